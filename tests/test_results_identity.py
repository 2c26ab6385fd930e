"""What makes a row the row that a run wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
from test_results_rows import make_row, silent

from offrl_jax import results
from offrl_jax.errors import ResultsError
from offrl_jax.results.rows import NOT_CONTENT

RESULTS = Path(__file__).resolve().parent.parent / "results"


class TestIdentity:
    """A row that was changed by hand is refused by whoever reads it."""

    def lines(self, folder: Path, *rows: results.Row) -> Path:
        path = results.row_path(folder, "run-a")
        with results.RowFile(path, silent) as file:
            for row in rows:
                file.append(row)
        return path

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"score":61.5', '"score":91.5'),
            ("-140.0", "-14.0"),
            ('"seed":1', '"seed":7'),
            ('"alpha":2.5', '"alpha":2.6'),
            ('"status":"ok"', '"status":"diverged"'),
            ('"agent":"td3_bc"', '"agent":"iql"'),
            ('"episodes":3', '"episodes":100'),
            ('"score":61.5', '"score":NaN'),
            ('"score":61.5', '"score":1e999'),
        ],
    )
    def test_changed_content_is_refused(
        self, tmp_path: Path, old: str, new: str
    ) -> None:
        path = self.lines(tmp_path, make_row(), make_row(seed=1), make_row(seed=2))
        first, second, third = path.read_text().splitlines(keepends=True)
        assert old in second
        path.write_text(first + second.replace(old, new, 1) + third)
        for read in (
            lambda: results.read_rows(tmp_path, silent),
            lambda: results.RowFile(path, silent),
        ):
            with pytest.raises(ResultsError, match=r"run-a\.jsonl:2: row_id '") as told:
                read()
            assert "changed after it was written; restore the file" in str(told.value)
            assert "\n" not in str(told.value)

    def test_a_null_cannot_become_nan(self, tmp_path: Path) -> None:
        # Non-finite numbers are hashed as null: the same hash must not let one in.
        path = self.lines(tmp_path, make_row(score=None, status="diverged"))
        path.write_text(path.read_text().replace('"score":null', '"score":NaN'))
        with pytest.raises(ResultsError, match="NaN that is not null"):
            results.read_rows(tmp_path, silent)

    def test_an_emptied_row_id_is_refused(self, tmp_path: Path) -> None:
        path = self.lines(tmp_path, make_row())
        path.write_text(path.read_text().replace(make_row().row_id, ""))
        with pytest.raises(ResultsError, match="row_id ''"):
            results.read_rows(tmp_path, silent)

    def test_time_host_and_layout_may_change(self, tmp_path: Path) -> None:
        path = self.lines(tmp_path, make_row())
        record = {**json.loads(path.read_text()), "wall_s": 1.0, "device": "gpu"}
        path.write_text(json.dumps(dict(reversed(record.items()))) + "\n")
        (row,) = results.read_rows(tmp_path, silent)
        assert (row.wall_s, row.returns) == (1.0, make_row().returns)

    def test_rows_with_fewer_fields_keep_their_hash(self, tmp_path: Path) -> None:
        # As an older writer of the schema, which knew no `error`, would have done it.
        record = dataclasses.asdict(make_row())
        del record["error"]
        content = {n: v for n, v in record.items() if n not in NOT_CONTENT}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        record["row_id"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = results.row_path(tmp_path, "old")
        path.parent.mkdir()
        path.write_text(json.dumps(record) + "\n")
        assert results.read_rows(tmp_path, silent)[0].returns == make_row().returns

    def test_odd_numbers_survive_the_round_trip(self, tmp_path: Path) -> None:
        odd = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, 1e16, 2.0**53 + 2]
        hyper = {"big": 10**30, "inf": math.inf, "deep": {"b": [math.nan], "a": (1,)}}
        row = make_row(returns=[*odd, math.nan, -math.inf], hyper=hyper, error="né\x1b")
        self.lines(tmp_path, row)
        (read,) = results.read_rows(tmp_path, silent)
        assert read.row_id == row.row_id
        assert [repr(x) for x in read.returns[:-2]] == [repr(x) for x in odd]

    @pytest.mark.parametrize(
        "folder", sorted(path.parent.name for path in RESULTS.glob("*/rows"))
    )
    def test_rows_of_the_repository_are_whole(self, folder: str) -> None:
        assert results.read_rows(RESULTS / folder, silent)
