"""A row leads back to what made it, and comes out again, bit for bit."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from cli_runner import DATA, RESULTS, RUN, SETTINGS, SMALL, TINY, USAGE, files, offrl
from test_benchmark_jobs import SUITE, devices_of, run
from test_results_rows import make_row
from tiny_runs import pendulum_episodes, write_store

from offrl_jax.agents import bc, registry
from offrl_jax.benchmark import jobs as jobs_module
from offrl_jax.benchmark import provenance, reproduction
from offrl_jax.benchmark.command_lines import command_of
from offrl_jax.benchmark.progress import Progress
from offrl_jax.benchmark.reproduction import Difference, Verdict
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, ResultsError, UsageError
from offrl_jax.results import BEHAVIOUR, Row, plan_path, read_rows
from offrl_jax.results.rows import content_hash
from offrl_jax.types import Agent, Phase

pytest_plugins = ["cli_fixtures"]

OFFLINE = SUITE.tasks
EQUAL = "equal bit for bit"


def two_phases(config, spec) -> Agent:
    made = bc.make_bc(config, spec)
    update = made.phases[0].update
    phases = (Phase("density", update, 3), Phase("policy", update, 2))
    return Agent(made.init, made.act, phases, made.batch_size)


@pytest.fixture(scope="module", autouse=True)
def _an_agent_of_two_phases():
    with pytest.MonkeyPatch.context() as patch:
        entry = dataclasses.replace(bc.ENTRY, name="two", make=two_phases)
        patch.setitem(registry.REGISTRY, "two", entry)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Store, Path]:
    """Rows of every kind: two phases, a divergence, on-policy, datasets."""
    folder = tmp_path_factory.mktemp("made")
    store = write_store(folder / "data", OFFLINE)
    small = {"hidden": [8, 8], "batch_size": 12}
    offline = dataclasses.replace(
        SUITE,
        agents=("two",),
        pretraining_updates=30,
        settings={"two": {"tame": small, "wild": {**small, "lr": 1e30}}},
    )
    online = dataclasses.replace(
        SUITE,
        tasks=("online/Pendulum-v1",),
        agents=("a2c",),
        updates=32 * 4,
        protocol=dataclasses.replace(SUITE.protocol, evaluations=2),
        settings={"a2c": {"small": {"hidden": [8], "environments": 4, "steps": 8}}},
    )
    for suite in (offline, online):
        assert run(store, folder / "results", suite).ran == 1
    return store, folder / "results"


def rows_of(folder: Path, **wanted: object) -> list[Row]:
    return [
        row
        for row in read_rows(folder, print)
        if all(getattr(row, name) == value for name, value in wanted.items())
    ]


def again(
    store: Store, folder: Path, row_id: str, **options: bool
) -> tuple[Verdict, list[Difference]]:
    before = files(folder)
    origin = reproduction.trace(folder, row_id, print, **options)
    found = reproduction.differences(origin)
    with Progress(io.StringIO()) as progress:
        tasks = reproduction.load_data(origin, store, print)
        row = reproduction.run_again(origin, tasks, progress)
    assert files(folder) == before
    return reproduction.compare(origin.row, row, found), found


@pytest.mark.parametrize(
    "wanted",
    [
        {"agent": "two@quick", "setting": "tame", "step": 120, "seed": 1},
        {"agent": "two@quick", "setting": "tame", "step": 40, "seed": 0},
        {"agent": "two@quick", "setting": "wild", "step": 80, "seed": 1},
        {"agent": "a2c@quick", "step": 128, "seed": 1},
        {"agent": BEHAVIOUR},
    ],
    ids=["two-phases", "curve", "diverged", "on-policy", "behaviour"],
)
def test_rows_of_every_kind_come_out_again(made, wanted):
    store, folder = made
    row = rows_of(folder, **wanted)[-1]
    assert row.status == ("diverged" if row.setting == "wild" else "ok")
    verdict, found = again(store, folder, row.row_id[:8])
    assert found == []
    assert verdict.equal and verdict.text.startswith(EQUAL)
    assert f": {len(row.returns)} episodes" in verdict.text


def tampered(folder: Path, row: Row, change: Callable[[dict], None]) -> str:
    """Changes the row on disk, and the hash with it; the new id."""
    path = next(p for p in folder.glob("rows/*") if row.row_id in p.read_text())
    lines = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["row_id"] == row.row_id:
            change(record)
            record["row_id"] = content_hash(Row(**{**record, "row_id": "x"}))
            found = record["row_id"]
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return found


@pytest.fixture
def copy(made, tmp_path) -> tuple[Store, Path]:
    import shutil

    shutil.copytree(made[1], tmp_path / "results")
    return made[0], tmp_path / "results"


def test_a_single_digit_of_a_return_is_found(copy):
    store, folder = copy
    row = rows_of(folder, agent="two@quick", setting="tame", step=120, seed=0)[0]

    def change(record: dict) -> None:
        record["returns"][1] = float(np.nextafter(record["returns"][1], 0.0))

    verdict, found = again(store, folder, tampered(folder, row, change))
    assert not verdict.equal and found == []
    assert "different: mean return" in verdict.text and "model of a CPU" in verdict.text


def test_the_datasets_own_row_is_recomputed(copy):
    store, folder = copy
    row = rows_of(folder, agent=BEHAVIOUR)[0]

    def change(record: dict) -> None:
        record["returns"].pop()

    verdict, _ = again(store, folder, tampered(folder, row, change))
    assert verdict == Verdict(False, "different: 3 episodes, the row has 2")


def test_an_edit_that_left_the_hash_is_refused(copy):
    store, folder = copy
    row = rows_of(folder, agent=BEHAVIOUR)[0]
    path = next(p for p in folder.glob("rows/*") if row.row_id in p.read_text())
    path.write_text(path.read_text().replace('"role":"test"', '"role":"tune"'))
    with pytest.raises(ResultsError, match=rf"{path.name}:1: row_id '{row.row_id}' "):
        again(store, folder, row.row_id)


def test_without_a_plan_the_member_runs_alone(copy):
    store, folder = copy
    plan_path(folder).unlink()
    row = rows_of(folder, agent="two@quick", setting="tame", step=40, seed=0)[0]
    verdict, found = again(store, folder, row.row_id)
    told = {one.what: (one.then, one.now) for one in found}
    assert told["members of the population"] == ("8", "1")
    assert told["devices of the population"] == ("2", "1")
    assert verdict.equal and "members of the population" in verdict.text


def test_a_member_alone_is_equal_within_what_is_said(made, monkeypatch):
    store, folder = made
    row = rows_of(folder, agent="two@quick", setting="tame", step=40, seed=1)[0]
    sizes = []
    real = jobs_module.prepare

    def prepare(job, tasks):
        sizes.append((len(job.members), len(tasks), job.split["devices"]))
        return real(job, tasks)

    monkeypatch.setattr(jobs_module, "prepare", prepare)
    verdict, found = again(store, folder, row.row_id, member_only=True)
    assert sizes == [(1, 1, 1)]
    assert verdict.equal and {one.what for one in found} == {
        "members of the population",
        "devices of the population",
    }


def test_another_number_of_devices_is_told(made, monkeypatch):
    _, folder = made
    row = rows_of(folder, agent="two@quick", setting="tame", step=40, seed=0)[0]
    devices_of(monkeypatch, 1)
    found = reproduction.differences(reproduction.trace(folder, row.row_id, print))
    told = {one.what: (one.then, one.now) for one in found if one.counts}
    assert set(told) == {"device", "devices of the population"}
    assert told["devices of the population"] == ("2", "1")
    assert told["device"][0].startswith("2 x cpu") and "1 x" in told["device"][1]
    verdict = reproduction.compare(row, dataclasses.replace(row), found)
    assert verdict.text.startswith(EQUAL)


def test_other_sources_versions_and_flags_are_told(made, monkeypatch):
    _, folder = made
    row = rows_of(folder, agent="a2c@quick")[0]
    monkeypatch.setattr(provenance, "source_hash", lambda: "other")
    monkeypatch.setattr(provenance, "commit", lambda: "c0ffee")
    monkeypatch.setattr(provenance, "versions", lambda: {**row.versions, "jax": "9"})
    monkeypatch.setattr(provenance, "flags", lambda: {**row.flags, "xla_flags": "-x"})
    found = reproduction.differences(reproduction.trace(folder, row.row_id, print))
    assert [one.what for one in found] == ["commit", "sources", "jax", "flag xla_flags"]
    assert all(one.counts for one in found)
    assert found[2].then == row.versions["jax"] and found[2].now == "9"
    # Of the same sources, another commit changes no bits.
    monkeypatch.setattr(provenance, "source_hash", lambda: origin.planned.source_hash)
    origin = reproduction.trace(folder, row.row_id, print)
    commit = next(
        one for one in reproduction.differences(origin) if one.what == "commit"
    )
    assert not commit.counts


def test_other_data_are_refused(made, tmp_path):
    _, folder = made
    other = Store(tmp_path / "data")
    for number, name in enumerate(OFFLINE):
        other.write(
            name,
            "train",
            pendulum_episodes(number if name == OFFLINE[0] else 7),
            source={"kind": "own file", "file": "made by the test"},
            info={"env_id": "classic/pendulum-v0"},
        )
    for task, message in (
        (
            OFFLINE[1],
            f"{OFFLINE[1]}: the data in .* are sha256 .* the row's were sha256",
        ),
        (OFFLINE[0], "learned from them too, and --member-only does without"),
    ):
        row = rows_of(folder, agent="two@quick", task=task, setting="tame", step=40)[0]
        with pytest.raises(DataError, match=message):
            again(other, folder, row.row_id)
    assert again(other, folder, row.row_id, member_only=True)[0].equal
    row = rows_of(folder, agent=BEHAVIOUR, task=OFFLINE[1])[0]
    with pytest.raises(DataError, match="the row's were"):
        again(other, folder, row.row_id)


@pytest.mark.parametrize(
    ("row_id", "message"),
    [
        ("abc", "'abc' is no row id"),
        ("../../..", "is no row id"),
        ("a" * 17, "is no row id"),
        ("a" * 8, "no row has an id that begins with aaaaaaaa"),
        ("123456", "beginning of 1234567000000000, 1234568000000000; give more"),
    ],
)
def test_a_row_is_named_by_enough_digits(row_id, message):
    rows = [
        make_row(row_id=one + "0" * 9, seed=n)
        for n, one in enumerate(("1234567", "1234568"))
    ]
    assert reproduction.find_row(rows, "1234568").seed == 1
    assert reproduction.find_row(rows, "1234567000000000").seed == 0
    with pytest.raises(UsageError, match=message):
        reproduction.find_row(rows, row_id)


def test_a_failed_row_has_nothing_to_compare(copy):
    _, folder = copy
    row = rows_of(folder, agent="a2c@quick")[0]
    failed = tampered(
        folder, row, lambda record: record.update(status="failed", error="no memory")
    )
    with pytest.raises(UsageError, match=r"failed \(no memory\), so there is nothing"):
        reproduction.trace(folder, failed, print)


def test_settings_that_are_gone_are_told(copy):
    _, folder = copy
    row = rows_of(folder, agent="a2c@quick")[0]
    changed = tampered(folder, row, lambda record: record["hyper"].update(old=1.0))
    with pytest.raises(UsageError, match="has no setting old any more; check out"):
        reproduction.trace(folder, changed, print)


def test_settings_that_are_new_run_at_their_defaults_and_are_told(copy):
    store, folder = copy
    row = rows_of(folder, agent="two@quick", setting="tame", step=40, seed=0)[0]

    def older(record: dict) -> None:
        del record["config"]["obs_transform"]
        record["hyper"].pop("lr", None)

    plan = json.loads(plan_path(folder).read_text())
    for job in plan["jobs"]:
        if job["agent"] == "two@quick":
            del job["config"]["obs_transform"]
            for member in job["members"]:
                if member["setting"] == "tame":
                    del member["hyper"]["lr"]
    plan_path(folder).write_text(json.dumps(plan))
    verdict, found = again(store, folder, tampered(folder, row, older))
    assert [(one.what, one.then, one.now) for one in found] == [
        ("setting lr", "not there", "0.001"),
        ("setting obs_transform", "not there", row.config["obs_transform"]),
    ]
    assert verdict.text.startswith(EQUAL)


@pytest.mark.parametrize(
    ("then", "now", "counts", "equal"),
    [
        # Variances of 2 over 2 episodes each: 3 sqrt(1 + 1) = 4.24.
        ([9.0, 11.0], [13.2, 15.2], True, True),
        ([9.0, 11.0], [13.3, 15.3], True, False),
        ([9.0, 11.0], [9.0, 11.5], False, False),
        # Nothing varies: a thousandth of the mean.
        ([100.0, 100.0], [100.09, 100.09], True, True),
        ([100.0, 100.0], [100.11, 100.11], True, False),
        ([100.0], [100.09], True, True),
        ([1.0], [1.0, 1.0], True, False),
    ],
)
def test_tolerance_by_hand(then, now, counts, equal):
    row, other = make_row(returns=then), make_row(returns=now)
    found = [Difference("device", "a", "b", counts)]
    verdict = reproduction.compare(row, other, found)
    assert verdict.equal is equal
    if counts and len(then) == len(now):
        gap = abs(sum(now) - sum(then)) / len(then)
        start = f"equal within {gap:g}, tolerance" if equal else "different, beyond"
        assert verdict.text.startswith(start)


def test_on_an_accelerator_bits_are_not_promised():
    row = make_row(returns=[100.0])
    other = make_row(returns=[100.01], population={"platform": "gpu"})
    verdict = reproduction.compare(row, other, [])
    assert verdict.equal and "no accelerator promises bits" in verdict.text
    assert not reproduction.compare(row, make_row(status="diverged"), []).equal


class TestCommand:
    def row_id(self, results: Path, **wanted: object) -> str:
        return rows_of(results, **wanted)[0].row_id

    def test_shows_where_a_row_comes_from(self, results, capsys):
        before = files(results)
        row_id = self.row_id(results, agent="bc", step=40, seed=1)
        assert offrl("reproduce", row_id[:7], "--results", "out") == 0
        out, _ = capsys.readouterr()
        said = {
            line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1]
            for line in out.splitlines()
        }
        assert said["row"].startswith(f"{row_id}, bc on {TINY}")
        asked = ("offrl", *RUN, *SMALL, *SETTINGS)
        words = shlex.split(said["command"])
        words[words.index("--results") + 1] = "out"  # copied here since
        assert tuple(words) == asked
        # Without what was written down, the same in another order.
        (results / "commands.jsonl").rename(results / "aside")
        words = shlex.split(reproduction.trace(Path("out"), row_id, print).command)
        assert words[0] == "offrl" and sorted(words) == sorted(asked)
        (results / "aside").rename(results / "commands.jsonl")
        assert said["commit"] == provenance.commit()
        assert f"jax {jax.__version__}" in said["versions"]
        assert "members 2" in said["population"] and "in the plan" in said["population"]
        assert "sha256" in said["data"]
        assert out.splitlines()[-1].startswith(EQUAL)
        assert files(results) == before

    def test_says_when_it_is_different(self, results, capsys):
        row = rows_of(results, agent="bc", step=40, seed=1)[0]
        row_id = tampered(results, row, lambda r: r.update(returns=[1.0, 2.0, 3.0]))
        assert offrl("reproduce", row_id, "--results", "out") == 1
        assert "different: mean return" in capsys.readouterr().out

    def test_the_datasets_row(self, results, capsys):
        row_id = self.row_id(results, agent=BEHAVIOUR)
        assert offrl("reproduce", row_id, "--results", "out") == 0
        out = capsys.readouterr().out
        assert EQUAL in out and "offrl run --agent bc --task" in out

    def test_is_refused_in_one_line(self, results, capsys):
        row_id = self.row_id(results, agent="bc", seed=1)
        for code, words in (
            (USAGE, ("reproduce", "abc", "--results", "out")),
            (USAGE, ("reproduce", "f" * 16, "--results", "out")),
            (RESULTS, ("reproduce", row_id, "--results", "nowhere")),
            (DATA, ("reproduce", row_id, "--results", "out", "--data-dir", "empty")),
        ):
            assert offrl(*words) == code
            err = capsys.readouterr().err
            assert err.startswith("offrl: ") and err.count("\n") == 1

    def test_ctrl_c_leaves_nothing_behind(self, results, monkeypatch, capsys, tmp_path):
        monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", None)
        before = files(results)

        def interrupted(*_):
            assert list((tmp_path / "tmp").glob("offrl-reproduce-*"))
            raise KeyboardInterrupt

        monkeypatch.setattr(jobs_module, "prepare", interrupted)
        row_id = self.row_id(results, agent="bc", seed=1)
        assert offrl("reproduce", row_id, "--results", "out") == 130
        assert "stopped" in capsys.readouterr().err
        assert files(results) == before and not list((tmp_path / "tmp").iterdir())


def test_commands_of_suites(made, tmp_path):
    _, folder = made
    row = rows_of(folder, agent="two@quick")[0]
    origin = reproduction.trace(folder, row.row_id, print)
    assert origin.command == f"offrl benchmark tiny.toml --results {folder}"
    assert origin.planned is not None
    job = dataclasses.replace(
        origin.planned, suite="quick", updates_total=3000, eval_steps=(3000,)
    )
    row = dataclasses.replace(row, suite="quick")
    there = Path("results/quick")
    assert command_of(row, job, None, there) == "offrl benchmark quick --seeds 2"
    less = dataclasses.replace(job, updates_total=100, eval_steps=(100,))
    assert command_of(row, less, None, tmp_path).endswith(
        f"--updates 100 --results {tmp_path}"
    )
    cut = dataclasses.replace(job, split={**job.split, "max_parallel": 4})
    assert command_of(row, cut, None, there).endswith("--max-parallel 4")
