"""What a table says of how settings were chosen, and a choice from real runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from test_benchmark_jobs import SUITE as TINY
from test_benchmark_jobs import run
from test_benchmark_selection import PROTOCOL, A, B, write
from test_results_rows import make_row
from tiny_runs import write_store

from offrl_jax import leaderboard, results
from offrl_jax.benchmark.rules import Selection
from offrl_jax.benchmark.suites import Protocol
from offrl_jax.errors import OffrlError


def chosen_row(agent: str, settings: int, rule: str, task: str, **changes: Any):
    record = {"from": "tuning", "rule": rule, "settings": settings, "seeds": 2}
    return make_row(
        **{
            "run_id": f"{agent}-{settings}-{rule}",
            "agent": agent,
            "task": task,
            "protocol": {**PROTOCOL, "selection": record},
            **changes,
        }
    )


def board_of(folder: Path, rows: Iterable[results.Row]):
    return leaderboard.build(write(folder, rows))


def test_agents_of_one_rule_share_a_table_and_say_their_budget(tmp_path):
    rows = [
        chosen_row("iql", 20, "last_score", A),
        chosen_row("bc", 0, "last_score", A),
    ]
    (section,) = board_of(tmp_path, rows).sections
    tuned = {entry.agent: entry.tuned for entry in section.entries}
    assert tuned == {"iql": (20, 2), "bc": None}
    text = leaderboard.draw(leaderboard.build(tmp_path), "md")
    assert "chosen by last\\_score of tuning" in text or (
        "chosen by last_score of tuning" in text
    )
    assert "20x2" in text


def test_runs_of_different_selections_share_no_table(tmp_path):
    rows = [
        chosen_row("iql", 20, "last_score", A),
        chosen_row("bc", 20, "metric:loss:min", A),
        make_row(run_id="plain", agent="td3_bc", task=A, protocol=PROTOCOL),
    ]
    sections = board_of(tmp_path, rows).sections
    assert [len(one.entries) for one in sections] == [1, 1, 1]
    plain = next(one for one in sections if one.entries[0].agent == "td3_bc")
    assert plain.protocol == PROTOCOL


def test_chosen_per_task_is_a_table_of_its_own_even_with_equal_values(tmp_path):
    rule = "last_score_per_task"
    rows = [chosen_row("iql", 20, rule, task) for task in (A, B)]
    rows += [chosen_row("bc", 0, rule, task) for task in (A, B)]
    found = {one.tuning: one for one in board_of(tmp_path, rows).sections}
    assert set(found) == {"settings chosen per task", "one setting for all tasks"}
    per_task = found["settings chosen per task"]
    assert {entry.agent for entry in per_task.entries} == {"iql", "bc"}


TUNING = dataclasses.replace(
    TINY,
    name="tiny_tuning",
    agents=("bc",),
    preset="quick",
    updates=60,
    protocol=Protocol(episodes=2, evaluations=1),
    settings={
        "bc": {
            f"lr={rate}": {"hidden": [8, 8], "batch_size": 16, "lr": rate}
            for rate in (1e-4, 0.01, 0.1)
        }
    },
    role="tune",
    first_seed=1000,
)


def test_from_tuning_to_a_table(tmp_path):
    store = write_store(tmp_path / "data", TINY.tasks)
    test = dataclasses.replace(
        TUNING,
        name="tiny",
        role="test",
        first_seed=0,
        settings={},
        selection=Selection(str(tmp_path / "tuning"), "metric:actor_loss:min_per_task"),
    )
    with pytest.raises(OffrlError, match="no such folder"):
        run(store, tmp_path / "test", test)
    assert not (tmp_path / "test").exists()
    run(store, tmp_path / "tuning", TUNING)
    losses: dict[tuple[str, str], float] = {}
    for point in results.read_metrics(tmp_path / "tuning"):
        if point.step == 60:
            key = point.task, point.setting
            losses[key] = losses.get(key, 0.0) + point.values["actor_loss"]
    assert len(losses) == 6
    run(store, tmp_path / "test", test)
    rows = [
        r for r in results.read_rows(tmp_path / "test", print) if r.seed is not None
    ]
    assert {(row.task, row.seed) for row in rows} == {
        (task, seed) for task in TINY.tasks for seed in range(2)
    }
    for row in rows:
        own = {setting: x for (task, setting), x in losses.items() if task == row.task}
        assert f"lr={row.hyper['lr']}" == min(own, key=lambda setting: own[setting])
        assert row.config["hidden"] == [8, 8] and row.setting == "chosen per task"
    (section,) = leaderboard.build(tmp_path / "test").sections
    assert section.entries[0].tuned == (3, 2)
    assert section.tuning == "settings chosen per task"
