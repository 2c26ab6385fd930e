"""What sets Gymnasium's MuJoCo v5 tasks apart: models, noise, costs, termination.

Plain NumPy, so that specs are known without loading a simulator.  The values are the
defaults of Gymnasium's v5 environments; `offrl_jax.envs.mujoco` steps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from offrl_jax.types import Spec


def _hopper_healthy(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    rest = np.concatenate([qpos[:, 2:], qvel], axis=1)
    bounded = np.all((rest > -100.0) & (rest < 100.0), axis=1)
    upright = (qpos[:, 2] > -0.2) & (qpos[:, 2] < 0.2)
    return bounded & (qpos[:, 1] > 0.7) & upright


def _walker_healthy(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    del qvel
    high = (qpos[:, 1] > 0.8) & (qpos[:, 1] < 2.0)
    return high & (qpos[:, 2] > -1.0) & (qpos[:, 2] < 1.0)


@dataclasses.dataclass(frozen=True)
class Body:
    """One task: its model and what is computed from the model's states.

    Attributes:
      spec: dimensions and horizon.
      xml: file name among Gymnasium's MuJoCo assets.
      frame_skip: simulator steps per environment step.
      reset_noise: half-width of the uniform noise on start positions and velocities.
      normal_velocity: start velocities get normal noise of scale `reset_noise` instead.
      control_weight: weight of the squared action in the cost.
      velocity_bound: observed velocities are clipped to this absolute value.
      observes_x: whether the observation begins with the forward position.
      healthy: `(qpos, qvel) -> [n]` bool; an unhealthy episode terminates, a healthy
        step earns 1.  None if the task never terminates and earns nothing for it.
      speed_limit: a faster step earns -100 in place of its reward.
    """

    spec: Spec
    xml: str
    frame_skip: int
    reset_noise: float
    normal_velocity: bool
    control_weight: float
    velocity_bound: float = np.inf
    observes_x: bool = False
    healthy: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    speed_limit: float = np.inf


_HALF_CHEETAH = Body(
    spec=Spec(obs_dim=17, action_dim=6, horizon=1000),
    xml="half_cheetah.xml",
    frame_skip=5,
    reset_noise=0.1,
    normal_velocity=True,
    control_weight=0.1,
)

BODIES: Mapping[str, Body] = {
    "mujoco/HalfCheetah-v5": _HALF_CHEETAH,
    "mujoco/Hopper-v5": Body(
        spec=Spec(obs_dim=11, action_dim=3, horizon=1000),
        xml="hopper.xml",
        frame_skip=4,
        reset_noise=5e-3,
        normal_velocity=False,
        control_weight=1e-3,
        velocity_bound=10.0,
        healthy=_hopper_healthy,
    ),
    "mujoco/Walker2d-v5": Body(
        spec=Spec(obs_dim=17, action_dim=6, horizon=1000),
        xml="walker2d_v5.xml",
        frame_skip=4,
        reset_noise=5e-3,
        normal_velocity=False,
        control_weight=1e-3,
        velocity_bound=10.0,
        healthy=_walker_healthy,
    ),
    # NeoRL-2 (arXiv:2503.19267): the cheetah with its position shown and a speed limit.
    "neorl2/SafetyHalfCheetah-v1": dataclasses.replace(
        _HALF_CHEETAH,
        spec=Spec(obs_dim=18, action_dim=6, horizon=1000),
        observes_x=True,
        speed_limit=3.2096,
    ),
}
