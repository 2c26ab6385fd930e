"""`offrl benchmark --plan`, estimated durations, and the bar of a whole suite."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import pytest
from cli_runner import TINY, files, offrl
from test_benchmark_planning import finish, row_of, wanted

from offrl_jax.benchmark import progress as progress_module
from offrl_jax.benchmark import speeds
from offrl_jax.benchmark.progress import Progress, Work, duration
from offrl_jax.benchmark.speeds import Speed, estimate_seconds
from offrl_jax.results import Job

pytest_plugins = ["cli_fixtures"]

ENV_OF = {"local/a-v0": "env-a", "local/b-v0": "env-b"}
TWO_CPUS = "2 x cpu (x86_64, 2 cores)"


def speed_of(job: Job, **changes) -> Speed:
    known = Speed(
        agent=job.agent.partition("@")[0],
        config=job.config,
        device=TWO_CPUS,
        platform="cpu",
        envs=("env-a", "env-b"),
        members=6,
        devices=2,
        updates_per_s=300.0,
        eval_s=0.5,
        compile_s=7.0,
    )
    return dataclasses.replace(known, **changes)


def seconds(job: Job, *known: Speed, device: str = TWO_CPUS) -> float | None:
    return estimate_seconds(job, known, ENV_OF, device)


class TestDurations:
    """Jobs of 6 members, 100 updates, evaluated with 2 + 4 episodes."""

    job = wanted()[1]

    def test_by_hand(self):
        assert seconds(self.job, speed_of(self.job)) == pytest.approx(
            100 * 6 / 300 + 0.5 * 6 * 6 + 7
        )

    @pytest.mark.parametrize(
        "changes",
        [
            {"agent": "iql"},
            {"config": {"hidden": [8]}},
            {"device": "1 x NVIDIA H200"},
            {"envs": ("env-a",)},
        ],
    )
    def test_of_something_else_nothing_is_known(self, changes):
        assert seconds(self.job, speed_of(self.job, **changes)) is None
        assert seconds(self.job) is None

    def test_more_members_take_longer_and_fewer_only_on_a_cpu(self):
        def training(members, platform):
            known = speed_of(
                self.job, members=members, platform=platform, eval_s=0.0, compile_s=0.0
            )
            return seconds(self.job, known)

        # 300 updates/s of M members: a step of all of them lasts M / 300 s.
        assert training(2, "cpu") == pytest.approx(3 * 100 * 2 / 300)
        assert training(60, "cpu") == pytest.approx(0.1 * 100 * 60 / 300)
        assert training(2, "gpu") == pytest.approx(3 * 100 * 2 / 300)
        assert training(60, "gpu") == pytest.approx(100 * 60 / 300)

    def test_the_nearest_size_counts_and_of_equal_ones_the_newest(self):
        far = speed_of(self.job, members=600, updates_per_s=9.0)
        old, new = speed_of(self.job, updates_per_s=1.0), speed_of(self.job)
        assert seconds(self.job, old, far, new) == seconds(self.job, new)

    def test_from_rows(self):
        population = {"members": 6, "devices": 2, "platform": "cpu"}
        rows = [
            row_of(
                self.job,
                member,
                step,
                returns=[0.0] * episodes,
                eval_s=episodes * 3.0,  # of the three members in one environment
                updates_per_s=float(step),
                compile_s=step / 10,
                device=TWO_CPUS,
                population=population,
            )
            for member in self.job.members
            for step, episodes in ((50, 2), (100, 4))
        ]
        (found,) = speeds.of_rows(rows, ENV_OF)
        assert found == Speed(
            "td3_bc", dict(self.job.config), TWO_CPUS, "cpu", ("env-a", "env-b"),
            6, 2, 100.0, 3.0 / 3, 10.0,
        )  # fmt: skip
        unfinished = [row for row in rows if row.step == 50]
        assert speeds.of_rows(unfinished, ENV_OF) == []
        assert speeds.of_rows(finish(self.job), ENV_OF) == []  # no split is known
        assert speeds.of_rows(rows, {}) == []

    def test_the_table_survives_the_disk_and_damage(self, tmp_path, monkeypatch):
        path = tmp_path / "cache" / "speeds.jsonl"
        assert speeds.read_table(path) == []
        many = [speed_of(self.job, compile_s=float(i)) for i in range(9)]
        speeds.keep(path, many[:2])
        with path.open("a") as file:
            file.write('{"agent": "bc"}\n[]\nnot json\n')
        speeds.keep(path, many[2:3])
        assert speeds.read_table(path) == many[:3]
        monkeypatch.setattr(speeds, "LINES", 4)
        speeds.keep(path, many[3:])
        assert speeds.read_table(path) == many[-4:]
        (tmp_path / "file").write_text("")
        speeds.keep(tmp_path / "file" / "speeds.jsonl", many)  # says nothing


SUITE_FILE = f"""
agents = ["bc", "td3_bc"]
tasks = ["{TINY}"]
preset = "quick"
seeds = 4
updates = 20
[protocol]
episodes = 3
evaluations = 2
[settings.bc.small]
hidden = [8]
batch_size = 8
[settings.td3_bc.small]
hidden = [8]
batch_size = 8
"""


class TestThePlan:
    @pytest.fixture
    def suite(self, tiny: Path, monkeypatch, capsys) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tiny / "cache"))
        (tiny / "mine.toml").write_text(SUITE_FILE)
        return tiny

    def plan(self, capsys, *options: str) -> str:
        assert offrl("benchmark", "mine.toml", "--plan", *options) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    def test_before_between_and_after(self, suite, capsys):
        """Nothing is known, then half is done, then all; and nothing is written."""
        before = files(suite)
        text = self.plan(capsys)
        assert re.search(r"bc@quick .* 0-3 +1 +4 +20 +2 +\d+ MiB +0% +unknown", text)
        assert "0 of 8 runs are done" in text
        assert "2 jobs to run, 2 jobs of unknown duration" in text
        assert files(suite) == before

        some = ("benchmark", "mine.toml", "--agents", "bc", "--seeds", "2")
        assert offrl(*some) == 0
        capsys.readouterr()
        before = files(suite)
        text = self.plan(capsys, "--waves", "2")
        assert "2 of 8 runs are done" in text
        assert re.search(r"td3_bc@quick \(1/2\) .* 0-1 +1 +2 .* unknown", text)
        assert re.search(r"td3_bc@quick \(2/2\) .* 2-3 ", text)
        # Of bc the speed is known: from the rows, and elsewhere from the table.
        assert re.search(r"bc@quick \(2/2\) +local/tiny-v0 +3 +1 +1 .* 0% +\d+ s", text)
        assert files(suite) == before
        assert (suite / "cache/offrl_jax/speeds.jsonl").is_file()
        elsewhere = self.plan(capsys, "--results", "new", "--agents", "bc")
        assert re.search(r"bc@quick .* 0-3 .* 0% +\d+ s", elsewhere)
        assert not (suite / "new").exists()

        assert offrl("benchmark", "mine.toml", "--agents", "bc") == 0
        capsys.readouterr()
        done = self.plan(capsys, "--agents", "bc")
        assert "4 of 4 runs are done" in done and "nothing to run" in done

    def test_of_data_that_are_not_there_yet(self, suite, capsys):
        before = files(suite)
        text = self.plan(capsys, "--tasks", "classic/dmsd-mixed-v0")
        assert "data made on use, not counted in the memory: classic/dmsd" in text
        assert "0 of 8 runs" in text
        assert files(suite) == before

    def test_too_little_memory_is_one_line(self, suite, capsys):
        before = files(suite)
        for options in (("--plan",), ()):
            refused = ("benchmark", "mine.toml", "--memory", "0.00001", *options)
            assert offrl(*refused) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1
            assert "single run" in err and "--memory GIB" in err
        assert files(suite) == before


class Clock:
    """The time of `progress`, set by the tests."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress_module, "time", made)
    return made


