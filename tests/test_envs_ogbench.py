"""Batched OGBench environments against the package's own, stepped one by one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from offrl_jax import envs
from offrl_jax.envs.base import HostEnv, PureEnv
from offrl_jax.envs.ogbench_specs import ENVIRONMENTS, IDS, env_id
from offrl_jax.errors import OffrlError, UsageError
from offrl_jax.evaluation import Evaluator
from offrl_jax.types import ObsStats

HAS_OGBENCH = importlib.util.find_spec("ogbench") is not None
needs_ogbench = pytest.mark.skipif(
    not HAS_OGBENCH,
    reason="needs the package ogbench (extra ogbench)",
)


def host(name: str) -> HostEnv:
    env = envs.make(name)
    assert not isinstance(env, PureEnv)
    return env


@pytest.fixture
def seeded_arm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package's arm with an action space that can be seeded, as ours has one."""
    import gymnasium
    from ogbench.manipspace.envs.manipspace_env import ManipSpaceEnv

    one = np.ones(5, np.float32)
    space = gymnasium.spaces.Box(-one, one)
    monkeypatch.setattr(ManipSpaceEnv, "action_space", space)
    yield space


def package_env(gym_id: str) -> Any:
    """The package's environment with gymnasium's wrappers, compiled once."""
    import gymnasium
    import ogbench  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gymnasium's checker, about the package
        env = gymnasium.make(gym_id)
        env.reset(seed=0)
    return env


def package_reset(env: Any, seed: int) -> np.ndarray:
    env.unwrapped.action_space.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    return env.reset(seed=seed)[0]


@needs_ogbench
@pytest.mark.parametrize(
    ("environment", "goal", "steps"),
    [("pointmaze-medium", 3, 60), ("cube-single", 2, 30), ("scene", 4, 30)],
)
def test_a_batch_is_the_packages_own_stepping(
    environment: str, goal: int, steps: int, seeded_arm: Any
) -> None:
    """Observations, rewards and flags, bit for bit, with three episodes in turns."""
    del seeded_arm
    env = host(env_id(environment, goal))
    spec = ENVIRONMENTS[environment]
    seeds = np.array([5, 11, 2**32 - 1], np.uint32)
    own = package_env(f"{environment}-singletask-task{goal}-v0")
    assert own.spec is not None
    assert own.spec.max_episode_steps == spec.horizon
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.2, 1.2, (steps, 3, spec.action_dim)).astype(np.float32)
    obs = env.reset(seeds)
    assert (obs.shape, obs.dtype) == ((3, spec.obs_dim), np.float32)
    found = [env.step(action, np.ones(3, bool)) for action in actions]
    for i, seed in enumerate(seeds):
        first = package_reset(own, int(seed))
        np.testing.assert_array_equal(obs[i], first.astype(np.float32))
        for t in range(steps):
            clipped = np.clip(actions[t, i], -1, 1)
            after, reward, terminated, truncated, info = own.step(clipped)
            np.testing.assert_array_equal(found[t].obs[i], after.astype(np.float32))
            assert found[t].reward[i] == reward
            assert found[t].terminated[i] == terminated
            assert found[t].truncated[i] == truncated
            assert found[t].success[i] == bool(info["success"])
    env.close()


@needs_ogbench
def test_an_episode_depends_on_its_seed_alone() -> None:
    """Whatever the batch, the order, and the episodes played before it."""
    env = host(env_id("scene", 1))
    action = np.full((2, 5), 0.3, np.float32)

    def play(seeds: list[int]) -> np.ndarray:
        rows = [env.reset(np.array(seeds, np.uint32))]
        both = np.ones(len(seeds), bool)
        for _ in range(8):
            rows.append(env.step(action[: len(seeds)], both).obs)
        return np.stack(rows)

    before = np.random.get_state()[1]  # noqa: NPY002
    pair = play([7, 8])
    again = play([8])
    np.testing.assert_array_equal(again[:, 0], pair[:, 1])
    np.testing.assert_array_equal(play([8, 7])[:, 1], pair[:, 0])
    assert not np.array_equal(pair[0, 0], pair[0, 1])
    after = np.random.get_state()[1]  # noqa: NPY002
    np.testing.assert_array_equal(before, after)
    env.close()


