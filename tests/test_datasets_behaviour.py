from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from offrl_jax.datasets import (
    behaviour,
    behaviour_dmsd,
    behaviour_gates,
    behaviour_pendulum,
    behaviour_point_maze,
    classic,
)
from offrl_jax.envs import dmsd, pendulum, point_maze

MODULES = {
    "pendulum": behaviour_pendulum,
    "point_maze": behaviour_point_maze,
    "gates": behaviour_gates,
    "dmsd": behaviour_dmsd,
}
KEY = jax.random.key(0)


def _knobs(module, **changes: float) -> dict[str, jax.Array]:
    """The defaults (each a single value) with changes."""
    defaults = dict(module.BEHAVIOUR.defaults)
    assert all(low == high for low, high in defaults.values())
    values = {name: low for name, (low, _) in defaults.items()} | changes
    return {name: jnp.float32(value) for name, value in values.items()}


@pytest.mark.parametrize("name", MODULES)
def test_every_quality_is_a_mixture_of_known_knobs(name: str) -> None:
    module = MODULES[name]
    assert tuple(module.MIXTURES) == classic.QUALITIES
    for mixture in module.MIXTURES.values():
        knobs = behaviour.draw_knobs(
            module.BEHAVIOUR, mixture, np.random.default_rng(0)
        )
        count = sum(component.episodes for component in mixture)
        assert set(knobs) == set(dict(module.BEHAVIOUR.defaults))
        for values in knobs.values():
            assert values.shape == (count,)
            assert values.dtype == np.float32
    for component in (module.REFERENCE_MINIMUM, module.REFERENCE_MAXIMUM):
        assert set(component) <= set(dict(module.BEHAVIOUR.defaults))


@pytest.mark.parametrize("name", MODULES)
def test_random_policies_are_uniform(name: str) -> None:
    """Actions of the reference of score 0, wherever it is: Kolmogorov-Smirnov."""
    module = MODULES[name]
    component = behaviour.Component(64, module.REFERENCE_MINIMUM)
    knobs = behaviour.draw_knobs(
        module.BEHAVIOUR, (component,), np.random.default_rng(0)
    )
    rows = behaviour.rollout(module.BEHAVIOUR, knobs, seed=5)
    for column in np.moveaxis(rows.action, -1, 0):
        found = stats.kstest(column.ravel(), stats.uniform(-1, 2).cdf)
        assert found.pvalue > 1e-3


def test_noise_is_gaussian_around_the_action_and_clipped() -> None:
    knobs = {"noise": jnp.float32(0.1), "epsilon": jnp.float32(0.0)}
    keys = jax.random.split(KEY, 4000)
    action = jnp.array([0.2, -0.3])
    found = jax.vmap(behaviour.with_noise, (0, None, None))(keys, knobs, action)
    error = np.asarray(found - action[None]) / 0.1
    assert stats.kstest(error.ravel(), "norm").pvalue > 1e-3
    # The two components get noise of their own.
    assert abs(np.corrcoef(error.T)[0, 1]) < 0.06
    far = behaviour.with_noise(KEY, knobs, jnp.array([5.0, -5.0]))
    assert far.tolist() == [1.0, -1.0]


def test_epsilon_is_the_share_of_random_actions() -> None:
    knobs = {"noise": jnp.float32(0.0), "epsilon": jnp.float32(0.3)}
    keys = jax.random.split(KEY, 4000)
    action = jnp.array([0.25])
    found = jax.vmap(behaviour.with_noise, (0, None, None))(keys, knobs, action)
    share = float(np.mean(np.asarray(found) != 0.25))
    assert share == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 4000))


def _pendulum_action(theta: float, velocity: float, **changes: float) -> float:
    obs = jnp.array([np.cos(theta), np.sin(theta), velocity], jnp.float32)
    knobs = _knobs(behaviour_pendulum, **changes)
    action, _ = behaviour_pendulum.act(KEY, knobs, (), obs)
    return float(action[0])


