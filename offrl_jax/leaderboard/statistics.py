"""Aggregates of scores with stratified bootstrap intervals, in JAX.

Definitions follow Agarwal et al., "Deep Reinforcement Learning at the Edge of the
Statistical Precipice" (NeurIPS 2021), written out in `docs/protocol.md`.  Scores of one
agent are `[T, S]`, padded to the right, with the number of runs `count [T]` (0 for a
padded task), so that tables of many sizes share one compiled program.

Bootstrap: the runs of every task are resampled with replacement, tasks stay.  A
replicate is held as how often each run was drawn, which makes every aggregate but the
median a sum over runs and needs no sorting.  The draws of task t and slot s come from
`fold_in(fold_in(key, t), s)` (of the chunk's key): they depend neither on padding nor
on scores, so a longer table never changes an interval, and agents with equal numbers
of runs share one set of draws.

Replications are the last axis everywhere: every step is a loop over long vectors.
"""

from __future__ import annotations

import functools
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.types import Array, Key

REPLICATIONS = 50_000
"""Bootstrap replications of aggregates."""
POI_REPLICATIONS = 2_000
"""Bootstrap replications of a probability of improvement and of a profile."""
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
      iqm: `[...]`, 25 % trimmed mean of the pooled runs.
      mean: `[...]`, mean over tasks of the mean over runs.
      median: `[...]`, median over tasks of the mean over runs.
      optimality_gap: `[...]`, mean over tasks of the mean of `TARGET - min(score,
      TARGET)`.
      task_mean: `[T, ...]`, mean over runs; 0 for a padded task.
    """

    iqm: Value
    mean: Value
    median: Value
    optimality_gap: Value
    task_mean: Value


class Interval(NamedTuple):
    """A value with the ends of its percentile interval; all of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _mask(count: Array, slots: int) -> Array:
    return jnp.arange(slots)[None, :] < count[:, None]


def weighted_aggregates(
    scores: Array, count: Array, weight: Array
) -> Aggregates[Array]:
    """Aggregates in which run (t, s) occurs `weight[t, s]` times, `[..., R]`.

    IQM drops `floor(n / 4)` of the n pooled runs at either end, as
    `scipy.stats.trim_mean(x, 0.25)` does.  Each run counts once in the IQM, so a task
    with more runs has more say there; the other aggregates give tasks equal say.

    Args:
      scores: `[T, S]`.
      count: `[T]`, int32, runs of each task; the sums of `weight` over S.
      weight: `[T, S, R]`, uint8; 0 at padded slots.
    """
    valid = _mask(count, scores.shape[1])
    x = jnp.where(valid, scores, 0.0)
    runs = jnp.maximum(count, 1).astype(jnp.float32)
    share = (count > 0).sum().astype(jnp.float32)
    copies = weight.astype(jnp.float32)
    task_mean = (copies * x[:, :, None]).sum(axis=1) / runs[:, None]
    short = jnp.where(valid, TARGET - jnp.minimum(x, TARGET), 0.0)
    gap = (copies * (short / runs[:, None])[:, :, None]).sum(axis=(0, 1))
    return Aggregates(
        _iqm(x, valid, weight),
        task_mean.sum(axis=0) / share,
        _median(task_mean, count > 0),
        gap / share,
        task_mean,
    )


def _iqm(x: Array, valid: Array, weight: Array) -> Array:
    """`[R]`: runs in ascending order, each with its copies within the middle half."""
    order = jnp.argsort(jnp.where(valid, x, jnp.inf).reshape(-1))
    sorted_x, by_run = x.reshape(-1)[order], weight.reshape(x.size, -1)
    total = valid.sum()
    cut = total // 4
    start, end = cut.astype(jnp.float32), (total - cut).astype(jnp.float32)

    def add_run(carry: tuple[Array, Array], at: tuple[Array, Array]):
        below, kept_sum = carry
        index, value = at
        up_to = below + by_run[index].astype(jnp.float32)
        kept = jnp.clip(up_to, start, end) - jnp.clip(below, start, end)
        return (up_to, kept_sum + kept * value), None

    zeros = jnp.zeros(weight.shape[2])
    (_, kept_sum), _ = jax.lax.scan(add_run, (zeros, zeros), (order, sorted_x))
    return kept_sum / (end - start)


