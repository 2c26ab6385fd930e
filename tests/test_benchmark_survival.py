"""What a command does with what earlier ones left: damage, changed sources, settings,
populations; and how much a kill may cost."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from test_benchmark_planning import row_of, wanted
from tiny_runs import contents, pendulum_episodes, points

from offrl_jax.benchmark import jobs as jobs_module
from offrl_jax.benchmark import provenance
from offrl_jax.benchmark.checkpoints import Checkpoints
from offrl_jax.benchmark.overview import Limits
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.recording import has_all_rows
from offrl_jax.benchmark.runner import run_suite
from offrl_jax.datasets.store import Store
from offrl_jax.results import BEHAVIOUR, Row, RowFile, read_plan, read_rows

SUITE = dataclasses.replace(
    tiny_runs.SUITE,
    agents=("bc",),
    settings={"bc": {"narrow": {"hidden": [8, 8], "batch_size": 16}}},
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return tiny_runs.write_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    run(store, folder)
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(jobs_module, "FIRST_CHUNK", 8)
    monkeypatch.setattr(jobs_module, "CHUNK_SECONDS", 0.0)


def run(store: Store, folder: Path, suite=SUITE, stop_at: int | None = None, **options):
    """Runs a suite, interrupted at `stop_at` updates; what became of it, and words."""
    stream = io.StringIO()
    with Progress(stream) as progress:
        update, interrupted = progress.update, []

        def listen(done: int, note: str) -> None:
            update(done, note)
            if stop_at is not None and done >= stop_at and not interrupted:
                interrupted.append(done)
                os.kill(os.getpid(), signal.SIGINT)

        progress.update = listen  # type: ignore[method-assign]
        outcome = run_suite(suite, store, folder, progress, **options)
    return outcome, stream.getvalue()


def trained(folder: Path) -> list[Row]:
    rows = read_rows(folder, lambda line: pytest.fail(line))
    return [row for row in rows if row.agent != BEHAVIOUR]


def test_a_damaged_checkpoint_costs_one_generation(
    store, undisturbed, tmp_path, small_chunks, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(jobs_module, "CHECKPOINT_SECONDS", 0.0)
        assert run(store, tmp_path, stop_at=60)[0].stopped
    generations = sorted(tmp_path.glob("checkpoints/*/[0-9]*"), key=lambda p: p.name)
    assert len(generations) == 2
    files = [path for path in generations[-1].rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    outcome, said = run(store, tmp_path)
    assert outcome.ran == 1
    assert f"{generations[-1]} is damaged" in said
    assert contents(tmp_path) == contents(undisturbed)
    assert points(tmp_path) == points(undisturbed)


def test_changed_sources_start_anew_and_finished_rows_stay(
    store, tmp_path, small_chunks, monkeypatch
):
    narrow = {"hidden": [8, 8], "batch_size": 16}
    flat = {"hidden": [8], "batch_size": 16}
    both = dataclasses.replace(SUITE, settings={"bc": {"narrow": narrow, "flat": flat}})
    assert run(store, tmp_path, SUITE)[0].ran == 1
    whole = contents(tmp_path)
    assert run(store, tmp_path, both, stop_at=60)[0].stopped
    begun = {row.run_id for row in trained(tmp_path) if row.setting == "flat"}
    monkeypatch.setattr(provenance, "source_hash", lambda: "changed")
    outcome, said = run(store, tmp_path, both)
    assert outcome.ran == 1
    (name,) = begun
    assert f"{name} was begun before the package's sources changed" in said
    last = {row.run_id for row in trained(tmp_path) if row.step == 120}
    assert name not in last and len(last) == 2
    assert whole.items() <= contents(tmp_path).items()


def test_settings_that_changed_start_anew_and_say_so(store, tmp_path, small_chunks):
    """Under the same name: a suite file that was edited."""
    assert run(store, tmp_path, stop_at=60)[0].stopped
    (name,) = {row.run_id for row in trained(tmp_path)}
    wide = {"bc": {"narrow": {"hidden": [9, 9], "batch_size": 16}}}
    edited = dataclasses.replace(SUITE, settings=wide)
    outcome, said = run(store, tmp_path, edited)
    assert outcome.ran == 1
    assert f"{name} was begun with other settings or data" in said
    plan = read_plan(tmp_path)
    assert plan is not None and name not in {job.run_id for job in plan.jobs}
    # And back: what was begun is found again.
    outcome, said = run(store, tmp_path)
    assert outcome.ran == 1 and "other settings" not in said
    assert name in {row.run_id for row in trained(tmp_path) if row.step == 120}


def test_members_that_are_left_over_are_not_given_states_of_others(
    store, undisturbed, tmp_path, small_chunks
):
    """Of a population that was begun, one task is taken away into smaller ones."""
    assert run(store, tmp_path, stop_at=60)[0].stopped
    (begun,) = {row.run_id for row in trained(tmp_path)}
    first = dataclasses.replace(SUITE, tasks=SUITE.tasks[:1])
    assert run(store, tmp_path, first, limits=Limits(max_parallel=1))[0].ran == 2
    assert run(store, tmp_path)[0].ran == 1
    last = [row for row in trained(tmp_path) if row.step == 120]
    assert len(last) == 4 and begun not in {row.run_id for row in last}
    want = {
        (row.task, row.seed): row.returns
        for row in trained(undisturbed)
        if row.step == 120
    }
    for row in last:
        # Other populations, other bits.
        np.testing.assert_allclose(row.returns, want[row.task, row.seed], rtol=1e-3)


def test_checkpoints_of_other_members_are_not_used(
    store, undisturbed, tmp_path, small_chunks
):
    """Folders copied under a wrong name, say."""
    seeds = dataclasses.replace(SUITE, tasks=SUITE.tasks[1:], seeds=4)
    other = tmp_path / "other"
    assert run(store, other, seeds, stop_at=60)[0].stopped
    (taken,) = (other / "checkpoints").iterdir()
    (name,) = (undisturbed / "checkpoints").iterdir()
    folder = tmp_path / "mixed"
    (folder / "checkpoints").mkdir(parents=True)
    taken.rename(folder / "checkpoints" / name.name)
    outcome, said = run(store, folder)
    assert outcome.ran == 1 and "checkpoints of other runs" in said
    assert contents(folder) == contents(undisturbed)


def test_a_kill_costs_less_than_thirty_seconds(store, tmp_path, monkeypatch):
    """By a clock of which every look takes a second: about three for a chunk."""
    now, saved = 0.0, []

    def look() -> float:
        nonlocal now
        now += 1.0
        return now

    save = Checkpoints.save

    def note(self, *args, **options):
        saved.append(now)
        save(self, *args, **options)

    monkeypatch.setattr(jobs_module, "time", types.SimpleNamespace(monotonic=look))
    monkeypatch.setattr(jobs_module, "FIRST_CHUNK", 1)
    monkeypatch.setattr(jobs_module, "CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(Checkpoints, "save", note)
    one = dataclasses.replace(SUITE, tasks=SUITE.tasks[:1])
    assert run(store, tmp_path, one)[0].ran == 1
    assert len(saved) >= 120 * 3 / 30
    assert np.diff([0.0, *saved]).max() <= 30.0


def test_rows_of_one_environment_do_not_wait_for_those_of_another(
    store, tmp_path, monkeypatch
):
    """A kill while the second is simulated costs the first nothing."""
    two = Store(tmp_path / "data")
    names = ("local/here-v0", "local/there-v0")
    for name, env_id in zip(
        names, ("classic/pendulum-v0", "gymnasium/Pendulum-v1"), strict=True
    ):
        two.write(
            name,
            "train",
            pendulum_episodes(0),
            source={"kind": "own file", "file": "made by the test"},
            info={"env_id": env_id},
        )
    suite = dataclasses.replace(SUITE, tasks=names)
    evaluate, asked = jobs_module._Run._results, []

    def die_in_the_second(self, env_id, *others):
        asked.append(env_id)
        if len(asked) == 2:
            raise RuntimeError("killed")
        return evaluate(self, env_id, *others)

    with monkeypatch.context() as patch:
        patch.setattr(jobs_module._Run, "_results", die_in_the_second)
        with pytest.raises(RuntimeError, match="killed"):
            run(two, tmp_path / "results", suite)
        (there,) = {row.task for row in trained(tmp_path / "results")}
        asked.clear()
        asked += ["", ""]  # nobody dies any more
        run(two, tmp_path / "results", suite)
    # The environment that was through is not simulated again at that step.
    first, second = asked[2], asked[3]
    env_of = dict(
        zip(names, ("classic/pendulum-v0", "gymnasium/Pendulum-v1"), strict=True)
    )
    assert first != env_of[there] and second == env_of[there]
    assert len(trained(tmp_path / "results")) == 2 * 2 * 3


def test_a_job_has_all_rows_when_every_evaluation_of_every_member_has_one(tmp_path):
    job = wanted()[0]
    assert len(job.eval_steps) > 1 and len(job.members) > 1
    places = [(at, step) for at in range(len(job.members)) for step in job.eval_steps]

    def has_all(name: str, written: list[tuple[int, int]], status: str = "ok") -> bool:
        with RowFile(tmp_path / name, print) as rows:
            for at, step in written:
                last = (at, step) == places[-1]
                outcome = status if last else "ok"
                rows.append(row_of(job, job.members[at], step, status=outcome))
            return has_all_rows(job, rows)

    assert has_all("whole", places)
    assert not has_all("none", [])
    for lost in range(len(places)):
        assert not has_all(f"lost{lost}", places[:lost] + places[lost + 1 :])
    assert has_all("diverged", places, "diverged")
    assert not has_all("failed", places, "failed")


def test_a_cpu_has_one_device_per_core():
    code = (
        "from offrl_jax.benchmark.jax_settings import configure_jax\n"
        "configure_jax()\n"
        "import jax\n"
        "print(jax.local_device_count())"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    }
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(said.stdout) == len(os.sched_getaffinity(0))
