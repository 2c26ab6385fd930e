"""Figures of a results folder; nothing is run.

`read_runs`, `panels` and `draw` make those of training metrics, seed by seed;
`draw_progress` those of aggregated scores, `draw_tuning` those of choosing a policy;
`draw_section` all of a section of the leaderboard, for papers.  Reading needs no
matplotlib, drawing does.
"""

from offrl_jax.figures.leaderboard import (
    FIGURES,
    Picture,
    check_names,
    draw_section,
    left_out,
    picture_file,
    progress_of,
)
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
    "FIGURES",
    "PALETTE",
    "RETURN",
    "SCORE",
    "SUFFIXES",
    "UNITS",
    "Curve",
    "Final",
    "Panel",
    "Picture",
    "TrainedRun",
    "check_names",
    "check_suffix",
    "draw",
    "draw_progress",
    "draw_section",
    "draw_tuning",
    "final_values",
    "labels",
    "left_out",
    "median_curve",
    "panels",
    "picture_file",
    "progress_of",
    "read_runs",
    "recorded",
    "render",
]
