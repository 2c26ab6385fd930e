"""K-FAC: exact where it must be, and no worse than the plain gradient elsewhere."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offrl_jax import distributions, fisher, networks

pytestmark = pytest.mark.little_optimised

KEY = jax.random.key(0)


def sample_categorical(key, logits):
    return jax.nn.one_hot(jax.random.categorical(key, logits), logits.shape[-1])


def log_prob_categorical(logits, y):
    return jnp.sum(jax.nn.log_softmax(logits) * y, axis=-1)


def sample_gaussian(key, out):
    mean, log_std = out
    return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)


def log_prob_gaussian(out, y):
    return jnp.sum(distributions.normal_log_prob(*out, y), axis=-1)


def close(got, want, tolerance=1e-4):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def layer_matrix(kernel, bias):
    """Weights as K-FAC stacks them, `[in + 1, out]`."""
    return jnp.concatenate([kernel, bias[None]], axis=0)


# One layer, one input.


def one_layer():
    layer = nn.Dense(3, bias_init=nn.initializers.normal())
    x = jax.random.normal(KEY, (1, 4))
    params = layer.init(jax.random.key(1), x)
    return layer, params, x


def kfac_order(inputs: int, out: int) -> np.ndarray:
    """Places of those, row by row, in `ravel_pytree` of {bias, kernel}."""
    kernel = out + np.arange(inputs * out)
    return np.concatenate([kernel, np.arange(out)])


def test_one_input_and_one_layer_is_exact():
    """A kron G is the Fisher matrix of the same outcomes, and near the true one."""
    layer, params, x = one_layer()
    factors = fisher.kfac_factors(
        jax.random.key(2),
        layer.apply,
        params,
        (x,),
        sample_categorical,
        log_prob_categorical,
        samples=20_000,
    )
    ((a, g),) = factors.dense.values()
    assert factors.diagonal == {}
    want_a = np.append(np.asarray(x[0]), 1.0)
    close(a, np.outer(want_a, want_a), 1e-6)
    exact = fisher.categorical_fisher(
        lambda p, row: layer.apply(p, row[None])[0], params, x
    )
    order = kfac_order(4, 3)
    got = np.kron(a, g)
    assert np.linalg.norm(got - np.asarray(exact)[np.ix_(order, order)]) < (
        0.03 * np.linalg.norm(got)
    )
    # Drawn once and with the same key: equal to rounding, not only on average.
    keys = jax.random.split(jax.random.key(3), 1)
    one = fisher.kfac_factors(
        jax.random.key(3),
        layer.apply,
        params,
        (x,),
        sample_categorical,
        log_prob_categorical,
    )
    y = sample_categorical(keys[0], layer.apply(params, x))
    same = fisher.empirical_fisher(
        lambda p, row, t: log_prob_categorical(layer.apply(p, row[None]), t[None])[0],
        params,
        x,
        y,
    )
    ((a, g),) = one.dense.values()
    close(np.kron(a, g), np.asarray(same)[np.ix_(order, order)], 1e-5)


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_direction_of_a_layer(damping):
    """Against numpy's dense solve of the damped product, pi included."""
    rng = np.random.default_rng(0)
    a, g = (m @ m.T for m in (rng.normal(size=(5, 5)), 0.1 * rng.normal(size=(3, 3))))
    weights = rng.normal(size=(5, 3))
    pi = np.sqrt(np.trace(a) / 5 / (np.trace(g) / 3))
    root = np.sqrt(damping)
    matrix = np.kron(a + pi * root * np.eye(5), g + root / pi * np.eye(3))
    want = np.linalg.solve(matrix, weights.ravel()).reshape(5, 3)
    gradient = {"params": {"out": {"bias": weights[4], "kernel": weights[:4]}}}
    factors = fisher.KFACFactors({"out": (jnp.float32(a), jnp.float32(g))}, {})
    got = fisher.kfac_direction(
        jax.tree.map(jnp.float32, gradient), factors, jnp.float32(damping)
    )
    close(layer_matrix(**got["params"]["out"]), want, 1e-3)


