"""MISA against NumPy: losses of one update, the policy's gradient, both conventions.

The expectation under the improved policy p*, which the agent estimates by chains or by
weights, is here a Gauss-Hermite quadrature over the policy's noise.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import toy_mdps
from test_agents_first_update import STILL, close
from toy_mdps import forward

from offrl_jax import mutual_information
from offrl_jax.agents import misa
from offrl_jax.agents.entry import resolve
from offrl_jax.types import Spec, Transitions

pytestmark = pytest.mark.little_optimised

SPEC = Spec(obs_dim=3, action_dim=2, horizon=4)
ROWS, K = 48, 5
RATES = ("actor_lr", "critic_lr", "alpha_lr", "multiplier_lr")
NUMBERS = {"discount": 0.9, "critic_weight": 0.3, "policy_weight": 0.7}
# Of T = Q / SCALE: T of pi's actions then lies within some units of 0.
SCALE = 0.4
NUMBERS |= {"correction_weight": 0.4, "critic_scale": SCALE, "gap": 0.2}


def wide_batch() -> Transitions:
    rng = np.random.default_rng(8)
    fields = {
        "obs": rng.normal(size=(ROWS, 3)),
        # Some exactly on the bounds.
        "action": np.clip(rng.normal(size=(ROWS, 2)), -1.0, 1.0),
        "reward": rng.normal(size=ROWS),
        "discount": (np.arange(ROWS) % 3 != 1).astype(float),
        "next_obs": rng.normal(size=(ROWS, 3)),
        "next_action": np.zeros((ROWS, 2)),
        "has_next_action": np.zeros(ROWS),
    }
    return Transitions(**{k: jnp.float32(v) for k, v in fields.items()})


def make(rate: float = STILL, **changes: Any) -> tuple:
    """Agent, settings and a state with critics that differ between states."""
    overrides = {"hidden": (8, 8), "batch_size": ROWS, "samples": K}
    overrides |= NUMBERS | dict.fromkeys(RATES, rate) | changes
    config, hyper = resolve(misa.ENTRY, family="", preset=None, overrides=overrides)
    agent = misa.make_misa(config, SPEC)
    hyper = toy_mdps.as_arrays(hyper)
    state = jax.jit(agent.init)(jax.random.key(0), hyper)

    def widen(params: Any) -> Any:
        return jax.tree.map(lambda x: 3.0 * x, params)

    target = tuple(widen(p) for p in state.target_critics)
    state = state.replace(
        critics=tuple(widen(p) for p in state.critics), target_critics=target
    )
    return agent, hyper, state


def step(agent: Any, hyper: Any, state: Any, key: Any = None) -> tuple[Any, dict]:
    key = jax.random.key(3) if key is None else key
    # Many structures are compiled and hardly run: compiling is most of the time.
    options = {"xla_backend_optimization_level": 0}
    update = jax.jit(agent.phases[0].update, compiler_options=options)
    after, metrics = update(key, state, wide_batch(), hyper)
    return after, {k: float(v) for k, v in metrics.items()}


# --- the same in NumPy ---------------------------------------------------------------


def q_of(params: Any, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    layers = params["params"]["MLP_0"]
    x = np.concatenate([np.broadcast_to(obs, (*action.shape[:-1], 3)), action], -1)
    for i in range(2):
        kernel = np.asarray(layers[f"Dense_{i}"]["kernel"], np.float64)
        x = x @ kernel + np.asarray(layers[f"Dense_{i}"]["bias"])
        x = np.where(x > 0.0, x, np.expm1(np.minimum(x, 0.0)))
    out = layers["Dense_2"]
    return (x @ np.asarray(out["kernel"], np.float64) + np.asarray(out["bias"]))[..., 0]


def policy(actor: Any, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = forward(actor["net"]["params"]["MLP_0"], obs)
    mean, raw = np.split(out, 2, axis=-1)
    log_std = float(actor["gain"]) * raw + float(actor["shift"])
    return np.clip(mean, -9.0, 9.0), np.clip(log_std, -5.0, 2.0)


def gaussian(mean: np.ndarray, log_std: np.ndarray, u: np.ndarray) -> np.ndarray:
    return scipy.stats.norm.logpdf(u, mean, np.exp(log_std)).sum(-1)


def log_pi(mean: np.ndarray, log_std: np.ndarray, u: np.ndarray) -> np.ndarray:
    return gaussian(mean, log_std, u) - np.log(1.0 - np.tanh(u) ** 2).sum(-1)


class ByHand:
    """The noise of one update, and the quantities that its losses share."""

    def __init__(self, state: Any, samples: int = K, key: Any = None) -> None:
        keys = jax.random.split(jax.random.key(3) if key is None else key, 4)
        shape = (ROWS, 2)
        self.state = state
        self.batch = jax.tree.map(lambda x: np.asarray(x, np.float64), wide_batch())
        self.data = np.clip(self.batch.action, -0.999, 0.999)
        draws = [(keys[0], shape), (keys[1], (samples, *shape)), (keys[2], shape)]
        self.next_noise, self.noise, self.actor_noise = (
            np.asarray(jax.random.normal(*draw), np.float64) for draw in draws
        )
        self.mean, self.log_std = policy(state.actor, self.batch.obs)
        self.drawn = self.mean + np.exp(self.log_std) * self.noise
        q = [q_of(p, self.batch.obs, np.tanh(self.drawn)) for p in state.critics]
        self.q_drawn = np.stack(q)
        q = [q_of(p, self.batch.obs, self.data) for p in state.critics]
        self.q_data = np.stack(q)

    def td(self, critics: Any = None) -> float:
        mean, log_std = policy(self.state.actor, self.batch.next_obs)
        action = np.tanh(mean + np.exp(log_std) * self.next_noise)
        q = [q_of(p, self.batch.next_obs, action) for p in self.state.target_critics]
        y = self.batch.reward + 0.9 * self.batch.discount * np.minimum(*q)
        found = [q_of(p, self.batch.obs, self.data) for p in critics or ()]
        online = np.stack(found) if critics else self.q_data
        return float(((online - y) ** 2).mean(1).sum())

    def regulariser(self, bound: str, positive: bool, count: float) -> float:
        """Minus the gain in units of Q, mean of both critics."""
        total = []
        for q_data, q_drawn in zip(self.q_data, self.q_drawn, strict=True):
            t_data, t = q_data / SCALE, q_drawn / SCALE
            if positive:
                t = np.concatenate([t, t_data[None]])
            if bound == "misa":
                second = np.mean(np.log(np.exp(t).sum(0) / count))
            elif bound == "dv":
                second = np.log(np.exp(t).sum() / (count * ROWS))
            else:
                assert t.max() < mutual_information.LARGEST_T
                second = np.exp(t - 1.0).mean()
            total.append(SCALE * (second - t_data.mean()))
        return float(np.mean(total))

    def actor_loss(self, tilted: np.ndarray, weight: np.ndarray, actor: Any) -> float:
        mean, log_std = policy(actor, self.batch.obs)
        own = mean + np.exp(log_std) * self.actor_noise
        critics = self.state.critics
        q = np.minimum(*(q_of(p, self.batch.obs, np.tanh(own)) for p in critics))
        alpha = float(np.exp(self.state.log_alpha))
        cloning = alpha * log_pi(mean, log_std, own).mean()
        cloning -= log_pi(mean, log_std, np.arctanh(self.data)).mean()
        expected = (weight * gaussian(mean, log_std, tilted)).sum(0).mean()
        return 0.7 * cloning - q.mean() + 0.4 * expected

    def importance(self, bound: str) -> np.ndarray:
        t = self.q_drawn.min(0) / SCALE
        z = np.exp(t).mean(0)
        of_states = {"misa": np.ones(ROWS), "dv": z / z.mean(), "f": z / np.e}[bound]
        # Less the mean over a state's samples, a control variate.
        return of_states * (np.exp(t) / np.exp(t).sum(0) - 1.0 / len(t))


# --- one update ----------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["misa", "dv", "f"])
@pytest.mark.parametrize("convention", ["plain", "positive", "batch"])
def test_every_metric_of_one_update(bound, convention):
    positive, of_batch = convention == "positive", convention == "batch"
    agent, hyper, state = make(
        bound=bound,
        correction="importance",
        add_positive=positive,
        normaliser="batch" if of_batch else "samples",
    )
    state = state.replace(log_alpha=jnp.float32(-0.3))
    _, got = step(agent, hyper, state)
    hand = ByHand(state)
    close(got["critic_loss"], hand.td())
    count = ROWS if of_batch else K + positive
    close(got["regulariser"], hand.regulariser(bound, positive, count))
    close(got["q_mean"], float(np.mean(-_q_term(hand, state))))
    weight = hand.importance(bound)
    assert np.abs(weight).max() > 0.05, "weights are all alike"
    close(got["actor_loss"], hand.actor_loss(hand.drawn, weight, state.actor))
    own = hand.mean + np.exp(hand.log_std) * hand.actor_noise
    close(got["entropy"], -log_pi(hand.mean, hand.log_std, own).mean())
    data = log_pi(hand.mean, hand.log_std, np.arctanh(hand.data)).mean()
    close(got["log_density_data"], data)
    assert got["alpha"] == pytest.approx(np.exp(-0.3))
    assert set(got) == {
        "critic_loss",
        "actor_loss",
        "q_mean",
        "regulariser",
        "log_density_data",
        "entropy",
        "alpha",
    }


def _q_term(hand: ByHand, state: Any) -> np.ndarray:
    own = np.tanh(hand.mean + np.exp(hand.log_std) * hand.actor_noise)
    return -np.minimum(*(q_of(p, hand.batch.obs, own) for p in state.critics))


def test_barber_agakov_is_cloning_and_nothing_else():
    """No gain: neither critics nor policy see a sample or a chain."""
    agent, hyper, state = make(bound="ba")
    _, got = step(agent, hyper, state)
    hand = ByHand(state)
    close(got["critic_loss"], hand.td())
    none = np.zeros((1, ROWS))
    close(got["actor_loss"], hand.actor_loss(hand.drawn[:1], none, state.actor))
    assert not {"regulariser", "acceptance"} & set(got)


def test_the_first_steps_go_down_the_losses_of_their_own():
    """Adam's first step is -lr * sign(gradient); the gradient by finite differences."""
    lr = 1e-4
    agent, hyper, state = make(rate=lr, correction="importance", policy_weight=1.3)
    hyper = hyper.replace(policy_weight=jnp.float32(0.7))
    after, got = step(agent, hyper, state)
    hand = ByHand(state)
    weight = hand.importance("misa")
    for name in ("gain", "shift"):
        up, down = (
            hand.actor_loss(
                hand.drawn, weight, {**state.actor, name: state.actor[name] + h}
            )
            for h in (1e-3, -1e-3)
        )
        moved = float(after.actor[name] - state.actor[name])
        assert moved == pytest.approx(-lr * np.sign(up - down), rel=1e-3)
    # A larger bias of a critic's output adds to all its values alike: MISA's and DV's
    # gains do not see it, only the error does.
    for i in range(2):
        bias = state.critics[i]["params"]["MLP_0"]["Dense_2"]["bias"]
        both = []
        for h in (1e-3, -1e-3):
            critics = list(state.critics)
            shifted = jax.tree.map(lambda x: x, critics[i])
            shifted["params"]["MLP_0"]["Dense_2"]["bias"] = bias + h
            critics[i] = shifted
            both.append(hand.td(critics))
        moved = after.critics[i]["params"]["MLP_0"]["Dense_2"]["bias"] - bias
        assert float(moved[0]) == pytest.approx(
            -lr * np.sign(both[0] - both[1]), rel=1e-3
        )
    # alpha rises where the entropy is below its target, -A.
    rises = got["entropy"] < -SPEC.action_dim
    assert (float(after.log_alpha) > 0.0) == rises
    high = state.replace(actor={**state.actor, "shift": jnp.float32(-5.0)})
    after, got = step(agent, hyper, high)
    assert (got["entropy"] < -2.0) != rises and (float(after.log_alpha) > 0.0) != rises


