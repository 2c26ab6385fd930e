"""What is drawn: complete, escaped, of bounded width and the same every time."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_leaderboard_board import (
    TASKS,
    even,
    example_rows,
    fill,
    make_behaviour,
    make_job,
    make_rows,
)

from offrl_jax import leaderboard
from offrl_jax.errors import ResultsError, UsageError
from offrl_jax.leaderboard import text
from offrl_jax.leaderboard.formats import CSV_COLUMNS
from offrl_jax.leaderboard.ranking import Bounds


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("results") / "tiny", example_rows())


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = make_rows("iql", even(60.0), seeds=6)
    job = make_job(rows)
    kept = [r for r in rows if not (r.task == TASKS[0] and r.seed in (2, 3))]
    folder = tmp_path_factory.mktemp("results") / "partial"
    return fill(folder, [*kept, *make_rows("bc", even(40.0), seeds=6)], [job])


class TestTable:
    def test_ranking_at_a_glance(self, example: Path) -> None:
        lines = leaderboard.render(example, "table").splitlines()
        assert lines[0] == "tiny · classic"
        assert lines[1] == (
            "2 tasks, 10 seeds x 20 episodes, 100 updates, one setting for all tasks"
        )
        body = [line.split() for line in lines]
        assert [words[:3] for words in body if words and words[0] in "13"] == [
            ["1", "iql", "60.0"],
            ["1", "td3_bc", "59.0"],
            ["3", "bc", "40.0"],
        ]
        assert ["behaviour", "30.0"] in body
        assert any(words[:2] == [TASKS[0], "60.0"] for words in body)
        assert "PARTIAL" not in "\n".join(lines)

    @pytest.mark.parametrize("width", [80, 100, 160])
    def test_width_is_kept_and_nothing_is_cut(self, partial: Path, width: int) -> None:
        drawn = leaderboard.render(partial, "table", width=width)
        assert max(map(len, drawn.splitlines())) <= width
        assert "…" not in drawn
        for word in ("iql*‡", "bc", "behaviour", *TASKS, "60.0", "40.0"):
            assert word in drawn

    def test_strip_marks_the_value_within_its_interval(self, example: Path) -> None:
        strips = [
            line
            for line in leaderboard.render(example, "table", width=110).splitlines()
            if "●" in line
        ]
        assert len(strips) == 3
        iql, td3_bc, bc = (line.index("●") for line in strips)
        assert bc < td3_bc <= iql
        assert all("─" in line for line in strips)

    def test_partial_says_what_is_missing(self, partial: Path) -> None:
        drawn = leaderboard.render(partial, "table")
        assert "PARTIAL: 22 of 24 runs" in drawn.splitlines()[0]
        assert f"iql on {TASKS[0]}: seeds 2-3 missing" in drawn
        assert "‡ runs are absent" in drawn

    def test_plain_without_colour_and_styled_with_it(self, example: Path) -> None:
        assert "\x1b" not in leaderboard.render(example, "table")
        assert "\x1b[" in leaderboard.render(example, "table", colour=True)

    def test_hostile_names_are_shown_and_not_obeyed(self, tmp_path: Path) -> None:
        name = "a|b[red]\x1b[2J<i>*x*"
        rows = make_rows(name, even(50.0), seeds=5, run_id="x")
        folder = fill(tmp_path, rows)
        drawn = leaderboard.render(folder, "table", width=200)
        assert "a|b[red]\\x1b[2J<i>*x*" in drawn and "\x1b" not in drawn
        markdown = leaderboard.render(folder, "md")
        assert r"a\|b\[red\]\\x1b\[2J\<i\>\*x\*" in markdown
        (header,) = [li for li in markdown.splitlines() if li.startswith("| task")]
        assert header.replace(r"\|", "").count("|") == 4


class TestMachineFormats:
    def test_json_is_lossless(self, example: Path) -> None:
        record = json.loads(leaderboard.render(example, "json"))
        (section,) = record["sections"]
        entries = {entry["agent"]: entry for entry in section["entries"]}
        for row in example_rows():
            if row.seed is None:
                continue
            (cell,) = [c for c in entries[row.agent]["cells"] if c["task"] == row.task]
            assert cell["values"][cell["seeds"].index(row.seed)] == row.score
        assert section["partial"] is False and entries["bc"]["rank"] == 3
        assert section["protocol"] == {"episodes": 20}

    def test_csv_agrees_with_json(self, partial: Path) -> None:
        lines = list(csv.DictReader(io.StringIO(leaderboard.render(partial, "csv"))))
        assert tuple(lines[0]) == CSV_COLUMNS
        (section,) = json.loads(leaderboard.render(partial, "json"))["sections"]
        found = {(li["agent"], li["task"], li["statistic"]): li for li in lines}
        for entry in section["entries"]:
            overall = found[entry["agent"], "ranked tasks", "iqm"]
            assert float(overall["value"]) == entry["iqm"]["value"]
            assert float(overall["low"]) == entry["iqm"]["low"]
            for cell in entry["cells"]:
                line = found[entry["agent"], cell["task"], "mean"]
                assert float(line["value"]) == cell["mean"]["value"]
                assert int(line["missing"]) == len(cell["missing"])
        assert found["iql", TASKS[0], "mean"]["missing"] == "2"
        assert {line["partial"] for line in lines} == {"1"}

    def test_markdown_tables_are_rectangular(self, partial: Path) -> None:
        markdown = leaderboard.render(partial, "md")
        tables = [
            block.splitlines()
            for block in markdown.split("\n\n")
            if block.startswith("| ")
        ]
        assert len(tables) == 2
        for lines in tables:
            assert len({line.count("|") for line in lines}) == 1
        assert "**PARTIAL: 22 of 24 runs**" in markdown

    def test_behaviour_is_in_every_format(self, tmp_path: Path) -> None:
        rows = make_rows("iql", even(60.0), seeds=5)
        rows += [make_behaviour(task, 33.25) for task in TASKS]
        folder = fill(tmp_path, rows)
        for name, value in (("csv", "33.25"), ("json", "33.25"), ("md", "33.2")):
            assert value in leaderboard.render(folder, name)


class TestRender:
    def test_same_rows_same_bytes_in_another_process(self, example: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from offrl_jax import leaderboard\n"
            "for name in leaderboard.FORMATS:\n"
            "    text = leaderboard.render(Path(sys.argv[1]), name)\n"
            "    sys.stdout.buffer.write(text.encode())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(example)],
            capture_output=True,
            check=True,
            # Wishes of the environment must not show.
            env={"COLUMNS": "40", "FORCE_COLOR": "1", "JAX_PLATFORMS": "cpu"},
        )
        here = "".join(leaderboard.render(example, n) for n in leaderboard.FORMATS)
        assert done.stdout.decode() == here

    def test_unknown_format_and_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"unknown format 'jso'.*'json'"):
            leaderboard.render(tmp_path, "jso")
        with pytest.raises(ResultsError, match="run `offrl benchmark`"):
            leaderboard.render(tmp_path, "table")


class TestText:
    @pytest.mark.parametrize(
        ("value", "want"),
        [(None, "-"), (-0.04, "0.0"), (61.25, "61.2"), (-1234.5, "-1234")],
    )
    def test_number(self, value: float | None, want: str) -> None:
        assert text.number(value) == want

    def test_interval_and_spans(self) -> None:
        assert text.interval(Bounds(2.0, 1.0, 3.04)) == "[1.0, 3.0]"
        assert text.interval(Bounds(2.0, None, None)) == ""
        assert text.span([10, 8, 10]) == "8-10"
        assert text.seconds(1234.5) == "1,234" and text.seconds(12.34) == "12.3"
