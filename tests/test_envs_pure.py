"""The pure environments against Gymnasium, recorded data and brute force."""

from __future__ import annotations

import math
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from offrl_jax import envs
from offrl_jax.envs import dmsd, pendulum
from offrl_jax.envs.base import PureEnv
from offrl_jax.errors import UsageError

PURE = (
    "classic/pendulum-v0",
    "classic/point_maze-v0",
    "classic/gates-v0",
    "neorl2/DMSD-v1",
    "control/CartPole-v1",
    "control/Acrobot-v1",
    "control/MountainCarContinuous-v0",
)


def pure(env_id: str) -> PureEnv:
    env = envs.make(env_id)
    assert isinstance(env, PureEnv)
    return env


def rollout(env: PureEnv, key: jax.Array, actions: jax.Array):
    """One episode under open-loop actions `[steps, A]`."""
    state, obs = env.reset(key)
    return obs, jax.lax.scan(env.step, state, actions)[1]


@pytest.mark.parametrize("env_id", PURE)
class TestEveryPureEnv:
    def test_shapes_dtypes_and_horizon(self, env_id):
        env = pure(env_id)
        actions = jnp.zeros((env.spec.horizon, env.spec.action_dim))
        obs, steps = jax.jit(rollout, static_argnums=0)(env, jax.random.key(0), actions)
        assert env.name == env_id
        assert env.spec == envs.spec_of(env_id)
        assert obs.shape == (env.spec.obs_dim,)
        assert obs.dtype == steps.obs.dtype == steps.reward.dtype == jnp.float32
        assert steps.obs.shape == (env.spec.horizon, env.spec.obs_dim)
        for flag in (steps.terminated, steps.truncated, steps.success):
            assert flag.dtype == jnp.bool_ and flag.shape == (env.spec.horizon,)
        # At rest nothing terminates but the gates, whose walls do not wait, and the
        # pole; only the last step is cut off.
        ends = ("classic/gates-v0", "control/CartPole-v1")
        assert bool(steps.terminated.any()) == (env_id in ends)
        assert not steps.truncated[:-1].any() and bool(steps.truncated[-1])

    def test_lane_of_a_batch_equals_single_episode(self, env_id):
        env = pure(env_id)
        keys = jax.random.split(jax.random.key(3), 4)
        actions = jax.random.uniform(
            jax.random.key(4), (4, 60, env.spec.action_dim), minval=-1.0
        )
        run = jax.jit(rollout, static_argnums=0)
        _, batch = jax.jit(jax.vmap(rollout, (None, 0, 0)), static_argnums=0)(
            env, keys, actions
        )
        for lane in range(4):
            _, single = run(env, keys[lane], actions[lane])
            np.testing.assert_allclose(
                batch.obs[lane], single.obs, rtol=1e-4, atol=1e-4
            )

    def test_same_key_same_start(self, env_id):
        env = pure(env_id)
        first, again = (env.reset(jax.random.key(5))[1] for _ in range(2))
        other = env.reset(jax.random.key(6))[1]
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_actions_beyond_the_bounds_are_clipped(self, env_id):
        env = pure(env_id)
        state, _ = env.reset(jax.random.key(0))
        ones = jnp.ones(env.spec.action_dim)
        _, at_bound = env.step(state, ones)
        _, beyond = env.step(state, 3.0 * ones)
        np.testing.assert_array_equal(at_bound.obs, beyond.obs)
        np.testing.assert_array_equal(at_bound.reward, beyond.reward)


class TestPendulum:
    def test_each_step_is_gymnasiums(self):
        rng = np.random.default_rng(0)
        n = 500
        theta = rng.uniform(-math.pi, math.pi, n)
        velocity = rng.uniform(-8.0, 8.0, n)
        action = rng.uniform(-1.0, 1.0, (n, 1))
        state = pendulum.PendulumState(
            jnp.asarray(theta, jnp.float32),
            jnp.asarray(velocity, jnp.float32),
            jnp.zeros(n, jnp.int32),
        )
        _, got = jax.jit(jax.vmap(pendulum.step))(
            state, jnp.asarray(action, jnp.float32)
        )
        env = PendulumEnv()
        for i in range(n):
            env.reset(seed=0)
            env.state = np.array([theta[i], velocity[i]])
            obs, reward, *_ = env.step(2.0 * action[i])
            np.testing.assert_allclose(got.obs[i], obs, atol=3e-6)
            np.testing.assert_allclose(got.reward[i], reward, rtol=3e-6, atol=1e-6)

    @pytest.mark.parametrize("gain", [0.0, 1.0])
    def test_whole_episode_is_gymnasiums(self, gain):
        """With zero torque, and with full torque along the velocity (many turns)."""
        reference = gymnasium.make("Pendulum-v1")
        obs, _ = reference.reset(seed=1)
        start = reference.unwrapped.state  # pyright: ignore
        state = pendulum.PendulumState(
            jnp.float32(start[0]), jnp.float32(start[1]), jnp.zeros((), jnp.int32)
        )
        step = jax.jit(pendulum.step)
        np.testing.assert_allclose(pendulum.observe(state), obs, atol=1e-6)
        for t in range(200):
            action = np.sign(obs[2:]) * np.float32(gain)
            obs, reward, terminated, truncated, _ = reference.step(2.0 * action)
            state, got = step(state, jnp.asarray(action))
            np.testing.assert_allclose(got.obs, obs, atol=2e-3)
            np.testing.assert_allclose(got.reward, reward, atol=2e-2)
            assert bool(got.terminated) == terminated
            assert bool(got.truncated) == truncated == (t == 199)

    def test_start_covers_gymnasiums_range(self):
        state, _ = jax.vmap(pendulum.reset)(jax.random.split(jax.random.key(0), 4000))
        for values, bound in ((state.theta, math.pi), (state.velocity, 1.0)):
            assert np.abs(values).max() <= bound
            # Mean and variance of U[-bound, bound], at five standard errors.
            assert abs(np.mean(values)) < 5 * bound / math.sqrt(3 * 4000)
            assert np.var(values) == pytest.approx(bound**2 / 3, rel=0.08)


