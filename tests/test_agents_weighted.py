"""The families that ACPO interpolates: optima on paper, and one update in NumPy.

On a bandit whose behaviour is N(m_b, s_b^2) and whose reward is -(c / 2) (a - m)^2, the
policy proportional to beta^kappa exp(Q / temperature) is Gaussian, with precision
kappa / s_b^2 + c / temperature.  AWAC and BRAC must find kappa = 1, InAC kappa = 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy_mdps
from test_agents_first_update import (
    STILL,
    close,
    critic_values,
    first_update,
    mlp,
)
from toy_mdps import SPEC, forward, lab, solve

from offrl_jax import networks
from offrl_jax.agents import awac, awr, brac, inac

pytestmark = pytest.mark.little_optimised

HERE = np.ones((1, 2))
RATES = {"actor_lr": 3e-3, "critic_lr": 3e-3, "tau": 0.05}
INAC_RATES = {"value_lr": 3e-3, "behaviour_lr": 3e-3}
QUANTILES = scipy.stats.norm.ppf((np.arange(toy_mdps.N) + 0.5) / toy_mdps.N)


def oracle(
    behaviour: tuple[float, float],
    best: float,
    curvature: float,
    temperature: float,
    kappa: float,
) -> tuple[float, float]:
    """Mean and standard deviation of `beta^kappa exp(Q / temperature)`."""
    mean, std = behaviour
    precision = kappa / std**2 + curvature / temperature
    weighted = kappa * mean / std**2 + curvature * best / temperature
    return weighted / precision, precision**-0.5


def test_oracle_against_quadrature():
    """The oracle, too, must not be trusted: normalise the density on a grid."""
    a = np.linspace(-8.0, 8.0, 20001)
    q = -1.5 * (a - 0.7) ** 2
    log_density = 0.6 * scipy.stats.norm.logpdf(a, -0.2, 0.4) + q / 0.3
    density = np.exp(log_density - log_density.max())
    mean = np.average(a, weights=density)
    std = np.average((a - mean) ** 2, weights=density) ** 0.5
    got = oracle((-0.2, 0.4), 0.7, 3.0, 0.3, 0.6)
    np.testing.assert_allclose(got, (mean, std), rtol=1e-6)


def policy_at(name: str, state, obs=HERE) -> tuple[float, float]:
    """Mean and standard deviation of a policy whose density is not squashed."""
    module = {"awr": awr, "awac": awac, "inac": inac}[name]
    actor = module.actor_of(lab(name).config, SPEC)
    mean, raw = networks.apply(actor, state.actor, jnp.float32(obs))
    raw = float(raw[0, 0])
    log_std = -6.0 + 3.0 * (np.tanh(raw + 1.0) + 1.0) if name == "inac" else raw
    return float(np.tanh(mean[0, 0])), float(np.exp(log_std))


@pytest.mark.parametrize("temperature, largest", [(1.0, 20.0), (0.5, 20.0), (0.5, 2.0)])
def test_awr_weighs_the_actions_of_the_data(temperature, largest):
    """Two actions with rewards 0 (70 %) and 1 (30 %): V = 0.3, and each action counts
    min(exp((r - V) / temperature), largest) times its share of the data."""
    state = solve(
        "awr",
        toy_mdps.two_point_bandit(),
        2500,
        temperature=temperature,
        largest_weight=largest,
        actor_lr=3e-3,
        value_lr=3e-3,
    )
    value = networks.apply(
        awr.value_of(lab("awr").config), state.value, jnp.ones((1, 2))
    )
    assert float(value[0]) == pytest.approx(0.3, abs=0.06)
    good = 0.3 * min(np.exp(0.7 / temperature), largest)
    bad = 0.7 * min(np.exp(-0.3 / temperature), largest)
    mean, std = policy_at("awr", state)
    want = 0.5 * (good - bad) / (good + bad)
    assert mean == pytest.approx(want, abs=0.06)
    assert std == pytest.approx((0.25 - want**2) ** 0.5, abs=0.05)


def test_awr_knows_the_values_of_the_chain():
    """Terminals end the sum, the time-out of the third observation does not."""
    state = solve(
        "awr",
        toy_mdps.chain(),
        3000,
        discount=0.9,
        value_lr=3e-3,
        actor_lr=3e-3,
        tau=0.05,
    )
    value = networks.apply(
        awr.value_of(lab("awr").config), state.value, jnp.float32(toy_mdps.CHAIN_OBS)
    )
    np.testing.assert_allclose(value, toy_mdps.chain_values(0.9), atol=0.25)


def gaussian_bandit() -> tuple:
    """Actions from N(-0.05, 0.33^2), reward 1 - (a - 0.3)^2."""
    action = -0.05 + 0.33 * QUANTILES
    assert np.abs(action).max() < 1.1
    data = toy_mdps.bandit(np.clip(action, -1.0, 1.0), 1.0 - (action - 0.3) ** 2)
    return data, (-0.05, 0.33), 0.3, 2.0


@pytest.mark.parametrize("name, kappa", [("awac", 1.0), ("inac", 0.0)])
def test_density_and_support_constraints_choose_different_policies(name, kappa):
    """The same data and temperature: AWAC stays near the frequent actions, InAC asks
    only whether an action occurs."""
    data, behaviour, best, curvature = gaussian_bandit()
    rates = RATES | (INAC_RATES if name == "inac" else {})
    state = solve(name, data, 4000, temperature=0.1, **rates)
    want = oracle(behaviour, best, curvature, 0.1, kappa)
    other = oracle(behaviour, best, curvature, 0.1, 1.0 - kappa)
    assert abs(want[0] - other[0]) > 0.1
    got = policy_at(name, state)
    assert got[0] == pytest.approx(want[0], abs=0.05)
    assert got[1] == pytest.approx(want[1], abs=0.035)


def before_tanh(params) -> tuple[float, float]:
    actor = brac.actor_of(lab("brac").config, SPEC)
    mean, raw = networks.apply(actor, params, jnp.ones((1, 2)))
    log_std = -5.0 + 2.5 * (np.tanh(float(raw[0, 0])) + 1.0)
    return float(mean[0, 0]), float(np.exp(log_std))


@pytest.mark.parametrize("alpha", [0.25, 2.0])
def test_brac_finds_the_optimum_of_the_kl_regularised_problem(alpha):
    """Before tanh everything is Gaussian and quadratic: actions tanh(u) with u from
    N(-0.2, 0.5^2), reward 1 - (u - 0.6)^2 / 2.  The optimum is in the policy's class,
    so the reverse projection reaches it exactly."""
    u = -0.2 + 0.5 * QUANTILES
    data = toy_mdps.bandit(np.tanh(u), 1.0 - 0.5 * (u - 0.6) ** 2)
    state = solve("brac", data, 3000, 1500, alpha=alpha, **RATES)
    beta = before_tanh(state.behaviour)
    assert beta[0] == pytest.approx(-0.2, abs=0.05)
    assert beta[1] == pytest.approx(0.5, abs=0.04)
    want = oracle((-0.2, 0.5), 0.6, 1.0, alpha, 1.0)
    got = before_tanh(state.actor)
    assert got[0] == pytest.approx(want[0], abs=0.08)
    assert got[1] == pytest.approx(want[1], abs=0.05)


def test_brac_starts_at_the_behaviour_and_then_leaves_it_alone():
    it = lab("brac")
    data, key = toy_mdps.random_data(), jax.random.key(1)
    first, last = it.phases
    start = it.init(jax.random.key(0), it.hyper)
    fitted = first.train(start, key, data, it.hyper, 0, 5)
    pairs = zip(
        jax.tree.leaves(fitted.actor), jax.tree.leaves(fitted.behaviour), strict=True
    )
    assert all(np.array_equal(x, y) for x, y in pairs)
    assert int(fitted.behaviour_opt.count) == 5
    assert int(fitted.actor_opt.count) == int(fitted.critic_opt.count) == 0
    for field in ("critics", "target_critics"):
        for x, y in zip(
            jax.tree.leaves(getattr(start, field)),
            jax.tree.leaves(getattr(fitted, field)),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
    trained = last.train(fitted, key, data, it.hyper, 0, 5)
    for field in ("behaviour", "behaviour_opt"):
        for x, y in zip(
            jax.tree.leaves(getattr(fitted, field)),
            jax.tree.leaves(getattr(trained, field)),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
    assert int(trained.actor_opt.count) == 5


@pytest.mark.parametrize(
    "module, name, pretraining, extra",
    [
        (awac, "awac", 0, {}),
        # Hardly any temperature: no entropy in the values.
        (inac, "inac", 0, {"temperature": 1e-4} | INAC_RATES),
        (brac, "brac", 300, {}),
    ],
)
def test_critics_know_the_values_of_the_chain(module, name, pretraining, extra):
    """Terminals end the sum, the time-out of the third observation does not."""
    settings = RATES | extra
    state = solve(name, toy_mdps.chain(), 2500, pretraining, discount=0.9, **settings)
    critic = module.critic_of(lab(name).config)
    for action in (-0.6, 0.0, 0.6):
        q = networks.apply(
            critic,
            state.critics[0],
            jnp.float32(toy_mdps.CHAIN_OBS),
            jnp.full((3, 1), action),
        )
        np.testing.assert_allclose(q, toy_mdps.chain_values(0.9), atol=0.3)


def test_inac_counts_the_entropy_of_its_policy():
    """In the chain every action is as good: the value of an observation without end is
    (0.3 + gamma * temperature * H) / (1 - gamma), H being the policy's entropy."""
    state = solve(
        "inac",
        toy_mdps.chain(),
        4000,
        discount=0.9,
        temperature=0.5,
        **RATES,
        **INAC_RATES,
    )
    _, std = policy_at("inac", state, toy_mdps.CHAIN_OBS[2:])
    entropy = 0.5 + 0.5 * np.log(2.0 * np.pi) + np.log(std)
    assert abs(entropy) > 0.2
    q = networks.apply(
        inac.critic_of(lab("inac").config),
        state.critics[0],
        jnp.float32(toy_mdps.CHAIN_OBS[2:]),
        jnp.zeros((1, 1)),
    )
    want = (0.3 + 0.9 * 0.5 * entropy) / (1.0 - 0.9)
    assert float(q[0]) == pytest.approx(want, abs=0.3)


