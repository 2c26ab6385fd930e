"""Policies of many members x episodes -> raw returns.

Every member plays its own episodes with its own keys; an episode's start and noise
depend only on the protocol's seed, the member's seed and the number of the episode,
never on who else is evaluated or how the batch is split.  Only the first episode after
a reset counts, and counting is done here, not by a wrapper.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from offrl_jax.envs.base import HostEnv, PureEnv
from offrl_jax.population import AXIS, make_mesh, spread_members
from offrl_jax.types import ActFn, Array, Hyper, ObsStats, State


class EpisodeResults(NamedTuple):
    """What was measured, as NumPy arrays.

    Attributes:
      returns: `[M, episodes]`, float64, undiscounted.
      lengths: `[M, episodes]`, int64, in steps.
      successes: `[M, episodes]`, bool, or None where the task has no such criterion.
    """

    returns: np.ndarray
    lengths: np.ndarray
    successes: np.ndarray | None


class _Tally(NamedTuple):
    """Carried over the steps of E episodes of one member."""

    env: Any
    obs: Array
    returns: Array
    lengths: Array
    success: Array
    active: Array


def standardise(obs: Array, stats: ObsStats) -> Array:
    """`(obs - mean) / std` for `obs` `[..., O]`."""
    lead = (1,) * (obs.ndim - 1)
    return (obs - stats.mean.reshape(*lead, -1)) / stats.std.reshape(*lead, -1)


def _episode_seeds(protocol_seed: int, seeds: np.ndarray, episodes: int) -> np.ndarray:
    """`[M, episodes]`, uint32: one seed per episode, by NumPy's SeedSequence."""
    rows = [
        np.random.SeedSequence([protocol_seed, int(seed)]).generate_state(episodes)
        for seed in seeds
    ]
    return np.stack(rows)


