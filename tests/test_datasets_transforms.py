from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from datasets_builders import as_lists, random_episodes

from offrl_jax.datasets import transforms
from offrl_jax.errors import DataError, UsageError


def test_standardise_gives_mean_0_and_std_1_up_to_the_constant() -> None:
    rng = np.random.default_rng(0)
    obs = (rng.normal(size=(500, 4)) * [1, 10, 0.1, 100] + [0, 5, 1e3, -7]).astype("f4")
    stats = transforms.obs_stats("standardise", obs)
    exact = obs.astype(np.float64)
    np.testing.assert_allclose(stats.mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.std, exact.std(0) + 1e-3, rtol=1e-6)
    assert stats.mean.dtype == stats.std.dtype == np.float32


def test_a_constant_dimension_stays_finite() -> None:
    stats = transforms.obs_stats("standardise", np.full((9, 2), 3.0, np.float32))
    np.testing.assert_allclose(stats.std, 1e-3, rtol=1e-6)


def test_sums_do_not_lose_digits() -> None:
    # A float32 sum of 300,000 such numbers is off in the third digit.
    obs = np.full((300_000, 1), 1000.1, np.float32)
    obs[::2] += 1.0
    stats = transforms.obs_stats("standardise", obs)
    np.testing.assert_allclose(stats.mean, [1000.6], rtol=1e-6)
    np.testing.assert_allclose(stats.std, [0.501], rtol=1e-3)


def test_none_is_the_identity() -> None:
    stats = transforms.obs_stats("none", np.ones((3, 2), np.float32))
    assert stats.mean.tolist() == [0.0, 0.0]
    assert stats.std.tolist() == [1.0, 1.0]
    episodes = random_episodes(0)
    np.testing.assert_array_equal(
        transforms.transform_reward("none", episodes), episodes.reward
    )


def test_minus_one() -> None:
    episodes = random_episodes(0)
    found = transforms.transform_reward("minus_one", episodes)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, episodes.reward - np.float32(1))


def test_return_range_makes_the_returns_span_1000() -> None:
    episodes = random_episodes(0)
    found = transforms.transform_reward("return_range", episodes).astype(np.float64)
    returns = [found[rows].sum() for rows in as_lists(episodes)]
    assert max(returns) - min(returns) == pytest.approx(1000.0, rel=1e-5)
    ratio = found / episodes.reward
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_return_range_of_equal_returns_is_refused() -> None:
    episodes = random_episodes(0)
    flat = dataclasses.replace(episodes, reward=np.zeros_like(episodes.reward))
    with pytest.raises(DataError, match="all 12 episodes have the return 0"):
        transforms.transform_reward("return_range", flat)


def test_unknown_names_are_told() -> None:
    with pytest.raises(UsageError, match="did you mean 'standardise'"):
        transforms.obs_stats("standardize", np.ones((1, 1), np.float32))
    with pytest.raises(UsageError, match="did you mean 'minus_one'"):
        transforms.transform_reward("minusone", random_episodes(0))
