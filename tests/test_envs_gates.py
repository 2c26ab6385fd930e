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

STEP = jax.jit(jax.vmap(gates.step, (None, 0)))
PLANE = np.stack(np.meshgrid(*2 * [np.linspace(-3.0, 3.0, 601)]), -1).reshape(-1, 2)
CELL = 0.01**2


def disc(phi: float, action: np.ndarray) -> np.ndarray:
    """Whether the points `[n, 2]` lie in the opening in direction phi, in float64."""
    centre = gates.DISTANCE * np.array([math.cos(phi), math.sin(phi)])
    return np.linalg.norm(np.clip(action, -1, 1) - centre, axis=1) <= gates.OPENING


def at(phi: float, t: int = 0) -> gates.GatesState:
    return gates.GatesState(jax.random.key(1), jnp.float32(phi), jnp.int32(t))


@pytest.mark.parametrize("phi", [0.0, 0.4, 1.9, 5.1])
def test_every_point_of_a_wall(phi: float):
    """Clear, glass or wall, and where each of them leads."""
    points = PLANE[::7]
    after, step = STEP(at(phi), jnp.asarray(points, jnp.float32))
    clear, glass = disc(phi, points), disc(phi + math.pi, points)
    rim = np.zeros(len(points), bool)  # Rounding decides there.
    for side in (phi, phi + math.pi):
        centre = gates.DISTANCE * np.array([math.cos(side), math.sin(side)])
        gap = np.linalg.norm(np.clip(points, -1, 1) - centre, axis=1) - gates.OPENING
        rim |= np.abs(gap) < 1e-5
    inside = ~rim
    np.testing.assert_array_equal(np.asarray(step.reward)[inside], clear[inside])
    ended = np.asarray(step.terminated)
    np.testing.assert_array_equal(ended[inside], ~(clear | glass)[inside])
    # The same wall again against the glass, another one beyond the clear opening.
    same = np.asarray(after.phi) == np.float32(phi)
    assert same[glass & inside].all() and not same[clear & inside].any()
    assert not np.asarray(step.truncated).any()
    last = gates.step(at(phi, gates.SPEC.horizon - 1), jnp.zeros(2))[1]
    assert last.truncated and last.terminated


def test_half_a_turn_of_the_wall_is_not_seen():
    phi = jnp.linspace(0.0, math.pi, 50, endpoint=False)
    observe = jax.vmap(gates.observe)
    np.testing.assert_allclose(observe(phi), observe(phi + math.pi), atol=1e-6)
    centres = jax.vmap(gates.opening)(observe(phi))
    within = jax.vmap(gates.within)
    np.testing.assert_array_equal(within(phi, centres), within(phi + math.pi, -centres))
    assert (within(phi, centres) | within(phi, -centres)).all()
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 0.7, rtol=1e-5)


def test_walls_are_drawn_uniformly_whatever_was_done():
    first, _ = gates.reset(jax.random.key(0))
    clear = gates.centre(first.phi)
    ahead, _ = gates.step(first, clear)
    again, _ = gates.step(first, clear * 0.9)
    assert ahead.phi == again.phi != first.phi
    angles = []
    state = first
    for _ in range(200):
        state, _ = gates.step(state, gates.centre(state.phi))
        angles.append(float(state.phi))
    uniform = stats.kstest(angles, stats.uniform(0.0, 2 * math.pi).cdf)
    assert uniform.pvalue > 1e-3


def expected_return(one: float, other: float, steps: int = gates.SPEC.horizon) -> float:
    """Of a policy that meets the openings with these chances, by backward induction.

    At every new wall either opening is the clear one, with probability 1/2.
    """
    value = np.zeros(2)  # With the first, with the second opening clear.
    for _ in range(steps):
        fresh = 1.0 + value.mean()
        value = np.array(
            [one * fresh + other * value[0], other * fresh + one * value[1]]
        )
    return float(value.mean())


def test_references_in_closed_form():
    chance = math.pi * gates.OPENING**2 / 4
    minimum, maximum = reference.CLASSIC["gates"]
    assert minimum == pytest.approx(expected_return(chance, chance), abs=4 * 0.0025)
    assert expected_return(0.5, 0.5) == pytest.approx(10.0)
    assert maximum == pytest.approx(10.0, abs=4 * 0.025)
    # Always the same opening: one wall on average, and then the glass.
    assert expected_return(1.0, 0.0) == pytest.approx(1.0, abs=1e-5)


def test_no_gaussian_passes_more_than_one_wall():
    """Every mean on the axis through the openings, every spread along and across it.

    A mean beside the axis is no better by symmetry, and a tilted Gaussian meets the
    discs less often than one along their axis.
    """
    spreads = [0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5]
    axis = np.linspace(-3.0, 3.0, 601)
    clear, glass = (disc(side, PLANE).reshape(601, 601) for side in (0.0, math.pi))

    def densities(mean: float) -> np.ndarray:
        return np.stack([stats.norm.pdf(axis, mean, spread) for spread in spreads])

    best = 0.0
    for mean in np.linspace(0.0, 0.9, 19):
        # Rows of PLANE are the second axis; every pair of spreads at once.
        one, other = (
            densities(0.0) @ opening @ densities(mean).T * CELL
            for opening in (clear, glass)
        )
        pairs = zip(one.ravel(), other.ravel(), strict=True)
        best = max(best, *(expected_return(*pair) for pair in pairs))
    assert 0.98 < best < 1.01


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
def test_the_data_use_both_openings_and_their_gaussian_hits_the_wall(quality: str):
    actions = in_the_walls_frame(quality)
    own = [disc(side, actions).mean() for side in (0.0, math.pi)]
    assert own[0] == pytest.approx(own[1], abs=0.01)
    assert sum(own) > {"medium": 0.65, "expert": 0.99}[quality]
    fit = stats.multivariate_normal(actions.mean(0), np.cov(actions.T))
    likeliest = [fit.pdf(PLANE)[disc(s, PLANE)].sum() * CELL for s in (0.0, math.pi)]
    assert sum(likeliest) < 0.5
    assert expected_return(*likeliest) < 0.3 * expected_return(*own)
