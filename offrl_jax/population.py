"""Compiled training of many members at once.

A *member* is one run: a task, a setting and a seed.  A population trains M members of
one agent on tasks of equal spec, as a single program: `vmap` over the members, a loop
over updates inside, members spread over the devices of one mesh, the state donated.
The members lie on one flat axis (not on three nested ones): any set of runs fits, such
as the seeds that are still missing, and M members divide over D devices whenever M is
padded to a multiple of D.  The data is stored once per device and never per member.

What is promised about bits, on CPU: for a fixed split (members, their order, number of
devices) training in pieces equals training in one go, whatever the pieces are, and
whatever happens in one member leaves the others' bits alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from offrl_jax.sources import DataTable, DataView, Source
from offrl_jax.types import Agent, Array, Hyper, Key, Metrics, Phase, State

AXIS = "members"


class PopulationState(NamedTuple):
    """All that changes during training; leading axis M (padded to the mesh).

    Attributes:
      agent: leaves `[M, ...]`.
      source: leaves `[M, ...]`.
      key: `[M]`, the members' keys; never changed, only folded with phase and step.
      step: `[M]`, int32, updates done in the current phase.
      diverged_at: `[M]`, int32, the step at which a metric or the state first was not
        finite, counted over the current phase; -1 for a healthy member.
    """

    agent: State
    source: Any
    key: Array
    step: Array
    diverged_at: Array


class Sums(NamedTuple):
    """Running sums of a phase's metrics, which go on from one call to the next.

    In float32 a plain sum of 20,000 equal numbers is off in its fourth digit.  Kahan's
    summation (Communications of the ACM 8, 1965) keeps what every addition loses.

    Attributes:
      total: the sum, by name.
      lost: what `total` holds too much, by name.
      calls: int32, calls of the phase that were added.
    """

    total: Metrics
    lost: Metrics
    calls: Array


def _add(sums: Sums, metrics: Metrics) -> Sums:
    """`sums` with the metrics of one more call."""
    step = jax.tree.map(jnp.subtract, metrics, sums.lost)
    total = jax.tree.map(jnp.add, sums.total, step)
    # In this order: what was really added, less what should have been.
    lost = jax.tree.map(lambda new, old, x: (new - old) - x, total, sums.total, step)
    return Sums(total, lost, sums.calls + 1)


def _means(sums: Sums) -> Metrics:
    """Means over all calls that were added; zeros if there were none."""
    count = jnp.maximum(sums.calls, 1).astype(jnp.float32)
    return jax.tree.map(lambda total: total / count, sums.total)


class Population(NamedTuple):
    """M members of one agent on one mesh.

    Attributes:
      mesh: the devices.
      size: M without padding.
      padded: M with padding, a multiple of the number of devices.
      init: `(seed [M], hyper leaves [M]) -> state`, arguments on the host.
      run: one compiled function per phase:
        `(state, table, task [M], hyper, updates) -> (state, metrics)`, where `updates`
        is traced (no length recompiles), `state` is donated, and metrics are means over
        the updates, leaves `[M]`.
      record: one function per phase, the same compiled program as `run`'s, whose means
        go back beyond the call:
        `(state, sums, table, task, hyper, updates) -> (state, sums, metrics)`, where
        metrics are means over all updates since `sums` were empty.  On CPU they do not
        depend on how those updates were divided into calls.
      no_sums: one function per phase: `(state, table, task, hyper) -> sums`, the empty
        `Sums`, leaves `[M padded]`.
      next_phase: `state -> state` with the step at zero.
    """

    mesh: Mesh
    size: int
    padded: int
    init: Callable[[Any, Hyper], PopulationState]
    run: tuple[Callable[..., tuple[PopulationState, Metrics]], ...]
    record: tuple[Callable[..., tuple[PopulationState, Sums, Metrics]], ...]
    no_sums: tuple[Callable[..., Sums], ...]
    next_phase: Callable[[PopulationState], PopulationState]


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A one-dimensional mesh over `devices` (default: all of this process)."""
    found = np.asarray(devices if devices is not None else jax.local_devices())
    return Mesh(found, (AXIS,))


