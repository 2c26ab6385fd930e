"""From a suite to jobs: what is still missing, grouped into populations.

A job is one population: members of one agent and structure on tasks of equal spec.  Its
members, their order and the number of devices are fixed here, before the first update,
and written into the plan; a resume uses them again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from offrl_jax.agents.entry import resolve
from offrl_jax.agents.registry import REGISTRY, get_entry, parse_label
from offrl_jax.benchmark.splitting import (
    cut,
    fewest_devices,
    in_rounds,
    named,
    with_members,
)
from offrl_jax.benchmark.suites import ALL_AGENTS, Suite
from offrl_jax.catalogue import LoadedTask, is_online
from offrl_jax.datasets import transforms
from offrl_jax.errors import UsageError
from offrl_jax.results import SCHEMA, Job, Member, Plan, Row
from offrl_jax.results.rows import strict_json
from offrl_jax.types import Spec

PRETRAINING_SHARE = 0.1
"""Updates of a pre-training phase as a share of the policy phase's."""

DEFAULT_SETTING = "default"


@dataclasses.dataclass(frozen=True)
class Split:
    """How members are spread, as recorded in the plan."""

    devices: int
    platform: str
    max_parallel: int | None = None


def agent_labels(suite: Suite) -> list[str]:
    """The labels of a suite's agents, with its preset where they name none.

    `*` is every agent that can learn in the suite's first task.

    Raises:
      UsageError: for an unknown agent or preset, or an agent that cannot learn in one
        of the suite's tasks.
    """
    online = {task: is_online(task) for task in suite.tasks}
    first = next(iter(online.values()))
    names: list[str] = []
    for name in suite.agents:
        fitting = sorted(n for n, e in REGISTRY.items() if e.on_policy == first)
        names += fitting if name == ALL_AGENTS else [name]
    labels = []
    for name in dict.fromkeys(names):
        base, preset = parse_label(name)
        entry = get_entry(base)
        for task, is_env in online.items():
            if entry.on_policy and not is_env:
                raise UsageError(
                    f"{base} gathers its own experience and learns from no data, so "
                    f"not from {task}; choose tasks such as online/CartPole-v1"
                )
            if is_env and not entry.on_policy:
                raise UsageError(
                    f"{base} learns from data, and {task} has none; choose an "
                    "on-policy agent such as ppo, or a task with data"
                )
        preset = preset or suite.preset or None
        labels.append(f"{base}@{preset}" if preset else base)
    return labels


def check_request(
    suite: Suite,
    families: Iterable[str],
    overrides: Mapping[str, Any],
    max_parallel: int | None,
    waves: int = 1,
) -> None:
    """Tells what is wrong with a request before anything is generated or written.

    Args:
      suite: what is asked for.
      families: of its tasks.
      overrides: settings for every agent.
      max_parallel: largest number of members in one population, or None.
      waves: groups of seeds.

    Raises:
      UsageError: an unknown agent, preset or setting, a setting of the wrong type, a
        senseless number.
    """
    if max_parallel is not None and max_parallel < 1:
        raise UsageError(f"--max-parallel must be at least 1, got {max_parallel}")
    if waves < 1:
        raise UsageError(f"--waves must be at least 1, got {waves}")
    for name in suite.settings:
        get_entry(name)
    for label in agent_labels(suite):
        base, preset = parse_label(label)
        for values in suite.settings.get(base, {DEFAULT_SETTING: {}}).values():
            for family in sorted(set(families)):
                config, _ = resolve(
                    get_entry(base),
                    family=family,
                    preset=preset,
                    overrides={**values, **overrides},
                )
                if not get_entry(base).on_policy:
                    transforms.check_names(
                        config.obs_transform, config.reward_transform
                    )


def evaluation_steps(updates: int, evaluations: int, stride: int) -> tuple[int, ...]:
    """Steps of the learning curve: even multiples of `stride`, then the end."""
    points = (
        round(updates * k / evaluations / stride) * stride
        for k in range(1, evaluations)
    )
    inner = sorted({step for step in points if 0 < step < updates})
    return (*inner, updates)


def identity(
    *,
    agent: str,
    setting: str,
    config: Mapping[str, Any],
    hyper: Mapping[str, Any],
    task: str,
    dataset_hash: str | None,
    seed: int | None,
    updates_total: int,
    phase_updates: Mapping[str, int],
    protocol: Mapping[str, Any],
) -> str:
    """Names what a run *is*, whichever job it belongs to: equal names, equal runs."""
    return strict_json(
        [
            agent,
            setting,
            config,
            hyper,
            task,
            dataset_hash,
            seed,
            updates_total,
            phase_updates,
            protocol,
        ]
    )


def row_identity(row: Row) -> str:
    """`identity` of the run that a row belongs to."""
    return identity(
        agent=row.agent,
        setting=row.setting,
        config=row.config,
        hyper=row.hyper,
        task=row.task,
        dataset_hash=row.dataset_hash,
        seed=row.seed,
        updates_total=row.updates_total,
        phase_updates=row.phase_updates,
        protocol=row.protocol,
    )


