"""The gates against brute force, and what no policy with one mode can do there."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from offrl_jax.datasets import classic, reference
from offrl_jax.envs import gates

PASSES = jax.jit(jax.vmap(gates.passes))
GRID = np.stack(np.meshgrid(*2 * [np.linspace(-1.0, 1.0, 401)]), -1).reshape(-1, 2)


def free(phi: float, action: np.ndarray) -> np.ndarray:
    """Whether the points `[n, 2]` lie in either disc, in float64."""
    centre = gates.DISTANCE * np.array([math.cos(phi), math.sin(phi)])
    first = np.linalg.norm(action - centre, axis=1) <= gates.OPENING
    return first | (np.linalg.norm(action + centre, axis=1) <= gates.OPENING)


@pytest.mark.parametrize("phi", [0.0, 0.4, 1.9, 3.1])
def test_walls_are_two_discs_in_a_square(phi: float):
    found = np.asarray(PASSES(jnp.full(len(GRID), phi), jnp.asarray(GRID)))
    assert np.mean(found != free(phi, GRID)) < 1e-3  # On the rim: rounding.
    area = 2 * math.pi * gates.OPENING**2 / 4
    assert found.mean() == pytest.approx(area, rel=0.02)


def test_half_a_turn_of_the_wall_changes_nothing():
    phi = jnp.linspace(0.0, math.pi, 50, endpoint=False)
    turned = phi + math.pi
    observe = jax.vmap(gates.observe)
    np.testing.assert_allclose(observe(phi), observe(turned), atol=1e-6)
    actions = jax.random.uniform(jax.random.key(0), (50, 2), minval=-1.0)
    np.testing.assert_array_equal(PASSES(phi, actions), PASSES(turned, actions))
    centres = jax.vmap(gates.opening)(observe(phi))
    assert PASSES(phi, centres).all() and PASSES(phi, -centres).all()
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 0.7, rtol=1e-5)


def test_a_hit_ends_the_episode_and_pays_nothing():
    state, obs = gates.reset(jax.random.key(3))
    after, hit = gates.step(state, jnp.zeros(2))
    assert bool(hit.terminated) and hit.reward == 0.0 and not hit.truncated
    after, passed = gates.step(state, gates.opening(obs))
    assert passed.reward == 1.0 and not passed.terminated and not passed.success
    last = after._replace(t=jnp.int32(gates.SPEC.horizon - 1))
    _, end = gates.step(last, gates.opening(passed.obs))
    assert end.success and end.truncated and not end.terminated
    _, end = gates.step(last, jnp.zeros(2))
    assert end.terminated and not end.success


def test_the_walls_to_come_do_not_depend_on_the_action():
    state, obs = gates.reset(jax.random.key(0))
    _, one = gates.step(state, gates.opening(obs))
    _, other = gates.step(state, -gates.opening(obs))
    np.testing.assert_array_equal(one.obs, other.obs)
    angles = []
    for _ in range(200):
        state, step = gates.step(state, jnp.zeros(2))
        angles.append(float(jnp.arctan2(step.obs[1], step.obs[0])))
    uniform = stats.kstest(angles, stats.uniform(-math.pi, 2 * math.pi).cdf)
    assert uniform.pvalue > 1e-3


def test_the_random_policys_return_in_closed_form():
    chance = 2 * math.pi * gates.OPENING**2 / 4
    expected = sum(chance**k for k in range(1, gates.SPEC.horizon + 1))
    minimum, maximum = reference.CLASSIC["gates"]
    assert minimum == pytest.approx(expected, abs=4 * 0.0035)
    assert maximum == gates.SPEC.horizon


def in_the_walls_frame(quality: str) -> np.ndarray:
    """Recorded actions, turned so that the openings lie on the first axis; `[N, 2]`."""
    data = classic.generate(f"classic/gates-{quality}-v0").episodes
    phi = 0.5 * np.arctan2(data.obs[:, 1], data.obs[:, 0])
    along = np.stack([np.cos(phi), np.sin(phi)], 1)
    across = np.stack([-np.sin(phi), np.cos(phi)], 1)
    return np.stack(
        [(data.action * along).sum(1), (data.action * across).sum(1)], 1
    ).astype(np.float64)


@pytest.mark.parametrize("quality", ["medium", "expert"])
def test_the_gaussian_of_largest_likelihood_hits_the_wall(quality: str):
    """Its chance of passing by a sum over the plane, against the data's own."""
    actions = in_the_walls_frame(quality)
    np.testing.assert_allclose(actions.mean(0), 0.0, atol=0.02)
    fit = stats.multivariate_normal(np.zeros(2), np.cov(actions.T))
    plane = np.stack(np.meshgrid(*2 * [np.linspace(-4.0, 4.0, 801)]), -1).reshape(-1, 2)
    # Actions are clipped to the square, which the openings' rims do not touch.
    chance = fit.pdf(plane)[free(0.0, plane)].sum() * 0.01**2
    assert chance < 0.5
    assert not free(0.0, np.zeros((1, 2)))[0], "its mode hits the wall, too"
    own = free(0.0, actions).mean()
    assert own > {"medium": 0.65, "expert": 0.99}[quality]
    # One mode of the two, which no symmetric loss would prefer, is as good as both.
    right = actions[actions[:, 0] > 0]
    mode = stats.multivariate_normal(right.mean(0), np.cov(right.T))
    assert mode.pdf(plane)[free(0.0, plane)].sum() * 0.01**2 > own - 0.02


@pytest.mark.parametrize("seed", range(5))
def test_every_continuous_choice_of_one_action_hits_a_wall(seed: int):
    """A closed curve of actions changes sides of the wall's middle line somewhere."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0.0, 2 * math.pi, 20_001)  # Of the observation: 2 phi.
    if seed == 0:
        # Stays with one opening as long as it can, and returns on the last percent.
        phi = np.interp(angle, [0.0, 1.98 * math.pi, 2 * math.pi], [0, 0.99, 0])
        phi = phi * math.pi
        curve = 0.7 * np.stack([np.cos(phi), np.sin(phi)], 1)
    else:
        waves = np.arange(6)
        cosines = rng.normal(size=(6, 2)) / (1 + waves[:, None])
        sines = rng.normal(size=(6, 2)) / (1 + waves[:, None])
        phase = angle[:, None] * waves
        curve = np.tanh(np.cos(phase) @ cosines + np.sin(phase) @ sines)
    np.testing.assert_allclose(curve[0], curve[-1], atol=1e-9)
    side = (curve * np.stack([np.cos(angle / 2), np.sin(angle / 2)], 1)).sum(1)
    assert side[0] * side[-1] <= 0
    crossing = np.flatnonzero(side[:-1] * side[1:] <= 0)
    assert crossing.size
    hit = PASSES(jnp.asarray(angle[crossing] / 2), jnp.asarray(curve[crossing]))
    assert not np.asarray(hit).any()
