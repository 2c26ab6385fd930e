"""What choosing among trained policies costs online: two curves, simulated from rows.

`expected_best` is the expected online performance of Kurenkov & Kolesnikov (ICML 2022),
which takes every evaluation for the truth.  `deployment` simulates the bandit of
Unifloral (Jackson et al., NeurIPS 2025) on stored episodes, which prices the noise of
episodes.  Letters: N trained policies, B populations of them, K arms, P pulls.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.types import Array, Key

BONUS = 2.0
"""Factor of UCB's bonus for rewards whose scale is 1; that of Unifloral."""


class Policies(NamedTuple):
    """Trained policies of one agent on one task, padded to the right.

    Attributes:
      values: `[N]`, mean of all episodes of each.
      rewards: `[N, E]`, of its episodes, on a scale of about 1.
      lengths: `[N]`, int32, how many episodes it has; at least 1.
      count: `[]`, int32, how many policies there are.
    """

    values: Array
    rewards: Array
    lengths: Array
    count: Array


@functools.partial(jax.jit, static_argnames=("size", "replications"))
def populations(key: Key, count: Array, *, size: int, replications: int) -> Array:
    """Policies drawn with replacement, `[replications, size]` int32 below `count`."""
    uniform = jax.random.uniform(key, (size, replications))
    drawn = jnp.floor(uniform * count.astype(jnp.float32)).astype(jnp.int32)
    return jnp.minimum(drawn, count - 1).T


def expected_best(values: np.ndarray) -> np.ndarray:
    """Expected best of n policies drawn with replacement, for n = 1 .. N.

    With x_(1) <= ... <= x_(N): `sum_i x_(i) ((i / N)^n - ((i - 1) / N)^n)`.

    Args:
      values: `[..., N]`.

    Returns:
      `[..., N]`; the first is the mean.
    """
    size = values.shape[-1]
    below = (np.arange(size + 1) / size)[:, None] ** np.arange(1, size + 1)
    return np.sort(values, axis=-1) @ np.diff(below, axis=0)


@functools.partial(jax.jit, static_argnames=("arms", "pulls", "trials"))
def deployment(
    key: Key,
    policies: Policies,
    population: Array,
    *,
    arms: int,
    pulls: int,
    trials: int,
) -> Array:
    """True value of the arm that looks best after every pull, mean over trials.

    A trial draws `arms` policies without replacement, or all where there are fewer.
    Every pull draws one stored episode of the arm with the largest mean reward plus
    `BONUS sqrt(ln t / n)` after t pulls, n of them its own; arms without a pull come
    first, and never look best.

    Args:
      key: of all draws.
      policies: padded; new numbers do not recompile.
      population: `[B, N]`, which policy stands in each of the first `count` places.
      arms: K, static.
      pulls: P, static.
      trials: per population, static.

    Returns:
      `[B, P]`, in the unit of `policies.values`.
    """
    sizes = (population.shape[0], population.shape[1])
    arms_key, pulls_key = jax.random.split(key)
    place = _places(arms_key, policies.count, sizes, trials, min(arms, sizes[1]))
    policy = jnp.take_along_axis(population[:, None, :], place, axis=2)
    policy = policy.reshape(-1, place.shape[2]).T  # [K, B trials]: long vectors
    there = (jnp.arange(len(policy)) < policies.count)[:, None]
    width = policies.rewards.shape[1]

    def pull(state: tuple[Array, Array], t: Array):
        pulled, total = state
        own = jnp.maximum(pulled, 1.0)
        bonus = BONUS * jnp.sqrt(jnp.log(jnp.maximum(t, 1.0)) / own)
        index = jnp.where(pulled > 0, total / own + bonus, jnp.inf)
        chosen = _first_largest(jnp.where(there, index, -jnp.inf))
        drawn = (chosen * policy).sum(axis=0)
        uniform = jax.random.uniform(
            jax.random.fold_in(pulls_key, t.astype(jnp.int32)), drawn.shape
        )
        length = policies.lengths[drawn]
        episode = jnp.floor(uniform * length.astype(jnp.float32)).astype(jnp.int32)
        at = drawn * width + jnp.minimum(episode, length - 1)
        pulled = pulled + chosen.astype(jnp.float32)
        reward = policies.rewards.reshape(-1)[at]
        total = total + jnp.where(chosen > 0, reward[None, :], 0.0)
        mean = jnp.where(pulled > 0, total / jnp.maximum(pulled, 1.0), -jnp.inf)
        best = (_first_largest(mean) * policy).sum(axis=0)
        value = policies.values[best].reshape(sizes[0], trials).mean(axis=1)
        return (pulled, total), value

    none = jnp.zeros(policy.shape)
    steps = jnp.arange(pulls, dtype=jnp.float32)
    return jax.lax.scan(pull, (none, none), steps)[1].T


def _places(
    key: Key, count: Array, sizes: tuple[int, int], trials: int, arms: int
) -> Array:
    """Places of arms, in order, `[B, trials, K]`; beyond `count` of them they repeat.

    Consecutive trials turn one random order of all places, each by one more: a trial is
    a draw without replacement, and together they draw all places equally often, which
    takes most of the simulation's own noise out of a mean over trials.
    """
    order = jax.random.uniform(key, (sizes[0], trials, sizes[1]))
    order = jnp.where(jnp.arange(sizes[1]) < count, order, jnp.inf)
    order = jnp.argsort(order, axis=2)
    trial = jnp.arange(trials)
    turned = (trial[:, None] % count + jnp.arange(arms)[None, :]) % count
    return jnp.take_along_axis(order[:, trial // count], turned[None], axis=2)


def _first_largest(index: Array) -> Array:
    """One at the first largest of every column of `[K, L]`, zero elsewhere; int32."""
    place = jnp.arange(len(index), dtype=jnp.int32)[:, None]
    largest = index == index.max(axis=0, keepdims=True)
    first = jnp.where(largest, place, len(index)).min(axis=0, keepdims=True)
    return (place == first).astype(jnp.int32)
