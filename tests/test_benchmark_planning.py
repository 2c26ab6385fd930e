"""Suites as files, and plans: what is missing, what is kept, what starts anew."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import numpy as np
import pytest
from datasets_builders import random_episodes

from offrl_jax.benchmark import planning, suites
from offrl_jax.benchmark.planning import Split, evaluation_steps, plan_missing
from offrl_jax.benchmark.suites import Protocol, Suite, load_suite
from offrl_jax.catalogue import LoadedTask, Task
from offrl_jax.errors import UsageError
from offrl_jax.results import Job, Member, Plan, Row
from offrl_jax.types import Spec

SPLIT = Split(devices=2, platform="cpu")
SUITE = Suite(
    name="small",
    description="",
    tasks=("local/a-v0", "local/b-v0"),
    agents=("bc", "td3_bc"),
    preset="quick",
    seeds=3,
    updates=100,
    protocol=Protocol(episodes=4, evaluations=2, curve_episodes=2),
)


def loaded(name: str, obs_dim: int = 3, family: str = "local") -> LoadedTask:
    spec = Spec(obs_dim, 2, 10)
    task = Task(name, family, "classic/pendulum-v0", spec, None, "", "")
    return LoadedTask(task, spec, random_episodes(), None, f"bytes of {name}", None)


TASKS = [loaded("local/a-v0"), loaded("local/b-v0")]


def wanted(suite: Suite = SUITE, tasks=TASKS, source: str = "s1", split=SPLIT):
    return planning.wanted_jobs(suite, tasks, split, source)


def row_of(job: Job, member: Member, step: int | None = None, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "run_id": job.run_id,
        "suite": job.suite,
        "role": "test",
        "agent": job.agent,
        "config": job.config,
        "setting": member.setting,
        "hyper": dict(member.hyper),
        "task": member.task,
        "family": member.family,
        "recipe_hash": None,
        "dataset_hash": job.datasets[member.task]["dataset_hash"],
        "seed": member.seed,
        "step": job.updates_total if step is None else step,
        "updates_total": job.updates_total,
        "phase_updates": dict(job.phase_updates),
        "protocol": dict(job.protocol),
        "returns": [1.0],
        "lengths": [1],
        "successes": None,
        "score": None,
        "status": "ok",
        "split_changed": False,
        "updates_per_s": 1.0,
        "wall_s": 1.0,
        "compile_s": 1.0,
        "eval_s": 1.0,
        "device": "cpu",
        "flags": {},
        "versions": {},
        "commit": None,
        "population": {},
    }
    return Row(**{**values, **changes})


def finish(job: Job) -> list[Row]:
    return [row_of(job, member) for member in job.members]


def unheard(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.parametrize(
    ("updates", "evaluations", "stride", "steps"),
    [
        (100, 4, 1, (25, 50, 75, 100)),
        (100, 1, 1, (100,)),
        (100, 3, 2, (34, 66, 100)),
        (4, 10, 2, (2, 4)),
        (1, 10, 1, (1,)),
    ],
)
def test_evaluation_steps(updates, evaluations, stride, steps):
    assert evaluation_steps(updates, evaluations, stride) == steps


def test_one_population_per_agent_and_shape():
    jobs = wanted()
    assert [job.agent for job in jobs] == ["bc@quick", "td3_bc@quick"]
    assert [(m.task, m.seed) for m in jobs[0].members] == [
        (task, seed) for task in SUITE.tasks for seed in range(3)
    ]
    other = [TASKS[0], loaded("local/b-v0", obs_dim=4)]
    jobs = wanted(tasks=other)
    assert [len(job.members) for job in jobs] == [3, 3, 3, 3]
    assert {job.members[0].task for job in jobs[:2]} == {"local/a-v0", "local/b-v0"}


def test_jobs_carry_what_was_resolved():
    td3 = wanted()[1]
    assert td3.config["hidden"] == [64, 64]
    assert td3.members[0].hyper["critic_lr"] == 1e-3
    assert td3.updates_total == 100 and td3.phase_updates == {"train": 100}
    assert planning.config_from_plain(_config_of("td3_bc"), td3.config).hidden == (
        64,
        64,
    )


def _config_of(name: str) -> type:
    from offrl_jax.agents.registry import get_entry

    return get_entry(name).config


def test_settings_are_members_and_structure_splits_jobs():
    settings = {
        "td3_bc": {"a=1": {"alpha": 1.0}, "a=2": {"alpha": 2.0}},
        "bc": {"thin": {"hidden": [8]}, "wide": {"hidden": [16]}},
    }
    jobs = wanted(dataclasses.replace(SUITE, settings=settings))
    assert [(job.agent, len(job.members)) for job in jobs] == [
        ("bc@quick", 6),
        ("bc@quick", 6),
        ("td3_bc@quick", 12),
    ]
    alphas = {m.setting: m.hyper["alpha"] for m in jobs[2].members}
    assert alphas == {"a=1": 1.0, "a=2": 2.0}
    wrong = dataclasses.replace(SUITE, settings={"td3_bc": {"x": {"alfa": 1.0}}})
    with pytest.raises(UsageError, match="did you mean 'alpha'"):
        wanted(wrong)


def test_a_job_that_pretrains_gets_a_tenth_unless_set():
    def updates(total: int, stride: int, given: int = 0) -> int:
        suite = dataclasses.replace(SUITE, updates=total, pretraining_updates=given)
        return planning._pretraining_updates(suite, stride)

    assert updates(1000, 1) == 100
    assert updates(1000, 3) == 99
    assert updates(3, 1) == 1
    assert updates(1000, 1, given=7) == 7


def test_run_ids_name_their_content():
    ids = [job.run_id for job in wanted()]
    assert ids == [job.run_id for job in wanted()]
    assert len(set(ids)) == 2
    changed = [
        wanted(dataclasses.replace(SUITE, updates=200)),
        wanted(dataclasses.replace(SUITE, protocol=Protocol(episodes=5))),
        wanted(source="s2"),
        wanted(split=Split(1, "cpu")),
    ]
    for jobs in changed:
        assert not set(ids) & {job.run_id for job in jobs}


def test_everything_is_missing_at_first():
    plan, jobs = plan_missing(wanted(), None, [], unheard)
    assert plan.jobs == tuple(jobs)
    assert sum(len(job.members) for job in jobs) == 12


def test_nothing_is_missing_at_last():
    plan, jobs = plan_missing(wanted(), None, [], unheard)
    rows = [row for job in jobs for row in finish(job)]
    again, missing = plan_missing(wanted(), plan, rows, unheard)
    assert missing == [] and again == plan
    # Finished runs stay valid when the code changes.
    again, missing = plan_missing(wanted(source="s2"), plan, rows, unheard)
    assert missing == [] and again == plan


def test_a_begun_job_is_continued_as_it_was_planned():
    plan, jobs = plan_missing(wanted(), None, [], unheard)
    rows = [*finish(jobs[0]), row_of(jobs[1], jobs[1].members[0], step=50)]
    # Even from a machine with another number of devices.
    elsewhere = wanted(split=Split(8, "cuda"))
    again, missing = plan_missing(elsewhere, plan, rows, unheard)
    assert missing == [jobs[1]]
    assert again.jobs == (jobs[0], jobs[1])


def test_changed_sources_start_the_unfinished_anew():
    plan, jobs = plan_missing(wanted(), None, [], unheard)
    half = [row_of(jobs[0], m) for m in jobs[0].members[:2]]
    said: list[str] = []
    again, missing = plan_missing(wanted(source="s2"), plan, half, said.append)
    assert [len(job.members) for job in missing] == [4, 6]
    assert all(job.source_hash == "s2" for job in missing)
    assert not {job.run_id for job in missing} & {job.run_id for job in jobs}
    assert len(said) == 2 and all("sources changed" in line for line in said)
    # The finished half stays in the plan, under the run that made it.
    kept = [job for job in again.jobs if job.run_id == jobs[0].run_id]
    assert [job.members for job in kept] == [jobs[0].members[:2]]


def test_more_seeds_run_only_the_new_ones():
    plan, jobs = plan_missing(wanted(), None, [], unheard)
    rows = [row for job in jobs for row in finish(job)]
    more = wanted(dataclasses.replace(SUITE, seeds=5))
    again, missing = plan_missing(more, plan, rows, unheard)
    assert [{m.seed for m in job.members} for job in missing] == [{3, 4}, {3, 4}]
    assert len(again.jobs) == 4
    # Fewer seeds than there are: nothing to run, and nothing is forgotten.
    fewer = wanted(dataclasses.replace(SUITE, seeds=2))
    again, missing = plan_missing(fewer, plan, rows, unheard)
    assert missing == [] and again == plan


def test_rows_without_a_plan_are_adopted():
    jobs = wanted()
    rows = [row for job in jobs for row in finish(job)]
    plan, missing = plan_missing(jobs, None, rows, unheard)
    assert missing == []
    assert [job.run_id for job in plan.jobs] == [job.run_id for job in jobs]
    # Who knows which sources made them?
    assert {job.source_hash for job in plan.jobs} == {""}


def test_failed_rows_are_run_again_and_diverged_ones_are_not():
    plan, jobs = plan_missing(wanted(), None, [], unheard)
    rows = [row for job in jobs for row in finish(job)]
    rows[0] = row_of(jobs[0], jobs[0].members[0], status="failed", error="boom")
    _, missing = plan_missing(wanted(), plan, rows, unheard)
    assert missing == [jobs[0]]
    rows[0] = row_of(jobs[0], jobs[0].members[0], status="diverged", returns=[])
    assert plan_missing(wanted(), plan, rows, unheard)[1] == []


def test_other_suites_in_the_same_folder_stay_planned():
    plan, first = plan_missing(wanted(), None, [], unheard)
    other = dataclasses.replace(SUITE, name="other", updates=300)
    both, jobs = plan_missing(wanted(other), plan, [], unheard)
    ids = [job.run_id for job in (*first, *jobs)]
    assert sorted(job.run_id for job in both.jobs) == sorted(ids)
    assert len(set(ids)) == 4


def test_a_smaller_limit_cuts_a_job_that_was_begun():
    """What a user does whose device had too little memory."""
    plan, begun = plan_missing(wanted(), None, [], unheard)
    said: list[str] = []
    smaller = wanted(split=Split(2, "cpu", max_parallel=2))
    again, jobs = plan_missing(smaller, plan, [], said.append)
    assert [len(job.members) for job in jobs] == [2] * 6
    assert len(said) == 2 and all("--max-parallel" in line for line in said)
    assert not {job.run_id for job in again.jobs} & {job.run_id for job in begun}


def test_the_rest_of_a_begun_job_is_not_forgotten():
    plan, begun = plan_missing(wanted(), None, [], unheard)
    fewer = dataclasses.replace(SUITE, tasks=SUITE.tasks[:1], agents=("bc",))
    jobs = wanted(fewer, tasks=TASKS[:1], source="s2")
    again, to_run = plan_missing(jobs, plan, [], lambda line: None)
    assert [len(job.members) for job in to_run] == [3]
    planned = {(job.agent, m.task, m.seed) for job in again.jobs for m in job.members}
    assert planned == {
        (job.agent, m.task, m.seed) for job in begun for m in job.members
    }
    # A population that lost members is another one: its checkpoints are not its own.
    of_bc = next(job for job in begun if job.agent.startswith("bc"))
    assert of_bc.run_id not in {job.run_id for job in again.jobs}
    untouched = next(job for job in begun if job != of_bc)
    assert untouched in again.jobs


def test_another_suite_takes_the_place_of_what_older_sources_began():
    """The same runs under another suite's name: nothing is planned twice."""
    plan, begun = plan_missing(wanted(), None, [], unheard)
    other = wanted(dataclasses.replace(SUITE, name="other"), source="s2")
    again, to_run = plan_missing(other, plan, [], lambda line: None)
    assert again.jobs == tuple(to_run)
    assert not {job.run_id for job in to_run} & {job.run_id for job in begun}


