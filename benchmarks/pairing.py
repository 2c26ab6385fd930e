"""Why `offrl compare` draws the runs of one seed together: two measurements.

Example:
  python benchmarks/pairing.py results/acpo_kappa results/rank1_vectors

For every folder: settings of one agent on one task are a change of that agent.  How do
their final scores correlate over seeds, and which share of the variance of a difference
is left in pairs?  Medians over all pairs of settings.

Then coverage: how often the 95 % percentile interval of the difference of IQMs holds
the true one, which is 0, for normal scores of correlation rho between the sides.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import tyro
from tyro.conf import Positional

from offrl_jax.results import read_rows


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Prints one line per folder, then one per simulated case."""

    results: Positional[tuple[Path, ...]]
    """Results folders with several settings of an agent."""
    repetitions: int = 2_000
    """Simulated comparisons per case."""
    replications: int = 1_000
    """Bootstrap replications of each."""


def correlations(folder: Path) -> list[tuple[float, float]]:
    """Correlation and share of variance of every two settings, on 5 seeds or more."""
    scores: dict[tuple[str, str], dict[str, dict[int, float]]]
    scores = defaultdict(lambda: defaultdict(dict))
    for row in read_rows(folder, print):
        last = row.step == row.updates_total and row.role == "test"
        if last and row.seed is not None and row.score is not None:
            scores[row.task, row.agent][row.setting][row.seed] = row.score
    found = []
    for settings in scores.values():
        for one, other in itertools.combinations(settings.values(), 2):
            seeds = sorted(one.keys() & other.keys())
            x, y = (np.array([side[seed] for seed in seeds]) for side in (one, other))
            if len(seeds) >= 5 and x.std() > 0 and y.std() > 0:
                share = np.var(x - y) / (np.var(x) + np.var(y))
                found.append((float(np.corrcoef(x, y)[0, 1]), float(share)))
    return found


def iqm(runs: np.ndarray) -> np.ndarray:
    """25 % trimmed mean of `[..., T, S]` over the last two axes."""
    ordered = np.sort(runs.reshape(*runs.shape[:-2], -1), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)


def coverage(
    rng: np.random.Generator, tasks: int, seeds: int, rho: float, settings: Pairing
) -> dict[str, tuple[float, float]]:
    """Share of intervals that hold 0, and their mean width, drawn in pairs or apart."""
    level = rng.uniform(20, 90, (tasks, 1))
    index = np.arange(tasks)[None, :, None]
    shape = (settings.replications, tasks, seeds)
    held, width = defaultdict(int), defaultdict(float)
    for _ in range(settings.repetitions):
        one, two = rng.standard_normal((2, tasks, seeds))
        x = level + 10 * one
        y = level + 10 * (rho * one + np.sqrt(1 - rho**2) * two)
        drawn, other = rng.integers(0, seeds, (2, *shape))
        before = iqm(x[index, drawn])
        for name, places in (("pairs", drawn), ("apart", other)):
            samples = iqm(y[index, places]) - before
            low, high = np.quantile(samples, [0.025, 0.975])
            held[name] += low <= 0 <= high
            width[name] += high - low
    count = settings.repetitions
    return {name: (held[name] / count, width[name] / count) for name in held}


def main() -> None:
    """Measures and prints."""
    settings = tyro.cli(Pairing, description=__doc__)
    for folder in settings.results:
        found = np.array(correlations(folder))
        rho, share = np.median(found, axis=0)
        print(
            f"{folder}: {len(found)} pairs of settings, correlation {rho:.2f}, "
            f"variance left {share:.2f}"
        )
    rng = np.random.default_rng(0)
    for tasks, seeds, rho in itertools.product((1, 4), (5, 10), (0.0, 0.5, 0.9)):
        found = coverage(rng, tasks, seeds, rho, settings)
        parts = [
            f"{name} {held:.3f} (width {width:.1f})"
            for name, (held, width) in found.items()
        ]
        print(f"{tasks} tasks, {seeds} seeds, rho {rho}: {', '.join(parts)}")


if __name__ == "__main__":
    main()
