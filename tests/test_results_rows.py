"""Row files and the plan, against crashes, full disks and contradictions."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from offrl_jax import results
from offrl_jax.errors import ResultsError
from offrl_jax.results.folder import files_below


def make_row(**changes: Any) -> results.Row:
    content: dict[str, Any] = {
        "run_id": "run-a",
        "suite": "tiny",
        "role": "test",
        "agent": "td3_bc",
        "config": {"hidden": [64, 64]},
        "setting": "default",
        "hyper": {"alpha": 2.5},
        "task": "classic/pendulum-mixed-v0",
        "family": "classic",
        "recipe_hash": "r1",
        "dataset_hash": "d1",
        "seed": 0,
        "step": 100,
        "updates_total": 100,
        "phase_updates": {"train": 100},
        "protocol": {"episodes": 3},
        "returns": [-150.5, -140.0, -130.25],
        "lengths": [200, 200, 200],
        "successes": None,
        "score": 61.5,
        "status": "ok",
        "split_changed": False,
        "updates_per_s": 1000.0,
        "wall_s": 4.0,
        "compile_s": 2.0,
        "eval_s": 0.5,
        "device": "cpu",
        "flags": {"precision": "float32"},
        "versions": {"jax": "0.10.2"},
        "commit": "abc",
        "population": {"members": 4, "devices": 2},
    }
    return results.Row(**{**content, **changes})


def silent(message: str) -> None:
    raise AssertionError(f"unexpected message: {message}")


def make_job(**changes: Any) -> results.Job:
    members = tuple(
        results.Member("classic/pendulum-mixed-v0", "classic", "default", seed, {})
        for seed in range(2)
    )
    content: dict[str, Any] = {
        "run_id": "run-a",
        "suite": "tiny",
        "role": "test",
        "agent": "td3_bc",
        "config": {"hidden": (64, 64)},
        "members": members,
        "updates_total": 100,
        "phase_updates": {"train": 100},
        "eval_steps": (50, 100),
        "protocol": {"episodes": 3},
        "split": {"shape": (1, 1, 2), "devices": 1},
        "source_hash": "s",
        "datasets": {"classic/pendulum-mixed-v0": {"dataset_hash": "d"}},
    }
    return results.Job(**{**content, **changes})


class TestRow:
    def test_fields_are_those_of_the_contract_in_order(self) -> None:
        contract = [
            "schema",
            "row_id",
            "run_id",
            "suite",
            "role",
            "agent",
            "config",
            "setting",
            "hyper",
            "task",
            "family",
            "recipe_hash",
            "dataset_hash",
            "seed",
            "step",
            "updates_total",
            "phase_updates",
            "protocol",
            "returns",
            "lengths",
            "successes",
            "score",
            "status",
            "split_changed",
            "updates_per_s",
            "wall_s",
            "compile_s",
            "eval_s",
            "device",
            "flags",
            "versions",
            "commit",
            "population",
        ]
        names = [field.name for field in dataclasses.fields(results.Row)]
        assert names == [*contract, "error"]

    def test_id_ignores_time_speed_and_host_only(self) -> None:
        row = make_row()
        host = {
            "updates_per_s": 1.0,
            "wall_s": 9.0,
            "compile_s": 0.0,
            "eval_s": 8.0,
            "device": "gpu",
            "versions": {"jax": "0.11"},
            "commit": None,
        }
        assert make_row(**host).row_id == row.row_id
        content = {
            "returns": [-150.5, -140.0, -130.0],
            "hyper": {"alpha": 1.0},
            "seed": 1,
            "flags": {"precision": "tf32"},
            "population": {"members": 5, "devices": 2},
            "status": "diverged",
            "dataset_hash": "d2",
        }
        ids = {make_row(**{name: value}).row_id for name, value in content.items()}
        assert len(ids | {row.row_id}) == len(content) + 1

    def test_id_is_the_documented_hash(self) -> None:
        row = make_row()
        left_out = "row_id updates_per_s wall_s compile_s eval_s device versions commit"
        content = {
            name: value
            for name, value in dataclasses.asdict(row).items()
            if name not in left_out.split()
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        assert row.row_id == hashlib.sha256(text.encode()).hexdigest()[:16]


class TestRowFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        rows = [make_row(seed=seed, step=step) for seed in (0, 1) for step in (50, 100)]
        rows.append(make_row(seed=None, setting="dataset", agent=results.BEHAVIOUR))
        with results.RowFile(results.row_path(tmp_path, "run-a"), silent) as file:
            for row in rows:
                file.append(row)
        read = results.read_rows(tmp_path, silent)
        assert sorted(read, key=lambda r: r.row_id) == sorted(
            rows, key=lambda r: r.row_id
        )

    def test_non_finite_numbers_are_null_on_disk(self, tmp_path: Path) -> None:
        row = make_row(
            returns=[1.0, math.nan, math.inf],
            score=math.nan,
            hyper={"alpha": math.inf},
            status="diverged",
        )
        path = results.row_path(tmp_path, "run-a")
        with results.RowFile(path, silent) as file:
            file.append(row)
        record = json.loads(path.read_text())
        assert record["returns"] == [1.0, None, None]
        assert record["score"] is None and record["hyper"] == {"alpha": None}
        (read,) = results.read_rows(tmp_path, silent)
        assert read.returns[0] == 1.0 and all(map(math.isnan, read.returns[1:]))
        assert read.row_id == row.row_id
        # A repetition after a restart is recognised although NaN differs from NaN.
        with results.RowFile(path, silent) as file:
            file.append(row)
        assert len(path.read_text().splitlines()) == 1

    def test_equal_row_is_ignored_and_different_one_refused(
        self, tmp_path: Path
    ) -> None:
        path = results.row_path(tmp_path, "run-a")
        with results.RowFile(path, silent) as file:
            file.append(make_row())
            file.append(make_row(wall_s=99.0))
        with results.RowFile(path, silent) as file:
            assert set(file.row_ids) == {make_row().key}
            with pytest.raises(ResultsError, match=r"another row of run run-a.*seed 0"):
                file.append(make_row(score=1.0))
        assert results.read_rows(tmp_path, silent) == [make_row()]

    def test_failed_row_gives_way_to_a_retry(self, tmp_path: Path) -> None:
        failed = make_row(status="failed", error="out of memory", returns=[])
        path = results.row_path(tmp_path, "run-a")
        with results.RowFile(path, silent) as file:
            file.append(failed)
            file.append(make_row())
        assert results.read_rows(tmp_path, silent) == [make_row()]

    @pytest.mark.parametrize("cut", [1, 40])
    def test_torn_last_line_is_moved_aside(self, tmp_path: Path, cut: int) -> None:
        path = results.row_path(tmp_path, "run-a")
        with results.RowFile(path, silent) as file:
            file.append(make_row(seed=0))
            file.append(make_row(seed=1))
        torn = path.read_bytes()[:-cut]
        path.write_bytes(torn)
        messages: list[str] = []
        assert results.read_rows(tmp_path, messages.append) == [make_row(seed=0)]
        assert "skipped a torn last line" in messages[0]
        assert path.read_bytes() == torn  # reading changes nothing

        for _ in range(2):  # a second crash must not overwrite the first torn line
            path.write_bytes(torn)
            with results.RowFile(path, messages.append) as file:
                assert set(file.row_ids) == {make_row(seed=0).key}
                file.append(make_row(seed=1))
        aside = path.with_name("run-a.jsonl.torn").read_bytes()
        assert aside == 2 * (torn.splitlines()[1] + b"\n")
        assert "moved to run-a.jsonl.torn" in messages[1]
        assert len(results.read_rows(tmp_path, silent)) == 2

    def test_full_disk_leaves_a_valid_file(self, tmp_path: Path) -> None:
        path = results.row_path(tmp_path, "run-a")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with results.RowFile(path, silent) as file:
            file.append(make_row(seed=0))
            before = path.read_bytes()
            # The kernel writes the 100 bytes that fit and refuses the rest.
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
            try:
                with pytest.raises(
                    ResultsError, match=r"cannot be written.*free space"
                ):
                    file.append(make_row(seed=1))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert path.read_bytes() == before
            file.append(make_row(seed=1))
        assert [row.seed for row in results.read_rows(tmp_path, silent)] == [0, 1]

    def test_unwritable_folder(self, tmp_path: Path) -> None:
        (tmp_path / "rows").write_text("a file where the folder should be")
        with pytest.raises(ResultsError, match="cannot be written"):
            results.RowFile(results.row_path(tmp_path, "run-a"), silent)


class TestReadRows:
    def write(self, folder: Path, name: str, *records: Any) -> Path:
        path = folder / "rows" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path.write_text("".join(line + "\n" for line in lines))
        return path

    def record(self, **changes: Any) -> dict[str, Any]:
        """As a run writes it: `row_id` is that of the changed content."""
        return dataclasses.asdict(make_row(**changes))

    def test_gzip_and_nested_folders(self, tmp_path: Path) -> None:
        line = json.dumps(self.record()).encode() + b"\n"
        path = tmp_path / "2026" / "rows" / "run-a.jsonl.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(line))
        self.write(tmp_path, "copy.jsonl", self.record())  # equal, so it counts once
        self.write(tmp_path / "other", "note.txt", "not rows")
        (tmp_path / "stray.jsonl").write_text("not in a rows folder\n")
        assert results.read_rows(tmp_path, silent) == [make_row()]
        path.write_bytes(gzip.compress(line)[:-20])
        with pytest.raises(ResultsError, match=r"run-a.jsonl.gz: cannot be read"):
            results.read_rows(tmp_path, silent)

    def test_what_others_write_meanwhile_is_not_looked_at(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Checkpoints are renamed and removed, and so may be any folder."""
        self.write(tmp_path, "run-a.jsonl", self.record())
        for name in ("checkpoints/run-a/tmp-3/state", "locks", "gone"):
            (tmp_path / name).mkdir(parents=True)
        scan, seen = os.scandir, []

        def vanished(path: Any) -> Any:
            seen.append(Path(path).name)
            if Path(path).name == "gone":
                raise FileNotFoundError(path)
            return scan(path)

        monkeypatch.setattr(os, "scandir", vanished)
        assert results.read_rows(tmp_path, silent) == [make_row()]
        assert results.read_plans(tmp_path) is None
        assert "gone" in seen
        assert not {"checkpoints", "run-a", "tmp-3", "locks"} & set(seen)

    def test_files_come_by_path(self, tmp_path: Path) -> None:
        """A file of the folder itself may come after those of a folder in it."""
        made = [tmp_path / name for name in ("b/z", "c", "b/y", "a/x")]
        for path in made:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        assert files_below(tmp_path) == sorted(made)

    def test_order_is_independent_of_files(self, tmp_path: Path) -> None:
        first, second = self.record(), self.record(seed=1)
        self.write(tmp_path / "a", "1.jsonl", first, second)
        self.write(tmp_path / "b", "1.jsonl", second)
        self.write(tmp_path / "b", "2.jsonl", first)
        assert results.read_rows(tmp_path / "a", silent) == results.read_rows(
            tmp_path / "b", silent
        )

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"schema": 2}, r"bad\.jsonl:2: schema 2, this version reads 1"),
            ({"surprise": 1}, r"bad\.jsonl:2: .*unknown surprise"),
            (
                {"returns": None},
                r"bad\.jsonl:2: field 'returns' is None, expected list",
            ),
            ({"status": "fine"}, r"bad\.jsonl:2: status 'fine'"),
        ],
    )
    def test_refused_rows_name_file_and_line(
        self, tmp_path: Path, changes: dict[str, Any], match: str
    ) -> None:
        record = {**self.record(), **changes}
        self.write(tmp_path, "bad.jsonl", self.record(), record)
        with pytest.raises(ResultsError, match=match) as caught:
            results.read_rows(tmp_path, silent)
        assert "\n" not in str(caught.value)

    def test_two_rows_of_one_key_are_refused(self, tmp_path: Path) -> None:
        self.write(tmp_path, "bad.jsonl", self.record(), self.record(score=1.0))
        with pytest.raises(ResultsError, match=r"bad\.jsonl:2: differs from .*:1"):
            results.read_rows(tmp_path, silent)

    def test_missing_field_and_bad_json(self, tmp_path: Path) -> None:
        record = self.record()
        del record["task"]
        self.write(tmp_path, "bad.jsonl", record)
        with pytest.raises(ResultsError, match="lacks task"):
            results.read_rows(tmp_path, silent)
        self.write(tmp_path, "bad.jsonl", "{nonsense", self.record())
        with pytest.raises(ResultsError, match=r"bad\.jsonl:1: not JSON"):
            results.read_rows(tmp_path, silent)

    def test_six_thousand_rows_are_read_quickly(self, tmp_path: Path) -> None:
        returns = [float(i) + 0.123456789 for i in range(100)]
        for agent in range(6):
            records = [
                self.record(run_id=f"r{agent}", seed=i, returns=returns)
                for i in range(1000)
            ]
            self.write(tmp_path, f"r{agent}.jsonl", *records)
        start = time.process_time()  # not the wall, which neighbours lengthen
        assert len(results.read_rows(tmp_path, silent)) == 6000
        assert time.process_time() - start < 1.5


