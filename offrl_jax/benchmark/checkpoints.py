"""Checkpoints of whole populations: Orbax for the arrays, our own manifest for trust.

Orbax restores a flipped byte silently, so a SHA-256 of every file is written beside
each checkpoint after it is complete, and checked before it is read.  Two generations
are kept; a damaged one is passed over, with a message, for the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from offrl_jax.errors import ResultsError
from offrl_jax.results.lines import cannot_write, sync_folder

Say = Callable[[str], None]

_MANIFEST = "manifest.json"


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Orbax logs what its threads raise before it raises it: pages on a full disk."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _sync(folder: Path) -> None:
    """Has everything below a folder on disk: a power cut must not empty a file of a
    generation when the one before is removed already.
    """
    for root, _, files in os.walk(folder):
        for name in files:
            with Path(root, name).open("rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(root))


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST
    )


class Checkpoints:
    """The checkpoints of one job, in `folder/<serial>/`, newest serial last.

    A generation is a folder with Orbax's files, `meta.json` and `manifest.json`.  It is
    written under a temporary name and renamed when complete, so that it exists whole or
    not at all.

    Raises:
      ResultsError: the folder cannot be made.
    """

    def __init__(self, folder: Path, say: Say = lambda line: None) -> None:
        self.folder = folder
        self._say = say
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        for left_over in folder.glob("tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def generations(self) -> list[int]:
        """Serial numbers of the complete checkpoints, ascending."""
        return self.serials(self.folder)

    @staticmethod
    def serials(folder: Path) -> list[int]:
        """`generations` of a folder that is only looked at."""
        found = (path.name for path in folder.iterdir() if path.is_dir())
        return sorted(int(name) for name in found if name.isdigit())

    def save(self, state: Any, meta: dict[str, Any], keep: int = 2) -> None:
        """Writes `state` (any pytree of arrays and keys) and `meta` (JSON).

        Args:
          state: what to save.
          meta: what to know about it.
          keep: how many generations to keep, this one included.

        Raises:
          ResultsError: if the disk is full or not writable; what was there stays.
        """
        import orbax.checkpoint as ocp

        serial = max(self.generations(), default=0) + 1
        temporary = self.folder / f"tmp-{serial}"
        try:
            with _without_tracebacks(), ocp.StandardCheckpointer() as writer:
                writer.save(temporary.absolute() / "state", state)
            (temporary / "meta.json").write_text(json.dumps(meta))
            manifest = {
                str(path.relative_to(temporary)): _digest(path)
                for path in _files(temporary)
            }
            (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=0))
            _sync(temporary)
            temporary.rename(self.folder / str(serial))
            sync_folder(self.folder)
        except (OSError, ValueError) as error:
            # Orbax reports a full disk through tensorstore, as a ValueError.
            shutil.rmtree(temporary, ignore_errors=True)
            reason = str(error).splitlines()[0][:200]
            raise ResultsError(
                f"no checkpoint could be written to {self.folder} ({reason}); rows and "
                "older checkpoints are intact, make room and run the same command again"
            ) from error
        for old in self.generations()[:-keep]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def _damage(self, generation: Path) -> str | None:
        """What is wrong with a generation, or None."""
        try:
            manifest = dict(json.loads((generation / _MANIFEST).read_text()))
        except (OSError, ValueError, TypeError):
            return "its manifest is missing or unreadable"
        for name, digest in manifest.items():
            path = generation / name
            if not path.is_file():
                return f"{name} is missing"
            try:
                if _digest(path) != digest:
                    return f"{name} does not match its checksum"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
        return None

    def restore(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest undamaged checkpoint as `(state, meta)`, or None if there is none.

        Args:
          template: a state of the same structure and shapes (NumPy arrays come back as
            such, JAX arrays with the sharding of the template); not modified.
        """
        import orbax.checkpoint as ocp

        def abstract_of(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array):
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        abstract = jax.tree.map(abstract_of, template)
        for serial in reversed(self.generations()):
            generation = self.folder / str(serial)
            damage = self._damage(generation)
            if damage is not None:
                self._say(f"checkpoint {generation} is damaged ({damage}); not used")
                continue
            with ocp.StandardCheckpointer() as reader:
                state = reader.restore(generation.absolute() / "state", abstract)
            return state, json.loads((generation / "meta.json").read_text())
        return None