def _median(values: Array, there: Array) -> Array:
    """`[R]`, over those rows of `values [T, R]` that are `there [T]`."""
    lanes = 1 << (values.shape[0] - 1).bit_length()
    rows = jnp.where(there[:, None], values, jnp.inf)
    rows = jnp.pad(rows, ((0, lanes - len(values)), (0, 0)), constant_values=jnp.inf)

    # A sorting network: XLA's sort takes 30 times as long on CPU.
    def stage(rows: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        partner, keeps_smaller = at
        other = rows[partner]
        smaller, larger = jnp.minimum(rows, other), jnp.maximum(rows, other)
        return jnp.where(keeps_smaller[:, None], smaller, larger), None

    network = jax.tree.map(jnp.asarray, _bitonic_network(lanes))
    ordered, _ = jax.lax.scan(stage, rows, network)
    tasks = there.sum()
    return (ordered[(tasks - 1) // 2] + ordered[tasks // 2]) / 2.0


def _bitonic_network(lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Batcher's bitonic sort of a power of two lanes (1968), stage by stage.

    Returns:
      With whom each lane is compared, and whether it keeps the smaller of both;
      `[stages, lanes]`.
    """
    lane = np.arange(lanes)
    partners, smaller = [], []
    block = 2
    while block <= lanes:
        distance = block // 2
        while distance:
            partner = lane ^ distance
            ascending = (lane & block) == 0
            partners.append(partner)
            smaller.append(ascending == (lane < partner))
            distance //= 2
        block *= 2
    shape = (len(partners), lanes)
    return (
        np.array(partners, np.int32).reshape(shape),
        np.array(smaller, bool).reshape(shape),
    )


def aggregates(scores: Array, count: Array) -> Aggregates[Array]:
    """Aggregates of the runs as they are; arguments as in `weighted_aggregates`."""
    weight = _mask(count, scores.shape[1]).astype(jnp.uint8)
    found = weighted_aggregates(scores, count, weight[:, :, None])
    return jax.tree.map(lambda value: value[..., 0], found)


def resample(key: Key, count: Array, slots: int, replications: int) -> Array:
    """How often each run was drawn, `[T, slots, replications]` uint8.

    Every task's `count[t]` runs are drawn `count[t]` times with replacement.  (That one
    of more than 255 runs is drawn over 255 times has a probability below 1e-500.)
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
    chosen = jnp.where(each[None, :, None] < limit, chosen, -1)

    def add_draw(weight: Array, own: Array) -> tuple[Array, None]:
        hit = own[:, None, :] == each[None, :, None]
        return weight + hit.astype(jnp.uint8), None

    none = jnp.zeros((count.shape[0], slots, replications), jnp.uint8)
    return jax.lax.scan(add_draw, none, jnp.moveaxis(chosen, 1, 0))[0]


@functools.partial(jax.jit, static_argnames=("slots", "replications"))
def draws(
    key: Key, count: Array, *, slots: int, replications: int = REPLICATIONS
) -> Array:
    """The draws of a bootstrap, `[C, T, slots, R / C]` uint8, in C chunks.

    Args:
      key: the same key gives the same bits.
      count: `[T]`, int32.
      slots: static; at least the largest count.
      replications: R, static.

    Raises:
      ValueError: more than a chunk of replications, and no multiple of it.
    """
    if replications % _CHUNK and replications > _CHUNK:
        raise ValueError(f"replications {replications} is no multiple of {_CHUNK}")
    chunk = min(replications, _CHUNK)
    return jax.lax.map(
        lambda index: resample(jax.random.fold_in(key, index), count, slots, chunk),
        jnp.arange(replications // chunk),
    )


@jax.jit
def replicates(
    scores: Array, count: Array, drawn: Array
) -> tuple[Aggregates[Array], Aggregates[Array]]:
    """Aggregates of the runs as they are, and of every replicate, `[..., R]`."""
    found = jax.lax.map(lambda w: weighted_aggregates(scores, count, w), drawn)
    samples = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1), found
    )
    return aggregates(scores, count), samples


def bootstrap(
    scores: np.ndarray, count: np.ndarray, drawn: Array
) -> Aggregates[Interval]:
    """Aggregates with their stratified percentile intervals, on the host.

    Args:
      scores: `[T, S]`, finite where valid.
      count: `[T]`, int32, at least one positive.
      drawn: from `draws`, of the same count and slots.
    """
    values, samples = jax.device_get(replicates(scores, count, drawn))
    return Aggregates(*map(percentiles, values, samples))


def percentiles(value: np.ndarray, samples: np.ndarray) -> Interval:
    """The percentile interval from `samples [..., R]`, as `numpy.quantile` has it."""
    # NumPy sorts float32 with vector instructions; XLA on CPU takes 15 times as long.
    ordered = np.sort(samples, axis=-1)
    tail = (1.0 - LEVEL) / 2.0
    low, high = (_interpolated(ordered, level) for level in (tail, 1.0 - tail))
    return Interval(value, low, high)


def _interpolated(ordered: np.ndarray, level: float) -> np.ndarray:
    position = level * (ordered.shape[-1] - 1)
    index = min(int(position), ordered.shape[-1] - 2)
    below, above = (ordered[..., i].astype(np.float64) for i in (index, index + 1))
    return below + (above - below) * (position - index)


def improvement(
    x: Array, x_count: Array, x_weight: Array, y: Array, y_count: Array, y_weight: Array
) -> Array:
    """Probability that a run of x beats a run of y, `[R]`.

    The mean over tasks of the Mann-Whitney statistic U / (n m), a tie counting one
    half.

    Args:
      x: `[T, S]`.
      x_count: `[T]`, int32; a task counts if both have runs of it.
      x_weight: `[T, S, R]`, how often each run occurs.
      y: `[T, Q]`.
      y_count: `[T]`, int32.
      y_weight: `[T, Q, R]`.
    """
    above = (x[:, :, None] > y[:, None, :]).astype(jnp.float32)
    equal = (x[:, :, None] == y[:, None, :]).astype(jnp.float32)
    # Sums of halves below 2^23: exact in float32 (but not in the TF32 of some GPUs).
    wins = jnp.einsum(
        "tsq,tqr->tsr",
        above + 0.5 * equal,
        y_weight.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    pairs = (x_count * y_count).astype(jnp.float32)
    per_task = (x_weight.astype(jnp.float32) * wins).sum(axis=1)
    per_task = per_task / jnp.maximum(pairs, 1.0)[:, None]
    return per_task.sum(axis=0) / (pairs > 0).sum().astype(jnp.float32)


class Side(NamedTuple):
    """One of two agents that are compared.

    Attributes:
      scores: `[T, S]`.
      count: `[T]`, int32.
      drawn: `[T, S, R]`, its draws, independent of the other side's.
    """

    scores: Array
    count: Array
    drawn: Array


@functools.partial(jax.jit, static_argnames=("slots", "replications"))
def side_draws(
    key: Key, count: Array, *, slots: int, replications: int = POI_REPLICATIONS
) -> Array:
    """`resample`, compiled; arguments as in `draws`."""
    return resample(key, count, slots, replications)


@jax.jit
def _improvements(x: Side, y: Side) -> tuple[Array, Array]:
    whole = [
        _mask(side.count, side.scores.shape[1]).astype(jnp.uint8)[:, :, None]
        for side in (x, y)
    ]
    value = improvement(x.scores, x.count, whole[0], y.scores, y.count, whole[1])
    samples = improvement(x.scores, x.count, x.drawn, y.scores, y.count, y.drawn)
    return value[0], samples


def probability_of_improvement(x: Side, y: Side) -> Interval:
    """`improvement` with its percentile interval; both sides are resampled."""
    return percentiles(*jax.device_get(_improvements(x, y)))


@jax.jit
def _fractions(marked: Array, count: Array, drawn: Array) -> tuple[Array, Array]:
    runs = jnp.maximum(count, 1).astype(jnp.float32)
    share = 1.0 / (runs * (count > 0).sum().astype(jnp.float32))
    factors = (marked * share[None, :, None]).reshape(marked.shape[0], -1)
    copies = drawn.reshape(factors.shape[1], -1).astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    return factors.sum(axis=1), jnp.matmul(factors, copies, precision=exact)


def fractions(marked: np.ndarray, count: np.ndarray, drawn: Array) -> Interval:
    """Means over tasks of the fraction of runs that are marked, `[K]`.

    Args:
      marked: `[K, T, S]` float32, 1 or 0; 0 at padded slots.
      count: `[T]`, int32, runs of each task.
      drawn: `[T, S, R]`.
    """
    return percentiles(*jax.device_get(_fractions(marked, count, drawn)))
