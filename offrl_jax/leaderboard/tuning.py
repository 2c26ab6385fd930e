"""What an agent's trained policies are worth to someone who must choose one online.

The policies of an agent on a task are all its settings and seeds, after the last
update.  Two curves, see `bandit`: the expected best of n evaluated policies, and the
value of the policy that a bandit would deploy after n episodes.  Agents of different
family, preset, updates or protocol are never pooled, as in the leaderboard.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.errors import ResultsError, UsageError, unknown_name
from offrl_jax.leaderboard import bandit, ranking, statistics
from offrl_jax.leaderboard.ranking import Bounds
from offrl_jax.leaderboard.runs import Run, SectionKey, base_of, final_runs
from offrl_jax.leaderboard.sections import (
    RETURN,
    SCORE,
    Group,
    absent,
    gather,
    own_value,
)
from offrl_jax.results import BEHAVIOUR, Row, read_plans, read_rows

ARMS = 8
"""Policies that the bandit chooses from, as in Unifloral's text."""
PULLS = 200
"""Episodes that it may play."""
REPLICATIONS = 2_000
"""Bootstrap replications, over policies, of the expected best."""
DEPLOYMENTS = 200
"""Of these, populations on which the bandit is simulated."""
TRIALS = 100
"""Simulated bandits per population."""
POINT_POPULATIONS = 50
"""Repetitions of `TRIALS` on the policies as they are: 5,000 bandits."""

Curve = tuple[Bounds, ...]
"""At 1, 2, 3, ... evaluated policies or played episodes."""


class Curves(NamedTuple):
    """What the policies of an agent are worth, in the unit of the task.

    Attributes:
      expected_best: after 1, 2, ... policies were evaluated for good.
      deployed: after 1, 2, ... episodes of a bandit.
    """

    expected_best: Curve
    deployed: Curve


class TaskTuning(NamedTuple):
    """The policies of one agent on one task.

    Attributes:
      settings: names of them.
      seeds: trained per setting, most.
      policies: that count.
      arms: of the bandit: all policies if they are fewer than asked for.
      curves: with 95 % intervals, without ends for a single policy.
    """

    settings: int
    seeds: int
    policies: int
    arms: int
    curves: Curves


