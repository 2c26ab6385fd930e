"""Modules against NumPy, and initialisations against their definitions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_mdps

from offrl_jax import networks

pytestmark = pytest.mark.little_optimised

KEY = jax.random.key(0)


def init(module, *inputs):
    """Compiled as one program: op by op, each shape would compile on its own."""
    return jax.jit(module.init)(KEY, *inputs)


def perturbed(params):
    """Parameters without zeros or ones, so that no term can be missing unseen."""
    rng = np.random.default_rng(9)
    return jax.tree.map(
        lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), params
    )


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("hidden", [(5,), (7, 3)])
def test_mlp_equals_numpy(hidden, layer_norm):
    mlp = networks.MLP(hidden, 2, layer_norm)
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    params = perturbed(init(mlp, x))
    want = toy_mdps.forward(params["params"], x, layer_norm)
    np.testing.assert_allclose(networks.apply(mlp, params, x), want, atol=1e-5)


def test_actor_is_the_tanh_of_its_mlp():
    actor = networks.Actor((8,), 2)
    x = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    params = perturbed(init(actor, x))
    want = np.tanh(toy_mdps.forward(params["params"]["MLP_0"], x))
    np.testing.assert_allclose(networks.apply(actor, params, x), want, atol=1e-5)


def test_critic_reads_observation_then_action():
    critic = networks.Critic((8,), layer_norm=True)
    rng = np.random.default_rng(2)
    obs = rng.normal(size=(6, 3)).astype(np.float32)
    action = rng.normal(size=(6, 2)).astype(np.float32)
    params = perturbed(init(critic, obs, action))
    x = np.concatenate([obs, action], -1)
    want = toy_mdps.forward(params["params"]["MLP_0"], x, True)[:, 0]
    got = networks.apply(critic, params, obs, action)
    assert got.shape == (6,)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_value_is_a_scalar_per_row():
    value = networks.Value((8,))
    obs = np.random.default_rng(3).normal(size=(6, 3)).astype(np.float32)
    params = perturbed(init(value, obs))
    want = toy_mdps.forward(params["params"]["MLP_0"], obs)[:, 0]
    np.testing.assert_allclose(networks.apply(value, params, obs), want, atol=1e-5)


def test_gaussian_actor_with_and_without_state_dependent_std():
    obs = jnp.asarray(np.random.default_rng(4).normal(size=(6, 3)), jnp.float32)
    dependent = networks.GaussianActor((8,), 2)
    params = perturbed(init(dependent, obs))
    mean, log_std = networks.apply(dependent, params, obs)
    out = toy_mdps.forward(params["params"]["MLP_0"], np.asarray(obs))
    np.testing.assert_allclose(mean, out[:, :2], atol=1e-5)
    np.testing.assert_allclose(log_std, out[:, 2:], atol=1e-5)

    free = networks.GaussianActor((8,), 2, state_dependent_std=False)
    params = init(free, obs)
    mean, log_std = networks.apply(free, params, obs)
    assert mean.shape == log_std.shape == (6, 2)
    np.testing.assert_array_equal(log_std, np.zeros((6, 2)))
    np.testing.assert_array_equal(params["params"]["log_std"], [0.0, 0.0])


def layers_of(**inits):
    params = init(networks.MLP((300, 200), 4, **inits), jnp.zeros((1, 100)))
    return [params["params"][f"Dense_{i}"] for i in range(3)]


def assert_fills(array, bound: float) -> None:
    """Uniform in +-bound: inside, close to the ends, with the right variance."""
    assert np.max(np.abs(array)) <= bound
    if array.size > 1000:
        assert np.max(array) > 0.98 * bound and np.min(array) < -0.98 * bound
        np.testing.assert_allclose(np.std(array), bound / math.sqrt(3), rtol=0.05)


def test_torch_linear_bounds_every_layer_by_its_fan_in():
    for layer, fan_in in zip(layers_of(), (100, 300, 200), strict=True):
        assert_fills(layer["kernel"], 1 / math.sqrt(fan_in))
        assert_fills(layer["bias"], 1 / math.sqrt(fan_in))
        assert np.std(layer["bias"]) > 0.0


def test_edac_initialisation():
    layers = layers_of(
        hidden_init=networks.torch_linear_bias(0.1), out_init=networks.uniform(3e-3)
    )
    assert_fills(layers[0]["kernel"], 0.1)
    np.testing.assert_allclose(layers[1]["bias"], 0.1, rtol=1e-6)
    assert_fills(layers[2]["kernel"], 3e-3)
    assert_fills(layers[2]["bias"], 3e-3)
    assert np.max(np.abs(layers[2]["kernel"])) > 2.5e-3


def test_orthogonal_kernels_have_equal_singular_values():
    gain = math.sqrt(2.0)
    init = networks.orthogonal(gain)
    for layer in layers_of(hidden_init=init, out_init=init):
        singular = np.linalg.svd(np.asarray(layer["kernel"]), compute_uv=False)
        np.testing.assert_allclose(singular, gain, rtol=1e-4)
        np.testing.assert_array_equal(layer["bias"], 0.0)


def test_scaled_uniform_and_lecun_normal():
    layers = layers_of(
        hidden_init=networks.lecun_normal, out_init=networks.scaled_uniform(0.01)
    )
    for layer, fan_in in zip(layers[:2], (100, 300), strict=True):
        np.testing.assert_allclose(np.std(layer["kernel"]), fan_in**-0.5, rtol=0.05)
    # Variance 0.01 / fan_in; a uniform's bound is sqrt(3) deviations.
    assert_fills(layers[2]["kernel"], math.sqrt(3.0 * 0.01 / 200))
    assert np.max(np.abs(layers[2]["kernel"])) > 0.9 * math.sqrt(3.0 * 0.01 / 200)
    for layer in layers:
        np.testing.assert_array_equal(layer["bias"], 0.0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_mlp_with_another_activation_and_order_of_normalisation(norm_first):
    mlp = networks.MLP((8, 8), 2, True, activation=jax.nn.elu, norm_first=norm_first)
    x = np.random.default_rng(4).normal(size=(5, 3))
    params = perturbed(init(mlp, jnp.zeros((1, 3))))["params"]

    def elu(h):
        return np.where(h > 0.0, h, np.expm1(np.minimum(h, 0.0)))

    def normalise(h, layer):
        centred = h - h.mean(-1, keepdims=True)
        h = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return h * np.asarray(layer["scale"]) + np.asarray(layer["bias"])

    h = x
    for i in range(2):
        dense = params[f"Dense_{i}"]
        h = h @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"])
        norm = params[f"LayerNorm_{i}"]
        h = elu(normalise(h, norm)) if norm_first else normalise(elu(h), norm)
    out = params["Dense_2"]
    want = h @ np.asarray(out["kernel"], np.float64) + np.asarray(out["bias"])
    got = networks.apply(mlp, {"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_critics_of_an_ensemble_differ_and_smallest_is_taken():
    critic = networks.Critic((16,))
    params = networks.init_critics(critic, KEY, 3, 2, 4)
    assert len(params) == 4
    rng = np.random.default_rng(5)
    obs = jnp.asarray(rng.normal(size=(50, 3)), jnp.float32)
    action = jnp.asarray(rng.normal(size=(50, 2)), jnp.float32)
    q = np.stack([np.asarray(networks.apply(critic, p, obs, action)) for p in params])
    assert len({tuple(row) for row in q}) == 4
    assert len(set(q.argmin(0))) > 1
    got = networks.smallest_q(critic, params, obs, action)
    np.testing.assert_array_equal(got, q.min(0))


def test_modules_are_hashable_and_equal_by_structure():
    """They are closed over by jitted functions, which compare them by value."""
    for make in (
        lambda h: networks.Actor(h, 2),
        lambda h: networks.GaussianActor(h, 2),
        lambda h: networks.Critic(h, activation=jax.nn.elu, norm_first=True),
        networks.Critic,
        networks.Value,
    ):
        assert make((8, 8)) == make((8, 8))
        assert hash(make((8, 8))) == hash(make((8, 8)))
        assert make((8, 8)) != make((8, 4))
