"""Seconds of a large leaderboard: its bootstrap, and the whole command.

  python benchmarks/speed/leaderboard.py --agents 20 --tasks 30 --seeds 10 --repeats 5

Writes a results folder of made-up runs into a temporary folder, and times

- in this process, one agent's aggregates over 12 tasks x 10 seeds with all bootstrap
  replications, draws included, after compilation;
- `offrl leaderboard` over the whole folder as a process of its own, from start to end,
  once with an empty compilation cache and then with the one that this has filled;
- the same with `--format html`, which draws learning curves as well, of `--evaluations`
  rows a run (1, the last one, unless set), and the size of that page.

The table shows best, median and range: on a machine with other work the best says most,
and the CPU's seconds more than the clock's.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from offrl_jax.leaderboard import statistics
from offrl_jax.results import BEHAVIOUR, Row, row_path
from offrl_jax.results.rows import to_line

TASKS, SEEDS = 12, 10
"""Of the bootstrap that is timed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is made up, and how often it is measured.

    Attributes:
      agents: lines of the leaderboard.
      tasks: of every agent.
      seeds: runs per agent and task.
      episodes: of every run.
      evaluations: of every run; those before the last one are of ten episodes.
      seed: of the made-up returns.
      repeats: measurements of each.
    """

    agents: int = 20
    tasks: int = 30
    seeds: int = 10
    episodes: int = 100
    evaluations: int = 1
    seed: int = 0
    repeats: int = 5


def synthetic_rows(settings: Settings) -> list[Row]:
    """Valid rows, agents a few points apart, and one behaviour row per task."""
    rng = np.random.default_rng(settings.seed)
    rows = [
        _row(BEHAVIOUR, task, None, rng.normal(20.0, 10.0, settings.episodes))
        for task in range(settings.tasks)
    ]
    for agent in range(settings.agents):
        for task in range(settings.tasks):
            level = 40.0 + 2.0 * agent + rng.normal(0.0, 5.0)
            for seed in range(settings.seeds):
                centre = level + rng.normal(0.0, 8.0)
                scores = rng.normal(centre, 15.0, settings.episodes)
                name = f"agent_{agent:03d}"
                for k in range(1, settings.evaluations):
                    share = k / settings.evaluations
                    few = rng.normal(share * centre, 15.0, 10)
                    rows.append(_row(name, task, seed, few, round(100_000 * share)))
                rows.append(_row(name, task, seed, scores))
    return rows


def _row(
    agent: str, task: int, seed: int | None, scores: np.ndarray, step: int = 100_000
) -> Row:
    """A row whose returns are ten times the scores of its episodes."""
    data = agent == BEHAVIOUR
    return Row(
        run_id=f"synthetic-{agent}",
        suite="synthetic",
        role="test",
        agent=agent,
        config={"hidden": [256, 256]},
        setting="dataset" if data else "default",
        hyper={} if data else {"lr": 0.0003},
        task=f"synthetic/task-{task:02d}-v0",
        family="synthetic",
        recipe_hash=None,
        dataset_hash="0123456789abcdef",
        seed=seed,
        step=0 if data else step,
        updates_total=0 if data else 100_000,
        phase_updates={} if data else {"train": 100_000},
        protocol={"episodes": 100, "curve_episodes": 10},
        returns=(10.0 * scores).tolist(),
        lengths=[1000] * len(scores),
        successes=None,
        score=math.fsum(scores.tolist()) / len(scores),
        status="ok",
        split_changed=False,
        updates_per_s=None if data else 1000.0,
        wall_s=None if data else 100.0,
        compile_s=None if data else 2.0,
        eval_s=None if data else 1.0,
        device="made up",
        flags={},
        versions={},
        commit=None,
        population={} if data else {"members": 1, "devices": 1},
    )


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Writes a results folder, one file per agent."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        lines.setdefault(row.run_id, []).append(to_line(row) + "\n")
    row_path(folder, "any").parent.mkdir(parents=True)
    for run_id, own in lines.items():
        # Not by `RowFile`, which waits for the disk after every row.
        row_path(folder, run_id).write_text("".join(own), encoding="utf-8")


def time_bootstrap(repeats: int) -> list[float]:
    """Seconds of one agent's draws and intervals, after compilation."""
    rng = np.random.default_rng(0)
    count = np.full(TASKS, SEEDS, np.int32)
    found = []
    for repeat in range(repeats + 1):
        scores = rng.normal(60.0, 25.0, (TASKS, SEEDS)).astype(np.float32)
        start = time.perf_counter()
        drawn = statistics.draws(jax.random.key(repeat), count, slots=SEEDS)
        statistics.bootstrap(scores, count, drawn)
        found.append(time.perf_counter() - start)
    return found[1:]


def time_command(
    folder: Path, environment: Mapping[str, str], *options: str
) -> tuple[float, float]:
    """Seconds of `offrl leaderboard` from start to end, by the clock and of the CPU.

    Raises:
      RuntimeError: it failed; the message ends in its last line.
    """
    command = [sys.executable, "-m", "offrl_jax.cli", "leaderboard", str(folder)]
    command += options
    start, cpu_start = time.perf_counter(), _cpu_of_children()
    done = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, check=False
    )
    total = time.perf_counter() - start
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(
            f"offrl leaderboard exited with {done.returncode}: {lines[-1]}"
        )
    return total, _cpu_of_children() - cpu_start


def _cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def tabulate(measured: Mapping[str, Sequence[float]]) -> Table:
    """Best, median and range of the seconds of each."""
    table = Table(title="seconds")
    table.add_column("what")
    for name in ("best", "median", "range"):
        table.add_column(name, justify="right")
    for name, seconds in measured.items():
        table.add_row(
            name,
            f"{min(seconds):.2f}",
            f"{np.median(seconds):.2f}",
            f"{min(seconds):.2f}-{max(seconds):.2f}",
        )
    return table


def main(settings: Settings) -> None:
    """Measures and prints the table with its conditions."""
    load_before = os.getloadavg()[0]
    rows = synthetic_rows(settings)
    name = f"{statistics.REPLICATIONS:,} replications, {TASKS} tasks x {SEEDS} seeds"
    measured: dict[str, Sequence[float]] = {name: time_bootstrap(settings.repeats)}
    with tempfile.TemporaryDirectory() as folder:
        results, cache = Path(folder) / "results", Path(folder) / "cache"
        write_rows(results, rows)
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        name = "offrl leaderboard"
        cold = [time_command(results, environment)]
        warm = [time_command(results, environment) for _ in range(settings.repeats)]
        page = Path(folder) / "page.html"
        options = ("--format", "html", "--out", str(page))
        drawn = [
            time_command(results, environment, *options)
            for _ in range(settings.repeats + 1)
        ][1:]
        size = page.stat().st_size
    for what, runs in (
        (f"{name}, empty cache", cold),
        (f"{name}, filled cache", warm),
        (f"{name} --format html, filled cache", drawn),
    ):
        wall, cpu = zip(*runs, strict=True)
        measured[what] = wall
        measured[f"{what}, CPU"] = cpu
    console = Console()
    console.print(tabulate(measured))
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib", "numpy", "tyro", "rich")
    )
    console.print(
        f"{len(rows):,} rows: {settings.agents} agents, {settings.tasks} tasks, "
        f"{settings.seeds} seeds, {settings.episodes} episodes, "
        f"{settings.evaluations} evaluations; a page of {size / 1e6:.2f} MB; "
        f"{os.cpu_count()} cores "
        f"({platform.machine()}), load before {load_before:.2f}, Python "
        f"{platform.python_version()}, {versions}; {settings.repeats} repeats",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
