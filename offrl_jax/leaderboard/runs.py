"""Which runs count: the last evaluation of every planned or written test run.

A *cell* is one agent with one setting on one task, and a run is one seed of it.
Sections are the tables: runs that differ in suite, family, preset, number of updates or
protocol are never put into one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from offrl_jax.errors import unknown_name
from offrl_jax.results import BEHAVIOUR, Plan, Row
from offrl_jax.results.rows import strict_json


class SectionKey(NamedTuple):
    """What all runs of one table have in common.

    Attributes:
      suite: name of the suite.
      family: of tasks.
      preset: suffix of the agent labels, `full` where there is none.
      updates_total: of the last phase.
      protocol: canonical JSON; of several protocols, `{"pooled": [...]}`; of how
        settings were chosen the rule and the tuning suite, not how many settings and
        seeds an agent had there.
    """

    suite: str
    family: str
    preset: str
    updates_total: int
    protocol: str


Merge = Callable[[Iterable[SectionKey]], Mapping[SectionKey, SectionKey]]
"""Puts runs of several keys under one; keys that it leaves out stay as they are."""

POOLED = "pooled"
"""The name under which a merged key holds its protocols."""
POOLABLE = frozenset({"episodes", "evaluations", "curve_episodes", "seed"})
"""What runs of one table may differ in if asked for; never the protocol's version."""


class CellKey(NamedTuple):
    """One agent with one setting on one task."""

    agent: str
    setting: str
    task: str


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed of a cell.

    Attributes:
      section: the table, after merging.
      protocol: its own, canonical JSON.
      cell: agent, setting and task.
      seed: of the run.
      run_id: of its job.
      config: canonical JSON of the agent's structure.
      hyper: canonical JSON of the setting's values.
      dataset: recipe hash, or the hash of the bytes where there is no recipe.
      row: the row that counts: of the last step, or of a divergence; else None.
      reached: the latest step with any row; of a divergence, the first that shows it.
      failure: one line, where the latest row says `failed` (and nothing counts).
      selection: how its setting was chosen, as its protocol says; empty where a suite
        gave the setting.
    """

    section: SectionKey
    protocol: str
    cell: CellKey
    seed: int
    run_id: str
    config: str
    hyper: str
    dataset: str | None
    row: Row | None
    reached: int
    failure: str | None
    selection: Mapping[str, Any]

    @property
    def diverged(self) -> bool:
        """Whether the run counts as the floor: it diverged, or has no finite return."""
        return self.row is not None and has_diverged(self.row)


def preset_of(agent: str) -> str:
    """`quick` of `td3_bc@quick`; `full` where the label has no suffix."""
    return agent.partition("@")[2] or "full"


def base_of(agent: str) -> str:
    """`td3_bc` of `td3_bc@quick`."""
    return agent.partition("@")[0]


def mean_return(row: Row) -> float | None:
    """Mean raw return of the row's episodes; None if there is no finite one."""
    if not row.returns:
        return None
    mean = math.fsum(row.returns) / len(row.returns) if _finite(row.returns) else None
    return mean if mean is not None and math.isfinite(mean) else None


def has_diverged(row: Row) -> bool:
    """Whether a row counts as the floor: it diverged, or has no finite return."""
    return row.status == "diverged" or mean_return(row) is None


def _finite(values: Iterable[float]) -> bool:
    return all(map(math.isfinite, values))


def merge_protocols(keys: Iterable[SectionKey]) -> dict[SectionKey, SectionKey]:
    """Merges keys that differ in nothing but the `POOLABLE` parts of their protocol."""
    alike: dict[tuple[SectionKey, str], set[SectionKey]] = defaultdict(set)
    for key in keys:
        protocol = json.loads(key.protocol)
        fixed = {name: protocol[name] for name in protocol.keys() - POOLABLE}
        alike[key._replace(protocol=""), strict_json(fixed)].add(key)
    merged: dict[SectionKey, SectionKey] = {}
    for several in alike.values():
        if len(several) > 1:
            protocols = [json.loads(key.protocol) for key in sorted(several)]
            pooled = strict_json({POOLED: protocols})
            merged |= {key: key._replace(protocol=pooled) for key in several}
    return merged


def merge_suites(keys: Iterable[SectionKey]) -> dict[SectionKey, SectionKey]:
    """Merges keys that differ in the suite's name alone."""
    return {key: key._replace(suite="") for key in keys}


def shared_protocol(protocol: Mapping[str, Any]) -> str:
    """Canonical JSON of the part of a protocol that all runs of a table share."""
    selection = protocol.get("selection")
    if selection is None:
        return strict_json(protocol)
    shared = {name: selection.get(name) for name in ("from", "rule")}
    return strict_json({**protocol, "selection": shared})


def _selection(protocol: Mapping[str, Any]) -> Mapping[str, Any]:
    selection = protocol.get("selection", {})
    return selection if selection.get("settings") else {}


