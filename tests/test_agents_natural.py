"""Steps of policies against each other and against what is known of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offrl_jax import fisher
from offrl_jax.agents import optim
from offrl_jax.agents.actor_critic import Experience
from offrl_jax.agents.entry import resolve
from offrl_jax.agents.registry import REGISTRY
from offrl_jax.errors import UsageError
from offrl_jax.types import Spec, Transitions

pytestmark = pytest.mark.little_optimised

SPECS = {"gaussian": Spec(3, 2, 10), "softmax": Spec(3, 4, 10, discrete=True)}
TINY = {"hidden": (8,), "environments": 4, "steps": 16}


@pytest.fixture(params=sorted(SPECS))
def spec(request) -> Spec:
    return SPECS[request.param]


def moved(name: str, spec: Spec, **settings):
    """`(policy before, policy after, observations, metrics)` of one update."""
    entry = REGISTRY[name]
    config, hyper = resolve(
        entry, family="", preset=None, overrides={**TINY, **settings}
    )
    agent = entry.make(config, spec)
    hyper = jax.tree.map(jnp.float32, hyper)
    state = agent.init(jax.random.key(0), hyper)
    # Away from the nearly uniform policy of the start.
    keys = iter(jax.random.split(jax.random.key(1), 20))
    actor = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), state.actor
    )
    state = dataclasses.replace(state, actor=actor)
    rows = agent.phases[0].stride
    obs = jax.random.normal(jax.random.key(2), (rows, spec.obs_dim))
    assert agent.collection is not None
    action = agent.collection.explore(jax.random.key(3), state, obs, hyper)
    reward = jnp.sin(3.0 * obs[:, 0]) * action[:, 0]
    ends = jnp.zeros(rows)
    batch = Transitions(obs, action, reward, ends, obs, action, ends)
    update = jax.jit(agent.phases[0].update)
    after, metrics = update(jax.random.key(4), state, batch, hyper)
    return actor, after.actor, obs, metrics


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def step(name: str, spec: Spec, **settings) -> np.ndarray:
    before, after, _, _ = moved(name, spec, **settings)
    return flat(after) - flat(before)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def plain(spec: Spec, lr: float = 0.01) -> np.ndarray:
    return step("a2c", spec, optimiser="sgd", actor_lr=lr)


@pytest.mark.parametrize("name", ["rank1_ac", "woodbury_ac"])
def test_a_large_damping_is_plain_sgd_at_the_same_rate(name, spec):
    got = step(name, spec, actor_lr=0.01, damping=1e8)
    np.testing.assert_allclose(got, plain(spec), rtol=1e-4, atol=1e-6)


def test_one_score_of_woodbury_is_rank_1(spec):
    settings = {"actor_lr": 0.01, "damping": 0.1}
    one = step("woodbury_ac", spec, samples=1, **settings)
    fresh = step("rank1_ac", spec, vector="fresh", **settings)
    np.testing.assert_allclose(one, fresh, rtol=1e-3, atol=1e-6)
    assert cosine(fresh, plain(spec)) < 0.9999, "the score takes something"


def test_a_score_that_is_the_gradient_only_shortens_the_step(spec):
    got = step("rank1_ac", spec, vector="gradient", actor_lr=0.01, damping=0.1)
    assert cosine(got, plain(spec)) > 1.0 - 1e-5
    assert np.linalg.norm(got) < np.linalg.norm(plain(spec))


@pytest.mark.parametrize("vector", ["pair", "left_out", "fresh", "mean", "average"])
def test_other_scores_turn_the_step(vector, spec):
    got = step("rank1_ac", spec, vector=vector, actor_lr=0.01, damping=1e-3)
    assert 0.0 < cosine(got, plain(spec)) < 1.0 - 1e-6


def test_normalised_steps_have_the_rates_length(spec):
    got = step("a2c", spec, optimiser="normalised_sgd", actor_lr=0.01, damping=0.0)
    assert np.linalg.norm(got) == pytest.approx(0.01, rel=1e-4)
    assert cosine(got, plain(spec)) > 1.0 - 1e-5


def test_the_exact_trust_region_costs_the_kl_it_was_given(spec):
    """To second order; the step is short enough for the third to be small."""
    settings = {"kl": 1e-5, "damping": 1e-4, "actor_lr": 1e3}
    *_, metrics = moved("npg_full", spec, **settings)
    assert float(metrics["kl"]) == pytest.approx(1e-5, rel=0.1)


def test_conjugate_gradients_and_the_dense_solve_agree_on_the_direction(spec):
    settings = {"kl": 1e-4, "damping": 0.1}
    searched = step("trpo", spec, iterations=60, **settings)
    dense = step("npg_full", spec, **settings, actor_lr=1e3)
    # TRPO's advantages are normalised and its surrogate has the same gradient.
    assert cosine(searched, dense) > 0.999
    # The line search accepts the first or a shorter length.
    assert np.linalg.norm(searched) < 1.1 * np.linalg.norm(dense)


@pytest.mark.parametrize("kl", [1e-3, 0.1])
def test_trpo_keeps_the_kl_and_raises_the_surrogate(kl, spec):
    *_, metrics = moved("trpo", spec, kl=kl)
    assert float(metrics["kl"]) <= kl * 1.0001
    assert float(metrics["accepted"]) == 1.0


def test_kronecker_factors_are_nearer_to_the_full_gradient_than_plain_steps(spec):
    settings = {"kl": 1e-4, "damping": 1e-3, "actor_lr": 1e3}
    full = step("npg_full", spec, **settings)
    factored = step("acktr", spec, **settings)
    assert cosine(factored, full) > cosine(plain(spec), full) + 0.1


def test_ppo_is_clipped_from_above_for_good_actions():
    """Two epochs from the same start: with a clip of nearly nothing the second one
    moves the policy only by Adam's momentum, so it goes less far than unclipped."""
    far = step("ppo", SPECS["gaussian"], epochs=6, batches=1, actor_lr=0.01, clip=100.0)
    near = step("ppo", SPECS["gaussian"], epochs=6, batches=1, actor_lr=0.01, clip=1e-4)
    assert np.linalg.norm(near) < 0.95 * np.linalg.norm(far)


