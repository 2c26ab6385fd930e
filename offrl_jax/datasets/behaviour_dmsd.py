"""Behaviour for `neorl2/DMSD-v1`: PID position control with target feed-forward.

The feed-forward force holds the masses at their targets: F = 2k x1 - k x2 (mass 1).
The expert inverts the model instead: it picks the velocity from which the mass can
still brake in time, v = sign(e) min(|e| / dt, sqrt(2 a |e|)), and the force that gives
exactly this velocity after one step.
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
from offrl_jax.envs import dmsd
from offrl_jax.types import Array, Key

_ENV = dmsd.make()

DEFAULTS = {
    # 0: PID with feed-forward; 1: the model-based controller.
    "inverse": (0.0, 0.0),
    # Deceleration, length per s^2, that the model-based controller counts on.
    "brake": (1.0, 1.0),
    "feed_forward": (1.0, 1.0),
    "proportional": (20.0, 20.0),
    "integral": (0.0, 0.0),
    "derivative": (15.0, 15.0),
    # A constant error of the measured positions, of opposite sign for the two masses.
    "offset": (0.0, 0.0),
    "noise": (0.0, 0.0),
    "epsilon": (0.0, 0.0),
}


def start(key: Key, knobs: Knobs) -> tuple[Any, Array, Any]:
    """The environment's own start; the memory is the integral of the error `[2]`."""
    del knobs
    state, obs = _ENV.reset(key)
    return state, obs, jnp.zeros(2)


def act(key: Key, knobs: Knobs, memory: Any, obs: Array) -> tuple[Array, Any]:
    """Drives both masses to their targets."""
    x, v, target = obs[0:2], obs[2:4], obs[4:6]
    sign = jnp.array([1.0, -1.0])
    error = target + sign * knobs["offset"] - x
    memory = memory + dmsd.DT * error

    hold = 2.0 * dmsd.STIFFNESS * target - dmsd.STIFFNESS * target[::-1]
    pid = (
        knobs["feed_forward"] * hold
        + knobs["proportional"] * error
        + knobs["integral"] * memory
        - knobs["derivative"] * v
    )

    # The force acts on the velocity first: it moves the mass from x + dt v on.
    ahead = error - dmsd.DT * v
    distance = jnp.abs(ahead)
    speed = jnp.minimum(distance / dmsd.DT, jnp.sqrt(2.0 * knobs["brake"] * distance))
    pull = -2.0 * dmsd.STIFFNESS * x + dmsd.STIFFNESS * x[::-1]
    pull = pull - 2.0 * dmsd.DAMPING * v + dmsd.DAMPING * v[::-1]
    inverse = dmsd.MASS / dmsd.DT * (jnp.sign(ahead) * speed - v) - pull

    force = jnp.where(knobs["inverse"] > 0.5, inverse, pid)
    action = jnp.clip(force / dmsd.MAX_FORCE, -1.0, 1.0)
    return with_noise(key, knobs, action), memory


BEHAVIOUR = Behaviour(_ENV, start, act, never_finished, tuple(DEFAULTS.items()))

_RANDOM = {"epsilon": (1.0, 1.0)}
# Badly tuned PID controllers with a wrong zero: they arrive late and beside the target.
_MEDIUM = {
    "feed_forward": (0.5, 1.2),
    "proportional": (8.0, 20.0),
    "integral": (0.0, 3.0),
    "derivative": (4.0, 20.0),
    "offset": (-0.15, 0.15),
    "noise": (0.05, 0.2),
}
_EXPERT = {"inverse": (1.0, 1.0)}
_NOISY_EXPERT = _EXPERT | {"noise": (0.1, 0.3), "epsilon": (0.0, 0.2)}

MIXTURES = {
    "random": (Component(600, _RANDOM),),
    "medium": (Component(600, _MEDIUM),),
    "mixed": (
        Component(225, _RANDOM),
        Component(300, _MEDIUM),
        Component(75, _NOISY_EXPERT),
    ),
    "expert": (Component(600, _EXPERT | {"noise": (0.02, 0.02)}),),
}

REFERENCE_MINIMUM = _RANDOM
REFERENCE_MAXIMUM = _EXPERT
