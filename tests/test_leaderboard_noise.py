"""The share of evaluation noise by hand, and against known variances."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from test_leaderboard_board import TASKS, fill, make_row, only_section

from offrl_jax import leaderboard
from offrl_jax.leaderboard import noise


def share_of(returns: list[list[float]]) -> float | None:
    return noise.share(noise.spread(returns, [float(np.mean(r)) for r in returns]))


class TestShare:
    def test_by_hand(self) -> None:
        # Means 1 and 5: variance 8.  Variances 2 and 8 of two episodes: (1 + 4) / 2.
        assert share_of([[0.0, 2.0], [3.0, 7.0]]) == round(2.5 / 8, 4)
        # Unequal numbers of episodes: (2 / 2 + 2 / 4) / 2 over the variance 8 of 1, 5.
        unequal = [[0.0, 2.0], [5 - 3**0.5, 5.0, 5.0, 5 + 3**0.5]]
        assert share_of(unequal) == pytest.approx(0.75 / 8, abs=1e-4)

    def test_noise_alone_is_at_most_one(self) -> None:
        assert share_of([[0.0, 10.0], [1.0, 9.5]]) == 1.0
        assert share_of([[0.0, 10.0], [10.0, 0.0]]) == 1.0
        assert share_of([[1.0, 1.0], [5.0, 5.0]]) == 0.0

    @pytest.mark.parametrize(
        "returns",
        [[], [[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [3.0]], [[4.0] * 3] * 2],
    )
    def test_unknown(self, returns: list[list[float]]) -> None:
        assert share_of(returns) is None

    @pytest.mark.parametrize("episodes", [10, 40])
    def test_known_variances(self, episodes: int) -> None:
        # Between runs 4 (variance 16), between episodes 20: noise of 400 / E.
        rng = np.random.default_rng(1)
        means = 50 + 4 * rng.standard_normal((4000, 1))
        returns = means + 20 * rng.standard_normal((4000, episodes))
        truth = (400 / episodes) / (400 / episodes + 16)
        assert share_of(returns.tolist()) == pytest.approx(truth, abs=0.03)


class TestPooledShare:
    def test_tasks_weigh_as_in_the_variance_of_the_mean(self) -> None:
        # Scores of 0.1 a return on the second task: variances a hundredth.
        first = noise.spread([[0.0, 2.0], [3.0, 7.0]], [1.0, 5.0])
        second = noise.spread([[0.0, 60.0], [0.0, 80.0]], [3.0, 4.0])
        assert second is not None and second.scale == pytest.approx(0.01)
        # Noise 2.5 and (900 + 1600) / 2 / 100; totals 8 and 0.5: clipped as a whole.
        assert noise.pooled_share([first, second]) == 1.0
        steady = noise.spread([[0.0, 2.0], [99.0, 101.0]], [0.1, 10.0])
        assert steady is not None
        want = (2.5 / 2 + 0.01 * 1.0 / 2) / (8 / 2 + 0.01 * (99**2 / 2) / 2)
        assert noise.pooled_share([first, steady, None]) == pytest.approx(
            want, abs=1e-4
        )
        assert noise.pooled_share([None]) is None

    def test_known_variances(self) -> None:
        rng = np.random.default_rng(2)
        spreads, noises, totals = [], [], []
        for scale, runs in ((1.0, 3000), (0.01, 6000)):
            means = 3 * rng.standard_normal((runs, 1)) / scale
            returns = means + 8 * rng.standard_normal((runs, 10)) / scale
            spreads.append(
                noise.spread(returns.tolist(), (scale * returns.mean(1)).tolist())
            )
            noises.append(64 / 10 / runs)
            totals.append((64 / 10 + 9) / runs)
        assert noise.pooled_share(spreads) == pytest.approx(
            sum(noises) / sum(totals), abs=0.03
        )


class TestBoard:
    def test_cells_entries_and_formats(self, tmp_path: Path) -> None:
        returns = [[0.0, 2.0], [3.0, 7.0]]
        rows = [
            make_row(task=task, seed=s, returns=r, score=10 * float(np.mean(r)))
            for task in TASKS
            for s, r in enumerate(returns)
        ]
        # A diverged run says nothing about the noise of episodes.
        rows.append(
            make_row(seed=2, status="diverged", score=None, returns=[float("nan")] * 2)
        )
        folder = fill(tmp_path, rows)
        (entry,) = only_section(folder).entries
        assert [cell.episode_share for cell in entry.cells] == [0.3125, 0.3125]
        assert entry.episode_share == 0.3125
        lines = list(csv.DictReader(io.StringIO(leaderboard.render(folder, "csv"))))
        assert list(lines[0])[-1] == "episode_share"
        assert {line["episode_share"] for line in lines} == {"0.3125"}
        markdown = leaderboard.render(folder, "md")
        assert "| episode noise |" in markdown and "| 31 % |" in markdown
        assert "noise" not in leaderboard.render(folder, "table")
