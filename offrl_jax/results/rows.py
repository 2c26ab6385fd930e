"""One evaluation of one member as a self-describing row, and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from offrl_jax.errors import ResultsError

SCHEMA = 1
"""Version of the row's fields; another schema is refused, never guessed at."""

BEHAVIOUR = "behaviour"
"""The agent name under which a dataset's own episode returns are written."""
ONLINE = "online"
"""The family of tasks without data, whose updates are environment steps."""

STATUSES = ("ok", "diverged", "failed")

NOT_CONTENT = frozenset(
    {
        "row_id",
        "updates_per_s",
        "wall_s",
        "compile_s",
        "eval_s",
        "device",
        "versions",
        "commit",
    }
)
"""Fields outside `row_id`: time, speed and host (hardware, packages, checkout).

`flags` (precision, determinism) and `population` (the split) do belong to the content:
both change the bits of a result.
"""


class RowKey(NamedTuple):
    """What a results folder may hold only once."""

    run_id: str
    task: str
    setting: str
    seed: int | None
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The outcome of evaluating one member at one step.

    `row_id` is computed when left empty.  Non-finite numbers are null on disk; returns
    come back as NaN, every other field as None.

    Attributes:
      schema: `SCHEMA`.
      row_id: content hash of every field outside `NOT_CONTENT`.
      run_id: the job of the plan, and the name of the row file.
      suite: name of the suite.
      role: `test` (counts in leaderboards) or `tune`.
      agent: label, `td3_bc`, or `td3_bc@quick` for a preset; `behaviour` for a dataset.
      config: the agent's structure (static).
      setting: name of a setting; `dataset` in a behaviour row.
      hyper: the setting's values.
      task: task id with its version.
      family: tasks that may be averaged together.
      recipe_hash: identifies a regenerated dataset across machines, else None.
      dataset_hash: of the dataset's bytes.
      seed: None in a behaviour row.
      step: updates of the last phase done when evaluated.
      updates_total: updates planned for the last phase.
      phase_updates: updates of every phase by name.
      protocol: how it was evaluated (episodes and whatever else identifies it).
      returns: raw return of every episode.
      lengths: steps of every episode.
      successes: per episode, None where the task has no criterion.
      score: normalised mean of `returns` x100, None without a reference.
      status: `ok`, `diverged` (non-finite, frozen) or `failed`.
      error: one line, for `failed`.
      split_changed: whether the run continued under another split.
      updates_per_s: of the population, summed over its members.
      wall_s: training seconds of the population up to `step`, without compilation
        and evaluation.
      compile_s: seconds of compilation so far.
      eval_s: seconds of this evaluation, of all members in the same environment.
      device: in words.
      flags: precision and determinism.
      versions: of packages.
      commit: of the checkout, None outside of one.
      population: the split; `members` and `devices` are ints, from which the
        leaderboard takes the cost of one run.
    """

    schema: int = SCHEMA
    row_id: str = ""
    run_id: str
    suite: str
    role: str
    agent: str
    config: Mapping[str, Any]
    setting: str
    hyper: Mapping[str, Any]
    task: str
    family: str
    recipe_hash: str | None
    dataset_hash: str | None
    seed: int | None
    step: int
    updates_total: int
    phase_updates: Mapping[str, int]
    protocol: Mapping[str, Any]
    returns: list[float]
    lengths: list[int]
    successes: list[bool] | None
    score: float | None
    status: str
    split_changed: bool
    updates_per_s: float | None
    wall_s: float | None
    compile_s: float | None
    eval_s: float | None
    device: str
    flags: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str | None
    population: Mapping[str, Any]
    error: str | None = None

    def __post_init__(self) -> None:
        if not self.row_id:
            object.__setattr__(self, "row_id", content_hash(self))

    @property
    def key(self) -> RowKey:
        """What must be unique in a results folder."""
        return RowKey(self.run_id, self.task, self.setting, self.seed, self.step)


FIELDS = tuple(field.name for field in dataclasses.fields(Row))
_REQUIRED = frozenset(FIELDS) - {"error"}
_OPTIONAL = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("row_id", "run_id", "suite", "role", "agent", "setting", "task"), (str,)
    ),
    **dict.fromkeys(("family", "status", "device"), (str,)),
    **dict.fromkeys(("config", "hyper", "phase_updates", "protocol"), (dict,)),
    **dict.fromkeys(("flags", "versions", "population"), (dict,)),
    **dict.fromkeys(("returns", "lengths"), (list,)),
    **dict.fromkeys(("schema", "step", "updates_total"), (int,)),
    **dict.fromkeys(("recipe_hash", "dataset_hash"), (str, _OPTIONAL)),
    **dict.fromkeys(("commit", "error"), (str, _OPTIONAL)),
    **dict.fromkeys(
        ("updates_per_s", "wall_s", "compile_s", "eval_s", "score"),
        (int, float, _OPTIONAL),
    ),
    "seed": (int, _OPTIONAL),
    "successes": (list, _OPTIONAL),
    "split_changed": (bool,),
}


def strict_json(value: Any) -> str:
    """Canonical JSON of `value`: sorted keys, no spaces, non-finite numbers as null."""
    try:
        return _dumps(value)
    except ValueError:  # raised by allow_nan=False; rare, so the copy is made only here
        return _dumps(_without_non_finite(value))


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _without_non_finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    return value


def content_hash(row: Row) -> str:
    """16 hex digits of SHA-256 over the canonical JSON of the row's content."""
    content = {name: getattr(row, name) for name in FIELDS if name not in NOT_CONTENT}
    return _hash(strict_json(content))


