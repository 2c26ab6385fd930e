"""Densities against scipy and quadrature, and their behaviour on the bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from offrl_jax import distributions

pytestmark = pytest.mark.little_optimised

MEAN = np.array([[0.2, -0.5], [1.5, 0.0]], np.float32)
LOG_STD = np.array([[-0.3, 0.4], [-1.0, 0.1]], np.float32)
ACTION = np.array([[0.3, -0.9], [0.95, 0.0]], np.float32)


def scipy_tanh_log_prob(action, mean, log_std):
    """Change of variables by hand: N(atanh a) / (1 - a^2), in float64."""
    a = np.asarray(action, np.float64)
    log_prob = scipy.stats.norm.logpdf(np.arctanh(a), mean, np.exp(log_std))
    return (log_prob - np.log1p(-(a**2))).sum(-1)


def test_normal_equals_scipy():
    got = distributions.normal(MEAN, LOG_STD).log_prob(ACTION)
    want = scipy.stats.norm.logpdf(ACTION, MEAN, np.exp(LOG_STD)).sum(-1)
    assert got.shape == (2,)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_tanh_normal_equals_scipy():
    policy = distributions.tanh_normal(jnp.asarray(MEAN), jnp.asarray(LOG_STD))
    got = distributions.log_prob_of_data(policy, jnp.asarray(ACTION))
    assert got.shape == (2,)
    want = scipy_tanh_log_prob(ACTION, MEAN, LOG_STD)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("mean, log_std", [(0.0, -1.0), (0.8, -0.5), (-2.0, 0.0)])
def test_tanh_normal_integrates_to_one(mean, log_std):
    grid = np.linspace(-1.0, 1.0, 20_001)[1:-1, None].astype(np.float32)
    policy = distributions.tanh_normal(
        jnp.full((1, 1), mean), jnp.full((1, 1), log_std)
    )
    density = np.exp(np.asarray(policy.log_prob(grid), np.float64))
    total = scipy.integrate.trapezoid(density, grid[:, 0].astype(np.float64))
    np.testing.assert_allclose(total, 1.0, atol=2e-3)


@pytest.mark.parametrize("bound", [-1.0, 1.0])
def test_density_and_gradient_are_finite_on_the_bounds(bound):
    action = jnp.full((1, 2), bound)

    def log_prob(mean, log_std):
        policy = distributions.tanh_normal(mean, log_std)
        return jnp.sum(distributions.log_prob_of_data(policy, action))

    args = (jnp.asarray(MEAN[:1]), jnp.asarray(LOG_STD[:1]))
    value, grads = jax.value_and_grad(log_prob, (0, 1))(*args)
    want = scipy_tanh_log_prob(
        np.float32(bound * distributions.LARGEST_ACTION) * np.ones((1, 2)), *args
    )
    np.testing.assert_allclose(value, want.sum(), rtol=2e-2)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)
    # The mean is pulled towards the bound.
    assert bool(jnp.all(grads[0] * bound > 0.0))


def test_data_inside_the_box_is_left_alone():
    inside = jnp.array([[0.999, -0.999]])
    policy = distributions.tanh_normal(jnp.asarray(MEAN[:1]), jnp.asarray(LOG_STD[:1]))
    np.testing.assert_array_equal(
        distributions.log_prob_of_data(policy, inside), policy.log_prob(inside)
    )


def test_samples_follow_the_density():
    """Tanh is monotone: P(a < x) = Phi((atanh x - mean) / std)."""
    policy = distributions.tanh_normal(jnp.full((1,), 0.4), jnp.full((1,), -0.7))
    with jax.numpy_rank_promotion("allow"):  # distrax broadcasts its own parameters
        sample = policy.sample(seed=jax.random.key(0), sample_shape=(4_000,))
    base = scipy.stats.norm(0.4, np.exp(-0.7))
    result = scipy.stats.kstest(
        np.asarray(sample)[:, 0], lambda x: base.cdf(np.arctanh(x))
    )
    assert result.pvalue > 1e-3


def test_soft_bound_stays_inside_and_keeps_a_gradient():
    x = jnp.linspace(-6.0, 6.0, 41)
    y = distributions.soft_bound(x, -5.0, 2.0)
    assert bool(jnp.all((y > -5.0) & (y < 2.0))) and bool(jnp.all(jnp.diff(y) > 0.0))
    np.testing.assert_allclose(distributions.soft_bound(jnp.zeros(()), -5.0, 2.0), -1.5)
    slope = jax.vmap(jax.grad(distributions.soft_bound), (0, None, None))(x, -5.0, 2.0)
    assert bool(jnp.all(slope > 0.0))


def test_normal_log_cdf_and_its_slope_are_exact_to_the_far_tail():
    """Slopes against the Mills ratio by scipy's scaled erfc, where exp underflows."""
    z = np.array(
        [-1e5, -1e3, -40.0, -10.5, -10.0, -9.5, -3.0, 0.0, 2.0, 9.0], np.float32
    )
    exact = z.astype(np.float64)
    value = distributions.normal_log_cdf(jnp.asarray(z))
    np.testing.assert_allclose(value, scipy.special.log_ndtr(exact), rtol=5e-6)
    slope = jax.vmap(jax.grad(distributions.normal_log_cdf))(jnp.asarray(z))
    mills = np.sqrt(2.0 / np.pi) / scipy.special.erfcx(-exact / np.sqrt(2.0))
    np.testing.assert_allclose(slope, mills, rtol=1e-4, atol=1e-12)


