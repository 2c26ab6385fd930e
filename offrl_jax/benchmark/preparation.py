"""A job made ready: agent, population and environments built, data on the devices."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from offrl_jax import envs
from offrl_jax.agents.registry import get_entry, parse_label
from offrl_jax.benchmark.planning import config_from_plain
from offrl_jax.catalogue import LoadedTask
from offrl_jax.collection import on_policy_collector
from offrl_jax.datasets.schema import Episodes, to_transitions
from offrl_jax.datasets.transforms import obs_stats, transform_reward
from offrl_jax.envs.base import HostEnv, PureEnv
from offrl_jax.evaluation import standardise
from offrl_jax.population import Population, make_mesh, make_population, place
from offrl_jax.results import Job
from offrl_jax.sources import (
    DataTable,
    Source,
    dataset_sampler,
    no_data,
    stack_tasks,
)
from offrl_jax.types import Agent, Hyper, ObsStats, Transitions


def prepare_task(
    episodes: Episodes, obs_transform: str, reward_transform: str
) -> tuple[Transitions, ObsStats]:
    """Transitions as the agent sees them, and the statistics its policy needs.

    Observations are standardised here, once, instead of in every batch.
    """
    stats = obs_stats(obs_transform, episodes.obs)
    reward = transform_reward(reward_transform, episodes)
    transitions = to_transitions(dataclasses.replace(episodes, reward=reward))
    return transitions._replace(
        obs=standardise(transitions.obs, stats),
        next_obs=standardise(transitions.next_obs, stats),
    ), stats


def prepare_tasks(
    tasks: Sequence[LoadedTask], obs_transform: str, reward_transform: str
) -> list[tuple[Transitions, ObsStats]]:
    """`prepare_task` of several tasks; what they share becomes the very same array.

    Goals of one dataset have equal observations and actions, and statistics of the
    observations are equal with them, so these are standardised once.
    """
    known: dict[str, np.ndarray] = {}
    shared: dict[tuple[int, int], tuple[Transitions, ObsStats]] = {}
    prepared = []
    for task in tasks:
        same = {
            name: known.setdefault(digest, getattr(task.train, name))
            for name, digest in task.array_hashes.items()
        }
        episodes = dataclasses.replace(task.train, **same)
        pair = id(episodes.obs), id(episodes.next_obs)
        transitions, stats = prepare_task(episodes, obs_transform, reward_transform)
        first, stats = shared.setdefault(pair, (transitions, stats))
        transitions = transitions._replace(obs=first.obs, next_obs=first.next_obs)
        prepared.append((transitions, stats))
    return prepared


class Prepared(NamedTuple):
    """A job ready to be run.

    Attributes:
      agent: pure functions.
      population: compiled on first use.
      table: data on the devices.
      task: `[M padded]`, index into the job's tasks, on the devices.
      hyper: leaves `[M padded]`, on the devices.
      own_hyper: leaves `[M]`, on the host.
      stats: leaves `[M, O]`.
      streams: `[M]`, uint32, what members and their episodes draw from: made of task
        and seed, so that equal seeds on two tasks are independent runs.
      envs: the environments, by id.
      evaluated_by: per environment id, the members (indices into `[M]`) it evaluates;
        members of a task without an environment are trained only.
    """

    agent: Agent
    population: Population
    table: DataTable
    task: Any
    hyper: Hyper
    own_hyper: Hyper
    stats: ObsStats
    streams: np.ndarray
    envs: dict[str, PureEnv | HostEnv]
    evaluated_by: dict[str, np.ndarray]


def stream(task_id: str, seed: int) -> int:
    """The 32 bits that all randomness of a run comes from, whatever the agent is."""
    sequence = np.random.SeedSequence([zlib.crc32(task_id.encode()), seed])
    return int(sequence.generate_state(1)[0])


def source_of(agent: Agent, tasks: Sequence[LoadedTask]) -> Source:
    """Where an agent's batches come from: the data, or the environment of the tasks."""
    if agent.collection is None:
        return dataset_sampler()
    (learns_in,) = {str(one.task.env_id) for one in tasks}
    return on_policy_collector(envs.make_pure(learns_in), agent.collection)


def prepare(job: Job, tasks: Mapping[str, LoadedTask]) -> Prepared:
    """Builds agent, population and data of a job, on its recorded number of devices."""
    entry = get_entry(parse_label(job.agent)[0])
    config = config_from_plain(entry.config, job.config)
    names = list(dict.fromkeys(member.task for member in job.members))
    loaded = [tasks[name] for name in names]
    agent = entry.make(config, loaded[0].spec)
    task = np.array([names.index(member.task) for member in job.members], np.int32)
    source = source_of(agent, loaded)
    if agent.collection is None:
        prepared = prepare_tasks(loaded, config.obs_transform, config.reward_transform)
        table = stack_tasks([transitions for transitions, _ in prepared])
        each = [stats for _, stats in prepared]
    else:
        table = no_data(loaded[0].spec, len(loaded))
        each = [obs_stats("none", one.train.obs) for one in loaded]
    stats = jax.tree.map(lambda *leaves: np.stack(leaves)[task], *each)
    hyper = entry.hyper(
        **{
            field.name: np.array(
                [member.hyper[field.name] for member in job.members], np.float32
            )
            for field in dataclasses.fields(entry.hyper)
        }
    )
    devices = jax.local_devices()[: job.split["devices"]]
    population = make_population(agent, source, len(job.members), make_mesh(devices))
    table, placed_task, placed_hyper = place(population, table, task, hyper)
    by_env: dict[str, list[int]] = {}
    for index, member in enumerate(job.members):
        env_id = tasks[member.task].task.env_id
        if env_id is not None:
            by_env.setdefault(env_id, []).append(index)
    return Prepared(
        agent,
        population,
        table,
        placed_task,
        placed_hyper,
        hyper,
        stats,
        np.array([stream(member.task, member.seed) for member in job.members]),
        {env_id: envs.make(env_id) for env_id in by_env},
        {env_id: np.array(members) for env_id, members in by_env.items()},
    )