def normals(which: int, rows: int = 96) -> np.ndarray:
    """The noise of an update: the first or second half of its key."""
    key = jax.random.split(jax.random.key(0))[which]
    return np.asarray(jax.random.normal(key, (rows, 1)), np.float64)


def log_normal(x, mean, log_std) -> np.ndarray:
    return scipy.stats.norm.logpdf(x, mean, np.exp(log_std)).sum(-1)


def test_first_update_of_awr():
    state, _, batch, got = first_update(
        "awr",
        actor_lr=STILL,
        value_lr=STILL,
        discount=0.9,
        temperature=0.4,
        largest_weight=3.0,
    )
    v = forward(mlp(state.value), batch.obs)[:, 0]
    y = (
        batch.reward
        + 0.9 * batch.discount * forward(mlp(state.value), batch.next_obs)[:, 0]
    )
    close(got["value_loss"], ((v - y) ** 2).mean())
    close(got["v_mean"], v.mean())
    close(got["advantage_mean"], (y - v).mean())
    weight = np.minimum(np.exp((y - v) / 0.4), 3.0)
    assert 0.0 < (weight == 3.0).mean() < 1.0
    close(got["weight_mean"], weight.mean())
    pi = np.tanh(forward(mlp(state.actor), batch.obs))
    close(got["actor_loss"], -(weight * log_normal(batch.action, pi, 0.0)).mean())
    close(got["std"], 1.0)


