"""Kills a benchmark with SIGKILL at random moments and compares what comes out.

  python benchmarks/faults/kill.py benchmarks/suites/faults.toml --kills 20
  python benchmarks/faults/kill.py faults --executor ray --kills 20

The suite is run twice, in `OUT/whole` and in `OUT/EXECUTOR`.  The first run is left
alone.  The second is killed whenever its recorded metrics reach one of `--kills` random
counts and up to half a minute, seeded, has passed; then the same command goes on.  With
Ray every other kill hits a worker and the command stays, the others hit the command
itself.  At the end all rows and metrics must be those of the first run, bit for bit,
each once.  The exit code is 0 if they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from offrl_jax.errors import ResultsError
from offrl_jax.results import read_metrics, read_rows

POLL_SECONDS = 0.05
JITTER_SECONDS = 30.0
"""Longest pause between a count and its kill: that between two checkpoints."""
AGAIN = 20
"""How often the last command may be repeated, because of jobs that it left."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is killed, and how often.

    Attributes:
      suite: name, or file.
      executor: of the run that is killed.
      kills: how often.
      seed: of the moments.
      out: folder for both runs and the report.
    """

    suite: tyro.conf.Positional[str]
    executor: Literal["local", "ray"] = "local"
    kills: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    seed: int = 0
    out: Path = Path("build/faults")


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
      victim: `command` or `worker`.
      points: metrics recorded until then.
      lost_s: seconds of work that no checkpoint held: since the job's newest one, or
        since the process took the job (the first one of a process: since it was
        started), whichever came last; of several jobs that die at once the longest; 0
        where none was worked on.
      starting: whether the process had saved nothing of that job yet, so that its
        compilation, and of a first job the process' start, are part of the loss.
    """

    victim: str
    points: int
    lost_s: float
    starting: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """What came out; every number but the times must be zero or equal."""

    suite: str
    executor: str
    kills: Sequence[Kill]
    whole_s: float
    killed_s: float
    rows: int
    rows_missing: int
    rows_twice: int
    rows_different: int
    metrics: int
    metrics_different: int

    @property
    def equal(self) -> bool:
        """Whether nothing was lost, doubled or changed."""
        return not (
            self.rows_missing
            or self.rows_twice
            or self.rows_different
            or self.metrics_different
        )


def begin(settings: Settings, folder: Path, executor: str) -> subprocess.Popen:
    """Starts the benchmark as a user would, its words in a file beside the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = (sys.executable, "-m", "offrl_jax.cli", "benchmark", settings.suite)
    options = ("--results", str(folder), "--executor", executor)
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def count(folder: Path, kind: str) -> int:
    """Lines of all rows or metrics."""
    return sum(
        path.read_bytes().count(b"\n") for path in folder.glob(f"{kind}/*.jsonl")
    )


def holders(folder: Path) -> dict[int, str]:
    """The run id of the job whose lock file is open, by process (Linux)."""
    locks = folder.absolute() / "locks"
    found = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = Path(os.readlink(link))
        except OSError:
            continue
        if target.parent == locks and target.stem != "plan":
            found[int(link.parts[2])] = target.name.removesuffix(".lock")
    return dict(sorted(found.items()))


def began_at(pid: int) -> float:
    """When a process was started, in seconds since the epoch (Linux)."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def saved_at(folder: Path, run_id: str) -> float:
    """When the job's newest checkpoint was written, of any part of it; 0 without."""
    of_job = folder / "checkpoints" / run_id
    found = [0.0]
    for pattern in ("[0-9]*", "part-*/[0-9]*"):
        for path in of_job.glob(pattern):
            # Of two generations the older one goes at any moment.
            with contextlib.suppress(FileNotFoundError):
                found.append(path.stat().st_mtime)
    return max(found)


class Taken(NamedTuple):
    """The job that a process has, and since when: of its first one, since its start."""

    run_id: str
    since: float


def note_taken(taken: dict[int, Taken], jobs: Mapping[int, str], now: float) -> None:
    """Brings `taken` up to date with `holders`, called again and again."""
    for pid, run_id in jobs.items():
        before = taken.get(pid)
        if before is None:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                taken[pid] = Taken(run_id, began_at(pid))
        elif before.run_id != run_id:
            taken[pid] = Taken(run_id, now)


def lost_work(folder: Path, dying: Sequence[Taken], now: float) -> tuple[float, bool]:
    """`lost_s` and `starting` if at `now` the processes of these jobs are killed."""
    lost = []
    for run_id, since in dying:
        saved = saved_at(folder, run_id)
        lost.append((now - max(since, saved), since > saved))
    return max(lost, default=(0.0, True))


