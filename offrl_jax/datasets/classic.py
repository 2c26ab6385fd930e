"""The `classic` family: datasets generated here in seconds, without any file.

Tasks are `classic/{pendulum,point_maze,gates,dmsd}-{random,medium,mixed,expert}-v0`.
Each dataset is described by its recipe: environment, controller, mixture of knobs,
seed.  On one machine the same recipe gives the same bytes in every process; on another
machine (or accelerator) the last digits of float32 may differ, so results are compared
across machines by `recipe_hash`, not by `dataset_hash`.
"""

from __future__ import annotations

import hashlib
import json
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from offrl_jax.datasets import (
    behaviour,
    behaviour_dmsd,
    behaviour_gates,
    behaviour_pendulum,
    behaviour_point_maze,
    schema,
)
from offrl_jax.datasets.schema import Episodes
from offrl_jax.types import Spec

VERSION = 1
"""Of controllers and rollout code: raised with every change that alters the data."""
SEED = 20260101
"""Of the `-v0` datasets; any other seed would be another dataset."""

QUALITIES = ("random", "medium", "mixed", "expert")
_MODULES: dict[str, ModuleType] = {
    "pendulum": behaviour_pendulum,
    "point_maze": behaviour_point_maze,
    "gates": behaviour_gates,
    "dmsd": behaviour_dmsd,
}
ENVIRONMENTS = tuple(_MODULES)
TASKS = tuple(f"classic/{e}-{q}-v0" for e in ENVIRONMENTS for q in QUALITIES)


class Generated(NamedTuple):
    """A generated dataset.

    Attributes:
      episodes: all of them, in random order of the mixture's components.
      recipe: what determines them, JSON types only.
      recipe_hash: SHA-256 of the recipe.
      success_rate: share of episodes that succeed; None where success means nothing.
    """

    episodes: Episodes
    recipe: dict[str, Any]
    recipe_hash: str
    success_rate: float | None


class Measured(NamedTuple):
    """Returns of a reference policy.

    Attributes:
      mean: over the episodes.
      standard_error: of the mean.
      episodes: how many.
    """

    mean: float
    standard_error: float
    episodes: int


def split_id(task_id: str) -> tuple[str, str]:
    """Environment and quality of a classic task id.

    Raises:
      ValueError: not one of `TASKS`.
    """
    if task_id not in TASKS:
        raise ValueError(f"'{task_id}' is not a classic task")
    name = task_id.removeprefix("classic/").removesuffix("-v0")
    environment, quality = name.rsplit("-", 1)
    return environment, quality


def env_id(environment: str) -> str:
    """The id of the environment that the behaviour acts in."""
    return _MODULES[environment].BEHAVIOUR.env.name


def env_spec(environment: str) -> Spec:
    """Dimensions and horizon of the environment."""
    return _MODULES[environment].BEHAVIOUR.env.spec


def recipe(task_id: str, seed: int = SEED) -> dict[str, Any]:
    """All that determines a dataset, as JSON types."""
    environment, quality = split_id(task_id)
    module = _MODULES[environment]
    return {
        "generator": "offrl_jax.datasets.classic",
        "version": VERSION,
        "environment": env_id(environment),
        "horizon": env_spec(environment).horizon,
        "quality": quality,
        "defaults": {k: list(v) for k, v in module.BEHAVIOUR.defaults},
        "mixture": [
            {"episodes": c.episodes, "knobs": {k: list(v) for k, v in c.knobs.items()}}
            for c in module.MIXTURES[quality]
        ],
        "seed": seed,
    }


def recipe_hash(content: dict[str, Any]) -> str:
    """SHA-256 (hex) of a recipe's canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _rng(content: dict[str, Any]) -> np.random.Generator:
    # Seeded by the recipe, so that two datasets of one seed share no knobs.
    return np.random.default_rng(int(recipe_hash(content)[:16], 16))


def generate(task_id: str, seed: int = SEED) -> Generated:
    """Generates a dataset; only `SEED` gives the one that the task id names.

    Raises:
      ValueError: not a classic task.
    """
    environment, quality = split_id(task_id)
    module = _MODULES[environment]
    content = recipe(task_id, seed)
    rng = _rng(content)
    knobs = behaviour.draw_knobs(module.BEHAVIOUR, module.MIXTURES[quality], rng)
    rows = behaviour.rollout(module.BEHAVIOUR, knobs, int(rng.integers(2**31)))
    success_rate = None
    if module.BEHAVIOUR.env.has_success:
        success_rate = float(behaviour.successes(rows).mean())
    return Generated(behaviour.pack(rows), content, recipe_hash(content), success_rate)


def measure_reference(
    environment: str, which: str, episodes: int, seed: int = 0
) -> Measured:
    """Return of a reference policy from the environment's own starts.

    Args:
      environment: one of `ENVIRONMENTS`.
      which: `minimum`, the uniform random policy, or `maximum`, the expert controller
        without noise.
      episodes: how many.
      seed: of the rollouts.
    """
    module = _MODULES[environment]
    references = {
        "minimum": module.REFERENCE_MINIMUM,
        "maximum": module.REFERENCE_MAXIMUM,
    }
    mixture = (behaviour.Component(episodes, references[which]),)
    rng = np.random.default_rng(seed)
    knobs = behaviour.draw_knobs(module.BEHAVIOUR, mixture, rng)
    rows = behaviour.rollout(module.BEHAVIOUR, knobs, seed)
    returns = schema.episode_returns(behaviour.pack(rows))
    error = float(returns.std(ddof=1) / np.sqrt(len(returns)))
    return Measured(float(returns.mean()), error, episodes)