def test_censored_normal_equals_scipy():
    mean = np.array([-3.0, -0.9, 0.0, 0.4, 2.5], np.float32)[:, None, None]
    std = np.array([0.05, 0.5, 4.0], np.float32)[None, :, None]
    action = np.array([-1.0, -0.999, 0.2, 0.999, 1.0], np.float32)[None, None]
    mean, std, action = np.broadcast_arrays(mean, std, action)
    got = distributions.censored_normal_log_prob(
        jnp.asarray(mean), jnp.log(jnp.asarray(std)), jnp.asarray(action)
    )
    normal = scipy.stats.norm(mean.astype(np.float64), std.astype(np.float64))
    want = np.where(
        action == 1.0,
        normal.logsf(1.0),
        np.where(action == -1.0, normal.logcdf(-1.0), normal.logpdf(action)),
    )
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


def test_censored_normal_has_finite_gradients_everywhere():
    mean, log_std, action = jnp.meshgrid(
        jnp.array([-1e3, -4.0, -1.0, 0.0, 1.0, 4.0, 1e3]),
        jnp.array([-5.0, 0.0, 2.0]),
        jnp.array([-1.0, -1.0 + 1e-5, 0.0, 1.0 - 1e-5, 1.0]),
    )

    def total(mean, log_std, action):
        return jnp.sum(distributions.censored_normal_log_prob(mean, log_std, action))

    grads = jax.grad(total, (0, 1, 2))(mean, log_std, action)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)
    # An action on a bound pulls the mean outwards, and does not depend on the action.
    at_bound = jnp.abs(action) == 1.0
    assert bool(jnp.all(jnp.where(at_bound, grads[0] * action >= 0.0, True)))
    assert bool(jnp.all(jnp.where(at_bound, grads[2] == 0.0, True)))


def random_spline(
    seed: int, rows: int, bins: int, scale: float
) -> distributions.Spline:
    raw = scale * jax.random.normal(jax.random.key(seed), (rows, 3 * bins + 1))
    return distributions.spline(raw)


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_splines_are_increasing_bijections_of_the_box(scale):
    rows, bins = 16, 6
    spline = random_spline(0, rows, bins, scale)
    x = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, 401), (rows, 401))
    per_x = jax.tree.map(
        lambda k: jnp.broadcast_to(k[:, None], (rows, 401, bins + 1)), spline
    )
    y, log_slope = distributions.spline_forward(per_x, x)
    np.testing.assert_allclose(y[:, 0], -1.0, atol=1e-6)
    np.testing.assert_allclose(y[:, -1], 1.0, atol=1e-6)
    # At scale 10 slopes of 1e-6 are reached: an increment is then below float32's eps.
    assert bool(jnp.all(jnp.diff(y) > (0.0 if scale < 10.0 else -2e-7)))
    assert bool(jnp.all(jnp.isfinite(log_slope)))
    back = distributions.spline_inverse(per_x, y)
    # Slopes of up to 170 multiply the resolution of x.
    np.testing.assert_allclose(
        distributions.spline_forward(per_x, back)[0], y, atol=170.0 * 2.4e-7
    )
    if scale < 10.0:
        error = jnp.abs(back - x)
        assert bool(jnp.all(error < 2e-6 * (1.0 + jnp.exp(-log_slope))))
    if scale == 0.0:
        np.testing.assert_allclose(y, x, atol=1e-6)
        np.testing.assert_allclose(log_slope, 0.0, atol=1e-5)

    def image(x, knots):
        return distributions.spline_forward(knots, x)[0]

    slope = jax.vmap(jax.vmap(jax.grad(image)))(x, per_x)
    # Not of the logarithms: the quotient rule cancels where the slope is 1e-6.
    np.testing.assert_allclose(jnp.exp(log_slope), slope, rtol=1e-3, atol=1e-6)


def test_spline_takes_its_knots_values_and_slopes():
    """The interpolation conditions, and one interior value computed by hand.

    Between (-1, -1) with slope 1 and (0, 0.5) with slope 0.5, so mean slope s = 1.5,
    at the middle t = 1/2: y = -1 + 1.5 (s/4 + 1/4) / (s + (1.5 - 2 s)/4) = -0.1666...
    """
    one = distributions.Spline(
        x=jnp.array([-1.0, 0.0, 1.0]),
        y=jnp.array([-1.0, 0.5, 1.0]),
        slope=jnp.array([1.0, 0.5, 2.0]),
    )
    knots = jax.tree.map(lambda k: jnp.broadcast_to(k[None], (4, 3)), one)
    y, log_slope = distributions.spline_forward(
        knots, jnp.array([-1.0, 0.0, 1.0, -0.5])
    )
    np.testing.assert_allclose(y, [-1.0, 0.5, 1.0, -1.0 / 6.0], atol=1e-6)
    np.testing.assert_allclose(log_slope[:3], np.log([1.0, 0.5, 2.0]), atol=1e-6)
