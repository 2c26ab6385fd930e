"""Training curves: which runs are drawn, what lines, labels and files come of them."""

from __future__ import annotations

import csv
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import RESULTS, RUN, SETTINGS, SMALL, TINY, USAGE, offrl
from test_results_metrics import make_point
from test_results_rows import make_job, make_row

from offrl_jax import figures, results
from offrl_jax.errors import ResultsError, UsageError
from offrl_jax.results import read_metrics

pytest_plugins = ["cli_fixtures"]

POND, MAZE = "classic/pendulum-mixed-v0", "classic/point_maze-mixed-v0"


def silent(line: str) -> None:
    pytest.fail(f"unexpected message: {line}")


def write(folder: Path, points: Sequence[Any] = (), rows: Sequence[Any] = ()) -> Path:
    for point in points:
        with results.MetricFile(
            results.metric_path(folder, point.run_id), silent
        ) as file:
            file.append([point])
    for row in rows:
        with results.RowFile(results.row_path(folder, row.run_id), silent) as file:
            file.append(row)
    return folder


def curve(values: list[float], **about: Any) -> list[Any]:
    """Points of `loss` at 10, 20, ... updates."""
    return [
        make_point(step=10 * (i + 1), values={"loss": value}, **about)
        for i, value in enumerate(values)
    ]


def read(folder: Path, **chosen: Any) -> list[figures.TrainedRun]:
    return figures.read_runs(folder, silent, **chosen)


def two_agents(folder: Path) -> Path:
    """Three seeds of one agent, one of them diverged; one seed of the other."""
    td3 = {"run_id": "run-a", "agent": "td3_bc@quick"}
    bc = {"run_id": "run-b", "agent": "bc@quick"}
    points = [
        *curve([1.0, 2.0, 3.0], seed=0, **td3),
        *curve([5.0, 6.0, 9.0], seed=1, **td3),
        *curve([7.0, math.nan, math.nan], seed=2, **td3),
        *curve([0.5, 0.25, 0.125], seed=0, **bc),
        *curve([0.5, 0.5, 0.75], seed=0, task=MAZE, **bc),
    ]
    return write(folder, points)


class TestRuns:
    def test_metrics_alone_are_enough(self, tmp_path: Path) -> None:
        runs = read(two_agents(tmp_path))
        assert [(r.cell.agent, r.cell.task, r.seed, r.diverged) for r in runs] == [
            ("bc@quick", POND, 0, False),
            ("bc@quick", MAZE, 0, False),
            ("td3_bc@quick", POND, 0, False),
            ("td3_bc@quick", POND, 1, False),
            ("td3_bc@quick", POND, 2, True),
        ]
        found = runs[0].curves["loss", "train"]
        assert found.steps.tolist() == [10, 20, 30]
        assert found.values.tolist() == [0.5, 0.25, 0.125]

    def test_superseded_and_tuning_runs_are_left_out(self, tmp_path: Path) -> None:
        """The plan's last job has a result; an older one of the same runs has too."""
        about = {"agent": "td3_bc", "seed": 0}
        for run_id, value in (("run-old", 1.0), ("run-new", 2.0), ("run-t", 3.0)):
            role = "tune" if run_id == "run-t" else "test"
            row = make_row(run_id=run_id, role=role)
            write(tmp_path, curve([value], run_id=run_id, **about), [row])
        jobs = (make_job(run_id="run-old"), make_job(run_id="run-new"))
        results.write_plan(tmp_path, results.Plan(results.SCHEMA, jobs))
        (run,) = (r for r in read(tmp_path) if r.curves)
        assert run.curves["loss", "train"].values.tolist() == [2.0]

    def test_evaluations_are_metrics_too(self, tmp_path: Path) -> None:
        phases = {"density": 30, "policy": 100}
        rows = [
            make_row(step=50, score=10.0, returns=[1.0, 2.0], phase_updates=phases),
            make_row(step=100, score=30.0, returns=[3.0, 5.0], phase_updates=phases),
            make_row(step=50, seed=1, score=None, returns=[1.0], phase_updates=phases),
            make_row(step=100, seed=1, score=None, returns=[], status="diverged"),
        ]
        first, second = read(write(tmp_path, rows=rows))
        assert first.curves["score", "policy"].steps.tolist() == [50, 100]
        assert first.curves["score", "policy"].values.tolist() == [10.0, 30.0]
        assert first.curves["return", "policy"].values.tolist() == [1.5, 4.0]
        assert second.diverged and "score" not in {name for name, _ in second.curves}
        assert figures.recorded([first, second]) == []

    def test_chosen_agents_and_tasks(self, tmp_path: Path) -> None:
        folder = two_agents(tmp_path)
        chosen = read(folder, agents=["bc"], tasks=[MAZE])
        assert [(r.cell.agent, r.cell.task) for r in chosen] == [("bc@quick", MAZE)]
        labelled = read(folder, agents=["bc@quick"])
        assert [r.cell.task for r in labelled] == [POND, MAZE]
        with pytest.raises(UsageError, match=r"agent.*'td3_b'; did you mean 'td3_bc'"):
            read(folder, agents=["td3_b"])
        with pytest.raises(UsageError, match=f"task.*did you mean '{MAZE}'"):
            read(folder, tasks=["point_maze-mixed-v0"])

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ResultsError, match="neither metrics nor evaluations"):
            read(tmp_path)


