"""What a task id means: dataset, environment, horizon, reference scores, provenance.

A task id says family and version, `classic/pendulum-mixed-v0`.  Families are never
averaged together: `classic` is generated here, `neorl2` are the official files,
`ogbench` are regenerated ones or official files, `minari` and `local` are whatever the
user put into the store.  Tasks of the family `online` have no data: on-policy agents
act in the environment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from offrl_jax import envs
from offrl_jax.datasets import classic, minari_io, neorl2, ogbench, reference, schema
from offrl_jax.datasets.getting import how_to_get
from offrl_jax.datasets.schema import Episodes
from offrl_jax.datasets.store import Record, Store
from offrl_jax.envs import ogbench_specs
from offrl_jax.errors import DataError, unknown_name
from offrl_jax.results import ONLINE
from offrl_jax.types import Spec

FAMILIES = ("classic", "neorl2", "ogbench", "minari", "local", ONLINE)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Returns that mean 0 and 100: `score = 100 (R - minimum) / (maximum - minimum)`.

    Attributes:
      minimum: undiscounted return of score 0.
      maximum: undiscounted return of score 100.
      source: who published the two numbers, or how they were measured.
      of: `return`, or `success`: an episode counts 1 if it succeeded, else 0, in the
        place of its return.
    """

    minimum: float
    maximum: float
    source: str
    of: Literal["return", "success"] = "return"


@dataclasses.dataclass(frozen=True)
class Task:
    """One dataset and, where there is one, the environment that scores policies.

    Attributes:
      id: family, name and version.
      family: one of `FAMILIES`.
      env_id: name for `offrl_jax.envs.make`; None: can be trained on, not evaluated.
      spec: dimensions and horizon.
      reference: None: returns of this task are never normalised.
      provenance: where the data come from, in a phrase.
      description: one line for people.
    """

    id: str
    family: str
    env_id: str | None
    spec: Spec
    reference: Reference | None
    provenance: str
    description: str


@dataclasses.dataclass(frozen=True)
class LoadedTask:
    """A task with its data, memory-mapped from the store.

    Attributes:
      task: the entry.
      spec: same as `task.spec`.
      train: the episodes to train on; none for a task of the family `online`.
      validation: held-out episodes: the official split, or the last 5 % of episodes;
        None where neither exists.
      dataset_hash: SHA-256 of the arrays of `train`; None where there are none.
      recipe_hash: identifies a generated dataset across machines; None for files.
      array_hashes: SHA-256 of the stored arrays of `train`, by field: arrays of equal
        hash, of one task or of several, are equal.
    """

    task: Task
    spec: Spec
    train: Episodes
    validation: Episodes | None
    dataset_hash: str | None
    recipe_hash: str | None
    array_hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)


def normalised_score(reference: Reference, returns: np.ndarray) -> np.ndarray:
    """`100 (R - minimum) / (maximum - minimum)`, float64, shape of `returns`."""
    span = reference.maximum - reference.minimum
    return 100.0 * (np.asarray(returns, np.float64) - reference.minimum) / span


def episode_scores(
    reference: Reference, returns: np.ndarray, successes: np.ndarray | None
) -> np.ndarray:
    """Scores of episodes by what the reference counts, float64, shape of `returns`.

    Args:
      reference: of the episodes' task.
      returns: undiscounted, any shape.
      successes: bool, same shape; None where the task has no such criterion.

    Raises:
      ValueError: the reference counts successes and there are none.
    """
    if reference.of == "return":
        return normalised_score(reference, returns)
    if successes is None:
        raise ValueError("a reference of success rates needs successes")
    return normalised_score(reference, np.asarray(successes, np.float64))


_CLASSIC_TEXT = {
    "pendulum": "swing up and balance a pendulum",
    "point_maze": "find the way through a maze from pieces of ways",
    "gates": "pass walls with two openings, one of them glass",
    "dmsd": "drive two coupled masses to their targets",
}
_QUALITY_TEXT = {
    "random": "uniform random actions",
    "medium": "badly tuned controllers",
    "mixed": "random, medium and noisy expert controllers",
    "expert": "near-optimal controller with a little noise",
}


