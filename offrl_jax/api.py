"""What a notebook needs: train ten seeds, evaluate them, compare; in ten lines.

    import offrl_jax

    runs = offrl_jax.train("td3_bc@quick", "classic/pendulum-mixed-v0", updates=5_000)
    outcome = offrl_jax.evaluate(runs, episodes=50)
    print(outcome.scores.mean(), outcome.scores)   # normalised x100, one per seed

Everything lives in memory; `run_benchmark` is the way to results that are kept, resumed
and compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from offrl_jax import catalogue, leaderboard
from offrl_jax.agents.entry import resolve
from offrl_jax.agents.registry import get_entry, parse_label
from offrl_jax.benchmark import jax_settings, provenance, runner, suites
from offrl_jax.benchmark.planning import Split, wanted_jobs
from offrl_jax.benchmark.preparation import Prepared, prepare
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.suites import Protocol, Suite
from offrl_jax.catalogue import LoadedTask
from offrl_jax.datasets.store import Store, default_data_dir
from offrl_jax.errors import UsageError
from offrl_jax.evaluation import Evaluator
from offrl_jax.population import PopulationState
from offrl_jax.types import Agent, Spec

POINTS = 20
"""Points of the training curves that `train` records."""


class Runs(NamedTuple):
    """Trained policies of one agent on one task, one per seed.

    Attributes:
      task: the task with its data.
      prepared: agent, data and settings on the devices.
      state: the population after training.
      steps: `[points]`, updates of the policy phase at each point of the curves.
      metrics: per metric `[points, S]`, means over the updates since the point before.
      diverged: `[S]`, bool; a run whose numbers stopped being finite.
    """

    task: LoadedTask
    prepared: Prepared
    state: PopulationState
    steps: np.ndarray
    metrics: Mapping[str, np.ndarray]
    diverged: np.ndarray


class Outcome(NamedTuple):
    """An evaluation of `Runs`.

    Attributes:
      returns: `[S, episodes]`, float64, undiscounted.
      lengths: `[S, episodes]`, steps.
      successes: `[S, episodes]`, bool, or None where the task has no such criterion.
      scores: `[S]`, normalised x100 (NaN for a diverged run), or None where the task
        has no reference scores.
    """

    returns: np.ndarray
    lengths: np.ndarray
    successes: np.ndarray | None
    scores: np.ndarray | None


def make_agent(
    label: str, spec: Spec, *, family: str = "", **settings: Any
) -> tuple[Agent, Any]:
    """An agent's pure functions and its numeric settings.

    Args:
      label: `td3_bc`, or `td3_bc@quick` for a preset.
      spec: dimensions, as in `load_task(...).spec`.
      family: of the task; some agents have settings for whole families.
      **settings: any setting of the agent, structural or numeric.

    Returns:
      `(agent, hyper)`.

    Raises:
      UsageError: an unknown agent, preset or setting, a senseless value, or an agent
        that does not know actions of this kind.
    """
    name, preset = parse_label(label)
    entry = get_entry(name)
    if spec.discrete and not entry.on_policy:
        raise UsageError(
            f"{name} has a policy of continuous actions, and the task's are "
            "alternatives; choose an on-policy agent such as ppo"
        )
    config, hyper = resolve(entry, family=family, preset=preset, overrides=settings)
    return entry.make(config, spec), hyper


def load_task(task_id: str, data_dir: Path | str | None = None) -> LoadedTask:
    """A task with its data; the `classic` family is generated on first use.

    Raises:
      UsageError: no such task.
      DataError: its data is absent or damaged; the message says what to do.
    """
    return catalogue.load_task(task_id, _store(data_dir))


def train(
    label: str,
    task: LoadedTask | str,
    *,
    seeds: int = 10,
    updates: int = 100_000,
    data_dir: Path | str | None = None,
    **settings: Any,
) -> Runs:
    """Trains one agent on one task with many seeds, as one compiled program.

    Args:
      label: `td3_bc`, or `td3_bc@quick` for a preset.
      task: from `load_task`, or a task id.
      seeds: S; seeds 0 .. S-1.
      updates: of the policy phase.
      data_dir: data store of a task given by its id.
      **settings: any setting of the agent, structural or numeric.

    Raises:
      UsageError: an unknown name or a senseless value.
      DataError: the task's data is absent or damaged.
    """
    jax_settings.configure_jax()
    if isinstance(task, str):
        task = load_task(task, data_dir)
    suite = Suite("", "", (task.task.id,), (label,), "", seeds, updates, Protocol())
    devices = jax.local_devices()
    split = Split(len(devices), devices[0].platform)
    (job,) = wanted_jobs(suite, [task], split, provenance.source_hash(), settings)
    ready = prepare(job, {task.task.id: task})
    state = ready.population.init(ready.streams, ready.own_hyper)
    args = (ready.table, ready.task, ready.hyper)
    steps: list[int] = []
    curves: list[dict[str, np.ndarray]] = []
    for index, phase in enumerate(ready.agent.phases):
        if index:
            state = ready.population.next_phase(state)
        total = job.phase_updates[phase.name]
        last = index == len(ready.agent.phases) - 1
        step = 0
        while step < total:
            pause = max(1, total // POINTS // phase.stride) * phase.stride
            pause = min(pause, total - step)
            state, metrics = ready.population.run[index](state, *args, pause)
            step += pause
            if last:
                found = {name: np.asarray(m)[:seeds] for name, m in metrics.items()}
                curves.append(found)
                steps.append(step)
    return Runs(
        task,
        ready,
        state,
        np.array(steps),
        {name: np.stack([point[name] for point in curves]) for name in curves[0]},
        np.asarray(state.diverged_at)[:seeds] >= 0,
    )


def evaluate(runs: Runs, *, episodes: int = 100, seed: int = 0) -> Outcome:
    """Plays episodes with every trained policy.

    Args:
      runs: from `train`.
      episodes: per seed.
      seed: of the episodes.

    Raises:
      UsageError: the task has no environment.
    """
    ready = runs.prepared
    if not ready.envs:
        raise UsageError(
            f"task '{runs.task.task.id}' has no environment to evaluate in"
        )
    (env,) = ready.envs.values()
    evaluator = Evaluator(ready.agent.act, env, episodes, ready.population.mesh)
    found = evaluator(
        runs.state.agent, ready.hyper, ready.stats, ready.streams, seed, ~runs.diverged
    )
    reference, scores = runs.task.task.reference, None
    if reference is not None:
        scores = catalogue.episode_scores(
            reference, found.returns, found.successes
        ).mean(axis=1)
        scores = np.where(runs.diverged, np.nan, scores)
    return Outcome(found.returns, found.lengths, found.successes, scores)


def run_benchmark(
    suite: str,
    results: Path | str | None = None,
    *,
    data_dir: Path | str | None = None,
    **changes: Any,
) -> leaderboard.Leaderboard:
    """Runs what is missing of a suite and returns its leaderboard as plain data.

    Args:
      suite: name, or path of a TOML file.
      results: folder; default `results/SUITE`.
      data_dir: data store.
      **changes: any field of `offrl_jax.benchmark.suites.Suite`, such as `seeds=3`.

    Raises:
      OffrlError: for everything that the user can cause or cure.
    """
    jax_settings.configure_jax()
    chosen = dataclasses.replace(suites.load_suite(suite), **changes)
    folder = Path(results or Path("results") / chosen.name)
    with Progress() as progress:
        runner.run_suite(chosen, _store(data_dir), folder, progress)
    return leaderboard.build(folder)


def read_leaderboard(results: Path | str) -> leaderboard.Leaderboard:
    """The leaderboard of a results folder as plain data; runs nothing.

    Raises:
      ResultsError: the folder holds no rows, or rows that contradict each other.
    """
    return leaderboard.build(Path(results))


def _store(data_dir: Path | str | None) -> Store:
    return Store(default_data_dir(None if data_dir is None else Path(data_dir)))
