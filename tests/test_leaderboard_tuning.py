"""The expected best and the bandit against pencil, brute force and plain Python."""

from __future__ import annotations

import csv
import io
import itertools
import math
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from cli_runner import offrl
from test_leaderboard_board import TASKS, fill, make_row

from offrl_jax import figures, leaderboard
from offrl_jax.errors import ResultsError, UsageError
from offrl_jax.leaderboard import bandit, tuning
from offrl_jax.results import Row


def policies(values: np.ndarray, noise: float = 0.0, episodes: int = 8, size: int = 0):
    """Policies of scores; rewards a hundredth, episodes at `noise` around them."""
    steps = np.linspace(-1, 1, episodes)[None, :] * noise / 100
    places = max(size, len(values))
    rewards = np.full((places, episodes), 1e3, np.float32)
    rewards[: len(values)] = values[:, None] / 100 + steps
    padded = np.full(places, 1e6, np.float32)
    padded[: len(values)] = values
    lengths = np.full(places, episodes, np.int32)
    return bandit.Policies(padded, rewards, lengths, np.int32(len(values)))


def deploy(
    own: bandit.Policies, seed: int = 0, *, arms: int, pulls: int, trials: int = 4000
) -> np.ndarray:
    whole = np.arange(len(own.values), dtype=np.int32)[None]
    key = jax.random.key(seed)
    found = bandit.deployment(key, own, whole, arms=arms, pulls=pulls, trials=trials)
    return np.asarray(found)[0]


class TestExpectedBest:
    def test_by_hand(self) -> None:
        got = bandit.expected_best(np.array([60.0, 10.0, 20.0]))
        np.testing.assert_allclose(got[:2], [30.0, 370 / 9])

    def test_against_all_draws(self) -> None:
        values = np.array([3.0, -1.0, 7.0, 7.0])
        got = bandit.expected_best(values)
        for n in range(1, 5):
            best = [max(draw) for draw in itertools.product(values, repeat=n)]
            assert got[n - 1] == pytest.approx(np.mean(best))

    def test_every_row_on_its_own(self) -> None:
        values = np.random.default_rng(0).normal(size=(5, 6))
        each = [bandit.expected_best(row) for row in values]
        np.testing.assert_allclose(bandit.expected_best(values), each)


class TestDeployment:
    def test_without_noise_it_is_the_best_of_those_pulled(self) -> None:
        # After t <= K pulls: the best of t of N, drawn without replacement.
        values = np.array([10.0, 20.0, 40.0, 70.0, 90.0])
        got = deploy(policies(values, size=16), arms=4, pulls=30)
        for t in (1, 2, 3, 4):
            want = np.mean([max(c) for c in itertools.combinations(values, t)])
            assert got[t - 1] == pytest.approx(want, abs=0.5)
        np.testing.assert_allclose(got[3:], got[3], rtol=1e-6)

    def test_fewer_policies_than_arms_are_all_arms(self) -> None:
        got = deploy(policies(np.array([10.0, 50.0]), size=16), arms=8, pulls=10)
        assert got[0] == pytest.approx(30.0, abs=0.1)
        np.testing.assert_allclose(got[1:], 50.0, rtol=1e-6)

    def test_an_arm_without_a_pull_never_looks_best(self) -> None:
        # All scores negative: a default mean of zero would deploy an unpulled arm.
        values = np.array([-80.0, -60.0, -40.0, -20.0])
        got = deploy(policies(values), arms=4, pulls=4)
        for t in (1, 2, 3, 4):
            want = np.mean([max(c) for c in itertools.combinations(values, t)])
            assert got[t - 1] == pytest.approx(want, abs=0.7)

    def test_against_plain_python(self) -> None:
        # One policy always yields 50, the better one 20 or 100: a bandit that explores
        # too little stays with the first after one bad episode of the second.
        rng = random.Random(3)
        episodes = [[0.5, 0.5], [0.2, 1.0]]
        pulls, trials = 14, 6000
        total = np.zeros(pulls)
        for _ in range(trials):
            counts, sums = [0, 0], [0.0, 0.0]
            unpulled = rng.sample([0, 1], 2)
            for t in range(pulls):
                index = [
                    s / n + 2 * math.sqrt(math.log(t) / n) if n else 0.0
                    for s, n in zip(sums, counts, strict=True)
                ]
                arm = unpulled.pop() if unpulled else index.index(max(index))
                counts[arm] += 1
                sums[arm] += rng.choice(episodes[arm])
                means = [
                    s / n if n else -math.inf for s, n in zip(sums, counts, strict=True)
                ]
                total[t] += (50.0, 60.0)[means.index(max(means))]
        own = policies(np.array([50.0, 60.0]), episodes=2)
        got = deploy(
            own._replace(rewards=np.array(episodes, np.float32)),
            arms=2, pulls=pulls, trials=20_000,
        )  # fmt: skip
        # Standard errors: at most 5 / sqrt(6000) = 0.07.
        np.testing.assert_allclose(got, total / trials, atol=0.25)

    def test_only_stored_episodes_of_the_policy_are_played(self) -> None:
        own = policies(np.array([10.0, 20.0]), noise=4.0, episodes=5, size=4)
        lengths = np.array([1, 1, 1, 1], np.int32)
        rewards = own.rewards.copy()
        rewards[0, 0], rewards[1, 0] = 0.9, 0.1  # misleading: the worse looks better
        got = deploy(own._replace(rewards=rewards, lengths=lengths), arms=2, pulls=50)
        assert got[0] == pytest.approx(15.0, abs=0.1)
        np.testing.assert_allclose(got[1:], 10.0, rtol=1e-6)

    def test_same_key_same_bits_and_no_recompilation(self) -> None:
        own = policies(np.array([10.0, 20.0, 30.0]), noise=20.0, size=4)
        first = deploy(own, arms=2, pulls=6, trials=64)
        compiled = bandit.deployment._cache_size()
        np.testing.assert_array_equal(first, deploy(own, arms=2, pulls=6, trials=64))
        fewer = policies(np.array([5.0, 6.0]), noise=9.0, size=4)
        other = deploy(fewer, 1, arms=2, pulls=6, trials=64)
        assert bandit.deployment._cache_size() == compiled
        assert not np.array_equal(first, other)


