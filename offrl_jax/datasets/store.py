"""The local store: where datasets lie on disk, written whole or not at all.

Layout under the data folder:

  tasks/<task id>/<split>/<field>.npy   arrays, memory-mapped when read
  tasks/<task id>/<split>/record.json   provenance, counts and SHA-256 of each array
  minari/<dataset id>/data/...          genuine Minari datasets (ours and the user's)

A split (`train` or `val`) is a folder that appears by one rename, so an interrupted
import or a full disk leaves nothing that could be mistaken for data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offrl_jax.datasets import schema
from offrl_jax.datasets.schema import Episodes
from offrl_jax.errors import DataError
from offrl_jax.version import __version__

SPLITS = ("train", "val")
RECORD_SCHEMA = 1
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def default_data_dir(cli_value: Path | None = None) -> Path:
    """The data folder: `--data-dir`, else `$OFFRL_DATA`, else the user's cache folder.

    The last is `$XDG_CACHE_HOME/offrl_jax/data`, by default under `~/.cache`.
    """
    if cli_value is not None:
        return cli_value.expanduser()
    if os.environ.get("OFFRL_DATA"):
        return Path(os.environ["OFFRL_DATA"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "offrl_jax" / "data"


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of one stored split; the content of its `record.json`.

    Attributes:
      task_id: the task.
      split: `train` or `val`.
      source: provenance: kind of source, file name and checksums, or the recipe.
      dataset_hash: see `schema.dataset_hash`.
      recipe_hash: of the generator, if generated.
      arrays: SHA-256 of each array's file, by field.
      transitions: N.
      episodes: K.
      terminated_episodes: how many end in a terminal state.
      obs_dim: O.
      action_dim: A.
      longest_episode: in transitions.
      return_mean: mean undiscounted return of the episodes.
      return_min: smallest.
      return_max: largest.
      info: facts that the task's family needs (environment id, reference scores).
      tool_version: version of offrl_jax that wrote it.
      schema: version of this record.
    """

    task_id: str
    split: str
    source: Mapping[str, Any]
    dataset_hash: str
    recipe_hash: str | None
    arrays: Mapping[str, str]
    transitions: int
    episodes: int
    terminated_episodes: int
    obs_dim: int
    action_dim: int
    longest_episode: int
    return_mean: float
    return_min: float
    return_max: float
    info: Mapping[str, Any]
    tool_version: str = __version__
    schema: int = RECORD_SCHEMA


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """Outcome of checking one stored split; `problem` is None if it is sound."""

    task_id: str
    split: str
    problem: str | None


