"""The `ogbench` family (Park et al. 2025, arXiv:2410.20092): ids, rewards, storage.

A *dataset* holds the trajectories of one environment, without rewards; each of the
environment's five goals makes a *task* of it:

  ogbench/pointmaze-medium-navigate-v0                      a dataset
  ogbench/pointmaze-medium-navigate-singletask-task1-v0     its first task

Data come from `datasets.ogbench_generation` (regenerated, by the authors' procedure) or
from the authors' files (`read_official`).  Both are brought into the form of those
files, `Raw`, and then labelled by the package `ogbench` itself: since its version 1.2.0
the reward of a transition (s, a, s') and whether it is terminal are those of s.

A trajectory goes on after its goal was met.  In a task's data it is cut there: every
transition from a state that meets the goal is `terminated`, an episode's end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from offrl_jax.datasets.schema import Episodes
from offrl_jax.datasets.store import Record, Store, sha256_of
from offrl_jax.envs.ogbench_specs import ENVIRONMENTS, GOALS, PREFIX
from offrl_jax.errors import DataError, UsageError, unknown_name
from offrl_jax.types import Spec

REWARDS = "single-task rewards of ogbench 1.2: of s, minus the parts of the goal unmet"
OFFICIAL_VALIDATION = 10
"""The authors' validation file holds a tenth as many trajectories."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One dataset of OGBench.

    Attributes:
      environment: a key of `ENVIRONMENTS`.
      kind: `navigate`, `stitch` or `play`.
      trajectories: in the authors' training file.
      rows: of each trajectory; one more than its transitions.
      qpos_dim: numbers of the simulator's positions, recorded in every row.
      buttons: whose states are recorded in every row.
      description: one line for people.
    """

    environment: str
    kind: str
    trajectories: int
    rows: int
    qpos_dim: int
    buttons: int
    description: str

    @property
    def spec(self) -> Spec:
        """Dimensions and horizon of the environment."""
        return ENVIRONMENTS[self.environment]


def _maze(size: str, kind: str) -> Dataset:
    trajectories, rows = (1000, 1001) if kind == "navigate" else (5000, 201)
    walks = "long walks" if kind == "navigate" else "short walks, to be stitched,"
    text = f"{walks} of a point through the {size} maze"
    return Dataset(f"pointmaze-{size}", kind, trajectories, rows, 2, 0, text)


DATASETS: dict[str, Dataset] = {
    f"{one.environment}-{one.kind}": one
    for one in (
        _maze("medium", "navigate"),
        _maze("medium", "stitch"),
        _maze("large", "navigate"),
        _maze("large", "stitch"),
        Dataset("cube-single", "play", 1000, 1001, 21, 0, "an arm moves a cube"),
        Dataset("scene", "play", 1000, 1001, 25, 2, "an arm, cube, drawer and window"),
        Dataset("puzzle-3x3", "play", 1000, 1001, 23, 9, "an arm presses buttons"),
    )
}
"""Those whose data can be made without a trained expert, by name."""


def dataset_id(name: str) -> str:
    """`ogbench/cube-single-play-v0` of `cube-single-play`."""
    return f"{PREFIX}{name}-v0"


def task_id(name: str, goal: int) -> str:
    """`ogbench/cube-single-play-singletask-task1-v0` of `cube-single-play` and 1."""
    return f"{PREFIX}{name}-singletask-task{goal}-v0"


TASKS: dict[str, tuple[str, int]] = {
    task_id(name, goal): (name, goal) for name in DATASETS for goal in GOALS
}
"""Dataset and goal of every task id."""


def dataset_of(any_id: str) -> str:
    """The dataset that a dataset's or a task's id belongs to.

    Raises:
      UsageError: neither.
    """
    if any_id in TASKS:
        return TASKS[any_id][0]
    names = {dataset_id(name): name for name in DATASETS}
    if any_id not in names:
        raise unknown_name("OGBench dataset", any_id, names)
    return names[any_id]


class Raw(NamedTuple):
    """Trajectories as the authors' files hold them; R rows.

    Attributes:
      observations: `[R, O]`, float32.
      actions: `[R, A]`, float32; that of a trajectory's last row leads nowhere.
      terminals: `[R]`, bool, the last row of each trajectory.
      qpos: `[R, nq]`, float32, the simulator's positions.
      button_states: `[R, buttons]`, int64; no columns where there are no buttons.
    """

    observations: np.ndarray
    actions: np.ndarray
    terminals: np.ndarray
    qpos: np.ndarray
    button_states: np.ndarray


def concatenate(parts: list[Raw]) -> Raw:
    """Trajectories one after the other."""
    return Raw(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


class Labels(NamedTuple):
    """What one goal says of each row.

    Attributes:
      reward: `[R]`, float32.
      met: `[R]`, bool, whether the row's state meets the goal.
    """

    reward: np.ndarray
    met: np.ndarray


def label(name: str, raw: Raw) -> dict[int, Labels]:
    """Rewards for every goal of a dataset's environment, by the package's own code.

    Raises:
      UsageError: the package is absent or defines rewards otherwise.
      OffrlError: its model files are absent or damaged.
    """
    # Simulators are imported where they are used.
    from offrl_jax.envs.ogbench import Simulator, global_numpy_seed

    environment = DATASETS[name].environment
    env = Simulator(f"{environment}-singletask-task{GOALS[0]}-v0").spawn()
    from ogbench.relabel_utils import relabel_dataset  # pyright: ignore

    found = {}
    for goal in GOALS:
        # The goal is read at the reset inside; another model would be compiled for it.
        env._reward_task_id = goal
        env.action_space.seed(0)
        data = {"qpos": raw.qpos, "button_states": raw.button_states}
        with global_numpy_seed(0), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*precision lowered.*")
            relabel_dataset(environment, env, data)
        found[goal] = Labels(data["rewards"], data["masks"] == 0)
    return found


def to_episodes(raw: Raw, labels: Mapping[int, Labels]) -> dict[int, Episodes]:
    """Transitions of every goal; the arrays that do not depend on it are shared.

    A trajectory of L rows gives L - 1 transitions, the last one `truncated`.
    """
    inner = ~raw.terminals
    obs, action = raw.observations[inner], raw.actions[inner]
    next_obs = raw.observations[np.flatnonzero(inner) + 1]
    truncated = raw.terminals[np.flatnonzero(inner) + 1]
    return {
        goal: Episodes(
            obs, action, one.reward[inner], next_obs, one.met[inner], truncated
        )
        for goal, one in labels.items()
    }


def hash_of(content: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def store_tasks(
    name: str,
    store: Store,
    splits: Mapping[str, Raw],
    source: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Labels and stores trajectories as the five tasks of a dataset.

    Observations, actions and next observations are written for the first task; the
    others have hard links to them where the file system knows those, else copies.

    Args:
      name: a key of `DATASETS`.
      store: where to.
      splits: trajectories of `train`, `val` or both.
      source: provenance, JSON types only.
      recipe: what the data were generated from; None for files.
      say: is told in a phrase what takes time.

    Returns:
      The records, in the order in which they were written: `train` last, because it
      says that all is there.

    Raises:
      DataError: other data are stored already, the schema is broken, the disk is full.
      OffrlError: see `label`.
    """
    records = []
    first = task_id(name, GOALS[0])
    for split in sorted(splits, reverse=True):
        say(f"labelling {dataset_id(name)} ({split}) for {len(GOALS)} goals")
        raw = splits[split]
        for goal, episodes in to_episodes(raw, label(name, raw)).items():
            one = task_id(name, goal)
            goals = {"goal": goal, "rewards": REWARDS}
            recipe_hash = None if recipe is None else hash_of({**recipe, **goals})
            records.append(
                store.write(
                    one,
                    split,
                    episodes,
                    source={**source, **goals},
                    recipe_hash=recipe_hash,
                    info={"trajectories": int(raw.terminals.sum())},
                    twin=first if one != first else None,
                )
            )
    return records


