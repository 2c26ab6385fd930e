"""What the listing commands print: agents, tasks, data, doctor."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offrl_jax.agents.entry import AgentEntry
    from offrl_jax.benchmark.overview import Overview
    from offrl_jax.catalogue import Task


def _console() -> Console:
    """As wide as the terminal; wide enough for every table where there is none."""
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, markup=False, soft_wrap=True)


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column in right or column == columns[0],
        )
    return table


def _print_fitting(console: Console, wide: Table, narrow: Table) -> None:
    """The table with all columns where they fit, else the one with the main ones."""
    unbounded = console.options.update(max_width=10_000)
    fits = console.measure(wide, options=unbounded).maximum <= console.width
    console.print(wide if fits else narrow, soft_wrap=False)
    if not fits:
        console.print("(a wider terminal shows more columns)")


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
    console.print(table, soft_wrap=False)
    console.print("settings of one agent: offrl agents NAME")


def _one_agent(console: Console, entry: AgentEntry) -> None:
    console.print(f"{entry.title}  ({entry.reference})")
    table = _table("setting", "default", "allowed", "kind", right=("default",))
    base = {**entry.base.config, **entry.base.hyper}
    for kind, cls in (("structure", entry.config), ("number", entry.hyper)):
        for field in dataclasses.fields(cls):
            choices = " ".join(field.metadata.get("choices", ()))
            allowed = str(field.metadata.get("range", choices))
            default = base.get(field.name, field.default)
            table.add_row(field.name, _value(default), allowed, kind)
    console.print(table, soft_wrap=False)
    if base:
        console.print(f"defaults of its own: {' '.join(base)}  [{entry.base.source}]")
    for what, layers in (("preset", entry.presets), ("family", entry.families)):
        for name, layer in layers.items():
            values = {**layer.config, **layer.hyper}
            shown = " ".join(f"{key}={_value(one)}" for key, one in values.items())
            console.print(f"{what} {name}: {shown or 'the defaults'}  [{layer.source}]")
    console.print("numbers are traced: sweeping them never recompiles")


def _value(value: object) -> str:
    """A setting's value as `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def tasks(store: Store, part: str | None) -> None:
    """All tasks, with what to do for those whose data is absent."""
    from offrl_jax.catalogue import (
        is_online,
        is_present,
        known_tasks,
        listed_as,
    )
    from offrl_jax.datasets.getting import how_to_get

    console = _console()
    # The five goals of an OGBench dataset share a line.
    found = {
        listed_as(task): task
        for task in reversed(known_tasks(store))
        if part is None or part in task.id or part in listed_as(task)
    }
    if not found:
        raise UsageError(
            f"no task has '{part}' in its id; all are shown by: offrl tasks"
        )
    right = ("obs", "act", "horizon")
    columns = ("task", *right, "scored", "data")
    wide = _table(*columns, "about", right=right)
    narrow = _table(*columns, right=right)
    absent = []
    for name, task in reversed(found.items()):
        present = is_present(task.id, store)
        if not present and task.family != "classic":
            absent.append(task.id)
        data = "present" if present else "absent" if task.id in absent else "on use"
        row = (
            name,
            str(task.spec.obs_dim),
            str(task.spec.action_dim),
            str(task.spec.horizon),
            _scored(task),
            "none" if is_online(task.id) else data,
        )
        wide.add_row(*row, task.description)
        narrow.add_row(*row)
    _print_fitting(console, wide, narrow)
    console.print()
    console.print("scored: 0-100 by reference; as raw return; or -, train only")
    console.print(
        "data: present; generated on use; absent; or none, for agents that act"
    )
    if absent:
        console.print(how_to_get(absent[0]))
    if absent[1:]:
        others = "the other one" if len(absent) == 2 else f"the other {len(absent) - 1}"
        console.print(f"and so for {others}, each with its own data")
    if any(task.family == "ogbench" for task in found.values()):
        goals = "-singletask-task1-v0 to -singletask-task5-v0"
        console.print(f"ogbench/NAME-v0 are five tasks: ogbench/NAME{goals}")
    console.print(f"data store: {store.path}")


def _scored(task: Task) -> str:
    if task.env_id is None:
        return "-"
    return "0-100" if task.reference else "return"


