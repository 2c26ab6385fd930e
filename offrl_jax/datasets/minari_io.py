"""Minari datasets: written as genuine ones, read in either of its formats.

They lie under `Store.minari_root`, which is `MINARI_DATASETS_PATH` to the minari
package, so its own tools can be pointed there.  Rules of reading:

- Observations of a `Box` are flattened.  Of a `Dict` the entry `observation`, followed
  by `desired_goal` if there is one; `achieved_goal` is left out.  Other keys, and other
  spaces, are refused.
- Actions must be a bounded `Box`; they are scaled from its bounds to [-1, 1].
- Minari keeps episodes apart itself: one whose last step has neither flag was cut by
  the collector and counts as truncated.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from offrl_jax.datasets.schema import Episodes
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError
from offrl_jax.types import Spec
from offrl_jax.version import __version__

OWN_NAMESPACE = "offrl"
"""Ids `offrl/<task id>` are the Minari form of datasets that were generated here."""

_ENVIRONMENT_LOCK = threading.Lock()


class MinariInfo(NamedTuple):
    """What a dataset's metadata say.

    Attributes:
      dataset_id: its Minari id.
      spec: dimensions after flattening; horizon of the environment, else the longest
        episode.
      env_id: `gymnasium/<id>` where the recorded environment is made by its id alone
        (no arguments, no wrappers, plain observations), else None.
      reference: returns of score 0 and 100, if recorded.
      episodes: K.
      transitions: N.
    """

    dataset_id: str
    spec: Spec
    env_id: str | None
    reference: tuple[float, float] | None
    episodes: int
    transitions: int


@contextlib.contextmanager
def _datasets_path(root: Path) -> Iterator[None]:
    """Sets `MINARI_DATASETS_PATH` around a call: the writer takes no path."""
    with _ENVIRONMENT_LOCK:
        before = os.environ.get("MINARI_DATASETS_PATH")
        os.environ["MINARI_DATASETS_PATH"] = str(root)
        try:
            yield
        finally:
            if before is None:
                del os.environ["MINARI_DATASETS_PATH"]
            else:
                os.environ["MINARI_DATASETS_PATH"] = before


def data_folder(store: Store, dataset_id: str) -> Path:
    """Where the files of a dataset lie, whether present or not."""
    return store.minari_root.joinpath(*dataset_id.split("/"), "data")


def is_present(store: Store, dataset_id: str) -> bool:
    """Whether the dataset lies in the store."""
    return (data_folder(store, dataset_id) / "metadata.json").is_file()


def discover(store: Store) -> list[str]:
    """Ids of all Minari datasets in the store but those generated here, sorted."""
    root = store.minari_root
    found = []
    for path in root.glob("**/data/metadata.json"):
        parts = path.relative_to(root).parts[:-2]
        hidden = any(part.startswith(".") for part in parts)
        if parts and not hidden and parts[0] != OWN_NAMESPACE:
            found.append("/".join(parts))
    return sorted(found)


def write(
    store: Store,
    dataset_id: str,
    episodes: Episodes,
    *,
    description: str,
    algorithm: str,
    reference: tuple[float, float],
    data_format: str = "hdf5",
) -> None:
    """Writes episodes as a genuine Minari dataset; one that is present stands.

    Args:
      store: written below its `minari_root`.
      dataset_id: e.g. `offrl/classic/pendulum-mixed-v0`.
      episodes: valid ones.
      description: says which task this is; no environment is recorded.
      algorithm: name of the behaviour.
      reference: returns of score 0 and 100.
      data_format: `hdf5` or `arrow`.

    Raises:
      DataError: the disk is full or cannot be written.
    """
    if is_present(store, dataset_id):
        return
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for first, last in zip(episodes.starts, episodes.ends, strict=True):
        rows = slice(int(first), int(last) + 1)
        following = episodes.next_obs[rows]
        buffers.append(
            EpisodeBuffer(
                id=None,
                observations=np.concatenate(  # pyright: ignore[reportArgumentType]
                    [episodes.obs[rows][:1], following]
                ),
                actions=episodes.action[rows],  # pyright: ignore[reportArgumentType]
                rewards=episodes.reward[rows],  # pyright: ignore[reportArgumentType]
                terminations=episodes.terminated[rows],  # pyright: ignore[reportArgumentType]
                truncations=episodes.truncated[rows],  # pyright: ignore[reportArgumentType]
                infos={},
            )
        )
    obs_dim, action_dim = episodes.obs.shape[1], episodes.action.shape[1]
    folder = data_folder(store, dataset_id).parent
    needed = 2 * episodes.obs.nbytes + episodes.action.nbytes
    with store.new_folder(folder, needed) as temporary:
        # The writer knows only a root and an id: the root is the temporary folder.
        with _datasets_path(temporary), warnings.catch_warnings():
            # "env_spec is None" and "evaluation environment": there is none.
            warnings.filterwarnings("ignore", category=UserWarning, module="minari")
            dataset = minari.create_dataset_from_buffers(
                dataset_id,
                buffer=buffers,
                observation_space=Box(-np.inf, np.inf, (obs_dim,), np.float32),
                action_space=Box(-1.0, 1.0, (action_dim,), np.float32),
                algorithm_name=algorithm,
                author="The offrl_jax authors",
                author_email="none",
                code_permalink=f"offrl_jax {__version__}",
                description=description,
                data_format=data_format,
                requirements=[],
            )
            # The writer drops reference scores where there is no environment.
            dataset.storage.update_metadata(
                {"ref_min_score": reference[0], "ref_max_score": reference[1]}
            )
        written = temporary.joinpath(*dataset_id.split("/"), "data")
        written.rename(temporary / "data")
        # Empty folders of the nested id.
        for parent in written.parents:
            if parent == temporary:
                break
            for extra in parent.iterdir():
                extra.unlink()
            parent.rmdir()


def read_info(store: Store, dataset_id: str) -> MinariInfo:
    """Reads the metadata of a dataset.

    Raises:
      DataError: it is absent or unreadable, or its spaces cannot be flattened.
    """
    return _info(_open(store, dataset_id), dataset_id)


def _open(store: Store, dataset_id: str) -> Any:
    folder = data_folder(store, dataset_id)
    if not is_present(store, dataset_id):
        raise DataError(f"no Minari dataset at {folder}")
    import minari

    try:
        return minari.MinariDataset(folder)
    except Exception as error:  # whatever the package makes of damaged metadata
        raise DataError(
            f"{folder}: minari cannot open it ({type(error).__name__}: "
            f"{_one_line(error)}); fetch the dataset again"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _info(dataset: Any, dataset_id: str) -> MinariInfo:
    import gymnasium

    space = dataset.observation_space
    keys = _observation_keys(space, dataset_id)
    obs_dim = sum(int(np.prod((space[k] if k else space).shape)) for k in keys)
    _action_bounds(dataset.action_space, dataset_id)
    env_spec = _env_spec(dataset)
    horizon = env_spec.max_episode_steps if env_spec is not None else None
    if horizon is None:
        horizon = _longest_episode(dataset, dataset_id)
    env_id = None
    if env_spec is not None and not env_spec.kwargs:
        plain = isinstance(space, gymnasium.spaces.Box)
        if plain and not env_spec.additional_wrappers:
            env_id = f"gymnasium/{env_spec.id}"
    metadata = dataset.storage.metadata
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    reference = None if low is None or high is None else (float(low), float(high))
    return MinariInfo(
        dataset_id=dataset_id,
        spec=Spec(obs_dim, int(np.prod(dataset.action_space.shape)), int(horizon)),
        env_id=env_id,
        reference=reference,
        episodes=int(dataset.total_episodes),
        transitions=int(dataset.total_steps),
    )


def _longest_episode(dataset: Any, dataset_id: str) -> int:
    try:
        every = dataset.storage.get_episode_metadata(range(dataset.total_episodes))
        return max(int(one["total_steps"]) for one in every)
    except (OSError, KeyError, ValueError) as error:
        raise _damaged(dataset_id, error) from error


def _damaged(dataset_id: str, error: Exception) -> DataError:
    return DataError(
        f"Minari dataset '{dataset_id}': damaged ({_one_line(error)}); fetch it again"
    )


def _env_spec(dataset: Any) -> Any:
    """The specification of the environment to evaluate in, or None."""
    from gymnasium.envs.registration import EnvSpec

    text = dataset.storage.metadata.get("eval_env_spec")
    return EnvSpec.from_json(text) if text else dataset.spec.env_spec


def _observation_keys(space: Any, dataset_id: str) -> tuple[str, ...]:
    """Keys of a `Dict` to concatenate; one empty key stands for a `Box` itself."""
    from gymnasium.spaces import Box, Dict

    if isinstance(space, Box):
        return ("",)
    known = {"observation", "desired_goal", "achieved_goal"}
    if isinstance(space, Dict) and "observation" in space.keys():  # noqa: SIM118
        unknown = sorted(set(space.keys()) - known)
        chosen = tuple(k for k in ("observation", "desired_goal") if k in space.keys())  # noqa: SIM118
        if not unknown and all(isinstance(space[k], Box) for k in chosen):
            return chosen
    raise DataError(
        f"Minari dataset '{dataset_id}': observations of {space} cannot be read; a Box "
        "or a Dict of observation, desired_goal and achieved_goal can"
    )


def _action_bounds(space: Any, dataset_id: str) -> tuple[np.ndarray, np.ndarray]:
    from gymnasium.spaces import Box

    if not isinstance(space, Box) or not space.is_bounded("both"):
        raise DataError(
            f"Minari dataset '{dataset_id}': actions of {space} cannot be scaled to "
            "[-1, 1]; only a Box with finite bounds can"
        )
    return space.low.reshape(-1), space.high.reshape(-1)


def scale_action(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Maps actions `[N, A]` from [low, high] to [-1, 1], float32; exact for [-1, 1]."""
    if (low == -1).all() and (high == 1).all():
        return np.asarray(action, np.float32)
    low64, span = low.astype(np.float64), high.astype(np.float64) - low
    scaled = 2.0 * (action.astype(np.float64) - low64[None]) / span[None] - 1.0
    return scaled.astype(np.float32)


