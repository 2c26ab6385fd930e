"""What all figures of results share: sizes, colours, legends, files."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
COLUMN_WIDTH, TEXT_WIDTH, TEXT_HEIGHT = 3.3, 6.75, 9.0
"""Inches of a paper of two columns: of one, of both, and from top to bottom."""
NORMAL, SMALL, TINY = 8.0, 7.0, 6.0
"""Points of a paper figure's text: titles and axes; ticks and legends; remarks."""
INK, FAINT = "0.35", "0.92"
"""Greys of what is said beside the data, and of what lies behind them."""
_PAPER: Mapping[str, Any] = {
    "font.size": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": NORMAL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.4,
    # Names of agents and tasks are words, whatever dollars they hold.
    "text.parse_math": False,
}
# Width of a legend's line with its gaps, and of a character, per point of its font.
_LEGEND_INCHES, _CHARACTER_INCHES = 0.072, 0.009
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
        raise _no_matplotlib(error) from error
    # A Figure without pyplot: no display, no global state, nothing to close.
    return Figure(figsize=(width, height), layout="constrained")


def _no_matplotlib(error: ImportError) -> UsageError:
    return UsageError(
        f"figures need matplotlib ({error}); install it: pip install matplotlib"
    )


@contextlib.contextmanager
def paper_style() -> Iterator[None]:
    """Figures drawn inside have the sizes of a paper, whatever the user's settings.

    Raises:
      UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise _no_matplotlib(error) from error
    with style.context(["default", dict(_PAPER)]):
        yield


def lines_of(sentences: str, width: float, size: float = TINY) -> list[str]:
    """`sentences` in lines of `size` points that fit `width` inches."""
    kept = sentences.replace(" %", "\N{NO-BREAK SPACE}%")
    # DejaVu Sans, matplotlib's own font, has letters of 0.53 em on average.
    return textwrap.wrap(kept, int(width * 72 / (0.54 * size)))


def small_size() -> float:
    """Points of the font that matplotlib calls small, by the present settings."""
    from matplotlib import rcParams
    from matplotlib.font_manager import font_scalings

    return font_scalings["small"] * rcParams["font.size"]


def remark(figure: FigureBase, sentences: str, width: float) -> None:
    """Small words below the panels, in lines that fit `width` inches."""
    lines = "\n".join(lines_of(sentences, width))
    figure.supxlabel(lines, fontsize=TINY, color=INK)


def legend_columns(texts: Sequence[str], width: float) -> int:
    """Entries that fit beside each other: a legend wider than its figure is cut off."""
    letters = _CHARACTER_INCHES * max(map(len, texts))
    column = small_size() * (_LEGEND_INCHES + letters)
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
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=legend_columns(list(texts.values()), width),
        title=title,
        title_fontsize="small",
        fontsize="small",
        frameon=False,
    )
    legend.get_title().set_multialignment("center")


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


def render(figure: Figure, suffix: str, dpi: int = 150) -> bytes:
    """The figure as a file of that suffix; the same bytes for the same figure.

    Text in a PDF stays text, with fonts of type 42, which journals ask for.  In an SVG
    it becomes paths: a viewer without the font would move and cut the labels.

    Args:
      figure: drawn.
      suffix: one of `SUFFIXES`.
      dpi: dots per inch of a PNG.
    """
    import matplotlib

    dates = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    files: dict[Any, Any] = {
        "svg.hashsalt": "offrl_jax",
        "svg.fonttype": "path",
        "pdf.fonttype": 42,
        # A user's wish to trim the margins would change the width.
        "savefig.bbox": "standard",
    }
    stream = io.BytesIO()
    with matplotlib.rc_context(files):
        figure.savefig(stream, format=suffix[1:], dpi=dpi, metadata=dates[suffix])
    return stream.getvalue()