def test_pendulum_controller_by_hand() -> None:
    # Near the top: torque -(12 * 0.1 + 3 * 0.05) = -1.35, of at most 2.
    assert _pendulum_action(0.1, 0.05) == pytest.approx(-0.675, abs=1e-5)
    # Hanging: full torque along the motion; at rest, to one side.
    assert _pendulum_action(np.pi, 0.1) == 1.0
    assert _pendulum_action(np.pi, -0.1) == -1.0
    assert _pendulum_action(np.pi, 0.0) == 1.0
    assert _pendulum_action(np.pi, 0.1, strength=0.5) == 0.5
    # Too much energy is taken out: E = 64/6 + 5 cos(2) = 8.6 > 5.2.
    assert _pendulum_action(2.0, 8.0) == -1.0
    # bias is a torque: half of it in units of the action.
    assert _pendulum_action(0.0, 0.0, bias=0.4) == pytest.approx(0.2)


def test_pendulum_balance_is_stable() -> None:
    """Eigenvalues of the linearised closed loop of one step lie inside the circle."""
    knobs = dict(behaviour_pendulum.DEFAULTS)
    p, d = knobs["proportional"][0], knobs["derivative"][0]
    dt = pendulum.DT
    # v' = v + dt (15 theta + 3 u), theta' = theta + dt v', u = -(p theta + d v)
    theta_row = np.array([dt * (15 - 3 * p), 1 - 3 * dt * d])
    matrix = np.array([[1, 0] + dt * theta_row, theta_row])
    assert np.abs(np.linalg.eigvals(matrix)).max() < 1


def test_pendulum_expert_ends_upright() -> None:
    knobs = behaviour.draw_knobs(
        behaviour_pendulum.BEHAVIOUR,
        (behaviour.Component(128, behaviour_pendulum.REFERENCE_MAXIMUM),),
        np.random.default_rng(0),
    )
    rows = behaviour.rollout(behaviour_pendulum.BEHAVIOUR, knobs, seed=1)
    np.testing.assert_allclose(rows.next_obs[:, -1, 0], 1.0, atol=1e-3)
    np.testing.assert_allclose(rows.next_obs[:, -1, 2], 0.0, atol=1e-2)


def test_dmsd_feed_forward_holds_the_targets() -> None:
    target = np.array([0.9, -0.4], np.float32)
    obs = jnp.concatenate([jnp.asarray(target), jnp.zeros(2), jnp.asarray(target)])
    knobs = _knobs(behaviour_dmsd)
    action, memory = behaviour_dmsd.act(KEY, knobs, jnp.zeros(2), obs)
    # 4 * 0.9 + 2 * 0.4 and 4 * -0.4 - 2 * 0.9, over 30
    np.testing.assert_allclose(action, np.array([4.4, -3.4]) / 30, rtol=1e-5)
    np.testing.assert_array_equal(memory, [0, 0])
    state = dmsd.DMSDState(
        jnp.asarray(target), jnp.zeros(2), jnp.stack([target] * 2), jnp.int32(3)
    )
    after, _ = dmsd.step(state, action)
    np.testing.assert_allclose(after.v, [0, 0], atol=1e-7)


def test_dmsd_pid_by_hand() -> None:
    obs = jnp.array([0.1, 0.2, 0.3, -0.1, 0.4, 0.1], jnp.float32)
    knobs = _knobs(behaviour_dmsd, integral=2.0, offset=0.05, feed_forward=0.5)
    action, memory = behaviour_dmsd.act(KEY, knobs, jnp.array([0.5, -0.5]), obs)
    error = np.array([0.4 + 0.05 - 0.1, 0.1 - 0.05 - 0.2])
    total = np.array([0.5, -0.5]) + 0.2 * error
    hold = np.array([4 * 0.4 - 2 * 0.1, 4 * 0.1 - 2 * 0.4])
    force = 0.5 * hold + 20 * error + 2 * total - 15 * np.array([0.3, -0.1])
    np.testing.assert_allclose(memory, total, rtol=1e-5)
    np.testing.assert_allclose(action, np.clip(force / 30, -1, 1), rtol=1e-4)


