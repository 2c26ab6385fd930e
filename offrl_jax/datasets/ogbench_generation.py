"""Generates OGBench's datasets in processes, one file per trajectory, to be continued.

A trajectory depends on the dataset, the seed, the split and its number, and on nothing
else: neither on the number of processes nor on how often the work was interrupted.
Each is written whole or not at all to

  generated/ogbench/<dataset>/<hash>/<split>-<number>.npz

of the data folder, where the hash is that of everything else that it depends on.  When
all are there they become the dataset's tasks in the store.  The files stay: a later
call for more trajectories goes on from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from offrl_jax.datasets import ogbench_episodes
from offrl_jax.datasets.ogbench import (
    DATASETS,
    OFFICIAL_VALIDATION,
    Raw,
    concatenate,
    dataset_id,
    dataset_of,
    describe,
    hash_of,
    store_tasks,
    task_id,
)
from offrl_jax.datasets.store import SPLITS, Record, Store
from offrl_jax.envs.ogbench import Simulator, versions
from offrl_jax.envs.ogbench_specs import GOALS
from offrl_jax.errors import DataError, UsageError

VERSION = 1
"""Of the procedure: raised with every change that alters the data."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be generated.

    Attributes:
      name: a key of `DATASETS`.
      trajectories: of the training split; a tenth as many more are held out as `val`,
        as the authors do, none where that is less than one.
      seed: of all randomness.
      rows: of each trajectory.
    """

    name: str
    trajectories: int
    seed: int
    rows: int

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """Split and number of every trajectory, those of training first."""
        held_out = self.trajectories // OFFICIAL_VALIDATION
        counts = {"train": self.trajectories, "val": held_out}
        return [(split, i) for split in SPLITS for i in range(counts[split])]

    def entropy(self, split: str, number: int) -> tuple[int, ...]:
        """All that a trajectory's randomness comes from."""
        return (self.seed, zlib.crc32(self.name.encode()), SPLITS.index(split), number)

    def recipe(self) -> dict[str, Any]:
        """All that determines each trajectory, as JSON types."""
        found = versions()
        return {
            "generator": "offrl_jax.datasets.ogbench_generation",
            "version": VERSION,
            "dataset": dataset_id(self.name),
            "kind": DATASETS[self.name].kind,
            "rows": self.rows,
            "seed": self.seed,
            "constants": ogbench_episodes.constants(self.name),
            "ogbench": found["ogbench"],
            "mujoco": found["mujoco"],
        }

    def folder(self, store: Store) -> Path:
        """Where the trajectories lie until, and after, the dataset is stored."""
        parts = ("generated", "ogbench", self.name, hash_of(self.recipe())[:12])
        return store.path.joinpath(*parts)


def make_plan(
    any_id: str,
    trajectories: int | None = None,
    seed: int = 0,
    rows: int | None = None,
) -> Plan:
    """Checks a request.

    Args:
      any_id: of a dataset, or of one of its tasks.
      trajectories: of the training split; the authors' number if None.
      seed: of all randomness.
      rows: of each trajectory; the authors' number if None.

    Raises:
      UsageError: an unknown id, or a number that is too small.
    """
    name = dataset_of(any_id)
    trajectories = DATASETS[name].trajectories if trajectories is None else trajectories
    rows = DATASETS[name].rows if rows is None else rows
    for what, value, least in (
        ("trajectories", trajectories, 1),
        ("seed", seed, 0),
        ("rows", rows, 2),
    ):
        if value < least:
            raise UsageError(f"{what} must be at least {least}, got {value}")
    return Plan(name, trajectories, seed, rows)