def _classic_task(task_id: str) -> Task:
    environment, quality = classic.split_id(task_id)
    minimum, maximum = reference.CLASSIC[environment]
    return Task(
        id=task_id,
        family="classic",
        env_id=classic.env_id(environment),
        spec=classic.env_spec(environment),
        reference=Reference(minimum, maximum, reference.SOURCE),
        provenance="generated here (offrl_jax.datasets.classic)",
        description=f"{_CLASSIC_TEXT[environment]}; {_QUALITY_TEXT[quality]}",
    )


def _neorl2_task(task_id: str) -> Task:
    official = neorl2.TASKS[task_id]
    return Task(
        id=task_id,
        family="neorl2",
        env_id=task_id if task_id in envs.known() else None,
        spec=official.spec,
        reference=Reference(official.minimum, official.maximum, neorl2.SOURCE),
        provenance="official NeoRL-2 files, checked by MD5",
        description=official.challenge,
    )


_SUCCESS_RATE = Reference(0.0, 1.0, "success rate, as OGBench scores", "success")


def _ogbench_task(task_id: str, store: Store) -> Task:
    name, goal = ogbench.TASKS[task_id]
    dataset = ogbench.DATASETS[name]
    known = store.record(task_id).source["kind"] if store.has(task_id) else None
    return Task(
        id=task_id,
        family="ogbench",
        env_id=ogbench_specs.env_id(dataset.environment, goal),
        spec=dataset.spec,
        reference=_SUCCESS_RATE,
        provenance=known or "to be regenerated, or official files",
        description=dataset.description,
    )


_BODIES = ("Hopper", "HalfCheetah", "Walker2d", "Swimmer", "Humanoid", "Pusher")
_ONLINE: Mapping[str, tuple[str, Reference | None, str]] = {
    "online/CartPole-v1": (
        "control/CartPole-v1",
        Reference(0.0, 500.0, "no step at all, and every step of the episode"),
        "balance a pole on a cart; two actions",
    ),
    "online/Acrobot-v1": (
        "control/Acrobot-v1",
        Reference(-500.0, -100.0, "never up, and Gymnasium's reward threshold"),
        "swing a two-link arm above a line; three actions",
    ),
    "online/Pendulum-v1": (
        "classic/pendulum-v0",
        Reference(*reference.CLASSIC["pendulum"], reference.SOURCE),
        "swing up and balance a pendulum",
    ),
    "online/MountainCarContinuous-v0": (
        "control/MountainCarContinuous-v0",
        Reference(0.0, 90.0, "no action, and Gymnasium's reward threshold"),
        "rock a car up a hill; only the flag is rewarded",
    ),
    # Published returns depend on steps and version: these are told raw.
    **{
        f"online/{name}-v5": (f"mujoco/{name}-v5", None, f"Gymnasium's {name}, raw")
        for name in _BODIES
    },
}


def is_online(task_id: str) -> bool:
    """Whether the task has no data, only an environment to learn in."""
    return task_id.partition("/")[0] == ONLINE


def _online_task(task_id: str) -> Task:
    env_id, scores, description = _ONLINE[task_id]
    return Task(
        id=task_id,
        family=ONLINE,
        env_id=env_id,
        spec=envs.spec_of(env_id),
        reference=scores,
        provenance="no data: agents act in the environment",
        description=description,
    )


def _without_data(task: Task) -> LoadedTask:
    """The task with the data it has: no transitions."""
    obs = np.zeros((0, task.spec.obs_dim), np.float32)
    action, flags = np.zeros((0, task.spec.action_dim), np.float32), np.zeros(0, bool)
    nothing = Episodes(obs, action, obs[:, 0], obs, flags, flags)
    return LoadedTask(task, task.spec, nothing, None, None, None)


def _minari_task(task_id: str, store: Store) -> Task:
    info = minari_io.read_info(store, task_id.removeprefix("minari/"))
    scores = None
    if info.reference is not None and info.reference[0] != info.reference[1]:
        scores = Reference(*info.reference, "metadata of the Minari dataset")
    return Task(
        id=task_id,
        family="minari",
        env_id=info.env_id,
        spec=info.spec,
        reference=scores,
        provenance="Minari dataset in the store",
        description=f"{info.episodes} episodes, {info.transitions} transitions",
    )


