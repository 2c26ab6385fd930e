"""Importing and checking data by `offrl data`: what is refused, and how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_runner import DATA, RUN, SMALL, TINY, USAGE, files, offrl, write_npz

from offrl_jax import envs
from offrl_jax.catalogue import known_tasks, listed_as
from offrl_jax.datasets import local, ogbench, reference
from offrl_jax.datasets.store import Store

pytest_plugins = ["cli_fixtures"]


class TestImport:
    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"reward": np.full(30, np.nan)}, ("reward", "nan")),
            ({"obs": np.full((30, 3), np.inf)}, ("obs",)),
            ({"action": np.full((30, 1), 1.5)}, ("action", "1.5")),
            ({"obs": np.zeros((30, 4)), "next_obs": np.zeros((30, 4))}, ("4", "3")),
            ({"action": np.zeros((30, 2))}, ("2", "1", "classic/pendulum-v0")),
            ({"next_obs": np.zeros((30, 4))}, ("next_obs", "4")),
            ({"reward": np.zeros(29)}, ("unequal", "reward 29")),
            ({"reward": None}, ("no field reward or rewards",)),
            ({"truncated": None}, ("no field truncated or timeouts",)),
            ({"truncated": np.zeros(30)}, ("episode",)),
            ({"terminated": np.full(30, 2)}, ("terminated", "neither 0 nor 1")),
            ({"obs": np.array([["x"] * 3] * 30)}, ("obs", "real numbers")),
        ],
    )
    def test_of_data_that_break_the_schema(self, changes, parts, home, refused):
        path = write_npz(home / "bad.npz", **changes)
        refused(DATA, ("bad.npz", *parts), "data", "import", str(path), "--task", TINY)

    def test_of_an_unknown_environment(self, home, refused):
        path = write_npz(home / "bad.npz", env_id=np.array("classic/pendulun-v0"))
        said = "did you mean 'classic/pendulum-v0'?"
        refused(USAGE, said, "data", "import", str(path), "--task", TINY)

    @pytest.mark.parametrize("kept", [0, 10, 1000])
    def test_of_a_truncated_file(self, kept, home, refused):
        path = write_npz(home / "cut.npz")
        path.write_bytes(path.read_bytes()[:kept])
        refused(DATA, "cut.npz", "data", "import", str(path), "--task", TINY)

    def test_of_a_file_with_another_checksum(self, home, refused):
        path = write_npz(home / "DMSD-train.npz")
        parts = ("DMSD-train.npz", "88dfa39aa18904e809056b51c2e6319b")
        refused(DATA, parts, "data", "import", str(path), "--task", "neorl2/DMSD-v1")

    @pytest.mark.parametrize(
        ("task", "code", "said"),
        [
            ("neorl2/DSMD-v1", USAGE, "did you mean 'neorl2/DMSD-v1'?"),
            ("local/tiny", USAGE, "local/<name>-v<number>"),
            ("local/../tiny-v0", USAGE, "malformed"),
            ("classic/dmsd-mixed-v0", USAGE, "cannot import into"),
            ("minari/x/y-v0", USAGE, "minari"),
        ],
    )
    def test_under_a_wrong_id(self, task, code, said, home, refused):
        path = write_npz(home / "tiny.npz")
        refused(code, said, "data", "import", str(path), "--task", task)

    def test_of_no_file(self, home, refused):
        refused(DATA, "no such file", "data", "import", "none.npz", "--task", TINY)

    def test_never_replaces_other_data(self, tiny, refused):
        path = write_npz(tiny / "other.npz", reward=np.ones(30))
        said = "already in the store with other data"
        refused(DATA, said, "data", "import", str(path), "--task", TINY)

    def test_twice_is_no_error(self, tiny, capsys):
        before = files(tiny)
        assert offrl("data", "import", str(tiny / "tiny.npz"), "--task", TINY) == 0
        assert "train: 5 episodes, 25 transitions" in capsys.readouterr().out
        assert files(tiny) == before

    def test_into_a_store_that_is_a_file(self, home, refused):
        (home / "data").write_text("mine")
        path = write_npz(home / "tiny.npz")
        said = "choose another folder with --data-dir"
        refused(DATA, said, "data", "import", str(path), "--task", TINY)


class TestDamagedStore:
    def array(self, home: Path) -> Path:
        return home / "data" / "tasks" / TINY / "train" / "reward.npy"

    def test_a_flipped_byte_is_found_by_check(self, tiny, capsys):
        assert offrl("data", "check") == 0
        assert "2 datasets checked, 0 damaged" in capsys.readouterr().out
        data = bytearray(self.array(tiny).read_bytes())
        data[-1] ^= 1
        self.array(tiny).write_bytes(bytes(data))
        assert offrl("data", "check") == DATA
        out = capsys.readouterr().out
        assert "SHA-256" in out
        assert "1 damaged" in out

    def test_a_cut_array_is_told_by_run(self, tiny, refused):
        data = self.array(tiny).read_bytes()
        self.array(tiny).write_bytes(data[:-8])
        refused(DATA, ("reward.npy", "import"), *RUN, *SMALL)

    def test_a_cut_record_is_told_by_every_list(self, tiny, refused):
        record = self.array(tiny).with_name("record.json")
        record.write_text(record.read_text()[:50])
        for command in ("tasks", "data list"):
            refused(DATA, ("record.json", "damaged", "remove"), *command.split())

    def test_doctor_lives_with_it(self, tiny, capsys):
        record = self.array(tiny).with_name("record.json")
        record.write_text("")
        assert offrl("doctor") == 0
        assert "missing: " in capsys.readouterr().out


class TestDocumentation:
    """`docs/data.md` is read by hand while data are prepared: it must not drift."""

    @pytest.fixture
    def lines(self) -> list[str]:
        path = Path(__file__).parent.parent / "docs" / "data.md"
        return path.read_text(encoding="utf-8").splitlines()

    def cells(self, lines: list[str], first: str) -> list[str]:
        row = next(line for line in lines if line.startswith(f"| {first} |"))
        return [cell.strip() for cell in row.strip("|").split("|")][1:]

    def test_names_every_field(self, lines):
        for names in local.NAMES.values():
            row = next(line for line in lines if line.startswith(f"| `{names[0]}`"))
            assert all(f"`{name}`" in row for name in names)

    def test_names_every_environment(self, lines):
        text = "\n".join(lines)
        assert all(f"`{name}`" in text for name in envs.known())

    @pytest.mark.parametrize("environment", sorted(reference.CLASSIC))
    def test_gives_the_references_in_use(self, environment, lines):
        cells = self.cells(lines, f"`{environment}`")
        numbers = tuple(float(cell.split()[0]) for cell in cells)
        assert numbers == reference.CLASSIC[environment]

    def test_lists_every_task(self, lines, tmp_path):
        for task in known_tasks(Store(tmp_path)):
            cells = self.cells(lines, f"`{listed_as(task)}`")
            if task.family == "neorl2":
                spec = task.spec
                shape = [spec.obs_dim, spec.action_dim, spec.horizon]
                assert [int(cell) for cell in cells[:3]] == shape
                assert cells[-1] == ("no" if task.env_id is None else "yes")
            if task.family == "ogbench":
                one = ogbench.DATASETS[ogbench.dataset_of(task.id)]
                shape = [one.spec.obs_dim, one.spec.action_dim, one.spec.horizon]
                assert [*map(int, cells)] == [*shape, one.trajectories, one.rows]
