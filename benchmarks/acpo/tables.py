"""Scores, and what the dual did, per setting, from a results folder, as Markdown.

Example:
  offrl benchmark acpo_kappa
  python benchmarks/acpo/tables.py results/acpo_kappa

Means over seeds with the 95 % interval of Student's t, and the range of the seeds;
kappa, eps and E log beta are the seeds' medians at the end of training, from the
recorded metrics.  Where those are absent (they are not kept with the project), the
columns are empty.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path

import scipy.stats
import tyro
from tyro.conf import Positional

from offrl_jax.results import MetricPoint, Row, read_metrics, read_rows

COLUMNS = ("kappa", "epsilon", "log_density_policy", "effective_sample_size")
"""Metrics that are shown beside the score, where an agent has them."""

Key = tuple[str, str, str]
"""Task, agent and setting."""


@dataclasses.dataclass(frozen=True)
class Tables:
    """Prints one table per task."""

    results: Positional[Path]
    """Results folder of one of the `acpo_*` suites."""


def final_scores(rows: Sequence[Row]) -> dict[Key, dict[int, float]]:
    """Score of every seed's last evaluation, NaN for a failed run."""
    found: dict[Key, dict[int, float]] = collections.defaultdict(dict)
    for row in rows:
        if row.seed is not None and row.step == row.updates_total:
            score = math.nan if row.score is None else row.score
            found[row.task, row.agent, row.setting][row.seed] = score
    return found


def final_metrics(points: Sequence[MetricPoint]) -> dict[Key, dict[str, float]]:
    """Median over seeds of each metric's last point of the phase `train`."""
    last: dict[tuple[Key, int], MetricPoint] = {}
    for point in points:
        if point.phase == "train":
            key = (point.task, point.agent, point.setting), point.seed
            if key not in last or last[key].step < point.step:
                last[key] = point
    found: dict[Key, dict[str, list[float]]] = {}
    for (key, _), point in last.items():
        for name, value in point.values.items():
            if not math.isnan(value):
                found.setdefault(key, {}).setdefault(name, []).append(value)
    return {
        key: {name: statistics.median(x) for name, x in metrics.items()}
        for key, metrics in found.items()
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean, by Student's t; NaN for a single value."""
    if len(values) < 2:
        return math.nan, math.nan
    quantile = float(scipy.stats.t.ppf(0.975, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def table(
    task: str,
    scores: dict[Key, dict[int, float]],
    metrics: dict[Key, dict[str, float]],
) -> str:
    """One Markdown table, best mean first."""
    keys = [key for key in scores if key[0] == task]
    shown = [c for c in COLUMNS if any(c in metrics.get(key, {}) for key in keys)]
    lines = [
        f"| {task} | mean score | 95 % interval | range (seeds) | "
        + " | ".join(f"`{name}`" for name in shown)
        + (" |" if shown else ""),
        "| --- | --- | --- | --- |" + " --- |" * len(shown),
    ]
    several_agents = len({agent for _, agent, _ in keys}) > 1
    for key in sorted(keys, key=lambda key: -statistics.fmean(scores[key].values())):
        values = list(scores[key].values())
        low, high = interval(values)
        label = f"{key[1]} {key[2]}" if several_agents else key[2]
        cells = [
            label,
            f"{statistics.fmean(values):.1f}",
            f"[{low:.1f}, {high:.1f}]",
            f"{min(values):.1f} to {max(values):.1f} ({len(values)})",
        ]
        own = metrics.get(key, {})
        cells += [f"{own[name]:.3g}" if name in own else "" for name in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Tables) -> None:
    """Prints the tables of all tasks."""
    scores = final_scores(read_rows(arguments.results, warnings.warn))
    metrics = final_metrics(read_metrics(arguments.results))
    for task in sorted({key[0] for key in scores}):
        print(table(task, scores, metrics), end="\n\n")


if __name__ == "__main__":
    main(tyro.cli(Tables, description=__doc__))
