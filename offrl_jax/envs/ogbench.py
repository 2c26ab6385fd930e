"""OGBench's environments (Park et al. 2025, arXiv:2410.20092), many episodes at once.

The simulators are those of the optional package `ogbench`.  A batch compiles the model
once and keeps one `MjData` per episode (some 0.5 MB; a whole environment of the robot
arm takes hundreds).  Episodes are stepped one after the other: more than half of a step
of the arm is Python, and threads were measured to be slower.

The package draws an episode's start from three places: the environment's own generator,
NumPy's global one, and the action space, which the robot arm makes anew, unseeded, at
every use.  Here all three are seeded from the episode's seed, so an episode depends on
nothing else.  Apart from the source of that randomness every number is the package's,
bit for bit.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import numpy as np

from offrl_jax.envs.base import TimeStep
from offrl_jax.envs.ogbench_specs import ENVIRONMENTS, IDS
from offrl_jax.errors import OffrlError, UsageError, unknown_name

OLDEST, BEYOND = (1, 2), (1, 3)
"""Versions of the package that are used: single-task rewards changed in 1.2.0."""
INSTALL = "pip install 'offrl-jax[ogbench]'"


def package_version() -> str:
    """The installed version of `ogbench`.

    Raises:
      UsageError: it is absent, or its single-task rewards are defined otherwise.
    """
    try:
        found = metadata.version("ogbench")
    except metadata.PackageNotFoundError as error:
        raise UsageError(
            f"OGBench tasks need the package ogbench; run: {INSTALL}"
        ) from error
    major, minor, *_ = (*found.split("."), "0")
    if not OLDEST <= (int(major), int(minor)) < BEYOND:
        raise UsageError(
            f"ogbench {found} is installed, but single-task rewards are those of 1.2 "
            f"(1.2.0 changed them); run: {INSTALL}"
        )
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that an episode's numbers depend on."""
    names = ("gymnasium", "mujoco", "numpy", "scipy")
    return {"ogbench": package_version()} | {n: metadata.version(n) for n in names}


@contextlib.contextmanager
def global_numpy_seed(seed: int) -> Iterator[None]:
    """NumPy's global generator begins at `seed` inside, and is restored at the end."""
    before = np.random.get_state()  # noqa: NPY002  (what the package draws from)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    """Without the warning of a rendering library that finds no display."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*DISPLAY.*is missing.*")
        yield


def _with_own_space(cls: type) -> type:
    """A subclass whose action space is an attribute, so that it can be seeded."""
    return type(cls.__name__, (cls,), {"action_space": None})


