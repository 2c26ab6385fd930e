"""Settings of a test chosen from tuning runs, by a rule that the rows of the test name.

Tuning seeds are other ones than those of the test, as in Tarasov et al., *Revisiting
the Minimalist Approach to Offline Reinforcement Learning* (NeurIPS 2023).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from offrl_jax.agents.registry import parse_label
from offrl_jax.benchmark.planning import agent_labels
from offrl_jax.benchmark.rules import Choice, Rule, Selection, parse_rule
from offrl_jax.benchmark.suites import Suite
from offrl_jax.catalogue import LoadedTask
from offrl_jax.errors import ResultsError, UsageError, unknown_name
from offrl_jax.results import MetricPoint, Plan, Row, read_metrics, read_plan, read_rows
from offrl_jax.results.rows import strict_json

Arm = TypeVar("Arm", bound=Hashable)
"""What one setting is chosen for: an agent, or a part of its settings."""
PER_TASK_SETTING = "chosen per task"
"""The name of a setting whose values differ between tasks."""


class TuningRun(NamedTuple):
    """What tells one tuning run from another."""

    agent: str
    setting: str
    task: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting that was tried.

    Attributes:
      setting: its name.
      by_task: mean over seeds of what the rule compares, by task, sorted.
      merit: by which settings for all tasks are compared, the larger the better: the
        mean of the scores over tasks; of a metric, whose unit tasks do not share, the
        mean over tasks of the setting's rank (1 is the best), with a minus.
    """

    setting: str
    by_task: Mapping[str, float]
    merit: float


def finished(rows: Iterable[Row], plan: Plan | None) -> dict[TuningRun, Row]:
    """The last row of every finished run of role `tune`.

    Of several runs the last one in the plan counts, as in a leaderboard, and one that
    failed gives way to any other.
    """
    order = {job.run_id: i for i, job in enumerate(plan.jobs)} if plan else {}
    found: dict[TuningRun, Row] = {}
    every = (r for r in rows if r.role == "tune" and r.step == r.updates_total)
    for row in sorted(
        every,
        key=lambda r: (r.status != "failed", order.get(r.run_id, -1), r.run_id),
    ):
        if row.seed is not None:
            found[TuningRun(row.agent, row.setting, row.task, row.seed)] = row
    return found


def candidates(
    finals: Mapping[TuningRun, Row],
    rule: Rule,
    *,
    arm_of: Callable[[TuningRun], Arm],
    planned: Iterable[TuningRun] = (),
    points: Iterable[MetricPoint] = (),
    incomplete: bool = False,
) -> dict[Arm, list[Candidate]]:
    """All settings of every arm, the best first, of equal ones the first by name.

    A diverged or failed run counts as the worst value that any run of its task has; of
    a metric, any run of the same agent, and so does a value that is not finite.

    Args:
      finals: of `finished`.
      rule: what is compared.
      arm_of: a run's arm; settings are compared inside of one.
      planned: runs that must have finished, besides `finals`.
      points: training metrics, for a rule of a metric.
      incomplete: leave settings out that are not finished, instead of refusing.

    Raises:
      UsageError: no runs, a task without reference scores, no such metric, or settings
        of one arm that were not run on the same tasks and seeds.
    """
    if not finals:
        raise UsageError(
            'no rows of finished tuning runs; run a suite with role = "tune" first'
        )
    if rule.metric is None:
        values = _scores(finals)
    else:
        values = _metrics(finals, rule.metric, points)
    known: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run, value in values.items():
        if value is not None:
            known[run.agent if rule.metric else "", run.task].append(value)
    worst = {key: (min if rule.largest else max)(own) for key, own in known.items()}
    arms: dict[Arm, dict[TuningRun, float]] = {}
    for run, value in values.items():
        if value is None:
            value = worst.get((run.agent if rule.metric else "", run.task), 0.0)
        arms.setdefault(arm_of(run), {})[run] = value
    asked: dict[Arm, set[TuningRun]] = {arm: set(own) for arm, own in arms.items()}
    for run in planned:
        asked.setdefault(arm_of(run), set()).add(run)
    return {
        arm: _ranked(_complete(own, asked[arm], incomplete), rule)
        for arm, own in arms.items()
    }


def _scores(finals: Mapping[TuningRun, Row]) -> dict[TuningRun, float | None]:
    """Scores of the last evaluation; None where a run diverged or failed."""
    for row in finals.values():
        if row.status == "ok" and row.score is None:
            raise UsageError(f"{row.task} has no reference scores to choose by")
    return {
        run: _finite(row.score if row.status == "ok" else None)
        for run, row in finals.items()
    }


