"""Training curves of a results folder: which runs count, their final values, figures.

Reads rows and metrics and runs nothing.  Reading needs no matplotlib, drawing does.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from offrl_jax.errors import ResultsError, unknown_name
from offrl_jax.figures.style import (
    RETURN,
    SCORE,
    UNITS,
    Looks,
    add_legend,
    looks_of,
    new_figure,
)
from offrl_jax.leaderboard.runs import (
    CellKey,
    SectionKey,
    base_of,
    final_runs,
    mean_return,
)
from offrl_jax.results import read_metrics, read_plans, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OnMessage = Callable[[str], None]


class Curve(NamedTuple):
    """One metric of one run in one phase.

    Attributes:
      steps: `[points]`, updates of the phase, ascending.
      values: `[points]`, float64; NaN once the run had diverged.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRun:
    """One seed of one agent with one setting on one task.

    Attributes:
      section: suite, family, preset, updates and protocol; None where neither a plan
        nor a row tells.
      cell: agent, setting and task.
      seed: of the run.
      phases: names, in the order of training.
      curves: by metric and phase; `score` and `return` are those of the evaluations.
      diverged: whether a value or the state stopped being finite.
    """

    section: SectionKey | None
    cell: CellKey
    seed: int
    phases: tuple[str, ...]
    curves: Mapping[tuple[str, str], Curve]
    diverged: bool

    @property
    def group(self) -> tuple[str, str, SectionKey | None]:
        """What runs share that differ by seed alone (or by task)."""
        return self.cell.agent, self.cell.setting, self.section


def read_runs(
    folder: Path,
    on_message: OnMessage,
    agents: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
) -> list[TrainedRun]:
    """The runs that the leaderboard counts, and the begun ones, with their curves.

    Of several runs of the same cell and seed the one that
    `offrl_jax.leaderboard.runs.final_runs` keeps.  Metrics without plan and rows, such
    as a copied folder `metrics`, are all read.

    Args:
      folder: of results.
      on_message: told of torn last lines.
      agents: only these: labels, or names, which stand for every preset.
      tasks: only these.

    Raises:
      UsageError: an agent or task of which the folder holds no run.
      ResultsError: the folder holds neither rows nor metrics, or damaged ones.
    """
    rows, plan = read_rows(folder, on_message), read_plans(folder)
    counted = {
        (run.run_id, run.cell, run.seed): run.section
        for run in final_runs(rows, plan)[0]
    }
    known = {row.run_id for row in rows}
    known |= {job.run_id for job in plan.jobs} if plan else set()

    found: dict[tuple[str, CellKey, int], dict[tuple[str, str], list]] = {}
    broken: set[tuple[str, CellKey, int]] = set()
    for point in read_metrics(folder, on_message):
        key = (
            point.run_id,
            CellKey(point.agent, point.setting, point.task),
            point.seed,
        )
        if key not in counted and point.run_id in known:
            continue  # superseded, or of a tuning run
        curves = found.setdefault(key, defaultdict(list))
        for name, value in point.values.items():
            curves[name, point.phase].append((point.step, value))
            if math.isnan(value):
                broken.add(key)
    for row in rows:
        if row.seed is None:
            continue
        key = (row.run_id, CellKey(row.agent, row.setting, row.task), row.seed)
        if key not in counted:
            continue
        curves = found.setdefault(key, defaultdict(list))
        phase = list(row.phase_updates)[-1]
        for name, value in ((SCORE, row.score), (RETURN, mean_return(row))):
            if value is not None:
                curves[name, phase].append((row.step, value))
        if row.status == "diverged":
            broken.add(key)
    if not found:
        raise ResultsError(
            f"{folder}: neither metrics nor evaluations of a training run; name a "
            "results folder, or run something into it"
        )
    for kind, names, there in (
        ("agent", agents, {name for _, c, _ in found for name in _names(c.agent)}),
        ("task", tasks, {cell.task for _, cell, _ in found}),
    ):
        for name in names or ():
            if name not in there:
                raise unknown_name(f"{kind} of these results", name, there)
    return [
        TrainedRun(
            section=counted.get(key),
            cell=key[1],
            seed=key[2],
            phases=tuple(dict.fromkeys(phase for _, phase in curves)),
            curves={
                name: Curve(
                    np.array([step for step, _ in points]),
                    np.array([value for _, value in points], np.float64),
                )
                for name, points in curves.items()
            },
            diverged=key in broken,
        )
        for key, curves in sorted(found.items(), key=lambda item: item[0][1:])
        if (agents is None or _names(key[1].agent) & set(agents))
        and (tasks is None or key[1].task in tasks)
    ]