def final_runs(
    rows: Iterable[Row],
    plan: Plan | None,
    merge: Merge | None = None,
    role: str = "test",
) -> tuple[list[Run], int]:
    """The run that counts for every cell and seed, and how many others it superseded.

    A job that starts anew gets another `run_id`.  Of several runs of the same cell and
    seed the last one with a result counts: in the order of the plan, runs outside of it
    first and by name.  Where keys are merged, that holds within the merged one.
    """
    runs = _all_runs(rows, plan, role)
    if merge is not None:
        merged = merge({run.section for run in runs})
        runs = [
            dataclasses.replace(run, section=merged.get(run.section, run.section))
            for run in runs
        ]
    order = {job.run_id: i for i, job in enumerate(plan.jobs)} if plan else {}
    by_cell: dict[tuple[SectionKey, CellKey, int], list[Run]] = defaultdict(list)
    for run in runs:
        by_cell[run.section, run.cell, run.seed].append(run)

    def precedence(run: Run) -> tuple[bool, int, str]:
        return (run.row is not None, order.get(run.run_id, -1), run.run_id)

    kept = [max(runs, key=precedence) for _, runs in sorted(by_cell.items())]
    return kept, sum(map(len, by_cell.values())) - len(kept)


def _all_runs(rows: Iterable[Row], plan: Plan | None, role: str) -> list[Run]:
    jobs = {job.run_id: job for job in plan.jobs} if plan else {}
    evaluations: dict[tuple[str, CellKey, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.role == role and row.agent != BEHAVIOUR and row.seed is not None:
            cell = CellKey(row.agent, row.setting, row.task)
            evaluations[row.run_id, cell, row.seed].append(row)
    runs: list[Run] = []
    for job in jobs.values():
        if job.role != role:
            continue
        config = strict_json(job.config)
        for member in job.members:
            cell = CellKey(job.agent, member.setting, member.task)
            section = SectionKey(
                job.suite,
                member.family,
                preset_of(job.agent),
                job.updates_total,
                shared_protocol(job.protocol),
            )
            found = evaluations.pop((job.run_id, cell, member.seed), [])
            hyper = strict_json(member.hyper)
            dataset = _dataset(job.datasets.get(member.task, {}))
            runs.append(
                _run(
                    section,
                    cell,
                    member.seed,
                    job.run_id,
                    config,
                    hyper,
                    dataset,
                    found,
                    _selection(job.protocol),
                )
            )
    for (run_id, cell, seed), found in evaluations.items():
        last = max(found, key=lambda row: row.step)
        section = SectionKey(
            last.suite,
            last.family,
            preset_of(last.agent),
            last.updates_total,
            shared_protocol(last.protocol),
        )
        config, hyper = strict_json(last.config), strict_json(last.hyper)
        dataset = last.recipe_hash or last.dataset_hash
        chosen = _selection(last.protocol)
        runs.append(
            _run(section, cell, seed, run_id, config, hyper, dataset, found, chosen)
        )
    return runs


def _dataset(hashes: Mapping[str, Any]) -> str | None:
    return hashes.get("recipe_hash") or hashes.get("dataset_hash")


def _run(
    section: SectionKey,
    cell: CellKey,
    seed: int,
    run_id: str,
    config: str,
    hyper: str,
    dataset: str | None,
    rows: list[Row],
    selection: Mapping[str, Any],
) -> Run:
    counted: Row | None = None
    failure: str | None = None
    latest = max(rows, key=lambda row: row.step, default=None)
    if latest is not None:
        dataset = latest.recipe_hash or latest.dataset_hash
        if latest.status == "failed":
            failure = latest.error or "no reason given"
        elif latest.status == "diverged" or latest.step == section.updates_total:
            counted = latest
    reached = latest.step if latest is not None else 0
    if counted is not None and counted.status == "diverged":
        reached = min(row.step for row in rows if row.status == "diverged")
    return Run(
        section=section,
        protocol=section.protocol,
        cell=cell,
        seed=seed,
        run_id=run_id,
        config=config,
        hyper=hyper,
        dataset=dataset,
        row=counted,
        reached=reached,
        failure=failure,
        selection=selection,
    )


def device_seconds(row: Row) -> float | None:
    """Training seconds of the row's population x its devices / its members."""
    members, devices = (row.population.get(n) for n in ("members", "devices"))
    if row.wall_s is None or not isinstance(members, int) or members < 1:
        return None
    return row.wall_s * (devices if isinstance(devices, int) else 1) / members


def check_names(
    runs: Iterable[Run], agents: Sequence[str] | None, tasks: Sequence[str] | None
) -> None:
    """Refuses a name of which there is no run.

    Raises:
      UsageError: with the nearest name that there is.
    """
    runs = list(runs)
    for kind, names, there in (
        ("agent", agents, {name for run in runs for name in _names(run)}),
        ("task", tasks, {run.cell.task for run in runs}),
    ):
        for name in names or ():
            if name not in there:
                raise unknown_name(f"{kind} of these results", name, there)


def is_chosen(
    run: Run, agents: Sequence[str] | None, tasks: Sequence[str] | None
) -> bool:
    """Whether a run is of these agents (labels, or names alone) and tasks."""
    return (agents is None or not _names(run).isdisjoint(agents)) and (
        tasks is None or run.cell.task in tasks
    )


def _names(run: Run) -> set[str]:
    """What may be said for the agent of a run: its label, or its name alone."""
    return {run.cell.agent, base_of(run.cell.agent)}


def tuning_budget(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[int, set[int]]]:
    """Settings tried and seeds used in rows of role `tune`, by agent and family."""
    settings: dict[tuple[str, str], set[str]] = defaultdict(set)
    seeds: dict[tuple[str, str], set[int]] = defaultdict(set)
    for row in rows:
        if row.role == "tune" and row.seed is not None:
            settings[row.agent, row.family].add(strict_json(row.hyper))
            seeds[row.agent, row.family].add(row.seed)
    return {key: (len(settings[key]), seeds[key]) for key in settings}
