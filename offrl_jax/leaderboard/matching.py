"""Which runs of two results folders may be compared, and what differs between them."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from offrl_jax.leaderboard.runs import CellKey, Run, SectionKey, base_of
from offrl_jax.leaderboard.sections import RETURN, SCORE, differing, seen_units

NAMES = ("A", "B")
"""The baseline and the change."""

Side = list[Run]
"""Runs of one folder."""

_Cell = tuple[SectionKey, CellKey]


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """The cells of two folders, sorted out.

    Attributes:
      common: runs of both sides whose cell has a counterpart, by what they share.
      cells: that have a counterpart.
      unmatched: cells without one, of either side.
      lines: which these are, and what differs, one line each.
    """

    common: Mapping[SectionKey, tuple[Side, Side]]
    cells: int
    unmatched: tuple[int, int]
    lines: tuple[str, ...]


def match(before: Iterable[Run], after: Iterable[Run]) -> Match:
    """Matches cells of equal section, agent, setting and task."""
    sides = [_by_cell(before), _by_cell(after)]
    lines: list[str] = []
    shared = sides[0].keys() & sides[1].keys()
    by_task: dict[str, list[_Cell]] = defaultdict(list)
    for found in shared:
        by_task[found[1].task].append(found)
    clashing: set[_Cell] = set()
    for task, own in sorted(by_task.items()):
        units = seen_units(r for side in sides for found in own for r in side[found])
        if len(units) > 1:
            clashing.update(own)
            lines.append(
                f"{_count(len(own))} on {task} not compared: scores in run "
                f"{units[SCORE]}, raw returns in run {units[RETURN]}"
            )
    shared -= clashing
    common: dict[SectionKey, tuple[Side, Side]] = defaultdict(lambda: ([], []))
    for found in sorted(shared):
        for i in (0, 1):
            common[found[0]][i].extend(sides[i][found])
    alone = [sorted(side.keys() - shared - clashing) for side in sides]
    lines += _unmatched(alone, sides)
    return Match(
        common=common,
        cells=len(shared),
        unmatched=(len(alone[0]) + len(clashing), len(alone[1]) + len(clashing)),
        lines=tuple(lines),
    )


def _by_cell(runs: Iterable[Run]) -> dict[_Cell, list[Run]]:
    found: dict[_Cell, list[Run]] = defaultdict(list)
    for run in runs:
        found[run.section, run.cell].append(run)
    return found


def _unmatched(
    alone: Sequence[Sequence[_Cell]], sides: Sequence[Mapping[_Cell, Side]]
) -> Iterator[str]:
    """One line per difference that keeps cells apart, then one per agent and side."""
    others: list[dict[tuple[str, str, str], list[SectionKey]]] = []
    for side in sides:
        index: dict[tuple[str, str, str], list[SectionKey]] = defaultdict(list)
        for key, cell in side:
            index[base_of(cell.agent), cell.setting, cell.task].append(key)
        others.append(index)
    apart: dict[str, tuple[list[CellKey], list[CellKey]]] = defaultdict(
        lambda: ([], [])
    )
    single: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for i, cells in enumerate(alone):
        for key, cell in cells:
            there = others[1 - i].get((base_of(cell.agent), cell.setting, cell.task))
            if there:
                near = min(there, key=lambda other: (_distance(key, other), other))
                pair = (key, near) if i == 0 else (near, key)
                apart[_what_differs(*pair)][i].append(cell)
            else:
                single[NAMES[i], cell.agent, cell.setting].append(cell.task)
    for what, both in sorted(apart.items()):
        counts = [
            f"{_count(len(own))} of {n}"
            for n, own in zip(NAMES, both, strict=True)
            if own
        ]
        cells = [*both[0], *both[1]]
        agents = ", ".join(sorted({f"{cell.agent} [{cell.setting}]" for cell in cells}))
        tasks = ", ".join(sorted({cell.task for cell in cells}))
        yield f"{' and '.join(counts)} not compared: {what} ({agents} on {tasks})"
    for (name, agent, setting), tasks in sorted(single.items()):
        yield (
            f"only in {name}: {agent} [{setting}] on {', '.join(sorted(set(tasks)))} "
            f"({_count(len(tasks))})"
        )


def _count(cells: int) -> str:
    return f"{cells} cell{'s' * (cells != 1)}"


def _distance(one: SectionKey, other: SectionKey) -> int:
    return sum(x != y for x, y in zip(one, other, strict=True))


def _what_differs(before: SectionKey, after: SectionKey) -> str:
    """`updates 100 in A, 200 in B`, and so on."""
    parts = [
        _values(name, x, y)
        for name, x, y in (
            ("family", before.family, after.family),
            ("preset", before.preset, after.preset),
            ("updates", before.updates_total, after.updates_total),
        )
        if x != y
    ]
    protocols = [json.loads(key.protocol) for key in (before, after)]
    parts += _between(protocols[0], protocols[1], "protocol ")
    return ", ".join(parts)


def _values(name: str, before: object, after: object) -> str:
    return f"{name} {before} in {NAMES[0]}, {after} in {NAMES[1]}"


def _between(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    return [
        _values(f"{prefix}{name}", before.get(name), after.get(name))
        for name in differing([before, after])
    ]


def machines(runs: Iterable[Run]) -> set[tuple[str, str]]:
    """Devices and sizes of populations: seconds compare where both sides have these."""
    return {
        (run.row.device, f"{run.row.population.get('members')} runs")
        for run in runs
        if run.row is not None
    }


def warnings(
    before: Side, after: Side, labels: Mapping[tuple[str, str], str]
) -> tuple[str, ...]:
    """What differs between matched runs besides their results, one line each."""
    return (
        *_settings(before, after, labels),
        *_structures(before, after),
        *_datasets(before, after),
        *_conditions(before, after, labels),
    )


def _settings(
    before: Side, after: Side, labels: Mapping[tuple[str, str], str]
) -> list[str]:
    values = [
        _collect((run.cell, run.hyper) for run in side) for side in (before, after)
    ]
    tasks: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cell in sorted(values[0].keys() & values[1].keys()):
        if values[0][cell] != values[1][cell]:
            what = _records(values[0][cell], values[1][cell])
            tasks[labels[cell.agent, cell.setting], what].append(cell.task)
    return [
        f"{label}: {what} on {len(own)} task{'s' * (len(own) > 1)}"
        for (label, what), own in sorted(tasks.items())
    ]


def _structures(before: Side, after: Side) -> list[str]:
    a, b = (
        _collect((run.cell.agent, run.config) for run in s) for s in (before, after)
    )
    return [
        f"{agent}: structure {_records(a[agent], b[agent])}"
        for agent in sorted(a.keys() & b.keys())
        if a[agent] != b[agent]
    ]


def _datasets(before: Side, after: Side) -> list[str]:
    a, b = (
        _collect((run.cell.task, run.dataset or "none") for run in side if run.row)
        for side in (before, after)
    )
    return [
        f"{task}: another dataset ({', '.join(sorted(a[task]))} in {NAMES[0]}, "
        f"{', '.join(sorted(b[task]))} in {NAMES[1]}); a difference may be the data's"
        for task in sorted(a.keys() & b.keys())
        if a[task] != b[task]
    ]


def _conditions(
    before: Side, after: Side, labels: Mapping[tuple[str, str], str]
) -> list[str]:
    rows = [[run.row for run in side if run.row] for side in (before, after)]
    if not rows[0] or not rows[1]:
        return []
    found = []
    for name in ("flags", "versions"):
        records = [
            {json.dumps(getattr(r, name), sort_keys=True) for r in s} for s in rows
        ]
        if records[0] != records[1]:
            found.append(f"{name}: {_records(records[0], records[1])}")
    return [*found, *_speeds(before, after, labels)]


def _speeds(
    before: Side, after: Side, labels: Mapping[tuple[str, str], str]
) -> list[str]:
    lines: dict[tuple[str, str], tuple[Side, Side]] = defaultdict(lambda: ([], []))
    for i, side in enumerate((before, after)):
        for run in side:
            lines[run.cell[:2]][i].append(run)
    found: dict[str, list[str]] = defaultdict(list)
    for line, sides in lines.items():
        a, b = (" and ".join(map(" x ".join, sorted(machines(s)))) for s in sides)
        if a and b and a != b:
            found[_values("", a, b).strip()].append(labels[line])
    return [
        f"s/run do not compare, of {', '.join(sorted(own))}: {what}"
        for what, own in sorted(found.items())
    ]


def _collect(pairs: Iterable[tuple[Any, str]]) -> dict[Any, set[str]]:
    found: dict[Any, set[str]] = defaultdict(set)
    for name, value in pairs:
        found[name].add(value)
    return found


def _records(before: set[str], after: set[str]) -> str:
    """What differs between two sets of JSON records; in words if each is one record."""
    if len(before) == len(after) == 1:
        return ", ".join(_between(json.loads(min(before)), json.loads(min(after))))
    return f"{len(before)} different ones in {NAMES[0]}, {len(after)} in {NAMES[1]}"
