"""What sets Gymnasium's MuJoCo v5 tasks apart: models, starts, observations, rewards.

Plain NumPy, so that specs are known without loading a simulator.  The values are the
defaults of Gymnasium's v5 environments and every sum is taken in their order and
precision; `offrl_jax.envs.mujoco` steps them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from offrl_jax.types import Spec

Readings = Mapping[str, np.ndarray]
"""Fields of `MjData` by name, float64 `[n, ...]`, one row per episode."""
Start = Callable[
    [np.random.Generator, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]
]
Outcome = Callable[
    [Readings, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray | None]
]
Health = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Body:
    """One task: its model and what is computed from the model's states.

    Attributes:
      spec: dimensions and horizon.
      xml: file name among Gymnasium's MuJoCo assets.
      frame_skip: simulator steps per environment step.
      start: `(generator, qpos [nq], qvel [nv]) -> (qpos, qvel)`, draws a start from the
        model's rest state.
      observe: `readings -> [n, O]`, float64.
      outcome: `(readings, velocity [n], control [n, A]) -> (reward [n], healthy [n])`;
        an episode that is not healthy terminates, None if none ever does.  `velocity`
        is the change of `progress` per second, `control` what drives the actuators.
      progress: `(readings, model) -> [n]`, the place, metres, whose change is the
        velocity; None if the task has no use for one.
      reads: fields of `MjData` that the functions above need beside qpos and qvel;
        each one costs a copy per step.
      control_scale: the control at an action of 1.
      healthy: `(qpos, qvel) -> [n]` bool; the test behind `outcome`, None without one.
    """

    spec: Spec
    xml: str
    frame_skip: int
    start: Start
    observe: Callable[[Readings], np.ndarray]
    outcome: Outcome
    progress: Callable[[Readings, Any], np.ndarray] | None = None
    reads: tuple[str, ...] = ()
    control_scale: float = 1.0
    healthy: Health | None = None


def _uniform_start(noise: float) -> Start:
    def start(rng: np.random.Generator, qpos: np.ndarray, qvel: np.ndarray):
        qpos = qpos + rng.uniform(-noise, noise, len(qpos))
        return qpos, qvel + rng.uniform(-noise, noise, len(qvel))

    return start


def _normal_start(noise: float) -> Start:
    """Uniform noise on positions, normal noise on velocities."""

    def start(rng: np.random.Generator, qpos: np.ndarray, qvel: np.ndarray):
        qpos = qpos + rng.uniform(-noise, noise, len(qpos))
        return qpos, qvel + noise * rng.standard_normal(len(qvel))

    return start


def _joints(hidden: int, bound: float = np.inf) -> Callable[[Readings], np.ndarray]:
    """Positions but the first `hidden` ones, then velocities, clipped at `bound`."""

    def observe(read: Readings) -> np.ndarray:
        velocity = np.clip(read["qvel"], -bound, bound)
        return np.concatenate([read["qpos"][:, hidden:], velocity], axis=1)

    return observe


def _root_x(read: Readings, model: Any) -> np.ndarray:
    del model
    return read["qpos"][:, 0]


def _running(
    control_weight: float, health: Health | None = None, speed_limit: float = np.inf
) -> Outcome:
    """Velocity, plus 1 if healthy, less the control's cost; -100 for a faster step."""

    def outcome(read: Readings, velocity: np.ndarray, control: np.ndarray):
        cost = control_weight * np.sum(np.square(control), axis=1)
        gain, healthy = velocity, None
        if health is not None:
            healthy = health(read["qpos"], read["qvel"])
            gain = velocity + healthy * 1.0
        return np.where(velocity > speed_limit, -100.0, gain - cost), healthy

    return outcome


