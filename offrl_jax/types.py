"""The vocabulary that every room shares: transitions, specs, agents.

Dimension letters, used in every docstring:

  B  batch            O  observation dimension    E  critics of an ensemble
  N  transitions      A  action dimension         M  members of a population
  T  tasks            H  settings (hyper-parameters)   S  seeds

Units: returns are raw, scores are normalised and x100, times are seconds.
All arrays are float32 unless a docstring says otherwise; keys are typed
(`jax.random.key`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
Key = jax.Array
State = Any
"""A pytree of arrays that holds everything a resume needs."""
Hyper = Any
"""A pytree of traced float32 scalars; new values never recompile."""
Metrics = Mapping[str, Array]
"""Scalars of one update, under names that are fixed per agent."""


class Transitions(NamedTuple):
    """Transitions of whole episodes; leading axis N in storage, B in a batch.

    Attributes:
      obs: `[N, O]`.
      action: `[N, A]`, in [-1, 1].
      reward: `[N]`.
      discount: `[N]`, 0 where the episode `terminated`, else 1.  A time-out
        (`truncated`) keeps 1: only a terminal state stops bootstrapping.
      next_obs: `[N, O]`, always of the same episode.
      next_action: `[N, A]`, the action taken in `next_obs`; zeros where there is none.
      has_next_action: `[N]`, 0 at the last transition of an episode, else 1.
    """

    obs: Array
    action: Array
    reward: Array
    discount: Array
    next_obs: Array
    next_action: Array
    has_next_action: Array


@dataclasses.dataclass(frozen=True)
class Spec:
    """What an agent must know of a task: dimensions and horizon.

    Tasks of equal spec can be trained as one population.

    Attributes:
      obs_dim: O.
      action_dim: A.
      horizon: most steps of an episode.
      discrete: False: actions lie in [-1, 1].  True: an action is one of A
        alternatives, written as a one-hot vector; an environment takes the largest
        component.
    """

    obs_dim: int
    action_dim: int
    horizon: int
    discrete: bool = False


class InitFn(Protocol):
    """Type of `Agent.init`."""

    def __call__(self, key: Key, hyper: Hyper) -> State:
        """Draws a fresh state."""
        ...


class ActFn(Protocol):
    """Type of `Agent.act`."""

    def __call__(self, key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        """Actions `[B, A]` in [-1, 1] for evaluation in `obs` `[B, O]`."""
        ...


class UpdateFn(Protocol):
    """Type of `Phase.update`."""

    def __call__(
        self, key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        """One call of a phase; `batch` leaves have the leading axis `stride * B`."""
        ...


class Phase(NamedTuple):
    """One stage of training.

    Attributes:
      name: shown in bars and rows.
      update: see `UpdateFn`.
      stride: how many updates one call of `update` performs and is counted for.  It
        receives as many batches, one after the other on the leading axis.  An actor
        that is updated at every second critic update declares 2 and does so: under
        `vmap` a `lax.cond` on the step would compute the actor's gradient every time.
    """

    name: str
    update: UpdateFn
    stride: int = 1


class Collection(NamedTuple):
    """How an on-policy agent gathers experience; see `collection.on_policy_collector`.

    Such an agent has batches of one transition and a phase whose stride is a whole
    rollout, so that its updates count environment steps.

    Attributes:
      explore: `(key, state, obs, hyper) -> action`, the policy that acts while
        learning; the batch holds its actions as drawn, the environment clips them.
      environments: episodes advanced side by side.  A batch `[steps * environments]`
        is time-major: all environments' first transitions, then their second ones.
    """

    explore: ActFn
    environments: int


class Agent(NamedTuple):
    """An algorithm: pure functions, made for one structure and one `Spec`.

    Attributes:
      init: `(key, hyper) -> state`.
      act: `(key, state, obs, hyper) -> action`, the policy that is evaluated.
      phases: run one after the other; `--updates` counts the last one.
      batch_size: B, transitions of one update.
      collection: how the agent gathers its own experience; None: it learns from data.
    """

    init: InitFn
    act: ActFn
    phases: tuple[Phase, ...]
    batch_size: int
    collection: Collection | None = None


class ObsStats(NamedTuple):
    """Standardisation of observations, `(obs - mean) / std`; saved with every policy.

    Attributes:
      mean: `[O]`, zeros for the identity.
      std: `[O]`, ones for the identity.
    """

    mean: Array
    std: Array
