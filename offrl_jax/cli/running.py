"""From a request on the command line to a drawn leaderboard."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offrl_jax.errors import ResultsError, UsageError

if TYPE_CHECKING:
    from offrl_jax.benchmark.overview import Limits
    from offrl_jax.benchmark.suites import Suite
    from offrl_jax.cli.options import Where
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


def tell(line: str) -> None:
    """Shows a message about a results folder."""
    print(f"offrl: {line}", file=sys.stderr)


MESSAGES = 20
"""Lines about a results folder that are shown at once."""


def tell_some(lines: Iterable[str]) -> None:
    """Shows the first `MESSAGES` messages about a results folder, each once."""
    every = list(dict.fromkeys(lines))
    for line in every[:MESSAGES]:
        tell(line)
    if len(every) > MESSAGES:
        tell(
            f"and {len(every) - MESSAGES} more; offrl leaderboard lists what is absent"
        )


def write(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole: where that fails, the old one stands."""

    def fill(file: Path) -> None:
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content, encoding="utf-8")

    special = path.exists() and not path.is_file()  # such as /dev/stdout
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if special:
            fill(path)
            return
        try:
            fill(temporary)
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


COMMAND: ContextVar[tuple[str, ...]] = ContextVar("COMMAND", default=())
"""The words of the command that runs."""
BUSY = 5
"""Exit code of a command that left nothing but what other processes work on."""


def run_and_draw(
    suite: Suite,
    folder: Path,
    data_dir: Path | None,
    where: Where,
    *,
    limits: Limits,
    overrides: Mapping[str, str] | None = None,
    skip_missing: bool = False,
) -> int:
    """Runs what is missing of `suite`, then draws all that the folder holds.

    Returns:
      The exit code: 0; 1 if a job failed; `BUSY` if none did but other processes still
      work on some; 130 if stopped.

    Raises:
      OffrlError: for everything a user can cause, before anything is generated or
        written where that can be told.
    """
    import jax

    from offrl_jax import leaderboard, page
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
            limits=limits,
            overrides=overrides,
            executor=where.open(store),
            command=COMMAND.get(),
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
        tell(line)
    if outcome.busy:
        tell(
            f"other processes work on {len(outcome.busy)} of the populations in "
            f"{folder}; --wait waits for them and takes over what they leave"
        )
    code = 1 if outcome.failed else BUSY if outcome.busy else 0
    if suite.role == "tune":
        print(f"no leaderboard counts runs that tune; rows: {folder}/rows/*.jsonl")
        return code
    # On the CPU, as `offrl leaderboard` does: the same rows, the same digits.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        board = leaderboard.build(folder)
        drawn = page.render(folder)
    show(board, "table")
    for style in ("md", "csv", "json"):
        write(folder / f"leaderboard.{style}", leaderboard.draw(board, style))
    write(folder / "leaderboard.html", drawn)
    print(f"rows: {folder}/rows/*.jsonl   tables: {folder}/leaderboard.{{md,csv,json}}")
    print(f"page: {folder}/leaderboard.html, to be opened in a browser")
    print(
        f"metrics: {folder}/metrics/*.jsonl   figures: offrl curves {folder} --out FILE"
    )
    return code


def show_plan(
    suite: Suite,
    folder: Path,
    data_dir: Path | None,
    where: Where,
    limits: Limits,
    skip_missing: bool,
) -> int:
    """Prints what `run_and_draw` would do, and does none of it.

    Raises:
      OffrlError: as `run_and_draw`.
    """
    from offrl_jax import reports
    from offrl_jax.benchmark.runner import look_ahead

    store = open_store(data_dir)
    seen = look_ahead(
        suite,
        store,
        folder,
        skip_missing=skip_missing,
        limits=limits,
        executor=where.open(store),
    )
    reports.plan(seen)
    return 0


COLUMNS = 4
"""Tasks beside each other in a table of metrics."""


def show_final_metrics(folder: Path, agent: str, tasks: Sequence[str]) -> None:
    """Prints where every training metric of an agent ended, as medians over seeds."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from offrl_jax import figures

    # What is torn was told when the run began.
    runs = figures.read_runs(
        folder, lambda line: None, tasks=list(dict.fromkeys(tasks))
    )
    finals = figures.final_values([run for run in runs if run.cell.agent == agent])
    if not finals:
        print(
            f"no training metrics of {agent} are in {folder}: older versions kept none"
        )
        return
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, highlight=False, markup=False)
    for label, group in groupby(finals, key=lambda final: final.label):
        found = list(group)
        value = {(f.task, f.phase, f.metric): f for f in found}
        named = list(dict.fromkeys(final.task for final in found))
        lines = list(dict.fromkeys((final.phase, final.metric) for final in found))
        phased = len({phase for phase, _ in lines}) > 1
        for first in range(0, len(named), COLUMNS):
            shown = named[first : first + COLUMNS]
            table = Table("metric", box=box.SIMPLE_HEAD, show_edge=False)
            for task in shown:
                table.add_column(task, justify="right")
            for phase, metric in lines:
                ends = [value.get((task, phase, metric)) for task in shown]
                table.add_row(
                    f"{metric} ({phase})" if phased else metric, *map(_final, ends)
                )
            print(f"\nlast values of {label}, median over seeds")
            console.print(table)


def _final(final: Any) -> str:
    """A cell of the table: four digits, and how many runs it leaves out."""
    if final is None:
        return "-"
    diverged = f" ({final.diverged} diverged)" if final.diverged else ""
    return (f"{final.value:.4g}" if final.seeds else "-") + diverged
