"""The theory of constraint interpolation on random tabular MDPs, and a 2-D bandit.

Everything but `closed_form` is float64 NumPy (tabular.py).  The statements are
reconstructions: ACPO's own theorems are known to us only by their names.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import scipy.special
import tabular
from tabular import TabularMDP

from offrl_jax import constraint

KAPPAS = (0.0, 0.3, 1.0, 2.5)
_each_state = jax.jit(jax.vmap(constraint.closed_form, (0, 0, None, None)))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _log(beta):
    with np.errstate(divide="ignore"):
        return np.log(beta)


def _mean(policy, values):
    """`E_pi`, `[X, K], [X, K] -> [X]`; what has probability zero does not count."""
    return (policy * np.where(policy > 0, values, 0.0)).sum(-1)


def _optimal(q, beta, alpha, kappa):
    """The library's closed form in every state, `[X, K]`."""
    return np.exp(np.asarray(_each_state(q, _log(beta), alpha, kappa)[0]))


def _behaviour(rng, mdp, zeros=True):
    """A random policy; with `zeros`, one action per state is outside its support."""
    beta = tabular.random_policy(rng, mdp)
    if zeros:
        beta[np.arange(len(beta)), rng.integers(beta.shape[1], size=len(beta))] = 0.0
    return beta / beta.sum(-1, keepdims=True)


def test_tabular_solutions_equal_rollouts():
    """The linear solves against sums over time of the state distribution."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        mdp = tabular.random_mdp(rng)
        policy = _behaviour(rng, mdp)
        gain = _mean(policy, mdp.reward - 0.7 * _log(np.where(policy > 0, policy, 1.0)))
        state, total, visits = mdp.start, 0.0, np.zeros(len(gain))
        for t in range(400):
            total += mdp.gamma**t * (state @ gain)
            visits += (1 - mdp.gamma) * mdp.gamma**t * state
            state = np.einsum("x,xk,xky->y", state, policy, mdp.transition)
        np.testing.assert_allclose(tabular.soft_return(mdp, policy, 0.7), total)
        np.testing.assert_allclose(tabular.occupancy(mdp, policy), visits)
        assert visits.sum() < 0.9  # These episodes do terminate.


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.5])
def test_max_entropy_performance_difference_lemma(alpha):
    """Both forms of it; alpha = 0 is Kakade & Langford's (2002)."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        mdp = tabular.random_mdp(rng, terminates=0.3 * (seed % 2))
        beta, policy = (_behaviour(rng, mdp, zeros=False) for _ in range(2))
        v, q = tabular.soft_values(mdp, beta, alpha)
        d = tabular.occupancy(mdp, policy)
        difference = tabular.soft_return(mdp, policy, alpha) - tabular.soft_return(
            mdp, beta, alpha
        )
        first = _mean(policy, q - alpha * np.log(policy)) - v
        np.testing.assert_allclose(d @ first / (1 - mdp.gamma), difference)
        advantage = q - alpha * np.log(beta) - v[:, None]
        np.testing.assert_allclose(_mean(beta, advantage), 0.0, atol=1e-12)
        second = _mean(policy, advantage) - alpha * tabular.kl(policy, beta)
        np.testing.assert_allclose(d @ second / (1 - mdp.gamma), difference)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_improvement_identity_and_lower_bound(kappa):
    """What the closed form gains over the behaviour, exactly and at least."""
    alpha, gaps = 0.3, []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        mdp = tabular.random_mdp(rng)
        beta = _behaviour(rng, mdp, zeros=seed % 2 == 1)
        _, q = tabular.soft_values(mdp, beta, alpha)
        best = _optimal(q, beta, alpha, kappa)
        np.testing.assert_array_equal(best[beta == 0.0], 0.0)
        d = tabular.occupancy(mdp, best) / (1 - mdp.gamma)
        gain = tabular.soft_return(mdp, best, alpha) - tabular.soft_return(
            mdp, beta, alpha
        )
        log_beta = _log(beta)
        move = alpha * kappa * (_mean(beta, log_beta) - _mean(best, log_beta))
        np.testing.assert_allclose(
            d @ (alpha * tabular.kl(beta, best) + move), gain, rtol=1e-9
        )
        gaps.append(gain - d @ move)
        if kappa == 0.0:
            assert gain >= 0.0
    # The bound leaves the KL out: never above, and it is the KL that is missing.
    assert min(gaps) > 0.0


