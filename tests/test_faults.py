"""Processes killed at random moments, and several at once in one folder: the rows and
metrics are those of one process that nobody disturbed."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import scripts
import tiny_runs
from tiny_runs import BUSY, DONE, JOBS, MEMBERS, RESULTS, STOPPED, contents, points

from offrl_jax.benchmark.executors import LocalExecutor, Ran, is_finished
from offrl_jax.benchmark.progress import Progress
from offrl_jax.errors import ResultsError
from offrl_jax.results import lock_path, read_plan, row_path, try_lock
from offrl_jax.results.rows import from_record, to_line

LIMIT = 300.0
"""Seconds after which a process counts as stuck, on a machine that has other work."""
KILLS = 3


class Bench:
    """A store, a cache of compiled programs, and an undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.cache = folder, folder / "data", folder / "xla"
        tiny_runs.write_store(self.data)
        self.whole = folder / "whole"
        assert self.end(self.start(self.whole)) == DONE  # compiles
        assert self.end(self.start(folder / "again", often=True)) == DONE

    def start(self, folder: Path, **options):
        return tiny_runs.start(self.data, folder, self.cache, **options)

    def end(self, process) -> int:
        """The exit code of a process, once it ends by itself."""
        process.join(LIMIT)
        assert process.exitcode is not None, "stuck"
        return process.exitcode

    def assert_equal(self, folder: Path) -> None:
        """Every row once, none missing, the same bits; one plan, of all jobs."""
        assert contents(folder) == contents(self.whole)
        assert len(contents(folder)) == JOBS * MEMBERS * 3
        assert points(folder) == points(self.whole)
        assert read_plan(folder) == read_plan(self.whole)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def until(what, process) -> None:
    """Waits for something that a process does."""
    end = time.monotonic() + LIMIT
    while not what():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.01)


def test_the_pace_of_checkpoints_changes_nothing(bench):
    bench.assert_equal(bench.folder / "again")


