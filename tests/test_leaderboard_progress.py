"""Scores while training against scipy, brute force and the leaderboard itself."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from test_leaderboard_board import TASKS, make_behaviour, make_row

from offrl_jax import leaderboard, results
from offrl_jax.errors import ResultsError, UsageError
from offrl_jax.leaderboard.progress import AgentProgress, Point, Progress
from offrl_jax.leaderboard.ranking import Bounds
from offrl_jax.results import Row

STEPS = (40, 70, 100)
SEEDS = 5


def silent(line: str) -> None:
    pytest.fail(f"unexpected message: {line}")


def write(folder: Path, rows: Iterable[Row]) -> Path:
    for row in rows:
        with results.RowFile(results.row_path(folder, row.run_id), silent) as file:
            file.append(row)
    return folder


def scores(seed: int = 0, tasks: int = 2) -> np.ndarray:
    """`[T, S, steps]`, irregular."""
    rng = np.random.default_rng(seed)
    return np.round(50 + 20 * rng.standard_normal((tasks, SEEDS, len(STEPS))), 3)


def rows_of(table: np.ndarray, tasks: Sequence[str] = TASKS, **about: Any) -> list[Row]:
    """A row per evaluation; 3 s of the population's training per 10 updates."""
    return [
        make_row(
            task=task, seed=seed, step=step, score=float(score), wall_s=3.0 * step,
            **about,
        )
        for task, of_task in zip(tasks, table, strict=True)
        for seed, of_seed in enumerate(of_task)
        for step, score in zip(STEPS, of_seed, strict=True)
    ]  # fmt: skip


def built(folder: Path, **chosen: Any) -> tuple[Progress, ...]:
    return leaderboard.progress_of(folder, **chosen)[0]


def only(folder: Path, rows: Iterable[Row], **chosen: Any) -> Progress:
    (section,) = built(write(folder, rows), **chosen)
    return section


def own(section: Progress, label: str = "td3_bc") -> AgentProgress:
    return next(agent for agent in section.agents if agent.label == label)


def values(points: Sequence[Point]) -> list[float]:
    return [point.value.value for point in points]


