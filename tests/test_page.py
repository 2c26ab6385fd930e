"""The page as a file: its numbers, its escapes, its charts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from test_leaderboard_board import (
    TASKS,
    even,
    example_rows,
    fill,
    make_row,
    make_rows,
    only_section,
)

from offrl_jax import page
from offrl_jax.benchmark.suites import known_suites
from offrl_jax.cli import _parse
from offrl_jax.errors import ResultsError, UsageError
from offrl_jax.leaderboard import text
from offrl_jax.leaderboard.comparisons import improvements
from offrl_jax.page import charts
from offrl_jax.results import Row

EVIL = "<script>window.hacked=1</script>\"'><img src=x onerror=hacked=1>"
LONG = "agent_" + "x" * 300


class Reader(HTMLParser):
    """Elements with their attributes, and the words of table cells."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self._into: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data


def read(content: str) -> Reader:
    reader = Reader()
    reader.feed(content)
    return reader


def data_of(content: str) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', content, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def cells_of(line: list[str]) -> list[str]:
    return [" ".join(cell.split()) for cell in line]


def curve_rows() -> list[Row]:
    """Rows of two evaluations, so that there are curves."""
    early = [
        make_row(
            **{
                name: getattr(row, name)
                for name in ("agent", "task", "seed", "run_id", "setting")
            },
            score=row.score / 2 if row.score else 0.0,
            step=50,
        )
        for row in example_rows()
        if row.seed is not None
    ]
    return early + example_rows()


def test_tables_hold_the_leaderboards_numbers(tmp_path: Path) -> None:
    folder = fill(tmp_path / "r", curve_rows())
    section = only_section(folder)
    ranking, tasks, _ = read(page.render(folder)).tables[:3]
    head, *lines, behaviour = map(cells_of, ranking)
    assert head[:3] == ["#", "agent", "IQM"]
    for entry, line in zip(section.entries, lines, strict=True):
        assert line[0] == str(entry.rank)
        assert line[1] == entry.label
        assert line[2] == f"{text.estimate(entry.iqm)} {text.interval(entry.iqm)}"
        assert line[4] == text.estimate(entry.mean)
        assert line[10] == text.seconds(entry.cost_s)
    assert behaviour[4] == "30.0"
    head, *lines = map(cells_of, tasks)
    assert head[1:-1] == [entry.label for entry in section.entries]
    for j, line in enumerate(lines):
        assert line[0] == section.tasks[j].task
        for entry, words in zip(section.entries, line[1:-1], strict=True):
            mean = entry.cells[j].mean
            assert words == text.estimate(mean) + text.interval(mean)


def test_rows_in_the_page_are_those_of_the_files(tmp_path: Path) -> None:
    folder = fill(tmp_path / "r", curve_rows())
    known = {
        (record["agent"], record["task"], record["seed"]): record
        for path in (folder / "rows").glob("*.jsonl")
        for line in path.read_text().splitlines()
        if (record := json.loads(line))["step"] == 100
    }
    data = data_of(page.render(folder))
    (section,) = data["sections"]
    count = 0
    for place, cell in section["cells"].items():
        agent, task = map(int, place.split("."))
        assert cell["steps"] == [50, 100]
        for seed, _, state, value, _, curve, fields in cell["runs"]:
            own = iter(fields)
            whole = {
                name: next(own) if place < 0 else data["pool"][place]
                for name, place in zip(data["fields"], cell["shared"], strict=True)
            }
            key = (section["agents"][agent], section["tasks"][task], seed)
            assert whole == known[key]
            assert state == "ok"
            assert value == pytest.approx(whole["score"], rel=1e-4)
            ends = [whole["score"] / 2, whole["score"]]
            assert curve[::2] == pytest.approx(ends, rel=1e-3)
            # Two scores make the scale: 10 of return are a point of score here.
            deviation = (20 * 0.25 / 19) ** 0.5
            half = 1.96 * deviation / 20**0.5 / 10
            assert curve[1::2] == pytest.approx([half, half], rel=0.05)
            count += 1
    assert count == 60


def test_lists_of_episodes_are_left_out_of_large_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "r", example_rows())
    for limit, kept in ((60 * 20 * 25, True), (60 * 20 * 25 - 1, False)):
        monkeypatch.setattr("offrl_jax.page.cells.EPISODES_BYTES", limit)
        data = data_of(page.render(folder))
        assert data["episodes"] == kept
        (section,) = data["sections"]
        fields = data["fields"]
        assert ("returns" in fields) == ("lengths" in fields) == kept
        assert "score" in fields
        for cell in section["cells"].values():
            assert len(cell["shared"]) == len(fields)


