"""Runs `offrl` in the test's own process, and makes files to run it on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from offrl_jax.cli import main

USAGE, DATA, RESULTS = 2, 3, 4
TINY = "local/tiny-v0"
CLI = ("-m", "offrl_jax.cli")
RUN = ("run", "--agent", "bc", "--task", TINY, "--results", "out")
SMALL = ("--seeds", "2", "--updates", "40", "--episodes", "3", "--evaluations", "2")
SETTINGS = ("--set", "hidden=8,8", "--set", "batch_size=16")


def arrays(episodes: int = 6, length: int = 5) -> dict[str, np.ndarray]:
    """Time-limited episodes with the dimensions of the pendulum."""
    rng = np.random.default_rng(0)
    n = episodes * length
    path = rng.normal(size=(episodes, length + 1, 3)).astype(np.float32)
    return {
        "obs": path[:, :-1].reshape(n, 3),
        "action": rng.uniform(-1, 1, size=(n, 1)).astype(np.float32),
        "reward": rng.normal(size=n).astype(np.float32),
        "next_obs": path[:, 1:].reshape(n, 3),
        "terminated": np.zeros(n, bool),
        "truncated": np.arange(1, n + 1) % length == 0,
        "env_id": np.array("classic/pendulum-v0"),
    }


def write_npz(path: Path, **changes: np.ndarray | None) -> Path:
    fields = {**arrays(), **changes}
    np.savez(path, **{k: v for k, v in fields.items() if v is not None})
    return path


def offrl(*arguments: str) -> int:
    """Runs the command in this process; the exit code."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def settings(folder: Path) -> Mapping[str, str]:
    """Environment variables that keep a command away from the user's own folders."""
    return {
        "OFFRL_DATA": str(folder / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "80",
    }