def _local_task(task_id: str, store: Store) -> Task:
    record = store.record(task_id)
    env_id = record.info["env_id"]
    horizon = record.longest_episode
    if env_id is not None:
        horizon = envs.spec_of(env_id).horizon
    return Task(
        id=task_id,
        family="local",
        env_id=env_id,
        spec=Spec(record.obs_dim, record.action_dim, horizon),
        reference=None,
        provenance=f"imported from {record.source['file']}",
        description=f"{record.episodes} episodes, {record.transitions} transitions",
    )


def _known_ids(store: Store) -> list[str]:
    local = {r.task_id for r in store.records() if r.task_id.startswith("local/")}
    return [
        *classic.TASKS,
        *neorl2.TASKS,
        *ogbench.TASKS,
        *_ONLINE,
        *(f"minari/{one}" for one in minari_io.discover(store)),
        *sorted(one for one in local if store.has(one)),
    ]


def known_tasks(store: Store) -> tuple[Task, ...]:
    """All tasks that ship, and what the store has of others.

    Raises:
      DataError: a record or the metadata of a dataset in the store is damaged.
    """
    return tuple(get_task(task_id, store) for task_id in _known_ids(store))


def get_task(task_id: str, store: Store) -> Task:
    """The entry of a task, whether its data are present or not.

    Raises:
      UsageError: no such task.
      DataError: a `minari/` or `local/` dataset that is not in the store; what to do is
        said.
    """
    if task_id in classic.TASKS:
        return _classic_task(task_id)
    if task_id in neorl2.TASKS:
        return _neorl2_task(task_id)
    if task_id in ogbench.TASKS:
        return _ogbench_task(task_id, store)
    if task_id in _ONLINE:
        return _online_task(task_id)
    family = task_id.partition("/")[0]
    if family in ("minari", "local"):
        if not _is_well_formed(task_id):
            raise unknown_name("task", task_id, _known_ids(store))
        if not is_present(task_id, store):
            raise DataError(_absent(task_id, store))
        task_of = _minari_task if family == "minari" else _local_task
        return task_of(task_id, store)
    raise unknown_name("task", task_id, _known_ids(store))


def listed_as(task: Task) -> str:
    """The name of a task's line in listings: the dataset's id where goals share one."""
    if task.family != "ogbench":
        return task.id
    return ogbench.dataset_id(ogbench.dataset_of(task.id))


def _is_well_formed(task_id: str) -> bool:
    return all(part and not part.startswith(".") for part in task_id.split("/"))


def is_present(task_id: str, store: Store) -> bool:
    """Whether `load_task` finds all data it needs; generating is not counted."""
    if is_online(task_id):
        return task_id in _ONLINE
    if task_id.startswith("minari/"):
        return minari_io.is_present(store, task_id.removeprefix("minari/"))
    return store.has(task_id)


def _absent(task_id: str, store: Store) -> str:
    return f"{how_to_get(task_id)} (data folder: {store.path})"


def load_task(
    task_id: str, store: Store, progress: Callable[[str], None] | None = None
) -> LoadedTask:
    """A task with its data.  A classic one is generated on first use and then stored.

    Args:
      task_id: see `known_tasks`.
      store: where the data lie.
      progress: is told in a phrase what takes time.

    Raises:
      UsageError: no such task.
      DataError: the data are absent (the message says which file to put where), or
        damaged.
    """
    task = get_task(task_id, store)
    tell = progress or (lambda message: None)
    if task.family == ONLINE:
        return _without_data(task)
    if task.family == "classic":
        _generate(task, store, tell)
    elif task.family == "minari":
        _convert(task, store, tell)
    if not store.has(task_id):
        raise DataError(_absent(task_id, store))
    return _load_stored(task, store)


def peek_task(task_id: str, store: Store) -> LoadedTask:
    """A task with the data that the store has of it, none perhaps; makes nothing.

    Raises:
      UsageError: no such task.
      DataError: a `minari/` or `local/` dataset that is absent, or damaged data.
    """
    task = get_task(task_id, store)
    known = task.family != ONLINE and store.has(task_id)
    return _load_stored(task, store) if known else _without_data(task)


