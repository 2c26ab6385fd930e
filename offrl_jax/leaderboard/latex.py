r"""The leaderboard for a paper: tables of LaTeX, which need the package booktabs alone.

Every character of a name that TeX could take as a command is written out, and all
others than printable ASCII as the terminal shows them, so that any LaTeX compiles them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from offrl_jax.leaderboard import names, text
from offrl_jax.leaderboard.model import Entry, Leaderboard, Section
from offrl_jax.leaderboard.published import PublishedTable
from offrl_jax.leaderboard.ranking import Bounds, surely_highest
from offrl_jax.leaderboard.statistics import REPLICATIONS
from offrl_jax.results import BEHAVIOUR

TEXT_WIDTH = 388.0
"""Points of a line of 5.5 inches, as many conferences have, less 2 % for estimates."""
PAGE_ROWS = 40
"""Lines of a table that a page holds."""
_GAP = 6.0  # points between two columns, half of them at either side
# Points of a letter of Computer Modern at 8 points, and of a subscript's at 6.
_LETTER, _SMALL_LETTER = 4.25, 3.2
# Where a header may be broken: nowhere, before a setting, before a preset as well.
_BREAKS = (r"$^", r"(?<=.) (?=\[)", r"(?<=.)(?=@)| (?=\[)")
_HEADING = (
    "% Tables of offrl_jax. In the preamble: \\usepackage{booktabs}\n"
    "% A table too wide for a column of two: replace table by table*.\n"
)

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # Some languages of babel make quotes commands; in pairs they are ligatures.
    '"': r"\char34{}",
    "`": r"\char96{}",
    "'": r"\char39{}",
}
_MARKS = {
    text.FEW_MARK: "*",
    text.DIVERGED_MARK: r"\dagger",
    text.INCOMPLETE_MARK: r"\ddagger",
}


class _Column(NamedTuple):
    """A column: its alignment, its cells, the header first, and its width in points."""

    align: str
    cells: list[str]
    width: float


def escape(name: str) -> str:
    """`name` as text that LaTeX shows as it is, in a cell or in a caption."""
    shown = "".join(
        c if " " <= c <= "~" else c.encode("ascii", "backslashreplace").decode()
        for c in text.printable(name)
    )
    escaped = "".join(_ESCAPES.get(c, c) for c in shown)
    # Two hyphens would be a dash.
    return _start(re.sub(r"-(?=-)", "-{}", escaped))


def _start(cell: str) -> str:
    """Kept from being taken for an option of the end of the line before."""
    return f"{{{cell[0]}}}{cell[1:]}" if cell[:1] in ("[", "*") else cell


def to_latex(board: Leaderboard) -> str:
    """Two tables of every section: the ranking, and tasks by agents; then published."""
    parts = [_HEADING]
    stems = names.stems(board.sections)
    for section, stem in zip(board.sections, stems, strict=True):
        parts += [*_ranking(section, stem), *_tasks(section, stem)]
    for number, table in enumerate(board.published, start=1):
        parts += _published(table, number)
    parts += [f"% {escape(message)}\n" for message in board.messages]
    return "\n".join(parts)


def estimate(bounds: Bounds | None, *, bold: bool = False) -> str:
    """`$72.2_{[62.5, 85.2]}$`, or a dash."""
    if bounds is None:
        return "--"
    value = text.number(bounds.value)
    value = rf"\mathbf{{{value}}}" if bold else value
    interval = text.interval(bounds)
    return f"${value}_{{{interval}}}$" if interval else f"${value}$"


def _ranking(section: Section, stem: str) -> Iterator[str]:
    entries = section.entries
    tuned = any(entry.tuned for entry in entries)
    columns = [
        _column("r", r"\#", [str(entry.rank or "--") for entry in entries]),
        _column("l", "agent", [_name(entry) for entry in entries]),
        _column("r", "IQM", [estimate(entry.iqm) for entry in entries]),
        _column("r", "mean", [_value(entry.mean) for entry in entries]),
        _column("r", "median", [_value(entry.median) for entry in entries]),
        _column("r", "gap", [_value(entry.optimality_gap) for entry in entries]),
        _column("r", "P(lead)", [text.probability(entry) for entry in entries]),
        _column("r", "runs", [_runs(entry) for entry in entries]),
        _column("r", "s/run", [_plain(text.seconds(e.cost_s)) for e in entries]),
    ]
    if section.unit != "score":
        del columns[5]
    if tuned:
        cells = [
            r"${}\times{}$".format(*entry.tuned) if entry.tuned else ""
            for entry in entries
        ]
        columns.append(_column("r", "tuned", cells))
    last = []
    if text.has_behaviour(section):
        mean = _plain(text.number(text.behaviour_mean(section)))
        last = ["", BEHAVIOUR, "", mean, *[""] * (len(columns) - 4)]
    caption = " ".join([_about(section), *_ranking_words(section, tuned)])
    yield from _floats(columns, last, caption, f"{stem}-ranking")


def _tasks(section: Section, stem: str) -> Iterator[str]:
    tasks = section.tasks
    shown = [
        escape(name) + " (raw return)" * (task.unit != "score")
        for name, task in zip(names.short_tasks(section), tasks, strict=True)
    ]
    sure = [
        surely_highest([entry.cells[i].mean for entry in section.entries])
        for i in range(len(tasks))
    ]
    columns = [_column("l", "task", shown)]
    for j, entry in enumerate(section.entries):
        cells = [
            estimate(cell.mean, bold=best == j)
            for cell, best in zip(entry.cells, sure, strict=True)
        ]
        columns.append(_column("r", _name(entry), cells))
    if text.has_behaviour(section):
        values = [_plain(text.number(task.behaviour)) for task in tasks]
        columns.append(_column("r", BEHAVIOUR, values))
    caption = " ".join([_about(section), *_task_words(section)])
    for part in _blocks(columns):
        label = f"{stem}-tasks{part.number}"
        said = caption if part.first else f"Continued: {_about(section)}"
        yield from _floats(part.columns, [], said, label)


class _Block(NamedTuple):
    columns: list[_Column]
    number: str
    first: bool


def _published(table: PublishedTable, number: int) -> Iterator[str]:
    """Numbers of others, in a table of their own."""
    names_of = ("task", "agent", "spread", "conditions")
    columns = [
        _column(
            "l", name, [escape(getattr(score, name)) or "--" for score in table.scores]
        )
        for name in names_of
    ]
    scores = _column("r", "score", [f"{score.score:g}" for score in table.scores])
    caption = escape(f"{table.family}: {text.PUBLISHED}. Source: {table.source}.")
    yield from _floats(
        [*columns[:2], scores, *columns[2:]], (), caption, f"published-{number}"
    )


def _blocks(columns: Sequence[_Column]) -> list[_Block]:
    """The first column with as many others as a line holds, as often as needed."""
    head, *others = columns
    groups: list[list[_Column]] = [[]]
    used = head.width
    for column in others:
        if groups[-1] and used + _GAP + column.width > TEXT_WIDTH:
            groups.append([])
            used = head.width
        groups[-1].append(column)
        used += _GAP + column.width
    return [
        _Block([head, *group], f"-{i}" if len(groups) > 1 else "", i == 1)
        for i, group in enumerate(groups, start=1)
    ]


def _floats(
    columns: Sequence[_Column], last: Sequence[str], caption: str, label: str
) -> Iterator[str]:
    """Table environments of at most `PAGE_ROWS` lines; `last` ends the last one."""
    header, *lines = zip(*(column.cells for column in columns), strict=True)
    pages = [lines[i : i + PAGE_ROWS] for i in range(0, len(lines), PAGE_ROWS)]
    for number, page in enumerate(pages, start=1):
        body = [_line(header), r"\midrule", *map(_line, page)]
        if last and number == len(pages):
            body += [r"\midrule", _line(last)]
        several = len(pages) > 1
        said = f"{caption} Part {number} of {len(pages)}." if several else caption
        yield "\n".join(
            [
                r"\begin{table}[htbp]",
                r"\centering",
                r"\footnotesize",
                # Classes leave the room for a caption below its table.
                r"\setlength{\abovecaptionskip}{0pt}",
                r"\setlength{\belowcaptionskip}{6pt}",
                rf"\setlength{{\tabcolsep}}{{{_GAP / 2:g}pt}}",
                rf"\caption{{{said}}}",
                rf"\label{{tab:{label}{f'-part{number}' * several}}}",
                rf"\begin{{tabular}}{{@{{}}{''.join(c.align for c in columns)}@{{}}}}",
                r"\toprule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _column(align: str, header: str, cells: Sequence[str]) -> _Column:
    """A header longer than its cells is stacked."""
    widest = max(map(_points, cells), default=0.0)
    lines = _stacked(header, widest) if align == "r" else [header]
    if len(lines) > 1:
        header = r"\shortstack[r]{" + r" \\ ".join(map(_start, lines)) + "}"
    return _Column(align, [header, *cells], max(widest, *map(_points, lines)))


def _stacked(header: str, room: float) -> list[str]:
    """Lines of a header: a setting apart if it is too long, a preset if that helps."""
    options = [re.split(breaks, header) for breaks in _BREAKS]
    fitting = [lines for lines in options if max(map(_points, lines)) <= room]
    if fitting:
        return fitting[0]
    return min(options, key=lambda lines: max(map(_points, lines)))


def _points(cell: str) -> float:
    """An estimate of the width of a cell."""
    shown = re.sub(r"\\mathbf|\\text[a-z]+\{\}|\\char\d+\{\}|\\d+agger", "x", cell)
    value, _, interval = re.sub(r"[${}\\ ]", "", shown).partition("_[")
    return _LETTER * len(value) + _SMALL_LETTER * (len(interval) + bool(interval))


def _name(entry: Entry) -> str:
    marks = "".join(_MARKS[mark] for mark in text.marks(entry))
    return escape(entry.label) + (f"$^{{{marks}}}$" if marks else "")


def _value(bounds: Bounds | None) -> str:
    return _plain(text.number(bounds.value if bounds else None))


def _plain(number: str) -> str:
    """A number as mathematics, or else its minus would be a hyphen."""
    return "--" if number == text.DASH else f"${number.replace(',', '{,}')}$"


def _runs(entry: Entry) -> str:
    shown = text.runs(entry.cells)
    return "--" if shown == text.DASH else _times(shown)


def _times(shown: str) -> str:
    """`10x8-20` as mathematics, with a range as words have it."""
    seeds, _, episodes = shown.partition("x")
    return rf"{seeds.replace('-', '--')}$\times${episodes.replace('-', '--')}"


def _about(section: Section) -> str:
    """What was run."""
    state = f" {text.state(section)}." * section.partial
    protocol = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in sorted(section.protocol.items())
    )
    said = f"{text.title(section)}: {text.subtitle(section)}; protocol: {protocol}."
    return _words(said) + escape(state)


def _words(sentence: str) -> str:
    """Our own words: names inside are escaped, signs become those of TeX."""
    escaped = escape(sentence).replace(escape("·"), r"$\cdot$")
    return escaped.replace(" x ", r" $\times$ ")


def _ranking_words(section: Section, tuned: bool) -> Iterator[str]:
    yield (
        "IQM: mean of the middle half of all runs (task $\\times$ seed), with its "
        f"95\\,\\% interval, runs resampled within tasks, {REPLICATIONS:,} times."
    )
    yield (
        "Agents share a rank unless its first one is surely better: P(lead), the "
        "probability that a run of that one beats a run of this agent, has an interval "
        "above 0.5."
    )
    if section.unit == "score":
        yield "Scores: 0 random, 100 expert; gap: how far below 100, lower is better."
    else:
        yield "Raw returns of an episode, undiscounted."
    yield r"Runs: seeds $\times$ episodes; s/run: device seconds of training."
    if tuned:
        yield r"Tuned: settings tried $\times$ seeds."
    yield from _notes(section)


def _task_words(section: Section) -> Iterator[str]:
    yield (
        "Mean over seeds with its 95\\,\\% interval; bold where that interval lies "
        "above those of all other agents."
    )
    yield from _notes(section)


def _notes(section: Section) -> Iterator[str]:
    for note in text.footnotes(section):
        yield f"${_MARKS[note[0]]}$ {_words(note[2:])}."
