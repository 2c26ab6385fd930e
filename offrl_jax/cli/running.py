"""From a request on the command line to a drawn leaderboard."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offrl_jax.errors import ResultsError, UsageError

if TYPE_CHECKING:
    from offrl_jax.benchmark.suites import Suite
    from offrl_jax.datasets.store import Store


def default_suite() -> str:
    """`classic` where there is an accelerator, else `quick`."""
    import jax

    return "quick" if jax.default_backend() == "cpu" else "classic"


def open_store(data_dir: Path | None) -> Store:
    """The data store of a command."""
    from offrl_jax.datasets.store import Store, default_data_dir

    return Store(default_data_dir(data_dir))


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` strings by name.

    Raises:
      UsageError: another form, or the same name twice.
    """
    settings: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set takes NAME=VALUE, got '{pair}'")
        if name in settings:
            raise UsageError(
                f"--set {name} is given twice: {settings[name]} and {value}"
            )
        settings[name] = value
    return settings


def show(board: Any, style: str) -> None:
    """Prints a leaderboard as wide as the terminal."""
    from offrl_jax import leaderboard

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else 100
    print(leaderboard.draw(board, style, width=width, colour=terminal), end="")


def write(path: Path, text: str) -> None:
    """Replaces a file as a whole: where that fails, the old one stands."""
    special = path.exists() and not path.is_file()  # such as /dev/stdout
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if special:
            path.write_text(text, encoding="utf-8")
            return
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ResultsError(
            f"{path}: cannot be written ({error.strerror}); free space or choose "
            "another file"
        ) from error


def _check_folder(folder: Path) -> None:
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "not writable" if parent.is_dir() else "not a folder"
        raise ResultsError(
            f"{folder}: cannot be written ({parent} is {why}); choose another "
            "results folder"
        )


def run_and_draw(
    suite: Suite,
    folder: Path,
    data_dir: Path | None,
    *,
    overrides: Mapping[str, str] | None = None,
    max_parallel: int | None = None,
    skip_missing: bool = False,
) -> int:
    """Runs what is missing of `suite`, then draws all that the folder holds.

    Returns:
      The exit code: 0; 1 if a job failed or is another process's; 130 if stopped.

    Raises:
      OffrlError: for everything a user can cause, before anything is generated or
        written where that can be told.
    """
    import jax

    from offrl_jax import leaderboard
    from offrl_jax.benchmark.progress import Progress
    from offrl_jax.benchmark.runner import run_suite

    store = open_store(data_dir)
    _check_folder(folder)
    with Progress() as progress:
        outcome = run_suite(
            suite,
            store,
            folder,
            progress,
            skip_missing=skip_missing,
            max_parallel=max_parallel,
            overrides=overrides,
        )
        progress.say(
            f"{outcome.ran} populations trained now, {outcome.already} runs were there"
        )
    if outcome.stopped:
        print(
            f"stopped; everything is saved in {folder}, the same command continues",
            file=sys.stderr,
        )
        return 130
    for line in outcome.failed:
        print(f"offrl: {line}", file=sys.stderr)
    # On the CPU, as `offrl leaderboard` does: the same rows, the same digits.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        board = leaderboard.build(folder)
    show(board, "table")
    for style in ("md", "csv", "json"):
        write(folder / f"leaderboard.{style}", leaderboard.draw(board, style))
    print(f"rows: {folder}/rows/*.jsonl   tables: {folder}/leaderboard.{{md,csv,json}}")
    return 1 if outcome.failed or outcome.busy else 0
