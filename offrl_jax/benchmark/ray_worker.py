"""The worker's half of `ray_executor`: runs one job in a process of its own.

Nothing heavy is imported with this file: a worker sets JAX up before it loads it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from offrl_jax.errors import DataError, OffrlError, ResultsError
from offrl_jax.results import (
    Job,
    checkpoint_path,
    lock_path,
    plan_path,
    row_path,
    try_lock,
)

if TYPE_CHECKING:
    from offrl_jax.catalogue import LoadedTask

TELL_SECONDS = 1.0
"""Pause between two words of a worker, and so until it hears that it is to stop."""


class State(NamedTuple):
    """What a worker last told: which attempt at its job it is, its bar, updates summed
    over members, lines to keep."""

    attempt: int = 0
    label: str = ""
    done: int = 0
    total: int = 0
    note: str = ""
    amount: float = 0.0
    said: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """How an attempt at a job ended: `how` is done, elsewhere, held, stopped, failed
    or unwritable (the results folder); `why` is a line about it."""

    how: str
    why: str = ""


class Mailbox:
    """Actor between workers and driver."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}
        self._stopped = False

    def tell(self, run_id: str, state: State) -> bool:
        """Takes a worker's state; returns whether it is to stop.

        The word of a worker that was lost may come after its successor's: of it only
        the lines are kept.
        """
        before = self._states.get(run_id, State())
        newer = before if before.attempt > state.attempt else state
        self._states[run_id] = newer._replace(said=before.said + state.said)
        return self._stopped

    def take(self, stop: bool) -> dict[str, State]:
        """What was told since the last time; `stop` is passed on to all workers."""
        self._stopped = stop
        states, self._states = self._states, {}
        return states


class Link:
    """A worker's end: a `Reporter`, and a thread that tells the driver every second."""

    def __init__(self, mailbox: Any, job: Job, attempt: int, folder: Path) -> None:
        self._mailbox = mailbox
        self._job = job
        self._folder = folder
        self._rows = row_path(folder, job.run_id)
        self._state = State(attempt, label=job.run_id)
        self._members, self._ended = 1, 0.0
        self._guard = threading.Lock()
        self._closed = threading.Event()
        self.stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Link:
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        self._tell()

    def say(self, line: str) -> None:
        """See `Reporter`."""
        with self._guard:
            self._state = self._state._replace(said=(*self._state.said, line))

    def begin(self, label: str, total: int, done: int = 0, members: int = 1) -> None:
        """See `Reporter`."""
        self._members = members
        # Of a job in parts, those before this one may have ended in another process.
        saved = saved_updates(self._job, self._folder)
        self._ended = max(0.0, saved - members * done)
        with self._guard:
            self._state = self._state._replace(label=label, total=total)
        self.update(done, "")

    def update(self, done: int, note: str) -> None:
        """See `Reporter`."""
        with self._guard:
            amount = self._ended + self._members * done
            self._state = self._state._replace(done=done, note=note, amount=amount)

    def end(self, line: str) -> None:
        """See `Reporter`."""
        self.say(line)

    def _run(self) -> None:
        while not self._closed.wait(TELL_SECONDS):
            self._tell()

    def _tell(self) -> None:
        from ray.exceptions import ActorDiedError, RayError

        with self._guard:
            state, self._state = self._state, self._state._replace(said=())
        wanted = len(self._job.members) * len(self._job.eval_steps)
        try:
            rows = self._rows.read_bytes().count(b"\n")
        except OSError:  # none yet, or a file server that is away for a moment
            rows = 0
        note = f"{state.note}, {rows} of {wanted} rows".removeprefix(", ")
        try:
            told = self._mailbox.tell.remote(
                self._job.run_id, state._replace(note=note)
            )
            # While a task is in `ray.get`, Ray gives its cores to another one.
            self.stopped |= told.future().result(10 * TELL_SECONDS)
        except ActorDiedError:  # with the driver: nobody else would stop this worker
            self.stopped = True
        except (RayError, TimeoutError):
            # Late or lost: the lines go with the next word.
            with self._guard:
                said = (*state.said, *self._state.said)
                self._state = self._state._replace(said=said)


def saved_updates(job: Job, folder: Path) -> float:
    """Updates summed over members that the job's checkpoints hold; 0 if unreadable."""
    from offrl_jax.benchmark.parts import updates_done

    try:
        return updates_done(checkpoint_path(folder, job.run_id), job)
    except (ResultsError, OSError):
        return 0.0


def work(
    job: Job,
    attempt: int,
    data_dir: str,
    folder: Path,
    mailbox: Any,
    environment: Mapping[str, str],
    platform: str,
) -> Verdict:
    """Runs a job in this process, a fresh worker; everything ends as a `Verdict`.

    Args:
      job: of the plan.
      attempt: number of this attempt at it.
      data_dir: the data store.
      folder: of the results.
      mailbox: actor of a `Mailbox`.
      environment: variables to be set before JAX is.
      platform: what JAX must run on.
    """
    os.environ.update(environment)
    import jax

    from offrl_jax.benchmark import provenance
    from offrl_jax.benchmark.executors import is_finished
    from offrl_jax.benchmark.jax_settings import configure_jax
    from offrl_jax.benchmark.jobs import JobFailed, Stopped, run_job

    host = socket.gethostname()
    try:
        if not plan_path(folder).is_file():
            return Verdict(
                "failed", f"{host} does not see {folder}; all nodes must share it"
            )
        with try_lock(lock_path(folder, job.run_id)) as ours:
            if not ours:
                return Verdict("held")
            if provenance.source_hash() != job.source_hash:
                return Verdict("failed", f"another offrl_jax is installed on {host}")
            try:
                configure_jax()
                backend = jax.default_backend()
            except RuntimeError as error:
                reason = str(error).splitlines()[0][:160]
                return Verdict("failed", f"JAX on {host} cannot start ({reason})")
            if backend != platform:
                return Verdict(
                    "failed",
                    f"JAX on {host} uses {backend} and no {platform}; "
                    "install the right extra there (see docs/install.md)",
                )
            with Link(mailbox, job, attempt, folder) as link:
                if link.stopped:  # while this process was starting
                    return Verdict("stopped")
                if is_finished(job, folder, link.say):
                    return Verdict("elsewhere")
                tasks = _load(job, data_dir, link.say)
                run_job(job, tasks, folder, link, lambda: link.stopped)
                return Verdict("done")
    except Stopped:
        return Verdict("stopped")
    except ResultsError as error:
        return Verdict("unwritable", str(error))
    except JobFailed as error:
        return Verdict("failed", str(error))
    except OffrlError as error:
        return Verdict("failed", f"{error} (on {host})")
    except MemoryError:
        return Verdict(
            "failed", f"no memory is left on {host}; end what else runs there"
        )
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return Verdict(
            "unwritable",
            f"{where}{error.strerror or error} (on {host}); mend that and run the same "
            "command again",
        )


def _load(job: Job, data_dir: str, say: Callable[[str], None]) -> dict[str, LoadedTask]:
    """The job's tasks from the store as this node sees it.

    Raises:
      DataError: they are absent here, damaged, or not those of the plan.
    """
    from offrl_jax.benchmark.runner import load_checked
    from offrl_jax.datasets.store import Store

    store = Store(data_dir)
    tasks = {name: load_checked(name, store, say) for name in job.datasets}
    for name, hashes in job.datasets.items():
        if tasks[name].dataset_hash != hashes["dataset_hash"]:
            raise DataError(
                f"{name}: the data in {data_dir} are not those of the plan; share one "
                "data store, or copy it"
            )
    return tasks
