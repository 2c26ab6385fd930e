"""Behaviour densities against quadrature, scipy and closed forms."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from offrl_jax import densities, errors
from offrl_jax.densities import Density
from offrl_jax.types import Array, Spec

pytestmark = pytest.mark.little_optimised

OBS_DIM = 2
KEY = jax.random.key(7)
OVER_R = ("gaussian", "mixture", "cvae")
"""Kinds whose density is one over R^A, of which samples are clipped."""
SHARP = ("gaussian", "mixture", "censored", "flow")
"""Kinds that can be as narrow as their data."""


@functools.cache
def density_of(kind: str, action_dim: int) -> Density:
    return densities.make_density(kind, (16,), Spec(OBS_DIM, action_dim, 10), 3)


@functools.cache
def jitted(kind: str, action_dim: int, name: str):
    return jax.jit(getattr(density_of(kind, action_dim), name))


def rough_params(kind: str, action_dim: int, scale: float = 0.3, seed: int = 0):
    """Initial parameters plus noise: the initial flow would be all but uniform."""
    params = jax.jit(density_of(kind, action_dim).init)(jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noisy = [
        leaf + jnp.asarray(rng.normal(0.0, scale, leaf.shape), jnp.float32)
        for leaf in leaves
    ]
    return jax.tree.unflatten(treedef, noisy)


def measure_nodes(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights `[K]` of one dimension's measure: trapezoids, and atoms."""
    if kind in OVER_R:  # sinh t: dense in the box, and out to +-40
        t = np.linspace(-4.4, 4.4, count)
        nodes, slope, step = np.sinh(t), np.cosh(t), t[1] - t[0]
    else:
        end = 1.0 if kind == "flow" else 1.0 - 2e-6
        nodes = np.linspace(-end, end, count)
        slope, step = np.ones(count), nodes[1] - nodes[0]
    weights = slope * step
    weights[[0, -1]] /= 2.0
    if kind == "censored":
        nodes = np.concatenate([[-1.0], nodes, [1.0]])
        weights = np.concatenate([[1.0], weights, [1.0]])
    return nodes, weights


def repeated(obs: list[float], rows: int) -> Array:
    return jnp.broadcast_to(jnp.asarray(obs)[None], (rows, OBS_DIM))


