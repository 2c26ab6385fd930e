"""Behaviour densities after training: known distributions, degenerate data."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from offrl_jax import densities
from offrl_jax.agents import optim
from offrl_jax.densities import Density
from offrl_jax.types import Array, Spec

pytestmark = pytest.mark.little_optimised

BATCH = 128


@functools.cache
def density_of(kind: str, action_dim: int) -> Density:
    return densities.make_density(kind, (16,), Spec(1, action_dim, 10), 3)


@functools.cache
def trainer(kind: str, action_dim: int, steps: int, largest_lr: float):
    """`(key, obs [N, 1], action [N, A]) -> (params, losses [steps])`, uncompiled."""
    density = density_of(kind, action_dim)

    def train(key, obs, action):
        def step(carry, inputs):
            params, opt = carry
            key, lr = inputs
            index_key, loss_key = jax.random.split(key)
            index = jax.random.randint(index_key, (BATCH,), 0, obs.shape[0])
            loss, grads = jax.value_and_grad(density.loss, 1)(
                loss_key, params, obs[index], action[index]
            )
            return optim.adam_step(grads, opt, params, lr), loss

        init_key, key = jax.random.split(key)
        params = density.init(init_key)
        carry = (params, optim.adam_init(params))
        decay = jnp.linspace(largest_lr, 0.0, steps)
        inputs = jax.random.split(key, steps), decay
        (params, _), losses = jax.lax.scan(step, carry, inputs)
        return params, losses

    return train


def fit(kind: str, obs: np.ndarray, action: np.ndarray, steps: int = 1_000):
    train = jax.jit(trainer(kind, action.shape[1], steps, 1e-2))
    return train(jax.random.key(3), as_float32(obs), as_float32(action))[0]


def as_float32(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float32)


def mean_log_prob(kind, params, obs, action) -> float:
    log_prob = jax.jit(density_of(kind, action.shape[1]).log_prob)(
        jax.random.key(4), params, as_float32(obs), as_float32(action)
    )
    return float(jnp.mean(log_prob))


def two_modes(rng: np.random.Generator, count: int, std: float):
    """Modes at +-0.6; the upper one has probability 0.9 where obs > 0, else 0.1."""
    obs = rng.choice([-1.0, 1.0], (count, 1))
    upper = rng.random((count, 1)) < 0.5 + 0.4 * obs
    action = np.where(upper, 0.6, -0.6) + std * rng.normal(size=(count, 1))
    return obs, action


def two_modes_log_prob(obs, action, std: float) -> np.ndarray:
    upper = 0.5 + 0.4 * obs
    return np.log(
        upper * scipy.stats.norm.pdf(action, 0.6, std)
        + (1.0 - upper) * scipy.stats.norm.pdf(action, -0.6, std)
    )


@pytest.mark.parametrize("kind", ["mixture", "censored", "flow"])
def test_two_modes_are_recovered(kind):
    rng = np.random.default_rng(0)
    params = fit(kind, *two_modes(rng, 8_000, 0.1))
    obs, action = two_modes(rng, 4_000, 0.1)
    best = two_modes_log_prob(obs, action, 0.1).mean()
    assert abs(mean_log_prob(kind, params, obs, action) - best) < 0.06
    sample = density_of(kind, 1).sample(jax.random.key(5), params, jnp.ones((2_000, 1)))
    assert abs(float(jnp.mean(sample > 0.0)) - 0.9) < 0.04


def test_gaussian_finds_the_moments():
    rng = np.random.default_rng(0)
    params = fit("gaussian", *two_modes(rng, 8_000, 0.1))
    obs, action = two_modes(rng, 4_000, 0.1)
    # Given obs: mean +-0.48, variance 0.36 - 0.48^2 + 0.1^2.
    best = scipy.stats.norm.logpdf(
        action, 0.48 * obs, math.sqrt(0.36 - 0.48**2 + 0.01)
    ).mean()
    assert abs(mean_log_prob("gaussian", params, obs, action) - best) < 0.03


def test_cvae_finds_the_modes_that_its_decoder_can_resolve():
    """Data drawn from the family itself: modes as broad as the decoder."""
    rng, std = np.random.default_rng(0), math.sqrt(0.125)
    params = fit("cvae", *two_modes(rng, 8_000, std))
    obs, action = two_modes(rng, 4_000, std)
    best = two_modes_log_prob(obs, action, std).mean()
    single = scipy.stats.norm.logpdf(
        action, 0.48 * obs, math.sqrt(0.36 - 0.48**2 + 0.125)
    ).mean()
    got = mean_log_prob("cvae", params, obs, action)
    assert single < got < best + 0.02
    assert best - got < 0.05


def saturated(rng: np.random.Generator, count: int):
    """N(0.9 obs, 0.5^2) clipped to [-1, 1]: 42 % of the actions sit on a bound."""
    obs = rng.choice([-1.0, 1.0], (count, 1))
    return obs, np.clip(0.9 * obs + 0.5 * rng.normal(size=(count, 1)), -1.0, 1.0)


def test_censored_recovers_saturated_actions():
    rng = np.random.default_rng(0)
    params = fit("censored", *saturated(rng, 8_000))
    obs, action = saturated(rng, 4_000)
    normal = scipy.stats.norm(0.9 * obs, 0.5)
    best = np.where(
        action == 1.0,
        normal.logsf(1.0),
        np.where(action == -1.0, normal.logcdf(-1.0), normal.logpdf(action)),
    ).mean()
    assert abs(mean_log_prob("censored", params, obs, action) - best) < 0.03
    density = density_of("censored", 1)
    at_bound = density.log_prob(
        jax.random.key(0), params, jnp.array([[1.0]]), jnp.array([[1.0]])
    )
    np.testing.assert_allclose(
        np.exp(at_bound), scipy.stats.norm.sf(1.0, 0.9, 0.5), atol=0.03
    )
    sample = density.sample(jax.random.key(1), params, jnp.ones((4_000, 1)))
    np.testing.assert_allclose(
        float(jnp.mean(sample == 1.0)), scipy.stats.norm.sf(1.0, 0.9, 0.5), atol=0.04
    )


def degenerate(count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(count, 1))
    free = rng.uniform(-1.0, 1.0, (count, 1))
    return {
        "one dimension constant": (obs, np.hstack([free, np.full((count, 1), 0.3)])),
        "all on the bounds": (obs, rng.choice([-1.0, 1.0], (count, 2))),
        "one corner": (obs, np.ones((count, 2))),
        "one transition": (
            np.full((count, 1), 0.7),
            np.tile([[0.25, -0.8]], (count, 1)),
        ),
    }


@pytest.mark.parametrize("kind", densities.KINDS)
def test_degenerate_data_stay_finite(kind):
    """After training until the likelihood's limit, at the data and far from them."""
    density, cases = density_of(kind, 2), degenerate(BATCH)
    obs = as_float32(np.stack([case[0] for case in cases.values()]))
    action = as_float32(np.stack([case[1] for case in cases.values()]))
    keys = jax.random.split(jax.random.key(0), len(cases))
    params, losses = jax.jit(jax.vmap(trainer(kind, 2, 300, 3e-2)))(keys, obs, action)
    assert bool(jnp.all(jnp.isfinite(losses)))
    # It did learn: the last losses are far below the first.
    assert bool(jnp.all(losses[:, -1] < losses[:, 0] - 0.2))

    def value_and_grads(key, params, obs, action):
        def total(params, action):
            log_prob = density.log_prob(key, params, obs, action)
            return jnp.sum(log_prob), log_prob

        grads, log_prob = jax.grad(total, (0, 1), has_aux=True)(params, action)
        return log_prob, grads

    evaluate = jax.jit(jax.vmap(value_and_grads))
    corners = jnp.tile(jnp.array([[-1.0, 1.0], [1.0, -1.0]]), (BATCH // 2, 1))
    away = jnp.broadcast_to(corners[None], action.shape)
    # In the data's states, and where the networks extrapolate a thousandfold.
    for states in (obs, 1e3 * obs):
        for where in (action, away, 0.0 * action):
            result = evaluate(keys, params, states, where)
            assert all(
                bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(result)
            )
            # Below the limit of 10 nats per dimension that the floors imply.
            assert float(jnp.max(result[0])) < 2 * 10.0
    sample = jax.vmap(density.sample)(keys, params, 1e3 * obs)
    assert bool(jnp.all(jnp.abs(sample) <= 1.0))
