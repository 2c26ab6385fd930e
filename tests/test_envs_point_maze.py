"""The point maze against brute force: geometry, collisions, reachability."""

from __future__ import annotations

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offrl_jax.envs import point_maze as maze


def touches_wall(position: np.ndarray) -> np.ndarray:
    """Whether the body's square overlaps any wall cell, by trying every one."""
    x, y = np.moveaxis(np.asarray(position, np.float64), -1, 0)
    inside = np.zeros(x.shape, bool)
    for i, row in enumerate(maze.LAYOUT):
        for j, cell in enumerate(row):
            if cell == "#":
                inside |= (
                    (x + maze.RADIUS > j)
                    & (x - maze.RADIUS < j + 1)
                    & (y + maze.RADIUS > i)
                    & (y - maze.RADIUS < i + 1)
                )
    height, width = len(maze.LAYOUT), len(maze.LAYOUT[0])
    return inside | (x < 0) | (y < 0) | (x > width) | (y > height)


def cell_of(position) -> tuple[int, int]:
    return int(np.floor(position[1])), int(np.floor(position[0]))


def distances_from(goal: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Steps of a breadth-first search from the goal cell over the free cells."""
    free, found, queue = set(maze.free_cells()), {goal: 0}, deque([goal])
    while queue:
        i, j = queue.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if cell in free and cell not in found:
                found[cell] = found[(i, j)] + 1
                queue.append(cell)
    return found


@jax.jit
def run_many(keys: jax.Array):
    """Starts anywhere free, at any speed, under persistent random pushes."""
    centres = jnp.asarray(np.stack([maze.cell_centre(*c) for c in maze.free_cells()]))

    def episode(key):
        k_cell, k_offset, k_speed, k_action = jax.random.split(key, 4)
        cell = jax.random.randint(k_cell, (), 0, len(centres))
        offset = jax.random.uniform(k_offset, (2,), minval=-0.39, maxval=0.39)
        speed = maze.MAX_SPEED * jax.random.uniform(k_speed, (2,), minval=-1.0)
        state, _ = maze.reset_at(centres[cell] + offset, speed)
        # Pushes last ten steps, mostly at full strength, so that walls are hit hard.
        pushes = 3.0 * jax.random.normal(k_action, (15, 2))
        actions = jnp.repeat(pushes, 10, axis=0)

        def body(state, action):
            new, step = maze.step(state, action)
            return new, (state, new, step)

        return jax.lax.scan(body, state, actions)[1]

    return jax.vmap(episode)(keys)


@pytest.fixture(scope="module")
def many():
    return jax.device_get(run_many(jax.random.split(jax.random.key(0), 1500)))


def test_layout_is_closed_and_connected():
    rows = maze.LAYOUT
    assert len({len(row) for row in rows}) == 1
    assert set(rows[0]) == set(rows[-1]) == {"#"}
    assert all(row[0] == row[-1] == "#" for row in rows)
    found = distances_from(maze.GOAL_CELL)
    assert set(found) == set(maze.free_cells())
    # The start lies far from the goal; the documented distance is that of the nearest.
    assert min(found[cell] for cell in maze.START_CELLS) == 16


def test_free_cells_and_centres_agree_with_the_drawing():
    drawn = [
        (i, j)
        for i, row in enumerate(maze.LAYOUT)
        for j, cell in enumerate(row)
        if cell != "#"
    ]
    assert list(maze.free_cells()) == drawn
    for i, j in drawn:
        centre = maze.cell_centre(i, j)
        assert cell_of(centre) == (i, j)
        assert bool(maze.is_free(jnp.asarray(centre)))
    np.testing.assert_array_equal(maze.GOAL, maze.cell_centre(*maze.GOAL_CELL))


def test_is_free_against_brute_force():
    rng = np.random.default_rng(0)
    points = rng.uniform(-1.0, 10.0, (20_000, 2)).astype(np.float32)
    free = jax.jit(jax.vmap(maze.is_free))(jnp.asarray(points))
    np.testing.assert_array_equal(free, ~touches_wall(points))


def test_no_position_is_ever_inside_a_wall(many):
    _, new, _ = many
    assert not touches_wall(new.position).any()


def test_paths_between_steps_cross_no_wall(many):
    """x moves first, then y; neither leg passes through a wall (no tunnelling)."""
    old, new, _ = many
    corner = np.stack([new.position[..., 0], old.position[..., 1]], axis=-1)
    for part in np.linspace(0.0, 1.0, 6):
        assert not touches_wall(old.position + part * (corner - old.position)).any()
        assert not touches_wall(corner + part * (new.position - corner)).any()


def test_free_moves_follow_the_formula_and_contacts_stop_at_the_wall(many):
    old, new, _ = many
    hit = new.velocity == 0.0
    assert hit.mean() > 0.05  # The trial does exercise contacts.
    move = new.position - old.position
    np.testing.assert_allclose(move[~hit], new.velocity[~hit], atol=2e-6)
    # A blocked coordinate ends one skin and one radius from a cell's face.
    gap = np.abs(new.position[hit] - np.round(new.position[hit]))
    np.testing.assert_allclose(gap, maze.RADIUS + maze.SKIN, atol=2e-6)
    assert np.abs(new.velocity).max() <= maze.MAX_SPEED * (1 + 1e-6)


def test_velocity_by_hand():
    state, _ = maze.reset_at(jnp.array([1.5, 1.5]), jnp.array([0.1, 0.0]))
    new, step = maze.step(state, jnp.array([1.0, -0.5]))
    np.testing.assert_allclose(new.velocity, [0.8 * 0.1 + 0.05, -0.025], rtol=1e-6)
    np.testing.assert_allclose(new.position, [1.63, 1.475], rtol=1e-6)
    np.testing.assert_allclose(
        step.obs, [(1.63 - 4.5) / 4.5, (1.475 - 4.5) / 4.5, 0.52, -0.1], rtol=1e-5
    )


def test_body_slides_along_a_wall():
    """Pushed right and down in the first corridor, it is stopped right, not down."""
    state, _ = maze.reset_at(jnp.array([1.5, 2.5]))
    step = jax.jit(maze.step)
    for _ in range(10):
        state, _ = step(state, jnp.array([1.0, 1.0]))
    assert float(state.position[0]) == pytest.approx(2 - maze.RADIUS - maze.SKIN)
    assert float(state.velocity[0]) == 0.0
    assert float(state.position[1]) > 3.5


def test_reward_success_and_termination_are_one_event(many):
    _, new, step = many
    reached = np.linalg.norm(new.position - maze.GOAL, axis=-1) <= maze.GOAL_RADIUS
    assert reached.any() and not reached.all()
    np.testing.assert_array_equal(step.terminated, reached)
    np.testing.assert_array_equal(step.success, reached)
    np.testing.assert_array_equal(step.reward, reached.astype(np.float32))
    np.testing.assert_array_equal(step.truncated, new.t >= 150)


def test_starts_are_at_rest_in_every_start_cell():
    state, obs = jax.vmap(maze.reset)(jax.random.split(jax.random.key(1), 1000))
    assert {cell_of(p) for p in np.asarray(state.position)} == set(maze.START_CELLS)
    assert not touches_wall(state.position).any()
    assert np.abs(obs).max() <= 1.0 and not np.asarray(state.velocity).any()


@pytest.mark.parametrize("start", maze.START_CELLS)
def test_a_waypoint_controller_reaches_the_goal_in_time(start):
    """The task is solvable within the horizon, by walking down the distances."""
    found = distances_from(maze.GOAL_CELL)
    state, _ = maze.reset_at(jnp.asarray(maze.cell_centre(*start)))
    step, cell = jax.jit(maze.step), start
    for _ in range(maze.SPEC.horizon):
        position, velocity = np.asarray(state.position), np.asarray(state.velocity)
        if np.linalg.norm(position - maze.cell_centre(*cell)) < 0.3 and found[cell]:
            cell = min(
                (c for c in found if abs(c[0] - cell[0]) + abs(c[1] - cell[1]) == 1),
                key=found.__getitem__,
            )
        action = 4.0 * (maze.cell_centre(*cell) - position) - 6.0 * velocity
        state, got = step(state, jnp.asarray(action))
        if bool(got.terminated):
            break
    assert bool(got.success) and float(got.reward) == 1.0
    assert 60 < int(state.t) < 110
