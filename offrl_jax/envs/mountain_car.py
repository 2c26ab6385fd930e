"""`control/MountainCarContinuous-v0`: out of a valley with too weak an engine.

The task of A. Moore, *Efficient memory-based learning for robot control* (1990), with
the constants, the order of operations and the reward of Gymnasium's
MountainCarContinuous-v0; float32, as Gymnasium's state is.  A step costs a tenth of the
squared action; reaching the flag earns 100 and terminates, the task's success.  The
episode is cut after 999 steps.  (Gymnasium charges actions beyond [-1, 1] as they are;
here they are clipped first.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from offrl_jax.envs.base import PureEnv, TimeStep
from offrl_jax.types import Array, Key, Spec

NAME = "control/MountainCarContinuous-v0"
SPEC = Spec(obs_dim=2, action_dim=1, horizon=999)

POWER = 0.0015
SLOPE = 0.0025
MIN_POSITION = -1.2
MAX_POSITION = 0.6
MAX_SPEED = 0.07
FLAG = 0.45


class MountainCarState(NamedTuple):
    """The car and the clock.

    Attributes:
      position: `[]`, in [-1.2, 0.6], the flag at 0.45.
      velocity: `[]`, positions per step.
      t: `[]`, int32, steps taken.
    """

    position: Array
    velocity: Array
    t: Array


def observe(state: MountainCarState) -> Array:
    """The observation `[2]` of a state: position and velocity."""
    return jnp.stack([state.position, state.velocity])


def reset(key: Key) -> tuple[MountainCarState, Array]:
    """At rest, at a position from U[-0.6, -0.4]."""
    state = MountainCarState(
        position=jax.random.uniform(key, (), minval=-0.6, maxval=-0.4),
        velocity=jnp.zeros(()),
        t=jnp.zeros((), jnp.int32),
    )
    return state, observe(state)


def step(state: MountainCarState, action: Array) -> tuple[MountainCarState, TimeStep]:
    """One step under the force `action` `[1]`, clipped to [-1, 1].

    A NaN action makes state and reward NaN.
    """
    force = jnp.clip(action[0], -1.0, 1.0)
    gain = force * POWER - SLOPE * jnp.cos(3.0 * state.position)
    velocity = jnp.clip(state.velocity + gain, -MAX_SPEED, MAX_SPEED)
    position = jnp.clip(state.position + velocity, MIN_POSITION, MAX_POSITION)
    # The wall on the left takes all speed; that on the right lies beyond the flag.
    stopped = (position <= MIN_POSITION) & (velocity < 0.0)
    velocity = jnp.where(stopped, 0.0, velocity)
    new = MountainCarState(position, velocity, state.t + 1)
    arrived = (position >= FLAG) & (velocity >= 0.0)
    return new, TimeStep(
        obs=observe(new),
        reward=jnp.where(arrived, 100.0, 0.0) - 0.1 * force**2,
        terminated=arrived,
        truncated=new.t >= SPEC.horizon,
        success=arrived,
    )


def make() -> PureEnv:
    """The environment as a pair of pure functions."""
    return PureEnv(NAME, SPEC, reset, step, has_success=True)
