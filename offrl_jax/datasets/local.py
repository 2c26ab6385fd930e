"""The user's own data: plain `.npz` files, imported as `local/<name>-v<number>`.

Fields (any one of the names; numbers may be of any real dtype and become float32):

  obs | observations                          [N, O]
  action | actions                            [N, A], in [-1, 1]
  reward | rewards                            [N]
  next_obs | next_observations                [N, O], optional
  terminated | terminals | done               [N], 0 or 1
  truncated | timeouts                        [N], 0 or 1
  env_id                                      a string, optional

Both flags must be given: where an episode was cut cannot be guessed.  If there is no
`next_obs`, it is taken from the next row of the episode; the last row of a truncated
episode then has no successor and is dropped (the row before becomes the cut), and a
terminal row is refused, because the observation after it is not in the file.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from offrl_jax.datasets.schema import Episodes
from offrl_jax.datasets.store import sha256_of
from offrl_jax.errors import DataError, UsageError

_ID = re.compile(r"local/[A-Za-z0-9][A-Za-z0-9_.+-]*-v\d+")

NAMES: dict[str, tuple[str, ...]] = {
    "obs": ("obs", "observations"),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards"),
    "next_obs": ("next_obs", "next_observations"),
    "terminated": ("terminated", "terminals", "done"),
    "truncated": ("truncated", "timeouts"),
    "env_id": ("env_id",),
}
_OPTIONAL = ("next_obs", "env_id")


def check_id(task_id: str) -> None:
    """Checks the form `local/<name>-v<number>`.

    Raises:
      UsageError: another form.
    """
    if not _ID.fullmatch(task_id):
        raise UsageError(
            f"malformed task id '{task_id}'; own data are local/<name>-v<number>, for "
            "example local/hopper-medium-v0"
        )


def read_npz(path: Path) -> tuple[Episodes, str | None, dict[str, Any]]:
    """Reads a file by the rules above.

    Returns:
      `(episodes, env_id, source)`; `source` is the provenance for the store.  The
      episodes are not validated yet (`Store.write` does).

    Raises:
      DataError: the file is damaged, a field is absent, given twice, of the wrong kind
        or shape, or `next_obs` cannot be derived.
    """
    found = _fields(path)
    env_id = None
    if "env_id" in found:
        if found["env_id"].dtype.kind != "U" or found["env_id"].size != 1:
            raise DataError(f"{path}: field 'env_id' must be one string")
        env_id = str(found["env_id"].reshape(()))
    real = ("obs", "action", "reward", "next_obs")
    numbers = {n: _number(path, n, found[n]) for n in real if n in found}
    terminated, truncated = (
        _flag(path, name, found[name]) for name in ("terminated", "truncated")
    )
    rows = {name: len(array) for name, array in numbers.items()}
    if len({*rows.values(), len(terminated), len(truncated)}) > 1:
        rows |= {"terminated": len(terminated), "truncated": len(truncated)}
        listed = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise DataError(f"{path}: fields have unequal numbers of rows: {listed}")
    source: dict[str, Any] = {
        "kind": "local file",
        "file": path.name,
        "sha256": sha256_of(path),
        "next_obs": "given" if "next_obs" in numbers else "derived from the next row",
    }
    if "next_obs" in numbers:
        episodes = Episodes(
            **numbers,
            terminated=terminated,
            truncated=truncated,
        )
    else:
        before = len(terminated)
        episodes = _derive_next_obs(path, numbers, terminated, truncated)
        source["rows_dropped"] = before - len(episodes)
    return episodes, env_id, source


def _fields(path: Path) -> dict[str, np.ndarray]:
    """Loads the fields by their canonical names."""
    try:
        # Opened here: np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array, not an .npz archive")
            present = set(archive.files)
            found = {}
            for name, accepted in NAMES.items():
                given = [one for one in accepted if one in present]
                if len(given) > 1:
                    raise DataError(
                        f"{path}: fields {' and '.join(given)} mean the same; keep one"
                    )
                if given:
                    found[name] = archive[given[0]]
                elif name not in _OPTIONAL:
                    raise DataError(
                        f"{path}: has no field {' or '.join(accepted)}; it holds "
                        f"{', '.join(sorted(present)) or 'nothing'}"
                    )
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: cannot be read as a plain .npz archive ({reason})"
        ) from error
    return found


def _number(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: field '{name}' is {array.dtype}, must be real numbers"
        )
    rank = 1 if name == "reward" else 2
    if rank == 1 and array.shape[1:] == (1,):
        array = array[:, 0]
    if array.ndim != rank:
        raise DataError(
            f"{path}: field '{name}' has shape {array.shape}, not rank {rank}"
        )
    # A float64 too large for float32 becomes infinite and is named by the validation.
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32)


def _flag(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.shape[1:] == (1,):
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "bfiu":
        raise DataError(
            f"{path}: field '{name}' is {array.dtype} of shape {array.shape}, must be "
            "[N] of 0 or 1"
        )
    odd = np.flatnonzero((array != 0) & (array != 1))
    if len(odd):
        raise DataError(
            f"{path}: field '{name}', row {odd[0]}: {array[odd[0]]} is neither 0 nor 1"
        )
    return array.astype(bool)


def _derive_next_obs(
    path: Path,
    numbers: dict[str, np.ndarray],
    terminated: np.ndarray,
    truncated: np.ndarray,
) -> Episodes:
    """Fills `next_obs` from the next row and drops the last row of each episode."""
    if terminated.any():
        raise DataError(
            f"{path}: row {int(np.argmax(terminated))} is terminal and there is no "
            "next_obs; the observation after a terminal step cannot be derived: add "
            "the field"
        )
    if not len(truncated) or not truncated[-1]:
        raise DataError(f"{path}: the last row ends no episode; set 'truncated' there")
    keep = np.flatnonzero(~truncated)
    if not len(keep):
        raise DataError(f"{path}: every episode has one row, and there is no next_obs")
    return Episodes(
        obs=numbers["obs"][keep],
        action=numbers["action"][keep],
        reward=numbers["reward"][keep],
        next_obs=numbers["obs"][keep + 1],
        terminated=terminated[keep],
        truncated=truncated[keep + 1],
    )
