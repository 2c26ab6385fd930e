from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from datasets_builders import official_arrays, random_episodes

from offrl_jax import catalogue, envs
from offrl_jax.datasets import classic, getting, minari_io, schema
from offrl_jax.datasets.importing import import_file
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, UsageError
from offrl_jax.types import Spec

PENDULUM = "classic/pendulum-mixed-v0"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with a generated, an own and a Minari dataset."""
    store = Store(tmp_path_factory.mktemp("store"))
    told: list[str] = []
    catalogue.load_task(PENDULUM, store, told.append)
    assert told == [f"generating {PENDULUM}"]
    path = store.path / "own.npz"
    np.savez(path, **official_arrays(random_episodes(0, count=40)))
    import_file(path, "local/own-v0", store)
    minari_io.write(
        store,
        "group/deep/set-v1",
        random_episodes(1, count=40),
        description="test",
        algorithm="none",
        reference=(-2.0, 3.0),
    )
    return store


def test_an_empty_store_knows_classic_neorl2_and_ogbench(tmp_path: Path) -> None:
    tasks = catalogue.known_tasks(Store(tmp_path))
    assert len([t for t in tasks if t.family == "classic"]) == 16
    assert len([t for t in tasks if t.family == "neorl2"]) == 7
    assert len([t for t in tasks if t.family == "ogbench"]) == 7 * 5
    assert len([t for t in tasks if t.family == "online"]) == 10
    assert len(tasks) == 68
    assert len({t.id for t in tasks}) == 68


def test_specs_agree_with_the_environments(tmp_path: Path) -> None:
    with_env = [t for t in catalogue.known_tasks(Store(tmp_path)) if t.env_id]
    assert {t.env_id for t in with_env if t.family != "ogbench"} == {
        "classic/pendulum-v0",
        "classic/point_maze-v0",
        "classic/gates-v0",
        "neorl2/DMSD-v1",
        "neorl2/SafetyHalfCheetah-v1",
        "control/Acrobot-v1",
        "control/CartPole-v1",
        "control/MountainCarContinuous-v0",
        "mujoco/HalfCheetah-v5",
        "mujoco/Hopper-v5",
        "mujoco/Humanoid-v5",
        "mujoco/Pusher-v5",
        "mujoco/Swimmer-v5",
        "mujoco/Walker2d-v5",
    }
    for task in with_env:
        assert task.env_id is not None
        assert envs.spec_of(task.env_id) == task.spec


def test_every_official_task_has_references_with_a_source(tmp_path: Path) -> None:
    raw = [t for t in catalogue.known_tasks(Store(tmp_path)) if t.reference is None]
    assert all(str(task.env_id).startswith("mujoco/") for task in raw)
    for task in catalogue.known_tasks(Store(tmp_path)):
        if task in raw:
            continue
        assert task.reference is not None
        assert task.reference.minimum < task.reference.maximum
        assert task.reference.source
        assert task.description


def test_online_tasks_need_no_data(tmp_path: Path) -> None:
    store = Store(tmp_path)
    task = catalogue.load_task("online/CartPole-v1", store)
    assert len(task.train) == 0 and task.validation is None
    assert task.dataset_hash is None and task.recipe_hash is None
    assert task.spec == Spec(4, 2, 500, discrete=True)
    assert catalogue.is_present("online/CartPole-v1", store)
    assert "needs no data" in getting.how_to_get("online/CartPole-v1")
    assert not list(tmp_path.iterdir()), "nothing is stored"
    with pytest.raises(UsageError, match=r"'online/CartPole-v2'.*online/CartPole-v1"):
        catalogue.get_task("online/CartPole-v2", store)


def test_scores_by_hand() -> None:
    reference = catalogue.Reference(-50.0, 150.0, "hand")
    returns = np.array([-50.0, 150.0, 50.0, 250.0, -150.0], np.float32)
    found = catalogue.normalised_score(reference, returns)
    assert found.tolist() == [0.0, 100.0, 50.0, 150.0, -50.0]
    assert found.dtype == np.float64


def test_published_score_of_the_neorl2_data(tmp_path: Path) -> None:
    """NeoRL-2 gives 494.5 as 56.64 for DMSD."""
    task = catalogue.get_task("neorl2/DMSD-v1", Store(tmp_path))
    assert task.reference is not None
    found = catalogue.normalised_score(task.reference, np.array([494.4527]))
    np.testing.assert_allclose(found, [56.64], atol=0.01)


def test_generated_tasks_are_loaded_mapped_and_split(filled: Store) -> None:
    loaded = catalogue.load_task(PENDULUM, filled)
    assert isinstance(loaded.train.obs, np.memmap)
    assert loaded.validation is not None
    assert (len(loaded.train.ends), len(loaded.validation.ends)) == (285, 15)
    assert loaded.dataset_hash == schema.dataset_hash(loaded.train)
    assert loaded.recipe_hash == classic.recipe_hash(classic.recipe(PENDULUM))
    whole = classic.generate(PENDULUM).episodes
    for name in schema.FIELDS:
        joined = [getattr(loaded.train, name), getattr(loaded.validation, name)]
        np.testing.assert_array_equal(np.concatenate(joined), getattr(whole, name))


def test_a_second_load_generates_nothing(filled: Store, monkeypatch) -> None:
    monkeypatch.setattr(classic, "generate", None)
    told: list[str] = []
    catalogue.load_task(PENDULUM, filled, told.append)
    assert told == []


def test_the_generated_dataset_is_a_genuine_minari_one(filled: Store) -> None:
    episodes, info = minari_io.read(filled, f"offrl/{PENDULUM}")
    whole = classic.generate(PENDULUM).episodes
    assert schema.dataset_hash(episodes) == schema.dataset_hash(whole)
    task = catalogue.get_task(PENDULUM, filled)
    assert task.reference is not None
    assert info.reference == (task.reference.minimum, task.reference.maximum)


def test_another_recipe_is_not_mixed_up(filled: Store, monkeypatch) -> None:
    monkeypatch.setattr(classic, "VERSION", 999)
    with pytest.raises(DataError, match="generated by another recipe"):
        catalogue.load_task(PENDULUM, filled)


def test_own_data_are_a_task(filled: Store) -> None:
    loaded = catalogue.load_task("local/own-v0", filled)
    episodes = random_episodes(0, count=40)
    assert loaded.task.family == "local"
    assert loaded.task.env_id is None
    assert loaded.task.reference is None
    # Without an environment the horizon is the longest episode.
    assert (loaded.spec.obs_dim, loaded.spec.action_dim) == (3, 2)
    train, validation = schema.split_validation(episodes)
    assert loaded.spec.horizon == train.lengths.max()
    assert validation is not None
    assert loaded.validation is not None
    assert loaded.dataset_hash == schema.dataset_hash(train)
    assert loaded.recipe_hash is None
    assert schema.dataset_hash(loaded.validation) == schema.dataset_hash(validation)


def test_a_minari_dataset_is_a_task_and_cached(filled: Store, monkeypatch) -> None:
    task = "minari/group/deep/set-v1"
    told: list[str] = []
    loaded = catalogue.load_task(task, filled, told.append)
    assert told == ["reading the Minari dataset group/deep/set-v1"]
    train, _ = schema.split_validation(random_episodes(1, count=40))
    assert loaded.dataset_hash == schema.dataset_hash(train)
    assert loaded.task.reference is not None
    assert loaded.task.reference.maximum == 3.0
    real = minari_io.read
    monkeypatch.setattr(minari_io, "read", None)
    assert isinstance(catalogue.load_task(task, filled).train.obs, np.memmap)
    monkeypatch.setattr(minari_io, "read", real)
    # Changed files are read again.
    folder = minari_io.data_folder(filled, "group/deep/set-v1")
    content = (folder / "main_data.hdf5").read_bytes()
    (folder / "main_data.hdf5").write_bytes(content)
    catalogue.load_task(task, filled, told.append)
    assert len(told) == 2
    catalogue.load_task(task, filled, told.append)
    assert len(told) == 2


def test_an_interrupted_conversion_is_done_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for dataset, seed in (("group/a-v0", 0), ("group/b-v0", 1)):
        minari_io.write(
            store,
            dataset,
            random_episodes(seed, count=40),
            description="test",
            algorithm="none",
            reference=(0.0, 1.0),
        )
    # What is left if the process ends between the two splits: an old `val`.
    store.write("minari/group/a-v0", "val", random_episodes(7), source={})
    loaded = catalogue.load_task("minari/group/a-v0", store)
    _, validation = schema.split_validation(random_episodes(0, count=40))
    assert validation is not None
    assert loaded.validation is not None
    assert schema.dataset_hash(loaded.validation) == schema.dataset_hash(validation)
    assert not store.has("minari/group/b-v0")


def test_what_lies_in_the_store_is_listed(filled: Store) -> None:
    ids = [task.id for task in catalogue.known_tasks(filled)]
    assert ids[68:] == ["minari/group/deep/set-v1", "local/own-v0"]


def test_everything_stored_passes_the_check(filled: Store) -> None:
    catalogue.load_task("minari/group/deep/set-v1", filled)
    results = filled.check_all()
    assert len(results) == 6
    assert [one.problem for one in results] == [None] * 6


def test_status_counts_without_reading(filled: Store, tmp_path: Path) -> None:
    status = catalogue.status(PENDULUM, filled)
    assert status.present
    assert status.record is not None
    assert status.record.episodes == 285
    empty = catalogue.status(PENDULUM, Store(tmp_path))
    assert (empty.present, empty.record) == (False, None)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (
            "neorl2/DMSD-v1",
            DataError,
            r"needs DMSD-train\.npz: .* offrl data import DMSD-train\.npz --task "
            r"neorl2/DMSD-v1",
        ),
        ("minari/D4RL/pen/human-v2", DataError, r"needs the Minari dataset 'D4RL/pen"),
        ("local/none-v0", DataError, r"offrl data import FILE\.npz --task local/none"),
        ("classic/pendulum-mixd-v0", UsageError, "did you mean 'classic/pendulum-mix"),
        ("neorl2/DMSD-v2", UsageError, "did you mean 'neorl2/DMSD-v1'"),
        ("local/../x", UsageError, "unknown task"),
        ("nonsense", UsageError, "unknown task 'nonsense'"),
    ],
)
def test_absent_data_and_unknown_tasks_are_told(
    tmp_path: Path, task: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        catalogue.load_task(task, Store(tmp_path))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_validation_of_an_official_task_is_its_own_file(
    shared_data: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    import_file(shared_data / "neorl2" / "DMSD-val.npz", "neorl2/DMSD-v1", store)
    with pytest.raises(DataError, match="needs DMSD-train"):
        catalogue.load_task("neorl2/DMSD-v1", store)
    import_file(shared_data / "neorl2" / "DMSD-train.npz", "neorl2/DMSD-v1", store)
    loaded = catalogue.load_task("neorl2/DMSD-v1", store)
    assert loaded.validation is not None
    assert (len(loaded.train), len(loaded.validation)) == (100_000, 20_000)
    assert loaded.spec == envs.spec_of("neorl2/DMSD-v1")


def test_stored_data_of_other_dimensions_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("neorl2/DMSD-v1", "train", random_episodes(0), source={"kind": "x"})
    with pytest.raises(DataError, match="stored data have 3 and 2 components"):
        catalogue.load_task("neorl2/DMSD-v1", store)


def test_entries_are_frozen(tmp_path: Path) -> None:
    task = catalogue.get_task(PENDULUM, Store(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.id = "other"  # pyright: ignore[reportAttributeAccessIssue]
