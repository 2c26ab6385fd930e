"""`E_p* grad log pi(a|s)` of every estimator against quadrature, in 1-D and 2-D."""

from __future__ import annotations

import csv
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import scripts

from offrl_jax import distributions, sampling
from offrl_jax.errors import UsageError

script = scripts.load("misa/gradient_error")

# The problems: policies whose mass reaches the bounds, and a Q with several bumps.
MEAN = np.array([0.4, -0.7])
LOG_STD = np.array([-0.2, -0.5])


def q_value(action, lib=np):
    """Q of actions `[..., A]`, for NumPy in float64 and for jax."""
    waves = lib.sin(3.0 * action + 0.5).sum(-1)
    return 1.5 * waves - 1.2 * lib.square(action.sum(-1) - 0.4)


@functools.cache
def truth(dimensions):
    """`[2 A]`, gradient in (mean, log std), by quadrature *over actions*."""
    mean, std = MEAN[:dimensions], np.exp(LOG_STD[:dimensions])

    nodes, weights = np.polynomial.legendre.leggauss(600)
    grid = np.stack(np.meshgrid(*[nodes] * dimensions, indexing="ij"), axis=-1)
    area = functools.reduce(np.multiply.outer, [weights] * dimensions)
    z = (np.arctanh(grid) - mean) / std
    policy = np.prod(scipy.stats.norm.pdf(z) / std / (1.0 - grid**2), axis=-1)
    np.testing.assert_allclose((policy * area).sum(), 1.0, rtol=2e-4)
    improved = policy * np.exp(q_value(grid)) * area
    score = np.concatenate([z / std, z**2 - 1.0], axis=-1)
    return (improved[..., None] * score).reshape(-1, 2 * dimensions).sum(
        0
    ) / improved.sum()


def rows_of(dimensions, rows):
    """Mean and log std of one state, repeated: `[rows, A]` each."""
    shape = (rows, dimensions)
    return (
        jnp.broadcast_to(jnp.asarray(MEAN[:dimensions], jnp.float32), shape),
        jnp.broadcast_to(jnp.asarray(LOG_STD[:dimensions], jnp.float32), shape),
    )


