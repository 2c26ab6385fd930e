"""Words and numbers that the drawn formats share."""

from __future__ import annotations

from collections.abc import Iterable

from offrl_jax.leaderboard.model import FEW_EPISODES, FEW_SEEDS, Cell, Entry, Section
from offrl_jax.leaderboard.ranking import Bounds
from offrl_jax.leaderboard.runs import POOLED
from offrl_jax.leaderboard.statistics import REPLICATIONS
from offrl_jax.results import ONLINE

DASH = "-"
FEW_MARK, DIVERGED_MARK, INCOMPLETE_MARK = "*", "†", "‡"

HOW_TO_READ = (
    "IQM: mean of the middle half of all runs (task x seed), scores x100; [ ]: 95 % "
    f"interval, runs resampled within tasks, {REPLICATIONS:,} times. Agents share a "
    "rank unless its first one is surely better: P(lead), the probability that a run "
    "of that one beats a run of this agent, has an interval above 0.5. Only the last "
    "checkpoint counts. s/run: training seconds of a population x its devices / its "
    "members."
)


def printable(name: str) -> str:
    """`name` with control characters written out, so that no file steers a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


LONGEST = 56
"""Characters of a name in a terminal's table; longer ones lose their middle."""


def cut(name: str) -> str:
    """`name`, or its first 40 and last 15 characters with an ellipsis between."""
    return name if len(name) <= LONGEST else f"{name[:40]}…{name[-15:]}"


PUBLISHED = "published by others, not measured here"
"""Heading of every table of numbers that others published."""


def number(value: float | None) -> str:
    """One decimal; none from 1,000 on."""
    if value is None:
        return DASH
    text = f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}"
    return "0.0" if text == "-0.0" else text


def interval(bounds: Bounds | None) -> str:
    """`[80.2, 85.9]`; empty where there is none."""
    if bounds is None or bounds.low is None:
        return ""
    return f"[{number(bounds.low)}, {number(bounds.high)}]"


def estimate(bounds: Bounds | None) -> str:
    """The value alone."""
    return number(bounds.value if bounds else None)


def probability(entry: Entry) -> str:
    """The probability that the leader beats this agent."""
    return f"{entry.leader_better.value:.2f}" if entry.leader_better else ""


def seconds(value: float | None) -> str:
    """One decimal below 100."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def percentage(share: float | None) -> str:
    """`12 %`."""
    return DASH if share is None else f"{100 * share:.0f} %"


def span(values: Iterable[int]) -> str:
    """`10`, or `8-10` where cells differ."""
    found = sorted(set(values))
    if not found:
        return DASH
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def runs(cells: Iterable[Cell]) -> str:
    """Seeds x episodes of the cells that have runs."""
    begun = [cell for cell in cells if cell.seeds]
    if not begun:
        return DASH
    return (
        f"{span(len(cell.seeds) for cell in begun)}x"
        f"{span(cell.episodes for cell in begun)}"
    )


def marks(entry: Entry) -> str:
    """Footnote marks of a line."""
    return (
        FEW_MARK * entry.few
        + DIVERGED_MARK * bool(entry.diverged)
        + INCOMPLETE_MARK * entry.incomplete
    )


def footnotes(section: Section) -> list[str]:
    """What the marks of the section's lines mean."""
    used = "".join(marks(entry) for entry in section.entries)
    return meanings(used, section.unit == "return")


def meanings(used: str, raw: bool) -> list[str]:
    """What the marks in `used` mean, of scores or of raw returns."""
    floor = "the lowest return of the task" if raw else "a score of 0"
    known = {
        FEW_MARK: f"fewer than {FEW_SEEDS} seeds or {FEW_EPISODES} episodes on a task",
        DIVERGED_MARK: f"diverged runs, counted as {floor}, or their own if lower",
        INCOMPLETE_MARK: "runs are absent; no rank without runs of every task",
    }
    return [f"{mark} {meaning}" for mark, meaning in known.items() if mark in used]


def title(section: Section) -> str:
    """Suite, family and preset."""
    return heading(section.suite, section.family, section.preset)


def heading(suite: str, family: str, preset: str) -> str:
    """The title of a table of that suite (if of one), family and preset."""
    names = [suite, family] if suite else [family]
    if preset != "full":
        names.append(f"preset {preset}")
    return printable(" · ".join(names))


def subtitle(section: Section) -> str:
    """What was run, in one line."""
    ranked = sum(task.ranked for task in section.tasks)
    tasks = f"{len(section.tasks)} task{'s' * (len(section.tasks) > 1)}"
    if 0 < ranked < len(section.tasks):
        tasks += f" ({ranked} ranked)"
    cells = [cell for entry in section.entries for cell in entry.cells if cell.seeds]
    seeds = span(len(cell.seeds) for cell in cells)
    episodes = span(cell.episodes for cell in cells)
    return (
        f"{tasks}, {seeds} seeds x {episodes} episodes, {section.updates_total:,} "
        f"{steps_name(section.family)}, {section.tuning}{_chosen_by(section)}"
        f"{pooled(section)}"
    )


def _chosen_by(section: Section) -> str:
    """By which rule settings were chosen, where a suite says so."""
    selection = section.protocol.get("selection")
    if selection is None:
        return ""
    return printable(f", chosen by {selection['rule']} of {selection['from']}")


def pooled(section: Section) -> str:
    """What a subtitle adds where runs of several protocols stand together."""
    protocols = section.protocol.get(POOLED, ())
    return f", {len(protocols)} protocols POOLED" if protocols else ""


def steps_name(family: str) -> str:
    """What the updates of a family's runs count."""
    return "environment steps" if family == ONLINE else "updates"


def has_behaviour(section: Section) -> bool:
    """Whether there are data whose own return gives the context of a table."""
    return section.family != ONLINE


def state(section: Section) -> str:
    """`PARTIAL: 23 of 30 runs`; empty for a complete section."""
    if not section.partial:
        return ""
    return f"PARTIAL: {section.runs} of {section.planned} runs"


def behaviour_mean(section: Section) -> float | None:
    """Mean of the dataset's own value over ranked tasks; None unless all have one."""
    values = [task.behaviour for task in section.tasks if task.ranked]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
