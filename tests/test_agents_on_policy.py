"""What on-policy agents share: advantages, policies, moments, values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy_mdps
from flax import linen as nn
from toy_mdps import lab

from offrl_jax import networks
from offrl_jax.agents import actor_critic, optim
from offrl_jax.agents.registry import REGISTRY
from offrl_jax.types import Spec, Transitions

pytestmark = pytest.mark.little_optimised

ON_POLICY = sorted(name for name, entry in REGISTRY.items() if entry.on_policy)
CONTINUOUS, DISCRETE = Spec(3, 2, 10), Spec(3, 4, 10, discrete=True)


def summed_advantages(reward, discount, goes_on, value, next_value, gamma, decay):
    """A_t = sum over later steps of (gamma * lambda)^l delta_(t+l), by loops."""
    steps, environments = reward.shape
    found = np.zeros_like(reward)
    for e in range(environments):
        for t in range(steps):
            weight = 1.0
            for later in range(t, steps):
                target = (
                    reward[later, e] + gamma * discount[later, e] * next_value[later, e]
                )
                found[t, e] += weight * (target - value[later, e])
                if not goes_on[later, e]:
                    break
                weight *= gamma * decay
    return found


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_advantages_are_the_sums_of_the_paper(decay: float):
    rng = np.random.default_rng(0)
    shape = (11, 3)
    reward, value, next_value = (rng.normal(size=shape) for _ in range(3))
    ends = rng.random(shape) < 0.3
    discount = (~(ends & (rng.random(shape) < 0.5))).astype(float)
    arrays = (reward, discount, (~ends).astype(float), value, next_value)
    got = actor_critic.advantages(
        *(jnp.asarray(x, jnp.float32) for x in arrays),
        jnp.float32(0.9),
        jnp.float32(decay),
    )
    expected = summed_advantages(*arrays, 0.9, decay)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_time_limit_bootstraps_and_a_terminal_state_does_not():
    """Two one-step episodes that differ in nothing else: 1 + 0.9 * 5 - 2 and 1 - 2."""
    ones = jnp.ones((1, 2))
    discount, goes_on = jnp.array([[1.0, 0.0]]), jnp.zeros((1, 2))
    got = actor_critic.advantages(
        ones,
        discount,
        goes_on,
        2.0 * ones,
        5.0 * ones,
        jnp.float32(0.9),
        jnp.float32(0.95),
    )
    np.testing.assert_allclose(got, [[3.5, -1.0]], rtol=1e-6)


def drawn(spec: Spec):
    """A policy with parameters far from its start, and observations."""
    policy = actor_critic.make_policy((8,), spec)

    class Start:
        log_std = -0.5

    params = policy.init(jax.random.key(0), Start)
    noise = jax.random.key(1)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(noise, len(leaves))
    other = jax.tree.unflatten(
        tree,
        [
            x + 0.4 * jax.random.normal(k, x.shape)
            for x, k in zip(leaves, keys, strict=True)
        ],
    )
    obs = jax.random.normal(jax.random.key(2), (5, spec.obs_dim))
    return policy, params, other, obs


def test_a_gaussian_policy_is_scipys():
    policy, params, other, obs = drawn(CONTINUOUS)
    mean = np.asarray(policy.outputs(other, obs), np.float64)
    std = np.exp(np.asarray(other["log_std"], np.float64))
    action = np.random.default_rng(0).normal(size=(5, 2))
    expected = scipy.stats.norm(mean, std).logpdf(action).sum(-1)
    got = policy.log_prob(other, obs, jnp.asarray(action, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    entropy = scipy.stats.norm(mean, std).entropy().sum(-1)
    np.testing.assert_allclose(policy.entropy(other, obs), entropy, rtol=1e-5)
    old_mean = np.asarray(policy.outputs(params, obs), np.float64)
    old_std = np.exp(np.asarray(params["log_std"], np.float64))
    ratio = (old_std**2 + (old_mean - mean) ** 2) / (2 * std**2)
    kl = (np.log(std / old_std) + ratio - 0.5).sum(-1)
    np.testing.assert_allclose(policy.divergence(params, other, obs), kl, rtol=1e-3)


def test_a_softmax_policy_is_scipys():
    policy, params, other, obs = drawn(DISCRETE)
    p, old = (
        scipy.special.softmax(np.asarray(policy.outputs(x, obs)), axis=-1)
        for x in (other, params)
    )
    for choice in range(4):
        action = jax.nn.one_hot(jnp.full(5, choice), 4)
        np.testing.assert_allclose(
            policy.log_prob(other, obs, action), np.log(p[:, choice]), rtol=1e-4
        )
    entropy = scipy.stats.entropy(p, axis=-1)
    np.testing.assert_allclose(policy.entropy(other, obs), entropy, rtol=1e-4)
    kl = scipy.stats.entropy(old, p, axis=-1)
    np.testing.assert_allclose(policy.divergence(params, other, obs), kl, rtol=1e-3)


@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE], ids=["gaussian", "softmax"])
def test_samples_have_the_stated_density(spec: Spec):
    """The mean of -log pi over draws is the entropy, within 4 standard errors."""
    policy, _, other, obs = drawn(spec)
    many = jnp.repeat(obs[:1], 20_000, axis=0)
    action = policy.sample(jax.random.key(5), other, many)
    surprise = -np.asarray(policy.log_prob(other, many, action))
    error = surprise.std() / np.sqrt(len(surprise))
    assert abs(surprise.mean() - float(policy.entropy(other, obs)[0])) < 4 * error
    if spec.discrete:
        assert set(np.unique(action)) == {0.0, 1.0} and (action.sum(-1) == 1.0).all()


@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE], ids=["gaussian", "softmax"])
def test_no_action_is_likelier_than_the_mode(spec: Spec):
    policy, params, _, obs = drawn(spec)
    best = policy.log_prob(params, obs, policy.mode(params, obs))
    for i in range(20):
        action = policy.sample(jax.random.key(i), params, obs)
        assert bool(jnp.all(policy.log_prob(params, obs, action) <= best + 1e-6))


def test_moments_are_those_of_everything_seen():
    rng = np.random.default_rng(0)
    parts = [rng.normal(3.0, 2.0, (n, 2)).astype(np.float32) for n in (7, 100, 40)]
    moments = actor_critic._no_moments(2)
    for part in parts:
        moments = actor_critic._with(moments, jnp.asarray(part))
    everything = np.concatenate(parts).astype(np.float64)
    obs = np.float32([[1.0, 2.0], [1e6, -1e6]])
    expected = (obs - everything.mean(0)) / everything.std(0)
    got = actor_critic._standardised(moments, jnp.asarray(obs))
    np.testing.assert_allclose(got, np.clip(expected, -10.0, 10.0), rtol=1e-4)
    nothing = actor_critic._standardised(actor_critic._no_moments(2), jnp.asarray(obs))
    np.testing.assert_array_equal(nothing, obs)


def test_minibatches_are_a_partition():
    found = np.asarray(optim.shuffled(jax.random.key(0), 12, 3))
    assert found.shape == (3, 4) and sorted(found.ravel()) == list(range(12))
    assert not np.array_equal(found.ravel(), np.arange(12))
    assert optim.shuffled(jax.random.key(0), 13, 3).shape == (3, 4)


@pytest.mark.parametrize("name", ON_POLICY)
def test_every_agent_moves_towards_the_better_action(name: str):
    """A bandit whose reward is the action: the mean action must rise."""
    it = lab(name)
    state = it.init(jax.random.key(0), it.hyper)
    update = jax.jit(it.agent.phases[0].update)
    rows = it.agent.phases[0].stride
    obs, zeros = jnp.ones((rows, 2)), jnp.zeros(rows)
    before = float(it.agent.act(jax.random.key(0), state, obs, it.hyper)[0, 0])
    for i in range(30):
        assert it.agent.collection is not None
        action = it.agent.collection.explore(jax.random.key(i), state, obs, it.hyper)
        batch = Transitions(obs, action, action[:, 0], zeros, obs, action, zeros)
        state, metrics = update(jax.random.key(100 + i), state, batch, it.hyper)
        assert all(np.isfinite(float(x)) for x in metrics.values())
    assert float(it.agent.act(jax.random.key(0), state, obs, it.hyper)[0, 0]) > before


def test_the_critic_learns_the_values_of_the_chain():
    """gamma = 0.9: 1 + 0.9 * 2, 2 (terminal), and 0.3 / (1 - 0.9) behind time-outs."""
    it = lab("a2c")
    hyper = it.hyper.replace(
        critic_lr=jnp.float32(1e-2),
        discount=jnp.float32(0.9),
        gae_lambda=jnp.float32(0.0),
    )
    data = toy_mdps.chain()
    # Of a rollout, the row after a step is the episode's next one: here none goes on.
    data = data._replace(has_next_action=jnp.zeros_like(data.has_next_action))
    state = it.train(
        it.init(jax.random.key(0), hyper), jax.random.key(1), data, hyper, 0, 3000
    )
    critic = networks.Value(it.config.hidden, activation=nn.tanh)
    obs = jnp.asarray(toy_mdps.CHAIN_OBS, jnp.float32)
    found = networks.apply(critic, state.critic, obs)
    np.testing.assert_allclose(found, toy_mdps.chain_values(0.9), rtol=0.03)
