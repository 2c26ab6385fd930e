from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from datasets_builders import random_episodes
from gymnasium import spaces

from offrl_jax.datasets import minari_io, schema
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError

FORMATS = ("hdf5", "arrow")


def _write(store: Store, dataset_id: str, data_format: str = "hdf5") -> None:
    minari_io.write(
        store,
        dataset_id,
        random_episodes(0),
        description="test",
        algorithm="none",
        reference=(-1.0, 2.0),
        data_format=data_format,
    )


@pytest.mark.parametrize("data_format", FORMATS)
def test_own_datasets_survive_the_round_trip(tmp_path: Path, data_format: str) -> None:
    store = Store(tmp_path)
    before = os.environ.get("MINARI_DATASETS_PATH")
    _write(store, "offrl/some/thing-v0", data_format)
    assert os.environ.get("MINARI_DATASETS_PATH") == before
    episodes, info = minari_io.read(store, "offrl/some/thing-v0")
    wanted = random_episodes(0)
    schema.validate(episodes, "read")
    assert schema.dataset_hash(episodes) == schema.dataset_hash(wanted)
    assert info.reference == (-1.0, 2.0)
    assert info.env_id is None
    assert (info.episodes, info.transitions) == (12, len(wanted))
    assert info.spec.horizon == wanted.lengths.max()
    # Ours are not offered as the user's.
    assert minari_io.discover(store) == []


@pytest.mark.parametrize("data_format", FORMATS)
def test_minari_itself_loads_what_we_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_format: str
) -> None:
    import minari

    store = Store(tmp_path)
    _write(store, "offrl/some/thing-v0", data_format)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(store.minari_root))
    assert list(minari.list_local_datasets()) == ["offrl/some/thing-v0"]
    dataset = minari.load_dataset("offrl/some/thing-v0")
    wanted = random_episodes(0)
    assert dataset.total_steps == len(wanted)
    first = dataset[3]
    rows = slice(int(wanted.starts[3]), int(wanted.ends[3]) + 1)
    np.testing.assert_array_equal(first.rewards, wanted.reward[rows])
    np.testing.assert_array_equal(first.observations[1:], wanted.next_obs[rows])