@needs_ogbench
def test_an_episode_ends_at_success_or_at_the_time_limit() -> None:
    """Task 3 of the medium maze: one episode walks to the goal, the other stays."""
    env = host(env_id("pointmaze-medium", 3))
    obs = env.reset(np.array([1, 2], np.uint32))
    # Cells (row, column) of the way from (5, 3), 4 wide; cell (1, 1) is the origin.
    cells = np.array([(6, 3), (6, 1), (4, 1), (4, 2)])
    way = [4.0 * (cell[::-1] - 1) for cell in cells]
    goal = way[-1]
    active = np.array([True, True])
    succeeded_at = None
    for t in range(env.spec.horizon):
        action = np.zeros((2, 2), np.float32)  # the second episode stays where it is
        if len(way) > 1 and np.linalg.norm(obs[0] - way[0]) < 0.5:
            way.pop(0)
        action[0] = np.clip(way[0] - obs[0], -1, 1)
        at_goal = np.linalg.norm(obs[0] - goal) <= 1.0
        step = env.step(action, active)
        if active[0]:
            # Told of the state before the action, with a reward of 0 instead of -1.
            assert step.reward[0] == (0.0 if at_goal else -1.0)
            assert step.success[0] == step.terminated[0] == at_goal
        if step.success[0]:
            succeeded_at = t
        obs = step.obs
        active = active & ~(step.terminated | step.truncated)
        if not active.any():
            break
    assert succeeded_at is not None and succeeded_at < 200
    assert t == env.spec.horizon - 1
    assert step.truncated[1] and not step.terminated[1] and not step.success[1]
    with pytest.raises(ValueError, match="has ended"):
        env.step(np.zeros((2, 2), np.float32), np.array([False, True]))
    env.close()


@needs_ogbench
def test_the_evaluator_counts_successes() -> None:
    """One policy knows the way of task 3, the other one stays where it is."""

    def act(key: Any, state: Any, obs: Any, hyper: Any) -> Any:
        del key, hyper
        x, y = obs[:, 0], obs[:, 1]
        stages = [(x > 6) & (y < 19), (x > 0.7) & (y > 18.5), y > 12.8]
        goals = [[8.0, 20.0], [0.0, 20.0], [0.0, 12.0]]
        goal = jnp.array([[4.0, 12.0]])
        for stage, place in zip(stages[::-1], goals[::-1], strict=True):
            goal = jnp.where(stage[:, None], jnp.array([place]), goal)
        return state * jnp.clip(goal - obs, -1.0, 1.0)

    env = host(env_id("pointmaze-medium", 3))
    goes = np.array([1.0, 0.0], np.float32)
    stats: Any = ObsStats(np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32))  # type: ignore[arg-type]
    found = Evaluator(act, env, 3)(
        goes, np.zeros(2, np.float32), stats, np.arange(2), 0
    )
    assert found.successes is not None
    assert found.successes.tolist() == [[True] * 3, [False] * 3]
    assert (found.lengths[0] < 200).all()
    assert (found.lengths[1] == env.spec.horizon).all()
    # -1 for every step but the one from the goal.
    np.testing.assert_array_equal(found.returns, found.successes - found.lengths)
    env.close()


def test_ids_and_specs_need_no_package() -> None:
    assert len(IDS) == 25
    for name, (environment, goal) in IDS.items():
        assert name == env_id(environment, goal)
        assert envs.spec_of(name) == ENVIRONMENTS[environment]


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UsageError, match=r"pip install 'offrl-jax\[ogbench\]'$"):
        envs.make(env_id("scene", 1))


def test_another_version_of_the_rewards_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.1.5")
    with pytest.raises(UsageError, match=r"ogbench 1\.1\.5 is installed.*1\.2"):
        envs.make(env_id("scene", 1))


@needs_ogbench
def test_absent_model_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ogbench.locomaze.point import PointEnv

    monkeypatch.setattr(PointEnv, "xml_file", "no_such_folder/point.xml")
    with pytest.raises(OffrlError, match=r"cannot load its model.*point\.xml.*reinst"):
        envs.make(env_id("pointmaze-large", 1))


def test_an_unknown_id_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown environment 'ogbench/cube-singl"):
        envs.make("ogbench/cube-single-singletask-task9-v0")