def run_and_kill(settings: Settings, folder: Path, total: int) -> list[Kill]:
    """Runs the suite to its end, with kills on the way.

    There may be fewer than asked for: a worker is killed only while there is one.
    """
    moments = random.Random(settings.seed)
    goals = sorted(
        int(moments.uniform(0.0, 0.95) * total) for _ in range(settings.kills)
    )
    kills: list[Kill] = []
    taken: dict[int, Taken] = {}
    process = begin(settings, folder, settings.executor)
    for number, goal in enumerate(goals):
        at_worker = settings.executor == "ray" and number % 2 == 0
        # Not beyond the next goal, or the run would be over before its last kill.
        limit = goals[number + 1] if number + 1 < len(goals) else int(0.98 * total)
        due = None
        while True:
            if process.poll() is not None:
                process = begin(settings, folder, settings.executor)
            points, now = count(folder, "metrics"), time.monotonic()
            if due is None and points >= goal:
                due = now + moments.uniform(0.0, JITTER_SECONDS)
            jobs = holders(folder)
            note_taken(taken, jobs, time.time())
            pids = list(jobs) if at_worker else [process.pid]
            is_over = points == total and not pids
            if is_over or (
                due is not None and pids and (now >= due or points >= limit)
            ):
                break
            time.sleep(POLL_SECONDS)
        if is_over:
            break
        pid = moments.choice(pids)
        # With the command die its workers.
        dying = [pid] if at_worker else jobs
        known = [taken[one] for one in dying if one in taken]
        lost = lost_work(folder, known, time.time())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            kills.append(Kill("worker" if at_worker else "command", points, *lost))
        if not at_worker:
            process.wait()
    for _ in range(AGAIN):
        if process.wait() == 0 and count(folder, "metrics") == total:
            return kills
        process = begin(settings, folder, settings.executor)
    raise ResultsError(f"{folder}: unfinished; see {folder.with_suffix('.log')}")


def compare(whole: Path, killed: Path) -> tuple[int, int, int, int, int, int]:
    """Rows, missing, twice and different ones; metrics, and different ones."""

    def rows(folder: Path) -> dict:
        found = read_rows(folder, lambda line: None)
        return {row.key: row.row_id for row in found}

    def metrics(folder: Path) -> dict:
        return {point.key: point for point in read_metrics(folder, lambda line: None)}

    want, got = rows(whole), rows(killed)
    want_points, got_points = metrics(whole), metrics(killed)
    lines = Counter(
        tuple(record[name] for name in ("run_id", "task", "setting", "seed", "step"))
        for path in killed.glob("rows/*.jsonl")
        for record in map(json.loads, path.read_text().splitlines())
    )
    return (
        len(want),
        len(want.keys() - got.keys()),
        sum(number - 1 for number in lines.values()),
        sum(got[key] != want.get(key) for key in got),
        len(want_points),
        sum(
            got_points.get(key) != want_points.get(key)
            for key in want_points.keys() | got_points.keys()
        ),
    )


def table(report: Report) -> Table:
    """The report for people."""
    drawn = Table(title=f"{report.suite}, {report.executor}", show_header=False)
    victims = Counter(kill.victim for kill in report.kills)
    by_victim = ", ".join(f"{number} of a {name}" for name, number in victims.items())
    drawn.add_row("kills", f"{len(report.kills)} ({by_victim})")
    for starting, when in ((False, "after a checkpoint"), (True, "before the first")):
        lost = [kill.lost_s for kill in report.kills if kill.starting is starting]
        if lost:
            middle = statistics.median(lost)
            drawn.add_row(
                f"seconds of work lost, {when}",
                f"median {middle:.1f}, most {max(lost):.1f} (of {len(lost)})",
            )
    drawn.add_row("undisturbed, by this process", f"{report.whole_s:.0f} s")
    drawn.add_row("killed and continued", f"{report.killed_s:.0f} s")
    drawn.add_row("rows compared", str(report.rows))
    drawn.add_row("rows missing", str(report.rows_missing))
    drawn.add_row("rows twice", str(report.rows_twice))
    drawn.add_row("rows different", str(report.rows_different))
    drawn.add_row("metrics compared", str(report.metrics))
    drawn.add_row("metrics different", str(report.metrics_different))
    return drawn


def main(settings: Settings) -> int:
    """Runs both, compares, reports."""
    whole, killed = settings.out / "whole", settings.out / settings.executor
    if killed.exists():
        print(f"{killed} exists; remove it or choose another --out", file=sys.stderr)
        return 2
    clock = whole.with_suffix(".seconds")
    if not clock.exists():
        started = time.monotonic()
        if begin(settings, whole, "local").wait() != 0:
            print(f"failed; see {whole.with_suffix('.log')}", file=sys.stderr)
            return 1
        clock.write_text(str(time.monotonic() - started))
    started = time.monotonic()
    kills = run_and_kill(settings, killed, count(whole, "metrics"))
    report = Report(
        settings.suite,
        settings.executor,
        kills,
        float(clock.read_text()),
        time.monotonic() - started,
        *compare(whole, killed),
    )
    path = killed.with_suffix(".json")
    path.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    Console().print(table(report))
    print(f"report: {path}")
    return 0 if report.equal else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