def gradient_at(pre_tanh, weights, mean, log_std):
    """Weighted sums over K of `grad log pi`: draws `[K, M, A]` -> `[M, 2 A]`.

    As an agent would: of the Gaussian's density, at fixed draws, by `jax.grad`.
    """

    def total(theta):
        shape = pre_tanh.shape
        at = jnp.broadcast_to(theta[0], shape), jnp.broadcast_to(theta[1], shape)
        log_prob = distributions.normal_log_prob(*at, pre_tanh)
        return jnp.sum(weights * jnp.sum(log_prob, axis=-1))

    return jnp.concatenate(jax.grad(total)((mean, log_std)), axis=-1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def by_importance(key, k, rows_and_dimensions):
    rows, dimensions = rows_and_dimensions
    mean, log_std = rows_of(dimensions, rows)
    target = sampling.whitened(lambda a: q_value(a, jnp), mean, log_std)
    zeta = jax.random.normal(key, (k, rows, dimensions))
    weights = sampling.self_normalised_weights(q_value(target.action(zeta), jnp))
    return gradient_at(target.pre_tanh(zeta), weights, mean, log_std)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def by_hmc(key, chains, draws, burn_in, rows_and_dimensions):
    rows, dimensions = rows_and_dimensions
    mean, log_std = rows_of(dimensions, chains * rows)
    target = sampling.whitened(lambda a: q_value(a, jnp), mean, log_std)
    start_key, key = jax.random.split(key)
    drawn = sampling.hmc(
        key,
        target.log_density,
        jax.random.normal(start_key, mean.shape),
        step_size=jnp.float32(0.55),
        draws=draws,
        burn_in=burn_in,
        leapfrogs=2,
    )
    weights = jnp.full((draws, chains * rows), 1.0 / (chains * draws))
    each = gradient_at(target.pre_tanh(drawn.positions), weights, mean, log_std)
    return jnp.sum(each.reshape(chains, rows, -1), axis=0), drawn.acceptance


def mean_and_error(rows):
    rows = np.asarray(rows, np.float64)
    return rows.mean(0), rows.std(0, ddof=1) / np.sqrt(len(rows))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_whitened_is_the_action_space_density(dimensions):
    """Moments of p*(a) through zeta equal those by quadrature over actions."""
    axis = np.linspace(-7.0, 7.0, 401)
    zeta = np.stack(np.meshgrid(*[axis] * dimensions, indexing="ij"), axis=-1)
    zeta = zeta.reshape(-1, dimensions)
    mean, log_std = rows_of(dimensions, len(zeta))
    target = sampling.whitened(lambda a: q_value(a, jnp), mean, log_std)
    density = np.exp(np.asarray(target.log_density(jnp.asarray(zeta, jnp.float32))))
    density = density.astype(np.float64) / density.sum(dtype=np.float64)
    score = np.concatenate([zeta / np.exp(LOG_STD[:dimensions]), zeta**2 - 1.0], axis=1)
    np.testing.assert_allclose(density @ score, truth(dimensions), atol=1e-3)


def test_raw_is_the_log_density_of_actions_and_nan_outside():
    action = np.array([[0.3, -0.99], [-0.9, 0.0], [0.2, 1.01], [-1.5, 0.0]])
    mean, log_std = rows_of(2, 4)
    density = sampling.raw(lambda a: q_value(a, jnp), mean, log_std)
    got = np.asarray(density(jnp.asarray(action, jnp.float32)))
    inside = action[:2]
    want = scipy.stats.norm.logpdf(np.arctanh(inside), MEAN, np.exp(LOG_STD))
    want = (want - np.log1p(-(inside**2))).sum(-1) + q_value(inside)
    np.testing.assert_allclose(got[:2], want, rtol=1e-4)
    assert np.isnan(got[2:]).all()


def test_ways_between_noise_and_actions():
    mean, log_std = rows_of(2, 3)
    target = sampling.whitened(lambda a: q_value(a, jnp), mean, log_std)
    zeta = jax.random.normal(jax.random.key(0), (5, 3, 2))
    want = np.tanh(MEAN + np.exp(LOG_STD) * np.asarray(zeta, np.float64))
    np.testing.assert_allclose(target.action(zeta), want, atol=1e-5)
    np.testing.assert_allclose(jnp.tanh(target.pre_tanh(zeta)), want, atol=1e-5)
    np.testing.assert_allclose(target.noise(target.action(zeta)), zeta, atol=1e-3)
    assert target.action(zeta[0]).shape == (3, 2)


def test_the_gaussians_gradient_is_the_squashed_policys():
    """Held at u, the Jacobian of tanh has no part in the gradient."""
    mean, log_std = rows_of(2, 6)
    target = sampling.whitened(lambda a: q_value(a, jnp), mean, log_std)
    pre_tanh = target.pre_tanh(jax.random.normal(jax.random.key(0), (4, 6, 2)))

    def squashed(theta):
        policy = distributions.tanh_normal(theta[0][None], theta[1][None])
        return jnp.sum(jnp.asarray(policy.log_prob(jnp.tanh(pre_tanh))))

    want = jnp.concatenate(jax.grad(squashed)((mean, log_std)), axis=-1)
    got = gradient_at(pre_tanh, jnp.ones((4, 6)), mean, log_std)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_hmc_is_unbiased_once_burnt_in(dimensions):
    estimate, acceptance = by_hmc(jax.random.key(1), 10, 5, 40, (2000, dimensions))
    mean, error = mean_and_error(estimate)
    assert np.all(np.abs(mean - truth(dimensions)) < 4.5 * error)
    # The test can tell: the error is a small part of what is estimated.
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(truth(dimensions))
    assert acceptance > 0.6


@pytest.mark.parametrize("chains, draws", [(1, 50), (10, 5)])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_hmc_with_a_short_burn_in_keeps_little_of_its_start(chains, draws, dimensions):
    estimate, _ = by_hmc(jax.random.key(2), chains, draws, 5, (2000, dimensions))
    mean, _ = mean_and_error(estimate)
    away = np.linalg.norm(mean - truth(dimensions))
    assert away < 0.25 * np.linalg.norm(truth(dimensions))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_importance_weights_are_biased_by_what_theory_says(dimensions):
    """The bias is `-Cov_p*(w, score) / K` to first order, w = dp*/dpi.

    It is the ratio estimator's; the expectations are sums over a grid of the noise.
    """
    axis = np.linspace(-7.0, 7.0, 301)
    zeta = np.stack(np.meshgrid(*[axis] * dimensions, indexing="ij"), axis=-1)
    std = np.exp(LOG_STD[:dimensions])
    policy = np.prod(scipy.stats.norm.pdf(zeta), axis=-1)
    policy /= policy.sum()
    ratio = np.exp(q_value(np.tanh(MEAN[:dimensions] + std * zeta)))
    ratio /= (policy * ratio).sum()
    score = np.concatenate([zeta / std, zeta**2 - 1.0], axis=-1)
    away = score - truth(dimensions)
    flat = (policy * ratio**2)[..., None] * away
    first_order = -flat.reshape(-1, 2 * dimensions).sum(0)
    size = np.linalg.norm(first_order)
    for k, rows, within in ((10, 40_000, 0.6), (50, 40_000, 0.2)):
        estimate = by_importance(jax.random.key(3), k, (rows, dimensions))
        mean, error = mean_and_error(estimate)
        bias = mean - truth(dimensions)
        noise = 4.5 * np.linalg.norm(error)
        assert np.linalg.norm(bias - first_order / k) < within * size / k + noise
        assert np.linalg.norm(bias) > 0.3 * size / k


@pytest.mark.parametrize("dimensions", [1, 2])
def test_released_returns_the_score_of_the_data(dimensions):
    """Its chains stay at the data's action, whatever Q says."""
    rows = 1000
    mean, _ = rows_of(dimensions, rows)
    log_std = jnp.full_like(mean, np.log(0.2))

    def q_of(action):
        return 3.0 * q_value(action, jnp)

    target = sampling.whitened(q_of, mean, log_std)
    keys = jax.random.split(jax.random.key(4), 4)

    @jax.jit
    def run():
        data = target.action(jax.random.normal(keys[0], mean.shape))
        drawn, _ = sampling.hmc_released(
            keys[1],
            sampling.raw(q_of, mean, log_std),
            data,
            draws=50,
            burn_in=5,
            leapfrogs=2,
        )
        share = jnp.full((50, rows), 1.0 / 50)
        got = gradient_at(jnp.arctanh(drawn.positions), share, mean, log_std)
        of_data = gradient_at(jnp.arctanh(data)[None], share[:1] * 50, mean, log_std)
        # What it should estimate, from a sampler that does move.
        right = sampling.hmc(
            keys[2],
            target.log_density,
            jax.random.normal(keys[3], mean.shape),
            step_size=jnp.float32(0.4),
            draws=50,
            burn_in=20,
            leapfrogs=2,
        )
        want = gradient_at(target.pre_tanh(right.positions), share, mean, log_std)
        return got, of_data, want, drawn.acceptance

    got, of_data, want, acceptance = run()
    same = np.all(np.isclose(got, of_data, rtol=1e-4, atol=1e-4), axis=1)
    assert same.mean() > 0.97 and acceptance < 0.002
    wanted = np.asarray(want).mean(0)
    missed = np.asarray(got).mean(0) - wanted
    assert np.linalg.norm(missed) > 0.8 * np.linalg.norm(wanted)


def test_the_scripts_truth_equals_adaptive_quadrature():
    problems = script.make_problems(jax.random.key(0), 3, 1)
    got = script.expected_scores(problems, (1.0, 16.0))
    mean, log_std, frequency, phase, weight = (
        np.asarray(leaf, np.float64) for leaf in problems
    )
    for s, sharpness in enumerate((1.0, 16.0)):
        for p in range(3):

            def density(z, p=p, sharpness=sharpness):
                action = np.tanh(mean[p, 0] + np.exp(log_std[p, 0]) * z)
                q = np.sum(weight[p] * np.cos(frequency[p, :, 0] * action + phase[p]))
                return np.exp(sharpness * q - 0.5 * z**2)

            def expected(f, density=density):
                whole = lambda z: f(z) * density(z)  # noqa: E731
                return scipy.integrate.quad(whole, -10, 10, limit=500)[0]

            total = expected(lambda z: 1.0)
            want = [expected(lambda z: z), expected(lambda z: z**2 - 1.0)]
            np.testing.assert_allclose(got[s, p], np.array(want) / total, atol=1e-6)


def test_relative_errors_by_hand():
    truth = np.array([[3.0, 4.0]])
    # Off by (1, 0) on average; (2, 0) and (0, 0) vary by 2 about it.
    estimate = truth[None] + np.array([[[2.0, 0.0]], [[0.0, 0.0]]])
    rmse, bias = script.relative_errors(estimate, truth)
    np.testing.assert_allclose(rmse, np.sqrt(2.0) / 5.0)
    assert bias == 0.0
    _, bias = script.relative_errors(np.repeat(estimate[:1], 4, axis=0), truth)
    np.testing.assert_allclose(bias, 2.0 / 5.0)


def test_prices_of_the_estimators():
    assert script.Estimator("hmc", 0, 10, 5, 5, 2).gradients == 10 * (1 + 2 * 10)
    assert script.Estimator("released", 0, 1, 50, 5, 2).gradients == 111
    assert script.Estimator("importance", 50).gradients == 0


def test_the_script_writes_its_table(tmp_path, monkeypatch):
    few = tuple(
        script.Estimator(*fields)
        for fields in (
            ("dropped",),
            ("importance", 50),
            ("centred", 50),
            ("resampled", 50, 4, 2, 0, 1),
            ("released", 0, 1, 5, 2, 2),
        )
    )
    monkeypatch.setattr(script, "ESTIMATORS", few)
    script.main(
        script.Settings(tmp_path, problems=8, rounds=16, adapting=8, sharpness=(1.0,))
    )
    with (tmp_path / "gradient_error.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * len(few)
    by_kind = {(row["kind"], row["dimensions"]): row for row in rows}
    for dimensions in ("1", "2"):
        dropped = by_kind["dropped", dimensions]
        assert float(dropped["rmse"]) == float(dropped["bias"]) == 1.0
        weights = float(by_kind["importance", dimensions]["rmse"])
        centred = float(by_kind["centred", dimensions]["rmse"])
        released = float(by_kind["released", dimensions]["rmse"])
        assert centred < weights < released
        assert by_kind["resampled", dimensions]["passes"] == str(50 + 2 * 4 * 3)
        assert 0.6 < float(by_kind["resampled", dimensions]["acceptance"]) < 1.0
        assert float(by_kind["released", dimensions]["acceptance"]) < 0.1
    table = (tmp_path / "gradient_error.md").read_text()
    assert table.count("\n| ") == len(few) + 1
    assert "| importance weights, K = 50 | 50 |" in table


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"problems": 0}, "--problems is 0"),
        ({"rounds": 1}, "--rounds is 1"),
        ({"sharpness": (1.0, -1.0)}, "--sharpness is"),
    ],
)
def test_the_scripts_settings_are_checked(tmp_path, wrong, says):
    with pytest.raises(UsageError, match=says):
        script.checked(script.Settings(tmp_path, **wrong))
