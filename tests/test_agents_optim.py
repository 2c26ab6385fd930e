"""Adam, target averages and minibatches against their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_mdps

from offrl_jax.agents import optim


def test_adam_equals_its_definition():
    """Kingma & Ba (2015), algorithm 1, in float64."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}
    got = jax.tree.map(jnp.float32, params)
    state = optim.adam_init(got)
    m = jax.tree.map(np.zeros_like, params)
    v = jax.tree.map(np.zeros_like, params)
    for t in range(1, 6):
        lr = 0.1 / t
        grads = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}
        for k, g in grads.items():
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.999 * v[k] + 0.001 * g**2
            m_hat, v_hat = m[k] / (1 - 0.9**t), v[k] / (1 - 0.999**t)
            params[k] = params[k] - lr * m_hat / (np.sqrt(v_hat) + 1e-8)
        got, state = optim.adam_step(
            jax.tree.map(jnp.float32, grads), state, got, jnp.float32(lr)
        )
    for k, want in params.items():
        np.testing.assert_allclose(got[k], want, rtol=1e-4)


def test_adam_keeps_the_rate_out_of_its_state():
    params = (jnp.ones(2),)
    slow = optim.adam_step((jnp.ones(2),), optim.adam_init(params), params, 1e-3)
    fast = optim.adam_step((jnp.ones(2),), optim.adam_init(params), params, 1e-1)
    for x, y in zip(jax.tree.leaves(slow[1]), jax.tree.leaves(fast[1]), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(slow[0][0], 1.0 - 1e-3, rtol=1e-6)
    np.testing.assert_allclose(fast[0][0], 1.0 - 1e-1, rtol=1e-6)


def test_adam_works_under_strict_promotion_inside_jit():
    params = {"w": jnp.ones(3)}
    step = jax.jit(optim.adam_step)
    new, _ = step(params, optim.adam_init(params), params, jnp.float32(0.5))
    # 1 - 0.999 in float32 is off by 1e-5: optax's bias correction inherits half of it.
    np.testing.assert_allclose(new["w"], 0.5, rtol=1e-5)


def test_polyak_is_a_weighted_mean():
    target, online = {"x": jnp.array([0.0, 4.0])}, {"x": jnp.array([1.0, 0.0])}
    got = optim.polyak(target, online, 0.25)
    np.testing.assert_allclose(got["x"], [0.25, 3.0])
    np.testing.assert_array_equal(optim.polyak(target, online, 1.0)["x"], online["x"])


def test_minibatches_keep_the_order():
    batch = jax.tree.map(lambda x: x[:12], toy_mdps.random_data())
    parts = optim.minibatches(batch, 3)
    assert [p.obs.shape for p in parts] == [(4, 2)] * 3
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    for x, y in zip(joined, batch, strict=True):
        np.testing.assert_array_equal(x, y)


def test_minibatches_refuse_a_remainder():
    batch = jax.tree.map(lambda x: x[:10], toy_mdps.random_data())
    with pytest.raises(ValueError, match="10 transitions cannot be cut into 3"):
        optim.minibatches(batch, 3)