def member_identity(job: Job, member: Member) -> str:
    """`identity` of a planned member."""
    return identity(
        agent=job.agent,
        setting=member.setting,
        config=job.config,
        hyper=member.hyper,
        task=member.task,
        dataset_hash=job.datasets[member.task]["dataset_hash"],
        seed=member.seed,
        updates_total=job.updates_total,
        phase_updates=job.phase_updates,
        protocol=job.protocol,
    )


def _called(job: Job, member: Member) -> tuple[object, ...]:
    """What a run is called, whatever its numbers, its structure and its data are."""
    protocol = tuple(sorted((name, str(x)) for name, x in job.protocol.items()))
    names = (job.suite, job.agent, member.setting, member.task, member.seed)
    return (*names, job.updates_total, protocol)


def wanted_jobs(
    suite: Suite,
    tasks: Sequence[LoadedTask],
    split: Split,
    source_hash: str,
    overrides: Mapping[str, str] | None = None,
) -> list[Job]:
    """Every run that the suite asks for, as jobs of the largest possible populations.

    Args:
      suite: what is asked for.
      tasks: the suite's tasks, loaded.
      split: devices.
      source_hash: of the package.
      overrides: settings of the command line (`--set`), for every agent.

    Raises:
      UsageError: an unknown agent, preset or setting, or a setting of the wrong type.
    """
    if suite.selection is not None and not suite.choices:
        raise ValueError("nothing was chosen yet; pass the suite to selection.chosen")
    jobs: list[Job] = []
    for label in agent_labels(suite):
        base, preset = parse_label(label)
        entry = get_entry(base)
        settings = suite.settings.get(base, {DEFAULT_SETTING: {}})
        # One compiled program holds one environment that it learns in.
        groups: dict[tuple[Any, Spec, str | None], list[Member]] = {}
        protocol, choice = (
            dataclasses.asdict(suite.protocol),
            suite.choices.get(label),
        )
        if choice is not None:
            protocol["selection"] = dict(choice.record)
        for task in tasks:
            if choice is not None and choice.values:
                settings = {choice.setting: choice.values[task.task.id]}
            for setting, values in settings.items():
                config, hyper = resolve(
                    entry,
                    family=task.task.family,
                    preset=preset,
                    overrides={**values, **(overrides or {})},
                )
                numbers = {
                    field.name: float(getattr(hyper, field.name))
                    for field in dataclasses.fields(hyper)
                }
                learns_in = task.task.env_id if entry.on_policy else None
                groups.setdefault((config, task.spec, learns_in), []).extend(
                    Member(
                        task.task.id,
                        task.task.family,
                        _setting_name(setting, overrides or {}),
                        seed,
                        numbers,
                    )
                    for seed in range(suite.first_seed, suite.first_seed + suite.seeds)
                )
        for (config, spec, _), members in groups.items():
            agent = entry.make(config, spec)
            *pretraining, policy = agent.phases
            stride, updates = policy.stride, suite.updates
            if updates % stride:
                raise UsageError(
                    f"{label} advances {stride} updates at a time, so {updates} "
                    f"updates are not possible; choose {-(-updates // stride) * stride}"
                )
            phase_updates = {
                phase.name: _pretraining_updates(suite, phase.stride)
                for phase in pretraining
            }
            phase_updates[policy.name] = updates
            jobs.append(
                named(
                    Job(
                        run_id="",
                        suite=suite.name,
                        role=suite.role,
                        agent=label,
                        config=_plain_config(config),
                        members=tuple(members),
                        updates_total=updates,
                        phase_updates=phase_updates,
                        eval_steps=evaluation_steps(
                            updates, suite.protocol.evaluations, stride
                        ),
                        protocol=protocol,
                        split=dataclasses.asdict(split)
                        | {"devices": fewest_devices(len(members), split.devices)},
                        source_hash=source_hash,
                        datasets={
                            task.task.id: {
                                "dataset_hash": task.dataset_hash,
                                "recipe_hash": task.recipe_hash,
                            }
                            for task in tasks
                            if any(m.task == task.task.id for m in members)
                        },
                    )
                )
            )
    return jobs


def _setting_name(setting: str, overrides: Mapping[str, Any]) -> str:
    """The name of a setting that was changed, by `--set` for instance."""
    changes = ",".join(f"{name}={value}" for name, value in sorted(overrides.items()))
    if not changes:
        return setting
    return changes if setting == DEFAULT_SETTING else f"{setting},{changes}"


def _pretraining_updates(suite: Suite, stride: int) -> int:
    """As set, else a tenth of the policy's; a multiple of `stride`, at least one."""
    updates = suite.pretraining_updates or suite.updates * PRETRAINING_SHARE
    return max(1, round(updates / stride)) * stride


