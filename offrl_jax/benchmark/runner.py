"""A suite from request to rows: load tasks, plan what is missing, run it, tell."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np

from offrl_jax.benchmark import provenance, speeds
from offrl_jax.benchmark.executors import Executor, LocalExecutor
from offrl_jax.benchmark.memory import check_given
from offrl_jax.benchmark.overview import (
    Limits,
    Overview,
    Planner,
    env_of,
    member_updates,
    overview,
    speed_table,
    work,
)
from offrl_jax.benchmark.planning import agent_labels, check_request
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.selection import chosen, other_data
from offrl_jax.benchmark.suites import Suite
from offrl_jax.catalogue import (
    LoadedTask,
    Task,
    get_task,
    is_online,
    is_present,
    load_task,
    normalised_score,
    peek_task,
)
from offrl_jax.datasets.getting import how_to_get
from offrl_jax.datasets.schema import episode_returns
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, UsageError
from offrl_jax.results import (
    BEHAVIOUR,
    Row,
    RowFile,
    lock,
    lock_path,
    note_command,
    read_plan,
    read_rows,
    row_path,
    write_plan,
)

NO_LIMITS = Limits()
PLAN_SECONDS = 300.0
"""Longest wait for others that plan in the same folder: an array of jobs, say."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
      ran: jobs finished now.
      already: runs of the request that were finished before.
      failed: per failed job, one line.
      busy: run ids that another process is working on.
      stopped: whether the user asked to stop before the end.
    """

    ran: int
    already: int
    failed: tuple[str, ...]
    busy: tuple[str, ...]
    stopped: bool


def find_tasks(
    suite: Suite, store: Store, say: Callable[[str], None], skip_missing: bool
) -> list[Task]:
    """The suite's tasks whose data is at hand or can be generated; loads nothing.

    Raises:
      UsageError: a task has no environment.
      DataError: a task's data is absent and `skip_missing` is false; tells for every
        such task which file to put where.
    """
    found: list[Task] = []
    absent: list[str] = []
    for name in suite.tasks:
        try:
            task = get_task(name, store)
        except DataError:
            if is_present(name, store):  # there, but damaged
                raise
            absent.append(how_to_get(name))
            continue
        if task.env_id is None:
            raise UsageError(
                f"task '{task.id}' has no environment to evaluate in, so it cannot be "
                "benchmarked; offrl_jax.train trains on it"
            )
        if task.family == "classic" or is_present(name, store):
            found.append(task)
        else:
            absent.append(how_to_get(name))
    if absent:
        what = "; ".join(absent)
        if not found:
            raise DataError(what)
        if not skip_missing:
            raise DataError(f"{what}; or run the rest with --skip-missing")
        say(f"left out: {what}")
    return found


def load_checked(task_id: str, store: Store, say: Callable[[str], None]) -> LoadedTask:
    """A task whose stored arrays are what their checksums say.

    Raises:
      DataError: they are not.
    """
    task = load_task(task_id, store, progress=say)
    if is_online(task_id):
        return task
    problem = store.check(task_id, "train").problem
    if problem is not None:
        raise DataError(f"{task_id}: {problem}")
    return task


def behaviour_row(task: LoadedTask, suite: Suite) -> Row:
    """The dataset's own episodes as a row: the context of every table."""
    returns = episode_returns(task.train)
    reference = task.task.reference
    score = None
    # Recorded episodes have returns alone: of success rates the data have no score.
    if reference is not None and reference.of == "return":
        score = float(np.mean(normalised_score(reference, returns)))
    digest = hashlib.sha256(f"{task.task.id} {task.dataset_hash}".encode()).hexdigest()
    return Row(
        run_id=f"{BEHAVIOUR}-{digest[:10]}",
        suite=suite.name,
        role="test",
        agent=BEHAVIOUR,
        config={},
        setting="dataset",
        hyper={},
        task=task.task.id,
        family=task.task.family,
        recipe_hash=task.recipe_hash,
        dataset_hash=task.dataset_hash,
        seed=None,
        step=0,
        updates_total=0,
        phase_updates={},
        protocol={},
        returns=returns.tolist(),
        lengths=task.train.lengths.tolist(),
        successes=None,
        score=score,
        status="ok",
        split_changed=False,
        updates_per_s=None,
        wall_s=None,
        compile_s=None,
        eval_s=None,
        device=provenance.device(),
        flags={},
        versions=provenance.versions(),
        commit=provenance.commit(),
        population={},
    )


