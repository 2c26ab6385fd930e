"""Tables of LaTeX: rectangular, escaped, in lines that fit, and compiled for real."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_figures_leaderboard import around, made
from test_leaderboard_board import (
    TASKS,
    example_rows,
    fill,
    make_job,
    make_row,
    make_rows,
    only_section,
)

from offrl_jax import leaderboard
from offrl_jax.leaderboard import latex, ranking
from offrl_jax.leaderboard.model import FEW_SEEDS, Leaderboard, Section
from offrl_jax.leaderboard.ranking import Bounds

HOSTILE = "[a_%&#$1]{b}~^\\c<d>|*\"'`--é\x1b\n日"


def tables(code: str) -> list[list[list[str]]]:
    """Cells of every table, line by line; cells are told apart by bare ampersands."""
    found = []
    for body in re.findall(r"\\toprule\n(.*?)\\bottomrule", code, re.S):
        lines = [line for line in body.split("\n") if line and line != r"\midrule"]
        assert all(line.endswith(r" \\") for line in lines)
        found.append([re.split(r"(?<!\\) & ", line[:-3]) for line in lines])
    return found


def check(code: str) -> None:
    """Rectangular tables as wide as they say, and balanced braces and dollars."""
    specified = re.findall(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", code)
    assert len(specified) == len(tables(code)) > 0
    for columns, lines in zip(specified, tables(code), strict=True):
        assert {len(line) for line in lines} == {len(columns)}
        # An option of the end of the line before.
        assert not [line[0] for line in lines if line[0].lstrip()[:1] in ("[", "*")]
    bare = re.sub(r"\\[\\{}$&#%_]", "", code)
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(c, 0) for c in bare))
    assert min(depth) >= 0 and depth[-1] == 0
    assert bare.count("$") % 2 == 0
    outside = re.sub(r"\$[^$]*\$", "", re.sub(r"\\label\{.*?\}", "", bare))
    body = [line for line in outside.split("\n") if not line.startswith("%")]
    assert not re.search(r"[_^#~]", "\n".join(body))
    assert not re.search(r"%(?! )", "\n".join(body)) and code.isascii()
    names = re.findall(r"\\label\{(.*?)\}", code)
    assert len(set(names)) == len(names)
    opened, closed = (re.findall(rf"\\{w}{{(\w+)}}", code) for w in ("begin", "end"))
    assert opened == ["table", "tabular"] * len(specified)
    assert sorted(opened) == sorted(closed)


def plain(cell: str) -> str:
    return re.sub(r"\\mathbf|[${}]|\\(?=[_%])", "", cell)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Section:
    return only_section(fill(tmp_path_factory.mktemp("results"), example_rows()))


def draw(*sections: Section) -> str:
    return latex.to_latex(Leaderboard(sections, ()))


class TestEscape:
    @pytest.mark.parametrize(
        ("name", "want"),
        [
            ("td3_bc", r"td3\_bc"),
            ("50%&#$", r"50\%\&\#\$"),
            ("{a}", r"\{a\}"),
            ("~^", r"\textasciitilde{}\textasciicircum{}"),
            ("a\\b", r"a\textbackslash{}b"),
            ("<|>", r"\textless{}\textbar{}\textgreater{}"),
            ("a---b-c", "a-{}-{}-b-c"),
            ("[x]", "{[}x]"),
            ("*x*", "{*}x*"),
            ("a\x1b\n", r"a\textbackslash{}x1b\textbackslash{}n"),
            ("é日", r"\textbackslash{}xe9\textbackslash{}u65e5"),
            ("", ""),
        ],
    )
    def test_known(self, name: str, want: str) -> None:
        assert latex.escape(name) == want

    def test_letters_and_digits_are_themselves(self) -> None:
        same = string.ascii_letters + string.digits + " .,:;/@+=()!?"
        assert latex.escape(same) == same


class TestRanking:
    def test_numbers_of_the_section(self, example: Section) -> None:
        code = draw(example)
        check(code)
        ranking, _ = tables(code)
        header, iql, td3_bc, bc, behaviour = ranking
        assert header[:5] == [r"\#", "agent", "IQM", "mean", "median"]
        assert [line[0] for line in (iql, td3_bc, bc)] == ["1", "1", "3"]
        assert [line[1] for line in (iql, td3_bc, bc)] == ["iql", r"td3\_bc", "bc"]
        bounds = example.entries[2].iqm
        assert bounds is not None and bounds.low is not None
        assert bc[2] == f"$40.0_{{[{bounds.low:.1f}, {bounds.high:.1f}]}}$"
        assert bc[3:6] == ["$40.0$", "$40.0$", "$60.0$"]
        assert [iql[6], bc[6]] == ["", "1.00"]
        assert float(td3_bc[6]) == pytest.approx(0.595, abs=0.0051)  # U / (n m)
        assert bc[7:] == [r"10$\times$20", "$6.0$"]
        assert behaviour == ["", "behaviour", "", "$30.0$", "", "", "", "", ""]

    def test_captions_say_what_was_run(self, tmp_path: Path) -> None:
        rows = make_rows("iql", dict.fromkeys(TASKS, 60.0), seeds=4)
        job = make_job(rows)
        rows[0] = make_row(agent="iql", score=None, status="diverged")
        section = only_section(fill(tmp_path, rows[:-1], [job]))
        code = draw(section)
        check(code)
        for caption in re.findall(r"\\caption\{(.*)\}", code):
            assert r"3-4 seeds $\times$ 20 episodes, 100 updates" in caption
            assert "protocol: episodes 20." in caption
            assert "PARTIAL: 7 of 8 runs." in caption
            assert rf"$*$ fewer than {FEW_SEEDS} seeds" in caption
            assert r"$\dagger$ diverged runs, counted as a score of 0" in caption
            assert r"$\ddagger$ runs are absent" in caption
        assert tables(code)[0][1][1] == r"iql$^{*\dagger\ddagger}$"

    def test_raw_returns_and_tuning(self) -> None:
        section = made(2, 1)
        task = dataclasses.replace(section.tasks[0], unit="return")
        first = dataclasses.replace(section.entries[0], tuned=(7, 3))
        entries = (first, *section.entries[1:])
        section = dataclasses.replace(section, tasks=(task,), entries=entries)
        code = draw(section)
        check(code)
        ranking, tasks = tables(code)
        assert "gap" not in ranking[0] and ranking[0][-1] == "tuned"
        assert [line[-1] for line in ranking[1:3]] == [r"$7\times3$", ""]
        assert tasks[1][0] == "task-0-v0 (raw return)"
        assert "Raw returns" in code and "0 random" not in code

    def test_unranked_and_costless_entries_have_dashes(self) -> None:
        (entry,) = made(1).entries
        empty = dict.fromkeys(("rank", "iqm", "mean", "median", "cost_s"))
        entry = dataclasses.replace(entry, **empty, optimality_gap=None)
        line = tables(draw(made(1, entries=(entry,))))[0][1]
        assert line[0] == "--" and line[2:6] == ["--"] * 4 and line[-1] == "--"


class TestTasks:
    def test_means_of_the_section(self, example: Section) -> None:
        _, lines = tables(draw(example))
        assert lines[0] == ["task", "iql", r"td3\_bc", "bc", "behaviour"]
        assert [line[0] for line in lines[1:]] == [
            "pendulum-mixed-v0",
            r"point\_maze-mixed-v0",
        ]
        for t, line in enumerate(lines[1:]):
            for entry, cell in zip(example.entries, line[1:4], strict=True):
                mean = entry.cells[t].mean
                assert mean is not None and mean.low is not None
                want = f"{mean.value:.1f}_[{mean.low:.1f}, {mean.high:.1f}]"
                assert plain(cell) == want
            assert line[4] == "$30.0$"

    @pytest.mark.parametrize(
        ("means", "best"),
        [
            ([around(50.0), around(57.0)], 1),
            ([around(57.0), around(50.0), None], 0),
            ([around(50.0), around(56.0)], None),  # 53 and 53 touch
            ([around(50.0), around(50.0)], None),
            # The second has a lower value, but an interval that reaches higher.
            ([around(80.0, 2.0), around(70.0, 20.0)], None),
            ([around(80.0, 2.0), around(70.0, 2.0), around(60.0, 30.0)], None),
            ([around(50.0)], None),
            ([None, None], None),
            ([Bounds(90.0, None, None), around(50.0)], None),
            ([around(90.0), Bounds(50.0, None, None)], None),
        ],
    )
    def test_surely_highest(
        self, means: Sequence[Bounds | None], best: int | None
    ) -> None:
        assert ranking.surely_highest(means) == best

    def test_only_the_surely_highest_is_bold(self) -> None:
        section = made(3, 2)
        second = section.entries[1]
        cells = (second.cells[0], dataclasses.replace(second.cells[1], mean=around(99)))
        entries = list(section.entries)
        entries[1] = dataclasses.replace(second, cells=cells)
        _, lines = tables(draw(dataclasses.replace(section, entries=tuple(entries))))
        bold = [[r"\mathbf" in cell for cell in line[1:4]] for line in lines[1:]]
        assert bold == [[True, False, False], [False, True, False]]
        assert lines[2][2] == r"$\mathbf{99.0}_{[96.0, 102.0]}$"

    def test_wide_and_long_tables_are_split(self) -> None:
        labels = [f"agent_{i}@quick [a long setting]" for i in range(20)]
        section = made(labels, latex.PAGE_ROWS * 2 + 1)
        code = draw(section)
        check(code)
        ranking, *parts = tables(code)
        assert len(ranking) == 22
        heads = [line[0][1:] for line in parts]
        assert heads[0] == heads[1] == heads[2] != heads[3]
        agents = [name for head in heads[::3] for name in head]
        assert len(agents) == 21 and agents[-1] == "behaviour"
        assert len(set(agents)) == 21
        assert [len(part) - 1 for part in parts[:3]] == [latex.PAGE_ROWS] * 2 + [1]
        rows = [line[0] for part in parts[:3] for line in part[1:]]
        assert rows == [task.task.removeprefix("f/") for task in section.tasks]
        assert code.count("Part 2 of 3.") == len(parts) // 3
        assert code.count("Continued: ") == len(parts) - 3

    def test_headers_are_broken_only_as_far_as_needed(self) -> None:
        labels = ["iql@quick", "name@quick [ab]", "a_very_long_name_of_it@q [b]"]
        (head, *_) = tables(draw(made(labels, 1)))[1]
        assert head[1].startswith("iql@quick")
        assert head[2].startswith(r"\shortstack[r]{name@quick \\ {[}ab]")
        assert head[3].startswith(
            r"\shortstack[r]{a\_very\_long\_name\_of\_it \\ @q \\ {[}b]"
        )


class TestFormat:
    def test_hostile_names(self) -> None:
        code = draw(made([HOSTILE, "b"], [HOSTILE, "c"], suite=HOSTILE))
        check(code)
        assert "\x1b" not in code

    def test_messages_are_comments(self) -> None:
        code = latex.to_latex(Leaderboard((made(1),), ("a\n\\b",)))
        assert code.endswith("\n% a\\textbackslash{}n\\textbackslash{}b\n")

    def test_from_a_folder(self, tmp_path: Path) -> None:
        code = leaderboard.render(fill(tmp_path, example_rows()), "latex")
        check(code)
        assert r"\label{tab:tiny-classic-ranking}" in code
        assert r"\label{tab:tiny-classic-tasks}" in code


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_compiles_and_fits(tmp_path: Path, example: Section) -> None:
    long = [f"agent_{i}@quick [a setting]" for i in range(12)]
    hostile = made([HOSTILE, "*", "[b"], [HOSTILE, "*c", "[d"], suite=HOSTILE)
    code = draw(example, hostile, made(long, 45))
    document = (
        "\\documentclass{article}\n"
        "\\usepackage[textwidth=5.5in,textheight=9in]{geometry}\n"
        "\\usepackage{booktabs}\n\\begin{document}\n"
        f"{code}\n\\end{{document}}\n"
    )
    (tmp_path / "a.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    # Overfull lines of captions, with names that cannot be broken, are no tables.
    too_wide = re.findall(r"Overfull \\hbox.*", done.stdout)
    assert not [line for line in too_wide if "alignment" in line]
    assert "Float too large" not in done.stdout