@pytest.mark.parametrize(("bound", "scale"), [("misa", 0.1), ("dv", 0.4), ("f", 0.4)])
def test_chains_estimate_what_quadrature_finds(bound, scale):
    """The value of the correction, whose gradient the policy follows."""
    agent, hyper, state = make(
        bound=bound, critic_scale=scale, chains=100, draws=20, burn_in=10, samples=400
    )
    _, got = step(agent, hyper, state)
    plain, same, _ = make(bound=bound, correction="none", samples=400)
    _, without = step(plain, same, state)
    assert 0.5 < got["acceptance"] <= 1.0
    hand = ByHand(state, samples=400)
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(24)
    grid = np.array(list(itertools.product(nodes, nodes)))
    prior = np.array([a * b for a, b in itertools.product(node_weights, node_weights)])
    u = hand.mean + np.exp(hand.log_std) * grid[:, None, :]
    t = (
        np.minimum(*(q_of(p, hand.batch.obs, np.tanh(u)) for p in state.critics))
        / scale
    )
    joint = prior[:, None] / prior.sum() * np.exp(t)
    z = joint.sum(0)
    tilted = joint / z
    if bound == "dv":
        tilted = joint / z.mean()
    elif bound == "f":
        tilted = joint / np.e
    density = gaussian(hand.mean, hand.log_std, u)
    want = (tilted * density).sum(0).mean()
    under_pi = (prior[:, None] / prior.sum() * density).sum(0).mean()
    assert abs(want - under_pi) > 0.05, "the tilt does not show"
    found = (got["actor_loss"] - without["actor_loss"]) / 0.4
    assert found == pytest.approx(want, abs=0.1 * abs(want - under_pi))


