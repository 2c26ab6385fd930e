"""A real Ray cluster on this machine: its rows are those of this process, whatever
happens to its workers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray_work
import tiny_runs
from cli_runner import CLI
from tiny_runs import DONE, JOBS, SUITE, contents, points

from offrl_jax.benchmark import ray_executor
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.ray_executor import cluster
from offrl_jax.benchmark.ray_worker import saved_updates
from offrl_jax.benchmark.runner import run_suite
from offrl_jax.datasets.store import Store
from offrl_jax.errors import UsageError
from offrl_jax.results import lock_path, read_plan, row_path, try_lock

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.enable_socket

ONE_JOB = dataclasses.replace(SUITE, agents=("td3_bc",))
TWO_JOBS = dataclasses.replace(SUITE, agents=("bc",))
LIMIT = 120.0
"""Seconds after which a process counts as stuck, on a machine that has other work."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A store, and the rows of this machine's own process in `whole`."""
    folder = tmp_path_factory.mktemp("ray")
    tiny_runs.write_store(folder / "data")
    process = tiny_runs.start(folder / "data", folder / "whole", folder / "xla")
    process.join(300)
    assert process.exitcode == DONE
    return folder


@pytest.fixture(scope="module")
def executor(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "2")
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "xla"))
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        patch.setenv("PYTHONPATH", path)
        patch.setattr(ray_executor, "work", ray_work.work)
        # One job at a time, however many cores there are.
        with cluster(Store(home / "data"), cpus=os.cpu_count()) as made:
            yield made


def run(home, folder, executor, on_word=None, suite=SUITE):
    """Runs the suite in the cluster; `on_word` hears of every word, by run id."""
    stream = io.StringIO()
    with Progress(stream) as progress:
        if on_word is not None:
            show = progress.show

            def heard(*args):
                show(*args)
                on_word(args[0])

            progress.show = heard
        outcome = run_suite(
            suite,
            Store(home / "data"),
            folder,
            progress,
            executor=contextlib.nullcontext(executor),
        )
    return outcome, stream.getvalue()


def assert_equal(folder, home, suite=SUITE):
    """Rows and metrics of the suite's agents are those of the local run."""

    def chosen(found):
        return {k: v for k, v in found.items() if k[0].split("@")[0] in suite.agents}

    assert contents(folder) == chosen(contents(home / "whole"))
    assert points(folder) == chosen(points(home / "whole"))


def planned(folder, agent):
    """The job of an agent, None before it is planned."""
    plan = read_plan(folder)
    return plan and next(j for j in plan.jobs if j.agent.startswith(agent))


def begun(folder, name):
    """Of every worker that began to train a job, its id and the updates done before."""
    lines = (folder.parent / f"{name}.workers").read_text().splitlines()
    return [tuple(map(int, line.split())) for line in lines]


def test_rows_are_those_of_this_process(home, executor, tmp_path):
    outcome, said = run(home, tmp_path / "out", executor)
    assert (outcome.ran, outcome.failed, outcome.stopped) == (JOBS, (), False)
    assert_equal(tmp_path / "out", home)
    assert said.count(": done, ") == JOBS
    assert " of 12 rows" in said


def test_a_worker_that_is_killed_is_replaced(home, executor, tmp_path):
    folder, killed = tmp_path / "out", []

    def kill(name):
        job = planned(folder, "td3_bc")
        if not killed and saved_updates(job, folder) > 0:
            ((pid, done),) = begun(folder, name)
            assert done == 0
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.append(name)

    outcome, said = run(home, folder, executor, kill, ONE_JOB)
    assert outcome.ran == len(killed) == 1
    assert f"{killed[0]}: its worker is lost (it was killed or died)" in said
    _, (_, done) = begun(folder, killed[0])
    assert 0 < done < SUITE.updates, "not from its last checkpoint"
    assert_equal(folder, home, ONE_JOB)


def until(what, process):
    """Waits for something that a process does; what it was."""
    end = time.monotonic() + LIMIT
    while not (found := what()):
        assert process.is_alive() and time.monotonic() < end, "stuck"
        time.sleep(0.01)
    return found


def is_free(path):
    with try_lock(path) as ours:
        return ours


