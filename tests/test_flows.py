"""Flow matching against Gaussians, for which everything is known in closed form.

For actions a ~ N(mu, S) and noise z ~ N(0, 1), the path x_t = (1 - t) z + t a is normal
with mean t mu and covariance C_t = (1 - t)^2 + t^2 S, and (a - z, x_t) jointly, so that

    v(t, x) = mu + (t S - (1 - t)) C_t^-1 (x - t mu),    score = -C_t^-1 (x - t mu).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from offrl_jax import flows, networks
from offrl_jax.errors import UsageError

pytestmark = pytest.mark.little_optimised

MEAN = np.array([0.3, -0.4])
COVARIANCE = np.array([[0.20, 0.09], [0.09, 0.08]])


def covariance_at(t: float) -> np.ndarray:
    return (1 - t) ** 2 * np.eye(2) + t**2 * COVARIANCE


def velocity_at(x: np.ndarray, t: float) -> np.ndarray:
    gain = (t * COVARIANCE - (1 - t) * np.eye(2)) @ np.linalg.inv(covariance_at(t))
    return MEAN + (x - t * MEAN) @ gain.T


def plane_field(x, t):
    """The closed form for `COVARIANCE`, in jnp: the 2x2 inverse by hand."""
    t = t[..., None]
    s = jnp.asarray(COVARIANCE, jnp.float32)
    one = np.eye(2).tolist()
    c = [[(1 - t) ** 2 * one[i][j] + t**2 * s[i, j] for j in (0, 1)] for i in (0, 1)]
    y = x - t * jnp.asarray(MEAN, jnp.float32).reshape((1,) * (x.ndim - 1) + (2,))
    y0, y1 = y[..., :1], y[..., 1:]
    det = c[0][0] * c[1][1] - c[0][1] * c[1][0]
    w0 = (c[1][1] * y0 - c[0][1] * y1) / det
    w1 = (c[0][0] * y1 - c[1][0] * y0) / det
    v0 = float(MEAN[0]) + t * (s[0, 0] * w0 + s[0, 1] * w1) - (1 - t) * w0
    v1 = float(MEAN[1]) + t * (s[1, 0] * w0 + s[1, 1] * w1) - (1 - t) * w1
    return jnp.concatenate([v0, v1], -1)


def points(seed: int = 0, rows: int = 7, width: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width))


def test_test_fields_agree_with_the_matrix_formula():
    for t in (0.0, 0.3, 0.9):
        got = plane_field(jnp.float32(points()), jnp.full(7, t))
        np.testing.assert_allclose(got, velocity_at(points(), t), rtol=2e-4, atol=1e-5)


def test_velocity_is_the_conditional_expectation_of_the_path():
    """`matching_loss` is least there: a least-squares fit over affine fields at one t
    finds the closed form, from samples."""
    rng, t, rows = np.random.default_rng(1), 0.7, 200_000
    noise = rng.normal(size=(rows, 2))
    action = rng.multivariate_normal(MEAN, COVARIANCE, size=rows)
    x = (1 - t) * noise + t * action
    inputs = np.concatenate([x, np.ones((rows, 1))], 1)
    fit = np.linalg.lstsq(inputs, action - noise, rcond=None)[0]
    np.testing.assert_allclose(
        inputs[:50] @ fit, velocity_at(x[:50], t), atol=0.03, rtol=0.02
    )


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_gradient_of_the_loss_vanishes_at_the_conditional_expectation(t):
    """Per direction of an affine perturbation, within six standard errors; a field that
    is 0.05 off is far outside of them."""
    rng, rows = np.random.default_rng(2), 40_000
    noise = rng.normal(size=(rows, 2))
    action = rng.multivariate_normal(MEAN, COVARIANCE, size=rows)
    times = jnp.full(rows, t)

    def loss(weights, offset):
        def field(x, t):
            inputs = jnp.concatenate([x, jnp.ones_like(x[:, :1])], -1)
            return plane_field(x, t) + offset + inputs @ weights

        return flows.matching_loss(
            field, jnp.float32(noise), jnp.float32(action), times
        )

    x = (1 - t) * noise + t * action
    inputs = np.concatenate([x, np.ones((rows, 1))], 1)
    rest = velocity_at(x, t) - (action - noise)
    # d loss / d weights[i, j] is the mean of rest_j input_i (2 / 2 dimensions).
    error = (inputs[:, :, None] * rest[:, None, :]).std(0) / np.sqrt(rows)
    gradient = np.asarray(jax.grad(loss)(jnp.zeros((3, 2)), 0.0))
    assert (np.abs(gradient) < 6 * error).all()
    off = np.asarray(jax.grad(loss)(jnp.zeros((3, 2)), 0.05))
    assert (np.abs(off[2]) > 6 * error[2]).all()


def test_loss_by_hand():
    def field(x, t):
        return x * t[:, None]

    noise, action = np.array([[0.5, -1.0]]), np.array([[0.1, 0.7]])
    x = 0.75 * noise + 0.25 * action
    want = ((0.25 * x - (action - noise)) ** 2).mean()
    got = flows.matching_loss(
        field, jnp.float32(noise), jnp.float32(action), jnp.full(1, 0.25)
    )
    assert float(got) == pytest.approx(want, rel=1e-6)


def test_keyed_loss_draws_normal_noise_and_uniform_times():
    """v = 0 gives E (a - z)^2 = a^2 + 1; v = t gives E (t - a + z)^2."""
    action = jnp.full((50_000, 1), 0.6)
    key = jax.random.key(0)
    still = flows.keyed_matching_loss(key, lambda x, t: jnp.zeros_like(x), action)
    assert float(still) == pytest.approx(1.36, abs=0.03)
    moving = flows.keyed_matching_loss(key, lambda x, t: t[:, None], action)
    assert float(moving) == pytest.approx(1 + 1 / 3 - 0.6 + 0.36, abs=0.03)
    # Noise and times come from keys of their own: z is not a function of t.
    mixed = flows.keyed_matching_loss(key, lambda x, t: x, 0.0 * action)
    # E ((1 - t) z + z)^2 = E (2 - t)^2 = 7 / 3
    assert float(mixed) == pytest.approx(7 / 3, abs=0.05)


def errors_of(method: str, steps: tuple[int, ...]) -> np.ndarray:
    """Of dx/dt = -(1 + t) x^2, x = 1 / (1 / x_0 + t + t^2 / 2), in float64.  (Gaussian
    fields are special: on them the midpoint's second-order errors cancel.)"""

    def field(x, t):
        return -(1 + t[..., None]) * x**2

    start = np.array([[1.0], [0.6]])
    with jax.enable_x64(True):
        got = [flows.integrate(field, jnp.asarray(start), n, method) for n in steps]
        assert got[0].dtype == jnp.float64
    return np.array([np.abs(np.asarray(y) - 1 / (1 / start + 1.5)).max() for y in got])


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_orders_of_convergence(method, order):
    steps = (32, 64, 128)
    found = errors_of(method, steps)
    slopes = -np.diff(np.log(found)) / np.log(2.0)
    np.testing.assert_allclose(slopes, order, atol=0.15)


def test_euler_by_hand_and_clipped_only_at_the_end():
    """Steps of 1/2 by hand; a clip in between would end elsewhere."""

    def field(x, t):
        return 2.0 * x - 16.0 * t[..., None]

    start = jnp.full((1, 1), 2.0)
    # 2 + (4 - 0) / 2 = 4; 4 + (8 - 8) / 2 = 4
    assert float(flows.integrate(field, start, 2)[0, 0]) == 4.0
    assert float(flows.sample(field, start, 2)[0, 0]) == 1.0
    # From 0.5: 0.5 + 0.5 = 1; 1 + (2 - 8) / 2 = -2.
    half = jnp.full((1, 1), 0.5)
    assert float(flows.integrate(field, half, 2)[0, 0]) == -2.0
    assert float(flows.sample(field, half, 2)[0, 0]) == -1.0


def test_integration_back_returns():
    x = jnp.float32(points(3))
    there = flows.integrate(plane_field, x, 40, "rk4")
    back = flows.integrate(plane_field, there, 40, "rk4", start=1.0, stop=0.0)
    np.testing.assert_allclose(back, x, atol=2e-4)
    assert float(jnp.abs(there - x).max()) > 0.3


def test_samples_have_the_mean_and_covariance():
    noise = jax.random.normal(jax.random.key(0), (40_000, 2))
    action = np.asarray(flows.integrate(plane_field, noise, 20, "rk4"))
    np.testing.assert_allclose(action.mean(0), MEAN, atol=0.01)
    np.testing.assert_allclose(np.cov(action.T), COVARIANCE, atol=0.005)


def test_divergence_of_a_polynomial_map():
    """(x^2 y, y^3 + x) has the divergence 2 x y + 3 y^2; also with two leading axes."""

    def function(p):
        x, y = p[..., :1], p[..., 1:]
        return jnp.concatenate([x**2 * y, y**3 + x], -1)

    p = points(4, 6)
    want = 2 * p[:, 0] * p[:, 1] + 3 * p[:, 1] ** 2
    got = flows.divergence(function, jnp.float32(p))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    got = flows.divergence(function, jnp.float32(p.reshape(2, 3, 2)))
    np.testing.assert_allclose(got, want.reshape(2, 3), rtol=1e-5, atol=1e-6)


def test_log_density_is_the_gaussian_s():
    rng = np.random.default_rng(5)
    action = rng.multivariate_normal(MEAN, COVARIANCE, size=9)
    got, noise = flows.log_density(plane_field, jnp.float32(action), 40)
    want = scipy.stats.multivariate_normal.logpdf(action, MEAN, COVARIANCE)
    np.testing.assert_allclose(got, want, atol=2e-3)
    forth = flows.integrate(plane_field, noise, 40, "rk4")
    np.testing.assert_allclose(forth, action, atol=1e-3)


def test_log_density_of_a_network_integrates_to_one():
    """No closed form here: quadrature over a grid, and the samples' histogram."""
    velocity = flows.Velocity((16, 16), 1)
    obs = jnp.ones((801, 2))
    params = velocity.init(jax.random.key(1), obs[:1], obs[:1, :1], obs[:1, 0])
    params = jax.tree.map(lambda x: 2.0 * x, params)
    grid = np.linspace(-12.0, 12.0, 801)
    field = flows.field_of(velocity, params, obs)
    log_p, _ = flows.log_density(field, jnp.float32(grid[:, None]), 40)
    density = np.exp(np.asarray(log_p, np.float64))
    step = grid[1] - grid[0]
    assert density.sum() * step == pytest.approx(1.0, abs=2e-3)
    noise = jax.random.normal(jax.random.key(2), (20_000, 1))
    everywhere = flows.field_of(velocity, params, jnp.ones((20_000, 2)))
    sample = np.asarray(flows.integrate(everywhere, noise, 40, "rk4"))[:, 0]
    mean = (density * grid).sum() * step
    std = np.sqrt((density * (grid - mean) ** 2).sum() * step)
    assert abs(mean) + abs(std - 1) > 0.2, "the map must not be the identity"
    assert sample.mean() == pytest.approx(mean, abs=4 * std / np.sqrt(20_000))
    cdf = np.cumsum(density) * step
    result = scipy.stats.kstest(sample, lambda x: np.interp(x, grid + step / 2, cdf))
    assert result.pvalue > 1e-3


@pytest.mark.parametrize("t", [0.0, 0.5, 0.95])
def test_score_is_exact_at_every_time(t):
    x = points(6)
    want = -(x - t * MEAN) @ np.linalg.inv(covariance_at(t)).T
    got = flows.score(
        jnp.float32(velocity_at(x, t)), jnp.float32(x), jnp.full(7, t, jnp.float32)
    )
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_score_is_the_gradient_of_the_flow_s_own_log_density():
    """At t = 0.6: the flow stopped there is a flow of its own, rescaled in time."""
    stop = 0.6

    def stopped(x, t):
        return stop * plane_field(x, stop * t)

    x = jnp.float32(points(7, 3))
    gradient = jax.grad(lambda y: flows.log_density(stopped, y, 30)[0].sum())(x)
    at = jnp.full(3, stop)
    got = flows.score(plane_field(x, at), x, at)
    np.testing.assert_allclose(got, gradient, rtol=2e-3, atol=2e-3)


def test_scaled_velocity_lacks_the_expected_action():
    """score = v / (1 - t) - E[a | x_t] / (1 - t), with E[a | x_t] from the Gaussian."""
    t, x = 0.8, points(8)
    gain = t * COVARIANCE @ np.linalg.inv(covariance_at(t))
    expected = MEAN + (x - t * MEAN) @ gain.T
    at = jnp.full(7, t)
    v = jnp.float32(velocity_at(x, t))
    got = flows.scaled_velocity(v, at) - flows.score(v, jnp.float32(x), at)
    np.testing.assert_allclose(got, expected / (1 - t), rtol=1e-3, atol=1e-3)
    # At the mode of the time-t density the score is 0 and the velocity is not.
    mode = jnp.float32(t * MEAN)[None]
    v = jnp.float32(velocity_at(t * MEAN, t))[None]
    np.testing.assert_allclose(flows.score(v, mode, at[:1]), 0.0, atol=1e-5)
    np.testing.assert_allclose(
        flows.scaled_velocity(v, at[:1])[0], MEAN / (1 - t), rtol=1e-4
    )


def by_hand(params, x, layer_norm=False):
    """`gelu_mlp` in float64 NumPy."""
    layers = params["params"]["MLP_0"]
    count = sum("Dense" in k for k in layers)
    for i in range(count):
        layer = layers[f"Dense_{i}"]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
        if i < count - 1:
            x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
            if layer_norm:
                x = x - x.mean(-1, keepdims=True)
                x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x


def test_networks_by_hand():
    rng = np.random.default_rng(9)
    obs, action, t = rng.normal(size=(5, 3)), points(9, 5), rng.uniform(size=5)
    both = np.concatenate([obs, action], -1)
    args = [jnp.float32(x) for x in (obs, action, t)]
    for module, inputs, x, norm in [
        (
            flows.Velocity((8, 6), 2),
            args,
            np.concatenate([both, t[:, None]], -1),
            False,
        ),
        (flows.ActionMap((8, 6), 2), args[:2], both, False),
        (flows.gelu_critic((8, 6), True), args[:2], both, True),
        (flows.gelu_value((8, 6), True), args[:1], obs, True),
    ]:
        params = module.init(jax.random.key(0), *inputs)
        got = networks.apply(module, params, *inputs)
        want = by_hand(params, x, norm).reshape(got.shape)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_kernels_are_xavier_uniform_and_biases_zero():
    params = flows.ActionMap((400,), 3).init(
        jax.random.key(3), jnp.zeros((1, 97)), jnp.zeros((1, 3))
    )
    layer = params["params"]["MLP_0"]["Dense_0"]
    bound = np.sqrt(6.0 / (100 + 400))
    kernel = np.asarray(layer["kernel"])
    assert np.abs(kernel).max() <= bound * (1 + 1e-6)
    assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    assert not np.asarray(layer["bias"]).any()


def test_best_of_and_repeated():
    values = jnp.float32([[0.1, 2.0, -1.0], [3.0, 2.0, 1.0]])
    candidates = jnp.float32(points(10, 6).reshape(2, 3, 2))
    got = flows.best_of(values, candidates)
    np.testing.assert_array_equal(got, [candidates[0, 1], candidates[1, 0]])
    obs = jnp.float32(points(11, 2, 4))
    np.testing.assert_array_equal(flows.repeated(obs, 3)[1, 2], obs[1])


def test_errors_for_people():
    x = jnp.zeros((1, 2))
    with pytest.raises(UsageError, match=r"unknown integrator 'midpiont'.*'midpoint'"):
        flows.integrate(plane_field, x, 3, "midpiont")
    with pytest.raises(UsageError, match="0 steps: take 1 or more"):
        flows.integrate(plane_field, x, 0)
