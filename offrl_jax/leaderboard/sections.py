"""From a results folder to what each table is made of, with all rules of counting."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offrl_jax.errors import ResultsError
from offrl_jax.leaderboard.model import ONE_SETTING, PER_TASK
from offrl_jax.leaderboard.published import PublishedTable, read_published
from offrl_jax.leaderboard.runs import (
    POOLED,
    CellKey,
    Merge,
    Run,
    SectionKey,
    base_of,
    final_runs,
    has_diverged,
    mean_return,
    merge_protocols,
    tuning_budget,
)
from offrl_jax.results import BEHAVIOUR, Row, plan_path, read_plans, read_rows
from offrl_jax.results.rows import strict_json

SCORE, RETURN = "score", "return"
"""Units of a task: normalised x100, or raw where it has no reference."""

Budget = Mapping[tuple[str, str], tuple[int, set[int]]]
"""Settings tried and seeds used for tuning, by agent and family."""
Behaviours = Mapping[tuple[str, str | None], Row]
"""Rows of datasets by task and hash: of the recipe, or of the bytes without one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The runs of one table, and what their rows count as.

    Attributes:
      key: what all runs have in common.
      tuning: `ONE_SETTING` or `PER_TASK`.
      runs: in the order of cells and seeds.
      labels: of a line, by agent and setting.
      units: by task, sorted.
      floors: what a diverged run counts as, by task.
      behaviour: the row of the dataset that the runs used, by task.
      budget: of tuning.
    """

    key: SectionKey
    tuning: str
    runs: Sequence[Run]
    labels: Mapping[tuple[str, str], str]
    units: Mapping[str, str]
    floors: Mapping[str, float]
    behaviour: Mapping[str, Row]
    budget: Budget

    @property
    def begun(self) -> set[str]:
        """Tasks of which any run counts."""
        return {run.cell.task for run in self.runs if run.row is not None}

    def value(self, task: str, row: Row) -> float | None:
        """What a row counts as; None if it has no value in its task's unit."""
        own = own_value(row, self.units[task])
        if not has_diverged(row):
            return own
        floor = self.floors[task]
        return floor if own is None else min(floor, own)


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """What a results folder holds for tables.

    Attributes:
      groups: one per table, sorted.
      rows: all of them.
      messages: about the folder as a whole, one line each.
      published: numbers of others, never among the groups.
    """

    groups: Sequence[Group]
    rows: Sequence[Row]
    messages: tuple[str, ...]
    published: tuple[PublishedTable, ...]


def read_contents(folder: Path, pool_protocols: bool = False) -> Contents:
    """Reads rows and plan, and sorts the runs that count into tables.

    Args:
      folder: of results.
      pool_protocols: whether runs that differ in episodes, points of the curve or seed
        of the evaluation alone share a table, which then says so.

    Raises:
      ResultsError: no such folder, nothing to rank in it, or rows that cannot be read
        or contradict each other.
    """
    runs, rows, messages = read_runs(
        folder, merge_protocols if pool_protocols else None
    )
    behaviour = behaviour_rows(rows)
    # Of several experiments below a folder, one's tuning says nothing of another's.
    alone = plan_path(folder).parent.joinpath("rows").is_dir()
    budget = tuning_budget(rows) if alone else {}
    groups: dict[tuple[SectionKey, str], list[Run]] = defaultdict(list)
    for run, tuning in zip(runs, _tuning(runs), strict=True):
        groups[run.section, tuning].append(run)
    for (key, tuning), group in groups.items():
        other = groups.get((key, ONE_SETTING), [])
        if tuning == PER_TASK and all(base_of(r.cell.agent) != "bc" for r in group):
            # Cloning, the yardstick of every table, has nothing to choose per task.
            group += [r for r in other if base_of(r.cell.agent) == "bc"]
    return Contents(
        [
            gather(key, tuning, group, behaviour, budget)
            for (key, tuning), group in sorted(groups.items())
        ],
        rows,
        messages,
        read_published(folder),
    )


def read_runs(
    folder: Path, merge: Merge | None = None
) -> tuple[list[Run], list[Row], tuple[str, ...]]:
    """The runs that count, all rows, and messages about the folder, one line each.

    Raises:
      ResultsError: as `read_contents`.
    """
    if not folder.is_dir():
        raise ResultsError(
            f"{folder}: no such folder; give the results folder of `offrl benchmark`"
        )
    messages: list[str] = []
    # Paths inside the folder: tables are kept and shared, whoever drew them.
    rows = read_rows(folder, lambda m: messages.append(m.replace(f"{folder}/", "")))
    runs, superseded = final_runs(rows, read_plans(folder), merge)
    if not runs:
        what = "only tuning or dataset rows" if rows else "no rows and no plan"
        raise ResultsError(
            f"{folder}: {what} below it ({plan_path(Path())}, rows/*.jsonl); run "
            "`offrl benchmark` with this results folder first"
        )
    if superseded:
        messages.append(f"{superseded} runs are superseded by later ones of their cell")
    return runs, rows, tuple(messages)


def behaviour_rows(rows: Iterable[Row]) -> Behaviours:
    """The rows of the datasets themselves."""
    return {
        (row.task, row.recipe_hash or row.dataset_hash): row
        for row in rows
        if row.agent == BEHAVIOUR
    }


