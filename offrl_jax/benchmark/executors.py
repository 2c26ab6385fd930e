"""Where jobs are run: the contract, and this process, one job after the other.

Any number of executors may share a results folder.  A job belongs to whoever holds its
lock; the others leave it alone and come back to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from offrl_jax.benchmark.jobs import JobFailed, Stopped, run_job
from offrl_jax.benchmark.overview import Machine, this_machine
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.recording import has_all_rows
from offrl_jax.catalogue import LoadedTask
from offrl_jax.results import Job, RowFile, lock_path, row_path, try_lock

POLL_SECONDS = 2.0
"""Pause between two looks at jobs that other processes hold."""


class Ran(NamedTuple):
    """What an executor did with the jobs that it was given.

    Attributes:
      ran: jobs finished by it.
      elsewhere: runs (members of jobs) that other processes finished meanwhile.
      failed: per failed job, one line.
      busy: run ids that other processes were still working on at the end.
      stopped: whether the user asked to stop before the end.
    """

    ran: int = 0
    elsewhere: int = 0
    failed: tuple[str, ...] = ()
    busy: tuple[str, ...] = ()
    stopped: bool = False


class Executor(Protocol):
    """Runs jobs somewhere, each in one process that holds the job's lock."""

    def machine(self, memory_gib: float | None) -> Machine:
        """What one job gets, with `memory_gib` as the limit if it is given."""
        ...

    def run(
        self,
        jobs: Sequence[Job],
        tasks: Mapping[str, LoadedTask],
        folder: Path,
        progress: Progress,
        stop: Callable[[], bool],
    ) -> Ran:
        """Runs jobs to their ends, from wherever they were left.

        Args:
          jobs: of the plan.
          tasks: loaded tasks by id.
          folder: of the results.
          progress: bars; it knows the jobs (`begin_jobs`).
          stop: asked all the time; when true, jobs are saved and left.

        Raises:
          ResultsError: the results folder cannot be written, or contradicts the run.
        """
        ...


class LocalExecutor:
    """Runs jobs in this process, on its own devices."""

    def __init__(self, wait: bool = False) -> None:
        """Args:
        wait: stay until no job is left to other processes, and take over what they
          leave unfinished.
        """
        self._wait = wait

    def machine(self, memory_gib: float | None) -> Machine:
        """All that this process has."""
        return this_machine(memory_gib)

    def run(
        self,
        jobs: Sequence[Job],
        tasks: Mapping[str, LoadedTask],
        folder: Path,
        progress: Progress,
        stop: Callable[[], bool],
    ) -> Ran:
        """Runs the jobs one after the other; see `Executor`.

        Jobs that others hold are looked at again as long as there is work beside them.
        """
        ran, elsewhere, failed = 0, 0, []
        todo, told = list(jobs), set()
        while todo:
            held: list[Job] = []
            for job in todo:
                with try_lock(lock_path(folder, job.run_id)) as ours:
                    if not ours:
                        held.append(job)
                        if job.run_id not in told:
                            progress.say(
                                f"{job.run_id}: another process is working on it"
                            )
                        told.add(job.run_id)
                        continue
                    if is_finished(job, folder, progress.say):
                        elsewhere += len(job.members)
                    else:
                        progress.begin_job(job.run_id)
                        try:
                            run_job(job, tasks, folder, progress, stop)
                            ran += 1
                        except Stopped:
                            return Ran(ran, elsewhere, tuple(failed), stopped=True)
                        except JobFailed as error:
                            failed.append(f"{job.run_id}: {error}")
                            progress.say(failed[-1])
                progress.end_job(job.run_id)
            if len(held) == len(todo) and not self._wait:
                break
            if len(held) == len(todo):
                if stop():
                    return Ran(ran, elsewhere, tuple(failed), stopped=True)
                time.sleep(POLL_SECONDS)
            todo = held
        return Ran(ran, elsewhere, tuple(failed), tuple(job.run_id for job in todo))


def is_finished(job: Job, folder: Path, say: Callable[[str], None]) -> bool:
    """Whether every row of a job is there; the caller holds the job's lock."""
    with RowFile(row_path(folder, job.run_id), say) as rows:
        return has_all_rows(job, rows)