class TestDMSD:
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_reproduces_every_recorded_transition(self, shared_data: Path, split: str):
        data = np.load(shared_data / "neorl2" / f"DMSD-{split}.npz")
        obs, next_obs, action, reward = (
            data[k].reshape(-1, 100, *data[k].shape[1:])
            for k in ("obs", "next_obs", "action", "reward")
        )
        episodes = len(obs)
        targets = np.stack([obs[:, 0, 4:], obs[:, -1, 4:]], axis=1)
        state = dmsd.DMSDState(
            x=obs[..., :2],
            v=obs[..., 2:4],
            targets=np.broadcast_to(targets[:, None], (episodes, 100, 2, 2)),
            t=np.broadcast_to(np.arange(100, dtype=np.int32), (episodes, 100)),
        )
        _, got = jax.jit(jax.vmap(jax.vmap(dmsd.step)))(state, action)
        assert np.abs(got.obs - next_obs).max() < 1e-6
        # The logarithm magnifies the rounding of float32 positions by 1 / (d + 0.01).
        d = np.abs(next_obs[..., :2] - next_obs[..., 4:])
        allowed = 1e-6 + (2.4e-7 / (d + 0.01)).sum(-1)
        assert (np.abs(got.reward - reward) < allowed).all()
        assert not data["done"].any() and not got.terminated.any()
        np.testing.assert_array_equal(got.truncated.ravel(), data["truncated"] > 0)

    def test_recorded_targets_show_the_switch(self, shared_data: Path):
        """Observation 50 is the first with the second targets, in data and here."""
        recorded = np.load(shared_data / "neorl2" / "DMSD-train.npz")["obs"]
        targets = recorded.reshape(-1, 100, 6)[..., 4:]
        jumps = np.argwhere(np.diff(targets, axis=1) != 0)[:, 1] + 1
        assert set(jumps.tolist()) == {dmsd.SWITCH}

        env = pure(dmsd.NAME)
        keys = jax.random.split(jax.random.key(0), 2000)
        zeros = jnp.zeros((100, 2))
        _, steps = jax.jit(jax.vmap(lambda k: rollout(env, k, zeros)))(keys)
        moved = np.diff(np.asarray(steps.obs)[..., 4:], axis=1) != 0
        # Entry t of `steps` is observation t + 1.
        assert set((np.argwhere(moved)[:, 1] + 2).tolist()) == {dmsd.SWITCH}
        share = moved.any(axis=1).mean(axis=0)
        np.testing.assert_allclose(share, 0.5, atol=0.06)

    def test_starts_lie_where_the_recorded_ones_do(self, shared_data: Path):
        recorded = np.load(shared_data / "neorl2" / "DMSD-train.npz")["obs"][::100]
        _, obs = jax.vmap(dmsd.reset)(jax.random.split(jax.random.key(1), 4000))
        bound = np.array([0.25, 0.25, 0.1, 0.1, 1.5, 1.5])
        assert (np.abs(obs) <= bound[None]).all()
        quantiles = np.linspace(0.05, 0.95, 7)
        np.testing.assert_allclose(
            np.quantile(obs, quantiles, axis=0) / bound,
            np.quantile(recorded, quantiles, axis=0) / bound,
            atol=0.15,
        )

    def test_rest_at_target_by_hand(self):
        """Forces that balance the springs hold the masses at their targets."""
        x = np.array([0.5, -0.25], np.float32)
        force = np.array([2 * 2 * 0.5 + 2 * 0.25, -2 * 2 * 0.25 - 2 * 0.5])
        state = dmsd.DMSDState(
            jnp.asarray(x), jnp.zeros(2), jnp.tile(x, (2, 1)), jnp.int32(0)
        )
        new, got = dmsd.step(state, jnp.asarray(force / 30.0, jnp.float32))
        np.testing.assert_allclose(new.v, 0.0, atol=1e-7)
        np.testing.assert_array_equal(new.x, x)
        assert float(got.reward) == pytest.approx(-2 * math.log(0.01), rel=1e-6)


def test_known_ids_have_specs_and_unknown_ones_are_told():
    assert set(PURE) < set(envs.known())
    assert envs.spec_of("mujoco/Hopper-v5").obs_dim == 11
    with pytest.raises(UsageError, match="did you mean 'classic/pendulum-v0'"):
        envs.make("classic/pendulum")
    with pytest.raises(UsageError, match="unknown environment"):
        envs.spec_of("mujoco/Hoper-v5")