def _hopper_healthy(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    rest = np.concatenate([qpos[:, 2:], qvel], axis=1)
    bounded = np.all((rest > -100.0) & (rest < 100.0), axis=1)
    upright = (qpos[:, 2] > -0.2) & (qpos[:, 2] < 0.2)
    return bounded & (qpos[:, 1] > 0.7) & upright


def _walker_healthy(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    del qvel
    high = (qpos[:, 1] > 0.8) & (qpos[:, 1] < 2.0)
    return high & (qpos[:, 2] > -1.0) & (qpos[:, 2] < 1.0)


def _humanoid_healthy(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    del qvel
    return (qpos[:, 2] > 1.0) & (qpos[:, 2] < 2.0)


def _flat(values: np.ndarray) -> np.ndarray:
    """`[n, ...]` as `[n, K]`; n may be 0."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _humanoid_observe(read: Readings) -> np.ndarray:
    # Row 0 of the per-body fields is the world; the root's six are not actuated.
    parts = [read["qpos"][:, 2:], read["qvel"]]
    parts += [_flat(read[field][:, 1:]) for field in ("cinert", "cvel")]
    parts += [read["qfrc_actuator"][:, 6:], _flat(read["cfrc_ext"][:, 1:])]
    return np.concatenate(parts, axis=1)


def _mass_centre_x(read: Readings, model: Any) -> np.ndarray:
    mass = model.body_mass[:, None]
    # All three coordinates, though one is used: so the sum keeps Gymnasium's order.
    return (np.sum(mass * read["xipos"], axis=1) / np.sum(mass))[:, 0]


def _humanoid_outcome(read: Readings, velocity: np.ndarray, control: np.ndarray):
    healthy = _humanoid_healthy(read["qpos"], read["qvel"])
    forces = np.sum(np.square(_flat(read["cfrc_ext"])), axis=1)
    contact = np.minimum(5e-7 * forces, 10.0)
    # Gymnasium takes this cost from the simulator, thus in float64.
    effort = 0.1 * np.sum(np.square(control.astype(np.float64)), axis=1)
    return (1.25 * velocity + healthy * 5.0) - (effort + contact), healthy


# Bodies of the pusher's model whose places are seen; the test compares their names.
_TIP, _OBJECT, _GOAL = 10, 11, 12


def _pusher_start(rng: np.random.Generator, qpos: np.ndarray, qvel: np.ndarray):
    """The object anywhere in reach but closer than 0.17 m to the goal."""
    while True:
        place = np.concatenate([rng.uniform(-0.3, 0, 1), rng.uniform(-0.2, 0.2, 1)])
        if np.linalg.norm(place) > 0.17:
            break
    qpos, qvel = qpos.copy(), qvel + rng.uniform(-0.005, 0.005, len(qvel))
    qpos[-4:-2], qpos[-2:], qvel[-4:] = place, 0.0, 0.0
    return qpos, qvel


def _pusher_observe(read: Readings) -> np.ndarray:
    places = [read["xpos"][:, body] for body in (_TIP, _OBJECT, _GOAL)]
    return np.concatenate([read["qpos"][:, :7], read["qvel"][:, :7], *places], axis=1)


def _pusher_outcome(read: Readings, velocity: np.ndarray, control: np.ndarray):
    del velocity
    tip, thing, goal = (read["xpos"][:, body] for body in (_TIP, _OBJECT, _GOAL))
    # `vecdot` rounds as `np.linalg.norm` of one vector does, its `axis=1` otherwise.
    near, far = thing - tip, thing - goal
    reward_near = -np.sqrt(np.vecdot(near, near)) * 0.5
    reward_far = -np.sqrt(np.vecdot(far, far))
    effort = -np.sum(np.square(control), axis=1) * 0.1
    return reward_far + effort + reward_near, None


_HALF_CHEETAH = Body(
    spec=Spec(obs_dim=17, action_dim=6, horizon=1000),
    xml="half_cheetah.xml",
    frame_skip=5,
    start=_normal_start(0.1),
    observe=_joints(hidden=1),
    outcome=_running(0.1),
    progress=_root_x,
)

BODIES: Mapping[str, Body] = {
    "mujoco/HalfCheetah-v5": _HALF_CHEETAH,
    "mujoco/Hopper-v5": Body(
        spec=Spec(obs_dim=11, action_dim=3, horizon=1000),
        xml="hopper.xml",
        frame_skip=4,
        start=_uniform_start(5e-3),
        observe=_joints(hidden=1, bound=10.0),
        outcome=_running(1e-3, _hopper_healthy),
        progress=_root_x,
        healthy=_hopper_healthy,
    ),
    "mujoco/Humanoid-v5": Body(
        spec=Spec(obs_dim=348, action_dim=17, horizon=1000),
        xml="humanoid.xml",
        frame_skip=5,
        start=_uniform_start(1e-2),
        observe=_humanoid_observe,
        outcome=_humanoid_outcome,
        progress=_mass_centre_x,
        reads=("cinert", "cvel", "qfrc_actuator", "cfrc_ext", "xipos"),
        control_scale=0.4,
        healthy=_humanoid_healthy,
    ),
    "mujoco/Pusher-v5": Body(
        spec=Spec(obs_dim=23, action_dim=7, horizon=100),
        xml="pusher_v5.xml",
        frame_skip=5,
        start=_pusher_start,
        observe=_pusher_observe,
        outcome=_pusher_outcome,
        reads=("xpos",),
        control_scale=2.0,
    ),
    "mujoco/Swimmer-v5": Body(
        spec=Spec(obs_dim=8, action_dim=2, horizon=1000),
        xml="swimmer.xml",
        frame_skip=4,
        start=_uniform_start(0.1),
        observe=_joints(hidden=2),
        outcome=_running(1e-4),
        progress=_root_x,
    ),
    "mujoco/Walker2d-v5": Body(
        spec=Spec(obs_dim=17, action_dim=6, horizon=1000),
        xml="walker2d_v5.xml",
        frame_skip=4,
        start=_uniform_start(5e-3),
        observe=_joints(hidden=1, bound=10.0),
        outcome=_running(1e-3, _walker_healthy),
        progress=_root_x,
        healthy=_walker_healthy,
    ),
    # NeoRL-2 (arXiv:2503.19267): the cheetah with its position shown and a speed limit.
    "neorl2/SafetyHalfCheetah-v1": dataclasses.replace(
        _HALF_CHEETAH,
        spec=Spec(obs_dim=18, action_dim=6, horizon=1000),
        observe=_joints(hidden=0),
        outcome=_running(0.1, speed_limit=3.2096),
    ),
}
