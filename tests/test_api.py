"""The notebook's face, against the benchmark that does the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_benchmark_jobs import SUITE, run
from test_benchmark_jobs import store as store  # a fixture

import offrl_jax
from offrl_jax.datasets.store import Store
from offrl_jax.errors import UsageError
from offrl_jax.results import BEHAVIOUR, read_rows
from offrl_jax.types import Spec


def test_train_and_evaluate_equal_the_benchmark(store: Store, tmp_path):
    """Bit for bit: the same members, in the same order, on the same devices."""
    task = SUITE.tasks[0]
    run(store, tmp_path, dataclasses.replace(SUITE, tasks=(task,)))
    rows = [r for r in read_rows(tmp_path, print) if r.agent != BEHAVIOUR]
    want = {r.seed: r.returns for r in rows if r.step == r.updates_total}
    runs = offrl_jax.train(
        "td3_bc@quick",
        task,
        seeds=2,
        updates=120,
        data_dir=store.path,
        hidden=(8, 8),
        batch_size=16,
    )
    outcome = offrl_jax.evaluate(runs, episodes=3)
    assert {seed: list(r) for seed, r in enumerate(outcome.returns)} == want
    assert outcome.scores is None and outcome.successes is None
    assert runs.steps[-1] == 120 and not runs.diverged.any()
    assert runs.metrics["critic_loss"].shape == (len(runs.steps), 2)
    assert np.isfinite(runs.metrics["critic_loss"]).all()
    board = offrl_jax.read_leaderboard(tmp_path)
    assert "td3_bc@quick" in {entry.agent for entry in board.sections[0].entries}


def test_make_agent():
    agent, hyper = offrl_jax.make_agent("iql", Spec(3, 1, 10), expectile=0.9)
    assert hyper.expectile == 0.9 and agent.phases
    with pytest.raises(UsageError, match="did you mean 'expectile'"):
        offrl_jax.make_agent("iql", Spec(3, 1, 10), expectil=0.9)


def test_unknown_names(store: Store):
    with pytest.raises(UsageError, match="unknown task"):
        offrl_jax.train("bc", "classic/pendulm-mixed-v0", data_dir=store.path)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = offrl_jax.trian


def test_offline_agents_refuse_alternatives():
    spec = Spec(4, 2, 500, discrete=True)
    with pytest.raises(UsageError, match="iql has a policy of continuous actions"):
        offrl_jax.make_agent("iql", spec)
    agent, _ = offrl_jax.make_agent("ppo@quick", spec)
    assert agent.collection is not None
