"""`offrl compare`: exit codes that a continuous integration can use, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import RESULTS, USAGE, offrl
from test_leaderboard_board import even, fill, make_rows

pytest_plugins = ["cli_fixtures"]


class TestCommand:
    @pytest.fixture
    def folders(self, home: Path) -> Path:
        before = make_rows("iql", even(60.0)) + make_rows("bc", even(40.0))
        fill(home / "a", before)
        fill(home / "same", before)
        fill(home / "up", make_rows("iql", even(70.0)) + make_rows("bc", even(40.0)))
        fill(home / "down", make_rows("iql", even(55.0)) + make_rows("bc", even(40.0)))
        fill(home / "other", make_rows("awr", even(60.0)))
        return home

    @pytest.mark.parametrize(
        ("after", "options", "code"),
        [
            ("down", (), 0),
            ("same", ("--fail-on", "worse"), 0),
            ("up", ("--fail-on", "worse"), 0),
            ("down", ("--fail-on", "worse"), 1),
            ("down", ("--fail-on", "worse", "--tolerance", "4.9"), 1),
            ("down", ("--fail-on", "worse", "--tolerance", "5.1"), 0),
            ("down", ("--fail-on", "worse", "--agent", "bc"), 0),
            ("same", ("--fail-on", "changed"), 0),
            ("up", ("--fail-on", "changed"), 1),
            ("up", ("--fail-on", "changed", "--agent", "bc"), 0),
        ],
    )
    def test_exit_codes(
        self,
        folders: Path,
        capsys: pytest.CaptureFixture[str],
        after: str,
        options: tuple[str, ...],
        code: int,
    ) -> None:
        assert offrl("compare", "a", after, *options) == code
        out, err = capsys.readouterr()
        assert "A  a   (baseline)" in out
        assert bool(err) == bool(code)
        if code and "worse" in options:
            assert err.startswith("offrl: worse: iql, IQM B - A -5.0 [-5.0, -5.0]")
        elif code:
            assert err.startswith("offrl: changed: 1 of 2 agents differ")

    def test_more_cells_are_a_change(self, folders: Path) -> None:
        fill(folders / "more", make_rows("iql", even(60.0)))
        fill(folders / "more", make_rows("bc", even(40.0)))
        fill(folders / "more", make_rows("awr", even(40.0)))
        assert offrl("compare", "a", "more", "--fail-on", "changed") == 1
        assert offrl("compare", "more", "a", "--fail-on", "changed") == 1

    def test_writes_a_file(
        self, folders: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ("compare", "a", "up", "--format", "json", "--out", "c.json")
        assert offrl(*command) == 0
        assert capsys.readouterr().out == "wrote c.json\n"
        assert json.loads((folders / "c.json").read_text())["cells"] == 4

    def test_refusals(self, folders: Path, refused) -> None:
        fill(folders / "one", make_rows("iql", even(60.0), seeds=1))
        fill(folders / "two", make_rows("iql", even(50.0), seeds=1))
        refused(RESULTS, "none: no such folder", "compare", "a", "none")
        refused(RESULTS, "nothing to compare: only in A", "compare", "a", "other")
        worse = ("--fail-on", "worse")
        refused(USAGE, "--tolerance needs", "compare", "a", "up", "--tolerance", "1")
        for value in ("-1", "nan"):
            options = (*worse, "--tolerance", value)
            refused(USAGE, "at least 0", "compare", "a", "up", *options)
        refused(USAGE, "unknown agent", "compare", "a", "up", "--agent", "iq")
        refused(USAGE, "--task needs at least one", "compare", "a", "up", "--task")

    def test_a_gate_that_cannot_judge_is_an_error(
        self, folders: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fill(folders / "one", make_rows("iql", even(60.0), seeds=1))
        fill(folders / "two", make_rows("iql", even(50.0), seeds=1))
        assert offrl("compare", "one", "two") == 0
        capsys.readouterr()
        assert offrl("compare", "one", "two", "--fail-on", "worse") == RESULTS
        assert "no agent can be judged (iql)" in capsys.readouterr().err