def test_first_update_of_awac():
    state, _, batch, got = first_update(
        "awac",
        actor_lr=STILL,
        critic_lr=STILL,
        discount=0.9,
        temperature=0.05,
        largest_weight=1.5,
    )

    def sample(obs, noise):
        return np.clip(np.tanh(forward(mlp(state.actor), obs)) + noise, -1.0, 1.0)

    next_action = sample(batch.next_obs, normals(0))
    next_q = critic_values(state, batch.next_obs, next_action).min(0)
    y = batch.reward + 0.9 * batch.discount * next_q
    q = critic_values(state, batch.obs, batch.action)
    close(got["critic_loss"], ((q - y) ** 2).mean(1).sum())
    q = q.min(0)
    v = critic_values(state, batch.obs, sample(batch.obs, normals(1))).min(0)
    close(got["q_mean"], q.mean())
    close(got["advantage_mean"], (q - v).mean())
    weight = np.minimum(np.exp((q - v) / 0.05), 1.5)
    assert 0.0 < (weight == 1.5).mean() < 1.0
    close(got["weight_mean"], weight.mean())
    pi = np.tanh(forward(mlp(state.actor), batch.obs))
    close(got["actor_loss"], -(weight * log_normal(batch.action, pi, 0.0)).mean())


@pytest.mark.parametrize("temperature", [0.3, 0.003])
def test_first_update_of_inac(temperature):
    rates = ("actor_lr", "critic_lr", "value_lr", "behaviour_lr")
    state, _, batch, got = first_update(
        "inac", discount=0.9, temperature=temperature, **dict.fromkeys(rates, STILL)
    )

    def density(params, obs):
        log_std = -6.0 + 3.0 * (np.tanh(1.0) + 1.0)
        return np.tanh(forward(mlp(params), obs)), log_std

    def soft_value(obs, noise):
        mean, log_std = density(state.actor, obs)
        action = mean + np.exp(log_std) * noise
        q = critic_values(state, obs, np.clip(action, -1.0, 1.0)).min(0)
        return q - temperature * log_normal(action, mean, log_std)

    log_beta = log_normal(batch.action, *density(state.behaviour, batch.obs))
    close(got["behaviour_loss"], -log_beta.mean())
    v = forward(mlp(state.value), batch.obs)[:, 0]
    close(got["value_loss"], ((v - soft_value(batch.obs, normals(0))) ** 2).mean())
    y = batch.reward + 0.9 * batch.discount * soft_value(batch.next_obs, normals(1))
    q = critic_values(state, batch.obs, batch.action)
    close(got["critic_loss"], ((q - y) ** 2).mean(1).sum())
    q = q.min(0)
    close(got["advantage_mean"], (q - v).mean())
    weight = np.clip(np.exp((q - v) / temperature - log_beta), 1e-8, 1e4)
    if temperature == 0.003:
        assert (weight == 1e4).any() and (weight == 1e-8).any()
    close(got["weight_mean"], weight.mean())
    log_pi = log_normal(batch.action, *density(state.actor, batch.obs))
    close(got["actor_loss"], -(weight * log_pi).mean())


