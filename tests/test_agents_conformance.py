"""What every registered agent must do; a new one is tested by being registered."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_mdps
from toy_mdps import lab

from offrl_jax.agents.entry import resolve
from offrl_jax.agents.registry import REGISTRY

# Half of a default shows within a few updates, but not for the length of a schedule,
# nor for a bound that only large numbers reach; half of zero is zero.
PERTURBED = {
    "actor_decay_updates": 4.0,
    "largest_weight": 0.5,
    "kappa_max": 0.5,
    "delta": 1.0,
    "max_grad_norm": 1e-2,
    "score_width": 0.1,
    "entropy": 0.1,
    "clip": 1e-4,
    "damping": 0.5,
}
# Presets of another structure, for settings that the default structure does not read.
OTHER_STRUCTURES = {
    "a2c": ("a2c@normalised_sgd",),
    "acpo": ("acpo@paper", "acpo@in_sample", "acpo@rank1"),
    "awr": ("awr@rank1",),
    "deflow": ("deflow@as_in_fidec",),
    # With one action dimension, the trace leaves nothing of the Fisher form.
    "fidec": ("fidec@kl",),
    "iql": ("rank1_iql",),
    "misa": ("misa@antmaze", "misa@rank1"),
    "rank1_ac": ("rank1_ac@trust_region",),
    "woodbury_ac": ("woodbury_ac@trust_region",),
}
CALLS = 4
# Names of what learns values, in the states of agents that have it.
VALUES = {"critic", "critics", "value"}


def all_equal(a, b) -> bool:
    """Bit for bit, over two trees of equal structure."""
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def lane(tree, i: int):
    return jax.tree.map(lambda x: x[i], tree)


def bootstraps(name: str, phase: int) -> bool:
    """Whether a phase learns values: the last one of agents that have any."""
    fields = {field.name for field in dataclasses.fields(start(name, phase))}
    return phase == len(lab(name).phases) - 1 and bool(fields & VALUES)


def settings_of(name: str) -> tuple[list[str], object]:
    """Names of all numeric settings, and lanes: twice the defaults, then one
    lane per setting in which only that setting is changed."""
    hyper = lab(name).hyper
    names = [field.name for field in dataclasses.fields(hyper)]
    lanes = [hyper, hyper]
    for field in names:
        value = PERTURBED.get(field, 0.5 * float(getattr(hyper, field)))
        lanes.append(hyper.replace(**{field: jnp.float32(value)}))
    return names, jax.tree.map(lambda *x: jnp.stack(x), *lanes)


def many(name: str, phase: int, states, first: int = 0, calls: int = CALLS):
    """All lanes of `settings_of` trained in one phase, with the same key."""
    names, hypers = settings_of(name)
    keys = jnp.stack([jax.random.key(1)] * (len(names) + 2))
    data = toy_mdps.random_data()
    train_many = lab(name).phases[phase].train_many
    return train_many(states, keys, data, hypers, first, first + calls)


@functools.cache
def states_before(name: str, phase: int):
    """All lanes at the start of a phase (after the last one for `phase = P`): each
    began with the same key and has gone through the phases before with its setting."""
    if phase > 0:
        return many(name, phase - 1, states_before(name, phase - 1))
    # One by one, as the population does it; a batched draw may round differently.
    key, init = jax.random.key(0), lab(name).agent.init
    return jax.jit(jax.lax.map, static_argnums=0)(
        lambda hyper: init(key, hyper), settings_of(name)[1]
    )


def start(name: str, phase: int):
    """The state at the start of a phase, with the default settings."""
    return lane(states_before(name, phase), 0)


@pytest.fixture(params=sorted(REGISTRY))
def name(request) -> str:
    return request.param


@pytest.fixture(
    params=[
        pytest.param((name, i), id=f"{name}-{phase}")
        for name in sorted(REGISTRY)
        for i, phase in enumerate(toy_mdps.phase_names(name))
    ]
)
def stage(request) -> tuple[str, int]:
    """An agent and the index of one of its phases."""
    return request.param


@pytest.fixture
def state(name):
    it = lab(name)
    return it.init(jax.random.key(0), it.hyper)


def test_phases_have_names_of_their_own(name):
    names = toy_mdps.phase_names(name)
    assert len(set(names)) == len(names)


def test_state_keeps_structure_shapes_and_dtypes(stage):
    name, index = stage
    it = lab(name)
    state = it.init(jax.random.key(0), it.hyper)
    phase = it.phases[index].phase
    rows = it.agent.batch_size * phase.stride
    batch = jax.tree.map(lambda x: x[:rows], toy_mdps.random_data())
    after, metrics = jax.eval_shape(
        phase.update, jax.random.key(0), state, batch, it.hyper
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
        assert x.dtype in (jnp.float32, jnp.int32)
    assert metrics
    assert all(m.shape == () and m.dtype == jnp.float32 for m in metrics.values())


def test_state_holds_no_buffer_twice(state):
    """A donated state with a shared buffer is an error on the first chunk."""
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def test_settings_are_traced_and_nothing_recompiles(stage):
    name, phase = stage
    runner, hyper = lab(name).phases[phase], lab(name).hyper
    state, data, key = start(name, phase), toy_mdps.random_data(), jax.random.key(1)
    runner.train(state, key, data, hyper, 0, 1)
    traced = runner.traces[0]
    names, hypers = settings_of(name)
    for i in range(len(names) + 2):
        runner.train(state, key, data, lane(hypers, i), 0, 1)
    assert runner.traces[0] == traced


def test_every_setting_changes_something(name, little_optimised):
    """A state after all phases, each of them a few updates long."""
    effective = set()
    for label in (name, *OTHER_STRUCTURES.get(name, ())):
        states = states_before(label, len(lab(label).phases))
        assert all_equal(lane(states, 0), lane(states, 1))
        for i, setting in enumerate(settings_of(label)[0]):
            if not all_equal(lane(states, 0), lane(states, i + 2)):
                effective.add(setting)
    assert effective == set(settings_of(name)[0])


def test_every_phase_learns(stage):
    name, phase = stage
    before, after = start(name, phase), start(name, phase + 1)
    assert not all_equal(before, after)


def test_init_of_many_equals_init_alone(name):
    it = lab(name)
    keys = jax.random.split(jax.random.key(5), 3)
    # As the population does it; a batched draw may round differently.
    together = jax.jit(jax.lax.map, static_argnums=0)(
        lambda key: it.agent.init(key, it.hyper), keys
    )
    for i in (0, 2):
        assert all_equal(lane(together, i), it.init(keys[i], it.hyper))
    first = [np.asarray(x) for x in jax.tree.leaves(lane(together, 0))]
    second = [np.asarray(x) for x in jax.tree.leaves(lane(together, 1))]
    assert any(not np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def test_lane_follows_the_same_run_alone(stage):
    """Gradients of one call, read off Adam's first moments, to rtol 1e-4."""
    name, phase = stage
    it, data, key = lab(name), toy_mdps.random_data(), jax.random.key(1)
    alone = it.phases[phase].train(start(name, phase), key, data, it.hyper, 0, 1)
    together = lane(many(name, phase, states_before(name, phase), calls=1), 0)
    moments = [
        (getattr(alone, field.name).mu, getattr(together, field.name).mu)
        for field in dataclasses.fields(alone)
        # Policies that move without Adam remember no gradient; their critics do.
        if hasattr(getattr(alone, field.name), "mu")
    ]
    assert moments
    for x, y in zip(*map(jax.tree.leaves, zip(*moments, strict=True)), strict=True):
        scale = float(jnp.max(jnp.abs(x)))
        # Entries that are sums of cancelling terms have no relative precision.
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * scale + 1e-12)