class TestNumbers:
    def test_every_step_against_scipy(self, tmp_path: Path) -> None:
        table = scores()
        section = only(tmp_path, rows_of(table))
        agent = own(section)
        assert section.pooled == TASKS and section.messages == ()
        assert [point.step for point in agent.pooled] == list(STEPS)
        for i, point in enumerate(agent.pooled):
            pooled = scipy.stats.trim_mean(table[:, :, i].ravel(), 0.25)
            assert point.value.value == pytest.approx(pooled, abs=1e-3)
            assert (point.runs, point.diverged, point.episodes) == (10, 0, 20)
            assert point.seconds == 3.0 * STEPS[i] / 10  # ten members
        for t, task in enumerate(TASKS):
            means = table[t].mean(axis=0)
            np.testing.assert_allclose(values(agent.by_task[task]), means, atol=1e-3)

    def test_bands_against_brute_force(self, tmp_path: Path) -> None:
        table = scores(1)
        agent = own(only(tmp_path, rows_of(table)))
        rng = np.random.default_rng(7)
        for i, point in enumerate(agent.pooled):
            at = table[:, :, i]
            drawn = [
                np.concatenate([rng.choice(runs, SEEDS) for runs in at])
                for _ in range(20_000)
            ]
            for found, samples in (
                (point, scipy.stats.trim_mean(drawn, 0.25, axis=1)),
                (agent.by_task[TASKS[0]][i], np.mean(drawn, axis=1, where=FIRST)),
            ):
                ends = np.percentile(samples, (2.5, 97.5))
                width = ends[1] - ends[0]
                got = [found.value.low, found.value.high]
                np.testing.assert_allclose(got, ends, rtol=0, atol=0.03 * width)

    def test_last_points_are_the_leaderboards(self, tmp_path: Path) -> None:
        rows = rows_of(scores(2)) + rows_of(scores(3), agent="iql")
        rows.append(make_row(seed=5, score=None, returns=[], status="diverged"))
        section = only(tmp_path, rows)
        (board,) = leaderboard.build(tmp_path).sections
        assert {entry.label for entry in board.entries} == {"td3_bc", "iql"}
        for entry in board.entries:
            agent = own(section, entry.label)
            assert agent.pooled[-1].value == entry.iqm
            for cell in entry.cells:
                assert agent.by_task[cell.task][-1].value == cell.mean

    def test_other_agents_and_the_choice_of_agents_change_nothing(
        self, tmp_path: Path
    ) -> None:
        alone = own(only(tmp_path / "a", rows_of(scores())))
        rows = rows_of(scores()) + rows_of(scores(4), agent="iql")
        both = write(tmp_path / "b", rows)
        (section,) = built(both)
        assert own(section) == alone
        (chosen,) = built(both, agents=["td3_bc"])
        assert chosen.agents == (alone,)

    def test_population_seconds_are_averaged_over_runs(self, tmp_path: Path) -> None:
        """Two tasks trained apart: 100 s of 10 members, 60 s of 2."""
        small = {"population": {"members": 2, "devices": 1}, "wall_s": 60.0}
        rows = [
            make_row(seed=seed, task=task, run_id=f"job-{task[8:12]}", **about)
            for seed in (0, 1)
            for task, about in ((TASKS[0], {"wall_s": 100.0}), (TASKS[1], small))
        ]
        agent = own(only(tmp_path, rows))
        assert agent.pooled[0].seconds == (10.0 + 30.0) / 2
        assert agent.by_task[TASKS[1]][0].seconds == 30.0

    @pytest.mark.parametrize(
        "unknown", [{"wall_s": None}, {"population": {}}, {"wall_s": math.nan}]
    )
    def test_unknown_seconds_are_told(self, unknown: dict, tmp_path: Path) -> None:
        section = only(tmp_path, [make_row(), make_row(seed=1, **unknown)])
        assert own(section).pooled[0].seconds is None
        assert any("without seconds" in line for line in section.messages)


FIRST = np.arange(2 * SEEDS) < SEEDS
"""Runs of the first task among all."""


