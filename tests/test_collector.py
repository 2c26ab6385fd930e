"""The on-policy collector, on an environment that counts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offrl_jax.collection import Collected, on_policy_collector
from offrl_jax.envs.base import PureEnv, TimeStep
from offrl_jax.population import make_mesh, make_population, place
from offrl_jax.sources import no_data
from offrl_jax.types import Agent, Collection, Phase, Spec

SPEC = Spec(obs_dim=2, action_dim=1, horizon=5)
TERMINAL, LIMIT = 3, 5


class Counter(NamedTuple):
    """`first`: drawn at the start; `t`: steps; `ends`: whether it terminates at 3."""

    first: jax.Array
    t: jax.Array
    ends: jax.Array


def _observe(state: Counter) -> jax.Array:
    return jnp.stack([state.first, state.t.astype(jnp.float32)])


def _reset(key):
    first = jax.random.uniform(key)
    # Half of the episodes terminate after 3 steps, the others time out after 5.
    state = Counter(first, jnp.int32(0), first < 0.5)
    return state, _observe(state)


def _step(state, action):
    new = state._replace(t=state.t + 1)
    return new, TimeStep(
        obs=_observe(new),
        reward=action[0],
        terminated=new.ends & (new.t >= TERMINAL),
        truncated=new.t >= LIMIT,
        success=jnp.zeros((), bool),
    )


COUNTING = PureEnv("test/counter-v0", SPEC, _reset, _step)


def explore(key, state, obs, hyper):
    """Actions between -2 and 2, told by the time step and the agent's state."""
    del key, hyper
    return (state - obs[:, 1:]) / 2.0


def collect(rows: int, environments: int, batches: int, env: PureEnv = COUNTING):
    """Consecutive batches, as NumPy `[T, E, ...]`."""
    source = on_policy_collector(env, Collection(explore, environments))
    state = source.init(jax.random.key(0))
    found = []
    for i in range(batches):
        state, batch = source.next(
            jax.random.key(1 + i), state, jnp.float32(4.0), None, None, rows
        )
        shape = (rows // environments, environments)
        found.append(
            jax.tree.map(
                lambda x, s=shape: np.asarray(x).reshape(*s, *x.shape[1:]), batch
            )
        )
    return found


def test_every_transition_stays_in_its_episode():
    for batch in collect(28, 4, 3):
        np.testing.assert_array_equal(batch.next_obs[..., 0], batch.obs[..., 0])
        np.testing.assert_array_equal(batch.next_obs[..., 1], batch.obs[..., 1] + 1)


def test_only_terminal_states_have_discount_zero():
    batch = collect(400, 4, 1)[0]
    ends = batch.obs[..., 0] < 0.5
    after = batch.next_obs[..., 1]
    np.testing.assert_array_equal(batch.discount == 0.0, ends & (after == TERMINAL))
    assert (after == LIMIT).any() and (batch.discount[after == LIMIT] == 1.0).all()


def test_fresh_episodes_follow_ended_ones_and_batches_go_on():
    one = np.concatenate([b.obs for b in collect(28, 4, 3)])
    following = np.concatenate([b.next_obs for b in collect(28, 4, 3)])
    last = np.where(one[..., 0] < 0.5, TERMINAL, LIMIT)
    over = following[:-1, :, 1] == last[:-1]
    assert over.any()
    # Also across the borders of batches, which lie at 7 and 14.
    np.testing.assert_array_equal(one[1:][~over], following[:-1][~over])
    np.testing.assert_array_equal(one[1:][over][:, 1], 0.0)
    assert not np.any(one[1:][over][:, 0] == following[:-1][over][:, 0])


def test_next_actions_are_those_of_the_next_step():
    (batch,) = collect(80, 4, 1)
    last = np.where(batch.obs[..., 0] < 0.5, TERMINAL, LIMIT)
    going = batch.next_obs[..., 1] != last
    going[-1] = False
    np.testing.assert_array_equal(batch.has_next_action == 1.0, going)
    np.testing.assert_array_equal(
        batch.next_action[:-1][going[:-1]], batch.action[1:][going[:-1]]
    )
    assert not batch.next_action[~going].any()


def test_the_environment_gets_clipped_actions_and_the_batch_what_was_drawn():
    (batch,) = collect(40, 4, 1)
    assert batch.action.max() == 2.0
    np.testing.assert_array_equal(
        batch.reward, np.clip(batch.action[..., 0], -1.0, 1.0)
    )


def test_a_rollout_is_whole_steps_of_all_environments():
    with pytest.raises(ValueError, match="30 transitions are no rollout of 4"):
        collect(30, 4, 1)


def test_an_environments_own_renewal_is_used():
    def renewed(key, state, obs, over):
        del key
        fresh = Counter(jnp.float32(0.25), jnp.int32(0), jnp.array(True))
        return jax.tree.map(
            lambda a, b: jnp.where(over, a, b), (fresh, _observe(fresh)), (state, obs)
        )

    (batch,) = collect(80, 4, 1, COUNTING._replace(renew=renewed))
    # The first episodes are drawn; all later ones begin as told.
    later = batch.obs[10:]
    assert np.all(later[..., 0] == 0.25)


def counting_agent() -> Agent:
    """Adds up the rewards that it sees, and acts by the sum."""

    def init(key, hyper):
        del key, hyper
        return jnp.zeros(())

    def update(key, state, batch, hyper):
        del key, hyper
        assert batch.reward.shape == (8,)
        total = state + jnp.sum(batch.reward * batch.obs[:, 0])
        return total, {"total": total}

    def act(key, state, obs, hyper):
        del key, hyper
        return jnp.clip(obs[:, :1] - state, -1.0, 1.0)

    return Agent(
        init, act, (Phase("train", update, stride=8),), 1, Collection(explore, 4)
    )


@pytest.mark.parametrize("devices", [1, 2])
def test_a_population_collects_and_goes_on_bit_for_bit(devices: int):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    agent = counting_agent()
    assert agent.collection is not None
    source = on_policy_collector(COUNTING, agent.collection)

    def run(*pieces: int):
        population = make_population(
            agent, source, 3, make_mesh(jax.devices()[:devices])
        )
        hyper = {"unused": np.zeros(3, np.float32)}
        table, task, hyper = place(population, no_data(SPEC), np.zeros(3), hyper)
        state = population.init(np.arange(3), {"unused": np.zeros(3, np.float32)})
        for updates in pieces:
            state, _ = population.run[0](state, table, task, hyper, updates)
        return state

    whole, pieces = run(80), run(24, 56)
    assert isinstance(whole.source, Collected)
    for x, y in zip(
        jax.tree.leaves((whole.agent, whole.source, whole.step)),
        jax.tree.leaves((pieces.agent, pieces.source, pieces.step)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    assert np.asarray(whole.step)[0] == 80
    assert len(set(np.asarray(whole.agent)[:3].tolist())) == 3
