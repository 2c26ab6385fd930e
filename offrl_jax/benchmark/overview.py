"""What a suite would do: its populations, their memory and duration, what is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from offrl_jax.benchmark import provenance, speeds
from offrl_jax.benchmark.jax_settings import cache_folder
from offrl_jax.benchmark.memory import Estimates, Memory, device_memory
from offrl_jax.benchmark.parts import updates_done
from offrl_jax.benchmark.planning import (
    Split,
    member_identity,
    plan_missing,
    row_identity,
    wanted_jobs,
)
from offrl_jax.benchmark.progress import Work
from offrl_jax.benchmark.suites import Suite
from offrl_jax.catalogue import LoadedTask
from offrl_jax.results import Job, Plan, Row, checkpoint_path


def speed_table() -> Path:
    """Where finished jobs leave their speeds: the user's cache folder."""
    return cache_folder().parent / "speeds.jsonl"


def env_of(tasks: Mapping[str, LoadedTask]) -> dict[str, str]:
    """The environment id by task."""
    return {name: str(task.task.env_id) for name, task in tasks.items()}


@dataclasses.dataclass(frozen=True)
class Limits:
    """How a user bounds populations.

    Attributes:
      max_parallel: largest number of members, or None.
      waves: groups of seeds, each a population or several of its own.
      memory_gib: per device, or in all on a CPU; None: what there is.
    """

    max_parallel: int | None = None
    waves: int = 1
    memory_gib: float | None = None


class Machine(NamedTuple):
    """Where one job runs.

    Attributes:
      devices: that it gets.
      platform: of these, as jax calls it.
      memory: that it may use; None: unknown, so everything fits.
      device: in words, as in `Row`.
    """

    devices: int
    platform: str
    memory: Memory | None
    device: str


def this_machine(memory_gib: float | None = None) -> Machine:
    """All devices of this process; `memory_gib` as in `Limits`."""
    devices = jax.local_devices()
    memory = device_memory(devices, memory_gib)
    return Machine(len(devices), devices[0].platform, memory, provenance.device())


class Planner:
    """Everything that planning a suite needs beside plan and rows.

    Attributes:
      wanted: jobs that the suite asks for.
      estimates: of memory.
      tasks: by id.
      device: that jobs get, in words.
    """

    def __init__(
        self,
        suite: Suite,
        tasks: Sequence[LoadedTask],
        limits: Limits,
        machine: Machine,
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        split = Split(machine.devices, machine.platform, limits.max_parallel)
        self.wanted = wanted_jobs(
            suite, tasks, split, provenance.source_hash(), overrides
        )
        self.tasks = {task.task.id: task for task in tasks}
        self.estimates = Estimates(self.tasks, machine.memory)
        self._waves = limits.waves
        self._env_of = env_of(self.tasks)
        self.device = machine.device
        self._known = speeds.read_table(speed_table())

    def plan(
        self, plan: Plan | None, rows: Sequence[Row], say: Callable[[str], None]
    ) -> tuple[Plan, list[Job]]:
        """`plan_missing`, with all that is known of memory and speed.

        Raises:
          UsageError: a single run of a new job does not fit into memory.
        """
        known = [*self._known, *speeds.of_rows(rows, self._env_of)]
        return plan_missing(
            self.wanted,
            plan,
            rows,
            say,
            most=self.estimates.most,
            waves=self._waves,
            seconds=lambda job: self._seconds(job, known),
        )

    def seconds(self, job: Job, rows: Sequence[Row]) -> float | None:
        """Estimated duration of a job from its start; None: nothing is known."""
        known = [*self._known, *speeds.of_rows(rows, self._env_of)]
        return self._seconds(job, known)

    def _seconds(self, job: Job, known: Sequence[speeds.Speed]) -> float | None:
        return speeds.estimate_seconds(job, known, self._env_of, self.device)


def work(job: Job, folder: Path) -> Work:
    """A job's updates, and those that its checkpoints hold."""
    total = len(job.members) * sum(job.phase_updates.values())
    return Work(total, updates_done(checkpoint_path(folder, job.run_id), job))


def member_updates(jobs: Sequence[Job]) -> float:
    """Updates of all phases, summed over members and jobs."""
    return sum(len(job.members) * sum(job.phase_updates.values()) for job in jobs)


@dataclasses.dataclass(frozen=True)
class Population:
    """A line of the overview: one job that is to be run.

    Attributes:
      job: as it will stand in the plan.
      number: which one of its agent and structure it is, from 1 on.
      of: how many of those are to be run.
      bytes: estimated memory per device, or in all on a CPU; of a job whose tasks are
        not all at hand None.
      done: share of its updates that checkpoints hold.
      seconds: estimated, of what is left; None: unknown.
    """

    job: Job
    number: int
    of: int
    bytes: int | None
    done: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Overview:
    """What a suite would do in a results folder.

    Attributes:
      suite: its name.
      folder: of results.
      runs: that the suite asks for.
      finished: of these.
      populations: to be run, in this order.
      memory: bytes that populations may use; None: unknown.
      shared: whether that is the memory of all devices together.
      device: in words.
      said: messages of planning.
    """

    suite: str
    folder: Path
    runs: int
    finished: int
    populations: tuple[Population, ...]
    memory: int | None
    shared: bool
    device: str
    said: tuple[str, ...]


def overview(
    suite: Suite,
    planner: Planner,
    plan: Plan | None,
    rows: Sequence[Row],
    folder: Path,
) -> Overview:
    """Looks ahead; writes nothing.

    Args:
      suite: asked for.
      planner: of the suite.
      plan: of the folder, or None.
      rows: of the folder.
      folder: of results.

    Raises:
      UsageError: as `Planner.plan`.
    """
    said: list[str] = []
    _, jobs = planner.plan(plan, rows, said.append)
    names = {
        member_identity(job, member) for job in planner.wanted for member in job.members
    }
    there = {
        row_identity(row)
        for row in rows
        if row.step == row.updates_total and row.status != "failed"
    }
    same = [_kind(job) for job in jobs]
    lines = []
    for index, job in enumerate(jobs):
        amount = work(job, folder)
        share = amount.done / amount.total
        seconds = planner.seconds(job, rows)
        at_hand = all(member.task in planner.tasks for member in job.members)
        lines.append(
            Population(
                job,
                same[: index + 1].count(same[index]),
                same.count(same[index]),
                planner.estimates.bytes_of(job) if at_hand else None,
                share,
                None if seconds is None else (1.0 - share) * seconds,
            )
        )
    memory = planner.estimates.memory
    return Overview(
        suite.name,
        folder,
        len(names),
        len(names & there),
        tuple(lines),
        None if memory is None else memory.bytes,
        memory is not None and memory.shared,
        planner.device,
        tuple(said),
    )


def _kind(job: Job) -> str:
    """Jobs of equal kind are populations that one job was cut into."""
    tasks = sorted({member.task for member in job.members})
    return repr((job.agent, job.config, tasks, job.updates_total))