def _metrics(
    finals: Mapping[TuningRun, Row], metric: str, points: Iterable[MetricPoint]
) -> dict[TuningRun, float | None]:
    """A metric at the end of the last phase; None where a run diverged or failed."""
    jobs = {row.run_id: row for row in finals.values()}
    last = {
        (point.run_id, point.task, point.setting, point.seed): point.values
        for point in points
        if (row := jobs.get(point.run_id)) is not None
        and point.phase == list(row.phase_updates)[-1]
        and point.step == row.updates_total
    }
    found: dict[TuningRun, float | None] = {}
    for run, row in finals.items():
        values = last.get((row.run_id, run.task, run.setting, run.seed))
        if row.status != "ok":
            found[run] = None
        elif values is None:
            raise UsageError(
                f"{run.agent} [{run.setting}] on {run.task}, seed {run.seed}, has no "
                "training metrics of its last update; rows without metrics/ allow only "
                "rules of scores"
            )
        elif metric not in values:
            raise unknown_name(f"training metric of {run.agent}", metric, values)
        else:
            found[run] = _finite(values[metric])
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _complete(
    own: Mapping[TuningRun, float], asked: set[TuningRun], incomplete: bool
) -> dict[TuningRun, float]:
    """The runs of settings that were run on all tasks and seeds of their arm."""
    cells = {(run.task, run.seed) for run in asked}
    there: dict[tuple[str, str], set[tuple[str, int]]] = {
        (run.agent, run.setting): set() for run in sorted(asked)
    }
    for run in own:
        there[run.agent, run.setting].add((run.task, run.seed))
    short = {setting for setting, found in there.items() if found != cells}
    if short and (not incomplete or len(short) == len(there)):
        agent, setting = min(short)
        raise UsageError(
            f"{agent} {setting}: {len(there[agent, setting])} of {len(cells)} runs are "
            "there; let the suite finish, settings are compared on the same runs"
        )
    return {
        run: value
        for run, value in own.items()
        if (run.agent, run.setting) not in short
    }


def _ranked(values: Mapping[TuningRun, float], rule: Rule) -> list[Candidate]:
    """Settings of one arm by falling merit."""
    seeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, value in sorted(values.items()):
        seeds[run.setting][run.task].append(value)
    means = {
        setting: {task: statistics.fmean(own) for task, own in by_task.items()}
        for setting, by_task in seeds.items()
    }

    def merit(setting: str) -> float:
        if rule.metric is None:
            return statistics.fmean(means[setting].values())
        return -statistics.fmean(
            _rank(means[setting][task], [own[task] for own in means.values()], rule)
            for task in means[setting]
        )

    listed = [Candidate(setting, own, merit(setting)) for setting, own in means.items()]
    return sorted(listed, key=lambda one: -one.merit)


def _rank(value: float, every: list[float], rule: Rule) -> float:
    """1 for the best of `every`; equal ones share the mean of their ranks."""
    better = sum((x > value) if rule.largest else (x < value) for x in every)
    return better + (every.count(value) + 1) / 2


def best_on(ranked: list[Candidate], task: str, rule: Rule) -> Candidate:
    """The candidate with the best mean on one task, of equal ones the first by name."""
    sign = -1.0 if rule.largest else 1.0
    return min(ranked, key=lambda one: (sign * one.by_task[task], one.setting))


def chosen(suite: Suite, say: Callable[[str], None]) -> Suite:
    """The suite with what its selection chooses, told; raises as `choose` does."""
    choices = choose(suite, say)
    for label, choice in choices.items():
        if choice.values:
            record = choice.record
            say(
                f"{label}: {choice.setting}, of {record['settings']} settings x "
                f"{record['seeds']} seeds, by {record['rule']} of {record['from']}"
            )
    return dataclasses.replace(suite, choices=choices)


def choose(suite: Suite, say: Callable[[str], None]) -> dict[str, Choice]:
    """What the suite's selection chooses, by the label of the agent.

    An agent with settings of its own in the suite keeps them; nothing is chosen for it.

    Args:
      suite: a test; without a selection nothing is chosen.
      say: takes messages for the user.

    Raises:
      ResultsError: there is no folder of tuning runs, or it cannot be read.
      UsageError: the tuning runs are not finished, do not fit the rule or the test, or
        share a seed with it.
    """
    selection = suite.selection
    if selection is None:
        return {}
    folder = selection.folder()
    if not folder.is_dir():
        raise ResultsError(
            f"{folder}: no such folder, so nothing to choose settings from; run the "
            f"suite '{selection.source}' first, or give its results folder as 'from'"
        )
    rule = parse_rule(selection.rule)
    plan = read_plan(folder)
    finals = _of_one_suite(finished(read_rows(folder, say), plan), selection)
    points = read_metrics(folder) if rule.metric is not None else []
    choices: dict[str, Choice] = {}
    name = next((row.suite for row in finals.values()), selection.source)
    for label in agent_labels(suite):
        if parse_label(label)[0] in suite.settings:
            choices[label] = Choice(_record(name, selection, 0, 0))
            continue
        own = {run: row for run, row in finals.items() if run.agent == label}
        if not own:
            raise UsageError(
                f"no finished tuning runs of {label} are in {folder}; tune it, or give "
                f"the suite a setting [settings.{parse_label(label)[0]}.NAME]"
            )
        planned = [run for run in _planned(plan, name) if run.agent == label]
        _check(label, own, planned, suite, say)
        ranked = candidates(
            own,
            rule,
            arm_of=lambda run: run.agent,
            planned=planned,
            points=points,
            incomplete=selection.incomplete,
        )[label]
        left = len({run.setting for run in (*own, *planned)}) - len(ranked)
        if left:
            say(f"{label}: {left} settings are not tuned to the end and left out")
        choices[label] = _choice(label, ranked, own, suite, rule, name)
    return choices


