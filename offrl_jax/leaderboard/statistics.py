"""Aggregates of scores with stratified bootstrap intervals, in JAX.

Definitions follow Agarwal et al., "Deep Reinforcement Learning at the Edge of the
Statistical Precipice" (NeurIPS 2021), written out in `docs/protocol.md`.  Scores of one
agent are `[T, S]`, padded to the right, with the number of runs `count [T]` (0 for a
padded task), so that tables of many sizes share one compiled program.

Bootstrap: the runs of every task are resampled with replacement, tasks stay.  A
replicate is held as how often each run was drawn, which makes every aggregate but the
median a sum over runs and needs no sorting.  The draws of task t and slot s come from
`fold_in(fold_in(key, t), s)` (of the chunk's key): they depend neither on padding nor
on other agents, so a longer table never changes an interval.
"""

from __future__ import annotations

import functools
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from offrl_jax.types import Array, Key

REPLICATIONS = 50_000
"""Bootstrap replications of aggregates."""
POI_REPLICATIONS = 2_000
"""Bootstrap replications of a probability of improvement."""
LEVEL = 0.95
"""Coverage of all intervals."""
TARGET = 100.0
"""Score at which the optimality gap is zero."""

_CHUNK = 1_000  # replications held at a time

Value = TypeVar("Value")
"""An array, or an `Interval` of arrays."""


class Aggregates(NamedTuple, Generic[Value]):
    """Four aggregates of one agent over tasks, and its means per task.

    Attributes:
      iqm: `[]`, 25 % trimmed mean of the pooled runs.
      mean: `[]`, mean over tasks of the mean over runs.
      median: `[]`, median over tasks of the mean over runs.
      optimality_gap: `[]`, mean over tasks of the mean of `TARGET - min(score,
      TARGET)`.
      task_mean: `[T]`, mean over runs; 0 for a padded task.
    """

    iqm: Value
    mean: Value
    median: Value
    optimality_gap: Value
    task_mean: Value


class Interval(NamedTuple):
    """A value with the ends of its percentile interval; all of one shape."""

    value: Array
    low: Array
    high: Array


def _mask(count: Array, slots: int) -> Array:
    return jnp.arange(slots)[None, :] < count[:, None]


