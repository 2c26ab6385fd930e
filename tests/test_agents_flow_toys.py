"""Flow agents solve problems whose answers are known on paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_mdps

from offrl_jax import flows, networks
from offrl_jax.agents import registry
from offrl_jax.agents.entry import resolve
from offrl_jax.types import Transitions


def trained(name: str, data: Transitions, calls: int, **changes):
    """The agent and its state after `calls` updates on `data`, as in `toy_mdps`."""
    entry = registry.get_entry(name)
    overrides = {"hidden": (32, 32), "batch_size": 64, "flow_steps": 5} | changes
    config, hyper = resolve(entry, family="toy", preset=None, overrides=overrides)
    agent, hyper = entry.make(config, toy_mdps.SPEC), toy_mdps.as_arrays(hyper)

    @jax.jit
    def run(state, data, hyper):
        def one(i, state):
            rows_key, key = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
            rows = jax.random.randint(rows_key, (64,), 0, toy_mdps.N)
            batch = jax.tree.map(lambda x: x[rows], data)
            return agent.phases[-1].update(key, state, batch, hyper)[0]

        return jax.lax.fori_loop(0, calls, one, state)

    return agent, hyper, run(agent.init(jax.random.key(0), hyper), data, hyper)


def actions(agent, hyper, state, count: int = 512) -> np.ndarray:
    got = jax.jit(agent.act)(jax.random.key(7), state, jnp.ones((count, 2)), hyper)
    return np.asarray(got)[:, 0]


def test_flow_bc_hits_both_modes_where_a_gaussian_cannot():
    """-0.5 in 70 % and +0.5 in 30 % of the data: the Gaussian of their mean and spread,
    which is the likeliest one, puts most of its mass where there are none."""
    data = toy_mdps.two_point_bandit()
    agent, hyper, state = trained("flow_bc", data, 2500, lr=2e-3, flow_steps=10)
    found = actions(agent, hyper, state)
    near = np.minimum(np.abs(found - 0.5), np.abs(found + 0.5))
    assert (near < 0.2).mean() > 0.85
    assert (found > 0).mean() == pytest.approx(0.3, abs=0.1)
    spread = np.sqrt(0.25 - 0.2**2)
    gaussian = -0.2 + spread * np.random.default_rng(0).normal(size=4000)
    near = np.minimum(np.abs(gaussian - 0.5), np.abs(gaussian + 0.5))
    assert (near < 0.2).mean() < 0.5


RATES = {"flow_lr": 2e-3, "critic_lr": 3e-3, "tau": 0.05}


def test_ifql_chooses_the_good_mode():
    data = toy_mdps.two_point_bandit()
    agent, hyper, state = trained(
        "ifql", data, 1500, value_lr=3e-3, candidates=16, **RATES
    )
    assert (actions(agent, hyper, state) > 0.25).mean() > 0.95


def test_fql_goes_to_the_best_action_or_stays_with_the_data():
    """Reward 1 - (a - 0.5)^2, uniform data: 0.5 for a small alpha; for a large one
    much of the spread of the data, around their mean."""
    data = toy_mdps.uniform_bandit()
    rates = RATES | {"actor_lr": 2e-3}
    found = actions(*trained("fql", data, 1500, alpha=0.01, **rates))
    assert found.mean() == pytest.approx(0.5, abs=0.1) and found.std() < 0.15
    found = actions(*trained("fql", data, 1500, alpha=100.0, **rates))
    assert found.mean() == pytest.approx(0.0, abs=0.15) and found.std() > 0.35


@pytest.mark.parametrize("name", ["deflow", "fidec"])
def test_penalty_settles_at_its_budget(name):
    """The mean square displacement of the evaluated policy is what was asked for, and
    it goes towards higher values."""
    data = toy_mdps.uniform_bandit()
    _, _, state = trained(
        name,
        data,
        3000,
        budget=0.01,
        multiplier=5.0,
        multiplier_lr=1e-2,
        actor_lr=2e-3,
        normalise_q=False,
        clip_gradients=False,
        **RATES,
    )
    noise = jax.random.normal(jax.random.key(5), (2048, 1))
    obs = jnp.ones((2048, 2))
    velocity_net = flows.Velocity((32, 32), 1)
    field = flows.field_of(velocity_net, state.flow, obs)
    base = flows.sample(field, noise, 5)
    delta = networks.apply(flows.ActionMap((32, 32), 1), state.actor, obs, base)
    assert float(jnp.mean(delta**2)) == pytest.approx(0.01, rel=0.35)
    before = float(jnp.mean((base - 0.5) ** 2))
    after = float(jnp.mean((jnp.clip(base + delta, -1, 1) - 0.5) ** 2))
    assert after < before - 0.03
