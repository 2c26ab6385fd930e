"""Gymnasium's MuJoCo tasks, many episodes at once, bit for bit.

A step hands each worker of a thread pool a contiguous slice of the active episodes; the
bindings release the interpreter's lock inside `mj_step`, so the workers run in
parallel.  Rewards, terminations and observations are then computed for the whole batch
in NumPy, operation by operation in the order and precision of Gymnasium's v5
environments: for equal seeds and actions all of them are Gymnasium's, bit for bit.
(`mujoco.rollout` would lose the solver's warm start between calls, and a closed-loop
episode would become another one.)

`MujocoEnv` keeps one `MjData` per episode; `offrl_jax.envs.mujoco_pure` keeps none and
passes the state of each episode in and out.

Rewards are float64 (Gymnasium's own values); observations are Gymnasium's float64 ones
cast to float32, as any policy in float32 sees them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.utils import seeding

from offrl_jax.envs.base import TimeStep
from offrl_jax.envs.mujoco_bodies import BODIES, Readings
from offrl_jax.errors import OffrlError, unknown_name

# Compiled without type stubs; a type checker cannot know its names.
mujoco: Any = importlib.import_module("mujoco")


def available_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load_model(file_name: str) -> Any:
    """Compiles one of Gymnasium's models.

    MuJoCo 4 deprecates the attribute `settotalmass`: it would print a warning and leave
    a log file in the working directory.  Doing on the compiled model what the attribute
    asks for gives the same model, bit for bit.
    """
    # Found, not imported: Gymnasium's MuJoCo package imports its rendering libraries.
    origin = importlib.util.find_spec("gymnasium")
    if origin is None or origin.origin is None:
        raise OffrlError("the gymnasium package has no files; reinstall gymnasium")
    path = Path(origin.origin).parent / "envs" / "mujoco" / "assets" / file_name
    if not path.is_file():
        raise OffrlError(
            f"gymnasium {gymnasium.__version__} has no model {file_name}; install a "
            "version that offrl_jax supports"
        )
    root = ElementTree.parse(path).getroot()
    compiler = root.find("compiler")
    mass = None if compiler is None else compiler.attrib.pop("settotalmass", None)
    model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, "unicode"))
    if mass is not None:
        mujoco.mj_setTotalmass(model, float(mass))
        mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


class Cell(NamedTuple):
    """One simulator.

    Attributes:
      data: the `MjData`.
      ctrl: view of its controls `[A]`.
      views: views of the fields that `Engine.fields` names.  Making one per step would
        cost a fifth.
    """

    data: Any
    ctrl: np.ndarray
    views: tuple[np.ndarray, ...]


class Engine:
    """What all faces of a body share: the model, its threads, Gymnasium's arithmetic.

    Args:
      env_id: a key of `BODIES`.
      threads: workers; all cores that the process may use if None.

    Raises:
      UsageError: the id is unknown.
      OffrlError: the installed Gymnasium lacks the model.
    """

    def __init__(self, env_id: str, threads: int | None = None) -> None:
        if env_id not in BODIES:
            raise unknown_name("environment", env_id, BODIES)
        self.body = BODIES[env_id]
        self.model = _load_model(self.body.xml)
        self.fields = ("qpos", "qvel", *self.body.reads)
        self._contact_forces = "cfrc_ext" in self.fields
        self._dt = self.model.opt.timestep * self.body.frame_skip
        self._threads = threads or available_cores()
        # The calling thread is a worker too.
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), "offrl-mujoco")
        rest = mujoco.MjData(self.model)
        self._rest = rest.qpos.copy(), rest.qvel.copy()
        self._shapes = {name: getattr(rest, name).shape for name in self.fields}

    def new_cell(self) -> Cell:
        """A simulator in no particular state; about 0.4 MB and 1 ms."""
        data = mujoco.MjData(self.model)
        return Cell(data, data.ctrl, tuple(getattr(data, f) for f in self.fields))

    def readings(self, n: int) -> dict[str, np.ndarray]:
        """Room for what is read off n episodes: zeros `[n, ...]` by field."""
        return {name: np.zeros((n, *self._shapes[name])) for name in self.fields}

    def drawn_start(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions `[nq]` and velocities `[nv]` of Gymnasium's `reset(seed=seed)`."""
        rng, _ = seeding.np_random(seed)
        return self.body.start(rng, *self._rest)

    def place(self, cell: Cell, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Puts a simulator into a fresh state, as Gymnasium's reset does."""
        mujoco.mj_resetData(self.model, cell.data)
        cell.data.qpos[:], cell.data.qvel[:] = qpos, qvel
        mujoco.mj_forward(self.model, cell.data)

    def advance(self, cell: Cell, control: np.ndarray) -> None:
        """One environment step under `control` `[A]`, see `controls`."""
        cell.ctrl[:] = control
        mujoco.mj_step(self.model, cell.data, nstep=self.body.frame_skip)
        if self._contact_forces:
            mujoco.mj_rnePostConstraint(self.model, cell.data)

    def controls(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scaled actions `[n, A]` as the costs see them, and as the simulator does.

        MuJoCo would take a NaN for a control of zeros and complain in a log file in the
        working directory; the zeros alone give the same step.
        """
        control = np.clip(action, -1.0, 1.0)
        if self.body.control_scale != 1.0:
            control = self.body.control_scale * control
        broken = np.isnan(control)
        if not broken.any():
            return control, control
        return control, np.where(broken.any(axis=1, keepdims=True), 0, control)

    def progress(self, read: Readings) -> np.ndarray:
        """The body's place `[n]`, whose change is its velocity."""
        if self.body.progress is None:
            return np.zeros(len(read["qpos"]))
        return self.body.progress(read, self.model)

    def observe(self, read: Readings) -> np.ndarray:
        """Observations `[n, O]`, float32."""
        return self.body.observe(read).astype(np.float32)

    def outcome(
        self,
        read: Readings,
        before: np.ndarray,
        after: np.ndarray,
        control: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and terminations `[n]` of a step between two `progress` `[n]`."""
        velocity = (after - before) / self._dt
        reward, healthy = self.body.outcome(read, velocity, control)
        ended = np.zeros(len(reward), bool) if healthy is None else ~healthy
        return reward, ended

    def in_threads(self, work: Callable[[np.ndarray], None], rows: np.ndarray) -> None:
        """Calls `work` on slices of `rows`, one per thread; raises what it raises."""
        first, *rest = np.array_split(rows, min(self._threads, max(1, len(rows))))
        futures = [self._pool.submit(work, slice_) for slice_ in rest]
        try:
            work(first)
        finally:
            # Never leave while a worker still writes.
            wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        """Stops the workers."""
        self._pool.shutdown()


class MujocoEnv:
    """A `HostEnv` of one of `BODIES`.

    Memory: about 0.4 MB per episode of the largest batch so far, kept for the next one.

    Args:
      env_id: a key of `BODIES`.
      threads: workers; all cores that the process may use if None.  The results do not
        depend on it.

    Raises:
      UsageError: the id is unknown.
      OffrlError: the installed Gymnasium lacks the model.
    """

    has_success = False

    def __init__(self, env_id: str, threads: int | None = None) -> None:
        self._engine = Engine(env_id, threads)
        self.name = env_id
        self.spec = self._engine.body.spec
        self.max_batch = 4096  # some 0.4 MB each
        self.versions: Mapping[str, str] = {
            "gymnasium": gymnasium.__version__,
            "mujoco": mujoco.__version__,
        }
        self._cells: list[Cell] = []
        self._begin(0)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Starts the episodes that `gymnasium.make(id).reset(seed=seed)` starts.

        Args:
          seeds: `[n]`, non-negative integers.

        Returns:
          Observations `[n, O]`, float32.
        """
        model = self._engine.model
        qpos = np.empty((len(seeds), model.nq))
        qvel = np.empty((len(seeds), model.nv))
        for i, seed in enumerate(seeds):
            qpos[i], qvel[i] = self._engine.drawn_start(int(seed))
        return self.reset_to(qpos, qvel)

    def reset_to(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Starts `n` episodes in given states, as Gymnasium's `set_state`.

        Args:
          qpos: `[n, nq]`, generalised positions.
          qvel: `[n, nv]`, generalised velocities.

        Returns:
          Observations `[n, O]`, float32.

        Raises:
          ValueError: the shapes are not those of the model.
        """
        n, engine = len(qpos), self._engine
        if qpos.shape != (n, engine.model.nq) or qvel.shape != (n, engine.model.nv):
            raise ValueError(f"states of shape {qpos.shape} and {qvel.shape}")
        while len(self._cells) < n:
            self._cells.append(engine.new_cell())
        self._begin(n)
        targets = tuple(self._read.values())

        def work(rows: np.ndarray) -> None:
            for i in rows:
                engine.place(self._cells[i], qpos[i], qvel[i])
                for target, view in zip(targets, self._cells[i].views, strict=True):
                    target[i] = view

        engine.in_threads(work, np.arange(n))
        self._progress[:] = engine.progress(self._read)
        self._obs[:] = engine.observe(self._read)
        return self._obs.copy()

    def step(self, action: np.ndarray, active: np.ndarray) -> TimeStep:
        """Advances the active episodes; see `HostEnv.step`.

        Args:
          action: `[n, A]`, clipped to [-1, 1] and scaled to the body's controls.
            Gymnasium computes the control cost in the dtype of the action; so does
            this.
          active: `[n]`, bool.

        Returns:
          Observations float32, rewards float64, flags bool.

        Raises:
          ValueError: a shape is wrong, or an episode that has ended is active.
        """
        n, engine = len(self._t), self._engine
        if action.shape != (n, self.spec.action_dim) or active.shape != (n,):
            raise ValueError(
                f"action {action.shape} and active {active.shape} for {n} episodes"
            )
        if np.any(active & self._over):
            raise ValueError("an episode that has ended cannot be stepped; reset first")
        rows = np.flatnonzero(active)
        control, drive = engine.controls(action)
        targets = tuple(self._read.values())

        def work(mine: np.ndarray) -> None:
            for i in mine:
                cell = self._cells[i]
                engine.advance(cell, drive[i])
                for target, view in zip(targets, cell.views):  # noqa: B905 (hot)
                    target[i] = view

        engine.in_threads(work, rows)
        self._t[rows] += 1
        return self._outcome(rows, control[rows])

    def close(self) -> None:
        """Frees the simulators and stops the workers."""
        self._engine.close()
        self._cells.clear()

    def _begin(self, n: int) -> None:
        self._read = self._engine.readings(n)
        self._progress = np.zeros(n)
        self._obs = np.zeros((n, self.spec.obs_dim), np.float32)
        self._t = np.zeros(n, np.int64)
        self._over = np.zeros(n, bool)

    def _outcome(self, rows: np.ndarray, control: np.ndarray) -> TimeStep:
        """Observations, rewards and flags of the rows just stepped."""
        engine, n = self._engine, len(self._t)
        read = {name: values[rows] for name, values in self._read.items()}
        before, after = self._progress[rows], engine.progress(read)
        reward = np.zeros(n)
        terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
        reward[rows], terminated[rows] = engine.outcome(read, before, after, control)
        truncated[rows] = self._t[rows] >= self.spec.horizon
        self._over |= terminated | truncated
        self._progress[rows], self._obs[rows] = after, engine.observe(read)
        return TimeStep(
            self._obs.copy(), reward, terminated, truncated, np.zeros(n, bool)
        )