def test_a_suite_in_plain_lines(clock):
    """Two jobs of 100 and 300 member-updates; of the second a third was there."""
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.begin_jobs({"a": Work(100), "b": Work(300, 100)}, finished=1000)
        assert progress.seconds_left() is None
        progress.begin_job("a")
        progress.begin("first", 50, 0, members=2)
        clock.now += 5
        progress.update(25, "")
        # 50 in 5 s; 50 + 200 are left.
        assert progress.seconds_left() == pytest.approx(25)
        clock.now += 5
        progress.update(50, "")
        progress.end("first: done")
        progress.end_job("a")
        progress.begin_job("b")
        progress.begin("second", 100, 40, members=3)  # 20 more than was told
        assert progress.seconds_left() == pytest.approx(10 * 180 / 100)
        clock.now += 9
        progress.update(100, "")
        progress.end("second: done")
        progress.end_job("b")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "first: begins",
        "first: done",
        "1 of 2 jobs, about 20 s left",
        "second: goes on at 40",
        "second: done",
        "2 of 2 jobs",
    ]


def test_a_job_in_halves_is_counted_once(clock):
    with Progress(io.StringIO()) as progress:
        progress.begin_jobs({name: Work(100) for name in "abc"})
        progress.begin_job("a")
        progress.begin("whole", 50, 0, members=2)
        clock.now += 10
        progress.update(20, "")  # and then memory is gone
        for _ in range(2):
            progress.begin("half", 50, 10, members=1)
            progress.update(50, "")
            progress.end("half: done")
        clock.now += 10
        assert progress.seconds_left() == pytest.approx(20 * 200 / (40 + 2 * 40))
        progress.end_job("a")
        progress.begin_job("b")
        clock.now += 5
        progress.end_job("b")  # it failed: nothing of it is left
        assert progress.seconds_left() == pytest.approx(25 * 100 / 120)


def test_a_terminal_shows_the_suite_above_the_job(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress(stream) as progress:
        progress.begin_jobs({"a": Work(100), "b": Work(300, 100)}, finished=600)
        progress.begin_job("a")
        progress.begin("first", 50, 0, members=2)
        progress.update(25, "7 updates/s")
        assert progress._bars is not None
        suite, job = progress._bars.tasks
        assert (suite.total, suite.completed) == (1000, 750)
        assert (job.total, job.completed) == (50, 25)
        progress._bars.refresh()
        progress.end("first: done")
        progress.end_job("a")
        (suite,) = progress._bars.tasks
        assert (suite.description, suite.completed) == ("1 of 2 jobs", 800)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"0 of 2 jobs .* 75%", text)
    assert re.search(r"first .* 50% 7 updates/s", text)
    assert "first: done" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (91, "2 min"),
        (89 * 60, "89 min"),
        (200 * 60, "3 h 20 min"),
        (52 * 3600, "2 d 4 h"),
    ],
)
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text