class TestWhatCounts:
    def test_families_and_protocols_are_never_pooled(self, tmp_path: Path) -> None:
        table = scores(tasks=1)
        rows = [
            *rows_of(table, TASKS[:1]),
            *rows_of(table + 1, ["neorl2/a-v1"], family="neorl2", run_id="n"),
            *rows_of(table + 2, TASKS[:1], protocol={"episodes": 30}, run_id="p"),
        ]
        sections = built(write(tmp_path, rows))
        assert [(s.key.family, s.key.protocol) for s in sections] == [
            ("classic", '{"episodes":20}'),
            ("classic", '{"episodes":30}'),
            ("neorl2", '{"episodes":20}'),
        ]
        for section, shift in zip(sections, (0, 2, 1), strict=True):
            assert own(section).pooled[-1].runs == SEEDS
            want = scipy.stats.trim_mean(table[0, :, -1] + shift, 0.25)
            assert values(own(section).pooled)[-1] == pytest.approx(want, abs=1e-3)

    @pytest.mark.parametrize("alone", [True, False])
    def test_tasks_without_reference_are_returns(
        self, alone: bool, tmp_path: Path
    ) -> None:
        about = {"score": None, "task": TASKS[1]}
        raw = [
            make_row(seed=seed, step=step, returns=[100.0 * seed + step] * 2, **about)
            for seed in (0, 1)
            for step in STEPS
        ]
        rows = raw if alone else [*raw, *rows_of(scores(tasks=1), TASKS[:1])]
        section = only(tmp_path, rows)
        agent = own(section)
        assert section.pooled == (() if alone else TASKS[:1])
        assert section.units[TASKS[1]] == "return"
        assert values(agent.by_task[TASKS[1]]) == [90.0, 120.0, 150.0]
        assert [p.runs for p in agent.pooled] == ([] if alone else [SEEDS] * 3)
        assert any(
            f"in no IQM: {TASKS[1]}" in x and "reference" in x for x in section.messages
        )

    def test_a_diverged_run_is_the_floor_from_then_on(self, tmp_path: Path) -> None:
        """Also without rows after; a lower score of its own, before, stays its own."""
        gone = {"score": None, "returns": [], "status": "diverged"}
        rows = [make_row(step=step, score=60.0) for step in STEPS]
        rows += [
            make_row(seed=1, step=40, score=-6.0),
            make_row(seed=1, step=70, **gone),
            make_row(seed=2, step=40, **gone),
            make_row(seed=2, step=70, **gone),
            make_row(seed=2, step=100, **gone),
        ]
        section = only(tmp_path, rows)
        points = own(section).by_task[TASKS[0]]
        np.testing.assert_allclose(values(points), [18.0, 20.0, 20.0], atol=1e-3)
        assert [point.diverged for point in points] == [1, 2, 2]
        assert own(section).diverged == 2
        assert section.messages == tuple(
            f"td3_bc on {TASKS[0]}: {when} updates, counted as the floor"
            for when in ("seed 2 diverged by 40", "seed 1 diverged by 70")
        )

    def test_the_floor_of_returns_is_the_leaderboards(self, tmp_path: Path) -> None:
        about = {"score": None}
        gone = {"returns": [], "status": "diverged", **about}
        rows = [make_behaviour(TASKS[0], None, returns=[-700.0])]
        rows += [make_row(step=s, returns=[-10.0 * s], **about) for s in STEPS]
        rows += [make_row(seed=1, step=step, **gone) for step in STEPS]
        section = only(tmp_path, rows)
        want = [(-400 - 1000) / 2, (-700 - 1000) / 2, -1000.0]
        assert values(own(section).by_task[TASKS[0]]) == want
        assert section.behaviour == {TASKS[0]: -700.0}

    def test_an_evaluation_that_is_not_finite_is_the_floor(self, tmp_path) -> None:
        rows = [make_row(step=step, score=30.0) for step in STEPS]
        rows[1] = make_row(step=70, score=None, returns=[math.nan, 1.0])
        assert values(own(only(tmp_path, rows)).pooled) == [30.0, 0.0, 30.0]

    def test_a_line_is_over_one_set_of_runs(self, tmp_path: Path) -> None:
        """Failed, unfinished and planned runs enter no point; gaps leave points out."""
        rows = [make_row(seed=s, step=t, score=10.0 * s) for s in (0, 1) for t in STEPS]
        del rows[1]  # seed 0 at 70
        rows += [make_row(seed=2, step=step, score=99.0) for step in STEPS[:2]]
        failed = {"status": "failed", "returns": [], "error": "out of memory"}
        rows += [make_row(seed=3, step=40), make_row(seed=3, score=None, **failed)]
        section = only(tmp_path, rows)
        agent = own(section)
        assert [point.step for point in agent.pooled] == [40, 100]
        assert values(agent.pooled) == [5.0, 5.0]
        assert (agent.failed, agent.missing, agent.seeds) == (1, 1, {TASKS[0]: 2})
        assert section.messages == (
            f"td3_bc on {TASKS[0]}: seed 3 failed (out of memory)",
            f"td3_bc on {TASKS[0]}: seed 2 missing, at 70 of 100 updates",
            f"td3_bc on {TASKS[0]}: no point at 70 updates, where not all of its 2 "
            "runs have a value",
        )

    def test_no_iqm_over_fewer_tasks_than_others(self, tmp_path: Path) -> None:
        rows = rows_of(scores()) + rows_of(scores(5, 1), TASKS[:1], agent="iql")
        write(tmp_path, rows)
        for chosen in (None, ["iql"]):
            (section,) = built(tmp_path, agents=chosen)
            agent = own(section, "iql")
            assert agent.pooled == () and len(agent.by_task[TASKS[0]]) == 3
            assert f"iql: no IQM, without runs of {TASKS[1]}" in section.messages
        (section,) = built(tmp_path, tasks=TASKS[:1])
        assert len(own(section, "iql").pooled) == 3 and section.pooled == TASKS[:1]

    def test_tuning_and_superseded_runs_are_left_out(self, tmp_path: Path) -> None:
        rows = [make_row(run_id="run-b", step=s, score=1.0) for s in STEPS]
        rows += [make_row(run_id="run-a", step=s, score=2.0) for s in STEPS]
        rows += [make_row(run_id="t", role="tune", seed=9, score=3.0)]
        sections, messages = leaderboard.progress_of(write(tmp_path, rows))
        assert values(own(sections[0]).pooled) == [1.0] * 3
        assert messages == ("1 runs are superseded by later ones of their cell",)

    def test_settings_are_lines_of_their_own_and_devices_are_told(self, tmp_path):
        other = {"setting": "alpha=1", "hyper": {"alpha": 1.0}, "device": "one GPU"}
        section = only(tmp_path, [make_row(), make_row(score=9.0, **other)])
        labels = ["td3_bc [alpha=1]", "td3_bc [default]"]
        assert [agent.label for agent in section.agents] == labels
        assert section.messages == (
            "seconds do not compare between devices: 2 CPU cores, one GPU",
        )