def tune_rows(
    agent: str, settings: int, seeds: int, task: str = TASKS[0], **changes
) -> list[Row]:
    rng = np.random.default_rng(settings)
    rows = []
    for setting, seed in itertools.product(range(settings), range(seeds)):
        score = float(np.round(50 + 20 * rng.standard_normal(), 3))
        content = {"agent": agent, "task": task, "seed": 1000 + seed, "score": score}
        content |= {"setting": f"s{setting}", "hyper": {"alpha": float(setting)}}
        content |= {"run_id": f"{agent}-s{setting}", "role": "tune"}
        rows.append(make_row(**{**content, **changes}))
    return rows


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer simulations than a figure needs."""
    for name, number in (
        ("TRIALS", 40),
        ("DEPLOYMENTS", 40),
        ("POINT_POPULATIONS", 20),
    ):
        monkeypatch.setattr(tuning, name, number)


@pytest.mark.usefixtures("quick")
class TestBuild:
    def test_tuning_rows_are_taken_where_there_are_any(self, tmp_path: Path) -> None:
        tuned = tune_rows("iql", 3, 2)
        tested = tune_rows("iql", 1, 4, role="test", run_id="final")
        other = tune_rows("bc", 1, 4, role="test", run_id="bc-final")
        folder = fill(tmp_path, [*tuned, *tested, *other])
        (section,), _ = leaderboard.tuning_of(folder, pulls=5)
        bc, iql = section.agents
        assert (bc.role, iql.role) == ("test", "tune")
        found = iql.tasks[TASKS[0]]
        assert (found.settings, found.seeds, found.policies, found.arms) == (3, 2, 6, 6)
        scores = [row.score for row in tuned]
        assert found.curves.expected_best[0].value == pytest.approx(np.mean(scores))
        assert len(found.curves.expected_best) == 6 and len(found.curves.deployed) == 5
        assert found.curves.deployed[0].value == pytest.approx(np.mean(scores), abs=1.0)
        assert any("fewer than 8" in line for line in section.messages)

    def test_protocols_presets_and_families_are_apart(self, tmp_path: Path) -> None:
        rows = tune_rows("iql", 2, 2)
        rows += tune_rows("iql@quick", 2, 2)
        rows += tune_rows("bc", 2, 2, protocol={"episodes": 30})
        rows += tune_rows("bc", 2, 2, family="other", run_id="o")
        sections, _ = leaderboard.tuning_of(fill(tmp_path, rows), pulls=3)
        assert len(sections) == 4
        assert all(len(section.agents) == 1 for section in sections)

    def test_means_are_over_tasks_that_an_agent_has_all(self, tmp_path: Path) -> None:
        rows = tune_rows("iql", 3, 2) + tune_rows("iql", 5, 2, TASKS[1])
        rows += tune_rows("bc", 2, 2)
        (section,), _ = leaderboard.tuning_of(fill(tmp_path, rows), pulls=3)
        bc, iql = section.agents
        assert bc.pooled is None and iql.pooled is not None
        means = [np.mean([row.score for row in r]) for r in (rows[:6], rows[6:16])]
        assert iql.pooled.expected_best[0].value == pytest.approx(
            np.mean(means), abs=1e-3
        )
        assert len(iql.pooled.expected_best) == 6
        assert any("bc: no mean over tasks" in line for line in section.messages)

    def test_diverged_raw_and_single_policies(self, tmp_path: Path) -> None:
        rows = tune_rows("iql", 2, 2)
        rows += tune_rows(
            "iql", 1, 1, status="diverged", score=None, returns=[float("nan")] * 20,
            run_id="iql-d", setting="d",
        )  # fmt: skip
        raw = tune_rows("bc", 2, 2, "x/raw-v0", score=None, family="raw")
        single = tune_rows("bc", 1, 1, family="single")
        sections, _ = leaderboard.tuning_of(fill(tmp_path, rows + raw + single))
        by_family = {section.key.family: section for section in sections}
        scores = [row.score for row in rows[:4]] + [0.0]
        found = by_family["classic"].agents[0].tasks[TASKS[0]]
        assert found.curves.expected_best[0].value == pytest.approx(np.mean(scores))
        assert (
            by_family["raw"].pooled == () and by_family["raw"].agents[0].pooled is None
        )
        (only,) = by_family["single"].agents[0].tasks.values()
        assert {bound.low for bound in only.curves.deployed} == {None}

    def test_mistakes_are_told(self, tmp_path: Path) -> None:
        folder = fill(tmp_path / "a", tune_rows("iql", 2, 1))
        with pytest.raises(UsageError, match="episodes must be at least 1, got 0"):
            leaderboard.tuning_of(folder, pulls=0)
        with pytest.raises(UsageError, match="unknown agent of these results 'bc'"):
            leaderboard.tuning_of(folder, ["bc"])
        with pytest.raises(ResultsError, match="no such folder"):
            leaderboard.tuning_of(tmp_path / "none")
        with pytest.raises(ResultsError, match="no policy has come"):
            leaderboard.tuning_of(fill(tmp_path / "b", []))


def test_band_shrinks_with_policies_and_not_with_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def width(settings: int, folder: str) -> float:
        rows = tune_rows("iql", settings, 1)
        # The same quantiles, so that only the number of policies differs.
        levels = np.linspace(20, 80, settings)
        rows = [
            make_row(
                agent="iql", role="tune", setting=r.setting, hyper=r.hyper,
                run_id=r.run_id, seed=r.seed, score=float(level),
            )
            for r, level in zip(rows, levels, strict=True)
        ]  # fmt: skip
        (section,), _ = tuning.build(fill(tmp_path / folder, rows), pulls=2)
        first = section.agents[0].tasks[TASKS[0]].curves.deployed[0]
        assert first.low is not None and first.high is not None
        return first.high - first.low

    few = width(8, "few")
    assert few / width(32, "many") == pytest.approx(2.0, rel=0.25)
    monkeypatch.setattr(tuning, "TRIALS", 2 * tuning.TRIALS)
    assert width(8, "longer") / few == pytest.approx(1.0, rel=0.15)


@pytest.mark.usefixtures("quick")
def test_figure_table_and_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tune_rows("iql", 3, 2) + tune_rows("iql", 3, 2, TASKS[1])
    folder = fill(tmp_path / "results", rows)
    out = tmp_path / "tuning.svg"
    command = ("tuning", str(folder), "--out", str(out), "--episodes", "4")
    assert offrl(*command) == 0
    assert "wrote" in capsys.readouterr().out
    lines = list(csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text())))
    assert tuple(lines[0]) == tuning.COLUMNS
    # Two tasks and their mean, 6 numbers of policies and 4 of episodes each.
    assert len(lines) == 3 * (6 + 4)
    sections, _ = leaderboard.tuning_of(folder, pulls=4)
    axes = figures.draw_tuning(sections).axes
    titles = [axis.get_title().replace("\n", "") for axis in axes]
    pairs = ["mean over 2 tasks", *sorted(TASKS)]
    assert titles == [name for name in pairs for _ in range(2)]
    (line,) = axes[1].get_lines()
    pooled = sections[0].agents[0].pooled
    assert pooled is not None
    want = [bound.value for bound in pooled.deployed]
    np.testing.assert_array_equal(line.get_ydata(), want)
