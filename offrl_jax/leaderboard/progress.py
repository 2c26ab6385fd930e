"""Scores while training: the leaderboard's aggregates at every evaluation.

A line is over one set of runs, those that the leaderboard counts, so its last point is
the leaderboard's number.  At an earlier step a line has a point where all of them have
a value; a diverged run has one, its floor, from the evaluation that shows it on.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from offrl_jax.errors import ResultsError
from offrl_jax.leaderboard import ranking
from offrl_jax.leaderboard.model import FEW_SEEDS
from offrl_jax.leaderboard.ranking import Bounds
from offrl_jax.leaderboard.runs import (
    SectionKey,
    check_names,
    has_diverged,
    is_chosen,
)
from offrl_jax.leaderboard.sections import (
    SCORE,
    Contents,
    Group,
    absent,
    own_value,
    read_contents,
    warnings,
)
from offrl_jax.results import Row

RunKey = tuple[str, str, str, str, int | None]


class Point(NamedTuple):
    """What the runs of a line are worth at one evaluation.

    Attributes:
      step: updates of the last phase done.
      seconds: mean over the runs of the seconds that their population had trained, all
        phases, divided by its members; None if rows do not say.
      value: with its 95 % interval.
      runs: behind it.
      diverged: those of them that count as the floor.
      episodes: fewest that a run was evaluated over, floors aside; 0 if all are.
    """

    step: int
    seconds: float | None
    value: Bounds
    runs: int
    diverged: int
    episodes: int


@dataclasses.dataclass(frozen=True)
class AgentProgress:
    """The lines of one agent with one setting.

    Attributes:
      label: agent, with its setting where the section has several of that agent.
      agent: label of the agent.
      setting: name of the setting.
      seeds: runs that count, by task that has any.
      diverged: runs that count as the floor in the end.
      failed: runs that failed.
      missing: planned runs without a result, failed ones not among them.
      pooled: IQM of the scores over all `Progress.pooled` tasks; empty without runs
        of each of them.
      by_task: mean over seeds, in the unit of the task, by task.
    """

    label: str
    agent: str
    setting: str
    seeds: Mapping[str, int]
    diverged: int
    failed: int
    missing: int
    pooled: tuple[Point, ...]
    by_task: Mapping[str, tuple[Point, ...]]

    @property
    def few(self) -> bool:
        """Whether some task has fewer than `FEW_SEEDS` runs."""
        return min(self.seeds.values(), default=0) < FEW_SEEDS


@dataclasses.dataclass(frozen=True)
class Progress:
    """One section of a results folder, as the leaderboard parts them.

    Attributes:
      key: suite, family, preset, updates and protocol.
      tuning: one setting for all tasks, or per task.
      pooled: tasks of the IQM: those with scores of which any run counts.
      units: `score` or `return`, by task with any run that counts.
      behaviour: mean of the dataset's episodes in that unit, by task that has it.
      agents: by label; only those with a run that counts.
      phased: whether updates of earlier phases come before step 0.
      devices: in words, sorted.
      messages: what is absent, left out or compares badly, one line each.
    """

    key: SectionKey
    tuning: str
    pooled: tuple[str, ...]
    units: Mapping[str, str]
    behaviour: Mapping[str, float]
    agents: tuple[AgentProgress, ...]
    phased: bool
    devices: tuple[str, ...]
    messages: tuple[str, ...]


class _Evaluation(NamedTuple):
    value: float
    seconds: float | None
    episodes: int
    floored: bool


_Track = Mapping[int, _Evaluation]
"""The evaluations of one run by step."""


def build(
    folder: Path,
    agents: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
) -> tuple[tuple[Progress, ...], tuple[str, ...]]:
    """Sections with a run that counts, and messages about the folder and the others.

    Args:
      folder: of results.
      agents: only these: labels, or names, which stand for every preset.
      tasks: only these; the IQM is over those of them that have scores.

    Raises:
      UsageError: an agent or task of which the folder holds no run.
      ResultsError: as `leaderboard.build`, or no run counts.
    """
    found, messages = of_contents(read_contents(folder), agents, tasks)
    if not found:
        what = "" if agents is None and tasks is None else " of those asked for"
        raise ResultsError(
            f"{folder}: no run{what} has come to its last update or diverged; continue "
            "them, or draw what there is: offrl curves --metrics score"
        )
    return found, messages


def of_contents(
    contents: Contents,
    agents: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
) -> tuple[tuple[Progress, ...], tuple[str, ...]]:
    """`build` of a folder that was read already; no section if no run counts.

    Raises:
      UsageError: an agent or task of which the folder holds no run.
    """
    runs = [run for group in contents.groups for run in group.runs]
    check_names(runs, agents, tasks)
    evaluations = _evaluations(contents)
    found, messages = [], [*contents.messages]
    for group in contents.groups:
        chosen = [run for run in group.runs if is_chosen(run, agents, tasks)]
        if any(run.row is not None for run in chosen):
            # Of all agents: the choice of others must not change an agent's IQM.
            pooled = [
                task
                for task in sorted(group.begun)
                if group.units[task] == SCORE and (tasks is None or task in tasks)
            ]
            part = dataclasses.replace(group, runs=chosen)
            found.append(_progress(part, pooled, evaluations))
        else:
            messages += absent(chosen, group.labels)
    return tuple(found), tuple(messages)


def _evaluations(contents: Contents) -> Mapping[RunKey, list[Row]]:
    found: dict[RunKey, list[Row]] = defaultdict(list)
    for row in contents.rows:
        found[row.run_id, row.agent, row.setting, row.task, row.seed].append(row)
    return found


def _progress(
    group: Group, pooled: Sequence[str], evaluations: Mapping[RunKey, list[Row]]
) -> Progress:
    counted = [run for run in group.runs if run.row is not None]
    begun = sorted(group.begun)
    messages = [*absent(group.runs, group.labels), *warnings(group)]
    agents: list[AgentProgress] = []
    for (agent, setting), label in group.labels.items():
        own = [run for run in group.runs if run.cell[:2] == (agent, setting)]
        seeds: dict[str, int] = {}
        tracks: dict[str, list[_Track]] = {}
        for task in begun:
            runs = [run for run in own if run.cell.task == task and run.row is not None]
            if runs:
                seeds[task] = len(runs)
                tracks[task] = [
                    _track(group, task, evaluations[run.run_id, *run.cell, run.seed])
                    for run in runs
                ]
        if not seeds:
            continue
        lacking = [task for task in pooled if task not in seeds]
        if lacking:
            messages.append(f"{label}: no IQM, without runs of {', '.join(lacking)}")
        points, means = _points(label, tracks, pooled, messages)
        if any(point.seconds is None for line in means.values() for point in line):
            messages.append(
                f"{label}: points without seconds of training, which rows lack"
            )
        agents.append(
            AgentProgress(
                label=label,
                agent=agent,
                setting=setting,
                seeds=seeds,
                diverged=sum(run.diverged for run in own),
                failed=sum(run.failure is not None for run in own),
                missing=sum(r.row is None and r.failure is None for r in own),
                pooled=points,
                by_task=means,
            )
        )
    raw = [task for task in begun if group.units[task] != SCORE]
    if raw:
        messages.append(f"no reference scores, so in no IQM: {', '.join(raw)}")
    datasets = {
        task: own_value(group.behaviour.get(task), group.units[task]) for task in begun
    }
    devices = sorted({run.row.device for run in counted if run.row})
    if len(devices) > 1:
        messages.append(f"seconds do not compare between devices: {', '.join(devices)}")
    return Progress(
        key=group.key,
        tuning=group.tuning,
        pooled=tuple(pooled),
        units={task: group.units[task] for task in begun},
        behaviour={t: value for t, value in datasets.items() if value is not None},
        agents=tuple(agents),
        phased=any(run.row and len(run.row.phase_updates) > 1 for run in counted),
        devices=tuple(devices),
        messages=tuple(messages),
    )


def _track(group: Group, task: str, rows: Iterable[Row]) -> _Track:
    """What a run counts as at each step that has a row; see `_at` for later ones."""
    found: dict[int, _Evaluation] = {}
    for row in sorted(rows, key=lambda row: row.step):
        value = group.value(task, row) if row.status != "failed" else None
        if value is not None:
            floored = has_diverged(row)
            found[row.step] = _Evaluation(
                value, _seconds(row), len(row.returns), floored
            )
    return found


def _seconds(row: Row) -> float | None:
    members = row.population.get("members")
    if row.wall_s is None or not math.isfinite(row.wall_s):
        return None
    if not isinstance(members, int) or members < 1:
        return None
    return row.wall_s / members


def _at(track: _Track, step: int) -> _Evaluation | None:
    """A run at a step; a diverged one without a row there stays as it was."""
    if step in track:
        return track[step]
    before = max((earlier for earlier in track if earlier < step), default=None)
    return track[before] if before is not None and track[before].floored else None


def _points(
    label: str,
    tracks: Mapping[str, Sequence[_Track]],
    pooled: Sequence[str],
    messages: list[str],
) -> tuple[tuple[Point, ...], dict[str, tuple[Point, ...]]]:
    """The IQM of `pooled` tasks and the means of all tasks, step by step."""
    whole: dict[int, dict[str, list[_Evaluation]]] = defaultdict(dict)
    for task, runs in tracks.items():
        left_out = []
        for step in sorted({step for track in runs for step in track}):
            found = [_at(track, step) for track in runs]
            there = [evaluation for evaluation in found if evaluation is not None]
            if len(there) == len(runs):
                whole[step][task] = there
            else:
                left_out.append(f"{step:,}")
        if left_out:
            messages.append(
                f"{label} on {task}: no point at {'; '.join(left_out)} updates, where "
                f"not all of its {len(runs)} runs have a value"
            )
    overall: list[Point] = []
    means: dict[str, list[Point]] = {task: [] for task in tracks}
    for step, own in sorted(whole.items()):
        values = {task: [e.value for e in runs] for task, runs in own.items()}
        standing = ranking.aggregate(values, pooled, sorted(own))
        if standing.iqm is not None:
            together = [e for task in pooled for e in own[task]]
            overall.append(_point(step, standing.iqm, together))
        for task, runs in own.items():
            means[task].append(_point(step, standing.task_means[task], runs))
    return tuple(overall), {task: tuple(found) for task, found in means.items()}


def _point(step: int, value: Bounds, runs: Sequence[_Evaluation]) -> Point:
    seconds = [run.seconds for run in runs if run.seconds is not None]
    known = len(seconds) == len(runs)
    return Point(
        step=step,
        seconds=round(math.fsum(seconds) / len(runs), 4) if known else None,
        value=value,
        runs=len(runs),
        diverged=sum(run.floored for run in runs),
        episodes=min((run.episodes for run in runs if not run.floored), default=0),
    )


def table(sections: Iterable[Progress]) -> list[dict[str, object]]:
    """Every point as a record with the columns `COLUMNS`; empty where unknown."""
    records: list[dict[str, object]] = []
    for section in sections:
        key = section.key
        common = {
            "suite": key.suite,
            "family": key.family,
            "preset": key.preset,
            "tuning": section.tuning,
            "updates": key.updates_total,
            "protocol": json.dumps(json.loads(key.protocol), sort_keys=True),
        }
        for own in section.agents:
            common |= {"agent": own.agent, "setting": own.setting}
            lines = [("pooled tasks", len(section.pooled), SCORE, "iqm", own.pooled)]
            lines += [
                (task, 1, section.units[task], "mean", points)
                for task, points in own.by_task.items()
            ]
            for task, count, unit, statistic, points in lines:
                about = {"task": task, "tasks": count, "unit": unit}
                for point in points:
                    line = point._asdict() | dataclasses.asdict(point.value)
                    records.append({**common, **about, "statistic": statistic, **line})
    return records


COLUMNS: tuple[str, ...] = (
    "suite",
    "family",
    "preset",
    "tuning",
    "updates",
    "protocol",
    "agent",
    "setting",
    "task",
    "tasks",
    "unit",
    "statistic",
    "step",
    "seconds",
    "value",
    "low",
    "high",
    "runs",
    "diverged",
    "episodes",
)
"""One line per agent, statistic and evaluation: IQMs, then the means of each task."""
