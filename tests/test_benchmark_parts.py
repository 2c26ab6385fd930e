"""Out of device memory: halves of a population go on from its last checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import test_benchmark_jobs as whole_jobs
from test_benchmark_jobs import SUITE as PAIR
from test_benchmark_jobs import points, run

from offrl_jax.benchmark import jobs as jobs_module
from offrl_jax.benchmark import parts as parts_module
from offrl_jax.benchmark import recording as recording_module
from offrl_jax.benchmark.checkpoints import Checkpoints
from offrl_jax.benchmark.parts import Part
from offrl_jax.benchmark.progress import Progress
from offrl_jax.errors import ResultsError
from offrl_jax.results import BEHAVIOUR, Row, checkpoint_path, read_plan, read_rows

SUITE = dataclasses.replace(
    PAIR,
    tasks=PAIR.tasks[:1],
    agents=("bc",),
    settings={"bc": {"default": {"hidden": [8, 8], "batch_size": 16}}},
    seeds=3,
    updates=60,
)
FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBufferAssignment: ..."

store = whole_jobs.store


@pytest.fixture(scope="module", autouse=True)
def few_points():
    """Every 10 updates, where chunks end too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording_module, "POINTS", 6)
        yield


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "whole"
    run(store, folder, SUITE)
    return folder