def weighted_aggregates(
    scores: Array, count: Array, weight: Array
) -> Aggregates[Array]:
    """Aggregates in which run (t, s) occurs `weight[t, s]` times.

    IQM drops `floor(n / 4)` of the n pooled runs at either end, as
    `scipy.stats.trim_mean(x, 0.25)` does.  Each run counts once in the IQM, so a task
    with more runs has more say there; the other aggregates give tasks equal say.

    Args:
      scores: `[T, S]`.
      count: `[T]`, int32, runs of each task; the row sums of `weight`.
      weight: `[T, S]`, non-negative whole numbers as float32; 0 at padded slots.
    """
    valid = _mask(count, scores.shape[1])
    x = jnp.where(valid, scores, 0.0)
    total = count.sum()
    cut = total // 4
    # Occurrences up to and including each run, in the order of all scores.
    flat = jnp.where(valid, scores, jnp.inf).reshape(-1)
    rank = jnp.argsort(jnp.argsort(flat))
    up_to = (rank[:, None] <= rank[None, :]).astype(jnp.float32)
    copies = weight.reshape(-1)
    # Whole numbers below 2^24, exact in float32 (but not in the TF32 of some GPUs).
    upper = jnp.matmul(copies, up_to, precision=jax.lax.Precision.HIGHEST)
    lower = upper - copies
    low_end, high_end = cut.astype(jnp.float32), (total - cut).astype(jnp.float32)
    kept = jnp.clip(
        jnp.minimum(upper, high_end) - jnp.maximum(lower, low_end), 0.0, None
    )
    iqm = (kept * x.reshape(-1)).sum() / (high_end - low_end)

    runs = jnp.maximum(count, 1).astype(jnp.float32)
    task_mean = (weight * x).sum(axis=1) / runs
    short = jnp.where(valid, TARGET - jnp.minimum(x, TARGET), 0.0)
    gap = (weight * short).sum(axis=1) / runs
    has_runs = count > 0
    tasks = has_runs.sum()
    ordered = jnp.sort(jnp.where(has_runs, task_mean, jnp.inf))
    median = (ordered[(tasks - 1) // 2] + ordered[tasks // 2]) / 2.0
    share = tasks.astype(jnp.float32)
    return Aggregates(
        iqm, task_mean.sum() / share, median, gap.sum() / share, task_mean
    )


def aggregates(scores: Array, count: Array) -> Aggregates[Array]:
    """Aggregates of the runs as they are; arguments as in `weighted_aggregates`."""
    weight = _mask(count, scores.shape[1]).astype(jnp.float32)
    return weighted_aggregates(scores, count, weight)


def resample(key: Key, count: Array, slots: int, replications: int) -> Array:
    """How often each run was drawn, `[replications, T, slots]` float32.

    Every task's `count[t]` runs are drawn `count[t]` times with replacement.
    """

    def draw(task: Array, slot: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, task), slot)
        return jax.random.uniform(own, (replications,))

    tasks, each = jnp.arange(count.shape[0]), jnp.arange(slots)
    uniform = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(tasks, each)  # [T, S, R]
    limit = count[:, None, None]
    chosen = jnp.floor(uniform * limit.astype(jnp.float32)).astype(jnp.int32)
    # A uniform just below 1 may round up to the count when multiplied.
    chosen = jnp.minimum(chosen, jnp.maximum(limit - 1, 0))
    drawn = each[None, :, None] < limit
    hits = (chosen[:, :, None, :] == each[None, None, :, None]) & drawn[:, :, None, :]
    return jnp.moveaxis(hits.sum(axis=1).astype(jnp.float32), -1, 0)


def _percentiles(value: Array, samples: Array) -> Interval:
    """The percentile interval from `samples [R, ...]`."""
    tail = (1.0 - LEVEL) / 2.0
    ends = jnp.quantile(samples, jnp.array([tail, 1.0 - tail]), axis=0)
    return Interval(value, ends[0], ends[1])


@functools.partial(jax.jit, static_argnames="replications")
def bootstrap(
    key: Key, scores: Array, count: Array, *, replications: int = REPLICATIONS
) -> Aggregates[Interval]:
    """Aggregates with their stratified percentile intervals.

    Args:
      key: the same key gives the same bits.
      scores: `[T, S]`, finite where valid.
      count: `[T]`, int32, at least one positive.
      replications: static.

    Raises:
      ValueError: more than a chunk of replications, and no multiple of it.
    """
    if replications % _CHUNK and replications > _CHUNK:
        raise ValueError(f"replications {replications} is no multiple of {_CHUNK}")
    chunk = min(replications, _CHUNK)

    def one_chunk(index: Array) -> Aggregates[Array]:
        own = jax.random.fold_in(key, index)
        weight = resample(own, count, scores.shape[1], chunk)
        return jax.vmap(lambda w: weighted_aggregates(scores, count, w))(weight)

    samples = jax.lax.map(one_chunk, jnp.arange(replications // chunk))
    flat = jax.tree.map(lambda s: s.reshape(replications, *s.shape[2:]), samples)
    return Aggregates(*map(_percentiles, aggregates(scores, count), flat))


def improvement(x: Array, x_count: Array, y: Array, y_count: Array) -> Array:
    """Probability that a run of x beats a run of y, `[]`.

    The mean over tasks of the Mann-Whitney statistic U / (n m), a tie counting one
    half.

    Args:
      x: `[T, S]`.
      x_count: `[T]`, int32; a task counts if both have runs of it.
      y: `[T, S]`.
      y_count: `[T]`, int32.
    """
    x_weight = _mask(x_count, x.shape[1]).astype(jnp.float32)
    y_weight = _mask(y_count, y.shape[1]).astype(jnp.float32)
    return _weighted_improvement(x, x_count, x_weight, y, y_count, y_weight)


def _weighted_improvement(
    x: Array, x_count: Array, x_weight: Array, y: Array, y_count: Array, y_weight: Array
) -> Array:
    above = (x[:, :, None] > y[:, None, :]).astype(jnp.float32)
    equal = (x[:, :, None] == y[:, None, :]).astype(jnp.float32)
    wins = ((above + 0.5 * equal) * y_weight[:, None, :]).sum(axis=2)
    pairs = (x_count * y_count).astype(jnp.float32)
    per_task = (x_weight * wins).sum(axis=1) / jnp.maximum(pairs, 1.0)
    return per_task.sum() / (pairs > 0).sum().astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="replications")
def probability_of_improvement(
    x_key: Key,
    x: Array,
    x_count: Array,
    y_key: Key,
    y: Array,
    y_count: Array,
    *,
    replications: int = POI_REPLICATIONS,
) -> Interval:
    """`improvement` with its percentile interval; both sides are resampled.

    Args:
      x_key: draws of x; differs from `y_key`, so that the two sides are independent.
      x: `[T, S]`.
      x_count: `[T]`, int32.
      y_key: draws of y.
      y: `[T, S]`.
      y_count: `[T]`, int32.
      replications: static.
    """
    x_weights = resample(x_key, x_count, x.shape[1], replications)
    y_weights = resample(y_key, y_count, y.shape[1], replications)
    samples = jax.vmap(_weighted_improvement, (None, None, 0, None, None, 0))(
        x, x_count, x_weights, y, y_count, y_weights
    )
    return _percentiles(improvement(x, x_count, y, y_count), samples)


@functools.partial(jax.jit, static_argnames="replications")
def fractions(
    key: Key, marked: Array, count: Array, *, replications: int = POI_REPLICATIONS
) -> Interval:
    """Means over tasks of the fraction of runs that are marked, with intervals, `[K]`.

    Args:
      key: of the draws, which are those of all K.
      marked: `[K, T, S]`, 1 or 0; 0 at padded slots.
      count: `[T]`, int32, runs of each task.
      replications: static.
    """
    share = 1.0 / jnp.maximum(count, 1) / (count > 0).sum()
    factors = (marked * share[None, :, None]).reshape(marked.shape[0], -1)
    weight = resample(key, count, marked.shape[2], replications)
    exact = jax.lax.Precision.HIGHEST
    samples = jnp.matmul(weight.reshape(replications, -1), factors.T, precision=exact)
    return _percentiles(factors.sum(axis=1), samples)
