"""Where batches come from, as pure functions.

A source answers one question inside the compiled training loop: given the agent as it
is now, what is the next batch?  The dataset sampler is the common one; a replay buffer,
the rollouts of a learned model or an on-policy collector have the same two functions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.envs.base import PureEnv, renew
from offrl_jax.types import (
    Array,
    Collection,
    Hyper,
    Key,
    Spec,
    State,
    Transitions,
)


class DataTable(NamedTuple):
    """The transitions of T tasks of equal spec, one task after the other, stored once.

    Tasks of unequal length need no padding: a member samples rows
    `offset[t] .. offset[t] + length[t] - 1` of its own task `t`, however many settings
    and seeds share it.  Every leaf has offsets of its own, because tasks may share some
    leaves (the observations of several goals) and not others (their rewards).

    Attributes:
      transitions: leaves `[rows, ...]`, the sum of N over tasks that do not share.
      offset: leaves `[T]`, int32, one for each leaf of `transitions`.
      length: `[T]`, int32.
    """

    transitions: Transitions
    offset: Transitions
    length: Array


class DataView(NamedTuple):
    """What one member sees of a `DataTable`: all rows, and where its own task lies.

    Attributes:
      transitions: leaves `[rows, ...]`; shared by all members.
      offset: leaves `[]`, int32.
      length: `[]`, int32.
    """

    transitions: Transitions
    offset: Transitions
    length: Array


class SourceInit(Protocol):
    """Type of `Source.init`."""

    def __call__(self, key: Key) -> Any:
        """A fresh source state."""
        ...


class SourceNext(Protocol):
    """Type of `Source.next`."""

    def __call__(
        self,
        key: Key,
        source_state: Any,
        agent_state: State,
        data: DataView,
        hyper: Hyper,
        rows: int,
    ) -> tuple[Any, Transitions]:
        """The next source state and a batch of `rows` (static) transitions."""
        ...


class Source(NamedTuple):
    """A pair of pure functions, see the module's docstring."""

    init: SourceInit
    next: SourceNext


def stack_tasks(tasks: Sequence[Transitions]) -> DataTable:
    """Concatenates the transitions of T tasks of equal dimensions.

    Args:
      tasks: per task, leaves `[N_t, ...]`; lengths may differ.  A leaf that is the very
        same array in several tasks is stored once.

    Returns:
      The table, as NumPy arrays (the population puts them on its devices).

    Raises:
      ValueError: if there is no task, a task is empty, or 2^31 rows are exceeded.
    """
    lengths = [int(task.reward.shape[0]) for task in tasks]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"every task needs at least one transition, got {lengths}")
    if sum(lengths) >= 2**31:
        raise ValueError(
            f"{sum(lengths)} transitions exceed the 2^31 that int32 can index"
        )
    stacked = [_stack(leaves) for leaves in zip(*tasks, strict=True)]
    table, offset = (Transitions(*part) for part in zip(*stacked, strict=True))
    length: Any = np.asarray(lengths, np.int32)
    return DataTable(table, offset, length)


def _stack(leaves: Sequence[Any]) -> tuple[Any, Any]:
    """The different arrays one after the other, and where each leaf's own begins."""
    different = {id(leaf): leaf for leaf in leaves}
    starts, rows = {}, 0
    for name, leaf in different.items():
        starts[name] = rows
        rows += len(leaf)
    offset = np.array([starts[id(leaf)] for leaf in leaves], np.int32)
    return np.concatenate(list(different.values())), offset


def dataset_sampler() -> Source:
    """Uniform sampling with replacement from the member's own task."""

    def init(key: Key) -> tuple[()]:
        del key
        return ()

    def sample(
        key: Key,
        source_state: Any,
        agent_state: State,
        data: DataView,
        hyper: Hyper,
        rows: int,
    ) -> tuple[Any, Transitions]:
        del agent_state, hyper
        drawn = jax.random.randint(key, (rows,), 0, data.length)
        # The rows are in range by construction, so no clamping is compiled in.
        batch = jax.tree.map(
            lambda leaf, start: leaf.at[start + drawn].get(mode="promise_in_bounds"),
            data.transitions,
            data.offset,
        )
        return source_state, batch

    return Source(init, sample)


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


def no_data(spec: Spec, tasks: int = 1) -> DataTable:
    """The table of members that gather their own experience: `tasks` without rows."""

    def empty(*shape: int) -> np.ndarray:
        return np.zeros((0, *shape), np.float32)

    obs, action = empty(spec.obs_dim), empty(spec.action_dim)
    one = empty()
    table: Any = Transitions(obs, action, one, one, obs, action, one)
    start: Any = Transitions(*[np.zeros(tasks, np.int32)] * len(Transitions._fields))
    return DataTable(table, start, start.reward)
