"""The difference of one agent's runs on two sides, with bootstrap intervals.

Where both sides have the same seeds on every task, the runs of a seed are drawn
together (the paired bootstrap); else each side is drawn on its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.leaderboard import statistics
from offrl_jax.leaderboard.ranking import SEED, Bounds, bounds, padded
from offrl_jax.leaderboard.statistics import POI_REPLICATIONS, Interval, Side
from offrl_jax.types import Array

Runs = Mapping[str, Sequence[float]]
"""Values of the runs of one side by task; paired ones in the order of their seeds."""


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
      paired: whether runs of the same place are drawn together.
    """
    by_task: dict[str, Bounds] = {}
    for task in before:
        if task not in pooled:  # raw returns of different tasks have no common scale
            alone = _aggregate(before, after, [task], paired)
            by_task[task] = alone.by_task[task]
    if not pooled:
        return Estimates(None, None, None, by_task)
    found = _aggregate(before, after, pooled, paired)
    return dataclasses.replace(found, by_task=by_task | dict(found.by_task))


def _aggregate(
    before: Runs, after: Runs, tasks: Sequence[str], paired: bool
) -> Estimates:
    # Differences do not feel a shift, but float32 does.
    shift = float(
        np.mean([x for side in (before, after) for t in tasks for x in side[t]])
    )
    sides = [
        padded({task: np.subtract(side[task], shift).tolist() for task in tasks}, tasks)
        for side in (before, after)
    ]
    found, samples, chances = [], [], []
    for stream, (scores, count) in enumerate(sides):
        counts, slots = tuple(count.tolist()), scores.shape[1]
        drawn, few = _draws(counts, slots, 0 if paired else stream)
        of_runs, of_draws = jax.device_get(statistics.replicates(scores, count, drawn))
        found.append(of_runs)
        samples.append(of_draws)
        chances.append(Side(jnp.asarray(scores), jnp.asarray(count), few))
    iqm, mean, means = (
        statistics.percentiles(
            getattr(found[1], name) - getattr(found[0], name),
            getattr(samples[1], name) - getattr(samples[0], name),
        )
        for name in ("iqm", "mean", "task_mean")
    )
    wins = statistics.probability_of_improvement(chances[1], chances[0])
    several = {t: len(before[t]) > 1 or len(after[t]) > 1 for t in tasks}
    return Estimates(
        bounds(iqm, any(several.values())),
        bounds(mean, any(several.values())),
        bounds(wins, any(several.values())),
        {
            task: bounds(Interval(*(part[i] for part in means)), several[task])
            for i, task in enumerate(tasks)
        },
    )


# Of both sides: one byte per replication and run each.
@functools.lru_cache(maxsize=2)
def _draws(count: tuple[int, ...], slots: int, stream: int) -> tuple[Array, Array]:
    """Draws of aggregates, in chunks, and those of a probability, in one."""
    key = jax.random.fold_in(jax.random.key(SEED), stream)
    drawn = statistics.draws(key, np.array(count, np.int32), slots=slots)
    chunks = POI_REPLICATIONS // drawn.shape[-1]
    return drawn, jnp.concatenate(drawn[:chunks], axis=-1)
