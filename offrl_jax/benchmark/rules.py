"""How a test suite says by what its settings were chosen, and what was chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from offrl_jax.errors import UsageError

LAST_SCORE = "last_score"
PER_TASK_SUFFIX = "_per_task"
GRAMMAR = (
    f"'{LAST_SCORE}' or 'metric:NAME:min' or 'metric:NAME:max', each also with "
    f"'{PER_TASK_SUFFIX}' at its end"
)


class Rule(NamedTuple):
    """What is compared between the tuning runs of an agent's settings.

    Attributes:
      metric: a training metric; None for the score of the last evaluation.
      largest: whether the largest value is the best one.
      per_task: whether every task gets a setting of its own.
    """

    metric: str | None
    largest: bool
    per_task: bool


def parse_rule(text: str) -> Rule:
    """A rule from its name in a suite file.

    Raises:
      UsageError: it is none.
    """
    name = text.removesuffix(PER_TASK_SUFFIX)
    per_task = name != text
    if name == LAST_SCORE:
        return Rule(None, True, per_task)
    kind, _, rest = name.partition(":")
    metric, _, end = rest.rpartition(":")
    if kind != "metric" or not metric or end not in ("min", "max"):
        raise UsageError(f"unknown rule '{text}' of selection; write {GRAMMAR}")
    return Rule(metric, end == "max", per_task)


@dataclasses.dataclass(frozen=True)
class Selection:
    """How the settings of a test suite are chosen (`[selection]` of its file).

    Attributes:
      source: a suite of role `tune`, whose results lie in `results/NAME`, or a results
        folder; `from` in the file.
      rule: see `parse_rule`.
      incomplete: whether settings whose tuning is not finished are left out, instead of
        refusing to choose.
      other_updates: whether tuning runs may have another number of updates.
    """

    source: str
    rule: str
    incomplete: bool = False
    other_updates: bool = False

    def __post_init__(self) -> None:
        parse_rule(self.rule)
        if not self.source:
            raise UsageError("selection needs 'from': a suite or a results folder")

    def folder(self) -> Path:
        """The results folder that the tuning runs lie in."""
        there = Path(self.source)
        named = "/" in self.source or there.is_dir()
        return there if named else Path("results") / self.source


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for an agent.

    Attributes:
      record: what its rows carry as `protocol["selection"]`: `from` (the suite that
        tuned), `rule`, `settings` (how many were tried) and `seeds` (of each).
      setting: its name.
      values: by task, every setting of the agent by name; empty where nothing was
        chosen because the suite gives the settings.
      data: by task, the hash of the data that the tuning runs learned from (of the
        recipe where there is one).
    """

    record: Mapping[str, Any]
    setting: str = ""
    values: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    data: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
