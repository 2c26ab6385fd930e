"""The plan: what is to be run, written before anything runs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offrl_jax.errors import ResultsError
from offrl_jax.results.folder import files_below, plan_path
from offrl_jax.results.lines import sync_folder
from offrl_jax.results.rows import SCHEMA, RowKey


@dataclasses.dataclass(frozen=True)
class Member:
    """One training run inside a job: a task, a setting and a seed."""

    task: str
    family: str
    setting: str
    seed: int
    hyper: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Job:
    """One population, trained by one process.

    Attributes:
      run_id: names the job, its rows, checkpoints and lock.
      suite: as in `Row`.
      role: as in `Row`.
      agent: label, as in `Row`.
      config: the agent's structure.
      members: in the order of the population.
      updates_total: updates of the last phase.
      phase_updates: updates of every phase by name.
      eval_steps: steps at which every member gets a row, ascending; the last one is
        `updates_total`.
      protocol: evaluation, as in `Row` at the last step.
      split: shape of the population and number of devices, reused on resume.
      source_hash: of the package's source when planned; empty where nobody knows.
      datasets: `dataset_hash` and `recipe_hash` by task.
    """

    run_id: str
    suite: str
    role: str
    agent: str
    config: Mapping[str, Any]
    members: tuple[Member, ...]
    updates_total: int
    phase_updates: Mapping[str, int]
    eval_steps: tuple[int, ...]
    protocol: Mapping[str, Any]
    split: Mapping[str, Any]
    source_hash: str
    datasets: Mapping[str, Mapping[str, str | None]]

    def row_key(self, member: Member, step: int) -> RowKey:
        """Where a member's row of an evaluation at `step` belongs."""
        return RowKey(self.run_id, member.task, member.setting, member.seed, step)

    def __post_init__(self) -> None:
        steps = self.eval_steps
        if list(steps) != sorted(set(steps)) or steps[-1:] != (self.updates_total,):
            raise ResultsError(
                f"job {self.run_id}: evaluation steps {list(steps)} must ascend and "
                f"end at updates_total {self.updates_total}"
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All jobs of a results folder, in the order in which they were planned."""

    schema: int
    jobs: tuple[Job, ...]


def write_plan(folder: Path, plan: Plan) -> None:
    """Replaces `folder/plan.json` atomically; a crash leaves the old or the new one.

    Raises:
      ResultsError: the folder cannot be written.
    """
    path = plan_path(folder)
    # The process id keeps two writers from sharing a temporary file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(_plain(plan), file, indent=1, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise ResultsError(
            f"{path}: cannot be written ({error.strerror}); free space or choose "
            "another results folder"
        ) from error


def read_plan(folder: Path) -> Plan | None:
    """The plan of a results folder; None where there is none.

    Raises:
      ResultsError: the file is no plan of this schema.
    """
    path = plan_path(folder)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{path}: cannot be read as JSON; restore it or remove it to plan anew"
        ) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ResultsError(
            f"{path}: schema {schema!r}, this version reads {SCHEMA}; use the version "
            "of offrl_jax that wrote it"
        )
    try:
        jobs = tuple(_job(job) for job in record["jobs"])
    except (KeyError, TypeError) as error:
        raise ResultsError(
            f"{path}: not a plan ({error}); restore it or remove it to plan anew"
        ) from error
    return Plan(SCHEMA, jobs)


def read_plans(folder: Path) -> Plan | None:
    """All plans at or below a folder as one, in the order of their paths.

    Raises:
      ResultsError: as `read_plan`.
    """
    name = plan_path(Path()).name
    found = [path.parent for path in files_below(folder) if path.name == name]
    plans = [plan for where in found if (plan := read_plan(where)) is not None]
    jobs = {job.run_id: job for plan in plans for job in plan.jobs}
    return Plan(SCHEMA, tuple(jobs.values())) if plans else None


def _job(record: dict[str, Any]) -> Job:
    members = tuple(Member(**member) for member in record["members"])
    steps = tuple(record["eval_steps"])
    return Job(**{**record, "members": members, "eval_steps": steps})


def _plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as JSON has them."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
