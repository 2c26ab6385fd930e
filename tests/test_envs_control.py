"""CartPole, Acrobot and MountainCarContinuous against Gymnasium's own."""

from __future__ import annotations

import math

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from offrl_jax import envs
from offrl_jax.envs import acrobot, cartpole, mountain_car
from offrl_jax.envs.base import PureEnv

PI = math.pi
RNG_STATES = 600

# Module, Gymnasium's id, ranges of its state vector to draw from: wide enough that
# many steps terminate, hit a bound or go through a full turn.
CASES = {
    "CartPole-v1": (cartpole, [(-2.5, 2.5), (-3, 3), (-0.25, 0.25), (-3, 3)]),
    "Acrobot-v1": (acrobot, [(-PI, PI), (-PI, PI), (-8, 8), (-14, 14)]),
    "MountainCarContinuous-v0": (mountain_car, [(-1.2, 0.6), (-0.07, 0.07)]),
}


def pure(name: str) -> PureEnv:
    env = envs.make(f"control/{name}")
    assert isinstance(env, PureEnv)
    return env


def state_of(name: str, vector: np.ndarray):
    """Our state of Gymnasium's state vectors `[..., K]`, at time 0."""
    v = jnp.asarray(vector, jnp.float32)
    t = jnp.zeros(v.shape[:-1], jnp.int32)
    if name == "Acrobot-v1":
        return acrobot.AcrobotState(v[..., :2], v[..., 2:], t)
    columns = [v[..., i] for i in range(v.shape[-1])]
    kind = (
        cartpole.CartPoleState
        if name == "CartPole-v1"
        else mountain_car.MountainCarState
    )
    return kind(*columns, t)


def draw_actions(env: PureEnv, n: int, seed: int) -> tuple[np.ndarray, list]:
    """Ours `[n, A]`, and the same for Gymnasium."""
    rng = np.random.default_rng(seed)
    if env.spec.discrete:
        chosen = rng.integers(env.spec.action_dim, size=n)
        return np.eye(env.spec.action_dim, dtype=np.float32)[chosen], chosen.tolist()
    drawn = rng.uniform(-1, 1, (n, env.spec.action_dim)).astype(np.float32)
    return drawn, list(drawn)


@pytest.mark.parametrize("name", CASES)
class TestAgainstGymnasium:
    def test_spec(self, name: str):
        reference, env = gymnasium.make(name), pure(name)
        assert reference.spec is not None
        assert env.spec.horizon == reference.spec.max_episode_steps
        assert (env.spec.obs_dim,) == reference.observation_space.shape
        space = reference.action_space
        assert env.spec.discrete == isinstance(space, gymnasium.spaces.Discrete)
        if isinstance(space, gymnasium.spaces.Discrete):
            assert env.spec.action_dim == space.n
        else:
            assert (env.spec.action_dim,) == space.shape
            np.testing.assert_array_equal(space.low, -1.0)  # pyright: ignore
            np.testing.assert_array_equal(space.high, 1.0)  # pyright: ignore
        assert env.has_success == (name != "CartPole-v1")
        assert env.name in envs.known()

    def test_one_step_from_arbitrary_states(self, name: str):
        ranges = np.array(CASES[name][1], np.float64)
        rng, env = np.random.default_rng(0), pure(name)
        vectors = rng.uniform(ranges[:, 0], ranges[:, 1], (RNG_STATES, len(ranges)))
        vectors = vectors.astype(np.float32)
        ours, theirs = draw_actions(env, RNG_STATES, 1)
        _, got = jax.jit(jax.vmap(env.step))(state_of(name, vectors), jnp.asarray(ours))
        reference = gymnasium.make(name).unwrapped
        ended = 0
        for i, action in enumerate(theirs):
            reference.reset(seed=0)
            # In float64 but for the car, whose state is float32 in Gymnasium.
            kind = np.float32 if name == "MountainCarContinuous-v0" else np.float64
            reference.state = vectors[i].astype(kind)  # pyright: ignore
            obs, reward, terminated, truncated, _ = reference.step(action)
            # A Runge-Kutta step of 0.2 s at such speeds magnifies rounding.
            tolerance = 2e-4 if name == "Acrobot-v1" else 2e-6
            np.testing.assert_allclose(got.obs[i], obs, rtol=1e-6, atol=tolerance)
            assert bool(got.terminated[i]) == terminated, vectors[i]
            np.testing.assert_allclose(got.reward[i], reward, rtol=1e-6, atol=1e-7)
            assert not truncated and not got.truncated[i]
            assert bool(got.success[i]) == (terminated and env.has_success)
            ended += terminated
        assert 10 < ended < RNG_STATES - 10

    def test_starts_are_distributed_as_gymnasiums(self, name: str):
        env, reference = pure(name), gymnasium.make(name)
        keys = jax.random.split(jax.random.key(0), 2000)
        _, obs = jax.jit(jax.vmap(env.reset))(keys)
        theirs = np.stack([reference.reset(seed=i)[0] for i in range(500)])
        for ours, column in zip(np.asarray(obs).T, theirs.T, strict=True):
            # 500 draws come this close to the ends but for one time in a million.
            near = 0.03 * (column.max() - column.min())
            assert abs(ours.min() - column.min()) <= near
            assert abs(ours.max() - column.max()) <= near
            assert stats.ks_2samp(ours, column).pvalue > 1e-4

    def test_open_loop_episode_as_long_as_float32_allows(self, name: str):
        """CartPole until it falls (about 20 steps) and the car for all of 999 steps.

        The Acrobot is chaotic once it swings: 60 steps of 0.2 s to 1e-3.
        """
        env, reference = pure(name), gymnasium.make(name)
        step = jax.jit(env.step)
        steps = {"Acrobot-v1": 60}.get(name, env.spec.horizon)
        longest = 0
        for seed in range(4):
            obs, _ = reference.reset(seed=seed)
            state = state_of(name, np.asarray(reference.unwrapped.state))  # pyright: ignore
            ours, theirs = draw_actions(env, steps, seed)
            for t, action in enumerate(theirs):
                obs, reward, terminated, truncated, _ = reference.step(action)
                state, got = step(state, ours[t])
                np.testing.assert_allclose(got.obs, obs, atol=1e-3)
                assert bool(got.terminated) == terminated
                assert bool(got.truncated) == truncated
                np.testing.assert_allclose(got.reward, reward, rtol=1e-6, atol=1e-7)
                longest = max(longest, t + 1)
                if terminated or truncated:
                    break
        assert longest > 20 if name == "CartPole-v1" else longest == steps

    def test_time_limit_cuts_without_terminating(self, name: str):
        env = pure(name)
        state, _ = env.reset(jax.random.key(0))
        state = state._replace(t=jnp.asarray(env.spec.horizon - 2, jnp.int32))
        action = jnp.zeros(env.spec.action_dim)
        state, before = env.step(state, action)
        _, last = env.step(state, action)
        assert not before.truncated and not before.terminated
        assert last.truncated and not last.terminated and not last.success
        assert last.truncated.dtype == last.terminated.dtype == jnp.bool_

    def test_nan_action_shows_in_the_reward(self, name: str):
        env = pure(name)
        state, _ = env.reset(jax.random.key(0))
        for position in range(env.spec.action_dim):
            action = jnp.ones(env.spec.action_dim).at[position].set(jnp.nan)
            _, got = env.step(state, action)
            assert np.isnan(got.reward)
            assert not got.success and not got.truncated
            assert np.isnan(got.obs).any()


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1"])
def test_the_largest_component_counts(name: str):
    env = pure(name)
    state, _ = env.reset(jax.random.key(0))
    shown = []
    for i in range(env.spec.action_dim):
        _, hot = env.step(state, jax.nn.one_hot(i, env.spec.action_dim))
        logits = jnp.full(env.spec.action_dim, -7.0).at[i].set(-2.0)
        _, soft = env.step(state, logits)
        np.testing.assert_array_equal(hot.obs, soft.obs)
        shown.append(np.asarray(hot.obs))
    assert len(np.unique(shown, axis=0)) == env.spec.action_dim


