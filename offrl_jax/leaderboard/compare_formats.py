"""Comparisons of two results folders as terminal table, Markdown and JSON."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from offrl_jax.leaderboard import compare, formats, table, text
from offrl_jax.leaderboard.compare import (
    AgentDifference,
    Comparison,
    Comparisons,
    TaskDifference,
)
from offrl_jax.leaderboard.ranking import Bounds
from offrl_jax.leaderboard.sections import RETURN, name_seeds
from offrl_jax.leaderboard.statistics import REPLICATIONS

JSON_SCHEMA = 1
"""Version of the JSON layout, which is that of `compare.Comparisons`."""

HOW_TO_READ = (
    "B - A: IQM of B less that of A over the tasks that both have, scores x100; [ ]: "
    f"95 % interval, runs resampled within tasks, {REPLICATIONS:,} times: the runs of "
    "a seed together where both sides have the same seeds (pairs), else each side "
    "alone. better, worse: the interval lies above, below 0. tasks: better / worse / "
    "undecided, each by its own interval. P(B>A): probability that a run of B beats "
    "one of A. s/run: B / A."
)

_STYLES = {compare.BETTER: "green", compare.WORSE: "bold red"}
_LISTED = 20  # lines of what is absent or unmatched


def caveat(found: Comparisons) -> str:
    """What many comparisons at once mean; empty for a single one."""
    count = len(found.agents)
    if count < 2:
        return ""
    return (
        f"{count} agents are compared, without correction for their number: of agents "
        f"that did not change, one in twenty shows a difference by chance, here "
        f"{count / 20:.2g} on average; tasks likewise."
    )


def to_json(found: Comparisons) -> str:
    """Everything that is known, values of single runs included; keys sorted."""
    record = {"schema": JSON_SCHEMA, **formats.plain(found)}
    return json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"


def signed(value: float | None) -> str:
    """`+1.2`, `-0.3`, `0.0`."""
    shown = text.number(value)
    return f"+{shown}" if value is not None and value > 0 and shown != "0.0" else shown


def _interval(bounds: Bounds | None) -> str:
    if bounds is None or bounds.low is None:
        return ""
    return f"[{signed(bounds.low)}, {signed(bounds.high)}]"


def _difference(bounds: Bounds | None) -> str:
    return signed(bounds.value if bounds else None)


def _probability(bounds: Bounds | None) -> str:
    if bounds is None:
        return text.DASH
    ends = "" if bounds.low is None else f" [{bounds.low:.2f}, {bounds.high:.2f}]"
    return f"{bounds.value:.2f}{ends}"


def _ratio(agent: AgentDifference) -> str:
    return text.DASH if agent.cost_ratio is None else f"x{agent.cost_ratio:.2f}"


def _tasks(agent: AgentDifference) -> str:
    return f"{agent.better} / {agent.worse} / {agent.undecided}"


def _runs(agent: AgentDifference) -> str:
    """Seeds x episodes of both sides, `10x100`, or `10x100 : 8x100`."""
    shown = [
        f"{text.span(len(side.seeds) for side in sides)}x"
        f"{text.span(side.episodes for side in sides)}"
        for sides in (
            [task.baseline for task in agent.tasks],
            [task.change for task in agent.tasks],
        )
    ]
    return shown[0] if shown[0] == shown[1] else " : ".join(shown)


def _label(agent: AgentDifference) -> str:
    marks = text.FEW_MARK * agent.few + text.DIVERGED_MARK * bool(agent.diverged)
    return agent.label + marks + text.INCOMPLETE_MARK * agent.incomplete


def _heading(section: Comparison) -> str:
    return text.heading("", section.family, section.preset)


def _subtitle(section: Comparison) -> str:
    tasks = {task.task for agent in section.agents for task in agent.tasks}
    pairs = sum(agent.paired for agent in section.agents)
    count = len(section.agents)
    how = "paired by seed" if pairs == count else "seeds differ, sides drawn apart"
    if 0 < pairs < count:
        how = f"{pairs} of {count} agents paired by seed, the others' seeds differ"
    protocol = ", ".join(f"{n} {v}" for n, v in sorted(section.protocol.items()))
    return (
        f"{len(tasks)} task{'s' * (len(tasks) != 1)}, {section.updates_total:,} "
        f"{text.steps_name(section.family)}, {how}; protocol: {protocol}"
    )


def _notes(section: Comparison) -> Iterator[str]:
    """What the marks mean, and which agents are not judged, and why."""
    used = "".join(_label(agent)[len(agent.label) :] for agent in section.agents)
    yield from text.meanings(
        used, any(t.unit == RETURN for a in section.agents for t in a.tasks)
    )
    for agent in section.agents:
        if agent.verdict == compare.UNJUDGED:
            why = (
                "a single run per task and side has no interval"
                if agent.pooled
                else "raw returns of several tasks are not pooled, choose one by --task"
            )
            yield f"{text.printable(agent.label)}: not judged, {why}"
        yield from (f"{text.printable(agent.label)}: {how}" for how in _seeds(agent))
        left = [task.task for task in agent.tasks if task.difference is None]
        if left:
            names = text.printable(", ".join(left))
            yield (
                f"{text.printable(agent.label)}: without runs of both sides, "
                f"left out: {names}"
            )


def _seeds(agent: AgentDifference) -> list[str]:
    """Where the seeds of both sides differ, and what they are."""
    found: dict[str, int] = defaultdict(int)
    for task in agent.tasks:
        a, b = task.baseline.seeds, task.change.seeds
        if a and b and a != b:
            found[f"{name_seeds(a)} in A, {name_seeds(b)} in B"] += 1
    return [
        f"{what} on {count} task{'s' * (count > 1)}, so not paired"
        for what, count in sorted(found.items())
    ]


def _common(found: Comparisons) -> str:
    cells = f"{found.cells} cells (agent, setting, task) in both"
    alone = found.unmatched_baseline, found.unmatched_change
    return f"{cells}, {alone[0]} of A and {alone[1]} of B without a counterpart"


_HEADER = ("agent", "IQM A", "IQM B", "B - A", "95 % interval")
_HEADER += ("mean B - A", "P(B>A)", "tasks", "runs", "s/run", "verdict")


def _line(agent: AgentDifference) -> list[str]:
    return [
        text.printable(_label(agent)),
        text.number(agent.baseline_iqm),
        text.number(agent.change_iqm),
        _difference(agent.iqm),
        _interval(agent.iqm),
        f"{_difference(agent.mean)} {_interval(agent.mean)}".strip(),
        _probability(agent.improvement),
        _tasks(agent),
        _runs(agent),
        _ratio(agent),
        agent.verdict,
    ]


def to_markdown(found: Comparisons) -> str:
    """Pipe tables as GitHub draws them; names are escaped."""
    escape = formats.escape
    parts = [
        f"A (baseline): {escape(found.baseline)}  \nB (change): "
        f"{escape(found.change)}\n",
        f"{_common(found)}\n",
    ]
    for section in found.sections:
        parts.append(f"## {escape(_heading(section))}\n")
        parts.append(f"{escape(_subtitle(section))}\n")
        lines = []
        for agent in section.agents:
            line = [escape(value) for value in _line(agent)]
            line[3] = f"**{line[3]}**"
            lines.append(line)
        parts.append(formats.pipe_table(_HEADER, lines, left=(0, 10)))
        parts += [f"{escape(note)}\n" for note in _notes(section)]
        parts += [f"> Warning: {escape(line)}\n" for line in section.warnings]
        header = ("agent", "task", "A", "B", "B - A", "95 % interval")
        header += ("seeds A", "seeds B", "equal runs", "verdict")
        parts.append(formats.pipe_table(header, _task_lines(section), left=(0, 1, 9)))
        parts += _items(section.absent)
    parts += _items(found.unmatched)
    parts += [f"> {escape(message)}\n" for message in found.messages]
    parts += [f"<sub>{escape(line)}</sub>\n" for line in _legend(found)]
    return "\n".join(parts)


def _items(lines: Sequence[str]) -> list[str]:
    found = [f"- {formats.escape(line)}" for line in lines]
    return [*found, ""] if found else []


def _legend(found: Comparisons) -> list[str]:
    return [line for line in (caveat(found), HOW_TO_READ) if line]


def _task_lines(section: Comparison) -> Iterable[list[str]]:
    for agent in section.agents:
        for task in agent.tasks:
            yield [
                formats.escape(agent.label),
                formats.escape(task.task) + _unit(task),
                text.number(task.baseline.mean),
                text.number(task.change.mean),
                _difference(task.difference),
                _interval(task.difference),
                str(len(task.baseline.seeds)),
                str(len(task.change.seeds)),
                str(len(task.equal)),
                task.verdict,
            ]


def _unit(task: TaskDifference) -> str:
    return " (raw return)" if task.unit == RETURN else ""


def to_table(found: Comparisons, *, width: int, colour: bool) -> str:
    """For a terminal of `width` columns; without `colour` it is plain text."""
    buffer = io.StringIO()
    console = table.console_on(buffer, width, colour)
    console.print(Text(f"A  {text.printable(found.baseline)}   (baseline)", "bold"))
    console.print(Text(f"B  {text.printable(found.change)}   (change)", "bold"))
    console.print(Text(_common(found), "dim"))
    for section in found.sections:
        console.print()
        console.print(Text(_heading(section), "bold"))
        console.print(Text(_subtitle(section), "dim"))
        console.print()
        console.print(_agents(section, width))
        for note in _notes(section):
            console.print(Text(note, "dim"))
        for warning in section.warnings:
            console.print(Text(f"warning: {text.printable(warning)}", "yellow"))
        console.print()
        for block in _blocks(section, width):
            console.print(block)
        for line in _first(section.absent):
            console.print(Padding(Text(line, "red"), (0, 0, 0, 2)))
    for line in _first(found.unmatched):
        console.print(Text(line, "yellow"))
    for message in found.messages:
        console.print(Text(f"note: {text.printable(message)}", "yellow"))
    for line in _legend(found):
        console.print(Text(line, "dim"))
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return "\n".join(lines) + "\n"


def _first(lines: Sequence[str]) -> Iterator[str]:
    yield from map(text.printable, lines[:_LISTED])
    if len(lines) > _LISTED:
        yield f"and {len(lines) - _LISTED} more (all in --format json)"


def _agents(section: Comparison, width: int) -> Table:
    lines = [_line(agent) for agent in section.agents]
    for line in lines:
        line[0] = text.cut(line[0])
    columns = list(range(len(_HEADER)))

    def needed() -> int:
        widest = [max(len(_HEADER[i]), *(len(li[i]) for li in lines)) for i in columns]
        widest[0] = min(widest[0], table.LABEL)
        return sum(widest) + table.GAP * (len(columns) - 1)

    # Narrow terminals lose what the other formats keep.
    for dropped in (5, 8, 9, 6, 7):
        if needed() > width:
            columns.remove(dropped)
    drawn = table.grid()
    left = {"agent", "95 % interval", "verdict"}
    for i in columns:
        drawn.add_column(
            _HEADER[i],
            justify="left" if _HEADER[i] in left else "right",
            no_wrap=i != 0,
            overflow="fold",
            max_width=table.LABEL if i == 0 else None,
        )
    for line in lines:
        style = _STYLES.get(line[-1], "")
        drawn.add_row(*(Text(line[i], style) for i in columns))
    return drawn


def _blocks(section: Comparison, width: int) -> Iterator[Padding]:
    """Differences per task, agents as columns, in blocks that fit."""
    tasks = sorted({task.task for agent in section.agents for task in agent.tasks})
    units = {t.task: _unit(t) for agent in section.agents for t in agent.tasks}
    names = [text.cut(text.printable(task)) + units[task] for task in tasks]
    columns: list[tuple[str, list[Text]]] = []
    for agent in section.agents:
        own = {task.task: task for task in agent.tasks}
        values = [_value(own.get(task)) for task in tasks]
        columns.append((text.cut(text.printable(agent.label)), values))
    yield from table.blocks("task (B - A)", names, columns, width)


def _value(task: TaskDifference | None) -> Text:
    """The difference and, below it, its interval."""
    if task is None:
        return Text(text.DASH)
    value = Text(_difference(task.difference), _STYLES.get(task.verdict, ""))
    if task.verdict == compare.IDENTICAL:
        value.append("\nidentical", "dim")
    else:
        value.append(f"\n{_interval(task.difference)}", "dim")
    return value