@pytest.mark.parametrize("value_penalty", [True, False])
def test_first_update_of_brac(value_penalty):
    """The policy differs from the behaviour here: one update of the policy first."""
    config = brac.Config((32, 32), batch_size=96, value_penalty=value_penalty)
    agent = brac.make_brac(config, SPEC)
    hyper: Any = brac.Hyper(discount=0.9, alpha=0.7, critic_lr=STILL)
    batch = jax.tree.map(lambda x: x[:96], toy_mdps.random_data())
    update = jax.jit(agent.phases[-1].update)
    key = jax.random.key(0)
    state, _ = update(key, agent.init(key, hyper), batch, hyper.replace(actor_lr=0.02))
    _, metrics = update(key, state, batch, hyper.replace(actor_lr=STILL))
    got = {k: float(v) for k, v in metrics.items()}

    def density(params, obs):
        mean, raw = np.split(forward(mlp(params), obs), 2, axis=-1)
        return mean, -5.0 + 2.5 * (np.tanh(raw) + 1.0)

    def sample(obs, noise):
        """Log densities after tanh, by change of variables."""
        mean, log_std = density(state.actor, obs)
        before = mean + np.exp(log_std) * noise
        jacobian = np.log1p(-(np.tanh(before) ** 2)).sum(-1)
        log_pi = log_normal(before, mean, log_std) - jacobian
        log_beta = log_normal(before, *density(state.behaviour, obs)) - jacobian
        return np.tanh(before), log_pi - log_beta

    obs, next_obs = (np.asarray(x, np.float64) for x in (batch.obs, batch.next_obs))
    next_action, divergence = sample(next_obs, normals(0))
    next_v = critic_values(state, next_obs, next_action, field="target_critics").min(0)
    next_v = next_v - value_penalty * 0.7 * divergence
    y = np.asarray(batch.reward) + 0.9 * np.asarray(batch.discount) * next_v
    q = critic_values(state, obs, np.asarray(batch.action))
    assert np.abs(divergence).mean() > 0.1
    close(got["critic_loss"], ((q - y) ** 2).mean(1).sum())
    action, divergence = sample(obs, normals(1))
    q = critic_values(state, obs, action).min(0)
    close(got["kl"], divergence.mean())
    close(got["q_mean"], q.mean())
    close(got["actor_loss"], 0.7 * divergence.mean() - q.mean())


