"""Populations of toy agents whose every number is known, and of a real one."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from offrl_jax.agents import td3_bc
from offrl_jax.population import (
    from_host,
    make_mesh,
    make_population,
    place,
    spread_members,
    start_keys,
    to_host,
)
from offrl_jax.sources import dataset_sampler, stack_tasks
from offrl_jax.types import Agent, Phase, Spec, Transitions

SPEC = Spec(obs_dim=3, action_dim=2, horizon=10)
BATCH = 4


@struct.dataclass
class Hyper:
    rate: Any = 1.0


class Counted(NamedTuple):
    """Everything that the toy agent saw."""

    total: jax.Array
    calls: jax.Array
    lowest: jax.Array
    highest: jax.Array
    noise: jax.Array


def counting_agent(strides: tuple[int, ...] = (1,)) -> Agent:
    """Adds up rewards times `rate`; draws a number per call; never learns."""

    def init(key, hyper):
        return Counted(
            jnp.zeros(()),
            jnp.zeros(()),
            jnp.asarray(jnp.inf),
            jnp.asarray(-jnp.inf),
            jax.random.normal(key) * hyper.rate,
        )

    def update(key, state, batch, hyper):
        total = state.total + hyper.rate * jnp.sum(batch.reward)
        state = Counted(
            total,
            state.calls + 1.0,
            jnp.minimum(state.lowest, jnp.min(batch.reward)),
            jnp.maximum(state.highest, jnp.max(batch.reward)),
            state.noise + jax.random.normal(key),
        )
        rows = jnp.asarray(batch.reward.shape[0], jnp.float32)
        return state, {"total": total, "rows": rows}

    phases = tuple(Phase(f"p{i}", update, s) for i, s in enumerate(strides))
    return Agent(init, lambda *_: None, phases, BATCH)  # type: ignore[arg-type]


def transitions(rewards: np.ndarray, seed: int = 0) -> Transitions:
    rng = np.random.default_rng(seed)
    n = len(rewards)

    def draw(*shape: int) -> Any:
        return rng.uniform(-1, 1, shape).astype(np.float32)

    ones: Any = np.ones(n, np.float32)
    return Transitions(
        draw(n, 3), draw(n, 2), rewards, ones, draw(n, 3), draw(n, 2), ones
    )


def tasks(*sizes: int) -> list[Transitions]:
    """Task t has rewards 100 t .. 100 t + size - 1: a batch tells where it is from."""
    return [
        transitions(np.arange(n, dtype=np.float32) + 100 * t)
        for t, n in enumerate(sizes)
    ]


def start(agent: Agent, size: int, *, sizes=(7,), task=None, rates=None, devices=2):
    population = make_population(
        agent, dataset_sampler(), size, make_mesh(jax.local_devices()[:devices])
    )
    rates = np.ones(size, np.float32) if rates is None else np.float32(rates)
    hyper = Hyper(rate=rates)
    task = np.zeros(size, np.int32) if task is None else np.asarray(task)
    args = place(population, stack_tasks(tasks(*sizes)), task, hyper)
    return population, population.init(np.arange(size), hyper), args


def on_host(tree: Any) -> Any:
    def fetch(leaf: Any) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def assert_equal(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, on_host(left), on_host(right))


def test_members_see_exactly_the_rows_of_their_own_task():
    task = [2, 0, 1, 0, 2]
    population, state, args = start(
        counting_agent(), 5, sizes=(7, 3, 11), task=task, devices=2
    )
    state, _ = population.run[0](state, *args, 300)
    ends = {0: (0, 6), 1: (100, 102), 2: (200, 210)}
    for member, t in enumerate(task):
        # 1200 draws of at most 11 rows: both ends are missed with probability 1e-49.
        found = (float(state.agent.lowest[member]), float(state.agent.highest[member]))
        assert found == ends[t]


def test_sampling_is_uniform_over_the_task():
    population, state, args = start(counting_agent(), 2, sizes=(5, 4), task=[1, 1])
    state, _ = population.run[0](state, *args, 5000)
    mean = np.asarray(state.agent.total) / (5000 * BATCH)
    # Rewards 100..103: mean 101.5, standard error sqrt(1.25 / 20000) = 0.008.
    np.testing.assert_allclose(mean, 101.5, atol=0.04)


def test_batches_of_different_members_and_updates_differ():
    population, state, args = start(counting_agent(), 3, sizes=(1000,))
    totals = []
    for _ in range(3):
        state, _ = population.run[0](state, *args, 1)
        totals.append(np.asarray(state.agent.total)[:3])
    totals = np.diff(np.stack(totals), axis=0, prepend=np.zeros((1, 3)))
    assert len(np.unique(totals)) == totals.size


def test_stride_phases_and_metrics():
    population, state, args = start(counting_agent((1, 3)), 3, rates=[1.0, 2.0, 4.0])
    state, metrics = population.run[0](state, *args, 5)
    assert np.asarray(state.step).tolist() == [5, 5, 5, 5]
    np.testing.assert_array_equal(np.asarray(metrics["rows"]), BATCH)
    state = population.next_phase(state)
    assert np.asarray(state.step).tolist() == [0, 0, 0, 0]
    state, metrics = population.run[1](state, *args, 6)
    assert np.asarray(state.step).tolist() == [6, 6, 6, 6]
    np.testing.assert_array_equal(np.asarray(metrics["rows"]), 3 * BATCH)
    np.testing.assert_array_equal(np.asarray(state.agent.calls), 5 + 2)
    with pytest.raises(ValueError, match="advances 3 updates at a time"):
        population.run[1](state, *args, 4)


def test_metrics_are_means_over_the_chunk():
    population, state, args = start(counting_agent(), 2)
    before, seen = state, []
    for _ in range(4):
        state, metrics = population.run[0](state, *args, 1)
        seen.append(np.asarray(metrics["total"]))
    before = population.init(np.arange(2), Hyper(rate=np.ones(2, np.float32)))
    _, together = population.run[0](before, *args, 4)
    np.testing.assert_allclose(
        np.asarray(together["total"]), np.mean(seen, axis=0), rtol=1e-6
    )


def test_recorded_means_go_on_from_call_to_call_bit_for_bit():
    """Sums that are handed on give the means of one call, and start anew when empty."""
    population, state, args = start(counting_agent((2,)), 3, rates=[0.1, 0.3, 1e-3])
    empty = population.no_sums[0](state, *args)
    seen, last = [], state
    for _ in range(50):
        last, found = population.run[0](last, *args, 2)
        seen.append(np.asarray(found["total"], np.float64))
    whole, sums, means = population.record[0](
        population.init(np.arange(3), args[2]), empty, *args, 100
    )
    np.testing.assert_allclose(means["total"], np.mean(seen, axis=0), rtol=2e-7)
    for pieces in ((2, 98), (34, 0, 2, 64)):
        state, parts = population.init(np.arange(3), args[2]), empty
        for updates in pieces:
            state, parts, found = population.record[0](state, parts, *args, updates)
        assert_equal((whole, sums, means), (state, parts, found))
    *_, found = population.record[0](state, empty, *args, 2)
    _, alone = population.run[0](whole, *args, 2)
    assert_equal(found, alone)
    assert np.asarray(parts.calls).tolist() == [50] * 4


def test_a_mean_of_many_equal_numbers_is_that_number():
    """A plain sum of 100,000 times 0.1 in float32 is off by 1.4e-4 of it."""

    def update(key, state, batch, hyper):
        return state + 1.0, {"rate": hyper.rate * jnp.ones(())}

    agent = Agent(
        lambda key, hyper: jnp.zeros(()),
        lambda *_: None,  # type: ignore[arg-type]
        (Phase("train", update),),
        BATCH,
    )
    population, state, args = start(agent, 2, rates=[0.1, 1 / 3])
    _, metrics = population.run[0](state, *args, 100_000)
    np.testing.assert_allclose(metrics["rate"], np.float32([0.1, 1 / 3]), rtol=1e-7)


@pytest.mark.parametrize("pieces", [(50, 50), (10,) * 10, (1, 99), (97, 1, 2)])
def test_training_in_pieces_equals_training_in_one_go(pieces):
    """Bit for bit, with a real agent, noise and two devices."""
    config = td3_bc.Config(hidden=(16, 16), batch_size=8, policy_delay=1)
    agent = td3_bc.make_td3_bc(config, SPEC)
    population = make_population(agent, dataset_sampler(), 3)
    hyper = jax.tree.map(lambda x: np.full(3, x, np.float32), td3_bc.Hyper())
    args = place(population, stack_tasks(tasks(50)), np.zeros(3, np.int32), hyper)
    whole, _ = population.run[0](population.init(np.arange(3), hyper), *args, 100)
    state = population.init(np.arange(3), hyper)
    for updates in pieces:
        state, _ = population.run[0](state, *args, updates)
    assert_equal(whole, state)


def test_a_diverging_member_is_frozen_and_disturbs_nobody():
    rates = np.array([1.0, 1.0, 1.0], np.float32)
    population, state, args = start(counting_agent(), 3, rates=rates)
    healthy, _ = population.run[0](state, *args, 20)
    healthy, _ = population.run[0](healthy, *args, 20)

    population, state, args = start(counting_agent(), 3, rates=[1.0, np.inf, 1.0])
    first, _ = population.run[0](state, *args, 20)
    # inf * reward is inf (or NaN, for a reward of 0) at the very first update.
    assert np.asarray(first.diverged_at)[:3].tolist() == [-1, 1, -1]
    frozen = jax.tree.map(lambda x: x[1], on_host(first.agent))
    second, _ = population.run[0](first, *args, 20)
    assert_equal(frozen, jax.tree.map(lambda x: x[1], on_host(second.agent)))
    assert np.asarray(second.step)[:3].tolist() == [40, 40, 40]
    assert np.asarray(second.diverged_at)[:3].tolist() == [-1, 1, -1]
    for member in (0, 2):
        pick = functools.partial(jax.tree.map, lambda x, m=member: x[m])
        assert_equal(pick(on_host(healthy)), pick(on_host(second)))


def test_a_state_that_is_not_finite_is_found_without_metrics():
    def update(key, state, batch, hyper):
        return state + hyper.rate, {"fine": jnp.zeros(())}

    agent = Agent(
        lambda key, hyper: jnp.asarray(3e38),
        lambda *_: None,  # type: ignore[arg-type]
        (Phase("train", update),),
        BATCH,
    )
    population, state, args = start(agent, 2, rates=[0.0, 3e38])
    state, _ = population.run[0](state, *args, 5)
    assert np.asarray(state.diverged_at).tolist() == [-1, 5]


def test_init_equals_the_agent_alone():
    agent = td3_bc.make_td3_bc(td3_bc.Config(hidden=(16, 16)), SPEC)
    hyper = jax.tree.map(lambda x: np.full(5, x, np.float32), td3_bc.Hyper())
    population = make_population(agent, dataset_sampler(), 5)
    together = population.init(np.array([4, 0, 7, 1, 2]), hyper)
    for member, seed in ((0, 4), (2, 7), (4, 2)):
        _, agent_key, _ = start_keys(seed)
        alone = jax.jit(agent.init)(agent_key, td3_bc.Hyper())
        assert_equal(alone, jax.tree.map(lambda x, m=member: x[m], together.agent))


def test_one_update_on_two_devices_equals_one_device():
    """Gradients, read off Adam's first moments, to the tolerance that is promised."""
    agent = td3_bc.make_td3_bc(td3_bc.Config(hidden=(32, 32), policy_delay=1), SPEC)
    hyper = jax.tree.map(lambda x: np.full(3, x, np.float32), td3_bc.Hyper())
    states = []
    for devices in (1, 2):
        mesh = make_mesh(jax.local_devices()[:devices])
        population = make_population(agent, dataset_sampler(), 3, mesh)
        args = place(population, stack_tasks(tasks(50)), np.zeros(3, np.int32), hyper)
        state, _ = population.run[0](population.init(np.arange(3), hyper), *args, 1)
        states.append([on_host(x) for x in jax.tree.leaves(state.agent.critic_opt.mu)])
    for one, two in zip(*states, strict=True):
        np.testing.assert_allclose(one, two[:3], rtol=1e-4, atol=1e-7)


