"""`offrl figures`: which files it writes, and a part of a leaderboard."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import RESULTS, USAGE, offrl
from test_figures_leaderboard import made
from test_leaderboard_board import TASKS, fill, make_behaviour, make_rows
from test_leaderboard_progress import rows_of, scores

from offrl_jax import figures
from offrl_jax.leaderboard import board, choice, names, sections
from offrl_jax.leaderboard.model import PER_TASK

pytest_plugins = ["cli_fixtures"]


class TestCommand:
    @pytest.fixture
    def folder(self, home: Path) -> Path:
        """Results with a curve, and a second section of one agent alone."""
        rows = [*rows_of(scores()), make_behaviour(TASKS[0], 33.0)]
        rows += make_rows("iql", dict.fromkeys(TASKS, 40.0), seeds=5)
        rows += make_rows("bc@small", {TASKS[0]: 40.0}, seeds=5)
        return fill(home / "out", rows)

    def test_files_and_reasons(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ("out", "--out", "a/b", "--format", "svg", "pdf")
        assert offrl("figures", *arguments) == 0
        out, err = capsys.readouterr()
        written = {path.name for path in Path("a/b").iterdir()}
        stems = {
            *(f"tiny-classic-{figure}" for figure in figures.FIGURES),
            "tiny-classic-small-ranking",
            "tiny-classic-small-profiles",
            "tiny-classic-small-cost",
            "tiny-classic-small-tasks",
        }
        assert written == {f"{s}.{suffix}" for s in stems for suffix in ("svg", "pdf")}
        assert out == f"wrote {len(written)} files to a/b\n"
        assert (
            "offrl: improvement: left out of tiny-classic-small: a single ranked agent "
            "has no other to beat\n" in err
        )
        assert (
            "offrl: progress: left out of tiny-classic-small: runs were evaluated "
            "once\n" in err
        )

    def test_agents_keep_their_ranks_and_tasks_change_the_numbers(
        self, folder: Path
    ) -> None:
        contents = sections.read_contents(folder)
        whole = board.of_contents(contents)
        (first, *_) = choice.of_agents(whole, ["iql"]).sections
        (full, *_) = whole.sections
        assert [entry.label for entry in first.entries] == ["iql"]
        assert first.entries[0] in full.entries
        part = board.of_contents(choice.of_tasks(contents, [TASKS[1]])).sections
        assert [[t.task for t in section.tasks] for section in part] == [[TASKS[1]]]
        (iql,) = [e for e in part[0].entries if e.label == "iql"]
        assert iql.iqm is not None and iql.iqm.value == 40.0
        assert part[0].planned == sum(
            run.cell.task == TASKS[1] for run in contents.groups[0].runs
        )

    @pytest.mark.parametrize(
        ("code", "said", "arguments"),
        [
            (USAGE, "unknown figure 'rank'", ("out", "--out", "a", "--figure", "rank")),
            (USAGE, "offrl figures --help", ("out",)),
            (USAGE, "offrl figures --help", ("out", "--out", "a", "--format", "gif")),
            (USAGE, "at least one name", ("out", "--out", "a", "--agent")),
            (USAGE, "unknown agent", ("out", "--out", "a", "--agent", "cql")),
            (USAGE, "unknown task", ("out", "--out", "a", "--task", "t")),
            (RESULTS, "no such folder", ("none", "--out", "a")),
            (RESULTS, "cannot be made", ("out", "--out", "file")),
            (
                RESULTS,
                "nothing to draw; improvement: left out of tiny-classic-small",
                ("out", "--out", "a", "--agent", "bc", "--figure", "improvement"),
            ),
        ],
    )
    def test_mistakes_are_one_line(self, code, said, arguments, folder, home, refused):
        (home / "file").touch()
        refused(code, said, "figures", *arguments)


class TestNames:
    def test_stems_are_safe_and_different(self) -> None:
        parts = [
            made(1, suite="a/b", preset="../x"),
            made(1, suite="A_B", preset=".._X"),
            made(1, suite="q", updates_total=10),
            made(1, suite="q", updates_total=20),
            made(1, suite="q", updates_total=20, tuning=PER_TASK),
            made(1, suite="q", updates_total=20, protocol={"episodes": 50}),
            made(1, suite=".é" * 99, family=""),
        ]
        found = names.stems(parts)
        assert found[:2] == ["a_b-f-_x", "A_B-f-_X-2"]
        assert found[2:6] == [
            "q-f-10_updates",
            "q-f-20_updates-20_episodes",
            "q-f-20_updates-per_task",
            "q-f-20_updates-50_episodes",
        ]
        assert len(found[6]) < 130 and found[6].isascii()
        assert not any(name.startswith(".") or "/" in name for name in found)
