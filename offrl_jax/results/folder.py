"""The layout of a results folder, and its locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from offrl_jax.errors import ResultsError

_PRIVATE = ("checkpoints", "locks")


def plan_path(folder: Path) -> Path:
    """Where the plan lies."""
    return folder / "plan.json"


def row_path(folder: Path, run_id: str) -> Path:
    """Where the rows of a run lie."""
    return folder / "rows" / f"{run_id}.jsonl"


def metric_path(folder: Path, run_id: str) -> Path:
    """Where the training metrics of a run lie."""
    return folder / "metrics" / f"{run_id}.jsonl"


def checkpoint_path(folder: Path, run_id: str) -> Path:
    """The folder of a run's checkpoints."""
    return folder / _PRIVATE[0] / run_id


def lock_path(folder: Path, run_id: str) -> Path:
    """The lock of a job (or of `plan`, which no run is called)."""
    return folder / _PRIVATE[1] / f"{run_id}.lock"


def command_path(folder: Path) -> Path:
    """Where the commands lie that were given for a folder."""
    return folder / "commands.jsonl"


def files_below(folder: Path) -> list[Path]:
    """All files at or below a folder but checkpoints and locks, by path.

    Those come and go while other processes work, and nobody who reads results needs
    them; a folder that is gone when its turn comes is no error.
    """
    found: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _PRIVATE]
        found += [Path(root, name) for name in files]
    return sorted(found)


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Tries to hold `path` for the block; yields whether it is ours.

    The lock is the kernel's (`flock`): it ends with the process that holds it, however
    that ends.  The file stays, since removing it would let two processes hold one name.

    Raises:
      ResultsError: the lock file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ResultsError(
            f"{path}: cannot be locked ({error.strerror}); choose another "
            "results folder"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError as error:
            raise ResultsError(
                f"{path}: its file system has no locks ({error.strerror}); mount it "
                "with flock, or choose another results folder"
            ) from error
        else:
            yield True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(path: Path, wait_s: float = 10.0) -> Iterator[None]:
    """Holds `path` for the block, waiting up to `wait_s` seconds for another process.

    Raises:
      ResultsError: another process still holds it.
    """
    end = time.monotonic() + wait_s
    while True:
        with try_lock(path) as held:
            if held:
                yield
                return
        if time.monotonic() >= end:
            raise ResultsError(
                f"{path}: held by another process for over {wait_s:g} s; wait for it "
                "or end it"
            )
        time.sleep(0.02)