def read(store: Store, dataset_id: str) -> tuple[Episodes, MinariInfo]:
    """Reads a dataset; the arrays are not validated yet (`Store.write` does).

    Raises:
      DataError: absent or unreadable, a space that cannot be read, or a flag inside an
        episode.
    """
    dataset = _open(store, dataset_id)
    info = _info(dataset, dataset_id)
    keys = _observation_keys(dataset.observation_space, dataset_id)
    low, high = _action_bounds(dataset.action_space, dataset_id)
    columns: list[list[np.ndarray]] = [[] for _ in range(6)]
    try:
        for number, episode in enumerate(dataset.iterate_episodes()):
            for column, array in zip(
                columns, _episode_arrays(episode, keys, number, dataset_id), strict=True
            ):
                column.append(array)
    except (OSError, KeyError, ValueError) as error:
        raise _damaged(dataset_id, error) from error
    if not columns[0]:
        raise DataError(f"Minari dataset '{dataset_id}': holds no episode")
    obs, action, reward, next_obs, terminated, truncated = (
        np.concatenate(column) for column in columns
    )
    return Episodes(
        obs=obs,
        action=scale_action(action, low, high),
        reward=reward,
        next_obs=next_obs,
        terminated=terminated,
        truncated=truncated,
    ), info


def _episode_arrays(
    episode: Any, keys: tuple[str, ...], number: int, dataset_id: str
) -> tuple[np.ndarray, ...]:
    """Arrays of one episode of L steps, in the order of `Episodes`."""
    observations = np.concatenate(
        [
            np.asarray(
                episode.observations[k] if k else episode.observations, np.float32
            ).reshape(len(episode.rewards) + 1, -1)
            for k in keys
        ],
        axis=1,
    )
    terminated = np.array(episode.terminations, bool)
    truncated = np.array(episode.truncations, bool)
    inner = np.flatnonzero((terminated | truncated)[:-1])
    if len(inner):
        raise DataError(
            f"Minari dataset '{dataset_id}': episode {number} has an end flag at step "
            f"{int(inner[0])} of {len(terminated)}; only the last step may end it"
        )
    truncated[-1] |= not terminated[-1]
    return (
        observations[:-1],
        np.asarray(episode.actions).reshape(len(terminated), -1),
        np.asarray(episode.rewards, np.float32),
        observations[1:],
        terminated,
        truncated,
    )


def fingerprint(store: Store, dataset_id: str) -> str:
    """SHA-256 over names, sizes and times of a dataset's files: tells a stale cache."""
    folder = data_folder(store, dataset_id)
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            name = path.relative_to(folder).as_posix()
            lines.append(f"{name} {status.st_size} {status.st_mtime_ns}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