def test_falling_cartpole_terminates_on_both_sides():
    env = pure("CartPole-v1")
    edge = cartpole.MAX_THETA
    inside, outside = np.nextafter(np.float32(edge), np.float32([0, 1]))
    for place, bound in ((0, (2.4 - 1e-6, 2.4 + 1e-6)), (2, (inside, outside))):
        for sign in (-1.0, 1.0):
            vector = np.zeros((2, 4), np.float32)
            vector[:, place] = sign * np.float32(bound)
            _, got = jax.vmap(env.step)(state_of("CartPole-v1", vector), np.eye(2)[:2])
            np.testing.assert_array_equal(got.terminated, [False, True])
            np.testing.assert_array_equal(got.reward, 1.0)


def test_acrobot_wraps_several_turns_and_bounds_speeds():
    angles = jnp.array([PI - 1e-3, -PI + 1e-3, 3.0 * PI - 0.5, -5.0 * PI + 0.5, 0.3])
    wrapped = acrobot._wrap(angles)
    expected = [PI - 1e-3, -PI + 1e-3, PI - 0.5, -PI + 0.5, 0.3]
    np.testing.assert_allclose(wrapped, expected, atol=2e-6)
    assert wrapped[4] == angles[4]
    vector = np.array([0.3, 0.2, 4 * PI, 9 * PI], np.float32)
    for sign in (1, -1):
        _, got = acrobot.step(state_of("Acrobot-v1", sign * vector), jnp.ones(3))
        assert abs(float(got.obs[5])) <= np.float32(9 * PI)


def test_mountain_car_stops_at_the_wall_and_arrives_only_forwards():
    env = pure("MountainCarContinuous-v0")
    vectors = np.array([[-1.19, -0.07], [0.6, -0.06], [0.43, 0.05]], np.float32)
    state = state_of("MountainCarContinuous-v0", vectors)
    _, got = jax.vmap(env.step)(state, np.zeros((3, 1), np.float32))
    np.testing.assert_array_equal(got.obs[0], np.float32([-1.2, 0.0]))
    assert got.obs[1, 0] >= mountain_car.FLAG
    np.testing.assert_array_equal(got.terminated, [False, False, True])
    np.testing.assert_array_equal(got.reward, [0.0, 0.0, 100.0])
    # Beyond the bounds an action is charged as the bound.
    _, beyond = env.step(jax.tree.map(lambda x: x[0], state), jnp.array([-3.0]))
    assert float(beyond.reward) == pytest.approx(-0.1)
