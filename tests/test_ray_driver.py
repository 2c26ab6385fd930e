"""What the driver of a Ray cluster decides, and what workers tell: no cluster runs."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from offrl_jax.benchmark import jax_settings, provenance, ray_executor, ray_worker
from offrl_jax.benchmark.executors import Ran
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.ray_executor import LOSSES, ZOMBIE_SECONDS, cluster
from offrl_jax.benchmark.ray_worker import Link, Mailbox, State, Verdict, saved_updates
from offrl_jax.datasets.store import Store
from offrl_jax.errors import ResultsError, UsageError
from offrl_jax.results import Job, Member, checkpoint_path

ray = pytest.importorskip("ray")
from ray import exceptions  # noqa: E402

DONE, HELD, STOPPED = Verdict("done"), Verdict("held"), Verdict("stopped")
LOST = exceptions.WorkerCrashedError()
UPDATES = 30


def job(name: str, members: int = 4) -> Job:
    return Job(
        run_id=name,
        suite="tiny",
        role="test",
        agent="bc",
        config={},
        members=tuple(
            Member("t", "local", "default", seed, {}) for seed in range(members)
        ),
        updates_total=UPDATES,
        phase_updates={"train": UPDATES},
        eval_steps=(UPDATES,),
        protocol={},
        split={"members": members, "devices": 1},
        source_hash=provenance.source_hash(),
        datasets={},
    )


class Task(NamedTuple):
    """An attempt that was submitted."""

    name: str
    number: int


class Bench:
    """A driver in front of a cluster, a mailbox and a clock that are played.

    Every wait for tasks takes a second.  `ends` says how a task ends, None that it is
    still running; `words` are what the mailbox gives out, once each.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.ends: Callable[[Task], Any] = lambda task: DONE
        self.saved: Callable[[Job], float] = lambda job: 0.0
        self.words: list[Any] = []
        self.stopping = False
        self.told_to_stop = False
        self.submitted: list[Task] = []
        self.cancelled: set[Task] = set()
        self.stream = io.StringIO()
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        patch.setattr(ray_executor, "time", clock)
        for name in ("wait", "get", "cancel"):
            patch.setattr(ray, name, getattr(self, f"_{name}"))

    def run(self, *names: str, wait: bool = False) -> Ran:
        remote = SimpleNamespace(remote=self._take)
        driver = ray_executor._Driver(
            self._submit,
            lambda job: self.saved(job),
            SimpleNamespace(take=remote),
            Progress(self.stream),
            lambda: self.stopping,
            wait,
        )
        return driver.run([job(name) for name in names])

    @property
    def said(self) -> str:
        return self.stream.getvalue()

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def _submit(self, job: Job, attempt: int) -> Task:
        self.submitted.append(Task(job.run_id, attempt))
        return self.submitted[-1]

    def _wait(self, tasks: list[Task], timeout: float) -> tuple[list[Task], list[Task]]:
        assert self.now < 10_000, "no end"
        self.now += timeout
        ended = [task for task in tasks if self._end(task) is not None]
        return ended, [task for task in tasks if task not in ended]

    def _end(self, task: Task) -> Any:
        cancelled = exceptions.TaskCancelledError()
        return cancelled if task in self.cancelled else self.ends(task)

    def _get(self, asked: Any) -> Any:
        got = self._end(asked) if isinstance(asked, Task) else asked
        if isinstance(got, Exception):
            raise got
        return got

    def _cancel(self, task: Task) -> None:
        self.cancelled.add(task)

    def _take(self, stop: bool) -> Any:
        self.told_to_stop = stop
        return self.words.pop(0) if self.words else {}


@pytest.fixture
def bench(monkeypatch) -> Bench:
    return Bench(monkeypatch)


@pytest.mark.parametrize(
    ("saved", "fails"),
    [
        ([0] * LOSSES, True),
        ([0] * (LOSSES - 1), False),
        ([0, *[10] * (LOSSES - 1)], False),
        ([0, *[10] * LOSSES], True),
        ([10, 20, 30, 40, 50, 60], False),
        ([10, 0, 10, 0, 10], True),  # unreadable now and then: nothing was gained
    ],
)
def test_a_job_fails_after_five_losses_that_saved_nothing(bench, saved, fails):
    """What counts is what checkpoints hold; every worker tells the same."""
    held = iter(saved)
    bench.ends = lambda task: (
        LOST if task.name == "a" and task.number <= len(saved) else DONE
    )
    bench.saved = lambda job: next(held)
    bench.words = [{"a": State(n + 1, "a", 7, 9, "", 7.0)} for n in range(len(saved))]
    ran = bench.run("a", "b")
    losses = "a: its worker is lost (it was killed or died)"
    assert bench.said.count(losses) == len(saved)
    if fails:
        why = f"{losses}, {LOSSES} times without getting further"
        assert ran == Ran(ran=1, failed=(why,)) and why in bench.said
    else:
        assert ran == Ran(ran=2)
        assert f"{losses}; another continues from the last checkpoint" in bench.said


