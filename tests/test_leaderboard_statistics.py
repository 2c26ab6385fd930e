"""Aggregates and intervals against scipy, exhaustive enumeration and pencil."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import numpy as np
import pytest
import scipy.stats

from offrl_jax.leaderboard import ranking, statistics

Table = Sequence[Sequence[float]]

aggregates = jax.jit(statistics.aggregates)
weighted_aggregates = jax.jit(statistics.weighted_aggregates)
improvement = jax.jit(statistics.improvement)
resample = jax.jit(statistics.resample, static_argnums=(2, 3))


def pad(table: Table, tasks: int = 0, slots: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Runs of each task as `[T, S]`, padded with NaN that must not leak; counts."""
    counts = [len(row) for row in table]
    scores = np.full((max(tasks, len(table)), max(slots, *counts)), np.nan, np.float32)
    for i, row in enumerate(table):
        scores[i, : len(row)] = row
    count = np.zeros(scores.shape[0], np.int32)
    count[: len(counts)] = counts
    return scores, count


def random_table(counts: Sequence[int], seed: int = 0) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [(60 + 25 * rng.standard_normal(n)).round(2).tolist() for n in counts]


def key(seed: int = 0) -> jax.Array:
    return jax.random.key(seed)


def bootstrap(
    table: Table, seed: int = 0, replications: int = statistics.REPLICATIONS
) -> statistics.Aggregates[statistics.Interval]:
    scores, count = pad(table)
    drawn = statistics.draws(
        key(seed), count, slots=scores.shape[1], replications=replications
    )
    return statistics.bootstrap(scores, count, drawn)


def side(
    table: Table, seed: int, tasks: int = 0, slots: int = 0, replications: int = 2000
) -> statistics.Side:
    scores, count = pad(table, tasks, slots)
    drawn = statistics.side_draws(
        key(seed), count, slots=scores.shape[1], replications=replications
    )
    return statistics.Side(scores, count, drawn)


def oracle(table: Table) -> dict[str, float]:
    """The four aggregates in plain NumPy and scipy."""
    means = [np.mean(row) for row in table]
    return {
        "iqm": scipy.stats.trim_mean(np.concatenate(table), 0.25),
        "mean": np.mean(means),
        "median": np.median(means),
        "optimality_gap": np.mean([np.mean(100 - np.minimum(r, 100)) for r in table]),
    }


class TestAggregates:
    @pytest.mark.parametrize(
        "counts", [(1,), (2,), (3,), (5, 5), (10, 10, 10), (3, 7, 1), (4, 9, 2, 6)]
    )
    def test_against_scipy_with_and_without_padding(
        self, counts: tuple[int, ...]
    ) -> None:
        table = random_table(counts)
        shapes = [(6, 12)] if len(counts) < 4 else [(6, 12), (0, 0)]
        for tasks, slots in shapes:
            got = aggregates(*pad(table, tasks, slots))
            for name, want in oracle(table).items():
                np.testing.assert_allclose(
                    getattr(got, name), want, rtol=1e-5, err_msg=name
                )
            np.testing.assert_allclose(
                got.task_mean[: len(counts)], [np.mean(r) for r in table], rtol=1e-5
            )

    def test_by_hand(self) -> None:
        # 0..9: two are dropped at either end, 2..7 remain.
        got = aggregates(*pad([list(range(10))]))
        assert float(got.iqm) == 4.5
        # Task means 20 and 90; gaps (90 + 70) / 2 and (20 + 0) / 2; 120 is clipped.
        got = aggregates(*pad([[10.0, 30.0], [80.0, 120.0]]))
        assert float(got.median) == float(got.mean) == 60.0
        assert float(got.optimality_gap) == 45.0
        assert float(got.iqm) == 55.0  # of 10, 30, 80, 120 the middle two

    @pytest.mark.parametrize("score", [100.0, 150.0])
    def test_no_gap_at_or_above_the_target(self, score: float) -> None:
        got = aggregates(*pad([[score] * 3] * 2))
        assert float(got.optimality_gap) == 0.0

    def test_weights_are_repetitions(self) -> None:
        table = [[3.0, 1.0, 4.0, 1.0], [5.0, 9.0, 2.0, 6.0]]
        weight = np.array([[2, 0, 1, 1], [0, 4, 0, 0]], np.uint8)
        whole = np.ones((2, 4), np.uint8)
        repeated = [[3.0, 3.0, 4.0, 1.0], [9.0] * 4]
        got = weighted_aggregates(*pad(table), np.stack([weight, whole], axis=2))
        for i, sample in enumerate((repeated, table)):
            for name, want in oracle(sample).items():
                np.testing.assert_allclose(getattr(got, name)[i], want, rtol=1e-6)