class TestPlan:
    def test_round_trip(self, tmp_path: Path) -> None:
        assert results.read_plan(tmp_path) is None
        results.write_plan(tmp_path, results.Plan(results.SCHEMA, (make_job(),)))
        read = results.read_plan(tmp_path)
        assert read is not None
        (job,) = read.jobs
        assert job.members == make_job().members
        assert job.eval_steps == make_job().eval_steps
        assert job.datasets == make_job().datasets
        assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]

    def test_last_evaluation_is_at_the_end(self) -> None:
        with pytest.raises(ResultsError, match=r"\[50\] must ascend and end at"):
            make_job(eval_steps=(50,))
        with pytest.raises(ResultsError, match="must ascend"):
            make_job(eval_steps=(100, 50, 100))

    def test_failed_write_keeps_the_old_plan(self, tmp_path: Path) -> None:
        results.write_plan(tmp_path, results.Plan(results.SCHEMA, (make_job(),)))
        before = results.plan_path(tmp_path).read_bytes()
        many = [make_job(run_id=f"run-{i}") for i in range(50)]
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(ResultsError, match="cannot be written"):
                results.write_plan(tmp_path, results.Plan(results.SCHEMA, tuple(many)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert results.plan_path(tmp_path).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("{", "cannot be read as JSON"),
            ('{"schema": 7}', "schema 7, this version reads 1"),
            ('{"schema": 1, "jobs": [{"members": []}]}', "not a plan"),
        ],
    )
    def test_broken_plan(self, tmp_path: Path, text: str, match: str) -> None:
        results.plan_path(tmp_path).write_text(text)
        with pytest.raises(ResultsError, match=match):
            results.read_plan(tmp_path)


