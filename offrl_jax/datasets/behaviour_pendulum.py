"""Behaviour for `classic/pendulum-v0`: energy-based swing-up, then a linear controller.

The energy of the rod is E = thetadot^2 / 6 + 5 cos(theta) (I = 1/3, m g l / 2 = 5), and
dE/dt = thetadot u, so a torque u of the sign of thetadot (E_top - E) swings it up
(Astrom & Furuta 2000, *Swinging up a pendulum by energy control*).  Near the top,
u = -(p theta + d thetadot) balances: 15 theta + 3 u is stable for p > 5.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from offrl_jax.datasets.behaviour import (
    Behaviour,
    Component,
    Knobs,
    never_finished,
    with_noise,
)
from offrl_jax.envs import pendulum
from offrl_jax.types import Array, Key

_ENV = pendulum.make()

DEFAULTS = {
    # The energy that the swing-up aims at; that of rest at the top is 5.
    "energy": (5.2, 5.2),
    "pump": (3.0, 3.0),
    # |theta| below which the linear controller takes over, if it can still catch.
    "catch": (0.6, 0.6),
    "proportional": (12.0, 12.0),
    "derivative": (3.0, 3.0),
    # Share of the torque that is used, and a constant error of the torque.
    "strength": (1.0, 1.0),
    "bias": (0.0, 0.0),
    "noise": (0.0, 0.0),
    "epsilon": (0.0, 0.0),
}


def start(key: Key, knobs: Knobs) -> tuple[Any, Array, Any]:
    """The environment's own start; no memory."""
    del knobs
    state, obs = _ENV.reset(key)
    return state, obs, ()


def act(key: Key, knobs: Knobs, memory: Any, obs: Array) -> tuple[Array, Any]:
    """Pumps energy until the linear controller can hold the pendulum."""
    cosine, sine, velocity = obs[0], obs[1], obs[2]
    theta = jnp.arctan2(sine, cosine)
    energy = velocity**2 / 6.0 + 5.0 * cosine
    # At rest the sign is 0 and nothing would ever move.
    direction = jnp.where(velocity >= 0, 1.0, -1.0)
    pump = knobs["pump"] * direction * (knobs["energy"] - energy)
    hold = -(knobs["proportional"] * theta + knobs["derivative"] * velocity)
    torque = jnp.where(jnp.abs(theta) < knobs["catch"], hold, pump)
    limit = pendulum.MAX_TORQUE * knobs["strength"]
    torque = jnp.clip(torque, -limit, limit) + knobs["bias"]
    action = (torque / pendulum.MAX_TORQUE)[None]
    return with_noise(key, knobs, action), memory


BEHAVIOUR = Behaviour(_ENV, start, act, never_finished, tuple(DEFAULTS.items()))

_RANDOM = {"epsilon": (1.0, 1.0)}
# Swings up, but with part of the torque and a wrong zero, and balances badly.
_MEDIUM = {
    "strength": (0.4, 0.8),
    "pump": (0.3, 1.5),
    "energy": (3.5, 5.5),
    "bias": (-0.5, 0.5),
    "proportional": (6.0, 12.0),
    "derivative": (0.5, 2.0),
    "noise": (0.1, 0.4),
}
_NOISY_EXPERT = {"noise": (0.2, 0.5), "epsilon": (0.0, 0.2)}

MIXTURES = {
    "random": (Component(300, _RANDOM),),
    "medium": (Component(300, _MEDIUM),),
    "mixed": (
        Component(110, _RANDOM),
        Component(150, _MEDIUM),
        Component(40, _NOISY_EXPERT),
    ),
    "expert": (Component(300, {"noise": (0.05, 0.05)}),),
}

REFERENCE_MINIMUM = _RANDOM
REFERENCE_MAXIMUM: dict[str, tuple[float, float]] = {}