def save_often(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint after each of the six chunks."""
    patch.setattr(jobs_module, "CHECKPOINT_SECONDS", 0.0)


def too_small(
    patch: pytest.MonkeyPatch,
    members: int,
    after: int = 0,
    error: type[Exception] = jax.errors.JaxRuntimeError,
) -> list[int]:
    """Populations of more than `members` run out of memory after `after` updates.

    Returns:
      The sizes of the populations that were made, in their order.
    """
    made: list[int] = []
    prepare = jobs_module.prepare

    def with_less_memory(job, tasks):
        ready = prepare(job, tasks)
        made.append(len(job.members))

        def limited(record):
            def step(state, sums, table, task, hyper, updates):
                begun = int(np.asarray(state.step)[0])
                if len(job.members) > members and begun + updates >= after:
                    raise error(FULL)
                return record(state, sums, table, task, hyper, updates)

            return step

        record = tuple(limited(one) for one in ready.population.record)
        return ready._replace(population=ready.population._replace(record=record))

    patch.setattr(jobs_module, "prepare", with_less_memory)
    return made


def trained(folder: Path) -> list[Row]:
    return [row for row in read_rows(folder, print) if row.agent != BEHAVIOUR]


def assert_same_scores(folder: Path, other: Path) -> None:
    """None missing, none double, and float tolerance between."""
    one, two = ({(r.seed, r.step): r for r in trained(f)} for f in (folder, other))
    assert one.keys() == two.keys()
    assert len(trained(folder)) == len(one)
    for key, row in one.items():
        # Returns are sums of 200 rewards of a chaotic swing-up.
        np.testing.assert_allclose(row.returns, two[key].returns, rtol=2e-3)
        assert (row.status, row.run_id) == (two[key].status, two[key].run_id)
    left, right = points(folder), points(other)
    assert left.keys() == right.keys()
    for key, values in left.items():
        for name, value in values.items():
            np.testing.assert_allclose(
                value, right[key][name], rtol=1e-3, atol=1e-4, err_msg=name
            )


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError, MemoryError])
def test_a_population_that_does_not_compile_is_halved(
    store, undisturbed, tmp_path, monkeypatch, error
):
    made = too_small(monkeypatch, 1, error=error)
    outcome = run(store, tmp_path, SUITE)
    assert (outcome.ran, outcome.failed) == (1, ())
    assert made == [3, 2, 1, 1, 1]
    assert_same_scores(tmp_path, undisturbed)
    assert all(row.split_changed for row in trained(tmp_path))
    assert {row.population["members"] for row in trained(tmp_path)} == {1}
    # Nothing is left to be done, and the checkpoint is that of the whole.
    assert run(store, tmp_path, SUITE).ran == 0
    job = the_job(tmp_path)
    saved = Checkpoints(checkpoint_path(tmp_path, job.run_id)).restore(None)
    assert saved is not None
    assert np.asarray(saved[0]["population"]["step"]).tolist() == [60] * 3
    keys = np.asarray(saved[0]["population"]["key"])
    assert len(np.unique(keys, axis=0)) == 3
    assert not list(tmp_path.glob("checkpoints/*/part*"))


def the_job(folder: Path):
    plan = read_plan(folder)
    assert plan is not None
    (job,) = plan.jobs
    return job


def test_halves_go_on_from_the_last_checkpoint(
    store, undisturbed, tmp_path, monkeypatch
):
    """Memory is gone after 30 of 60 updates: rows before that stay as they are."""
    save_often(monkeypatch)
    made = too_small(monkeypatch, 2, after=30)
    steps: list[int] = []
    begin = Progress.begin

    def note(self, label, total, done=0, members=1):
        steps.append(done)
        begin(self, label, total, done, members)

    monkeypatch.setattr(Progress, "begin", note)
    assert run(store, tmp_path, SUITE).ran == 1
    assert made == [3, 2, 1]
    assert steps[0] == 0 and steps[1:] == [20, 20]
    assert_same_scores(tmp_path, undisturbed)
    before = {row.row_id for row in trained(undisturbed) if row.step == 20}
    assert {r.row_id for r in trained(tmp_path) if r.step == 20} == before
    assert all(row.split_changed == (row.step > 20) for row in trained(tmp_path))
    assert {row.population["members"] for row in trained(tmp_path)} == {3, 2, 1}


def test_a_job_in_parts_is_stopped_and_continued(
    store, undisturbed, tmp_path, monkeypatch
):
    save_often(monkeypatch)
    made = too_small(monkeypatch, 1, after=30)
    with monkeypatch.context() as patch:
        calls = 0

        def interrupt(self, done, note):
            nonlocal calls
            calls += made == [3, 2, 1] and done > 40
            if calls == 1:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(Progress, "update", interrupt)
        assert run(store, tmp_path, SUITE).stopped
    assert made == [3, 2, 1]
    made.clear()
    job = the_job(tmp_path)
    path = checkpoint_path(tmp_path, job.run_id)
    assert json.loads((path / "parts.json").read_text()) == [[0, 1], [1, 2], [2, 3]]
    done = parts_module.updates_done(path, job)
    assert 40 + 2 * 20 < done < 3 * 60
    assert run(store, tmp_path, SUITE).ran == 1
    assert made == [1, 1, 1]
    assert_same_scores(tmp_path, undisturbed)


def test_a_run_that_does_not_fit_alone_fails_and_the_others_go_on(
    store, undisturbed, tmp_path, monkeypatch
):
    prepare = jobs_module.prepare

    def without_seed_1(job, tasks):
        if any(member.seed == 1 for member in job.members):
            raise jax.errors.JaxRuntimeError(FULL)
        return prepare(job, tasks)

    with monkeypatch.context() as patch:
        patch.setattr(jobs_module, "prepare", without_seed_1)
        outcome = run(store, tmp_path, SUITE)
    assert outcome.ran == 0 and len(outcome.failed) == 1
    assert "1 of 3 runs need more memory" in outcome.failed[0]
    assert "\n" not in outcome.failed[0]
    failed = [row for row in trained(tmp_path) if row.status == "failed"]
    assert [(row.seed, row.error) for row in failed] == [(1, FULL.splitlines()[0])]
    ok = {(row.seed, row.step) for row in trained(tmp_path) if row.status == "ok"}
    assert ok == {(s, t) for s in (0, 2) for t in (20, 40, 60)}
    # With the memory back, the one run is repeated and nothing else.
    made = too_small(monkeypatch, 99)
    assert run(store, tmp_path, SUITE).ran == 1
    assert made == [1]
    assert_same_scores(tmp_path, undisturbed)


def test_other_errors_halve_nothing(store, tmp_path, monkeypatch):
    def broken(*_args):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel")

    monkeypatch.setattr(jobs_module, "prepare", broken)
    outcome = run(store, tmp_path, SUITE)
    assert "no such kernel" in outcome.failed[0]
    assert not list(tmp_path.glob("checkpoints/*/parts.json"))


_SCRIPT = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from pathlib import Path
import pytest
import test_benchmark_parts as t
t.recording_module.POINTS = 6
patch = pytest.MonkeyPatch()
t.save_often(patch)
t.too_small(patch, 1, after=30)
with t.Progress() as progress:
    store = t.whole_jobs.Store(Path(sys.argv[1]))
    t.whole_jobs.run_suite(t.SUITE, store, Path(sys.argv[2]), progress)
"""


def test_kill_9_in_parts_and_continued(store, undisturbed, tmp_path, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(store.path), str(tmp_path)],
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        },
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/*/part-0-1/[0-9]*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert run(store, tmp_path, SUITE).ran == 1
    assert_same_scores(tmp_path, undisturbed)
    assert {r.population["members"] for r in trained(tmp_path) if r.step > 20} == {1}


@pytest.mark.parametrize(
    "record", ["", "[[0, 2]]", "[[0, 1], [2, 3]]", "[[0, 0], [0, 3]]", '{"a": 1}']
)
def test_a_damaged_record_of_parts_is_told(undisturbed, tmp_path, record):
    """It says who belongs to which checkpoint, so it is never guessed."""
    job = the_job(undisturbed)
    assert parts_module.read_parts(tmp_path, job) == [Part(0, 3)]
    parts_module.write_parts(tmp_path, [Part(0, 2), Part(2, 3)])
    assert parts_module.read_parts(tmp_path, job) == [Part(0, 2), Part(2, 3)]
    (tmp_path / "parts.json").write_text(record)
    with pytest.raises(ResultsError, match=r"parts\.json.*remove the folder"):
        parts_module.read_parts(tmp_path, job)


def test_parts_share_what_was_trained_together(undisturbed, tmp_path):
    """Rows and training time: else the cost of a run would be counted twice."""
    job = the_job(undisturbed)
    saved = {"x": np.arange(6.0).reshape(3, 2)}
    meta = {
        "members": parts_module.names_of(job),
        "updates": 60,
        "clock": {"train": 9.0, "compile": 5.0},
    }
    Checkpoints(tmp_path).save(saved, meta)
    for part in (Part(1, 3), Part(2, 3)):
        template = {"x": np.zeros((part.size, 2))}
        found = parts_module.restore(tmp_path, job, part, template, print)
        assert found is not None
        np.testing.assert_array_equal(found[0]["x"], saved["x"][part.start :])
        assert found[1]["clock"] == {"train": 3.0 * part.size, "compile": 5.0}
    # One's own checkpoint comes first, then that of the smallest holder.
    parts = [Part(0, 1), Part(1, 3)]
    parts_module.write_parts(tmp_path, parts)
    own = Checkpoints(tmp_path / "part-1-3")
    meta = {**meta, "members": meta["members"][1:]}
    own.save({"x": -np.ones((2, 2))}, {**meta, "updates": 50})
    found = parts_module.restore(
        tmp_path, job, Part(2, 3), {"x": np.zeros((1, 2))}, print
    )
    assert found is not None and (found[0]["x"] == -1.0).all()
    assert parts_module.updates_done(tmp_path, job) == 60 + 2 * 50
    # They are joined at the end and not before.
    parts_module.join(tmp_path, job, parts, {"x": np.zeros((1, 2))}, print)
    assert parts_module.read_parts(tmp_path, job) == parts
    own.save({"x": -np.ones((2, 2))}, meta)
    parts_module.join(tmp_path, job, parts, {"x": np.zeros((1, 2))}, print)
    assert parts_module.read_parts(tmp_path, job) == [Part(0, 3)]
    found = Checkpoints(tmp_path).restore({"x": np.zeros((3, 2))})
    assert found is not None and found[1]["members"] == parts_module.names_of(job)
    assert found[0]["x"].tolist() == [[0.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]]
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_halves():
    assert Part(0, 5).halves() == (Part(0, 3), Part(3, 5))
    assert Part(3, 5).halves() == (Part(3, 4), Part(4, 5))


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: std::bad_alloc"), True),
        (MemoryError(), True),
        (jax.errors.JaxRuntimeError("INTERNAL: cuDNN"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_memory):
    assert parts_module.is_out_of_memory(error) is is_memory
