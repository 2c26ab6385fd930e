from __future__ import annotations

import errno
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
from datasets_builders import random_episodes

from offrl_jax.datasets import schema, store
from offrl_jax.datasets.schema import Episodes
from offrl_jax.datasets.store import Store, default_data_dir
from offrl_jax.errors import DataError

TASK = "local/a/b-v0"


def _write(where: Store, seed: int = 0, split: str = "train", task: str = TASK):
    return where.write(task, split, random_episodes(seed), source={"kind": "test"})


def _everything(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_what_is_written_is_read_mapped_and_equal(tmp_path: Path) -> None:
    where = Store(tmp_path / "data")
    episodes = random_episodes(0)
    record = _write(where)
    found = where.load(TASK)
    for name in schema.FIELDS:
        array = getattr(found, name)
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, getattr(episodes, name))
    assert record == where.record(TASK)
    assert record.dataset_hash == schema.dataset_hash(episodes)
    assert (record.transitions, record.episodes) == (len(episodes), 12)
    assert record.terminated_episodes == 8  # terminal, cut, both, in turn
    returns = schema.episode_returns(episodes)
    assert record.return_mean == pytest.approx(returns.mean())
    assert (record.return_min, record.return_max) == (returns.min(), returns.max())


def test_records_list_everything_sorted(tmp_path: Path) -> None:
    where = Store(tmp_path)
    assert where.records() == []
    for task, split in (("local/z-v0", "train"), (TASK, "val"), (TASK, "train")):
        _write(where, split=split, task=task)
    (tmp_path / "tasks/local/.partial-x/train").mkdir(parents=True)
    (tmp_path / "tasks/local/.partial-x/train/record.json").write_text("{}")
    (tmp_path / "tasks/local/b-v0/other").mkdir(parents=True)
    (tmp_path / "tasks/local/b-v0/other/record.json").write_text("{}")
    found = [(record.task_id, record.split) for record in where.records()]
    assert found == [(TASK, "train"), (TASK, "val"), ("local/z-v0", "train")]
    assert len(where.check_all()) == 3


def test_the_same_data_twice_are_a_no_op_others_are_refused(tmp_path: Path) -> None:
    where = Store(tmp_path)
    first = _write(where)
    before = (where.folder(TASK, "train") / "obs.npy").stat().st_mtime_ns
    assert _write(where) == first
    assert (where.folder(TASK, "train") / "obs.npy").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="already in the store with other data"):
        _write(where, seed=1)
    assert where.record(TASK) == first


def test_invalid_episodes_are_not_stored(tmp_path: Path) -> None:
    where = Store(tmp_path)
    bad = random_episodes(0)
    bad.reward[3] = np.nan
    with pytest.raises(DataError, match="row 3"):
        where.write(TASK, "train", bad, source={})
    assert _everything(tmp_path) == []


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = Store(tmp_path)
    real = store._write_array

    def fails_at_next_obs(path: Path, array: np.ndarray) -> None:
        if path.name == "next_obs.npy":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, array)

    monkeypatch.setattr(store, "_write_array", fails_at_next_obs)
    with pytest.raises(DataError, match=r"no space left under .* --data-dir") as caught:
        _write(where)
    assert "\n" not in str(caught.value)
    assert not where.has(TASK)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    monkeypatch.undo()
    _write(where)
    assert where.check(TASK, "train").problem is None


def _write_below_a_limit(folder: Path, queue) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    try:
        _write(Store(folder))
    except DataError as error:
        queue.put(str(error))


def test_a_real_limit_of_the_system_leaves_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_write_below_a_limit, args=(tmp_path, queue))
    process.start()
    message = queue.get(timeout=60)
    process.join(timeout=60)
    assert "no space left" in message
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(DataError, match=r"cannot write under .* --data-dir"):
        _write(Store(blocked))


def test_who_comes_second_finds_the_first(tmp_path: Path) -> None:
    where = Store(tmp_path)
    final = where.folder(TASK, "train")
    with where.new_folder(final, 0) as temporary:
        (temporary / "mine").write_text("second")
        other = _write(where)  # another process, meanwhile
    assert where.record(TASK) == other
    assert not (final / "mine").exists()
    assert where.check(TASK, "train").problem is None


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", schema.FIELDS)
def test_one_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    where = Store(tmp_path)
    _write(where)
    assert where.check(TASK, "train").problem is None
    _flip(where.folder(TASK, "train") / f"{name}.npy", -1)
    problem = where.check(TASK, "train").problem
    assert problem is not None
    assert f"{name}.npy: SHA-256 is" in problem


def test_an_absent_or_cut_array_is_told(tmp_path: Path) -> None:
    where = Store(tmp_path)
    _write(where)
    path = where.folder(TASK, "train") / "action.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"action\.npy: damaged"):
        where.load(TASK)
    path.unlink()
    assert "action.npy: absent" in str(where.check(TASK, "train").problem)
    with pytest.raises(DataError, match=r"action\.npy"):
        where.load(TASK)


def test_an_array_of_other_length_is_told(tmp_path: Path) -> None:
    where = Store(tmp_path)
    _write(where)
    path = where.folder(TASK, "train") / "reward.npy"
    np.save(path, np.zeros(3, np.float32))
    with pytest.raises(DataError, match="3 rows, recorded were"):
        where.load(TASK)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}'])
def test_a_damaged_record_is_told(tmp_path: Path, text: str) -> None:
    where = Store(tmp_path)
    _write(where)
    (where.folder(TASK, "train") / "record.json").write_text(text)
    with pytest.raises(DataError, match=r"record\.json: damaged"):
        where.record(TASK)
    assert "damaged" in str(where.check(TASK, "train").problem)


def test_a_record_of_another_version_is_told(tmp_path: Path) -> None:
    where = Store(tmp_path)
    _write(where)
    path = where.folder(TASK, "train") / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(DataError, match="record version 99"):
        where.record(TASK)


def test_remove_and_absence(tmp_path: Path) -> None:
    where = Store(tmp_path)
    _write(where)
    where.remove(TASK, "train")
    where.remove(TASK, "train")
    assert not where.has(TASK)
    with pytest.raises(DataError, match="not in the store"):
        where.load(TASK)


@pytest.mark.parametrize("task", ["../x", "a//b", "/etc", "a/.hidden", ""])
def test_ids_cannot_leave_the_folder(tmp_path: Path, task: str) -> None:
    with pytest.raises(ValueError, match="malformed"):
        Store(tmp_path).folder(task, "train")


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OFFRL_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_data_dir() == tmp_path / ".cache/offrl_jax/data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_data_dir() == tmp_path / "xdg/offrl_jax/data"
    monkeypatch.setenv("OFFRL_DATA", "~/own")
    assert default_data_dir() == tmp_path / "own"
    assert default_data_dir(Path("~/cli")) == tmp_path / "cli"


def test_a_million_transitions_are_mapped_at_once(tmp_path: Path) -> None:
    count = 1_000_000
    truncated = np.zeros(count, bool)
    truncated[999::1000] = True
    zeros = np.zeros((count, 11), np.float32)
    episodes = Episodes(
        obs=zeros,
        action=np.zeros((count, 3), np.float32),
        reward=np.zeros(count, np.float32),
        next_obs=zeros,
        terminated=np.zeros(count, bool),
        truncated=truncated,
    )
    where = Store(tmp_path)
    where.write(TASK, "train", episodes, source={})
    start = time.perf_counter()
    found = where.load(TASK)
    assert time.perf_counter() - start < 2.0
    assert found.obs.shape == (count, 11)
