"""The bridge against plain loops over Gymnasium environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from offrl_jax import envs
from offrl_jax.envs.gymnasium_bridge import GymnasiumEnv
from offrl_jax.errors import UsageError
from offrl_jax.types import Spec


class Walk(gymnasium.Env):
    """A walk on a line with asymmetric bounds; ends at 3, which is a success.

    Args:
      observation_space: what it declares.
      action_space: what it declares.
      wrap: puts the observation into a dict, as goal-conditioned tasks do.
    """

    def __init__(self, observation_space=None, action_space=None, wrap=False):
        line = spaces.Box(-10.0, 10.0, (2,))
        self._wrap = wrap
        if observation_space is None:
            both = spaces.Dict({"observation": line, "desired_goal": line})
            observation_space = both if wrap else line
        if action_space is None:
            action_space = spaces.Box(np.float32([-0.5, 0.0]), np.float32([1.0, 4.0]))
        self.observation_space, self.action_space = observation_space, action_space

    def _observe(self):
        obs = np.array([self.x, self.t], np.float32)
        return {"observation": obs, "desired_goal": obs + 1} if self._wrap else obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.x, self.t = float(self.np_random.uniform(-1, 1)), 0
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.x, self.t = self.x + float(action.sum()) / 4, self.t + 1
        done = self.x >= 3
        return self._observe(), self.x / 3, done, False, {"is_success": done}


def register(name: str, monkeypatch, horizon: int | None = 12, **kwargs) -> str:
    env_id = f"OffrlTest/{name}-v0"
    registry = dict(gymnasium.registry)
    monkeypatch.setattr("gymnasium.envs.registration.registry", registry)
    gymnasium.register(
        env_id,
        entry_point=lambda **k: Walk(**k),
        max_episode_steps=horizon,
        kwargs=kwargs,
        disable_env_checker=True,
    )
    return env_id


def test_pendulum_is_a_plain_loop():
    env = envs.make("gymnasium/Pendulum-v1")
    assert isinstance(env, GymnasiumEnv)
    assert env.spec == envs.spec_of("classic/pendulum-v0")
    assert not env.has_success
    assert env.versions["gymnasium"] == gymnasium.__version__
    seeds = np.array([5, 0])
    loops = [gymnasium.make("Pendulum-v1") for _ in seeds]
    rng = np.random.default_rng(0)
    for _ in range(2):  # The second batch re-uses the instances of the first.
        starts = [e.reset(seed=int(s))[0] for e, s in zip(loops, seeds, strict=True)]
        np.testing.assert_array_equal(env.reset(seeds), starts)
        for t in range(200):
            action = rng.uniform(-1, 1, (2, 1)).astype(np.float32)
            got = env.step(action, np.ones(2, bool))
            for i, loop in enumerate(loops):
                obs, *rest, _ = loop.step(2 * action[i])
                np.testing.assert_array_equal(got.obs[i], obs)
                assert rest == [got.reward[i], got.terminated[i], got.truncated[i]]
            assert got.truncated.all() == (t == 199)
        seeds = seeds + 1
    env.close()


@pytest.mark.parametrize("wrap", [False, True])
def test_scaling_success_and_first_episode_only(wrap: bool, monkeypatch):
    env = GymnasiumEnv(register("Walk", monkeypatch, wrap=wrap))
    assert env.spec == Spec(obs_dim=2, action_dim=2, horizon=12)
    assert env.has_success
    start = env.reset(np.arange(3))
    # -1, 0 and 1 mean (-0.5, 0), (0.25, 2) and (1, 4): by hand from the bounds.
    action = np.array([[-1, -1], [0, 0], [9, 1]], np.float32)
    active, x, ended = np.ones(3, bool), start[:, 0].astype(float), []
    for t in range(1, 13):
        got = env.step(action, active)
        x += np.where(active, [-0.125, 0.5625, 1.25], 0.0)
        np.testing.assert_allclose(got.obs[:, 0], x, atol=1e-6)
        np.testing.assert_allclose(got.reward, np.where(active, x / 3, 0), atol=1e-6)
        np.testing.assert_array_equal(got.terminated, active & (x >= 3))
        np.testing.assert_array_equal(got.success, got.terminated)
        np.testing.assert_array_equal(got.truncated, active & (t == 12))
        with_end = got.terminated | got.truncated
        ended += [(int(i), t) for i in np.flatnonzero(with_end)]
        active &= ~with_end
        if with_end.any() and t < 12:
            with pytest.raises(ValueError, match="has ended"):
                env.step(action, np.ones(3, bool))
    assert dict(ended)[0] == 12 and dict(ended)[2] < dict(ended)[1] < 12
    env.close()


def test_same_seed_same_episode_in_any_batch(monkeypatch):
    env = GymnasiumEnv(register("Again", monkeypatch))
    first = env.reset(np.array([7, 8, 9]))
    np.testing.assert_array_equal(env.reset(np.array([9, 7])), first[[2, 0]])
    assert len(np.unique(first[:, 0])) == 3
    with pytest.raises(ValueError, match="for 2 episodes"):
        env.step(np.zeros((3, 2)), np.ones(3, bool))
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "horizon", "message"),
    [
        (
            {"action_space": spaces.Discrete(3)},
            12,
            "discrete actions are not supported",
        ),
        ({"action_space": spaces.Box(-np.inf, 1.0, (2,))}, 12, "unbounded actions"),
        ({"action_space": spaces.Box(-1.0, 1.0, (2, 2))}, 12, "one-dimensional Box"),
        ({"observation_space": spaces.Box(0, 1, (8, 8))}, 12, "one-dimensional Box"),
        ({"observation_space": spaces.Discrete(4)}, 12, "observes Discrete"),
        ({"observation_space": spaces.Dict({})}, 12, "under 'observation'"),
        ({}, None, "no time limit"),
    ],
)
def test_environments_of_another_kind_are_refused(
    kwargs, horizon, message, monkeypatch
):
    env_id = register("Odd", monkeypatch, horizon=horizon, **kwargs)
    with pytest.raises(UsageError, match=message) as caught:
        envs.make(f"gymnasium/{env_id}")
    assert env_id in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("env_id", ["NoSuchThing-v0", "no_such_module:Thing-v0"])
def test_unknown_ids_are_told(env_id: str):
    with pytest.raises(UsageError, match=f"cannot make '{env_id}'") as caught:
        envs.spec_of(f"gymnasium/{env_id}")
    assert "\n" not in str(caught.value)