@dataclasses.dataclass(frozen=True)
class AgentTuning:
    """All policies of one agent.

    Attributes:
      agent: label.
      role: of their rows, `tune` or `test`.
      tasks: by task with a policy that counts.
      pooled: means over `Tuning.pooled` tasks; None without policies of each of them.
    """

    agent: str
    role: str
    tasks: Mapping[str, TaskTuning]
    pooled: Curves | None


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Agents of equal suite, family, preset, updates and protocol.

    Attributes:
      key: what they have in common.
      pooled: tasks with scores of which any policy counts.
      units: `score` or `return`, by task of which any policy counts.
      behaviour: mean of the dataset's episodes in that unit, by task that has it.
      agents: by label.
      messages: what is absent or compares badly, one line each.
    """

    key: SectionKey
    pooled: tuple[str, ...]
    units: Mapping[str, str]
    behaviour: Mapping[str, float]
    agents: tuple[AgentTuning, ...]
    messages: tuple[str, ...]


def build(
    folder: Path,
    agents: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    *,
    arms: int = ARMS,
    pulls: int = PULLS,
) -> tuple[tuple[Tuning, ...], tuple[str, ...]]:
    """The curves of a results folder, and messages about it.

    The policies of an agent and family are those of role `tune` where there are any,
    else those of role `test`.

    Args:
      folder: of results.
      agents: only these: labels, or names, which stand for every preset.
      tasks: only these; means over tasks are over those of them that have scores.
      arms: of the bandit, K.
      pulls: episodes of the bandit, P.

    Raises:
      UsageError: no arms or pulls, an agent or task of which the folder has no policy.
      ResultsError: no such folder, no policy in it, or rows that cannot be read.
    """
    for name, number in (("policies", arms), ("episodes", pulls)):
        if number < 1:
            raise UsageError(f"{name} must be at least 1, got {number}")
    if not folder.is_dir():
        raise ResultsError(
            f"{folder}: no such folder; give the results folder of `offrl benchmark`"
        )
    messages: list[str] = []
    rows = read_rows(folder, lambda m: messages.append(m.replace(f"{folder}/", "")))
    roles = _runs(rows, folder)
    runs = [run for group in roles.values() for run in group]
    for kind, names, there in (
        ("agent", agents, {name for run in runs for name in _names(run)}),
        ("task", tasks, {run.cell.task for run in runs}),
    ):
        for name in names or ():
            if name not in there:
                raise unknown_name(f"{kind} of these results", name, there)
    behaviour = {
        (row.task, row.recipe_hash or row.dataset_hash): row
        for row in rows
        if row.agent == BEHAVIOUR
    }
    role_of = {
        (run.section, run.cell.agent): role
        for role, group in roles.items()
        for run in group
    }
    groups: dict[SectionKey, list[Run]] = defaultdict(list)
    for run in runs:
        if (agents is None or _names(run) & set(agents)) and (
            tasks is None or run.cell.task in tasks
        ):
            groups[run.section].append(run)
    found: list[Tuning] = []
    for key, group in sorted(groups.items()):
        whole = gather(key, "", group, behaviour, {})
        if whole.begun:
            found.append(_tuning(whole, role_of, arms, pulls))
        else:
            messages += absent(whole.runs, whole.labels)
    if not found:
        raise ResultsError(
            f"{folder}: no policy has come to its last update; run a suite with "
            'role = "tune", or any other, with `offrl benchmark` first'
        )
    return tuple(found), tuple(messages)


def _names(run: Run) -> set[str]:
    return {run.cell.agent, base_of(run.cell.agent)}


def _runs(rows: Sequence[Row], folder: Path) -> dict[str, list[Run]]:
    """Runs by role; those of role `test` only of agents and families without others."""
    plan = read_plans(folder)
    tune, test = (final_runs(rows, plan, role=role)[0] for role in ("tune", "test"))
    tuned = {(run.cell.agent, run.section.family) for run in tune}
    left = [run for run in test if (run.cell.agent, run.section.family) not in tuned]
    return {"tune": tune, "test": left}


def _tuning(
    group: Group, role_of: Mapping[tuple[SectionKey, str], str], arms: int, pulls: int
) -> Tuning:
    begun = sorted(group.begun)
    pooled = [task for task in begun if group.units[task] == SCORE]
    messages = list(absent(group.runs, group.labels))
    agents: list[AgentTuning] = []
    for agent in sorted({run.cell.agent for run in group.runs}):
        own = [run for run in group.runs if run.cell.agent == agent]
        by_task: dict[str, TaskTuning] = {}
        samples: dict[str, _Samples] = {}
        for task in begun:
            runs = [r for r in own if r.cell.task == task and r.row is not None]
            if not runs:
                continue
            samples[task] = _sample(group, agent, task, runs, arms, pulls)
            seeds: dict[str, int] = defaultdict(int)
            for run in runs:
                seeds[run.cell.setting] += 1
            by_task[task] = TaskTuning(
                settings=len(seeds),
                seeds=max(seeds.values()),
                policies=len(runs),
                arms=min(arms, len(runs)),
                curves=_curves([samples[task]], len(runs) > 1),
            )
            if len(runs) < arms:
                messages.append(
                    f"{agent} on {task}: {len(runs)} policies, fewer than {arms}; the "
                    "bandit chooses from all of them"
                )
        if not by_task:
            continue
        lacking = [task for task in pooled if task not in by_task]
        if lacking:
            messages.append(
                f"{agent}: no mean over tasks, without policies of {', '.join(lacking)}"
            )
        several = any(by_task[t].policies > 1 for t in pooled if t in by_task)
        mean = None
        if pooled and not lacking:
            mean = _curves([samples[task] for task in pooled], several)
        role = role_of[group.key, agent]
        agents.append(AgentTuning(agent, role, by_task, mean))
    raw = [task for task in begun if group.units[task] == RETURN]
    if raw:
        messages.append(f"no reference scores, so in no mean: {', '.join(raw)}")
    datasets = {
        task: own_value(group.behaviour.get(task), group.units[task]) for task in begun
    }
    return Tuning(
        key=group.key,
        pooled=tuple(pooled),
        units={task: group.units[task] for task in begun},
        behaviour={t: value for t, value in datasets.items() if value is not None},
        agents=tuple(agents),
        messages=tuple(messages),
    )


class _Samples(NamedTuple):
    """Curves `[x]` of one task, and of bootstrapped policies `[replications, x]`."""

    expected: np.ndarray
    expected_samples: np.ndarray
    deployed: np.ndarray
    deployed_samples: np.ndarray


def _curves(samples: Sequence[_Samples], several: bool) -> Curves:
    """Means over tasks; the policies of each task are drawn on their own."""

    def curve(values: list[np.ndarray], drawn: list[np.ndarray]) -> Curve:
        length = min(len(value) for value in values)
        intervals = statistics.percentiles(
            np.mean([value[:length] for value in values], axis=0),
            np.mean([draw[:, :length] for draw in drawn], axis=0).T,
        )
        return tuple(
            ranking.bounds(statistics.Interval(*ends), several)
            for ends in zip(*intervals, strict=True)
        )

    return Curves(
        curve([s.expected for s in samples], [s.expected_samples for s in samples]),
        curve([s.deployed for s in samples], [s.deployed_samples for s in samples]),
    )


def _sample(
    group: Group, agent: str, task: str, runs: Sequence[Run], arms: int, pulls: int
) -> _Samples:
    policies = _policies(group, task, runs)
    size = len(policies.values)
    # Of the names: a curve does not depend on who else is in the folder.
    key = jax.random.key(ranking.SEED)
    for name in (agent, task):
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    drawn_key, bandit_key = jax.random.split(key)
    drawn = np.asarray(
        bandit.populations(
            drawn_key, policies.count, size=size, replications=REPLICATIONS
        )
    )
    # The policies as they are come first, often enough to leave little noise.
    whole = np.tile(np.arange(size, dtype=np.int32), (POINT_POPULATIONS, 1))
    deployed = bandit.deployment(
        bandit_key,
        policies,
        jnp.concatenate([whole, drawn[:DEPLOYMENTS]]),
        arms=arms,
        pulls=pulls,
        trials=TRIALS,
    )
    deployed = np.asarray(deployed, np.float64)
    values = np.asarray(policies.values, np.float64)[: len(runs)]
    return _Samples(
        bandit.expected_best(values),
        bandit.expected_best(values[drawn[:, : len(runs)]]),
        deployed[:POINT_POPULATIONS].mean(axis=0),
        deployed[POINT_POPULATIONS:],
    )


def _policies(group: Group, task: str, runs: Sequence[Run]) -> bandit.Policies:
    """Values and rewards, padded to multiples so that tasks share programs.

    A reward is a score over 100, or a return over the range of the agent's returns on
    the task.  A diverged policy has one episode, of the floor.
    """
    values, returns = [], []
    for run in runs:
        value = group.value(task, run.row) if run.row else None
        if run.row is None or value is None:
            continue
        values.append(value)
        returns.append(None if run.diverged else np.asarray(run.row.returns))
    slope, offset = _to_values(group, task)
    episodes = [
        np.array([value]) if own is None else slope * own + offset
        for value, own in zip(values, returns, strict=True)
    ]
    scale = 100.0
    if group.units[task] == RETURN:
        every = np.concatenate(episodes)
        scale = float(np.ptp(every)) or 1.0
    places = -(-len(values) // 16) * 16
    width = -(-max(map(len, episodes)) // 20) * 20
    rewards = np.zeros((places, width), np.float32)
    padded = np.zeros(places, np.float32)
    lengths = np.ones(places, np.int32)
    for i, (value, own) in enumerate(zip(values, episodes, strict=True)):
        padded[i], lengths[i] = value, len(own)
        rewards[i, : len(own)] = own / scale
    whole = (padded, rewards, lengths, np.array(len(values), np.int32))
    return bandit.Policies(*map(jnp.asarray, whole))


def _to_values(group: Group, task: str) -> tuple[float, float]:
    """Slope and offset from a return of the task to its value.

    Rows hold mean returns and their scores, but not the references behind them: two
    rows tell them.  Where all means are equal, any line through them will do.
    """
    if group.units[task] == RETURN:
        return 1.0, 0.0
    known = [
        (float(np.mean(run.row.returns)), run.row.score)
        for run in group.runs
        if run.cell.task == task and run.row is not None and not run.diverged
        if run.row.score is not None
    ]
    if not known:
        return 0.0, 0.0
    (low, low_score), (high, high_score) = min(known), max(known)
    slope = (high_score - low_score) / (high - low) if high > low else 0.0
    return slope, low_score - slope * low


def table(sections: Iterable[Tuning]) -> list[dict[str, object]]:
    """Every point as a record with the columns `COLUMNS`; empty where unknown."""
    records: list[dict[str, object]] = []
    for section in sections:
        key = section.key
        common: dict[str, object] = {
            "suite": key.suite,
            "family": key.family,
            "preset": key.preset,
            "updates": key.updates_total,
            "protocol": json.dumps(json.loads(key.protocol), sort_keys=True),
        }
        for own in section.agents:
            common |= {"agent": own.agent, "role": own.role}
            if own.pooled is not None:
                about = {"task": "pooled tasks", "tasks": len(section.pooled)}
                about |= {"unit": SCORE}
                records += _points({**common, **about}, own.pooled)
            for task, found in own.tasks.items():
                about = {"task": task, "tasks": 1, "unit": section.units[task]}
                about |= {"policies": found.policies, "settings": found.settings}
                about |= {"arms": found.arms}
                records += _points({**common, **about}, found.curves)
    return records


def _points(about: Mapping[str, object], curves: Curves) -> list[dict[str, object]]:
    return [
        {**about, "statistic": statistic, "n": n, **dataclasses.asdict(value)}
        for statistic, curve in curves._asdict().items()
        for n, value in enumerate(curve, start=1)
    ]


COLUMNS: tuple[str, ...] = (
    "suite",
    "family",
    "preset",
    "updates",
    "protocol",
    "agent",
    "role",
    "task",
    "tasks",
    "unit",
    "statistic",
    "n",
    "value",
    "low",
    "high",
    "policies",
    "settings",
    "arms",
)
"""One line per agent, task and point: `n` counts policies (`expected_best`) or episodes
(`deployed`)."""