def test_a_written_dataset_leaves_only_itself(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _write(store, "offrl/some/thing-v0")
    _write(store, "offrl/some/thing-v0")
    folder = store.minari_root / "offrl/some"
    assert [p.name for p in folder.iterdir()] == ["thing-v0"]
    assert [p.name for p in (folder / "thing-v0").iterdir()] == ["data"]


def _collect(
    store: Store,
    dataset_id: str,
    env: gymnasium.Env | str,
    data_format: str = "hdf5",
    episodes: int = 3,
    **spaces_of: spaces.Space,
) -> None:
    """A genuine dataset made by Minari's own collector."""
    import minari

    made = gymnasium.make(env) if isinstance(env, str) else env
    store.minari_root.mkdir(parents=True, exist_ok=True)
    with minari_io._datasets_path(store.minari_root), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        collector = minari.DataCollector(made, data_format=data_format, **spaces_of)
        temporary = collector._tmp_dir
        for seed in range(episodes):
            collector.action_space.seed(seed)
            collector.reset(seed=seed)
            ended = False
            while not ended:
                action = collector.action_space.sample()
                *_, terminated, truncated, _ = collector.step(action)
                ended = terminated or truncated
        collector.create_dataset(dataset_id=dataset_id)
    # The collector leaves its temporary folders to the garbage collector, which warns.
    temporary.cleanup()
    collector._tmp_dir.cleanup()
    made.close()


@pytest.mark.parametrize("data_format", FORMATS)
def test_a_collected_gymnasium_dataset_is_read(
    tmp_path: Path, data_format: str
) -> None:
    store = Store(tmp_path)
    _collect(store, "group/pendulum/random-v1", "Pendulum-v1", data_format)
    assert minari_io.discover(store) == ["group/pendulum/random-v1"]
    episodes, info = minari_io.read(store, "group/pendulum/random-v1")
    schema.validate(episodes, "read")
    assert episodes.lengths.tolist() == [200] * 3
    assert info.spec == minari_io.Spec(3, 1, 200)
    assert info.env_id == "gymnasium/Pendulum-v1"
    assert info.reference is None
    # The same steps in gymnasium, with torques in [-2, 2].
    env = gymnasium.make("Pendulum-v1")
    space = env.action_space
    for number in range(3):
        space.seed(number)
        obs, _ = env.reset(seed=number)
        for row in range(episodes.starts[number], episodes.ends[number] + 1):
            torque = space.sample()
            np.testing.assert_array_equal(episodes.obs[row], obs)
            np.testing.assert_allclose(2 * episodes.action[row], torque, atol=1e-6)
            obs, reward, *_ = env.step(torque)
            np.testing.assert_array_equal(episodes.next_obs[row], obs)
            assert episodes.reward[row] == pytest.approx(float(reward), abs=1e-6)
    env.close()


class _Goal(gymnasium.Env):
    """Dict observations as of the goal-conditioned environments."""

    observation_space = spaces.Dict(
        {
            "achieved_goal": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "desired_goal": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "observation": spaces.Box(-np.inf, np.inf, (3,), np.float64),
        }
    )
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    metadata = {"render_modes": []}  # noqa: RUF012

    def _obs(self):
        return {
            "achieved_goal": np.full(2, -1.0),
            "desired_goal": np.array([7.0, 8.0]),
            "observation": np.array([self.t, 0.5, 1.5]),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0.0
        return self._obs(), {}

    def step(self, action):
        self.t += 1.0
        return self._obs(), 0.25, self.t == 4, False, {}


class _Pixels(_Goal):
    observation_space = spaces.Dict({"pixels": spaces.Box(0, 1, (4,), np.float64)})

    def _obs(self):
        return {"pixels": np.full(4, self.t / 10)}


class _Discrete(_Goal):
    observation_space = spaces.Box(0, 9, (1,), np.float64)
    action_space = spaces.Discrete(2)

    def _obs(self):
        return np.array([self.t])


@pytest.mark.parametrize("data_format", FORMATS)
def test_goals_follow_the_observation(tmp_path: Path, data_format: str) -> None:
    store = Store(tmp_path)
    env = _Goal()
    own = {
        "observation_space": env.observation_space,
        "action_space": env.action_space,
    }
    _collect(store, "goal/reach-v0", env, data_format, **own)
    episodes, info = minari_io.read(store, "goal/reach-v0")
    schema.validate(episodes, "read")
    assert info.spec == minari_io.Spec(5, 1, 4)
    assert info.env_id is None
    assert episodes.obs[:2].tolist() == [[0, 0.5, 1.5, 7, 8], [1, 0.5, 1.5, 7, 8]]
    assert episodes.next_obs[3].tolist() == [4, 0.5, 1.5, 7, 8]
    assert episodes.terminated.tolist() == [False, False, False, True] * 3


@pytest.mark.parametrize(
    ("env", "message"),
    [(_Pixels, "observations of Dict"), (_Discrete, "cannot be scaled to")],
)
def test_other_spaces_are_refused(tmp_path: Path, env, message: str) -> None:
    store = Store(tmp_path)
    _collect(store, "odd/thing-v0", env())
    with pytest.raises(DataError, match=message):
        minari_io.read(store, "odd/thing-v0")


def test_an_episode_without_flags_was_cut(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _write(store, "group/thing-v0")
    import h5py

    with h5py.File(_main(store, "group/thing-v0"), "r+") as file:
        file["episode_1"]["truncations"][-1] = False
        assert not file["episode_1"]["terminations"][-1]
    episodes, _ = minari_io.read(store, "group/thing-v0")
    assert schema.dataset_hash(episodes) == schema.dataset_hash(random_episodes(0))


def test_a_flag_inside_an_episode_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _write(store, "group/thing-v0")
    import h5py

    number = int(np.argmax(random_episodes(0).lengths))
    with h5py.File(_main(store, "group/thing-v0"), "r+") as file:
        file[f"episode_{number}"]["terminations"][0] = True
    with pytest.raises(DataError, match=f"episode {number} has an end flag at step 0"):
        minari_io.read(store, "group/thing-v0")


def _main(store: Store, dataset_id: str) -> Path:
    return minari_io.data_folder(store, dataset_id) / "main_data.hdf5"


def test_absent_and_damaged_datasets_are_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(DataError, match="no Minari dataset at"):
        minari_io.read(store, "group/thing-v0")
    _write(store, "group/thing-v0")
    path = _main(store, "group/thing-v0")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="fetch") as caught:
        minari_io.read(store, "group/thing-v0")
    assert "\n" not in str(caught.value)
    (path.parent / "metadata.json").write_text("{")
    with pytest.raises(DataError, match="minari cannot open it") as caught:
        minari_io.read(store, "group/thing-v0")
    assert "\n" not in str(caught.value)


def test_scaling_maps_bounds_to_bounds() -> None:
    low, high = np.array([-2, 0], np.float32), np.array([2, 10], np.float32)
    actions = np.array([[-2, 0], [2, 10], [0, 5], [1, 2.5]], np.float32)
    found = minari_io.scale_action(actions, low, high)
    assert found.tolist() == [[-1, -1], [1, 1], [0, 0], [0.5, -0.5]]
    assert found.dtype == np.float32
    same = np.array([[0.1, 0.2]], np.float32)
    unit = np.ones(2, np.float32)
    np.testing.assert_array_equal(minari_io.scale_action(same, -unit, unit), same)


def test_the_fingerprint_sees_changed_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _write(store, "group/thing-v0")
    before = minari_io.fingerprint(store, "group/thing-v0")
    assert minari_io.fingerprint(store, "group/thing-v0") == before
    shutil.copy(_main(store, "group/thing-v0"), tmp_path / "copy")
    _main(store, "group/thing-v0").write_bytes((tmp_path / "copy").read_bytes())
    assert minari_io.fingerprint(store, "group/thing-v0") != before
