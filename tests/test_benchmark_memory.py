"""Estimated memory: against the compiler's own account, and what is made of it."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts
from test_benchmark_jobs import SUITE, run
from test_benchmark_planning import loaded, wanted
from tiny_runs import write_store

from offrl_jax.agents.registry import get_entry, parse_label
from offrl_jax.benchmark import memory as memory_module
from offrl_jax.benchmark.memory import (
    Estimates,
    Memory,
    Need,
    available_bytes,
    device_memory,
    estimate,
    most_members,
    needed,
    peak_bytes,
    trace_training,
)
from offrl_jax.benchmark.overview import Limits
from offrl_jax.benchmark.planning import Split, config_from_plain
from offrl_jax.catalogue import LoadedTask
from offrl_jax.datasets.store import Store
from offrl_jax.errors import UsageError
from offrl_jax.population import make_mesh, make_population, place
from offrl_jax.results import Job, read_plan
from offrl_jax.sources import dataset_sampler, stack_tasks
from offrl_jax.types import Agent, Spec

script = scripts.load("speed/memory")

MB = 1_000_000
F = 4  # bytes of a float32


def peak_of(program: Any, *shapes: tuple[int, ...]) -> int:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return peak_bytes(jax.make_jaxpr(program)(*arguments).jaxpr)


class TestTheTrace:
    def test_what_is_used_no_longer_is_not_counted(self):
        def chain(x):
            for _ in range(5):
                x = jnp.sin(x)
            return x

        # Two at a time: what is read, and what is written.
        assert peak_of(chain, (100,)) == 2 * 100 * F

    def test_what_is_used_later_is(self):
        def keep(x):
            made = [jnp.sin(x * 2.0**i) for i in range(5)]
            return sum(jnp.sum(one) for one in made)

        # Ten arrays are made; of four of them the sines wait for their sums.
        found = peak_of(keep, (1000,))
        assert 5 * 1000 * F <= found <= 7 * 1000 * F

    def test_arguments_are_the_callers(self):
        assert peak_of(lambda x: jnp.sum(x), (1000,)) == F

    def test_a_loop_counts_its_body_once(self):
        def looped(times):
            def body(_, x):
                return jnp.tanh(jnp.outer(x, x)) @ x

            return lambda x: jax.lax.fori_loop(0, times, body, x)

        one, many = peak_of(looped(1), (50,)), peak_of(looped(100), (50,))
        assert one == many
        assert 2 * 50 * 50 * F <= one < 3 * 50 * 50 * F

    def test_a_loop_holds_what_it_began_with_beside_what_it_makes(self):
        def looped(x):  # as many rounds as its data say
            return jax.lax.while_loop(lambda x: x[0] > 0, jnp.sin, x)

        assert 2 * 1000 * F <= peak_of(looped, (1000,)) < 2.1 * 1000 * F

    def test_a_branch_counts_the_larger(self):
        def branch(x):
            return jax.lax.cond(
                x[0] > 0, lambda x: jnp.sum(jnp.outer(x, x)), lambda x: x[0], x
            )

        assert 50 * 50 * F <= peak_of(branch, (50,)) < 55 * 50 * F


SPEC = Spec(obs_dim=5, action_dim=2, horizon=10)


def a_job(agent: str, hidden: list[int], batch_size: int) -> tuple[Job, LoadedTask]:
    task = loaded("local/a-v0", obs_dim=5)
    suite = dataclasses.replace(
        SUITE,
        agents=(agent,),
        settings={agent: {"s": {"hidden": hidden, "batch_size": batch_size}}},
    )
    (job,) = wanted(suite, tasks=[task])
    return job, task


@pytest.mark.parametrize(
    ("agent", "hidden", "batch_size"),
    [("bc", [200, 50], 16), ("td3_bc", [64], 64)],
)
def test_estimates_cover_what_the_compiler_allocates(agent, hidden, batch_size):
    job, task = a_job(agent, hidden, batch_size)
    need = estimate(job, {task.task.id: task})
    entry = get_entry(parse_label(job.agent)[0])
    made = entry.make(config_from_plain(entry.config, job.config), SPEC)
    allocated = script.allocated_per_member(
        made, dataset_sampler(), entry.hyper(), SPEC
    )
    assert 1.0 <= need.member / allocated < 3.0


@pytest.mark.parametrize("agent", ["brac", "rank1_ac"])  # two phases; rollouts
def test_every_kind_of_agent_is_measured(agent, little_optimised):
    found = script.measure(get_entry(agent), 16, script.Settings())
    assert found.hidden.startswith("16x16")
    assert 0.5 < found.over_trace < 4
    assert found.state < found.allocated


def traced(name: str, reverse: bool = False) -> tuple[Any, Agent, int, int]:
    """Settings and agent of 16 units, its own bytes and those of its trace."""
    entry = get_entry(name)
    agent = entry.make(entry.config(hidden=(16, 16)), SPEC)
    if reverse:
        agent = agent._replace(phases=agent.phases[::-1])
    hyper = entry.hyper()
    shapes = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), hyper)
    _, own, most = trace_training(agent, dataset_sampler(), shapes, SPEC)
    return hyper, agent, own, most


def test_a_state_is_what_a_population_holds_per_member():
    hyper, agent, own, _ = traced("td3_bc")
    mesh = make_mesh(jax.local_devices()[:1])
    population = make_population(agent, dataset_sampler(), 3, mesh)
    each = jax.tree.map(lambda x: np.full(3, x, np.float32), hyper)
    table = stack_tasks([script.few_transitions(SPEC)])
    args = place(population, table, np.zeros(3, np.int32), each)
    state = population.init(np.arange(3), each)
    held = (state, each, population.no_sums[0](state, *args))
    assert own == sum(leaf.nbytes for leaf in jax.tree.leaves(held)) / 3


def test_the_hungriest_phase_counts():
    assert traced("brac")[3] == traced("brac", reverse=True)[3]


def test_a_process_is_measured_at_its_largest():
    def peak(size: int) -> int:
        code = f"held = bytearray({size}); del held"
        return script.peak_resident([sys.executable, "-c", code])

    assert 190 * MB < peak(200 * MB) - peak(0) < 210 * MB
    with pytest.raises(SystemExit, match="exit status"):
        script.peak_resident([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("seeds", [(4, 4), (0, 2)])
def test_seeds_that_cannot_be_compared_are_refused(seeds):
    with pytest.raises(UsageError, match="takes a number, and a larger one"):
        script.main(script.Settings(agents=("bc",), whole_runs=True, seeds=seeds))


def test_estimates_grow_with_what_needs_memory():
    def member(hidden, batch_size):
        job, task = a_job("td3_bc", hidden, batch_size)
        return estimate(job, {task.task.id: task}).member

    assert member([64], 4096) > 10 * member([64], 64)
    assert member([512, 512], 64) > 10 * member([64, 64], 64)


def test_the_table_counts_what_tasks_share_once():
    one = loaded("local/a-v0")
    rows = len(one.train.reward)
    o, a = one.spec.obs_dim, one.spec.action_dim
    alone = rows * F * (2 * o + 2 * a + 3)
    assert memory_module.table_bytes([one]) == alone
    hashes = {"obs": "x", "next_obs": "y"}
    goals = [
        dataclasses.replace(loaded(f"local/{name}-v0"), array_hashes=hashes)
        for name in "abc"
    ]
    shared = alone * 3 - 2 * rows * F * 2 * o
    assert memory_module.table_bytes(goals) == shared


NEED = Need(table=100, member=10, host=5)


@pytest.mark.parametrize(
    ("members", "devices", "shared", "found"),
    [
        (8, 4, False, 100 + 2 * 10),
        (5, 4, False, 100 + 2 * 10),
        (1, 1, False, 110),
        # Four tables on devices, two on the host; five members padded to eight.
        (5, 4, True, 6 * 100 + 8 * 10 + 5 * 5),
    ],
)
def test_needed(members, devices, shared, found):
    assert needed(NEED, members, devices, shared) == found


def test_most_members_by_trying_all():
    for limit in (90, 110, 137, 300, 430, 5000):
        for shared in (False, True):
            there = Memory(limit, shared)
            fitting = [
                m
                for m in range(1, 21)
                if needed(NEED, m, -(-m // -(-m // 4)), shared) <= limit
            ]
            want = max(fitting, default=0)
            assert most_members(NEED, there, 4, 20) == want, (limit, shared)


class TestWhatThereIs:
    @dataclasses.dataclass
    class Device:
        stats: dict[str, int] | None
        platform: str = "gpu"

        def memory_stats(self):
            return self.stats

    def test_of_the_smallest_device(self):
        devices = [self.Device({"bytes_limit": n * MB}) for n in (80, 50)]
        assert device_memory(devices, None) == Memory(40 * MB, False)

    def test_unknown_is_no_limit(self):
        assert device_memory([self.Device(None)], None) is None

    def test_what_the_user_says(self):
        assert device_memory([self.Device(None)], 2.0) == Memory(2**31, False)
        assert device_memory([self.Device(None, "cpu")], 0.5) == Memory(2**29, True)
        for wrong in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(UsageError, match="above 0 GiB"):
                memory_module.check_given(wrong)

    def test_of_this_machine(self):
        found = available_bytes()
        assert found is not None and found > 2**20

    def test_a_container_has_less(self, tmp_path):
        meminfo = tmp_path / "proc/meminfo"
        meminfo.parent.mkdir()
        meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
        assert available_bytes(tmp_path) == 8000 * 1024
        group = tmp_path / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text("max\n")
        (group / "memory.current").write_text("50000\n")
        assert available_bytes(tmp_path) == 8000 * 1024
        (group / "memory.max").write_text("1000000\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 20000\n")
        assert available_bytes(tmp_path) == 1_000_000 - 50_000 + 20_000
        old = group / "memory"
        old.mkdir()
        (old / "memory.limit_in_bytes").write_text("500000\n")
        (old / "memory.usage_in_bytes").write_text("100000\n")
        assert available_bytes(tmp_path) == 400_000


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return write_store(tmp_path_factory.mktemp("data"), SUITE.tasks)


def test_a_job_that_does_not_fit_is_cut_and_stays_cut(store, tmp_path, monkeypatch):
    from offrl_jax.benchmark import executors as executors_module
    from offrl_jax.benchmark.jobs import Stopped

    def stop_at_once(*_args):
        raise Stopped

    monkeypatch.setattr(executors_module, "run_job", stop_at_once)
    suite = dataclasses.replace(SUITE, agents=("bc",), settings={}, seeds=4)

    def sizes(folder) -> list[int]:
        plan = read_plan(folder)
        assert plan is not None
        return [len(job.members) for job in plan.jobs]

    need = Need(table=0, member=10 * MB, host=0)
    monkeypatch.setattr(memory_module, "estimate", lambda job, tasks: need)
    there = Memory(65 * MB, True)

    def limited(*_args):
        return there

    monkeypatch.setattr("offrl_jax.benchmark.overview.device_memory", limited)
    assert run(store, tmp_path / "a", suite).stopped
    assert sizes(tmp_path / "a") == [4, 4]  # of eight six would fit
    # Neither more nor less memory, nor other devices, cut it anew.
    before = read_plan(tmp_path / "a")
    for limit in (500 * MB, 15 * MB):
        there = Memory(limit, False)
        assert run(store, tmp_path / "a", suite).stopped
        assert read_plan(tmp_path / "a") == before
    # What the user says holds besides.
    there = Memory(65 * MB, True)
    run(store, tmp_path / "b", suite, limits=Limits(max_parallel=2))
    assert sizes(tmp_path / "b") == [2, 2, 2, 2]
    # And not a single one.
    there = Memory(9 * MB, True)
    with pytest.raises(UsageError) as error:
        run(store, tmp_path / "c", suite)
    text = str(error.value)
    assert re.search(r"^bc@quick on local/tiny-a-v0 needs about 10 MiB", text)
    assert "9 MiB" in text and "--memory" in text and "\n" not in text
    assert not (tmp_path / "c").exists()


def test_unlimited_plans_are_as_they_were(store):
    tasks = [loaded("local/a-v0"), loaded("local/b-v0")]
    by_id = {task.task.id: task for task in tasks}
    jobs = wanted(split=Split(2, "cpu"))
    for there in (None, Memory(2**40, True), Memory(2**40, False)):
        estimates = Estimates(by_id, there)
        assert [estimates.most(job) for job in jobs] == [6, 6]