@pytest.mark.parametrize(
    ("until", "ran"),
    [
        (ZOMBIE_SECONDS - 5, Ran(ran=1)),
        (ZOMBIE_SECONDS + 30, Ran(busy=("a",))),
    ],
)
def test_the_lock_of_a_lost_worker_is_waited_for(bench, until, ran):
    bench.ends = lambda task: (
        LOST if task.number == 1 else HELD if bench.now < until else DONE
    )
    assert bench.run("a") == ran
    assert bench.now == pytest.approx(min(until, ZOMBIE_SECONDS), abs=10)
    assert bench.said.count("another process is working on it") == 1


@pytest.mark.parametrize("wait", [False, True])
def test_what_others_hold_is_left_unless_told_to_wait(bench, wait):
    bench.ends = lambda task: HELD if bench.now < 600 else DONE
    assert bench.run("a", wait=wait) == (Ran(ran=1) if wait else Ran(busy=("a",)))
    assert bench.now == pytest.approx(600 if wait else 30, abs=35)
    assert "taken" not in bench.said


def test_what_others_held_is_tried_again_after_work(bench):
    """Another command holds `a` for a minute, and `b` takes longer than that."""
    bench.ends = lambda task: (
        (HELD if task.name == "a" else None) if bench.now < 60 else DONE
    )
    assert bench.run("a", "b") == Ran(ran=2)


def test_nothing_begins_while_all_nodes_are_taken(bench):
    bench.ends = lambda task: None if bench.now < 100 else DONE
    assert bench.run("a") == Ran(ran=1)
    assert bench.said.count("all nodes of the Ray cluster are taken; waiting") == 1


def test_what_cannot_be_written_stops_all_and_is_raised(bench):
    """`b` is at work and saves, and `c` has not begun."""
    bench.words = [{"b": State(1, "b")}]

    def ends(task):
        if task.name == "a":
            return Verdict("unwritable", "no room")
        return STOPPED if task.name == "b" and bench.told_to_stop else None

    bench.ends = ends
    with pytest.raises(ResultsError, match="no room"):
        bench.run("a", "b", "c")
    assert bench.told_to_stop and bench.cancelled == {Task("c", 1)}
    assert len(bench.submitted) == 3


def test_a_job_that_fails_is_told_and_the_others_go_on(bench):
    bench.ends = lambda task: Verdict("failed", "why") if task.name == "a" else DONE
    assert bench.run("a", "b") == Ran(ran=1, failed=("a: why",))
    assert "a: why\n" in bench.said


def test_ctrl_c_saves_what_is_at_work_and_leaves_the_rest(bench):
    """The last word of `b`'s first worker comes when its second one has not begun."""

    def ends(task):
        bench.stopping = bench.now > 5
        if task == Task("b", 1):
            return LOST
        return STOPPED if task.name == "a" and bench.told_to_stop else None

    bench.ends = ends
    bench.words = [{"a": State(1, "a")}, {"b": State(1, "b", said=("too late",))}]
    assert bench.run("a", "b") == Ran(stopped=True)
    assert bench.cancelled == {Task("b", 2)}
    assert "too late" in bench.said


def test_a_worker_that_is_lost_while_all_stops_has_no_successor(bench):
    def ends(task):
        bench.stopping = True
        return LOST

    bench.ends = ends
    assert bench.run("a") == Ran(stopped=True)
    assert "; the same command continues from the last checkpoint" in bench.said
    assert len(bench.submitted) == 1


def test_a_mailbox_that_dies_is_survived(bench):
    bench.words = [exceptions.ActorUnavailableError("gone", None)] * 3
    bench.words += [{"a": State(1, "a", said=("back",))}]
    bench.ends = lambda task: None if bench.words else DONE
    assert bench.run("a") == Ran(ran=1)
    assert "back" in bench.said


def test_the_bar_of_a_job_does_not_go_back(bench, monkeypatch):
    amounts = []
    monkeypatch.setattr(Progress, "show", lambda *args: amounts.append(args[-1]))
    bench.ends = lambda task: LOST if task.number == 1 else DONE
    bench.words = [{"a": State(n, "a", amount=x)} for n, x in ((1, 80.0), (2, 60.0))]
    assert bench.run("a") == Ran(ran=1)
    assert amounts == [80.0, 80.0]


def test_the_mailbox_keeps_the_newest_word_and_all_lines():
    box = Mailbox()
    assert not box.tell("a", State(1, amount=5.0, said=("one",)))
    assert not box.tell("a", State(2, amount=3.0, said=("two",)))
    assert not box.tell("a", State(1, amount=6.0, said=("late",)))
    assert box.take(True) == {
        "a": State(2, amount=3.0, said=("one", "two", "late")),
    }
    assert box.tell("a", State(2)) and box.take(False) == {"a": State(2)}