# --- conventions and samplers --------------------------------------------------------


def test_both_conventions_of_log_k_are_one_after_a_shift_of_the_gap():
    """log(batch) with gap g is log K with gap g + log(batch / K)."""
    common = {"lagrange": True, "correction": "importance", "rate": 1e-3}
    agent, hyper, state = make(normaliser="batch", **common)
    other, _, _ = make(normaliser="samples", **common)
    shift = SCALE * np.log(ROWS / K)
    moved = hyper.replace(gap=hyper.gap + jnp.float32(shift))
    (one, released), (two, ours) = step(agent, hyper, state), step(other, moved, state)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-7), one, two
    )
    assert released["regulariser"] == pytest.approx(ours["regulariser"], abs=1e-5)
    same_gap = step(other, hyper, state)[1]
    assert same_gap["regulariser"] == pytest.approx(
        released["regulariser"] + shift, abs=1e-5
    )


@pytest.mark.parametrize("gap", [-5.0, 5.0])
def test_the_multiplier_rises_above_its_gap_and_falls_below(gap):
    agent, hyper, state = make(
        rate=1e-3, lagrange=True, correction="none", gap=gap, critic_weight=0.5
    )
    after, got = step(agent, hyper, state)
    hand = ByHand(state)
    close(got["regulariser"], hand.regulariser("misa", False, K) - gap)
    assert got["multiplier"] == pytest.approx(np.e)
    moved = float(after.log_multiplier - state.log_multiplier)
    assert moved == pytest.approx(1e-3 * np.sign(-gap), rel=1e-3)


