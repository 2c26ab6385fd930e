"""Behaviour for `classic/gates-v0`: aims at one opening or the other.

A coin decides, tossed anew at every wall, so data of every quality but `random` have
two modes, of equal weight and value, at every observation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from offrl_jax.datasets.behaviour import (
    Behaviour,
    Component,
    Knobs,
    never_finished,
    with_noise,
)
from offrl_jax.envs import gates
from offrl_jax.types import Array, Key

_ENV = gates.make()

DEFAULTS = {
    # Where on the way from the middle to the opening's centre it aims, 1 at the centre.
    "reach": (1.0, 1.0),
    "noise": (0.0, 0.0),
    "epsilon": (0.0, 0.0),
}


def start(key: Key, knobs: Knobs) -> tuple[Any, Array, Any]:
    """The environment's own start; no memory."""
    del knobs
    state, obs = _ENV.reset(key)
    return state, obs, ()


def act(key: Key, knobs: Knobs, memory: Any, obs: Array) -> tuple[Array, Any]:
    """Aims at one of the two openings."""
    k_coin, k_noise = jax.random.split(key)
    side = jnp.where(jax.random.bernoulli(k_coin), 1.0, -1.0)
    action = knobs["reach"] * side * gates.opening(obs)
    return with_noise(k_noise, knobs, action), memory


BEHAVIOUR = Behaviour(_ENV, start, act, never_finished, tuple(DEFAULTS.items()))

_RANDOM = {"epsilon": (1.0, 1.0)}
# Hits the wall at about every third step: aims badly, and too near to the middle.
_MEDIUM = {"noise": (0.1, 0.2), "reach": (0.7, 1.0)}
_NOISY_EXPERT = {"noise": (0.05, 0.15)}

MIXTURES = {
    "random": (Component(55_000, _RANDOM),),
    "medium": (Component(18_000, _MEDIUM),),
    "mixed": (
        Component(10_000, _RANDOM),
        Component(11_000, _MEDIUM),
        Component(800, _NOISY_EXPERT),
    ),
    "expert": (Component(3_000, {"noise": (0.06, 0.06)}),),
}

REFERENCE_MINIMUM = _RANDOM
REFERENCE_MAXIMUM: dict[str, tuple[float, float]] = {}
