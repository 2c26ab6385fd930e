"""From a row back to what made it, and the same once more.

A row is trained again as the plan says, whole population and all, since the bits of a
member depend on who is beside it; then its returns are compared.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
import shlex
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from offrl_jax.agents.entry import resolve
from offrl_jax.agents.registry import get_entry, parse_label
from offrl_jax.benchmark import provenance
from offrl_jax.benchmark.command_lines import command_of
from offrl_jax.benchmark.jobs import JobFailed, run_job
from offrl_jax.benchmark.progress import Progress
from offrl_jax.catalogue import LoadedTask, is_online, load_task
from offrl_jax.datasets.schema import episode_returns
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, ResultsError, UsageError
from offrl_jax.results import (
    BEHAVIOUR,
    Job,
    Member,
    Plan,
    Row,
    read_commands,
    read_plan,
    read_rows,
)
from offrl_jax.results.rows import strict_json

FEWEST_DIGITS = 6
"""Of a row id that is given in part."""
SHOWN = 4
"""Row ids that an ambiguous one is told to be."""
RELATIVE = 1e-3
STANDARD_ERRORS = 3.0
"""Where bits may differ, the mean return of a run may differ by a thousandth, or by so
many standard errors of the difference of two means over episodes, whichever is more."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What made a row.

    Attributes:
      row: itself.
      planned: its job in the plan; None where there is no plan or another one.
      job: to run again, up to the row's step; None for a row of the dataset.
      command: that made it, as far as plan and row say.
      new: settings that its agent did not have then, with the values that run now.
    """

    row: Row
    planned: Job | None
    job: Job | None
    command: str
    new: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Difference(NamedTuple):
    """Something that was another thing when the row was written.

    Attributes:
      what: in a word or two.
      then: what the row says.
      now: what is here.
      counts: whether bits may differ for it.
    """

    what: str
    then: str
    now: str
    counts: bool = True


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a row came out again, and a line that says how closely."""

    equal: bool
    text: str


