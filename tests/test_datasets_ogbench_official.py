"""OGBench's official files: what is accepted, and how everything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_envs_ogbench import needs_ogbench

from offrl_jax.datasets.importing import import_file
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, UsageError

MAZE = "ogbench/pointmaze-medium-navigate-v0"
SECOND_TASK = "ogbench/pointmaze-medium-navigate-singletask-task2-v0"


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    """Arrays of the form of the authors' validation file of the medium maze."""
    rows = 100 * 1001
    places = np.random.default_rng(0).uniform(0, 20, (rows, 2)).astype(np.float32)
    return {
        "observations": places,
        "actions": np.clip(places - 10, -1, 1),
        "terminals": np.arange(1, rows + 1) % 1001 == 0,
        "qpos": places,
        "qvel": np.zeros_like(places),
    }


class TestOfficialFiles:
    def save(self, path: Path, arrays: dict[str, Any]) -> Path:
        np.savez(path / "any.npz", allow_pickle=False, **arrays)
        return path / "any.npz"

    @needs_ogbench
    def test_is_stored_as_five_tasks(
        self, official: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        store = Store(tmp_path / "store")
        said = import_file(self.save(tmp_path, official), MAZE, store)
        assert "val: 100 trajectories, 100,000 transitions" in said
        record = store.record(SECOND_TASK, "val")
        assert record.source["kind"] == "official OGBench file"
        assert record.recipe_hash is None
        near = np.linalg.norm(official["qpos"] - [20, 0], axis=1) <= 1  # cell (1, 6)
        assert record.terminated_episodes == (near & ~official["terminals"]).sum() > 0

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"qvel": None}, "has no field 'qvel'.*another version"),
            ({"rewards": np.zeros(3)}, "holds 'rewards'.*before 1.2.0"),
            ({"observations": np.zeros((100100, 4))}, r"'observations'.*\(100100, 2\)"),
            ({"qpos": np.zeros((100100, 2))}, "differ by .* another version"),
            ({"terminals": np.zeros(100100, bool)}, "'terminals' is 0 in row 1000"),
        ],
    )
    def test_another_file_is_refused(
        self,
        change: dict[str, Any],
        said: str,
        official: dict[str, np.ndarray],
        tmp_path: Path,
    ) -> None:
        changed = {k: v for k, v in {**official, **change}.items() if v is not None}
        path = self.save(tmp_path, changed)
        with pytest.raises(DataError, match=said):
            import_file(path, MAZE, Store(tmp_path / "store"))

    def test_rows_that_are_missing_are_told(
        self, official: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        short = {name: array[:-1001] for name, array in official.items()}
        with pytest.raises(DataError, match=r"99,099 rows.*1,001,000.*100,100 \(val\)"):
            import_file(self.save(tmp_path, short), MAZE, Store(tmp_path / "store"))

    def test_a_file_cut_short_is_told(
        self, official: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        path = self.save(tmp_path, official)
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(DataError, match="is damaged or cut short"):
            import_file(path, MAZE, Store(tmp_path / "store"))

    def test_the_rows_tell_the_split(
        self, official: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        path = self.save(tmp_path, official)
        with pytest.raises(UsageError, match="has the rows of the val split"):
            import_file(path, MAZE, Store(tmp_path / "store"), split="train")

    def test_a_file_of_the_arm_needs_its_buttons(
        self, official: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        path = self.save(tmp_path, official)
        with pytest.raises(DataError, match="has no field 'button_states'"):
            import_file(path, "ogbench/scene-play-v0", Store(tmp_path / "store"))
