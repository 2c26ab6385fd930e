"""Experience gathered by the policy itself, inside of the compiled training loop."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from offrl_jax.envs.base import PureEnv, renew
from offrl_jax.sources import DataView, Source
from offrl_jax.types import Array, Collection, Hyper, Key, State, Transitions


class Collected(NamedTuple):
    """State of an on-policy collector: episodes in progress.

    Attributes:
      env: leaves `[E, ...]`, states of the environment.
      obs: `[E, O]`, what the policy sees next.
    """

    env: Any
    obs: Array


def on_policy_collector(env: PureEnv, collection: Collection) -> Source:
    """Rollouts of the policy as it is, in E episodes that go on from batch to batch.

    A batch of `rows` transitions is T = rows / E steps of every episode, time-major.
    Where an episode ends, a fresh one begins; `next_obs` is still the state that the
    old one ended in, `discount` is 0 only if it terminated there, and
    `has_next_action` is 0 there and at the last step of the batch.  `action` is what
    the policy drew; the environment gets it clipped to [-1, 1].

    Args:
      env: where to act.
      collection: the policy that acts, and E.

    Returns:
      A source that needs no data; its `next` raises ValueError if `rows` is not a
      multiple of E.
    """
    count = collection.environments

    def init(key: Key) -> Collected:
        return Collected(*jax.vmap(env.reset)(jax.random.split(key, count)))

    def collect(
        key: Key,
        source_state: Any,
        agent_state: State,
        data: DataView,
        hyper: Hyper,
        rows: int,
    ) -> tuple[Any, Transitions]:
        del data
        if rows % count:
            raise ValueError(f"{rows} transitions are no rollout of {count} episodes")

        def step(now: Collected, key: Key) -> tuple[Collected, Transitions]:
            act_key, reset_key = jax.random.split(key)
            action = collection.explore(act_key, agent_state, now.obs, hyper)
            after, seen = jax.vmap(env.step)(now.env, jnp.clip(action, -1.0, 1.0))
            over = seen.terminated | seen.truncated
            keys = jax.random.split(reset_key, count)
            begin = jax.vmap(functools.partial(renew, env))
            state, obs = begin(keys, after, seen.obs, over)
            transition = Transitions(
                obs=now.obs,
                action=action,
                reward=seen.reward,
                discount=1.0 - seen.terminated.astype(jnp.float32),
                next_obs=seen.obs,
                next_action=jnp.zeros_like(action),  # known one step later
                has_next_action=1.0 - over.astype(jnp.float32),
            )
            return Collected(state, obs), transition

        keys = jax.random.split(key, rows // count)
        after, steps = jax.lax.scan(step, source_state, keys)
        # The last step's next action belongs to the next batch.
        following = jnp.concatenate(
            [steps.has_next_action[:-1], jnp.zeros_like(steps.has_next_action[:1])]
        )
        action = jnp.concatenate([steps.action[1:], jnp.zeros_like(steps.action[:1])])
        steps = steps._replace(
            next_action=action * following[..., None], has_next_action=following
        )
        flat = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), steps)
        return after, flat

    return Source(init, collect)
