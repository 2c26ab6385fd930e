"""Environments behind one batched interface, by id.

`make` gives a `PureEnv` (whole episodes inside `jit`) or a `HostEnv` (a batch of
episodes stepped on the host), see `offrl_jax.envs.base`.  Simulators are imported when
an environment that needs them is made.
"""

from __future__ import annotations

from collections.abc import Callable

from offrl_jax.envs import (
    acrobot,
    cartpole,
    dmsd,
    gates,
    mountain_car,
    pendulum,
    point_maze,
)
from offrl_jax.envs.base import HostEnv, PureEnv, TimeStep, renew
from offrl_jax.envs.mujoco_bodies import BODIES
from offrl_jax.envs.ogbench_specs import ENVIRONMENTS as OGBENCH
from offrl_jax.envs.ogbench_specs import IDS as OGBENCH_IDS
from offrl_jax.envs.ogbench_specs import PREFIX as OGBENCH_PREFIX
from offrl_jax.errors import UsageError, unknown_name
from offrl_jax.types import Spec

__all__ = [
    "HostEnv",
    "PureEnv",
    "TimeStep",
    "is_pure",
    "known",
    "make",
    "make_pure",
    "renew",
    "spec_of",
]

_PURE: dict[str, Callable[[], PureEnv]] = {
    pendulum.NAME: pendulum.make,
    point_maze.NAME: point_maze.make,
    gates.NAME: gates.make,
    dmsd.NAME: dmsd.make,
    cartpole.NAME: cartpole.make,
    acrobot.NAME: acrobot.make,
    mountain_car.NAME: mountain_car.make,
}

_BRIDGE = "gymnasium/"


def known() -> list[str]:
    """The ids of all environments of this package.

    `gymnasium/<id>` works besides, and OGBench's ids with its package.
    """
    return sorted([*_PURE, *BODIES])


def make(env_id: str) -> PureEnv | HostEnv:
    """Makes the environment of that id.

    Args:
      env_id: one of `known()` or of `ogbench_specs.IDS`, or `gymnasium/<id>` for any
        registered Gymnasium environment with box observations and bounded box actions.

    Raises:
      UsageError: the id is unknown, Gymnasium's environment is of another kind, or
        the package ogbench is absent.
    """
    if env_id in _PURE:
        return _PURE[env_id]()
    if env_id in BODIES:
        from offrl_jax.envs.mujoco import MujocoEnv

        return MujocoEnv(env_id)
    if env_id.startswith(OGBENCH_PREFIX):
        from offrl_jax.envs.ogbench import OgbenchEnv

        return OgbenchEnv(env_id)
    if env_id.startswith(_BRIDGE):
        from offrl_jax.envs.gymnasium_bridge import GymnasiumEnv

        return GymnasiumEnv(env_id.removeprefix(_BRIDGE))
    raise unknown_name("environment", env_id, known())


def is_pure(env_id: str) -> bool:
    """Whether `make` gives a `PureEnv`; makes nothing, and knows no errors."""
    return env_id in _PURE


def make_pure(env_id: str) -> PureEnv:
    """Makes the environment of that id as pure functions, to be stepped inside `jit`.

    Args:
      env_id: one of `known()`.  MuJoCo bodies are simulated on the host all the same,
        one callback per step of a batch; see `offrl_jax.envs.mujoco_pure`.

    Raises:
      UsageError: the id is unknown, or that environment has no pure form.
    """
    if env_id in _PURE:
        return _PURE[env_id]()
    if env_id in BODIES:
        from offrl_jax.envs.mujoco_pure import as_pure

        return as_pure(env_id)
    if env_id.startswith(_BRIDGE) or env_id in OGBENCH_IDS:
        raise UsageError(
            f"environment '{env_id}' cannot be stepped inside a compiled program; "
            f"those that can: {', '.join(known())}"
        )
    raise unknown_name("environment", env_id, known())


def spec_of(env_id: str) -> Spec:
    """The dimensions and horizon of an environment; see `make` for ids and errors.

    Only ids of the bridge need the environment itself to be made.
    """
    if env_id in _PURE:
        return _PURE[env_id]().spec
    if env_id in BODIES:
        return BODIES[env_id].spec
    if env_id in OGBENCH_IDS:
        return OGBENCH[OGBENCH_IDS[env_id][0]]
    env = make(env_id)
    if not isinstance(env, PureEnv):
        env.close()
    return env.spec