class TestResample:
    def test_every_task_draws_its_own_runs_only(self) -> None:
        count = np.array([3, 1, 0, 5], np.int32)
        weight = np.asarray(resample(key(), count, 5, 400))
        assert weight.shape == (4, 5, 400)
        np.testing.assert_array_equal(weight.sum(axis=1).T, np.tile(count, (400, 1)))
        for task, n in enumerate(count):
            assert (weight[task, n:] == 0).all()

    def test_draws_are_uniform_and_tasks_independent(self) -> None:
        count = np.array([4, 4], np.int32)
        weight = np.asarray(resample(key(), count, 4, 20_000))
        # Each run is drawn Binomial(4, 1/4) times: mean 1, variance 3/4.
        np.testing.assert_allclose(weight.mean(axis=2), 1.0, atol=0.03)
        np.testing.assert_allclose(weight.var(axis=2), 0.75, atol=0.03)
        correlation = np.corrcoef(weight[0, 0], weight[1, 0])[0, 1]
        assert abs(correlation) < 0.03

    def test_padding_changes_no_draw(self) -> None:
        small = resample(key(), np.array([3, 2], np.int32), 3, 50)
        large = resample(key(), np.array([3, 2, 0], np.int32), 7, 50)
        np.testing.assert_array_equal(small, large[:2, :3])


def exhaustive(table: Table) -> dict[str, np.ndarray]:
    """Aggregates of all equally likely resamples, strata independent."""
    draws = [list(itertools.product(row, repeat=len(row))) for row in table]
    all_of = [oracle(sample) for sample in itertools.product(*draws)]
    return {name: np.array([o[name] for o in all_of]) for name in all_of[0]}