def _hash(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def to_line(row: Row) -> str:
    """The row as one line of JSON without newline, fields in the order of `Row`."""
    record = {name: getattr(row, name) for name in FIELDS}
    try:
        return json.dumps(record, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(
            _without_non_finite(record), separators=(",", ":"), allow_nan=False
        )


def from_record(record: Any, where: str) -> Row:
    """Builds a row from parsed JSON; `where` (file and line) heads an error.

    Raises:
      ResultsError: another schema, a missing, unknown or wrongly typed field, or
        content that is not what `row_id` was made of.
    """
    if not isinstance(record, dict) or "schema" not in record:
        raise ResultsError(
            f"{where}: not a row of offrl_jax (no 'schema'); move the file out of rows/"
        )
    if record["schema"] != SCHEMA:
        raise ResultsError(
            f"{where}: schema {record['schema']!r}, this version reads {SCHEMA}; use "
            "the version of offrl_jax that wrote it"
        )
    missing = _REQUIRED - record.keys()
    unknown = record.keys() - set(FIELDS)
    if missing or unknown:
        kind, names = ("lacks", missing) if missing else ("has unknown", unknown)
        raise ResultsError(
            f"{where}: the row {kind} {', '.join(sorted(names))}; restore the file or "
            "move it out of rows/"
        )
    for name, value in record.items():
        if not isinstance(value, _TYPES[name]):
            raise ResultsError(
                f"{where}: field '{name}' is {value!r:.40}, expected "
                f"{' or '.join(kind.__name__ for kind in _TYPES[name])}; "
                "restore the file"
            )
    if record["status"] not in STATUSES:
        raise ResultsError(
            f"{where}: status '{record['status']}', expected one of "
            f"{', '.join(STATUSES)}; restore the file"
        )
    _check_identity(record, where)
    returns = record["returns"]
    if None in returns:
        record["returns"] = [math.nan if value is None else value for value in returns]
    return Row(**record)


def _check_identity(record: Mapping[str, Any], where: str) -> None:
    """Refuses a row whose content is not what its `row_id` was made of.

    The hash is over the fields that the line has: a version that writes more of them
    still reads the rows of those that wrote fewer.
    """
    content = {name: record[name] for name in record.keys() - NOT_CONTENT}
    try:
        identity = _hash(_dumps(content))
    except ValueError:  # a bare NaN or Infinity, which no version writes
        identity = None
    if identity != record["row_id"]:
        raise ResultsError(
            f"{where}: row_id {record['row_id']!r:.40} is not the hash of the row's "
            f"content ({identity or 'it holds a NaN that is not null'}), so it was "
            "changed after it was written; restore the file or run that job again"
        )
