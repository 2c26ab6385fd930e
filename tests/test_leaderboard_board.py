"""Which runs count, what is missing, and who shares a rank."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from offrl_jax import leaderboard, results
from offrl_jax.errors import ResultsError
from offrl_jax.leaderboard.model import ONE_SETTING, PER_TASK, Entry, Section
from offrl_jax.results import BEHAVIOUR, Row

TASKS = ("classic/pendulum-mixed-v0", "classic/point_maze-mixed-v0")


def make_row(**changes: Any) -> Row:
    """A final test row; `returns` are such that 100 points are a return of 0."""
    content: dict[str, Any] = {
        "suite": "tiny",
        "role": "test",
        "agent": "td3_bc",
        "config": {"hidden": [64, 64]},
        "setting": "default",
        "hyper": {"alpha": 2.5},
        "task": TASKS[0],
        "family": "classic",
        "recipe_hash": "r",
        "dataset_hash": "d",
        "seed": 0,
        "step": 100,
        "updates_total": 100,
        "phase_updates": {"train": 100},
        "protocol": {"episodes": 20},
        "score": 50.0,
        "status": "ok",
        "split_changed": False,
        "successes": None,
        "updates_per_s": 1000.0,
        "wall_s": 30.0,
        "compile_s": 2.0,
        "eval_s": 0.5,
        "device": "2 CPU cores",
        "flags": {},
        "versions": {"jax": "0.10.2"},
        "commit": "abc",
        "population": {"members": 10, "devices": 2},
        **changes,
    }
    agent = content["agent"]
    content.setdefault("run_id", f"{content['suite']}-{agent}-{content['setting']}")
    score = content["score"]
    centre = (0.0 if score is None else score) * 10 - 1000
    episodes = content["protocol"]["episodes"]
    content.setdefault("returns", [centre + i % 2 - 0.5 for i in range(episodes)])
    content.setdefault("lengths", [200] * len(content["returns"]))
    return Row(**content)


def make_rows(
    agent: str, means: Mapping[str, float], seeds: int = 10, **changes: Any
) -> list[Row]:
    """Rows whose scores lie evenly within 5 points around the mean of their task."""
    return [
        make_row(
            agent=agent,
            task=task,
            seed=seed,
            score=mean + 10 * (seed + 0.5) / seeds - 5,
            **changes,
        )
        for task, mean in means.items()
        for seed in range(seeds)
    ]


def make_behaviour(task: str, score: float | None, **changes: Any) -> Row:
    content = {"setting": "dataset", "seed": None, "step": 0, "updates_total": 0}
    content |= {"run_id": BEHAVIOUR, "agent": BEHAVIOUR, "hyper": {}, "config": {}}
    return make_row(**{**content, "task": task, "score": score, **changes})


def make_job(rows: Sequence[Row], **changes: Any) -> results.Job:
    """The job that `rows` are the complete result of."""
    first = rows[0]
    members = tuple(
        results.Member(r.task, r.family, r.setting, r.seed, r.hyper)
        for r in rows
        if r.seed is not None
    )
    content: dict[str, Any] = {
        name: getattr(first, name)
        for name in ("run_id", "suite", "role", "agent", "config", "updates_total")
    }
    content |= {
        "members": members,
        "phase_updates": first.phase_updates,
        "eval_steps": (first.updates_total,),
        "protocol": first.protocol,
        "split": {},
        "source_hash": "s",
        "datasets": {},
    }
    return results.Job(**{**content, **changes})


def fill(folder: Path, rows: Iterable[Row], jobs: Sequence[results.Job] = ()) -> Path:
    """Writes a results folder; the rows of a run in the order given."""
    for row in rows:
        path = results.row_path(folder, row.run_id)
        with results.RowFile(path, lambda message: pytest.fail(message)) as file:
            file.append(row)
    if jobs:
        results.write_plan(folder, results.Plan(results.SCHEMA, tuple(jobs)))
    folder.mkdir(exist_ok=True)
    return folder


def even(mean: float) -> dict[str, float]:
    return dict.fromkeys(TASKS, mean)


def example_rows() -> list[Row]:
    """Three agents: two that cannot be told apart, and one that is clearly worse."""
    rows = make_rows("iql", even(60.0)) + make_rows("td3_bc", even(59.0))
    rows += make_rows("bc", even(40.0))
    return rows + [make_behaviour(task, 30.0) for task in TASKS]


def only_section(folder: Path) -> Section:
    (section,) = leaderboard.build(folder).sections
    return section


def by_label(section: Section) -> dict[str, Entry]:
    return {entry.label: entry for entry in section.entries}


class TestRanking:
    def test_shared_ranks_and_values(self, tmp_path: Path) -> None:
        section = only_section(fill(tmp_path, example_rows()))
        assert [(e.label, e.rank) for e in section.entries] == [
            ("iql", 1),
            ("td3_bc", 1),
            ("bc", 3),
        ]
        iql, td3_bc, bc = section.entries
        scores = [row.score for row in example_rows() if row.agent == "iql"]
        assert iql.iqm is not None and iql.mean is not None
        assert iql.iqm.value == pytest.approx(
            scipy.stats.trim_mean(scores, 0.25), abs=1e-4
        )
        assert iql.iqm.low is not None and iql.iqm.high is not None
        assert iql.iqm.low < iql.iqm.value < iql.iqm.high
        assert iql.mean.value == 60.0
        assert iql.optimality_gap is not None and iql.optimality_gap.value == 40.0
        assert (iql.leader, iql.leader_better) == (None, None)
        # Scores are 55.5 ... 64.5 against 54.5 ... 63.5 on both tasks.
        own = [55.5 + i for i in range(10)]
        other = [54.5 + i for i in range(10)]
        wins = scipy.stats.mannwhitneyu(own, other).statistic / 100
        assert td3_bc.leader == "iql" and td3_bc.leader_better is not None
        assert td3_bc.leader_better.value == pytest.approx(wins)
        assert bc.leader == "iql" and bc.leader_better is not None
        assert bc.leader_better.value == bc.leader_better.low == 1.0

    def test_cost_tasks_and_behaviour(self, tmp_path: Path) -> None:
        section = only_section(fill(tmp_path, example_rows()))
        assert {entry.cost_s for entry in section.entries} == {30.0 * 2 / 10}
        assert [task.behaviour for task in section.tasks] == [30.0, 30.0]
        assert [task.task for task in section.tasks] == sorted(TASKS)
        assert not section.partial and section.planned == 60
        cell = by_label(section)["bc"].cells[0]
        assert cell.seeds == tuple(range(10)) and cell.episodes == 20
        assert cell.mean is not None and cell.mean.value == 40.0

    def test_behaviour_is_that_of_the_dataset_the_runs_used(
        self, tmp_path: Path
    ) -> None:
        rows = [*make_rows("iql", even(60.0), seeds=2)]
        for recipe, score in (("a", 1.0), ("r", 30.0), ("z", 2.0)):
            other = {"recipe_hash": recipe, "run_id": f"behaviour-{recipe}"}
            rows.append(make_behaviour(TASKS[0], score, **other))
        section = only_section(fill(tmp_path, rows))
        assert [task.behaviour for task in section.tasks] == [30.0, None]

    def test_rows_of_other_steps_roles_and_order_change_nothing(
        self, tmp_path: Path
    ) -> None:
        rows = example_rows()
        extra = [dataclasses.replace(r, step=50, score=0.0, row_id="") for r in rows]
        extra = [row for row in extra if row.agent != BEHAVIOUR]
        board = leaderboard.build(fill(tmp_path / "a", rows))
        mixed = rows + extra
        random.Random(0).shuffle(mixed)
        assert leaderboard.build(fill(tmp_path / "b", mixed)) == board

    def test_an_agent_more_changes_no_interval(self, tmp_path: Path) -> None:
        rows = example_rows()
        before = by_label(only_section(fill(tmp_path / "a", rows)))
        more = rows + make_rows("aaa", even(20.0), seeds=12)
        after = by_label(only_section(fill(tmp_path / "b", more)))
        assert {label: after[label] for label in before} == before

    def test_single_runs_have_no_interval(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=1)
        (entry,) = only_section(fill(tmp_path, rows)).entries
        assert entry.iqm is not None and entry.iqm.low is None
        assert entry.rank == 1 and entry.few

    @pytest.mark.parametrize(
        ("seeds", "episodes", "few"), [(4, 20, True), (5, 19, True), (5, 20, False)]
    )
    def test_few_seeds_or_episodes_are_marked(
        self, tmp_path: Path, seeds: int, episodes: int, few: bool
    ) -> None:
        rows = make_rows(
            "iql", even(60.0), seeds=seeds, protocol={"episodes": episodes}
        )
        (entry,) = only_section(fill(tmp_path, rows)).entries
        assert entry.few is few


class TestSections:
    def test_what_must_not_be_averaged_is_kept_apart(self, tmp_path: Path) -> None:
        one = even(50.0)
        rows = make_rows("iql", one, seeds=2)
        rows += make_rows("iql@quick", one, seeds=2)
        rows += make_rows("iql", one, seeds=2, suite="other")
        rows += make_rows("iql", {"d4rl/x-v2": 5.0}, seeds=2, family="d4rl")
        long = {"updates_total": 200, "step": 200, "run_id": "long"}
        rows += make_rows("iql", one, seeds=2, **long)
        protocol = {"protocol": {"episodes": 30}, "run_id": "more"}
        rows += make_rows("iql", one, seeds=2, **protocol)
        sections = leaderboard.build(fill(tmp_path, rows)).sections
        assert len(sections) == 6
        assert {len(section.entries) for section in sections} == {1}
        assert sorted(section.preset for section in sections) == ["full"] * 5 + [
            "quick"
        ]

    def test_settings_are_lines_of_their_own(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=5)
        rows += make_rows("iql", even(50.0), seeds=5, setting="b", hyper={"alpha": 1.0})
        rows += make_rows("bc", even(40.0), seeds=5)
        section = only_section(fill(tmp_path, rows))
        assert [e.label for e in section.entries] == ["iql [default]", "iql [b]", "bc"]

    def test_settings_chosen_per_task_are_another_table_with_bc(
        self, tmp_path: Path
    ) -> None:
        rows = make_rows("iql", even(50.0), seeds=3) + make_rows(
            "bc", even(40.0), seeds=3
        )
        for i, task in enumerate(TASKS):
            rows += make_rows(
                "iql", {task: 60.0}, seeds=3, setting="best", hyper={"alpha": i}
            )
        board = leaderboard.build(fill(tmp_path, rows))
        tables = {
            section.tuning: [entry.agent for entry in section.entries]
            for section in board.sections
        }
        assert tables == {ONE_SETTING: ["iql", "bc"], PER_TASK: ["iql", "bc"]}

    def test_tuning_budget_and_shared_seeds(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=5)
        for alpha in (1.0, 2.0, 3.0):
            for seed in (4, 100):
                rows.append(
                    make_row(
                        agent="iql",
                        role="tune",
                        seed=seed,
                        hyper={"alpha": alpha},
                        run_id=f"tune-{alpha}",
                    )
                )
        section = only_section(fill(tmp_path, rows))
        assert section.entries[0].tuned == (3, 2)
        assert section.warnings == ("iql: seed 4 served for tuning and for testing",)

    def test_mixtures_are_told(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=5)
        rows[0] = dataclasses.replace(rows[0], row_id="", config={"hidden": [8]})
        rows[1] = dataclasses.replace(rows[1], row_id="", recipe_hash="other")
        rows[2] = dataclasses.replace(rows[2], row_id="", split_changed=True)
        assert only_section(fill(tmp_path, rows)).warnings == (
            "iql: runs of 2 different structures under one label",
            f"{TASKS[0]}: runs used 2 different datasets; they do not compare",
            "1 runs continued under another split of the population",
        )


class TestRawReturns:
    def test_a_single_task_is_ranked_by_return(self, tmp_path: Path) -> None:
        rows = []
        for agent, level in (("iql", 2.0), ("bc", 1.0)):
            for seed in range(5):
                own = {"score": None, "returns": [level, level + seed / 10] * 10}
                rows.append(make_row(agent=agent, seed=seed, **own))
        rows.append(make_behaviour(TASKS[0], None, returns=[0.25, 0.75]))
        section = only_section(fill(tmp_path, rows))
        assert section.unit == "return" and section.tasks[0].behaviour == 0.5
        iql = section.entries[0]
        assert iql.label == "iql" and iql.rank == 1 and iql.optimality_gap is None
        values = [2.0 + seed / 20 for seed in range(5)]
        assert iql.cells[0].values == pytest.approx(values)
        assert iql.iqm is not None
        assert iql.iqm.value == pytest.approx(scipy.stats.trim_mean(values, 0.25))

    def test_several_tasks_are_never_pooled(self, tmp_path: Path) -> None:
        rows = make_rows("iql", {TASKS[0]: 60.0}, seeds=5)
        for seed in range(5):
            rows.append(make_row(agent="iql", task=TASKS[1], seed=seed, score=None))
        section = only_section(fill(tmp_path, rows))
        assert [(t.unit, t.ranked) for t in section.tasks] == [
            ("score", True),
            ("return", False),
        ]
        (entry,) = section.entries
        assert entry.iqm is not None and entry.iqm.value == pytest.approx(60.0)
        mean = entry.cells[1].mean
        assert mean is not None and mean.value == -1000.0
        assert section.warnings == (
            f"no reference scores, so raw returns and no rank: {TASKS[1]}",
        )
        unscored = [dataclasses.replace(r, score=None, row_id="") for r in rows]
        (entry,) = only_section(fill(tmp_path / "none", unscored)).entries
        assert entry.rank is None and entry.cells[0].mean is not None

    def test_scores_in_some_runs_only_are_refused(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=2)
        rows += [make_row(agent="bc", score=None, run_id="without")]
        with pytest.raises(ResultsError, match=r"has scores in run .* none in run wi"):
            leaderboard.build(fill(tmp_path, rows))


class TestAbsentRuns:
    def test_missing_failed_and_diverged(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=5)
        job = make_job(rows)
        # Task 0: seed 0 never began, seed 1 is half-way, seed 2 failed.
        half = dataclasses.replace(rows[1], step=50, row_id="")
        failed = dataclasses.replace(
            rows[2], step=70, row_id="", status="failed", error="out of memory"
        )
        # Task 1: seed 0 diverged with a good last score, seed 1 with a bad one,
        # seed 2 without any.
        early = dataclasses.replace(rows[5], step=30, row_id="", status="diverged")
        low = dataclasses.replace(rows[6], row_id="", status="diverged", score=-7.0)
        before = dataclasses.replace(low, step=40, row_id="")
        nothing = dataclasses.replace(
            rows[7], row_id="", status="diverged", score=None, returns=[math.nan]
        )
        rows = [half, failed, *rows[3:5], early, before, low, nothing, *rows[8:]]
        section = only_section(fill(tmp_path, rows, [job]))
        (entry,) = section.entries
        first, second = entry.cells
        assert (first.seeds, first.missing, first.failed) == ((3, 4), (0, 1), (2,))
        assert second.diverged == (0, 1, 2)
        assert second.values == (0.0, -7.0, 0.0, 62.0, 64.0)
        assert entry.diverged == 3 and entry.incomplete and entry.few
        assert section.partial and (section.runs, section.planned) == (7, 10)
        names = [f"iql on {task}" for task in TASKS]
        assert set(section.absent) == {
            f"{names[0]}: seed 2 failed (out of memory)",
            f"{names[0]}: seed 0 missing",
            f"{names[0]}: seed 1 missing, at 50 of 100 updates",
            f"{names[1]}: seed 1 diverged by 40 updates, counted as the floor",
            f"{names[1]}: seed 2 diverged by 100 updates, counted as the floor",
            f"{names[1]}: seed 0 diverged by 30 updates, counted as the floor",
        }

    def test_floor_of_raw_returns_is_the_lowest_known(self, tmp_path: Path) -> None:
        def run(agent: str, seed: int, level: float, status: str = "ok") -> Row:
            own = {"score": None, "returns": [level] * 20, "status": status}
            return make_row(agent=agent, seed=seed, **own)

        rows = [run("iql", 0, 5.0), run("iql", 1, math.nan, "diverged")]
        rows += [run("iql", 2, 4.0, "diverged"), run("bc", 0, -3.0)]
        section = only_section(fill(tmp_path, rows))
        assert by_label(section)["iql"].cells[0].values == (5.0, -3.0, -3.0)

    def test_agent_without_a_task_is_listed_but_not_ranked(
        self, tmp_path: Path
    ) -> None:
        rows = make_rows("iql", {TASKS[0]: 90.0}) + make_rows("bc", even(40.0))
        section = only_section(fill(tmp_path, rows))
        assert [(e.label, e.rank) for e in section.entries] == [
            ("bc", 1),
            ("iql", None),
        ]
        assert by_label(section)["iql"].iqm is None
        mean = by_label(section)["iql"].cells[0].mean
        assert mean is not None and mean.value == 90.0

    def test_plan_without_rows_says_what_is_missing(self, tmp_path: Path) -> None:
        job = make_job(make_rows("iql", even(60.0), seeds=3))
        section = only_section(fill(tmp_path, [], [job]))
        assert (section.runs, section.planned) == (0, 6)
        assert section.absent[0] == f"iql on {TASKS[0]}: seeds 0-2 missing"
        assert section.entries[0].rank is None

    def test_job_that_started_anew_supersedes(self, tmp_path: Path) -> None:
        old = make_rows("iql", even(10.0), seeds=2, run_id="z-old")
        new = make_rows("iql", even(60.0), seeds=2, run_id="a-new")
        jobs = [make_job(old), make_job(new)]
        board = leaderboard.build(fill(tmp_path / "both", old + new, jobs))
        (section,) = board.sections
        assert section.entries[0].mean is not None
        assert section.entries[0].mean.value == 60.0 and not section.partial
        assert board.messages == ("4 runs are superseded by later ones of their cell",)
        # The old results count as long as the new job has none.
        board = leaderboard.build(fill(tmp_path / "old", old, jobs))
        mean = board.sections[0].entries[0].mean
        assert mean is not None and mean.value == 10.0

    def test_torn_line_is_told_without_the_folder(self, tmp_path: Path) -> None:
        fill(tmp_path, make_rows("iql", even(60.0), seeds=2))
        (path,) = (tmp_path / "rows").iterdir()
        path.write_bytes(path.read_bytes()[:-9])
        (message,) = leaderboard.build(tmp_path).messages
        assert message.startswith(f"rows/{path.name}: skipped a torn last line")

    def test_folders_without_results(self, tmp_path: Path) -> None:
        with pytest.raises(ResultsError, match="no such folder"):
            leaderboard.build(tmp_path / "absent")
        with pytest.raises(ResultsError, match="no rows and no plan") as caught:
            leaderboard.build(tmp_path)
        assert "\n" not in str(caught.value)
        fill(tmp_path, [make_behaviour(TASKS[0], 3.0)])
        with pytest.raises(ResultsError, match="only tuning or dataset rows"):
            leaderboard.build(tmp_path)