class TestNumbers:
    def test_median_skips_what_is_not_finite(self) -> None:
        steps = np.array([1, 2, 3])
        values = (
            [1.0, 2.0, math.nan],
            [5.0, math.nan, math.nan],
            [30.0, 4.0, math.nan],
        )
        found = figures.median_curve(
            [figures.Curve(steps, np.array(v)) for v in values]
            + [figures.Curve(np.array([5]), np.array([8.0]))]
        )
        assert found.steps.tolist() == [1, 2, 5]
        assert found.values.tolist() == [5.0, 3.0, 8.0]

    def test_final_values(self, tmp_path: Path) -> None:
        """A diverged seed is counted apart, one that is still behind not at all."""
        folder = two_agents(tmp_path)
        write(folder, curve([100.0], seed=3, agent="td3_bc@quick"))
        found = {(f.label, f.task): f[4:] for f in figures.final_values(read(folder))}
        assert found == {
            ("td3_bc@quick", POND): (6.0, 30, 2, 1),
            ("bc@quick", POND): (0.125, 30, 1, 0),
            ("bc@quick", MAZE): (0.75, 30, 1, 0),
        }

    def test_labels_say_no_more_than_tells_apart(self, tmp_path: Path) -> None:
        for number, changes in enumerate(
            ({}, {"setting": "alpha=1.0"}, {"updates_total": 2000}, {"agent": "iql"})
        ):
            updates = changes.get("updates_total", 100)
            row = make_row(run_id=f"r{number}", **{**changes, "step": updates})
            write(tmp_path, rows=[row])
        labels = figures.labels(run.group for run in read(tmp_path))
        assert sorted(labels.values()) == [
            "iql",
            "td3_bc, 100 updates",
            "td3_bc, 2,000 updates",
            "td3_bc, alpha=1.0",
        ]

    def test_an_agent_has_one_colour_in_the_panels_of_every_family(self, tmp_path):
        for family, task in (("classic", POND), ("neorl2", "neorl2/DMSD-v1")):
            write(tmp_path, rows=[make_row(run_id=family, family=family, task=task)])
        runs = read(tmp_path)
        assert {run.section.family for run in runs} == {"classic", "neorl2"}
        assert set(figures.labels(run.group for run in runs).values()) == {"td3_bc"}