class Store:
    """Datasets under one folder, which is created when something is first written."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    @property
    def minari_root(self) -> Path:
        """The folder that is `MINARI_DATASETS_PATH` to the minari package."""
        return self.path / "minari"

    def folder(self, task_id: str, split: str) -> Path:
        """Where a split lies, whether present or not."""
        if split not in SPLITS:
            raise ValueError(f"split '{split}' is not one of {SPLITS}")
        parts = task_id.split("/")
        if any(part in ("", ".", "..") or part.startswith(".") for part in parts):
            raise ValueError(f"malformed task id '{task_id}'")
        return self.path.joinpath("tasks", *parts, split)

    def has(self, task_id: str, split: str = "train") -> bool:
        """Whether the split is stored."""
        return (self.folder(task_id, split) / "record.json").is_file()

    def record(self, task_id: str, split: str = "train") -> Record:
        """Reads the record of a stored split.

        Raises:
          DataError: the record is absent, unreadable or of another version.
        """
        path = self.folder(task_id, split) / "record.json"
        cure = f"remove {path.parent} and import or generate it again"
        try:
            content = json.loads(path.read_text())
            version = content["schema"]
            if version != RECORD_SCHEMA:
                raise DataError(
                    f"{path}: record version {version}, this offrl_jax reads "
                    f"{RECORD_SCHEMA}; {cure}"
                )
            return Record(**content)
        except FileNotFoundError as error:
            raise DataError(f"{path}: not in the store") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: damaged ({error}); {cure}") from error

    def records(self) -> list[Record]:
        """Records of everything stored, sorted by task and split."""
        found = [self.record(*where) for where in self._stored()]
        return sorted(found, key=lambda record: (record.task_id, record.split))

    def load(self, task_id: str, split: str = "train") -> Episodes:
        """Maps the arrays of a split into memory, read-only; nothing is read yet.

        Raises:
          DataError: an array is absent, unreadable or has not the recorded length.
        """
        record = self.record(task_id, split)
        folder = self.folder(task_id, split)
        arrays = {}
        for name in schema.FIELDS:
            path = folder / f"{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(
                    f"{path}: damaged ({error}); remove {folder} and import or "
                    "generate it again"
                ) from error
            if len(arrays[name]) != record.transitions:
                raise DataError(
                    f"{path}: {len(arrays[name])} rows, recorded were "
                    f"{record.transitions}; remove {folder} and import it again"
                )
        return Episodes(**arrays)

    def write(
        self,
        task_id: str,
        split: str,
        episodes: Episodes,
        *,
        source: Mapping[str, Any],
        recipe_hash: str | None = None,
        info: Mapping[str, Any] | None = None,
        twin: str | None = None,
    ) -> Record:
        """Validates and stores a split.  Storing the same arrays again is a no-op.

        Args:
          task_id: the task.
          split: `train` or `val`.
          episodes: what to store.
          source: provenance, JSON types only, without dates.
          recipe_hash: of the generator, if generated.
          info: facts that the task's family needs, JSON types only.
          twin: a stored task; arrays of its split that are equal to these are not
            written again but linked, where the file system has hard links.

        Raises:
          DataError: the episodes break the schema, other data are already stored there,
            or the disk is full.
        """
        schema.validate(episodes, f"{task_id} ({split})")
        folder = self.folder(task_id, split)
        returns = schema.episode_returns(episodes)
        record = Record(
            task_id=task_id,
            split=split,
            source=dict(source),
            dataset_hash=schema.dataset_hash(episodes),
            recipe_hash=recipe_hash,
            arrays={},
            transitions=len(episodes),
            episodes=len(returns),
            terminated_episodes=int(episodes.terminated.sum()),
            obs_dim=episodes.obs.shape[1],
            action_dim=episodes.action.shape[1],
            longest_episode=int(episodes.lengths.max()),
            return_mean=float(returns.mean()),
            return_min=float(returns.min()),
            return_max=float(returns.max()),
            info=dict(info or {}),
        )
        if self.has(task_id, split):
            return self._same_or_error(record)
        needed = sum(getattr(episodes, name).nbytes for name in schema.FIELDS)
        with self.new_folder(folder, needed) as temporary:
            sums = {}
            for name in schema.FIELDS:
                path = temporary / f"{name}.npy"
                array = getattr(episodes, name)
                linked = twin and self._link(twin, split, name, array, path)
                if not linked:
                    _write_array(path, array)
                sums[name] = linked or sha256_of(path)
            record = dataclasses.replace(record, arrays=sums)
            text = json.dumps(dataclasses.asdict(record), indent=1, sort_keys=True)
            _write_text(temporary / "record.json", text)
        # Another process may have been first: then its data stand.
        return self._same_or_error(record)

    def _link(
        self, twin: str, split: str, name: str, array: np.ndarray, path: Path
    ) -> str | None:
        """Links the twin's equal array to `path`; its SHA-256, or None: not done."""
        if not self.has(twin, split):
            return None
        stored = getattr(self.load(twin, split), name)
        if stored.dtype != array.dtype or not np.array_equal(stored, array):
            return None
        try:
            os.link(self.folder(twin, split) / f"{name}.npy", path)
        except OSError:
            return None  # no hard links here: the array is written once more
        return self.record(twin, split).arrays[name]

    def _same_or_error(self, record: Record) -> Record:
        stored = self.record(record.task_id, record.split)
        if stored.dataset_hash != record.dataset_hash:
            raise DataError(
                f"{record.task_id} ({record.split}) is already in the store with other "
                f"data ({stored.dataset_hash[:12]}, not {record.dataset_hash[:12]}); "
                f"use another id or remove {self.folder(record.task_id, record.split)}"
            )
        return stored

    @contextlib.contextmanager
    def new_folder(self, folder: Path, needed: int) -> Iterator[Path]:
        """A temporary folder that becomes `folder` if all goes well, else vanishes.

        Where `folder` exists at the end it stands, and the temporary one vanishes.

        Args:
          folder: below the store's path.
          needed: about how many bytes will be written, for the message.

        Raises:
          DataError: the disk is full or the folder cannot be written.
        """
        temporary = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
            temporary.chmod(0o755)  # mkdtemp keeps others out; a store may be shared
            yield temporary
            try:
                temporary.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise DataError(
                    f"no space left under {self.path} (about {needed / 1e6:.0f} MB are "
                    "needed); free some, or choose another folder with --data-dir"
                ) from error
            raise DataError(
                f"cannot write under {self.path} ({error.strerror or error}); choose "
                "another folder with --data-dir"
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, task_id: str, split: str) -> None:
        """Deletes a stored split; one that is absent is no error."""
        folder = self.folder(task_id, split)
        if folder.is_dir():
            # The record goes first: what is left by an interruption is no dataset.
            (folder / "record.json").unlink(missing_ok=True)
            shutil.rmtree(folder)

    def check(self, task_id: str, split: str) -> CheckResult:
        """Reads everything again: file sums, schema, dataset hash, counts."""
        try:
            record = self.record(task_id, split)
            folder = self.folder(task_id, split)
            for name in schema.FIELDS:
                path = folder / f"{name}.npy"
                if not path.is_file():
                    raise DataError(f"{path}: absent")
                found = sha256_of(path)
                if found != record.arrays.get(name):
                    raise DataError(
                        f"{path}: SHA-256 is {found}, recorded was "
                        f"{record.arrays.get(name)}; remove {folder} and import or "
                        "generate it again"
                    )
            episodes = self.load(task_id, split)
            schema.validate(episodes, f"{task_id} ({split})")
            found = schema.dataset_hash(episodes)
            if found != record.dataset_hash:
                raise DataError(
                    f"{folder}: dataset hash is {found}, recorded was "
                    f"{record.dataset_hash}"
                )
        except DataError as error:
            return CheckResult(task_id, split, str(error))
        return CheckResult(task_id, split, None)

    def check_all(self) -> list[CheckResult]:
        """`check` of everything that has a record."""
        return [self.check(*where) for where in self._stored()]

    def _stored(self) -> list[tuple[str, str]]:
        """`(task id, split)` of every folder with a record, without hidden ones."""
        root = self.path / "tasks"
        found = []
        for path in sorted(root.glob("**/record.json")):
            *parts, split, _ = path.relative_to(root).parts
            hidden = any(part.startswith(".") for part in parts)
            if parts and split in SPLITS and not hidden:
                found.append(("/".join(parts), split))
        return found


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