def _hold(path: Path, ready: Any, release: Any) -> None:
    with results.try_lock(path) as held:
        ready.put(held)
        release.get()


class TestLock:
    def test_excludes_another_process_until_that_dies(self, tmp_path: Path) -> None:
        path = results.lock_path(tmp_path, "run-a")
        context = multiprocessing.get_context("spawn")
        ready, release = context.SimpleQueue(), context.SimpleQueue()
        process = context.Process(target=_hold, args=(path, ready, release))
        process.start()
        assert ready.get() is True
        with results.try_lock(path) as held:
            assert held is False
        with results.try_lock(results.lock_path(tmp_path, "run-b")) as held:
            assert held is True
        with (
            pytest.raises(ResultsError, match=r"held by another process for over 0.05"),
            results.lock(path, wait_s=0.05),
        ):
            pass
        process.kill()
        process.join()
        with results.lock(path, wait_s=1.0), results.try_lock(path) as held:
            assert held is False
        with results.try_lock(path) as held:
            assert held is True

    def test_error_inside_releases(self, tmp_path: Path) -> None:
        path = tmp_path / "l.lock"
        with pytest.raises(KeyError), results.lock(path):
            raise KeyError("inside")
        with results.try_lock(path) as held:
            assert held
        assert os.path.exists(path)