def gather(
    key: SectionKey,
    tuning: str,
    runs: list[Run],
    behaviours: Behaviours,
    budget: Budget,
) -> Group:
    """Runs that stand together, with what their rows count as.

    Raises:
      ResultsError: a task with scores in some of the runs only.
    """
    tasks = sorted({run.cell.task for run in runs})
    behaviour = {
        task: behaviours[task, data]
        for task, data in sorted({(r.cell.task, r.dataset or "") for r in runs})
        if (task, data) in behaviours
    }
    units = {task: _unit(task, runs, behaviour.get(task)) for task in tasks}
    lines = sorted({(run.cell.agent, run.cell.setting) for run in runs})
    several = Counter(agent for agent, _ in lines)
    labels = {
        (agent, setting): agent if several[agent] == 1 else f"{agent} [{setting}]"
        for agent, setting in lines
    }
    floors = {task: _floor(task, units[task], runs, behaviour) for task in tasks}
    return Group(key, tuning, runs, labels, units, floors, behaviour, budget)


def _tuning(runs: list[Run]) -> list[str]:
    """Whether each run's setting was chosen per task, or differs between tasks."""
    values: dict[tuple[SectionKey, str, str], set[str]] = defaultdict(set)
    for run in runs:
        values[run.section, run.cell.agent, run.cell.setting].add(run.hyper)
    return [
        ONE_SETTING
        if len(values[run.section, run.cell.agent, run.cell.setting]) == 1
        and not str(run.selection.get("rule", "")).endswith("_per_task")
        else PER_TASK
        for run in runs
    ]


def _unit(task: str, runs: Iterable[Run], behaviour: Row | None) -> str:
    ids = seen_units(run for run in runs if run.cell.task == task)
    if len(ids) == 2:
        raise ResultsError(
            f"task {task} has scores in run {ids[SCORE]} but none in run {ids[RETURN]};"
            " keep runs made with the same references in one results folder"
        )
    if not ids and behaviour is not None:
        return RETURN if behaviour.score is None else SCORE
    return RETURN if RETURN in ids else SCORE


def seen_units(runs: Iterable[Run]) -> dict[str, str]:
    """Units that a task's runs have values in, each with the id of such a run."""
    return {
        RETURN if run.row.score is None else SCORE: run.run_id
        for run in runs
        if run.row is not None and not run.diverged
    }


def own_value(row: Row | None, unit: str) -> float | None:
    """What a row says in that unit, diverged or not; None where it says nothing."""
    if row is None:
        return None
    return row.score if unit == SCORE else mean_return(row)


def _floor(
    task: str, unit: str, runs: Iterable[Run], behaviour: Mapping[str, Row]
) -> float:
    """What a diverged run counts as, unless its own value is lower."""
    if unit == SCORE:
        return 0.0
    known = [own_value(run.row, unit) for run in runs if run.cell.task == task]
    known.append(own_value(behaviour.get(task), unit))
    return min(value for value in known if value is not None)


def absent(
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
        f"{labels[cell[:2]]} on {cell.task}: {name_seeds(seeds)} {reason}"
        for (cell, reason), seeds in sorted(groups.items())
    )


def name_seeds(seeds: Iterable[int]) -> str:
    """`seed 3`, or `seeds 0-2, 7`."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    text = ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
    return f"seed{'' if text.isdigit() else 's'} {text}"


def warnings(group: Group) -> tuple[str, ...]:
    """What makes the runs of a group compare badly, one line each."""
    key, runs, budget = group.key, group.runs, group.budget
    found: list[str] = []
    configs, datasets = defaultdict(set), defaultdict(set)
    hypers, seeds = defaultdict(set), defaultdict(set)
    for run in runs:
        configs[run.cell[:2]].add(run.config)
        hypers[run.cell].add(run.hyper)
        seeds[run.cell.agent].add(run.seed)
        if run.row is not None:
            datasets[run.cell.task].add(run.dataset)
    found += [
        f"{group.labels[line]}: runs of {len(several)} different structures under one "
        "label"
        for line, several in sorted(configs.items())
        if len(several) > 1
    ]
    found += [
        f"{cell.agent} [{cell.setting}] on {cell.task}: seeds ran with different values"
        for cell, several in sorted(hypers.items())
        if len(several) > 1
    ]
    found += [
        f"{task}: runs used {len(several)} different datasets; they do not compare"
        for task, several in sorted(datasets.items())
        if len(several) > 1
    ]
    for agent, own in sorted(seeds.items()):
        shared = own & budget.get((agent, key.family), (0, set()))[1]
        if shared:
            found.append(
                f"{agent}: {name_seeds(shared)} served for tuning and for testing"
            )
    changed = sum(run.row is not None and run.row.split_changed for run in runs)
    if changed:
        found.append(f"{changed} runs continued under another split of the population")
    if POOLED in json.loads(key.protocol):
        found.append(_pooling(key, runs))
    return tuple(found)


def _pooling(key: SectionKey, runs: Iterable[Run]) -> str:
    """Names the protocols of a merged table, by what they differ in."""
    counts = Counter(run.protocol for run in runs if run.row is not None)
    protocols = json.loads(key.protocol)[POOLED]
    names = differing(protocols)
    parts = [
        f"{' '.join(f'{n} {protocol.get(n)}' for n in names)} "
        f"({counts[strict_json(protocol)]} runs)"
        for protocol in protocols
    ]
    return (
        f"asked for: runs of {len(protocols)} protocols stand together: "
        f"{', '.join(parts)}"
    )


def differing(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names under which some of the records differ, sorted."""
    names = sorted({name for record in records for name in record})
    return [
        name
        for name in names
        if len({strict_json(record.get(name)) for record in records}) > 1
    ]
