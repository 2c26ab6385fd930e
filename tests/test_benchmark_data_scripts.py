"""The scripts that make data to import: actor_data.py and acpo/few_episodes.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from offrl_jax.datasets import importing
from offrl_jax.datasets.store import Store

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def write_actor(path: Path, obs_dim: int = 11, action_dim: int = 3) -> Path:
    rng = np.random.default_rng(0)
    sizes = {"w0": (4, obs_dim), "w1": (4, 4), "w_mu": (action_dim, 4)}
    sizes["w_log_std"] = sizes["w_mu"]
    weights = {name: 0.3 * rng.normal(size=size) for name, size in sizes.items()}
    biases = {"b" + name[1:]: np.zeros(size[0]) for name, size in sizes.items()}
    biases["b_log_std"] -= 30.0  # Cut at -20: next to no noise.
    np.savez(path, **weights, **biases)
    return path


def script(name: str, *arguments: object, **env: str) -> Any:
    return subprocess.run(
        [sys.executable, str(FOLDER / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | env,
    )


def collect(*arguments: object) -> Any:
    return script("actor_data.py", *arguments)


def test_rows_are_the_simulators_and_can_be_imported(tmp_path: Path):
    actor = write_actor(tmp_path / "actor.npz")
    out = tmp_path / "hopper.npz"
    options = "--env", "Hopper-v5", "--out", out, "--transitions", 60, "--epsilon", 0
    done = collect(actor, *options)
    assert done.returncode == 0, done.stderr
    with np.load(out) as found, np.load(actor) as weights:
        rows, w = dict(found), dict(weights)
    assert len(rows["reward"]) >= 60 and rows["env_id"] == "mujoco/Hopper-v5"
    hidden = np.maximum(rows["obs"] @ w["w0"].T, 0.0)
    hidden = np.maximum(hidden @ w["w1"].T, 0.0)
    np.testing.assert_allclose(rows["action"], np.tanh(hidden @ w["w_mu"].T), atol=1e-5)
    # Played again from the recorded seed of the first episode.
    env = gymnasium.make("Hopper-v5")
    obs, _ = env.reset(seed=int(np.random.default_rng(0).integers(2**31)))
    np.testing.assert_allclose(rows["obs"][0], obs, atol=1e-6)
    next_obs, reward, terminated, _, _ = env.step(rows["action"][0])
    np.testing.assert_allclose(rows["next_obs"][0], next_obs, atol=1e-4)
    assert rows["reward"][0] == pytest.approx(float(reward), abs=1e-4)
    assert bool(rows["terminated"][0]) == terminated
    env.close()
    ends = rows["terminated"] | rows["truncated"]
    assert ends[-1]
    np.testing.assert_array_equal(
        rows["next_obs"][:-1][~ends[:-1]], rows["obs"][1:][~ends[:-1]]
    )
    assert "hopper-test" in importing.import_file(
        out, "local/hopper-test-v0", Store(tmp_path / "store")
    )


def test_an_actor_of_another_body_is_refused_in_one_line(tmp_path: Path):
    actor = write_actor(tmp_path / "actor.npz", obs_dim=17)
    done = collect(actor, "--env", "Hopper-v5", "--out", tmp_path / "x.npz")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "of 17 observations" in done.stderr
    (tmp_path / "half.npz").write_bytes(actor.read_bytes()[:300])
    done = collect(tmp_path / "half.npz", "--env", "Hopper-v5", "--out", "x.npz")
    assert done.returncode == 1 and "no readable .npz" in done.stderr
    assert done.stderr.count("\n") == 1
    done = collect(actor, "--env", "Hoper-v5", "--out", "x.npz")
    assert done.returncode == 1 and "did you mean 'mujoco/Hopper-v5'" in done.stderr
    np.savez(tmp_path / "half.npz", w0=np.zeros((4, 11)))
    done = collect(tmp_path / "half.npz", "--env", "Hopper-v5", "--out", "x.npz")
    assert "lacks b0" in done.stderr and done.returncode == 1


def test_the_first_episodes_of_a_dataset(tmp_path: Path):
    rng = np.random.default_rng(0)
    ends = np.isin(np.arange(12), [3, 4, 11])  # Episodes of 4, 1 and 7 steps.
    full = {
        "obs": rng.normal(size=(12, 2)),
        "action": rng.uniform(-1, 1, (12, 1)),
        "reward": rng.normal(size=12),
        "next_obs": np.zeros((12, 2)),
        "terminated": ends,
        "truncated": np.zeros(12, bool),
    }
    full["next_obs"][:-1] = full["obs"][1:]
    np.savez(tmp_path / "full.npz", allow_pickle=False, **full)
    store, task = Store(tmp_path / "store"), "local/three-v0"
    importing.import_file(tmp_path / "full.npz", task, store, "train")
    few = "acpo/few_episodes.py", task, "--out", tmp_path / "few.npz", "--episodes"
    done = script(*few, 2, OFFRL_DATA=str(store.path))
    assert done.returncode == 0 and "2 episodes, 5 transitions" in done.stdout
    with np.load(tmp_path / "few.npz") as found:
        assert set(found) == set(full)  # No simulator, so no `env_id`.
        for name, values in full.items():
            np.testing.assert_allclose(found[name], values[:5], rtol=1e-6)
    done = script(*few, 4, OFFRL_DATA=str(store.path))
    assert done.returncode == 1 and "has 3 episodes to train on" in done.stderr
    assert done.stderr.count("\n") == 1