def lines(folder: Path) -> int:
    """How far a run is: recorded metrics, of which a whole one has 600."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("metrics/*"))


def test_killed_at_random_moments(bench, tmp_path):
    """In any of the jobs; then the same command, to the end."""
    moments = random.Random(0)
    folder = tmp_path / "cut"
    for reached in sorted(moments.sample(range(500), KILLS)):
        process = bench.start(folder, often=True)
        until(lambda reached=reached: lines(folder) >= reached, process)
        time.sleep(moments.uniform(0.0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert lines(folder) < lines(bench.whole) == 50 * JOBS * MEMBERS
    assert bench.end(bench.start(folder)) == DONE
    bench.assert_equal(folder)


def test_three_at_once_of_which_one_is_killed(bench, tmp_path):
    """No job is done twice, and what the dead one held is taken over."""
    folder = tmp_path / "shared"
    runners = [bench.start(folder, often=True, wait=True) for _ in range(3)]
    victim = runners[0]
    until(lambda: list(folder.glob("checkpoints/*/[0-9]*")), victim)
    victim.kill()
    assert [bench.end(runner) for runner in runners[1:]] == [DONE, DONE]
    bench.assert_equal(folder)
    said = [tiny_runs.log(folder, runner) for runner in runners]
    assert sum(text.count(": done, ") for text in said) in (JOBS, JOBS + 1)


def test_the_term_signal_saves_and_says_so(bench, tmp_path):
    folder = tmp_path / "stopped"
    process = bench.start(folder, often=True)
    until(lambda: list(folder.glob("checkpoints/*/[0-9]*")), process)
    process.terminate()
    assert bench.end(process) == STOPPED
    assert "stopping after this chunk; nothing will be lost" in tiny_runs.log(
        folder, process
    )
    assert bench.end(bench.start(folder)) == DONE
    bench.assert_equal(folder)


def test_jobs_that_others_hold_are_left_and_told(bench, tmp_path):
    """All but one are held; that one is done, and nobody waits."""
    folder = tmp_path / "held"
    folder.mkdir()
    shutil.copy(bench.whole / "plan.json", folder)
    plan = read_plan(folder)
    assert plan is not None
    first, *others = (job.run_id for job in plan.jobs)
    with (
        try_lock(lock_path(folder, others[0])) as one,
        try_lock(lock_path(folder, others[1])) as two,
    ):
        assert one and two
        process = bench.start(folder)
        assert bench.end(process) == BUSY
    said = tiny_runs.log(folder, process)
    assert all(
        said.count(f"{name}: another process is working on it") == 1 for name in others
    )
    assert row_path(folder, first).exists()
    assert not any(row_path(folder, name).exists() for name in others)


def test_what_another_process_finished_meanwhile_is_not_done_again(bench, monkeypatch):
    from offrl_jax.benchmark import executors

    monkeypatch.setattr(executors, "run_job", None)
    plan = read_plan(bench.whole)
    assert plan is not None
    with Progress(io.StringIO()) as progress:
        ran = LocalExecutor().run(
            plan.jobs, {}, bench.whole, progress, lambda: pytest.fail("asked to stop")
        )
    assert ran == Ran(elsewhere=JOBS * MEMBERS)


def test_a_job_without_its_last_row_is_not_finished(bench, tmp_path):
    plan = read_plan(bench.whole)
    assert plan is not None
    job = plan.jobs[0]
    lines = row_path(bench.whole, job.run_id).read_text().splitlines(keepends=True)
    path = row_path(tmp_path, job.run_id)
    path.parent.mkdir()
    for kept, finished in ((lines, True), (lines[:-1], False), (lines[1:], False)):
        path.write_text("".join(kept))
        assert is_finished(job, tmp_path, pytest.fail) is finished


def test_a_full_disk_stops_in_one_line_and_nothing_is_lost(bench, tmp_path):
    """No file grows beyond a size, until there is room again."""
    folder = tmp_path / "full"
    for largest, what in (
        (1_000, "plan.json"),
        (20_000, "metrics/bc"),
        (36_000, "checkpoints/td3_bc"),
    ):
        process = bench.start(folder, often=True, largest=largest)
        assert bench.end(process) == RESULTS
        said = tiny_runs.log(folder, process)
        assert "Traceback" not in said
        (line,) = (text for text in said.splitlines() if text.startswith("offrl: "))
        assert what in line and "File too large" in line
        assert contents(folder).items() <= contents(bench.whole).items()
    assert bench.end(bench.start(folder)) == DONE
    bench.assert_equal(folder)


def test_a_file_system_without_locks_is_told_in_one_line(tmp_path, monkeypatch):
    """As Lustre is where it is mounted with noflock."""
    import fcntl

    def refuse(*_args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(ResultsError, match=r"job\.lock: its file system has no locks"),
        try_lock(lock_path(tmp_path, "job")),
    ):
        pass


@pytest.fixture(scope="module")
def kill():
    return scripts.load("faults/kill")


ROWS = JOBS * MEMBERS * 3 + 2
POINTS = 50 * JOBS * MEMBERS


def test_the_script_finds_what_is_missing_twice_or_different(bench, tmp_path, kill):
    folder = tmp_path / "copy"
    shutil.copytree(bench.whole, folder)
    assert kill.compare(bench.whole, folder) == (ROWS, 0, 0, 0, POINTS, 0)
    rows = sorted(folder.glob("rows/*bc*"))[0]
    first, second, *others = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([first, first, *others]))
    metrics = sorted(folder.glob("metrics/*"))[0]
    point = json.loads(metrics.read_text().splitlines()[0])
    name = next(iter(point["values"]))
    before = f'"{name}":{json.dumps(point["values"][name])}'
    metrics.write_text(metrics.read_text().replace(before, f'"{name}":1e9', 1))
    assert kill.compare(bench.whole, folder) == (ROWS, 1, 1, 0, POINTS, 1)
    row = from_record(json.loads(second), "")
    changed = to_line(dataclasses.replace(row, returns=[0.0, 0.0], row_id=""))
    rows.write_text("".join([first, changed + "\n", *others]))
    assert kill.compare(bench.whole, folder) == (ROWS, 0, 0, 1, POINTS, 1)


def test_the_script_knows_who_works_and_since_when(tmp_path, kill):
    me = os.getpid()
    assert kill.holders(tmp_path) == {}
    assert kill.lost_work(tmp_path, [], time.time()) == (0.0, True)
    with try_lock(lock_path(tmp_path, "job")):
        assert kill.holders(tmp_path) == {me: "job"}
    began = kill.began_at(me)
    assert 0 < time.time() - began < 86_400
    taken = {}
    for job, now in (("job", began + 5), ("job", began + 6), ("next", began + 9)):
        kill.note_taken(taken, {me: job}, now)
        since = began if job == "job" else began + 9
        assert taken == {me: (job, pytest.approx(since, abs=0.1))}
    kill.note_taken(taken, {me: "next", 2**22 + 1: "gone"}, began + 10)
    assert set(taken) == {me}


def test_the_script_counts_what_the_checkpoints_of_that_job_miss(
    tmp_path, kill, monkeypatch
):
    """Process 1 took its job at 100, process 2 at 200; job `b` goes on in halves."""

    def save(name, time):
        path = tmp_path / "checkpoints" / name
        path.mkdir(parents=True)
        os.utime(path, (time, time))
        return path

    def lost(**jobs):
        since = {"_1": 100.0, "_2": 200.0}
        dying = [kill.Taken(name, since[who]) for who, name in jobs.items()]
        return kill.lost_work(tmp_path, dying, 300)

    assert lost(_1="a") == (200.0, True)
    save("a/1", 250.0)
    save("a/2", 270.0)
    assert lost(_1="a") == (30.0, False)
    assert lost(_2="b") == (100.0, True)
    assert lost(_1="a", _2="b") == (100.0, True)
    save("b/1", 150.0)
    assert lost(_2="b") == (100.0, True)
    save("b/part-0-2/1", 290.0)
    assert lost(_2="b") == (10.0, False)
    assert lost(_1="a", _2="b") == (30.0, False)
    stat = Path.stat

    def removed(path, **options):
        if path.name == "2":
            raise FileNotFoundError
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", removed)
    assert lost(_1="a") == (50.0, False)


def test_the_script_ends_where_no_worker_is_left_to_be_killed(
    tmp_path, kill, monkeypatch
):
    begun = []

    class Command:
        def poll(self):
            return 0

        def wait(self):
            return 0

    def begin(*_args):
        assert len(begun) < 5, "it begins for ever"
        begun.append(Command())
        return begun[-1]

    monkeypatch.setattr(kill, "begin", begin)
    monkeypatch.setattr(kill, "count", lambda folder, kind: 100)
    settings = kill.Settings("faults", "ray", kills=3)
    assert kill.run_and_kill(settings, tmp_path, 100) == []
