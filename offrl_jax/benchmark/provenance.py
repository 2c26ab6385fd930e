"""What a row needs to be traced back: versions, commit, sources, device, flags."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "offrl-jax")
# Rooms and files that no trained number depends on: they may change under a checkpoint.
# All others count, so that a room that is added later does, too.
_NOT_TRAINING = frozenset(
    {
        "__init__.py",
        "api.py",
        "cli",
        "embedding.py",
        "errors.py",
        "figures",
        "leaderboard",
        "page",
        "reports.py",
        "results",
        "suites",
        "version.py",
        "benchmark/__init__.py",
        "benchmark/checkpoints.py",
        "benchmark/executors.py",
        "benchmark/memory.py",
        "benchmark/overview.py",
        "benchmark/command_lines.py",
        "benchmark/planning.py",
        "benchmark/progress.py",
        "benchmark/provenance.py",
        "benchmark/ray_executor.py",
        "benchmark/ray_worker.py",
        "benchmark/reproduction.py",
        "benchmark/rules.py",
        "benchmark/runner.py",
        "benchmark/speeds.py",
        "benchmark/splitting.py",
        "benchmark/search.py",
        "benchmark/selection.py",
        "benchmark/suites.py",
    }
)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def training_sources(package: Path) -> list[Path]:
    """The sources in the folder `package` that trained numbers depend on, sorted."""

    def counts(path: Path) -> bool:
        inside = path.relative_to(package)
        rooms = (inside, *inside.parents)
        return not any(room.as_posix() in _NOT_TRAINING for room in rooms)

    return sorted(filter(counts, package.rglob("*.py")))


@functools.cache
def source_hash() -> str:
    """SHA-256 (16 digits) of the package's sources that training depends on."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in training_sources(package):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def commit() -> str:
    """The git commit of the sources (`-dirty` if they were edited), else a version."""
    package = Path(__file__).resolve().parent.parent
    git = ("git", "-C", str(package))
    try:
        run = functools.partial(
            subprocess.run, capture_output=True, text=True, check=True, timeout=10
        )
        head = run([*git, "rev-parse", "HEAD"]).stdout.strip()
        edited = run([*git, "status", "--porcelain", "--", str(package)]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"offrl-jax {versions()['offrl-jax']}"
    return head + ("-dirty" if edited else "")


def device() -> str:
    """The devices of this process in words, such as `2 x cpu (x86_64, 2 cores)`."""
    devices = jax.local_devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        kind = f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    return f"{len(devices)} x {kind}"


def flags() -> dict[str, str]:
    """Settings that change numbers: precision, determinism, platform."""
    platform_name = jax.local_devices()[0].platform
    return {
        "platform": platform_name,
        "matmul_precision": jax.config.values["jax_default_matmul_precision"]
        or ("float32" if platform_name == "cpu" else "default"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
