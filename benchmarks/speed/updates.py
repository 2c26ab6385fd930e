"""Updates per second of every agent, against the matrix products that they need.

  python benchmarks/speed/updates.py --agents td3_bc --widths 256 --seeds 1 16
  python benchmarks/speed/updates.py --agents td3_bc --widths 64 --seeds 8 --devices 1 2

Each contestant is a population as the runner makes it: one virtual CPU device per core,
members spread over the devices, batches gathered from synthetic transitions.  Next to
each of its measurements, the same devices multiply matrices of the same shapes
(batch x width times width x width) one after the other; the share in the last column is
what the update's own products would take at that rate, over the time the update took.
Repeats are interleaved and the table shows medians.  Run it on an idle machine; on one
that is not, the share and the speed relative to the first row mean most.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.extend import core
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from offrl_jax.agents.entry import AgentEntry, resolve
from offrl_jax.agents.registry import REGISTRY, get_entry
from offrl_jax.benchmark.jax_settings import configure_jax
from offrl_jax.errors import OffrlError, UsageError
from offrl_jax.population import AXIS, make_mesh, make_population, place
from offrl_jax.sources import dataset_sampler, stack_tasks
from offrl_jax.types import Agent, Phase, Spec, Transitions

Run = Callable[[int], None]
"""Does that many units of work (updates of every member, or products) and waits."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured and how long.

    Attributes:
      agents: names in the registry; none means all.
      widths: hidden layers of every network: 256 stands for 256x256.
      seeds: members of a population.
      devices: that the members are spread over; none means all that there are.
      batch_size: transitions of one update, whatever the agent's default.
      obs_dim: of the synthetic transitions.
      action_dim: of the synthetic transitions.
      transitions: rows of the synthetic dataset.
      seconds: length of one measurement.
      repeats: measurements of each contestant.
    """

    agents: tuple[str, ...] = ()
    widths: tuple[int, ...] = (64, 256)
    seeds: tuple[int, ...] = (1, 5, 16)
    devices: tuple[int, ...] = ()
    batch_size: int = 256
    obs_dim: int = 11
    action_dim: int = 3
    transitions: int = 100_000
    seconds: float = 0.5
    repeats: int = 5


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Attributes:
      label: the agent, with its setting where that is not the default.
      width: of both hidden layers.
      seeds: members asked for; those that pad the mesh are not counted.
      devices: that the members were spread over.
      flops: of the matrix products of one update of one member.
      passes: `flops` in forward passes of one critic, see `forward_flops`.
      updates_per_s: of all members together, median over repeats.
      to_first: speed over that of the first row in the same repeat, median.
      matmul_rate: floating-point operations per second of the plain products, median.
      shares: per repeat, `flops * updates/s / matmul rate` (of the products before and
        after it).
    """

    label: str
    width: int
    seeds: int
    devices: int
    flops: float
    passes: float
    updates_per_s: float
    to_first: float
    matmul_rate: float
    shares: tuple[float, ...]

    @property
    def share(self) -> float:
        """Median of `shares`."""
        return float(np.median(self.shares))


def _inner(value: Any) -> Iterator[core.Jaxpr]:
    """Programs among the parameters of an operation."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _inner(item)


def _flops_of(program: core.Jaxpr) -> int:
    total = 0
    for operation in program.eqns:
        kind, params = operation.primitive.name, operation.params
        if kind == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left: Any = operation.invars[0].aval
            out: Any = operation.outvars[0].aval
            depth = math.prod(left.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(out.shape)
            continue
        inner = sum(_flops_of(p) for v in params.values() for p in _inner(v))
        if inner and kind in ("while", "cond"):
            raise ValueError(
                f"a '{kind}' of the program multiplies matrices: how often is unknown"
            )
        total += inner * params["length"] if kind == "scan" else inner
    return total


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Floating-point operations of all matrix products that `function` asks for.

    Two per multiply-and-add.  Read off the traced program: element-wise work, such as
    Adam's or ReLU's, does not count, so that the share of an update in the machine's
    matrix-multiply rate leaves nothing out that an implementation could save.

    Args:
      function: traceable.
      arguments: arrays, or shapes and dtypes.

    Raises:
      ValueError: products inside a loop of unknown length or inside a condition.
    """
    return _flops_of(jax.make_jaxpr(function)(*arguments).jaxpr)


