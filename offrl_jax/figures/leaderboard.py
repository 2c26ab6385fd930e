"""All figures of a section of a leaderboard, for papers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from offrl_jax.errors import unknown_name
from offrl_jax.figures import cost, dots, matchups, progress
from offrl_jax.figures.captions import ranked
from offrl_jax.figures.style import TEXT_WIDTH, paper_style, render
from offrl_jax.leaderboard import comparisons
from offrl_jax.leaderboard.model import Section
from offrl_jax.leaderboard.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("ranking", "profiles", "improvement", "cost", "tasks", "progress")
"""What `draw_section` draws, in this order."""
DPI = 300
"""Dots per inch of a paper's PNG, which journals ask for."""


class Picture(NamedTuple):
    """A figure with its name: one of `FIGURES`, with a number where it has pages."""

    name: str
    figure: Figure


def progress_of(section: Section, parts: Iterable[Progress]) -> Progress | None:
    """The part that is of the runs of this section; None if none of them counts."""
    key = (section.suite, section.family, section.preset, section.updates_total)
    for part in parts:
        same_runs = part.key[:4] == key and part.tuning == section.tuning
        if same_runs and json.loads(part.key.protocol) == section.protocol:
            return part
    return None


def left_out(section: Section, part: Progress | None) -> dict[str, str]:
    """Why figures cannot be drawn of a section, by their name.

    Args:
      section: of a leaderboard.
      part: from `progress_of`.
    """
    count = len(ranked(section))
    reasons: dict[str, str] = {}
    if not count:
        for name in ("ranking", "profiles", "improvement", "cost"):
            reasons[name] = "no agent is ranked"
    else:
        if count == 1:
            reasons["improvement"] = "a single ranked agent has no other to beat"
        if not cost.priced(section):
            reasons["cost"] = "rows of ranked agents do not say what they cost"
    if not any(cell.seeds for entry in section.entries for cell in entry.cells):
        reasons["tasks"] = "no run counts"
    if part is None:
        reasons["progress"] = "no run counts"
    elif _single_points(part):
        reasons["progress"] = "runs were evaluated once"
    return reasons


def _single_points(part: Progress) -> bool:
    lines = [line for own in part.agents for line in own.by_task.values()]
    return all(len(line) < 2 for line in lines)


def check_names(names: Iterable[str]) -> None:
    """Checks names of figures before anything is computed.

    Raises:
      UsageError: one that is not of `FIGURES`.
    """
    for name in names:
        if name not in FIGURES:
            raise unknown_name("figure", name, FIGURES)


def draw_section(
    section: Section,
    part: Progress | None = None,
    names: Sequence[str] = FIGURES,
) -> list[Picture]:
    """The figures of a section, in the order of `FIGURES`, in one style.

    Args:
      section: of a leaderboard.
      part: of the same section, from `leaderboard.progress_of`; None leaves its figure
        out.
      names: of `FIGURES`; those that `left_out` names are left out.

    Raises:
      UsageError: an unknown figure, or matplotlib is not installed.
    """
    check_names(names)
    reasons = left_out(section, part)
    found: list[Picture] = []
    with paper_style():
        for name in FIGURES:
            if name not in names or name in reasons:
                continue
            drawn = _draw(name, section, part)
            numbers = [f"-{i}" for i in range(1, len(drawn) + 1)]
            for number, figure in zip(numbers, drawn, strict=True):
                found.append(Picture(name + number * (len(drawn) > 1), figure))
    return found


def picture_file(picture: Picture, suffix: str, dpi: int = DPI) -> bytes:
    """A picture of `draw_section` as `style.render` writes it, in the same style."""
    # Ticks are made when a figure is written, by the settings of that moment.
    with paper_style():
        return render(picture.figure, suffix, dpi)


def _draw(name: str, section: Section, part: Progress | None) -> list[Figure]:
    if name == "tasks":
        return dots.draw_tasks(section)
    if name == "profiles":
        profiles = comparisons.profiles(section)
        return [matchups.draw_profiles(section, profiles)]
    if name == "improvement":
        first = [entry.label for entry in ranked(section)[: matchups.MOST_AGENTS]]
        better = comparisons.improvements(section, first)
        return [matchups.draw_improvement(section, better)]
    if name == "progress":
        assert part is not None  # or `left_out` names it
        return [progress.draw([part], TEXT_WIDTH)]
    return [{"ranking": dots.draw_ranking, "cost": cost.draw_cost}[name](section)]