def test_finished_members_that_are_asked_for_later_join_those_of_their_run():
    begun = plan_missing(wanted(), None, [], unheard)[1]
    fewer = dataclasses.replace(SUITE, tasks=SUITE.tasks[:1], agents=("bc",))
    done = [row_of(begun[0], m) for m in begun[0].members if m.seed == 0]
    only_a = wanted(fewer, tasks=TASKS[:1], source="s2")
    some, _ = plan_missing(only_a, None, done, unheard)
    again, _ = plan_missing(wanted(source="s2"), some, done, lambda line: None)
    ids = [job.run_id for job in again.jobs]
    assert len(set(ids)) == len(ids)
    kept = next(job for job in again.jobs if job.run_id == begun[0].run_id)
    assert [m.task for m in kept.members] == ["local/a-v0", "local/b-v0"]
    assert plan_missing(wanted(source="s2"), again, done, unheard)[0] == again


def test_finished_members_of_a_job_that_is_taken_apart_stay_planned():
    plan, begun = plan_missing(wanted(), None, [], unheard)
    done = [row_of(begun[0], m) for m in begun[0].members if m.seed == 0]
    fewer = dataclasses.replace(SUITE, tasks=SUITE.tasks[:1], agents=("bc",))
    jobs = wanted(fewer, tasks=TASKS[:1], source="s2")
    again, to_run = plan_missing(jobs, plan, done, lambda line: None)
    assert [len(job.members) for job in to_run] == [2]
    ids = [job.run_id for job in again.jobs]
    assert len(set(ids)) == len(ids)
    kept = next(job for job in again.jobs if job.run_id == begun[0].run_id)
    assert [(m.task, m.seed) for m in kept.members] == [
        ("local/a-v0", 0),
        ("local/b-v0", 0),
    ]
    assert kept.source_hash == "s1"
    # The same once more changes nothing.
    once_more = plan_missing(jobs, again, done, unheard)
    assert set(ids) == {job.run_id for job in once_more[0].jobs}


