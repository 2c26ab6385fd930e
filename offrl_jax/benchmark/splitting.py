"""How a job is cut into populations, and in which order they are trained.

A job that is cut gets its seeds in rounds: the first population of every agent holds
the first seeds of all its tasks, and all first ones come before any second one.  So a
leaderboard of all agents exists early, and gets tighter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence

from offrl_jax.results import Job, Member
from offrl_jax.results.rows import strict_json


def named(job: Job) -> Job:
    """The job with the run id that its content gives it."""
    content = dataclasses.asdict(job)
    digest = hashlib.sha256(strict_json(content).encode()).hexdigest()[:10]
    return dataclasses.replace(job, run_id=f"{job.agent.replace('@', '-')}-{digest}")


def fewest_devices(members: int, devices: int) -> int:
    """The fewest devices on which no device has more members than on `devices`.

    Ten members on eight devices are two each on five: three less to pad and to fill
    with data.
    """
    return -(-members // -(-members // devices))


def cut(job: Job, most: int, waves: int = 1) -> list[Job]:
    """The job as the fewest populations of at most `most` members, first seeds first.

    Args:
      job: without a run id.
      most: members of one population.
      waves: the seeds are dealt out to so many groups first, each a population of its
        own or several.

    Returns:
      Jobs with run ids.  One that needs no cut keeps the order of its members; of
      others, members are in the order of their seeds, and populations of equal size
      where that is possible (one compiled program serves them), of whole seeds or
      without padding where that fits.
    """
    seeds = sorted({member.seed for member in job.members})
    if len(job.members) <= most and min(waves, len(seeds)) == 1:
        return [with_members(job, job.members)]
    per_wave = -(-len(seeds) // waves)
    parts: list[Job] = []
    for first in range(0, len(seeds), per_wave):
        wave = set(seeds[first : first + per_wave])
        members = sorted(
            (member for member in job.members if member.seed in wave),
            key=lambda member: member.seed,
        )
        size = _size(members, most, job.split["devices"])
        parts += [
            with_members(job, members[start : start + size])
            for start in range(0, len(members), size)
        ]
    return parts


def _size(members: Sequence[Member], most: int, devices: int) -> int:
    """Members per population: as even as can be, rounded up to whole seeds if it fits,
    else to whole devices.
    """
    even = math.ceil(len(members) / math.ceil(len(members) / most))
    of_one_seed = sum(member.seed == members[0].seed for member in members)
    for unit in (of_one_seed, devices):
        rounded = -(-even // unit) * unit
        if rounded <= most:
            return rounded
    return even


def with_members(job: Job, members: Sequence[Member]) -> Job:
    """The job with these members alone, and the run id that this gives it.

    Never with its old one, under which checkpoints of other members may lie.
    """
    used = {member.task for member in members}
    devices = fewest_devices(len(members), job.split["devices"])
    return named(
        dataclasses.replace(
            job,
            run_id="",
            members=tuple(members),
            datasets={
                task: job.datasets[task] for task in job.datasets if task in used
            },
            split={**job.split, "devices": devices},
        )
    )


def in_rounds(jobs: Sequence[Job], seconds: Callable[[Job], float | None]) -> list[Job]:
    """Jobs by their lowest seed; where there are several rounds, the cheapest first.

    After the last job of a round every agent has a run of the round's seed on each of
    its tasks.  Within a round, jobs of unknown cost come last and keep their order; a
    single round keeps its order as a whole.

    Args:
      jobs: to be ordered.
      seconds: estimated, or None where nothing is known.
    """
    first = {job.run_id: min(member.seed for member in job.members) for job in jobs}
    if len(set(first.values())) < 2:
        return list(jobs)

    def order(job: Job) -> tuple[int, float]:
        cost = seconds(job)
        return first[job.run_id], math.inf if cost is None else cost

    return sorted(jobs, key=order)