class TestPanels:
    def test_one_per_metric_and_task_in_the_order_asked_for(self, tmp_path) -> None:
        points = [
            make_point(task=task, seed=seed, values={"a": 1.0, "b": 2.0})
            for task in (MAZE, POND)
            for seed in (0, 1)
        ]
        runs = read(write(tmp_path, points))
        found = figures.panels(runs, ["b", "a", "b"])
        assert [(p.metric, p.task, p.phase) for p in found] == [
            ("b", POND, ""),
            ("b", MAZE, ""),
            ("a", POND, ""),
            ("a", MAZE, ""),
        ]
        assert [len(p.curves["td3_bc@quick"]) for p in found] == [2, 2, 2, 2]
        assert {p.metric for p in figures.panels(runs)} == {"a", "b"}

    def test_phases_of_one_metric_are_never_one_line(self, tmp_path: Path) -> None:
        points = [
            *curve([1.0, 2.0], phase="density"),
            *curve([3.0, 4.0], phase="policy"),
            make_point(phase="policy", step=30, values={"kappa": 1.0}),
        ]
        found = figures.panels(read(write(tmp_path, points)))
        assert [(p.metric, p.phase) for p in found] == [
            ("loss", "density"),
            ("loss", "policy"),
            ("kappa", "policy"),
        ]
        values = [p.curves["td3_bc@quick"][0].values.tolist() for p in found]
        assert values == [[1.0, 2.0], [3.0, 4.0], [1.0]]

    def test_no_such_metric(self, tmp_path: Path) -> None:
        runs = read(two_agents(tmp_path))
        with pytest.raises(UsageError, match="metric 'los'; did you mean 'loss'"):
            figures.panels(runs, ["los"])
        with pytest.raises(UsageError, match="unknown metric 'score'; known: loss"):
            figures.panels(runs, ["score"])

    def test_none_recorded(self, tmp_path: Path) -> None:
        runs = read(write(tmp_path, rows=[make_row()]))
        for asked in (None, ["loss"]):
            with pytest.raises(ResultsError, match=r"no training metrics.*score"):
                figures.panels(runs, asked)
        (panel,) = figures.panels(runs, ["score"])
        assert panel.curves["td3_bc"][0].values.tolist() == [61.5]


