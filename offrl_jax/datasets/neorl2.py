"""Reader of the official NeoRL-2 files (Gao et al. 2025, arXiv:2503.19267).

Tables are those of the official repository polixir/NeoRL2 at b50d91d,
`neorl2/envs/info.py` (MD5 sums, reference returns) and its environments (dimensions,
horizons, and the trims that `get_dataset` applies by default).  Data: CC BY 4.0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from offrl_jax.datasets import schema
from offrl_jax.datasets.schema import Episodes
from offrl_jax.errors import DataError, UsageError, unknown_name
from offrl_jax.types import Spec

SOURCE = "polixir/NeoRL2@b50d91d neorl2/envs/info.py"


@dataclasses.dataclass(frozen=True)
class Official:
    """One task of NeoRL-2.

    Attributes:
      spec: dimensions and horizon.
      minimum: return of score 0.
      maximum: return of score 100.
      md5: of the official files, by split.
      trims: the first so many episodes of a split are used; all where not named.
      challenge: what the task is about.
    """

    spec: Spec
    minimum: float
    maximum: float
    md5: dict[str, str]
    trims: dict[str, int]
    challenge: str


TASKS: dict[str, Official] = {
    "neorl2/Pipeline-v1": Official(
        Spec(52, 1, 1000),
        -296.0,
        751.0,
        {
            "train": "59902b333be6edb9252acfc2302cc1ed",
            "val": "c502f529db1de55ebf37d63e1defca56",
        },
        {},
        "flow control through a long delay",
    ),
    "neorl2/Simglucose-v1": Official(
        Spec(31, 1, 480),
        9.75,
        475.0,
        {
            "train": "6195a3634379f576958440b7e0c8fc53",
            "val": "6df907556cbc96002757f6d652be9d92",
        },
        {},
        "blood glucose under delay and meals",
    ),
    "neorl2/RocketRecovery-v1": Official(
        Spec(7, 2, 500),
        -176.0,
        208.0,
        {
            "train": "b1a7bf1ec16cfef390b6b1cec2b13ddc",
            "val": "0b25bd998e92b4f808f8ee5207ce06dd",
        },
        {"train": 100, "val": 25},
        "landing a rocket in wind from few data",
    ),
    "neorl2/RandomFrictionHopper-v1": Official(
        Spec(13, 3, 1000),
        -3.0,
        503.0,
        {
            "train": "3ef2c41483689729d3b5a3aef3b7b8f7",
            "val": "2628f354222de37803451c63e84a1269",
        },
        {},
        "hopping under hidden friction",
    ),
    "neorl2/DMSD-v1": Official(
        Spec(6, 2, 100),
        30.6,
        849.51,
        {
            "train": "88dfa39aa18904e809056b51c2e6319b",
            "val": "be6c39c0e73c17029206e714068f26b7",
        },
        {},
        "double mass-spring-damper driven by PID controllers",
    ),
    "neorl2/Fusion-v1": Official(
        Spec(15, 6, 100),
        -107.601,
        98.05,
        {
            "train": "98979f97e0b59dd46bbb9237176a68ab",
            "val": "9baa5556fac98b86ab9b58040da17d86",
        },
        {"train": 20, "val": 5},
        "plasma control from very few data",
    ),
    "neorl2/SafetyHalfCheetah-v1": Official(
        Spec(18, 6, 1000),
        -283.0,
        2507.0,
        {
            "train": "c35efec4a25fb45837487ba00f74e1ed",
            "val": "da65ba51a4cc17370572da3c801d228b",
        },
        {},
        "running below a global limit of speed",
    ),
}


def file_name(task_id: str, split: str) -> str:
    """The official name of a file, e.g. `DMSD-train.npz`."""
    return f"{task_id.removeprefix('neorl2/').removesuffix('-v1')}-{split}.npz"


def md5_of(path: Path) -> str:
    """MD5 (hex) of a file: what the official list gives; not a safeguard."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(
                file, lambda: hashlib.md5(usedforsecurity=False)
            )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def identify(path: Path, task_id: str, split: str | None = None) -> tuple[str, str]:
    """Which split an official file is, by its MD5.

    Args:
      path: the file; its name does not matter.
      task_id: the task that it is meant for.
      split: if given, the file must be this one.

    Returns:
      `(split, md5)`.

    Raises:
      UsageError: no such task, or the file is another split than `split`.
      DataError: the file cannot be read, is damaged, is not an official one, or is that
        of another task.
    """
    if task_id not in TASKS:
        raise unknown_name("NeoRL-2 task", task_id, TASKS)
    found = md5_of(path)
    for other, official in TASKS.items():
        for name, md5 in official.md5.items():
            if md5 != found:
                continue
            if other != task_id:
                raise DataError(
                    f"{path}: is the official {file_name(other, name)}, not a file of "
                    f"{task_id}; import it with --task {other}"
                )
            if split not in (None, name):
                raise UsageError(
                    f"{path}: is the official {name} split, not '{split}'; leave "
                    "--split out"
                )
            return name, found
    expected = TASKS[task_id].md5
    wanted = " or ".join(f"{expected[name]} ({name})" for name in expected)
    size = path.stat().st_size
    reason = "is not the official file"
    if not zipfile.is_zipfile(path):
        reason = f"is damaged or cut short ({size} bytes, no complete zip archive)"
    raise DataError(
        f"{path}: {reason}: MD5 is {found}, expected {wanted}; fetch it again, or "
        "import other data under a local/ id"
    )


def read_official(
    path: Path, task_id: str, split: str | None = None
) -> tuple[Episodes, str, dict[str, Any]]:
    """Reads an official file and applies the official trims.

    `done` becomes `terminated`, `truncated` stays.

    Returns:
      `(episodes, split, source)`; `source` is the provenance for the store.  The
      episodes are not validated yet (`Store.write` does).

    Raises:
      UsageError: as `identify`.
      DataError: as `identify`, or a field is absent or of another shape.
    """
    split, md5 = identify(path, task_id, split)
    official = TASKS[task_id]
    try:
        # Opened here: np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        episodes = Episodes(
            obs=np.asarray(arrays["obs"], np.float32),
            action=np.asarray(arrays["action"], np.float32),
            reward=np.asarray(arrays["reward"], np.float32).reshape(-1),
            next_obs=np.asarray(arrays["next_obs"], np.float32),
            terminated=arrays["done"].reshape(-1) > 0,
            truncated=arrays["truncated"].reshape(-1) > 0,
        )
    except KeyError as error:
        raise DataError(f"{path}: has no field {error}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    shape = (episodes.obs.shape[1:], episodes.action.shape[1:])
    if shape != ((official.spec.obs_dim,), (official.spec.action_dim,)):
        raise DataError(
            f"{path}: observations and actions have shapes {shape}, {task_id} has "
            f"{official.spec.obs_dim} and {official.spec.action_dim}"
        )
    count = len(episodes.ends)
    kept = min(official.trims.get(split, count), count)
    source = {
        "kind": "official NeoRL-2 file",
        "file": path.name,
        "md5": md5,
        "table": SOURCE,
        "licence": "CC BY 4.0",
        "episodes_in_file": count,
        "episodes_kept": kept,
    }
    return schema.take_episodes(episodes, 0, kept), split, source
