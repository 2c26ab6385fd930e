"""Points of training metrics on disk, against crashes, full disks, contradictions."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offrl_jax import results
from offrl_jax.benchmark import recording
from offrl_jax.benchmark.recording import record_point, recording_steps
from offrl_jax.errors import ResultsError
from offrl_jax.results import Job, Member, MetricFile, MetricPoint, read_metrics


def silent(line: str) -> None:
    pytest.fail(f"unexpected message: {line}")


def make_point(**changes: Any) -> MetricPoint:
    values: dict[str, Any] = {
        "run_id": "run-a",
        "agent": "td3_bc@quick",
        "task": "classic/pendulum-mixed-v0",
        "setting": "default",
        "seed": 0,
        "phase": "train",
        "step": 20,
        "values": {"actor_loss": -1.5, "q_mean": 3.25e-5},
    }
    return MetricPoint(**{**values, **changes})


def path_in(folder: Path) -> Path:
    return results.metric_path(folder, "run-a")


class TestMetricFile:
    def test_round_trip_in_the_order_of_training(self, tmp_path: Path) -> None:
        points = [
            make_point(seed=seed, phase=phase, step=step)
            for phase in ("world", "actor")  # not in alphabetical order
            for step in (9, 10)
            for seed in (1, 0)
        ]
        with MetricFile(path_in(tmp_path), silent) as file:
            file.append(points)
        read = read_metrics(tmp_path, silent)
        assert [(p.seed, p.phase, p.step) for p in read] == [
            (seed, phase, step)
            for seed in (0, 1)
            for phase in ("world", "actor")
            for step in (9, 10)
        ]
        assert set(read) == set(points)

    def test_what_is_not_finite_is_null_on_disk(self, tmp_path: Path) -> None:
        point = make_point(values={"a": math.nan, "b": -math.inf, "c": 1.0})
        with MetricFile(path_in(tmp_path), silent) as file:
            file.append([point])
        record = json.loads(path_in(tmp_path).read_text())
        assert record["values"] == {"a": None, "b": None, "c": 1.0}
        (read,) = read_metrics(tmp_path, silent)
        assert math.isnan(read.values["a"]) and math.isnan(read.values["b"])
        assert read == point != make_point(values={"a": 0.0, "b": 0.0, "c": 1.0})

    def test_points_that_are_there_stay(self, tmp_path: Path) -> None:
        with MetricFile(path_in(tmp_path), silent) as file:
            file.append([make_point(seed=0)])
        before = path_in(tmp_path).read_bytes()
        other = make_point(seed=0, values={"actor_loss": 9.0, "q_mean": 9.0})
        with MetricFile(path_in(tmp_path), silent) as file:
            assert file.keys == {make_point().key}
            file.append([other])
            assert path_in(tmp_path).read_bytes() == before
            file.append([other, make_point(seed=1)])
            file.append([make_point(seed=1)])
        assert read_metrics(tmp_path, silent) == [make_point(), make_point(seed=1)]

    @pytest.mark.parametrize("cut", [1, 30])
    def test_torn_last_line_is_repaired(self, tmp_path: Path, cut: int) -> None:
        """Killed inside a batch: the members that are whole stay, the rest comes."""
        path = path_in(tmp_path)
        batch = [make_point(seed=seed) for seed in range(3)]
        with MetricFile(path, silent) as file:
            file.append(batch)
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        with pytest.warns(UserWarning, match="skipped a torn last line"):
            assert read_metrics(tmp_path) == batch[:2]
        said: list[str] = []
        with MetricFile(path, said.append) as file:
            file.append(batch)
        assert path.read_bytes() == whole
        assert len(said) == 1 and "its interval will be repeated" in said[0]
        assert path.with_name("run-a.jsonl.torn").stat().st_size > 0
        assert read_metrics(tmp_path, silent) == batch

    def test_full_disk_leaves_a_valid_file(self, tmp_path: Path) -> None:
        path = path_in(tmp_path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with MetricFile(path, silent) as file:
            file.append([make_point(seed=0)])
            before = path.read_bytes()
            # Two lines and a half fit: nothing of the batch may stay.
            limit = int(len(before) * 3.5)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                with pytest.raises(ResultsError, match=r"cannot be written.*free"):
                    file.append([make_point(seed=seed) for seed in range(1, 6)])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert path.read_bytes() == before
            file.append([make_point(seed=1)])
        assert [p.seed for p in read_metrics(tmp_path, silent)] == [0, 1]


class TestReadMetrics:
    def write(self, folder: Path, *records: Any, name: str = "bad.jsonl") -> Path:
        path = folder / "metrics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
        path.write_text("".join(line + "\n" for line in lines))
        return path

    def record(self, **changes: Any) -> dict[str, Any]:
        return {"schema": 1, **dataclasses.asdict(make_point()), **changes}

    def test_nothing_recorded_is_no_error(self, tmp_path: Path) -> None:
        assert read_metrics(tmp_path) == []
        assert read_metrics(str(tmp_path / "absent")) == []

    def test_copies_count_once_gzip_and_folders_below(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, self.record(), name="a.jsonl")
        self.write(tmp_path / "copy", self.record(), name="b.jsonl")
        packed = tmp_path / "old" / "metrics" / "c.jsonl.gz"
        packed.parent.mkdir(parents=True)
        packed.write_bytes(gzip.compress(path.read_bytes()))
        (tmp_path / "stray.jsonl").write_text("not in a metrics folder\n")
        assert read_metrics(tmp_path, silent) == [make_point()]

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"schema": 2}, r"bad\.jsonl:2: schema 2, this version reads 1"),
            ({"surprise": 1}, r"bad\.jsonl:2: missing or unknown fields: surprise"),
            ({"step": "1"}, r"bad\.jsonl:2: field 'step' is '1', expected int"),
            ({"values": {"a": "x"}}, r"bad\.jsonl:2: metric 'a' is 'x'"),
            ({"values": {"a": 1.0}}, r"bad\.jsonl:2: differs from .*:1 .*seed 0"),
        ],
    )
    def test_refused_points_name_file_and_line(
        self, tmp_path: Path, changes: dict[str, Any], match: str
    ) -> None:
        self.write(tmp_path, self.record(), self.record(**changes))
        with pytest.raises(ResultsError, match=match) as caught:
            read_metrics(tmp_path, silent)
        assert "\n" not in str(caught.value)

    def test_foreign_lines(self, tmp_path: Path) -> None:
        self.write(tmp_path, "{nonsense", self.record())
        with pytest.raises(ResultsError, match=r"bad\.jsonl:1: not JSON"):
            read_metrics(tmp_path, silent)
        path = self.write(tmp_path, {"loss": 1.0})
        with pytest.raises(ResultsError, match=r":1: not a metric of offrl_jax"):
            MetricFile(path, silent)


class TestGrid:
    @pytest.mark.parametrize("updates", [1, 7, 49, 50, 51, 99, 6_000, 1_000_003])
    @pytest.mark.parametrize("stride", [1, 2, 5])
    def test_is_even_and_ends_at_the_end(self, updates: int, stride: int) -> None:
        steps = recording_steps(updates * stride, stride)
        assert len(steps) == min(updates, recording.POINTS)
        assert steps[-1] == updates * stride
        widths = np.diff((0, *steps))
        assert (widths % stride == 0).all() and widths.min() >= stride
        assert widths.max() - widths.min() <= stride

    def test_round_numbers_of_updates_have_equal_intervals(self) -> None:
        assert recording_steps(100_000, 2) == tuple(range(2_000, 100_001, 2_000))


def test_a_recorded_point_has_the_digits_of_float32(tmp_path: Path) -> None:
    members = tuple(Member("t/x-v0", "t", "default", seed, {}) for seed in (0, 1))
    job = Job(
        run_id="run-a",
        suite="tiny",
        role="test",
        agent="bc",
        config={},
        members=members,
        updates_total=10,
        phase_updates={"train": 10},
        eval_steps=(10,),
        protocol={},
        split={},
        source_hash="",
        datasets={},
    )
    value = np.float32([0.1, 0.2])
    with MetricFile(path_in(tmp_path), silent) as file:
        record_point(file, job, "train", 10, {"loss": value}, np.array([False, True]))
    first, second = path_in(tmp_path).read_text().splitlines()
    assert '"loss":0.1}' in first and '"loss":null}' in second
    found = [p.values["loss"] for p in read_metrics(tmp_path, silent)]
    assert np.float32(found[0]) == value[0] and math.isnan(found[1])
