"""The worth of an agent's trained policies, drawn: over tasks, then task by task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from offrl_jax.figures.style import (
    SCORE,
    UNITS,
    Looks,
    add_legend,
    legend_columns,
    looks_of,
    new_figure,
)
from offrl_jax.leaderboard import text
from offrl_jax.leaderboard.tuning import AgentTuning, Curve, Curves, Tuning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4
"""Panels beside each other: two tasks."""
# Inches: of a figure, rows of the two kinds of panels, a title, a line of a legend.
_WIDTH, _TOP, _TASK, _TITLE, _LEGEND_LINE = 10.2, 3.2, 2.3, 0.6, 0.21
_LONG = 26  # characters of a task that need two lines
_X_LABELS = {
    "expected_best": "policies evaluated",
    "deployed": "episodes played by a bandit",
}


class _Panel(NamedTuple):
    title: str
    unit: str
    statistic: str
    lines: Mapping[str, Curve]
    behaviour: float | None = None


def draw(sections: Sequence[Tuning]) -> Figure:
    """Sections below each other: means over tasks, then two panels per task.

    Expected best of n policies on the left, the bandit's choice after n episodes on the
    right, on a logarithmic axis.  An agent has one colour in all of them.

    Args:
      sections: from `leaderboard.tuning_of`.

    Raises:
      UsageError: matplotlib is not installed.
    """
    looks = looks_of(own.agent for part in sections for own in part.agents)
    blocks = [_blocks(part) for part in sections]
    legends = [{own.agent: _legend(own) for own in part.agents} for part in sections]
    heights = [
        sum(_rows(panels, columns) * row for panels, columns, row in own)
        + _TITLE
        + _LEGEND_LINE
        * (2 + math.ceil(len(texts) / legend_columns(list(texts.values()), _WIDTH)))
        for own, texts in zip(blocks, legends, strict=True)
    ]
    figure = new_figure(_WIDTH, sum(heights))
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)
    for section, part, own, texts in zip(
        sections, parts[:, 0], blocks, legends, strict=True
    ):
        part.suptitle(_title(section), fontsize="medium")
        ratios = [_rows(panels, columns) * row for panels, columns, row in own]
        areas = part.subfigures(len(own), 1, height_ratios=ratios, squeeze=False)
        for area, (panels, columns, _) in zip(areas[:, 0], own, strict=True):
            axes = area.subplots(_rows(panels, columns), columns, squeeze=False)
            for axis in axes.flat[len(panels) :]:
                axis.set_axis_off()
            for i, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
                _draw_panel(axis, panel, looks)
                if i % columns == 0 or panels[i - 1].unit != panel.unit:
                    axis.set_ylabel(UNITS[panel.unit], fontsize="small")
        add_legend(part, texts, looks, _WIDTH, _READING)
    return figure


def _rows(panels: Sequence[_Panel], columns: int) -> int:
    return math.ceil(len(panels) / columns)


def _blocks(section: Tuning) -> list[tuple[list[_Panel], int, float]]:
    """Panels of one size each, with how many lie side by side and the height of a row.

    A single task is its own mean.
    """
    tasks: list[_Panel] = []
    for task, unit in section.units.items():
        lines = {
            own.agent: own.tasks[task].curves
            for own in section.agents
            if task in own.tasks
        }
        tasks += _pair(task, unit, lines, section.behaviour.get(task))
    if len(section.units) == 1:
        return [(tasks, 2, _TOP)]
    lines = {own.agent: own.pooled for own in section.agents if own.pooled}
    count = len(section.pooled)
    title = f"mean over {count} task{'s' * (count > 1)}"
    found = [(_pair(title, SCORE, lines, None), 2, _TOP), (tasks, COLUMNS, _TASK)]
    return [block for block in found if block[0]]


def _pair(
    title: str, unit: str, lines: Mapping[str, Curves], behaviour: float | None
) -> list[_Panel]:
    return [
        _Panel(
            title,
            unit,
            statistic,
            {agent: getattr(curves, statistic) for agent, curves in lines.items()},
            behaviour,
        )
        for statistic in _X_LABELS
        if lines
    ]


def _draw_panel(axis: Axes, panel: _Panel, looks: Looks) -> None:
    from matplotlib.ticker import StrMethodFormatter

    for agent, points in panel.lines.items():
        xs = range(1, len(points) + 1)
        axis.plot(xs, [point.value for point in points], linewidth=1.8, **looks[agent])
        if len(points) == 1:
            axis.plot(xs, [points[0].value], marker="o", **looks[agent])
        ends = [(p.low, p.high) for p in points if p.low is not None]
        if ends:
            low, high = zip(*ends, strict=True)
            colour = looks[agent]["color"]
            axis.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
    if panel.behaviour is not None:
        axis.axhline(
            panel.behaviour, color="0.45", linewidth=1.0, linestyle=(0, (1, 2))
        )
    title = panel.title
    if len(title) > _LONG:
        title = title.replace("/", "/\n", 1)
    axis.set_title(title, fontsize="small")
    axis.set_xlabel(_X_LABELS[panel.statistic], fontsize="small")
    if panel.statistic == "deployed":
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axis.set_xlim(left=0)
    axis.tick_params(labelsize="small")
    axis.grid(alpha=0.25, linewidth=0.5)


def _title(section: Tuning) -> str:
    key = section.key
    name = text.heading(key.suite, key.family, key.preset)
    arms = text.span(
        found.arms for own in section.agents for found in own.tasks.values()
    )
    return (
        f"{name}\n{key.updates_total:,} {text.steps_name(key.family)}, the bandit "
        f"chooses from {arms} policies"
    )


def _legend(own: AgentTuning) -> str:
    """The label with where its policies come from."""
    found = own.tasks.values()
    settings = text.span(task.settings for task in found)
    policies = text.span(task.policies for task in found)
    return f"{own.agent} ({own.role}: {policies} policies of {settings} settings)"


_READING = (
    "left: expected best of n policies; right: value of the policy that looks best "
    "after n episodes; band: 95 % interval, policies resampled; dotted grey: the "
    "dataset"
)
