"""Figures of papers: what is in their panels, and that nothing covers anything."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from matplotlib import rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_leaderboard_board import (
    TASKS,
    example_rows,
    fill,
    make_behaviour,
    make_rows,
    only_section,
)

from offrl_jax import figures
from offrl_jax.errors import UsageError
from offrl_jax.figures import cost, dots, matchups, style
from offrl_jax.leaderboard import comparisons
from offrl_jax.leaderboard.model import Cell, Entry, Section, TaskInfo
from offrl_jax.leaderboard.ranking import Bounds
from offrl_jax.results import BEHAVIOUR


def around(value: float, half: float = 3.0) -> Bounds:
    return Bounds(value, value - half, value + half)


def made(
    agents: int | Sequence[str], tasks: int | Sequence[str] = 2, **about: Any
) -> Section:
    """A section of made-up numbers: agent i has rank i and task t is worth t more."""
    labels = (
        [f"agent_{i}" for i in range(agents)] if isinstance(agents, int) else agents
    )
    ids = [f"f/task-{t}-v0" for t in range(tasks)] if isinstance(tasks, int) else tasks
    entries = []
    for i, label in enumerate(labels):
        level = 90.0 - 80.0 * i / len(labels)
        cells = tuple(
            Cell(task, (0, 1), (level, level), around(level + t), 20, (), (), (), None)
            for t, task in enumerate(ids)
        )
        entries.append(
            Entry(
                label=label,
                agent=label,
                setting="default",
                rank=i + 1,
                iqm=around(level),
                mean=around(level + 1),
                median=around(level + 2),
                optimality_gap=around(100 - level),
                leader=None,
                leader_better=None,
                cost_s=2.0 + i % 7,
                tuned=None,
                cells=cells,
                episode_share=None,
            )
        )
    fields: dict[str, Any] = {
        "suite": "made",
        "family": "f",
        "preset": "full",
        "updates_total": 100,
        "protocol": {"episodes": 20},
        "tuning": "one setting for all tasks",
        "tasks": tuple(TaskInfo(task, "score", True, 10.0) for task in ids),
        "entries": tuple(entries),
        "runs": 4,
        "planned": 4,
        "absent": (),
        "warnings": (),
        "devices": ("cpu",),
    }
    return Section(**{**fields, **about})


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Section:
    return only_section(fill(tmp_path_factory.mktemp("results"), example_rows()))


def scores(agent: str) -> np.ndarray:
    """`[T, S]` of the example, from its rows."""
    return np.array(
        [
            [row.score for row in example_rows() if (row.agent, row.task) == (agent, t)]
            for t in TASKS
        ]
    )


def panels(figure: Figure) -> list[Any]:
    return [axis for axis in figure.get_axes() if axis.axison]


def dots_of(axis: Any) -> list[float]:
    lines = [line for line in axis.lines if line.get_marker() == "o"]
    assert [line.get_ydata()[0] for line in lines] == sorted(
        line.get_ydata()[0] for line in lines
    )
    return [float(line.get_xdata()[0]) for line in lines]


def intervals_of(axis: Any) -> list[tuple[float, float]]:
    lines = [line for line in axis.lines if line.get_marker() == "None"]
    return [tuple(line.get_xdata()) for line in lines if line.get_linestyle() == "-"]


def dotted(axis: Any) -> list[float]:
    return [
        float(x.get_xdata()[0])
        for x in axis.lines
        if x.get_linestyle() != "-" and x.get_marker() == "None"
    ]


def words(figure: Figure) -> str:
    """The remark below the panels, in one line."""
    parts = [figure, *figure.subfigs]
    found = [p._supxlabel.get_text() for p in parts if p._supxlabel is not None]
    return " ".join(found).replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ")


def overlaps(texts: Sequence[Text]) -> list[tuple[str, str]]:
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in texts if t.get_text()]
    return [
        (a, b)
        for (a, x), (b, y) in itertools.combinations(boxes, 2)
        if min(x.x1, y.x1) - max(x.x0, y.x0) > 1
        and min(x.y1, y.y1) - max(x.y0, y.y0) > 1
    ]


def outside(figure: Figure, texts: Sequence[Text]) -> list[str]:
    page = figure.bbox
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in texts if t.get_text()]
    return [
        text
        for text, box in boxes
        if box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y1 > page.y1 + 1
    ]


class TestRanking:
    def test_four_panels_with_the_numbers_of_the_rows(self, example: Section) -> None:
        figure = dots.draw_ranking(example)
        drawn = panels(figure)
        assert [axis.get_title() for axis in drawn] == [
            "IQM",
            "mean",
            "median",
            "optimality gap",
        ]
        labels = [label.get_text() for label in drawn[0].get_yticklabels()]
        assert labels == ["1  iql", "1  td3_bc", "3  bc"]
        bottom, top = drawn[0].get_ylim()
        assert bottom > top  # the first rank is above
        of = [scores(agent) for agent in ("iql", "td3_bc", "bc")]
        for axis, measure in zip(
            drawn,
            (
                lambda x: scipy.stats.trim_mean(x.ravel(), 0.25),
                np.mean,
                lambda x: np.median(x.mean(axis=1)),
                lambda x: np.mean(100 - np.minimum(x, 100)),
            ),
            strict=True,
        ):
            assert dots_of(axis) == pytest.approx([measure(x) for x in of], abs=1e-4)
        bounds = [entry.iqm for entry in example.entries]
        assert intervals_of(drawn[0]) == [(b.low, b.high) for b in bounds if b]
        gaps = [entry.optimality_gap for entry in example.entries]
        assert intervals_of(drawn[3]) == [(b.low, b.high) for b in gaps if b]
        assert [dotted(axis) for axis in drawn] == [[], [30.0], [], []]

    def test_shades_part_the_ranks(self, example: Section) -> None:
        axis = panels(dots.draw_ranking(example))[0]
        centres = [patch.get_y() + patch.get_height() / 2 for patch in axis.patches]
        assert centres == [0.0, 1.0]  # the two that share rank 1

    def test_raw_returns_have_no_gap_and_one_run_no_interval(self) -> None:
        returns = (TaskInfo("t", "return", True, None),)
        section = dataclasses.replace(made(2, 1), tasks=returns)
        figure = dots.draw_ranking(section)
        assert [a.get_title() for a in panels(figure)] == ["IQM", "mean", "median"]
        assert "return of an episode" in words(figure)
        assert "gap" not in words(figure)
        (entry,) = made(1).entries
        entry = dataclasses.replace(entry, iqm=Bounds(5.0, None, None))
        axis = panels(dots.draw_ranking(made(1, entries=(entry,))))[0]
        assert dots_of(axis) == [5.0] and not intervals_of(axis)

    def test_marks_are_in_labels_and_explained(self, tmp_path: Path) -> None:
        rows = make_rows("iql", dict.fromkeys(TASKS, 50.0), seeds=3)
        section = only_section(fill(tmp_path, rows))
        figure = dots.draw_ranking(section)
        assert panels(figure)[0].get_yticklabels()[0].get_text() == "1  iql*"
        assert "* fewer than 5 seeds" in words(figure)
        assert "†" not in words(figure)


class TestTasks:
    def test_a_panel_per_task_with_the_means_of_the_rows(
        self, example: Section
    ) -> None:
        (figure,) = dots.draw_tasks(example)
        drawn = panels(figure)
        assert [axis.get_title() for axis in drawn] == [
            "pendulum-mixed-v0",
            "point_maze-mixed-v0",
        ]
        for t, axis in enumerate(drawn):
            means = [scores(agent)[t].mean() for agent in ("iql", "td3_bc", "bc")]
            assert dots_of(axis) == pytest.approx(means, abs=1e-4)
            ends = [entry.cells[t].mean for entry in example.entries]
            assert intervals_of(axis) == [(b.low, b.high) for b in ends if b]
            assert dotted(axis) == [30.0]

    @pytest.mark.parametrize(("agents", "tasks"), [(1, 1), (9, 4), (12, 14), (20, 30)])
    def test_pages_hold_every_task_once_and_nothing_overlaps(
        self, agents: int, tasks: int
    ) -> None:
        names = [f"f/halfcheetah-medium-replay-{t}-v0" for t in range(tasks)]
        labels = [f"gaussian_bc@quick [{i}]" for i in range(agents)]
        found = []
        with style.paper_style():
            for figure in dots.draw_tasks(made(labels, names)):
                assert figure.get_figheight() <= style.TEXT_HEIGHT
                figure.draw_without_rendering()
                drawn = panels(figure)
                titles = [axis.title for axis in drawn]
                assert not overlaps(titles) and not outside(figure, titles)
                ticks = [label for axis in drawn for label in axis.get_yticklabels()]
                assert not outside(figure, [t for t in ticks if t.get_visible()])
                found += [title.get_text().replace("\n", "") for title in titles]
        assert found == [name.removeprefix("f/") for name in names]


class TestProfiles:
    def test_fractions_of_runs_above_each_threshold(self, example: Section) -> None:
        figure = matchups.draw_profiles(example, comparisons.profiles(example))
        (axis,) = panels(figure)
        for line, agent in zip(axis.lines, ("iql", "td3_bc", "bc"), strict=True):
            thresholds = np.asarray(line.get_xdata(), np.float64)
            above = (scores(agent)[..., None] > thresholds).mean(axis=(0, 1))
            assert np.asarray(line.get_ydata()) == pytest.approx(above, abs=1e-4)
            assert thresholds[0] <= 0 and thresholds[-1] >= 100
        looks = style.looks_of(["iql", "td3_bc", "bc"])
        colours = [looks[label]["color"] for label in ("iql", "td3_bc", "bc")]
        assert [to_hex(line.get_color()).upper() for line in axis.lines] == colours
        assert len(axis.collections) == 3
        own = comparisons.profiles(example)["bc"]
        band = axis.collections[2].get_paths()[0].vertices
        ends = {round(end, 4) for b in own.above for end in (b.low, b.high) if end}
        assert ends <= {round(float(y), 4) for _, y in band}

    def test_many_agents_have_a_wide_figure_and_a_legend_apart(self) -> None:
        section = made(20)
        line = comparisons.Profile((0.0, 50.0), (around(0.9, 0.1), around(0.2, 0.1)))
        given = {entry.label: line for entry in section.entries}
        with style.paper_style():
            figure = matchups.draw_profiles(section, given)
            assert figure.get_figwidth() == style.TEXT_WIDTH
            figure.draw_without_rendering()
            above, below = figure.subfigs
            (legend,) = above.legends
            assert len(legend.get_texts()) == 20
            box, remark = legend.get_window_extent(), below._supxlabel
            assert box.x0 >= figure.bbox.x0 and box.x1 <= figure.bbox.x1
            assert Text.get_window_extent(remark).y1 <= box.y0


class TestImprovement:
    def test_numbers_are_mann_whitney_and_bold_where_sure(
        self, example: Section
    ) -> None:
        better = comparisons.improvements(example)
        figure = matchups.draw_improvement(example, better)
        axis = figure.get_axes()[0]
        agents = ("iql", "td3_bc", "bc")
        table = axis.images[0].get_array()
        shown = {
            (round(t.get_position()[1]), round(t.get_position()[0])): t
            for t in axis.texts
        }
        assert len(shown) == 6
        for (i, x), (j, y) in itertools.product(enumerate(agents), repeat=2):
            if x == y:
                assert np.ma.is_masked(table[i, j]) or np.isnan(table[i, j])
                continue
            wins = np.mean(
                [
                    scipy.stats.mannwhitneyu(a, b).statistic / (len(a) * len(b))
                    for a, b in zip(scores(x), scores(y), strict=True)
                ]
            )
            assert table[i, j] == pytest.approx(100 * wins, abs=0.01)
            assert shown[i, j].get_text() == f"{100 * wins:.0f}"
            assert (shown[i, j].get_fontweight() == "bold") == ("bc" in (x, y))
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            assert tuple(label.get_text() for label in labels) == agents

    @pytest.mark.parametrize(
        ("bounds", "sure"),
        [
            (Bounds(0.7, 0.51, 0.8), True),
            (Bounds(0.3, 0.2, 0.49), True),
            (Bounds(0.7, 0.5, 0.8), False),
            (Bounds(0.3, 0.2, 0.5), False),
            (Bounds(1.0, None, None), False),
        ],
    )
    def test_sure(self, bounds: Bounds, sure: bool) -> None:
        assert matchups.sure(bounds) is sure

    def test_no_more_agents_than_can_be_read(self) -> None:
        section = made(32, 1)
        (picture,) = figures.draw_section(section, names=["improvement"])
        axis = picture.figure.get_axes()[0]
        assert len(axis.get_yticklabels()) == 30
        assert axis.get_yticklabels()[-1].get_text() == "agent_29*"
        assert "2 lower ranks left out" in words(picture.figure)
        assert picture.figure.get_figwidth() == style.TEXT_WIDTH
        picture.figure.draw_without_rendering()
        assert not overlaps(axis.texts)

    def test_numbers_can_be_read_on_every_colour(self) -> None:
        labels = [f"a{i}" for i in range(20)]
        better = {}
        for n, (x, y) in enumerate(itertools.permutations(labels, 2)):
            better[x, y] = Bounds(n / 379, None, None)
        axis = matchups.draw_improvement(made(labels), better).get_axes()[0]
        image = axis.images[0]
        for text in axis.texts:
            x, y = text.get_position()
            value = image.get_array()[round(y), round(x)]
            ground = _luminance(image.cmap(image.norm(value)))
            ink = {"white": 1.0, "black": 0.0}[text.get_color()]
            high, low = max(ground, ink) + 0.05, min(ground, ink) + 0.05
            assert high / low >= 4.5  # of WCAG 2 for small text


def _luminance(colour: Sequence[float]) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]
    ]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


class TestCost:
    def test_dots_lie_at_cost_and_iqm(self) -> None:
        section = made(3)
        axis = cost.draw_cost(section).get_axes()[0]
        dots_there = [x for x in axis.lines if x.get_marker() == "o"]
        for dot, entry in zip(dots_there, section.entries, strict=True):
            assert entry.iqm is not None
            assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (
                entry.cost_s,
                entry.iqm.value,
            )
        ends = [tuple(x.get_ydata()) for x in axis.lines if x.get_marker() != "o"]
        assert ends == [(e.iqm.low, e.iqm.high) for e in section.entries if e.iqm]
        assert [t.get_text() for t in axis.texts] == [f"agent_{i}*" for i in range(3)]

    @pytest.mark.parametrize(("most", "scale"), [(19.9, "linear"), (20.1, "log")])
    def test_wide_ranges_are_logarithmic(self, most: float, scale: str) -> None:
        section = made(2)
        first, second = section.entries
        dear = dataclasses.replace(second, cost_s=most)
        axis = cost.draw_cost(made(2, entries=(first, dear))).get_axes()[0]
        assert first.cost_s == 2.0 and axis.get_xscale() == scale

    def test_labels_of_twenty_agents_overlap_neither_each_other_nor_dots(self) -> None:
        section = made(20)
        with style.paper_style():
            figure = cost.draw_cost(section)
            figure.draw_without_rendering()
        axis = figure.get_axes()[0]
        assert not overlaps(axis.texts) and not outside(figure, axis.texts)
        for entry in section.entries:
            assert entry.iqm is not None
            x, y = axis.transData.transform((entry.cost_s, entry.iqm.value))
            for text in axis.texts:
                assert not Text.get_window_extent(text).contains(x, y)

    def test_a_label_goes_where_nothing_is(self) -> None:
        frame = cost.Box(0, 0, 1000, 1000)
        right = cost.Box(500, 400, 1000, 600)
        left = cost.Box(0, 490, 400, 510)
        free = cost.best_place((500, 500), (100, 10), 1.0, [], frame)
        assert free.direction == (1, 0) and free.reach == 5.0
        assert free.box == cost.Box(505.0, 495.0, 605.0, 505.0)
        blocked = cost.best_place((500, 500), (100, 10), 1.0, [right], frame)
        assert blocked.direction == (-1, 0)
        both = cost.best_place((500, 500), (100, 10), 1.0, [right, left], frame)
        assert both.box.left < 500 and both.box.right <= 500
        corner = cost.best_place((995, 500), (100, 10), 1.0, [], frame)
        assert corner.direction == (-1, 0)


class TestSection:
    def test_names_and_reasons(self, example: Section) -> None:
        names = [picture.name for picture in figures.draw_section(example)]
        assert names == ["ranking", "profiles", "improvement", "cost", "tasks"]
        assert figures.left_out(example, None) == {"progress": "no run counts"}

    @pytest.mark.parametrize(
        ("about", "lacking"),
        [
            (
                {"rank": None, "iqm": None},
                {"ranking", "profiles", "improvement", "cost"},
            ),
            ({"cost_s": None}, {"improvement", "cost"}),
            ({}, {"improvement"}),
        ],
    )
    def test_what_cannot_be_drawn_is_left_out(
        self, about: Mapping[str, Any], lacking: set[str]
    ) -> None:
        (entry,) = made(1).entries
        section = made(1, entries=(dataclasses.replace(entry, **about),))
        reasons = figures.left_out(section, None)
        assert set(reasons) == lacking | {"progress"}
        drawn = {picture.name for picture in figures.draw_section(section)}
        assert drawn == set(figures.FIGURES) - set(reasons)

    def test_unknown_figure(self) -> None:
        with pytest.raises(UsageError, match=r"unknown figure 'rankin'.*'ranking'"):
            figures.draw_section(made(1), names=["rankin"])

    @pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
    def test_same_bytes_whatever_the_settings(self, suffix: str) -> None:
        def drawn() -> list[bytes]:
            pictures = figures.draw_section(made(["a$_b$", "c^{x}"]))
            return [figures.picture_file(p, suffix, 60) for p in pictures]

        first = drawn()
        wishes = {"font.size": 20.0, "pdf.fonttype": 3, "svg.fonttype": "none"}
        with rc_context({**wishes, "savefig.bbox": "tight", "lines.linewidth": 9.0}):
            assert drawn() == first
        if suffix == ".pdf":
            assert all(b"/CIDFontType2" in f and b"/Type3" not in f for f in first)
        if suffix == ".svg":
            assert all(b"<text" not in file for file in first)

    def test_dollars_of_names_are_letters(self) -> None:
        (picture,) = figures.draw_section(made(["a$_b$"]), names=["ranking"])
        label = picture.figure.get_axes()[0].get_yticklabels()[0]
        assert label.get_text() == "1  a$_b$*" and not label.get_parse_math()

    def test_behaviour_is_nobody(self, tmp_path: Path) -> None:
        rows = [
            *make_rows("iql", dict.fromkeys(TASKS, 50.0)),
            make_behaviour(TASKS[0], 9.0),
        ]
        section = only_section(fill(tmp_path, rows))
        (figure,) = dots.draw_tasks(section)
        first, second = panels(figure)
        assert (dotted(first), dotted(second)) == ([9.0], [])
        assert BEHAVIOUR not in [t.get_text() for t in first.get_yticklabels()]
