"""The leaderboard for a terminal, or as plain text of a given width."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from offrl_jax.leaderboard import text
from offrl_jax.leaderboard.model import Cell, Entry, Leaderboard, Section
from offrl_jax.leaderboard.published import PublishedTable
from offrl_jax.results import BEHAVIOUR

_STRIP = range(10, 29)  # widths worth drawing
GAP = 2  # between two columns: one of padding, one of the box
LABEL = 28  # longer labels are folded
_ABSENT_LINES = 20


def draw(board: Leaderboard, *, width: int, colour: bool) -> str:
    """Draws all sections into `width` columns; without `colour` it is plain text."""
    buffer = io.StringIO()
    console = console_on(buffer, width, colour)
    for section in board.sections:
        _section(console, section, width)
    for published in board.published:
        _published(console, published)
    for message in board.messages:
        console.print(Text(f"note: {text.printable(message)}", "yellow"))
    console.print(Text(text.HOW_TO_READ, "dim"))
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return "\n".join(lines) + "\n"


def console_on(file: io.StringIO, width: int, colour: bool) -> Console:
    """A console whose bytes depend on nothing but its arguments."""
    return Console(
        file=file,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        legacy_windows=False,
        highlight=False,
        emoji=False,
        markup=False,
        _environ={},  # a width or colour wish of the environment would change the bytes
    )


def _published(console: Console, published: PublishedTable) -> None:
    """One line per number, its spread beside it; the conditions below."""
    console.print(Text(f"{text.printable(published.family)}: {text.PUBLISHED}", "bold"))
    console.print(Text(f"source: {text.printable(published.source)}", "dim"))
    console.print()
    conditions = published.conditions
    drawn = grid()
    for name in ("task", "agent", "score", "spread"):
        drawn.add_column(name, justify="right" if name == "score" else "left")
    several = len(conditions) > 1
    if several:
        drawn.add_column("conditions", justify="right")
    for score in published.scores:
        values = [text.cut(text.printable(name)) for name in (score.task, score.agent)]
        values += [f"{score.score:g}", text.printable(score.spread)]
        if several:
            own = conditions.index(score.conditions) + 1 if score.conditions else ""
            values.append(f"({own})" if own else "")
        drawn.add_row(*map(Text, values))
    console.print(drawn)
    for i, condition in enumerate(conditions, start=1):
        mark = f"({i}) " if several else "conditions: "
        console.print(Text(f"{mark}{text.printable(condition)}", "dim"))
    console.print()


def _section(console: Console, section: Section, width: int) -> None:
    heading = Text(text.title(section), "bold")
    if section.partial:
        heading.append(f"   {text.state(section)}", "bold red")
    console.print(heading)
    console.print(Text(text.subtitle(section), "dim"))
    if section.devices:
        console.print(Text(text.printable(", ".join(section.devices)), "dim"))
    console.print()
    console.print(_ranking(section, width))
    for note in text.footnotes(section):
        console.print(Text(note, "dim"))
    for warning in section.warnings:
        console.print(Text(f"warning: {text.printable(warning)}", "yellow"))
    console.print()
    for block in _task_blocks(section, width):
        console.print(block)
    shown = section.absent[:_ABSENT_LINES]
    for line in shown:
        console.print(Padding(Text(text.printable(line), "red"), (0, 0, 0, 2)))
    if len(section.absent) > len(shown):
        more = len(section.absent) - len(shown)
        console.print(Text(f"  and {more} more (all in --format json)", "red"))
    if shown:
        console.print()


def grid() -> Table:
    """An empty table with a rule below its header."""
    return Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
        show_edge=False,
    )


def _ranking(section: Section, width: int) -> Table:
    unit = "IQM" if section.unit == "score" else "IQM return"
    tuned = any(entry.tuned for entry in section.entries)
    header = ["#", "agent", unit, "95 % interval", "", "mean", "median", "gap"]
    header += ["P(lead)", "runs", "s/run"] + ["tuned"] * tuned
    lines: list[list[Text]] = []
    for entry in section.entries:
        own = "bold" if entry.rank == 1 else ""
        values = [
            str(entry.rank or text.DASH),
            _label(entry),
            text.estimate(entry.iqm),
            text.interval(entry.iqm),
            "",
            text.estimate(entry.mean),
            text.estimate(entry.median),
            text.estimate(entry.optimality_gap),
            text.probability(entry),
            text.runs(entry.cells),
            text.seconds(entry.cost_s),
        ]
        if tuned:
            values.append("x".join(map(str, entry.tuned)) if entry.tuned else "")
        lines.append([Text(value, own) for value in values])
    if text.has_behaviour(section):
        mean = text.number(text.behaviour_mean(section))
        behaviour = ["", BEHAVIOUR, *[""] * 3, mean]
        behaviour += [""] * (len(header) - len(behaviour))
        lines.append([Text(value, "dim") for value in behaviour])

    def spread(columns: list[int]) -> int:
        widest = [max(len(header[i]), *(len(r[i]) for r in lines)) for i in columns]
        return sum(min(w, LABEL) for w in widest) + GAP * (len(columns) - 1)

    # Narrow terminals lose what the machine-readable formats keep.
    columns = list(range(len(header)))
    for dropped in (7, 6, 5, 9):
        if spread([c for c in columns if c != 4]) > width:
            columns.remove(dropped)
    room = width - spread([c for c in columns if c != 4]) - GAP
    if room < _STRIP.start:
        columns.remove(4)
    else:
        strips = _strips(section, min(room, _STRIP.stop - 1))
        for line, strip in zip(lines, strips, strict=False):
            line[4] = Text(strip, "cyan")
    table = grid()
    left = {"agent", "95 % interval"}
    for c in columns:
        table.add_column(
            header[c],
            justify="left" if header[c] in left or c == 4 else "right",
            no_wrap=header[c] != "agent",
            overflow="fold",
            max_width=LABEL,
        )
    for i, line in enumerate(lines):
        end = i == len(lines) - 2
        table.add_row(*(line[c] for c in columns), end_section=end)
    return table


def _label(entry: Entry) -> str:
    return f"{text.cut(text.printable(entry.label))}{text.marks(entry)}"


def _strips(section: Section, width: int) -> list[str]:
    """Every IQM with its interval on one common scale, `──●──`, one per entry."""
    points = [
        tuple(b.value if end is None else end for end in (b.low, b.value, b.high))
        for entry in section.entries
        if (b := entry.iqm)
    ]
    if not points:
        return []
    low, high = min(p[0] for p in points), max(p[2] for p in points)
    scale = (width - 1) / (high - low) if high > low else 0.0
    strips = []
    for entry in section.entries:
        if entry.iqm is None:
            strips.append("")
            continue
        ends = points[len(strips)]  # ranked entries come first
        start, middle, end = (round((value - low) * scale) for value in ends)
        line = [" "] * width
        line[start : end + 1] = "─" * (end + 1 - start)
        line[middle] = "●"
        strips.append("".join(line))
    return strips


def _task_blocks(section: Section, width: int) -> list[Padding]:
    """Means per task, agents as columns in the order of ranks, in blocks that fit."""
    tasks = [text.cut(text.printable(task.task)) for task in section.tasks]
    marked = [f"{name}{_unit_mark(section, i)}" for i, name in enumerate(tasks)]
    columns: list[tuple[str, list[Text]]] = [
        (_label(entry), [_value(cell) for cell in entry.cells])
        for entry in section.entries
    ]
    if text.has_behaviour(section):
        datasets = [Text(text.number(task.behaviour), "dim") for task in section.tasks]
        columns.append((BEHAVIOUR, datasets))
    for i in range(len(section.tasks)):
        values = [e.cells[i].mean for e in section.entries]
        best = max((v.value for v in values if v), default=None)
        for bounds, (_, own) in zip(values, columns, strict=False):
            if bounds and bounds.value == best:
                own[i].stylize("bold", 0, own[i].plain.find("\n"))
    return list(blocks("task", marked, columns, width))


def blocks(
    title: str,
    names: Sequence[str],
    columns: Iterable[tuple[str, Sequence[Text]]],
    width: int,
) -> Iterator[Padding]:
    """Tables of a line per name, with as many columns each as fit into `width`.

    Args:
      title: of the names.
      names: of the lines.
      columns: header and values; those that do not fit go into the next table.
      width: of the terminal.
    """
    room = width - max(len(title), *map(len, names)) - GAP
    parts: list[list[tuple[str, Sequence[Text]]]] = [[]]
    used = 0
    for column in columns:
        needed = GAP + max(
            len(line)
            for value in [column[0], *(v.plain for v in column[1])]
            for line in value.split("\n")
        )
        if parts[-1] and used + needed > room:
            parts.append([])
            used = 0
        parts[-1].append(column)
        used += needed
    for part in parts:
        table = grid()
        table.add_column(title, overflow="fold")
        for label, _ in part:
            table.add_column(label, justify="right", overflow="fold")
        for i, name in enumerate(names):
            table.add_row(Text(name), *(values[i] for _, values in part))
        yield Padding(table, (0, 0, 1, 0))


def _unit_mark(section: Section, index: int) -> str:
    return "" if section.tasks[index].unit == "score" else " (raw return)"


def _value(cell: Cell) -> Text:
    """Mean and, below it, its interval."""
    value = Text(text.estimate(cell.mean))
    value.append(f"\n{text.interval(cell.mean)}", "dim")
    return value
