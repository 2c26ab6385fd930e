"""Computes the leaderboard from rows and plan: a pure function of the folder."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from offrl_jax.leaderboard import noise, ranking
from offrl_jax.leaderboard.model import (
    Cell,
    Entry,
    Leaderboard,
    Section,
    TaskInfo,
)
from offrl_jax.leaderboard.runs import Run, device_seconds
from offrl_jax.leaderboard.sections import (
    RETURN,
    SCORE,
    Contents,
    Group,
    absent,
    own_value,
    read_contents,
    warnings,
)


class _Line(NamedTuple):
    label: str
    agent: str
    setting: str
    cells: Mapping[str, Cell]
    runs: Sequence[Run]
    episode_share: float | None


def build(folder: Path, pool_protocols: bool = False) -> Leaderboard:
    """Computes the leaderboard of a results folder from its rows and its plan.

    Args:
      folder: of results.
      pool_protocols: whether runs of different evaluation protocols share a table.

    Raises:
      ResultsError: no such folder, nothing to rank in it, or rows that cannot be read
        or contradict each other.
    """
    return of_contents(read_contents(folder, pool_protocols))


def of_contents(contents: Contents) -> Leaderboard:
    """`build` of a folder that was read already; a section per group, in order."""
    sections = tuple(map(_section, contents.groups))
    return Leaderboard(sections, contents.messages, contents.published)


def _section(group: Group) -> Section:
    key, runs, units = group.key, group.runs, group.units
    tasks = list(units)
    # Raw returns of different tasks have no common scale, so they are never pooled.
    ranked = {
        task
        for task in group.begun
        if units[task] == SCORE or (len(tasks) == 1 and units[task] == RETURN)
    }
    lines = []
    by_line: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        by_line[run.cell[:2]].append(run)
    for (agent, setting), label in group.labels.items():
        own = by_line[agent, setting]
        by_task = {t: [run for run in own if run.cell.task == t] for t in tasks}
        spreads = {t: _spread(group, t, by_task[t]) for t in tasks}
        cells = {t: _cell(group, t, by_task[t], spreads[t]) for t in tasks}
        noisy = noise.pooled_share(spreads[task] for task in sorted(ranked))
        lines.append(_Line(label, agent, setting, cells, own, noisy))
    samples = {
        line.label: {task: cell.values for task, cell in line.cells.items()}
        for line in lines
    }
    statistics = ranking.rank(samples, sorted(ranked), tasks)
    entries = [
        _entry(
            line,
            statistics[line.label],
            units,
            ranked,
            group.budget.get((line.agent, key.family)),
        )
        for line in lines
    ]
    entries.sort(key=lambda e: (e.rank or 10**9, -e.iqm.value if e.iqm else 0, e.label))
    infos = tuple(
        TaskInfo(
            task,
            units[task],
            task in ranked,
            own_value(group.behaviour.get(task), units[task]),
        )
        for task in tasks
    )
    return Section(
        suite=key.suite,
        family=key.family,
        preset=key.preset,
        updates_total=key.updates_total,
        protocol=json.loads(key.protocol),
        tuning=group.tuning,
        tasks=infos,
        entries=tuple(entries),
        runs=sum(run.row is not None for run in runs),
        planned=len(runs),
        absent=absent(runs, group.labels),
        warnings=warnings(group) + _unranked(infos),
        devices=tuple(sorted({run.row.device for run in runs if run.row})),
    )


def _unranked(tasks: Iterable[TaskInfo]) -> tuple[str, ...]:
    left_out = [t.task for t in tasks if not t.ranked and t.unit == RETURN]
    if not left_out:
        return ()
    return (f"no reference scores, so raw returns and no rank: {', '.join(left_out)}",)


def _spread(group: Group, task: str, runs: Iterable[Run]) -> noise.Spread | None:
    found = [
        (run.row.returns, value)
        for run in runs
        if run.row and not run.diverged
        if (value := group.value(task, run.row)) is not None
    ]
    return noise.spread([own for own, _ in found], [value for _, value in found])


def _cell(
    group: Group, task: str, runs: list[Run], spread: noise.Spread | None
) -> Cell:
    runs = sorted(runs, key=lambda run: run.seed)
    counted = [run for run in runs if run.row is not None]
    values = [group.value(task, run.row) for run in runs if run.row is not None]
    return Cell(
        task=task,
        seeds=tuple(run.seed for run in counted),
        values=tuple(value for value in values if value is not None),
        mean=None,
        episodes=min((len(run.row.returns) for run in counted if run.row), default=0),
        diverged=tuple(run.seed for run in counted if run.diverged),
        failed=tuple(run.seed for run in runs if run.failure is not None),
        missing=tuple(r.seed for r in runs if r.row is None and r.failure is None),
        episode_share=noise.share(spread),
    )


def _entry(
    line: _Line,
    statistics: ranking.Standing,
    units: Mapping[str, str],
    ranked: set[str],
    budget: tuple[int, set[int]] | None,
) -> Entry:
    every = [device_seconds(run.row) for run in line.runs if run.row]
    costs = [cost for cost in every if cost is not None]
    scored = all(units[task] == "score" for task in ranked)
    return Entry(
        label=line.label,
        agent=line.agent,
        setting=line.setting,
        rank=statistics.rank,
        iqm=statistics.iqm,
        mean=statistics.mean,
        median=statistics.median,
        optimality_gap=statistics.optimality_gap if scored else None,
        leader=statistics.leader,
        leader_better=statistics.leader_better,
        cost_s=round(sum(costs) / len(costs), 4) if costs else None,
        tuned=_tuned(line.runs, budget),
        cells=tuple(
            dataclasses.replace(cell, mean=statistics.task_means.get(task))
            for task, cell in line.cells.items()
        ),
        episode_share=line.episode_share,
    )


def _tuned(
    runs: Iterable[Run], budget: tuple[int, set[int]] | None
) -> tuple[int, int] | None:
    """Settings tried and seeds of each: as the runs say, else from rows of tuning."""
    said = [
        (int(run.selection["settings"]), int(run.selection["seeds"]))
        for run in runs
        if run.selection
    ]
    if said:
        return max(said)
    return (budget[0], len(budget[1])) if budget else None