def spread_members(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree with leading axis M on the mesh, padded with copies of the last
    member.

    The padding is done on the host: indexing an array that is spread over devices would
    compile a collective, and collectives between virtual CPU devices can wait for each
    other for ever when there are fewer cores than work.  A tree that is padded and
    spread already is returned as it is.

    Args:
      tree: leaves `[M, ...]` or `[M padded, ...]`.
      mesh: the devices.

    Returns:
      Leaves `[M padded, ...]`, where M padded is the next multiple of the mesh's size.
    """
    by_member = NamedSharding(mesh, P(AXIS))

    return jax.tree.map(
        lambda leaf: jax.device_put(_padded(leaf, mesh), by_member), tree
    )


def _padded(leaf: Any, mesh: Mesh) -> Any:
    """`leaf` `[M, ...]` with copies of its last entry up to a multiple of the mesh."""
    size = leaf.shape[0]
    padded = -(-size // mesh.size) * mesh.size
    if padded == size:
        return leaf
    return np.asarray(leaf)[np.minimum(np.arange(padded), size - 1)]


def start_keys(seed: Any) -> tuple[Key, Key, Key]:
    """The keys of a member, of its agent's start and of its source's start.

    Phases fold their index into the member's key, so the others come from the far end:
    `split(key)[i]` and `fold_in(key, i)` can be the same key.
    """
    key = jax.random.key(seed)
    agent_key, source_key = jax.random.split(jax.random.fold_in(key, 2**31 - 1))
    return key, agent_key, source_key


def to_host(state: Any, size: int) -> Any:
    """The state (or sums) of the first `size` members as NumPy arrays, unpadded.

    What a checkpoint holds: it fits any number of devices.  Keys become their data.
    """

    def fetch(leaf: Any) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)[:size]

    return jax.tree.map(fetch, state)


def from_host(plain: Any, like: Any, mesh: Mesh) -> Any:
    """Undoes `to_host`: pads and spreads over `mesh`; `like` tells what is a key."""

    def restore(leaf: np.ndarray, model: Any) -> Any:
        leaf = _padded(leaf, mesh)
        if jnp.issubdtype(model.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                jnp.asarray(leaf), impl=jax.random.key_impl(model)
            )
        return leaf

    return spread_members(jax.tree.map(restore, plain, like), mesh)


def _is_finite(tree: Any) -> Array:
    """`[]`, bool: whether every floating-point leaf is finite."""
    checks = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def one_call(
    agent: Agent,
    phase: Phase,
    phase_index: int,
    source: Source,
    state: PopulationState,
    data: DataView,
    hyper: Hyper,
) -> tuple[PopulationState, Metrics]:
    """One call of a phase for one member, and its metrics; see `train_member`."""
    phase_key = jax.random.fold_in(state.key, phase_index)
    batch_key, update_key = jax.random.split(jax.random.fold_in(phase_key, state.step))
    rows = agent.batch_size * phase.stride
    source_state, batch = source.next(
        batch_key, state.source, state.agent, data, hyper, rows
    )
    agent_state, metrics = phase.update(update_key, state.agent, batch, hyper)
    step = state.step + phase.stride
    # Metrics are scalars, so looking at them at every update costs nothing; the
    # parameters are looked at once per chunk.
    bad = (state.diverged_at < 0) & ~_is_finite(metrics)
    diverged_at = jnp.where(bad, step, state.diverged_at)
    return (
        PopulationState(agent_state, source_state, state.key, step, diverged_at),
        metrics,
    )


def train_member(
    agent: Agent,
    phase: Phase,
    phase_index: int,
    source: Source,
    state: PopulationState,
    sums: Sums,
    data: DataView,
    hyper: Hyper,
    calls: Array,
) -> tuple[PopulationState, Sums]:
    """`calls` calls of a phase for one member: the program that `vmap` multiplies.

    Args:
      agent: pure functions.
      phase: the phase to run.
      phase_index: its position, folded into the key.
      source: where batches come from.
      state: leaves without the member axis.
      sums: of the phase's metrics so far.
      data: the member's view of the data.
      hyper: scalars.
      calls: `[]`, int32, traced; each does `phase.stride` updates.

    Returns:
      The state, and the sums with the metrics of these calls.
    """

    def body(_: Array, carry: Any) -> Any:
        state, sums = carry
        state, metrics = one_call(agent, phase, phase_index, source, state, data, hyper)
        return state, _add(sums, metrics)

    after, sums = jax.lax.fori_loop(0, calls, body, (state, sums))

    bad = (after.diverged_at < 0) & ~_is_finite(after.agent)
    after = after._replace(diverged_at=jnp.where(bad, after.step, after.diverged_at))
    # A member that had diverged before this chunk is frozen as it was; its clock goes
    # on so that all members reach the evaluation steps together.
    frozen = state.diverged_at >= 0
    agent_state, source_state = jax.tree.map(
        lambda old, new: jnp.where(frozen, old, new),
        (state.agent, state.source),
        (after.agent, after.source),
    )
    return after._replace(agent=agent_state, source=source_state), sums


def init_member(
    agent: Agent, source: Source, seed: Array, hyper: Hyper
) -> PopulationState:
    """The start of one member: leaves without the member axis.

    Args:
      agent: pure functions.
      source: where batches come from.
      seed: `[]`, uint32.
      hyper: scalars.
    """
    key, agent_key, source_key = start_keys(seed)
    state: Any = (agent.init(agent_key, hyper), source.init(source_key))
    # A state that begins as a Python number is weakly typed: the first chunk would be
    # compiled for it alone.
    state = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)
    zero = jnp.zeros((), jnp.int32)
    return PopulationState(state[0], state[1], key, zero, zero - 1)


def make_population(
    agent: Agent, source: Source, size: int, mesh: Mesh | None = None
) -> Population:
    """Compiles nothing yet; `run[i]` compiles on its first call.

    Args:
      agent: the algorithm.
      source: where batches come from.
      size: M, number of members.
      mesh: devices to spread the members over; default all local ones.

    Raises:
      ValueError: if `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"a population needs at least one member, got {size}")
    mesh = make_mesh() if mesh is None else mesh
    devices = mesh.size
    padded = -(-size // devices) * devices

    # One member after the other: batched, an initialiser may round differently, and a
    # member's start would depend on who is drawn beside it.
    def init_members(seeds: Array, hyper: Hyper) -> PopulationState:
        return jax.lax.map(
            lambda args: init_member(agent, source, *args), (seeds, hyper)
        )

    init_all = jax.jit(
        jax.shard_map(
            init_members,
            mesh=mesh,
            in_specs=P(AXIS),
            out_specs=P(AXIS),
            check_vma=False,
        )
    )

    def init(seed: Any, hyper: Hyper) -> PopulationState:
        seeds = np.asarray(seed, np.uint32)
        return init_all(*spread_members((seeds, hyper), mesh))

    own: Any = DataView(None, 0, 0)  # type: ignore[arg-type]

    def make_phase(index: int, phase: Phase) -> tuple[Callable[..., Any], ...]:
        parts = (agent, phase, index, source)

        def views(table: DataTable, task: Array) -> DataView:
            offset = jax.tree.map(lambda starts: starts[task], table.offset)
            return DataView(table.transitions, offset, table.length[task])

        def chunk(
            state: PopulationState,
            sums: Sums,
            table: DataTable,
            task: Array,
            hyper: Hyper,
            calls: Array,
        ) -> tuple[PopulationState, Sums, Metrics]:
            one: Any = functools.partial(train_member, *parts)
            state, sums = jax.vmap(one, in_axes=(0, 0, own, 0, None))(
                state, sums, views(table, task), hyper, calls
            )
            return state, sums, _means(sums)

        spread = jax.shard_map(
            chunk,
            mesh=mesh,
            in_specs=(P(AXIS), P(AXIS), P(), P(AXIS), P(AXIS), P()),
            out_specs=P(AXIS),
            check_vma=False,
        )
        compiled = jax.jit(spread, donate_argnums=0)

        def one_metrics(
            state: PopulationState, table: DataTable, task: Array, hyper: Hyper
        ) -> Metrics:
            one: Any = functools.partial(one_call, *parts)
            many = jax.vmap(one, in_axes=(0, own, 0))
            return many(state, views(table, task), hyper)[1]

        # Shapes depend on the phase alone, and empty sums are never donated.
        made: list[Sums] = []

        def no_sums(
            state: PopulationState, table: DataTable, task: Array, hyper: Hyper
        ) -> Sums:
            if not made:
                shapes = jax.eval_shape(one_metrics, state, table, task, hyper)
                zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
                empty = Sums(zeros, zeros, np.zeros(padded, np.int32))  # type: ignore[arg-type]
                made.append(spread_members(empty, mesh))
            return made[0]

        def record(
            state: PopulationState,
            sums: Sums,
            table: DataTable,
            task: Array,
            hyper: Hyper,
            updates: int,
        ) -> tuple[PopulationState, Sums, Metrics]:
            if updates % phase.stride:
                raise ValueError(
                    f"phase '{phase.name}' advances {phase.stride} updates at a time, "
                    f"so {updates} updates are not possible"
                )
            calls = np.int32(updates // phase.stride)
            return compiled(state, sums, table, task, hyper, calls)

        def run(
            state: PopulationState,
            table: DataTable,
            task: Array,
            hyper: Hyper,
            updates: int,
        ) -> tuple[PopulationState, Metrics]:
            sums = no_sums(state, table, task, hyper)
            state, _, metrics = record(state, sums, table, task, hyper, updates)
            return state, metrics

        return run, record, no_sums

    def next_phase(state: PopulationState) -> PopulationState:
        return state._replace(step=spread_members(np.zeros(padded, np.int32), mesh))

    phases = [make_phase(i, phase) for i, phase in enumerate(agent.phases)]
    run, record, no_sums = (tuple(each) for each in zip(*phases, strict=True))
    return Population(mesh, size, padded, init, run, record, no_sums, next_phase)


def place(population: Population, table: DataTable, task: Any, hyper: Hyper) -> Any:
    """Puts data on every device, and the per-member arrays where their members are.

    Args:
      population: made by `make_population`.
      table: data of all tasks.
      task: `[M]`, index of each member's task.
      hyper: leaves `[M]`.

    Returns:
      `(table, task, hyper)` as `run` takes them.
    """
    everywhere = NamedSharding(population.mesh, P())
    members = (np.asarray(task, np.int32), hyper)
    return jax.device_put(table, everywhere), *spread_members(members, population.mesh)