class Simulator:
    """One compiled model of an environment, from which episodes are spawned.

    Args:
      gym_id: an id that the package registers, without a prefix.
      **arguments: of the environment's constructor, besides those registered.

    Attributes:
      horizon: the registered time limit, in steps.

    Raises:
      UsageError: the package is absent or of another version.
      OffrlError: its model files are absent or damaged.
    """

    def __init__(self, gym_id: str, **arguments: Any) -> None:
        found = package_version()
        import gymnasium
        from gymnasium.envs.registration import load_env_creator

        try:
            with _quiet_imports():
                importlib.import_module("ogbench")  # registers its environments
                registered = gymnasium.spec(gym_id)
                assert registered.entry_point is not None
                creator: Any = registered.entry_point
                if isinstance(creator, str):
                    creator = load_env_creator(creator)
            if isinstance(creator, type):
                creator = _with_own_space(creator)
            self._env: Any = creator(**registered.kwargs, **arguments)
            if isinstance(creator, type):
                one = np.ones(5, np.float32)
                self._env.action_space = gymnasium.spaces.Box(-one, one)
            # The arm compiles its model at the first reset, some seconds.
            begin(self._env, 0)
        except (ImportError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise OffrlError(
                f"ogbench {found} cannot load its model of '{gym_id}' ({reason}); "
                "reinstall it: pip install --force-reinstall --no-deps "
                f"ogbench=={found}"
            ) from error
        assert registered.max_episode_steps is not None
        self.horizon = registered.max_episode_steps
        self.is_arm = hasattr(self._env, "_data")
        self.model: Any = self._env._model if self.is_arm else self._env.model
        # What episodes change of the model and what physics reads: buttons of the
        # scene lock drawer and window by the damping of their joints.
        self._pristine = self.model.dof_damping.copy(), self.model.site_pos.copy()

    def spawn(self) -> Any:
        """An environment of its own that shares the model; `begin` it before a step.

        Where several are stepped in turns, `set_model_state` comes before every step.
        """
        import mujoco

        self.restore_model()
        env = object.__new__(type(self._env))
        for name, value in self._env.__dict__.items():
            copied = isinstance(value, np.ndarray)
            env.__dict__[name] = value.copy() if copied else value
        # Compiled without type stubs.
        data: Any = mujoco.MjData(self.model)  # pyright: ignore
        setattr(env, "_data" if self.is_arm else "data", data)
        space = self._env.action_space
        env.action_space = type(space)(space.low, space.high, dtype=np.float32)
        return env

    def restore_model(self) -> None:
        """Sets the model back to what it was before any episode."""
        self.model.dof_damping[:], self.model.site_pos[:] = self._pristine

    def model_state(self) -> np.ndarray:
        """What an episode may have changed of the model's physics, `[nv]`."""
        return self.model.dof_damping.copy()

    def set_model_state(self, state: np.ndarray) -> None:
        """Undoes what other episodes changed since `state` was read."""
        self.model.dof_damping[:] = state


def begin(env: Any, seed: int, options: dict[str, Any] | None = None) -> Any:
    """Resets an environment of a `Simulator` so that only `seed` matters.

    Returns:
      Observation, float64, and the package's `info`.
    """
    env.action_space.seed(seed)
    with global_numpy_seed(seed), warnings.catch_warnings():
        # Of gymnasium's about the arm's spaces, made anew in float64 at every use.
        warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
        return env.reset(options=options, seed=seed)


class OgbenchEnv:
    """A `HostEnv` of one single-task environment.

    The reward is minus the number of the goal's parts that are not met.  An episode
    ends at success or at the time limit.  Reward and success are told of the state
    before the action, as the package does since 1.2.0.

    Args:
      env_id: a key of `ogbench_specs.IDS`.

    Raises:
      UsageError: the id is unknown, or the package is absent or of another version.
      OffrlError: the package's model files are absent or damaged.
    """

    has_success = True

    def __init__(self, env_id: str) -> None:
        if env_id not in IDS:
            raise unknown_name("environment", env_id, IDS)
        environment, goal = IDS[env_id]
        self.name = env_id
        self.spec = ENVIRONMENTS[environment]
        self.max_batch = 512  # some 0.5 MB each
        self.versions: Mapping[str, str] = versions()
        self._simulator = Simulator(f"{environment}-singletask-task{goal}-v0")
        self._envs: list[Any] = []
        self._models: list[np.ndarray] = []
        self._obs = np.zeros((0, self.spec.obs_dim), np.float32)
        self._t = np.zeros(0, np.int64)
        self._over = np.zeros(0, bool)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Starts one episode per seed (`[n]`, uint32); returns float32 `[n, O]`."""
        n = len(seeds)
        while len(self._envs) < n:
            self._envs.append(self._simulator.spawn())
            self._models.append(self._simulator.model_state())
        self._obs = np.zeros((n, self.spec.obs_dim), np.float32)
        self._t = np.zeros(n, np.int64)
        self._over = np.zeros(n, bool)
        for i, seed in enumerate(seeds):
            self._simulator.restore_model()
            self._obs[i], _ = begin(self._envs[i], int(seed))
            self._models[i] = self._simulator.model_state()
        return self._obs.copy()

    def step(self, action: np.ndarray, active: np.ndarray) -> TimeStep:
        """Advances the active episodes; see `HostEnv.step`.

        Args:
          action: `[n, A]`, clipped to [-1, 1].
          active: `[n]`, bool.

        Returns:
          Observations float32, rewards float64, flags bool.

        Raises:
          ValueError: a shape is wrong, or an episode that has ended is active.
        """
        n = len(self._over)
        if action.shape != (n, self.spec.action_dim) or active.shape != (n,):
            raise ValueError(
                f"action {action.shape} and active {active.shape} for {n} episodes"
            )
        if np.any(active & self._over):
            raise ValueError("an episode that has ended cannot be stepped; reset first")
        action = np.clip(action, -1.0, 1.0)
        reward = np.zeros(n)
        terminated, truncated, success = np.zeros((3, n), bool)
        for i in np.flatnonzero(active):
            self._simulator.set_model_state(self._models[i])
            self._obs[i], reward[i], terminated[i], _, info = self._envs[i].step(
                action[i]
            )
            self._models[i] = self._simulator.model_state()
            success[i] = bool(info["success"])
        self._t[active] += 1
        truncated[active] = self._t[active] >= self.spec.horizon
        self._over |= terminated | truncated
        return TimeStep(self._obs.copy(), reward, terminated, truncated, success)

    def close(self) -> None:
        """Frees the episodes' simulators."""
        self._envs.clear()
        self._models.clear()
