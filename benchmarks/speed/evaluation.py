"""Environment steps per second: Gymnasium's vector environments against ours.

  python benchmarks/speed/evaluation.py --seconds 5 --repeats 5

Every contestant plays whole episodes of uniformly random actions and pays for its own
resets; only transitions count, not the resetting calls of Gymnasium's vector
environments.  Repeats of all contestants are interleaved, so that a passing load hits
all of them; the table shows medians.  Run it on an otherwise idle machine.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gymnasium
import mujoco
import numpy as np
import tyro
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from rich.console import Console
from rich.table import Table

Play = Callable[[float], float]
"""Plays for about that many seconds; returns transitions per second."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured and how long.

    Attributes:
      tasks: Gymnasium ids that `mujoco/<id>` knows.
      episodes: batch of ours, as many as an evaluation runs at once.
      vector_envs: sizes tried for Gymnasium's; 0 means one per core.
      seconds: length of one measurement.
      repeats: measurements of each contestant.
    """

    tasks: tuple[str, ...] = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5")
    episodes: int = 100
    vector_envs: tuple[int, ...] = (0, 16)
    seconds: float = 2.0
    repeats: int = 3


def _quiet_make(task: str) -> gymnasium.Env:
    # MuJoCo 4 warns of an attribute of Gymnasium's cheetah, once per process.
    getattr(mujoco, "set_mju_user_warning")(lambda message: None)  # noqa: B009
    return gymnasium.make(task)


def _play_gymnasium(env: VectorEnv, seconds: float) -> float:
    rng, n = np.random.default_rng(0), env.num_envs
    shape = env.action_space.shape
    assert shape is not None
    env.reset(seed=0)
    resetting, transitions = np.zeros(n, bool), 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        action = rng.uniform(-1, 1, shape).astype(np.float32)
        _, _, terminated, truncated, _ = env.step(action)
        # The call after an episode's end only resets and ignores the action.
        transitions += n - int(resetting.sum())
        resetting = terminated | truncated
    return transitions / (time.perf_counter() - start)


@contextmanager
def _gymnasium(
    kind: type[SyncVectorEnv] | type[AsyncVectorEnv], task: str, n: int
) -> Iterator[Play]:
    makers = [functools.partial(_quiet_make, task)] * n
    env = (
        AsyncVectorEnv(makers, context="spawn")
        if kind is AsyncVectorEnv
        else SyncVectorEnv(makers)
    )
    yield functools.partial(_play_gymnasium, env)
    env.close()


@contextmanager
def _ours(task: str, episodes: int, threads: int) -> Iterator[Play]:
    # Imported late: processes spawned by Gymnasium need not load JAX.
    from offrl_jax.envs.mujoco import MujocoEnv

    env = MujocoEnv(f"mujoco/{task}", threads)
    env.reset(np.arange(episodes))  # Allocates, as any second evaluation has.

    def play(seconds: float) -> float:
        rng, seed, transitions = np.random.default_rng(0), 0, 0
        start = time.perf_counter()
        elapsed = 0.0
        while elapsed < seconds:
            env.reset(np.arange(seed, seed + episodes))
            seed, active = seed + episodes, np.ones(episodes, bool)
            while active.any() and elapsed < seconds:
                shape = (episodes, env.spec.action_dim)
                action = rng.uniform(-1, 1, shape).astype(np.float32)
                step = env.step(action, active)
                transitions += int(active.sum())
                active &= ~(step.terminated | step.truncated)
                elapsed = time.perf_counter() - start
        return transitions / elapsed

    yield play
    env.close()


def measure(task: str, settings: Settings, cores: int) -> dict[str, float]:
    """Transitions per second by contestant: medians of interleaved repeats."""
    sizes = [n or cores for n in settings.vector_envs]
    contestants = {
        **{
            f"gymnasium {name} x{n}": functools.partial(_gymnasium, kind, task, n)
            for name, kind in (("sync", SyncVectorEnv), ("async", AsyncVectorEnv))
            for n in sizes
        },
        **{
            f"ours, {threads} threads": functools.partial(
                _ours, task, settings.episodes, threads
            )
            for threads in range(1, cores + 1)
        },
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(settings.repeats):
        for name, contestant in contestants.items():
            with contestant() as play:
                play(min(0.3, settings.seconds))
                rates[name].append(play(settings.seconds))
    return {name: float(np.median(values)) for name, values in rates.items()}


def main(settings: Settings) -> None:
    """Measures every task and prints the table with its conditions."""
    from offrl_jax.envs.mujoco import available_cores

    cores = available_cores()
    load_before = os.getloadavg()[0]
    results = {task: measure(task, settings, cores) for task in settings.tasks}
    table = Table(title="environment steps per second (median)")
    table.add_column("contestant")
    for task in results:
        table.add_column(task, justify="right")
    names = list(next(iter(results.values())))
    for name in names:
        table.add_row(name, *[f"{rates[name]:,.0f}" for rates in results.values()])
    ratios = [
        max(v for k, v in rates.items() if k.startswith("ours"))
        / max(v for k, v in rates.items() if k.startswith("gymnasium"))
        for rates in results.values()
    ]
    table.add_section()
    table.add_row("best of ours / best of gymnasium", *[f"{r:.2f}" for r in ratios])
    console = Console()
    console.print(table)
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("gymnasium", "mujoco", "numpy")
    )
    console.print(
        f"{cores} cores ({platform.machine()}), load before {load_before:.2f}, Python "
        f"{platform.python_version()}, {versions}; "
        f"{settings.episodes} episodes of ours, "
        f"{settings.repeats} x {settings.seconds:g} s each",
        soft_wrap=True,
    )


if __name__ == "__main__":
    # MuJoCo leaves its log file in the working directory.
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        main(tyro.cli(Settings, description=__doc__))
