"""`classic/gates-v0`: walls with two openings, one of which is glass.

A task of this suite's own, made for policies with several modes.  The action is the
point of the wall, in [-1, 1]^2, through which to pass.  The openings are discs of
radius `OPENING` around `+p` and `-p`, `p = DISTANCE (cos phi, sin phi)`.  For every
wall, phi and which opening is glass are drawn anew, whatever was done before:

- through the clear opening: 1 point, and on to the next wall;
- against the glass: nothing, and the same wall again;
- anywhere else: a hit, which ends the episode (`terminated`) and pays nothing.

Episodes are cut off after 20 steps.  The observation is `(cos 2 phi, sin 2 phi)`: it
tells neither the openings apart, which half a turn of the wall exchanges, nor which one
is glass, nor that one has just been tried.

Why a policy with one mode must fail, however it is trained: at the same observation it
does the same again.  If it goes for one opening, the first glass there holds it for
good: it passes 1 wall on average.  If it is broad enough to reach both, it mostly hits
the wall between them.  No Gaussian at any mean and spread passes more than 1
(`tests/test_envs_gates.py` tries them all), a coin that is tossed between the openings
passes 10.  The data are made with such a coin, and both openings have the same value,
so that improvement by value gives no reason to give one of them up.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from offrl_jax.envs.base import PureEnv, TimeStep
from offrl_jax.types import Array, Key, Spec

NAME = "classic/gates-v0"
SPEC = Spec(obs_dim=2, action_dim=2, horizon=20)

DISTANCE = 0.7
"""Of an opening's centre from the wall's middle."""
OPENING = 0.25
"""Radius of an opening; it lies within the wall."""


class GatesState(NamedTuple):
    """The wall ahead and the clock.

    Attributes:
      key: of the walls to come.
      phi: `[]`, radians, the direction of the clear opening; that of the other one is
        phi + pi.
      t: `[]`, int32, steps taken.
    """

    key: Key
    phi: Array
    t: Array


def observe(phi: Array) -> Array:
    """The observation `[2]` of a wall."""
    return jnp.stack([jnp.cos(2.0 * phi), jnp.sin(2.0 * phi)])


def opening(obs: Array) -> Array:
    """One of the openings' centres `[2]` at an observation; minus it is the other."""
    return centre(0.5 * jnp.arctan2(obs[1], obs[0]))


def centre(phi: Array) -> Array:
    """Centre `[2]` of the opening in direction phi `[]`, radians."""
    return DISTANCE * jnp.stack([jnp.cos(phi), jnp.sin(phi)])


def within(phi: Array, action: Array) -> Array:
    """Whether `action` `[2]` lies in the opening in direction phi; bool `[]`."""
    return jnp.sum((action - centre(phi)) ** 2) <= OPENING**2


def _next_wall(key: Key) -> tuple[Key, Array]:
    key, k_phi = jax.random.split(key)
    return key, jax.random.uniform(k_phi, (), maxval=2.0 * math.pi)


def reset(key: Key) -> tuple[GatesState, Array]:
    """The first wall."""
    key, phi = _next_wall(key)
    return GatesState(key, phi, jnp.zeros((), jnp.int32)), observe(phi)


def step(state: GatesState, action: Array) -> tuple[GatesState, TimeStep]:
    """Towards the wall at `action` `[2]`, clipped to [-1, 1]."""
    action = jnp.clip(action, -1.0, 1.0)
    passed = within(state.phi, action)
    bounced = within(state.phi + math.pi, action)
    key, phi = _next_wall(state.key)
    phi = jnp.where(passed, phi, state.phi)
    new = GatesState(key, phi, state.t + 1)
    return new, TimeStep(
        obs=observe(phi),
        reward=passed.astype(jnp.float32),
        terminated=~(passed | bounced),
        truncated=new.t >= SPEC.horizon,
        success=jnp.zeros((), bool),
    )


def make() -> PureEnv:
    """The environment as a pair of pure functions."""
    return PureEnv(NAME, SPEC, reset, step)
