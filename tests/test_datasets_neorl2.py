from __future__ import annotations

import csv
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from datasets_builders import official_arrays, random_episodes

from offrl_jax.datasets import neorl2, schema
from offrl_jax.datasets.importing import import_file
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, UsageError
from offrl_jax.types import Spec

DMSD = "neorl2/DMSD-v1"
FUSION = "neorl2/Fusion-v1"


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes `DMSD` a small task whose two files are written here."""
    paths = {}
    for seed, split in enumerate(("train", "val")):
        paths[split] = tmp_path / f"any-{split}.npz"
        np.savez(paths[split], **official_arrays(random_episodes(seed)))
    entry = dataclasses.replace(
        neorl2.TASKS[DMSD],
        spec=Spec(3, 2, 9),
        md5={split: _md5(path) for split, path in paths.items()},
    )
    monkeypatch.setitem(neorl2.TASKS, DMSD, entry)
    return paths


def test_the_split_is_told_by_the_sum_whatever_the_name(official) -> None:
    for split, path in official.items():
        assert neorl2.identify(path, DMSD) == (split, _md5(path))
        assert neorl2.identify(path, DMSD, split)[0] == split


def test_fields_become_episodes(official) -> None:
    episodes, split, source = neorl2.read_official(official["train"], DMSD)
    wanted = random_episodes(0)
    assert split == "train"
    assert schema.dataset_hash(episodes) == schema.dataset_hash(wanted)
    assert source["md5"] == _md5(official["train"])
    assert (source["episodes_in_file"], source["episodes_kept"]) == (12, 12)


def test_trims_keep_the_first_episodes(official, monkeypatch) -> None:
    entry = dataclasses.replace(neorl2.TASKS[DMSD], trims={"train": 5, "val": 99})
    monkeypatch.setitem(neorl2.TASKS, DMSD, entry)
    episodes, _, source = neorl2.read_official(official["train"], DMSD)
    wanted = schema.take_episodes(random_episodes(0), 0, 5)
    assert schema.dataset_hash(episodes) == schema.dataset_hash(wanted)
    assert (source["episodes_in_file"], source["episodes_kept"]) == (12, 5)
    assert len(neorl2.read_official(official["val"], DMSD)[0].ends) == 12


def test_import_puts_both_splits_into_the_store(official, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    message = import_file(official["train"], DMSD, store)
    assert message.startswith(f"{DMSD} stored; train: 12 episodes")
    assert not store.has(DMSD, "val")
    import_file(official["val"], DMSD, store)
    found = store.load(DMSD, "val")
    assert schema.dataset_hash(found) == schema.dataset_hash(random_episodes(1))
    assert store.record(DMSD).source["file"] == "any-train.npz"
    assert [one.problem for one in store.check_all()] == [None, None]


def test_the_wrong_split_is_refused(official, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the official train split, not 'val'"):
        import_file(official["train"], DMSD, Store(tmp_path / "s"), "val")


def test_the_file_of_another_task_is_told(official, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"official DMSD-val\.npz.*--task neorl2/DMSD"):
        import_file(official["val"], FUSION, Store(tmp_path / "s"))


def test_another_file_names_both_sums(official, tmp_path: Path) -> None:
    path = tmp_path / "DMSD-train.npz"
    np.savez(path, **official_arrays(random_episodes(9)))
    with pytest.raises(DataError) as caught:
        import_file(path, DMSD, Store(tmp_path / "s"))
    message = str(caught.value)
    assert "is not the official file" in message
    assert _md5(path) in message
    for md5 in neorl2.TASKS[DMSD].md5.values():
        assert md5 in message
    assert "\n" not in message
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_file_is_told(official, tmp_path: Path, keep: float) -> None:
    content = official["train"].read_bytes()
    path = tmp_path / "cut.npz"
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match=r"damaged or cut short .* MD5 is"):
        import_file(path, DMSD, Store(tmp_path / "s"))


def test_pickles_are_never_opened(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "evil.npz"
    np.savez(path, **(official_arrays(random_episodes(0)) | {"obs": np.array([{}])}))
    entry = dataclasses.replace(neorl2.TASKS[DMSD], md5={"train": _md5(path)})
    monkeypatch.setitem(neorl2.TASKS, DMSD, entry)
    with pytest.raises(DataError, match=r"cannot be read .*allow_pickle"):
        neorl2.read_official(path, DMSD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("done"), "has no field 'done'"),
        (lambda a: a.update(obs=a["obs"][:, :2]), "DMSD-v1 has 3 and 2"),
    ],
)
def test_other_fields_are_told(tmp_path: Path, monkeypatch, change, message) -> None:
    arrays = official_arrays(random_episodes(0))
    change(arrays)
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    entry = dataclasses.replace(
        neorl2.TASKS[DMSD], spec=Spec(3, 2, 9), md5={"train": _md5(path)}
    )
    monkeypatch.setitem(neorl2.TASKS, DMSD, entry)
    with pytest.raises(DataError, match=message):
        neorl2.read_official(path, DMSD)


def test_absent_files_and_unknown_tasks_are_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        import_file(tmp_path / "none.npz", DMSD, store)
    path = tmp_path / "x.npz"
    path.write_bytes(b"x")
    with pytest.raises(UsageError, match="did you mean 'neorl2/DMSD-v1'"):
        import_file(path, "neorl2/DMSD-v2", store)


def test_the_table_equals_the_published_lists(shared_data: Path) -> None:
    with (shared_data / "official_files.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == "NeoRL2"]
    sums = {row["task"]: row["md5"] for row in rows if "Sales" not in row["task"]}
    ours = {
        neorl2.file_name(task, split).removesuffix(".npz"): md5
        for task, official in neorl2.TASKS.items()
        for split, md5 in official.md5.items()
    }
    assert ours == sums
    with (shared_data / "reference_scores.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == neorl2.SOURCE]
    for row in rows:
        if row["task"] != "Salespromotion":
            official = neorl2.TASKS[f"neorl2/{row['task']}-v1"]
            assert official.minimum == float(row["ref_min"])
            assert official.maximum == float(row["ref_max"])


# Episodes, transitions and mean return of the official files, as documented with them
# (RocketRecovery and Fusion: episodes after the official trim).
OFFICIAL = {
    "DMSD-train": (1000, 100_000, 494.4527),
    "DMSD-val": (200, 20_000, 481.2),
    "Simglucose-train": (280, 100_257, 353.4519),
    "Simglucose-val": (62, 20_018, 316.2),
    "SafetyHalfCheetah-val": (2, 2_000, 1656.5),
    "RandomFrictionHopper-val": (218, 20_047, 114.2),
    "RocketRecovery-val": (25, None, None),
    "Fusion-val": (5, 500, None),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_are_read(shared_data: Path, tmp_path: Path, name: str) -> None:
    task = f"neorl2/{name.rsplit('-', 1)[0]}-v1"
    split = name.rsplit("-", 1)[1]
    store = Store(tmp_path)
    import_file(shared_data / "neorl2" / f"{name}.npz", task, store)
    record = store.record(task, split)
    episodes, transitions, mean = OFFICIAL[name]
    assert record.episodes == episodes
    assert transitions in (None, record.transitions)
    assert mean is None or record.return_mean == pytest.approx(mean, abs=0.06)
    assert record.longest_episode <= neorl2.TASKS[task].spec.horizon
    if name == "Simglucose-train":
        assert record.terminated_episodes == 111
    assert store.check(task, split).problem is None