def generate(
    plan: Plan,
    store: Store,
    processes: int = 1,
    tell: Callable[[int], None] = lambda done: None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Generates what is missing of a dataset and stores it as its five tasks.

    Args:
      plan: made by `make_plan`.
      store: where to.
      processes: how many work at once; the data do not depend on it.
      tell: is told how many of `plan.jobs` are done, at the start and after each.
      say: is told in a phrase what takes time besides.

    Returns:
      One line that says what was stored.

    Raises:
      UsageError: the package ogbench is absent or of another version; `processes` < 1.
      DataError: other data are stored already; it was interrupted (what is done is kept
        and the same call goes on); a file is damaged; the disk is full.
      OffrlError: the package's model files are absent or damaged.
    """
    if processes < 1:
        raise UsageError(f"processes must be at least 1, got {processes}")
    recipe = plan.recipe()
    whole = recipe | {"trajectories": plan.trajectories}
    stored = _stored(plan.name, store, whole)
    if stored is not None:
        return f"{describe(stored)} (there already)"
    folder = plan.folder(store)
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder / "recipe.json", json.dumps(recipe, indent=1))
        missing = [job for job in plan.jobs if not _path(folder, *job).is_file()]
        done = len(plan.jobs) - len(missing)
        tell(done)
        try:
            for number, _ in enumerate(_run(plan, folder, missing, processes), 1):
                tell(done + number)
        except (KeyboardInterrupt, BrokenProcessPool) as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else _KILLED
            kept = sum(_path(folder, *job).is_file() for job in plan.jobs)
            raise DataError(
                f"generation of {dataset_id(plan.name)} was {why}; {kept} of "
                f"{len(plan.jobs)} trajectories are kept: the same command goes on"
            ) from error
    parts: dict[str, list[Raw]] = {}
    for split, number in plan.jobs:
        raw = _read(_path(folder, split, number), plan)
        parts.setdefault(split, []).append(raw)
    source = {
        "kind": "regenerated by the authors' procedure, not the authors' files",
        "recipe": whole,
        "versions": versions(),
    }
    splits = {split: concatenate(part) for split, part in parts.items()}
    return describe(store_tasks(plan.name, store, splits, source, whole, say))


_KILLED = "cut short (a process was killed: is there memory for fewer --processes?)"


def _stored(name: str, store: Store, recipe: dict[str, Any]) -> list[Record] | None:
    """Records of all tasks if they are stored from this recipe, else None.

    Raises:
      DataError: a task is stored from something else.
    """
    found = []
    splits = (
        ("train", "val")
        if recipe["trajectories"] >= OFFICIAL_VALIDATION
        else ("train",)
    )
    for split in SPLITS:
        for goal in GOALS:
            one = task_id(name, goal)
            if not store.has(one, split):
                continue
            record = store.record(one, split)
            if record.source.get("recipe") != recipe:
                folders = store.folder(task_id(name, GOALS[0]), "train").parent
                others = str(folders).replace("task1", "task*")
                raise DataError(
                    f"{one} ({split}) is already in the store with other data "
                    f"({_in_words(record)}); remove {others} to replace it"
                )
            found.append(record)
    return found if len(found) == len(GOALS) * len(splits) else None


def _in_words(record: Record) -> str:
    recipe = record.source.get("recipe")
    if recipe is None:
        return str(record.source["kind"])
    return (
        f"{recipe['trajectories']} trajectories of {recipe['rows']} rows, seed "
        f"{recipe['seed']}, ogbench {recipe['ogbench']}, mujoco {recipe['mujoco']}"
    )


def _path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:06d}.npz"


def _run(
    plan: Plan, folder: Path, jobs: list[tuple[str, int]], processes: int
) -> Iterator[None]:
    """Does the jobs, yielding after each one."""
    if processes == 1 or len(jobs) <= 1:
        simulator = ogbench_episodes.make_simulator(plan.name) if jobs else None
        for job in jobs:
            assert simulator is not None
            _write_one(simulator, plan, folder, job)
            yield
        return
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)),
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(plan, folder),
    )
    try:
        for future in as_completed([pool.submit(_work, job) for job in jobs]):
            future.result()
            yield
    finally:
        # Trajectories that are begun are finished: seconds.
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}
"""What a process of the pool keeps from one trajectory to the next."""


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker(plan: Plan, folder: Path) -> None:
    # Ctrl-C reaches every process; the first one decides what is to be done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A first process that was killed tells nobody: the others would wait for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(plan=plan, folder=folder, simulator=None)


def _work(job: tuple[str, int]) -> None:
    # Here and not at the start of the process, where an error would say nothing.
    if _worker["simulator"] is None:
        _worker["simulator"] = ogbench_episodes.make_simulator(_worker["plan"].name)
    _write_one(_worker["simulator"], _worker["plan"], _worker["folder"], job)


def _write_one(
    simulator: Simulator, plan: Plan, folder: Path, job: tuple[str, int]
) -> None:
    """Generates a trajectory; its file appears whole, by one rename."""
    raw = ogbench_episodes.trajectory(
        simulator, plan.name, plan.rows, plan.entropy(*job)
    )
    path = _path(folder, *job)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **raw._asdict())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, plan: Plan) -> Raw:
    """A trajectory's file.

    Raises:
      DataError: it is damaged.
    """
    dataset = DATASETS[plan.name]
    widths = (dataset.spec.obs_dim, dataset.spec.action_dim, 0, dataset.qpos_dim)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            raw = Raw(*(archive[name] for name in Raw._fields))
        for array, width in zip(raw, (*widths, dataset.buttons), strict=True):
            shape = (plan.rows,) if array is raw.terminals else (plan.rows, width)
            if array.shape != shape:
                raise ValueError(f"shape {array.shape}, not {shape}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: damaged ({' '.join(str(error).split())}); remove it and run the "
            "same command again"
        ) from error
    return raw


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_text(text)
    partial.replace(path)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Errors of the disk in one line."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(_existing(folder)).free
        raise DataError(
            f"cannot write under {folder} ({error.strerror or error}; {free / 1e6:.0f} "
            "MB are free); what is done is kept: the same command goes on"
        ) from error


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