def test_dmsd_inverse_controller_lands_on_a_near_target() -> None:
    """Within reach, position is exact two steps later (the force acts on velocity)."""
    x, v = jnp.array([0.30, -0.20]), jnp.array([0.02, 0.01])
    target = jnp.array([0.31, -0.205])
    state = dmsd.DMSDState(x, v, jnp.stack([target, target]), jnp.int32(0))
    knobs = _knobs(behaviour_dmsd, inverse=1.0)
    for _ in range(2):
        action, _ = behaviour_dmsd.act(KEY, knobs, jnp.zeros(2), dmsd.observe(state))
        assert np.abs(np.asarray(action)).max() < 1
        state, _ = dmsd.step(state, action)
    np.testing.assert_allclose(state.x, target, atol=1e-6)


def _maze_obs(i: int, j: int) -> jax.Array:
    return point_maze.reset_at(jnp.asarray(point_maze.cell_centre(i, j)))[1]


def test_maze_controller_turns_at_corners() -> None:
    goal = behaviour_point_maze.CELLS.index(point_maze.GOAL_CELL)
    knobs = _knobs(behaviour_point_maze)

    def action(i: int, j: int) -> list[float]:
        found, _ = behaviour_point_maze.act(
            KEY, knobs, jnp.int32(goal), _maze_obs(i, j)
        )
        return np.round(np.asarray(found), 4).tolist()

    # Of the loop's two ways the short one, along the top; then round to the right.
    assert action(1, 1) == [1.0, 0.0]
    assert action(1, 3) == [0.0, 1.0]
    assert action(3, 5) == [0.0, -1.0]
    assert action(1, 7) == [0.0, 1.0]
    assert action(*point_maze.GOAL_CELL) == [0.0, 0.0]


def test_maze_starts_follow_the_journey() -> None:
    keys = jax.random.split(KEY, 600)
    distance = behaviour_point_maze.DISTANCE
    for journey in (0.0, 1.0, 2.0):
        knobs = _knobs(behaviour_point_maze, journey=journey)
        state, obs, target = jax.vmap(behaviour_point_maze.start, (0, None))(
            keys, knobs
        )
        assert np.asarray(jax.vmap(point_maze.is_free)(state.position)).all()
        np.testing.assert_array_equal(obs, jax.vmap(point_maze.observe)(state))
        cells = {(int(y), int(x)) for x, y in np.asarray(state.position)}
        if journey == 0.0:
            assert cells == set(point_maze.START_CELLS)
            goal = behaviour_point_maze.CELLS.index(point_maze.GOAL_CELL)
            assert set(np.asarray(target).tolist()) == {goal}
            continue
        assert cells == set(point_maze.free_cells()) - {point_maze.GOAL_CELL}
        if journey == 1.0:
            here = [
                behaviour_point_maze.CELLS.index((int(y), int(x)))
                for x, y in np.asarray(state.position)
            ]
            gaps = distance[np.asarray(target), here]
            assert set(gaps.tolist()) == set(range(3, 9))


def test_only_pieces_are_cut_at_their_target() -> None:
    target = behaviour_point_maze.CELLS.index((3, 3))
    at, beside = _maze_obs(3, 3), _maze_obs(3, 4)
    for journey, cut in ((0.0, False), (1.0, True), (2.0, False)):
        knobs = _knobs(behaviour_point_maze, journey=journey)
        found = behaviour_point_maze.finished(knobs, jnp.int32(target), at)
        assert bool(found) is cut
        assert not behaviour_point_maze.finished(knobs, jnp.int32(target), beside)
