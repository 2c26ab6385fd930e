"""Checkpoints and the run loop: an interrupted run has the rows and points of a whole
one."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import write_store

from offrl_jax.benchmark import checkpoints as checkpoints_module
from offrl_jax.benchmark import executors as executors_module
from offrl_jax.benchmark import jobs as jobs_module
from offrl_jax.benchmark import recording as recording_module
from offrl_jax.benchmark.checkpoints import Checkpoints
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.runner import run_suite
from offrl_jax.benchmark.suites import Protocol, Suite
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, OffrlError, ResultsError
from offrl_jax.population import make_mesh, spread_members
from offrl_jax.results import BEHAVIOUR, read_metrics, read_plan, read_rows

SUITE = Suite(
    name="tiny",
    description="",
    tasks=("local/tiny-a-v0", "local/tiny-b-v0"),
    agents=("td3_bc",),
    preset="quick",
    seeds=2,
    updates=120,
    protocol=Protocol(episodes=3, evaluations=3, curve_episodes=2),
    settings={"td3_bc": {"default": {"hidden": [8, 8], "batch_size": 16}}},
)


@pytest.fixture(scope="module", autouse=True)
def few_points():
    """Intervals of 60 calls / 7: longer than a chunk, and off the evaluation steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording_module, "POINTS", 7)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return write_store(tmp_path_factory.mktemp("data"), SUITE.tasks)


def run(store: Store, folder: Path, suite: Suite = SUITE, **options):
    with Progress(io.StringIO()) as progress:
        return run_suite(suite, store, folder, progress, **options)


def contents(folder: Path) -> dict[tuple, str]:
    """Row identities by what they are about; the run id is part of the content."""
    rows = read_rows(folder, lambda line: None)
    return {(r.agent, r.task, r.setting, r.seed, r.step): r.row_id for r in rows}


def points(folder: Path) -> dict[tuple, dict[str, float]]:
    """Recorded metrics by what they are about; no run id, as for `contents`."""
    found = read_metrics(folder)
    by_key = {p.key[1:]: dict(p.values) for p in found}
    assert len(by_key) == len(found)
    return by_key


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "whole"
    outcome = run(store, folder)
    assert (outcome.ran, outcome.already, outcome.stopped) == (1, 0, False)
    return folder


def test_rows_are_complete_and_say_everything(undisturbed, store):
    rows = read_rows(undisturbed, lambda line: pytest.fail(line))
    trained = [row for row in rows if row.agent != BEHAVIOUR]
    assert len(trained) == 2 * 2 * 3
    assert {row.step for row in trained} == {40, 80, 120}
    for row in trained:
        last = row.step == row.updates_total
        assert len(row.returns) == len(row.lengths) == (3 if last else 2)
        assert row.lengths == [200] * len(row.lengths)
        assert row.status == "ok" and row.split_changed is False
        assert row.config["hidden"] == [8, 8] and row.hyper["alpha"] == 2.5
        assert row.score is None  # own data has no reference scores
        assert row.dataset_hash == store.record(row.task).dataset_hash
        assert row.population == {"members": 4, "devices": 2, "platform": "cpu"}
        assert row.wall_s and row.updates_per_s and row.versions["jax"]
    behaviour = [row for row in rows if row.agent == BEHAVIOUR]
    assert {row.task for row in behaviour} == set(SUITE.tasks)
    episodes = store.load(behaviour[0].task)
    want = episodes.reward.reshape(3, 200).astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(behaviour[0].returns, want, rtol=1e-6)


def test_members_differ_by_seed_and_task(undisturbed):
    rows = [r for r in read_rows(undisturbed, print) if r.agent != BEHAVIOUR]
    final = {tuple(r.returns) for r in rows if r.step == 120}
    assert len(final) == 4


def test_running_again_does_nothing(store, undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.glob("rows/*")}
    outcome = run(store, undisturbed)
    assert (outcome.ran, outcome.already) == (0, 4)
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.glob("rows/*")}


@pytest.mark.parametrize("chunks", [1, 3])
def test_stopped_and_continued_equals_undisturbed(
    store, undisturbed, tmp_path, monkeypatch, chunks
):
    """Ctrl-C after a few chunks, twice; then the same command to the end."""
    monkeypatch.setattr(jobs_module, "FIRST_CHUNK", 8)
    monkeypatch.setattr(jobs_module, "CHUNK_SECONDS", 0.0)
    for _ in range(2):
        heard = 0

        def interrupt_after_some(self, done, note):
            nonlocal heard
            heard += "updates/s" in note
            if heard == chunks:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "update", interrupt_after_some)
            assert run(store, tmp_path).stopped
        assert set(contents(tmp_path)) < set(contents(undisturbed))
        assert set(points(tmp_path)) < set(points(undisturbed))
    outcome = run(store, tmp_path)
    assert (outcome.ran, outcome.stopped) == (1, False)
    assert contents(tmp_path) == contents(undisturbed)
    assert points(tmp_path) == points(undisturbed)


def devices_of(monkeypatch, count: int) -> None:
    """Makes the runner see only `count` of the two devices."""
    devices = jax.local_devices()[:count]
    monkeypatch.setattr(jax, "local_devices", lambda **_: devices)


