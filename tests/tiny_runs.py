"""A suite of several tiny jobs, run in processes that may be killed at any time."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401  what a new process must not import once more
import ray_work

from offrl_jax import envs
from offrl_jax.benchmark import jobs, ray_executor
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.runner import run_suite
from offrl_jax.benchmark.suites import Protocol, Suite
from offrl_jax.cli.options import Where
from offrl_jax.datasets.schema import Episodes
from offrl_jax.datasets.store import Store
from offrl_jax.errors import OffrlError
from offrl_jax.results import BEHAVIOUR, read_metrics, read_rows

SUITE = Suite(
    name="tiny",
    description="",
    tasks=("local/tiny-a-v0", "local/tiny-b-v0"),
    agents=("bc", "td3_bc"),
    preset="quick",
    seeds=2,
    updates=120,
    protocol=Protocol(episodes=3, evaluations=3, curve_episodes=2),
    # Three structures: three jobs.
    settings={
        "bc": {
            "narrow": {"hidden": [8, 8], "batch_size": 16},
            "flat": {"hidden": [8], "batch_size": 16},
        },
        "td3_bc": {"default": {"hidden": [8, 8], "batch_size": 16}},
    },
)
JOBS = 3
MEMBERS = 4
"""Of each job: two tasks, two seeds."""
DONE, FAILED, RESULTS, BUSY, STOPPED = 0, 1, 4, 5, 130


def pendulum_episodes(seed: int, episodes: int = 3) -> Episodes:
    """Random torques in our own pendulum."""
    env = envs.make("classic/pendulum-v0")
    key = jax.random.key(seed)

    def one(key):
        reset_key, action_key = jax.random.split(key)
        state, obs = env.reset(reset_key)
        actions = jax.random.uniform(action_key, (200, 1), minval=-1.0, maxval=1.0)

        def step(carry, action):
            state, obs = carry
            state, out = env.step(state, action)
            return (state, out.obs), (obs, action, out.reward, out.obs)

        return jax.lax.scan(step, (state, obs), actions)[1]

    parts = jax.vmap(one)(jax.random.split(key, episodes))
    obs, action, reward, next_obs = (
        np.asarray(x).reshape(episodes * 200, *x.shape[2:]) for x in parts
    )
    truncated = np.arange(episodes * 200) % 200 == 199
    return Episodes(obs, action, reward, next_obs, np.zeros_like(truncated), truncated)


def write_store(folder: Path, names: Sequence[str] = SUITE.tasks) -> Store:
    """Datasets of the pendulum, by default those of the suite, each its own."""
    store = Store(folder)
    for number, name in enumerate(names):
        store.write(
            name,
            "train",
            pendulum_episodes(number),
            source={"kind": "own file", "file": "made by the test"},
            info={"env_id": "classic/pendulum-v0"},
        )
    return store


def as_toml(suite: Suite) -> str:
    """A file of `suite`, for the command line; JSON's strings and lists are TOML's."""
    lines = [
        f"{name} = {json.dumps(getattr(suite, name))}"
        for name in ("name", "description", "tasks", "agents", "preset", "seeds")
    ]
    lines.append(f"updates = {suite.updates}")
    lines.append("[protocol]")
    for name, value in dataclasses.asdict(suite.protocol).items():
        lines.append(f"{name} = {value}")
    for agent, named in suite.settings.items():
        for setting, entries in named.items():
            lines.append(f"[settings.{agent}.{setting}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in entries.items()]
    return "\n".join(lines) + "\n"


def contents(folder: Path) -> dict[tuple, str]:
    """Identity of every row, the run id included, by run, task, seed and step.

    Fails where a row is there twice.
    """
    lines = [
        line
        for path in folder.glob("rows/*.jsonl")
        for line in path.read_bytes().splitlines()
    ]
    rows = read_rows(folder, lambda line: None)
    assert len(lines) == len(rows)
    return {
        (row.agent, row.setting, row.task, row.seed, row.step): row.row_id
        for row in rows
        if row.agent != BEHAVIOUR
    }


def points(folder: Path) -> dict[tuple, dict[str, float]]:
    """Recorded metrics by what they are about."""
    return {
        (point.agent, *point.key[1:]): dict(point.values)
        for point in read_metrics(folder)
    }


def command(
    data: Path,
    folder: Path,
    cache: Path,
    often: bool = False,
    wait: bool = False,
    largest: int | None = None,
    ray: Mapping[str, str] | None = None,
    suite: Suite = SUITE,
) -> None:
    """The whole of a process: `offrl benchmark` without its leaderboard.

    With `often` a chunk is one update, and several checkpoints are saved a second.
    `largest` is the size in bytes beyond which no file can grow, as on a full disk.
    `ray` are the variables of Ray with which its workers run the jobs.
    """
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_NUM_CPU_DEVICES"] = "2"
    for name, value in (
        ("jax_platforms", "cpu"),
        ("jax_num_cpu_devices", 2),
        ("jax_compilation_cache_dir", str(cache)),
    ):
        jax.config.update(name, value)
    with (folder.parent / f"{folder.name}.{os.getpid()}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(ray or {})
    where, store = Where("ray" if ray else "local", wait=wait), Store(data)
    where.configure_jax()
    if often:
        jobs.FIRST_CHUNK, jobs.CHUNK_SECONDS, jobs.CHECKPOINT_SECONDS = 1, 0.0, 0.3
        ray_executor.work = ray_work.work
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        with Progress() as progress:
            found = run_suite(
                suite, store, folder, progress, executor=where.open(store)
            )
    except OffrlError as error:
        print(f"offrl: {error}", flush=True)
        raise SystemExit(error.exit_code) from None
    print(found, flush=True)
    if found.stopped:
        raise SystemExit(STOPPED)
    raise SystemExit(FAILED if found.failed else BUSY if found.busy else DONE)


def log(folder: Path, process: multiprocessing.process.BaseProcess) -> str:
    """What a process said."""
    return (folder.parent / f"{folder.name}.{process.pid}.log").read_text()


def start(*args: object, **options: object) -> multiprocessing.process.BaseProcess:
    """`command` in a new process, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_runs"])
    process = context.Process(target=command, args=args, kwargs=options)
    process.start()
    return process