def update_flops(agent: Agent, phase: Phase, hyper: Any, spec: Spec) -> float:
    """Floating-point operations of the products of one update of one member.

    One call of a phase does `stride` updates.  A delayed actor is thus counted as often
    as it is updated: with `policy_delay` 2, half an actor update for each update.
    """
    rows = agent.batch_size * phase.stride
    key = jax.eval_shape(lambda: jax.random.key(0))
    hyper = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), hyper)
    state = jax.eval_shape(agent.init, key, hyper)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        synthetic_transitions(spec, rows),
    )
    return matmul_flops(phase.update, key, state, batch, hyper) / phase.stride


def synthetic_transitions(spec: Spec, count: int) -> Transitions:
    """`count` transitions of normal observations, uniform actions and normal rewards.

    They form episodes of 1,000 steps that end in time-outs.
    """
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((count + 1, spec.obs_dim), np.float32)
    action = rng.uniform(-1, 1, (count + 1, spec.action_dim)).astype(np.float32)
    has_next = np.ones(count, np.float32)
    has_next[999::1000] = 0.0
    has_next[-1] = 0.0
    arrays: Any = (
        obs[:-1],
        action[:-1],
        rng.standard_normal(count, np.float32),
        np.ones(count, np.float32),
        obs[1:],
        action[1:] * has_next[:, None],
        has_next,
    )
    return Transitions(*arrays)


def forward_flops(batch: int, width: int, spec: Spec) -> float:
    """Floating-point operations of one forward pass of one critic of two layers.

    A unit in which agents compare whatever the width: an update of TD3+BC with an
    undelayed actor is about 14 of them.
    """
    inputs = spec.obs_dim + spec.action_dim
    return 2.0 * batch * (inputs * width + width * width + width)


# What the arithmetic of an agent hangs on, where that is more than its defaults.
_PRESETS = {"misa": ("released", "quick")}
_SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "misa": (
        {"burn_in": 0},
        {"correction": "importance"},
        {"correction": "importance", "samples": 10},
        {"correction": "none"},
    )
}


def variants(entry: AgentEntry) -> dict[str, dict[str, Any]]:
    """Label -> overrides: as it is, with an actor step at every update, and others."""
    found: dict[str, dict[str, Any]] = {entry.name: {}}
    for preset in _PRESETS.get(entry.name, ()):
        chosen = entry.presets[preset]
        found[f"{entry.name}@{preset}"] = {**chosen.config, **chosen.hyper}
    fields = {field.name: field.default for field in dataclasses.fields(entry.config)}
    undelayed = [{"policy_delay": 1}] if fields.get("policy_delay", 1) != 1 else []
    for settings in (*undelayed, *_SETTINGS.get(entry.name, ())):
        told = " ".join(f"{name}={value}" for name, value in settings.items())
        found[f"{entry.name} {told}"] = settings
    return found


def training(
    agent: Agent, hyper: Any, seeds: int, mesh: Mesh, transitions: Transitions
) -> tuple[Run, int]:
    """A warmed-up population's last phase, and the stride of its updates."""
    population = make_population(agent, dataset_sampler(), seeds, mesh)
    members = jax.tree.map(lambda x: np.full(seeds, x, np.float32), hyper)
    state = population.init(np.arange(seeds), members)
    arguments = place(
        population, stack_tasks([transitions]), np.zeros(seeds, np.int32), members
    )

    def run(updates: int) -> None:
        nonlocal state
        state, _ = population.run[-1](state, *arguments, updates)
        jax.block_until_ready(state)

    stride = agent.phases[-1].stride
    run(stride)
    return run, stride


