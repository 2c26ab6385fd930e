from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets_builders import as_lists, random_episodes

from offrl_jax.datasets import schema
from offrl_jax.datasets.importing import import_file
from offrl_jax.datasets.local import read_npz
from offrl_jax.datasets.schema import Episodes
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, UsageError

TASK = "local/mine-v0"


def _arrays(episodes: Episodes) -> dict[str, np.ndarray]:
    return {
        "observations": episodes.obs,
        "actions": episodes.action,
        "rewards": episodes.reward,
        "next_observations": episodes.next_obs,
        "terminals": episodes.terminated,
        "timeouts": episodes.truncated,
    }


def _file(folder: Path, arrays: dict[str, np.ndarray], name: str = "x.npz") -> Path:
    path = folder / name
    np.savez(path, **arrays)
    return path


def _only_cut(seed: int = 0) -> Episodes:
    """Episodes without terminal rows."""
    episodes = random_episodes(seed)
    ends = episodes.terminated | episodes.truncated
    return Episodes(
        episodes.obs,
        episodes.action,
        episodes.reward,
        episodes.next_obs,
        np.zeros_like(ends),
        ends,
    )


@pytest.mark.parametrize("done", ["terminated", "terminals", "done"])
@pytest.mark.parametrize("short", [True, False])
def test_every_name_of_a_field_is_read(tmp_path: Path, done: str, short: bool) -> None:
    episodes = random_episodes(0)
    arrays = _arrays(episodes)
    arrays[done] = arrays.pop("terminals")
    if short:
        for long, name in (
            ("observations", "obs"),
            ("actions", "action"),
            ("rewards", "reward"),
            ("next_observations", "next_obs"),
            ("timeouts", "truncated"),
        ):
            arrays[name] = arrays.pop(long)
    found, env_id, source = read_npz(_file(tmp_path, arrays))
    assert schema.dataset_hash(found) == schema.dataset_hash(episodes)
    assert env_id is None
    assert source["next_obs"] == "given"


def test_other_dtypes_and_columns_become_float32(tmp_path: Path) -> None:
    episodes = random_episodes(0)
    arrays = {
        k: v.astype(np.float64)[:, None] if v.ndim == 1 else v.astype(np.float64)
        for k, v in _arrays(episodes).items()
    }
    found, *_ = read_npz(_file(tmp_path, arrays))
    assert schema.dataset_hash(found) == schema.dataset_hash(episodes)


@pytest.mark.parametrize("seed", range(4))
def test_next_obs_is_derived_within_episodes(tmp_path: Path, seed: int) -> None:
    episodes = _only_cut(seed)
    arrays = _arrays(episodes)
    del arrays["next_observations"]
    found, _, source = read_npz(_file(tmp_path, arrays))
    schema.validate(found, "derived")
    wanted = [rows[:-1] for rows in as_lists(episodes) if len(rows) > 1]
    assert found.lengths.tolist() == [len(rows) for rows in wanted]
    flat = [row for rows in wanted for row in rows]
    np.testing.assert_array_equal(found.obs, episodes.obs[flat])
    np.testing.assert_array_equal(found.action, episodes.action[flat])
    np.testing.assert_array_equal(found.reward, episodes.reward[flat])
    np.testing.assert_array_equal(found.next_obs, episodes.next_obs[flat])
    assert not found.terminated.any()
    assert source["rows_dropped"] == len(episodes.ends)


def test_next_obs_of_a_terminal_row_cannot_be_derived(tmp_path: Path) -> None:
    arrays = _arrays(random_episodes(0))
    del arrays["next_observations"]
    row = int(random_episodes(0).ends[0])
    with pytest.raises(DataError, match=f"row {row} is terminal and there is no next"):
        read_npz(_file(tmp_path, arrays))


def test_an_open_end_cannot_be_derived(tmp_path: Path) -> None:
    arrays = _arrays(_only_cut())
    del arrays["next_observations"]
    arrays["timeouts"] = arrays["timeouts"].copy()
    arrays["timeouts"][-1] = False
    with pytest.raises(DataError, match="last row ends no episode"):
        read_npz(_file(tmp_path, arrays))
    arrays["timeouts"][:] = True
    with pytest.raises(DataError, match="every episode has one row"):
        read_npz(_file(tmp_path, arrays))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timeouts": None}, "has no field truncated or timeouts"),
        ({"terminals": None}, "has no field terminated or terminals or done"),
        ({"observations": None}, "has no field obs or observations"),
        ({"obs": np.zeros((3, 3))}, "fields obs and observations mean the same"),
        ({"terminals": np.full(3, 2)}, "row 0: 2 is neither 0 nor 1"),
        ({"terminals": np.zeros((2, 2))}, "must be"),
        ({"rewards": np.zeros(3)}, "unequal numbers of rows: obs"),
        ({"rewards": np.zeros((3, 2))}, "not rank 1"),
        ({"actions": np.array(["a", "b"])}, "must be real numbers"),
        ({"actions": np.zeros((3, 1), complex)}, "must be real numbers"),
        ({"env_id": np.array([1])}, "'env_id' must be one string"),
    ],
)
def test_wrong_fields_are_told(tmp_path: Path, change, message: str) -> None:
    arrays = _arrays(random_episodes(0)) | change
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(DataError, match=message) as caught:
        read_npz(_file(tmp_path, arrays))
    assert "\n" not in str(caught.value)


