"""Transforms of observations and rewards, by name, as published methods use them."""

from __future__ import annotations

import numpy as np

from offrl_jax.datasets.schema import Episodes, episode_returns
from offrl_jax.errors import DataError, unknown_name
from offrl_jax.types import ObsStats

OBS_TRANSFORMS = ("none", "standardise")
REWARD_TRANSFORMS = ("none", "minus_one", "return_range")


def check_names(obs_transform: str, reward_transform: str) -> None:
    """Checks the names that an agent's structure gives.

    Raises:
      UsageError: an unknown name.
    """
    if obs_transform not in OBS_TRANSFORMS:
        raise unknown_name("observation transform", obs_transform, OBS_TRANSFORMS)
    if reward_transform not in REWARD_TRANSFORMS:
        raise unknown_name("reward transform", reward_transform, REWARD_TRANSFORMS)


def obs_stats(name: str, obs: np.ndarray) -> ObsStats:
    """Statistics that standardise observations, `(obs - mean) / std`.

    Args:
      name: `none` (the identity), or `standardise`: mean and standard deviation of each
        dimension over the dataset, the latter + 1e-3 (Fujimoto & Gu 2021, TD3+BC, and
        its authors' code).
      obs: `[N, O]`.

    Returns:
      NumPy leaves `[O]` float32; sums are accumulated in float64.

    Raises:
      UsageError: an unknown name.
    """
    if name == "none":
        mean, std = np.zeros(obs.shape[1]), np.ones(obs.shape[1])
    elif name == "standardise":
        mean = obs.mean(axis=0, dtype=np.float64)
        std = obs.std(axis=0, dtype=np.float64) + 1e-3
    else:
        raise unknown_name("observation transform", name, OBS_TRANSFORMS)
    stats = (mean.astype(np.float32), std.astype(np.float32))
    return ObsStats(*stats)  # pyright: ignore[reportArgumentType]


def transform_reward(name: str, episodes: Episodes) -> np.ndarray:
    """Rewards to train on, `[N]` float32.

    Args:
      name: `none`; `minus_one`: r - 1, which turns a sparse 0/1 reward into a step
        cost (Kumar et al. 2020 and Kostrikov et al. 2022, for AntMaze); `return_range`:
        1000 r / (largest - smallest return of an episode) (Kostrikov et al. 2022, IQL,
        for the locomotion tasks).
      episodes: the training data.

    Raises:
      UsageError: an unknown name.
      DataError: `return_range` where all returns are equal.
    """
    reward = np.asarray(episodes.reward)
    if name == "none":
        return reward
    if name == "minus_one":
        return reward - np.float32(1.0)
    if name == "return_range":
        returns = episode_returns(episodes)
        span = returns.max() - returns.min()
        if span <= 0:
            raise DataError(
                f"reward transform 'return_range': all {len(returns)} episodes have "
                f"the return {returns[0]:g}; use 'none'"
            )
        return (reward * (1000.0 / span)).astype(np.float32)
    raise unknown_name("reward transform", name, REWARD_TRANSFORMS)
