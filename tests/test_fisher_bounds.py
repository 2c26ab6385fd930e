"""The Cramér-Rao bound against simulated maximum-likelihood estimates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offrl_jax import fisher

RUNS = 4000


def covariance_error(samples: np.ndarray) -> np.ndarray:
    """Standard error of every entry of the covariance of `[RUNS, m]`."""
    centred = samples - samples.mean(0)
    products = centred[:, :, None] * centred[:, None, :]
    return products.std(0) / np.sqrt(len(samples))


def test_gaussian_mean_attains_the_bound():
    """The mean of n samples, and a linear function of it."""
    rng, n, std = np.random.default_rng(0), 25, np.array([0.5, 2.0])
    exact = fisher.gaussian_fisher(
        lambda p, x: (p, jnp.float32(np.log(std))), jnp.zeros(2), jnp.zeros((1, 1))
    )
    # Equality of the second kind: F / n inverted is the variance of the mean.
    bound = fisher.crlb(exact, np.eye(2), n)
    np.testing.assert_allclose(bound, np.diag(std**2) / n, rtol=1e-5)
    estimates = rng.normal(size=(RUNS, n, 2)).mean(1) * std
    error = covariance_error(estimates)
    assert (np.abs(np.cov(estimates.T) - bound) < 4 * error).all()
    jacobian = np.array([[1.0, -1.0]])
    np.testing.assert_allclose(
        fisher.crlb(exact, jacobian, n), [[(std**2).sum() / n]], rtol=1e-5
    )


def test_bernoulli():
    """p (1 - p) / n for the probability, through the logit; attained."""
    rng, n, p = np.random.default_rng(1), 30, 0.3
    logit = jnp.float32(np.log(p / (1 - p)))
    exact = fisher.categorical_fisher(
        lambda t, x: jnp.stack([t, jnp.zeros(())]), logit, jnp.zeros((1, 1))
    )
    np.testing.assert_allclose(exact, [[p * (1 - p)]], rtol=1e-5)
    slope = [[p * (1 - p)]]
    bound = fisher.crlb(exact, slope, n)[0, 0]
    assert bound == pytest.approx(p * (1 - p) / n, rel=1e-5)
    frequency = rng.binomial(n, p, size=(RUNS, 1)) / n
    error = covariance_error(frequency)[0, 0]
    assert abs(frequency.var() - bound) < 4 * error


def test_gaussian_log_std():
    """F = 2 whatever the deviation; the estimate reaches 1 / (2 n) as n grows."""
    for std in (0.1, 3.0):
        exact = fisher.gaussian_fisher(
            lambda p, x: (jnp.zeros(1), p),
            jnp.float32([np.log(std)]),
            jnp.zeros((1, 1)),
        )
        np.testing.assert_allclose(exact, [[2.0]], rtol=1e-5)
    rng, n = np.random.default_rng(2), 200
    square = np.square(rng.normal(size=(RUNS, n))).mean(1)
    estimate = 0.5 * np.log(square)[:, None]
    bound = fisher.crlb([[2.0]], [[1.0]], n)[0, 0]
    assert bound == pytest.approx(1 / (2 * n))
    error = covariance_error(estimate)[0, 0]
    assert estimate.var() > bound - 4 * error
    assert estimate.var() < bound * 1.02 + 4 * error


def test_logistic_regression():
    """4,000 fits of two weights: their covariance is no smaller than the bound, and
    nears it; read backwards it estimates the Fisher matrix."""
    rng, n = np.random.default_rng(3), 400
    theta = np.array([0.8, -0.5])
    x = rng.normal(size=(n, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    exact = np.asarray(
        fisher.categorical_fisher(
            lambda t, row: jnp.stack([jnp.dot(row, t), jnp.zeros(())]),
            jnp.float32(theta),
            jnp.float32(x),
        )
    )
    labels = (rng.random((RUNS, n)) < 1 / (1 + np.exp(-x @ theta))).astype(float)
    found = np.zeros((RUNS, 2))
    for _ in range(7):
        p = 1 / (1 + np.exp(-found @ x.T))
        slope = (labels - p) @ x
        w = p * (1 - p)
        a, b, d = ((w @ (x[:, i] * x[:, j])) for i, j in ((0, 0), (0, 1), (1, 1)))
        step = np.stack(
            [d * slope[:, 0] - b * slope[:, 1], a * slope[:, 1] - b * slope[:, 0]], -1
        )
        found += step / (a * d - b * b)[:, None]
    assert np.abs(step / (a * d - b * b)[:, None]).max() < 1e-8
    covariance = np.cov(found.T)
    bound = fisher.crlb(exact, np.eye(2), n)
    error = np.linalg.norm(covariance_error(found))
    assert np.linalg.eigvalsh(covariance - bound)[0] > -4 * error
    # A bound twice as large would have been broken.
    assert np.linalg.eigvalsh(covariance - 2 * bound)[0] < -4 * error
    backwards = np.linalg.inv(n * covariance)
    np.testing.assert_allclose(backwards, exact, atol=0.08 * np.abs(exact).max())


def test_not_identifiable():
    """Of two logits only the difference can be estimated."""
    logits = jnp.float32([0.2, -0.1])
    exact = fisher.categorical_fisher(lambda p, x: p, logits, jnp.zeros((1, 1)))
    p = float(jax.nn.softmax(logits)[0])
    got = fisher.crlb(exact, [[1.0, -1.0]], 10)
    np.testing.assert_allclose(got, [[1 / (p * (1 - p) * 10)]], rtol=1e-4)
    with pytest.raises(ValueError, match=r"rows \[1\].*rank 1 of 2.*not identifiable"):
        fisher.crlb(exact, [[1.0, -1.0], [1.0, 0.0]], 10)
    with pytest.raises(ValueError, match="not identifiable"):
        fisher.crlb(np.zeros((2, 2)), np.eye(2), 10)


def test_nonsense_is_refused():
    for args in (
        (np.eye(2), np.eye(2), 0),
        (np.ones((2, 3)), np.eye(2), 1),
        (np.eye(2), np.ones(2), 1),
        (np.eye(2), np.eye(3), 1),
    ):
        with pytest.raises(ValueError):
            fisher.crlb(*args)
