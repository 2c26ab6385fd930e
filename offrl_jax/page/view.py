"""What the template draws, in words and numbers ready to be written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from offrl_jax.benchmark.suites import known_suites
from offrl_jax.leaderboard import comparisons, text
from offrl_jax.leaderboard.model import Cell, Entry, Section
from offrl_jax.leaderboard.progress import Progress
from offrl_jax.leaderboard.ranking import Bounds, surely_highest
from offrl_jax.leaderboard.runs import Run
from offrl_jax.page import charts
from offrl_jax.results.rows import strict_json

COLOURS, DASHES = 7, 4
"""Of lines: an agent has the same look in all charts of a section."""
SHOWN = 30
"""Most agents of a matrix or chart; the first ones of the ranking."""
NAMED = 4
"""Most agents named in a sentence."""


Better = Mapping[tuple[str, str], Bounds]
"""Probability that a run of the first beats one of the second, by labels."""


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
    anchor: str,
) -> dict[str, Any]:
    """Everything that the template needs of one table.

    Args:
      section: of the leaderboard.
      progress: the same section's scores while training, None if no run counts.
      runs: of the section.
      anchor: name of the section within the page.
    """
    numbers = {entry.label: i for i, entry in enumerate(section.entries)}
    ranked = [entry for entry in section.entries if entry.rank is not None]
    low, high = _range(section, ranked)
    shown = ranked[:SHOWN]
    better = comparisons.improvements(section, [entry.label for entry in shown])
    drawn_labels = {entry.label for entry in shown}
    found = {
        label: profile
        for label, profile in comparisons.profiles(section).items()
        if label in drawn_labels
    }
    looks = {label: i for i, label in enumerate(sorted(numbers))}
    steps = text.steps_name(section.family)
    unit = "score" if section.unit == "score" else "return"
    drawn = [
        chart
        for chart in (
            charts.profiles(found, numbers, unit),
            charts.learning(progress, numbers, drawn_labels),
        )
        if chart
    ]
    return {
        "id": anchor,
        "title": text.title(section),
        "subtitle": text.subtitle(section),
        "updates": f"{section.updates_total:,}",
        "state": text.state(section),
        "family": section.family,
        "short": in_short(section, ranked, better),
        "overview": _overview(section, ranked, better),
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
        "matrix": _matrix(numbers, shown, better),
        "cut": len(ranked) if len(ranked) > SHOWN else 0,
        "steps": steps,
        "lines": drawn,
        "dots": charts.cost(shown, section.unit, numbers),
        "warnings": section.warnings,
        "absent": section.absent,
        "origin": origin(section, runs),
    }


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
        "leader": text.printable(entry.leader) if entry.leader else "",
        "runs": text.runs(entry.cells),
        "noise": _noise(entry.episode_share),
        "cost": Number(
            _seconds(entry.cost_s), "" if entry.cost_s is None else str(entry.cost_s)
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


def _matrix(
    numbers: Mapping[str, int], shown: Sequence[Entry], better: Better
) -> dict[str, Any] | None:
    if len(shown) < 2:
        return None
    names = [(numbers[entry.label], text.printable(entry.label)) for entry in shown]
    lines = []
    for row, (index, name) in zip(shown, names, strict=True):
        pairs = [better.get((row.label, column.label)) for column in shown]
        cells = [None if bounds is None else _chance(bounds) for bounds in pairs]
        lines.append((index, name, cells))
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


def in_short(section: Section, ranked: Sequence[Entry], better: Better) -> list[str]:
    """Who leads, over whom that was shown, and what it costs, one sentence each.

    Args:
      section: of the leaderboard.
      ranked: its ranked entries.
      better: probabilities of improvement between the first `SHOWN` of them.
    """
    if not ranked:
        raw = section.tasks and all(task.unit == "return" for task in section.tasks)
        why = (
            "raw returns of several tasks have no common scale; see the tasks below"
            if raw and section.runs
            else "no agent has finished runs of every task"
        )
        return [f"No ranking: {why}."]
    leaders, others = _leaders(ranked)
    iqm = f"{text.estimate(leaders[0].iqm)} {text.interval(leaders[0].iqm)}".strip()
    name = text.printable(leaders[0].label)
    if len(leaders) > 1:
        names = _names([text.printable(entry.label) for entry in leaders])
        found = [f"No agent leads: {names} have the same IQM, {iqm}."]
    else:
        found = [f"{name} has the highest IQM: {iqm}."]
        if others:
            found.append(_certainty(leaders[0], others, better))
        else:
            found.append("No other agent is ranked beside it.")
    costs = [entry for entry in ranked if entry.cost_s]
    if len(leaders) == 1 and leaders[0].cost_s and len(costs) > 1:
        line = f"Training one of its runs takes {_seconds(leaders[0].cost_s)} device "
        line += "seconds"
        cheap = min(costs, key=lambda entry: entry.cost_s or 0.0)
        times = leaders[0].cost_s / (cheap.cost_s or leaders[0].cost_s)
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
            "Few seeds or episodes: the intervals are too narrow."
            if len(few) == len(ranked)
            else "Some agents have few seeds or episodes; they carry a mark."
        )
    return found


def _leaders(ranked: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Those of the highest IQM, usually one, and the others."""
    top = ranked[0].iqm.value if ranked[0].iqm else None
    leaders = [entry for entry in ranked if entry.iqm and entry.iqm.value == top]
    return leaders, [entry for entry in ranked if entry not in leaders]


