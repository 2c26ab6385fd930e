"""`neorl2/DMSD-v1`: two masses between three spring-dampers, driven to moving targets.

The double mass-spring-damper task of NeoRL-2 (S. Gao et al., *NeoRL-2: Near Real-World
Benchmarks for Offline Reinforcement Learning with Extended Realistic Scenarios*, 2025,
arXiv:2503.19267) in closed form.  Each mass hangs between a wall and the other mass by
equal springs (stiffness k, damping c), and each is pushed by one force:

  x1' = x1 + dt v1
  v1' = v1 + dt / m (-2k x1 + k x2 - 2c v1 + c v2 + F1),

and the same for mass 2 with the indices swapped; the right-hand sides hold old values
(explicit Euler).  The reward is `-sum_i log(|x_i' - target_i'| + 0.01)`, where target'
is the one shown in the next observation.  Each target coordinate either stays, or jumps
half way (both with probability one half).  100 steps, never terminated.

The formulas reproduce every transition of the published dataset (see the tests): the
observations to 3e-7, the rewards to the rounding of float32 positions, which the
logarithm magnifies by up to 100 next to a target (at most 2e-5).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from offrl_jax.envs.base import PureEnv, TimeStep
from offrl_jax.types import Array, Key, Spec

NAME = "neorl2/DMSD-v1"
SPEC = Spec(obs_dim=6, action_dim=2, horizon=100)

DT = 0.2
MASS = 20.0
STIFFNESS = 2.0
DAMPING = 4.0
MAX_FORCE = 30.0
MAX_TARGET = 1.5
SWITCH = SPEC.horizon // 2
"""The first time index at which the second pair of targets holds."""


class DMSDState(NamedTuple):
    """The masses, their targets and the clock.

    Attributes:
      x: `[2]`, displacements from rest.
      v: `[2]`, velocities.
      targets: `[2, 2]`, the targets of both masses (columns) before and from `SWITCH`
        (rows); equal rows where a target never moves.
      t: `[]`, int32, steps taken.
    """

    x: Array
    v: Array
    targets: Array
    t: Array


def target(state: DMSDState) -> Array:
    """The targets `[2]` that hold at the state's time."""
    return jnp.where(state.t >= SWITCH, state.targets[1], state.targets[0])


def observe(state: DMSDState) -> Array:
    """The observation `[6]`: displacements, velocities, targets."""
    return jnp.concatenate([state.x, state.v, target(state)])


def reset(key: Key) -> tuple[DMSDState, Array]:
    """Draws x from U[-0.25, 0.25], v from U[-0.1, 0.1], targets from U[-1.5, 1.5]."""
    k_x, k_v, k_targets, k_moves = jax.random.split(key, 4)
    drawn = jax.random.uniform(k_targets, (2, 2), minval=-MAX_TARGET, maxval=MAX_TARGET)
    moves = jax.random.bernoulli(k_moves, 0.5, (2,))
    state = DMSDState(
        x=jax.random.uniform(k_x, (2,), minval=-0.25, maxval=0.25),
        v=jax.random.uniform(k_v, (2,), minval=-0.1, maxval=0.1),
        targets=jnp.stack([drawn[0], jnp.where(moves, drawn[1], drawn[0])]),
        t=jnp.zeros((), jnp.int32),
    )
    return state, observe(state)


def step(state: DMSDState, action: Array) -> tuple[DMSDState, TimeStep]:
    """One step of 0.2 s under `action` `[2]`, clipped to [-1, 1]."""
    force = MAX_FORCE * jnp.clip(action, -1.0, 1.0)
    x, v = state.x, state.v
    pull = (
        -2.0 * STIFFNESS * x
        + STIFFNESS * x[::-1]
        - 2.0 * DAMPING * v
        + DAMPING * v[::-1]
        + force
    )
    new = DMSDState(x + DT * v, v + DT / MASS * pull, state.targets, state.t + 1)
    distance = jnp.abs(new.x - target(new))
    return new, TimeStep(
        obs=observe(new),
        reward=-jnp.sum(jnp.log(distance + 0.01)),
        terminated=jnp.zeros((), bool),
        truncated=new.t >= SPEC.horizon,
        success=jnp.zeros((), bool),
    )


def make() -> PureEnv:
    """The environment as a pair of pure functions."""
    return PureEnv(NAME, SPEC, reset, step)
