"""Scores while training, drawn: against updates, against seconds, task by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from offrl_jax.figures.style import (
    RETURN,
    SCORE,
    UNITS,
    Looks,
    add_legend,
    legend_columns,
    lines_of,
    looks_of,
    new_figure,
    small_size,
)
from offrl_jax.leaderboard import text
from offrl_jax.leaderboard.model import FEW_SEEDS
from offrl_jax.leaderboard.progress import AgentProgress, Point, Progress
from offrl_jax.results import ONLINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
"""Panels of tasks beside each other."""
# Inches: of a figure, rows of the two kinds of panels, a title, a line of a legend.
WIDTH, _TOP, _TASK, _TITLE, _LEGEND_LINE = 10.2, 3.2, 2.4, 0.6, 0.21
_MARKED = 25  # evaluations of a line, of which each has a mark
_BESIDE = 0.3  # inches of a panel's numbers and of the gap to the next
SECONDS = "seconds of training: the population's / its members"


class _Panel(NamedTuple):
    title: str
    unit: str
    x_label: str
    x: Callable[[Point], float | None]
    lines: Mapping[str, tuple[Point, ...]]
    behaviour: float | None = None


def draw(sections: Sequence[Progress], width: float = WIDTH) -> Figure:
    """Sections below each other: two panels of the IQM, then one panel per task.

    The IQM stands against updates and against seconds; tasks against updates, and those
    without a reference, which are in no IQM, against seconds, too.  An agent has one
    colour in all of them.

    Args:
      sections: from `leaderboard.progress_of`.
      width: of the figure in inches; panels keep their proportions.

    Raises:
      UsageError: matplotlib is not installed.
    """
    looks = looks_of(own.label for part in sections for own in part.agents)
    blocks = [_blocks(part) for part in sections]
    legends = [{own.label: _legend(own) for own in part.agents} for part in sections]
    readings = [
        "\n".join(lines_of(_reading(part), width, small_size())) for part in sections
    ]
    heights = [
        sum(math.ceil(len(panels) / columns) * row for panels, columns, row in own)
        * (width / WIDTH)
        + _TITLE
        + _LEGEND_LINE
        * (
            2
            + reading.count("\n")
            + math.ceil(len(texts) / legend_columns(list(texts.values()), width))
        )
        for own, texts, reading in zip(blocks, legends, readings, strict=True)
    ]
    figure = new_figure(width, sum(heights))
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)
    for section, part, own, texts, reading in zip(
        sections, parts[:, 0], blocks, legends, readings, strict=True
    ):
        part.suptitle(_title(section), fontsize="medium")
        rows = [math.ceil(len(panels) / columns) for panels, columns, _ in own]
        ratios = [count * row for count, (_, _, row) in zip(rows, own, strict=True)]
        areas = part.subfigures(len(own), 1, height_ratios=ratios, squeeze=False)
        for area, count, (panels, columns, _) in zip(
            areas[:, 0], rows, own, strict=True
        ):
            axes = area.subplots(count, columns, squeeze=False)
            for axis in axes.flat[len(panels) :]:
                axis.set_axis_off()
            for i, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
                _draw_panel(axis, panel, looks, width / columns - _BESIDE)
                if i % columns == 0 or panels[i - 1].unit != panel.unit:
                    axis.set_ylabel(UNITS[panel.unit], fontsize="small")
        add_legend(part, texts, looks, width, reading)
    return figure


def _blocks(section: Progress) -> list[tuple[list[_Panel], int, float]]:
    """Panels of one size each, with how many lie side by side and the height of a row.

    A single task lies beside its own IQM.
    """
    top, tasks = _of_all(section), _of_tasks(section)
    if top and len(tasks) == 1:
        return [(top + tasks, len(top) + 1, _TOP)]
    columns = min(COLUMNS, max(2, len(tasks)))
    found = [(top, 2, _TOP), (tasks, columns, _TASK)]
    return [block for block in found if block[0]]


def _updates(section: Progress) -> str:
    name = text.steps_name(section.key.family)
    phased = section.phased and section.key.family != ONLINE
    return f"{name} of the last phase" if phased else name


def _of_all(section: Progress) -> list[_Panel]:
    """The IQM, where there is one."""
    lines = {own.label: own.pooled for own in section.agents if own.pooled}
    if not lines:
        return []
    count = len(section.pooled)
    title = f"IQM over {count} tasks" if count > 1 else "IQM over one task only"
    return [
        _Panel(title, SCORE, _updates(section), _step, lines),
        _Panel(title, SCORE, SECONDS, _seconds, lines),
    ]


def _of_tasks(section: Progress) -> list[_Panel]:
    panels: list[_Panel] = []
    for task, unit in section.units.items():
        lines = {
            own.label: own.by_task[task]
            for own in section.agents
            if own.by_task.get(task)
        }
        about = (lines, section.behaviour.get(task))
        if lines:
            panels.append(_Panel(task, unit, _updates(section), _step, *about))
        if lines and unit == RETURN:
            panels.append(_Panel(task, unit, SECONDS, _seconds, *about))
    return panels


def _step(point: Point) -> float | None:
    return point.step


def _seconds(point: Point) -> float | None:
    return point.seconds


def _draw_panel(axis: Axes, panel: _Panel, looks: Looks, room: float) -> None:
    from matplotlib.ticker import EngFormatter

    for label, points in panel.lines.items():
        known = [(x, p.value) for p in points if (x := panel.x(p)) is not None]
        xs = [x for x, _ in known]
        single = len(known) == 1  # such as the only evaluation: no line to be seen
        size = 6.0 if single else 3.0 if len(known) <= _MARKED else 0.0
        values = [value.value for _, value in known]
        axis.plot(
            xs, values, linewidth=1.8, marker="o", markersize=size, **looks[label]
        )
        ends = [(v.low, v.high) for _, v in known if v.low is not None]
        if len(ends) < len(known) or not known:
            continue  # a single run per task has no interval
        low, high = zip(*ends, strict=True)
        colour = looks[label]["color"]
        if single:
            axis.vlines(xs, low, high, colors=colour, linewidth=1.0)
        else:
            axis.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
    if panel.behaviour is not None:
        axis.axhline(
            panel.behaviour, color="0.45", linewidth=1.0, linestyle=(0, (1, 2))
        )
    title = panel.title
    if len(lines_of(title.replace(" ", "_"), room, small_size())) > 1:
        title = title.replace("/", "/\n", 1)
    axis.set_title(title, fontsize="small")
    words = lines_of(panel.x_label, room, small_size())
    axis.set_xlabel("\n".join(words), fontsize="small")
    axis.set_xlim(left=0)
    if panel.x is _step:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.tick_params(labelsize="small")
    axis.grid(alpha=0.25, linewidth=0.5)


def _title(section: Progress) -> str:
    key = section.key
    name = text.heading(key.suite, key.family, key.preset)
    points = [
        p for own in section.agents for line in own.by_task.values() for p in line
    ]
    episodes = text.span(point.episodes for point in points if point.episodes)
    return (
        f"{name}\n{key.updates_total:,} {text.steps_name(key.family)}, "
        f"{section.tuning}, {episodes} episodes per evaluation"
    )


def _legend(own: AgentProgress) -> str:
    """The label with the numbers of its runs."""
    seeds = text.span(own.seeds.values())
    counts = {"diverged": own.diverged, "failed": own.failed, "missing": own.missing}
    told = [f"{seeds} {'seed' if seeds == '1' else 'seeds'}"]
    told += [f"{count} {what}" for what, count in counts.items() if count]
    return f"{own.label}{text.FEW_MARK * own.few} ({', '.join(told)})"


def _reading(section: Progress) -> str:
    words = ["band: 95 % interval, runs resampled within tasks"]
    if section.pooled:
        words.insert(0, "IQM: mean of the middle half of all runs; task: mean of seeds")
    if section.behaviour:
        words.append("dotted grey: the dataset")
    if any(own.few for own in section.agents):
        words.append(f"{text.FEW_MARK} fewer than {FEW_SEEDS} seeds on a task")
    return "; ".join(words)
