"""What all figures of results share: colours, legends, files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offrl_jax.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

SUFFIXES = (".png", ".pdf", ".svg")
SCORE, RETURN = "score", "return"
UNITS = {
    SCORE: "score (0 random, 100 expert)",
    RETURN: "return of an episode, undiscounted",
}
"""What rows know of evaluations, named like metrics, with their axis labels."""

PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
"""Told apart by colour-blind people: Okabe & Ito 2008, without the yellow, too pale for
a line on white."""
# Width of a legend's line with its gaps, and of a character of its small font.
_LEGEND_INCHES, _CHARACTER_INCHES = 0.6, 0.075
_STYLES = ("-", "--", ":", "-.")

Looks = Mapping[str, Mapping[str, Any]]
"""Colour and line style by label."""


def looks_of(labels: Iterable[str]) -> Looks:
    """A look per label, in their order as words: the same labels, the same looks."""
    return {
        label: {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": _STYLES[i // len(PALETTE) % len(_STYLES)],
        }
        for i, label in enumerate(sorted(set(labels)))
    }


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
      UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"figures need matplotlib ({error}); install it: pip install matplotlib"
        ) from error
    # A Figure without pyplot: no display, no global state, nothing to close.
    return Figure(figsize=(width, height), layout="constrained")


def legend_columns(texts: Sequence[str], width: float) -> int:
    """Entries that fit beside each other: a legend wider than its figure is cut off."""
    column = _LEGEND_INCHES + _CHARACTER_INCHES * max(map(len, texts))
    return max(1, min(len(texts), int(width / column)))


def add_legend(
    figure: FigureBase, texts: Mapping[str, str], looks: Looks, width: float, title: str
) -> None:
    """A legend below the panels.

    Args:
      figure: or a part of one.
      texts: by label, in order.
      looks: of every label.
      width: of the figure in inches.
      title: how to read the lines.
    """
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linewidth=2.2, label=text, **looks[label])
        for label, text in texts.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=legend_columns(list(texts.values()), width),
        title=title,
        title_fontsize="small",
        fontsize="small",
        frameon=False,
    )


def check_suffix(path: Path) -> str:
    """The suffix of a figure's file.

    Raises:
      UsageError: none of `SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"
        raise UsageError(
            f"{path}: unknown suffix '{path.suffix}' of a figure; choose {known}"
        )
    return path.suffix.lower()


def render(figure: Figure, suffix: str) -> bytes:
    """The figure as a file of that suffix; the same bytes for the same figure."""
    import matplotlib

    dates = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "offrl_jax"}):
        figure.savefig(stream, format=suffix[1:], dpi=150, metadata=dates[suffix])
    return stream.getvalue()