def test_trpo_takes_the_longest_step_that_is_good(spec):
    """Recomputed: the accepted step raises the surrogate within the KL, and where the
    search went back, the step before it did not."""
    from offrl_jax.agents import trpo

    config = trpo.Config(**{**TINY, "iterations": 10})
    hyper = jax.tree.map(jnp.float32, trpo.Hyper(actor_lr=5.0, backtrack=0.6))
    own = trpo.policy_step(config, spec)
    actor = own.policy.init(jax.random.key(0), hyper)
    obs = jax.random.normal(jax.random.key(1), (64, spec.obs_dim))
    action = own.policy.sample(jax.random.key(2), actor, obs)
    advantage = jnp.sin(3.0 * obs[:, 0]) * action[:, 0]
    given = Experience(obs, action, advantage)
    after, _, metrics = own.improve(jax.random.key(3), actor, (), given, hyper)
    old = own.policy.log_prob(actor, obs, action)

    def is_good(params) -> bool:
        ratio = jnp.exp(own.policy.log_prob(params, obs, action) - old)
        kl = jnp.mean(own.policy.divergence(actor, params, obs))
        return bool(jnp.mean(ratio * advantage) > jnp.mean(advantage)) and bool(
            kl <= hyper.kl
        )

    assert is_good(after)
    longer = jax.tree.map(lambda a, b: a + (b - a) / 0.6, actor, after)
    assert float(metrics["accepted"]) == 1.0
    assert not is_good(longer), "five times too long at first: the search went back"