def test_first_update_of_the_behaviour_model_of_brac():
    agent = brac.make_brac(brac.Config((32, 32), batch_size=96), SPEC)
    batch = jax.tree.map(lambda x: x[:96], toy_mdps.random_data())
    state = agent.init(jax.random.key(0), brac.Hyper())
    _, metrics = jax.jit(agent.phases[0].update)(
        jax.random.key(0), state, batch, brac.Hyper()
    )
    obs, action = (np.asarray(x, np.float64) for x in (batch.obs, batch.action))
    mean, raw = np.split(forward(mlp(state.behaviour), obs), 2, axis=-1)
    log_std = -5.0 + 2.5 * (np.tanh(raw) + 1.0)
    log_beta = log_normal(np.arctanh(action), mean, log_std)
    log_beta = log_beta - np.log1p(-(action**2)).sum(-1)
    close(float(metrics["behaviour_loss"]), -log_beta.mean())


@pytest.mark.parametrize("name", ["awr", "awac", "inac", "brac"])
def test_actions_on_the_bounds_and_constant_actions_stay_finite(name):
    """Bang-bang data, and data whose behaviour has no spread: densities degenerate."""
    sides = np.where(np.arange(toy_mdps.N) % 2 == 0, 1.0, -1.0)
    for action in (sides, np.full(toy_mdps.N, 1.0), np.zeros(toy_mdps.N)):
        data = toy_mdps.bandit(action, 10.0 * action)
        state = solve(name, data, 800, 400 if name == "brac" else 0, tau=0.05)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["awr", "awac", "inac", "brac"])
def test_independent_of_the_code_that_they_are_compared_with(name):
    """Tests hold acpo against these agents: nothing of it may be in them."""
    module = {"awr": awr, "awac": awac, "inac": inac, "brac": brac}[name]
    others = {
        value.__name__
        for value in vars(module).values()
        if type(value).__name__ == "module" and value.__name__.startswith("offrl_jax")
    }
    allowed = {"offrl_jax." + x for x in ("distributions", "losses", "networks")}
    assert others <= allowed | {"offrl_jax.agents.optim"}
    assert {f.name for f in dataclasses.fields(module.State)} >= {"actor", "actor_opt"}
