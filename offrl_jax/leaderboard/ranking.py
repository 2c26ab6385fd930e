"""Aggregates and shared ranks of the agents of one table."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.leaderboard import statistics
from offrl_jax.types import Array

SEED = 20_210_831
"""Of all bootstrap draws; arbitrary and fixed, so that a table can be drawn again."""

Values = Mapping[str, Sequence[float]]
"""Values of the runs of one agent by task."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """A value with its 95 % interval, all rounded to 4 decimals.

    The ends are None where nothing can be resampled: a single run per task.
    """

    value: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Standing:
    """What `rank` says of one agent; only `task_means` if it is unranked."""

    task_means: Mapping[str, Bounds]
    rank: int | None = None
    iqm: Bounds | None = None
    mean: Bounds | None = None
    median: Bounds | None = None
    optimality_gap: Bounds | None = None
    leader: str | None = None
    leader_better: Bounds | None = None


def aggregate(own: Values, ranked: Sequence[str], tasks: Sequence[str]) -> Standing:
    """One agent's aggregates and means, without a rank.

    Arguments as in `rank`; without runs of some ranked task there are only means.
    """
    others = [task for task in tasks if task not in ranked]
    pooled = _bootstrap(own, ranked)
    means = _task_means(pooled, own, ranked)
    means |= _task_means(_bootstrap(own, others), own, others)
    if pooled is None or not all(own.get(task) for task in ranked):
        return Standing(means)
    several = any(len(own[task]) > 1 for task in ranked)
    return Standing(
        means,
        iqm=bounds(pooled.iqm, several),
        mean=bounds(pooled.mean, several),
        median=bounds(pooled.median, several),
        optimality_gap=bounds(pooled.optimality_gap, several),
    )


def rank(
    values: Mapping[str, Values], ranked: Sequence[str], tasks: Sequence[str]
) -> dict[str, Standing]:
    """Ranks agents by IQM over the `ranked` tasks; ranks may be shared.

    Agents are taken by falling IQM (equal ones by label).  The first leads rank 1.
    Each next one shares the rank of its leader unless the 95 % interval of the
    probability that a run of the leader beats one of its own lies above 0.5; then it
    leads a new rank, one more than the number of agents before it.  An agent without
    runs of some ranked task is not ranked: its aggregates would be over other tasks.

    Args:
      values: runs by agent label and task; a task may be absent or empty.
      ranked: tasks of one unit that enter the aggregates.
      tasks: all tasks of the table, for `task_means`.
    """
    # Those with equal numbers of runs one after the other: they share their draws.
    alike = sorted(values, key=lambda label: _counts(values[label], tasks))
    found = {label: aggregate(values[label], ranked, tasks) for label in alike}
    standings = {label: found[label] for label in values}
    order = sorted(
        (-standing.iqm.value, label)
        for label, standing in standings.items()
        if standing.iqm is not None
    )
    leader: Contender | None = None
    place = 0
    for position, (_, label) in enumerate(order, start=1):
        own = contender(label, values[label], ranked)
        better = compare(leader, own) if leader else None
        compared = leader.label if leader else None
        if better is None or (better.low is not None and better.low > 0.5):
            leader, place = own, position
        standings[label] = dataclasses.replace(
            standings[label], rank=place, leader=compared, leader_better=better
        )
    return standings


class Contender(NamedTuple):
    """An agent that can be compared with others over the same tasks.

    Attributes:
      label: of the agent.
      side: its scores and draws.
      several: whether some task has several runs.
    """

    label: str
    side: statistics.Side
    several: bool


def contender(label: str, own: Values, tasks: Sequence[str]) -> Contender:
    """An agent with runs of all `tasks`, ready for `compare`."""
    scores, count = map(jnp.asarray, padded(own, tasks))
    # A key of the label: two agents are drawn independently, and the interval of a pair
    # does not depend on who else is in the table.
    key = jax.random.fold_in(jax.random.key(SEED), zlib.crc32(label.encode()))
    drawn = statistics.side_draws(key, count, slots=scores.shape[1])
    return Contender(
        label,
        statistics.Side(scores, count, drawn),
        any(len(own[task]) > 1 for task in tasks),
    )


def compare(x: Contender, y: Contender) -> Bounds:
    """The probability that a run of x beats one of y.

    A pair is computed in the order of its labels and reversed where asked the other way
    round, so that `P(y, x)` is `1 - P(x, y)` to the last digit.
    """
    if y.label < x.label:
        return reversed_bounds(compare(y, x))
    interval = statistics.probability_of_improvement(x.side, y.side)
    return bounds(interval, x.several or y.several)


def reversed_bounds(better: Bounds) -> Bounds:
    """The same comparison, seen from the other side."""
    value, low, high = (
        None if end is None else round(1.0 - end, 4)
        for end in (better.value, better.high, better.low)
    )
    assert value is not None
    return Bounds(value, low, high)


def _counts(own: Values, tasks: Sequence[str]) -> tuple[int, ...]:
    return tuple(len(own.get(task, ())) for task in tasks)


def padded(own: Values, tasks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Values `[T, S]` and counts, padded to multiples so that tables share programs."""
    slots = max(_counts(own, tasks))
    table = np.zeros((-(-len(tasks) // 4) * 4, -(-slots // 5) * 5), np.float32)
    count = np.zeros(table.shape[0], np.int32)
    for i, task in enumerate(tasks):
        runs = own.get(task, ())
        table[i, : len(runs)] = runs
        count[i] = len(runs)
    return table, count


# Of ranked and of other tasks: one byte per replication and run each.
@functools.lru_cache(maxsize=2)
def _draws(count: tuple[int, ...], slots: int) -> Array:
    return statistics.draws(
        jax.random.key(SEED), np.array(count, np.int32), slots=slots
    )


def _bootstrap(
    own: Values, tasks: Sequence[str]
) -> statistics.Aggregates[statistics.Interval] | None:
    if not any(own.get(task) for task in tasks):
        return None
    scores, count = padded(own, tasks)
    drawn = _draws(tuple(count.tolist()), scores.shape[1])
    return statistics.bootstrap(scores, count, drawn)


def _task_means(
    aggregates: statistics.Aggregates[statistics.Interval] | None,
    own: Values,
    tasks: Sequence[str],
) -> dict[str, Bounds]:
    if aggregates is None:
        return {}
    of_all = aggregates.task_mean
    return {
        task: bounds(statistics.Interval(*(x[i] for x in of_all)), len(own[task]) > 1)
        for i, task in enumerate(tasks)
        if own.get(task)
    }


def bounds(interval: statistics.Interval, several: bool) -> Bounds:
    """An interval of scalars, rounded; without ends unless there are `several` runs."""
    value, low, high = (round(float(part), 4) for part in interval)
    return Bounds(value, low, high) if several else Bounds(value, None, None)


def surely_highest(means: Sequence[Bounds | None]) -> int | None:
    """Position of the value whose interval lies above all others; None without one.

    A value without an interval is surely neither above nor below another.
    """
    known = [(i, bounds) for i, bounds in enumerate(means) if bounds is not None]
    if len(known) < 2:
        return None
    best, highest = max(known, key=lambda item: item[1].value)
    for i, other in known:
        if i == best:
            continue
        if highest.low is None or other.high is None or other.high >= highest.low:
            return None
    return best
