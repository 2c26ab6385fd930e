"""Comparisons of two folders against pencil, scipy and exhaustive enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from test_leaderboard_board import (
    TASKS,
    even,
    fill,
    make_behaviour,
    make_job,
    make_row,
    make_rows,
)

from offrl_jax import leaderboard
from offrl_jax.errors import ResultsError, UsageError
from offrl_jax.leaderboard import differences
from offrl_jax.leaderboard.compare import (
    BETTER,
    IDENTICAL,
    UNDECIDED,
    UNJUDGED,
    WORSE,
    AgentDifference,
    Comparisons,
)
from offrl_jax.results import Row


def of_scores(
    table: Sequence[Sequence[float]], agent: str = "iql", **changes: object
) -> list[Row]:
    """A run per score: `table[task][seed]`."""
    return [
        make_row(agent=agent, task=task, seed=seed, score=score, **changes)
        for task, scores in zip(TASKS, table, strict=False)
        for seed, score in enumerate(scores)
    ]


def changed(rows: Sequence[Row], **changes: object) -> list[Row]:
    return [dataclasses.replace(row, row_id="", **changes) for row in rows]


def compared(folder: Path, before: Sequence[Row], after: Sequence[Row]) -> Comparisons:
    a, b = fill(folder / "a", before), fill(folder / "b", after)
    return leaderboard.compare(a, b)


def only_agent(found: Comparisons) -> AgentDifference:
    (agent,) = found.agents
    return agent


BEFORE = ((10.0, 37.0, 61.0), (80.0, 95.5, 120.0))
AFTER = ((22.0, 30.0, 99.0), (70.0, 90.0, 101.0))


class TestDifferences:
    def test_values_by_hand_and_scipy(self, tmp_path: Path) -> None:
        agent = only_agent(compared(tmp_path, of_scores(BEFORE), of_scores(AFTER)))
        before, after = np.array(BEFORE), np.array(AFTER)
        iqm = [scipy.stats.trim_mean(x.ravel(), 0.25) for x in (before, after)]
        assert agent.baseline_iqm == pytest.approx(iqm[0], abs=1e-4)
        assert agent.change_iqm == pytest.approx(iqm[1], abs=1e-4)
        assert agent.iqm is not None and agent.mean is not None
        assert agent.iqm.value == pytest.approx(iqm[1] - iqm[0], abs=1e-4)
        assert agent.mean.value == pytest.approx(after.mean() - before.mean(), abs=1e-4)
        for i, task in enumerate(agent.tasks):
            assert task.difference is not None
            want = after[i].mean() - before[i].mean()
            assert task.difference.value == pytest.approx(want, abs=1e-4)
        wins = [
            scipy.stats.mannwhitneyu(y, x).statistic / 9
            for x, y in zip(BEFORE, AFTER, strict=True)
        ]
        assert agent.improvement is not None
        assert agent.improvement.value == pytest.approx(np.mean(wins), abs=1e-4)

    @pytest.mark.parametrize("paired", [True, False])
    def test_interval_is_that_of_all_resamples(self, paired: bool) -> None:
        """Seeds drawn together: 27 x 27 resamples; apart: 27^4, of which a sample."""
        x, y = np.array(BEFORE), np.array(AFTER)
        draws = np.array(list(itertools.product(range(3), repeat=3)))
        rng = np.random.default_rng(0)
        if paired:
            both = np.array(list(itertools.product(range(27), repeat=2)))
            both = np.concatenate([both, both], axis=1)
        else:
            both = rng.integers(0, 27, (200_000, 4))
        of_x = np.stack([x[t][draws[both[:, t]]] for t in (0, 1)], axis=1)
        of_y = np.stack([y[t][draws[both[:, 2 + t]]] for t in (0, 1)], axis=1)
        flat = [np.sort(side.reshape(-1, 6), axis=1) for side in (of_x, of_y)]
        iqm = flat[1][:, 1:5].mean(axis=1) - flat[0][:, 1:5].mean(axis=1)
        wins = of_y[:, :, :, None] > of_x[:, :, None, :]
        ties = of_y[:, :, :, None] == of_x[:, :, None, :]
        samples = {
            "iqm": iqm,
            "mean": of_y.mean(axis=(1, 2)) - of_x.mean(axis=(1, 2)),
            "improvement": (wins + 0.5 * ties).mean(axis=(1, 2, 3)),
        }
        runs = [dict(zip(TASKS, side, strict=True)) for side in (BEFORE, AFTER)]
        found = differences.estimate(runs[0], runs[1], TASKS, paired)
        for name, values in samples.items():
            bounds = getattr(found, name)
            # Discrete distributions jump; 2,000 draws stand behind the probability.
            slack = 0.011 if name == "improvement" else 0.003
            for end, level in ((bounds.low, 0.025), (bounds.high, 0.975)):
                below, above = np.quantile(values, [level - slack, level + slack])
                assert below - 1e-3 <= end <= above + 1e-3, name

    def test_pairs_are_of_one_seed_whatever_the_order(self, tmp_path: Path) -> None:
        """A shift by 3 of widely spread seeds: certain in pairs, and only there."""
        rng = np.random.default_rng(1)
        before = rng.uniform(0, 90, (2, 10)).round(2)
        rows = of_scores(before.tolist())
        shifted = of_scores((before + 3).tolist())[::-1]
        agent = only_agent(compared(tmp_path / "pairs", rows, shifted))
        assert agent.paired and agent.iqm is not None
        assert agent.iqm.value == pytest.approx(3.0, abs=1e-3)
        assert agent.iqm.low == agent.iqm.high == pytest.approx(3.0, abs=1e-3)
        assert agent.verdict == BETTER and (agent.better, agent.worse) == (2, 0)
        moved = [dataclasses.replace(r, row_id="", seed=r.seed + 1) for r in shifted]
        agent = only_agent(compared(tmp_path / "apart", rows, moved))
        assert not agent.paired and agent.verdict == UNDECIDED
        assert agent.iqm is not None and agent.iqm.low is not None
        assert agent.iqm.low < -5

    def test_large_returns_keep_small_differences(self) -> None:
        before = {"t": [1e7 + x for x in (0.0, 1.0, 2.0, 3.0)]}
        after = {"t": [1e7 + x + 0.25 for x in (0.0, 1.0, 2.0, 3.0)]}
        found = differences.estimate(before, after, ["t"], paired=True)
        assert found.iqm is not None and found.iqm.value == pytest.approx(0.25)
        assert differences.estimate(before, after, [], True).by_task["t"].low == 0.25

    def test_worse_mirrors_better(self, tmp_path: Path) -> None:
        before, after = make_rows("iql", even(60.0)), make_rows("iql", even(40.0))
        down = only_agent(compared(tmp_path / "down", before, after))
        up = only_agent(compared(tmp_path / "up", after, before))
        assert (down.verdict, up.verdict) == (WORSE, BETTER)
        assert down.iqm is not None and up.iqm is not None
        assert (down.iqm.low, down.iqm.high) == (
            -(up.iqm.high or 0),
            -(up.iqm.low or 0),
        )
        assert down.improvement is not None and down.improvement.value == 0.0
        assert (down.worse, up.better, up.undecided) == (2, 2, 0)


class TestVerdicts:
    def test_identical_is_bit_for_bit(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=3)
        odd = [math.nan, 1.0]
        rows.append(make_row(agent="bc", seed=0, status="diverged", returns=odd))
        again = changed(rows[:-1], run_id="other", suite="renamed", commit="x")
        again += changed(rows[-1:], wall_s=1.0)
        found = compared(tmp_path / "same", rows, again)
        assert found.identical and found.cells == 3 and not found.unmatched
        assert [agent.verdict for agent in found.agents] == [IDENTICAL] * 2
        # Equal scores of other episodes are not the same runs.
        again[0] = dataclasses.replace(
            again[0], row_id="", returns=again[0].returns[::-1]
        )
        found = compared(tmp_path / "other", rows, again)
        iql = {agent.label: agent for agent in found.agents}["iql"]
        assert not found.identical and iql.verdict == UNDECIDED
        assert iql.tasks[0].equal == (1, 2) and iql.tasks[1].verdict == IDENTICAL

    def test_all_scores_equal(self, tmp_path: Path) -> None:
        rows = of_scores([[50.0] * 5] * 2)
        same = only_agent(compared(tmp_path / "same", rows, rows))
        assert same.verdict == IDENTICAL and same.improvement is not None
        assert same.improvement.value == 0.5
        up = only_agent(compared(tmp_path / "up", rows, of_scores([[51.0] * 5] * 2)))
        assert up.verdict == BETTER and up.iqm is not None and up.iqm.low == 1.0

    def test_one_seed_is_not_judged(self, tmp_path: Path) -> None:
        found = compared(
            tmp_path, of_scores([[50.0], [50.0]]), of_scores([[9.0], [9.0]])
        )
        agent = only_agent(found)
        assert agent.verdict == UNJUDGED and agent.few
        assert agent.iqm is not None and (agent.iqm.value, agent.iqm.low) == (
            -41.0,
            None,
        )
        drawn = leaderboard.draw_comparison(found, "table")
        assert "not judged, a single run per task and side has no interval" in drawn

    def test_one_task(self, tmp_path: Path) -> None:
        rows = of_scores([[50.0, 60.0]])
        agent = only_agent(compared(tmp_path, rows, of_scores([[70.0, 80.0]])))
        assert agent.pooled == (TASKS[0],) and agent.verdict == BETTER

    @pytest.mark.parametrize(("seeds", "few"), [(4, True), (5, False)])
    def test_few_seeds_on_either_side(
        self, tmp_path: Path, seeds: int, few: bool
    ) -> None:
        before = make_rows("iql", even(60.0), seeds=10)
        after = make_rows("iql", even(60.0), seeds=seeds)
        found = compared(tmp_path, before, after)
        assert only_agent(found).few is few
        drawn = leaderboard.draw_comparison(found, "md")
        assert f"seeds 0-9 in A, seeds 0-{seeds - 1} in B on 2 tasks" in drawn
        assert ("fewer than 5 seeds" in drawn) is few

    def test_caveat_counts_agents(self, tmp_path: Path) -> None:
        rows = [r for i in range(10) for r in make_rows(f"a{i}", even(60.0), seeds=2)]
        drawn = leaderboard.draw_comparison(compared(tmp_path, rows, rows), "table")
        assert "10 agents are compared" in drawn and "0.5 on average" in drawn


class TestAbsentRuns:
    def test_diverged_runs_count_as_the_floor(self, tmp_path: Path) -> None:
        before = of_scores([[50.0, 60.0, 70.0]])
        after = changed(before[:2], status="diverged", score=None) + before[2:]
        agent = only_agent(compared(tmp_path, before, after))
        assert agent.tasks[0].change.values == (0.0, 0.0, 70.0)
        assert agent.tasks[0].change.diverged == (0, 1) and agent.diverged == 2
        assert agent.mean is not None
        assert agent.mean.value == pytest.approx(70 / 3 - 60, abs=1e-3)

    def test_missing_and_failed_are_stated(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=4)
        failed = dataclasses.replace(
            rows[1], row_id="", status="failed", error="memory"
        )
        a = fill(tmp_path / "a", rows)
        b = fill(tmp_path / "b", [failed, *rows[2:]], [make_job(rows)])
        found = leaderboard.compare(a, b)
        agent = only_agent(found)
        assert agent.incomplete and not agent.paired
        assert agent.tasks[0].change.absent == (0, 1)
        assert found.sections[0].absent == (
            f"B: iql on {TASKS[0]}: seed 1 failed (memory)",
            f"B: iql on {TASKS[0]}: seed 0 missing",
        )
        for style in leaderboard.COMPARISON_FORMATS:
            assert "seed 0 missing" in leaderboard.draw_comparison(found, style)

    def test_a_task_without_runs_of_one_side_is_left_out(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=5)
        a = fill(tmp_path / "a", rows)
        b = fill(tmp_path / "b", rows[:5], [make_job(rows)])
        found = leaderboard.compare(a, b)
        agent = only_agent(found)
        assert agent.pooled == (TASKS[0],) and agent.iqm is not None
        assert agent.tasks[1].difference is None and not found.identical
        assert agent.baseline_iqm == agent.change_iqm
        drawn = leaderboard.draw_comparison(found, "table")
        assert "without runs of both sides, left out" in drawn

    def test_nothing_on_both_sides(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=2)
        a, b = fill(tmp_path / "a", rows), fill(tmp_path / "b", [], [make_job(rows)])
        with pytest.raises(
            ResultsError, match=r"nothing to compare: B: iql on .*missing"
        ):
            leaderboard.compare(a, b)


class TestRawReturns:
    def runs(self, levels: Sequence[float], **changes: object) -> list[Row]:
        return [
            make_row(agent="iql", seed=s, score=None, returns=[x] * 20, **changes)
            for s, x in enumerate(levels)
        ]

    def test_a_single_task_is_judged_by_return(self, tmp_path: Path) -> None:
        before, after = self.runs([1.0, 2.0, 3.0]), self.runs([5.0, 6.0, 7.0])
        agent = only_agent(compared(tmp_path, before, after))
        assert agent.tasks[0].unit == "return" and agent.verdict == BETTER
        assert agent.iqm is not None and agent.iqm.value == 4.0

    def test_several_tasks_are_judged_one_by_one(self, tmp_path: Path) -> None:
        before = self.runs([1.0, 2.0]) + self.runs([1.0, 2.0], task=TASKS[1])
        after = self.runs([8.0, 9.0]) + self.runs([-8.0, -9.0], task=TASKS[1])
        a, b = fill(tmp_path / "a", before), fill(tmp_path / "b", after)
        agent = only_agent(leaderboard.compare(a, b))
        assert agent.iqm is None and agent.verdict == UNJUDGED
        assert [task.verdict for task in agent.tasks] == [BETTER, WORSE]
        alone = only_agent(leaderboard.compare(a, b, tasks=[TASKS[1]]))
        assert alone.verdict == WORSE

    def test_the_floor_is_the_lowest_of_both_folders(self, tmp_path: Path) -> None:
        lost = make_row(
            agent="iql", seed=1, score=None, returns=[math.nan], status="diverged"
        )
        before = [*self.runs([3.0]), lost]
        data = make_behaviour(TASKS[0], None, returns=[-9.0])
        agent = only_agent(compared(tmp_path, before, [*self.runs([5.0, 4.0]), data]))
        assert agent.tasks[0].baseline.values == (3.0, -9.0)

    def test_scores_on_one_side_only_are_not_compared(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=2)
        raw = changed(rows[:2], score=None) + rows[2:]
        found = compared(tmp_path, rows, raw)
        assert [task.task for task in only_agent(found).tasks] == [TASKS[1]]
        assert found.unmatched_baseline == found.unmatched_change == 1
        assert "scores in run tiny-iql-default, raw returns in" in found.unmatched[0]


class TestMatching:
    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"protocol": {"episodes": 30}}, "protocol episodes 20 in A, 30 in B"),
            ({"updates_total": 7, "step": 7}, "updates 100 in A, 7 in B"),
            ({"agent": "iql@quick"}, "preset full in A, quick in B"),
            ({"family": "d4rl"}, "family classic in A, d4rl in B"),
        ],
    )
    def test_what_keeps_folders_apart_is_said_in_one_line(
        self, tmp_path: Path, changes: dict[str, object], what: str
    ) -> None:
        rows = make_rows("iql", even(60.0), seeds=2)
        other = changed(rows, **changes)
        with pytest.raises(ResultsError, match="nothing to compare") as told:
            compared(tmp_path / "all", rows, other)
        assert f"2 cells of A and 2 cells of B not compared: {what}" in str(told.value)
        assert "\n" not in str(told.value)
        both = make_rows("bc", even(40.0), seeds=2)
        found = compared(tmp_path / "some", rows + both, other + both)
        assert only_agent(found).label == "bc" and not found.identical
        assert (found.unmatched_baseline, found.unmatched_change) == (2, 2)
        (line,) = found.unmatched
        assert what in line and TASKS[0] in line and TASKS[1] in line

    def test_agents_and_tasks_of_one_side_are_listed(self, tmp_path: Path) -> None:
        before = make_rows("iql", even(60.0), seeds=2) + make_rows("bc", even(1.0), 2)
        after = make_rows("iql", {TASKS[0]: 60.0}, 2) + make_rows("awr", even(1.0), 2)
        found = compared(tmp_path, before, after)
        assert found.unmatched == (
            f"only in A: bc [default] on {TASKS[0]}, {TASKS[1]} (2 cells)",
            f"only in A: iql [default] on {TASKS[1]} (1 cell)",
            f"only in B: awr [default] on {TASKS[0]}, {TASKS[1]} (2 cells)",
        )
        for style in leaderboard.COMPARISON_FORMATS:
            drawn = leaderboard.draw_comparison(found, style, width=200)
            assert "only in B: awr" in drawn

    def test_suites_and_run_ids_do_not_matter(self, tmp_path: Path) -> None:
        """The same cell under two suites of a folder counts once, the later one."""
        rows = make_rows("iql", even(60.0), seeds=2)
        twice = rows + changed(make_rows("iql", even(70.0), 2), suite="z", run_id="z")
        found = compared(tmp_path, rows, twice)
        agent = only_agent(found)
        assert agent.iqm is not None and agent.iqm.value == 10.0
        assert found.messages == (
            "B: 4 runs are superseded by later ones of their cell",
        )

    def test_what_else_differs_is_a_warning(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=2)
        after = changed(
            rows,
            hyper={"alpha": 1.0},
            config={"hidden": [8]},
            recipe_hash="q",
            versions={"jax": "0.11"},
            flags={"precision": "tf32"},
            device="gpu",
        )
        found = compared(tmp_path, rows, after)
        assert found.sections[0].warnings == (
            "iql: alpha 2.5 in A, 1.0 in B on 2 tasks",
            "iql: structure hidden [64, 64] in A, [8] in B",
            *(
                f"{task}: another dataset (r in A, q in B); a difference may be the "
                "data's"
                for task in TASKS
            ),
            "flags: precision None in A, tf32 in B",
            "versions: jax 0.10.2 in A, 0.11 in B",
            "s/run do not compare, of iql: 2 CPU cores x 10 runs in A, gpu x 10 runs "
            "in B",
        )
        assert only_agent(found).cost_ratio is None
        slower = compared(tmp_path / "slow", rows, changed(rows, wall_s=45.0))
        assert only_agent(slower).cost_ratio == 1.5
        assert slower.sections[0].warnings == ()

    def test_filters(self, tmp_path: Path) -> None:
        rows = make_rows("iql@quick", even(60.0), 2) + make_rows("bc", even(1.0), 2)
        a, b = fill(tmp_path / "a", rows), fill(tmp_path / "b", rows)
        found = leaderboard.compare(a, b, ["iql"], [TASKS[1]])
        agent = only_agent(found)
        assert (agent.label, [t.task for t in agent.tasks]) == ("iql@quick", [TASKS[1]])
        with pytest.raises(UsageError, match="unknown agent of these results 'iq'"):
            leaderboard.compare(a, b, ["iq"])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparisons:
    before = make_rows("iql", even(60.0)) + make_rows("bc", even(40.0))
    after = make_rows("iql", even(50.0)) + make_rows("bc", even(40.5))
    return compared(tmp_path_factory.mktemp("drawn"), before, after)


class TestDrawing:
    @pytest.mark.parametrize("width", [60, 80, 100, 160])
    def test_table_keeps_its_width(self, found: Comparisons, width: int) -> None:
        drawn = leaderboard.draw_comparison(found, "table", width=width)
        assert max(map(len, drawn.splitlines())) <= width
        words = [line.split() for line in drawn.splitlines()]
        assert ["iql", "60.0", "50.0", "-10.0"] in [line[:4] for line in words]
        assert any(line[:1] == ["iql"] and line[-1] == "worse" for line in words)

    def test_json_holds_everything(self, found: Comparisons) -> None:
        record = json.loads(leaderboard.draw_comparison(found, "json"))
        (section,) = record["sections"]
        bc, iql = section["agents"]
        assert (bc["agent"], iql["verdict"], record["identical"]) == (
            "bc",
            WORSE,
            False,
        )
        assert iql["tasks"][0]["baseline"]["values"][0] == 55.5
        assert iql["iqm"]["value"] == -10.0 and iql["paired"] is True

    def test_markdown_tables_are_rectangular(self, found: Comparisons) -> None:
        drawn = leaderboard.draw_comparison(found, "md")
        tables = [b.splitlines() for b in drawn.split("\n\n") if b.startswith("| ")]
        assert [len(lines) for lines in tables] == [4, 6]
        for lines in tables:
            assert len({line.count("|") for line in lines}) == 1

    def test_unknown_format(self, found: Comparisons) -> None:
        with pytest.raises(UsageError, match="unknown format 'csv'"):
            leaderboard.draw_comparison(found, "csv")
