"""Performance profiles and the matrix of probabilities of improvement of one table.

Both are of Agarwal et al. (NeurIPS 2021), with 95 % intervals from 2,000 stratified
bootstrap replications, over the ranked tasks and the ranked agents of a section.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from offrl_jax.errors import unknown_name
from offrl_jax.leaderboard import ranking, statistics
from offrl_jax.leaderboard.model import Section
from offrl_jax.leaderboard.ranking import Bounds, Values
from offrl_jax.types import Array

THRESHOLDS = 101
"""Points of a performance profile."""


class Profile(NamedTuple):
    """How often an agent's runs lie above each of many thresholds.

    Attributes:
      thresholds: ascending, in the unit of the section's ranked tasks.
      above: by threshold, fraction of runs above it, in [0, 1], with its pointwise
        95 % interval; without ends where every task has a single run.
    """

    thresholds: tuple[float, ...]
    above: tuple[Bounds, ...]


def profiles(section: Section) -> dict[str, Profile]:
    """The performance profile of every ranked entry, by label, all on one grid.

    The fraction at a threshold is the mean over ranked tasks of the fraction of the
    task's runs with a value strictly above it: tasks have equal say, as in the mean
    and the median.  The paper pools all runs; for equal numbers of seeds both agree.
    The grid reaches from the lowest to the highest value of the ranked entries, for
    scores at least from 0 to 100.

    Returns:
      Empty if no entry is ranked.
    """
    tasks, values = _ranked(section)
    if not values:
        return {}
    every = [value for own in values.values() for t in tasks for value in own[t]]
    thresholds = _grid(min(every), max(every), section.unit)
    found = {}
    for label, own in values.items():
        scores, count = ranking.padded(own, tasks)
        # Compared in double precision: a float32 could fall on a threshold.
        above = np.zeros((len(thresholds), *scores.shape), np.float32)
        for i, task in enumerate(tasks):
            runs = np.asarray(own[task])
            above[:, i, : len(runs)] = runs[None, :] > thresholds[:, None]
        drawn = _draws(tuple(count.tolist()), scores.shape[1])
        intervals = statistics.fractions(above, count, drawn)
        several = any(len(own[task]) > 1 for task in tasks)
        found[label] = Profile(
            tuple(thresholds.tolist()),
            tuple(
                ranking.bounds(statistics.Interval(*ends), several)
                for ends in zip(*intervals, strict=True)
            ),
        )
    return found


def improvements(
    section: Section, labels: Sequence[str] | None = None
) -> dict[tuple[str, str], Bounds]:
    """P(a run of x beats a run of y) for all ordered pairs of ranked entries.

    The numbers are those by which `ranking.rank` shares ranks, and
    `P(y, x) = 1 - P(x, y)` holds exactly, for the ends of the intervals crosswise.

    Args:
      section: of a leaderboard.
      labels: only these of its ranked entries; all pairs of a thousand agents take
        minutes.

    Raises:
      UsageError: a label that no ranked entry has.
    """
    tasks, values = _ranked(section)
    for label in labels or ():
        if label not in values:
            raise unknown_name("ranked agent", label, values)
    chosen = list(values) if labels is None else list(dict.fromkeys(labels))
    contenders = [ranking.contender(label, values[label], tasks) for label in chosen]
    found = {}
    for x, y in itertools.combinations(contenders, 2):
        better = ranking.compare(x, y)
        found[x.label, y.label] = better
        found[y.label, x.label] = ranking.reversed_bounds(better)
    return found


@functools.lru_cache(maxsize=1)
def _draws(count: tuple[int, ...], slots: int) -> Array:
    """Those of all agents with these numbers of runs."""
    return statistics.side_draws(
        jax.random.key(ranking.SEED), np.array(count, np.int32), slots=slots
    )


def _ranked(section: Section) -> tuple[list[str], dict[str, Values]]:
    """Ranked tasks, and the values of ranked entries by label and task."""
    # In the order in which `board` hands them to `rank`: draws belong to positions.
    tasks = sorted(task.task for task in section.tasks if task.ranked)
    values: dict[str, Values] = {
        entry.label: {cell.task: cell.values for cell in entry.cells}
        for entry in section.entries
        if entry.rank is not None
    }
    return tasks, values


def _grid(lowest: float, highest: float, unit: str) -> np.ndarray:
    """`[THRESHOLDS]` float64."""
    if unit == "score":
        lowest, highest = min(0.0, lowest), max(100.0, highest)
    elif lowest == highest:
        lowest, highest = lowest - 1.0, highest + 1.0
    return np.linspace(lowest, highest, THRESHOLDS)
