"""What a task id means: dataset, environment, horizon, reference scores, provenance.

A task id says family and version, `classic/pendulum-mixed-v0`.  Families are never
averaged together: `classic` is generated here, `neorl2` are the official files,
`minari` and `local` are whatever the user put into the store.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from offrl_jax.datasets.schema import Episodes
from offrl_jax.types import Spec


@dataclasses.dataclass(frozen=True)
class Reference:
    """Returns that mean 0 and 100: `score = 100 (R - minimum) / (maximum - minimum)`.

    Attributes:
      minimum: undiscounted return of score 0.
      maximum: undiscounted return of score 100.
      source: who published the two numbers, or how they were measured.
    """

    minimum: float
    maximum: float
    source: str


@dataclasses.dataclass(frozen=True)
class Task:
    """One dataset and, where there is one, the environment that scores policies.

    Attributes:
      id: family, name and version.
      family: `classic`, `neorl2`, `minari` or `local`.
      env_id: name for `offrl_jax.envs.make`; None: can be trained on, not evaluated.
      spec: dimensions and horizon.
      reference: None: returns of this task are never normalised.
      provenance: where the data come from, in a phrase.
      description: one line for people.
    """

    id: str
    family: str
    env_id: str | None
    spec: Spec
    reference: Reference | None
    provenance: str
    description: str


@dataclasses.dataclass(frozen=True)
class LoadedTask:
    """A task with its data, memory-mapped from the store.

    Attributes:
      task: the entry.
      spec: same as `task.spec`.
      train: the episodes to train on.
      validation: held-out episodes: the official split, or the last 5 % of episodes;
        None where neither exists.
      dataset_hash: SHA-256 of the arrays of `train`.
      recipe_hash: identifies a generated dataset across machines; None for files.
    """

    task: Task
    spec: Spec
    train: Episodes
    validation: Episodes | None
    dataset_hash: str
    recipe_hash: str | None


def normalised_score(reference: Reference, returns: np.ndarray) -> np.ndarray:
    """`100 (R - minimum) / (maximum - minimum)`, float64, shape of `returns`."""
    span = reference.maximum - reference.minimum
    return 100.0 * (np.asarray(returns, np.float64) - reference.minimum) / span
