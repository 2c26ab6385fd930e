"""Values with their intervals, one line per agent: aggregates, and task by task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from offrl_jax.figures.captions import (
    INTERVALS,
    ranked,
    remarks,
    shown_name,
    unit,
)
from offrl_jax.figures.style import (
    FAINT,
    INK,
    PALETTE,
    SMALL,
    TEXT_HEIGHT,
    TEXT_WIDTH,
    TINY,
    new_figure,
    remark,
)
from offrl_jax.leaderboard import names, text
from offrl_jax.leaderboard.model import Entry, Section
from offrl_jax.leaderboard.ranking import Bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches: of an agent's line, of a panel's title and ticks, of all that lies around.
_LINE, _HEAD, _AROUND = 0.155, 0.42, 0.75
_DENSE = 0.11  # of an agent's line where there are many panels
_LETTER = 0.0082  # inches of a letter, per point of its font
_GAP = 0.1  # between two panels
COLUMNS = (3, 4, 5)
"""Tasks beside each other, of which the first that fits a page is taken."""
PAGED_COLUMNS = 4
"""Tasks beside each other where none does."""


class _Measure(NamedTuple):
    title: str
    values: Sequence[Bounds | None]
    context: float | None = None


def draw_ranking(section: Section) -> Figure:
    """IQM, mean, median and optimality gap of the ranked agents, in their order.

    The four panels of Agarwal et al. (NeurIPS 2021); raw returns have no optimality
    gap.  Shaded bands part the ranks; the dotted line is the dataset's mean.

    Args:
      section: with a ranked agent.
    """
    entries = ranked(section)
    measures = [
        _Measure("IQM", [entry.iqm for entry in entries]),
        _Measure(
            "mean",
            [entry.mean for entry in entries],
            text.behaviour_mean(section) if text.has_behaviour(section) else None,
        ),
        _Measure("median", [entry.median for entry in entries]),
    ]
    if section.unit == "score":
        gaps = [entry.optimality_gap for entry in entries]
        measures.append(_Measure("optimality gap", gaps))
    figure = new_figure(TEXT_WIDTH, _AROUND + _LINE * len(entries))
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        _bands(axis, entries)
        _dots(axis, measure, SMALL)
        axis.set_title(measure.title, fontsize=SMALL)
    labels = [f"{entry.rank}  {shown_name(entry)}" for entry in entries]
    _agents(axes[0], labels, SMALL)
    reading = _reading(section, gap=section.unit == "score")
    remark(figure, remarks(section, entries, *reading), TEXT_WIDTH)
    return figure


def draw_tasks(section: Section) -> list[Figure]:
    """The mean of every agent on every task, a panel each, in the table's order.

    Every panel has a scale of its own; the dotted line is the dataset's own mean.

    Args:
      section: with a run that counts.

    Returns:
      As many figures as the tasks need pages.
    """
    entries = [entry for entry in section.entries if any(c.seeds for c in entry.cells)]
    measures = [
        _Measure(
            text.printable(name) + (" (raw return)" * (task.unit != "score")),
            [entry.cells[i].mean for entry in entries],
            task.behaviour,
        )
        for i, (task, name) in enumerate(
            zip(section.tasks, names.short_tasks(section), strict=True)
        )
        if any(entry.cells[i].seeds for entry in entries)
    ]
    grid = _grid(len(measures), len(entries))
    page = grid.rows * grid.columns
    return [
        _page(section, entries, measures[first : first + page], grid)
        for first in range(0, len(measures), page)
    ]


class _Grid(NamedTuple):
    """Rows and columns of a page, inches of an agent's line and points of its font."""

    rows: int
    columns: int
    line: float
    size: float


def _grid(tasks: int, agents: int) -> _Grid:
    """The widest panels with which one page suffices, else pages of small ones."""
    for columns in COLUMNS if tasks != 4 else (2, 4):
        line, size = (_LINE, SMALL) if columns <= COLUMNS[0] else (_DENSE, TINY)
        rows = math.ceil(tasks / columns)
        if rows * (_HEAD + line * agents) <= TEXT_HEIGHT - _AROUND:
            return _Grid(rows, min(columns, tasks), line, size)
    rows = int((TEXT_HEIGHT - _AROUND) / (_HEAD + _DENSE * agents))
    return _Grid(max(rows, 1), PAGED_COLUMNS, _DENSE, TINY)


def _page(
    section: Section,
    entries: Sequence[Entry],
    measures: Sequence[_Measure],
    grid: _Grid,
) -> Figure:
    labels = [shown_name(entry) for entry in entries]
    rows = math.ceil(len(measures) / grid.columns)
    height = rows * (_HEAD + grid.line * len(entries)) + _AROUND - _HEAD
    figure = new_figure(TEXT_WIDTH, max(height, 1.4))
    axes = figure.subplots(rows, grid.columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(measures) :]:
        axis.set_axis_off()
    room = TEXT_WIDTH - _LETTER * grid.size * max(map(len, labels))
    letters = int((room / grid.columns - _GAP) / (_LETTER * grid.size))
    for axis, measure in zip(axes.flat, measures, strict=False):
        _bands(axis, entries)
        _dots(axis, measure, grid.size)
        axis.set_title(_folded(measure.title, letters), fontsize=grid.size)
    for axis in axes[:, 0]:
        _agents(axis, labels, grid.size)
    remark(figure, remarks(section, entries, *_reading(section)), TEXT_WIDTH)
    return figure


def _folded(name: str, letters: int) -> str:
    """In two lines, parted after a slash or before a hyphen, if it is too long."""
    if len(name) <= letters:
        return name
    ends = [i + (name[i] in "/_ ") for i in range(1, len(name)) if name[i] in "/-_ "]
    middle = min(ends, key=lambda i: abs(i - len(name) / 2), default=len(name))
    return f"{name[:middle]}\n{name[middle:]}".strip()


def _agents(axis: Axes, labels: Sequence[str], size: float) -> None:
    axis.set_yticks(range(len(labels)), labels, fontsize=size)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(labels) - 0.5, -0.5)


def _bands(axis: Axes, entries: Sequence[Entry]) -> None:
    """Every second group of agents that share a rank has a shade."""
    ranks = sorted({entry.rank or 0 for entry in entries})
    for i, entry in enumerate(entries):
        if ranks.index(entry.rank or 0) % 2 == 0:
            axis.axhspan(i - 0.5, i + 0.5, color=FAINT, linewidth=0, zorder=0)


def _dots(axis: Axes, measure: _Measure, size: float) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, bounds in enumerate(measure.values):
        if bounds is None:
            continue
        if bounds.low is not None and bounds.high is not None:
            axis.plot(
                [bounds.low, bounds.high],
                [i, i],
                color=PALETTE[0],
                linewidth=1.4,
                solid_capstyle="butt",
            )
        axis.plot([bounds.value], [i], color=PALETTE[0], marker="o", markersize=3.2)
    if measure.context is not None:
        axis.axvline(measure.context, color=INK, linewidth=0.9, linestyle=(0, (1, 1.5)))
    axis.xaxis.set_major_locator(
        MaxNLocator(3, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2)
    )
    axis.tick_params(axis="x", labelsize=size)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)


def _reading(section: Section, *, gap: bool = False) -> list[str]:
    return [
        unit(section),
        f"lines: {INTERVALS}",
        "shades part the ranks",
        *["the optimality gap is better if lower"] * gap,
        *["dotted: the dataset"] * text.has_behaviour(section),
    ]
