"""Scores against what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from offrl_jax.figures.captions import INTERVALS, ranked, remarks, shown_name, unit
from offrl_jax.figures.style import (
    COLUMN_WIDTH,
    INK,
    SMALL,
    TEXT_WIDTH,
    TINY,
    looks_of,
    new_figure,
    remark,
)
from offrl_jax.leaderboard.model import Entry, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW = 8  # agents that a column is wide enough for
_LOGARITHMIC = 10.0  # ratio of costs from which on the axis is
_SHORT = 18  # letters of a name that a column has room for
_REACHES = (5.0, 11.0, 18.0, 28.0, 40.0)  # points from a dot to its label
_NEAR = 5.0  # points beyond which a line leads to the label
_TOUCHED = 0.3  # what touching anything counts, in labels covered
_WIDER = 1.12  # of a file to the screen, whose letters are hinted
_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


class Box(NamedTuple):
    """A rectangle, in pixels."""

    left: float
    bottom: float
    right: float
    top: float


class Place(NamedTuple):
    """Where a label lies: its box, the direction from its dot, and points to it."""

    box: Box
    direction: tuple[int, int]
    reach: float


def draw_cost(section: Section) -> Figure:
    """IQM with its interval against device seconds per run, each dot with its name.

    Args:
      section: with a ranked agent whose cost is known.
    """
    entries = priced(section)
    looks = looks_of(entry.label for entry in section.entries)
    few = len(entries) <= _FEW and all(len(shown_name(e)) <= _SHORT for e in entries)
    width = COLUMN_WIDTH if few else TEXT_WIDTH
    figure = new_figure(width, 2.6 if few else 3.8)
    axis = figure.subplots()
    costs = [cost for entry in entries if (cost := entry.cost_s) is not None]
    if min(costs) > 0 and max(costs) / min(costs) > _LOGARITHMIC:
        _logarithmic(axis)
    for entry, cost in zip(entries, costs, strict=True):
        bounds = entry.iqm
        if bounds is None:
            continue
        colour = looks[entry.label]["color"]
        if bounds.low is not None and bounds.high is not None:
            axis.plot([cost, cost], [bounds.low, bounds.high], color=colour)
        axis.plot([cost], [bounds.value], color=colour, marker="o", markersize=4)
    axis.margins(x=0.12, y=0.08)
    axis.set_xlabel("device seconds of training per run")
    axis.set_ylabel("IQM of scores" if section.unit == "score" else "IQM of returns")
    axis.grid()
    reading = [
        unit(section),
        f"lines: {INTERVALS}",
        "populations of other sizes or devices do not compare",
    ]
    remark(figure, remarks(section, entries, *reading), width)
    _label(figure, axis, entries, costs, SMALL if few else TINY)
    return figure


def priced(section: Section) -> list[Entry]:
    """Ranked entries whose cost is known."""
    return [entry for entry in ranked(section) if entry.cost_s is not None]


def _logarithmic(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _label(
    figure: Figure,
    axis: Axes,
    entries: Sequence[Entry],
    costs: Sequence[float],
    size: float,
) -> None:
    """Names beside the dots, where they cover the least of what is there."""
    from matplotlib.text import Text

    figure.draw_without_rendering()  # settles where the panel lies
    figure.set_layout_engine("none")
    pixels = figure.dpi / 72  # of a point
    dots: list[tuple[float, float]] = []
    taken: list[Box] = []
    for entry, cost in zip(entries, costs, strict=True):
        assert entry.iqm is not None  # ranked
        ends = (entry.iqm.value, entry.iqm.low, entry.iqm.high)
        known = [(cost, end) for end in ends if end is not None]
        places = axis.transData.transform(known)
        x, y = places[0]
        dots.append((x, y))
        half = 2.5 * pixels
        taken.append(Box(x - half, y - half, x + half, y + half))
        low, high = places[:, 1].min(), places[:, 1].max()
        taken.append(Box(x - pixels, low, x + pixels, high))
    frame = axis.get_window_extent()
    inside = Box(frame.x0, frame.y0, frame.x1, frame.y1)
    for entry, cost, (x, y) in zip(entries, costs, dots, strict=True):
        assert entry.iqm is not None
        line = {"arrowstyle": "-", "linewidth": 0.4, "color": INK}
        word = axis.annotate(
            shown_name(entry),
            (cost, entry.iqm.value),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=size,
            arrowprops={**line, "shrinkA": 0, "shrinkB": 2.5},
        )
        extent = Text.get_window_extent(word)  # without its line
        word_size = (extent.width * _WIDER, extent.height)
        place = best_place((x, y), word_size, pixels, taken, inside)
        right, up = place.direction
        word.set_horizontalalignment(("right", "center", "left")[right + 1])
        word.set_verticalalignment(("top", "center", "bottom")[up + 1])
        word.set_position((right * place.reach, up * place.reach))
        if word.arrow_patch is not None:
            word.arrow_patch.set_visible(place.reach > _NEAR)
        taken.append(place.box)


def best_place(
    dot: tuple[float, float],
    size: tuple[float, float],
    pixels: float,
    taken: Sequence[Box],
    inside: Box,
) -> Place:
    """Where a label covers the least, rather near to its dot than far from it.

    Args:
      dot: in pixels, like all that follows.
      size: width and height of the label.
      pixels: of a point.
      taken: what is better not covered.
      inside: what the label is better not outside of.
    """
    x, y = dot
    width, height = size
    best: tuple[float, Place] | None = None
    for reach in _REACHES:
        for right, up in _AROUND:
            left = x + right * reach * pixels - width * (1 - right) / 2
            bottom = y + up * reach * pixels - height * (1 - up) / 2
            box = Box(left, bottom, left + width, bottom + height)
            covered = [_overlap(box, other) / (width * height) for other in taken]
            outside = 1 - _overlap(box, inside) / (width * height)
            score = sum(part + _TOUCHED for part in covered if part > 0)
            # A farther place must be worth it: a hundredth of the label per point.
            score += 2 * outside + 0.01 * reach
            if best is None or score < best[0]:
                best = (score, Place(box, (right, up), reach))
    assert best is not None
    return best[1]


def _overlap(a: Box, b: Box) -> float:
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.top, b.top) - max(a.bottom, b.bottom)
    return max(width, 0.0) * max(height, 0.0)
