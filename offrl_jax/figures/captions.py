"""What figures of a leaderboard say in words: who is drawn, from which runs."""

from __future__ import annotations

from collections.abc import Sequence

from offrl_jax.figures.style import UNITS
from offrl_jax.leaderboard import text
from offrl_jax.leaderboard.model import Entry, Section

INTERVALS = "95 % intervals, runs resampled within tasks"


def ranked(section: Section) -> list[Entry]:
    """Entries with a rank, in the order of the table."""
    return [entry for entry in section.entries if entry.rank is not None]


def shown_name(entry: Entry) -> str:
    """The label with its marks, as in the table."""
    return f"{text.printable(entry.label)}{text.marks(entry)}"


def remarks(section: Section, entries: Sequence[Entry], *reading: str) -> str:
    """One line on the runs, on how to read the figure, and on the marks in it.

    Args:
      section: of the figure.
      entries: that are drawn.
      reading: what is special about the figure, phrase by phrase.
    """
    shown = {mark for entry in entries for mark in text.marks(entry)}
    notes = [note for note in text.footnotes(section) if note[0] in shown]
    words = [f"{text.title(section)}: {text.subtitle(section)}"]
    words += [text.state(section)] * section.partial
    # A mark stays with its first word where lines are broken.
    notes = [note.replace(" ", "\N{NO-BREAK SPACE}", 1) for note in notes]
    return "; ".join([*words, *reading, *notes]) + "."


def unit(section: Section) -> str:
    """Of the ranking, as the label of an axis."""
    return UNITS[section.unit]
