"""Every command as a dataclass: tyro makes options and help texts of it.

Heavy imports happen inside the commands, so that help is instant.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand

from offrl_jax.cli.compare_command import Compare
from offrl_jax.cli.data_commands import Data
from offrl_jax.cli.figures_command import Figures
from offrl_jax.cli.options import (
    HERE,
    Amount,
    Count,
    DataDir,
    Folder,
    Name,
    Names,
    Settings,
    Where,
)
from offrl_jax.cli.reproduce_command import Reproduce
from offrl_jax.cli.running import (
    default_suite,
    open_store,
    parse_settings,
    run_and_draw,
    show,
    show_final_metrics,
    show_plan,
    tell,
    tell_some,
    write,
)
from offrl_jax.cli.tuning_command import Tuning
from offrl_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Run what is missing of a suite, then draw its leaderboard.

    Running it again continues where it was stopped or killed, and redraws when all is
    done.

    Example: offrl benchmark quick --agents bc iql --seeds 5
    """

    suite: Positional[
        Annotated[str | None, arg(metavar="[SUITE]", help_behavior_hint="")]
    ] = None
    """A suite's name, such as quick, classic, neorl2 or onpolicy, or a file. Default:
    quick, on an accelerator classic."""
    agents: Names = None
    """Only these agents: names, or NAME@PRESET. Default: the suite's."""
    tasks: Names = None
    """Only these tasks. Default: the suite's."""
    seeds: Count = None
    """Runs per agent and task. Default: the suite's."""
    updates: Count = None
    """Updates of the policy phase. Default: the suite's."""
    results: Folder = None
    """Results folder. Default: results/SUITE."""
    max_parallel: Count = None
    """Largest number of runs in one compiled program. Default: all of one shape that
    fit into memory."""
    waves: Annotated[int, arg(metavar="N")] = 1
    """Train the seeds in N groups, every agent's first group before any second one: a
    leaderboard of all agents exists early."""
    memory: Amount = None
    """GiB that a program may use on each device, on a CPU in all. Default: most of what
    is free."""
    plan: bool = False
    """Only show what would be run, with memory and time. Writes nothing."""
    skip_missing: bool = False
    """Leave out tasks whose data is absent, instead of refusing."""
    data_dir: DataDir = None
    where: Where = HERE

    def run(self) -> int:
        """Runs and draws; the exit code is 0 when nothing is missing."""
        from offrl_jax.benchmark.overview import Limits
        from offrl_jax.benchmark.suites import load_suite

        self.where.configure_jax()
        suite = load_suite(self.suite or default_suite())
        asked = {
            "agents": self.agents,
            "tasks": self.tasks,
            "seeds": self.seeds,
            "updates": self.updates,
        }
        changes = {name: value for name, value in asked.items() if value is not None}
        for name, value in changes.items():
            if value == ():
                raise UsageError(f"--{name} needs at least one name")
        suite = dataclasses.replace(suite, **changes)
        folder = self.results or Path("results") / suite.name
        limits = Limits(self.max_parallel, self.waves, self.memory)
        if self.plan:
            return show_plan(
                suite, folder, self.data_dir, self.where, limits, self.skip_missing
            )
        return run_and_draw(
            suite,
            folder,
            self.data_dir,
            self.where,
            limits=limits,
            skip_missing=self.skip_missing,
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """Train and evaluate one agent on one or more tasks.

    Example: offrl run --agent bc --task classic/dmsd-mixed-v0 --set lr=0.001 \\
      --results results/mine
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
    pretraining_updates: Annotated[int, arg(metavar="N", help_behavior_hint="")] = 0
    """Updates of the phases before it. Default: a tenth of --updates."""
    set: Settings = ()
    """One setting (see: offrl agents NAME); repeatable."""
    episodes: Annotated[int, arg(metavar="N")] = 100
    """Evaluation episodes per run after the last update."""
    evaluations: Annotated[int, arg(metavar="N")] = 10
    """Points of the learning curve."""
    max_parallel: Count = None
    """Largest number of runs in one compiled program."""
    memory: Amount = None
    """GiB that a program may use on each device, on a CPU in all. Default: most of what
    is free."""
    data_dir: DataDir = None
    where: Where = HERE

    def run(self) -> int:
        """Runs and draws; the exit code is 0 when nothing is missing."""
        from offrl_jax.benchmark.overview import Limits
        from offrl_jax.benchmark.suites import Protocol, Suite

        self.where.configure_jax()
        suite = Suite(
            name="run",
            description="",
            tasks=self.task,
            agents=(self.agent,),
            preset="",
            seeds=self.seeds,
            updates=self.updates,
            protocol=Protocol(self.episodes, self.evaluations),
            pretraining_updates=self.pretraining_updates,
        )
        code = run_and_draw(
            suite,
            self.results,
            self.data_dir,
            self.where,
            limits=Limits(self.max_parallel, memory_gib=self.memory),
            overrides=parse_settings(self.set),
        )
        if code == 0:
            show_final_metrics(self.results, self.agent, self.task)
        return code


@dataclasses.dataclass(frozen=True)
class Leaderboard:
    """Draw the leaderboard of a results folder; runs nothing.

    Example: offrl leaderboard results/quick --format html --out leaderboard.html
    """

    results: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Results folder."""
    format: Literal["table", "md", "latex", "csv", "json", "html"] = "table"
    """What to write; html is one page that needs no network."""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """File to write. Default: the screen."""
    pool_protocols: bool = False
    """Let runs that differ in evaluation episodes, curve or seed share a table."""
    serve: bool = False
    """Serve the page on this machine, and follow a benchmark that runs."""
    port: Annotated[int, arg(metavar="N")] = 8470
    """Where to serve it."""

    def run(self) -> int:
        """Draws."""
        if self.serve and (self.out is not None or self.format != "table"):
            raise UsageError("--serve draws the page; leave out --format and --out")
        # A benchmark that runs beside it keeps the accelerator's memory.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from offrl_jax.benchmark.jax_settings import configure_jax

        configure_jax()
        from offrl_jax import leaderboard, page

        if self.serve:
            pooled = self.pool_protocols
            with page.server(self.results, self.port, pool_protocols=pooled) as serving:
                host, port = serving.server_address[:2]
                print(f"http://{host!s}:{port} follows {self.results}; Ctrl-C stops it")
                sys.stdout.flush()
                serving.serve_forever()
        if self.format == "html":
            content = page.render(self.results, pool_protocols=self.pool_protocols)
            if self.out is None:
                print(content, end="")
                return 0
            write(self.out, content)
            print(f"wrote {self.out}")
            return 0
        board = leaderboard.build(self.results, self.pool_protocols)
        if self.out is None:
            show(board, self.format)
            return 0
        write(self.out, leaderboard.draw(board, self.format))
        print(f"wrote {self.out}")
        return 0


@dataclasses.dataclass(frozen=True)
class Curves:
    """Draw training metrics of a results folder against updates; runs nothing.

    A panel per metric and task, a thin line per seed, the median bold.

    Example: offrl curves results/quick --metrics q_mean score --agent td3_bc iql \
      --out curves.png
    """

    results: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Results folder."""
    out: Annotated[Path, arg(metavar="FILE")]
    """File to write: .png, .pdf or .svg."""
    metrics: Names = None
    """Metrics; score and return are the evaluations'. Default: all recorded ones."""
    agent: Names = None
    """Only these agents: names, or NAME@PRESET. Default: all."""
    task: Names = None
    """Only these tasks. Default: all."""

    def run(self) -> int:
        """Draws."""
        for name in ("metrics", "agent", "task"):
            if getattr(self, name) == ():
                raise UsageError(f"--{name} needs at least one name")
        from offrl_jax import figures

        suffix = figures.check_suffix(self.out)
        runs = figures.read_runs(self.results, tell, self.agent, self.task)
        panels = figures.panels(runs, self.metrics)
        write(self.out, figures.render(figures.draw(panels), suffix))
        print(f"wrote {self.out}")
        return 0


@dataclasses.dataclass(frozen=True)
class Progress:
    """Draw scores against updates and seconds of training; runs nothing.

    Per section of the leaderboard: the interquartile mean over tasks and seeds of every
    agent, and its mean on every task, with 95 % bands.

    Example: offrl progress results/quick --agent td3_bc iql --out progress.png
    """

    results: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Results folder."""
    out: Annotated[Path, arg(metavar="FILE")]
    """File to write: .png, .pdf or .svg; the numbers go beside it as .csv."""
    agent: Names = None
    """Only these agents: names, or NAME@PRESET. Default: all."""
    task: Names = None
    """Only these tasks, the interquartile mean is over them. Default: all."""

    def run(self) -> int:
        """Draws."""
        for name in ("agent", "task"):
            if getattr(self, name) == ():
                raise UsageError(f"--{name} needs at least one name")
        # A benchmark that runs beside it keeps the accelerator's memory.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from offrl_jax.benchmark.jax_settings import configure_jax

        configure_jax()
        from offrl_jax import figures, leaderboard

        suffix = figures.check_suffix(self.out)
        sections, messages = leaderboard.progress_of(
            self.results, self.agent, self.task
        )
        figure = figures.render(figures.draw_progress(sections), suffix)
        table = self.out.with_suffix(".csv")
        write(table, leaderboard.progress_csv(sections))
        write(self.out, figure)
        tell_some([*messages, *(line for own in sections for line in own.messages)])
        print(f"wrote {self.out} and {table}")
        return 0


@dataclasses.dataclass(frozen=True)
class Embed:
    """Draw the critic's embeddings of state-action pairs in two dimensions.

    The last hidden layer of a trained run's first critic at pairs of the task's data,
    projected by t-SNE, coloured by reward, return-to-go and Q.  Needs the extra embed.

    Example: offrl embed results/quick --agent iql --task classic/pendulum-mixed-v0 \
      --out embed.png
    """

    results: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Results folder, with the run's checkpoint."""
    out: Annotated[Path, arg(metavar="FILE")]
    """File to write: .png, .pdf or .svg; the numbers go beside it as .csv."""
    agent: Name = None
    """Which agent, where there are several: a name, or NAME@PRESET."""
    task: Name = None
    """Which task, where there are several."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Which seed."""
    setting: Name = None
    """Which setting, where there are several."""
    run_id: Name = None
    """Which job, where there are several of the same agent, task and setting."""
    pairs: Count = None
    """How many pairs. Default: 2000, or all if the data hold fewer."""
    random_seed: Annotated[int, arg(metavar="N")] = 0
    """Of the draw of the pairs and of the projection."""
    data_dir: DataDir = None

    def run(self) -> int:
        """Draws."""
        # A benchmark that runs beside it keeps the accelerator's memory.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from offrl_jax.benchmark.jax_settings import configure_jax

        configure_jax()
        from offrl_jax import embedding, figures

        suffix = figures.check_suffix(self.out)
        found, title = embedding.embed_run(
            self.results,
            open_store(self.data_dir),
            tell,
            seed=self.seed,
            agent=self.agent,
            task=self.task,
            setting=self.setting,
            run_id=self.run_id,
            pairs=self.pairs,
            random_seed=self.random_seed,
        )
        figure = figures.render(embedding.draw(found, title), suffix)
        table = self.out.with_suffix(".csv")
        write(table, embedding.to_csv(found))
        write(self.out, figure)
        print(f"wrote {self.out} and {table}, {len(found.q)} pairs")
        return 0


@dataclasses.dataclass(frozen=True)
class Agents:
    """List the agents, their presets and settings.

    Example: offrl agents td3_bc
    """

    name: Positional[
        Annotated[str | None, arg(metavar="[NAME]", help_behavior_hint="")]
    ] = None
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

    name: Positional[
        Annotated[str | None, arg(metavar="[PART]", help_behavior_hint="")]
    ] = None
    """Only tasks whose id contains this."""
    data_dir: DataDir = None

    def run(self) -> int:
        """Prints."""
        from offrl_jax import reports

        reports.tasks(open_store(self.data_dir), self.name)
        return 0


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Show versions, devices and the data store, and what is missing.

    Example: offrl doctor
    """

    data_dir: DataDir = None

    def run(self) -> int:
        """Prints."""
        from offrl_jax import reports
        from offrl_jax.benchmark.jax_settings import configure_jax

        configure_jax()
        reports.doctor(open_store(self.data_dir))
        return 0


Command = (
    Annotated[Benchmark, subcommand("benchmark")]
    | Annotated[Run, subcommand("run")]
    | Annotated[Leaderboard, subcommand("leaderboard")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Curves, subcommand("curves")]
    | Annotated[Progress, subcommand("progress")]
    | Annotated[Figures, subcommand("figures")]
    | Annotated[Tuning, subcommand("tuning")]
    | Annotated[Reproduce, subcommand("reproduce")]
    | Annotated[Embed, subcommand("embed")]
    | Annotated[Agents, subcommand("agents")]
    | Annotated[Tasks, subcommand("tasks")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Doctor, subcommand("doctor")]
)
