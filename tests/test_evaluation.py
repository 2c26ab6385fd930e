"""Evaluation against plain loops, on an environment whose every number is known."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offrl_jax import envs, evaluation
from offrl_jax.envs.base import PureEnv, TimeStep
from offrl_jax.evaluation import Evaluator
from offrl_jax.population import make_mesh
from offrl_jax.types import ObsStats, Spec

HORIZON = 12


class Walk(NamedTuple):
    position: jax.Array
    drift: jax.Array
    t: jax.Array


def _reset(key):
    drift_key, position_key = jax.random.split(key)
    position = jax.random.uniform(position_key)
    drift = jax.random.uniform(drift_key, minval=0.05, maxval=0.5)
    state = Walk(position, drift, jnp.zeros((), jnp.int32))
    return state, jnp.stack([position, drift])


def _step(state, action):
    position = state.position + state.drift + action[0]
    after = Walk(position, state.drift, state.t + 1)
    step = TimeStep(
        obs=jnp.stack([position, state.drift]),
        reward=position,
        terminated=position > 3.0,
        truncated=after.t >= HORIZON,
        success=(position > 1.0) & (position < 1.2),
    )
    return after, step


WALK = PureEnv("walk", Spec(2, 1, HORIZON), _reset, _step, has_success=True)


class HostWalk:
    """The same environment outside of jit; refuses actions that are not finite."""

    name = "walk"
    spec = WALK.spec
    has_success = True
    versions: dict[str, str] = {}  # noqa: RUF012
    max_batch = 1000

    def __init__(self) -> None:
        self.resets: list[int] = []

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        self.resets.append(len(seeds))
        keys = [jax.random.fold_in(jax.random.key(seed), 0) for seed in seeds]
        made = [jax.jit(_reset)(key) for key in keys]
        self.states = [state for state, _ in made]
        return np.stack([np.asarray(obs) for _, obs in made])

    def step(self, action: np.ndarray, active: np.ndarray) -> TimeStep:
        assert np.isfinite(action[active]).all()
        steps = []
        for i, on in enumerate(active):
            if on:
                self.states[i], step = jax.jit(_step)(self.states[i], action[i])
                steps.append(jax.tree.map(np.asarray, step))
            else:
                last = self.states[i]
                obs = np.asarray([last.position, last.drift])
                steps.append(TimeStep(obs, 1e9, False, False, False))
        return TimeStep(*(np.stack(leaf) for leaf in zip(*steps, strict=True)))

    def close(self) -> None:
        pass


def act(key, state, obs, hyper):
    """A noisy linear policy with gain `state` and noise `hyper`."""
    noise = hyper * jax.random.normal(key, (obs.shape[0], 1))
    return jnp.clip(state * obs[:, :1] + noise, -1.0, 1.0)


def stats_of(members: int) -> ObsStats:
    mean: Any = np.tile(np.float32([0.5, 0.0]), (members, 1))
    std: Any = np.tile(np.float32([2.0, 1.0]), (members, 1))
    return ObsStats(mean, std)


def evaluate(env, gains, *, noise=0.0, episodes=7, seeds=None, devices=2, **options):
    members = len(gains)
    evaluator = Evaluator(act, env, episodes, make_mesh(jax.local_devices()[:devices]))
    return evaluator(
        np.float32(gains),
        np.full(members, noise, np.float32),
        stats_of(members),
        np.arange(members) if seeds is None else np.asarray(seeds),
        0,
        **options,
    )


def by_hand(gain: float, episode_seeds: np.ndarray) -> list[tuple[float, int, bool]]:
    """One member's episodes in float64 with a plain loop, no noise."""
    outcomes = []
    for seed in episode_seeds:
        state, _ = _reset(jax.random.fold_in(jax.random.key(seed), 0))
        position, drift = float(state.position), float(state.drift)
        total, length, success = 0.0, 0, False
        for _ in range(HORIZON):
            action = np.clip(gain * (position - 0.5) / 2.0, -1, 1)
            position += drift + action
            total += position
            length += 1
            success |= 1.0 < position < 1.2
            if position > 3.0:
                break
        outcomes.append((total, length, success))
    return outcomes


