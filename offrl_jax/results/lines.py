"""Files of JSON lines: appended to by one writer, safe against crashes, full disks."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from offrl_jax.errors import ResultsError
from offrl_jax.results.folder import files_below

OnMessage = Callable[[str], None]
SUFFIXES = (".jsonl", ".jsonl.gz")


class Record(NamedTuple):
    """One line: where it is (`file:line`, for messages), and its JSON."""

    where: str
    content: Any


class LineFile:
    """An append-only file of JSON lines; all is on disk when `append` returns.

    Opening reads what is there.  A torn last line (the process died while writing) is
    moved to `<name>.torn` and told through `on_message`.  One process writes at a time:
    hold the lock of the job.

    Attributes:
      path: the file.
      found: the lines that were there when it was opened.

    Raises:
      ResultsError: the folder cannot be written, or a line but the last is no JSON.
    """

    def __init__(self, path: Path, on_message: OnMessage, lost: str) -> None:
        """Opens `path`; `lost` says what a torn line costs, for the message."""
        self.path = path
        try:
            new = not path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644
            )
            if new:
                sync_folder(path.parent)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            self.found = self._recover(on_message, lost)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _recover(self, on_message: OnMessage, lost: str) -> list[Record]:
        data = self.path.read_bytes()
        records, torn = parse_lines(data, self.path)
        if torn:
            aside = self.path.with_name(self.path.name + ".torn")
            try:
                with aside.open("ab") as file:
                    file.write(torn.rstrip(b"\n") + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.ftruncate(self._descriptor, len(data) - len(torn))
                os.fsync(self._descriptor)
            except OSError as error:
                raise cannot_write(aside, error) from error
            on_message(
                f"{self.path}: the last line was torn by a crash ({len(torn)} bytes); "
                f"moved to {aside.name}, {lost}"
            )
        return records

    def append(self, lines: Iterable[str]) -> None:
        """Writes lines, given without their newlines.

        Raises:
          ResultsError: the disk is full or fails, after which the file is as it was
            before.
        """
        data = "".join(line + "\n" for line in lines).encode()
        size = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Closes the file; lines are on disk already."""
        os.close(self._descriptor)


def read_lines(folder: Path, kind: str, on_message: OnMessage) -> Iterator[Record]:
    """Lines of all `kind/*.jsonl` and `kind/*.jsonl.gz` at or below `folder`, by path.

    A torn last line is skipped and told through `on_message`.

    Raises:
      ResultsError: a file that cannot be read, or with file and line what is no JSON.
    """
    for path in files_below(folder):
        if path.parent.name != kind or not path.name.endswith(SUFFIXES):
            continue
        try:
            data = path.read_bytes()
            if path.suffix == ".gz":
                data = gzip.decompress(data)
        except (OSError, EOFError, ValueError) as error:
            raise ResultsError(f"{path}: cannot be read ({error})") from error
        records, torn = parse_lines(data, path)
        if torn:
            on_message(f"{path}: skipped a torn last line of {len(torn)} bytes")
        yield from records


def parse_lines(data: bytes, path: Path) -> tuple[list[Record], bytes]:
    """The lines, and the bytes of a torn last line (or none)."""
    records: list[Record] = []
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        last = number == len(lines)
        try:
            content = json.loads(line)
            complete = line.endswith(b"\n")
        except ValueError as error:  # JSON and UTF-8 errors alike
            if not last:
                raise ResultsError(
                    f"{where}: not JSON; restore the file or remove that line"
                ) from error
            complete = False
        if not complete:
            return records, line
        records.append(Record(where, content))
    return records, b""


def cannot_write(path: Path, error: OSError) -> ResultsError:
    """The error of a file below a results folder that cannot be written."""
    return ResultsError(
        f"{path}: cannot be written ({error.strerror}); free space or choose another "
        "results folder"
    )


def sync_folder(folder: Path) -> None:
    """Makes a new or renamed entry of `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
