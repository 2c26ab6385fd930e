"""Rules of honesty and bad input, through the command as a user meets them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import time
from pathlib import Path

import pytest
from cli_runner import RESULTS, offrl
from test_leaderboard_board import TASKS, even, fill, make_row, make_rows

from offrl_jax import leaderboard
from offrl_jax.leaderboard.published import COLUMNS
from offrl_jax.results import Row
from offrl_jax.results.rows import to_line

pytest_plugins = ["cli_fixtures"]

Output = pytest.CaptureFixture[str]
HEADER = ",".join(COLUMNS)


def drawn(output: Output, *options: str) -> str:
    assert offrl("leaderboard", "out", *options) == 0
    return output.readouterr().out


def sections(output: Output, *options: str) -> list[dict]:
    return json.loads(drawn(output, "--format", "json", *options))["sections"]


class TestEditedRows:
    def test_no_command_counts_them(self, home: Path, refused) -> None:
        rows = make_rows("iql", even(60.0), seeds=2)
        fill(home / "whole", rows)
        path = fill(home / "out", rows) / "rows" / "tiny-iql-default.jsonl"
        first, second, *rest = path.read_text().splitlines(keepends=True)
        assert '"score":62.5' in second
        second = second.replace('"score":62.5', '"score":92.5')
        path.write_text("".join([first, second, *rest]))
        told = (f"{path.name}:2: row_id", "was changed after it was written")
        refused(RESULTS, told, "leaderboard", "out")
        refused(RESULTS, told, "compare", "whole", "out")
        refused(RESULTS, told, "progress", "out", "--out", "p.png")
        refused(RESULTS, told, "curves", "out", "--out", "c.png")


class TestProtocols:
    def rows(self) -> list[Row]:
        rows = make_rows("iql", even(60.0), seeds=6, protocol=self.protocol(20))
        more = {"protocol": self.protocol(100, seed=7), "run_id": "bc-100"}
        return rows + make_rows("bc", even(40.0), seeds=5, **more)

    def protocol(self, episodes: int, **changes: int) -> dict[str, int]:
        return {
            "episodes": episodes,
            "evaluations": 2,
            "seed": 0,
            "version": 1,
        } | changes

    def test_never_share_a_table(self, home: Path, capsys: Output) -> None:
        fill(home / "out", self.rows())
        found = sections(capsys)
        assert [[e["label"] for e in s["entries"]] for s in found] == [["bc"], ["iql"]]
        assert "POOLED" not in drawn(capsys)

    def test_share_one_if_asked_for_and_it_says_so(
        self, home: Path, capsys: Output
    ) -> None:
        fill(home / "out", self.rows())
        (section,) = sections(capsys, "--pool-protocols")
        assert [entry["label"] for entry in section["entries"]] == ["iql", "bc"]
        both = [self.protocol(100, seed=7), self.protocol(20)]
        assert section["protocol"] == {"pooled": both}
        warning = (
            "asked for: runs of 2 protocols stand together: episodes 100 seed 7 (10 "
            "runs), episodes 20 seed 0 (12 runs)"
        )
        assert section["warnings"] == [warning]
        for style in ("table", "md"):
            text = drawn(capsys, "--format", style, "--pool-protocols")
            assert warning in " ".join(text.split())
            assert "one setting for all tasks, 2 protocols POOLED" in " ".join(
                text.split()
            )
        lines = csv.DictReader(
            io.StringIO(drawn(capsys, "--format", "csv", "--pool-protocols"))
        )
        assert {json.loads(li["protocol"])["pooled"][0]["seed"] for li in lines} == {7}

    @pytest.mark.parametrize(
        "changes",
        [
            {"family": "d4rl"},
            {"agent": "bc@quick"},
            {"updates_total": 7, "step": 7},
            {"protocol": {"episodes": 20, "evaluations": 2, "seed": 0, "version": 2}},
            {"protocol": {"episodes": 20, "evaluations": 2, "seed": 0, "new": 1}},
        ],
    )
    def test_nothing_else_is_pooled(
        self, home: Path, capsys: Output, changes: dict[str, object]
    ) -> None:
        rows = self.rows()
        own = {"row_id": "", "run_id": "other", **changes}
        other = [dataclasses.replace(r, **own) for r in rows if r.agent == "bc"]
        iql = [row for row in rows if row.agent == "iql"]
        fill(home / "out", iql + other)
        assert len(sections(capsys, "--pool-protocols")) == 2

    def test_a_seed_counts_once(self, home: Path, capsys: Output) -> None:
        rows = make_rows("iql", even(60.0), seeds=2)
        again = {"protocol": {"episodes": 30}, "run_id": "z-later"}
        fill(home / "out", rows + make_rows("iql", even(70.0), seeds=2, **again))
        (section,) = sections(capsys, "--pool-protocols")
        (entry,) = section["entries"]
        assert entry["mean"]["value"] == 70.0 and section["runs"] == 4
        note = "note: 4 runs are superseded by later ones"
        assert note in drawn(capsys, "--pool-protocols")

    def test_a_single_protocol_is_not_called_pooled(
        self, home: Path, capsys: Output
    ) -> None:
        fill(home / "out", make_rows("iql", even(60.0), seeds=5))
        assert drawn(capsys, "--pool-protocols") == drawn(capsys)

    def test_the_page_says_so(self, home: Path, capsys: Output) -> None:
        fill(home / "out", self.rows())
        said = "asked for: runs of 2 protocols stand together"
        assert said in drawn(capsys, "--format", "html", "--pool-protocols")
        assert said not in drawn(capsys, "--format", "html")


class TestPublished:
    TABLE = (
        f"{HEADER}\n"
        '"Doe et al., 2025, Table 2",classic,{0},iql,99.5,"± 2.1 (s.d., 4 seeds)",'
        '"1e6 updates, best <checkpoint>"\n'
        "\n"
        '"Doe et al., 2025, Table 2",classic,{0},bc,41,,\n'
        "Roe 2024,classic,{0},iql,97,,last checkpoint\n"
    ).replace("{0}", TASKS[0])

    def folder(self, home: Path, text: str) -> Path:
        fill(home / "out", make_rows("iql", even(60.0), seeds=5))
        (home / "out" / "published.csv").write_text(text, encoding="utf-8")
        return home / "out"

    def test_stand_in_tables_of_their_own(self, home: Path, capsys: Output) -> None:
        fill(home / "out", make_rows("iql", even(60.0), seeds=5))
        styles = (*leaderboard.FORMATS, "html")
        before = {style: drawn(capsys, "--format", style) for style in styles}
        self.folder(home, self.TABLE)
        after = {style: drawn(capsys, "--format", style) for style in styles}
        assert after["csv"] == before["csv"]
        one, two = json.loads(before["json"]), json.loads(after["json"])
        assert one["sections"] == two["sections"] and one["published"] == []
        assert [table["source"] for table in two["published"]] == [
            "Doe et al., 2025, Table 2",
            "Roe 2024",
        ]
        assert two["published"][0]["scores"][0] == {
            "task": TASKS[0],
            "agent": "iql",
            "score": 99.5,
            "spread": "± 2.1 (s.d., 4 seeds)",
            "conditions": "1e6 updates, best <checkpoint>",
        }
        assert "published by others, not measured here" in after["html"]
        assert "best <checkpoint>" not in after["html"]
        for style in ("table", "md"):
            measured, *tables = after[style].split(
                "classic: published by others, not measured here"
            )
            assert len(tables) == 2
            assert "99.5" not in measured and "97" not in measured
            assert "Doe et al., 2025, Table 2" in tables[0] and "99.5" in tables[0]
            assert "± 2.1 (s.d., 4 seeds)" in tables[0] and "41" in tables[0]
            assert "Roe 2024" in tables[1] and "last checkpoint" in tables[1]
        assert r"best \<checkpoint\>" in after["md"]

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("", "published.csv:1: no column 'source'"),
            (f"{HEADER},rank\n", "published.csv:1: unknown column 'rank'; the header"),
            (HEADER.replace("score", "value"), "unknown column 'value', no column 'sc"),
            (f"{HEADER},task\n", "published.csv:1: a column is there twice"),
            (f"{HEADER}\ns,f,t,a,high,,\n", ".csv:2: score is 'high', expected a num"),
            (f"{HEADER}\ns,f,t,a,nan,,\n", "published.csv:2: score is 'nan'"),
            (f"{HEADER}\n\n ,f,t,a,1,,\n", "published.csv:3: source is empty"),
            (f"{HEADER}\ns,f,t,a,1\n", "published.csv:2: 5 values for 7 columns"),
            (f"{HEADER}\ns,f,t,a,1,,\ns,f,t,a,2,,\n", ".csv:3: a second number of a"),
            (f'{HEADER}\ns,f,t,a,1,"x\n', "published.csv: cannot be read as CSV"),
        ],
    )
    def test_what_is_wrong_is_told(
        self, home: Path, refused, text: str, told: str
    ) -> None:
        self.folder(home, text)
        refused(RESULTS, told, "leaderboard", "out")

    def test_other_order_of_columns_and_a_mark_of_bytes(
        self, home: Path, capsys: Output
    ) -> None:
        text = (
            "\ufefftask,score,agent,family,source,conditions,spread\nt,1.5,a,f,s,c,d\n"
        )
        self.folder(home, text)
        (table,) = json.loads(drawn(capsys, "--format", "json"))["published"]
        assert table["scores"][0]["score"] == 1.5 and table["source"] == "s"

    def test_alone_they_are_no_leaderboard(self, home: Path, refused) -> None:
        (home / "out").mkdir()
        (home / "out" / "published.csv").write_text(self.TABLE, encoding="utf-8")
        refused(RESULTS, "no rows and no plan", "leaderboard", "out")


class TestCounting:
    def test_only_the_last_checkpoint_counts(self, home: Path, capsys: Output) -> None:
        """An earlier and much better one changes no byte; an unfinished run is none."""
        rows = make_rows("iql", even(60.0), seeds=5)
        fill(home / "out", rows)
        before = drawn(capsys, "--format", "json")
        best = [dataclasses.replace(r, row_id="", step=90, score=99.0) for r in rows]
        fill(home / "out", best)
        assert drawn(capsys, "--format", "json") == before
        unfinished = make_row(agent="bc", step=90, score=99.0)
        fill(home / "out", [unfinished])
        (section,) = sections(capsys)
        assert "99.0" not in drawn(capsys)
        assert section["absent"] == [
            f"bc on {TASKS[0]}: seed 0 missing, at 90 of 100 updates"
        ]

    def test_families_are_never_averaged(self, home: Path, capsys: Output) -> None:
        rows = make_rows("iql", {TASKS[0]: 60.0}, seeds=5)
        other = {"family": "regenerated", "run_id": "r"}
        fill(home / "out", rows + make_rows("iql", {"m/x-v0": 20.0}, seeds=5, **other))
        means = {
            s["family"]: s["entries"][0]["mean"]["value"] for s in sections(capsys)
        }
        assert means == {"classic": 60.0, "regenerated": 20.0}

    def test_settings_chosen_per_task_stand_apart(
        self, home: Path, capsys: Output
    ) -> None:
        rows = make_rows("iql", even(60.0), seeds=5)
        for i, task in enumerate(TASKS):
            own = {"setting": "best", "hyper": {"alpha": float(i)}}
            rows += make_rows("iql", {task: 90.0}, seeds=5, **own)
        fill(home / "out", rows)
        tunings = {s["tuning"]: s["entries"][0]["setting"] for s in sections(capsys)}
        assert tunings == {
            "one setting for all tasks": "default",
            "settings chosen per task": "best",
        }

    def test_failed_diverged_and_few_runs_are_marked(
        self, home: Path, capsys: Output
    ) -> None:
        rows = make_rows("iql", even(60.0), seeds=4)
        rows[0] = dataclasses.replace(
            rows[0], row_id="", status="failed", error="out of memory"
        )
        rows[1] = dataclasses.replace(rows[1], row_id="", status="diverged", score=None)
        fill(home / "out", rows)
        for style in ("table", "md"):
            text = " ".join(drawn(capsys, "--format", style).replace("\\", "").split())
            assert "iql*†‡" in text
            assert "PARTIAL: 7 of 8 runs" in text
            assert f"iql on {TASKS[0]}: seed 0 failed (out of memory)" in text
            assert f"iql on {TASKS[0]}: seed 1 diverged by 100 updates" in text


class TestOddInput:
    def test_one_seed_one_task(self, home: Path, capsys: Output) -> None:
        fill(home / "out", [make_row(agent="iql", score=50.0)])
        for style in leaderboard.FORMATS:
            assert "iql" in drawn(capsys, "--format", style)
        (entry,) = [e for section in sections(capsys) for e in section["entries"]]
        assert entry["iqm"] == {"value": 50.0, "low": None, "high": None}

    def test_all_scores_equal(self, home: Path, capsys: Output) -> None:
        rows = [
            make_row(agent=agent, task=task, seed=seed, score=50.0)
            for agent in ("iql", "bc")
            for task in TASKS
            for seed in range(5)
        ]
        fill(home / "out", rows)
        (section,) = sections(capsys)
        assert [entry["rank"] for entry in section["entries"]] == [1, 1]
        assert section["entries"][0]["iqm"] == {"value": 50, "low": 50, "high": 50}
        assert "[50.0, 50.0]" in drawn(capsys)

    def test_scores_that_are_not_finite(self, home: Path, capsys: Output) -> None:
        """A run without a finite return is diverged, whatever it calls itself."""
        rows = make_rows("iql", even(60.0), seeds=5)
        bad = {"row_id": "", "score": math.nan, "returns": [math.inf] * 20}
        rows[0] = dataclasses.replace(rows[0], **bad)
        fill(home / "out", rows)
        (section,) = sections(capsys)
        assert section["entries"][0]["cells"][0]["values"][0] == 0.0
        assert section["entries"][0]["cells"][0]["diverged"] == [0]
        assert "NaN" not in drawn(capsys, "--format", "json")

    @pytest.mark.parametrize(
        "name", ["<script>alert(1)</script>|`x`", "long-" + "n" * 290 + "-tail"]
    )
    def test_odd_names(self, home: Path, capsys: Output, name: str) -> None:
        rows = make_rows(name, {f"{name}-v0": 50.0}, seeds=5, run_id="x")
        rows += make_rows("bc", {f"{name}-v0": 40.0}, seeds=5)
        fill(home / "out", rows)
        fill(home / "more", rows)
        for command in (("leaderboard", "out"), ("compare", "out", "more")):
            assert offrl(*command) == 0
            table = capsys.readouterr().out
            assert max(map(len, table.splitlines())) <= 100
            assert len(table.splitlines()) < 60
            assert offrl(*command, "--format", "md") == 0
            markdown = capsys.readouterr().out
            if "script" in name:
                assert "<script>" not in markdown and r"\<script\>" in markdown
                assert "<script>alert(1)</script>" in table.replace("\n", "")
            else:
                assert "…" in table and name not in table and "-tail" in table
                assert name in markdown

    def test_rows_of_a_newer_schema(self, home: Path, refused) -> None:
        fill(home / "whole", make_rows("iql", even(60.0), seeds=2))
        path = fill(home / "out", make_rows("iql", even(60.0), seeds=2)) / "rows"
        (file,) = path.iterdir()
        file.write_text(file.read_text().replace('"schema":1', '"schema":2', 1))
        told = (f"{file.name}:1: schema 2, this version reads 1", "use the version")
        refused(RESULTS, told, "leaderboard", "out")
        refused(RESULTS, told, "compare", "whole", "out")

    @pytest.mark.long
    def test_a_thousand_agents(self, home: Path) -> None:
        """Time grows with the agents, not with their square; programs are shared."""
        path = home / "out" / "rows" / "all.jsonl"
        path.parent.mkdir(parents=True)
        means = ((f"a{i}", {TASKS[0]: i / 10}) for i in range(1000))
        rows = (row for agent, mean in means for row in make_rows(agent, mean, 2))
        path.write_text("".join(f"{to_line(row)}\n" for row in rows))
        start = time.process_time()
        board = leaderboard.build(home / "out")
        found = leaderboard.compare(home / "out", home / "out")
        for style in leaderboard.FORMATS:
            leaderboard.draw(board, style)
        for style in leaderboard.COMPARISON_FORMATS:
            leaderboard.draw_comparison(found, style)
        assert len(board.sections[0].entries) == len(found.agents) == 1000
        assert time.process_time() - start < 40
