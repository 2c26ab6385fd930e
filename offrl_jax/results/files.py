"""Row files: appended to by one writer, safe against crashes and full disks."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from offrl_jax.errors import ResultsError
from offrl_jax.results.rows import Row, RowKey, from_record, to_line

OnMessage = Callable[[str], None]
_SUFFIXES = (".jsonl", ".jsonl.gz")


class RowFile:
    """The append-only row file of one run; every row is on disk when `append` returns.

    Opening reads what is there.  A torn last line (the process died while writing) is
    moved to `<name>.torn` and told through `on_message`.  One process writes at a
    time: hold the lock of the job.

    Attributes:
      path: the file.
      row_ids: identity of every row that the file holds, by key.
      failed: keys of the rows that are `failed`, which another row may replace.

    Raises:
      ResultsError: the folder cannot be written, or the file holds no rows of `SCHEMA`.
    """

    def __init__(self, path: Path, on_message: OnMessage) -> None:
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
            raise _cannot_write(path, error) from error
        try:
            self.row_ids = self._recover(on_message)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _recover(self, on_message: OnMessage) -> dict[RowKey, str]:
        data = self.path.read_bytes()
        rows, torn = _parse(data, self.path)
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
                raise _cannot_write(aside, error) from error
            on_message(
                f"{self.path}: the last line was torn by a crash ({len(torn)} bytes); "
                f"moved to {aside.name}, its evaluation will be repeated"
            )
        merged = _merge_rows(rows)
        self.failed = {row.key for row in merged if row.status == "failed"}
        return {row.key: row.row_id for row in merged}

    def append(self, row: Row) -> None:
        """Writes `row`; does nothing if an equal row is there.

        Raises:
          ResultsError: a different row of the same key is there (unless that one is
            `failed`: a retry replaces it), or the disk is full or fails, after
            which the file is as it was before.
        """
        known = self.row_ids.get(row.key)
        if known == row.row_id:
            return
        if known is not None and row.key not in self.failed:
            raise ResultsError(
                f"{self.path}: another row of {_describe(row)} is there already; the "
                "run was not repeated bit for bit, move the file away to start it anew"
            )
        line = (to_line(row) + "\n").encode()
        size = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            raise _cannot_write(self.path, error) from error
        self.row_ids[row.key] = row.row_id
        (self.failed.add if row.status == "failed" else self.failed.discard)(row.key)

    def close(self) -> None:
        """Closes the file; rows are on disk already."""
        os.close(self._descriptor)

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_rows(folder: Path, on_message: OnMessage) -> list[Row]:
    """Every row of all `rows/*.jsonl` and `rows/*.jsonl.gz` at or below `folder`.

    Repeated equal rows count once; a `failed` row gives way to any other of its key; a
    torn last line is skipped and told through `on_message`.  The order is that of the
    keys, so it does not depend on how the rows are spread over files.

    Raises:
      ResultsError: with file and line: no JSON, another schema, or a row that
        differs from another one of the same key.
    """
    located: list[tuple[str, Row]] = []
    for path in sorted(folder.rglob("*")):
        if path.parent.name != "rows" or not path.name.endswith(_SUFFIXES):
            continue
        try:
            data = path.read_bytes()
            if path.suffix == ".gz":
                data = gzip.decompress(data)
        except (OSError, EOFError, ValueError) as error:
            raise ResultsError(f"{path}: cannot be read ({error})") from error
        rows, torn = _parse(data, path)
        if torn:
            on_message(f"{path}: skipped a torn last line of {len(torn)} bytes")
        located += rows
    return sorted(_merge_rows(located), key=_order)


def _order(row: Row) -> tuple[str, str, str, int, int]:
    seed = -1 if row.seed is None else row.seed
    return (row.run_id, row.task, row.setting, seed, row.step)


def _parse(data: bytes, path: Path) -> tuple[list[tuple[str, Row]], bytes]:
    """Rows with their `file:line`, and the bytes of a torn last line (or none)."""
    rows: list[tuple[str, Row]] = []
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        last = number == len(lines)
        try:
            record = json.loads(line)
            complete = line.endswith(b"\n")
        except ValueError as error:  # JSON and UTF-8 errors alike
            if not last:
                raise ResultsError(
                    f"{where}: not JSON; restore the file or remove that line"
                ) from error
            complete = False
        if not complete:
            return rows, line
        rows.append((where, from_record(record, where)))
    return rows, b""


def _merge_rows(located: list[tuple[str, Row]]) -> list[Row]:
    kept: dict[RowKey, tuple[str, Row]] = {}
    for where, row in located:
        first = kept.setdefault(row.key, (where, row))
        if first[1].row_id == row.row_id or row.status == "failed":
            continue
        if first[1].status != "failed":
            raise ResultsError(
                f"{where}: differs from {first[0]} for the same {_describe(row)}; keep "
                "one of the two"
            )
        kept[row.key] = (where, row)
    return [row for _, row in kept.values()]


def _describe(row: Row) -> str:
    return (
        f"run {row.run_id}, task {row.task}, setting {row.setting}, seed {row.seed}, "
        f"step {row.step}"
    )


def _cannot_write(path: Path, error: OSError) -> ResultsError:
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
