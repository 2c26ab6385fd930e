"""The two kinds of environment, and what one step of either returns.

A *pure* environment is a pair of functions that run inside `jit`, so that whole
episodes are one compiled program.  A *host* environment steps a batch of episodes
outside of it.  Policies always act in [-1, 1]; an environment scales to its own bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.types import Array, Key, Spec


class TimeStep(NamedTuple):
    """What follows an action: of one episode (pure) or of n (host, `[n, ...]`).

    Attributes:
      obs: `[O]`, float32, the observation after the step (never that of a new episode).
      reward: `[]`, float32; float64 from a host environment, whose simulator's it is.
      terminated: `[]`, bool; the episode reached a terminal state.
      truncated: `[]`, bool; the time limit was hit.
      success: `[]`, bool; the task's own criterion was met at this step, always false
        where the task has none.  An episode succeeds if any of its steps does.
    """

    obs: Any
    reward: Any
    terminated: Any
    truncated: Any
    success: Any


class PureEnv(NamedTuple):
    """An environment as pure functions of one episode; batch it with `vmap`.

    Attributes:
      name: environment id with its version.
      spec: dimensions and horizon.
      reset: `key -> (state, obs [O])`; all randomness of an episode comes from `key`.
      step: `(state, action [A]) -> (state, TimeStep)`.
      has_success: whether `TimeStep.success` means anything.
      renew: as the function `renew`, where a fresh episode costs more than a few
        operations; None elsewhere.
    """

    name: str
    spec: Spec
    reset: Callable[[Key], tuple[Any, Array]]
    step: Callable[[Any, Array], tuple[Any, TimeStep]]
    has_success: bool = False
    renew: Callable[[Key, Any, Array, Array], tuple[Any, Array]] | None = None


def renew(
    env: PureEnv, key: Key, state: Any, obs: Array, over: Array
) -> tuple[Any, Array]:
    """Begins a fresh episode where the last one is over, for endless collection.

    Args:
      env: the environment.
      key: all randomness of the fresh episode.
      state: the episode after its last step.
      obs: `[O]`, its last observation.
      over: `[]`, bool, whether it terminated or was truncated.

    Returns:
      State and observation of `env.reset(key)` where `over`, else those given.
    """
    if env.renew is not None:
        return env.renew(key, state, obs, over)
    fresh = env.reset(key)
    return jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, (state, obs))


class HostEnv(Protocol):
    """A batch of episodes advanced together outside of `jit` (NumPy in, NumPy out)."""

    name: str
    spec: Spec
    has_success: bool
    versions: Mapping[str, str]
    """Versions of the simulators behind it, recorded in every row."""
    max_batch: int
    """Most episodes to simulate side by side, for the memory that they take."""

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Starts `n = len(seeds)` fresh episodes; returns their observations `[n, O]`.

        The same seed gives the same episode, whatever n is and whatever came before.
        """
        ...

    def step(self, action: np.ndarray, active: np.ndarray) -> TimeStep:
        """Advances the episodes where `active` `[n]` is true by `action` `[n, A]`.

        Rows that are not active are not simulated; their entries repeat the last
        observation with reward 0 and all flags false.
        """
        ...

    def close(self) -> None:
        """Frees simulators and threads."""
        ...
