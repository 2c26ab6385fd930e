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

import dataclasses
import json
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro
from tyro.conf import Positional

from offrl_jax.benchmark.rules import LAST_SCORE, parse_rule
from offrl_jax.benchmark.selection import Candidate, TuningRun, candidates, finished
from offrl_jax.benchmark.suites import Suite, load_suite
from offrl_jax.errors import OffrlError, UsageError
from offrl_jax.results import Plan, Row, read_plan, read_rows

Arm = tuple[str, str]
"""Agent and name of the grid."""


@dataclasses.dataclass(frozen=True)
class Choose:
    """Prints the table and the settings."""

    results: Positional[Path]
    """Results folder of a suite with `role = "tune"`."""
    suite: str | None = None
    """The suite, by name or file.  Default: as its rows call it."""


def arm_of(run: TuningRun) -> Arm:
    """`("a2c@quick", "sgd")` of the setting `sgd,actor_lr=0.1`."""
    return run.agent, run.setting.partition(",")[0]


def varied(setting: str) -> dict[str, str]:
    """`{"actor_lr": "0.1"}` of `sgd,actor_lr=0.1`."""
    pairs = (part.partition("=") for part in setting.split(",")[1:])
    return {name: value for name, _, value in pairs}


def arms_of(
    rows: Sequence[Row], plan: Plan | None = None
) -> dict[Arm, list[Candidate]]:
    """All settings of every arm, the best first.

    Raises:
      UsageError: no tuning rows, a task without reference scores, or settings of one
        arm that were not run on the same tasks and seeds.
    """
    rule = parse_rule(LAST_SCORE)
    return candidates(finished(rows, plan), rule, arm_of=arm_of)


def table(arms: Mapping[Arm, Sequence[Candidate]]) -> str:
    """Markdown: per arm the best setting, its scores, and how the others did."""
    tasks = sorted({t for ranked in arms.values() for t in ranked[0].by_task})
    short = [task.partition("/")[2] for task in tasks]
    head = ["arm", "chosen of", "setting", *short, "mean", "second", "median"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for (agent, arm), ranked in sorted(arms.items()):
        best = ranked[0]
        means = [one.merit for one in ranked]
        values = ", ".join(f"{k} {v}" for k, v in varied(best.setting).items())
        cells = [
            f"{agent} {arm}",
            str(len(ranked)),
            values,
            *(f"{best.by_task[task]:.1f}" for task in tasks),
            f"{best.merit:.1f}",
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
    arms = arms_of(rows, read_plan(arguments.results))
    name = arguments.suite or next(row.suite for row in rows if row.role == "tune")
    print(table(arms))
    print()
    print(settings(arms, load_suite(name)))


if __name__ == "__main__":
    try:
        main(tyro.cli(Choose, description=__doc__))
    except OffrlError as error:
        sys.exit(f"error: {error}")