def masses(kind: str, count: int, action_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes `[K, A]` and the probability `[K]` that the density gives to each."""
    nodes, weights = measure_nodes(kind, count)
    grid = np.stack(np.meshgrid(*[nodes] * action_dim, indexing="ij"), -1)
    weight = np.prod(np.stack(np.meshgrid(*[weights] * action_dim), -1), -1)
    grid = grid.reshape(-1, action_dim)
    log_prob = jitted(kind, action_dim, "log_prob")(
        KEY,
        rough_params(kind, action_dim),
        repeated([0.4, -1.0], len(grid)),
        jnp.asarray(grid, jnp.float32),
    )
    assert log_prob.shape == (len(grid),)
    return grid, np.exp(np.asarray(log_prob, np.float64)) * weight.ravel()


@pytest.mark.parametrize("kind", densities.KINDS)
def test_one_dimension_integrates_to_one_and_samples_follow(kind):
    """Samples' distribution function within the band of Dvoretzky, Kiefer, Wolfowitz.

    The bound of `cvae` is the log of an unbiased estimate of its density, which has the
    integral one, and an average over the grid's independent estimates shows it.
    """
    nodes, mass = masses(kind, 20_001, 1)
    np.testing.assert_allclose(mass.sum(), 1.0, atol=0.02 if kind == "cvae" else 1e-3)

    count = 4_000
    sample = jitted(kind, 1, "sample")(
        KEY, rough_params(kind, 1), repeated([0.4, -1.0], count)
    )
    assert sample.shape == (count, 1)
    assert bool(jnp.all(jnp.abs(sample) <= 1.0))
    inside = np.abs(nodes[:, 0]) < 1.0 - 1e-3
    x, cdf = nodes[inside, 0], np.cumsum(mass)[inside]
    empirical = np.searchsorted(np.sort(np.asarray(sample[:, 0])), x, "right") / count
    band = math.sqrt(math.log(2.0 / 1e-5) / (2.0 * count))
    assert np.max(np.abs(empirical - cdf)) < band
    # The density is no trivial one.
    assert np.max(np.abs(cdf - 0.5 * (x + 1.0))) > 2.0 * band


@pytest.mark.parametrize("kind", SHARP)
def test_two_dimensions_integrate_to_one_and_samples_follow(kind):
    """For `censored` the product of nodes holds the box, its edges and its corners."""
    nodes, mass = masses(kind, 501, 2)
    np.testing.assert_allclose(mass.sum(), 1.0, atol=5e-3)

    count = 8_000
    sample = jitted(kind, 2, "sample")(
        KEY, rough_params(kind, 2), repeated([0.4, -1.0], count)
    )
    inside = np.clip(nodes, -1.0, 1.0)
    for moment in (
        lambda a: a[:, 0],
        lambda a: a[:, 1],
        lambda a: a[:, 0] * a[:, 1],
        lambda a: a[:, 1] ** 2,
    ):
        drawn = moment(np.asarray(sample, np.float64))
        error = drawn.mean() - (moment(inside) * mass).sum()
        assert abs(error) < 4.5 * drawn.std() / math.sqrt(count) + 2e-3


def linear_mixture_by_hand(params, obs, components: int, action_dim: int):
    """`(log weight [B, K], mean [B, K, A], std)` of a head without hidden layers."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), params)["params"]
    dense = tree["MLP_0"]["Dense_0"]
    out = np.asarray(obs, np.float64) @ dense["kernel"] + dense["bias"]
    logits, rest = out[:, :components], out[:, components:]
    mean, raw = np.moveaxis(rest.reshape(-1, 2, components, action_dim), 1, 0)
    std = np.exp(-1.5 + 3.5 * np.tanh(raw))
    return scipy.special.log_softmax(logits, -1), mean + tree["location"], std


def test_gaussian_equals_scipy():
    density = densities.make_density("gaussian", (), Spec(OBS_DIM, 3, 10))
    params = density.init(KEY)
    obs = jax.random.normal(jax.random.key(1), (5, OBS_DIM))
    action = jax.random.uniform(jax.random.key(2), (5, 3), minval=-1.0)
    dense = params["params"]["MLP_0"]["Dense_0"]
    out = np.asarray(obs, np.float64) @ np.asarray(dense["kernel"], np.float64)
    mean, raw = np.split(out + np.asarray(dense["bias"]), 2, axis=-1)
    want = scipy.stats.norm.logpdf(
        action, np.tanh(mean), np.exp(-1.5 + 3.5 * np.tanh(raw))
    ).sum(-1)
    got = density.log_prob(KEY, params, obs, action)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        density.loss(KEY, params, obs, action), -want.mean(), rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["mixture", "censored"])
def test_mixtures_equal_scipy(kind):
    components, action_dim = 4, 2
    density = densities.make_density(kind, (), Spec(OBS_DIM, action_dim, 10), 4)
    params = density.init(KEY)
    obs = jax.random.normal(jax.random.key(1), (6, OBS_DIM))
    action = jnp.array(
        [[0.1, -0.9], [1.0, 0.3], [-1.0, 1.0], [0.99, -1.0], [0.5, 0.5], [-1.0, -0.2]]
    )
    log_weight, mean, std = linear_mixture_by_hand(params, obs, components, action_dim)
    a = np.asarray(action, np.float64)[:, None]
    if kind == "mixture":
        each = scipy.stats.norm.logpdf(a, np.tanh(mean), std)
    else:
        mean = 4.0 * np.tanh(mean / 4.0)
        each = np.where(
            a == 1.0,
            scipy.stats.norm.logsf(1.0, mean, std),
            np.where(
                a == -1.0,
                scipy.stats.norm.logcdf(-1.0, mean, std),
                scipy.stats.norm.logpdf(a, mean, std),
            ),
        )
    want = scipy.special.logsumexp(log_weight + each.sum(-1), axis=-1)
    got = density.log_prob(KEY, params, obs, action)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("action_dim", [1, 2, 3])