def test_pieces_equal_the_whole_bit_for_bit(stage):
    name, phase = stage
    it, state = lab(name), start(name, phase)
    train = it.phases[phase].train
    data, key = toy_mdps.random_data(), jax.random.key(1)
    whole = train(state, key, data, it.hyper, 0, 100)
    half = train(state, key, data, it.hyper, 0, 50)
    assert not all_equal(whole, half)
    assert all_equal(whole, train(half, key, data, it.hyper, 50, 100))


def test_only_terminals_stop_bootstrapping(stage):
    name, phase = stage
    it, state = lab(name), start(name, phase)
    data, key = toy_mdps.random_data(), jax.random.key(1)
    terminal = data.discount == 0.0
    timed_out = (data.discount == 1.0) & (data.has_next_action == 0.0)
    assert bool(terminal.any()) and bool(timed_out.any())

    def after(rows) -> object:
        next_obs = jnp.where(rows[:, None], data.next_obs + 3.0, data.next_obs)
        return it.phases[phase].train(
            state, key, data._replace(next_obs=next_obs), it.hyper, 0, CALLS
        )

    as_it_was = after(jnp.zeros_like(terminal))
    assert all_equal(as_it_was, after(terminal))
    assert all_equal(as_it_was, after(timed_out)) == (not bootstraps(name, phase))


