"""Computes the leaderboard from rows and plan: a pure function of the folder."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from offrl_jax.errors import ResultsError
from offrl_jax.leaderboard import ranking
from offrl_jax.leaderboard.model import (
    ONE_SETTING,
    PER_TASK,
    Cell,
    Entry,
    Leaderboard,
    Section,
    TaskInfo,
)
from offrl_jax.leaderboard.runs import (
    CellKey,
    Run,
    SectionKey,
    base_of,
    final_runs,
    mean_return,
    tuning_budget,
)
from offrl_jax.results import BEHAVIOUR, Row, plan_path, read_plan, read_rows


def build(folder: Path) -> Leaderboard:
    """Computes the leaderboard of a results folder from its rows and its plan.

    Raises:
      ResultsError: no such folder, nothing to rank in it, or rows that cannot be read
        or contradict each other.
    """
    if not folder.is_dir():
        raise ResultsError(
            f"{folder}: no such folder; give the results folder of `offrl benchmark`"
        )
    messages: list[str] = []
    # Paths inside the folder: tables are kept and shared, whoever drew them.
    rows = read_rows(folder, lambda m: messages.append(m.replace(f"{folder}/", "")))
    plan = read_plan(folder)
    runs, superseded = final_runs(rows, plan)
    if not runs:
        what = "only tuning or dataset rows" if rows else "no rows and no plan"
        raise ResultsError(
            f"{folder}: {what} below it ({plan_path(Path())}, rows/*.jsonl); run "
            "`offrl benchmark` with this results folder first"
        )
    if superseded:
        messages.append(f"{superseded} runs are superseded by later ones of their cell")
    behaviour = {
        (row.task, row.recipe_hash or row.dataset_hash): row
        for row in rows
        if row.agent == BEHAVIOUR
    }
    budget = tuning_budget(rows)
    groups: dict[tuple[SectionKey, str], list[Run]] = defaultdict(list)
    for run, tuning in zip(runs, _tuning(runs), strict=True):
        groups[run.section, tuning].append(run)
    for (key, tuning), group in groups.items():
        other = groups.get((key, ONE_SETTING), [])
        if tuning == PER_TASK and all(base_of(r.cell.agent) != "bc" for r in group):
            # Cloning, the yardstick of every table, has nothing to choose per task.
            group += [r for r in other if base_of(r.cell.agent) == "bc"]
    sections = tuple(
        _section(key, tuning, group, behaviour, budget)
        for (key, tuning), group in sorted(groups.items())
    )
    return Leaderboard(sections, tuple(messages))


def _tuning(runs: list[Run]) -> list[str]:
    """Whether the values behind each run's setting are the same on every task."""
    values: dict[tuple[SectionKey, str, str], set[str]] = defaultdict(set)
    for run in runs:
        values[run.section, run.cell.agent, run.cell.setting].add(run.hyper)
    return [
        ONE_SETTING
        if len(values[run.section, run.cell.agent, run.cell.setting]) == 1
        else PER_TASK
        for run in runs
    ]


