"""How much memory a population needs, estimated before anything is compiled.

The program of one member is traced with shapes alone, and its intermediate results are
followed from where they are made to where they are last used: the largest sum of what
lives at one time, times `TEMPORARIES`, stands for what the compiler will allocate.  A
multiple of the state would not do: the temporaries are 3 states in behaviour cloning
and 250 in MISA with small networks, since they go with batch and samples.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from offrl_jax import envs
from offrl_jax.agents.registry import get_entry, parse_label
from offrl_jax.benchmark.planning import config_from_plain
from offrl_jax.benchmark.preparation import source_of
from offrl_jax.benchmark.splitting import fewest_devices
from offrl_jax.catalogue import LoadedTask
from offrl_jax.errors import UsageError
from offrl_jax.population import (
    PopulationState,
    Sums,
    init_member,
    one_call,
    train_member,
)
from offrl_jax.results import Job
from offrl_jax.results.rows import strict_json
from offrl_jax.sources import DataView, Source
from offrl_jax.types import Agent, Hyper, Spec, Transitions

TEMPORARIES = 2.0
"""Allocated temporaries over those of the trace, at most: docs/large_runs.md."""
SAFE_SHARE = 0.8
"""Of the memory that a device or machine says it has; the rest is for what we miss."""
GIB = 2**30
_FLOAT = 4
_SIMULATOR = 500_000
"""Bytes of one episode in a simulator on the host."""
_HOST_STATES = 4
"""Copies of a member's state on the host while a checkpoint is written."""
_HOST_TABLES = 2
"""Copies of the data on the host while they are prepared."""


class Need(NamedTuple):
    """Estimated bytes of a population.

    Attributes:
      table: the data, once on every device.
      member: on its device, for each member: state, sums of metrics, temporaries of the
        hungriest of training, evaluation and resuming.
      host: on the host, for each member: what a checkpoint copies, and simulators.
    """

    table: int
    member: int
    host: int


class Memory(NamedTuple):
    """What populations may use.

    Attributes:
      bytes: per device, or of all devices together if `shared`.
      shared: whether the devices are virtual ones of a CPU, with one memory.
    """

    bytes: int
    shared: bool