@contextmanager
def _stop_on_interrupt(progress: Progress) -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop after the current chunk; a second one stops at once."""
    asked = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread hears signals
        return

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        del frame
        if asked:
            raise KeyboardInterrupt
        asked = True
        progress.say("stopping after this chunk; nothing will be lost")

    before = {
        number: signal.signal(number, handle)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_suite(
    suite: Suite,
    store: Store,
    folder: Path,
    progress: Progress,
    *,
    skip_missing: bool = False,
    limits: Limits = NO_LIMITS,
    overrides: Mapping[str, str] | None = None,
    executor: AbstractContextManager[Executor] | None = None,
    command: Sequence[str] = (),
) -> Outcome:
    """Runs what is missing of `suite` in the results folder `folder`.

    Args:
      suite: what is asked for.
      store: of datasets.
      folder: of results; created if need be.
      progress: entered already.
      skip_missing: leave out tasks whose data is absent, instead of refusing.
      limits: of populations.
      overrides: settings for every agent, as strings (`--set`).
      executor: what runs the jobs, entered here; default this process.
      command: words to be written down as what asked for the new runs.

    Raises:
      OffrlError: for everything a user can cause; see the classes.
    """
    agent_labels(suite)  # an unknown agent is told before absent data
    found = find_tasks(suite, store, progress.say, skip_missing)
    _check(suite, found, limits, overrides)
    suite = chosen(suite, progress.say)
    with executor or nullcontext(LocalExecutor()) as running:
        planner = _planner(
            suite, found, store, folder, progress, limits, overrides, running
        )
        return _plan_and_run(planner, suite, store, folder, progress, running, command)


def _planner(
    suite: Suite,
    found: Sequence[Task],
    store: Store,
    folder: Path,
    progress: Progress,
    limits: Limits,
    overrides: Mapping[str, str] | None,
    executor: Executor,
) -> Planner:
    """The planner of the loaded tasks, memory estimated."""
    tasks = [load_checked(task.id, store, progress.say) for task in found]
    for line in other_data(suite.choices, tasks):
        progress.say(line)
    machine = executor.machine(limits.memory_gib)
    planner = Planner(suite, tasks, limits, machine, overrides)
    # Memory is estimated before the lock is taken, for that takes a while.
    planner.plan(read_plan(folder), read_rows(folder, _silent), _silent)
    return planner


def _plan_and_run(
    planner: Planner,
    suite: Suite,
    store: Store,
    folder: Path,
    progress: Progress,
    executor: Executor,
    command: Sequence[str],
) -> Outcome:
    with lock(lock_path(folder, "plan"), PLAN_SECONDS):
        rows = read_rows(folder, progress.say)
        plan, jobs = planner.plan(read_plan(folder), rows, progress.say)
        write_plan(folder, plan)
        note_command(
            folder,
            command,
            provenance.commit(),
            (job.run_id for job in jobs),
            progress.say,
        )
        for task in planner.tasks.values():
            if is_online(task.task.id):
                continue
            row = behaviour_row(task, suite)
            with RowFile(row_path(folder, row.run_id), progress.say) as file:
                if row.key not in file.row_ids:
                    file.append(row)
    by_id = dict(planner.tasks)
    for name in {task for job in jobs for task in job.datasets} - set(by_id):
        # A job that was begun is finished whole, tasks that are not asked for included.
        by_id[name] = load_checked(name, store, progress.say)
    asked = sum(len(job.members) for job in planner.wanted)
    open_runs = sum(len(job.members) for job in jobs)
    amounts = {job.run_id: work(job, folder) for job in jobs}
    everything = member_updates(planner.wanted)
    finished = everything - sum(amount.total for amount in amounts.values())
    progress.begin_jobs(amounts, max(0.0, finished))
    with _stop_on_interrupt(progress) as stop:
        done = executor.run(jobs, by_id, folder, progress, stop)
    if done.ran:
        ids = {job.run_id for job in jobs}
        new = [row for row in read_rows(folder, _silent) if row.run_id in ids]
        speeds.keep(speed_table(), speeds.of_rows(new, env_of(by_id)))
    already = max(0, asked - open_runs) + done.elsewhere
    return Outcome(done.ran, already, done.failed, done.busy, done.stopped)


def look_ahead(
    suite: Suite,
    store: Store,
    folder: Path,
    *,
    skip_missing: bool = False,
    limits: Limits = NO_LIMITS,
    overrides: Mapping[str, str] | None = None,
    executor: AbstractContextManager[Executor] | None = None,
) -> Overview:
    """What `run_suite` would do; makes no data and writes nothing.

    Args:
      suite: what is asked for.
      store: of datasets; a task whose data are not there yet is planned without.
      folder: of results; need not exist.
      skip_missing: as in `run_suite`.
      limits: of populations.
      overrides: as in `run_suite`.
      executor: as in `run_suite`.

    Raises:
      OffrlError: as `run_suite`.
    """
    agent_labels(suite)
    said: list[str] = []
    found = find_tasks(suite, store, said.append, skip_missing)
    _check(suite, found, limits, overrides)
    suite = chosen(suite, said.append)
    tasks = [peek_task(task.id, store) for task in found]
    waiting = [one.task.id for one in tasks if _is_to_be_made(one)]
    if waiting:
        said.append(
            f"data made on use, not counted in the memory: {', '.join(waiting)}"
        )
    with executor or nullcontext(LocalExecutor()) as running:
        machine = running.machine(limits.memory_gib)
    planner = Planner(suite, tasks, limits, machine, overrides)
    rows = read_rows(folder, said.append)
    seen = overview(suite, planner, read_plan(folder), rows, folder)
    return dataclasses.replace(seen, said=(*said, *seen.said))


def _is_to_be_made(task: LoadedTask) -> bool:
    return task.dataset_hash is None and not is_online(task.task.id)


def _check(
    suite: Suite,
    found: Sequence[Task],
    limits: Limits,
    overrides: Mapping[str, str] | None,
) -> None:
    check_given(limits.memory_gib)
    families = [task.family for task in found]
    check_request(suite, families, overrides or {}, limits.max_parallel, limits.waves)


def _silent(line: str) -> None:
    """Takes messages that were or will be told."""