@pytest.mark.parametrize("what", ["settings", "data"])
def test_other_settings_or_data_under_the_same_name_start_anew_and_say_so(what):
    plan, begun = plan_missing(wanted(), None, [], unheard)
    said: list[str] = []
    if what == "data":
        tasks = [dataclasses.replace(task, dataset_hash="new") for task in TASKS]
        jobs = wanted(tasks=tasks)
    else:
        wider = {"default": {"hidden": [9]}}
        changed = {"bc": wider, "td3_bc": wider}
        jobs = wanted(dataclasses.replace(SUITE, settings=changed))
    again, to_run = plan_missing(jobs, plan, [], said.append)
    assert len(said) == 2 and all("other settings or data" in line for line in said)
    assert not {job.run_id for job in again.jobs} & {job.run_id for job in begun}
    assert again.jobs == tuple(to_run)


def test_equal_settings_of_other_names_are_other_runs():
    named = dataclasses.replace(SUITE, agents=("bc",), settings={"bc": {"first": {}}})
    plan, jobs = plan_missing(wanted(named), None, [], unheard)
    rows = [row for job in jobs for row in finish(job)]
    other = dataclasses.replace(named, settings={"bc": {"second": {}}})
    assert len(plan_missing(wanted(other), plan, rows, unheard)[1]) == 1