def describe(records: list[Record]) -> str:
    """One line about what `store_tasks` stored."""
    counts = {r.split: (r.info["trajectories"], r.transitions) for r in records}
    parts = [
        f"{s}: {k} trajectories, {n:,} transitions" for s, (k, n) in counts.items()
    ]
    name = dataset_of(records[0].task_id)
    return f"{dataset_id(name)} stored as {len(GOALS)} tasks; {'; '.join(parts)}"


_KEYS = ("observations", "actions", "terminals", "qpos", "qvel")
_LABELLED = ("rewards", "masks")


def read_official(path: Path, name: str, split: str | None = None) -> tuple[Raw, str]:
    """Reads one of the authors' files and checks all that tells it from another one.

    The files carry no version and no checksum is published, so what is checked is: the
    fields, their dimensions, the number of rows (which tells the split), the ends of
    trajectories, and that the observations belong to the positions beside them.

    Args:
      path: the file; its name does not matter.
      name: a key of `DATASETS`.
      split: if given, the file must be this one.

    Returns:
      `(raw, split)`.

    Raises:
      UsageError: the file is another split than `split`.
      DataError: the file is damaged, cut short, of another dataset or version.
    """
    dataset = DATASETS[name]
    arrays = _official_arrays(path, dataset)
    raw = _official_raw(path, name, arrays)
    rows = len(raw.terminals)
    sizes = {
        "train": dataset.trajectories * dataset.rows,
        "val": dataset.trajectories // OFFICIAL_VALIDATION * dataset.rows,
    }
    found = [one for one, size in sizes.items() if size == rows]
    if not found:
        raise DataError(
            f"{path}: has {rows:,} rows; the official files of {dataset_id(name)} have "
            f"{sizes['train']:,} (train) and {sizes['val']:,} (val): it is cut short, "
            "or another dataset"
        )
    if split not in (None, found[0]):
        raise UsageError(
            f"{path}: has the rows of the {found[0]} split, not '{split}'; leave "
            "--split out"
        )
    expected = np.arange(1, rows + 1) % dataset.rows == 0
    if not np.array_equal(raw.terminals, expected):
        row = int(np.argmax(raw.terminals != expected))
        raise DataError(
            f"{path}: 'terminals' is {int(raw.terminals[row])} in row {row}; "
            f"trajectories of {dataset_id(name)} end every {dataset.rows} rows: it is "
            "another dataset"
        )
    _check_positions(path, name, raw)
    return raw, found[0]


