"""Leaderboards: statistics and tables, computed from rows and plan alone.

Nothing here trains or evaluates.  `build` gives the tables as data, `draw` as text in
one of `FORMATS`, `render` is both; the same rows and plan give the same bytes.
`progress_of` gives the same aggregates at every evaluation, `progress_csv` its table.
`tuning_of` gives what an agent's trained policies are worth to someone who must choose
one of them online, `tuning_csv` its table.
`compare` compares two folders, `draw_comparison` draws that.
"""

from pathlib import Path

from offrl_jax.errors import unknown_name
from offrl_jax.leaderboard import compare_formats, formats, latex, table
from offrl_jax.leaderboard.board import build
from offrl_jax.leaderboard.compare import Comparisons
from offrl_jax.leaderboard.compare import build as compare
from offrl_jax.leaderboard.formats import progress_csv, tuning_csv
from offrl_jax.leaderboard.model import Leaderboard
from offrl_jax.leaderboard.progress import build as progress_of
from offrl_jax.leaderboard.tuning import build as tuning_of

FORMATS = ("table", "md", "latex", "csv", "json")
COMPARISON_FORMATS = ("table", "md", "json")

__all__ = [
    "COMPARISON_FORMATS",
    "FORMATS",
    "Comparisons",
    "Leaderboard",
    "build",
    "compare",
    "draw",
    "draw_comparison",
    "progress_csv",
    "progress_of",
    "render",
    "tuning_csv",
    "tuning_of",
]


def render(folder: Path, format: str, *, width: int = 100, colour: bool = False) -> str:
    """The leaderboard of a results folder as text; `draw` of its `build`.

    Raises:
      UsageError: unknown format.
      ResultsError: as `build`.
    """
    _check_format(format, FORMATS)
    return draw(build(folder), format, width=width, colour=colour)


def draw(
    board: Leaderboard, format: str, *, width: int = 100, colour: bool = False
) -> str:
    """A leaderboard as text that ends with a newline.

    Args:
      board: built once, drawn in as many formats as wanted.
      format: one of `FORMATS`.
      width: columns of `table`.
      colour: whether `table` is styled for a terminal.

    Raises:
      UsageError: unknown format.
    """
    _check_format(format, FORMATS)
    if format == "table":
        return table.draw(board, width=width, colour=colour)
    return {
        "md": formats.to_markdown,
        "latex": latex.to_latex,
        "csv": formats.to_csv,
        "json": formats.to_json,
    }[format](board)


def draw_comparison(
    found: Comparisons, format: str, *, width: int = 100, colour: bool = False
) -> str:
    """A comparison as text that ends with a newline; arguments as in `draw`.

    Raises:
      UsageError: a format that is none of `COMPARISON_FORMATS`.
    """
    _check_format(format, COMPARISON_FORMATS)
    if format == "table":
        return compare_formats.to_table(found, width=width, colour=colour)
    if format == "md":
        return compare_formats.to_markdown(found)
    return compare_formats.to_json(found)


def _check_format(format: str, known: tuple[str, ...]) -> None:
    if format not in known:
        raise unknown_name("format", format, known)
