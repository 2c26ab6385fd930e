"""Settings chosen from tuning runs: by hand, on rows that were made up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from test_benchmark_planning import SPLIT, SUITE, TASKS, wanted
from test_results_rows import make_row

from offrl_jax import results
from offrl_jax.agents.registry import get_entry
from offrl_jax.benchmark import planning, selection
from offrl_jax.benchmark.rules import Rule, Selection, parse_rule
from offrl_jax.benchmark.suites import Suite, load_suite
from offrl_jax.errors import ResultsError, UsageError

A, B = "local/a-v0", "local/b-v0"
CONFIG = dataclasses.asdict(get_entry("td3_bc").config(hidden=(8, 8)))
HYPER = dataclasses.asdict(get_entry("td3_bc").hyper())
ALPHA = {"low": 1.0, "high": 2.0, "odd": 3.0}
# Per task and setting, the scores of seeds 1000 and 1001; None has diverged.
#   low:  A 10, 20 -> 15   B 50, 50 -> 50        mean 32.5
#   high: A 90, None -> the worst of A is 10, so 50   B 0, 0 -> 0   mean 25
#   odd:  A 16, 16 -> 16   B 49, 49 -> 49        mean 32.5, after low by name
SCORES: dict[tuple[str, str], tuple[float | None, float | None]] = {
    (A, "low"): (10.0, 20.0),
    (B, "low"): (50.0, 50.0),
    (A, "high"): (90.0, None),
    (B, "high"): (0.0, 0.0),
    (A, "odd"): (16.0, 16.0),
    (B, "odd"): (49.0, 49.0),
}
PROTOCOL = {"episodes": 4, "version": 1}


def tuning_rows(agent: str = "td3_bc@quick", **changes: Any) -> list[results.Row]:
    return [
        make_row(
            **{
                "run_id": f"{agent}-1".replace("@", "-"),
                "suite": "tuning",
                "role": "tune",
                "agent": agent,
                "setting": setting,
                "config": CONFIG,
                "hyper": HYPER | {"alpha": ALPHA[setting]},
                "task": task,
                "family": "local",
                "recipe_hash": None,
                "dataset_hash": f"bytes of {task}",
                "seed": 1000 + index,
                "score": score,
                "status": "diverged" if score is None else "ok",
                "returns": [] if score is None else [1.0],
                "protocol": PROTOCOL,
                **changes,
            }
        )
        for (task, setting), scores in SCORES.items()
        for index, score in enumerate(scores)
    ]


def write(folder: Path, rows: Iterable[results.Row]) -> Path:
    for row in rows:
        with results.RowFile(results.row_path(folder, row.run_id), print) as file:
            file.append(row)
    return folder


def suite_of(folder: Path, rule: str = "last_score", **changes: Any) -> Suite:
    more = {k: changes.pop(k) for k in ("incomplete", "other_updates") if k in changes}
    chosen = Selection(str(folder), rule, **more)
    changes = {"agents": ("td3_bc",), "updates": 100, "selection": chosen, **changes}
    return dataclasses.replace(SUITE, **changes)


def unheard(line: str) -> None:
    raise AssertionError(line)


def jobs_of(suite: Suite, said=unheard) -> list[results.Job]:
    choices = selection.choose(suite, said)
    suite = dataclasses.replace(suite, choices=choices)
    tasks = [task for task in TASKS if task.task.id in suite.tasks]
    return planning.wanted_jobs(suite, tasks, SPLIT, "s")


def alphas(jobs: list[results.Job]) -> dict[str, set[float]]:
    found: dict[str, set[float]] = {}
    for job in jobs:
        for member in job.members:
            found.setdefault(member.task, set()).add(member.hyper["alpha"])
    return found


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("last_score", Rule(None, True, False)),
        ("last_score_per_task", Rule(None, True, True)),
        ("metric:critic_loss:min", Rule("critic_loss", False, False)),
        ("metric:q_mean:max_per_task", Rule("q_mean", True, True)),
    ],
)
def test_rules(text, rule):
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    "text", ["best_score", "metric:loss", "metric:loss:least", "metric::min", ""]
)
def test_unknown_rules_are_told(text):
    with pytest.raises(UsageError, match="write 'last_score' or 'metric:NAME:min'"):
        Selection("tuning", text)


def test_the_best_mean_over_tasks_serves_all_tasks(tmp_path):
    (job,) = jobs_of(suite_of(write(tmp_path, tuning_rows())))
    assert alphas([job]) == {A: {1.0}, B: {1.0}}
    assert {m.setting for m in job.members} == {"low"}
    assert {m.seed for m in job.members} == {0, 1, 2} and job.role == "test"
    # Every setting is that of the tuning row, those that the preset gives included.
    assert job.config == CONFIG | {"hidden": [8, 8]}
    assert dict(job.members[0].hyper) == HYPER | {"alpha": 1.0}
    assert job.protocol["selection"] == {
        "from": "tuning",
        "rule": "last_score",
        "settings": 3,
        "seeds": 2,
    }


def test_what_was_chosen_is_told(tmp_path):
    said: list[str] = []
    suite = selection.chosen(suite_of(write(tmp_path, tuning_rows())), said.append)
    assert said == [
        "td3_bc@quick: low, of 3 settings x 2 seeds, by last_score of tuning"
    ]
    assert suite.choices["td3_bc@quick"].setting == "low"
    with pytest.raises(ValueError, match="nothing was chosen yet"):
        planning.wanted_jobs(suite_of(tmp_path), TASKS, SPLIT, "s")


def test_merits_are_those_of_a_pencil():
    finals = selection.finished(tuning_rows(), None)
    ranked = selection.candidates(
        finals, parse_rule("last_score"), arm_of=lambda run: run.agent
    )["td3_bc@quick"]
    assert [(one.setting, one.merit) for one in ranked] == [
        ("low", 32.5),
        ("odd", 32.5),
        ("high", 25.0),
    ]
    assert ranked[2].by_task == {A: 50.0, B: 0.0}


def test_a_setting_per_task(tmp_path):
    folder = write(tmp_path, tuning_rows())
    (job,) = jobs_of(suite_of(folder, "last_score_per_task"))
    assert alphas([job]) == {A: {2.0}, B: {1.0}}
    assert {m.setting for m in job.members} == {"chosen per task"}
    assert job.protocol["selection"]["rule"] == "last_score_per_task"


# Last critic losses; ranks by hand, the smallest first:
#   A: low 4, high 2 (the diverged one counts as 4: 3), odd 1   -> low 3, high 2, odd 1
#   B: low 10, high 20, odd 30                                   -> low 1, high 2, odd 3
# All ranks average to 2; with B's odd at 10, low and odd share 1.5 there: odd wins.
LOSSES = {
    (A, "low"): 4.0,
    (B, "low"): 10.0,
    (A, "high"): 2.0,
    (B, "high"): 20.0,
    (A, "odd"): 1.0,
    (B, "odd"): 30.0,
}


def write_points(folder: Path, rows: Iterable[results.Row], losses) -> None:
    for row in rows:
        path = results.metric_path(folder, row.run_id)
        # A point in the middle, where all is the other way round.
        for step, sign in ((50, -1.0), (row.updates_total, 1.0)):
            value = sign * losses[row.task, row.setting]
            lost = row.status == "diverged"
            point = results.MetricPoint(
                run_id=row.run_id,
                agent=row.agent,
                task=row.task,
                setting=row.setting,
                seed=row.seed or 0,
                phase="train",
                step=step,
                values={"critic_loss": math.nan if lost else value},
            )
            with results.MetricFile(path, print) as file:
                file.append([point])


@pytest.mark.parametrize(
    ("rule", "change", "want"),
    [
        ("metric:critic_loss:min", {}, {A: {2.0}, B: {2.0}}),  # ties: high by name
        ("metric:critic_loss:min", {(B, "odd"): 10.0}, {A: {3.0}, B: {3.0}}),
        ("metric:critic_loss:max", {(B, "odd"): 31.0, (A, "low"): 0.5}, None),
        ("metric:critic_loss:min_per_task", {}, {A: {3.0}, B: {1.0}}),
        ("metric:critic_loss:max_per_task", {}, {A: {1.0}, B: {3.0}}),
    ],
)
def test_a_metric_chooses_by_mean_ranks(tmp_path, rule, change, want):
    rows = tuning_rows()
    write_points(write(tmp_path, rows), rows, LOSSES | change)
    if want is None:
        # A: low 0.5, high (2 + 0.5) / 2 = 1.25, odd 1 -> high 1, odd 2, low 3;
        # B: odd 1, high 2, low 3: high and odd share 1.5, high is first by name.
        want = {A: {2.0}, B: {2.0}}
    assert alphas(jobs_of(suite_of(tmp_path, rule))) == want


def test_ranks_of_a_pencil(tmp_path):
    rows = tuning_rows()
    write_points(tmp_path, rows, LOSSES | {(B, "odd"): 10.0})
    ranked = selection.candidates(
        selection.finished(rows, None),
        parse_rule("metric:critic_loss:min"),
        arm_of=lambda run: run.agent,
        points=results.read_metrics(tmp_path),
    )["td3_bc@quick"]
    # On B, low and odd share the ranks 1 and 2, and high has rank 3.
    assert {one.setting: one.merit for one in ranked} == {
        "odd": -(1 + 1.5) / 2,
        "low": -(3 + 1.5) / 2,
        "high": -(2 + 3) / 2,
    }
    assert {one.setting: one.by_task[A] for one in ranked}["high"] == (2.0 + 4.0) / 2


def test_a_metric_of_the_middle_is_not_taken(tmp_path):
    rows = tuning_rows()
    write_points(write(tmp_path, rows), rows, LOSSES)
    path = results.metric_path(tmp_path, rows[0].run_id)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UsageError, match="no training metrics of its last update"):
        jobs_of(suite_of(tmp_path, "metric:critic_loss:min"))


def test_a_metric_needs_no_scores_and_must_be_there(tmp_path):
    rows = tuning_rows(score=None, status="ok", returns=[1.0])
    folder = write(tmp_path, rows)
    with pytest.raises(UsageError, match="local/a-v0 has no reference scores"):
        jobs_of(suite_of(folder))
    with pytest.raises(UsageError, match="no training metrics of its last update"):
        jobs_of(suite_of(folder, "metric:critic_loss:min"))
    write_points(folder, rows, LOSSES)
    assert jobs_of(suite_of(folder, "metric:critic_loss:min"))
    with pytest.raises(UsageError, match=r"unknown training metric .* 'critic_loss'"):
        jobs_of(suite_of(folder, "metric:critic_los:min"))


def test_unfinished_tuning_is_refused_unless_said(tmp_path):
    folder = write(tmp_path, tuning_rows()[1:])  # low lacks a run
    with pytest.raises(UsageError, match="td3_bc@quick low: 3 of 4 runs are there"):
        jobs_of(suite_of(folder))
    said: list[str] = []
    (job,) = jobs_of(suite_of(folder, incomplete=True), said.append)
    assert {m.setting for m in job.members} == {"odd"}
    assert job.protocol["selection"]["settings"] == 2
    assert said == ["td3_bc@quick: 1 settings are not tuned to the end and left out"]


def test_what_is_planned_and_never_ran_is_unfinished(tmp_path):
    rows = tuning_rows()
    members = [
        results.Member(row.task, "local", row.setting, row.seed or 0, row.hyper)
        for row in rows
    ]
    members += [results.Member(A, "local", "new", 1000, HYPER)]
    job = results.Job(
        run_id=rows[0].run_id,
        suite="tuning",
        role="tune",
        agent="td3_bc@quick",
        config=CONFIG,
        members=tuple(members),
        updates_total=100,
        phase_updates={"train": 100},
        eval_steps=(100,),
        protocol=PROTOCOL,
        split={},
        source_hash="s",
        datasets={},
    )
    folder = write(tmp_path, rows)
    results.write_plan(folder, results.Plan(results.SCHEMA, (job,)))
    with pytest.raises(UsageError, match="td3_bc@quick new: 0 of 4 runs are there"):
        jobs_of(suite_of(folder))
    said: list[str] = []
    assert jobs_of(suite_of(folder, incomplete=True), said.append) and len(said) == 1


def test_a_run_that_started_anew_counts_once(tmp_path):
    """The later one of the plan, and never a failed one."""
    first, again = tuning_rows(), tuning_rows(run_id="anew", score=1.0, status="ok")
    failed = [dataclasses.replace(row, run_id="z", status="failed") for row in again]
    jobs = [
        results.Job(
            run_id=run_id,
            suite="tuning",
            role="tune",
            agent="td3_bc@quick",
            config={},
            members=(),
            updates_total=1,
            phase_updates={},
            eval_steps=(1,),
            protocol={},
            split={},
            source_hash="",
            datasets={},
        )
        for run_id in ("anew", first[0].run_id, "z")
    ]
    plan = results.Plan(results.SCHEMA, tuple(jobs))
    rows = [*again, *first, *failed]
    for order in (rows, rows[::-1]):
        found = selection.finished(order, plan).values()
        assert {row.row_id for row in found} == {row.row_id for row in first}


@pytest.mark.parametrize(
    ("rows", "suite", "message"),
    [
        ({"updates_total": 50, "step": 50}, {}, "have 50 updates, the test has 100"),
        ({"protocol": {"version": 2}}, {}, "protocol version 2, the test's of 1"),
        ({"seed": 2}, {}, "seed 2 served for tuning and would serve for testing"),
        ({"agent": "iql@quick"}, {}, "no finished tuning runs of td3_bc@quick"),
        ({"role": "test"}, {}, "no finished tuning runs of td3_bc@quick"),
    ],
)
def test_what_does_not_fit_the_test_is_refused(tmp_path, rows, suite, message):
    folder = write(tmp_path, tuning_rows(**rows)[:1])
    with pytest.raises(UsageError, match=message) as caught:
        jobs_of(suite_of(folder, **suite))
    assert "\n" not in str(caught.value)


def test_other_updates_may_be_said(tmp_path):
    folder = write(tmp_path, tuning_rows(updates_total=50, step=50))
    said: list[str] = []
    (job,) = jobs_of(suite_of(folder, other_updates=True), said.append)
    assert job.updates_total == 100
    assert said == ["td3_bc@quick: tuning runs have 50 updates, the test has 100"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase_updates": {"train": 90}}, "different numbers of updates"),
        ({"protocol": {"episodes": 9}}, "different evaluation protocols"),
        ({"suite": "second"}, "tuning runs of several suites .second, tuning."),
    ],
)
def test_tuning_runs_that_do_not_compare_are_refused(tmp_path, change, message):
    rows = tuning_rows()
    rows[3] = dataclasses.replace(rows[3], row_id="", **change)
    with pytest.raises(UsageError, match=message):
        jobs_of(suite_of(write(tmp_path, rows)))


def test_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suite = dataclasses.replace(SUITE, selection=Selection("tuning", "last_score"))
    with pytest.raises(ResultsError, match="results/tuning: no such folder"):
        selection.choose(suite, unheard)
    write(tmp_path / "results" / "tuning", tuning_rows())
    suite = dataclasses.replace(suite, agents=("td3_bc",))
    assert selection.choose(suite, unheard)["td3_bc@quick"].setting == "low"


def test_a_task_that_nothing_was_tuned_on(tmp_path):
    rows = [row for row in tuning_rows() if row.task == A]
    folder = write(tmp_path / "one", rows)
    # On A alone: low 15, high 50, odd 16.
    assert alphas(jobs_of(suite_of(folder))) == {A: {2.0}, B: {2.0}}
    with pytest.raises(UsageError, match="and local/b-v0 has no tuning runs"):
        jobs_of(suite_of(folder, "last_score_per_task"))
    elsewhere = "local/c-v0"
    rows += [
        dataclasses.replace(
            row, row_id="", task=elsewhere, hyper=HYPER | {"alpha": row.seed}
        )
        for row in rows
    ]
    with pytest.raises(UsageError, match="different values on local/a-v0 and other"):
        jobs_of(suite_of(write(tmp_path / "two", rows)))


def test_settings_of_the_suite_are_not_chosen(tmp_path):
    folder = write(tmp_path, tuning_rows())
    suite = suite_of(
        folder, agents=("td3_bc", "bc"), settings={"bc": {"mine": {"hidden": [8]}}}
    )
    td3, bc = jobs_of(suite)
    assert {m.setting for m in bc.members} == {"mine"} and bc.config["hidden"] == [8]
    assert bc.protocol["selection"]["settings"] == 0
    assert td3.protocol["selection"]["settings"] == 3


def test_other_data_are_told(tmp_path):
    folder = write(tmp_path, tuning_rows(dataset_hash="others"))
    choices = selection.choose(suite_of(folder), unheard)
    assert selection.other_data(choices, TASKS) == [
        f"{task}: settings were tuned on other data of this task" for task in (A, B)
    ]
    right = selection.choose(suite_of(write(tmp_path / "r", tuning_rows())), unheard)
    assert selection.other_data(right, TASKS) == []


def test_a_suite_without_selection_has_the_protocol_that_it_had():
    for job in wanted():
        assert job.protocol == dataclasses.asdict(SUITE.protocol)
        assert "selection" not in job.protocol


FILE = """
agents = ["td3_bc"]
tasks = ["local/a-v0"]
seeds = 3
updates = 100
[selection]
from = "tuning"
rule = "last_score"
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('from = "tuning"', ""), "selection entry 'from' is missing"),
        (('rule = "last_score"', ""), "selection entry 'rule' is missing"),
        (('"last_score"', '"last_scor"'), "unknown rule 'last_scor'"),
        (("rule =", "rules ="), "did you mean 'rule'"),
        (('"last_score"', '"last_score"\nincomplete = 1'), "must be of type bool"),
        (("seeds", 'role = "tune"\nfirst_seed = 1000\nseeds'), "only a test has one"),
    ],
)
def test_bad_selections_are_told_in_one_line(tmp_path, change, message):
    path = tmp_path / "mine.toml"
    path.write_text(FILE)
    found = load_suite(str(path)).selection
    assert found == Selection("tuning", "last_score")
    assert str(found.folder()) == "results/tuning"
    path.write_text(FILE.replace(*change))
    with pytest.raises(UsageError, match=message) as caught:
        load_suite(str(path))
    assert "\n" not in str(caught.value)