class Evaluator:
    """Evaluates policies of one agent in one environment; compiles once per batch
    shape.

    Attributes:
      env: the environment.
      episodes: episodes per member.
    """

    def __init__(
        self,
        act: ActFn,
        env: PureEnv | HostEnv,
        episodes: int,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        if episodes < 1:
            raise ValueError(f"evaluation needs at least one episode, got {episodes}")
        self.env = env
        self.episodes = episodes
        self._mesh = make_mesh() if mesh is None else mesh
        if isinstance(env, PureEnv):
            body = jax.vmap(lambda *args: _pure_episodes(act, env, *args))
        else:
            body = jax.vmap(lambda *args: _actions(act, *args))
        spread = jax.shard_map(
            body,
            mesh=self._mesh,
            in_specs=P(AXIS),
            out_specs=P(AXIS),
            check_vma=False,
        )
        self._run = jax.jit(spread)

    def __call__(
        self,
        state: State,
        hyper: Hyper,
        stats: ObsStats,
        seeds: np.ndarray,
        protocol_seed: int,
        healthy: np.ndarray | None = None,
    ) -> EpisodeResults:
        """Plays `episodes` episodes with each of M policies.

        Args:
          state: agent states, leaves `[M, ...]` or already padded and on the mesh.
          hyper: leaves `[M]`, likewise.
          stats: standardisation of observations, leaves `[M, O]`, likewise.
          seeds: `[M]`, the members' seeds.
          protocol_seed: the protocol's; another one gives other episodes.
          healthy: `[M]`, bool; a simulator is not stepped with the actions of the
            others (they may be NaN) and their entries mean nothing.  Default: all.

        Returns:
          Returns, lengths and successes per member and episode.
        """
        size = len(seeds)
        policy = spread_members((state, hyper, stats), self._mesh)
        episode_seeds = _episode_seeds(protocol_seed, seeds, self.episodes)
        if isinstance(self.env, PureEnv):
            out = self._run(spread_members(episode_seeds, self._mesh), *policy)
            returns, lengths, success = (np.asarray(leaf)[:size] for leaf in out)
        else:
            if healthy is None:
                healthy = np.ones(size, bool)
            returns, lengths, success = self._on_host(policy, episode_seeds, healthy)
        return EpisodeResults(
            returns.astype(np.float64),
            lengths.astype(np.int64),
            success.astype(bool) if self.env.has_success else None,
        )

    def _on_host(
        self, policy: Any, seeds: np.ndarray, healthy: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Episodes stepped outside of jit, in slices that the environment can hold."""
        assert not isinstance(self.env, PureEnv)
        width = max(1, min(self.episodes, self.env.max_batch // len(seeds)))
        parts = [
            self._host_slice(policy, seeds[:, start : start + width], healthy, width)
            for start in range(0, self.episodes, width)
        ]
        returns, lengths, success = (
            np.concatenate(leaves, axis=1) for leaves in zip(*parts, strict=True)
        )
        return returns, lengths, success

    def _host_slice(
        self, policy: Any, seeds: np.ndarray, healthy: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        env = self.env
        assert not isinstance(env, PureEnv)
        size, episodes = seeds.shape
        obs_dim = env.spec.obs_dim
        padded = -(-size // self._mesh.size) * self._mesh.size
        # Every call of the compiled policy has the same shape: short slices are padded.
        padded_seeds = np.zeros((padded, width), np.uint32)
        padded_seeds[:size, :episodes] = seeds
        padded_seeds = spread_members(padded_seeds, self._mesh)
        obs = env.reset(seeds.reshape(-1))
        returns = np.zeros(size * episodes)
        lengths = np.zeros(size * episodes, np.int64)
        success = np.zeros(size * episodes, bool)
        active = np.repeat(healthy, episodes)
        padded_obs = np.zeros((padded, width, obs_dim), np.float32)
        for t in range(env.spec.horizon):
            padded_obs[:size, :episodes] = obs.reshape(size, episodes, obs_dim)
            steps = np.full(padded, t, np.int32)
            inputs = spread_members((steps, padded_obs), self._mesh)
            action = np.asarray(self._run(padded_seeds, inputs[0], *policy, inputs[1]))
            action = action[:size, :episodes].reshape(size * episodes, -1)
            step = env.step(action, active)
            returns += np.where(active, step.reward, 0.0)
            lengths += active
            success |= active & step.success
            active &= ~(step.terminated | step.truncated)
            obs = step.obs
            if not active.any():
                break
        shape = (size, episodes)
        return returns.reshape(shape), lengths.reshape(shape), success.reshape(shape)


def _actions(
    act: ActFn,
    seeds: Array,
    t: Array,
    state: State,
    hyper: Hyper,
    stats: ObsStats,
    obs: Array,
) -> Array:
    """Actions `[E, A]` of one member at step `t` in `obs` `[E, O]`; `seeds` `[E]`.

    Every episode has its own key, so a policy that draws noise draws the same noise
    however many episodes are played beside it.
    """

    def one(seed: Array, obs: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return act(jax.random.fold_in(key, t), state, obs[None], hyper)[0]

    return jnp.clip(jax.vmap(one)(seeds, standardise(obs, stats)), -1.0, 1.0)


def _pure_episodes(
    act: ActFn, env: PureEnv, seeds: Array, state: State, hyper: Hyper, stats: ObsStats
) -> tuple[Array, Array, Array]:
    """Returns, lengths and successes `[E]` of one member's whole episodes."""
    episodes = seeds.shape[0]
    reset_keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))
    env_state, obs = jax.vmap(env.reset)(reset_keys(seeds))
    start = _Tally(
        env_state,
        obs,
        jnp.zeros(episodes),
        jnp.zeros(episodes, jnp.int32),
        jnp.zeros(episodes, bool),
        jnp.ones(episodes, bool),
    )

    def more(carry: tuple[Array, _Tally]) -> Array:
        t, tally = carry
        return (t < env.spec.horizon) & jnp.any(tally.active)

    def advance(carry: tuple[Array, _Tally]) -> tuple[Array, _Tally]:
        t, tally = carry
        action = _actions(act, seeds, t, state, hyper, stats, tally.obs)
        env_state, step = jax.vmap(env.step)(tally.env, action)
        active = tally.active
        return t + 1, _Tally(
            env_state,
            step.obs,
            tally.returns + jnp.where(active, step.reward, 0.0),
            tally.lengths + active.astype(jnp.int32),
            tally.success | (active & step.success),
            active & ~(step.terminated | step.truncated),
        )

    zero = jnp.zeros((), jnp.int32)
    _, tally = jax.lax.while_loop(more, advance, (zero, start))
    return tally.returns, tally.lengths, tally.success
