"""Figures of a results folder; nothing is run.

`read_runs`, `panels` and `draw` make those of training metrics, seed by seed;
`draw_progress` those of aggregated scores, `draw_tuning` those of choosing a policy.
Reading needs no matplotlib, drawing does.
"""

from offrl_jax.figures.progress import draw as draw_progress
from offrl_jax.figures.style import (
    PALETTE,
    RETURN,
    SCORE,
    SUFFIXES,
    UNITS,
    check_suffix,
    render,
)
from offrl_jax.figures.training import (
    Curve,
    Final,
    Panel,
    TrainedRun,
    draw,
    final_values,
    labels,
    median_curve,
    panels,
    read_runs,
    recorded,
)
from offrl_jax.figures.tuning import draw as draw_tuning

__all__ = [
    "PALETTE",
    "RETURN",
    "SCORE",
    "SUFFIXES",
    "UNITS",
    "Curve",
    "Final",
    "Panel",
    "TrainedRun",
    "check_suffix",
    "draw",
    "draw_progress",
    "draw_tuning",
    "final_values",
    "labels",
    "median_curve",
    "panels",
    "read_runs",
    "recorded",
    "render",
]
