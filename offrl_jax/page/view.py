"""What the template draws, in words and numbers ready to be written."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from offrl_jax.leaderboard import comparisons, text
from offrl_jax.leaderboard.model import Cell, Entry, Section
from offrl_jax.leaderboard.progress import Progress
from offrl_jax.leaderboard.ranking import Bounds, surely_highest
from offrl_jax.leaderboard.runs import Run
from offrl_jax.page import charts
from offrl_jax.results.rows import strict_json

COLOURS, DASHES = 7, 4
"""Of lines: an agent has the same look in all charts of a page."""
MATRIX_AGENTS = 30
"""Most agents of a matrix; the first ones of the ranking."""
NAMED = 4
"""Most agents named in a sentence."""


class Number(NamedTuple):
    """A number of a table.

    Attributes:
      text: as it is read.
      sort: by which its column sorts, empty where there is none.
      interval: `[80.2, 85.9]` or empty.
    """

    text: str
    sort: str
    interval: str = ""


class Interval(NamedTuple):
    """An interval drawn in a row of the ranking, in percent of its width."""

    low: float
    value: float
    high: float


def number_of(bounds: Bounds | None) -> Number:
    """A value with its interval."""
    if bounds is None:
        return Number(text.DASH, "")
    return Number(text.estimate(bounds), str(bounds.value), text.interval(bounds))


def section_view(
    section: Section,
    progress: Progress | None,
    runs: Sequence[Run],
    looks: Mapping[str, int],
    position: int,
) -> dict[str, Any]:
    """Everything that the template needs of one table.

    Args:
      section: of the leaderboard.
      progress: the same section's scores while training, None if no run counts.
      runs: of the section.
      looks: number of an agent's look, by label.
      position: of the section in the page.
    """
    numbers = {entry.label: i for i, entry in enumerate(section.entries)}
    ranked = [entry for entry in section.entries if entry.rank is not None]
    low, high = _range(section, ranked)
    found = comparisons.profiles(section)
    unit = "score" if section.unit == "score" else "return"
    drawn = [
        chart
        for chart in (
            charts.profiles(found, numbers, unit),
            charts.learning(progress, numbers),
        )
        if chart
    ]
    return {
        "id": f"s{position}",
        "title": text.title(section),
        "subtitle": text.subtitle(section),
        "state": text.state(section),
        "family": section.family,
        "short": in_short(section),
        "unit": "IQM" if section.unit == "score" else "IQM return",
        "range": (text.number(low), text.number(high)),
        "agents": [
            _agent(entry, i, looks[entry.label], low, high)
            for i, entry in enumerate(section.entries)
        ],
        "tuned": any(entry.tuned for entry in section.entries),
        "behaviour": text.number(text.behaviour_mean(section))
        if text.has_behaviour(section)
        else None,
        "footnotes": text.footnotes(section),
        "tasks": _tasks(section),
        "matrix": _matrix(section, ranked),
        "matrix_cut": len(ranked) if len(ranked) > MATRIX_AGENTS else 0,
        "lines": drawn,
        "dots": charts.cost(section, numbers),
        "warnings": section.warnings,
        "absent": section.absent,
        "origin": origin(section, runs),
    }


def look_numbers(sections: Iterable[Section]) -> dict[str, int]:
    """A number per label, in their order as words."""
    labels = sorted({entry.label for part in sections for entry in part.entries})
    return {label: i for i, label in enumerate(labels)}


def _range(section: Section, ranked: Sequence[Entry]) -> tuple[float, float]:
    ends = [
        end
        for entry in ranked
        if entry.iqm
        for end in (entry.iqm.value, entry.iqm.low, entry.iqm.high)
        if end is not None
    ]
    if section.unit == "score":
        ends += [0.0, 100.0]
    return min(ends, default=0.0), max(ends, default=0.0)


def _agent(
    entry: Entry, index: int, look: int, low: float, high: float
) -> dict[str, Any]:
    return {
        "index": index,
        "name": text.printable(entry.label),
        "marks": text.marks(entry),
        "colour": look % COLOURS,
        "dash": look // COLOURS % DASHES,
        "rank": entry.rank,
        "iqm": number_of(entry.iqm),
        "interval": _interval(entry.iqm, low, high),
        "mean": number_of(entry.mean),
        "median": number_of(entry.median),
        "gap": number_of(entry.optimality_gap),
        "lead": _lead(entry),
        "runs": text.runs(entry.cells),
        "noise": _noise(entry.episode_share),
        "cost": Number(
            text.seconds(entry.cost_s),
            "" if entry.cost_s is None else str(entry.cost_s),
        ),
        "tuned": "x".join(map(str, entry.tuned)) if entry.tuned else "",
    }


def _interval(bounds: Bounds | None, low: float, high: float) -> Interval | None:
    if bounds is None or high <= low:
        return None
    ends = [bounds.value if e is None else e for e in (bounds.low, bounds.high)]
    places = [(v - low) / (high - low) * 100 for v in (ends[0], bounds.value, ends[1])]
    return Interval(*(round(place, 2) for place in places))


def _lead(entry: Entry) -> Number:
    better = entry.leader_better
    if better is None:
        return Number("", "")
    between = ""
    if better.low is not None and better.high is not None:
        between = f"[{better.low:.2f}, {better.high:.2f}]"
    return Number(text.probability(entry), str(better.value), between)


def _noise(share: float | None) -> Number:
    if share is None:
        return Number(text.DASH, "")
    return Number(f"{100 * share:.0f} %", str(share))


def _tasks(section: Section) -> list[dict[str, Any]]:
    found = []
    for j, info in enumerate(section.tasks):
        cells = [entry.cells[j] for entry in section.entries]
        best = surely_highest([cell.mean for cell in cells])
        found.append(
            {
                "index": j,
                "name": text.printable(info.task),
                "raw": info.unit == "return",
                "behaviour": text.number(info.behaviour),
                "cells": [
                    {
                        "agent": i,
                        "value": number_of(cell.mean),
                        "seeds": len(cell.seeds),
                        "bar": _share(cell) if info.unit == "score" else None,
                        "best": i == best,
                        "trouble": bool(cell.diverged or cell.failed or cell.missing),
                    }
                    for i, cell in enumerate(cells)
                ],
            }
        )
    return found


def _share(cell: Cell) -> float | None:
    if cell.mean is None:
        return None
    return round(min(max(cell.mean.value, 0.0), 100.0), 1)


def _matrix(section: Section, ranked: Sequence[Entry]) -> dict[str, Any] | None:
    if len(ranked) < 2:
        return None
    shown = ranked[:MATRIX_AGENTS]
    found = comparisons.improvements(section, [entry.label for entry in shown])
    index = {entry.label: i for i, entry in enumerate(section.entries)}
    names = [(index[entry.label], text.printable(entry.label)) for entry in shown]
    lines = []
    for row in shown:
        cells = []
        for column in shown:
            bounds = found.get((row.label, column.label))
            cells.append(None if bounds is None else _chance(bounds))
        lines.append((index[row.label], text.printable(row.label), cells))
    return {"names": names, "lines": lines}


def _chance(bounds: Bounds) -> dict[str, Any]:
    sure = (
        bounds.low is not None
        and bounds.high is not None
        and (bounds.low > 0.5 or bounds.high < 0.5)
    )
    between = (
        f" [{bounds.low:.2f}, {bounds.high:.2f}]"
        if bounds.low is not None and bounds.high is not None
        else ""
    )
    return {
        "text": f"{bounds.value:.2f}",
        "between": between,
        "sure": sure,
        # How strong the colour is, and which: it wins or it loses.
        "strength": round(abs(bounds.value - 0.5) * 2, 3),
        "wins": bounds.value >= 0.5,
    }


def in_short(section: Section) -> list[str]:
    """Who leads, whether that is sure, and what it costs, one sentence each."""
    ranked = [entry for entry in section.entries if entry.rank is not None]
    if not ranked:
        raw = section.tasks and all(task.unit == "return" for task in section.tasks)
        why = (
            "raw returns of several tasks have no common scale; see the tasks below"
            if raw and section.runs
            else "no agent has finished runs of every task"
        )
        return [f"No ranking: {why}."]
    leader = ranked[0]
    iqm = f"{text.estimate(leader.iqm)} {text.interval(leader.iqm)}".strip()
    found = [f"{text.printable(leader.label)} has the highest IQM: {iqm}."]
    if len(ranked) == 1:
        found.append("No other agent is ranked beside it.")
    else:
        found.append(_certainty(section, leader, ranked[1:]))
    costs = [entry for entry in ranked if entry.cost_s]
    if leader.cost_s and len(costs) > 1:
        line = f"One of its runs costs {text.seconds(leader.cost_s)} device seconds"
        cheap = min(costs, key=lambda entry: entry.cost_s or 0.0)
        times = leader.cost_s / (cheap.cost_s or leader.cost_s)
        if times < 1.05:
            line += "; no other is clearly cheaper."
        else:
            line += (
                f", {times:.1f} times those of the cheapest, "
                f"{text.printable(cheap.label)} (IQM {text.estimate(cheap.iqm)})."
            )
        found.append(line)
    few = [entry for entry in ranked if entry.few]
    if few:
        found.append(
            "Few seeds or episodes: read the intervals as too narrow."
            if len(few) == len(ranked)
            else "Some agents have few seeds or episodes; they carry a mark."
        )
    return found


def _certainty(section: Section, leader: Entry, others: Sequence[Entry]) -> str:
    """Whom a run of the leader surely beats, and whom not."""
    shown = others[: MATRIX_AGENTS - 1]
    labels = [leader.label, *(entry.label for entry in shown)]
    found = comparisons.improvements(section, labels)
    sure, unsure = [], []
    for entry in shown:
        chance = found[leader.label, entry.label]
        clear = chance.low is not None and chance.low > 0.5
        name = f"{text.printable(entry.label)} ({chance.value:.2f})"
        (sure if clear else unsure).append(name)
    parts = []
    if sure:
        parts.append(f"surely better than {_names(sure)}")
    if unsure:
        parts.append(f"not surely better than {_names(unsure)}")
    if len(others) > len(shown):
        parts.append(f"the other {len(others) - len(shown)} have a lower IQM")
    line = "; ".join(parts)
    return (
        f"It is {line}. In brackets: the probability that one of its runs beats one of "
        "theirs; sure if its interval is above one half."
    )


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def origin(section: Section, runs: Sequence[Run]) -> dict[str, Any]:
    """Where the numbers come from, and the command that makes them again."""
    rows = [run.row for run in runs if run.row is not None]
    data = sorted({(r.task, r.recipe_hash or r.dataset_hash or "none") for r in rows})
    return {
        "commands": commands(section, runs),
        "protocol": strict_json(section.protocol),
        "devices": section.devices,
        "flags": sorted({strict_json(row.flags) for row in rows}),
        "versions": sorted(
            {
                ", ".join(f"{k} {v}" for k, v in sorted(row.versions.items()))
                for row in rows
            }
        ),
        "commits": sorted({row.commit or "outside of a checkout" for row in rows}),
        "data": data,
        "runs": f"{section.runs} of {section.planned} planned runs",
    }


def commands(section: Section, runs: Sequence[Run]) -> list[str]:
    """Commands that train and evaluate the runs of a section anew."""
    seeds = max((run.seed for run in runs), default=0) + 1
    updates = section.updates_total
    if section.suite != "run":
        line = ["offrl", "benchmark", section.suite, "--seeds", str(seeds)]
        return [shlex.join([*line, "--updates", str(updates)])]
    tasks = [task.task for task in section.tasks]
    found = []
    for agent in sorted({entry.agent for entry in section.entries}):
        line = ["offrl", "run", "--agent", agent, "--task", *tasks]
        line += ["--seeds", str(seeds), "--updates", str(updates)]
        for name in ("episodes", "evaluations"):
            if name in section.protocol:
                line += [f"--{name}", str(section.protocol[name])]
        found.append(shlex.join([*line, "--results", "results/again"]))
    return found