class TestFewRuns:
    def test_one_seed_has_no_interval_and_a_mark(self, tmp_path: Path) -> None:
        agent = own(only(tmp_path, [make_row(score=12.5)]))
        assert agent.pooled[0].value == Bounds(12.5, None, None) and agent.few

    @pytest.mark.parametrize(("seeds", "few"), [(4, True), (5, False)])
    def test_few_seeds_are_marked_as_in_the_leaderboard(self, seeds, few, tmp_path):
        agent = own(only(tmp_path, [make_row(seed=seed) for seed in range(seeds)]))
        assert agent.few is few and agent.pooled[0].value.low is not None


class TestMistakes:
    def test_folders_without_what_is_needed(self, tmp_path: Path) -> None:
        with pytest.raises(ResultsError, match="no such folder"):
            built(tmp_path / "none")
        with pytest.raises(ResultsError, match="no rows and no plan"):
            built(tmp_path)
        write(tmp_path, [make_row(step=50)])
        with pytest.raises(ResultsError, match=r"no run has come to its last update"):
            built(tmp_path)

    def test_names(self, tmp_path: Path) -> None:
        write(tmp_path, [make_row(agent="td3_bc@quick"), make_row(agent="bc", step=50)])
        for name in ("td3_bc", "td3_bc@quick"):
            assert built(tmp_path, agents=[name])[0].agents[0].agent == "td3_bc@quick"
        with pytest.raises(UsageError, match=r"agent.*'td3_b'; did you mean 'td3_bc'"):
            built(tmp_path, agents=["td3_b"])
        with pytest.raises(UsageError, match=f"task.*did you mean '{TASKS[1]}'"):
            write(tmp_path, [make_row(task=TASKS[1])])
            built(tmp_path, tasks=["point_maze-mixed-v0"])
        with pytest.raises(ResultsError, match="no run of those asked for"):
            built(tmp_path, agents=["bc"])


class TestTable:
    def test_a_line_per_point(self, tmp_path: Path) -> None:
        write(tmp_path, rows_of(scores()))
        text = leaderboard.progress_csv(built(tmp_path))
        assert text == leaderboard.progress_csv(built(tmp_path))
        lines = list(csv.DictReader(io.StringIO(text)))
        assert [(x["task"], x["statistic"], x["step"]) for x in lines] == [
            (task, statistic, str(step))
            for task, statistic in (
                ("pooled tasks", "iqm"),
                (TASKS[0], "mean"),
                (TASKS[1], "mean"),
            )
            for step in STEPS
        ]
        point = own(built(tmp_path)[0]).pooled[-1]
        found = [float(lines[2][name]) for name in ("value", "low", "high", "seconds")]
        assert found == [*vars(point.value).values(), 30.0]
        assert lines[2]["tasks"] == "2" and lines[2]["runs"] == "10"
        assert lines[2]["protocol"] == '{"episodes": 20}'