def _of_one_suite(
    finals: dict[TuningRun, Row], selection: Selection
) -> dict[TuningRun, Row]:
    names = {row.suite for row in finals.values()}
    if selection.source in names:
        return {r: row for r, row in finals.items() if row.suite == selection.source}
    if len(names) > 1:
        raise UsageError(
            f"{selection.folder()} holds tuning runs of several suites "
            f"({', '.join(sorted(names))}); keep one in a folder"
        )
    return finals


def _planned(plan: Plan | None, suite: str) -> list[TuningRun]:
    """Tuning runs that were asked for."""
    return [
        TuningRun(job.agent, member.setting, member.task, member.seed)
        for job in (plan.jobs if plan else ())
        if job.role == "tune" and job.suite == suite
        for member in job.members
    ]


def _check(
    label: str,
    own: Mapping[TuningRun, Row],
    planned: Iterable[TuningRun],
    suite: Suite,
    say: Callable[[str], None],
) -> None:
    """Refuses tuning runs that do not fit the test."""
    assert suite.selection is not None
    test = range(suite.first_seed, suite.first_seed + suite.seeds)
    shared = sorted({run.seed for run in (*own, *planned)} & set(test))
    if shared:
        raise UsageError(
            f"{label}: seed {shared[0]} served for tuning and would serve for testing; "
            "settings are chosen on seeds of their own"
        )
    for what, found in (
        (
            "numbers of updates",
            {strict_json(row.phase_updates) for row in own.values()},
        ),
        ("evaluation protocols", {strict_json(row.protocol) for row in own.values()}),
    ):
        if len(found) > 1:
            raise UsageError(
                f"{label}: tuning runs have different {what} "
                f"({', '.join(sorted(found))}); keep what compares in one folder"
            )
    one = next(iter(own.values()))
    if one.updates_total != suite.updates:
        differ = (
            f"{label}: tuning runs have {one.updates_total:,} updates, the test has "
            f"{suite.updates:,}"
        )
        if not suite.selection.other_updates:
            raise UsageError(
                f"{differ}; tune with as many, or say other_updates = true in "
                "[selection]"
            )
        say(differ)
    version = one.protocol.get("version", suite.protocol.version)
    of_scores = parse_rule(suite.selection.rule).metric is None
    if of_scores and version != suite.protocol.version:
        raise UsageError(
            f"{label}: scores of the tuning runs are of protocol version {version}, "
            f"the test's of {suite.protocol.version}; tune again"
        )


def _choice(
    label: str,
    ranked: list[Candidate],
    own: Mapping[TuningRun, Row],
    suite: Suite,
    rule: Rule,
    name: str,
) -> Choice:
    """The best setting, with the values that it had on every task of the test."""
    assert suite.selection is not None
    tuned = sorted(ranked[0].by_task)
    rows = {(run.setting, run.task): row for run, row in own.items()}

    def values_of(setting: str, task: str) -> dict[str, Any]:
        row = rows[setting, task]
        return {**row.config, **row.hyper}

    values: dict[str, Mapping[str, Any]] = {}
    for task in suite.tasks:
        if task in tuned:
            best = best_on(ranked, task, rule) if rule.per_task else ranked[0]
            values[task] = values_of(best.setting, task)
            continue
        if rule.per_task:
            raise UsageError(
                f"{label}: {suite.selection.rule} chooses per task, and {task} has no "
                f"tuning runs; there are of {', '.join(tuned)}"
            )
        found = [values_of(ranked[0].setting, other) for other in tuned]
        if any(other != found[0] for other in found):
            raise UsageError(
                f"{label} [{ranked[0].setting}] has different values on {tuned[0]} and "
                f"other tuning tasks, and none on {task}; tune on {task} too"
            )
        values[task] = found[0]
    seeds = len({run.seed for run in own})
    return Choice(
        record=_record(name, suite.selection, len(ranked), seeds),
        setting=PER_TASK_SETTING if rule.per_task else ranked[0].setting,
        values=values,
        data={
            run.task: row.recipe_hash or row.dataset_hash for run, row in own.items()
        },
    )


def _record(
    suite: str, selection: Selection, settings: int, seeds: int
) -> dict[str, Any]:
    """What rows say of how their setting was chosen."""
    return {
        "from": suite,
        "rule": selection.rule,
        "settings": settings,
        "seeds": seeds,
    }


def other_data(choices: Mapping[str, Choice], tasks: Iterable[LoadedTask]) -> list[str]:
    """One line per task whose data are not those that its settings were tuned on."""
    here = {one.task.id: one.recipe_hash or one.dataset_hash for one in tasks}
    return sorted(
        {
            f"{task}: settings were tuned on other data of this task"
            for choice in choices.values()
            for task, tuned in choice.data.items()
            if task in here and here[task] != tuned
        }
    )