def test_coupling_splines_invert_and_their_log_det_is_the_jacobians(action_dim):
    bijection = densities.coupling_splines((16,), Spec(OBS_DIM, action_dim, 10))
    params = rough_params("flow", action_dim)
    rows = 64
    obs = jax.random.normal(jax.random.key(1), (rows, OBS_DIM))
    x = jax.random.uniform(jax.random.key(2), (rows, action_dim), minval=-1.0)
    y, log_det = jax.jit(bijection.forward)(params, obs, x)
    np.testing.assert_allclose(jax.jit(bijection.inverse)(params, obs, y), x, atol=2e-5)
    assert float(jnp.max(jnp.abs(y - x))) > 0.1

    def one(obs: Array, x: Array) -> Array:
        return bijection.forward(params, obs[None], x[None])[0][0]

    jacobian = jax.jit(jax.vmap(jax.jacfwd(one, 1)))(obs, x)
    sign, want = np.linalg.slogdet(np.asarray(jacobian, np.float64))
    assert np.all(sign == 1.0)
    np.testing.assert_allclose(log_det, want, rtol=1e-4, atol=1e-4)

    corner = jnp.ones((rows, action_dim)).at[::2].set(-1.0)
    np.testing.assert_allclose(
        bijection.forward(params, obs, corner)[0], corner, atol=1e-6
    )


# A model a = W z + c + 0.4 n with two latents: log p(a) is known.
LOADING = np.array([[0.8, -0.3], [0.2, 0.5]])
OFFSET = np.array([0.1, -0.2])
NOISE_STD = 0.4


def linear_decode(z: Array) -> Array:
    return z @ jnp.asarray(LOADING.T, jnp.float32) + jnp.asarray(
        OFFSET, jnp.float32
    ).reshape((1,) * (z.ndim - 1) + (2,))


def bounds(samples: int, mean: Array, log_std: Array, action: Array) -> Array:
    """The bound `[B]` with independent noise in every row."""
    noise = jax.random.normal(jax.random.key(samples), (samples, *mean.shape))
    return densities.importance_weighted_bound(
        noise, mean, log_std, linear_decode, math.log(NOISE_STD), action
    )


def test_importance_weighted_bound_rises_to_the_exact_density():
    action = np.array([0.6, 0.3])
    exact = scipy.stats.multivariate_normal(
        OFFSET, LOADING @ LOADING.T + NOISE_STD**2 * np.eye(2)
    ).logpdf(action)
    rows = 4_000
    args = (
        jnp.full((rows, 2), 0.3),
        jnp.full((rows, 2), -0.4),
        jnp.broadcast_to(jnp.asarray(action, jnp.float32)[None], (rows, 2)),
    )
    estimates = {k: np.asarray(bounds(k, *args), np.float64) for k in (1, 5, 50)}
    means = {k: v.mean() for k, v in estimates.items()}
    errors_of = {k: v.std() / math.sqrt(rows) for k, v in estimates.items()}
    assert means[1] + 5 * errors_of[1] < means[5]
    assert means[5] + 5 * errors_of[5] < means[50]
    assert means[50] < exact + 5 * errors_of[50]
    assert exact - means[50] < 0.02 < 0.2 < exact - means[1]
    # Importance weights are unbiased for the density itself.
    np.testing.assert_allclose(np.exp(estimates[50]).mean(), np.exp(exact), rtol=0.01)


def test_bound_is_exact_for_the_exact_posterior():
    """Orthogonal loadings have a diagonal posterior: every sample's weight is p(a)."""
    loading = np.array([[0.9, 0.0], [0.0, 0.5]])
    action = np.array([[0.6, 0.3], [-1.0, 0.9]])
    variance = np.diag(loading) ** 2 + NOISE_STD**2
    mean = action * np.diag(loading) / variance
    log_std = 0.5 * np.log(NOISE_STD**2 / variance) * np.ones((2, 1))
    want = scipy.stats.norm.logpdf(action, 0.0, np.sqrt(variance)).sum(-1)
    got = densities.importance_weighted_bound(
        jax.random.normal(KEY, (1, 2, 2)),
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(log_std, jnp.float32),
        lambda z: z @ jnp.asarray(loading, jnp.float32),
        math.log(NOISE_STD),
        jnp.asarray(action, jnp.float32),
    )
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_cvae_loss_is_the_expected_bound_of_one_sample(monkeypatch):
    """The closed KL against its estimate; ten samples give the higher bound."""
    density, rows = density_of("cvae", 2), 20_000
    params = rough_params("cvae", 2)
    obs = repeated([0.4, -1.0], rows)
    action = jnp.broadcast_to(jnp.array([[0.7, -1.0]]), (rows, 2))
    elbo = -float(density.loss(KEY, params, obs, action))
    ten = np.asarray(density.log_prob(KEY, params, obs, action))
    monkeypatch.setattr(densities, "CVAE_SAMPLES", 1)
    one = np.asarray(density.log_prob(jax.random.key(8), params, obs, action))
    assert abs(elbo - one.mean()) < 6.0 * one.std() / math.sqrt(rows)
    assert ten.mean() > one.mean() + 0.1


