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

from offrl_jax.agents.registry import get_entry, parse_label
from offrl_jax.benchmark import provenance
from offrl_jax.benchmark.jobs import JobFailed, run_job
from offrl_jax.benchmark.planning import DEFAULT_SETTING
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.suites import known_suites, load_suite
from offrl_jax.catalogue import LoadedTask, is_online, load_task
from offrl_jax.datasets.schema import episode_returns
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, ResultsError, UsageError
from offrl_jax.results import BEHAVIOUR, Job, Member, Plan, Row, read_plan, read_rows
from offrl_jax.results.rows import content_hash, strict_json

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
    """

    row: Row
    planned: Job | None
    job: Job | None
    command: str


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
    command = command_of(row, plan, folder)
    if row.agent == BEHAVIOUR:
        return Origin(row, None, None, command)
    _check_settings(row)
    planned = _planned(row, plan)
    job = _alone(row) if planned is None or member_only else planned
    return Origin(row, planned, _up_to(job, row), command)


def _check_settings(row: Row) -> None:
    """Refuses a row whose agent has other settings by now."""
    entry = get_entry(parse_label(row.agent)[0])
    for kind, cls, own in (
        ("structural", entry.config, row.config),
        ("numeric", entry.hyper, row.hyper),
    ):
        names = {field.name for field in dataclasses.fields(cls)}
        other = sorted(names ^ set(own))
        if other:
            raise UsageError(
                f"{row.agent} has other {kind} settings here ({', '.join(other)}); "
                f"check out the row's commit, {row.commit or 'which it does not say'}"
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


def command_of(row: Row, plan: Plan | None, folder: Path) -> str:
    """The command that makes the row, as far as plan and row say.

    Args:
      row: of the folder.
      plan: of the folder, or None.
      folder: of results.
    """
    jobs = [job for job in (plan.jobs if plan else ()) if job.suite == row.suite]
    if row.agent == BEHAVIOUR:
        job = next((job for job in jobs if row.task in job.datasets), None)
        setting = job.members[0].setting if job is not None else ""
    else:
        job, setting = _planned(row, plan) or _alone(row), row.setting
    if job is None:
        return f"any benchmark on {row.task}"
    jobs = [one for one in jobs if one.updates_total == job.updates_total] or [job]
    if row.suite == "run":
        jobs = [one for one in jobs if one.agent == job.agent]
        line = _run_words(job, jobs, setting)
    else:
        line = _suite_words(job, jobs)
    if job.split.get("max_parallel"):
        line += ["--max-parallel", str(job.split["max_parallel"])]
    if row.suite == "run" or folder != Path("results") / row.suite:
        line += ["--results", str(folder)]
    return shlex.join(["offrl", *line])


def _seeds(jobs: Iterable[Job]) -> int:
    return len({member.seed for job in jobs for member in job.members})


def _suite_words(job: Job, jobs: list[Job]) -> list[str]:
    """Of a suite, with the numbers that are not its own."""
    if job.suite not in known_suites():
        return ["benchmark", f"{job.suite}.toml"]
    line, suite = ["benchmark", job.suite], load_suite(job.suite)
    if _seeds(jobs) != suite.seeds:
        line += ["--seeds", str(_seeds(jobs))]
    if job.updates_total != suite.updates:
        line += ["--updates", str(job.updates_total)]
    return line


def _run_words(job: Job, jobs: list[Job], setting: str) -> list[str]:
    tasks = list(dict.fromkeys(m.task for one in jobs for m in one.members))
    line = ["run", "--agent", job.agent, "--task", *tasks]
    line += ["--seeds", str(_seeds(jobs)), "--updates", str(job.updates_total)]
    *before, _ = job.phase_updates
    if before:
        line += ["--pretraining-updates", str(job.phase_updates[before[-1]])]
    for pair in _pairs(setting):
        line += ["--set", pair]
    for name in ("episodes", "evaluations"):
        if name in job.protocol:
            line += [f"--{name}", str(job.protocol[name])]
    return line


def _pairs(setting: str) -> list[str]:
    """`["alpha=1", "hidden=64,64"]` of the setting `alpha=1,hidden=64,64`."""
    if setting == DEFAULT_SETTING:
        return []
    return re.split(r",(?=[a-z_0-9]+=)", setting)


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

    digest = content_hash(row)
    compare("row id (the row was edited)", row.row_id, digest, counts=False)
    same = planned is not None and planned.source_hash == provenance.source_hash()
    compare("commit", row.commit, provenance.commit(), counts=not same)
    if planned is not None:
        compare("sources", planned.source_hash, provenance.source_hash())
    here = provenance.versions()
    for name, version in sorted(row.versions.items()):
        compare(name, version, here.get(name) or _installed(name))
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
    allowed = tolerance(row.returns, again.returns)
    equal = abs(now - then) <= allowed
    word = f"equal within {allowed:g}" if equal else "different"
    limit = "" if equal else f", beyond the tolerance of {allowed:g}"
    why = ", ".join(said)
    return Verdict(equal, f"{word}: {numbers}{limit}; bits may differ ({why})")


def tolerance(then: list[float], now: list[float]) -> float:
    """By how much two mean returns may differ where bits may."""
    noise = 0.0
    if len(then) > 1:
        noise = math.sqrt(
            statistics.variance(then) / len(then) + statistics.variance(now) / len(now)
        )
    return max(RELATIVE * abs(statistics.fmean(then)), STANDARD_ERRORS * noise)
