"""Jobs that turned out too large: their members go on in parts, one after the other.

A part is a range of the job's members with checkpoints of its own, in the folder
`part-START-STOP` beside the job's.  Which parts there are stands in `parts.json`; a
part that has no checkpoint yet begins with its rows of the smallest one that holds it.
So cutting a job is the writing of one small file, whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from offrl_jax.benchmark.checkpoints import Checkpoints
from offrl_jax.benchmark.splitting import fewest_devices
from offrl_jax.errors import ResultsError
from offrl_jax.results import Job

_FILE = "parts.json"
_SIGNS = ("resource_exhausted", "out of memory", "bad_alloc", "failed to allocate")


class Part(NamedTuple):
    """Members `start` to `stop - 1` of a job."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """M, the members of the part."""
        return self.stop - self.start

    def halves(self) -> tuple[Part, Part]:
        """Two parts of at least one member each, the first not the smaller one."""
        middle = self.start + -(-self.size // 2)
        return Part(self.start, middle), Part(middle, self.stop)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of JAX or Python says that memory did not suffice."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _SIGNS)


def whole(job: Job) -> Part:
    """All members of a job."""
    return Part(0, len(job.members))


def part_of(job: Job, part: Part) -> Job:
    """The job of a part's members; its run id stays, for its rows are the job's."""
    if part == whole(job):
        return job
    devices = fewest_devices(part.size, job.split["devices"])
    return dataclasses.replace(
        job,
        members=job.members[part.start : part.stop],
        split={**job.split, "devices": devices},
    )


def names_of(job: Job) -> list[list[Any]]:
    """Task, setting and seed of every member, in order, as JSON has them."""
    return [[m.task, m.setting, m.seed] for m in job.members]


def folder_of(path: Path, job: Job, part: Part) -> Path:
    """Where the checkpoints of a part lie, below those of its job at `path`."""
    if part == whole(job):
        return path
    return path / f"part-{part.start}-{part.stop}"


def read_parts(path: Path, job: Job) -> list[Part]:
    """The parts of a job, in order; a job that was never cut is one.

    Raises:
      ResultsError: the record is no list of parts that make up the job.
    """
    file = path / _FILE
    try:
        parts = [Part(*pair) for pair in json.loads(file.read_text())]
        ends = [0, *(part.stop for part in parts)]
        sound = [part.start for part in parts] == ends[:-1]
        if sound and ends[-1] == len(job.members) and sorted(set(ends)) == ends:
            return parts
    except FileNotFoundError:
        return [whole(job)]
    except (OSError, ValueError, TypeError):
        pass
    raise ResultsError(
        f"{file}: does not say how {job.run_id} was cut; remove the folder {path} to "
        "train that job from its start"
    )


def write_parts(path: Path, parts: Sequence[Part]) -> None:
    """Replaces the record of a job's parts atomically.

    Raises:
      ResultsError: it cannot be written.
    """
    temporary = path / f"{_FILE}.tmp"
    try:
        with temporary.open("w") as stream:
            json.dump(parts, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path / _FILE)
    except OSError as error:
        raise ResultsError(
            f"{path / _FILE}: cannot be written ({error.strerror}); free space and run "
            "the same command again"
        ) from error


def restore(
    path: Path, job: Job, part: Part, template: Any, say: Callable[[str], None]
) -> tuple[Any, dict[str, Any]] | None:
    """The part's own checkpoint, else its rows of the smallest part that holds it.

    Args:
      path: of the job's checkpoints.
      job: the whole one.
      part: of it.
      template: a tree of NumPy arrays with the part's leading axis.
      say: told of damaged generations.

    Returns:
      `(saved, meta)` as `Checkpoints.restore`, None where there is nothing; seconds of
      training are the part's share.
    """
    for holder in _holders(path, job, part):
        resized = jax.tree.map(
            lambda leaf, n=holder.size: np.zeros((n, *leaf.shape[1:]), leaf.dtype),
            template,
        )
        found = Checkpoints(folder_of(path, job, holder), say).restore(resized)
        if found is not None:
            saved, meta = found
            if meta["members"] != names_of(part_of(job, holder)):
                say(
                    f"{path}: checkpoints of other runs; {job.run_id} does not use them"
                )
                continue
            first = part.start - holder.start
            rows = slice(first, first + part.size)
            clock = dict(meta["clock"])
            clock["train"] *= part.size / holder.size
            own = jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[rows], saved)
            return own, {**meta, "clock": clock}
    return None


def _holders(path: Path, job: Job, part: Part) -> list[Part]:
    """The parts that have a folder and hold `part`, smallest first."""
    known = {part, whole(job)}
    for folder in path.glob("part-*-*"):
        numbers = folder.name.split("-")[1:]
        if all(number.isdigit() for number in numbers):
            known.add(Part(*map(int, numbers)))
    holding = (p for p in known if p.start <= part.start and part.stop <= p.stop)
    return sorted(
        (p for p in holding if folder_of(path, job, p).is_dir()),
        key=lambda p: p.size,
    )


def join(
    path: Path,
    job: Job,
    parts: Sequence[Part],
    template: Any,
    say: Callable[[str], None],
) -> None:
    """Puts the last checkpoints of all parts together, as if the job had been one.

    Where one of them is not that of the end, the parts stay as they are.

    Args:
      path: of the job's checkpoints.
      job: the whole one.
      parts: all of them.
      template: a tree of arrays of any one part.
      say: told of damaged generations.
    """
    found = [restore(path, job, part, _like(template, part), say) for part in parts]
    if None in found:
        return
    saved, metas = zip(*(each for each in found if each is not None), strict=True)
    # One that was killed between its last row and its last checkpoint stays a part.
    end = sum(job.phase_updates.values())
    if any(meta["updates"] != end for meta in metas):
        return
    together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *saved)
    clock = dict(metas[-1]["clock"])
    clock["train"] = sum(meta["clock"]["train"] for meta in metas)
    meta = {**metas[-1], "members": names_of(job), "clock": clock}
    Checkpoints(path, say).save(together, meta, keep=1)
    (path / _FILE).unlink()
    for folder in path.glob("part-*-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _like(template: Any, part: Part) -> Any:
    return jax.tree.map(
        lambda leaf: np.zeros((part.size, *leaf.shape[1:]), leaf.dtype), template
    )


def updates_done(path: Path, job: Job) -> int:
    """Updates of all phases, summed over members, that the job's checkpoints hold."""
    if not path.is_dir():
        return 0
    done = 0
    for part in read_parts(path, job):
        for holder in _holders(path, job, part):
            generations = Checkpoints.serials(folder_of(path, job, holder))
            if generations:
                meta = folder_of(path, job, holder) / str(generations[-1]) / "meta.json"
                try:
                    done += part.size * json.loads(meta.read_text())["updates"]
                except (OSError, ValueError, KeyError):
                    continue
                break
    return done
