"""One trajectory of OGBench's data, by the procedure of its authors.

The package `ogbench` holds environments and scripted oracles, but not the scripts that
collected the data; what they do is written here anew, from their description:

- `navigate`: a point starts in any free cell of the maze and walks, cell by cell along
  a shortest way, to goals that are drawn one after the other among the cells that are
  no mere corridor;
- `stitch`: one short walk to a cell that is four cells away;
- `play`: the package's plan oracles carry out one random task after the other.

Actions of the point carry Gaussian noise, plans of the arm smoothed noise.  All
randomness comes from one `SeedSequence`, so a trajectory depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from offrl_jax.datasets.ogbench import DATASETS, Raw
from offrl_jax.envs.ogbench import Simulator, begin, global_numpy_seed
from offrl_jax.errors import DataError

ACTION_NOISE = 0.5
"""Standard deviation of the noise on a point's action, a direction of length 1."""
STITCH_CELLS = 4
"""Cells between start and goal of a walk of `stitch`, by the shortest way."""
PLAN_NOISE, PLAN_SMOOTHING = 0.1, 0.5
"""Level and smoothing of the noise on the arm's plans, arguments of the oracles."""
CUBE_RIGHT, CUBE_LEFT, DRAWER_FLOOR = 0.29, -0.3, (0.06, 0.08)
"""In the scene a cube beyond `CUBE_RIGHT`, or beyond `CUBE_LEFT` at heights other than
those on the drawer's floor, is out of sight: the trajectory is drawn anew. Metres."""
ATTEMPTS = 100

Cell = tuple[int, int]


def constants(name: str) -> dict[str, Any]:
    """What the procedure of a dataset is fixed by, JSON types only."""
    if DATASETS[name].kind == "play":
        found: dict[str, Any] = {
            "plan_noise": PLAN_NOISE,
            "plan_smoothing": PLAN_SMOOTHING,
        }
        if DATASETS[name].environment == "scene":
            found["cube_in_sight"] = [CUBE_RIGHT, CUBE_LEFT, *DRAWER_FLOOR]
        return found
    found = {"action_noise": ACTION_NOISE}
    if DATASETS[name].kind == "stitch":
        found["cells_to_goal"] = STITCH_CELLS
    return found


def make_simulator(name: str) -> Simulator:
    """The environment that a dataset is collected in; see `Simulator` for errors."""
    environment = DATASETS[name].environment
    if DATASETS[name].kind == "play":
        return Simulator(
            f"{environment}-v0", terminate_at_goal=False, mode="data_collection"
        )
    return Simulator(f"{environment}-v0", terminate_at_goal=False)


def trajectory(
    simulator: Simulator, name: str, rows: int, entropy: tuple[int, ...]
) -> Raw:
    """One trajectory of `rows` rows.

    Args:
      simulator: made by `make_simulator(name)`; left as it was.
      name: a key of `DATASETS`.
      rows: R, at least 2.
      entropy: all that the trajectory depends on besides.

    Raises:
      DataError: the cube of the scene was out of sight in `ATTEMPTS` trajectories.
    """
    play = DATASETS[name].kind == "play"
    for attempt in range(ATTEMPTS):
        sequence = np.random.SeedSequence([*entropy, attempt])
        if not play:
            return _walk(simulator, name, rows, sequence)
        raw = _play(simulator, name, rows, sequence)
        if DATASETS[name].environment != "scene" or cube_in_sight(raw.qpos[:, 14:17]):
            return raw
    raise DataError(
        f"{name}: the cube left the scene in {ATTEMPTS} trajectories on end; choose "
        "another seed"
    )


class _Recorder:
    """Rows of a trajectory as they come."""

    def __init__(self) -> None:
        self._rows: list[tuple[np.ndarray, ...]] = []

    def add(self, obs: np.ndarray, action: np.ndarray, info: dict[str, Any]) -> None:
        """A row: the state before the step that `info` is of, and the action."""
        buttons = info.get("prev_button_states", np.zeros(0, np.int64))
        self._rows.append((obs, action, info["prev_qpos"], buttons.copy()))

    def done(self) -> Raw:
        """The rows, in the types of the authors' files."""
        obs, action, qpos, buttons = (
            np.stack(part) for part in zip(*self._rows, strict=True)
        )
        terminals = np.zeros(len(obs), bool)
        terminals[-1] = True
        return Raw(
            observations=obs.astype(np.float32),
            actions=action.astype(np.float32),
            terminals=terminals,
            qpos=qpos.astype(np.float32),
            button_states=buttons.astype(np.int64),
        )


def free_cells(maze: np.ndarray) -> list[Cell]:
    """Cells without a wall, row by row."""
    return [(int(i), int(j)) for i, j in np.argwhere(maze == 0)]


def junctions(maze: np.ndarray) -> list[Cell]:
    """Free cells that are no mere corridor, open to two opposite sides alone."""

    def is_corridor(i: int, j: int) -> bool:
        vertical = (maze[i - 1, j], maze[i + 1, j])
        horizontal = (maze[i, j - 1], maze[i, j + 1])
        ways = {(0, 0, 1, 1), (1, 1, 0, 0)}
        return (*vertical, *horizontal) in ways

    return [cell for cell in free_cells(maze) if not is_corridor(*cell)]