def test_pure_episodes_equal_a_plain_loop():
    gains = [0.0, 0.4, -0.3]
    found = evaluate(WALK, gains)
    seeds = evaluation._episode_seeds(0, np.arange(3), 7)
    for member, gain in enumerate(gains):
        want = by_hand(gain, seeds[member])
        np.testing.assert_allclose(
            found.returns[member], [w[0] for w in want], rtol=1e-5
        )
        assert found.lengths[member].tolist() == [w[1] for w in want]
        assert found.successes[member].tolist() == [w[2] for w in want]
    # The case is of no use unless some episodes end early, some do not, some succeed.
    assert 1 < found.lengths.min() < found.lengths.max() == HORIZON
    assert found.successes.any() and not found.successes.all()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_host_episodes_equal_pure_ones(noise):
    pure = evaluate(WALK, [0.0, 0.4, -0.3], noise=noise, episodes=3)
    host = evaluate(HostWalk(), [0.0, 0.4, -0.3], noise=noise, episodes=3)
    np.testing.assert_allclose(host.returns, pure.returns, rtol=1e-5)
    np.testing.assert_array_equal(host.lengths, pure.lengths)
    np.testing.assert_array_equal(host.successes, pure.successes)


def test_episodes_do_not_depend_on_who_is_evaluated_beside():
    many = evaluate(WALK, [0.1, 0.4, -0.3, 0.2], noise=0.3, seeds=[3, 9, 5, 1])
    one = evaluate(WALK, [0.4], noise=0.3, seeds=[9], devices=1)
    np.testing.assert_allclose(many.returns[1], one.returns[0], rtol=1e-5)
    whole = evaluate(HostWalk(), [0.4, 0.1], noise=0.3, episodes=5)
    env = HostWalk()
    env.max_batch = 4
    sliced = evaluate(env, [0.4, 0.1], noise=0.3, episodes=5)
    assert env.resets == [4, 4, 2]
    np.testing.assert_allclose(sliced.returns, whole.returns, rtol=1e-5)


def test_seeds_matter():
    same = evaluate(WALK, [0.1, 0.1], seeds=[3, 4])
    assert not np.array_equal(same.returns[0], same.returns[1])
    assert len(np.unique(same.returns[0])) == 7


def test_unhealthy_members_are_not_simulated():
    """The host environment asserts that it never sees their NaN actions."""
    found = evaluate(
        HostWalk(), [0.2, np.nan, 0.1], episodes=2, healthy=np.array([1, 0, 1], bool)
    )
    want = evaluate(WALK, [0.2, 0.2, 0.1], episodes=2)
    np.testing.assert_allclose(found.returns[[0, 2]], want.returns[[0, 2]], rtol=1e-5)
    assert (found.lengths[1] == 0).all()


def test_random_torques_score_as_gymnasium_says():
    """A policy of pure noise on our pendulum against gymnasium's own, statistically."""
    import gymnasium

    members, episodes = 4, 25
    evaluator = Evaluator(
        lambda key, state, obs, hyper: jax.random.uniform(
            key, (obs.shape[0], 1), minval=-1.0, maxval=1.0
        ),
        envs.make("classic/pendulum-v0"),
        episodes,
    )
    stats: Any = ObsStats(
        np.zeros((members, 3), np.float32),  # type: ignore[arg-type]
        np.ones((members, 3), np.float32),  # type: ignore[arg-type]
    )
    zeros = np.zeros(members, np.float32)
    ours = evaluator(zeros, zeros, stats, np.arange(members), 0).returns.ravel()
    env = gymnasium.make("Pendulum-v1")
    rng = np.random.default_rng(0)
    theirs = []
    for seed in range(100):
        env.reset(seed=seed)
        theirs.append(
            sum(
                env.step(rng.uniform(-2, 2, 1).astype(np.float32))[1]
                for _ in range(200)
            )
        )
    error = np.sqrt(np.var(ours) / len(ours) + np.var(theirs) / len(theirs))
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * error
    assert evaluator.env.has_success is False


def test_needs_an_episode():
    with pytest.raises(ValueError, match="at least one episode"):
        Evaluator(act, WALK, 0)
