"""On-policy agents through the whole benchmark: plan, train, stop, resume, rows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

import offrl_jax
from offrl_jax import leaderboard
from offrl_jax.benchmark import jobs as jobs_module
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.runner import run_suite
from offrl_jax.benchmark.suites import Protocol, Suite
from offrl_jax.datasets.store import Store
from offrl_jax.results import BEHAVIOUR, read_plan, read_rows

TINY = {"hidden": [8, 8], "environments": 4, "steps": 8}
SUITE = Suite(
    name="tiny",
    description="",
    tasks=("online/CartPole-v1", "online/Hopper-v5"),
    agents=("rank1_ac",),
    preset="quick",
    seeds=2,
    updates=32 * 6,
    protocol=Protocol(episodes=3, evaluations=3, curve_episodes=2),
    settings={"rank1_ac": {"small": TINY}},
)


def run(folder: Path, data: Path):
    with Progress(io.StringIO()) as progress:
        return run_suite(SUITE, Store(data), folder, progress)


def contents(folder: Path) -> dict[tuple, str]:
    rows = read_rows(folder, lambda line: pytest.fail(line))
    return {(r.agent, r.task, r.setting, r.seed, r.step): r.row_id for r in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    outcome = run(folder / "results", folder / "data")
    assert (outcome.ran, outcome.already, outcome.failed) == (2, 0, ())
    return folder


def test_rows_count_environment_steps(whole):
    rows = read_rows(whole / "results", lambda line: pytest.fail(line))
    assert len(rows) == 2 * 2 * 3
    # Whole rollouts of 32 steps.
    assert {row.step for row in rows} == {64, 128, 192}
    assert not any(row.agent == BEHAVIOUR for row in rows), "there are no data"
    for row in rows:
        assert row.status == "ok" and row.dataset_hash is None
        assert (row.score is None) == (row.task == "online/Hopper-v5")
    hopper = next(row for row in rows if row.task == "online/Hopper-v5")
    assert "mujoco" in hopper.versions


def test_every_environment_is_a_population_of_its_own(whole):
    plan = read_plan(whole / "results")
    assert plan is not None
    for job in plan.jobs:
        assert len({member.task for member in job.members}) == 1


def test_no_data_folder_is_written(whole):
    assert not (whole / "data").exists() or not list((whole / "data").iterdir())


def test_the_leaderboard_is_drawn(whole):
    text = leaderboard.draw(leaderboard.build(whole / "results"), "md")
    assert "online/CartPole-v1" in text and "environment steps" in text
    assert "behaviour" not in text


def test_a_stopped_run_goes_on_to_the_same_rows(whole, tmp_path, monkeypatch):
    """Stopped after the third chunk of each job; episodes are in mid-air then."""
    monkeypatch.setattr(jobs_module, "FIRST_CHUNK", 32)
    monkeypatch.setattr(jobs_module, "CHUNK_SECONDS", 1e-9)
    real = jobs_module.run_job
    stops = 0

    def impatient(job, tasks, folder, progress, stop):
        nonlocal stops
        del stop
        calls = 0

        def after_three() -> bool:
            nonlocal calls
            calls += 1
            return calls == 3

        stops += 1
        real(job, tasks, folder, progress, after_three)

    monkeypatch.setattr("offrl_jax.benchmark.executors.run_job", impatient)
    folder = tmp_path / "results"
    for _ in range(12):
        if not run(folder, tmp_path / "data").stopped:
            break
    assert stops > 3, "it was really interrupted"
    assert contents(folder) == contents(whole / "results")


def test_a_notebook_trains_and_evaluates(tmp_path):
    runs = offrl_jax.train(
        "a2c", "online/Pendulum-v1", seeds=2, updates=64, data_dir=tmp_path, **TINY
    )
    outcome = offrl_jax.evaluate(runs, episodes=2)
    assert outcome.returns.shape == (2, 2) and np.isfinite(outcome.returns).all()
    assert outcome.scores is not None and outcome.scores.shape == (2,)