def _names(label: str) -> set[str]:
    """What may be said for an agent: its label, or its name alone."""
    return {label, base_of(label)}


def recorded(runs: Iterable[TrainedRun]) -> list[str]:
    """Names of the metrics that training recorded, in the order of their lines."""
    names = dict.fromkeys(name for run in runs for name, _ in run.curves)
    return [name for name in names if name not in UNITS]


def labels(
    groups: Iterable[tuple[str, str, SectionKey | None]],
) -> dict[tuple[str, str, SectionKey | None], str]:
    """A label per group of runs: the agent, and as much else as tells it apart."""
    every = list(dict.fromkeys(groups))
    found = {
        group: group[0] if group[1] == "default" else f"{group[0]}, {group[1]}"
        for group in every
    }
    # Not the family: a panel shows one task, and an agent has one colour in all.
    details: tuple[Callable[[SectionKey], str], ...] = (
        lambda section: f"{section.updates_total:,} updates",
        lambda section: f"suite {section.suite}",
        lambda section: f"protocol {section.protocol}",
    )
    for detail in details:
        if len(set(found.values())) == len(every):
            break
        for label in set(found.values()):
            same = [group for group in every if found[group] == label]
            words = {g: detail(g[2]) if g[2] else "not planned" for g in same}
            if len(set(words.values())) > 1:
                found |= {group: f"{label}, {words[group]}" for group in same}
    return found


