"""Behaviour for `classic/point_maze-v0`: breadth-first waypoints and a PD controller.

The maze is made for stitching.  `medium` holds only pieces: episodes between two cells
at most `MAX_PIECE` cells apart, while the goal lies 16 cells from the start, so that no
episode shows the way.  The recording of a piece is cut (`truncated`) where its own
target is reached; only the task's goal terminates.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.datasets.behaviour import Behaviour, Component, Knobs, with_noise
from offrl_jax.envs import point_maze
from offrl_jax.types import Array, Key

_ENV = point_maze.make()
MIN_PIECE, MAX_PIECE = 3, 8
"""Length of a piece in cells."""
ARRIVED = 0.3
"""Distance from a piece's target at which its recording is cut."""

CELLS = point_maze.free_cells()
CENTRES = np.stack([point_maze.cell_centre(*cell) for cell in CELLS])
_ROWS, _COLUMNS = len(point_maze.LAYOUT), len(point_maze.LAYOUT[0])
_HALF = np.array([_COLUMNS, _ROWS], np.float32) / 2.0
_GOAL = CELLS.index(point_maze.GOAL_CELL)

DEFAULTS = {
    # 0: from the start to the goal; 1: a piece; 2: from anywhere, without a target.
    "journey": (0.0, 0.0),
    "proportional": (4.0, 4.0),
    "derivative": (4.0, 4.0),
    "noise": (0.0, 0.0),
    "epsilon": (0.0, 0.0),
}


def distances_and_next() -> tuple[np.ndarray, np.ndarray]:
    """Breadth-first search from every cell.

    Returns:
      `distance [C, C]` int32, steps from cell c to target g as `distance[g, c]`; and
      `towards [C, C]` int32, the neighbour of c on a shortest way to g (g at g).
    """
    index = {cell: i for i, cell in enumerate(CELLS)}
    count = len(CELLS)
    distance = np.full((count, count), -1, np.int32)
    towards = np.tile(np.arange(count, dtype=np.int32)[:, None], (1, count))
    for target in range(count):
        distance[target, target] = 0
        queue = deque([target])
        while queue:
            here = queue.popleft()
            i, j = CELLS[here]
            for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                there = index.get(cell)
                if there is not None and distance[target, there] < 0:
                    distance[target, there] = distance[target, here] + 1
                    towards[target, there] = here
                    queue.append(there)
    return distance, towards


DISTANCE, _TOWARDS = distances_and_next()
_CELL_AT = np.zeros((_ROWS, _COLUMNS), np.int32)
for _number, (_i, _j) in enumerate(CELLS):
    _CELL_AT[_i, _j] = _number
_PIECE = (DISTANCE >= MIN_PIECE) & (DISTANCE <= MAX_PIECE)
# Pieces and walks begin outside of the goal's cell, where there would be nothing to do.
_MAY_START = np.arange(len(CELLS)) != _GOAL


def start(key: Key, knobs: Knobs) -> tuple[Any, Array, Any]:
    """Starts where the journey does; the memory is the number of the target cell."""
    k_own, k_cell, k_offset, k_target = jax.random.split(key, 4)
    own_state, own_obs = _ENV.reset(k_own)
    weights = jnp.log(jnp.asarray(_MAY_START, jnp.float32))
    cell = jax.random.categorical(k_cell, weights)
    room = 0.5 - 2.0 * point_maze.RADIUS
    offset = jax.random.uniform(k_offset, (2,), minval=-room, maxval=room)
    state, obs = point_maze.reset_at(jnp.asarray(CENTRES)[cell] + offset)
    own = knobs["journey"] < 0.5
    reachable = jnp.log(jnp.asarray(_PIECE, jnp.float32))[:, cell]
    target = jnp.where(own, _GOAL, jax.random.categorical(k_target, reachable))
    choose = lambda a, b: jnp.where(own, a, b)  # noqa: E731
    return (
        jax.tree.map(choose, own_state, state),
        choose(own_obs, obs),
        target.astype(jnp.int32),
    )


def _position(obs: Array) -> Array:
    return obs[:2] * jnp.asarray(_HALF) + jnp.asarray(_HALF)


def act(key: Key, knobs: Knobs, memory: Any, obs: Array) -> tuple[Array, Any]:
    """Steers to the centre of the next cell on the shortest way to the target."""
    position = _position(obs)
    velocity = obs[2:] * point_maze.MAX_SPEED
    column, row = jnp.floor(position).astype(jnp.int32)
    here = jnp.asarray(_CELL_AT)[row, column]
    waypoint = jnp.asarray(CENTRES)[jnp.asarray(_TOWARDS)[memory, here]]
    error = waypoint - position
    action = knobs["proportional"] * error - knobs["derivative"] * velocity
    return with_noise(key, knobs, jnp.clip(action, -1.0, 1.0)), memory


def finished(knobs: Knobs, memory: Any, obs: Array) -> Array:
    """A piece is cut where it arrives at its own target."""
    gap = _position(obs) - jnp.asarray(CENTRES)[memory]
    arrived = jnp.sum(gap**2) <= ARRIVED**2
    return arrived & (jnp.abs(knobs["journey"] - 1.0) < 0.5)


BEHAVIOUR = Behaviour(_ENV, start, act, finished, tuple(DEFAULTS.items()))

_WALK = {"journey": (2.0, 2.0), "epsilon": (1.0, 1.0)}
_PIECES = {
    "journey": (1.0, 1.0),
    "proportional": (1.0, 4.0),
    "noise": (0.1, 0.5),
    "epsilon": (0.0, 0.3),
}
# Sets out for the goal, but acts at random most of the time: arrives seldom in time.
_STRAY = {"epsilon": (0.5, 0.9), "noise": (0.3, 0.6)}

MIXTURES = {
    "random": (Component(400, _WALK),),
    "medium": (Component(1500, _PIECES),),
    "mixed": (Component(140, _WALK), Component(750, _PIECES), Component(80, _STRAY)),
    "expert": (Component(700, {"noise": (0.1, 0.1)}),),
}

REFERENCE_MINIMUM = {"epsilon": (1.0, 1.0)}
REFERENCE_MAXIMUM: dict[str, tuple[float, float]] = {}