class TestFigure:
    def test_lines_colours_and_labels(self, tmp_path: Path) -> None:
        figure = figures.draw(figures.panels(read(two_agents(tmp_path))))
        pond, maze = figure.axes
        assert (pond.get_title(), maze.get_title()) == (POND, MAZE)
        assert (pond.get_xlabel(), pond.get_ylabel()) == ("updates", "loss")
        by_colour: dict[Any, list[Any]] = {}
        for line in pond.lines:
            by_colour.setdefault(line.get_color(), []).append(line)
        assert list(by_colour) == list(figures.PALETTE[:2])
        cloned, learned = by_colour.values()
        assert len(cloned) == 2 and len(learned) == 4
        bold = max(learned, key=lambda line: line.get_linewidth())
        assert np.asarray(bold.get_xdata()).tolist() == [10, 20, 30]
        # Of 1, 5, 7; then of 2, 6 and of 3, 9, for the third seed has diverged.
        assert np.asarray(bold.get_ydata()).tolist() == [5.0, 4.0, 6.0]
        assert all(line.get_linewidth() < 1 for line in learned if line is not bold)
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [
            "bc@quick (1 seed)",
            "td3_bc@quick (3 seeds, 1 diverged)",
        ]

    def test_many_settings_differ_in_colour_or_style(self, tmp_path: Path) -> None:
        points = [
            make_point(setting=f"s{i}", values={"loss": float(i)}) for i in range(20)
        ]
        figure = figures.draw(figures.panels(read(write(tmp_path, points))))
        looks = {(x.get_color(), x.get_linestyle()) for x in figure.axes[0].lines}
        assert len(looks) == 20

    def test_units_and_phases_are_said(self, tmp_path: Path) -> None:
        points = [*curve([1.0], phase="density"), *curve([2.0], phase="policy")]
        rows = [make_row(phase_updates={"density": 30, "policy": 100})]
        points = [make_point(**{**vars(p), "agent": "td3_bc"}) for p in points]
        runs = read(write(tmp_path, points, rows))
        figure = figures.draw(figures.panels(runs, ["loss", "score"]))
        assert [axis.get_xlabel() for axis in figure.axes] == [
            "updates of phase density",
            "updates of phase policy",
            "updates of phase policy",
        ]
        assert figure.axes[2].get_ylabel() == "score (0 random, 100 expert)"

    @pytest.mark.parametrize(
        ("suffix", "begins"),
        [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")],
    )
    def test_files_are_the_same_every_time(
        self, suffix: str, begins: bytes, tmp_path: Path
    ) -> None:
        folder = two_agents(tmp_path)

        def drawn() -> bytes:
            return figures.render(figures.draw(figures.panels(read(folder))), suffix)

        first = drawn()
        assert first.startswith(begins) and first == drawn()

    def test_legend_of_many_long_names_lies_within_the_figure(
        self, tmp_path: Path
    ) -> None:
        for i in range(7):
            about = {"run_id": f"run-{i}", "setting": f"a rather long setting {i}"}
            write(tmp_path, curve([1.0, 2.0], seed=0, **about))
        figure = figures.draw(figures.panels(read(tmp_path)))
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, whole = legend.get_window_extent(), figure.bbox
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1

    @pytest.mark.parametrize("name", ["a.gif", "a", "png"])
    def test_unknown_suffix(self, name: str) -> None:
        with pytest.raises(UsageError, match=r"choose \.png, \.pdf or \.svg"):
            figures.check_suffix(Path(name))
        assert figures.check_suffix(Path("A.PNG")) == ".png"

    def test_without_matplotlib_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        panels = figures.panels(read(two_agents(tmp_path)))
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(UsageError, match="pip install matplotlib"):
            figures.draw(panels)


class TestCommands:
    def test_run_tells_where_metrics_are_and_how_they_ended(
        self, results: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert offrl(*RUN, *SMALL, *SETTINGS) == 0
        out = capsys.readouterr().out
        assert "metrics: out/metrics/*.jsonl   figures: offrl curves out" in out
        last = [
            point.values["actor_loss"]
            for point in read_metrics(results)
            if point.step == 40
        ]
        assert len(last) == 2
        told = out.split("last values of bc, batch_size=16,hidden=8,8")[1]
        row = next(line for line in told.splitlines() if "actor_loss" in line)
        assert float(row.split()[1]) == pytest.approx(np.mean(last), rel=1e-3)
        assert TINY in told

    def test_a_folder_without_metrics_is_whole(
        self, results: Path, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert offrl("leaderboard", "out", "--format", "csv") == 0
        board = capsys.readouterr().out
        shutil.rmtree(results / "metrics")
        assert offrl("leaderboard", "out", "--format", "csv") == 0
        assert capsys.readouterr().out == board
        assert offrl(*RUN, *SMALL, *SETTINGS) == 0
        assert "no training metrics of bc are in out" in capsys.readouterr().out

    def test_curves_writes_one_figure_and_nothing_else(
        self, results: Path, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ("curves", "out", "--metrics", "actor_loss", "return")
        assert offrl(*command, "--agent", "bc", "--out", "mine.svg") == 0
        assert capsys.readouterr().out == "wrote mine.svg\n"
        assert (home / "mine.svg").read_text().startswith("<?xml")
        assert not list(home.glob(".mine*"))

    def test_progress_of_a_run(self, results: Path, home: Path) -> None:
        assert offrl("progress", "out", "--agent", "bc", "--out", "mine.png") == 0
        with open(home / "mine.csv") as file:
            found = [(x["task"], x["step"], x["runs"]) for x in csv.DictReader(file)]
        assert found == [(TINY, "20", "2"), (TINY, "40", "2")]
        assert (home / "mine.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("code", "said", "arguments"),
        [
            (USAGE, "unknown suffix '.gif'", ("out", "--out", "a.gif")),
            (USAGE, "offrl curves --help", ("out",)),
            (USAGE, "at least one name", ("out", "--metrics", "--out", "a.png")),
            (
                USAGE,
                "did you mean 'actor_loss'?",
                ("out", "--metrics", "actor_los", "--out", "a.png"),
            ),
            (RESULTS, "neither metrics nor", ("none", "--out", "a.png")),
            (RESULTS, "cannot be written", ("out", "--out", "none/a.png")),
        ],
    )
    def test_mistakes_are_one_line(self, code, said, arguments, results, refused):
        refused(code, said, "curves", *arguments)
