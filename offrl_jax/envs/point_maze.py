"""`classic/point_maze-v0`: push a point mass through a maze to a fixed goal.

A task of this suite's own, made for stitching: the goal lies 16 cells from the start,
the maze has a short and a long way round a loop, and data that only holds pieces of the
way must be put together.  The reward is 1 at the step that reaches the goal, which
terminates the episode, and 0 at every other step; episodes are cut off at 150 steps.

Geometry.  `LAYOUT` is drawn from above, one text line per row; cell `(i, j)` is row i,
column j, has side 1 and covers `x in [j, j + 1]`, `y in [i, i + 1]`.  A position is
`(x, y)`, so y grows downwards in the drawing.  `#` is wall, `S` a start cell, `G` the
goal cell, `.` free floor.  The body is a square of half-width `RADIUS`.

Dynamics, in cells and steps, for actions in [-1, 1]^2 (`MAX_SPEED` is 0.25):

  v' = 0.8 v + 0.05 a,    p' = p + v',

with p moved along x, then along y.  An axis whose move would push the body into a wall
stops at the wall, `SKIN` away, with velocity 0; the other axis slides on.  A step is
shorter than any wall is thick, so nothing tunnels.

For data generators: `free_cells`, `cell_centre`, `is_free`, and `reset_at` to start an
episode anywhere.  `PointMazeState` is public; reward and termination always refer to
the one `GOAL`, whatever a behaviour policy steers to.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.envs.base import PureEnv, TimeStep
from offrl_jax.types import Array, Key, Spec

NAME = "classic/point_maze-v0"
SPEC = Spec(obs_dim=4, action_dim=2, horizon=150)

LAYOUT = (
    "#########",
    "#S..#...#",
    "#S#.#.#.#",
    "#.#...#.#",
    "#.###.#.#",
    "#...#.#.#",
    "###.#.#.#",
    "###...#G#",
    "#########",
)
RADIUS = 0.1
SKIN = 1e-3
"""Left between body and wall at contact: far above the rounding of float32 here."""
FRICTION = 0.8
GAIN = 0.05
MAX_SPEED = GAIN / (1.0 - FRICTION)
GOAL_RADIUS = 0.5

_WALL = np.array([[cell == "#" for cell in row] for row in LAYOUT])
_CENTRE = np.array([_WALL.shape[1], _WALL.shape[0]], np.float32) / 2.0


def _cells(kinds: str) -> tuple[tuple[int, int], ...]:
    return tuple(
        (i, j)
        for i, row in enumerate(LAYOUT)
        for j, cell in enumerate(row)
        if cell in kinds
    )


def free_cells() -> tuple[tuple[int, int], ...]:
    """All cells `(i, j)` that are not wall, row by row."""
    return _cells("S.G")


def cell_centre(i: int, j: int) -> np.ndarray:
    """The position `(x, y)`, float32 `[2]`, of the centre of cell `(i, j)`."""
    return np.array([j + 0.5, i + 0.5], np.float32)


START_CELLS = _cells("S")
GOAL_CELL = _cells("G")[0]
GOAL = cell_centre(*GOAL_CELL)


class PointMazeState(NamedTuple):
    """The mass and the clock.

    Attributes:
      position: `[2]`, (x, y) in cells.
      velocity: `[2]`, cells per step.
      t: `[]`, int32, steps taken.
    """

    position: Array
    velocity: Array
    t: Array


def _is_wall(x: Array, y: Array) -> Array:
    row, column = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
    # Out of range reads as the border, which is wall.
    return jnp.asarray(_WALL).at[row, column].get(mode="fill", fill_value=True)


def is_free(position: Array) -> Array:
    """Whether the body at `position` `[2]` touches no wall; bool `[]`."""
    # The body is smaller than a cell, so its four corners see every cell it touches.
    corners = [
        _is_wall(position[0] + dx, position[1] + dy)
        for dx in (-RADIUS, RADIUS)
        for dy in (-RADIUS, RADIUS)
    ]
    return ~jnp.any(jnp.stack(corners))


def observe(state: PointMazeState) -> Array:
    """The observation `[4]` in [-1, 1]: position from the maze's centre, velocity."""
    return jnp.concatenate(
        [(state.position - _CENTRE) / _CENTRE, state.velocity / MAX_SPEED]
    )


def reset_at(
    position: Array, velocity: Array | None = None
) -> tuple[PointMazeState, Array]:
    """Starts an episode at `position` `[2]`, which must satisfy `is_free`.

    Args:
      position: `[2]`, (x, y).
      velocity: `[2]`, at rest if not given.

    Returns:
      The state and its observation `[4]`.
    """
    start = jnp.asarray(position, jnp.float32)
    speed = jnp.zeros_like(start) if velocity is None else velocity
    state = PointMazeState(start, speed, jnp.zeros((), jnp.int32))
    return state, observe(state)


def reset(key: Key) -> tuple[PointMazeState, Array]:
    """Starts at rest, uniformly over the free positions of the start cells."""
    k_cell, k_offset = jax.random.split(key)
    centres = jnp.asarray(np.stack([cell_centre(*cell) for cell in START_CELLS]))
    cell = jax.random.randint(k_cell, (), 0, len(START_CELLS))
    room = 0.5 - RADIUS - SKIN
    offset = jax.random.uniform(k_offset, (2,), minval=-room, maxval=room)
    return reset_at(centres[cell] + offset)


def _slide(
    along: Array, move: Array, across: Array, vertical: bool
) -> tuple[Array, Array]:
    """Moves one coordinate, at most to the wall: where it comes to, whether it hit."""
    direction = jnp.sign(move)
    front = along + move + direction * RADIUS
    sides = (across - RADIUS, across + RADIUS)
    hits = [_is_wall(s, front) if vertical else _is_wall(front, s) for s in sides]
    near_face = jnp.floor(front) + jnp.where(direction > 0, 0.0, 1.0)
    stop = near_face - direction * (RADIUS + SKIN)
    blocked = jnp.any(jnp.stack(hits)) & (move != 0)
    return jnp.where(blocked, stop, along + move), blocked


def step(state: PointMazeState, action: Array) -> tuple[PointMazeState, TimeStep]:
    """One step under `action` `[2]`, clipped to [-1, 1]."""
    push = GAIN * jnp.clip(action, -1.0, 1.0)
    wanted = FRICTION * state.velocity + push
    x, hit_x = _slide(state.position[0], wanted[0], state.position[1], vertical=False)
    y, hit_y = _slide(state.position[1], wanted[1], x, vertical=True)
    velocity = jnp.where(jnp.stack([hit_x, hit_y]), 0.0, wanted)
    new = PointMazeState(jnp.stack([x, y]), velocity, state.t + 1)
    reached = jnp.sum((new.position - GOAL) ** 2) <= GOAL_RADIUS**2
    return new, TimeStep(
        obs=observe(new),
        reward=reached.astype(jnp.float32),
        terminated=reached,
        truncated=new.t >= SPEC.horizon,
        success=reached,
    )


def make() -> PureEnv:
    """The environment as a pair of pure functions."""
    return PureEnv(NAME, SPEC, reset, step, has_success=True)
