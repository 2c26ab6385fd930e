"""Densities against scipy and quadrature, and their behaviour on the bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from offrl_jax import distributions

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
