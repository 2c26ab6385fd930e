"""The command line behind a row."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from offrl_jax.benchmark.planning import DEFAULT_SETTING
from offrl_jax.benchmark.suites import known_suites, load_suite
from offrl_jax.results import Job, Plan, Row


def command_of(row: Row, job: Job | None, plan: Plan | None, folder: Path) -> str:
    """The command that makes the row, as far as plan and row say.

    Args:
      row: of the folder.
      job: of the row; None for a row of the dataset.
      plan: of the folder, or None.
      folder: of results.
    """
    jobs = [one for one in (plan.jobs if plan else ()) if one.suite == row.suite]
    setting = row.setting
    if job is None:
        job = next((one for one in jobs if row.task in one.datasets), None)
        if job is None:
            return f"any benchmark on {row.task}"
        setting = job.members[0].setting
    jobs = [one for one in jobs if one.updates_total == job.updates_total] or [job]
    if row.suite == "run":
        jobs = [one for one in jobs if one.agent == job.agent]
        line = _run_words(job, jobs, setting)
    else:
        line = _suite_words(job, jobs)
    if job.split.get("max_parallel"):
        line += ["--max-parallel", str(job.split["max_parallel"])]
    if row.suite == "run" or folder != Path("results") / row.suite:
        line += ["--results", str(folder)]
    return shlex.join(["offrl", *line])


def _seeds(jobs: Iterable[Job]) -> int:
    return len({member.seed for job in jobs for member in job.members})


def _suite_words(job: Job, jobs: list[Job]) -> list[str]:
    """Of a suite, with the numbers that are not its own."""
    if job.suite not in known_suites():
        return ["benchmark", f"{job.suite}.toml"]
    line, suite = ["benchmark", job.suite], load_suite(job.suite)
    if _seeds(jobs) != suite.seeds:
        line += ["--seeds", str(_seeds(jobs))]
    if job.updates_total != suite.updates:
        line += ["--updates", str(job.updates_total)]
    return line


def _run_words(job: Job, jobs: list[Job], setting: str) -> list[str]:
    tasks = list(dict.fromkeys(m.task for one in jobs for m in one.members))
    line = ["run", "--agent", job.agent, "--task", *tasks]
    line += ["--seeds", str(_seeds(jobs)), "--updates", str(job.updates_total)]
    *before, _ = job.phase_updates
    if before:
        line += ["--pretraining-updates", str(job.phase_updates[before[-1]])]
    for pair in _pairs(setting):
        line += ["--set", pair]
    for name in ("episodes", "evaluations"):
        if name in job.protocol:
            line += [f"--{name}", str(job.protocol[name])]
    return line


def _pairs(setting: str) -> list[str]:
    """`["alpha=1", "hidden=64,64"]` of the setting `alpha=1,hidden=64,64`."""
    if setting == DEFAULT_SETTING:
        return []
    return re.split(r",(?=[a-z_0-9]+=)", setting)