def plan(seen: Overview) -> None:
    """The populations that a suite would train, in their order."""
    from offrl_jax.benchmark.memory import in_words
    from offrl_jax.benchmark.progress import duration

    console = _console()
    right = ("settings", "runs", "updates", "devices", "memory", "done", "time")
    table = _table("agent", "tasks", "seeds", *right, right=right)
    for each in seen.populations:
        job = each.job
        tasks = list(dict.fromkeys(member.task for member in job.members))
        seeds = sorted({member.seed for member in job.members})
        settings = {member.setting for member in job.members}
        table.add_row(
            job.agent + (f" ({each.number}/{each.of})" if each.of > 1 else ""),
            tasks[0] if len(tasks) == 1 else f"{tasks[0]} and {len(tasks) - 1} more",
            _ranges(seeds),
            str(len(settings)),
            str(len(job.members)),
            " + ".join(f"{one:,}" for one in job.phase_updates.values()),
            str(job.split["devices"]),
            "unknown" if each.bytes is None else in_words(each.bytes),
            f"{100 * each.done:.0f}%",
            "unknown" if each.seconds is None else duration(each.seconds),
        )
    if seen.populations:
        console.print(table, soft_wrap=False)
        console.print()
    for line in seen.said:
        console.print(line)
    whose = "in all" if seen.shared else "per device"
    limit = "unknown" if seen.memory is None else in_words(seen.memory)
    console.print(f"devices: {seen.device}; memory to use {whose}: {limit}")
    known = [one.seconds for one in seen.populations if one.seconds is not None]
    unknown = len(seen.populations) - len(known)
    time = f"about {duration(sum(known))}" if known else ""
    if unknown:
        time += (" and " if known else "") + f"{unknown} jobs of unknown duration"
    left = f"{len(seen.populations)} jobs to run" + (f", {time}" if time else "")
    console.print(
        f"{seen.suite}: {seen.finished} of {seen.runs} runs are done in {seen.folder}; "
        + (left if seen.populations else "nothing to run")
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def data_list(store: Store) -> None:
    """The datasets of the store."""
    console = _console()
    records = store.records()
    if not records:
        console.print(f"the data store {store.path} is empty; see: offrl tasks")
        return
    counts = ("transitions", "episodes")
    returns = ("return mean", "min", "max")
    right = (*counts, "terminated", *returns)
    wide = _table("task", "split", *right, "sha256", right=right)
    narrow = _table("task", "split", *counts, "return mean", right=right)
    for record in records:
        first = (
            record.task_id,
            record.split,
            f"{record.transitions:,}",
            f"{record.episodes:,}",
        )
        mean = f"{record.return_mean:.1f}"
        wide.add_row(
            *first,
            f"{record.terminated_episodes:,}",
            mean,
            f"{record.return_min:.1f}",
            f"{record.return_max:.1f}",
            record.dataset_hash[:12],
        )
        narrow.add_row(*first, mean)
    _print_fitting(console, wide, narrow)
    console.print(f"data store: {store.path}")


def data_prepare(store: Store, names: tuple[str, ...]) -> None:
    """Generates the named tasks, or the whole classic family."""
    from offrl_jax.benchmark.progress import Progress
    from offrl_jax.catalogue import (
        get_task,
        is_online,
        known_tasks,
        load_task,
    )
    from offrl_jax.datasets.getting import how_to_get

    chosen = names or tuple(t.id for t in known_tasks(store) if t.family == "classic")
    for name in chosen:  # so that a wrong name costs no minutes of generating
        get_task(name, store)
    with Progress() as progress:
        progress.begin_all("preparing data", len(chosen))
        for name in chosen:
            loaded = load_task(name, store, progress=progress.say)
            count = f"{name}: {len(loaded.train):,} transitions to train on"
            progress.say(how_to_get(name) if is_online(name) else count)
            progress.advance_all(1)


def data_generate(
    store: Store,
    dataset: str,
    trajectories: int | None,
    seed: int,
    processes: int | None,
) -> None:
    """Generates a dataset of OGBench and says what was stored."""
    from offrl_jax.benchmark.progress import Progress
    from offrl_jax.datasets.ogbench_generation import generate, make_plan
    from offrl_jax.envs.mujoco import available_cores

    plan = make_plan(dataset, trajectories, seed)
    total = len(plan.jobs)
    begun = False
    with Progress() as progress:

        def tell(done: int) -> None:
            nonlocal begun
            if not begun:
                progress.begin(plan.name, total, done)
            progress.update(done, f"{done} of {total} trajectories")
            begun = True

        workers = available_cores() if processes is None else processes
        line = generate(plan, store, workers, tell, progress.say)
        progress.end(line)


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

    from offrl_jax.benchmark.jax_settings import cache_folder
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
    for what, folder, cure in (
        ("compilation cache", cache_folder(), "set JAX_COMPILATION_CACHE_DIR"),
        ("data store", store.path, "set OFFRL_DATA"),
    ):
        console.print(f"{what}: {folder}")
        if not os.access(_existing_parent(folder), os.W_OK):
            missing.append(f"{what} {folder} is not writable; {cure}")
    try:
        console.print(f"  {len(store.records())} datasets")
    except DataError as error:
        missing.append(str(error))
    for name in known_suites():
        absent = [
            task
            for task in load_suite(name).tasks
            if not task.startswith("classic/") and not is_present(task, store)
        ]
        state = f"needs data of {', '.join(absent)}" if absent else "ready"
        console.print(f"suite {name}: {state}")
    for line in missing:
        console.print(f"missing: {line}")
    if not missing:
        console.print("everything that is needed is here")


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def _existing_parent(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
