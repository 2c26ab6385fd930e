"""Training metrics on disk: what the updates reported, averaged over intervals.

They explain a run and never rank it: no field of a row, nothing of a leaderboard comes
from here, and a results folder without them is whole.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from offrl_jax.errors import ResultsError
from offrl_jax.results.lines import LineFile, OnMessage, read_lines

SCHEMA = 1
"""Version of the point's fields; another schema is refused, never guessed at."""


class PointKey(NamedTuple):
    """What a results folder may hold only once."""

    run_id: str
    task: str
    setting: str
    seed: int
    phase: str
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricPoint:
    """The metrics of one member over one interval of updates.

    Attributes:
      run_id: the job of the plan, and the name of the file.
      agent: label, as in `Row`.
      task: task id with its version.
      setting: name of a setting.
      seed: of the member.
      phase: name of the agent's phase.
      step: updates of that phase done at the end of the interval, which began at the
        step of the point before (or at 0).
      values: by metric name, the mean over the interval's calls of the phase, in the
        metric's own unit; NaN (null on disk) from the interval on in which the member
        diverged.
    """

    run_id: str
    agent: str
    task: str
    setting: str
    seed: int
    phase: str
    step: int
    values: Mapping[str, float]

    @property
    def key(self) -> PointKey:
        """What must be unique in a results folder."""
        return PointKey(
            self.run_id, self.task, self.setting, self.seed, self.phase, self.step
        )

    def __eq__(self, other: object) -> bool:
        """Equal content; NaN equals NaN."""
        return isinstance(other, MetricPoint) and _to_line(self) == _to_line(other)

    def __hash__(self) -> int:
        return hash(self.key)


_TYPES: dict[str, type] = {
    "run_id": str,
    "agent": str,
    "task": str,
    "setting": str,
    "seed": int,
    "phase": str,
    "step": int,
    "values": dict,
}


class MetricFile:
    """The append-only metric file of one job; safe against crashes like `RowFile`.

    Attributes:
      path: the file.
      keys: of all points that the file holds.

    Raises:
      ResultsError: the folder cannot be written, or the file holds no points of
        `SCHEMA`.
    """

    def __init__(self, path: Path, on_message: OnMessage) -> None:
        self.path = path
        self._lines = LineFile(path, on_message, "its interval will be repeated")
        try:
            self.keys = {_from_record(*record).key for record in self._lines.found}
        except BaseException:
            self._lines.close()
            raise

    def append(self, points: Iterable[MetricPoint]) -> None:
        """Writes the points whose keys are not there; all are on disk on return.

        What a killed process wrote stays: where training is reproducible bit for bit
        the point would be the same, and where it is not (another number of devices),
        the older one belongs to the rows of that time.

        Raises:
          ResultsError: the disk is full or fails, after which the file is as it was
            before.
        """
        new = {
            point.key: _to_line(point) for point in points if point.key not in self.keys
        }
        if new:
            self._lines.append(new.values())
            self.keys |= new.keys()

    def close(self) -> None:
        """Closes the file; points are on disk already."""
        self._lines.close()

    def __enter__(self) -> MetricFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(
    folder: Path | str, on_message: OnMessage = warnings.warn
) -> list[MetricPoint]:
    """Every point of all `metrics/*.jsonl` and `metrics/*.jsonl.gz` below `folder`.

    Args:
      folder: of results.
      on_message: told of a torn last line, which is skipped; default a warning.

    Returns:
      The points, by run, task, setting and seed, each in the order of its training;
      repeated equal points once, none where nothing was recorded.

    Raises:
      ResultsError: with file and line: no JSON, another schema, or a point that differs
        from another one of the same key.
    """
    kept: dict[PointKey, tuple[str, MetricPoint]] = {}
    for where, content in read_lines(Path(folder), "metrics", on_message):
        point = _from_record(where, content)
        first = kept.setdefault(point.key, (where, point))
        if first[1] != point:
            raise ResultsError(
                f"{where}: differs from {first[0]} for the same run {point.run_id}, "
                f"task {point.task}, setting {point.setting}, seed {point.seed}, phase "
                f"{point.phase}, step {point.step}; keep one of the two"
            )
    points = [point for _, point in kept.values()]
    # A phase begins when the one before is over, so files know their order.
    phases: dict[tuple[str, str], int] = {}
    for point in points:
        phases.setdefault((point.run_id, point.phase), len(phases))
    return sorted(
        points,
        key=lambda point: (
            point.run_id,
            point.task,
            point.setting,
            point.seed,
            phases[point.run_id, point.phase],
            point.step,
        ),
    )


def _to_line(point: MetricPoint) -> str:
    """The point as one line of JSON without newline; what is not finite is null."""
    fields = {name: getattr(point, name) for name in _TYPES}
    fields["values"] = {
        name: value if math.isfinite(value) else None
        for name, value in point.values.items()
    }
    return json.dumps(
        {"schema": SCHEMA, **fields}, separators=(",", ":"), allow_nan=False
    )


def _from_record(where: str, record: Any) -> MetricPoint:
    """Builds a point from parsed JSON; `where` (file and line) heads an error."""
    if not isinstance(record, dict) or "schema" not in record:
        raise ResultsError(
            f"{where}: not a metric of offrl_jax (no 'schema'); move the file out of "
            "metrics/"
        )
    if record["schema"] != SCHEMA:
        raise ResultsError(
            f"{where}: schema {record['schema']!r}, this version reads {SCHEMA}; use "
            "the version of offrl_jax that wrote it"
        )
    if record.keys() != {"schema", *_TYPES}:
        wrong = ", ".join(sorted(record.keys() ^ {"schema", *_TYPES}))
        raise ResultsError(
            f"{where}: missing or unknown fields: {wrong}; restore the file or move it "
            "out of metrics/"
        )
    for name, kind in _TYPES.items():
        if not isinstance(record[name], kind):
            raise ResultsError(
                f"{where}: field '{name}' is {record[name]!r:.40}, expected "
                f"{kind.__name__}; restore the file"
            )
    values = record["values"]
    for name, value in values.items():
        if value is not None and not isinstance(value, int | float):
            raise ResultsError(
                f"{where}: metric '{name}' is {value!r:.40}, expected a number or null;"
                " restore the file"
            )
    fields = {name: record[name] for name in _TYPES}
    fields["values"] = {
        name: math.nan if value is None else float(value)
        for name, value in values.items()
    }
    return MetricPoint(**fields)