def find_row(rows: Iterable[Row], row_id: str) -> Row:
    """The row whose id begins with `row_id`.

    Raises:
      UsageError: there is none, or more than one, or `row_id` is no part of an id.
    """
    wanted = row_id.lower()
    if not re.fullmatch(f"[0-9a-f]{{{FEWEST_DIGITS},16}}", wanted):
        raise UsageError(
            f"'{row_id}' is no row id; give the {FEWEST_DIGITS} to 16 first hex digits "
            "of a row_id in rows/*.jsonl"
        )
    found = {row.row_id: row for row in rows if row.row_id.startswith(wanted)}
    if not found:
        raise UsageError(f"no row has an id that begins with {wanted}")
    if len(found) > 1:
        some = ", ".join(sorted(found)[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UsageError(f"{wanted} is the beginning of {some}{more}; give more digits")
    return next(iter(found.values()))


def trace(
    folder: Path, row_id: str, say: Callable[[str], None], *, member_only: bool = False
) -> Origin:
    """What made the row `row_id` of the results folder `folder`, which is only read.

    Args:
      folder: of results.
      row_id: or the beginning of it.
      say: takes messages about the folder.
      member_only: train the row's member without those that were beside it.

    Raises:
      UsageError: no such row, or one that cannot be run again.
      ResultsError: the folder cannot be read.
    """
    if not folder.is_dir():
        raise ResultsError(f"{folder}: no such folder; give a results folder")
    row, plan = find_row(read_rows(folder, say), row_id), read_plan(folder)
    if row.status == "failed":
        raise UsageError(
            f"row {row.row_id} failed ({row.error}), so there is nothing to compare; "
            "its benchmark command tries it again"
        )
    if row.agent == BEHAVIOUR:
        return Origin(row, None, None, command_of(row, None, plan, folder))
    new = _new_settings(row)
    planned = _planned(row, plan)
    typed = read_commands(folder).get(row.run_id)
    if typed is None:
        command = command_of(row, planned or _alone(row), plan, folder)
    else:
        command = shlex.join(typed)
    job = _alone(row) if planned is None or member_only else planned
    return Origin(row, planned, _up_to(_with_settings(job, new), row), command, new)


def _new_settings(row: Row) -> dict[str, Any]:
    """Settings that the agent has by now and the row has not, with their values here.

    Raises:
      UsageError: the row has settings that are gone.
    """
    base, preset = parse_label(row.agent)
    entry = get_entry(base)
    own = {**row.config, **row.hyper}
    names = {
        field.name
        for cls in (entry.config, entry.hyper)
        for field in dataclasses.fields(cls)
    }
    gone = sorted(set(own) - names)
    if gone:
        raise UsageError(
            f"{row.agent} has no setting {', '.join(gone)} any more; check out the "
            f"row's commit, {row.commit or 'which it does not say'}"
        )
    config, hyper = resolve(entry, family=row.family, preset=preset, overrides=own)
    values = dataclasses.asdict(config) | dataclasses.asdict(hyper)
    return {name: values[name] for name in sorted(names - set(own))}


def _with_settings(job: Job, new: Mapping[str, Any]) -> Job:
    """The job with what its agent has by now besides."""
    fields = dataclasses.fields(get_entry(parse_label(job.agent)[0]).hyper)
    numbers = {f.name: float(new[f.name]) for f in fields if f.name in new}
    members = (
        dataclasses.replace(member, hyper={**numbers, **member.hyper})
        for member in job.members
    )
    structure = {name: new[name] for name in new if name not in numbers}
    return dataclasses.replace(
        job, config={**structure, **job.config}, members=tuple(members)
    )


def _planned(row: Row, plan: Plan | None) -> Job | None:
    own = (row.task, row.setting, row.seed)
    for job in plan.jobs if plan else ():
        members = {(m.task, m.setting, m.seed) for m in job.members}
        if job.run_id == row.run_id and own in members:
            return job
    return None


def _alone(row: Row) -> Job:
    """A job of the row's member alone."""
    assert row.seed is not None
    member = Member(row.task, row.family, row.setting, row.seed, row.hyper)
    return Job(
        run_id=row.run_id,
        suite=row.suite,
        role=row.role,
        agent=row.agent,
        config=row.config,
        members=(member,),
        updates_total=row.updates_total,
        phase_updates=row.phase_updates,
        eval_steps=(row.updates_total,),
        protocol=row.protocol,
        split={"devices": 1, "platform": jax.local_devices()[0].platform},
        source_hash=provenance.source_hash(),
        datasets={
            row.task: {
                "dataset_hash": row.dataset_hash,
                "recipe_hash": row.recipe_hash,
            }
        },
    )


def _up_to(job: Job, row: Row) -> Job:
    """The job as far as the row's step, and evaluated there as the row was."""
    protocol = dict(job.protocol)
    if row.step < job.updates_total:
        protocol["episodes"] = protocol.get("curve_episodes", protocol["episodes"])
    *_, policy = job.phase_updates
    return dataclasses.replace(
        job,
        updates_total=row.step,
        phase_updates={**job.phase_updates, policy: row.step},
        eval_steps=(row.step,),
        protocol=protocol,
    )


def describe(origin: Origin) -> list[tuple[str, str]]:
    """Where a row comes from: headings and what stands beside them."""
    row, planned = origin.row, origin.planned
    subject = f"{row.agent} on {row.task}"
    if row.agent != BEHAVIOUR:
        subject += (
            f", setting {row.setting}, seed {row.seed}, "
            f"{row.step:,} of {row.updates_total:,} updates"
        )
    found = [
        ("row", f"{row.row_id}, {subject}"),
        ("command", origin.command),
        ("commit", row.commit or "outside of a checkout"),
        ("versions", ", ".join(f"{k} {v}" for k, v in sorted(row.versions.items()))),
        ("device", row.device),
    ]
    if row.flags:
        flags = (f"{k} {v or 'none'}" for k, v in sorted(row.flags.items()))
        found.append(("flags", ", ".join(flags)))
    found.append(("data", _data(row.dataset_hash, row.recipe_hash)))
    if row.agent == BEHAVIOUR:
        return found
    split = ", ".join(f"{k} {v}" for k, v in sorted(row.population.items()))
    where = "in the plan" if planned is not None else "not in the plan"
    found.append(("population", f"{split}; job {row.run_id}, {where}"))
    selection = row.protocol.get("selection")
    if selection:
        found.append(
            (
                "setting",
                f"chosen by {selection['rule']} of {selection['from']}, "
                f"{selection['settings']} settings x {selection['seeds']} seeds",
            )
        )
    return found


def _data(dataset_hash: str | None, recipe_hash: str | None) -> str:
    if dataset_hash is None:
        return "none"
    recipe = f", recipe {recipe_hash[:16]}" if recipe_hash else ""
    return f"sha256 {dataset_hash[:16]}{recipe}"


def load_data(
    origin: Origin, store: Store, say: Callable[[str], None]
) -> dict[str, LoadedTask]:
    """The data that a row was made from, by task.

    Raises:
      DataError: they are absent, damaged, or others than those of the row.
    """
    row = origin.row
    wanted: Mapping[str, Mapping[str, Any]] = {
        row.task: {"dataset_hash": row.dataset_hash, "recipe_hash": row.recipe_hash}
    }
    if origin.job is not None:
        used = {member.task for member in origin.job.members}
        wanted = {task: origin.job.datasets[task] for task in sorted(used)}
    found = {}
    for task, hashes in wanted.items():
        try:
            found[task] = _load(task, hashes, store, say)
        except DataError as error:
            if task == row.task:
                raise
            raise DataError(
                f"{error}; the row's population learned from them too, and "
                "--member-only does without"
            ) from error
    return found


def _load(
    task: str, hashes: Mapping[str, Any], store: Store, say: Callable[[str], None]
) -> LoadedTask:
    loaded = load_task(task, store, progress=say)
    problem = None if is_online(task) else store.check(task, "train").problem
    if problem is not None:
        raise DataError(f"{task}: {problem}")
    if loaded.dataset_hash != hashes["dataset_hash"]:
        here = _data(loaded.dataset_hash, loaded.recipe_hash)
        then = _data(hashes["dataset_hash"], hashes["recipe_hash"])
        same = hashes["recipe_hash"] and hashes["recipe_hash"] == loaded.recipe_hash
        why = "; the same recipe gives other bytes on another machine" if same else ""
        raise DataError(
            f"{task}: the data in {store.path} are {here}, the row's were {then}{why}; "
            "give a data store that has them with --data-dir"
        )
    return loaded


def differences(origin: Origin) -> list[Difference]:
    """What is another thing here than it was when the row was written."""
    row, planned = origin.row, origin.planned
    found: list[Difference] = []

    def compare(what: str, then: object, now: object, counts: bool = True) -> None:
        if then != now:
            found.append(Difference(what, str(then), str(now), counts))

    same = planned is not None and planned.source_hash == provenance.source_hash()
    compare("commit", row.commit, provenance.commit(), counts=not same)
    if planned is not None and planned.source_hash:
        compare("sources", planned.source_hash, provenance.source_hash())
    here = provenance.versions()
    for name, version in sorted(row.versions.items()):
        compare(name, version, here.get(name) or _installed(name))
    for name, value in origin.new.items():
        compare(f"setting {name}", "not there", value)
    if row.agent == BEHAVIOUR:
        return found
    compare("device", row.device, provenance.device())
    flags = provenance.flags()
    for name, value in sorted(row.flags.items()):
        compare(f"flag {name}", value, flags.get(name))
    assert origin.job is not None
    available = min(origin.job.split["devices"], len(jax.local_devices()))
    compare("devices of the population", row.population.get("devices"), available)
    members = row.population.get("members")
    compare("members of the population", members, len(origin.job.members))
    if row.split_changed:
        found.append(Difference("split", "changed on the way", "one"))
    return found


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run_again(
    origin: Origin, tasks: Mapping[str, LoadedTask], progress: Progress
) -> Row:
    """The row once more, made in a temporary folder.

    Raises:
      ResultsError: the device cannot do it.
    """
    row, job = origin.row, origin.job
    if job is None:
        episodes = tasks[row.task].train
        return dataclasses.replace(
            row,
            returns=episode_returns(episodes).tolist(),
            lengths=episodes.lengths.tolist(),
        )
    with tempfile.TemporaryDirectory(prefix="offrl-reproduce-") as name:
        folder = Path(name)
        try:
            run_job(job, tasks, folder, progress, lambda: False)
        except JobFailed as error:
            raise ResultsError(
                f"the run could not be repeated here: {error}; try --member-only"
            ) from error
        own = (row.task, row.setting, row.seed, row.step)
        return next(
            again
            for again in read_rows(folder, progress.say)
            if (again.task, again.setting, again.seed, again.step) == own
        )


def compare(row: Row, again: Row, found: Iterable[Difference]) -> Verdict:
    """How closely a row came out again.

    Without a difference that counts, on a CPU, anything but equal bits is different;
    otherwise the mean return may differ within the tolerance (see `RELATIVE`).
    """
    said = [one.what for one in found if one.counts]
    if again.population.get("platform", "cpu") != "cpu":
        said.append("no accelerator promises bits")
    if again.status != row.status:
        return Verdict(False, f"different: {again.status}, the row is {row.status}")
    outcome = ("returns", "lengths", "successes")
    episodes = len(row.returns)
    if all(
        strict_json(getattr(row, name)) == strict_json(getattr(again, name))
        for name in outcome
    ):
        mean = f", mean return {statistics.fmean(row.returns):g}" if episodes else ""
        return Verdict(True, f"equal bit for bit: {episodes} episodes{mean}")
    if episodes != len(again.returns):
        return Verdict(
            False, f"different: {len(again.returns)} episodes, the row has {episodes}"
        )
    apart = max(abs(a - b) for a, b in zip(row.returns, again.returns, strict=True))
    then, now = statistics.fmean(row.returns), statistics.fmean(again.returns)
    numbers = (
        f"mean return {now:g}, the row's {then:g}; episodes differ by {apart:g} at most"
    )
    if not said:
        return Verdict(
            False,
            f"different: {numbers}; nothing that the row records is another thing "
            "here, so bits should be equal (it does not record the model of a CPU)",
        )
    gap, allowed = abs(now - then), tolerance(row.returns, again.returns)
    equal = gap <= allowed
    word = f"equal within {gap:g}" if equal else "different"
    side = "tolerance" if equal else "beyond the tolerance of"
    why = ", ".join(said)
    return Verdict(
        equal, f"{word}, {side} {allowed:g}: {numbers}; bits may differ ({why})"
    )


def tolerance(then: list[float], now: list[float]) -> float:
    """By how much two mean returns may differ where bits may."""
    noise = 0.0
    if len(then) > 1:
        noise = math.sqrt(
            statistics.variance(then) / len(then) + statistics.variance(now) / len(now)
        )
    return max(RELATIVE * abs(statistics.fmean(then)), STANDARD_ERRORS * noise)
