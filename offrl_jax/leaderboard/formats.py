"""The leaderboard for machines and for web pages: JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from offrl_jax.leaderboard import progress, text, tuning
from offrl_jax.leaderboard.model import Cell, Entry, Leaderboard, Section
from offrl_jax.leaderboard.progress import Progress
from offrl_jax.leaderboard.published import PublishedTable
from offrl_jax.leaderboard.ranking import Bounds
from offrl_jax.leaderboard.tuning import Tuning
from offrl_jax.results import BEHAVIOUR

JSON_SCHEMA = 1
"""Version of the JSON layout, which is that of `model`."""

CSV_COLUMNS: tuple[str, ...] = (
    "suite",
    "family",
    "preset",
    "tuning",
    "updates",
    "protocol",
    "partial",
    "agent",
    "setting",
    "rank",
    "task",
    "unit",
    "statistic",
    "value",
    "low",
    "high",
    "seeds",
    "episodes",
    "diverged",
    "failed",
    "missing",
    "device_s_per_run",
    "episode_share",
)
"""One line per agent and statistic over `ranked tasks`, then one per agent and task."""


def to_json(board: Leaderboard) -> str:
    """Everything that is known, values of single runs included; keys sorted."""
    record = {"schema": JSON_SCHEMA, **plain(board)}
    return json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Dataclasses with their properties, as what JSON has."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        names += [name for name, kind in vars(type(value)).items() if _derived(kind)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _derived(attribute: Any) -> bool:
    return isinstance(attribute, property)


def to_csv(board: Leaderboard) -> str:
    """A flat table with the columns `CSV_COLUMNS`; empty where nothing is known.

    Measured numbers alone: those that others published have a CSV of their own.
    """
    lines: list[dict[str, Any]] = []
    for section in board.sections:
        common = {
            "suite": section.suite,
            "family": section.family,
            "preset": section.preset,
            "tuning": section.tuning,
            "updates": section.updates_total,
            "protocol": json.dumps(section.protocol, sort_keys=True),
            "partial": int(section.partial),
        }
        for entry in section.entries:
            for line in _csv_lines(section, entry):
                lines.append({**common, **line})
        for task in section.tasks:
            if task.behaviour is not None:
                line = {"agent": BEHAVIOUR, "task": task.task, "unit": task.unit}
                line |= {"statistic": "mean", "value": task.behaviour}
                lines.append({**common, **line})
    return _csv(CSV_COLUMNS, lines)


def progress_csv(sections: Iterable[Progress]) -> str:
    """The points of `progress.build` with the columns `progress.COLUMNS`."""
    return _csv(progress.COLUMNS, progress.table(sections))


def tuning_csv(sections: Iterable[Tuning]) -> str:
    """The points of `tuning.build` with the columns `tuning.COLUMNS`."""
    return _csv(tuning.COLUMNS, tuning.table(sections))


def _csv(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _csv_lines(section: Section, entry: Entry) -> Iterable[dict[str, Any]]:
    common = {
        "agent": entry.agent,
        "setting": entry.setting,
        "rank": entry.rank,
        "device_s_per_run": entry.cost_s,
    }
    overall = {
        "iqm": entry.iqm,
        "mean": entry.mean,
        "median": entry.median,
        "optimality_gap": entry.optimality_gap,
        "leader_better": entry.leader_better,
    }
    for name, bounds in overall.items():
        if bounds is not None:
            line = {"task": "ranked tasks", "unit": section.unit, "statistic": name}
            line |= {"episode_share": entry.episode_share}
            yield {**common, **line, **_csv_bounds(bounds)}
    for task, cell in zip(section.tasks, entry.cells, strict=True):
        line = {"task": task.task, "unit": task.unit, "statistic": "mean"}
        yield {**common, **line, **_csv_bounds(cell.mean), **_csv_counts(cell)}


def _csv_bounds(bounds: Bounds | None) -> dict[str, float | None]:
    return dataclasses.asdict(bounds) if bounds else {}


def _csv_counts(cell: Cell) -> dict[str, float | None]:
    return {
        "seeds": len(cell.seeds),
        "episodes": cell.episodes,
        "diverged": len(cell.diverged),
        "failed": len(cell.failed),
        "missing": len(cell.missing),
        "episode_share": cell.episode_share,
    }


def to_markdown(board: Leaderboard) -> str:
    """Pipe tables as GitHub draws them; names are escaped."""
    parts: list[str] = []
    for section in board.sections:
        parts += _markdown_section(section)
    for published in board.published:
        parts += _markdown_published(published)
    parts += [f"> {escape(message)}\n" for message in board.messages]
    parts.append(f"<sub>{escape(text.HOW_TO_READ)}</sub>\n")
    return "\n".join(parts)


def _markdown_published(table: PublishedTable) -> list[str]:
    lines = [
        [*map(escape, (s.task, s.agent, f"{s.score:g}", s.spread, s.conditions))]
        for s in table.scores
    ]
    header = ("task", "agent", "score", "spread", "conditions")
    return [
        f"## {escape(table.family)}: {text.PUBLISHED}\n",
        f"Source: {escape(table.source)}\n",
        pipe_table(header, lines, left=(0, 1, 4)),
    ]


def _markdown_section(section: Section) -> list[str]:
    parts = [f"## {escape(text.title(section))}\n"]
    if section.partial:
        parts.append(f"**{text.state(section)}**\n")
    parts.append(f"{escape(text.subtitle(section))}\n")
    if section.devices:
        parts.append(f"Devices: {escape(', '.join(section.devices))}\n")
    unit = "IQM" if section.unit == "score" else "IQM return"
    header = ["rank", "agent", unit, "95 % interval", "mean", "median"]
    header += ["optimality gap", "P(lead)", "seeds x episodes", "episode noise"]
    header += ["s/run"]
    tuned = any(entry.tuned for entry in section.entries)
    header += ["tuning settings x seeds"] * tuned
    lines = []
    for entry in section.entries:
        line = [
            str(entry.rank or text.DASH),
            _markdown_label(entry),
            _first_bold(entry),
            text.interval(entry.iqm),
            text.estimate(entry.mean),
            text.estimate(entry.median),
            text.estimate(entry.optimality_gap),
            f"{text.probability(entry)} {_two_decimals(entry.leader_better)}".strip(),
            text.runs(entry.cells),
            text.percentage(entry.episode_share),
            text.seconds(entry.cost_s),
        ]
        if tuned:
            line.append("x".join(map(str, entry.tuned)) if entry.tuned else "")
        lines.append(line)
    with_data = text.has_behaviour(section)
    if with_data:
        behaviour = ["", f"*{BEHAVIOUR}*", "", ""]
        behaviour.append(text.number(text.behaviour_mean(section)))
        lines.append(behaviour + [""] * (len(header) - len(behaviour)))
    parts.append(pipe_table(header, lines, left=(1,)))
    parts += [f"{escape(note)}\n" for note in text.footnotes(section)]
    parts += [f"> Warning: {escape(warning)}\n" for warning in section.warnings]

    header = ["task", *map(_markdown_label, section.entries)]
    header += [f"*{BEHAVIOUR}*"] * with_data
    lines = []
    for i, task in enumerate(section.tasks):
        name = escape(task.task) + (" (raw return)" if task.unit == "return" else "")
        means = [entry.cells[i].mean for entry in section.entries]
        values = list(map(_markdown_mean, means))
        values += [text.number(task.behaviour)] * with_data
        lines.append([name, *values])
    parts.append(pipe_table(header, lines, left=(0,)))
    parts += [f"- {escape(line)}" for line in section.absent]
    return [*parts, ""] if section.absent else parts


def _two_decimals(bounds: Bounds | None) -> str:
    if bounds is None or bounds.low is None or bounds.high is None:
        return ""
    return f"[{bounds.low:.2f}, {bounds.high:.2f}]"


def _first_bold(entry: Entry) -> str:
    iqm = text.estimate(entry.iqm)
    return f"**{iqm}**" if entry.rank == 1 else iqm


def _markdown_mean(bounds: Bounds | None) -> str:
    """The mean above its interval: beside each other a page holds half the agents."""
    interval = text.interval(bounds)
    below = f"<br><sub>{interval}</sub>" if interval else ""
    return text.estimate(bounds) + below


def _markdown_label(entry: Entry) -> str:
    return escape(entry.label + text.marks(entry))


def pipe_table(
    header: Sequence[str], lines: Iterable[Sequence[str]], *, left: tuple[int, ...]
) -> str:
    """A table whose columns `left` are flush left, the others right."""
    rule = [":---" if i in left else "---:" for i in range(len(header))]
    rows = [header, rule, *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def escape(name: str) -> str:
    """Backslashes before everything that Markdown or HTML could take as markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", text.printable(name))
