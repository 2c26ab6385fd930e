"""What a cell shows when it is opened: curves seed by seed, and the rows themselves.

The result is JSON for the script of the page, in lists without names: six thousand runs
must fit.  Fields that all rows of a cell share are written once, as places in a pool of
values that all cells share; rows differ in little but their identity and their score.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from offrl_jax.leaderboard import text
from offrl_jax.leaderboard.model import Cell, Section
from offrl_jax.leaderboard.runs import CellKey, Run
from offrl_jax.leaderboard.sections import SCORE, Contents, Group
from offrl_jax.results import Row
from offrl_jax.results.rows import FIELDS, strict_json

EPISODE_FIELDS = ("returns", "lengths", "successes")
EPISODES_BYTES = 500_000
"""Lists of episodes are left out of a page in which they would take more than this."""

_RunKey = tuple[str, CellKey, int | None]


class Pool:
    """Values by number, each once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, value: Any) -> int:
        """Where `value` stands."""
        return self._numbers.setdefault(strict_json(value), len(self._numbers))

    def to_json(self) -> list[Any]:
        """The values in their order."""
        return [json.loads(text) for text in self._numbers]


def encode(contents: Contents, sections: Sequence[Section]) -> dict[str, Any]:
    """Everything about all cells, as plain JSON.

    Args:
      contents: of a results folder.
      sections: of its leaderboard, in the order of its groups.

    Returns:
      `episodes`, whether rows have their lists of episodes; `fields` of a row; `pool`
      of values; and `sections`, each with `agents`, `tasks`, `units`, `updates`,
      `steps` and `cells` by "agent.task".  A cell has its `mean` with the ends of the
      interval, `noise`, `shared`, a place in the pool for every field or -1, the
      `steps` of its evaluations, and `runs`: lists of seed, place of the run's name in
      the pool, state, value, what `_summary` says, `_curve`, and the fields that are
      not shared.
    """
    by_run: dict[_RunKey, list[Row]] = defaultdict(list)
    for row in contents.rows:
        cell = CellKey(row.agent, row.setting, row.task)
        by_run[row.run_id, cell, row.seed].append(row)
    counted = [r.row for group in contents.groups for r in group.runs if r.row]
    episodes = _size_of_episodes(counted) <= EPISODES_BYTES
    fields = [name for name in FIELDS if episodes or name not in EPISODE_FIELDS]
    pool = Pool()
    return {
        "episodes": episodes,
        "fields": fields,
        "sections": [
            _section(group, section, by_run, pool, fields)
            for group, section in zip(contents.groups, sections, strict=True)
        ],
        "pool": pool.to_json(),
    }


def _size_of_episodes(rows: Iterable[Row]) -> int:
    """Characters of their JSON, nearly."""
    return sum(20 * len(row.returns) + 5 * len(row.lengths) for row in rows)


def _section(
    group: Group,
    section: Section,
    by_run: Mapping[_RunKey, list[Row]],
    pool: Pool,
    fields: Sequence[str],
) -> dict[str, Any]:
    runs: dict[CellKey, list[Run]] = defaultdict(list)
    for run in group.runs:
        runs[run.cell].append(run)
    slopes = {info.task: _slope(group, info.task) for info in section.tasks}
    cells = {}
    for i, entry in enumerate(section.entries):
        for j, cell in enumerate(entry.cells):
            own = runs[CellKey(entry.agent, entry.setting, cell.task)]
            if own:
                cells[f"{i}.{j}"] = _cell(
                    group, cell, own, by_run, slopes[cell.task], pool, fields
                )
    return {
        "agents": [entry.label for entry in section.entries],
        "tasks": [info.task for info in section.tasks],
        "units": [info.unit for info in section.tasks],
        "updates": section.updates_total,
        "steps": text.steps_name(section.family),
        "cells": cells,
    }


def _cell(
    group: Group,
    cell: Cell,
    runs: Sequence[Run],
    by_run: Mapping[_RunKey, list[Row]],
    slope: float | None,
    pool: Pool,
    fields: Sequence[str],
) -> dict[str, Any]:
    rows = [run.row for run in runs if run.row is not None]
    shared = [
        pool.number(getattr(rows[0], name))
        if rows and all(getattr(r, name) == getattr(rows[0], name) for r in rows)
        else -1
        for name in fields
    ]
    own = [name for name, place in zip(fields, shared, strict=True) if place < 0]
    evaluations = [by_run[run.run_id, run.cell, run.seed] for run in runs]
    steps = sorted({row.step for found in evaluations for row in found})
    return {
        "mean": [cell.mean.value, cell.mean.low, cell.mean.high] if cell.mean else None,
        "noise": cell.episode_share,
        "shared": shared,
        "steps": steps,
        "runs": [
            [
                run.seed,
                pool.number(run.run_id),
                _state(run),
                _rounded(group.value(cell.task, run.row) if run.row else None, 5),
                _summary(run.row),
                _curve(group, run, found, steps, slope),
                None if run.row is None else _plain(run.row, own),
            ]
            for run, found in sorted(
                zip(runs, evaluations, strict=True), key=lambda item: item[0].seed
            )
        ],
    }


def _state(run: Run) -> str:
    if run.failure is not None:
        return f"failed: {run.failure}"
    if run.row is None:
        return "missing"
    return "diverged" if run.diverged else "ok"


def _plain(row: Row, names: Iterable[str]) -> list[Any]:
    return json.loads(strict_json([getattr(row, name) for name in names]))


def _summary(row: Row | None) -> list[float | None] | None:
    """Number, mean, standard deviation, lowest and highest return of the episodes."""
    if row is None or not row.returns or not all(map(math.isfinite, row.returns)):
        return None
    values = row.returns
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    found = [math.fsum(values) / len(values), deviation, min(values), max(values)]
    return [len(values), *(_rounded(value, 5) for value in found)]


def _rounded(value: float | None, digits: int) -> float | int | None:
    """Significant digits enough to draw and to read; whole numbers without a point."""
    if value is None:
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


def _slope(group: Group, task: str) -> float | None:
    """Points of score per unit of return; None where rows do not tell.

    A score is linear in the mean return, and two rows of the task tell how.
    """
    if group.units[task] != SCORE:
        return 1.0
    known = [
        (math.fsum(row.returns) / len(row.returns), row.score)
        for run in group.runs
        if run.cell.task == task and (row := run.row) is not None
        if row.score is not None and row.returns and not run.diverged
    ]
    low, high = min(known, default=None), max(known, default=None)
    if low is None or high is None or low[0] == high[0]:
        return None
    return (high[1] - low[1]) / (high[0] - low[0])


def _curve(
    group: Group,
    run: Run,
    rows: Iterable[Row],
    steps: Sequence[int],
    slope: float | None,
) -> list[float | None]:
    """By step: value, and half the width of a 95 % interval over the episodes."""
    found: dict[int, tuple[float | None, float | None]] = {}
    for row in rows:
        value = group.value(run.cell.task, row) if row.status != "failed" else None
        if value is not None:
            half = _half_width(row, slope)
            found[row.step] = (_rounded(value, 4), _rounded(half, 2))
    return [part for step in steps for part in found.get(step, (None, None))]


def _half_width(row: Row, slope: float | None) -> float | None:
    """1.96 standard errors of the mean over the row's episodes, in its unit."""
    values = row.returns
    if slope is None or len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return abs(slope) * 1.96 * error