def test_direction_without_curvature_is_the_gradient():
    gradient = {"out": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    factors = fisher.KFACFactors({"out": (jnp.zeros((3, 3)), jnp.zeros((3, 3)))}, {})
    got = fisher.kfac_direction(gradient, factors, 0.5)
    for leaf in jax.tree.leaves(got):
        np.testing.assert_allclose(leaf, 2.0, rtol=1e-5)


# Networks of the package.


def actor_case(state_dependent: bool):
    actor = networks.GaussianActor((8, 8), 2, state_dependent_std=state_dependent)
    x = jax.random.normal(KEY, (64, 3))
    params = actor.init(jax.random.key(1), x)

    def forward(p, obs):
        return networks.apply(actor, p, obs)

    return forward, params, x


@pytest.mark.parametrize("state_dependent", [True, False])
def test_factors_of_an_actor(state_dependent):
    """Every layer's A and G by hand from per-sample gradients: the gradient of a
    kernel is input times output gradient, and that of the bias the latter."""
    forward, params, x = actor_case(state_dependent)
    key = jax.random.key(5)
    factors = jax.jit(
        lambda p: fisher.kfac_factors(
            key, forward, p, (x,), sample_gaussian, log_prob_gaussian
        )
    )(params)
    y = sample_gaussian(jax.random.split(key, 1)[0], forward(params, x))
    scores = fisher.per_sample_scores(
        lambda p, row, t: log_prob_gaussian(forward(p, row[None]), t[None])[0],
        params,
        x,
        y,
    )["params"]
    assert set(factors.dense) == {f"MLP_0/Dense_{i}" for i in range(3)}
    for path, (_a, g) in factors.dense.items():
        bias = np.asarray(scores["MLP_0"][path.split("/")[1]]["bias"])
        close(g, bias.T @ bias / len(bias), 1e-5)
    first = np.concatenate([np.asarray(x), np.ones((64, 1))], axis=1)
    close(factors.dense["MLP_0/Dense_0"][0], first.T @ first / 64, 1e-5)
    if state_dependent:
        assert factors.diagonal == {}
    else:
        want = np.mean(np.square(scores["log_std"]), axis=0)
        close(factors.diagonal["log_std"], want, 1e-5)
        many = fisher.kfac_factors(
            key, forward, params, (x,), sample_gaussian, log_prob_gaussian, 50
        )
        np.testing.assert_allclose(many.diagonal["log_std"], 2.0, rtol=0.2)


@pytest.mark.parametrize("state_dependent", [True, False])
def test_nearer_to_the_natural_gradient(state_dependent):
    """Cosine to the true damped natural gradient, against that of the gradient."""
    forward, params, x = actor_case(state_dependent)
    damping = 0.01
    exact = fisher.gaussian_fisher(
        lambda p, row: tuple(o[0] for o in forward(p, row[None])), params, x
    )
    factors = fisher.kfac_factors(
        KEY, forward, params, (x,), sample_gaussian, log_prob_gaussian, 20
    )
    weight = jnp.sin(3.0 * x[:, 0])

    @jax.grad
    def gradient(p):
        out = forward(p, x)
        y = jax.lax.stop_gradient(sample_gaussian(jax.random.key(8), out))
        return jnp.mean(weight * log_prob_gaussian(out, y))

    g = gradient(params)
    ours = fisher.kfac_direction(g, factors, damping)
    diagonal_only = fisher.cosine_to_natural(g, exact, g, damping)
    cosine = fisher.cosine_to_natural(ours, exact, g, damping)
    assert cosine > diagonal_only + 0.1
    assert cosine > 0.5
    assert float(fisher.inner(ours, g)) > 0


def test_average_and_empty():
    forward, params, x = actor_case(False)

    def factors(p, key):
        return fisher.kfac_factors(
            key, forward, p, (x,), sample_gaussian, log_prob_gaussian
        )

    empty = fisher.empty_factors(forward, params, (x,))
    new = factors(params, KEY)
    assert jax.tree.structure(empty) == jax.tree.structure(new)
    for e, n in zip(jax.tree.leaves(empty), jax.tree.leaves(new), strict=True):
        assert (e.shape, e.dtype) == (n.shape, n.dtype)
        assert not e.any()
    got = fisher.average_factors(empty, new, 0.75)
    for a, n in zip(jax.tree.leaves(got), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(a, 0.25 * n, rtol=1e-5, atol=1e-7)
    same = fisher.average_factors(new, empty, 1.0)
    for a, n in zip(jax.tree.leaves(same), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(a, n, rtol=1e-6, atol=1e-7)

    # As an agent would: scan over updates, vmap over seeds.
    def run(key):
        def step(carry, key):
            p, old = carry
            average = fisher.average_factors(old, factors(p, key), 0.9)
            d = fisher.kfac_direction(p, average, 0.1)
            moved = jax.tree.map(lambda w, s: w - 1e-3 * s, p, d)
            return (moved, average), fisher.norm2(d)

        return jax.lax.scan(step, (params, empty), jax.random.split(key, 3))

    (_, average), norms = jax.jit(jax.vmap(run))(jax.random.split(KEY, 2))
    assert norms.shape == (2, 3)
    assert np.isfinite(norms).all()
    assert average.diagonal["log_std"].shape == (2, 2)


# What it refuses.


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(3)
        return layer(layer(x))


def test_misuse_is_told():
    x = jnp.ones((2, 3))
    twice = Twice()
    params = twice.init(KEY, x)
    rest = (sample_categorical, log_prob_categorical)
    with pytest.raises(ValueError, match="used twice"):
        fisher.kfac_factors(KEY, twice.apply, params, (x,), *rest)
    mlp = networks.MLP((4,), 2)
    params = mlp.init(KEY, x)
    with pytest.raises(ValueError, match=r"needs \[n, I\]"):
        fisher.kfac_factors(KEY, mlp.apply, params, (x[None],), *rest)
    with pytest.raises(ValueError, match="no parameters for"):
        fisher.kfac_factors(
            KEY, lambda p, x: mlp.apply(p["net"], x), {"net": params}, (x,), *rest
        )
    factors = fisher.kfac_factors(KEY, mlp.apply, params, (x,), *rest)
    with pytest.raises(ValueError, match="factors cover"):
        fisher.kfac_direction({**params, "more": jnp.ones(2)}, factors, 0.1)


def test_layer_without_bias_and_params_without_collection():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.Dense(2, use_bias=False)(x))

    net, x = Net(), jax.random.normal(KEY, (7, 3))
    params = net.init(KEY, x)["params"]
    factors = fisher.kfac_factors(
        KEY,
        lambda p, x: net.apply({"params": p}, x),
        params,
        (x,),
        sample_categorical,
        log_prob_categorical,
    )
    assert factors.dense["Dense_0"][0].shape == (3, 3)
    assert set(factors.diagonal) == {"LayerNorm_0/bias", "LayerNorm_0/scale"}
    got = fisher.kfac_direction(params, factors, 0.1)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    want = params["LayerNorm_0"]["scale"] / (
        factors.diagonal["LayerNorm_0/scale"] + 0.1
    )
    close(got["LayerNorm_0"]["scale"], want, 1e-6)