def _load_stored(task: Task, store: Store) -> LoadedTask:
    """The task with its stored data.

    Raises:
      DataError: they are damaged, or of other dimensions than the task.
    """
    task_id = task.id
    record = store.record(task_id)
    if (record.obs_dim, record.action_dim) != (task.spec.obs_dim, task.spec.action_dim):
        raise DataError(
            f"{task_id}: stored data have {record.obs_dim} and {record.action_dim} "
            f"components, the task has {task.spec.obs_dim} and {task.spec.action_dim}; "
            f"remove {store.folder(task_id, 'train')}"
        )
    return LoadedTask(
        task=task,
        spec=task.spec,
        train=store.load(task_id),
        validation=store.load(task_id, "val") if store.has(task_id, "val") else None,
        dataset_hash=record.dataset_hash,
        recipe_hash=record.recipe_hash,
        array_hashes=record.arrays,
    )


def _store_split(
    task_id: str,
    store: Store,
    episodes: Episodes,
    source: dict,
    recipe_hash: str | None = None,
    info: dict | None = None,
) -> None:
    """Stores `val` and `train`; `train` last, because it says that all is there."""
    train, validation = schema.split_validation(episodes)
    source = source | {"split": "last 5 % of episodes held out"}
    parts = {"train": train} if validation is None else {"val": validation}
    parts["train"] = train
    for split, part in parts.items():
        store.write(
            task_id, split, part, source=source, recipe_hash=recipe_hash, info=info
        )


def _generate(task: Task, store: Store, tell: Callable[[str], None]) -> None:
    """Generates a classic dataset unless the present recipe's is stored."""
    wanted = classic.recipe_hash(classic.recipe(task.id))
    if store.has(task.id):
        if store.record(task.id).recipe_hash == wanted:
            return
        raise DataError(
            f"{task.id}: the stored data were generated by another recipe (another "
            "version of offrl_jax); remove "
            f"{store.folder(task.id, 'train').parent} and "
            f"{store.minari_root / minari_io.OWN_NAMESPACE / task.id}"
        )
    tell(f"generating {task.id}")
    made = classic.generate(task.id)
    schema.validate(made.episodes, task.id)
    assert task.reference is not None
    minari_io.write(
        store,
        f"{minari_io.OWN_NAMESPACE}/{task.id}",
        made.episodes,
        description=f"offrl_jax task {task.id}; recipe {made.recipe_hash}",
        algorithm=f"scripted controllers, quality '{made.recipe['quality']}'",
        reference=(task.reference.minimum, task.reference.maximum),
    )
    source = {"kind": "generated", "recipe": made.recipe}
    info = {"success_rate": made.success_rate}
    _store_split(task.id, store, made.episodes, source, made.recipe_hash, info)


def _convert(task: Task, store: Store, tell: Callable[[str], None]) -> None:
    """Converts a Minari dataset to mapped arrays, again if its files changed."""
    dataset_id = task.id.removeprefix("minari/")
    mark = minari_io.fingerprint(store, dataset_id)
    if store.has(task.id) and store.record(task.id).info["fingerprint"] == mark:
        return
    # Stale, or the rest of a conversion that was interrupted.
    for split in ("train", "val"):
        store.remove(task.id, split)
    tell(f"reading the Minari dataset {dataset_id}")
    episodes, _ = minari_io.read(store, dataset_id)
    source = {"kind": "Minari dataset", "id": dataset_id}
    _store_split(task.id, store, episodes, source, info={"fingerprint": mark})


@dataclasses.dataclass(frozen=True)
class TaskStatus:
    """A line of `offrl tasks`: the entry and what is in the store.

    Attributes:
      task: the entry.
      present: whether the data are there.
      record: counts and returns of the training split; None before it is stored.
    """

    task: Task
    present: bool
    record: Record | None


def status(task_id: str, store: Store) -> TaskStatus:
    """What is known of a task without reading its arrays."""
    task = get_task(task_id, store)
    record = store.record(task_id) if store.has(task_id) else None
    return TaskStatus(task, is_present(task_id, store), record)
