"""Row files: what a run's evaluations are appended to, and read from."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from offrl_jax.errors import ResultsError
from offrl_jax.results.lines import LineFile, OnMessage, read_lines
from offrl_jax.results.rows import BEHAVIOUR, Row, RowKey, from_record, to_line


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
        self._lines = LineFile(path, on_message, "its evaluation will be repeated")
        try:
            merged = _merge_rows(
                [
                    (where, from_record(content, where))
                    for where, content in self._lines.found
                ]
            )
        except BaseException:
            self._lines.close()
            raise
        self.failed = {row.key for row in merged if row.status == "failed"}
        self.row_ids = {row.key: row.row_id for row in merged}

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
        self._lines.append([to_line(row)])
        self.row_ids[row.key] = row.row_id
        (self.failed.add if row.status == "failed" else self.failed.discard)(row.key)

    def close(self) -> None:
        """Closes the file; rows are on disk already."""
        self._lines.close()

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

    Repeated equal rows count once, and so do a dataset's own episodes, which every
    suite writes down; a `failed` row gives way to any other of its key; a torn last
    line is skipped and told through `on_message`.  The order is that of the keys, so it
    does not depend on how the rows are spread over files.

    Raises:
      ResultsError: with file and line: no JSON, another schema, or a row that
        differs from another one of the same key.
    """
    located = [
        (where, from_record(content, where))
        for where, content in read_lines(folder, "rows", on_message)
    ]
    return sorted(_merge_rows(located), key=_order)


def _order(row: Row) -> tuple[str, str, str, int, int]:
    seed = -1 if row.seed is None else row.seed
    return (row.run_id, row.task, row.setting, seed, row.step)


def _merge_rows(located: list[tuple[str, Row]]) -> list[Row]:
    kept: dict[RowKey, tuple[str, Row]] = {}
    for where, row in located:
        first = kept.setdefault(row.key, (where, row))
        if first[1].row_id == row.row_id or row.status == "failed":
            continue
        if _same_dataset(first[1], row):
            continue
        if first[1].status != "failed":
            raise ResultsError(
                f"{where}: differs from {first[0]} for the same {_describe(row)}; keep "
                "one of the two"
            )
        kept[row.key] = (where, row)
    return [row for _, row in kept.values()]


def _same_dataset(a: Row, b: Row) -> bool:
    """Whether two suites wrote down the episodes of one dataset."""
    return a.agent == b.agent == BEHAVIOUR and (
        (a.dataset_hash, a.returns, a.score) == (b.dataset_hash, b.returns, b.score)
    )


def _describe(row: Row) -> str:
    return (
        f"run {row.run_id}, task {row.task}, setting {row.setting}, seed {row.seed}, "
        f"step {row.step}"
    )