def _side_by_side(mesh: Mesh, members: int) -> int:
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return 1 if on_cpu else -(-members // mesh.size)


def products_flops(batch: int, width: int, mesh: Mesh, members: int) -> float:
    """Floating-point operations of one link of the chains that `products` runs."""
    return 2.0 * batch * width**2 * mesh.size * _side_by_side(mesh, members)


def products(batch: int, width: int, mesh: Mesh, members: int) -> Run:
    """A chain of `[batch, width] @ [width, width]` on every device of `mesh`.

    On CPU each device multiplies one pair at a time, which is the fastest that it can;
    an accelerator needs the products of all its `members` side by side to be busy.
    """
    side = _side_by_side(mesh, members)
    rng = np.random.default_rng(0)
    # Orthogonal: the numbers neither grow nor become denormal, which would cost time.
    square, _ = np.linalg.qr(rng.standard_normal((width, width)))
    wide = np.broadcast_to(square.astype(np.float32), (mesh.size * side, width, width))
    start = rng.standard_normal((mesh.size * side, batch, width), np.float32)

    def chain(x: jax.Array, w: jax.Array, count: jax.Array) -> jax.Array:
        if side == 1:
            one = jax.lax.fori_loop(0, count, lambda _, y: y @ w[0], x[0])
            return one[None]
        return jax.lax.fori_loop(0, count, lambda _, y: y @ w, x)

    spread = jax.jit(
        jax.shard_map(
            chain,
            mesh=mesh,
            in_specs=(P(AXIS), P(AXIS), P()),
            out_specs=P(AXIS),
            check_vma=False,
        )
    )
    sharding = NamedSharding(mesh, P(AXIS))
    x, w = jax.device_put(start, sharding), jax.device_put(wide, sharding)

    def run(count: int) -> None:
        jax.block_until_ready(spread(x, w, np.int32(count)))

    run(1)
    return run


def _rate(run: Run, count: int) -> float:
    start = time.perf_counter()
    run(count)
    return count / (time.perf_counter() - start)


def _count_for(run: Run, seconds: float, stride: int) -> int:
    """How many units, a multiple of `stride`, take about `seconds`.

    Never extrapolated from a call that was much shorter: what a call costs beside its
    units, or a busy moment, would make all measurements too short.
    """
    calls = 1
    while True:
        start = time.perf_counter()
        run(calls * stride)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds / 2:
            return max(1, round(calls * seconds / elapsed)) * stride
        calls = math.ceil(calls * min(4.0, max(1.5, seconds / elapsed)))


def _check_devices(asked: Iterable[int]) -> None:
    there = len(jax.local_devices())
    for devices in asked:
        if not 1 <= devices <= there:
            raise UsageError(
                f"--devices {devices}: there are 1 to {there}; JAX_NUM_CPU_DEVICES=N "
                "makes N of them on a CPU"
            )


def measure(
    entries: Iterable[AgentEntry], width: int, seeds: int, settings: Settings
) -> list[Measurement]:
    """All agents at one width and number of seeds; repeats are interleaved.

    Raises:
      UsageError: more devices than there are.
    """
    _check_devices(settings.devices)
    spec = Spec(settings.obs_dim, settings.action_dim, 1000)
    transitions = synthetic_transitions(spec, settings.transitions)
    structure = {"hidden": (width, width), "batch_size": settings.batch_size}
    plain: dict[int, tuple[Run, int, float]] = {}
    runs: dict[tuple[str, int], tuple[Run, int, float]] = {}
    agents = list(_agents(entries, spec, structure))
    for devices in settings.devices or (len(jax.local_devices()),):
        # A single member cannot be spread: it has the threads of one device.
        mesh = make_mesh(jax.local_devices()[: min(devices, seeds)])
        multiply = products(settings.batch_size, width, mesh, seeds)
        plain[mesh.size] = (
            multiply,
            _count_for(multiply, settings.seconds, 1),
            products_flops(settings.batch_size, width, mesh, seeds),
        )
        for label, agent, hyper in agents:
            run, stride = training(agent, hyper, seeds, mesh, transitions)
            count = _count_for(run, settings.seconds, stride)
            flops = update_flops(agent, agent.phases[-1], hyper, spec)
            runs[label, mesh.size] = (run, count, flops)

    speeds: dict[tuple[str, int], list[float]] = {which: [] for which in runs}
    rates: dict[tuple[str, int], list[float]] = {which: [] for which in runs}
    for _ in range(settings.repeats):
        before, measured = 0.0, 0
        for which, (run, count, _) in runs.items():
            multiply, products_count, operations = plain[which[1]]
            if which[1] != measured:
                before, measured = _rate(multiply, products_count), which[1]
            speeds[which].append(_rate(run, count) * seeds)
            after = _rate(multiply, products_count)
            rates[which].append(operations * 0.5 * (before + after))
            before = after
    unit = forward_flops(settings.batch_size, width, spec)
    first = np.asarray(next(iter(speeds.values())))
    return [
        Measurement(
            label=label,
            width=width,
            seeds=seeds,
            devices=devices,
            flops=flops,
            passes=flops / unit,
            updates_per_s=float(np.median(speeds[label, devices])),
            to_first=float(np.median(speeds[label, devices] / first)),
            matmul_rate=float(np.median(rates[label, devices])),
            shares=tuple(
                flops * speed / rate
                for speed, rate in zip(
                    speeds[label, devices], rates[label, devices], strict=True
                )
            ),
        )
        for (label, devices), (_, _, flops) in runs.items()
    ]


def _agents(
    entries: Iterable[AgentEntry], spec: Spec, structure: Mapping[str, Any]
) -> Iterator[tuple[str, Agent, Any]]:
    """Label, agent and settings of every variant, all with one structure."""
    for entry in entries:
        for label, overrides in variants(entry).items():
            config, hyper = resolve(
                entry, family="", preset=None, overrides={**overrides, **structure}
            )
            yield label, entry.make(config, spec), hyper


def tabulate(measurements: Iterable[Measurement]) -> Table:
    """The measurements as a table for the terminal."""
    table = Table(title="updates per second of all members (medians)")
    for name in ("agent", "nets"):
        table.add_column(name, no_wrap=True)
    for name in (
        "seeds",
        "devices",
        "GFLOP per\nupdate",
        "forward\npasses",
        "updates\nper s",
        "to the\nfirst",
        "GFLOP\nper s",
        "products\nGFLOP\nper s",
        "share",
        "range",
    ):
        table.add_column(name, justify="right")
    for m in measurements:
        table.add_row(
            m.label,
            f"{m.width}x{m.width}",
            str(m.seeds),
            str(m.devices),
            f"{m.flops / 1e9:.4f}",
            f"{m.passes:.1f}",
            f"{m.updates_per_s:,.0f}"
            if m.updates_per_s >= 100
            else f"{m.updates_per_s:.3g}",
            f"{m.to_first:.3g}",
            f"{m.flops * m.updates_per_s / 1e9:.1f}",
            f"{m.matmul_rate / 1e9:.1f}",
            f"{m.share:.0%}",
            f"{min(m.shares):.0%}-{max(m.shares):.0%}",
        )
    return table


def main(settings: Settings) -> None:
    """Measures every combination and prints the table with its conditions."""
    configure_jax()
    # On-policy agents gather their batches: benchmarks/onpolicy/cost.py times them.
    offline = [name for name, entry in REGISTRY.items() if not entry.on_policy]
    entries = [get_entry(name) for name in settings.agents or offline]
    load_before = os.getloadavg()[0]
    measurements = [
        measurement
        for width in settings.widths
        for seeds in settings.seeds
        for measurement in measure(entries, width, seeds, settings)
    ]
    # Where the terminal is narrower, long lines read better than cut columns.
    console = Console(width=max(150, Console().width))
    console.print(tabulate(measurements))
    device = jax.local_devices()[0]
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib", "flax", "optax", "numpy")
    )
    console.print(
        f"{len(jax.local_devices())} devices ({device.device_kind}, "
        f"{platform.machine()}), {os.cpu_count()} cores, load before "
        f"{load_before:.2f}, matmul precision "
        f"{jax.config.values['jax_default_matmul_precision'] or 'default'}, "
        f"Python {platform.python_version()}, {versions}; batch {settings.batch_size}, "
        f"O={settings.obs_dim}, A={settings.action_dim}, {settings.transitions:,} "
        f"transitions, {settings.repeats} x {settings.seconds:g} s each",
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except OffrlError as error:
        sys.exit(f"error: {error}")
