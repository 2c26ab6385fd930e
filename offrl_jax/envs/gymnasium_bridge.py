"""Any Gymnasium environment with flat observations and bounded box actions.

One instance per episode, stepped one after the other: nothing is fast here, everything
is what `gymnasium.make(id)` does.  Actions in [-1, 1] are scaled linearly to the bounds
of the environment.  Of a dict observation only the entry `observation` is passed on:
a task whose goal changes from episode to episode hides it that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from offrl_jax.envs.base import TimeStep
from offrl_jax.errors import UsageError
from offrl_jax.types import Spec

_SUCCESS_KEYS = ("success", "is_success")


def _make(gym_id: str) -> gymnasium.Env:
    try:
        return gymnasium.make(gym_id)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"gymnasium cannot make '{gym_id}': {reason}; check the id and that the "
            "package that registers it is installed"
        ) from error


def _flat_observations(gym_id: str, space: spaces.Space) -> tuple[int, bool]:
    """The observation dimension, and whether it is the entry of a dict."""
    inside = isinstance(space, spaces.Dict)
    flat = space.spaces.get("observation") if isinstance(space, spaces.Dict) else space
    if not isinstance(flat, spaces.Box) or len(flat.shape) != 1:
        raise UsageError(
            f"environment '{gym_id}' observes {space}; needed: a one-dimensional Box, "
            "or a Dict with one under 'observation'"
        )
    return flat.shape[0], inside


def _action_bounds(gym_id: str, space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise UsageError(
            f"environment '{gym_id}' takes actions from {space}; needed: a "
            "one-dimensional Box (discrete actions are not supported)"
        )
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise UsageError(
            f"environment '{gym_id}' has unbounded actions, {space}; wrap it in "
            "gymnasium.wrappers.RescaleAction or ClipAction and register that"
        )
    return space.low, space.high


def _versions(env: gymnasium.Env) -> dict[str, str]:
    """Versions of Gymnasium and of the packages that hold and simulate `env`."""
    versions = {"gymnasium": gymnasium.__version__}
    package = type(env.unwrapped).__module__.split(".")[0]
    distributions = metadata.packages_distributions().get(package, [])
    for name in [*distributions, "mujoco"]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # MuJoCo is optional to Gymnasium.
    return versions


class GymnasiumEnv:
    """A `HostEnv` over `gymnasium.make(gym_id)`.

    Whether the task knows success is read off the `info` of one probing step: the keys
    `success` and `is_success` count.

    Args:
      gym_id: an id of Gymnasium's registry, or `module:id`.

    Raises:
      UsageError: no such environment, no time limit, or spaces other than a flat Box of
        observations and a bounded flat Box of actions.
    """

    def __init__(self, gym_id: str) -> None:
        self.name = f"gymnasium/{gym_id}"
        self._gym_id = gym_id
        probe = _make(gym_id)
        try:
            obs_dim, self._in_dict = _flat_observations(gym_id, probe.observation_space)
            low, high = _action_bounds(gym_id, probe.action_space)
            horizon = None if probe.spec is None else probe.spec.max_episode_steps
            if horizon is None:
                raise UsageError(
                    f"environment '{gym_id}' has no time limit; register it with "
                    "max_episode_steps"
                )
            self._low, self._high = low, high
            # Halves of sum and difference, so that bounds of -1 and 1 change no bit.
            self._middle, self._half = (low + high) / 2, (high - low) / 2
            _, info = probe.reset(seed=0)
            *_, step_info = probe.step(self._middle.astype(low.dtype))
            self.has_success = any(k in {**info, **step_info} for k in _SUCCESS_KEYS)
            self.max_batch = 128  # each is a whole environment, with its own simulator
            self.versions: Mapping[str, str] = _versions(probe)
        except BaseException:
            probe.close()
            raise
        self.spec = Spec(obs_dim=obs_dim, action_dim=low.shape[0], horizon=horizon)
        self._envs: list[gymnasium.Env] = [probe]
        self._obs = np.zeros((0, obs_dim), np.float32)
        self._over = np.zeros(0, bool)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Starts one episode per seed, `reset(seed=seed)`; returns float32 `[n, O]`."""
        while len(self._envs) < len(seeds):
            self._envs.append(_make(self._gym_id))
        self._over = np.zeros(len(seeds), bool)
        self._obs = np.zeros((len(seeds), self.spec.obs_dim), np.float32)
        for i, seed in enumerate(seeds):
            observation, _ = self._envs[i].reset(seed=int(seed))
            self._obs[i] = self._flat(observation)
        return self._obs.copy()

    def step(self, action: np.ndarray, active: np.ndarray) -> TimeStep:
        """Advances the active episodes; see `HostEnv.step`.

        Args:
          action: `[n, A]`, clipped to [-1, 1] and scaled to the environment's bounds.
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
        scaled = self._middle + self._half * np.clip(action, -1.0, 1.0)
        scaled = np.clip(scaled, self._low, self._high).astype(self._low.dtype)
        reward = np.zeros(n)
        terminated, truncated, success = np.zeros((3, n), bool)
        for i in np.flatnonzero(active):
            observation, reward[i], terminated[i], truncated[i], info = self._envs[
                i
            ].step(scaled[i])
            self._obs[i] = self._flat(observation)
            success[i] = any(bool(info.get(key, False)) for key in _SUCCESS_KEYS)
        self._over |= terminated | truncated
        return TimeStep(self._obs.copy(), reward, terminated, truncated, success)

    def close(self) -> None:
        """Closes every instance."""
        for env in self._envs:
            env.close()
        self._envs.clear()

    def _flat(self, observation: Any) -> np.ndarray:
        return observation["observation"] if self._in_dict else observation
