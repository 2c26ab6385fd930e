"""Random but valid episodes, and a brute-force reading of them, for the data tests."""

from __future__ import annotations

import numpy as np

from offrl_jax.datasets.schema import Episodes


def random_episodes(
    seed: int = 0, count: int = 12, obs_dim: int = 3, action_dim: int = 2
) -> Episodes:
    """Episodes of 1 to 9 steps with every kind of end: terminal, cut, both."""
    rng = np.random.default_rng(seed)
    columns: list[list[np.ndarray]] = [[] for _ in range(6)]
    for number in range(count):
        length = int(rng.integers(1, 10))
        states = rng.normal(size=(length + 1, obs_dim)).astype(np.float32)
        terminated = np.zeros(length, bool)
        truncated = np.zeros(length, bool)
        terminated[-1], truncated[-1] = ((1, 0), (0, 1), (1, 1))[number % 3]
        action = rng.uniform(-1, 1, (length, action_dim)).astype(np.float32)
        reward = rng.normal(size=length).astype(np.float32)
        parts = (states[:-1], action, reward, states[1:], terminated, truncated)
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    return Episodes(*(np.concatenate(column) for column in columns))


def as_lists(episodes: Episodes) -> list[list[int]]:
    """Rows of each episode, found one row at a time."""
    found, rows = [], []
    for row in range(len(episodes.reward)):
        rows.append(row)
        if episodes.terminated[row] or episodes.truncated[row]:
            found.append(rows)
            rows = []
    assert not rows
    return found


def official_arrays(episodes: Episodes) -> dict[str, np.ndarray]:
    """The fields of a NeoRL-2 file."""
    return {
        "obs": episodes.obs,
        "action": episodes.action,
        "reward": episodes.reward,
        "next_obs": episodes.next_obs,
        "done": episodes.terminated.astype(np.float32),
        "truncated": episodes.truncated.astype(np.float32),
    }
