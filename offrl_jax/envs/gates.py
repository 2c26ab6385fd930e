"""`classic/gates-v0`: one wall after the other, each with two openings, equally good.

A task of this suite's own, made for policies with several modes.  The action is the
point of the wall, in [-1, 1]^2, through which to pass.  The openings are discs of
radius `OPENING` around `+p` and `-p`, `p = DISTANCE (cos phi, sin phi)`, with phi drawn
anew for every wall, whatever was done before.  Passing pays 1; a hit ends the episode
(`terminated`) and pays 0; episodes are cut off after 20 walls.

The observation is `(cos 2 phi, sin 2 phi)`: turning the wall by half a turn exchanges
its openings and changes nothing, so the observation does not tell them apart.

Why a unimodal policy must fail, however it is trained:

- It cannot *imitate*: by symmetry the mean of data that use both openings alike is the
  wall's middle, and the Gaussian of largest likelihood passes seldom (`tests/
  test_envs_gates.py` computes how seldom).
- It cannot *choose* either, if its mean is continuous in the observation: once round
  the circle of observations turns phi by half a turn, so a mean that stays with one
  opening comes back at the other one, and somewhere in between it crosses the wall.

A policy that is a continuous image of noise, like a flow, has no such difficulty: it
uses both openings everywhere.
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
      phi: `[]`, radians, the direction of one opening.
      t: `[]`, int32, walls passed.
    """

    key: Key
    phi: Array
    t: Array


def observe(phi: Array) -> Array:
    """The observation `[2]` of a wall."""
    return jnp.stack([jnp.cos(2.0 * phi), jnp.sin(2.0 * phi)])


def opening(obs: Array) -> Array:
    """One of the openings' centres `[2]` at an observation; minus it is the other."""
    phi = 0.5 * jnp.arctan2(obs[1], obs[0])
    return DISTANCE * jnp.stack([jnp.cos(phi), jnp.sin(phi)])


def passes(phi: Array, action: Array) -> Array:
    """Whether `action` `[2]` lies in an opening; bool `[]`."""
    centre = DISTANCE * jnp.stack([jnp.cos(phi), jnp.sin(phi)])
    nearest = jnp.minimum(
        jnp.sum((action - centre) ** 2), jnp.sum((action + centre) ** 2)
    )
    return nearest <= OPENING**2


def _next_wall(key: Key) -> tuple[Key, Array]:
    key, k_phi = jax.random.split(key)
    return key, jax.random.uniform(k_phi, (), maxval=math.pi)


def reset(key: Key) -> tuple[GatesState, Array]:
    """The first wall."""
    key, phi = _next_wall(key)
    return GatesState(key, phi, jnp.zeros((), jnp.int32)), observe(phi)


def step(state: GatesState, action: Array) -> tuple[GatesState, TimeStep]:
    """Through the wall at `action` `[2]`, clipped to [-1, 1], or into it."""
    passed = passes(state.phi, jnp.clip(action, -1.0, 1.0))
    key, phi = _next_wall(state.key)
    new = GatesState(key, phi, state.t + 1)
    return new, TimeStep(
        obs=observe(phi),
        reward=passed.astype(jnp.float32),
        terminated=~passed,
        truncated=new.t >= SPEC.horizon,
        success=passed & (new.t >= SPEC.horizon),
    )


def make() -> PureEnv:
    """The environment as a pair of pure functions."""
    return PureEnv(NAME, SPEC, reset, step, has_success=True)