def _section(
    key: SectionKey,
    tuning: str,
    runs: list[Run],
    behaviours: Mapping[tuple[str, str | None], Row],
    budget: Mapping[tuple[str, str], tuple[int, set[int]]],
) -> Section:
    tasks = sorted({run.cell.task for run in runs})
    behaviour = {
        task: behaviours[task, data]
        for task, data in sorted({(r.cell.task, r.dataset or "") for r in runs})
        if (task, data) in behaviours
    }
    units = {task: _unit(task, runs, behaviour.get(task)) for task in tasks}
    begun = {run.cell.task for run in runs if run.row is not None}
    # Raw returns of different tasks have no common scale, so they are never pooled.
    ranked = {
        task
        for task in begun
        if units[task] == "score" or (len(tasks) == 1 and units[task] == "return")
    }
    floors = {task: _floor(task, units[task], runs, behaviour) for task in tasks}
    by_line: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        by_line[run.cell.agent, run.cell.setting].append(run)
    agents = [agent for agent, _ in by_line]
    labels = {
        (agent, setting): agent if agents.count(agent) == 1 else f"{agent} [{setting}]"
        for agent, setting in by_line
    }
    lines = []
    for (agent, setting), own in sorted(by_line.items()):
        cells = {
            task: _cell(
                task, [run for run in own if run.cell.task == task], units, floors
            )
            for task in tasks
        }
        lines.append((labels[agent, setting], agent, setting, cells, own))
    samples = {
        label: {task: cell.values for task, cell in cells.items()}
        for label, _, _, cells, _ in lines
    }
    statistics = ranking.rank(samples, sorted(ranked), tasks)
    entries = [
        _entry(
            line, statistics[line[0]], units, ranked, budget.get((line[1], key.family))
        )
        for line in lines
    ]
    entries.sort(key=lambda e: (e.rank or 10**9, -e.iqm.value if e.iqm else 0, e.label))
    infos = tuple(
        TaskInfo(
            task,
            units[task],
            task in ranked,
            _behaviour(behaviour.get(task), units[task]),
        )
        for task in tasks
    )
    return Section(
        suite=key.suite,
        family=key.family,
        preset=key.preset,
        updates_total=key.updates_total,
        protocol=json.loads(key.protocol),
        tuning=tuning,
        tasks=infos,
        entries=tuple(entries),
        runs=sum(run.row is not None for run in runs),
        planned=len(runs),
        absent=_absent(runs, labels),
        warnings=_warnings(key, runs, infos, budget),
        devices=tuple(sorted({run.row.device for run in runs if run.row})),
    )


def _unit(task: str, runs: Iterable[Run], behaviour: Row | None) -> str:
    ids: dict[bool, str] = {}
    for run in runs:
        if run.cell.task == task and run.row is not None and not run.diverged:
            ids[run.row.score is not None] = run.run_id
    if len(ids) == 2:
        raise ResultsError(
            f"task {task} has scores in run {ids[True]} but none in run {ids[False]}; "
            "keep runs made with the same references in one results folder"
        )
    if not ids and behaviour is not None:
        return "return" if behaviour.score is None else "score"
    return "return" if False in ids else "score"


def _behaviour(row: Row | None, unit: str) -> float | None:
    if row is None:
        return None
    return row.score if unit == "score" else mean_return(row)


def _own_value(run: Run, unit: str) -> float | None:
    if run.row is None:
        return None
    return run.row.score if unit == "score" else mean_return(run.row)


def _floor(
    task: str, unit: str, runs: Iterable[Run], behaviour: Mapping[str, Row]
) -> float:
    """What a diverged run counts as, unless its own value is lower."""
    if unit == "score":
        return 0.0
    known = [_own_value(run, unit) for run in runs if run.cell.task == task]
    known.append(_behaviour(behaviour.get(task), unit))
    return min(value for value in known if value is not None)


def _cell(
    task: str, runs: list[Run], units: Mapping[str, str], floors: Mapping[str, float]
) -> Cell:
    runs = sorted(runs, key=lambda run: run.seed)
    values: list[float] = []
    for run in runs:
        own = _own_value(run, units[task])
        if run.diverged:
            values.append(min(floors[task], floors[task] if own is None else own))
        elif own is not None:
            values.append(own)
    counted = [run for run in runs if run.row is not None]
    return Cell(
        task=task,
        seeds=tuple(run.seed for run in counted),
        values=tuple(values),
        mean=None,
        episodes=min((len(run.row.returns) for run in counted if run.row), default=0),
        diverged=tuple(run.seed for run in counted if run.diverged),
        failed=tuple(run.seed for run in runs if run.failure is not None),
        missing=tuple(r.seed for r in runs if r.row is None and r.failure is None),
    )


