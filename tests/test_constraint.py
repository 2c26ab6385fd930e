"""The formulas of constraint interpolation against solvers, quadrature and NumPy.

What needs a whole MDP is in test_constraint_theory.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import tabular

from offrl_jax import constraint, losses

KAPPAS = (0.0, 0.3, 1.0, 2.5)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def _case(seed, states=3, actions=6):
    """Random values, log densities and a temperature, float64 NumPy."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(states, actions))
    log_beta = np.log(rng.dirichlet(np.ones(actions), states))
    return q, log_beta, rng.uniform(0.3, 1.5)


_each_state = jax.jit(jax.vmap(constraint.closed_form, (0, 0, None, None)))
_each_weight = jax.jit(jax.vmap(constraint.log_weight, (0, 0, None, None)))


def _optimal(q, log_beta, alpha, kappa):
    """The library's policy `[X, K]` and value `[X]` for every state, as NumPy."""
    log_policy, value = _each_state(q, log_beta, alpha, kappa)
    assert log_policy.dtype == jnp.float64
    return np.exp(np.asarray(log_policy)), np.asarray(value)


# --- the closed form


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kappa", KAPPAS)
def test_closed_form_is_what_a_solver_finds(kappa):
    for seed in range(6):
        q, log_beta, alpha = _case(seed)
        policy, value = _optimal(q, log_beta, alpha, kappa)
        found, objective = tabular.constrained_optimum(q, log_beta, alpha, kappa)
        np.testing.assert_allclose(policy, found, atol=1e-6)
        np.testing.assert_allclose(value.mean(), objective, rtol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kappa", KAPPAS)
def test_value_is_the_same_at_every_action(kappa):
    """`Q - alpha log pi* + alpha kappa log beta = V = alpha log Z`."""
    for seed in range(6):
        q, log_beta, alpha = _case(seed)
        policy, value = _optimal(q, log_beta, alpha, kappa)
        each = q - alpha * np.log(policy) + alpha * kappa * log_beta
        np.testing.assert_allclose(each, np.broadcast_to(value[:, None], q.shape))
        z = (np.exp(log_beta) ** kappa * np.exp(q / alpha)).sum(-1)
        np.testing.assert_allclose(value, alpha * np.log(z), rtol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kappa", KAPPAS)
def test_three_readings_of_the_objective(kappa):
    """For any policy, and the third says by how much it misses the optimum."""
    for seed in range(6):
        q, log_beta, alpha = _case(seed)
        beta = np.exp(log_beta)
        rng = np.random.default_rng(100 + seed)
        policy = rng.dirichlet(np.ones(q.shape[1]), len(q))
        mean_q, density = (policy * q).sum(-1), (policy * log_beta).sum(-1)
        entropy = tabular.entropy(policy)
        bonus = mean_q + alpha * entropy + alpha * kappa * density
        to_beta = alpha * kappa * tabular.kl(policy, beta)
        np.testing.assert_allclose(
            mean_q + alpha * (1 - kappa) * entropy - to_beta, bonus
        )
        tempered = beta**kappa
        scale = tempered.sum(-1)
        to_tempered = alpha * tabular.kl(policy, tempered / scale[:, None])
        np.testing.assert_allclose(mean_q - to_tempered + alpha * np.log(scale), bonus)
        best, value = _optimal(q, log_beta, alpha, kappa)
        np.testing.assert_allclose(value - alpha * tabular.kl(policy, best), bonus)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kappa", KAPPAS)
def test_derivative_of_the_value_is_the_policy(kappa):
    """The envelope theorem; and that `closed_form`, unlike weights, has gradients."""
    q, log_beta, alpha = (x[0] if np.ndim(x) else x for x in _case(0))
    swap = jax.jit(lambda *args: constraint.closed_form(*args)[::-1])
    slope, log_policy = jax.grad(swap, has_aux=True)(q, log_beta, alpha, kappa)
    np.testing.assert_allclose(slope, np.exp(log_policy), rtol=1e-12)


@pytest.mark.parametrize("kappa", [0.0, 1e-8, 0.5, 1.0, 7.0, 1e6])
@pytest.mark.parametrize("outside", [0.0, 1e30, -1e30, np.inf, np.nan])
def test_actions_outside_the_support_stay_outside(kappa, outside):
    beta = np.array([0.5, 0.0, 0.5, 0.0], np.float32)
    q = jnp.array([1.0, outside, -1.0, outside], jnp.float32)
    with np.errstate(divide="ignore"):
        log_beta = jnp.asarray(np.log(beta))
    log_policy, value = jax.jit(constraint.closed_form)(q, log_beta, 0.5, kappa)
    policy = np.exp(np.asarray(log_policy))
    assert policy[1] == policy[3] == 0.0
    # The densities of the two others are equal: kappa cannot move them.
    np.testing.assert_allclose(policy[0], scipy.special.expit(2.0 / 0.5), rtol=1e-6)
    assert policy.sum() == pytest.approx(1.0, abs=1e-6)
    log_z = kappa * np.log(0.5) + np.log(np.exp(2.0) + np.exp(-2.0))
    np.testing.assert_allclose(value, 0.5 * log_z, rtol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kappa", KAPPAS)
def test_derivatives_of_the_value_by_the_density(kappa):
    """`dV/dkappa = alpha E log beta`, `dV/dlog beta = alpha kappa pi*`; no NaN."""
    q, log_beta, alpha = (x[0] if np.ndim(x) else x for x in _case(1))
    log_beta[2] = -np.inf
    slope = jax.jit(jax.grad(lambda *args: constraint.closed_form(*args)[1], (1, 3)))
    by_density, by_kappa = slope(q, log_beta, alpha, kappa)
    inside = np.delete(np.arange(len(q)), 2)
    policy = np.zeros(len(q))
    policy[inside] = scipy.special.softmax(kappa * log_beta[inside] + q[inside] / alpha)
    np.testing.assert_allclose(by_density, alpha * kappa * policy, atol=1e-12)
    want = alpha * policy[inside] @ log_beta[inside]
    np.testing.assert_allclose(by_kappa, want, rtol=1e-10)


def test_a_large_common_value_costs_no_digits():
    """float32, and all numbers are exact in it: only differences of Q count."""
    q = 8192.0 + jnp.array([0.0, 1.0, 3.0]) / 64.0
    log_policy, value = constraint.closed_form(q, jnp.zeros(3), 1 / 64, 1.0)
    want = scipy.special.log_softmax([0.0, 1.0, 3.0])
    np.testing.assert_allclose(log_policy, want, rtol=1e-6)
    np.testing.assert_allclose(value, 8192.0 + (3.0 - want[2]) / 64.0, rtol=1e-6)


def test_a_broken_density_is_not_taken_for_an_empty_one():
    log_policy, value = constraint.closed_form(
        jnp.zeros(3), jnp.array([-1.0, jnp.nan, -1.0]), 1.0, 0.5
    )
    assert np.isnan(log_policy).all() and np.isnan(value)


@pytest.mark.usefixtures("float64")
def test_large_kappa_is_the_mode_of_the_behaviour():
    for seed in range(6):
        q, log_beta, alpha = _case(seed)
        kappas = [0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 1e5]
        policies = [_optimal(q, log_beta, alpha, kappa)[0] for kappa in kappas]
        density = [(policy * log_beta).sum(-1) for policy in policies]
        assert (np.diff(density, axis=0) > -1e-12).all()
        np.testing.assert_array_equal(policies[-1].argmax(-1), log_beta.argmax(-1))
        np.testing.assert_allclose(policies[-1].max(-1), 1.0, atol=1e-6)


# --- the dual


def _dual(q, log_beta, alpha, threshold, lam):
    """`g(lambda) = E V - lambda eps`, in NumPy."""
    exponent = (lam * log_beta + q) / alpha
    return (alpha * scipy.special.logsumexp(exponent, axis=-1)).mean() - lam * threshold


def _slack(q, log_beta, alpha, threshold, kappa):
    """`E log beta - eps` at the optimum for kappa, in NumPy."""
    policy = scipy.special.softmax(kappa * log_beta + q / alpha, axis=-1)
    return (policy * log_beta).sum(-1).mean() - threshold


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kappa", [0.05, 0.3, 1.0, 2.5])
def test_dual_gradient_is_the_slope_of_the_dual(kappa):
    """eps is a lower bound of E log beta: a slack constraint has a positive slope."""
    for seed in range(6):
        q, log_beta, alpha = _case(seed)
        threshold, lam, h = -1.3, alpha * kappa, 1e-5
        policy, value = _optimal(q, log_beta, alpha, kappa)
        dual = [
            _dual(q, log_beta, alpha, threshold, x) for x in (lam - h, lam, lam + h)
        ]
        np.testing.assert_allclose(value.mean() - lam * threshold, dual[1], rtol=1e-12)
        density = jnp.asarray((policy * log_beta).sum(-1))
        got = constraint.dual_gradient(density, threshold)
        np.testing.assert_allclose(got, (dual[2] - dual[0]) / (2 * h), atol=1e-8)
        assert (got > 0) == (np.mean(density) > threshold)


@pytest.mark.usefixtures("float64")
def test_dual_is_convex():
    for seed in range(6):
        q, log_beta, alpha = _case(seed)
        lams = np.linspace(0.0, 5.0, 101)
        solve = jax.vmap(_each_state, (None, None, None, 0))
        dual = np.mean(solve(q, log_beta, alpha, lams / alpha)[1], axis=-1) + 1.3 * lams
        assert (np.diff(dual, 2) > 0).all()


def test_dual_gradient_by_hand():
    got = constraint.dual_gradient(jnp.array([-1.0, -2.0, -6.0]), -2.5)
    np.testing.assert_allclose(got, -0.5)


@jax.jit
def _descend(q, log_beta, alpha, threshold, kappa=1.0, largest=10.0):
    """kappa after projected descent with the exact policy of every kappa."""

    def step(_, kappa):
        policy = jnp.exp(_each_state(q, log_beta, alpha, kappa)[0])
        density = jnp.sum(policy * log_beta, axis=-1)
        gradient = constraint.dual_gradient(density, threshold)
        # The dual's curvature is Var log beta: steps above 2 / Var would never settle.
        return constraint.dual_step(kappa, gradient, 0.1, largest)

    return jax.lax.fori_loop(0, 5000, step, jnp.float64(kappa))


@pytest.mark.usefixtures("float64")
def test_dual_descent_finds_the_multiplier_and_the_constrained_optimum():
    for seed in range(4):
        q, log_beta, alpha = _case(seed)
        wanted = 0.4 + 0.5 * seed
        threshold = _slack(q, log_beta, alpha, 0.0, wanted)
        root = scipy.optimize.brentq(
            lambda k, q=q, b=log_beta, a=alpha, e=threshold: _slack(q, b, a, e, k),
            0.0,
            10.0,
            xtol=1e-13,
        )
        for start in (0.0, 1.0, 10.0):
            got = _descend(q, log_beta, alpha, threshold, start)
            np.testing.assert_allclose(got, root, rtol=1e-6)
        # The same policy as a solver's that was given the constraint itself.
        found, objective = tabular.constrained_optimum(
            q, log_beta, alpha, least=threshold
        )
        policy = _optimal(q, log_beta, alpha, root)[0]
        np.testing.assert_allclose(policy, found, atol=1e-5)
        dual = _dual(q, log_beta, alpha, threshold, alpha * root)
        np.testing.assert_allclose(dual, objective, rtol=1e-8)


@pytest.mark.usefixtures("float64")
def test_kappa_answers_the_threshold():
    """Zero while slack, then rising with eps, and the guard where nothing can do."""
    q, log_beta, alpha = _case(5)
    at_zero = _slack(q, log_beta, alpha, 0.0, 0.0)
    attainable = log_beta.max(-1).mean()
    shares = (-0.5, -0.01, 0.2, 0.4, 0.6, 0.8)
    thresholds = [at_zero + share * (attainable - at_zero) for share in shares]
    kappas = [float(_descend(q, log_beta, alpha, eps)) for eps in thresholds]
    assert kappas[:2] == [0.0, 0.0]
    assert (np.diff(kappas[1:]) > 0.05).all() and kappas[-1] < 10.0
    assert _descend(q, log_beta, alpha, attainable + 0.1, 1.0, 4.0) == 4.0


@pytest.mark.parametrize(
    "kappa, gradient, want",
    [(1.0, 0.4, 0.8), (1.0, -0.4, 1.2), (0.1, 1.0, 0.0), (4.9, -1.0, 5.0)],
)
def test_dual_step_by_hand(kappa, gradient, want):
    got = constraint.dual_step(kappa, gradient, 0.5, 5.0)
    np.testing.assert_allclose(got, want, rtol=1e-6)


# --- weights


def test_log_weight_is_awr_at_one_and_inac_at_zero():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        q, v, log_beta = rng.normal(size=(3, 64)).astype(np.float32)
        log_beta = 3.0 * log_beta
        alpha = np.float32(rng.uniform(0.3, 2.0))

        def weight(kappa, q=q, v=v, log_beta=log_beta, alpha=alpha):
            return np.exp(_each_weight(q - v, log_beta, alpha, kappa))

        awr = jax.vmap(losses.awr_weight, (0, None, None))(
            jnp.asarray(q - v), 1.0 / alpha, jnp.inf
        )
        np.testing.assert_allclose(weight(1.0), awr, rtol=1e-5)
        wide = [x.astype(np.float64) for x in (q, v, log_beta)]
        support = np.exp((wide[0] - wide[1]) / alpha) / np.exp(wide[2])
        np.testing.assert_allclose(weight(0.0), support, rtol=1e-5)
        # Two nats of density are worth exp(2 * (2.5 - 1)) of weight at kappa = 2.5.
        ratio = weight(2.5, log_beta=log_beta + np.float32(2.0)) / weight(2.5)
        np.testing.assert_allclose(ratio, np.exp(3.0), rtol=1e-4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kappa", KAPPAS)
def test_weights_turn_the_behaviour_into_the_optimum(kappa):
    """`beta * w = pi*`, hence `E_beta w = 1`."""
    q, log_beta, alpha = _case(3)
    policy, value = _optimal(q, log_beta, alpha, kappa)
    advantage = (q - value[:, None]).ravel()
    log_w = _each_weight(advantage, log_beta.ravel(), alpha, kappa)
    moved = np.exp(log_beta + np.asarray(log_w).reshape(q.shape))
    np.testing.assert_allclose(moved, policy, rtol=1e-12)


def test_self_normalised_equals_numpy():
    for seed in range(6):
        logs = 2.0 * np.random.default_rng(seed).normal(size=200)
        weights, cut = jax.jit(constraint.self_normalised)(
            jnp.asarray(logs, jnp.float32), 3.0
        )
        whole = np.exp(logs) / np.mean(np.exp(logs))
        np.testing.assert_allclose(weights, np.minimum(whole, 3.0), rtol=1e-4)
        assert 0.02 < cut < 0.3
        np.testing.assert_allclose(cut, np.mean(whole > 3.0), rtol=1e-6)
        assert np.mean(weights) < 1.0


def test_the_unit_of_actions_does_not_matter():
    """Actions in other units add a constant to log beta, times (kappa - 1)."""
    rng = np.random.default_rng(0)
    advantage, log_beta = rng.normal(size=(2, 50)).astype(np.float32)
    per_unit = np.float32(6 * np.log(25.4))

    def weights(log_beta):
        logs = _each_weight(advantage, log_beta, 0.5, 0.25)
        return constraint.self_normalised(logs, 4.0)

    (one, cut), (other, other_cut) = weights(log_beta), weights(log_beta - per_unit)
    np.testing.assert_allclose(one, other, rtol=1e-4)
    assert cut == other_cut > 0.0


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_self_normalised_extremes(offset):
    equal, cut = constraint.self_normalised(jnp.full(8, offset), 2.0)
    np.testing.assert_allclose(equal, 1.0, rtol=1e-6)
    assert cut == 0.0
    one_hot = jnp.where(jnp.arange(8) == 3, offset + 500.0, offset)
    weights, cut = constraint.self_normalised(one_hot, 100.0)
    np.testing.assert_array_equal(weights, 8.0 * np.eye(8)[3])
    assert cut == 0.0
    weights, cut = constraint.self_normalised(one_hot, 2.0)
    np.testing.assert_array_equal(weights, 2.0 * np.eye(8)[3])
    assert cut == 0.125
    spread = jnp.array([-1e4, 0.0, 1e4, 1e4, -jnp.inf]) + offset
    weights, _ = constraint.self_normalised(spread, 100.0)
    np.testing.assert_allclose(weights, [0.0, 0.0, 2.5, 2.5, 0.0], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_effective_sample_size_closed_cases(scale):
    ess = constraint.effective_sample_size
    np.testing.assert_allclose(ess(jnp.full(16, scale)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(ess(scale * jnp.eye(16)[5]), 1 / 16, rtol=1e-6)
    half = scale * (jnp.arange(16) < 8).astype(jnp.float32)
    np.testing.assert_allclose(ess(half), 0.5, rtol=1e-6)
    # (1 + 3)^2 / (2 * (1 + 9)) by hand.
    np.testing.assert_allclose(ess(scale * jnp.array([1.0, 3.0])), 0.8, rtol=1e-6)


def test_effective_sample_size_of_lognormal_weights():
    """`exp(-sigma^2)` for `log w ~ N(0, sigma^2)`, on quantiles instead of draws."""
    sigma, size = 0.7, 200_000
    quantiles = scipy.stats.norm.ppf((np.arange(size) + 0.5) / size)
    weights, _ = constraint.self_normalised(jnp.asarray(sigma * quantiles), jnp.inf)
    got = constraint.effective_sample_size(weights)
    np.testing.assert_allclose(got, np.exp(-(sigma**2)), rtol=1e-3)


def test_bounded_log_density():
    log_density = jnp.array([-jnp.inf, -61.0, -60.0, -3.0, 15.0, 16.0, jnp.inf])
    got = constraint.bounded_log_density(log_density, 3)
    lowest = -60.0 - np.log1p(1e30)
    want = [lowest, -60.0 - np.log(2.0), -60.0, -3.0, 15.0, 15.0, 15.0]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.isnan(constraint.bounded_log_density(jnp.array(jnp.nan), 3))
    # It rises wherever the density does, and nowhere is the slope NaN or steeper.
    slope = jax.vmap(jax.grad(lambda x: constraint.bounded_log_density(x, 3)))
    np.testing.assert_allclose(
        slope(jnp.array([-jnp.inf, -1060.0, -61.0, -3.0, 16.0])),
        [0.0, 1.0 / 1001.0, 0.5, 1.0, 0.0],
        rtol=1e-5,
    )


@pytest.mark.parametrize("kappa", [0.0, 1.0, 5.0])
def test_a_density_of_zero_gives_finite_weights(kappa):
    bounded = constraint.bounded_log_density(jnp.array([-jnp.inf, 0.0, jnp.inf]), 2)
    logs = _each_weight(jnp.zeros(3), bounded, 1.0, kappa)
    tamed = np.array([-40.0 - np.log1p(1e30), 0.0, 10.0])
    np.testing.assert_allclose(logs, (kappa - 1.0) * tamed, rtol=1e-6)
    assert np.isfinite(constraint.self_normalised(logs, 100.0)[0]).all()


def test_no_gradient_flows():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=16), jnp.float32)
    scalars = tuple(jnp.float32(x) for x in (0.4, -1.2, 0.7, 0.3))
    logs = (batch, jnp.float32(1.5))
    cases = [
        (constraint.log_weight, scalars),
        (lambda x, y: jnp.sum(constraint.self_normalised(x, y)[0] ** 2), logs),
        (lambda x, y: constraint.self_normalised(x, y)[1], logs),
        (constraint.dual_gradient, (batch, jnp.float32(-1.0))),
    ]
    for function, args in cases:
        assert function(*args) != 0.0
        gradients = jax.grad(function, argnums=tuple(range(len(args))))(*args)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


# --- the Gaussian oracle


def _gaussian_optimum(kappa, alpha, mean_b, std_b, curvature, peak):
    """Mean, variance and `V` of `N(mean_b, std_b^2)^kappa exp(Q / alpha)` on paper."""
    variance = 1.0 / (kappa / std_b**2 + curvature / alpha)
    mean = variance * (kappa * mean_b / std_b**2 + curvature * peak / alpha)
    square = kappa * mean_b**2 / std_b**2 + curvature * peak**2 / alpha
    log_z = 0.5 * (
        np.log(2 * np.pi * variance)
        - kappa * np.log(2 * np.pi * std_b**2)
        + mean**2 / variance
        - square
    )
    return mean, variance, alpha * log_z


GAUSSIAN = {"mean_b": 0.3, "std_b": 0.5, "curvature": 2.0, "peak": 1.0}


def test_gaussian_oracle_of_the_notes():
    mean, variance, _ = _gaussian_optimum(0.6, 0.4, **GAUSSIAN)
    np.testing.assert_allclose([mean, variance], [0.772973, 0.135135], atol=5e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kappa", [0.0, 0.3, 0.6, 1.0, 2.5])
def test_gaussian_optimum_by_quadrature(kappa):
    alpha = 0.4
    mean, variance, value = _gaussian_optimum(kappa, alpha, **GAUSSIAN)

    def unnormalised(a, power):
        beta = scipy.stats.norm.pdf(a, GAUSSIAN["mean_b"], GAUSSIAN["std_b"])
        return a**power * beta**kappa * np.exp(-((a - 1.0) ** 2) / alpha)

    moments = [
        scipy.integrate.quad(unnormalised, -8, 8, args=(power,), epsabs=1e-12)[0]
        for power in range(3)
    ]
    np.testing.assert_allclose(moments[1] / moments[0], mean, rtol=1e-8)
    second = moments[2] / moments[0]
    np.testing.assert_allclose(second - mean**2, variance, rtol=1e-7)
    np.testing.assert_allclose(alpha * np.log(moments[0]), value, rtol=1e-8)

    # The library: the same integrals as sums over a fine grid of actions.
    grid, width = np.linspace(-8.0, 8.0, 4001, retstep=True)
    log_beta = scipy.stats.norm.logpdf(grid, GAUSSIAN["mean_b"], GAUSSIAN["std_b"])
    q = -((grid - 1.0) ** 2)
    log_policy, total = constraint.closed_form(
        jnp.asarray(q), jnp.asarray(log_beta), alpha, kappa
    )
    np.testing.assert_allclose(total + alpha * np.log(width), value, rtol=1e-10)
    density = np.exp(log_policy) / width
    want = scipy.stats.norm.pdf(grid, mean, np.sqrt(variance))
    np.testing.assert_allclose(density, want, atol=1e-10)

    # And what a forward projection sees: behaviour actions and their weights.
    log_w = _each_weight(q - value, log_beta, alpha, kappa)
    share = np.exp(log_beta) * np.exp(log_w) * width
    np.testing.assert_allclose(share.sum(), 1.0, rtol=1e-10)
    np.testing.assert_allclose((share * grid).sum(), mean, rtol=1e-10)
    centred = (share * (grid - mean) ** 2).sum()
    np.testing.assert_allclose(centred, variance, rtol=1e-10)
