"""Every agent solves problems whose answers are known on paper."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import toy_mdps
from toy_mdps import SPEC, lab, solve

from offrl_jax import distributions, networks
from offrl_jax.agents import gaussian_bc, iql, rebrac, td3_bc

HERE = np.ones((1, 2))
RATES = {"actor_lr": 3e-3, "critic_lr": 3e-3, "tau": 0.05}


def q_of(module, name: str, state, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    critic = module.critic_of(lab(name).config)
    return np.asarray(
        networks.apply(critic, state.critics[0], jnp.float32(obs), jnp.float32(action))
    )


def test_bc_finds_the_mean_action():
    state = solve("bc", toy_mdps.two_point_bandit(), 1500, lr=1e-3)
    # 0.3 * 0.5 - 0.7 * 0.5
    assert toy_mdps.action_at("bc", state, HERE)[0, 0] == pytest.approx(-0.2, abs=0.04)


def test_gaussian_bc_finds_mean_and_std_before_tanh():
    noise = np.random.default_rng(0).normal(size=toy_mdps.N)
    before = 0.4 + 0.3 * (noise - noise.mean()) / noise.std()
    data = toy_mdps.bandit(np.tanh(before), np.zeros(toy_mdps.N))
    state = solve("gaussian_bc", data, 2000, lr=1e-3)
    got = toy_mdps.action_at("gaussian_bc", state, HERE)[0, 0]
    assert got == pytest.approx(np.tanh(0.4), abs=0.03)
    it = lab("gaussian_bc")
    actor = gaussian_bc.actor_of(it.config, SPEC)
    _, raw = networks.apply(actor, state.actor, jnp.ones((1, 2)))
    log_std = distributions.soft_bound(raw, it.hyper.log_std_min, it.hyper.log_std_max)
    assert float(jnp.exp(log_std)[0, 0]) == pytest.approx(0.3, abs=0.04)


def test_td3_bc_balances_value_and_cloning():
    """d/da [alpha Q(a) / q - E(a - b)^2] = 0 with Q = 1 - (a - 1/2)^2, q = |Q(a)|."""

    def slope(a: float, alpha: float) -> float:
        return alpha * (0.5 - a) / abs(1.0 - (a - 0.5) ** 2) - a

    for alpha in (0.5, 2.5):
        want = scipy.optimize.brentq(slope, 0.0, 0.5, args=(alpha,))
        state = solve("td3_bc", toy_mdps.uniform_bandit(), 1500, alpha=alpha, **RATES)
        got = toy_mdps.action_at("td3_bc", state, HERE)[0, 0]
        assert got == pytest.approx(want, abs=0.07)


def test_rebrac_balances_value_and_cloning():
    """d/da [Q(a) / q - beta E(a - b)^2] = 0, Q and q as above."""

    def slope(a: float, beta: float) -> float:
        return (0.5 - a) / abs(1.0 - (a - 0.5) ** 2) - beta * a

    for beta in (0.1, 2.0):
        want = scipy.optimize.brentq(slope, 0.0, 0.5, args=(beta,))
        state = solve(
            "rebrac", toy_mdps.uniform_bandit(), 1500, actor_penalty=beta, **RATES
        )
        got = toy_mdps.action_at("rebrac", state, HERE)[0, 0]
        assert got == pytest.approx(want, abs=0.07)


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_iql_weighs_the_actions_of_the_data(beta):
    """The weighted mean: V cancels in the ratio of exp(beta (r - V)) as long as
    no weight is clipped; V is the expectile of {0 w.p. 0.7, 1 w.p. 0.3}."""
    state = solve(
        "iql",
        toy_mdps.two_point_bandit(),
        3000,
        beta=beta,
        value_lr=3e-3,
        expectile=0.7,
        **RATES,
    )
    ratio = 0.3 * np.exp(beta) / (0.3 * np.exp(beta) + 0.7)
    want = 0.5 * ratio - 0.5 * (1.0 - ratio)
    got = toy_mdps.action_at("iql", state, HERE)[0, 0]
    assert got == pytest.approx(want, abs=0.06)
    value = networks.apply(
        iql.value_of(lab("iql").config), state.value, jnp.ones((1, 2))
    )
    assert float(value[0]) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    "module, name, extra",
    [
        (td3_bc, "td3_bc", {}),
        (rebrac, "rebrac", {"critic_penalty": 0.0}),
        (iql, "iql", {"value_lr": 3e-3}),
    ],
)
def test_critics_know_the_values_of_the_chain(module, name, extra):
    """Terminals end the sum, the time-out of the third observation does not."""
    state = solve(name, toy_mdps.chain(), 3000, discount=0.9, **RATES, **extra)
    for action in (-0.6, 0.0, 0.6):
        q = q_of(module, name, state, toy_mdps.CHAIN_OBS, np.full((3, 1), action))
        np.testing.assert_allclose(q, toy_mdps.chain_values(0.9), atol=0.25)


def test_rebrac_critic_pays_for_leaving_the_data():
    """The data repeat their action, a' = a: the penalty lowers the value of (0, a) by
    gamma * (pi(1) - a)^2, and that of no other observation, since 1 terminates and 2
    has no next action."""
    free, priced = (
        solve(
            "rebrac",
            toy_mdps.chain(),
            3000,
            discount=0.9,
            critic_penalty=penalty,
            policy_noise=0.0,
            **RATES,
        )
        for penalty in (0.0, 1.0)
    )
    policy = toy_mdps.action_at("rebrac", priced, toy_mdps.CHAIN_OBS)[1, 0]
    for action in (-0.8, policy, 0.8):
        at = (toy_mdps.CHAIN_OBS, np.full((3, 1), action))
        before = q_of(rebrac, "rebrac", free, *at)
        difference = before - q_of(rebrac, "rebrac", priced, *at)
        want = [0.9 * (policy - action) ** 2, 0.0, 0.0]
        np.testing.assert_allclose(difference, want, atol=0.15)
