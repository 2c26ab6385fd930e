"""Gymnasium's MuJoCo tasks, many episodes at once, bit for bit.

A batch keeps one `MjData` per episode.  A step hands each worker of a thread pool a
contiguous slice of the active episodes; the bindings release the interpreter's lock
inside `mj_step`, so the workers run in parallel.  Rewards, terminations and
observations are then computed for the whole batch in NumPy, operation by operation in
the order and precision of Gymnasium's v5 environments: for equal seeds and actions all
of them are Gymnasium's, bit for bit.  (`mujoco.rollout` would lose the solver's warm
start between calls, and a closed-loop episode would become another one.)

Rewards are float64 (Gymnasium's own values); observations are Gymnasium's float64 ones
cast to float32, as any policy in float32 sees them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding

from offrl_jax.envs.base import TimeStep
from offrl_jax.envs.mujoco_bodies import BODIES
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
        if env_id not in BODIES:
            raise unknown_name("environment", env_id, BODIES)
        self.name = env_id
        self.body = BODIES[env_id]
        self.spec = self.body.spec
        self.max_batch = 4096  # some 0.4 MB each
        self.versions: Mapping[str, str] = {
            "gymnasium": gymnasium.__version__,
            "mujoco": mujoco.__version__,
        }
        self._model = _load_model(self.body.xml)
        self._dt = self._model.opt.timestep * self.body.frame_skip
        self._threads = threads or available_cores()
        # The calling thread is a worker too.
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), "offrl-mujoco")
        start = mujoco.MjData(self._model)
        self._start = start.qpos.copy(), start.qvel.copy()
        self._datas: list[Any] = []
        # Views into the simulator's memory; making one per step would cost a fifth.
        self._views: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._begin(0)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Starts the episodes that `gymnasium.make(id).reset(seed=seed)` starts.

        Args:
          seeds: `[n]`, non-negative integers.

        Returns:
          Observations `[n, O]`, float32.
        """
        model, body = self._model, self.body
        qpos = np.empty((len(seeds), model.nq))
        qvel = np.empty((len(seeds), model.nv))
        for i, seed in enumerate(seeds):
            rng, _ = seeding.np_random(int(seed))
            noise = body.reset_noise
            qpos[i] = self._start[0] + rng.uniform(-noise, noise, model.nq)
            if body.normal_velocity:
                qvel[i] = self._start[1] + noise * rng.standard_normal(model.nv)
            else:
                qvel[i] = self._start[1] + rng.uniform(-noise, noise, model.nv)
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
        n, model = len(qpos), self._model
        if qpos.shape != (n, model.nq) or qvel.shape != (n, model.nv):
            raise ValueError(f"states of shape {qpos.shape} and {qvel.shape}")
        while len(self._datas) < n:
            data = mujoco.MjData(model)
            self._datas.append(data)
            self._views.append((data.ctrl, data.qpos, data.qvel))
        self._begin(n)

        def work(rows: np.ndarray) -> None:
            for i in rows:
                data = self._datas[i]
                mujoco.mj_resetData(model, data)
                data.qpos[:], data.qvel[:] = qpos[i], qvel[i]
                mujoco.mj_forward(model, data)
                self._qpos[i], self._qvel[i] = data.qpos, data.qvel

        self._in_threads(work, np.arange(n))
        self._obs[:] = self._observe(self._qpos, self._qvel)
        return self._obs.copy()

    def step(self, action: np.ndarray, active: np.ndarray) -> TimeStep:
        """Advances the active episodes; see `HostEnv.step`.

        Args:
          action: `[n, A]`, clipped to [-1, 1].  Gymnasium computes the control cost in
            the dtype of the action; so does this.
          active: `[n]`, bool.

        Returns:
          Observations float32, rewards float64, flags bool.

        Raises:
          ValueError: a shape is wrong, or an episode that has ended is active.
        """
        n = len(self._t)
        if action.shape != (n, self.spec.action_dim) or active.shape != (n,):
            raise ValueError(
                f"action {action.shape} and active {active.shape} for {n} episodes"
            )
        if np.any(active & self._over):
            raise ValueError("an episode that has ended cannot be stepped; reset first")
        rows = np.flatnonzero(active)
        action = np.clip(action, -1.0, 1.0)
        x_before = self._qpos[rows, 0]
        model, frame_skip = self._model, self.body.frame_skip

        def work(mine: np.ndarray) -> None:
            for i in mine:
                ctrl, qpos, qvel = self._views[i]
                ctrl[:] = action[i]
                mujoco.mj_step(model, self._datas[i], nstep=frame_skip)
                self._qpos[i], self._qvel[i] = qpos, qvel

        self._in_threads(work, rows)
        self._t[rows] += 1
        return self._outcome(rows, x_before, action[rows])

    def close(self) -> None:
        """Frees the simulators and stops the workers."""
        self._pool.shutdown()
        self._views.clear()
        self._datas.clear()

    def _begin(self, n: int) -> None:
        self._qpos = np.zeros((n, self._model.nq))
        self._qvel = np.zeros((n, self._model.nv))
        self._obs = np.zeros((n, self.spec.obs_dim), np.float32)
        self._t = np.zeros(n, np.int64)
        self._over = np.zeros(n, bool)

    def _in_threads(self, work: Callable[[np.ndarray], None], rows: np.ndarray) -> None:
        first, *rest = np.array_split(rows, min(self._threads, max(1, len(rows))))
        futures = [self._pool.submit(work, slice_) for slice_ in rest]
        work(first)
        for future in futures:
            future.result()

    def _observe(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        position = qpos if self.body.observes_x else qpos[:, 1:]
        bound = self.body.velocity_bound
        velocity = np.clip(qvel, -bound, bound)
        return np.concatenate([position, velocity], axis=1).astype(np.float32)

    def _outcome(
        self, rows: np.ndarray, x_before: np.ndarray, action: np.ndarray
    ) -> TimeStep:
        """Rewards and flags of the rows just stepped, in Gymnasium's order of terms."""
        body, n = self.body, len(self._t)
        qpos, qvel = self._qpos[rows], self._qvel[rows]
        velocity = (qpos[:, 0] - x_before) / self._dt
        cost = body.control_weight * np.sum(np.square(action), axis=1)
        ended = np.zeros(len(rows), bool)
        gain = velocity
        if body.healthy is not None:
            healthy = body.healthy(qpos, qvel)
            gain = velocity + healthy * 1.0
            ended = ~healthy
        earned = np.where(velocity > body.speed_limit, -100.0, gain - cost)

        reward = np.zeros(n)
        terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
        reward[rows], terminated[rows] = earned, ended
        truncated[rows] = self._t[rows] >= self.spec.horizon
        self._over |= terminated | truncated
        self._obs[rows] = self._observe(qpos, qvel)
        return TimeStep(
            self._obs.copy(), reward, terminated, truncated, np.zeros(n, bool)
        )