def _certainty(leader: Entry, others: Sequence[Entry], better: Better) -> str:
    """Over whom the leader was shown to be better, over whom not, and who beats it."""
    groups: dict[str, list[str]] = {"over": [], "open": [], "under": []}
    shown = [entry for entry in others if (leader.label, entry.label) in better]
    for entry in shown:
        chance = better[leader.label, entry.label]
        name = f"{text.printable(entry.label)} ({chance.value:.2f})"
        groups[_outcome(chance)].append(name)
    parts = []
    if groups["over"]:
        parts.append(f"shown to win more often than {_names(groups['over'])}")
    if groups["open"]:
        parts.append(f"not shown against {_names(groups['open'])}")
    if groups["under"]:
        parts.append(f"but loses more often than not to {_names(groups['under'])}")
    if len(others) > len(shown):
        parts.append(f"the other {len(others) - len(shown)} have a lower IQM")
    return (
        f"It is {'; '.join(parts)}. In brackets: probability that one of its runs "
        f"beats one of theirs; shown, if the 95 % interval is above 0.5, "
        f"{len(shown)} comparisons, not corrected for their number."
    )


def _outcome(chance: Bounds) -> str:
    if chance.low is not None and chance.low > 0.5:
        return "over"
    return "under" if chance.high is not None and chance.high < 0.5 else "open"


def _overview(
    section: Section, ranked: Sequence[Entry], better: Better
) -> dict[str, Any] | None:
    """The line of a table in the list of all; None without a ranking."""
    if not ranked:
        return None
    leaders, _ = _leaders(ranked)
    leader = leaders[0]
    alone = len(leaders) == 1
    chances = [bounds for (x, _), bounds in better.items() if x == leader.label]
    beaten = sum(_outcome(chance) == "over" for chance in chances)
    return {
        "leader": text.printable(leader.label) + text.marks(leader)
        if alone
        else f"nobody: {len(leaders)} are equal",
        "iqm": number_of(leader.iqm),
        "raw": section.unit != "score",
        "beaten": f"{beaten} of {len(chances)}" if alone and chances else "",
        "cost": _seconds(leader.cost_s) if alone else "",
    }


def _seconds(value: float | None) -> str:
    """Two digits at least: 0.28, 1.6, 140."""
    if value is None or value >= 1:
        return text.seconds(value)
    return f"{value:.2g}"


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def origin(section: Section, runs: Sequence[Run]) -> dict[str, Any]:
    """Where the numbers come from, and the command that makes them again."""
    rows = [run.row for run in runs if run.row is not None]
    data = sorted({(r.task, r.recipe_hash or r.dataset_hash or "none") for r in rows})
    return {
        "commands": commands(section, runs),
        "note": suite_note(section.suite),
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
    """Commands that train and evaluate the runs of a section anew, in a new folder."""
    seeds = max((run.seed for run in runs), default=0) + 1
    tasks = [task.task for task in section.tasks]
    agents = sorted({entry.agent for entry in section.entries})
    length = ["--seeds", str(seeds), "--updates", str(section.updates_total)]
    there = ["--results", "results/again"]
    if section.suite != "run":
        line = ["offrl", "benchmark", section.suite, "--agents", *agents]
        return [shlex.join([*line, "--tasks", *tasks, *length, *there])]
    found = []
    for entry in section.entries:
        line = ["offrl", "run", "--agent", entry.agent, "--task", *tasks, *length]
        for name in ("episodes", "evaluations"):
            if name in section.protocol:
                line += [f"--{name}", str(section.protocol[name])]
        # `offrl run --set` names a setting after what it sets.
        changes = [part for part in entry.setting.split(",") if "=" in part]
        line += [word for change in changes for word in ("--set", change)]
        found.append(shlex.join([*line, *there]))
    return found


def suite_note(suite: str) -> str:
    """What a reader without the suite's file must know."""
    if suite == "run" or suite in known_suites():
        return ""
    return f"The suite {suite} does not come with the package: give its file instead."