def test_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    folder = fill(tmp_path / "r", curve_rows())
    content = page.render(folder)
    assert content == page.render(folder)
    elements = read(content).elements
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in elements}
    assert not [name for tag, own in elements for name in own if name == "src"]
    links = [own["href"] for tag, own in elements if tag == "a"]
    assert all(link and link.startswith("#") for link in links)
    (policy,) = [own["content"] for tag, own in elements if "http-equiv" in own]
    scripts = re.findall(r"<script>(.*?)</script>", content, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "connect-src" not in policy
    ids = [own["id"] for _, own in elements if "id" in own]
    assert len(ids) == len(set(ids))
    assert str(tmp_path) not in content


def test_names_never_become_markup(tmp_path: Path) -> None:
    rows = make_rows(EVIL, even(50.0), run_id="evil", setting=EVIL)
    rows += make_rows(LONG, even(40.0), run_id="long", suite=f"suite{EVIL}")
    content = page.render(fill(tmp_path / "r", rows))
    reader = read(content)
    assert [tag for tag, _ in reader.elements].count("script") == 2
    assert not [own for _, own in reader.elements if {"src", "onerror"} & own.keys()]
    assert any(
        EVIL in cell for table in reader.tables for line in table for cell in line
    )
    assert (
        EVIL
        in data_of(content)["sections"][-1]["agents"]
        + data_of(content)["sections"][0]["agents"]
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (make_rows("bc", even(50.0)), "No other agent is ranked beside it."),
        (make_rows("bc", even(50.0), seeds=1), "too narrow"),
        (
            [r for a in ("a", "b") for r in make_rows(a, even(50.0))],
            "No agent leads: a, b have the same IQM, 50.0",
        ),
        (
            make_rows("good", even(90.0)) + make_rows("bad", even(10.0)),
            "shown to win more often than bad (1.00)",
        ),
        (
            make_rows("bc", even(50.0), status="diverged", seeds=5),
            "bc has the highest IQM: 0.0 [0.0, 0.0].",
        ),
        (
            [make_row(seed=s, score=None, task=t) for t in TASKS for s in range(5)],
            "No ranking: raw returns",
        ),
        (
            make_rows("bc", {TASKS[0]: 3.0}, returns=[float("nan")] * 3),
            "bc has the highest IQM: 0.0",
        ),
        (
            make_rows("a", {TASKS[0]: 50.0, TASKS[1]: 90.0}, seeds=5)
            + make_rows("b", {TASKS[0]: 60.0, TASKS[1]: 60.0}, seeds=5)
            + make_rows("c", {TASKS[0]: 52.0, TASKS[1]: 89.0}, seeds=5),
            "not shown against",
        ),
    ],
)
def test_what_it_says_in_short(rows: list[Row], words: str, tmp_path: Path) -> None:
    content = page.render(fill(tmp_path / "r", rows))
    short = re.search(r'<ul class="short">(.*?)</ul>', content, re.DOTALL)
    assert short is not None
    assert words in short[1]


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_many_agents(count: int, tmp_path: Path) -> None:
    rows = [
        make_row(agent=f"agent{i:04}", run_id="r", setting=f"s{i}", score=i / 10)
        for i in range(count)
    ]
    content = page.render(fill(tmp_path / "r", rows))
    matrix = read(content).tables[-1]
    assert len(matrix) == 31
    assert f"The first 30 of {count} agents, as in the charts" in content
    assert f"the other {count - 30} have a lower IQM" in content


def test_unfinished_folders(tmp_path: Path) -> None:
    rows = [r for r in curve_rows() if r.step == 50]
    content = page.render(fill(tmp_path / "r", rows))
    assert "PARTIAL: 0 of 60 runs" in content
    assert "No ranking: no agent has finished" in content
    with pytest.raises(ResultsError, match="no such folder"):
        page.render(tmp_path / "none")


def test_commands_are_ones_that_offrl_takes(tmp_path: Path) -> None:
    own = {"protocol": {"episodes": 20, "evaluations": 4}}
    for suite, setting in (("quick", "default"), ("run", "alpha=1.5,tau=0.01")):
        rows = make_rows("td3_bc@quick", even(5.0), **own, suite=suite, setting=setting)
        section = only_section(fill(tmp_path / suite, rows))
        content = page.render(tmp_path / suite)
        (line,) = re.findall(r"<dd><code>(offrl [^<]*)</code>", content)
        parsed = _parse(shlex.split(line)[1:])
        tasks = tuple(task.task for task in section.tasks)
        assert (parsed.seeds, parsed.updates) == (10, 100)
        # Not the folder that the rows are in: there, all is done already.
        assert parsed.results == Path("results/again")
        if suite == "run":
            assert (parsed.agent, parsed.task) == ("td3_bc@quick", tasks)
            assert (parsed.episodes, parsed.evaluations) == (20, 4)
            assert parsed.set == ("alpha=1.5", "tau=0.01")
        else:
            assert parsed.suite in known_suites()
            assert (parsed.agents, parsed.tasks) == (("td3_bc@quick",), tasks)
    assert "does not come with the package" not in content
    rows = make_rows("bc", even(5.0), suite="mine")
    assert "The suite mine does not come" in page.render(fill(tmp_path / "m", rows))


