"""`offrl run` and `offrl leaderboard` on results folders, whole and damaged."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import jax
import pytest
from cli_runner import RESULTS, RUN, SETTINGS, SMALL, TINY, files, offrl

from offrl_jax.benchmark.jax_settings import configure_jax

pytest_plugins = ["cli_fixtures"]


class TestRun:
    def test_writes_rows_and_tables(self, results):
        rows = [
            json.loads(line)
            for path in (results / "rows").glob("bc-*.jsonl")
            for line in path.read_text().splitlines()
        ]
        assert sorted((row["seed"], row["step"]) for row in rows) == [
            (0, 20),
            (0, 40),
            (1, 20),
            (1, 40),
        ]
        assert {tuple(row["config"]["hidden"]) for row in rows} == {(8, 8)}
        assert {row["config"]["batch_size"] for row in rows} == {16}
        # At the end as many as asked for, along the curve the protocol's ten.
        assert all(len(row["returns"]) == (3, 10)[row["step"] < 40] for row in rows)
        assert {row["task"] for row in rows} == {TINY}
        # A pendulum's reward lies in [-(pi^2 + 0.1 8^2 + 0.001 2^2), 0] for 200 steps.
        assert all(-200 * 16.28 < r <= 0 for row in rows for r in row["returns"])

    def test_again_only_redraws(self, results, capsys):
        before = files(results)
        assert offrl(*RUN, *SMALL, *SETTINGS) == 0
        out, err = capsys.readouterr()
        assert "0 populations trained now, 2 runs were there" in err
        assert TINY in out
        assert files(results) == before

    def test_tables_are_those_of_the_leaderboard(self, results, home, capsys):
        command = ("leaderboard", "out", "--format", "md", "--out", "mine.md")
        assert offrl(*command) == 0
        assert "wrote mine.md" in capsys.readouterr().out
        drawn = (home / "mine.md").read_text()
        assert drawn == (results / "leaderboard.md").read_text()
        assert "| 1 | bc" in drawn

    @pytest.mark.parametrize("style", ["table", "md", "csv", "json"])
    def test_a_leaderboard_writes_nothing(self, style, results, home, capsys):
        before = files(home)
        assert offrl("leaderboard", "out", "--format", style) == 0
        assert "bc" in capsys.readouterr().out
        assert files(home) == before

    def test_configuring_jax_late_changes_no_devices(self, home, monkeypatch):
        devices = jax.devices()
        monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
        cores = set(range(len(devices) + 3))
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores)
        configure_jax()
        assert jax.devices() == devices


class TestResultsFolder:
    def rows(self, results: Path) -> Path:
        return next((results / "rows").glob("bc-*.jsonl"))

    def test_that_is_a_file(self, tiny, refused):
        (tiny / "out").write_text("mine")
        refused(RESULTS, ("out", "not a folder", "choose another"), *RUN)

    def test_below_a_file(self, tiny, refused):
        (tiny / "mine").write_text("mine")
        refused(RESULTS, "not a folder", *RUN[:-1], "mine/out")

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
    def test_that_is_not_writable(self, tiny, refused):
        (tiny / "out").mkdir(mode=0o500)
        refused(RESULTS, ("out", "not writable"), *RUN)

    def test_that_the_system_calls_not_writable(self, tiny, refused, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        refused(RESULTS, ("out", "not writable"), *RUN)

    def test_with_rows_of_another_schema(self, results, refused):
        path = self.rows(results)
        record = json.loads(path.read_text().splitlines()[0]) | {"schema": 99}
        path.write_text(json.dumps(record) + "\n" + path.read_text())
        parts = (f"{path.name}:1", "schema 99")
        refused(RESULTS, parts, *RUN, *SMALL, *SETTINGS)
        refused(RESULTS, parts, "leaderboard", "out")

    def test_with_a_foreign_line(self, results, refused):
        path = self.rows(results)
        path.write_text("hello\n" + path.read_text())
        refused(RESULTS, (f"{path.name}:1", "not JSON"), "leaderboard", "out")

    def test_with_a_damaged_plan(self, results, refused):
        (results / "plan.json").write_text("{")
        refused(RESULTS, "plan.json", *RUN, *SMALL, *SETTINGS)

    def test_that_is_absent_or_empty(self, home, refused):
        refused(RESULTS, "none", "leaderboard", "none")
        (home / "empty").mkdir()
        refused(RESULTS, "empty", "leaderboard", "empty")

    def test_with_a_torn_last_row_repeats_that_row(self, results, capsys):
        path = self.rows(results)
        whole = path.read_bytes()
        *head, last = whole.splitlines(keepends=True)
        path.write_bytes(b"".join(head) + last[: len(last) // 2])
        assert offrl(*RUN, *SMALL, *SETTINGS) == 0
        err = capsys.readouterr().err
        assert "torn" in err
        assert "Traceback" not in err
        torn = path.with_name(path.name + ".torn")
        assert torn.read_bytes().rstrip(b"\n") == last[: len(last) // 2]
        told = [json.loads(line)["row_id"] for line in path.read_text().splitlines()]
        assert told == [json.loads(line)["row_id"] for line in whole.splitlines()]

    def test_on_a_full_disk_keeps_its_rows(self, results, capsys, monkeypatch):
        path = self.rows(results)
        *head, _ = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(head))
        write = os.write

        def full(descriptor: int, data: bytes) -> int:
            if Path(os.readlink(f"/proc/self/fd/{descriptor}")) == path:
                write(descriptor, data[:7])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            assert offrl(*RUN, *SMALL, *SETTINGS) == RESULTS
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("offrl: ")
        assert "No space left on device" in last
        assert path.read_bytes() == b"".join(head)


class TestLeaderboardFile:
    def test_in_no_folder(self, results, refused):
        out = ("--format", "md", "--out", "none/board.md")
        refused(RESULTS, "none/board.md: cannot be written", "leaderboard", "out", *out)

    def test_that_is_a_folder(self, results, refused):
        refused(RESULTS, "cannot be written", "leaderboard", "out", "--out", "out")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_on_a_full_device(self, results, refused):
        out = ("--out", "/dev/full")
        refused(RESULTS, "No space left on device", "leaderboard", "out", *out)

    def test_that_cannot_be_finished_leaves_the_old_one(
        self, results, home, refused, monkeypatch
    ):
        (home / "board.md").write_text("the old one")
        write = Path.write_text

        def full(self: Path, text: str, **options: str) -> int:
            write(self, text[:9], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_text", full)
        refused(RESULTS, "No space left", "leaderboard", "out", "--out", "board.md")