def test_support_constrained_soft_improvement_is_monotone_to_the_optimum():
    """kappa = 0, repeated: soft policy iteration inside the behaviour's support."""
    alpha = 0.3
    for seed in range(4):
        rng = np.random.default_rng(seed)
        mdp = tabular.random_mdp(rng)
        beta = _behaviour(rng, mdp)
        policy, returns = beta, [tabular.soft_return(mdp, beta, alpha)]
        for _ in range(30):
            _, q = tabular.soft_values(mdp, policy, alpha)
            policy = _optimal(q, policy, alpha, 0.0)
            returns.append(tabular.soft_return(mdp, policy, alpha))
        assert (np.diff(returns) >= -1e-12).all() and returns[-1] > returns[0] + 0.05
        np.testing.assert_array_equal(policy > 0.0, beta > 0.0)
        # Soft value iteration on the support, without any policy.
        v = np.zeros(len(beta))
        for _ in range(1000):
            q = mdp.reward + mdp.gamma * mdp.transition @ v
            soft = scipy.special.logsumexp(q / alpha, axis=-1, b=beta > 0.0)
            v = alpha * soft
        np.testing.assert_allclose(returns[-1], mdp.start @ v, rtol=1e-10)


def _bound(xi, gamma, largest_reward=1.0):
    """`2 R_max / (1 - gamma)^2 * sqrt(xi / 2)`."""
    return 2.0 * largest_reward / (1.0 - gamma) ** 2 * np.sqrt(xi / 2.0)


def _projections(rng, best, d):
    """Policies near and far from `best`, and two that a smaller class would fit."""
    for scale in np.geomspace(1e-3, 5.0, 12):
        yield scipy.special.softmax(
            np.log(best) + scale * rng.normal(size=best.shape), axis=-1
        )
    # Forward projections: one action distribution for all states, or for half of them.
    share = d[:, None] * best
    pooled = share.sum(0) / share.sum()
    yield np.broadcast_to(pooled, best.shape)
    half = np.arange(len(best)) % 2 == 0
    even, odd = (share[x].sum(0) / share[x].sum() for x in (half, ~half))
    yield np.where(half[:, None], even, odd)


@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_projection_bound(gamma):
    ratios, informative = [], 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        mdp = tabular.random_mdp(rng, gamma=gamma, terminates=0.2 * (seed % 2))
        beta = _behaviour(rng, mdp, zeros=False)
        _, q = tabular.soft_values(mdp, beta, 0.3)
        best = _optimal(q, beta, 0.3, KAPPAS[seed % len(KAPPAS)])
        d = tabular.occupancy(mdp, best)
        target = tabular.soft_return(mdp, best, 0.0)
        # With the improvement bound: the closed form returns at least this.
        log_beta, kappa = np.log(beta), KAPPAS[seed % len(KAPPAS)]
        move = 0.3 * kappa * (_mean(beta, log_beta) - _mean(best, log_beta))
        least = tabular.soft_return(mdp, beta, 0.3) + (
            d @ (move - 0.3 * tabular.entropy(best)) / (1.0 - gamma)
        )
        for policy in _projections(rng, best, d):
            lost = abs(tabular.soft_return(mdp, policy, 0.0) - target)
            bound = _bound(d @ tabular.kl(best, policy), gamma)
            assert lost <= bound
            assert tabular.soft_return(mdp, policy, 0.0) >= least - bound
            ratios.append(lost / bound)
            informative += bound < 2.0 / (1.0 - gamma)  # No return differs by more.
    assert informative > 0.3 * len(ratios)
    assert 0.02 < max(ratios) < 1.0


