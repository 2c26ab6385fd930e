"""How near one score brings the gradient to the natural one, on softmax bandits.

The claim "nearer on average from B = 16 on" holds for a damping of the order of tr F
and fails for a small one: docs/fisher.md has the table.  `-s` prints the numbers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offrl_jax import fisher

pytestmark = pytest.mark.little_optimised

ARMS, BANDITS = 10, 2000


def log_prob(theta, arm):
    return jax.nn.log_softmax(theta)[arm]


def cosines(key, batch: int, damping, scores: int):
    """Cosines to the natural gradient of a mini-batch gradient, of the rank-1 and of
    the Woodbury direction, `[3]`; the damping is in units of tr F."""
    keys = jax.random.split(key, 4)
    theta = 1.5 * jax.random.normal(keys[0], (ARMS,))
    reward = jax.random.normal(keys[1], (ARMS,))
    p = jax.nn.softmax(theta)
    # F = diag p - p p^T, so that the natural gradient is the reward, centred.
    natural = reward - jnp.mean(reward)
    arms = jax.random.categorical(keys[2], theta, shape=(batch,))
    psi = fisher.per_sample_scores(log_prob, theta, arms)
    advantage = reward[arms] - jnp.mean(reward[arms])
    g = jnp.mean(advantage[:, None] * psi, axis=0)
    fresh = jax.random.categorical(keys[3], theta, shape=(scores,))
    v = fisher.per_sample_scores(log_prob, theta, fresh)
    lam = damping * (1.0 - jnp.sum(jnp.square(p)))
    directions = (
        g,
        fisher.rank1_direction(v[0], g, lam),
        fisher.woodbury_direction(v, g, lam),
    )
    return jnp.stack([fisher.cosine(d, natural) for d in directions])


@functools.partial(jax.jit, static_argnums=(1, 3))
def every(keys, batch: int, damping, scores: int):
    return jax.vmap(lambda key: cosines(key, batch, damping, scores))(keys)


def gain(batch: int, damping: float, scores: int = 16):
    """Mean cosines `[3]`, and mean and standard error of the gains over SGD, `[2]`."""
    keys = jax.random.split(jax.random.key(0), BANDITS)
    each = np.asarray(every(keys, batch, damping, scores), np.float64)
    difference = each[:, 1:] - each[:, :1]
    error = difference.std(0) / np.sqrt(BANDITS)
    print(batch, damping, each.mean(0).round(3), difference.mean(0).round(4), error)
    return each.mean(0), difference.mean(0), error


def test_natural_gradient_of_a_bandit_is_the_centred_reward():
    """The oracle above, against the room's matrix and its pseudo-inverse."""
    theta = 1.5 * jax.random.normal(jax.random.key(1), (ARMS,))
    reward = jax.random.normal(jax.random.key(2), (ARMS,))
    exact = fisher.categorical_fisher(lambda t, x: t, theta, jnp.zeros((1, 1)))
    g = jax.grad(lambda t: jnp.sum(jax.nn.softmax(t) * reward))(theta)
    natural = reward - jnp.mean(reward)
    assert fisher.cosine_to_natural(natural, exact, g) == pytest.approx(1, abs=1e-3)
    assert fisher.cosine_to_natural(g, exact, g) < 0.95


@pytest.mark.parametrize("batch", [64, 256])
def test_nearer_on_average_with_a_damping_of_the_trace(batch):
    _, difference, error = gain(batch, 1.0)
    assert (difference > 4 * error).all()


def test_sixteen_scores_bring_more_than_one():
    _, difference, error = gain(64, 0.1)
    assert difference[1] > difference[0] + 4 * error.sum()
    assert difference[1] > 0.03


def test_a_small_damping_hurts_with_one_score():
    """One score, all but removed, is noise; this is why the damping is relative."""
    _, difference, error = gain(64, 0.01)
    assert difference[0] < -4 * error[0]
