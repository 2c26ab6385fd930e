"""Scores, cost and final metrics per setting, from a results folder, as Markdown.

Example:
  offrl benchmark acpo_kappa
  python benchmarks/tables.py results/acpo_kappa --against automatic --metrics kappa

Scores are those of the last evaluation: mean over seeds with the 95 % interval of
Student's t, and the range of the seeds.  Seeds are paired with `--against`: members of
one seed share the initial networks, the batches' draws and the evaluation's episodes,
so the interval of their differences is often much narrower than those of the means.
`updates/s` is of the whole population, summed over members; settings of one program
share it.  Metrics are the seeds' medians at the end of the last phase; where metrics
were not recorded, their columns are left out.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import scipy.stats
import tyro
from tyro.conf import Positional

from offrl_jax.errors import OffrlError, UsageError
from offrl_jax.results import MetricPoint, Row, read_metrics, read_rows

Arm = tuple[str, str, str]
"""Task, agent and setting."""


@dataclasses.dataclass(frozen=True)
class Tables:
    """Prints one table per task."""

    results: Positional[Path]
    """Results folder."""
    against: str | None = None
    """Arm to show paired differences to: a setting's name, or an agent's."""
    metrics: tuple[str, ...] = ()
    """Recorded metrics to show beside the score."""
    between: tuple[str, str] | None = None
    """Two agents: shows the first minus the second, paired, setting by setting."""
    returns: bool = False
    """Show returns: tasks of your own have no reference to normalise them by."""


@dataclasses.dataclass(frozen=True)
class Final:
    """The last evaluation of one arm.

    Attributes:
      scores: by seed, or mean returns; NaN for a failed run.
      speed: updates per second, of the slowest program that ran a seed of it.
    """

    scores: Mapping[int, float]
    speed: float


def score(row: Row) -> float:
    """The normalised score; NaN of a failed run or without a reference."""
    return math.nan if row.score is None else row.score


def mean_return(row: Row) -> float:
    """The mean of the raw returns; NaN of a failed run."""
    return statistics.fmean(row.returns) if row.returns else math.nan


def final_evaluations(
    rows: Sequence[Row], value: Callable[[Row], float] = score
) -> dict[Arm, Final]:
    """Every arm's last evaluations; those of unfinished runs are left out.

    Args:
      rows: of a results folder.
      value: what counts of a row, `score` or `mean_return`.
    """
    last: dict[Arm, dict[int, Row]] = collections.defaultdict(dict)
    for row in rows:
        if row.seed is not None and row.step == row.updates_total:
            last[row.task, row.agent, row.setting][row.seed] = row
    return {
        arm: Final(
            {seed: value(row) for seed, row in sorted(by_seed.items())},
            min((row.updates_per_s or math.nan) for row in by_seed.values()),
        )
        for arm, by_seed in last.items()
    }


def final_metrics(points: Sequence[MetricPoint]) -> dict[Arm, dict[str, float]]:
    """Median over seeds of each metric's last finite point of the phase `train`."""
    last: dict[tuple[Arm, int], MetricPoint] = {}
    for point in points:
        if point.phase == "train":
            key = (point.task, point.agent, point.setting), point.seed
            if key not in last or last[key].step < point.step:
                last[key] = point
    found: dict[Arm, dict[str, list[float]]] = {}
    for (arm, _), point in last.items():
        for name, value in point.values.items():
            if not math.isnan(value):
                found.setdefault(arm, {}).setdefault(name, []).append(value)
    return {
        arm: {name: statistics.median(x) for name, x in metrics.items()}
        for arm, metrics in found.items()
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean's 95 % interval, Student's t; NaN of fewer than two, or of NaN."""
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return math.nan, math.nan
    quantile = float(scipy.stats.t.ppf(0.975, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def paired(scores: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    """Differences of the seeds that both have."""
    return [scores[seed] - reference[seed] for seed in scores if seed in reference]


def signed(differences: Sequence[float]) -> str:
    """Mean and interval of paired differences, with their signs."""
    low, high = interval(differences)
    return f"{statistics.fmean(differences):+.1f} [{low:+.1f}, {high:+.1f}]"


def table(
    task: str,
    found: Mapping[Arm, Final],
    recorded: Mapping[Arm, Mapping[str, float]],
    metrics: Sequence[str] = (),
    against: str | None = None,
    what: str = "score",
) -> str:
    """One Markdown table, best mean first; `what` names the column.

    Raises:
      UsageError: `against` is no setting or agent of the task, or of several arms.
    """
    arms = [arm for arm in found if arm[0] == task]
    several_agents = len({agent for _, agent, _ in arms}) > 1
    several_settings = len({setting for _, _, setting in arms}) > 1
    reference: Arm | None = None
    if against is not None:
        matching = [arm for arm in arms if against in (arm[1], arm[2])]
        if len(matching) != 1:
            known = ", ".join(sorted({name for arm in arms for name in arm[1:]}))
            raise UsageError(
                f"'{against}' names {len(matching)} arms of {task}; choose one of: "
                f"{known}"
            )
        reference = matching[0]
    shown = [m for m in metrics if any(m in recorded.get(arm, {}) for arm in arms)]
    header = [task, f"mean {what}", "95 % interval", "range (seeds)"]
    if against is not None:
        header.append(f"minus {against}, paired")
    header += ["updates/s", *(f"`{name}`" for name in shown)]
    lines = [header, ["---"] * len(header)]

    def mean(arm: Arm) -> float:
        value = statistics.fmean(found[arm].scores.values())
        return -math.inf if math.isnan(value) else value

    for arm in sorted(arms, key=mean, reverse=True):
        scores = found[arm].scores
        low, high = interval(list(scores.values()))
        names = arm[1:] if several_agents and several_settings else arm[2:]
        cells = [
            " ".join(names if several_settings else arm[1:2]),
            f"{statistics.fmean(scores.values()):.1f}",
            f"[{low:.1f}, {high:.1f}]",
            f"{min(scores.values()):.1f} to {max(scores.values()):.1f} ({len(scores)})",
        ]
        if reference is not None:
            difference = paired(scores, found[reference].scores)
            shown_there = arm != reference and difference
            cells.append(signed(difference) if shown_there else "")
        cells.append(f"{found[arm].speed:,.0f}")
        own = recorded.get(arm, {})
        cells += [f"{own[name]:.3g}" if name in own else "" for name in shown]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def differences(task: str, found: Mapping[Arm, Final], first: str, second: str) -> str:
    """Paired differences of two agents as a Markdown table, a row per setting.

    Raises:
      UsageError: the task has no setting that both agents have.
    """
    arms = {arm: final.scores for arm, final in found.items() if arm[0] == task}
    settings = [s for _, agent, s in arms if agent == first]
    common = [s for s in settings if (task, second, s) in arms]
    if not common:
        raise UsageError(f"{task} has no setting that both {first} and {second} have")
    lines = [[task, f"{first} minus {second}", "seeds"], ["---"] * 3]
    for setting in sorted(common):
        values = paired(arms[task, first, setting], arms[task, second, setting])
        lines.append([setting, signed(values), str(len(values))])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(arguments: Tables) -> None:
    """Prints the tables of all tasks."""
    if arguments.between is not None and (arguments.against or arguments.metrics):
        raise UsageError("--between makes a table of its own: no --against, --metrics")
    rows = read_rows(arguments.results, warnings.warn)
    found = final_evaluations(rows, mean_return if arguments.returns else score)
    recorded = final_metrics(read_metrics(arguments.results))
    if not found:
        raise UsageError(f"{arguments.results} has no finished run to show")
    shown = arguments.metrics, arguments.against
    for task in sorted({arm[0] for arm in found}):
        what = "return" if arguments.returns else "score"
        if arguments.between is not None:
            print(differences(task, found, *arguments.between))
        else:
            print(table(task, found, recorded, *shown, what))
        print(flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Tables, description=__doc__))
    except OffrlError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        # `| head` has seen enough; nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
