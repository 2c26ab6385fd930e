"""Cutting jobs into rounds of seeds: every agent on every task first, then more."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import test_benchmark_jobs as whole_jobs
from test_benchmark_jobs import SUITE as PAIR
from test_benchmark_jobs import run
from test_benchmark_planning import SUITE, finish, unheard, wanted

from offrl_jax import leaderboard
from offrl_jax.benchmark import executors as executors_module
from offrl_jax.benchmark.jobs import Stopped
from offrl_jax.benchmark.overview import Limits
from offrl_jax.benchmark.planning import Split, plan_missing
from offrl_jax.benchmark.splitting import cut, in_rounds
from offrl_jax.results import Job, read_rows

store = whole_jobs.store
SETTINGS = {"td3_bc": {"a=1": {"alpha": 1.0}, "a=2": {"alpha": 2.0}}}


def runs(jobs: list[Job]) -> Counter:
    return Counter(
        (job.agent, m.task, m.setting, m.seed) for job in jobs for m in job.members
    )


@pytest.fixture(params=[5, 7])
def job(request) -> Job:
    """Two tasks x two settings x some seeds."""
    suite = dataclasses.replace(SUITE, settings=SETTINGS, seeds=request.param)
    return wanted(suite, split=Split(4, "cpu"))[1]


@pytest.mark.parametrize("most", range(1, 30))
def test_the_fewest_populations_in_the_order_of_seeds(job, most):
    parts = cut(job, most)
    members = len(job.members)
    assert runs(parts) == runs([job])
    assert len(parts) == -(-members // most)
    assert max(len(part.members) for part in parts) <= most
    # All but the last are of one size, so one compiled program serves them.
    assert len({len(part.members) for part in parts[:-1]}) <= 1
    assert len({part.run_id for part in parts}) == len(parts)
    if len(parts) > 1:
        seeds = [m.seed for part in parts for m in part.members]
        assert seeds == sorted(seeds)
    for part in parts:
        assert part.split["devices"] <= min(4, len(part.members))
        assert set(part.datasets) == {m.task for m in part.members}


def test_a_job_that_fits_is_the_same_job(job):
    (same,) = cut(dataclasses.replace(job, run_id=""), len(job.members))
    assert same == job
    assert cut(job, len(job.members), waves=1) == [job]


def test_whole_seeds_or_whole_devices_where_they_fit():
    suite = dataclasses.replace(SUITE, settings=SETTINGS, seeds=6)
    job = wanted(suite, split=Split(4, "cpu"))[1]  # 24 members, 4 per seed
    assert [len(part.members) for part in cut(job, 11)] == [8, 8, 8]
    assert [{m.seed for m in p.members} for p in cut(job, 8)] == [
        {0, 1},
        {2, 3},
        {4, 5},
    ]
    assert [len(part.members) for part in cut(job, 23)] == [12, 12]
    one = wanted(dataclasses.replace(SUITE, seeds=9), split=Split(4, "cpu"))[0]
    assert [len(part.members) for part in cut(one, 17)] == [10, 8]


@pytest.mark.parametrize(
    ("waves", "sizes"), [(2, [3, 2]), (3, [2, 2, 1]), (99, [1] * 5)]
)
def test_waves(waves, sizes):
    suite = dataclasses.replace(SUITE, seeds=5)
    parts = cut(wanted(suite)[0], 999, waves)
    assert [len({m.seed for m in part.members}) for part in parts] == sizes
    assert [len(part.members) for part in parts] == [2 * size for size in sizes]
    # A limit cuts the waves further.
    parts = cut(wanted(suite)[0], 4, waves)
    assert max(len(part.members) for part in parts) <= 4
    assert runs(parts) == runs([wanted(suite)[0]])


def test_one_round_after_the_other_and_the_cheapest_first():
    suite = dataclasses.replace(SUITE, agents=("td3_bc", "bc", "iql"), seeds=5)
    whole = wanted(suite)
    seconds = {"td3_bc@quick": 30.0, "iql@quick": 10.0}

    def cost(job: Job) -> float | None:
        return seconds.get(job.agent)

    # What needs no cut keeps its order.
    assert in_rounds(whole, cost) == whole
    _, jobs = plan_missing(whole, None, [], unheard, waves=3, seconds=cost)
    names = [job.agent.partition("@")[0] for job in jobs]
    assert names == ["iql", "td3_bc", "bc"] * 3
    first = [min(m.seed for m in job.members) for job in jobs]
    assert first == [0] * 3 + [2] * 3 + [4] * 3
    for job in jobs[:3]:
        assert {m.task for m in job.members} == set(suite.tasks)


def test_populations_smaller_than_a_seed_still_come_seed_by_seed():
    suite = dataclasses.replace(SUITE, settings=SETTINGS)  # td3_bc: 4 per seed
    _, jobs = plan_missing(wanted(suite), None, [], unheard, most=lambda job: 3)
    last_first = max(
        i for i, job in enumerate(jobs) if any(m.seed == 0 for m in job.members)
    )
    done = runs(jobs[: last_first + 1])
    assert {key for key in done if key[3] == 0} == {
        key for key in runs(wanted(suite)) if key[3] == 0
    }
    assert last_first < len(jobs) / 2


def test_begun_jobs_are_never_cut_again():
    plan, begun = plan_missing(wanted(), None, [], unheard)
    again, jobs = plan_missing(
        wanted(), plan, finish(begun[0])[:2], unheard, most=lambda job: 1, waves=3
    )
    assert jobs == begun and again == plan


def test_after_the_first_round_every_agent_stands_in_the_leaderboard(
    store, tmp_path: Path, monkeypatch
):
    train, begun = executors_module.run_job, []

    def only_two(job, *rest):
        begun.append(job)
        if len(begun) > 2:
            raise Stopped
        train(job, *rest)

    monkeypatch.setattr(executors_module, "run_job", only_two)
    suite = dataclasses.replace(
        PAIR,
        agents=("bc", "gaussian_bc"),
        settings={
            name: {"s": {"hidden": [4], "batch_size": 8}}
            for name in ("bc", "gaussian_bc")
        },
        updates=20,
        seeds=4,
    )
    assert run(store, tmp_path, suite, limits=Limits(waves=2)).stopped
    assert [len(job.members) for job in begun] == [4, 4, 4]
    text = leaderboard.draw(leaderboard.build(tmp_path), "csv")
    scored = {
        (agent, task)
        for line in text.splitlines()
        for agent in ("gaussian_bc@quick", "bc@quick")
        for task in suite.tasks
        if f",{agent}," in f",{line}," and task in line
    }
    rows = {
        (row.agent, row.task, row.seed)
        for row in read_rows(tmp_path, print)
        if row.seed is not None and row.step == row.updates_total
    }
    assert rows == {
        (f"{agent}@quick", task, seed)
        for agent in ("bc", "gaussian_bc")
        for task in suite.tasks
        for seed in (0, 1)
    }
    assert len(scored) == 4, text
