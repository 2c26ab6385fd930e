"""`classic/pendulum-v0`: swing up and balance a pendulum, as Gymnasium's Pendulum-v1.

Same constants, same semi-implicit Euler step and same reward as Gymnasium (T. Brockman
et al., *OpenAI Gym*, 2016; Farama's Pendulum-v1), written as pure functions in float32.
The one difference of interface: actions lie in [-1, 1] and are scaled to the torque, so
`action = torque / 2`.  Episodes take 200 steps and never terminate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from offrl_jax.envs.base import PureEnv, TimeStep
from offrl_jax.types import Array, Key, Spec

NAME = "classic/pendulum-v0"
SPEC = Spec(obs_dim=3, action_dim=1, horizon=200)

GRAVITY = 10.0
MASS = 1.0
LENGTH = 1.0
MAX_TORQUE = 2.0
MAX_SPEED = 8.0
DT = 0.05


class PendulumState(NamedTuple):
    """The pendulum and the clock.

    Attributes:
      theta: `[]`, radians, 0 upright; kept in [-pi, pi), so that float32 keeps its
        digits.
      velocity: `[]`, radians per second.
      t: `[]`, int32, steps taken.
    """

    theta: Array
    velocity: Array
    t: Array


def _wrap(angle: Array) -> Array:
    return jnp.mod(angle + math.pi, 2.0 * math.pi) - math.pi


def observe(state: PendulumState) -> Array:
    """The observation `[3]` of a state: cosine and sine of the angle, velocity."""
    return jnp.stack([jnp.cos(state.theta), jnp.sin(state.theta), state.velocity])


def reset(key: Key) -> tuple[PendulumState, Array]:
    """Draws theta from U[-pi, pi] and the velocity from U[-1, 1]."""
    k_theta, k_velocity = jax.random.split(key)
    state = PendulumState(
        theta=jax.random.uniform(k_theta, (), minval=-math.pi, maxval=math.pi),
        velocity=jax.random.uniform(k_velocity, (), minval=-1.0, maxval=1.0),
        t=jnp.zeros((), jnp.int32),
    )
    return state, observe(state)


def step(state: PendulumState, action: Array) -> tuple[PendulumState, TimeStep]:
    """One step of 0.05 s under `action` `[1]`, clipped to [-1, 1]."""
    torque = MAX_TORQUE * jnp.clip(action[0], -1.0, 1.0)
    # The cost is that of the state before the step, as in Gymnasium.
    cost = _wrap(state.theta) ** 2 + 0.1 * state.velocity**2 + 0.001 * torque**2
    acceleration = (
        3.0 * GRAVITY / (2.0 * LENGTH) * jnp.sin(state.theta)
        + 3.0 / (MASS * LENGTH**2) * torque
    )
    velocity = jnp.clip(state.velocity + acceleration * DT, -MAX_SPEED, MAX_SPEED)
    new = PendulumState(_wrap(state.theta + velocity * DT), velocity, state.t + 1)
    return new, TimeStep(
        obs=observe(new),
        reward=-cost,
        terminated=jnp.zeros((), bool),
        truncated=new.t >= SPEC.horizon,
        success=jnp.zeros((), bool),
    )


def make() -> PureEnv:
    """The environment as a pair of pure functions."""
    return PureEnv(NAME, SPEC, reset, step)