def _official_arrays(path: Path, dataset: Dataset) -> dict[str, np.ndarray]:
    wanted = (*_KEYS, "button_states") if dataset.buttons else _KEYS
    try:
        # Opened here: np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array, not an .npz archive")
            labelled = [key for key in _LABELLED if key in archive.files]
            if labelled:
                raise DataError(
                    f"{path}: holds '{labelled[0]}', which the official files do not; "
                    "rewards written by ogbench before 1.2.0 are of the next state: "
                    "import the original file, rewards are computed here"
                )
            absent = [key for key in wanted if key not in archive.files]
            if absent:
                raise DataError(
                    f"{path}: has no field '{absent[0]}'; official OGBench files hold "
                    f"{', '.join(wanted)}: it is of another version or was reduced"
                )
            return {key: archive[key] for key in wanted if key != "qvel"}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: is damaged or cut short ({reason}); fetch it again"
        ) from error


def _official_raw(path: Path, name: str, arrays: Mapping[str, np.ndarray]) -> Raw:
    dataset, spec = DATASETS[name], DATASETS[name].spec
    widths = {
        "observations": spec.obs_dim,
        "actions": spec.action_dim,
        "qpos": dataset.qpos_dim,
    }
    if dataset.buttons:
        widths["button_states"] = dataset.buttons
    rows = len(arrays["terminals"])
    for key, width in widths.items():
        if arrays[key].shape != (rows, width):
            raise DataError(
                f"{path}: field '{key}' has shape {arrays[key].shape}, "
                f"{dataset_id(name)} needs ({rows}, {width}): it is another dataset or "
                "another version of it"
            )
    return Raw(
        np.asarray(arrays["observations"], np.float32),
        np.asarray(arrays["actions"], np.float32),
        np.asarray(arrays["terminals"]).reshape(-1) > 0,
        np.asarray(arrays["qpos"], np.float32),
        np.asarray(arrays.get("button_states", np.zeros((rows, 0))), np.int64),
    )


def _check_positions(path: Path, name: str, raw: Raw) -> None:
    """Observations begin with the joints of the arm, or are the point's place."""
    joints = min(6, DATASETS[name].qpos_dim)
    apart = np.abs(raw.observations[:, :joints] - raw.qpos[:, :joints]).max(axis=1)
    if apart.max() > 1e-5:
        row = int(np.argmax(apart))
        raise DataError(
            f"{path}: observation and 'qpos' of row {row} differ by {apart[row]:.3g} "
            f"in the first {joints} numbers, which {dataset_id(name)} observes as they "
            "are: it is another version of the dataset"
        )


def import_official(
    path: Path, any_id: str, store: Store, split: str | None = None
) -> str:
    """Stores one of the authors' files as the five tasks of its dataset.

    Returns:
      One line that says what was stored.

    Raises:
      UsageError: as `dataset_of`, `label` and `read_official`.
      DataError: as `read_official` and `store_tasks`.
    """
    name = dataset_of(any_id)
    raw, found = read_official(path, name, split)
    source = {
        "kind": "official OGBench file",
        "file": path.name,
        "sha256": sha256_of(path),
        "dataset": dataset_id(name),
    }
    return describe(store_tasks(name, store, {found: raw}, source))
