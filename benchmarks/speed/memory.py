"""Memory that a run more costs: allocated, measured and estimated.

  python benchmarks/speed/memory.py
  python benchmarks/speed/memory.py --agents td3_bc --widths 64
  python benchmarks/speed/memory.py --agents bc td3_bc --whole-runs

The first table compiles each agent's training as the runner does, for four members and
for eight on a single device, and asks the compiler (`memory_analysis`) what it
allocates; the difference is divided by four.  Beside it stands what
`offrl_jax.benchmark.memory` follows through the trace of one member.  Offline agents
see synthetic transitions, on-policy ones learn on classic/pendulum-v0.

`--whole-runs` starts `offrl run` with few and with many seeds in processes of their own
and compares their peak resident memory with the estimate of the planner.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from offrl_jax import envs
from offrl_jax.agents.entry import AgentEntry, resolve
from offrl_jax.agents.registry import REGISTRY, get_entry
from offrl_jax.benchmark.jax_settings import configure_jax
from offrl_jax.benchmark.memory import estimate, trace_training
from offrl_jax.benchmark.planning import Split, wanted_jobs
from offrl_jax.benchmark.suites import Protocol, Suite
from offrl_jax.catalogue import load_task
from offrl_jax.collection import on_policy_collector
from offrl_jax.datasets.store import Store, default_data_dir
from offrl_jax.errors import OffrlError, UsageError
from offrl_jax.population import make_mesh, make_population, place
from offrl_jax.sources import Source, dataset_sampler, stack_tasks
from offrl_jax.types import Agent, Hyper, Spec, Transitions

MB = 1_000_000
FEW, MANY = 4, 8
"""Members of the two programs that are compared."""
ENV = "classic/pendulum-v0"
TASK = "classic/pendulum-medium-v0"
PROTOCOL = Protocol(episodes=10, evaluations=1, curve_episodes=10)
UPDATES = 50


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      agents: names in the registry; none means all.
      widths: hidden layers of every network: 64 stands for 64x64; none means each
        agent's defaults.
      obs_dim: of the synthetic transitions.
      action_dim: of the synthetic transitions.
      whole_runs: compare processes instead of programs.
      seeds: of the two processes; with few, compiling is what needs most.
    """

    agents: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    obs_dim: int = 17
    action_dim: int = 6
    whole_runs: bool = False
    seeds: tuple[int, int] = (32, 96)


class Measurement(NamedTuple):
    """One row of the first table, in bytes per member.

    Attributes:
      agent: its name.
      hidden: widths of its hidden layers, in words.
      state: parameters, targets, optimisers, sums of metrics, settings.
      traced: most intermediate results at one time.
      allocated: by the compiler, all in all.
    """

    agent: str
    hidden: str
    state: int
    traced: int
    allocated: float

    @property
    def over_trace(self) -> float:
        """Allocated beyond the state, over what the trace has there."""
        return (self.allocated - self.state) / self.traced


def few_transitions(spec: Spec) -> Transitions:
    """Seven of zeros: data cost nothing more for more members."""
    one: Any = np.zeros(7, np.float32)
    obs: Any = np.zeros((7, spec.obs_dim), np.float32)
    action: Any = np.zeros((7, spec.action_dim), np.float32)
    return Transitions(obs, action, one, one, obs, action, one)


def allocated_by(program: Callable[..., Any], *args: Any) -> int:
    """Bytes of a program's arguments and temporaries; it may overwrite the first."""
    compiled = jax.jit(program, donate_argnums=0).lower(*args).compile()
    found = compiled.memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes + found.argument_size_in_bytes


def allocated_per_member(
    agent: Agent, source: Source, hyper: Hyper, spec: Spec
) -> float:
    """Bytes that a member more costs the hungriest compiled phase on a single device.

    Args:
      agent: pure functions.
      source: of its batches.
      hyper: scalar leaves.
      spec: of the synthetic transitions.
    """
    table = stack_tasks([few_transitions(spec)])
    mesh = make_mesh(jax.local_devices()[:1])

    def totals(members: int) -> Iterator[int]:
        population = make_population(agent, source, members, mesh)
        each = jax.tree.map(lambda x: np.full(members, x, np.float32), hyper)
        args = place(population, table, np.zeros(members, np.int32), each)
        state = population.init(np.arange(members), each)
        for index, phase in enumerate(agent.phases):
            sums = population.no_sums[index](state, *args)
            # One call would be compiled without the loop around it.
            program = partial(population.record[index], updates=1000 * phase.stride)
            yield allocated_by(program, state, sums, *args)

    pairs = zip(totals(FEW), totals(MANY), strict=True)
    return max((many - few) / (MANY - FEW) for few, many in pairs)