def test_projection_bound_is_reached_where_steps_do_not_interact():
    """Two arms worth +-1 at gamma = 0: Pinsker's inequality is all that is lost."""
    mdp = TabularMDP(
        reward=np.array([[1.0, -1.0]]),
        transition=np.zeros((1, 2, 1)),
        start=np.ones(1),
        gamma=0.0,
    )
    best, shift = np.array([[0.5, 0.5]]), 1e-3
    policy = best + np.array([[shift, -shift]])
    lost = abs(tabular.soft_return(mdp, policy, 0.0))
    np.testing.assert_allclose(lost, 2 * shift)
    bound = _bound(tabular.kl(best, policy)[0], 0.0)
    np.testing.assert_allclose(lost / bound, 1.0, rtol=1e-5)
    assert lost <= bound


def test_projection_bound_needs_both_powers_of_the_horizon():
    """One slip off a cliff costs a whole horizon: `1 / (1 - gamma)` would be false."""
    gamma, slip = 0.99, 1e-3
    stay, fall = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    mdp = TabularMDP(
        reward=np.array([[1.0, 1.0], [-1.0, -1.0]]),
        transition=np.array([[stay, fall], [fall, fall]]),
        start=stay,
        gamma=gamma,
    )
    best = np.array([[1.0, 0.0], [0.5, 0.5]])
    policy = np.array([[1.0 - slip, slip], [0.5, 0.5]])
    lost = tabular.soft_return(mdp, best, 0.0) - tabular.soft_return(mdp, policy, 0.0)
    # By hand: V(top) = 1 + gamma ((1 - slip) V(top) - slip / (1 - gamma)).
    top = (1 - gamma * slip / (1 - gamma)) / (1 - gamma * (1 - slip))
    np.testing.assert_allclose(lost, 1 / (1 - gamma) - top)
    xi = tabular.occupancy(mdp, best) @ tabular.kl(best, policy)
    np.testing.assert_allclose(xi, -np.log1p(-slip))
    assert (1 - gamma) * _bound(xi, gamma) < lost <= _bound(xi, gamma)


# --- a bandit with two modes: often and mediocre, rarely and well

FREQUENT, RARE, STD, REACH = (-0.5, -0.4), (0.5, 0.4), 0.15, 3.0


@functools.cache
def _two_modes():
    """Actions, behaviour, value and the region of each mode, on a grid of 121 x 121."""
    axis = np.linspace(-1.0, 1.0, 121)
    x, y = (grid.ravel() for grid in np.meshgrid(axis, axis, indexing="ij"))
    square = [((x - a) ** 2 + (y - b) ** 2) / STD**2 for a, b in (FREQUENT, RARE)]
    near = [s < REACH**2 for s in square]
    bumps = [np.exp(-0.5 * s) for s in square]
    beta = np.where(near[0], 0.95 * bumps[0], 0.0) + np.where(
        near[1], 0.05 * bumps[1], 0.0
    )
    # A third peak, the best of all, where there are no data.
    nowhere = np.exp(-((x - 0.6) ** 2 + (y + 0.7) ** 2) / 0.1)
    q = 0.2 * bumps[0] + 1.0 * bumps[1] + 3.0 * nowhere
    return beta / beta.sum(), q, near


@pytest.mark.parametrize(
    "kappa, frequent, rare",
    [(0.0, (0.0, 0.4), (0.6, 1.0)), (1.0, (0.75, 1), (0, 0.25)), (5.0, (1, 1), (0, 0))],
)
def test_bandit_goes_from_the_rare_good_mode_to_the_frequent_one(kappa, frequent, rare):
    beta, q, near = _two_modes()
    alpha = 0.5
    policy = _optimal(q[None], beta[None], alpha, kappa)[0]
    # In probabilities instead of logarithms, on the support alone.
    support = beta > 0.0
    want = np.zeros_like(q)
    want[support] = beta[support] ** kappa * np.exp(q[support] / alpha)
    want /= want.sum()
    np.testing.assert_allclose(policy, want, atol=1e-12)
    masses = [policy[mask].sum() for mask in near]
    np.testing.assert_allclose(sum(masses), 1.0, rtol=1e-12)
    for mass, (low, high) in zip(masses, (frequent, rare), strict=True):
        assert low - 1e-4 <= mass <= high + 1e-4
    # The best value of all lies outside the support, and nothing goes there.
    assert not support[q.argmax()] and policy[q.argmax()] == 0.0
