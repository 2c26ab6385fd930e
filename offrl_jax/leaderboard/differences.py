"""The difference of one agent's runs on two sides, with bootstrap intervals, in JAX.

Runs are `[T, S]`, padded to the right, with the number of runs `count [T]`, as in
`statistics`.  The two sides are resampled with a key each.  With the same key and equal
counts the draws are the same: slot s of one side goes with slot s of the other, which
is the paired bootstrap; with different keys the sides are independent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.leaderboard import statistics
from offrl_jax.leaderboard.ranking import SEED, Bounds
from offrl_jax.leaderboard.statistics import LEVEL, REPLICATIONS, Interval
from offrl_jax.types import Array, Key

_CHUNK = 1_000  # replications held at a time

Runs = Mapping[str, Sequence[float]]
"""Values of the runs of one side by task; paired ones in the order of their seeds."""
_Tables = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Differences(NamedTuple):
    """Change minus baseline.

    Attributes:
      iqm: `[]`, of the 25 % trimmed means of the pooled runs.
      mean: `[]`, of the means over tasks of the means over runs.
      task_mean: `[T]`, of the means over runs.
    """

    iqm: Interval
    mean: Interval
    task_mean: Interval


@functools.partial(jax.jit, static_argnames="replications")
def bootstrap(
    x_key: Key,
    x: Array,
    x_count: Array,
    y_key: Key,
    y: Array,
    y_count: Array,
    *,
    replications: int = REPLICATIONS,
) -> Differences:
    """Differences y - x with their stratified percentile intervals.

    Args:
      x_key: draws of x.
      x: baseline, `[T, S]`, finite where valid.
      x_count: `[T]`, int32, positive on the same tasks as `y_count`.
      y_key: draws of y: equal to `x_key` for pairs, else independent of it.
      y: change, `[T, S]`.
      y_count: `[T]`, int32; equal to `x_count` for pairs.
      replications: static, a multiple of 1,000.
    """

    def difference(x_weight: Array, y_weight: Array) -> tuple[Array, Array, Array]:
        before = statistics.weighted_aggregates(x, x_count, x_weight)
        after = statistics.weighted_aggregates(y, y_count, y_weight)
        return (
            after.iqm - before.iqm,
            after.mean - before.mean,
            after.task_mean - before.task_mean,
        )

    def one_chunk(index: Array) -> tuple[Array, Array, Array]:
        x_weight, y_weight = (
            statistics.resample(
                jax.random.fold_in(key, index), count, runs.shape[1], _CHUNK
            )
            for key, runs, count in ((x_key, x, x_count), (y_key, y, y_count))
        )
        return jax.vmap(difference)(x_weight, y_weight)

    samples = jax.lax.map(one_chunk, jnp.arange(replications // _CHUNK))
    slots = jnp.arange(x.shape[1])[None, :]
    every = (
        (slots < count[:, None]).astype(jnp.float32) for count in (x_count, y_count)
    )
    tail = (1.0 - LEVEL) / 2.0
    intervals = []
    for value, chunks in zip(difference(*every), samples, strict=True):
        flat = chunks.reshape(replications, *chunks.shape[2:])
        ends = jnp.quantile(flat, jnp.array([tail, 1.0 - tail]), axis=0)
        intervals.append(Interval(value, ends[0], ends[1]))
    return Differences(*intervals)


@dataclasses.dataclass(frozen=True)
class Estimates:
    """What the bootstrap says of one agent, rounded to 4 decimals.

    Attributes:
      iqm: change minus baseline; None without pooled tasks.
      mean: as `iqm`.
      improvement: probability that a run of the change beats one of the baseline.
      by_task: differences of means, of every task.
    """

    iqm: Bounds | None
    mean: Bounds | None
    improvement: Bounds | None
    by_task: Mapping[str, Bounds]


def estimate(
    before: Runs, after: Runs, pooled: Sequence[str], paired: bool
) -> Estimates:
    """Differences of one agent, `after` minus `before`.

    Args:
      before: runs of the baseline, at least one on every task.
      after: runs of the change, of the same tasks.
      pooled: tasks of one unit that enter the aggregates.
      paired: whether runs of the same place are resampled together.
    """
    key = jax.random.key(SEED)
    other = key if paired else jax.random.fold_in(key, 1)

    def differences(tables: _Tables) -> Differences:
        x, x_count, y, y_count = tables
        return jax.device_get(bootstrap(key, x, x_count, other, y, y_count))

    def means(result: Differences, tasks: Sequence[str]) -> dict[str, Bounds]:
        return {
            task: _bounds(
                Interval(*(part[i] for part in result.task_mean)),
                several=len(before[task]) > 1 or len(after[task]) > 1,
            )
            for i, task in enumerate(tasks)
        }

    by_task: dict[str, Bounds] = {}
    others = [task for task in before if task not in pooled]
    if others:
        by_task = means(differences(_tables(before, after, others, False)), others)
    if not pooled:
        return Estimates(None, None, None, by_task)
    tables = _tables(before, after, pooled, True)
    result = differences(tables)
    x, x_count, y, y_count = tables
    wins = statistics.probability_of_improvement(other, y, y_count, key, x, x_count)
    several = any(len(side[task]) > 1 for side in (before, after) for task in pooled)
    return Estimates(
        _bounds(result.iqm, several),
        _bounds(result.mean, several),
        _bounds(jax.device_get(wins), several),
        by_task | means(result, pooled),
    )


def _tables(before: Runs, after: Runs, tasks: Sequence[str], pooled: bool) -> _Tables:
    """Both sides as `[T, S]` and counts, padded so that agents share programs.

    Returns are shifted before they become float32, which differences do not feel: of
    pooled tasks all by one number, else each task by its own.
    """
    slots = max(len(side[task]) for side in (before, after) for task in tasks)
    shape = (-(-len(tasks) // 4) * 4, -(-slots // 5) * 5)
    shift = {task: float(np.mean([*before[task], *after[task]])) for task in tasks}
    if pooled:
        shift = dict.fromkeys(tasks, float(np.mean(list(shift.values()))))
    tables = []
    for side in (before, after):
        table, count = np.zeros(shape, np.float32), np.zeros(shape[0], np.int32)
        for i, task in enumerate(tasks):
            count[i] = len(side[task])
            table[i, : count[i]] = np.asarray(side[task], np.float64) - shift[task]
        tables += [table, count]
    return tables[0], tables[1], tables[2], tables[3]


def _bounds(interval: Interval, several: bool) -> Bounds:
    # A sum with zero makes the negative zero that rounding leaves a plain one.
    value, low, high = (round(float(part), 4) + 0.0 for part in interval)
    return Bounds(value, low, high) if several else Bounds(value, None, None)