def run(agent: Any, hyper: Any, state: Any, updates: int) -> dict[str, float]:
    def body(carry: Any, key: Any) -> tuple[Any, Any]:
        state, metrics = agent.phases[0].update(key, carry, wide_batch(), hyper)
        return state, metrics

    keys = jax.random.split(jax.random.key(1), updates)
    _, metrics = jax.jit(lambda s: jax.lax.scan(body, s, keys))(state)
    return {k: float(np.mean(v[-20:])) for k, v in metrics.items()}


def test_the_corrected_sampler_settles_and_the_released_one_does_not_move():
    counts = {"draws": 5, "burn_in": 5, "leapfrogs": 2, "rate": 3e-4}
    found = run(*make(sampler="corrected", chains=4, **counts), updates=150)
    assert 0.6 < found["acceptance"] < 0.9
    released = run(*make(sampler="released", **counts), updates=20)
    assert released["acceptance"] < 0.1
    assert "step_size" in found and "step_size" not in released


def test_presets_are_what_their_sources_say():
    """The table of the notes, where it differs from the locomotion defaults."""
    want = {
        "antmaze": {"lagrange": True, "add_positive": True, "layer_norm": True},
        "kitchen": {"layer_norm": True, "policy_weight": 3.0, "critic_lr": 1e-4},
        "adroit": {"layer_norm": True, "policy_weight": 5.0, "automatic_alpha": False},
        "released": {"normaliser": "batch", "gap": 3.0, "chains": 1, "draws": 50},
        "biased": {"correction": "none"},
    }
    for preset, values in want.items():
        config, hyper = resolve(misa.ENTRY, family="", preset=preset, overrides={})
        got = {**vars(config), **vars(hyper)}
        assert {name: got[name] for name in values} == values
        assert (got["samples"], got["burn_in"], got["critic_weight"]) == (50, 5, 5.0)
