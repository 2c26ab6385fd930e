"""Agents against each other: performance profiles, and who beats whom how often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from offrl_jax.figures.captions import INTERVALS, ranked, remarks, shown_name
from offrl_jax.figures.style import (
    COLUMN_WIDTH,
    FAINT,
    SMALL,
    TEXT_WIDTH,
    TINY,
    UNITS,
    add_legend,
    legend_columns,
    lines_of,
    looks_of,
    new_figure,
    remark,
)
from offrl_jax.leaderboard.comparisons import Profile
from offrl_jax.leaderboard.model import Section
from offrl_jax.leaderboard.ranking import Bounds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_AGENTS = 30
"""Rows of a matrix whose numbers can still be read."""
_FEW = 8  # agents that a column is wide enough for
# Inches: a panel of profiles, its axis, a line of a legend, a line of remarks.
_PANEL, _AXIS, _LEGEND_LINE, _REMARK_LINE = 2.0, 0.5, 0.16, 0.11
_BAR = 0.65  # inches of the bar of colours, with its numbers
_LETTER = 0.0082  # inches of a letter, per point of its font


def draw_profiles(section: Section, profiles: Mapping[str, Profile]) -> Figure:
    """The fraction of runs above every threshold, with bands.

    Args:
      section: with a ranked agent.
      profiles: of its ranked agents, from `leaderboard.comparisons.profiles`.
    """
    from matplotlib.ticker import PercentFormatter

    entries = [entry for entry in ranked(section) if entry.label in profiles]
    looks = looks_of(entry.label for entry in section.entries)
    texts = {entry.label: shown_name(entry) for entry in entries}
    width = COLUMN_WIDTH if len(entries) <= _FEW else TEXT_WIDTH
    lines = -(-len(entries) // legend_columns(list(texts.values()), width))
    reading = remarks(section, entries, f"bands: {INTERVALS}")
    heights = (
        _PANEL + _AXIS + _LEGEND_LINE * lines,
        _REMARK_LINE * (1 + len(lines_of(reading, width))),
    )
    figure = new_figure(width, sum(heights))
    # Apart from each other, or the legend would lie on the remarks.
    parts = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)
    panels, words = parts[:, 0]
    axis = panels.subplots()
    for entry in entries:
        thresholds, above = profiles[entry.label]
        look = looks[entry.label]
        axis.plot(thresholds, [bounds.value for bounds in above], **look)
        ends = [(b.low, b.high) for b in above if b.low is not None]
        if len(ends) == len(above):
            low, high = zip(*ends, strict=True)
            axis.fill_between(
                thresholds, low, high, color=look["color"], alpha=0.15, linewidth=0
            )
    axis.set_xlabel(f"threshold: {UNITS[section.unit]}")
    axis.set_ylabel("runs above it")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axis.set_ylim(0.0, 1.02)
    axis.margins(x=0.0)
    axis.grid()
    add_legend(panels, texts, looks, width, "")
    remark(words, reading, width)
    return figure


def draw_improvement(
    section: Section, better: Mapping[tuple[str, str], Bounds]
) -> Figure:
    """A heat map of the probability that a run of the row beats one of the column.

    Purple is above one half and orange below, which all people tell apart; numbers are
    bold where the interval excludes one half.

    Args:
      section: with two ranked agents.
      better: by ordered pair, from `leaderboard.comparisons.improvements`; agents
        without any pair are left out.
    """
    from matplotlib import colormaps

    known = {label for pair in better for label in pair}
    entries = [entry for entry in ranked(section) if entry.label in known]
    names = [shown_name(entry) for entry in entries]
    count = len(entries)
    size = SMALL if count <= _FEW else TINY
    width = COLUMN_WIDTH if count <= _FEW else TEXT_WIDTH
    beside = _LETTER * size * max(map(len, names))
    cell = min(max((width - beside - _BAR) / count, 0.15), 0.32)
    figure = new_figure(width, cell * count + beside + 0.55)
    axis = figure.subplots()
    colours = colormaps["PuOr"].with_extremes(bad=FAINT)
    table = np.full((count, count), np.nan)
    for i, x in enumerate(entries):
        for j, y in enumerate(entries):
            if i == j:
                continue
            bounds = better[x.label, y.label]
            table[i, j] = 100 * bounds.value
            axis.text(
                j,
                i,
                f"{table[i, j]:.0f}",
                ha="center",
                va="center",
                fontsize=min(size, 0.42 * cell * 72),
                fontweight="bold" if sure(bounds) else "normal",
                color=_readable(colours(bounds.value)),
            )
    image = axis.imshow(table, cmap=colours, vmin=0, vmax=100, aspect="equal")
    axis.set_yticks(range(count), names, fontsize=size)
    axis.set_xticks(range(count), names, fontsize=size, rotation=90)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_title("P(row beats column), %", fontsize=size)
    bar = figure.colorbar(image, ax=axis, shrink=0.8, aspect=25, pad=0.02)
    bar.ax.tick_params(labelsize=size)
    left_out = len(ranked(section)) - count
    cut = [f"{left_out} lower ranks left out"] * (left_out > 0)
    reading = ("bold: the 95 % interval excludes 50 %", *cut)
    remark(figure, remarks(section, entries, *reading), width)
    return figure


def _readable(background: tuple[float, float, float, float]) -> str:
    """White on dark colours, by the luminance of sRGB."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in background[:3]
    )
    # Where the contrast of WCAG 2 with white equals that with black.
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "black"


def sure(bounds: Bounds) -> bool:
    """Whether the interval of a probability excludes one half."""
    if bounds.low is None or bounds.high is None:
        return False
    return bounds.low > 0.5 or bounds.high < 0.5
