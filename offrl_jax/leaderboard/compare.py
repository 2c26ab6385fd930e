"""Did a change help?  Two results folders, agent by agent: a pure function of both.

Runs are matched by family, preset, updates and protocol, and within these by agent,
setting and task; the suite's name, run ids and commits do not matter.  What has no
counterpart is listed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offrl_jax.errors import ResultsError
from offrl_jax.leaderboard import differences, matching
from offrl_jax.leaderboard.differences import Estimates
from offrl_jax.leaderboard.matching import Match, Side
from offrl_jax.leaderboard.model import FEW_EPISODES, FEW_SEEDS
from offrl_jax.leaderboard.ranking import Bounds
from offrl_jax.leaderboard.runs import (
    Run,
    check_names,
    device_seconds,
    is_chosen,
    merge_suites,
)
from offrl_jax.leaderboard.sections import (
    RETURN,
    SCORE,
    Group,
    absent,
    behaviour_rows,
    gather,
    read_runs,
)
from offrl_jax.results import Row

BETTER, WORSE = "better", "worse"
UNDECIDED = "no difference shown"
IDENTICAL = "identical"
UNJUDGED = "not judged"
"""The verdict without an interval: single runs, or returns that cannot be pooled."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """The runs of one side of a cell.

    Attributes:
      seeds: of the runs that count, ascending.
      values: of these runs, in the unit of the task.
      mean: of the values, rounded to 4 decimals; None without any.
      episodes: fewest evaluation episodes of these runs.
      diverged: seeds that count as the floor.
      absent: planned seeds that failed or have no result.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float | None
    episodes: int
    diverged: tuple[int, ...]
    absent: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TaskDifference:
    """One agent on one task, on both sides.

    Attributes:
      task: task id.
      unit: `score` (normalised x100), or `return` where there is no reference.
      baseline: its runs.
      change: its runs.
      difference: of the means, change minus baseline; None without runs of both.
      equal: seeds whose runs have the same bits on both sides.
    """

    task: str
    unit: str
    baseline: Sample
    change: Sample
    difference: Bounds | None
    equal: tuple[int, ...]

    @property
    def verdict(self) -> str:
        """One of the module's verdicts, of this task alone."""
        return _verdict(self.difference, self.identical and bool(self.equal))

    @property
    def identical(self) -> bool:
        """Whether both sides have the same runs, bit for bit, or none at all."""
        return self.equal == self.baseline.seeds == self.change.seeds


