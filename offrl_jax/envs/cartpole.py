"""`control/CartPole-v1`: balance a pole on a cart, as Gymnasium's CartPole-v1.

The equations of R. V. Florian, *Correct equations for the dynamics of the cart-pole
system* (2005), eq. 23 and 24 without friction, for the task of A. Barto, R. Sutton and
C. Anderson, *Neuronlike adaptive elements that can solve difficult learning control
problems* (1983), with the constants and the explicit Euler step of Gymnasium; float32
where Gymnasium keeps float64.  Every step earns 1; the episode terminates when the cart
leaves the track or the pole falls, and is cut after 500 steps.  A discrete environment:
see `offrl_jax.types.Spec.discrete`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from offrl_jax.envs.base import PureEnv, TimeStep
from offrl_jax.types import Array, Key, Spec

NAME = "control/CartPole-v1"
SPEC = Spec(obs_dim=4, action_dim=2, horizon=500, discrete=True)

GRAVITY = 9.8
CART_MASS = 1.0
POLE_MASS = 0.1
MASS = CART_MASS + POLE_MASS
HALF_LENGTH = 0.5
FORCES = (-10.0, 10.0)
"""Newtons, by action: to the left, to the right."""
DT = 0.02
MAX_X = 2.4
MAX_THETA = 12 * 2 * math.pi / 360


class CartPoleState(NamedTuple):
    """Cart, pole and clock.

    Attributes:
      x: `[]`, metres from the middle of the track.
      x_dot: `[]`, metres per second.
      theta: `[]`, radians, 0 upright.
      theta_dot: `[]`, radians per second.
      t: `[]`, int32, steps taken.
    """

    x: Array
    x_dot: Array
    theta: Array
    theta_dot: Array
    t: Array


def observe(state: CartPoleState) -> Array:
    """The observation `[4]` of a state: all of it but the clock."""
    return jnp.stack([state.x, state.x_dot, state.theta, state.theta_dot])


def reset(key: Key) -> tuple[CartPoleState, Array]:
    """Draws all four from U[-0.05, 0.05]."""
    start = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    x, x_dot, theta, theta_dot = start
    state = CartPoleState(x, x_dot, theta, theta_dot, jnp.zeros((), jnp.int32))
    return state, observe(state)


def step(state: CartPoleState, action: Array) -> tuple[CartPoleState, TimeStep]:
    """One step of 0.02 s under the larger component of `action` `[2]`.

    A NaN in the action makes the reward NaN and terminates: a policy that has diverged
    must not pass for one that pushes to the left.
    """
    force = jnp.asarray(FORCES)[jnp.argmax(action)]
    force = jnp.where(jnp.isnan(action).any(), jnp.nan, force)
    x, x_dot, theta, theta_dot, t = state
    sin, cos = jnp.sin(theta), jnp.cos(theta)
    pole = POLE_MASS * HALF_LENGTH
    push = (force + pole * theta_dot**2 * sin) / MASS
    inertia = HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * cos**2 / MASS)
    theta_acc = (GRAVITY * sin - cos * push) / inertia
    x_acc = push - pole * theta_acc * cos / MASS
    new = CartPoleState(
        x=x + DT * x_dot,
        x_dot=x_dot + DT * x_acc,
        theta=theta + DT * theta_dot,
        theta_dot=theta_dot + DT * theta_acc,
        t=t + 1,
    )
    within = (jnp.abs(new.x) <= MAX_X) & (jnp.abs(new.theta) <= MAX_THETA)
    return new, TimeStep(
        obs=observe(new),
        reward=jnp.where(jnp.isnan(force), jnp.nan, 1.0),
        terminated=~within | jnp.isnan(force),
        truncated=new.t >= SPEC.horizon,
        success=jnp.zeros((), bool),
    )


def make() -> PureEnv:
    """The environment as a pair of pure functions."""
    return PureEnv(NAME, SPEC, reset, step)
