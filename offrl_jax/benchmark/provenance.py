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
# What training is made of.  Sources of other rooms may change under a checkpoint.
_TRAINING_SOURCES = (
    "types.py",
    "constraint.py",
    "densities.py",
    "losses.py",
    "networks.py",
    "distributions.py",
    "sources.py",
    "population.py",
    "evaluation.py",
    "agents",
    "envs",
    "datasets",
    "catalogue.py",
    "benchmark/preparation.py",
    "benchmark/jobs.py",
    "benchmark/recording.py",
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


@functools.cache
def source_hash() -> str:
    """SHA-256 (16 digits) of the package's sources that training depends on."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for name in _TRAINING_SOURCES:
        root = package / name
        paths = sorted(root.rglob("*.py")) if root.is_dir() else [root]
        for path in paths:
            if path.is_file():
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