def test_nothing_recompiles(caplog):
    population, state, args = start(counting_agent(), 3)
    state, _ = population.run[0](state, *args, 1)
    table, task, _ = args
    hyper = spread_members(Hyper(rate=np.float32([5, 6, 7])), population.mesh)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        state, _ = population.run[0](state, table, task, hyper, 17)
        state, _ = population.run[0](state, *args, 2)
    jax.block_until_ready(state)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


def test_keys_of_start_and_phases_are_different():
    key, agent_key, source_key = start_keys(7)
    phases = [jax.random.fold_in(key, i) for i in range(4)]
    keys = [key, agent_key, source_key, *phases]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == len(keys)


def test_a_state_on_the_host_fits_any_number_of_devices():
    population, state, _ = start(counting_agent(), 3, devices=2)
    plain = to_host(state, 3)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(plain))
    one = make_mesh(jax.local_devices()[:1])
    moved = from_host(plain, state, one)
    assert_equal(plain, to_host(moved, 3))
    assert jax.tree.leaves(moved.agent)[0].sharding.mesh.size == 1
    back = from_host(to_host(moved, 3), state, population.mesh)
    assert_equal(state, back)


def test_padding_repeats_the_last_member():
    mesh = make_mesh()
    padded = np.asarray(spread_members(np.arange(5), mesh))
    assert padded.tolist() == [0, 1, 2, 3, 4, 4]
    whole = spread_members(np.arange(4), mesh)
    assert spread_members(whole, mesh) is whole


def test_wrong_requests():
    with pytest.raises(ValueError, match="at least one member"):
        make_population(counting_agent(), dataset_sampler(), 0)
    with pytest.raises(ValueError, match="at least one transition"):
        stack_tasks(tasks(3, 0))
    with pytest.raises(ValueError, match="at least one transition"):
        stack_tasks([])
