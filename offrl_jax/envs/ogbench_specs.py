"""OGBench's single-task environments by id, known without its package.

Ids are `ogbench/<environment>-singletask-task<1..5>-v0`; `offrl_jax.envs.ogbench` steps
them.  Dimensions and time limits are those that ogbench 1.2 registers.
"""

from __future__ import annotations

from offrl_jax.types import Spec

PREFIX = "ogbench/"
GOALS = (1, 2, 3, 4, 5)
"""Numbers of the evaluation goals; each one is a task of its own."""

ENVIRONMENTS: dict[str, Spec] = {
    "pointmaze-medium": Spec(2, 2, 1000),
    "pointmaze-large": Spec(2, 2, 1000),
    "cube-single": Spec(28, 5, 200),
    "scene": Spec(40, 5, 750),
    "puzzle-3x3": Spec(55, 5, 500),
}
"""Environments whose data can be made without a trained expert."""


def env_id(environment: str, goal: int) -> str:
    """The id of the environment with one of its goals."""
    return f"{PREFIX}{environment}-singletask-task{goal}-v0"


IDS: dict[str, tuple[str, int]] = {
    env_id(environment, goal): (environment, goal)
    for environment in ENVIRONMENTS
    for goal in GOALS
}
"""Environment and goal of every id."""