def test_a_command_that_is_killed_is_continued(home, executor, tmp_path):
    """Its worker ends with it.  The same suite from the command line does the rest."""
    del executor
    folder, moments = tmp_path / "out", random.Random(0)
    head = ray.get_runtime_context().gcs_address
    # A cluster of this machine may have a secret, which Ray finds by its variables.
    variables = {k: v for k, v in os.environ.items() if k.startswith("RAY_")}
    first = tiny_runs.start(
        *(home / "data", folder, home / "xla"),
        often=True,
        ray={**variables, "RAY_ADDRESS": head},
        suite=ONE_JOB,
    )
    job = until(lambda: planned(folder, "td3_bc"), first)
    until(lambda: saved_updates(job, folder), first)
    time.sleep(moments.uniform(0.0, 1.0))
    first.kill()
    first.join(LIMIT)
    assert first.exitcode == -signal.SIGKILL

    end = time.monotonic() + LIMIT
    while not is_free(lock_path(folder, job.run_id)):
        assert time.monotonic() < end, "its worker lives on"
        time.sleep(0.1)
    before = contents(folder)
    suite = tmp_path / "tiny.toml"
    suite.write_text(tiny_runs.as_toml(ONE_JOB))
    where = ("--executor", "ray", "--ray-address", head)
    folders = ("--results", str(folder), "--data-dir", str(home / "data"))
    second = subprocess.run(
        [sys.executable, *CLI, "benchmark", str(suite), *folders, *where],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert second.returncode == DONE, second.stderr
    assert second.stderr.count(": done, ") == 1
    assert before.items() < contents(folder).items()
    assert_equal(folder, home, ONE_JOB)


def test_ctrl_c_saves_and_the_same_command_continues(home, executor, tmp_path):
    """One job is at work, and one waits for a worker."""
    folder, interrupted = tmp_path / "out", []

    def interrupt(name):
        if list(folder.glob("checkpoints/*/[0-9]*")) and not interrupted:
            interrupted.append(name)
            os.kill(os.getpid(), signal.SIGINT)

    outcome, said = run(home, folder, executor, interrupt, TWO_JOBS)
    assert outcome.stopped and outcome.ran == 0 and not outcome.failed
    assert "stopping after this chunk; nothing will be lost" in said
    assert "its worker is lost" not in said
    assert len(list(tmp_path.glob("*.workers"))) == 1
    assert set(contents(folder)) < set(contents(home / "whole"))
    outcome, _ = run(home, folder, executor, suite=TWO_JOBS)
    assert outcome.ran == 2
    assert_equal(folder, home, TWO_JOBS)


def test_a_job_that_fails_says_why(home, executor, tmp_path):
    """The worker's data store is empty; the driver's is not."""
    elsewhere = ray_executor.RayExecutor(Store(tmp_path / "no_data"))
    outcome, _ = run(home, tmp_path / "out", elsewhere, suite=ONE_JOB)
    assert outcome.ran == 0
    (line,) = outcome.failed
    assert SUITE.tasks[0] in line and socket.gethostname() in line


def test_a_lock_that_outlives_its_worker_is_waited_for(
    home, executor, tmp_path, monkeypatch
):
    """As after a worker that Ray gave up and that still runs; the end may be long."""
    monkeypatch.setattr(ray_executor, "RETRY_SECONDS", 0.2)
    folder, told = tmp_path / "out", []
    folder.mkdir()
    shutil.copy(home / "whole" / "plan.json", folder)
    plan = read_plan(folder)
    assert plan is not None
    (name,) = (j.run_id for j in plan.jobs if j.agent.startswith("td3_bc"))
    with monkeypatch.context() as patch, try_lock(lock_path(folder, name)) as ours:
        assert ours
        patch.setattr(ray_executor, "PATIENCE_SECONDS", 0.0)
        outcome, _ = run(home, folder, executor, suite=ONE_JOB)
        assert outcome.busy == (name,) and outcome.ran == 0
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(try_lock(lock_path(folder, name)))
        say = Progress.say

        def release(self, line):
            say(self, line)
            if "another process" in line:
                told.append(line)
                assert not row_path(folder, name).exists()
                stack.close()

        monkeypatch.setattr(Progress, "say", release)
        outcome, _ = run(home, folder, executor, suite=ONE_JOB)
    assert len(told) == 1
    assert outcome.ran == 1 and not outcome.busy
    assert contents(folder).items() < contents(home / "whole").items()


def test_without_ray_it_says_how_to_get_it(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UsageError, match=r"pip install 'offrl-jax\[ray\]'"),
        cluster(Store(home / "data")),
    ):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nobody", "ray://127.0.0.1:10001"])
def test_an_address_that_nobody_answers_is_one_line(address, home):
    with (
        pytest.raises(UsageError, match=address) as error,
        cluster(Store(home / "data"), address),
    ):
        pass
    assert "\n" not in str(error.value)