class TestBootstrap:
    def test_interval_equals_the_exhaustive_one(self) -> None:
        table = [[10.0, 37.0, 61.0], [80.0, 95.5, 120.0]]  # 27 x 27 resamples
        got = bootstrap(table, 1)
        for name, samples in exhaustive(table).items():
            interval = getattr(got, name)
            # The distribution is discrete: the percentile may fall on either side of
            # a jump, hence the bracket of levels (0.2 % is 3 standard errors).
            for end, level in ((interval.low, 0.025), (interval.high, 0.975)):
                below, above = np.quantile(samples, [level - 0.002, level + 0.002])
                assert below - 1e-3 <= float(end) <= above + 1e-3, name

    def test_same_key_same_bits_and_other_key_other_bits(self) -> None:
        table = random_table((3, 3))
        first, again, other = (bootstrap(table, seed, 2000) for seed in (1, 1, 2))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)
        assert float(first.mean.low) != float(other.mean.low)

    def test_width_falls_with_the_square_root_of_runs(self) -> None:
        widths = []
        for n in (10, 40):
            # The same quantiles of one normal distribution, so only n differs.
            column = scipy.stats.norm.ppf((np.arange(n) + 0.5) / n)
            got = bootstrap([column.tolist()] * 3, replications=10_000)
            assert got.iqm.low <= got.iqm.value <= got.iqm.high
            widths.append(float(got.mean.high - got.mean.low))
        assert widths[0] / widths[1] == pytest.approx(2.0, rel=0.1)

    def test_mean_interval_against_scipy(self) -> None:
        (row,) = random_table((12,), seed=3)
        want = scipy.stats.bootstrap(
            (row,),
            np.mean,
            n_resamples=20_000,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        got = bootstrap([row], replications=20_000)
        assert float(got.mean.low) == pytest.approx(want.low, abs=0.4)
        assert float(got.mean.high) == pytest.approx(want.high, abs=0.4)
        assert float(got.task_mean.low[0]) == float(got.mean.low)

    @pytest.mark.parametrize("counts", [(10,) * 12, (5, 5, 5, 5), (3, 7, 1), (1, 2)])
    def test_intervals_are_those_of_numpy_on_the_same_draws(
        self, counts: tuple[int, ...]
    ) -> None:
        table = random_table(counts, seed=4)
        scores, count = pad(table)
        drawn = statistics.draws(
            key(3), count, slots=scores.shape[1], replications=2000
        )
        got = statistics.bootstrap(scores, count, drawn)
        samples: dict[str, list[float]] = {}
        for weight in np.moveaxis(np.asarray(drawn), -1, 1).reshape(-1, *scores.shape):
            rows = [
                np.repeat(row, w[: len(row)]).tolist()
                for row, w in zip(table, weight, strict=True)
            ]
            for name, value in oracle(rows).items():
                samples.setdefault(name, []).append(value)
        for name, values in samples.items():
            interval = getattr(got, name)
            want = np.quantile(values, [0.025, 0.975])
            ends = [float(interval.low), float(interval.high)]
            np.testing.assert_allclose(ends, want, rtol=2e-5, err_msg=name)

    def test_median_of_any_number_of_tasks(self) -> None:
        rng = np.random.default_rng(0)
        for tasks in (1, 2, 3, 5, 8, 13, 17):
            values = rng.normal(size=(tasks, 50)).astype(np.float32)
            there = np.arange(tasks + 3) < tasks
            padded = np.concatenate([values, np.full((3, 50), np.nan, np.float32)])
            got = statistics._median(padded, there)
            np.testing.assert_allclose(got, np.median(values, axis=0), rtol=1e-6)

    def test_replications_must_fill_chunks(self) -> None:
        with pytest.raises(ValueError, match="1500 is no multiple of 1000"):
            bootstrap([[1.0, 2.0]], replications=1500)


class TestImprovement:
    @pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 7)])
    def test_against_mann_whitney(self, n: int, m: int) -> None:
        rng = np.random.default_rng(0)
        # Few distinct values, so that ties occur.
        x = rng.integers(0, 5, (3, n)).astype(float).tolist()
        y = rng.integers(1, 6, (3, m)).astype(float).tolist()
        want = np.mean(
            [
                scipy.stats.mannwhitneyu(a, b).statistic / (n * m)
                for a, b in zip(x, y, strict=True)
            ]
        )
        for slots in (0, 9):
            sides = []
            for table in (x, y):
                scores, count = pad(table, 4, slots)
                there = np.arange(scores.shape[1]) < count[:, None]
                sides += [scores, count, there.astype(np.uint8)[:, :, None]]
            assert float(improvement(*sides)[0]) == pytest.approx(want, abs=1e-6)

    def test_identical_is_a_half_and_disjoint_is_one(self) -> None:
        table = random_table((5, 5))
        above = [[value + 1000 for value in row] for row in table]
        for x, want in ((table, 0.5), (above, 1.0)):
            got = statistics.probability_of_improvement(side(x, 1), side(table, 2))
            assert float(got.value) == want
            assert float(got.low) <= want <= float(got.high)
        assert float(got.low) == 1.0

    def test_interval_equals_the_exhaustive_one(self) -> None:
        x, y = [[1.0, 4.0, 6.0]], [[2.0, 3.0, 5.0]]
        samples = [
            np.mean([(a > b) + 0.5 * (a == b) for a in xs for b in ys])
            for xs in itertools.product(x[0], repeat=3)
            for ys in itertools.product(y[0], repeat=3)
        ]
        got = statistics.probability_of_improvement(
            side(x, 1, replications=20_000), side(y, 2, replications=20_000)
        )
        for end, level in ((got.low, 0.025), (got.high, 0.975)):
            below, above = np.quantile(samples, [level - 0.004, level + 0.004])
            assert below - 1e-6 <= float(end) <= above + 1e-6

    @pytest.mark.parametrize(
        "counts", [(10, 10, 10, 10), (10,) * 12, (5,) * 7, (3, 7, 1), (2,)]
    )
    def test_interval_is_that_of_numpy_on_the_same_draws(
        self, counts: tuple[int, ...]
    ) -> None:
        # Against a compiler that once fused draws and wins into wrong samples.
        x, y = (random_table(counts, seed=seed) for seed in (5, 6))
        slots = -(-max(counts) // 5) * 5
        sides = [side(x, 1, len(x), slots), side(y, 2, len(y), slots)]
        got = statistics.probability_of_improvement(*sides)
        x_drawn, y_drawn = (np.asarray(s.drawn, np.float64) for s in sides)
        samples = np.zeros(2000)
        for t, n in enumerate(counts):
            wins = np.greater.outer(np.array(x[t]), np.array(y[t])).astype(float)
            wins += 0.5 * np.equal.outer(np.array(x[t]), np.array(y[t]))
            drawn = (x_drawn[t, :n], wins, y_drawn[t, :n])
            samples += np.einsum("sr,sq,qr->r", *drawn) / n**2 / len(counts)
        want = np.quantile(samples.round(5), [0.025, 0.975])
        np.testing.assert_allclose([got.low, got.high], want, atol=2e-5)


class TestRank:
    """Shared ranks, on one task whose runs make every comparison plain."""

    def ranks(self, **levels: float) -> dict[str, int | None]:
        values = {
            agent: {"t": [level + i for i in range(10)]}
            for agent, level in levels.items()
        }
        return {a: s.rank for a, s in ranking.rank(values, ["t"], ["t"]).items()}

    def test_next_leader_starts_after_all_who_share(self) -> None:
        got = self.ranks(a=100.0, b=99.5, c=50.0, d=49.5, e=0.0)
        assert got == {"a": 1, "b": 1, "c": 3, "d": 3, "e": 5}

    def test_compared_with_the_leader_and_not_with_the_neighbour(self) -> None:
        # Each is close to its neighbour, but c is far below a: it opens a new rank.
        got = self.ranks(a=100.0, b=98.0, c=96.0)
        assert got == {"a": 1, "b": 1, "c": 3}

    def test_equal_agents_share_in_the_order_of_names(self) -> None:
        values = {agent: {"t": [1.0, 2.0, 3.0]} for agent in ("b", "a", "c")}
        standings = ranking.rank(values, ["t"], ["t"])
        assert {s.rank for s in standings.values()} == {1}
        assert standings["a"].leader is None and standings["b"].leader == "a"

    def test_who_wins_more_often_than_a_higher_iqm_suggests_shares(self) -> None:
        # The IQM of x is 100 through its best runs, yet y wins 70 % of comparisons:
        # the interval lies wholly below 0.5, which does not make y the worse one.
        x = [0.0] * 42 + [1000.0] * 18
        y = [40.0] * 60
        standings = ranking.rank({"x": {"t": x}, "y": {"t": y}}, ["t"], ["t"])
        assert standings["x"].rank == standings["y"].rank == 1
        assert standings["y"].leader == "x"
        better = standings["y"].leader_better
        assert better is not None and better.high is not None and better.high < 0.5

    def test_unranked_tasks_have_means_only(self) -> None:
        values = {"a": {"t": [1.0, 2.0], "u": [-500.0, -700.0]}}
        (standing,) = ranking.rank(values, ["t"], ["t", "u"]).values()
        assert standing.iqm is not None and standing.iqm.value == 1.5
        assert standing.task_means["u"].value == -600.0
