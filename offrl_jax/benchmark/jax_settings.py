"""How every command sets up JAX; apart from the runner, whose imports take longer."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import jax


def cache_folder() -> Path:
    """The user's cache for compiled programs (`XDG_CACHE_HOME` or `~/.cache`)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "offrl_jax" / "xla"


def configure_jax(*, only_cpu: bool = False) -> None:
    """Settings of every run: one CPU device per core, persistent compilation cache.

    With `only_cpu` this process leaves accelerators to others, its children included.
    Must be called before JAX touches a device; without effect on the number of devices
    afterwards.  On CPU, members spread over one virtual device per core train 1.4 to 2
    times as fast as on a single one (benchmarks/speed/README.md).
    """
    if only_cpu:
        # Not by JAX_PLATFORMS, which children would inherit.
        jax.config.update("jax_platforms", "cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    with_default = "xla_force_host_platform_device_count" not in os.environ.get(
        "XLA_FLAGS", ""
    )
    if with_default and "JAX_NUM_CPU_DEVICES" not in os.environ:
        # JAX refuses once it holds its devices, as in a notebook or a test.
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cores or os.cpu_count() or 1)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    if (
        not only_cpu
        and jax.default_backend() != "cpu"
        and not jax.config.values["jax_default_matmul_precision"]
    ):
        # Left alone, recent NVIDIA GPUs multiply in TF32 and TPUs in bfloat16.
        jax.config.update("jax_default_matmul_precision", "float32")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
