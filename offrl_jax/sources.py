"""Where batches come from, as pure functions.

A source answers one question inside the compiled training loop: given the agent as it
is now, what is the next batch?  The dataset sampler is the common one; a replay buffer,
the rollouts of a learned model or an on-policy collector have the same two functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from offrl_jax.types import Array, Hyper, Key, Spec, State, Transitions


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


def no_data(spec: Spec, tasks: int = 1) -> DataTable:
    """The table of members that gather their own experience: `tasks` without rows."""

    def empty(*shape: int) -> Any:
        return np.zeros((0, *shape), np.float32)

    obs, action, one = empty(spec.obs_dim), empty(spec.action_dim), empty()
    nothing = Transitions(obs, action, one, one, obs, action, one)
    starts: Any = np.zeros(tasks, np.int32)
    return DataTable(nothing, jax.tree.map(lambda _: starts, nothing), starts)
