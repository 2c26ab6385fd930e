"""Scripted behaviour policies rolled out in pure environments, as one compiled program.

A behaviour is a controller with *knobs*: numbers drawn once per episode, each uniformly
from a range.  A quality (`medium`, say) is a mixture of such ranges, so that a dataset
is described completely by plain numbers, which are its recipe.  One program per
environment serves every quality.

Letters: K episodes, P horizon of the environment (steps of the padded rollout).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.datasets.schema import Episodes
from offrl_jax.envs.base import PureEnv
from offrl_jax.types import Array, Key

Range = tuple[float, float]
Knobs = Mapping[str, Any]
"""Knob values by name: scalars `[]` of one episode, or `[K]` of many; float32."""


class Component(NamedTuple):
    """Part of a mixture.

    Attributes:
      episodes: how many.
      knobs: a range for each knob that differs from the behaviour's default.
    """

    episodes: int
    knobs: Mapping[str, Range]


class Behaviour(NamedTuple):
    """A controller of one environment; hashable, so that it can be static in `jit`.

    Attributes:
      env: where it acts.
      start: `(key, knobs) -> (env state, obs [O], memory)`: begins an episode.
      act: `(key, knobs, memory, obs) -> (action [A], memory)`.
      finished: `(knobs, memory, obs) -> []` bool, whether the recording is cut
        (`truncated`) after the step that led to `obs`.
      defaults: a range of every knob, as sorted pairs.
    """

    env: PureEnv
    start: Callable[[Key, Knobs], tuple[Any, Array, Any]]
    act: Callable[[Key, Knobs, Any, Array], tuple[Array, Any]]
    finished: Callable[[Knobs, Any, Array], Array]
    defaults: tuple[tuple[str, Range], ...]


class Rollout(NamedTuple):
    """Episodes padded to P steps, `[K, P, ...]`; rows after an end mean nothing."""

    obs: Any
    action: Any
    reward: Any
    next_obs: Any
    terminated: Any
    truncated: Any
    success: Any


def never_finished(knobs: Knobs, memory: Any, obs: Array) -> Array:
    """The recording lasts as long as the environment's episode."""
    del knobs, memory, obs
    return jnp.zeros((), bool)


def with_noise(key: Key, knobs: Knobs, action: Array) -> Array:
    """Adds Gaussian noise (`noise`), then acts at random with probability `epsilon`."""
    k_noise, k_random, k_coin = jax.random.split(key, 3)
    noisy = action + knobs["noise"] * jax.random.normal(k_noise, action.shape)
    anything = jax.random.uniform(k_random, action.shape, minval=-1.0, maxval=1.0)
    at_random = jax.random.bernoulli(k_coin, knobs["epsilon"])
    return jnp.clip(jnp.where(at_random, anything, noisy), -1.0, 1.0)


def draw_knobs(
    behaviour: Behaviour, mixture: Sequence[Component], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Knobs of all episodes of a mixture, `[K]` float32 each, in random order.

    Raises:
      ValueError: a component names a knob that the behaviour has not.
    """
    defaults = dict(behaviour.defaults)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in defaults}
    for component in mixture:
        unknown = set(component.knobs) - set(defaults)
        if unknown:
            raise ValueError(f"no such knobs: {sorted(unknown)}")
        for name, default in defaults.items():
            low, high = component.knobs.get(name, default)
            columns[name].append(rng.uniform(low, high, component.episodes))
    joined = {
        name: np.concatenate(parts).astype(np.float32)
        for name, parts in columns.items()
    }
    order = rng.permutation(sum(component.episodes for component in mixture))
    return {name: values[order] for name, values in joined.items()}


def _episode(behaviour: Behaviour, key: Key, knobs: Knobs) -> Rollout:
    k_start, k_act = jax.random.split(key)
    env_state, obs, memory = behaviour.start(k_start, knobs)

    def step(carry: Any, t: Array) -> tuple[Any, Rollout]:
        env_state, obs, memory = carry
        k_step = jax.random.fold_in(k_act, t)
        action, memory = behaviour.act(k_step, knobs, memory, obs)
        env_state, after = behaviour.env.step(env_state, action)
        cut = behaviour.finished(knobs, memory, after.obs) & ~after.terminated
        row = Rollout(
            obs=obs,
            action=action,
            reward=after.reward,
            next_obs=after.obs,
            terminated=after.terminated,
            truncated=after.truncated | cut,
            success=after.success,
        )
        return (env_state, after.obs, memory), row

    times = jnp.arange(behaviour.env.spec.horizon)
    return jax.lax.scan(step, (env_state, obs, memory), times)[1]


@functools.partial(jax.jit, static_argnums=0)
def _episodes(behaviour: Behaviour, keys: Key, knobs: Knobs) -> Rollout:
    return jax.vmap(functools.partial(_episode, behaviour))(keys, knobs)


_CHUNK = 256


def rollout(behaviour: Behaviour, knobs: Knobs, seed: int) -> Rollout:
    """Rolls K episodes out; NumPy leaves `[K, P, ...]`.

    Episodes are computed in chunks of a fixed size, so that one compiled program serves
    every K and episode i does not depend on K.

    Args:
      behaviour: the controller.
      knobs: `[K]` each.
      seed: episode i uses `fold_in(key(seed), i)`.
    """
    count = len(next(iter(knobs.values())))
    root = jax.random.key(seed, impl="threefry2x32")
    parts = []
    for first in range(0, count, _CHUNK):
        wanted = np.arange(first, first + _CHUNK)
        # The last chunk is filled up with copies of the last episode, then cut.
        rows = np.minimum(wanted, count - 1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, rows.astype(np.uint32))
        part = _episodes(behaviour, keys, {k: v[rows] for k, v in knobs.items()})
        keep = min(_CHUNK, count - first)
        parts.append(jax.tree.map(lambda x, keep=keep: np.asarray(x)[:keep], part))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _valid(rows: Rollout) -> np.ndarray:
    """`[K, P]` bool: rows up to and including the first end of their episode."""
    ended = rows.terminated | rows.truncated
    before = np.cumsum(ended, axis=1) - ended
    return before == 0


def pack(rows: Rollout) -> Episodes:
    """Drops the padding and lays the episodes one after the other."""
    valid = _valid(rows)
    return Episodes(
        obs=rows.obs[valid],
        action=rows.action[valid],
        reward=rows.reward[valid],
        next_obs=rows.next_obs[valid],
        terminated=rows.terminated[valid],
        truncated=rows.truncated[valid],
    )


def successes(rows: Rollout) -> np.ndarray:
    """`[K]` bool: whether any step of the episode succeeded."""
    return (rows.success & _valid(rows)).any(axis=1)