def stop_after(monkeypatch, updates: int) -> None:
    stopped = False

    def interrupt(self, done, note):
        nonlocal stopped
        if done >= updates and not stopped:
            stopped = True
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "update", interrupt)


def test_another_number_of_devices_continues_and_says_so(store, tmp_path, monkeypatch):
    """Three members: padded to four on two devices, not at all on one."""
    suite = dataclasses.replace(SUITE, tasks=SUITE.tasks[:1], seeds=3)
    monkeypatch.setattr(jobs_module, "FIRST_CHUNK", 8)
    monkeypatch.setattr(jobs_module, "CHUNK_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        stop_after(patch, 60)
        assert run(store, tmp_path, suite).stopped
    devices_of(monkeypatch, 1)
    assert run(store, tmp_path, suite).ran == 1
    rows = [r for r in read_rows(tmp_path, print) if r.agent != BEHAVIOUR]
    assert {(r.step, r.split_changed) for r in rows} == {
        (40, False),
        (80, True),
        (120, True),
    }


def test_a_half_written_evaluation_is_completed_under_another_split(
    store, tmp_path, monkeypatch
):
    """Killed between two rows, continued with other devices: what is there stays."""
    suite = dataclasses.replace(SUITE, tasks=SUITE.tasks[:1])
    run(store, tmp_path, suite)
    (path,) = (p for p in tmp_path.glob("rows/td3*.jsonl"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    devices_of(monkeypatch, 1)
    assert run(store, tmp_path, suite).ran == 1
    after = path.read_text().splitlines(keepends=True)
    assert after[:-1] == lines[:-1] and len(after) == len(lines)
    assert json.loads(after[-1])["split_changed"] is True


def test_a_begun_job_is_finished_whole_when_less_is_asked_for(store, tmp_path):
    run(store, tmp_path)
    (path,) = (p for p in tmp_path.glob("rows/td3*.jsonl"))
    whole = contents(tmp_path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    suite = dataclasses.replace(SUITE, tasks=SUITE.tasks[1:])
    assert run(store, tmp_path, suite).ran == 1
    assert contents(tmp_path) == whole


def test_an_agent_of_two_phases_is_stopped_in_both_and_continued(
    store, tmp_path, monkeypatch
):
    """Strides of 3 and 2; interrupted in the first phase and in the second."""
    from offrl_jax.agents import bc, registry
    from offrl_jax.types import Agent, Phase

    def make(config, spec):
        made = bc.make_bc(config, spec)
        update = made.phases[0].update
        phases = (Phase("density", update, 3), Phase("policy", update, 2))
        return Agent(made.init, made.act, phases, made.batch_size)

    entry = dataclasses.replace(bc.ENTRY, name="two", make=make)
    monkeypatch.setitem(registry.REGISTRY, "two", entry)
    monkeypatch.setattr(jobs_module, "FIRST_CHUNK", 6)
    monkeypatch.setattr(jobs_module, "CHUNK_SECONDS", 0.0)
    suite = dataclasses.replace(
        SUITE,
        tasks=SUITE.tasks[:1],
        agents=("two",),
        settings={"two": {"default": {"hidden": [8, 8], "batch_size": 12}}},
        pretraining_updates=30,
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(store, whole, suite)
    for updates in (15, 90):
        with monkeypatch.context() as patch:
            stop_after(patch, updates)
            assert run(store, cut, suite).stopped
    run(store, cut, suite)
    assert contents(cut) == contents(whole)
    assert points(cut) == points(whole)
    steps = {phase: [] for phase in ("density", "policy")}
    for *_, seed, phase, step in points(cut):
        steps[phase] += [step] * (seed == 0)
    assert steps["density"] == [3, 6, 12, 15, 21, 24, 30]  # 10 calls in 7 parts
    assert steps["policy"] == [16, 34, 50, 68, 84, 102, 120]  # 60 calls in 7 parts
    rows = [r for r in read_rows(cut, print) if r.agent != BEHAVIOUR]
    assert {r.step for r in rows} == {40, 80, 120}
    assert rows[0].phase_updates == {"density": 30, "policy": 120}


def test_more_seeds_later_add_rows_and_change_none(store, undisturbed, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(undisturbed, folder)
    before = contents(folder)
    outcome = run(store, folder, dataclasses.replace(SUITE, seeds=3))
    assert (outcome.ran, outcome.already) == (1, 4)
    after = contents(folder)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2 * 3


def test_a_job_that_another_process_holds_is_left_alone(store, tmp_path):
    from offrl_jax.results import lock_path, try_lock

    def stop_at_once(*_args):
        raise jobs_module.Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors_module, "run_job", stop_at_once)
        assert run(store, tmp_path).stopped
    plan = read_plan(tmp_path)
    assert plan is not None
    with try_lock(lock_path(tmp_path, plan.jobs[0].run_id)) as held:
        assert held
        outcome = run(store, tmp_path)
    assert outcome.busy == (plan.jobs[0].run_id,) and outcome.ran == 0


def test_a_diverged_member_has_rows_that_say_so(store, tmp_path):
    settings = {
        "td3_bc": {
            "wild": {"hidden": [8, 8], "batch_size": 16, "critic_lr": 1e30},
            "tame": {"hidden": [8, 8], "batch_size": 16},
        }
    }
    suite = dataclasses.replace(SUITE, settings=settings, tasks=SUITE.tasks[:1])
    run(store, tmp_path, suite)
    rows = [r for r in read_rows(tmp_path, print) if r.agent != BEHAVIOUR]
    assert {r.status for r in rows if r.setting == "wild"} == {"diverged"}
    assert {r.status for r in rows if r.setting == "tame"} == {"ok"}
    # Nothing is recorded of a run that is frozen, all of the run beside it.
    for (_, setting, *_), values in points(tmp_path).items():
        assert all(np.isnan(x) == (setting == "wild") for x in values.values())
    assert all(r.returns == [] and r.score is None for r in rows if r.setting == "wild")


def test_a_failed_job_says_why_and_is_tried_again(store, tmp_path, monkeypatch):
    def too_large(*_args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nat length")

    with monkeypatch.context() as patch:
        patch.setattr(jobs_module, "prepare", too_large)
        outcome = run(store, tmp_path)
    assert outcome.ran == 0 and len(outcome.failed) == 1
    assert "4 of 4 runs need more memory" in outcome.failed[0]
    assert "RESOURCE_EXHAUSTED: out of memory" in outcome.failed[0]
    rows = [r for r in read_rows(tmp_path, print) if r.agent != BEHAVIOUR]
    assert len(rows) == 4
    assert {(r.status, r.error, r.step) for r in rows} == {
        ("failed", "RESOURCE_EXHAUSTED: out of memory", 120)
    }
    assert run(store, tmp_path).ran == 1
    rows = [r for r in read_rows(tmp_path, print) if r.agent != BEHAVIOUR]
    assert {r.status for r in rows} == {"ok"} and len(rows) == 12


def test_absent_data_is_told_before_anything_is_written(store, tmp_path):
    tasks = (*SUITE.tasks, "neorl2/DMSD-v1")
    suite = dataclasses.replace(SUITE, tasks=tasks)
    with pytest.raises(DataError, match=r"DMSD-train\.npz.*--skip-missing"):
        run(store, tmp_path / "new", suite)
    assert not (tmp_path / "new").exists()


# Checkpoints alone.


def a_state(seed: int = 3, n: int = 7) -> dict:
    spread = {
        "key": jax.random.split(jax.random.key(seed), 4),
        "x": np.arange(8, dtype=np.float32) * seed,
    }
    return {**spread_members(spread, make_mesh()), "n": jnp.int32(n), "nothing": ()}


def test_checkpoints_come_back_with_keys_and_sharding(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(a_state()) is None
    checkpoints.save(a_state(), {"step": 5})
    found = checkpoints.restore(a_state(seed=0, n=0))
    assert found is not None
    state, meta = found
    assert meta == {"step": 5}
    for name in ("key", "x"):
        assert state[name].sharding == a_state()[name].sharding
    np.testing.assert_array_equal(
        jax.random.key_data(state["key"]), jax.random.key_data(a_state()["key"])
    )
    np.testing.assert_array_equal(np.asarray(state["x"]), 3.0 * np.arange(8))
    assert int(state["n"]) == 7 and state["nothing"] == ()


def test_two_generations_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in range(4):
        checkpoints.save({"x": jnp.float32(step)}, {"step": step})
    assert checkpoints.generations() == [3, 4]


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "remove", "manifest", "no manifest", "unreadable"]
)
def test_a_damaged_generation_gives_way_to_the_one_before(
    tmp_path, damage, monkeypatch
):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    for step in (1, 2):
        value = jnp.arange(1000, dtype=jnp.float32) + step
        checkpoints.save({"x": value}, {"step": step})
    newest = tmp_path / "2"
    largest = max(newest.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    if damage == "flip":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif damage == "cut":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif damage == "remove":
        largest.unlink()
    elif damage == "unreadable":
        digest = checkpoints_module._digest

        def fail(path):
            if path == largest:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return digest(path)

        monkeypatch.setattr(checkpoints_module, "_digest", fail)
    else:
        text = "{" if damage == "manifest" else "[1]"
        (newest / "manifest.json").write_text(text)
    found = checkpoints.restore({"x": jnp.zeros(1000)})
    assert found is not None and found[1] == {"step": 1}
    assert len(said) == 1 and "damaged" in said[0] and str(newest) in said[0]


def test_left_overs_of_a_kill_are_removed(tmp_path):
    (tmp_path / "tmp-3").mkdir()
    (tmp_path / "tmp-3" / "half").write_text("x")
    Checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"x": jnp.float32(1)}, {"step": 1})

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "_sync", full)
        with pytest.raises(ResultsError, match="No space left on device") as error:
            checkpoints.save({"x": jnp.float32(2)}, {"step": 2})
    assert isinstance(error.value, OffrlError) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    found = checkpoints.restore({"x": jnp.float32(0)})
    assert found is not None and found[1] == {"step": 1}
