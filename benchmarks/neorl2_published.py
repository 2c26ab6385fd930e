"""Measured returns beside NeoRL-2's published runs, setting by setting, as Markdown.

Example:
  offrl benchmark neorl2_published
  python benchmarks/neorl2_published.py results/neorl2_published \
      ../shared/data/neorl2_published_runs.csv
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import re
import statistics
from pathlib import Path

import tyro
from tyro.conf import Positional

from offrl_jax.results import Row, read_rows

PUBLISHED = {"gaussian_bc": "bc", "bc": "bc", "td3_bc": "td3bc"}
"""Our agent -> NeoRL-2's algorithm; both kinds of BC stand beside its one."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Prints the table."""

    results: Positional[Path]
    """Results folder of the suite `neorl2_published`."""
    published: Positional[Path]
    """CSV: task, algorithm, hyperparameters, seed, return_mean, ..."""
    task: str = "neorl2/DMSD-v1"
    """Which task."""


def setting_key(text: str) -> tuple[float, ...]:
    """The numbers of a setting's name: `layers=2;lr=0.0010` gives (2, 0.001)."""
    return tuple(float(number) for number in re.findall(r"=([0-9.e-]+)", text))


def final_returns(
    rows: list[Row], task: str
) -> dict[tuple[str, int, str], list[float]]:
    """Mean return of every seed's last evaluation, by agent, updates and setting."""
    found: dict[tuple[str, int, str], dict[int, float]] = collections.defaultdict(dict)
    for row in rows:
        last = row.step == row.updates_total and row.status == "ok"
        if row.task == task and last and row.seed is not None:
            key = (row.agent, row.updates_total, row.setting)
            found[key][row.seed] = statistics.fmean(row.returns)
    return {key: list(seeds.values()) for key, seeds in found.items()}


def published_returns(path: Path, task: str) -> dict[tuple, list[float]]:
    """Mean return of every published seed, by algorithm and numbers of the setting."""
    found = collections.defaultdict(list)
    with path.open() as stream:
        for run in csv.DictReader(stream):
            if run["task"] == task.partition("/")[2].removesuffix("-v1"):
                key = (run["algorithm"], setting_key(run["hyperparameters"]))
                found[key].append(float(run["return_mean"]))
    return found


def spread(values: list[float]) -> str:
    """Mean and range of the seeds."""
    return (
        f"{statistics.fmean(values):.1f} [{min(values):.1f}, {max(values):.1f}] "
        f"({len(values)})"
    )


def place(ours: list[float], theirs: list[float]) -> str:
    """Where the mean of our seeds lies in the range of the published ones."""
    mean = statistics.fmean(ours)
    if not theirs:
        return "-"
    if mean > max(theirs):
        return f"{mean - max(theirs):.1f} above"
    return "inside" if mean >= min(theirs) else f"{min(theirs) - mean:.1f} below"


def main(options: Compare) -> None:
    """Prints one line per agent and setting."""
    rows = read_rows(options.results, print)
    published = published_returns(options.published, options.task)
    print(
        "| agent | setting | updates | measured return, mean [range] (seeds) | "
        "published return, mean [range] (seeds) | measured mean is |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for key, ours in sorted(final_returns(rows, options.task).items()):
        agent, updates, setting = key
        theirs = published.get((PUBLISHED[agent], setting_key(setting)), [])
        print(
            f"| {agent} | {setting} | {updates:,} | {spread(ours)} "
            f"| {spread(theirs) if theirs else 'none'} | {place(ours, theirs)} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Compare))