def test_what_is_left_out_is_the_pairs_own_term(spec):
    """With hardly any weight on v, the step is that of all other rows."""
    from offrl_jax.agents import actor_critic, rank1_ac

    config = rank1_ac.Config(**TINY, vector="left_out")
    hyper = jax.tree.map(jnp.float32, rank1_ac.Hyper(actor_lr=0.01, damping=1e8))
    own = rank1_ac.policy_step(config, spec)
    actor = own.policy.init(jax.random.key(0), hyper)
    obs = jax.random.normal(jax.random.key(1), (64, spec.obs_dim))
    action = own.policy.sample(jax.random.key(2), actor, obs)
    advantage = jax.random.normal(jax.random.key(5), (64,))
    key = jax.random.key(3)
    given = Experience(obs, action, advantage)
    after, *_ = own.improve(key, actor, own.init_opt(actor), given, hyper)
    moved_by = flat(after) - flat(actor)

    def without(j: int) -> np.ndarray:
        keep = np.delete(np.arange(64), j)
        rest = Experience(*(x[keep] for x in given))
        grads = jax.grad(actor_critic.objective, argnums=1)(
            own.policy, actor, rest, jnp.float32(0.0)
        )
        return -0.01 * flat(grads)

    nearest = min(np.abs(moved_by - without(j)).max() for j in range(64))
    assert nearest < 1e-5 * np.abs(moved_by).max() + 1e-7


@pytest.mark.parametrize(
    ("name", "setting"), [("ppo", "batches"), ("a2c", "critic_batches")]
)
def test_more_minibatches_than_transitions_are_told(name, setting, spec):
    entry = REGISTRY[name]
    overrides = {**TINY, setting: 65}
    config, _ = resolve(entry, family="", preset=None, overrides=overrides)
    with pytest.raises(UsageError, match=f"'{setting}' of .* is 65.* only 64"):
        entry.make(config, spec)


def linear(params, obs):
    """A Gaussian policy with mean `obs W` and a free log standard deviation."""
    mean = obs @ params["w"]
    return mean, jnp.broadcast_to(params["log_std"], mean.shape)


LINEAR = {"w": jnp.array([[0.5], [-1.0]]), "log_std": jnp.array([0.3])}
GRADS = {"w": jnp.array([[1.0], [2.0]]), "log_std": jnp.array([-1.0])}


def offline_step(rule: str, damping: float, obs):
    state = optim.actor_init(rule, LINEAR)
    after, _ = optim.actor_step(
        rule, jax.random.key(0), linear, obs, GRADS, state, LINEAR, 0.1, damping
    )
    return (flat(after) - flat(LINEAR)) / -0.1


def test_the_plain_rule_follows_the_gradient():
    obs = jnp.array([[1.0, 2.0]])
    np.testing.assert_allclose(offline_step("sgd", 0.1, obs), flat(GRADS), rtol=1e-5)


def test_the_offline_score_is_that_of_a_drawn_action():
    """Of N(s W, sigma^2) the score for W is (z / sigma) s, z a standard normal: what is
    taken from W lies along s, and with hardly any damping nothing is left along v."""
    obs = jnp.array([[1.0, 2.0]])
    direction = offline_step("rank1", 1e-7, obs)
    taken = flat(GRADS) - direction
    assert np.linalg.norm(taken) > 1e-2
    # Leaves in the order of their names: log_std, then W.
    assert taken[1:] @ np.array([2.0, -1.0]) == pytest.approx(0.0, abs=1e-4)
    assert abs(taken @ direction) < 1e-4 * np.linalg.norm(taken)


def test_a_large_offline_damping_is_the_plain_rule():
    obs = jax.random.normal(jax.random.key(1), (32, 2))
    far = offline_step("rank1", 1e8, obs)
    np.testing.assert_allclose(far, flat(GRADS), rtol=1e-5)
    assert not np.allclose(offline_step("rank1", 1e-3, obs), flat(GRADS), rtol=1e-3)


def test_rank1_iql_is_iql_with_another_step():
    """Critics and value do not know how the policy moves."""
    import toy_mdps

    data = toy_mdps.random_data()
    states = {}
    for name in ("iql", "rank1_iql"):
        it = toy_mdps.lab(name)
        state = it.init(jax.random.key(0), it.hyper)
        states[name] = it.train(state, jax.random.key(1), data, it.hyper, 0, 5)
    a, b = states["iql"], states["rank1_iql"]
    np.testing.assert_array_equal(flat(a.critics), flat(b.critics))
    np.testing.assert_array_equal(flat(a.value), flat(b.value))
    assert not np.allclose(flat(a.actor), flat(b.actor))
    assert isinstance(b.actor_opt, fisher.ScaleByFisherState)
    assert int(b.actor_opt.count) == 5