def write_checkpoint(folder: Path, updates: int) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "meta.json").write_text(json.dumps({"updates": updates}))


def test_a_worker_counts_the_parts_that_others_finished(tmp_path):
    """Of four members in halves two are through, and two are at 10 of 30 updates."""
    path, whole = checkpoint_path(tmp_path, "a"), job("a")
    assert saved_updates(whole, tmp_path) == 0
    write_checkpoint(path / "part-0-2", UPDATES)
    write_checkpoint(path / "part-2-4", 10)
    (path / "parts.json").write_text("[[0, 2], [2, 4]]")
    assert saved_updates(whole, tmp_path) == 2 * UPDATES + 2 * 10
    link = Link(None, whole, 3, tmp_path)
    link.begin("a", UPDATES, 10, 2)
    assert link._state.amount == 2 * UPDATES + 2 * 10
    link.update(15, "")
    assert link._state.amount == 2 * UPDATES + 2 * 15
    assert link._state.attempt == 3
    (path / "parts.json").write_text("[[0, 2], [3, 4]]")
    assert saved_updates(whole, tmp_path) == 0


@pytest.fixture
def work(tmp_path, monkeypatch) -> Callable[[], Verdict]:
    """A worker in this process, up to its loading of tasks."""
    monkeypatch.setattr(jax_settings, "configure_jax", lambda: None)
    (tmp_path / "plan.json").touch()
    answer = SimpleNamespace(future=lambda: SimpleNamespace(result=lambda wait: False))
    tell = SimpleNamespace(remote=lambda name, state: answer)
    mailbox = SimpleNamespace(tell=tell)
    return lambda: ray_worker.work(job("a"), 1, "", tmp_path, mailbox, {}, "cpu")


@pytest.mark.parametrize(
    ("error", "how", "why"),
    [
        (MemoryError(), "failed", "no memory is left on"),
        (OSError(errno.EDQUOT, "Over quota", "rows"), "unwritable", "rows: Over quota"),
        (TimeoutError("no answer"), "unwritable", "no answer"),
    ],
)
def test_errors_of_a_node_are_a_line_with_its_name(error, how, why, work, monkeypatch):
    def load(*_args):
        raise error

    monkeypatch.setattr(ray_worker, "_load", load)
    verdict = work()
    assert verdict.how == how and "\n" not in verdict.why
    assert why in verdict.why and socket.gethostname() in verdict.why


def test_a_node_where_jax_does_not_start_is_a_line(work, monkeypatch):
    def configure():
        raise RuntimeError("Unable to initialize backend 'cuda'\nand more")

    monkeypatch.setattr(jax_settings, "configure_jax", configure)
    verdict = work()
    assert verdict.how == "failed" and "\n" not in verdict.why
    assert "cannot start (Unable to initialize backend 'cuda')" in verdict.why
    assert socket.gethostname() in verdict.why


def test_a_folder_that_a_node_may_not_see_is_a_line(work, monkeypatch):
    def is_file():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/shared/plan")

    path = SimpleNamespace(is_file=is_file)
    monkeypatch.setattr(ray_worker, "plan_path", lambda folder: path)
    verdict = work()
    assert verdict.how == "unwritable"
    assert "/shared/plan: Permission denied" in verdict.why
    assert socket.gethostname() in verdict.why


@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out during startup.\nThis could be due to"),
        TimeoutError(),
        exceptions.RaySystemError("no object store"),
        RuntimeError("\n no node"),
    ],
)
def test_a_cluster_that_does_not_start_is_one_line(error, tmp_path, monkeypatch):
    def init(**_options):
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(UsageError, match="could not start on this machine") as found,
        cluster(Store(tmp_path)),
    ):
        pass
    assert "\n" not in str(found.value) and "()" not in str(found.value)


def test_ctrl_c_while_a_cluster_starts_is_no_error_of_ray(tmp_path, monkeypatch):
    def init(**_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KeyboardInterrupt), cluster(Store(tmp_path), "auto"):
        pass


@pytest.mark.parametrize("reached", [True, False])
def test_sigterm_stays_the_commands_own(tmp_path, monkeypatch, reached):
    """Ray takes it when a driver connects."""

    def init(**_options):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not reached:
            raise ConnectionError("nobody there")

    before = signal.getsignal(signal.SIGTERM)
    assert before != signal.SIG_IGN
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_executor, "RayExecutor", lambda *_args: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    outcome = contextlib.nullcontext() if reached else pytest.raises(UsageError)
    try:
        with outcome, cluster(Store(tmp_path)):
            assert signal.getsignal(signal.SIGTERM) == before
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, before)