def test_an_agent_that_beats_the_leader_is_named(tmp_path: Path) -> None:
    """The higher mean of the middle half, and yet the loser on two tasks of three."""
    tasks = [f"a/b{i}-v0" for i in range(3)]
    rows = make_rows("peak", dict(zip(tasks, (95.0, 50.0, 50.0), strict=True)))
    rows += make_rows("steady", dict.fromkeys(tasks, 56.0))
    content = page.render(fill(tmp_path / "r", rows))
    assert "peak has the highest IQM" in content
    chance = improvements(only_section(tmp_path / "r"))["peak", "steady"]
    assert chance.value < 0.5
    assert f"but loses more often than not to steady ({chance.value:.2f})" in content


class TestCharts:
    def test_places_on_an_axis(self) -> None:
        scale = charts.Scale(0.0, 10.0, 100.0, 200.0)
        assert [scale(v) for v in (0, 2.5, 10, 99, -9)] == [100, 125, 200, 200, 100]
        log = charts.Scale(1.0, 100.0, 0.0, 100.0, log=True)
        assert [log(v) for v in (1, 10, 100)] == [0, 50, 100]
        assert charts.Scale(3.0, 3.0, 0.0, 100.0)(3.0) == 50

    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (0, 100, [0, 20, 40, 60, 80, 100]),
            (-0.7, 1.0, [-0.5, 0, 0.5, 1.0]),
            (0, 102_400, [0, 20_000, 40_000, 60_000, 80_000, 100_000]),
            (7, 7, [7]),
        ],
    )
    def test_ticks(self, low: float, high: float, expected: list[float]) -> None:
        assert charts.ticks(low, high) == pytest.approx(expected)

    def test_ticks_of_a_logarithmic_axis(self) -> None:
        assert charts.log_ticks(0.3, 6) == pytest.approx([0.5, 1, 2, 5])
        assert charts.log_ticks(0.5, 5000) == pytest.approx([1, 10, 100, 1000])

    def test_names_lie_beside_each_other(self) -> None:
        dots = [
            charts.Dot(i, x, y, y + 5, y - 5, "name", 0, 0, "start")
            for i, (x, y) in enumerate([(100, 100), (104, 103), (380, 50), (60, 200)])
        ]
        placed = charts.place_names(dots, dict.fromkeys(range(4), 60.0))
        boxes = []
        assert sum(dot.name == "name" for dot in placed) >= 3
        for dot in placed:
            if not dot.name:
                continue
            start = dot.name_x - (60 if dot.anchor == "end" else 0)
            assert start >= charts.LEFT
            assert start + 60 <= charts.WIDTH
            boxes.append((start, dot.name_y - 10, start + 60, dot.name_y + 3))
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
                assert apart

    def test_lines_are_the_means(self, tmp_path: Path) -> None:
        folder = fill(tmp_path / "r", curve_rows())
        section = only_section(folder)
        content = page.render(folder)
        found = re.search(r"While training.*?</figure>", content, re.DOTALL)
        assert found is not None
        paths = re.findall(r'class="stroke" d="M([^"]*)"', found[0])
        # Labels of the vertical axis tell which height is which value.
        marks = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', found[0])
        (y0, v0), *_, (y1, v1) = [(float(y) - 4, float(v)) for y, v in marks]
        ends = {
            round(v0 + (float(p.split(",")[-1]) - y0) * (v1 - v0) / (y1 - y0), 0)
            for p in paths
        }
        assert ends == {round(e.iqm.value, 0) for e in section.entries if e.iqm}


@pytest.mark.enable_socket
def test_the_server_follows_the_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "r", example_rows())
    with page.server(folder, 0) as serving:
        port = serving.server_address[1]
        Thread(target=serving.serve_forever, daemon=True).start()

        def ask(path: str) -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                return answer.read().decode()

        before, content = ask("/version"), ask("/")
        assert "connect-src 'self'" in content
        assert ask("/version") == before
        fill(folder, make_rows("rebrac", even(70.0)))
        assert ask("/version") != before
        assert "rebrac" in ask("/")
        next((folder / "rows").iterdir()).write_text("{}\nnonsense\n")
        assert "cannot be drawn just now" in ask("/")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask("/etc/passwd")
        elsewhere = urllib.request.Request(
            f"http://127.0.0.1:{port}/", headers={"Host": f"evil.example:{port}"}
        )
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(elsewhere)
        other = fill(tmp_path / "other", example_rows())
        with pytest.raises(UsageError, match=rf"port {port} .*taken"):
            page.server(other, port)
        serving.shutdown()
    with pytest.raises(ResultsError, match="no such folder"):
        page.server(tmp_path / "none", 0)
