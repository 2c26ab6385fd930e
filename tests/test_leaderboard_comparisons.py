"""Profiles and probabilities of improvement against NumPy and scipy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from test_leaderboard_board import TASKS, even, fill, make_row, only_section

from offrl_jax.errors import UsageError
from offrl_jax.leaderboard import comparisons, ranking
from offrl_jax.leaderboard.model import Section
from offrl_jax.results import Row

SCORES: Mapping[str, list[list[float]]] = {
    # By agent and task; ties, unequal numbers of seeds, a score above 100.
    "iql": [[70.0, 75.0, 80.0, 95.5, 110.0], [40.0, 50.0, 60.0]],
    "td3_bc": [[70.0, 72.0, 79.0, 81.0, 90.0], [40.0, 55.0, 58.0, 61.0]],
    "bc": [[10.0, 20.0, 20.0, 30.0, 71.0], [-5.5, 10.0, 20.0, 45.0]],
}


def score_rows() -> list[Row]:
    return [
        make_row(agent=agent, task=TASKS[t], seed=seed, score=score)
        for agent, tasks in SCORES.items()
        for t, scores in enumerate(tasks)
        for seed, score in enumerate(scores)
    ]


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Section:
    folder = tmp_path_factory.mktemp("results") / "scores"
    unranked = [make_row(agent="awac", score=99.0)]  # has runs of one task only
    return only_section(fill(folder, [*score_rows(), *unranked]))


class TestProfiles:
    def test_fractions_are_strict_and_tasks_have_equal_say(
        self, section: Section
    ) -> None:
        profiles = comparisons.profiles(section)
        assert set(profiles) == set(SCORES)
        for agent, profile in profiles.items():
            thresholds = np.array(profile.thresholds)
            assert (len(thresholds), thresholds[0], thresholds[-1]) == (
                comparisons.THRESHOLDS,
                -5.5,
                110.0,
            )
            for tau, above in zip(thresholds, profile.above, strict=True):
                want = np.mean([np.mean(np.array(s) > tau) for s in SCORES[agent]])
                assert above.value == pytest.approx(want, abs=1e-4)
        # The highest score of all does not lie above itself.
        assert profiles["iql"].above[-1].value == 0.0
        assert profiles["iql"].above[-2].value == pytest.approx(0.1)

    def test_bands_are_those_of_resampled_runs(self, section: Section) -> None:
        rng = np.random.default_rng(0)
        profile = comparisons.profiles(section)["td3_bc"]
        drawn = [
            rng.choice(np.array(scores), (20_000, len(scores)))
            for scores in SCORES["td3_bc"]
        ]
        for tau, above in zip(profile.thresholds, profile.above, strict=True):
            samples = np.mean([(x > tau).mean(axis=1) for x in drawn], axis=0)
            assert above.low is not None and above.high is not None
            # Samples are discrete: either side of a jump, three standard errors wide.
            for end, level in ((above.low, 0.025), (above.high, 0.975)):
                lower = np.quantile(samples, max(level - 0.011, 0.0))
                upper = np.quantile(samples, min(level + 0.011, 1.0))
                assert lower - 1e-3 <= end <= upper + 1e-3
            assert above.low <= above.value <= above.high

    def test_grids_of_scores_and_of_returns(self, tmp_path: Path) -> None:
        inside = [make_row(seed=s, score=40.0 + s) for s in range(3)]
        profile = comparisons.profiles(only_section(fill(tmp_path / "a", inside)))
        (found,) = profile.values()
        np.testing.assert_array_equal(found.thresholds, np.arange(101.0))
        raw = [dataclasses.replace(row, score=None, row_id="") for row in inside]
        section = only_section(fill(tmp_path / "b", raw))
        values = section.entries[0].cells[0].values
        (found,) = comparisons.profiles(section).values()
        assert (found.thresholds[0], found.thresholds[-1]) == (min(values), max(values))
        assert found.above[0].value == pytest.approx(2 / 3, abs=1e-4)

    def test_single_runs_have_no_band_and_no_runs_no_profile(
        self, tmp_path: Path
    ) -> None:
        single = only_section(fill(tmp_path / "a", [make_row(score=40.0)]))
        (found,) = comparisons.profiles(single).values()
        assert {(b.low, b.high) for b in found.above} == {(None, None)}
        none = dataclasses.replace(
            single, entries=(dataclasses.replace(single.entries[0], rank=None),)
        )
        assert comparisons.profiles(none) == comparisons.improvements(none) == {}


class TestImprovements:
    def test_values_are_mann_whitney(self, section: Section) -> None:
        found = comparisons.improvements(section)
        assert len(found) == 6
        for (x, y), better in found.items():
            wins = [
                scipy.stats.mannwhitneyu(a, b).statistic / (len(a) * len(b))
                for a, b in zip(SCORES[x], SCORES[y], strict=True)
            ]
            assert better.value == pytest.approx(np.mean(wins), abs=1e-4)

    def test_the_other_way_round_is_the_complement(self, section: Section) -> None:
        found = comparisons.improvements(section)
        for (x, y), better in found.items():
            other = found[y, x]
            assert round(better.value + other.value, 9) == 1.0
            assert better.low is not None and other.high is not None
            assert round(better.low + other.high, 9) == 1.0

    def test_numbers_are_those_of_the_ranking(self, section: Section) -> None:
        found = comparisons.improvements(section)
        compared = [e for e in section.entries if e.leader is not None]
        assert len(compared) == 2
        for entry in compared:
            assert entry.leader is not None
            assert found[entry.leader, entry.label] == entry.leader_better

    def test_labels_restrict_and_change_nothing(self, section: Section) -> None:
        whole = comparisons.improvements(section)
        part = comparisons.improvements(section, ["td3_bc", "bc"])
        assert part == {
            pair: whole[pair] for pair in (("td3_bc", "bc"), ("bc", "td3_bc"))
        }
        with pytest.raises(UsageError, match="unknown ranked agent 'awac'"):
            comparisons.improvements(section, ["awac"])

    def test_width_falls_with_the_square_root_of_seeds(self) -> None:
        widths = []
        for seeds in (10, 40):
            column = scipy.stats.norm.ppf((np.arange(seeds) + 0.5) / seeds)
            own = {task: column.tolist() for task in even(0.0)}
            x, y = (ranking.contender(name, own, TASKS) for name in ("x", "y"))
            better = ranking.compare(x, y)
            assert better.low is not None and better.high is not None
            widths.append(better.high - better.low)
        assert widths[0] / widths[1] == pytest.approx(2.0, rel=0.1)
