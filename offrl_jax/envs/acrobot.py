"""`control/Acrobot-v1`: swing a two-link arm's tip up, as Gymnasium's Acrobot-v1.

Only the joint between the links is driven.  The equations of motion of R. Sutton and
A. Barto, *Reinforcement Learning: An Introduction* (1998), section 11.3, which
Gymnasium calls the book's, with its constants, its one fourth-order Runge-Kutta step of
0.2 s and its limits; float32 where Gymnasium keeps float64.  Every step costs 1 but the
one that ends the episode: the tip stands more than one link above the fixed joint, the
task's success.  The episode is cut after 500 steps.  A discrete environment: see
`offrl_jax.types.Spec.discrete`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from offrl_jax.envs.base import PureEnv, TimeStep
from offrl_jax.types import Array, Key, Spec

NAME = "control/Acrobot-v1"
SPEC = Spec(obs_dim=6, action_dim=3, horizon=500, discrete=True)

GRAVITY = 9.8
MASS = 1.0
"""Of either link, kilograms."""
LENGTH = 1.0
"""Of either link, metres; the centre of mass lies in the middle."""
CENTRE = 0.5
INERTIA = 1.0
"""Of either link, kg m^2."""
TORQUES = (-1.0, 0.0, 1.0)
"""Newton metres at the second joint, by action."""
MAX_SPEED_1 = 4.0 * math.pi
MAX_SPEED_2 = 9.0 * math.pi
DT = 0.2


class AcrobotState(NamedTuple):
    """Both links and the clock.

    Attributes:
      angles: `[2]`, radians in [-pi, pi]: of the first link from straight down, of the
        second from the first one's direction.
      speeds: `[2]`, radians per second.
      t: `[]`, int32, steps taken.
    """

    angles: Array
    speeds: Array
    t: Array


def observe(state: AcrobotState) -> Array:
    """The observation `[6]`: cosine and sine of each angle in turn, both speeds."""
    cos, sin = jnp.cos(state.angles), jnp.sin(state.angles)
    return jnp.concatenate([jnp.stack([cos, sin], axis=1).ravel(), state.speeds])


def _derivative(y: Array, torque: Array) -> Array:
    """Time derivative `[4]` of angles and speeds `y` `[4]` under the torque `[]`."""
    theta_1, theta_2, speed_1, speed_2 = y
    sin_2, cos_2 = jnp.sin(theta_2), jnp.cos(theta_2)
    arm = LENGTH * CENTRE
    d_1 = MASS * (CENTRE**2 + LENGTH**2 + CENTRE**2 + 2.0 * arm * cos_2) + 2.0 * INERTIA
    d_2 = MASS * (CENTRE**2 + arm * cos_2) + INERTIA
    # The book's cos(angle - pi / 2) is the sine.
    phi_2 = MASS * CENTRE * GRAVITY * jnp.sin(theta_1 + theta_2)
    phi_1 = (
        -MASS * arm * (speed_2**2 + 2.0 * speed_2 * speed_1) * sin_2
        + MASS * (CENTRE + LENGTH) * GRAVITY * jnp.sin(theta_1)
        + phi_2
    )
    drive = torque + d_2 / d_1 * phi_1 - MASS * arm * speed_1**2 * sin_2 - phi_2
    acc_2 = drive / (MASS * CENTRE**2 + INERTIA - d_2**2 / d_1)
    acc_1 = -(d_2 * acc_2 + phi_1) / d_1
    return jnp.stack([speed_1, speed_2, acc_1, acc_2])


def _wrap(angle: Array) -> Array:
    """The angle in [-pi, pi]; one that lies there keeps its bits."""
    return angle - 2.0 * math.pi * jnp.round(angle / (2.0 * math.pi))


def reset(key: Key) -> tuple[AcrobotState, Array]:
    """Draws angles and speeds from U[-0.1, 0.1]: hanging, almost at rest."""
    start = jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)
    state = AcrobotState(start[:2], start[2:], jnp.zeros((), jnp.int32))
    return state, observe(state)


def step(state: AcrobotState, action: Array) -> tuple[AcrobotState, TimeStep]:
    """One step of 0.2 s under the largest component of `action` `[3]`.

    A NaN in the action makes state and reward NaN, so that a policy that has diverged
    does not pass for one that turns to one side.
    """
    torque = jnp.asarray(TORQUES)[jnp.argmax(action)]
    torque = jnp.where(jnp.isnan(action).any(), jnp.nan, torque)
    y = jnp.concatenate([state.angles, state.speeds])
    k_1 = _derivative(y, torque)
    k_2 = _derivative(y + DT / 2.0 * k_1, torque)
    k_3 = _derivative(y + DT / 2.0 * k_2, torque)
    k_4 = _derivative(y + DT * k_3, torque)
    y = y + DT / 6.0 * (k_1 + 2.0 * k_2 + 2.0 * k_3 + k_4)
    bound = jnp.array([MAX_SPEED_1, MAX_SPEED_2])
    new = AcrobotState(_wrap(y[:2]), jnp.clip(y[2:], -bound, bound), state.t + 1)
    height = -jnp.cos(new.angles[0]) - jnp.cos(new.angles[0] + new.angles[1])
    up = height > LENGTH
    return new, TimeStep(
        obs=observe(new),
        reward=jnp.where(jnp.isnan(height), jnp.nan, jnp.where(up, 0.0, -1.0)),
        terminated=up,
        truncated=new.t >= SPEC.horizon,
        success=up,
    )


def make() -> PureEnv:
    """The environment as a pair of pure functions."""
    return PureEnv(NAME, SPEC, reset, step, has_success=True)
