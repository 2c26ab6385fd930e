"""The metrics of one update, recomputed in float64 NumPy from the initial parameters.

Learning rates are so small that no parameter moves, and there is no target noise, so
that each metric is a plain function of the initial parameters and the batch.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.stats
import toy_mdps
from toy_mdps import forward

from offrl_jax.agents import registry
from offrl_jax.agents.entry import resolve

pytestmark = pytest.mark.little_optimised

STILL = 1e-30


def first_update(name: str, **settings):
    entry = registry.get_entry(name)
    overrides = toy_mdps.TINY | {"batch_size": 96} | settings
    config, hyper = resolve(entry, family="toy", preset=None, overrides=overrides)
    agent = entry.make(config, toy_mdps.SPEC)
    hyper = toy_mdps.as_arrays(hyper)
    phase = agent.phases[-1]
    batch = jax.tree.map(lambda x: x[: 96 * phase.stride], toy_mdps.random_data())

    def run(key, batch, hyper):
        state = agent.init(key, hyper)
        return state, *phase.update(key, state, batch, hyper)

    state, after, metrics = jax.jit(run)(jax.random.key(0), batch, hyper)
    numbers = [np.asarray(x, np.float64) for x in batch]
    got = {k: float(v) for k, v in metrics.items()}
    return state, after, type(batch)(*numbers), got


def mlp(params) -> dict:
    return params["params"]["MLP_0"]


def critic_values(state, obs, action, layer_norm=False, field="critics"):
    x = np.concatenate([obs, action], -1)
    return np.stack(
        [forward(mlp(p), x, layer_norm)[:, 0] for p in getattr(state, field)]
    )


def close(got: float, want: float) -> None:
    assert got == pytest.approx(want, rel=2e-4, abs=1e-6)


def test_td3_bc():
    state, after, batch, got = first_update(
        "td3_bc",
        actor_lr=STILL,
        critic_lr=STILL,
        policy_noise=0.0,
        discount=0.9,
        alpha=1.7,
        policy_delay=2,
    )
    next_action = np.tanh(forward(mlp(state.actor), batch.next_obs))
    next_q = critic_values(state, batch.next_obs, next_action).min(0)
    y = batch.reward + 0.9 * batch.discount * next_q
    q = critic_values(state, batch.obs, batch.action)
    close(got["critic_loss"], ((q - y) ** 2).mean(1).sum())
    close(got["q_mean"], q[0].mean())
    # The actor learns from the last of the two minibatches.
    obs, action = batch.obs[96:], batch.action[96:]
    pi = np.tanh(forward(mlp(state.actor), obs))
    q_pi = critic_values(state, obs, pi)[0]
    cloning = ((pi - action) ** 2).mean()
    close(got["cloning_loss"], cloning)
    close(got["actor_loss"], cloning - 1.7 / np.abs(q_pi).mean() * q_pi.mean())
    assert int(after.actor_opt.count) == 1
    np.testing.assert_array_equal(after.critic_opt.count, 2)


def test_rebrac():
    state, after, batch, got = first_update(
        "rebrac",
        actor_lr=STILL,
        critic_lr=STILL,
        policy_noise=0.0,
        discount=0.9,
        actor_penalty=0.3,
        critic_penalty=0.7,
        policy_delay=3,
    )
    next_action = np.tanh(forward(mlp(state.actor), batch.next_obs))
    next_q = critic_values(state, batch.next_obs, next_action, True).min(0)
    distance = ((next_action - batch.next_action) ** 2).sum(-1)
    next_q = next_q - 0.7 * batch.has_next_action * distance
    y = batch.reward + 0.9 * batch.discount * next_q
    q = critic_values(state, batch.obs, batch.action, True)
    close(got["critic_loss"], ((q - y) ** 2).mean(1).sum())
    obs, action = batch.obs[192:], batch.action[192:]
    pi = np.tanh(forward(mlp(state.actor), obs))
    q_pi = critic_values(state, obs, pi, True).min(0)
    cloning = ((pi - action) ** 2).sum(-1).mean()
    close(got["actor_loss"], 0.3 * cloning - q_pi.mean() / np.abs(q_pi).mean())
    np.testing.assert_array_equal(after.critic_opt.count, 3)


def test_iql():
    state, _, batch, got = first_update(
        "iql",
        actor_lr=STILL,
        critic_lr=STILL,
        value_lr=STILL,
        discount=0.9,
        expectile=0.8,
        beta=2.0,
    )
    q = critic_values(state, batch.obs, batch.action, field="target_critics").min(0)
    v = forward(mlp(state.value), batch.obs)[:, 0]
    u = q - v
    close(got["value_loss"], (np.where(u < 0, 0.2, 0.8) * u**2).mean())
    weight = np.minimum(np.exp(2.0 * u), 100.0)
    close(got["weight_mean"], weight.mean())
    pi = np.tanh(forward(mlp(state.actor), batch.obs))
    log_prob = -0.5 * ((batch.action - pi) ** 2 + np.log(2 * np.pi)).sum(-1)
    close(got["actor_loss"], -(weight * log_prob).mean())
    next_v = forward(mlp(state.value), batch.next_obs)[:, 0]
    y = batch.reward + 0.9 * batch.discount * next_v
    online = critic_values(state, batch.obs, batch.action)
    close(got["critic_loss"], ((online - y) ** 2).mean(1).sum())


def test_iql_actor_stops_at_the_end_of_its_schedule():
    data, key = toy_mdps.random_data(), jax.random.key(1)
    it = toy_mdps.lab("iql")
    hyper = it.hyper.replace(actor_decay_updates=toy_mdps.as_arrays(3.0))
    state = it.train(it.init(jax.random.key(0), hyper), key, data, hyper, 0, 3)
    later = it.train(state, key, data, hyper, 3, 6)
    for x, y in zip(
        jax.tree.leaves(state.actor), jax.tree.leaves(later.actor), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    assert float(later.updates) == 6.0


def test_bc():
    state, _, batch, got = first_update("bc", lr=STILL)
    pi = np.tanh(forward(mlp(state.actor), batch.obs))
    close(got["actor_loss"], ((pi - batch.action) ** 2).mean())


def test_gaussian_bc():
    """Change of variables by hand: log N(atanh a) - log(1 - a^2)."""
    state, _, batch, got = first_update(
        "gaussian_bc", lr=STILL, log_std_min=-4.0, log_std_max=1.0
    )
    mean, raw = np.split(forward(mlp(state.actor), batch.obs), 2, axis=-1)
    std = np.exp(-4.0 + 2.5 * (np.tanh(raw) + 1.0))
    log_normal = scipy.stats.norm.logpdf(np.arctanh(batch.action), mean, std)
    log_prob = (log_normal - np.log1p(-(batch.action**2))).sum(-1)
    close(got["actor_loss"], -log_prob.mean())
    close(got["std_before_tanh"], std.mean())


def test_targets_are_constant_within_a_stride_and_move_once():
    state, after, _, _ = first_update("td3_bc", tau=0.25, policy_delay=2)
    for target, online, moved in zip(
        jax.tree.leaves(state.target_critics),
        jax.tree.leaves(after.critics),
        jax.tree.leaves(after.target_critics),
        strict=True,
    ):
        want = 0.75 * np.asarray(target) + 0.25 * np.asarray(online)
        np.testing.assert_allclose(moved, want, rtol=1e-5, atol=1e-7)
