"""Numbers that are known beforehand, through the whole chain: task to leaderboard."""

from __future__ import annotations

import csv
import io
import statistics

import pytest

from offrl_jax import leaderboard
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.runner import run_suite
from offrl_jax.benchmark.suites import Protocol, Suite
from offrl_jax.datasets.importing import import_file
from offrl_jax.datasets.store import Store
from offrl_jax.results import BEHAVIOUR, read_rows


def run(store: Store, folder, **changes):
    fields = {
        "name": "reference",
        "description": "",
        "agents": ("bc",),
        "preset": "quick",
        "seeds": 2,
        "updates": 1500,
        "protocol": Protocol(episodes=20, evaluations=1),
    }
    suite = Suite(**(fields | changes))
    with Progress(io.StringIO()) as progress:
        run_suite(suite, store, folder, progress)
    rows = read_rows(folder, pytest.fail)
    return [row for row in rows if row.agent != BEHAVIOUR], leaderboard.build(folder)


def test_a_clone_of_the_pendulums_expert_is_an_expert(tmp_path):
    """The reference expert scores 100 by definition, a clone of it nearly that."""
    rows, board = run(
        Store(tmp_path / "data"),
        tmp_path / "results",
        tasks=("classic/pendulum-expert-v0",),
        updates=6000,
    )
    scores = [row.score for row in rows]
    assert len(scores) == 2 and all(95 < score < 105 for score in scores)
    (section,) = board.sections
    (entry,) = [e for e in section.entries if e.agent == "bc@quick"]
    assert entry.mean is not None
    assert entry.mean.value == pytest.approx(statistics.fmean(scores))
    assert not section.partial


def test_cloning_official_dmsd_data_beats_the_data_as_published(shared_data, tmp_path):
    """NeoRL-2: data 56.64, BC 65.09 +- 1.64 (best of its grid, 1,000,000 updates)."""
    published = {}
    with (shared_data / "published_scores.csv").open() as stream:
        for line in csv.DictReader(stream):
            if line["benchmark"] == "NeoRL2" and line["task"] == "DMSD":
                published[line["algorithm"]] = float(line["mean"])
    store = Store(tmp_path / "data")
    import_file(shared_data / "neorl2" / "DMSD-train.npz", "neorl2/DMSD-v1", store)
    rows, board = run(store, tmp_path / "results", tasks=("neorl2/DMSD-v1",))
    (section,) = board.sections
    (behaviour,) = [
        row
        for row in read_rows(tmp_path / "results", pytest.fail)
        if row.agent == BEHAVIOUR
    ]
    assert behaviour.score == pytest.approx(published["behaviour-data"], abs=1e-3)
    # 1,500 updates of a small net, 20 episodes: between the data and the published BC,
    # with room for the noise of 20 episodes (a standard error of about 1.3).
    for row in rows:
        assert published["behaviour-data"] < row.score < published["bc"] + 6
    assert section.family == "neorl2"
