"""Jobs as tasks of a Ray cluster, one population per worker process.

The results folder and the data store must be the same on all nodes.  What a worker
knows comes from there and from the job; what it tells goes through a small actor beside
the driver.  A worker that is lost is replaced: the next one continues from the job's
last checkpoint.  Whoever writes holds the job's lock, so a worker that Ray has given
up but that still runs keeps its successor out until it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import signal
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offrl_jax.benchmark.executors import Ran
from offrl_jax.benchmark.memory import GIB, Memory
from offrl_jax.benchmark.overview import Machine
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.ray_worker import Mailbox, Verdict, saved_updates, work
from offrl_jax.errors import ResultsError, UsageError
from offrl_jax.results import Job

if TYPE_CHECKING:
    from offrl_jax.catalogue import LoadedTask
    from offrl_jax.datasets.store import Store

LOSSES = 5
"""Workers that a job may lose, one after the other, without getting any further."""
RETRY_SECONDS = 3.0
"""Pause before a job whose lock was held is tried again, while that may end soon."""
WAIT_SECONDS = 30.0
"""The same for `--wait`: every try starts a process."""
PATIENCE_SECONDS = 30.0
"""How long workers of a command that was killed may outlive it."""
ZOMBIE_SECONDS = 600.0
"""The same for a worker that Ray gave up, on a node out of reach perhaps."""
OBJECTS = 100_000_000
"""Bytes that a cluster of this machine keeps for what tasks exchange: next to nothing.
"""
CONNECT_SECONDS = 5.0
"""How long the head of a cluster may take to answer."""
FREE_SECONDS = 30.0
"""How long nothing may begin before it is told that all nodes are taken."""
_PASSED_ON = ("JAX_", "XLA_", "OFFRL_", "XDG_CACHE_HOME")
"""Environment variables that workers take over from the driver, by their beginning."""


@contextlib.contextmanager
def cluster(
    store: Store,
    address: str | None = None,
    *,
    wait: bool = False,
    cpus: int | None = None,
) -> Iterator[RayExecutor]:
    """Connects to a cluster for the block, or starts one of this machine alone.

    Args:
      store: of datasets, at the same path on all nodes.
      address: `HOST:PORT` of a cluster that this machine belongs to, or `auto`; None
        takes `$RAY_ADDRESS`, and without it starts a cluster on this machine, which
        only this machine can reach and which ends with the block.
      wait: stay until no job is left to other commands.
      cpus: cores of one job; default all that most nodes have, on nodes with GPUs
        those that fall to one of them.

    Raises:
      UsageError: Ray is not installed, or the cluster cannot be reached or started.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what Ray would print among our lines
        "RAY_TQDM": "0",
    }
    if address == "local":  # Ray's switch for binding to 127.0.0.1 alone
        defaults["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    _check_address(address)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "--executor ray needs Ray, which is not installed; "
            "pip install 'offrl-jax[ray]'"
        ) from error
    local = {
        "include_dashboard": False,
        "object_store_memory": OBJECTS,
        "num_cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else None,
    }
    before = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            # JAX warns of forks.  Ray's processes call nothing before they become
            # other programs.
            warnings.filterwarnings(
                "ignore", r"os\.fork\(\) was called", RuntimeWarning
            )
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(local if address == "local" else {}),
            )
    except Exception as error:  # Ray raises many kinds, and plain ones too
        raise _unreachable(address, str(error)) from error
    finally:
        in_main = threading.current_thread() is threading.main_thread()
        if before is not None and in_main:
            # Ray takes the signal for itself, and would exit with another code.
            signal.signal(signal.SIGTERM, before)
    try:
        yield RayExecutor(store, wait, cpus)
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Asks whether anything listens: Ray itself takes minutes to find out."""
    if address in ("local", "auto"):
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise UsageError(
            f"--ray-address takes HOST:PORT of a cluster's head, or auto; got "
            f"'{address}'"
        )
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, why: str) -> UsageError:
    reason = next((line.strip() for line in why.splitlines() if line.strip()), "")
    reason = reason or "no answer"
    if address == "local":
        return UsageError(
            f"Ray could not start on this machine ({reason}); run the same command "
            "again, or without --executor ray"
        )
    return UsageError(
        f"no Ray cluster can be reached at '{address}' ({reason}); start one with "
        "`ray start --head`, or leave --ray-address out to use this machine alone"
    )


class RayExecutor:
    """Runs every job as a task of its own in the cluster that Ray is connected to."""

    def __init__(
        self, store: Store, wait: bool = False, cpus: int | None = None
    ) -> None:
        """See `cluster`."""
        import ray

        self._store = store
        self._wait = wait
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
        if with_gpu:
            cores = [int(node.get("CPU", 0) // node["GPU"]) for node in with_gpu]
        else:
            cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        if not cores or max(cores) < (cpus or 0):
            raise UsageError(
                f"--ray-cpus {cpus}: no node of the Ray cluster has so many cores"
                if cores
                else "no node of the Ray cluster has a core for jobs"
            )
        self._platform = "gpu" if with_gpu else "cpu"
        # A head with few cores must not make all jobs small.
        common = Counter(cores)
        self._cores = max(common, key=lambda each: (common[each], each))
        self._cpus = cpus or (min(cores) if with_gpu else self._cores)
        shares = [
            node["memory"] * min(1.0, self._cpus / max(node.get("CPU", 0), 1))
            for node in (with_gpu or nodes)
            if node.get("memory")
        ]
        self._memory = int(min(shares)) if shares else None

    def machine(self, memory_gib: float | None) -> Machine:
        """A GPU for each job where there are any, else its cores.

        JAX_NUM_CPU_DEVICES says otherwise, as it does in this process.  Of GPUs the
        memory is unknown here; a job's share of a node's is what Ray counts with.
        """
        given = None if memory_gib is None else int(memory_gib * GIB)
        if self._platform == "gpu":
            memory = None if given is None else Memory(given, shared=False)
            return Machine(1, "gpu", memory, "1 x gpu")
        devices = int(os.environ.get("JAX_NUM_CPU_DEVICES") or self._cpus)
        words = f"cpu ({platform.machine()}, {self._cores} cores)"
        found = given or self._memory
        memory = None if found is None else Memory(found, shared=True)
        return Machine(devices, "cpu", memory, f"{devices} x {words}")

    def run(
        self,
        jobs: Sequence[Job],
        tasks: Mapping[str, LoadedTask],
        folder: Path,
        progress: Progress,
        stop: Callable[[], bool],
    ) -> Ran:
        """Runs the jobs beside each other, as many as the cluster holds.

        Workers load the tasks themselves; see `Executor`.
        """
        del tasks
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        mailbox: Any = (
            ray.remote(Mailbox)
            .options(num_cpus=0, max_restarts=-1, scheduling_strategy=here)
            .remote()
        )
        # A process per job: JAX's devices and their memory go with it.
        alone: Any = ray.remote(
            max_calls=1,
            max_retries=0,
            num_cpus=self._cpus,
            num_gpus=int(self._platform == "gpu"),
        )
        task: Any = alone(work)
        environment = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_PASSED_ON)
        }
        if self._platform == "cpu":
            environment = {
                "JAX_NUM_CPU_DEVICES": str(self._cpus),
                "JAX_PLATFORMS": "cpu",
                **environment,
            }
        data_dir = str(self._store.path.absolute())

        def submit(job: Job, attempt: int) -> Any:
            return task.remote(
                job,
                attempt,
                data_dir,
                folder.absolute(),
                mailbox,
                environment,
                self._platform,
            )

        def saved(job: Job) -> float:
            return saved_updates(job, folder)

        driver = _Driver(submit, saved, mailbox, progress, stop, self._wait)
        try:
            return driver.run(jobs)
        finally:
            ray.kill(mailbox)


@dataclasses.dataclass
class _Attempt:
    """A job on its way.

    Attributes:
      job: of the plan.
      patient_until: until when a held lock is waited for.
      retry_at: when to submit it.
      number: how often it was submitted.
      begun: whether the worker of that number has told anything.
      shown: the most updates that were told, summed over members.
      saved: the most that its checkpoints held when a worker was lost.
      losses: workers lost since they last held more.
    """

    job: Job
    patient_until: float
    retry_at: float = 0.0
    number: int = 0
    begun: bool = False
    shown: float = 0.0
    saved: float = 0.0
    losses: int = 0


class _Driver:
    """Submits jobs, listens to their workers, and replaces those that are lost."""

    def __init__(
        self,
        submit: Callable[[Job, int], Any],
        saved: Callable[[Job], float],
        mailbox: Any,
        progress: Progress,
        stop: Callable[[], bool],
        wait: bool,
    ) -> None:
        """Args:
        submit: starts a numbered attempt at a job; returns the task.
        saved: updates that a job's checkpoints hold, summed over members.
        mailbox: actor of a `Mailbox`.
        progress: bars.
        stop: as in `Executor.run`.
        wait: as in `cluster`.
        """
        self._submit = submit
        self._saved = saved
        self._mailbox = mailbox
        self._progress = progress
        self._user_stops = stop
        self._wait = wait
        self._waiting: list[_Attempt] = []
        self._running: dict[Any, _Attempt] = {}
        self._held: list[_Attempt] = []
        self._told: set[str] = set()
        self._unwritable = ""
        self._ran = 0
        self._elsewhere = 0
        self._failed: list[str] = []

    def run(self, jobs: Sequence[Job]) -> Ran:
        """Runs jobs to their ends.

        Raises:
          ResultsError: a worker could not write.
        """
        now = time.monotonic()
        self._waiting = [_Attempt(job, now + PATIENCE_SECONDS) for job in jobs]
        free_since, finished_at_pass = now, 0
        while self._waiting or self._running:
            stopping = self._stopping()
            self._start(stopping)
            ended = self._ended()
            for ref in ended:
                self._judge(self._running.pop(ref), self._verdict(ref))
            if stopping and not self._running:
                break
            begun = any(attempt.begun for attempt in self._running.values())
            # What finds its job held ends without having begun, but had a node.
            if begun or ended or not self._running:
                free_since = time.monotonic()
            elif time.monotonic() - free_since > FREE_SECONDS:
                self._progress.say("all nodes of the Ray cluster are taken; waiting")
                free_since = float("inf")
            finished = self._ran + self._elsewhere
            if not (self._waiting or self._running) and finished > finished_at_pass:
                # Others may have finished or left what they held.
                finished_at_pass = finished
                self._waiting, self._held = self._held, []
        if self._unwritable:
            raise ResultsError(self._unwritable)
        busy = tuple(attempt.job.run_id for attempt in self._held)
        stopped = self._user_stops() and bool(self._waiting)
        return Ran(self._ran, self._elsewhere, tuple(self._failed), busy, stopped)

    def _stopping(self) -> bool:
        return bool(self._unwritable) or self._user_stops()

    def _start(self, stopping: bool) -> None:
        """Submits what is due; takes back what has not begun when all is to stop."""
        import ray

        if stopping:
            for ref, attempt in self._running.items():
                if not attempt.begun:
                    ray.cancel(ref)
            return
        now = time.monotonic()
        for attempt in [a for a in self._waiting if a.retry_at <= now]:
            self._waiting.remove(attempt)
            attempt.number += 1
            attempt.begun = False
            self._running[self._submit(attempt.job, attempt.number)] = attempt

    def _ended(self) -> list[Any]:
        """Waits up to a second; shows what workers tell; tasks that have ended."""
        import ray
        from ray.exceptions import RayError

        if not self._running:
            time.sleep(0.2)
            return []
        ended, _ = ray.wait(list(self._running), timeout=1.0)
        by_name = {a.job.run_id: a for a in self._running.values()}
        try:
            told: Any = ray.get(self._mailbox.take.remote(self._stopping()))
        except RayError:  # restarting
            return ended
        for name, state in told.items():
            for line in state.said:
                self._progress.say(line)
            attempt = by_name.get(name)
            # A worker that was lost may be heard when its successor is on its way.
            if attempt is not None and attempt.number == state.attempt:
                attempt.begun = True
                attempt.shown = max(attempt.shown, state.amount)
                self._progress.show(
                    name,
                    state.label,
                    state.done,
                    state.total,
                    state.note,
                    attempt.shown,
                )
        return ended

    def _verdict(self, ref: Any) -> Verdict:
        """How a task ended; errors that are bugs are raised."""
        import ray
        from ray.exceptions import (
            NodeDiedError,
            OutOfMemoryError,
            RayError,
            RayTaskError,
            TaskCancelledError,
        )

        try:
            return ray.get(ref)
        except TaskCancelledError:
            return Verdict("stopped")
        except RayTaskError as error:
            lines = [line for line in str(error).splitlines() if "ModuleNotF" in line]
            if lines:
                why = lines[-1].partition(": ")[2]
                return Verdict(
                    "failed", f"a node lacks offrl_jax or a part of it: {why}"
                )
            raise
        except NodeDiedError:
            return Verdict("lost", "its node is gone")
        except OutOfMemoryError:
            return Verdict("lost", "its node was out of memory")
        except RayError:
            return Verdict("lost", "it was killed or died")

    def _fail(self, job: Job, why: str) -> None:
        self._failed.append(f"{job.run_id}: {why}")
        self._progress.say(self._failed[-1])
        self._progress.end_job(job.run_id)

    def _judge(self, attempt: _Attempt, verdict: Verdict) -> None:
        """Draws the consequences of an attempt's end."""
        job, now = attempt.job, time.monotonic()
        self._progress.drop(job.run_id)
        if verdict.how in ("done", "elsewhere"):
            self._ran += verdict.how == "done"
            self._elsewhere += len(job.members) * (verdict.how == "elsewhere")
            self._progress.end_job(job.run_id)
        elif verdict.how == "stopped":
            self._waiting.append(attempt)
        elif verdict.how == "failed":
            self._fail(job, verdict.why)
        elif verdict.how == "unwritable":
            self._unwritable = self._unwritable or verdict.why
        elif verdict.how == "lost":
            saved = self._saved(job)
            attempt.losses = 1 if saved > attempt.saved else attempt.losses + 1
            attempt.saved = max(saved, attempt.saved)
            lost = f"its worker is lost ({verdict.why})"
            if attempt.losses >= LOSSES:
                self._fail(job, f"{lost}, {LOSSES} times without getting further")
                return
            who = "the same command" if self._stopping() else "another"
            self._progress.say(
                f"{job.run_id}: {lost}; {who} continues from the last checkpoint"
            )
            attempt.patient_until = now + ZOMBIE_SECONDS
            self._waiting.append(attempt)
        else:
            if job.run_id not in self._told:
                self._progress.say(f"{job.run_id}: another process is working on it")
            self._told.add(job.run_id)
            soon = now < attempt.patient_until
            attempt.retry_at = now + (RETRY_SECONDS if soon else WAIT_SECONDS)
            (self._waiting if soon or self._wait else self._held).append(attempt)