def test_changed_settings_name_themselves():
    jobs = planning.wanted_jobs(
        dataclasses.replace(SUITE, agents=("td3_bc",)),
        TASKS,
        SPLIT,
        "s",
        {"discount": "0.9", "alpha": "1"},
    )
    assert {m.setting for m in jobs[0].members} == {"alpha=1,discount=0.9"}


def test_updates_that_an_agent_cannot_make_are_refused():
    with pytest.raises(UsageError, match=r"td3_bc@quick advances 2.*choose 102"):
        wanted(dataclasses.replace(SUITE, updates=101))


@pytest.mark.parametrize(
    ("members", "devices", "fewest"),
    [(10, 8, 5), (3, 8, 3), (16, 8, 8), (1, 4, 1), (5, 2, 2), (9, 8, 5)],
)
def test_no_device_is_used_for_padding_alone(members, devices, fewest):
    assert planning.fewest_devices(members, devices) == fewest


def test_requests_are_checked_down_to_the_transforms():
    wrong = dataclasses.replace(
        SUITE, settings={"bc": {"x": {"reward_transform": "minus_on"}}}
    )
    with pytest.raises(UsageError, match="did you mean 'minus_one'"):
        planning.check_request(wrong, ["local"], {}, None)
    with pytest.raises(UsageError, match="seed must be at least 0"):
        Protocol(seed=-1)