@dataclasses.dataclass(frozen=True)
class AgentDifference:
    """One agent with one setting on both sides.

    Attributes:
      label: agent, with its setting where there are several of that agent.
      agent: label of the agent.
      setting: name of the setting.
      pooled: tasks of the aggregates: ranked ones with runs on both sides.
      paired: whether both sides have the same seeds, which are resampled together.
      baseline_iqm: over `pooled`; None without such tasks.
      change_iqm: as `baseline_iqm`.
      iqm: change minus baseline.
      mean: of the means over tasks, change minus baseline.
      improvement: probability that a run of the change beats one of the baseline.
      baseline_cost_s: device seconds per run; None if rows do not say.
      change_cost_s: as `baseline_cost_s`.
      cost_ratio: change / baseline; None where devices or populations differ.
      tasks: sorted by id.
    """

    label: str
    agent: str
    setting: str
    pooled: tuple[str, ...]
    paired: bool
    baseline_iqm: float | None
    change_iqm: float | None
    iqm: Bounds | None
    mean: Bounds | None
    improvement: Bounds | None
    baseline_cost_s: float | None
    change_cost_s: float | None
    cost_ratio: float | None
    tasks: tuple[TaskDifference, ...]

    @property
    def identical(self) -> bool:
        """Whether every task has the same runs on both sides, bit for bit."""
        some = any(task.equal for task in self.tasks)
        return some and all(task.identical for task in self.tasks)

    @property
    def verdict(self) -> str:
        """What the interval of the IQM's difference shows."""
        return _verdict(self.iqm, self.identical)

    @property
    def better(self) -> int:
        """Tasks that are better."""
        return sum(task.verdict == BETTER for task in self.tasks)

    @property
    def worse(self) -> int:
        """Tasks that are worse."""
        return sum(task.verdict == WORSE for task in self.tasks)

    @property
    def undecided(self) -> int:
        """Tasks that are neither."""
        return len(self.tasks) - self.better - self.worse

    @property
    def few(self) -> bool:
        """Whether some task has few seeds or few episodes on a side."""
        sides = [side for task in self.tasks for side in (task.baseline, task.change)]
        return any(
            len(side.seeds) < FEW_SEEDS or side.episodes < FEW_EPISODES
            for side in sides
        )

    @property
    def diverged(self) -> int:
        """Runs of both sides that count as the floor."""
        return sum(
            len(task.baseline.diverged) + len(task.change.diverged)
            for task in self.tasks
        )

    @property
    def incomplete(self) -> bool:
        """Whether planned runs of a side are absent."""
        return any(
            side.absent or not side.seeds
            for task in self.tasks
            for side in (task.baseline, task.change)
        )

    def lost(self, tolerance: float = 0.0) -> bool:
        """Whether the IQM fell for sure by more than `tolerance` points."""
        high = self.iqm.high if self.iqm else None
        return high is not None and high < -tolerance


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that stands in one table.

    Attributes:
      family: of tasks.
      preset: suffix of the agent labels, `full` where there is none.
      updates_total: of the last phase.
      protocol: of the evaluation.
      agents: by label.
      absent: one line per side and cell that lacks runs.
      warnings: what else differs between the sides, one line each.
    """

    family: str
    preset: str
    updates_total: int
    protocol: Mapping[str, Any]
    agents: tuple[AgentDifference, ...]
    absent: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Two results folders.

    Attributes:
      baseline: the folder as it was given.
      change: the folder as it was given.
      sections: sorted.
      cells: agent, setting and task in both folders.
      unmatched_baseline: cells of the baseline without a counterpart.
      unmatched_change: cells of the change without a counterpart.
      unmatched: which ones, and what differs, one line each.
      messages: about a folder as a whole, one line each.
    """

    baseline: str
    change: str
    sections: tuple[Comparison, ...]
    cells: int
    unmatched_baseline: int
    unmatched_change: int
    unmatched: tuple[str, ...]
    messages: tuple[str, ...]

    @property
    def agents(self) -> tuple[AgentDifference, ...]:
        """Of all sections."""
        return tuple(agent for section in self.sections for agent in section.agents)

    @property
    def identical(self) -> bool:
        """Whether both folders have the same runs, bit for bit, and no others."""
        return (
            not self.unmatched_baseline
            and not self.unmatched_change
            and all(agent.identical for agent in self.agents)
        )


def build(
    baseline: Path,
    change: Path,
    agents: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
) -> Comparisons:
    """Compares the runs that count in two results folders.

    Args:
      baseline: A, a results folder.
      change: B, another one.
      agents: only these: labels, or names, which stand for every preset.
      tasks: only these.

    Raises:
      UsageError: an agent or task of which neither folder holds a run.
      ResultsError: a folder is absent, empty or cannot be read, or the two have no
        cell with a run on both sides.
    """
    sides: list[Side] = []
    behaviours = {}
    messages: list[str] = []
    for name, folder in zip(matching.NAMES, (baseline, change), strict=True):
        runs, rows, told = read_runs(folder, merge_suites)
        sides.append(runs)
        behaviours |= behaviour_rows(rows)
        messages += [f"{name}: {line}" for line in told]
    check_names([*sides[0], *sides[1]], agents, tasks)
    chosen = [[r for r in runs if is_chosen(r, agents, tasks)] for runs in sides]
    match = matching.match(chosen[0], chosen[1])
    sections = tuple(
        _compare(gather(key, "", [*before, *after], behaviours, {}), before, after)
        for key, (before, after) in sorted(match.common.items())
    )
    if not any(task.difference for s in sections for a in s.agents for task in a.tasks):
        reasons = "; ".join(_shortened(_reasons(match, sections)))
        raise ResultsError(
            f"{baseline} and {change} have nothing to compare: {reasons}; give two "
            "folders of the same suite"
        )
    return Comparisons(
        baseline=str(baseline),
        change=str(change),
        sections=sections,
        cells=match.cells,
        unmatched_baseline=match.unmatched[0],
        unmatched_change=match.unmatched[1],
        unmatched=match.lines,
        messages=tuple(messages),
    )


def _reasons(match: Match, sections: Iterable[Comparison]) -> list[str]:
    return [*match.lines, *(line for section in sections for line in section.absent)]


def _shortened(lines: Sequence[str], shown: int = 4) -> list[str]:
    more = len(lines) - shown
    return [*lines[:shown], *([f"and {more} more"] if more > 0 else [])]


