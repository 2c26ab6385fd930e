"""Chooses a setting per arm from tuning runs, by the rule that is printed with it.

Example:
  offrl benchmark onpolicy_tuning
  python benchmarks/onpolicy/choose.py results/onpolicy_tuning

An *arm* is an agent and the name of its grid (`[grids.AGENT.NAME]`); its settings were
all run on the same tasks and tuning seeds.  The rule: the highest mean, over tasks, of
the mean over seeds of the last evaluation's score; a diverged or failed run counts as
the lowest score of any run of its task.  One setting serves all tasks.  The chosen
settings are printed as tables for a suite file, below a table of how close the choice
was.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro
from tyro.conf import Positional

from offrl_jax.benchmark.suites import Suite, load_suite
from offrl_jax.errors import OffrlError, UsageError
from offrl_jax.results import Row, read_rows

Arm = tuple[str, str]
"""Agent and name of the grid."""


@dataclasses.dataclass(frozen=True)
class Choose:
    """Prints the table and the settings."""

    results: Positional[Path]
    """Results folder of a suite with `role = "tune"`."""
    suite: str | None = None
    """The suite, by name or file.  Default: as its rows call it."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting of an arm.

    Attributes:
      setting: its name.
      values: what its name says: the entries that the grid varies.
      by_task: mean score over seeds, by task.
    """

    setting: str
    values: Mapping[str, str]
    by_task: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The mean over tasks, by which a setting is chosen."""
        return statistics.fmean(self.by_task.values())


def arm_of(row: Row) -> Arm:
    """`("a2c@quick", "sgd")` of the setting `sgd,actor_lr=0.1`."""
    return row.agent, row.setting.partition(",")[0]


def varied(setting: str) -> dict[str, str]:
    """`{"actor_lr": "0.1"}` of `sgd,actor_lr=0.1`."""
    pairs = (part.partition("=") for part in setting.split(",")[1:])
    return {name: value for name, _, value in pairs}


def candidates(rows: Sequence[Row]) -> dict[Arm, list[Candidate]]:
    """All settings of every arm, the best first.

    Raises:
      UsageError: no tuning rows, a task without reference scores, or settings of one
        arm that were not run on the same tasks and seeds.
    """
    final = [r for r in rows if r.role == "tune" and r.step == r.updates_total]
    if not final:
        raise UsageError(
            'no rows of finished tuning runs; run a suite with role = "tune" first'
        )
    lowest: dict[str, float] = {}
    for row in final:
        if row.status == "ok" and row.score is None:
            raise UsageError(f"{row.task} has no reference scores to choose by")
        if row.score is not None and math.isfinite(row.score):
            lowest[row.task] = min(row.score, lowest.get(row.task, math.inf))
    scores: dict[Arm, dict[str, dict[str, dict[int, float]]]] = {}
    for row in final:
        found = row.score if row.status == "ok" else None
        value = lowest.get(row.task, 0.0) if found is None else found
        by_setting = scores.setdefault(arm_of(row), {})
        by_task = by_setting.setdefault(row.setting, collections.defaultdict(dict))
        by_task[row.task][row.seed or 0] = value
    return {arm: _ranked(arm, found) for arm, found in scores.items()}


def _ranked(
    arm: Arm, found: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> list[Candidate]:
    """Settings by falling mean; of equal ones the first by name."""
    runs = {
        setting: {(task, seed) for task, seeds in by_task.items() for seed in seeds}
        for setting, by_task in found.items()
    }
    everything = set.union(*runs.values())
    for setting, there in runs.items():
        if there != everything:
            raise UsageError(
                f"{arm[0]} {setting}: {len(there)} of {len(everything)} runs are "
                "there; let the suite finish, settings are compared on the same runs"
            )
    listed = [
        Candidate(
            setting,
            varied(setting),
            {t: statistics.fmean(by_task[t].values()) for t in sorted(by_task)},
        )
        for setting, by_task in sorted(found.items())
    ]
    return sorted(listed, key=lambda one: -one.mean)


def table(arms: Mapping[Arm, Sequence[Candidate]]) -> str:
    """Markdown: per arm the best setting, its scores, and how the others did."""
    tasks = sorted({t for ranked in arms.values() for t in ranked[0].by_task})
    short = [task.partition("/")[2] for task in tasks]
    head = ["arm", "chosen of", "setting", *short, "mean", "second", "median"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for (agent, arm), ranked in sorted(arms.items()):
        best = ranked[0]
        means = [one.mean for one in ranked]
        values = ", ".join(f"{k} {v}" for k, v in best.values.items())
        cells = [
            f"{agent} {arm}",
            str(len(ranked)),
            values,
            *(f"{best.by_task[task]:.1f}" for task in tasks),
            f"{best.mean:.1f}",
            f"{means[1]:.1f}" if len(means) > 1 else "",
            f"{statistics.median(means):.1f}",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def settings(arms: Mapping[Arm, Sequence[Candidate]], suite: Suite) -> str:
    """The chosen settings as tables of a suite file, what the grids fix included.

    Raises:
      UsageError: the suite has no such setting: it is another one, or was changed.
    """
    blocks = []
    for (agent, arm), ranked in sorted(arms.items()):
        base = agent.partition("@")[0]
        values = suite.settings.get(base, {}).get(ranked[0].setting)
        if values is None:
            raise UsageError(
                f"suite '{suite.name}' has no setting '{ranked[0].setting}' of {base}; "
                "give the suite that ran with --suite"
            )
        lines = [f"[settings.{base}.{arm}]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main(arguments: Choose) -> None:
    """Prints what was chosen."""
    if not arguments.results.is_dir():
        raise UsageError(f"{arguments.results}: no such folder")
    rows = read_rows(arguments.results, warnings.warn)
    arms = candidates(rows)
    name = arguments.suite or next(row.suite for row in rows if row.role == "tune")
    print(table(arms))
    print()
    print(settings(arms, load_suite(name)))


if __name__ == "__main__":
    try:
        main(tyro.cli(Choose, description=__doc__))
    except OffrlError as error:
        sys.exit(f"error: {error}")