def test_max_parallel_cuts_populations():
    split = Split(2, "cpu", max_parallel=4)
    _, jobs = plan_missing(wanted(split=split), None, [], unheard)
    assert [len(job.members) for job in jobs] == [4, 4, 2, 2]
    assert {m.seed for m in jobs[0].members} == {0, 1}
    assert {m.seed for m in jobs[2].members} == {2}
    assert len({job.run_id for job in jobs}) == 4
    with pytest.raises(UsageError, match="at least 1, got 0"):
        planning.check_request(SUITE, ["local"], {}, 0)


def test_plans_survive_the_disk(tmp_path):
    from offrl_jax.results import read_plan, write_plan

    plan, _ = plan_missing(wanted(), None, [], unheard)
    write_plan(tmp_path, plan)
    again, missing = plan_missing(wanted(), read_plan(tmp_path), [], unheard)
    assert [job.run_id for job in missing] == [job.run_id for job in plan.jobs]
    assert isinstance(again, Plan)


@pytest.mark.parametrize("name", sorted(suites.known_suites()))
def test_shipped_suites_load_and_name_known_agents(name):
    suite = load_suite(name)
    assert suite.name == name and suite.description
    assert planning.agent_labels(suite)
    assert len(set(suite.tasks)) == len(suite.tasks)


def test_star_is_every_agent_that_learns_from_data():
    from offrl_jax.agents.registry import REGISTRY

    everything = dataclasses.replace(SUITE, agents=("*",), preset="")
    offline = sorted(name for name, entry in REGISTRY.items() if not entry.on_policy)
    assert planning.agent_labels(everything) == offline
    named = dataclasses.replace(SUITE, agents=("bc", "bc", "iql@quick"), preset="")
    assert planning.agent_labels(named) == ["bc", "iql@quick"]


GOOD = """
description = "d"
agents = ["bc"]
tasks = ["classic/pendulum-mixed-v0"]
seeds = 2
updates = 10
"""


def parse(tmp_path, text: str) -> Suite:
    path = tmp_path / "mine.toml"
    path.write_text(textwrap.dedent(text))
    return load_suite(str(path))


def test_suite_files(tmp_path):
    suite = parse(tmp_path, GOOD + "[protocol]\nepisodes = 7\n")
    assert (suite.name, suite.seeds, suite.protocol.episodes) == ("mine", 2, 7)
    assert suite.protocol.evaluations == Protocol().evaluations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("seeds = 2", "seeds = 0"), "seeds must be at least 1, got 0"),
        (
            GOOD.replace("seeds = 2", 'seeds = "2"'),
            "'seeds' must be of type int",
        ),
        (
            GOOD.replace("seeds = 2", "seeds = true"),
            "type int, got True",
        ),
        (GOOD.replace("seeds", "sedes"), "did you mean 'seeds'"),
        (GOOD.replace("updates = 10", ""), "'updates' is missing"),
        (GOOD.replace('["bc"]', "[]"), "has no agents"),
        (GOOD + "[protocol]\nepisode = 7\n", "did you mean 'episodes'"),
        (GOOD + "[protocol]\nepisodes = 1.5\n", "must be of type int, got 1.5"),
        (GOOD + "[protocol]\nepisodes = 0\n", "episodes must be at least 1"),
        ("seeds = = 2", "not valid TOML"),
    ],
)
def test_bad_suite_files_say_what_is_wrong(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as error:
        parse(tmp_path, text)
    assert "\n" not in str(error.value)


def test_unknown_suites():
    with pytest.raises(UsageError, match="did you mean 'quick'"):
        load_suite("quik")
    with pytest.raises(UsageError, match="No such file"):
        load_suite("nowhere/mine.toml")


def test_seeds_of_rows_are_integers_of_any_kind():
    """NumPy integers would not be written as JSON."""
    assert all(type(m.seed) is int for job in wanted() for m in job.members)
    assert np.all([type(v) is float for v in wanted()[0].members[0].hyper.values()])