def needed(need: Need, members: int, devices: int, shared: bool) -> int:
    """Bytes per device (in all, if `shared`) of `members` members on `devices`.

    Args:
      need: of one member.
      members: M.
      devices: that they are spread over; M is padded to a multiple.
      shared: as in `Memory`.
    """
    each = -(-members // devices)
    if not shared:
        return need.table + each * need.member
    tables = (devices + _HOST_TABLES) * need.table
    return tables + each * devices * need.member + members * need.host


def most_members(need: Need, memory: Memory, devices: int, at_most: int) -> int:
    """The most members, up to `at_most`, that fit on up to `devices`; 0 if none does.

    Args:
      need: of one member.
      memory: what there is.
      devices: available.
      at_most: members that are to be trained.
    """

    def fits(members: int) -> bool:
        used = fewest_devices(members, devices)
        return needed(need, members, used, memory.shared) <= memory.bytes

    return next((m for m in range(at_most, 0, -1) if fits(m)), 0)


def estimate(job: Job, tasks: Mapping[str, LoadedTask]) -> Need:
    """What a member of `job`, and its data, need; traces, but compiles nothing.

    Args:
      job: its agent, structure and tasks count, not the number of its members.
      tasks: by id; one without data (absent yet) counts nothing for them.
    """
    entry = get_entry(parse_label(job.agent)[0])
    loaded = [tasks[name] for name in dict.fromkeys(m.task for m in job.members)]
    spec = loaded[0].spec
    agent = entry.make(config_from_plain(entry.config, job.config), spec)
    source = source_of(agent, loaded)
    hyper = entry.hyper(
        **{field.name: _shape() for field in dataclasses.fields(entry.hyper)}
    )
    state, own, temporaries = trace_training(agent, source, hyper, spec)
    episodes = max(job.protocol["episodes"], job.protocol["curve_episodes"])
    acting = peak_bytes(_acting(agent, state, hyper, spec.obs_dim, episodes).jaxpr)
    simulated = not all(envs.is_pure(str(one.task.env_id)) for one in loaded)
    member = max(
        own + round(TEMPORARIES * temporaries),
        # Members of one of several environments are copied to be evaluated.
        2 * own + round(TEMPORARIES * acting),
    )
    simulators = episodes * _SIMULATOR if simulated else 0
    return Need(table_bytes(loaded), member, _HOST_STATES * own + simulators)


def trace_training(
    agent: Agent, source: Source, hyper: Hyper, spec: Spec
) -> tuple[PopulationState, int, int]:
    """One member's training, followed with shapes alone.

    Args:
      agent: pure functions.
      source: of its batches.
      hyper: leaves are shapes.
      spec: of its tasks.

    Returns:
      The member's state, as shapes; bytes of state, settings and sums of metrics; the
      most bytes of intermediate results that live at one time in any phase.
    """
    count = _shape(dtype=jnp.int32)
    state = jax.eval_shape(
        partial(init_member, agent, source), _shape(dtype=jnp.uint32), hyper
    )
    rows, obs, action = 2**20, (spec.obs_dim,), (spec.action_dim,)
    table = Transitions(
        *(_shape(rows, *ends) for ends in (obs, action, (), (), obs, action, ()))
    )
    view = DataView(table, jax.tree.map(lambda _: count, table), count)
    own, temporaries = tree_bytes((state, hyper)), 0
    for index, phase in enumerate(agent.phases):
        parts = (agent, phase, index, source)
        metrics = jax.eval_shape(partial(one_call, *parts), state, view, hyper)[1]
        sums = Sums(metrics, metrics, count)
        own += tree_bytes(sums)
        traced = jax.make_jaxpr(partial(train_member, *parts))(
            state, sums, view, hyper, count
        )
        temporaries = max(temporaries, peak_bytes(traced.jaxpr))
    return state, own, temporaries


def _shape(*lengths: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(lengths, dtype)


def _acting(agent: Agent, state: Any, hyper: Any, obs_dim: int, episodes: int) -> Any:
    """The traced policy of one member in all of its episodes at once."""

    def act(seeds: Any, obs: Any, state: Any, hyper: Any) -> Any:
        def one(seed: Any, obs: Any) -> Any:
            return agent.act(jax.random.key(seed), state, obs[None], hyper)

        return jax.vmap(one)(seeds, obs)

    seeds = _shape(episodes, dtype=jnp.uint32)
    return jax.make_jaxpr(act)(seeds, _shape(episodes, obs_dim), state.agent, hyper)


def table_bytes(tasks: Sequence[LoadedTask]) -> int:
    """Bytes of `sources.DataTable` on one device; shared observations count once."""
    observed: dict[Any, int] = {}
    total = 0
    for task in tasks:
        rows, spec = len(task.train.reward), task.spec
        hashes = task.array_hashes
        pair = (hashes.get("obs", task.task.id), hashes.get("next_obs"))
        observed[pair] = rows * 2 * spec.obs_dim
        # Two actions; reward, discount, and whether there is a next action.
        total += rows * (2 * spec.action_dim + 3)
    return _FLOAT * (total + sum(observed.values()))


def in_words(size: int) -> str:
    """Bytes for people: 13 MiB, 1.5 GiB."""
    if size < GIB:
        return f"{max(1, round(size / 2**20))} MiB"
    return f"{size / GIB:.1f} GiB"


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or of shapes."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(leaf: Any) -> int:
    """Of an array, a shape or an abstract value; a key counts as its data."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return 0
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return math.prod(leaf.shape) * (8 if is_key else dtype.itemsize)


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """The largest sum of intermediate results, outputs included, that live at once.

    Args:
      jaxpr: of a program; what it is given is not counted, and what lives inside of an
        operation (a loop's body, a branch) is.
    """
    uses: dict[Any, int] = {}
    for index, equation in enumerate(jaxpr.eqns):
        uses |= dict.fromkeys(_variables(equation.invars), index)
    uses |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    alive: dict[Any, int] = {}
    total, most = 0, 0
    for index, equation in enumerate(jaxpr.eqns):
        made = sum(_bytes(each.aval) for each in equation.outvars)
        inner = max(map(peak_bytes, core.jaxprs_in_params(equation.params)), default=0)
        if equation.primitive.name == "while":
            inner += made  # what a round begins with, beside what it makes
        most = max(most, total + max(made, inner))
        for each in equation.outvars:
            if each in uses:
                alive[each] = _bytes(each.aval)
                total += alive[each]
        for each in set(_variables(equation.invars)):
            if uses[each] == index:
                total -= alive.pop(each, 0)
    return most


def _variables(found: Iterable[Any]) -> list[Any]:
    return [each for each in found if isinstance(each, core.Var)]


def check_given(given_gib: float | None) -> None:
    """Refuses a limit that is none.

    Raises:
      UsageError: `given_gib` is not positive.
    """
    if given_gib is not None and not 0 < given_gib < math.inf:
        raise UsageError(f"--memory must be above 0 GiB, got {given_gib:g}")


def device_memory(devices: Sequence[Any], given_gib: float | None) -> Memory | None:
    """What populations may use on these devices; None if that cannot be told.

    Args:
      devices: of one kind.
      given_gib: by the user: GiB per device, or in all on a CPU; taken as it is.
    """
    shared = devices[0].platform == "cpu"
    if given_gib is not None:
        return Memory(int(given_gib * GIB), shared)
    if shared:
        found = available_bytes()
    else:
        limits = [(each.memory_stats() or {}).get("bytes_limit", 0) for each in devices]
        found = min(limits) or None
    return None if found is None else Memory(int(SAFE_SHARE * found), shared)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this machine could still give, within a container's limit.

    Args:
      root: of the file system, `/` outside of tests.
    """
    found = []
    lines = _read(root / "proc/meminfo").splitlines()
    for line in lines:
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, used, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        base = root / "sys/fs/cgroup"
        bound, taken = _read(base / limit).strip(), _read(base / used).strip()
        if bound.isdigit() and taken.isdigit():
            statistics = _read((base / limit).with_name("memory.stat"))
            fields = dict(line.split()[:2] for line in statistics.splitlines())
            found.append(max(0, int(bound) - int(taken) + int(fields.get(idle, 0))))
    if not found and root == Path("/"):
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (ValueError, OSError):
            return None
    return min(found, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class Estimates:
    """Needs of jobs, each estimated once per agent, structure and tasks.

    Attributes:
      tasks: loaded tasks by id.
      memory: what there is; None: unknown, so everything fits.
    """

    def __init__(self, tasks: Mapping[str, LoadedTask], memory: Memory | None) -> None:
        self.tasks = tasks
        self.memory = memory
        self._known: dict[str, Need] = {}

    def need(self, job: Job) -> Need:
        """`estimate` of a job; see there."""
        names = sorted({member.task for member in job.members})
        key = strict_json([job.agent, job.config, job.protocol, names])
        if key not in self._known:
            self._known[key] = estimate(job, self.tasks)
        return self._known[key]

    def most(self, job: Job) -> int:
        """The most members of `job` that one population may have.

        Raises:
          UsageError: not even one fits.
        """
        members = len(job.members)
        if self.memory is None:
            return members
        need, devices = self.need(job), job.split["devices"]
        found = most_members(need, self.memory, devices, members)
        if found == 0:
            what = in_words(needed(need, 1, 1, self.memory.shared))
            there = in_words(self.memory.bytes)
            where = "the machine" if self.memory.shared else "a device"
            raise UsageError(
                f"{job.agent} on {job.members[0].task} needs about {what} for a single "
                f"run and {where} has {there} to spare: make batch_size, hidden or its "
                "samples smaller, leave it out with --agents, or say --memory GIB if "
                "you know better"
            )
        return found

    def bytes_of(self, job: Job) -> int:
        """Estimated bytes per device (in all, on a CPU) of a job as it is."""
        shared = self.memory is not None and self.memory.shared
        return needed(self.need(job), len(job.members), job.split["devices"], shared)