def cells_at_distance(maze: np.ndarray, start: Cell, distance: int) -> list[Cell]:
    """Free cells so many steps from `start`, by shortest ways; sorted."""
    reached, border = {start}, {start}
    for _ in range(distance):
        around = {
            (i + di, j + dj)
            for i, j in border
            for di, dj in ((-1, 0), (1, 0), (0, -1), (0, 1))
            if maze[i + di, j + dj] == 0
        }
        border = around - reached
        reached |= border
    return sorted(border)


def _walk(
    simulator: Simulator, name: str, rows: int, sequence: np.random.SeedSequence
) -> Raw:
    """A trajectory of `navigate` or `stitch`."""
    first, second = (int(word) for word in sequence.generate_state(2))
    rng = np.random.default_rng(sequence)
    env = simulator.spawn()
    maze = env.maze_map
    cells, targets = free_cells(maze), junctions(maze)
    start = cells[rng.integers(len(cells))]
    if DATASETS[name].kind == "stitch":
        # Where no cell is that far, any goal will do.
        targets = cells_at_distance(maze, start, STITCH_CELLS) or cells
    goal = targets[rng.integers(len(targets))]
    obs, _ = begin(env, first, {"task_info": {"init_ij": start, "goal_ij": goal}})
    next_cell = _way(env)
    recorder = _Recorder()
    # Goals that are drawn on the way get noise from NumPy's global generator.
    with global_numpy_seed(second):
        for _ in range(rows):
            towards = next_cell(env.get_xy(), env.cur_goal_xy) - env.get_xy()
            direction = towards / (np.linalg.norm(towards) + 1e-6)
            noise = rng.normal(0.0, ACTION_NOISE, 2)
            action = np.clip(direction + noise, -1.0, 1.0)
            after, _, _, _, info = env.step(action)
            recorder.add(obs, action, info)
            obs = after
            if info["success"] and DATASETS[name].kind == "navigate":
                goal = targets[rng.integers(len(targets))]
                env.set_goal(goal_xy=env.add_noise(env.ij_to_xy(goal)))
    return recorder.done()


def _way(env: Any) -> Callable[[np.ndarray, Any], np.ndarray]:
    """The package's next subgoal, searched once per pair of cells: it knows no more."""
    known: dict[tuple[Cell, Cell], np.ndarray] = {}

    def next_cell(place: np.ndarray, goal: Any) -> np.ndarray:
        pair = env.xy_to_ij(place), env.xy_to_ij(goal)
        if pair not in known:
            known[pair] = env.get_oracle_subgoal(place, goal)[0]
        return known[pair]

    return next_cell


def _oracles(env: Any, environment: str) -> dict[str, Any]:
    """The package's plan oracles of an environment, by the task that they do."""
    from ogbench.manipspace.oracles.plan import (  # pyright: ignore
        button_plan,
        cube_plan,
        drawer_plan,
        window_plan,
    )

    noise: dict[str, Any] = {"noise": PLAN_NOISE, "noise_smoothing": PLAN_SMOOTHING}
    if environment == "puzzle-3x3":
        press = button_plan.ButtonPlanOracle(True, env, **noise)  # always closed
        return {"button": press}
    cube = cube_plan.CubePlanOracle(env, **noise)
    if environment == "cube-single":
        return {"cube": cube}
    return {
        "cube": cube,
        "button": button_plan.ButtonPlanOracle(False, env, **noise),
        "drawer": drawer_plan.DrawerPlanOracle(env, **noise),
        "window": window_plan.WindowPlanOracle(env, **noise),
    }


def _play(
    simulator: Simulator, name: str, rows: int, sequence: np.random.SeedSequence
) -> Raw:
    """A trajectory of `play`: whenever a task is done, the next one is drawn."""
    first, second = (int(word) for word in sequence.generate_state(2))
    env = simulator.spawn()
    oracles = _oracles(env, DATASETS[name].environment)
    obs, info = begin(env, first)
    recorder = _Recorder()
    # Plans are drawn from NumPy's global generator.
    with global_numpy_seed(second):
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        for _ in range(rows):
            action = np.clip(oracle.select_action(obs, info), -1.0, 1.0)
            after, _, _, _, info = env.step(action)
            if oracle.done:
                # There is a single cube: with none to be put on, none is stacked.
                task_obs, task = env.set_new_target(p_stack=0.0)
                oracle = oracles[task["privileged/target_task"]]
                oracle.reset(task_obs, task)
            recorder.add(obs, action, info)
            obs = after
    return recorder.done()


def cube_in_sight(places: np.ndarray) -> bool:
    """Whether the scene's cube stays where a camera sees it; `places` `[R, 3]`."""
    y, z = places[:, 1], places[:, 2]
    low, high = DRAWER_FLOOR
    hidden = (y >= CUBE_RIGHT) | ((y <= CUBE_LEFT) & ((z < low) | (z > high)))
    return not hidden.any()
