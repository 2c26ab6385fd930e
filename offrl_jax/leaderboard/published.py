"""Numbers that others published: read, checked, and kept apart from measured ones."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections import defaultdict
from pathlib import Path

from offrl_jax.errors import ResultsError

FILE = "published.csv"
"""Name of the optional file in a results folder."""
COLUMNS = ("source", "family", "task", "agent", "score", "spread", "conditions")
"""Its header: where the number was published, normalised scores x100, free text."""
_REQUIRED = ("source", "family", "task", "agent", "score")


@dataclasses.dataclass(frozen=True)
class PublishedScore:
    """One number as its source has it.

    Attributes:
      task: as the source calls it.
      agent: as the source calls it.
      score: normalised, x100.
      spread: such as `± 2.1 (s.d., 4 seeds)`; empty where the source has none.
      conditions: such as data, updates and which checkpoint.
    """

    task: str
    agent: str
    score: float
    spread: str
    conditions: str


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """Numbers of one source on one family of tasks.

    Attributes:
      source: where they were published.
      family: of tasks.
      scores: in the order of the file.
    """

    source: str
    family: str
    scores: tuple[PublishedScore, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks, sorted."""
        return tuple(sorted({score.task for score in self.scores}))

    @property
    def agents(self) -> tuple[str, ...]:
        """Agents in the order of the file."""
        return tuple(dict.fromkeys(score.agent for score in self.scores))

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the source says of its conditions, each once."""
        found = (score.conditions for score in self.scores if score.conditions)
        return tuple(dict.fromkeys(found))


def read_published(folder: Path) -> tuple[PublishedTable, ...]:
    """Tables of `published.csv` in a results folder, by family and source.

    Raises:
      ResultsError: with file and line: no UTF-8, another header, a line of another
        length, an empty name, a score that is no finite number, or the same number
        twice.
    """
    path = folder / FILE
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, line) for line in reader]
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeError, csv.Error) as error:
        raise ResultsError(
            f"{path}: cannot be read as CSV ({error}); mend or remove it"
        ) from error
    header = lines[0][1] if lines else []
    _check_header(path, header)
    tables: dict[tuple[str, str], dict[tuple[str, str], PublishedScore]]
    tables = defaultdict(dict)
    for number, line in lines[1:]:
        if not line:
            continue
        where = f"{path}:{number}"
        if len(line) != len(header):
            raise ResultsError(
                f"{where}: {len(line)} values for {len(header)} columns; put text with "
                "commas in double quotes"
            )
        record = {n: v.strip() for n, v in zip(header, line, strict=True)}
        for name in _REQUIRED:
            if not record[name]:
                raise ResultsError(f"{where}: {name} is empty; fill it in")
        own = tables[record["family"], record["source"]]
        key = record["task"], record["agent"]
        if key in own:
            raise ResultsError(
                f"{where}: a second number of {key[1]} on {key[0]} from that source; "
                "keep one, or name the two agents apart"
            )
        own[key] = PublishedScore(
            *key, _score(record["score"], where), record["spread"], record["conditions"]
        )
    return tuple(
        PublishedTable(source, family, tuple(own.values()))
        for (family, source), own in sorted(tables.items())
    )


def _check_header(path: Path, header: list[str]) -> None:
    if sorted(header) == sorted(COLUMNS):
        return
    unknown = [name for name in header if name not in COLUMNS]
    missing = [name for name in COLUMNS if name not in header]
    what = [f"unknown column '{name}'" for name in unknown]
    what += [f"no column '{name}'" for name in missing]
    raise ResultsError(
        f"{path}:1: {', '.join(what) or 'a column is there twice'}; the header is "
        f"{','.join(COLUMNS)}"
    )


def _score(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ResultsError(
            f"{where}: score is '{text:.40}', expected a number (normalised, x100)"
        )
    return value
