"""What the listing commands print: agents, tasks, data, doctor."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from offrl_jax.datasets.store import Store


def _console() -> Console:
    """As wide as the terminal; wide enough not to wrap ids where there is none."""
    width = None if sys.stdout.isatty() else 120
    return Console(width=width, highlight=False, markup=False)


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column in right or column == columns[0],
        )
    return table


def agents(name: str | None) -> None:
    """All agents, or every setting of one."""
    from offrl_jax.agents.registry import REGISTRY, get_entry

    console = _console()
    if name is not None:
        _one_agent(console, get_entry(name))
        return
    table = _table("agent", "title", "reference", "presets")
    for entry in REGISTRY.values():
        table.add_row(
            entry.name, entry.title, entry.reference, ", ".join(entry.presets)
        )
    console.print(table)
    console.print("settings of one agent: offrl agents NAME")


def _one_agent(console: Console, entry: Any) -> None:
    console.print(f"{entry.title}  ({entry.reference})")
    table = _table("setting", "default", "allowed", "kind", right=("default",))
    for kind, cls in (("structure", entry.config), ("number", entry.hyper)):
        for field in dataclasses.fields(cls):
            allowed = field.metadata.get("range", "")
            table.add_row(field.name, str(field.default), str(allowed), kind)
    console.print(table)
    for what, layers in (("preset", entry.presets), ("family", entry.families)):
        for name, layer in layers.items():
            values = {**layer.config, **layer.hyper}
            shown = ", ".join(f"{key}={value}" for key, value in values.items())
            console.print(f"{what} {name}: {shown or 'the defaults'}  [{layer.source}]")
    console.print("numbers are traced: sweeping them never recompiles")


def tasks(store: Store, part: str | None) -> None:
    """All tasks, with what to do for those whose data is absent."""
    from offrl_jax.catalogue import how_to_get, is_present, known_tasks

    console = _console()
    found = [task for task in known_tasks(store) if part is None or part in task.id]
    if not found:
        console.print(f"no task has '{part}' in its id")
        return
    right = ("obs", "act", "horizon")
    table = _table("task", *right, "scored", "data", "about", right=right)
    todo = []
    for task in found:
        present = is_present(task.id, store)
        generated = task.family == "classic"
        if not present and not generated:
            todo.append(how_to_get(task.id))
        table.add_row(
            task.id,
            str(task.spec.obs_dim),
            str(task.spec.action_dim),
            str(task.spec.horizon),
            "yes"
            if task.env_id and task.reference
            else "return"
            if task.env_id
            else "-",
            "present" if present else "generated on use" if generated else "absent",
            task.description,
        )
    console.print(table)
    for line in todo:
        console.print(line)
    console.print(f"data store: {store.path}")


def data_list(store: Store) -> None:
    """The datasets of the store."""
    console = _console()
    records = store.records()
    if not records:
        console.print(f"the data store {store.path} is empty; see: offrl tasks")
        return
    right = ("transitions", "episodes", "terminated", "return mean", "min", "max")
    table = _table("task", "split", *right, "sha256", right=right)
    for record in records:
        table.add_row(
            record.task_id,
            record.split,
            f"{record.transitions:,}",
            f"{record.episodes:,}",
            f"{record.terminated_episodes:,}",
            f"{record.return_mean:.1f}",
            f"{record.return_min:.1f}",
            f"{record.return_max:.1f}",
            record.dataset_hash[:12],
        )
    console.print(table)
    console.print(f"data store: {store.path}")


def data_prepare(store: Store, names: tuple[str, ...]) -> None:
    """Generates the named tasks, or the whole classic family."""
    from offrl_jax.benchmark.progress import Progress
    from offrl_jax.catalogue import known_tasks, load_task

    chosen = names or tuple(t.id for t in known_tasks(store) if t.family == "classic")
    with Progress() as progress:
        progress.begin_all("preparing data", len(chosen))
        for name in chosen:
            loaded = load_task(name, store, progress=progress.say)
            progress.say(f"{name}: {len(loaded.train):,} transitions to train on")
            progress.advance_all(1)


def data_check(store: Store) -> int:
    """Checks every dataset; 0 if all are whole, else 3."""
    console = _console()
    results = store.check_all()
    for result in results:
        state = result.problem or "whole"
        console.print(f"{result.task_id} {result.split}: {state}")
    bad = sum(result.problem is not None for result in results)
    console.print(f"{len(results)} datasets checked, {bad} damaged")
    return 3 if bad else 0


def data_import(store: Store, file: Path, task_id: str, split: str | None) -> None:
    """Imports a file and says what it was."""
    from offrl_jax.datasets.importing import import_file

    _console().print(import_file(file, task_id, store, split=split))


def doctor(store: Store) -> None:
    """Versions, devices, data, and what is missing."""
    import jax

    from offrl_jax.benchmark.runner import cache_folder
    from offrl_jax.benchmark.suites import known_suites, load_suite
    from offrl_jax.catalogue import is_present

    console = _console()
    names = ("offrl-jax", "jax", "jaxlib", "flax", "optax", "chex", "distrax")
    names += ("orbax-checkpoint", "minari", "gymnasium", "mujoco", "numpy")
    console.print(f"python {platform.python_version()} on {platform.platform()}")
    missing = []
    for name in names:
        try:
            console.print(f"  {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"package {name} is not installed; run: make install")
    devices = jax.local_devices()
    console.print(f"devices: {len(devices)} x {devices[0].device_kind}")
    if devices[0].platform == "cpu" and _has_nvidia():
        missing.append(
            "an NVIDIA GPU is here but JAX does not see it; run: make clean install"
        )
    console.print(f"compilation cache: {cache_folder()}")
    writable = os.access(_existing_parent(store.path), os.W_OK)
    console.print(f"data store: {store.path}, {len(store.records())} datasets")
    if not writable:
        missing.append(f"data store {store.path} is not writable; set OFFRL_DATA")
    for name in known_suites():
        suite = load_suite(name)
        absent = [
            task
            for task in suite.tasks
            if not task.startswith("classic/") and not is_present(task, store)
        ]
        state = f"needs data of {', '.join(absent)}" if absent else "ready"
        console.print(f"suite {name}: {state}")
    for line in missing:
        console.print(f"missing: {line}")
    console.print("nothing is missing" if not missing else f"{len(missing)} missing")


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def _existing_parent(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