def median_curve(curves: Sequence[Curve]) -> Curve:
    """At every step, the median over the runs with a finite value there."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        for step, value in zip(curve.steps, curve.values, strict=True):
            if math.isfinite(value):
                by_step[int(step)].append(float(value))
    steps = sorted(by_step)
    return Curve(np.array(steps), np.array([np.median(by_step[s]) for s in steps]))


class Final(NamedTuple):
    """Where a metric of a group of runs ended on one task.

    Attributes:
      label: of the group.
      task: task id.
      phase: in which it was recorded.
      metric: its name.
      value: median over the seeds that are as far as the furthest; NaN if all of them
        had diverged.
      step: updates of the phase at that point.
      seeds: runs in the median.
      diverged: runs left out of it.
    """

    label: str
    task: str
    phase: str
    metric: str
    value: float
    step: int
    seeds: int
    diverged: int


def final_values(runs: Sequence[TrainedRun]) -> list[Final]:
    """The last point of every recorded metric, per group of runs and task."""
    label_of = labels(run.group for run in runs)
    ends: dict[tuple[str, str, str, str], list[tuple[int, float]]] = defaultdict(list)
    for run in runs:
        for (metric, phase), curve in run.curves.items():
            if metric not in UNITS:
                key = (label_of[run.group], run.cell.task, phase, metric)
                ends[key].append((int(curve.steps[-1]), float(curve.values[-1])))
    found = []
    for key, last in ends.items():
        step = max(step for step, _ in last)
        values = [value for at, value in last if at == step]
        finite = [value for value in values if math.isfinite(value)]
        value = float(np.median(finite)) if finite else math.nan
        label, task, phase, metric = key
        found.append(
            Final(
                label,
                task,
                phase,
                metric,
                value,
                step,
                len(finite),
                len(values) - len(finite),
            )
        )
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """One metric on one task.

    Attributes:
      metric: its name.
      task: task id.
      phase: what to call the axis of updates after; empty for agents of one phase.
      curves: one per seed, by label of the group of runs.
    """

    metric: str
    task: str
    phase: str
    curves: Mapping[str, tuple[Curve, ...]]


def panels(
    runs: Sequence[TrainedRun], metrics: Sequence[str] | None = None
) -> list[Panel]:
    """What is to be drawn: metric by metric, and each task by task.

    A metric that a run records in several phases has a row of panels for each of them.

    Args:
      runs: from `read_runs`.
      metrics: names; default all that were recorded.  `score` and `return` are the
        evaluations'.

    Raises:
      UsageError: a metric that no run has.
      ResultsError: no metrics were recorded.
    """
    names = recorded(runs)
    if not names and not set(metrics or ()) & set(UNITS):
        raise ResultsError(
            "no training metrics are recorded here (older versions kept none); "
            f"--metrics {SCORE} or {RETURN} draws the evaluations"
        )
    there = dict.fromkeys(name for run in runs for name, _ in run.curves)
    for name in metrics or ():
        if name not in there:
            raise unknown_name("metric", name, there)
    label_of = labels(run.group for run in runs)
    found: list[Panel] = []
    for metric in dict.fromkeys(metrics if metrics is not None else names):
        phases_of = [
            [phase for name, phase in run.curves if name == metric] for run in runs
        ]
        split = any(len(phases) > 1 for phases in phases_of)
        several = any(len(run.phases) > 1 for run in runs)
        used = list(dict.fromkeys(itertools.chain(*phases_of)))
        for phases in [[phase] for phase in used] if split else [used]:
            for task in sorted({run.cell.task for run in runs}):
                curves: dict[str, list[Curve]] = defaultdict(list)
                for run in runs:
                    for phase in phases:
                        curve = run.curves.get((metric, phase))
                        if curve is not None and run.cell.task == task:
                            curves[label_of[run.group]].append(curve)
                if curves:
                    shown = {label: tuple(c) for label, c in curves.items()}
                    phase = ", ".join(phases) if several else ""
                    found.append(Panel(metric, task, phase, shown))
    return found


def draw(drawn: Sequence[Panel]) -> Figure:
    """Panels as a figure: tasks side by side, metrics below each other.

    A thin line per seed, the bold median over the seeds, one colour per group of runs.

    Raises:
      UsageError: matplotlib is not installed.
    """
    tasks = list(dict.fromkeys(panel.task for panel in drawn))
    rows = list(dict.fromkeys((panel.metric, panel.phase) for panel in drawn))
    every = sorted({label for panel in drawn for label in panel.curves})
    look = looks_of(every)
    figure = new_figure(max(4.2, 3.4 * len(tasks)), 2.4 * len(rows) + 0.9)
    axes = figure.subplots(len(rows), len(tasks), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for panel in drawn:
        axis = axes[rows.index((panel.metric, panel.phase)), tasks.index(panel.task)]
        axis.set_axis_on()
        _draw_panel(axis, panel, look)
    add_legend(
        figure,
        {label: _legend(label, drawn) for label in every},
        look,
        figure.get_figwidth(),
        "bold: median over seeds; thin: one seed",
    )
    return figure


def _draw_panel(axis: Axes, panel: Panel, look: Looks) -> None:
    from matplotlib.ticker import EngFormatter

    for label, curves in panel.curves.items():
        # A single point, such as the only evaluation, has no line to be seen by.
        marker = "o" if max(len(curve.steps) for curve in curves) == 1 else ""
        for curve in curves:
            axis.plot(*curve, linewidth=0.6, alpha=0.45, marker=marker, **look[label])
        axis.plot(*median_curve(curves), linewidth=2.2, marker=marker, **look[label])
    axis.set_title(panel.task, fontsize="small")
    axis.set_ylabel(UNITS.get(panel.metric, panel.metric), fontsize="small")
    axis.set_xlabel(
        f"updates of phase {panel.phase}" if panel.phase else "updates",
        fontsize="small",
    )
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.tick_params(labelsize="small")
    axis.grid(alpha=0.25, linewidth=0.5)


def _legend(label: str, drawn: Iterable[Panel]) -> str:
    """The label with the numbers of seeds behind its medians."""
    groups = [panel.curves[label] for panel in drawn if label in panel.curves]
    counts = sorted({len(curves) for curves in groups})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    diverged = max(
        sum(bool(np.isnan(curve.values).any()) for curve in curves) for curves in groups
    )
    ended = f", {diverged} diverged" if diverged else ""
    return f"{label} ({seeds} {'seed' if counts == [1] else 'seeds'}{ended})"