def _plain_config(config: Any) -> dict[str, Any]:
    """A structural config as JSON has it (tuples become lists)."""
    plain = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def config_from_plain(config: type, plain: Mapping[str, Any]) -> Any:
    """The structural config that `_plain_config` wrote."""
    return config(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
    )


def plan_missing(
    wanted: Sequence[Job],
    plan: Plan | None,
    rows: Iterable[Row],
    say: Callable[[str], None],
    *,
    most: Callable[[Job], int] = lambda job: len(job.members),
    waves: int = 1,
    seconds: Callable[[Job], float | None] = lambda job: None,
) -> tuple[Plan, list[Job]]:
    """What is still to be done, as a plan and the jobs to run.

    Finished runs stay, whichever code made them.  A job that was begun is continued as
    it was planned if the package's training sources are the same; otherwise its
    unfinished members start anew in a job of their own, and `say` tells so.

    Args:
      wanted: jobs of `wanted_jobs`.
      plan: what the results folder holds, or None.
      rows: all rows of the results folder.
      say: takes messages for the user.
      most: how many members of a job fit into one population; asked of new jobs only,
        since a job that was begun keeps its split.
      waves: into how many groups of seeds new jobs are cut.
      seconds: estimated duration of a job, None where nothing is known.

    Returns:
      The new plan, and its jobs that are not finished: in the order of `wanted`, those
      with the first seeds first (`splitting.in_rounds`).
    """
    owners: dict[str, list[str]] = {}
    for row in rows:
        if row.step == row.updates_total and row.status != "failed":
            owners.setdefault(row_identity(row), []).append(row.run_id)

    kept: dict[str, Job] = {}
    begun: dict[str, Job] = {}
    called: dict[Any, Job] = {}
    for job in plan.jobs if plan else ():
        names = [member_identity(job, member) for member in job.members]
        if all(job.run_id in owners.get(name, ()) for name in names):
            kept[job.run_id] = job
        else:
            begun |= dict.fromkeys(names, job)
            called |= {_called(job, member): job for member in job.members}
    covered = {member_identity(job, m) for job in kept.values() for m in job.members}
    by_id = {job.run_id: job for job in begun.values()}

    def keep(job: Job, member: Member) -> None:
        """Leaves a finished member in the plan, under the run that finished it."""
        run_id = min(owners[member_identity(job, member)])
        known = kept.get(run_id)
        if known is None:
            # Nobody knows the sources of rows that came without a plan.
            unplanned = dataclasses.replace(job, run_id=run_id, source_hash="")
            known = dataclasses.replace(by_id.get(run_id, unplanned), members=())
        kept[run_id] = dataclasses.replace(
            known,
            members=(*known.members, member),
            datasets={**known.datasets, member.task: job.datasets[member.task]},
        )

    to_run: list[Job] = []
    told: set[str] = set()
    for job in wanted:
        missing: list[Member] = []
        for member in job.members:
            name = member_identity(job, member)
            earlier = begun.get(name)
            if name in covered:
                continue
            limit = job.split["max_parallel"] or math.inf
            if (
                earlier is not None
                and earlier.source_hash == job.source_hash
                and len(earlier.members) <= limit
            ):
                if earlier not in to_run:
                    to_run.append(earlier)
            elif name in owners:
                keep(job, member)
            else:
                missing.append(member)
                before = earlier or called.get(_called(job, member))
                if before is not None and before.run_id not in told:
                    told.add(before.run_id)
                    why = _why_anew(job, before, same=before is earlier)
                    say(f"{before.run_id} {why}; its unfinished runs start anew")
        if missing:
            new = dataclasses.replace(job, members=tuple(missing))
            limit = job.split["max_parallel"] or len(missing)
            to_run += cut(new, min(limit, most(new)), waves)
    to_run = in_rounds(to_run, seconds)

    # What other suites began in the same folder stays in the plan, for them to finish.
    pairs = [(job, member) for job in wanted for member in job.members]
    asked = {_called(*pair) for pair in pairs}
    wanted_now = {member_identity(*pair) for pair in pairs}
    planned = {job.run_id for job in to_run}
    waiting = []
    for job in by_id.values():
        if job.run_id in planned:
            continue
        rest: list[Member] = []
        for member in job.members:
            name = member_identity(job, member)
            if name in wanted_now or _called(job, member) in asked:
                continue
            if name in owners:
                keep(job, member)
            else:
                rest.append(member)
        whole = len(rest) == len(job.members)
        if rest:
            waiting.append(job if whole else with_members(job, rest))
    return Plan(SCHEMA, (*kept.values(), *waiting, *to_run)), to_run


def _why_anew(job: Job, before: Job, same: bool) -> str:
    """Why runs of `job` are not continued in `before`; `same`: the same identity."""
    if not same:
        return "was begun with other settings or data"
    if before.source_hash == job.source_hash:
        return "has more members than --max-parallel allows"
    return "was begun before the package's sources changed"