def _entry(
    line: tuple[str, str, str, dict[str, Cell], list[Run]],
    statistics: ranking.Standing,
    units: Mapping[str, str],
    ranked: set[str],
    budget: tuple[int, set[int]] | None,
) -> Entry:
    label, agent, setting, cells, runs = line
    costs = [cost for run in runs if run.row and (cost := _cost(run.row)) is not None]
    scored = all(units[task] == "score" for task in ranked)
    return Entry(
        label=label,
        agent=agent,
        setting=setting,
        rank=statistics.rank,
        iqm=statistics.iqm,
        mean=statistics.mean,
        median=statistics.median,
        optimality_gap=statistics.optimality_gap if scored else None,
        leader=statistics.leader,
        leader_better=statistics.leader_better,
        cost_s=round(sum(costs) / len(costs), 4) if costs else None,
        tuned=(budget[0], len(budget[1])) if budget else None,
        cells=tuple(
            dataclasses.replace(cell, mean=statistics.task_means.get(task))
            for task, cell in cells.items()
        ),
    )


def _cost(row: Row) -> float | None:
    members, devices = (row.population.get(n) for n in ("members", "devices"))
    if row.wall_s is None or not isinstance(members, int) or members < 1:
        return None
    return row.wall_s * (devices if isinstance(devices, int) else 1) / members


def _absent(
    runs: Iterable[Run], labels: Mapping[tuple[str, str], str]
) -> tuple[str, ...]:
    """One line per cell and reason, such as `iql on a/b-v0: seeds 3-9 missing`."""
    groups: dict[tuple[CellKey, str], list[int]] = defaultdict(list)
    for run in runs:
        if run.failure is not None:
            groups[run.cell, f"failed ({run.failure})"].append(run.seed)
        elif run.row is None:
            at = f", at {run.reached:,} of {run.section.updates_total:,} updates"
            groups[run.cell, "missing" + (at if run.reached else "")].append(run.seed)
        elif run.diverged:
            at = f"diverged by {run.reached:,} updates, counted as the floor"
            groups[run.cell, at].append(run.seed)
    return tuple(
        f"{labels[cell.agent, cell.setting]} on {cell.task}: {_seeds(seeds)} {reason}"
        for (cell, reason), seeds in sorted(groups.items())
    )


def _seeds(seeds: list[int]) -> str:
    """`seed 3`, or `seeds 0-2, 7`."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    text = ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
    return f"seed{'s' if len(seeds) > 1 else ''} {text}"


def _warnings(
    key: SectionKey,
    runs: list[Run],
    tasks: tuple[TaskInfo, ...],
    budget: Mapping[tuple[str, str], tuple[int, set[int]]],
) -> tuple[str, ...]:
    warnings: list[str] = []
    configs, datasets = defaultdict(set), defaultdict(set)
    hypers, seeds = defaultdict(set), defaultdict(set)
    for run in runs:
        configs[run.cell.agent].add(run.config)
        hypers[run.cell].add(run.hyper)
        seeds[run.cell.agent].add(run.seed)
        if run.row is not None:
            datasets[run.cell.task].add(run.dataset)
    warnings += [
        f"{agent}: runs of {len(found)} different structures under one label"
        for agent, found in sorted(configs.items())
        if len(found) > 1
    ]
    warnings += [
        f"{cell.agent} [{cell.setting}] on {cell.task}: seeds ran with different values"
        for cell, found in sorted(hypers.items())
        if len(found) > 1
    ]
    warnings += [
        f"{task}: runs used {len(found)} different datasets; they do not compare"
        for task, found in sorted(datasets.items())
        if len(found) > 1
    ]
    for agent, own in sorted(seeds.items()):
        shared = own & budget.get((agent, key.family), (0, set()))[1]
        if shared:
            warnings.append(
                f"{agent}: {_seeds(list(shared))} served for tuning and for testing"
            )
    changed = sum(run.row is not None and run.row.split_changed for run in runs)
    if changed:
        warnings.append(
            f"{changed} runs continued under another split of the population"
        )
    left_out = [t.task for t in tasks if not t.ranked and t.unit == "return"]
    if left_out:
        warnings.append(
            f"no reference scores, so raw returns and no rank: {', '.join(left_out)}"
        )
    return tuple(warnings)