def measure(entry: AgentEntry, width: int | None, settings: Settings) -> Measurement:
    """An agent at its defaults, or with hidden layers of one width."""
    overrides: dict[str, Any] = {} if width is None else {"hidden": (width, width)}
    config, hyper = resolve(entry, family="", preset=None, overrides=overrides)
    spec = Spec(settings.obs_dim, settings.action_dim, 1000)
    if entry.on_policy:
        spec = envs.make_pure(ENV).spec
    agent = entry.make(config, spec)
    source = dataset_sampler()
    if agent.collection is not None:
        source = on_policy_collector(envs.make_pure(ENV), agent.collection)
    shapes = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), hyper)
    _, state, traced = trace_training(agent, source, shapes, spec)
    allocated = allocated_per_member(agent, source, hyper, spec)
    hidden = "x".join(map(str, config.hidden))
    return Measurement(entry.name, hidden, state, traced, allocated)


class WholeRun(NamedTuple):
    """One row of the second table, in bytes per run."""

    agent: str
    measured: float
    estimated: int


_SMALL_PARENT = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_resident(command: list[str]) -> int:
    """Bytes of a process at its largest.

    A process counts what its parent had when it began, so a small one stands between.

    Raises:
      SystemExit: it failed; its own words are on stderr already.
    """
    words = [sys.executable, "-c", _SMALL_PARENT, *command]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}")
    # macOS counts bytes, Linux KiB.
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def measure_whole_runs(agent: str, seeds: tuple[int, int]) -> WholeRun:
    """Processes of few and of many runs, per run more."""
    peaks = []
    for count in seeds:
        with tempfile.TemporaryDirectory() as folder:
            options = {
                "--agent": agent,
                "--task": TASK,
                "--seeds": count,
                "--updates": UPDATES,
                "--episodes": PROTOCOL.episodes,
                "--evaluations": PROTOCOL.evaluations,
                "--results": Path(folder) / "r",
            }
            words = [str(word) for pair in options.items() for word in pair]
            peaks.append(
                peak_resident([sys.executable, "-m", "offrl_jax.cli", "run", *words])
            )
    suite = Suite(
        name="memory",
        description="",
        tasks=(TASK,),
        agents=(agent,),
        preset="",
        seeds=1,
        updates=UPDATES,
        protocol=PROTOCOL,
    )
    task = load_task(TASK, Store(default_data_dir()))
    (job,) = wanted_jobs(suite, [task], Split(1, "cpu"), "")
    need = estimate(job, {TASK: task})
    few, many = seeds
    measured = (peaks[1] - peaks[0]) / (many - few)
    return WholeRun(agent, measured, need.member + need.host)


def tabulate(measurements: Iterable[Measurement]) -> Table:
    """The first table."""
    table = Table(title="MB per member")
    table.add_column("agent", no_wrap=True)
    table.add_column("hidden", no_wrap=True)
    for name in ("state", "traced", "allocated", "over state", "over trace"):
        table.add_column(name, justify="right")
    for m in measurements:
        sizes = (m.state / MB, m.traced / MB, m.allocated / MB)
        ratios = (m.allocated / m.state, m.over_trace)
        table.add_row(
            m.agent,
            m.hidden,
            *(f"{value:.3g}" for value in sizes),
            *(f"{value:.2f}" for value in ratios),
        )
    return table


def tabulate_whole(runs: Iterable[WholeRun]) -> Table:
    """The second table."""
    table = Table(title="peak resident MB per run")
    table.add_column("agent", no_wrap=True)
    for name in ("measured", "estimated"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(
            run.agent, f"{run.measured / MB:.1f}", f"{run.estimated / MB:.1f}"
        )
    return table


def main(settings: Settings) -> None:
    """Measures and prints a table with its conditions.

    Raises:
      UsageError: an unknown agent, or numbers of seeds that cannot be compared.
    """
    few, many = settings.seeds
    if not 1 <= few < many:
        raise UsageError(f"--seeds {few} {many}: takes a number, and a larger one")
    configure_jax()
    console = Console(width=max(100, Console().width))
    entries = [get_entry(name) for name in settings.agents or REGISTRY]
    if settings.whole_runs:
        runs = [measure_whole_runs(each.name, settings.seeds) for each in entries]
        console.print(tabulate_whole(runs))
        console.print(
            f"{TASK}, {few} and {many} seeds, {UPDATES} updates, "
            f"{PROTOCOL.episodes} episodes"
        )
    else:
        found = [
            measure(entry, width, settings)
            for entry in entries
            for width in settings.widths or (None,)
        ]
        console.print(tabulate(found))
    device = jax.local_devices()[0]
    console.print(
        f"{device.device_kind}, {platform.machine()}, Python "
        f"{platform.python_version()}, jax {importlib.metadata.version('jax')}"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except OffrlError as error:
        sys.exit(f"error: {error}")