def test_missing_next_actions_are_not_read(stage):
    name, phase = stage
    it, state = lab(name), start(name, phase)
    train = it.phases[phase].train
    data, key = toy_mdps.random_data(), jax.random.key(1)
    garbage = jnp.where(data.has_next_action[:, None] == 0.0, 0.9, data.next_action)
    a = train(state, key, data, it.hyper, 0, CALLS)
    changed = data._replace(next_action=garbage)
    assert all_equal(a, train(state, key, changed, it.hyper, 0, CALLS))


def test_a_neighbour_full_of_nan_changes_nothing(stage):
    name, phase = stage
    states = states_before(name, phase + 1)
    healthy = many(name, phase, states, CALLS)
    sick = jax.tree.map(
        lambda x: x.at[0].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        states,
    )
    after = many(name, phase, sick, CALLS)
    actor = jax.tree.leaves(lane(after, 0).actor)
    assert all(np.isnan(x).all() for x in actor)
    for i in range(1, len(settings_of(name)[0]) + 2):
        assert all_equal(lane(healthy, i), lane(after, i))


def test_actions_are_bounded_and_repeatable(name, state):
    it = lab(name)
    obs = 10.0 * jax.random.normal(jax.random.key(3), (64, 2))
    obs = jnp.concatenate([obs, 1e4 * jnp.ones((1, 2))])
    act = jax.jit(it.agent.act)
    action = act(jax.random.key(4), state, obs, it.hyper)
    assert action.shape == (65, 1) and action.dtype == jnp.float32
    assert bool(jnp.all(jnp.abs(action) <= 1.0))
    again = act(jax.random.key(4), state, obs, it.hyper)
    assert np.array_equal(action, again)
    one = act(jax.random.key(4), state, obs[:1], it.hyper)
    np.testing.assert_allclose(one, action[:1], rtol=1e-4, atol=1e-6)


def test_entry_is_complete(name):
    entry = REGISTRY[name]
    assert entry.name == name and entry.title and entry.reference
    assert "quick" in entry.presets
    for where in (entry.presets, entry.families):
        assert all(layer.source for layer in where.values())
    for family in ("none", *entry.families):
        for preset in (None, *entry.presets):
            config, hyper = resolve(entry, family=family, preset=preset, overrides={})
            hash(config)
            assert config.hidden
            if not entry.on_policy:
                assert config.batch_size >= 1
                assert config.obs_transform and config.reward_transform
            assert all(type(x) is float for x in jax.tree.leaves(hyper))


def test_an_agent_learns_from_data_or_gathers_its_own(name):
    entry, agent = REGISTRY[name], lab(name).agent
    assert entry.on_policy == (agent.collection is not None)
    if agent.collection is not None:
        (phase,) = agent.phases
        # Its updates count environment steps, whole rollouts at a time.
        assert agent.batch_size == 1
        assert phase.stride % agent.collection.environments == 0


def test_names_of_transforms_exist(name):
    transforms = pytest.importorskip("offrl_jax.datasets.transforms")
    entry = REGISTRY[name]
    if entry.on_policy:
        pytest.skip("there is no data to transform")
    for family in ("none", *entry.families):
        config, _ = resolve(entry, family=family, preset=None, overrides={})
        assert config.obs_transform in transforms.OBS_TRANSFORMS
        assert config.reward_transform in transforms.REWARD_TRANSFORMS
