"""Figures of scores while training: what is in their panels, and `offrl progress`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import RESULTS, USAGE, offrl
from test_leaderboard_board import TASKS, make_behaviour, make_row
from test_leaderboard_progress import STEPS, rows_of, scores, write

from offrl_jax import figures
from offrl_jax.errors import UsageError
from offrl_jax.leaderboard.progress import AgentProgress, Point, Progress
from offrl_jax.leaderboard.ranking import Bounds
from offrl_jax.leaderboard.runs import SectionKey

pytest_plugins = ["cli_fixtures"]


def line(level: float, seconds: float | None = 2.0, steps: Sequence[int] = STEPS):
    """Points that rise by one, 4 wide; `seconds` from one to the next."""
    return tuple(
        Point(
            step,
            None if seconds is None else seconds * (i + 1),
            Bounds(level + i, level + i - 2, level + i + 2),
            10,
            0,
            20,
        )
        for i, step in enumerate(steps)
    )


def agent(label: str, level: float, tasks: Iterable[str] = TASKS, **about: Any):
    tasks = list(tasks)
    fields: dict[str, Any] = {
        "agent": label,
        "setting": "default",
        "seeds": dict.fromkeys(tasks, 5),
        "diverged": 0,
        "failed": 0,
        "missing": 0,
        "pooled": line(level),
        "by_task": {task: line(level + 10) for task in tasks},
    }
    return AgentProgress(label=label, **{**fields, **about})


def section(*agents: AgentProgress, family: str = "classic", **about: Any) -> Progress:
    fields: dict[str, Any] = {
        "tuning": "one setting for all tasks",
        "pooled": TASKS,
        "units": dict.fromkeys(TASKS, "score"),
        "behaviour": {},
        "phased": False,
        "devices": ("cpu",),
        "messages": (),
    }
    key = SectionKey("tiny", family, "full", 100, "{}")
    return Progress(key=key, agents=agents, **{**fields, **about})


def panels(figure: Any) -> list[Any]:
    return [axis for axis in figure.get_axes() if axis.axison]


def texts(figure: Any) -> list[list[str]]:
    """Of the legends, from the top."""
    parts = [area for sub in figure.subfigs for area in (sub, *sub.subfigs)]
    return [
        [text.get_text() for text in legend.get_texts()]
        for part in parts
        for legend in part.legends
    ]


class TestFigure:
    def test_panels_lines_and_bands(self) -> None:
        figure = figures.draw_progress([section(agent("bc", 5), agent("iql", 20))])
        drawn = panels(figure)
        seconds = "seconds of training: the population's / its members"
        assert [(a.get_title(), a.get_xlabel()) for a in drawn] == [
            ("IQM over 2 tasks", "updates"),
            ("IQM over 2 tasks", seconds),
            (TASKS[0], "updates"),
            (TASKS[1], "updates"),
        ]
        assert drawn[0].get_ylabel() == "score (0 random, 100 expert)"
        for axis, xs, base in (
            (drawn[0], STEPS, 20.0),
            (drawn[1], (2.0, 4.0, 6.0), 20.0),
            (drawn[3], STEPS, 30.0),
        ):
            _, learned = axis.lines
            assert np.asarray(learned.get_xdata()).tolist() == list(xs)
            assert np.asarray(learned.get_ydata()).tolist() == [
                base,
                base + 1,
                base + 2,
            ]
            band = axis.collections[1].get_paths()[0].get_extents()
            assert (band.y0, band.y1) == (base - 2, base + 4)
            assert (band.x0, band.x1) == (xs[0], xs[-1])
        assert texts(figure) == [["bc (5 seeds)", "iql (5 seeds)"]]

    @pytest.mark.parametrize(
        ("family", "phased", "said"),
        [
            ("online", False, "environment steps"),
            ("online", True, "environment steps"),
            ("classic", True, "updates of the last phase"),
        ],
    )
    def test_what_a_step_is(self, family: str, phased: bool, said: str) -> None:
        part = section(agent("ppo", 5), family=family, phased=phased)
        figure = figures.draw_progress([part])
        assert [a.get_xlabel() for a in panels(figure)][::2] == [said, said]
        title = figure.subfigs[0]._suptitle.get_text()
        assert f"100 {said.partition(' of ')[0]}, one setting" in title

    def test_returns_have_panels_against_seconds_and_no_iqm(self) -> None:
        own = agent("ppo", 5, TASKS[:1], pooled=())
        part = section(
            own, pooled=(), units={TASKS[0]: "return"}, behaviour={TASKS[0]: 7.0}
        )
        drawn = panels(figures.draw_progress([part]))
        assert [axis.get_title() for axis in drawn] == [TASKS[0]] * 2
        assert drawn[0].get_ylabel() == "return of an episode, undiscounted"
        assert drawn[1].get_xlabel().startswith("seconds")
        assert drawn[1].lines[1].get_ydata() == [7.0, 7.0]

    def test_few_runs_and_one_task_are_marked(self) -> None:
        few = {"seeds": {TASKS[0]: 2}, "diverged": 1, "failed": 2, "missing": 3}
        part = section(
            agent("bc", 5, TASKS[:1], **few),
            pooled=TASKS[:1],
            units={TASKS[0]: "score"},
        )
        figure = figures.draw_progress([part])
        assert panels(figure)[0].get_title() == "IQM over one task only"
        assert texts(figure) == [["bc* (2 seeds, 1 diverged, 2 failed, 3 missing)"]]
        title = figure.subfigs[0].legends[0].get_title().get_text()
        assert "* fewer than 5 seeds" in title

    def test_one_run_and_one_evaluation_are_still_seen(self) -> None:
        single = (Point(100, None, Bounds(3.0, None, None), 1, 0, 20),)
        own = agent("bc", 5, pooled=single, by_task={TASKS[0]: line(5, steps=[100])})
        at, after, task, *_ = panels(figures.draw_progress([section(own)]))
        assert at.lines[0].get_marker() == "o" and at.lines[0].get_markersize() == 6
        assert not at.collections and after.lines[0].get_xdata().size == 0
        assert len(task.collections) == 1  # the interval

    def test_ten_agents_differ_and_keep_their_look_in_every_section(self) -> None:
        every = [agent(f"agent {i:02}", 5.0 * i) for i in range(10)]
        other = section(*every[3:5], family="neorl2")
        figure = figures.draw_progress([section(*every), other])
        first, *_, last = panels(figure)
        looks = [(x.get_color(), x.get_linestyle()) for x in first.lines]
        assert len(set(looks)) == 10
        found = [(x.get_color(), x.get_linestyle()) for x in last.lines]
        assert found == looks[3:5]
        figure.draw_without_rendering()
        for part in figure.subfigs:
            (legend,) = part.legends
            box = legend.get_window_extent()
            assert box.x0 >= figure.bbox.x0 and box.x1 <= figure.bbox.x1
            drawn = [axis for area in part.subfigs for axis in area.get_axes()]
            assert box.y1 <= min(a.get_tightbbox().y0 for a in drawn if a.axison) + 1

    @pytest.mark.parametrize("suffix", [".png", ".svg"])
    def test_files_are_the_same_every_time(self, suffix: str) -> None:
        def drawn() -> bytes:
            return figures.render(
                figures.draw_progress([section(agent("bc", 5))]), suffix
            )

        assert drawn() == drawn()

    def test_without_matplotlib_says_what_to_install(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(UsageError, match="pip install matplotlib"):
            figures.draw_progress([section(agent("bc", 5))])


class TestCommand:
    def test_a_hand_made_folder(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [*rows_of(scores()), make_behaviour(TASKS[0], 33.0)]
        rows.append(make_row(seed=7, score=None, returns=[], status="diverged"))
        write(home / "out", rows)
        assert offrl("progress", "out", "--out", "mine.svg") == 0
        out, err = capsys.readouterr()
        assert out == "wrote mine.svg and mine.csv\n"
        assert err == (
            f"offrl: td3_bc on {TASKS[0]}: seed 7 diverged by 100 updates, counted as "
            "the floor\n"
            f"offrl: td3_bc on {TASKS[0]}: no point at 40; 70 updates, where not all "
            "of its 6 runs have a value\n"
        )
        assert (home / "mine.svg").read_text().startswith("<?xml")
        assert len((home / "mine.csv").read_text().splitlines()) == 1 + 1 + 1 + 3

    @pytest.mark.parametrize(
        ("code", "said", "arguments"),
        [
            (USAGE, "unknown suffix '.gif'", ("out", "--out", "a.gif")),
            (USAGE, "offrl progress --help", ("out",)),
            (USAGE, "at least one name", ("out", "--agent", "--out", "a.png")),
            (USAGE, "unknown agent", ("out", "--agent", "iql", "--out", "a.png")),
            (RESULTS, "no such folder", ("none", "--out", "a.png")),
            (RESULTS, "no rows and no plan", ("empty", "--out", "a.png")),
            (RESULTS, "cannot be written", ("out", "--out", "none/a.png")),
        ],
    )
    def test_mistakes_are_one_line(self, code, said, arguments, home, refused):
        write(home / "out", rows_of(scores()))
        (home / "empty").mkdir()
        refused(code, said, "progress", *arguments)