def test_cvae_loss_is_spots_up_to_scale():
    """`MSE + 0.5 KL`, both averages over dimensions, times 2 A / 0.5, plus a constant.

    Evaluated where the reconstruction is known: zero weights decode to 0 and encode to
    the prior shifted by the encoder's bias.
    """
    density = density_of("cvae", 2)
    params = jax.tree.map(jnp.zeros_like, rough_params("cvae", 2))
    last = params["encoder"]["params"]["Dense_1"]
    bias = np.array([0.5, -1.0, 0.2, 0.0, 0.3, -0.2, 0.1, 0.0])  # means, then log stds
    last["bias"] = jnp.asarray(bias, jnp.float32)
    action = np.array([[0.7, -1.0]])
    mean, std = bias[:4], np.exp(bias[4:])
    kl = (-0.5 * (1.0 + np.log(std**2) - mean**2 - std**2)).mean()
    spot = (action**2).mean() + 0.5 * kl
    constant = 2 * 0.5 * math.log(2.0 * math.pi * 0.125)
    got = density.loss(
        KEY, params, jnp.zeros((1, OBS_DIM)), jnp.asarray(action, jnp.float32)
    )
    np.testing.assert_allclose(got, 8.0 * spot + constant, rtol=1e-5)


@pytest.mark.parametrize("kind", densities.KINDS)
def test_members_under_vmap_equal_members_alone(kind):
    density = density_of(kind, 2)
    members = [rough_params(kind, 2, seed=seed) for seed in range(3)]
    obs = jax.random.normal(jax.random.key(1), (3, 8, OBS_DIM))
    action = jax.random.uniform(jax.random.key(2), (3, 8, 2), minval=-1.0)
    action = action.at[:, ::3].set(1.0)
    keys = jax.random.split(KEY, 3)

    def everything(key, params, obs, action):
        loss, grads = jax.value_and_grad(density.loss, 1)(key, params, obs, action)
        return (
            density.log_prob(key, params, obs, action),
            loss,
            grads,
            density.sample(key, params, obs),
        )

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    together = jax.jit(jax.vmap(everything))(keys, stacked, obs, action)
    alone = jax.jit(everything)
    for i in range(3):
        jax.tree.map(
            lambda got, want, i=i: np.testing.assert_allclose(
                got[i], want, rtol=2e-3, atol=2e-4
            ),
            together,
            alone(keys[i], members[i], obs[i], action[i]),
        )


@pytest.mark.parametrize("kind", densities.KINDS)
def test_same_key_same_value_and_new_data_do_not_retrace(kind):
    density, traces = density_of(kind, 1), []

    @jax.jit
    def loss(key, params, obs, action):
        traces.append(1)
        return density.loss(key, params, obs, action)

    params = rough_params(kind, 1)
    obs, action = repeated([0.4, -1.0], 4), jnp.zeros((4, 1))
    first = loss(KEY, params, obs, action)
    assert float(first) == float(loss(KEY, params, obs, action))
    changed = loss(KEY, rough_params(kind, 1, seed=1), obs + 1.0, action + 0.5)
    assert float(first) != float(changed)
    assert len(traces) == 1


def test_unknown_kind_and_no_components_are_told():
    spec = Spec(OBS_DIM, 1, 10)
    with pytest.raises(errors.UsageError, match="did you mean 'censored'"):
        densities.make_density("sensored", (16,), spec)
    for kind in ("mixture", "censored"):
        with pytest.raises(errors.UsageError, match="0 components; give at least 1"):
            densities.make_density(kind, (16,), spec, components=0)
