"""What a cell shows when it is opened: curves seed by seed, and the rows themselves.

The result is JSON for the script of the page.  Fields that all rows of a cell share are
written once, as places in a pool of values that all cells share: six thousand rows
differ in little but their identity, their score and their times.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

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
      `pool`; `episodes`, whether rows have their lists of episodes; and `sections`,
      each with `agents`, `tasks`, `updates` and `cells` by "agent.task".
    """
    by_run: dict[_RunKey, list[Row]] = defaultdict(list)
    for row in contents.rows:
        cell = CellKey(row.agent, row.setting, row.task)
        by_run[row.run_id, cell, row.seed].append(row)
    counted = [r.row for group in contents.groups for r in group.runs if r.row]
    episodes = _size_of_episodes(counted) <= EPISODES_BYTES
    pool = Pool()
    return {
        "episodes": episodes,
        "sections": [
            _section(group, section, by_run, pool, episodes)
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
    episodes: bool,
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
                    group, cell, own, by_run, slopes[cell.task], pool, episodes
                )
    return {
        "agents": [entry.label for entry in section.entries],
        "tasks": [info.task for info in section.tasks],
        "units": [info.unit for info in section.tasks],
        "updates": section.updates_total,
        "cells": cells,
    }


def _cell(
    group: Group,
    cell: Cell,
    runs: Sequence[Run],
    by_run: Mapping[_RunKey, list[Row]],
    slope: float | None,
    pool: Pool,
    episodes: bool,
) -> dict[str, Any]:
    names = [name for name in FIELDS if episodes or name not in EPISODE_FIELDS]
    rows = [run.row for run in runs if run.row is not None]
    shared = {
        name: pool.number(getattr(rows[0], name))
        for name in names
        if rows and all(getattr(r, name) == getattr(rows[0], name) for r in rows)
    }
    own_names = [name for name in names if name not in shared]
    return {
        "mean": [cell.mean.value, cell.mean.low, cell.mean.high] if cell.mean else None,
        "noise": getattr(cell, "episode_share", None),
        "shared": shared,
        "runs": [
            {
                "seed": run.seed,
                "run": pool.number(run.run_id),
                "state": _state(run),
                "value": _rounded(group.value(cell.task, run.row) if run.row else None),
                "episodes": _summary(run.row),
                "curve": _curve(
                    group, run, by_run[run.run_id, run.cell, run.seed], slope
                ),
                "row": _plain(run.row, own_names),
            }
            for run in sorted(runs, key=lambda run: run.seed)
        ],
    }


def _state(run: Run) -> str:
    if run.failure is not None:
        return f"failed: {run.failure}"
    if run.row is None:
        return "missing"
    return "diverged" if run.diverged else "ok"


def _plain(row: Row | None, names: Iterable[str]) -> dict[str, Any] | None:
    if row is None:
        return None
    return json.loads(strict_json({name: getattr(row, name) for name in names}))


def _summary(row: Row | None) -> list[float | None] | None:
    """Number, mean, standard deviation, lowest and highest return of the episodes."""
    if row is None or not row.returns or not all(map(math.isfinite, row.returns)):
        return None
    values = row.returns
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    found = [math.fsum(values) / len(values), deviation, min(values), max(values)]
    return [len(values), *map(_rounded, found)]


def _rounded(value: float | None) -> float | None:
    """Five digits, enough to draw and to read."""
    return None if value is None else float(f"{value:.5g}")


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
    group: Group, run: Run, rows: Iterable[Row], slope: float | None
) -> list[list[float | None]]:
    """Steps, values, and half the width of a 95 % interval over the episodes."""
    found: list[list[float | None]] = []
    for row in sorted(rows, key=lambda row: row.step):
        value = group.value(run.cell.task, row) if row.status != "failed" else None
        if value is not None:
            found.append([row.step, _rounded(value), _half_width(row, slope)])
    return found


def _half_width(row: Row, slope: float | None) -> float | None:
    """1.96 standard errors of the mean over the row's episodes, in its unit."""
    values = row.returns
    if slope is None or len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(f"{abs(slope) * 1.96 * error:.3g}")
