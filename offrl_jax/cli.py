"""The `offrl` command.  Heavy imports happen inside the commands: help is instant."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg, subcommand

from offrl_jax.errors import OffrlError, UsageError

_Count = Annotated[int | None, arg(metavar="N")]
_Names = Annotated[tuple[str, ...], arg(metavar="NAME ...")]
_Folder = Annotated[Path | None, arg(metavar="DIR")]
_Settings = Annotated[tuple[str, ...], arg(metavar="NAME=VALUE"), UseAppendAction]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Run what is missing of a suite, then draw its leaderboard.

    Running it again continues where it was stopped or killed, and redraws when all is
    done.

    Example: offrl benchmark quick --agents bc iql --seeds 5
    """

    suite: Positional[Annotated[str | None, arg(metavar="SUITE")]] = None
    """quick, classic, neorl2, or the path of a suite file; the default is classic where
    there is an accelerator, else quick."""
    agents: _Names = ()
    """Only these agents: names, or NAME@PRESET. Default: the suite's."""
    tasks: _Names = ()
    """Only these tasks. Default: the suite's."""
    seeds: _Count = None
    """Runs per agent and task. Default: the suite's."""
    updates: _Count = None
    """Updates of the policy phase. Default: the suite's."""
    results: _Folder = None
    """Results folder. Default: results/SUITE."""
    max_parallel: _Count = None
    """Largest number of runs in one compiled program. Default: all that fit a shape."""
    skip_missing: bool = False
    """Leave out tasks whose data is absent, instead of refusing."""
    data_dir: _Folder = None
    """Data store. Default: $OFFRL_DATA, else a folder in the user's cache."""

    def run(self) -> int:
        """Runs and draws; the exit code is 0 when nothing is missing."""
        from offrl_jax.benchmark.runner import configure_jax
        from offrl_jax.benchmark.suites import load_suite

        configure_jax()
        suite = load_suite(self.suite or _default_suite())
        asked = {
            "agents": self.agents or None,
            "tasks": self.tasks or None,
            "seeds": self.seeds,
            "updates": self.updates,
        }
        changes = {name: value for name, value in asked.items() if value is not None}
        suite = dataclasses.replace(suite, **changes)
        folder = self.results or Path("results") / suite.name
        return _run_and_draw(
            suite,
            folder,
            self.data_dir,
            max_parallel=self.max_parallel,
            skip_missing=self.skip_missing,
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """Train and evaluate one agent on one or more tasks.

    Example: offrl run --agent td3_bc --task classic/pendulum-mixed-v0 --seeds 5
    --updates 20000 --set alpha=1.0 --results results/mine
    """

    agent: Annotated[str, arg(metavar="NAME[@PRESET]")]
    """Which algorithm (see: offrl agents), at its defaults or under a preset."""
    task: Annotated[tuple[str, ...], arg(metavar="TASK ...")]
    """Which task or tasks (see: offrl tasks)."""
    results: Annotated[Path, arg(metavar="DIR")]
    """Results folder."""
    seeds: Annotated[int, arg(metavar="N")] = 10
    """Runs per task: seeds 0 .. N-1."""
    updates: Annotated[int, arg(metavar="N")] = 100_000
    """Updates of the policy phase."""
    set: _Settings = ()
    """One setting, numeric or structural; repeatable."""
    episodes: Annotated[int, arg(metavar="N")] = 100
    """Evaluation episodes per run after the last update."""
    evaluations: Annotated[int, arg(metavar="N")] = 10
    """Points of the learning curve."""
    max_parallel: _Count = None
    """Largest number of runs in one compiled program."""
    data_dir: _Folder = None
    """Data store. Default: $OFFRL_DATA, else a folder in the user's cache."""

    def run(self) -> int:
        """Runs and draws; the exit code is 0 when nothing is missing."""
        from offrl_jax.benchmark.runner import configure_jax
        from offrl_jax.benchmark.suites import Protocol, Suite

        configure_jax()
        suite = Suite(
            name="run",
            description="",
            tasks=self.task,
            agents=(self.agent,),
            preset="",
            seeds=self.seeds,
            updates=self.updates,
            protocol=Protocol(self.episodes, self.evaluations),
        )
        return _run_and_draw(
            suite,
            self.results,
            self.data_dir,
            max_parallel=self.max_parallel,
            overrides=_parse_settings(self.set),
        )


@dataclasses.dataclass(frozen=True)
class Leaderboard:
    """Draw the leaderboard of a results folder; runs nothing.

    Example: offrl leaderboard results/quick --format md --out leaderboard.md
    """

    results: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Results folder."""
    format: Literal["table", "md", "csv", "json"] = "table"
    """What to write."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """File to write; default: the screen."""

    def run(self) -> int:
        """Draws."""
        # A benchmark that runs beside it keeps the accelerator's memory.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from offrl_jax.benchmark.runner import configure_jax

        configure_jax()
        from offrl_jax import leaderboard

        board = leaderboard.build(self.results)
        if self.out is None:
            _show(board, self.format)
            return 0
        _write(self.out, leaderboard.draw(board, self.format))
        print(f"wrote {self.out}")
        return 0


@dataclasses.dataclass(frozen=True)
class Agents:
    """List the agents, their presets and settings.

    Example: offrl agents td3_bc
    """

    name: Positional[Annotated[str | None, arg(metavar="NAME")]] = None
    """Only this one, with every setting and its default."""

    def run(self) -> int:
        """Prints."""
        from offrl_jax import reports

        reports.agents(self.name)
        return 0


@dataclasses.dataclass(frozen=True)
class Tasks:
    """List the tasks: dimensions, data at hand or how to get it.

    Example: offrl tasks neorl2
    """

    name: Positional[Annotated[str | None, arg(metavar="PART")]] = None
    """Only tasks whose id contains this."""
    data_dir: _Folder = None
    """Data store. Default: $OFFRL_DATA, else a folder in the user's cache."""

    def run(self) -> int:
        """Prints."""
        from offrl_jax import reports

        reports.tasks(_store(self.data_dir), self.name)
        return 0


@dataclasses.dataclass(frozen=True)
class DataList:
    """List the datasets in the store.

    Example: offrl data list
    """

    data_dir: _Folder = None
    """Data store. Default: $OFFRL_DATA, else a folder in the user's cache."""

    def run(self) -> int:
        """Prints."""
        from offrl_jax import reports

        reports.data_list(_store(self.data_dir))
        return 0


@dataclasses.dataclass(frozen=True)
class DataPrepare:
    """Generate the data of tasks that need no download.

    Example: offrl data prepare classic/pendulum-mixed-v0
    """

    tasks: Positional[Annotated[tuple[str, ...], arg(metavar="TASK ...")]] = ()
    """Task ids; default: the whole classic family."""
    data_dir: _Folder = None
    """Data store. Default: $OFFRL_DATA, else a folder in the user's cache."""

    def run(self) -> int:
        """Generates what is not there yet."""
        from offrl_jax import reports

        reports.data_prepare(_store(self.data_dir), self.tasks)
        return 0


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """Check every dataset of the store against its checksums and the schema.

    Example: offrl data check
    """

    data_dir: _Folder = None
    """Data store. Default: $OFFRL_DATA, else a folder in the user's cache."""

    def run(self) -> int:
        """Checks; the exit code is 3 if something is damaged."""
        from offrl_jax import reports

        return reports.data_check(_store(self.data_dir))


@dataclasses.dataclass(frozen=True)
class DataImport:
    """Put a file into the store, checked: official NeoRL-2 files, or your own .npz.

    Example: offrl data import DMSD-train.npz --task neorl2/DMSD-v1
    """

    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    """The file; it is copied, never changed."""
    task: Annotated[str, arg(metavar="TASK")]
    """neorl2/NAME-v1 for official files, local/NAME-v0 for your own."""
    split: Literal["train", "val"] | None = None
    """Which split the file is; official files are recognised by their checksum."""
    data_dir: _Folder = None
    """Data store. Default: $OFFRL_DATA, else a folder in the user's cache."""

    def run(self) -> int:
        """Imports."""
        from offrl_jax import reports

        reports.data_import(_store(self.data_dir), self.file, self.task, self.split)
        return 0


@dataclasses.dataclass(frozen=True)
class Data:
    """List, generate, check or import datasets.

    Example: offrl data import DMSD-train.npz --task neorl2/DMSD-v1
    """

    action: (
        Annotated[DataList, subcommand("list")]
        | Annotated[DataPrepare, subcommand("prepare")]
        | Annotated[DataCheck, subcommand("check")]
        | Annotated[DataImport, subcommand("import")]
    )

    def run(self) -> int:
        """Does what was asked."""
        return self.action.run()


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Show versions, devices and the data store, and what is missing.

    Example: offrl doctor
    """

    data_dir: _Folder = None
    """Data store. Default: $OFFRL_DATA, else a folder in the user's cache."""

    def run(self) -> int:
        """Prints."""
        from offrl_jax import reports
        from offrl_jax.benchmark.runner import configure_jax

        configure_jax()
        reports.doctor(_store(self.data_dir))
        return 0


Command = (
    Annotated[Benchmark, subcommand("benchmark")]
    | Annotated[Run, subcommand("run")]
    | Annotated[Leaderboard, subcommand("leaderboard")]
    | Annotated[Agents, subcommand("agents")]
    | Annotated[Tasks, subcommand("tasks")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Doctor, subcommand("doctor")]
)


def _default_suite() -> str:
    import jax

    return "quick" if jax.default_backend() == "cpu" else "classic"


def _store(data_dir: Path | None):
    from offrl_jax.datasets.store import Store, default_data_dir

    return Store(default_data_dir(data_dir))


def _parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set takes NAME=VALUE, got '{pair}'")
        settings[name] = value
    return settings


def _show(board: Any, style: str) -> None:
    """Prints a leaderboard as wide as the terminal."""
    from offrl_jax import leaderboard

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else 100
    print(leaderboard.draw(board, style, width=width, colour=terminal), end="")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _run_and_draw(suite, folder: Path, data_dir: Path | None, **options) -> int:
    from offrl_jax import leaderboard
    from offrl_jax.benchmark.progress import Progress
    from offrl_jax.benchmark.runner import run_suite

    with Progress() as progress:
        outcome = run_suite(suite, _store(data_dir), folder, progress, **options)
        progress.say(
            f"{outcome.ran} populations trained now, {outcome.already} runs were there"
        )
    if outcome.stopped:
        print(
            f"stopped; everything is saved in {folder}, the same command continues",
            file=sys.stderr,
        )
        return 130
    board = leaderboard.build(folder)
    _show(board, "table")
    for style in ("md", "csv", "json"):
        _write(folder / f"leaderboard.{style}", leaderboard.draw(board, style))
    print(f"rows: {folder}/rows/*.jsonl   tables: {folder}/leaderboard.{{md,csv,json}}")
    return 1 if outcome.failed or outcome.busy else 0


def _parse(arguments: Sequence[str]):
    """The command as a dataclass; tyro's box of an error becomes one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                Command,
                prog="offrl",
                description="Offline reinforcement learning in JAX, honestly compared.",
                args=arguments,
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_one_line(box.getvalue(), arguments)) from None


def _one_line(box: str, arguments: Sequence[str]) -> str:
    """What a box of tyro's says, without its help texts.

    In a box, a message stands at the margin, what it is about is indented by four and
    help texts by eight.
    """
    lines = []
    for line in box.splitlines():
        text = line.removeprefix("│ ").rstrip("│ ")
        indent = len(text) - len(text.lstrip())
        boring = text.startswith(("╭", "╰", "For full helptext", "Argument helptext"))
        if text.startswith(("Got errors", "Argument helptext")):
            break
        if not boring and text.strip("─ ") and indent <= 4:
            lines.append(text.strip())
    commands = [word for word in arguments if word.isalpha()]
    known = {"benchmark", "run", "leaderboard", "agents", "tasks", "data", "doctor"}
    known |= (
        {"list", "prepare", "check", "import"} if commands[:1] == ["data"] else set()
    )
    shown = " ".join(word for word in commands[:2] if word in known)
    return f"{' '.join(lines)} (see: offrl {shown}{' ' if shown else ''}--help)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors become one line on standard error and an exit code."""
    argv = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = _parse(argv or ["--help"]).run()
    except OffrlError as error:
        print(f"offrl: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("offrl: stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    raise SystemExit(code)


if __name__ == "__main__":
    main()