def test_what_is_no_archive_is_told(tmp_path: Path) -> None:
    path = _file(tmp_path, _arrays(random_episodes(0)))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(path.read_bytes()[:400])
    single = tmp_path / "single.npy"
    np.save(single, np.zeros(3))
    text = tmp_path / "text.npz"
    text.write_text("hello")
    pickled = _file(tmp_path, {"obs": np.array([{}])}, "pickled.npz")
    for one in (cut, single, text, pickled):
        with pytest.raises(DataError, match="cannot be read as a plain") as caught:
            read_npz(one)
        assert "\n" not in str(caught.value)


def test_a_number_beyond_float32_is_named(tmp_path: Path) -> None:
    arrays = _arrays(random_episodes(0))
    arrays["rewards"] = arrays["rewards"].astype(np.float64)
    arrays["rewards"][5] = 1e300
    with pytest.raises(DataError, match=r"x\.npz: field 'reward', row 5 .* inf"):
        import_file(_file(tmp_path, arrays), TASK, Store(tmp_path / "s"))


def test_import_holds_out_the_last_episodes(tmp_path: Path) -> None:
    episodes = random_episodes(0, count=40)
    store = Store(tmp_path / "s")
    message = import_file(_file(tmp_path, _arrays(episodes)), TASK, store)
    assert "train: 38 episodes" in message
    assert "val: 2 episodes" in message
    train, validation = schema.split_validation(episodes)
    assert validation is not None
    assert store.record(TASK).dataset_hash == schema.dataset_hash(train)
    assert store.record(TASK, "val").dataset_hash == schema.dataset_hash(validation)
    # Again: nothing changes; other data: refused, whole.
    import_file(tmp_path / "x.npz", TASK, store)
    other = _file(tmp_path, _arrays(random_episodes(5, count=40)), "y.npz")
    with pytest.raises(DataError, match="already in the store with other data"):
        import_file(other, TASK, store)
    assert store.record(TASK).dataset_hash == schema.dataset_hash(train)


def test_import_of_given_splits_keeps_them_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    for seed, split in enumerate(("train", "val")):
        path = _file(tmp_path, _arrays(random_episodes(seed)), f"{split}.npz")
        import_file(path, TASK, store, split)
        wanted = schema.dataset_hash(random_episodes(seed))
        assert store.record(TASK, split).dataset_hash == wanted


def test_env_id_is_checked_against_the_data(tmp_path: Path) -> None:
    env_id = np.array("neorl2/DMSD-v1")
    good = _arrays(random_episodes(0, obs_dim=6)) | {"env_id": env_id}
    store = Store(tmp_path / "s")
    import_file(_file(tmp_path, good), TASK, store)
    assert store.record(TASK).info["env_id"] == "neorl2/DMSD-v1"
    bad = _arrays(random_episodes(0, obs_dim=5)) | {"env_id": env_id}
    with pytest.raises(DataError, match=r"have 5 and 2 components, env_id .* has 6"):
        import_file(_file(tmp_path, bad), "local/bad-v0", store)
    unknown = good | {"env_id": np.array("neorl2/DMSD-v9")}
    with pytest.raises(UsageError, match="unknown environment"):
        import_file(_file(tmp_path, unknown), "local/bad-v0", store)
    assert not store.has("local/bad-v0")


@pytest.mark.parametrize("task", ["local/mine", "local/-v0", "local/a/b-v0", "local/"])
def test_malformed_ids_are_told(tmp_path: Path, task: str) -> None:
    path = _file(tmp_path, _arrays(random_episodes(0)))
    with pytest.raises(UsageError, match="malformed task id"):
        import_file(path, task, Store(tmp_path / "s"))


@pytest.mark.parametrize(
    ("task", "split", "message"),
    [
        ("classic/pendulum-mixed-v0", None, "cannot import into"),
        ("minari/x-v0", None, "Minari dataset's folder"),
        (TASK, "test", "unknown split 'test'"),
    ],
)
def test_other_requests_are_refused(
    tmp_path: Path, task: str, split: str | None, message: str
) -> None:
    path = _file(tmp_path, _arrays(random_episodes(0)))
    with pytest.raises(UsageError, match=message):
        import_file(path, task, Store(tmp_path / "s"), split)