def _compare(group: Group, before: Side, after: Side) -> Comparison:
    by_line: dict[tuple[str, str], tuple[list[Run], list[Run]]] = defaultdict(
        lambda: ([], [])
    )
    for i, side in enumerate((before, after)):
        for run in side:
            by_line[run.cell[:2]][i].append(run)
    lines = [
        (label, by_line[line], line)
        for line, label in sorted(group.labels.items(), key=lambda item: item[1])
    ]
    key = group.key
    return Comparison(
        family=key.family,
        preset=key.preset,
        updates_total=key.updates_total,
        protocol=json.loads(key.protocol),
        agents=tuple(_agent(group, label, line, *runs) for label, runs, line in lines),
        absent=tuple(
            f"{name}: {line}"
            for name, side in zip(matching.NAMES, (before, after), strict=True)
            for line in absent(side, group.labels)
        ),
        warnings=matching.warnings(before, after, group.labels),
    )


def _agent(
    group: Group,
    label: str,
    line: tuple[str, str],
    before: Side,
    after: Side,
) -> AgentDifference:
    units = group.units
    tasks = sorted({run.cell.task for run in before})
    cells = {
        task: tuple(
            [run for run in side if run.cell.task == task] for side in (before, after)
        )
        for task in tasks
    }
    samples = {
        task: tuple(_sample(group, task, side) for side in both)
        for task, both in cells.items()
    }
    begun = [task for task, (x, y) in samples.items() if x.seeds and y.seeds]
    pooled = [
        task
        for task in begun
        if units[task] == SCORE or (len(units) == 1 and units[task] == RETURN)
    ]
    paired = all(samples[task][0].seeds == samples[task][1].seeds for task in begun)
    x, y = ({task: samples[task][i].values for task in begun} for i in (0, 1))
    found = (
        differences.estimate(x, y, pooled, paired)
        if begun
        else Estimates(None, None, None, {})
    )
    costs = [_mean_cost(side) for side in (before, after)]
    comparable = matching.machines(before) == matching.machines(after)
    ratio = costs[1] / costs[0] if comparable and costs[0] and costs[1] else None
    return AgentDifference(
        label=label,
        agent=line[0],
        setting=line[1],
        pooled=tuple(pooled),
        paired=paired,
        baseline_iqm=_iqm(x, pooled),
        change_iqm=_iqm(y, pooled),
        iqm=found.iqm,
        mean=found.mean,
        improvement=found.improvement,
        baseline_cost_s=_rounded(costs[0]),
        change_cost_s=_rounded(costs[1]),
        cost_ratio=_rounded(ratio),
        tasks=tuple(
            TaskDifference(
                task=task,
                unit=units[task],
                baseline=samples[task][0],
                change=samples[task][1],
                difference=found.by_task.get(task),
                equal=_equal(*cells[task]),
            )
            for task in tasks
        ),
    )


def _sample(group: Group, task: str, runs: Side) -> Sample:
    counted = [
        (run, run.row, value)
        for run in sorted(runs, key=lambda run: run.seed)
        if run.row is not None and (value := group.value(task, run.row)) is not None
    ]
    values = tuple(value for _, _, value in counted)
    return Sample(
        seeds=tuple(run.seed for run, _, _ in counted),
        values=values,
        mean=_rounded(math.fsum(values) / len(values)) if values else None,
        episodes=min((len(row.returns) for _, row, _ in counted), default=0),
        diverged=tuple(run.seed for run, _, _ in counted if run.diverged),
        absent=tuple(sorted(run.seed for run in runs if run.row is None)),
    )


def _equal(before: Side, after: Side) -> tuple[int, ...]:
    """Seeds whose runs have the same bits."""
    rows = [{run.seed: run.row for run in side if run.row} for side in (before, after)]
    return tuple(
        seed
        for seed in sorted(rows[0].keys() & rows[1].keys())
        if _bits(rows[0][seed]) == _bits(rows[1][seed])
    )


def _bits(row: Row) -> tuple[str, float | None, bytes]:
    # As bytes, a NaN equals itself.
    return row.status, row.score, array("d", row.returns).tobytes()


def _iqm(runs: Mapping[str, Sequence[float]], tasks: Iterable[str]) -> float | None:
    ordered = sorted(value for task in tasks for value in runs[task])
    if not ordered:
        return None
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    return _rounded(math.fsum(kept) / len(kept))


def _mean_cost(runs: Side) -> float | None:
    every = [device_seconds(run.row) for run in runs if run.row is not None]
    known = [cost for cost in every if cost is not None]
    return math.fsum(known) / len(known) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4) + 0.0


def _verdict(bounds: Bounds | None, identical: bool) -> str:
    if identical:
        return IDENTICAL
    if bounds is None or bounds.low is None or bounds.high is None:
        return UNJUDGED
    if bounds.low > 0:
        return BETTER
    return WORSE if bounds.high < 0 else UNDECIDED
