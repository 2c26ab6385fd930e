"""Flow agents: one update in NumPy, who moves whom, policies, settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_mdps
from test_agents_first_update import STILL, close

from offrl_jax.agents import registry
from offrl_jax.agents.entry import resolve
from offrl_jax.errors import UsageError
from offrl_jax.types import Spec, Transitions

pytestmark = pytest.mark.little_optimised

SPEC = Spec(obs_dim=2, action_dim=2, horizon=2)
SMALL = {"hidden": (16, 16), "batch_size": 48, "flow_steps": 3}
FROZEN = {
    "flow_bc": {"lr": STILL},
    "ifql": {"flow_lr": STILL, "critic_lr": STILL, "value_lr": STILL},
    "fql": {"flow_lr": STILL, "actor_lr": STILL, "critic_lr": STILL},
}
FROZEN["deflow"] = FROZEN["fidec"] = FROZEN["fql"] | {"multiplier_lr": STILL}


def random_batch() -> Transitions:
    """48 transitions with two action dimensions, a third of them terminal."""
    rng = np.random.default_rng(0)
    goes_on = (np.arange(48) % 3 > 0).astype(float)
    obs, next_obs = rng.normal(size=(2, 48, 2))
    action, none = rng.uniform(-1, 1, (48, 2)), np.zeros((48, 2))
    fields = (obs, action, rng.normal(size=48), goes_on, next_obs, none, none[:, 0])
    return Transitions(*(jnp.asarray(x, jnp.float32) for x in fields))


class Compiled(NamedTuple):
    """An agent's functions; compiled when first used, once per structure."""

    init: Callable[..., Any]
    update: Callable[..., Any]
    act: Callable[..., Any]


@functools.cache
def compiled(name: str, config: Any) -> Compiled:
    init, act, (phase,), *_ = registry.get_entry(name).make(config, SPEC)
    return Compiled(jax.jit(init), jax.jit(phase.update), jax.jit(act))


def made(name: str, preset: str | None = None, **settings) -> tuple[Compiled, Any]:
    config, hyper = resolve(
        registry.get_entry(name),
        family="toy",
        preset=preset,
        overrides=SMALL | settings,
    )
    return compiled(name, config), toy_mdps.as_arrays(hyper)


KEY = jax.random.key(7)


def first_update(name: str, preset: str | None = None, **settings):
    """State before and after, the batch in float64, and the metrics."""
    agent, hyper = made(name, preset, **settings)
    batch = random_batch()
    state = agent.init(jax.random.key(0), hyper)
    after, metrics = agent.update(KEY, state, batch, hyper)
    numbers = Transitions(*(np.asarray(x, np.float64) for x in batch))
    return state, after, numbers, {k: float(v) for k, v in metrics.items()}


# The agents' draws, from the key of the update.


def normal(key, *shape: int) -> np.ndarray:
    return np.asarray(jax.random.normal(key, shape), np.float64)


def gelu_mlp(params, x: np.ndarray, layer_norm: bool = False) -> np.ndarray:
    """In float64 NumPy, from the parameters of `flows.gelu_mlp`."""
    layers = params["params"]["MLP_0"]
    count = sum("Dense" in name for name in layers)
    for i in range(count):
        layer = layers[f"Dense_{i}"]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
        if i < count - 1:
            x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
            if layer_norm:
                x = x - x.mean(-1, keepdims=True)
                x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x


def velocity(params, obs, x, t) -> np.ndarray:
    t = np.broadcast_to(np.asarray(t, np.float64)[..., None], (*x.shape[:-1], 1))
    return gelu_mlp(params, np.concatenate([obs, x, t], -1))


def euler(params, obs, noise) -> np.ndarray:
    """Three steps, clipped at the end."""
    x = noise
    for i in range(3):
        x = x + velocity(params, obs, x, i / 3) / 3
    return np.clip(x, -1, 1)


def map_of(params, obs, x) -> np.ndarray:
    return gelu_mlp(params, np.concatenate([obs, x], -1))


def critic_values(critics, obs, action) -> np.ndarray:
    x = np.concatenate([obs, action], -1)
    return np.stack([gelu_mlp(p, x, True)[..., 0] for p in critics])


def matching(params, key, batch) -> float:
    noise_key, time_key = jax.random.split(key)
    noise = normal(noise_key, *batch.action.shape)
    t = np.asarray(jax.random.uniform(time_key, (48,)), np.float64)
    x = (1 - t[:, None]) * noise + t[:, None] * batch.action
    rest = velocity(params, batch.obs, x, t) - (batch.action - noise)
    return (rest**2).mean()


def bellman(batch, next_values, q) -> float:
    y = batch.reward + 0.9 * batch.discount * next_values
    return ((q - y[None]) ** 2).mean()


def test_flow_bc():
    state, _, batch, got = first_update("flow_bc", **FROZEN["flow_bc"])
    close(got["flow_loss"], matching(state.actor, KEY, batch))


def test_ifql():
    state, _, batch, got = first_update(
        "ifql", expectile=0.8, discount=0.9, **FROZEN["ifql"]
    )
    q = critic_values(state.target_critics, batch.obs, batch.action).min(0)
    u = q - gelu_mlp(state.value, batch.obs, True)[:, 0]
    close(got["value_loss"], (np.where(u < 0, 0.2, 0.8) * u**2).mean())
    close(got["advantage_mean"], u.mean())
    next_v = gelu_mlp(state.value, batch.next_obs, True)[:, 0]
    online = critic_values(state.critics, batch.obs, batch.action)
    close(got["critic_loss"], bellman(batch, next_v, online))
    close(got["flow_loss"], matching(state.actor, KEY, batch))


@pytest.mark.parametrize("q_aggregation, normalise_q", [("mean", False), ("min", True)])
def test_fql(q_aggregation, normalise_q):
    state, _, batch, got = first_update(
        "fql",
        discount=0.9,
        alpha=3.0,
        q_aggregation=q_aggregation,
        normalise_q=normalise_q,
        **FROZEN["fql"],
    )
    next_key, flow_key, actor_key = jax.random.split(KEY, 3)
    pool = np.mean if q_aggregation == "mean" else np.min
    next_action = np.clip(
        map_of(state.actor, batch.next_obs, normal(next_key, 48, 2)), -1, 1
    )
    next_values = critic_values(state.target_critics, batch.next_obs, next_action)
    q = critic_values(state.critics, batch.obs, batch.action)
    close(got["critic_loss"], bellman(batch, pool(next_values, 0), q))
    close(got["q_mean"], q.mean())
    close(got["flow_loss"], matching(state.flow, flow_key, batch))
    noise = normal(actor_key, 48, 2)
    action = map_of(state.actor, batch.obs, noise)
    distillation = ((action - euler(state.flow, batch.obs, noise)) ** 2).mean()
    close(got["distillation_loss"], distillation)
    q_pi = critic_values(state.critics, batch.obs, np.clip(action, -1, 1)).mean(0)
    scale = 1 / np.abs(q_pi).mean() if normalise_q else 1.0
    close(got["actor_loss"], 3.0 * distillation - scale * q_pi.mean())


def decorated(name: str, preset: str | None = None, **settings):
    """Everything that `deflow` and `fidec` have in common, checked; what differs is
    returned: the state, batch, base actions, displacements and metrics."""
    state, after, batch, got = first_update(
        name, preset, discount=0.9, multiplier=3.0, **FROZEN[name], **settings
    )
    keys = jax.random.split(KEY, 3 if name == "fidec" else 2)
    noise = normal(keys[0], 96, 2)
    base = euler(state.flow, batch.obs, noise[:48])
    next_base = euler(state.flow, batch.next_obs, noise[48:])
    next_action = np.clip(
        next_base + map_of(state.actor, batch.next_obs, next_base), -1, 1
    )
    next_values = critic_values(state.target_critics, batch.next_obs, next_action)
    q = critic_values(state.critics, batch.obs, batch.action)
    pool = np.min if settings.get("q_aggregation") == "min" else np.mean
    close(got["critic_loss"], bellman(batch, pool(next_values, 0), q))
    close(got["flow_loss"], matching(state.flow, keys[1], batch))
    delta = map_of(state.actor, batch.obs, base)
    close(got["displacement"], np.sqrt((delta**2).mean()))
    q_pi = critic_values(state.critics, batch.obs, np.clip(base + delta, -1, 1)).mean(0)
    close(got["q_policy"], q_pi.mean())
    close(got["multiplier"], 3.0)
    scale = 1 / np.abs(q_pi).mean() if settings.get("normalise_q") else 1.0
    close(got["actor_loss"], 3.0 * got["penalty"] - scale * q_pi.mean())
    return state, after, batch, base, delta, got, keys


@pytest.mark.parametrize("normalise_q", [False, True])
def test_deflow(normalise_q):
    *_, delta, got, _ = decorated("deflow", normalise_q=normalise_q)
    close(got["penalty"], (delta**2).mean())


def fidec_penalty(scores, delta, trace, damping=1e-3) -> float:
    """With matrices."""
    fisher = np.einsum("bmi,bmj->bij", scores, scores) / scores.shape[1]
    fisher = fisher + damping * np.eye(2)
    form = np.einsum("bi,bij,bj->b", delta, fisher, delta)
    size = np.trace(fisher, axis1=1, axis2=2)
    if trace == "none":
        return 0.5 * form.mean()
    return (form / size).mean() if trace == "state" else form.mean() / size.mean()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trace": "none", "clip_gradients": False},
        {"score": "velocity", "trace": "batch", "q_aggregation": "min"},
    ],
)
def test_fidec_at_the_base_action(settings):
    state, _, batch, base, delta, got, _ = decorated(
        "fidec", score_time=0.8, **settings
    )
    v = velocity(state.flow, batch.obs, base, 0.8)
    g = (0.8 * v - base) / 0.2 if "score" not in settings else v / 0.2
    trace = settings.get("trace", "state")
    close(got["penalty"], fidec_penalty(g[:, None], delta, trace))
    close(got["score_norm"], np.sqrt((g**2).sum(-1).mean()))


def test_fidec_as_coded():
    """Preset `code`: v / (1 - t) at 8 re-noised fresh base actions, t in [.85, .9]."""
    state, _, batch, _, delta, got, keys = decorated("fidec", "code")
    time_key, base_key, noise_key = jax.random.split(keys[2], 3)
    obs = np.repeat(batch.obs[:, None], 8, 1)
    t = np.asarray(jax.random.uniform(time_key, (48, 8)), np.float64) * 0.05 + 0.85
    fresh = euler(state.flow, obs, normal(base_key, 48, 8, 2))
    x = (1 - t[..., None]) * normal(noise_key, 48, 8, 2) + t[..., None] * fresh
    g = velocity(state.flow, obs, x, t) / (1 - t[..., None])
    close(got["penalty"], fidec_penalty(g, delta, "state"))
    assert ((t >= 0.85) & (t <= 0.9)).all() and t.std() > 0.01


def moved(state, after) -> set[str]:
    """Names of the parameter groups that an update changed."""
    names = [f.name for f in dataclasses.fields(state) if not f.name.endswith("_opt")]
    return {
        name
        for name in names
        if any(
            np.abs(np.asarray(x) - np.asarray(y)).max() > 1e-9
            for x, y in zip(
                jax.tree.leaves(getattr(state, name)),
                jax.tree.leaves(getattr(after, name)),
                strict=True,
            )
        )
    }


GROUPS = {
    "flow_lr": "flow",
    "actor_lr": "actor",
    "critic_lr": "critics",
    "multiplier_lr": "log_growth",
}


@pytest.mark.parametrize("name", ["fql", "deflow", "fidec"])
def test_each_rate_moves_its_own_group(name):
    """The targets equal the critics of before the first update: they stay."""
    for setting in FROZEN[name]:
        state, after, *_ = first_update(name, **FROZEN[name] | {setting: 1e-3})
        assert moved(state, after) == {GROUPS[setting]}


UNCLIPPED = {
    "deflow": {"clip_gradients": False},
    "fidec": {"clip_gradients": False, "trace": "none"},
}


@pytest.mark.parametrize("name", ["deflow", "fidec"])
def test_flow_and_critics_do_not_feel_the_residual_s_loss(name):
    """Their gradients are the same, whatever the multiplier and the penalty are."""
    _, one, *_ = first_update(name, multiplier=1.0, **UNCLIPPED[name])
    _, two, *_ = first_update(name, multiplier=100.0, **UNCLIPPED[name])
    for group in ("flow_opt", "critic_opt"):
        for x, y in zip(
            jax.tree.leaves(getattr(one, group).mu),
            jax.tree.leaves(getattr(two, group).mu),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9)
    flat = [np.asarray(x) for x in jax.tree.leaves(one.actor_opt.mu)]
    steep = [np.asarray(x) for x in jax.tree.leaves(two.actor_opt.mu)]
    assert any(not np.allclose(x, y) for x, y in zip(flat, steep, strict=True))


@pytest.mark.parametrize("name", ["deflow", "fidec"])
def test_residual_has_no_gradient_where_the_action_is_clipped(name):
    """All displacements far beyond the bounds: what is left is the penalty's, and it
    vanishes with the multiplier."""
    agent, hyper = made(name, multiplier=1e-20, **UNCLIPPED[name])
    state = agent.init(jax.random.key(0), hyper)
    layers = dict(state.actor["params"]["MLP_0"])
    layers["Dense_2"] = layers["Dense_2"] | {"bias": jnp.full(2, 50.0)}
    state = dataclasses.replace(state, actor={"params": {"MLP_0": layers}})
    after, _ = agent.update(KEY, state, random_batch(), hyper)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(after.actor_opt.mu))
    assert largest < 1e-12


@pytest.mark.parametrize("name", ["deflow", "fidec"])
def test_sign_of_the_multiplier(name):
    _, above, _, got = first_update(name, budget=1e-6)
    assert got["penalty"] > 1e-6 and float(above.log_growth) > 0
    _, below, _, got = first_update(name, budget=1e3)
    assert got["penalty"] < 1e3 and float(below.log_growth) < 0


def test_fixed_multiplier():
    _, after, *_ = first_update("deflow", budget=1e3, multiplier_rule="fixed")
    assert float(after.log_growth) == 0.0


@pytest.mark.parametrize("name", ["deflow", "fidec"])
def test_gradients_are_clipped_together(name):
    """Adam's first moments are a tenth of the gradients."""
    _, free, _, got = first_update(name, clip_gradients=True, max_grad_norm=1e9)
    _, cut, _, _ = first_update(name, clip_gradients=True, max_grad_norm=0.02)
    factor = 0.02 / (got["grad_norm"] + 1e-6)
    assert factor < 1

    def moments(state):
        groups = ("critic_opt", "flow_opt", "actor_opt", "multiplier_opt")
        leaves = [getattr(state, g).mu for g in groups]
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(leaves)])

    norm = 10 * np.linalg.norm(moments(free).astype(np.float64))
    assert norm == pytest.approx(got["grad_norm"], rel=1e-4)
    np.testing.assert_allclose(
        moments(cut), factor * moments(free), rtol=1e-3, atol=1e-9
    )


@pytest.mark.parametrize("name", ["ifql", "fql", "deflow", "fidec"])
def test_targets_follow_the_critics_of_before_the_update(name):
    agent, hyper = made(name, tau=0.25, critic_lr=0.1)
    state = agent.init(jax.random.key(0), hyper)
    one, _ = agent.update(KEY, state, random_batch(), hyper)
    two, _ = agent.update(KEY, one, random_batch(), hyper)
    for start, target, online, moved_to in zip(
        *(
            jax.tree.leaves(x)
            for x in (
                state.critics,
                one.target_critics,
                one.critics,
                two.target_critics,
            )
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(start, target)
        np.testing.assert_allclose(
            moved_to, 0.75 * target + 0.25 * online, rtol=1e-5, atol=1e-7
        )


# Policies.

OBS = np.random.default_rng(3).normal(size=(5, 2))


def test_act_of_fql_and_of_flow_bc():
    for name, of in (("fql", map_of), ("flow_bc", euler)):
        agent, hyper = made(name)
        state = agent.init(jax.random.key(1), hyper)
        got = agent.act(KEY, state, jnp.float32(OBS), hyper)
        want = np.clip(of(state.actor, OBS, normal(KEY, 5, 2)), -1, 1)
        np.testing.assert_allclose(got, want, atol=1e-5)
        other = agent.act(jax.random.key(8), state, jnp.float32(OBS), hyper)
        assert float(jnp.abs(other - got).max()) > 0.1, "the policy must draw"


def test_act_of_ifql_is_the_best_of_its_candidates():
    agent, hyper = made("ifql", candidates=6)
    state = agent.init(jax.random.key(1), hyper)
    got = agent.act(KEY, state, jnp.float32(OBS), hyper)
    obs = np.repeat(OBS[:, None], 6, 1)
    actions = euler(state.actor, obs, normal(KEY, 5, 6, 2))
    values = critic_values(state.critics, obs, actions).min(0)
    np.testing.assert_allclose(got, actions[np.arange(5), values.argmax(1)], atol=1e-5)


@pytest.mark.parametrize("name", ["deflow", "fidec"])
@pytest.mark.parametrize("play", ["sample", "best_of", "refine"])
def test_act_of_the_decorators(name, play):
    agent, hyper = made(name, play=play, candidates=6, refinements=4)
    state = agent.init(jax.random.key(1), hyper)
    got = agent.act(KEY, state, jnp.float32(OBS), hyper)

    def step(action):
        return np.clip(action + map_of(state.actor, OBS, action), -1, 1)

    def value(obs, action):
        return critic_values(state.critics, obs, action).mean(0)

    if play == "best_of":
        obs = np.repeat(OBS[:, None], 6, 1)
        bases = euler(state.flow, obs, normal(KEY, 5, 6, 2))
        want = step(bases[np.arange(5), value(obs, bases).argmax(1)])
    else:
        tries = [step(euler(state.flow, OBS, normal(KEY, 5, 2)))]
        for _ in range(3 if play == "refine" else 0):
            tries.append(step(tries[-1]))
        best = np.stack([value(OBS, a) for a in tries]).argmax(0)
        want = np.stack(tries)[best, np.arange(5)]
    np.testing.assert_allclose(got, want, atol=1e-5)


# Settings.


def settings(name, preset=None, family="toy", **overrides):
    entry = registry.get_entry(name)
    return resolve(entry, family=family, preset=preset, overrides=overrides)


def test_presets_say_what_paper_and_code_do():
    config, hyper = settings("fidec", "paper")
    assert (config.score, config.where, config.score_samples) == ("exact", "base", 1)
    assert (hyper.score_time, hyper.score_width) == (0.8, 0.0)
    config, hyper = settings("fidec", "code")
    assert (config.score, config.where) == ("velocity", "renoised")
    assert (config.score_samples, config.trace) == (8, "state")
    assert (hyper.score_time, hyper.score_width, hyper.damping) == (0.9, 0.05, 1e-3)
    config, hyper = settings("deflow")
    assert hyper.multiplier == pytest.approx(np.e) and not config.clip_gradients


@pytest.mark.parametrize(
    "preset, of_fidec", [("as_in_fidec", None), ("quick", "quick"), ("small", "small")]
)
def test_deflow_and_fidec_differ_in_the_penalty_alone(preset, of_fidec):
    """Every setting that both have is the same."""
    for ours, theirs in zip(
        settings("deflow", preset), settings("fidec", of_fidec), strict=True
    ):
        for field in dataclasses.fields(ours):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_families_and_defaults():
    for name in FROZEN:
        assert settings(name)[0].hidden == (512,) * 4
        assert settings(name, family="classic")[0].hidden == (256, 256)
        assert settings(name, "quick", "classic")[0].hidden == (64, 64)
    assert settings("fidec", family="ogbench")[0].normalise_q
    assert not settings("fidec")[0].normalise_q


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("fidec", {"score": "exakt"}, "unknown score of fidec 'exakt'.*'exact'"),
        ("fidec", {"where": "noise"}, "unknown where of fidec 'noise'"),
        ("fidec", {"trace": "batsch"}, "unknown trace of fidec 'batsch'.*'batch'"),
        ("fidec", {"score_samples": 8}, "score_samples=1 or where=renoised"),
        ("fidec", {"score_time": 1.0}, r"'score_time'.*\[0.001, 0.999\]"),
        ("deflow", {"play": "best"}, "unknown play of deflow 'best'.*'best_of'"),
        ("fql", {"q_aggregation": "max"}, "unknown q_aggregation of fql 'max'"),
        ("ifql", {"candidates": 0}, "'candidates' of ifql is 0"),
        ("flow_bc", {"integrator": "euller"}, "unknown integrator.*'euler'"),
    ],
)
def test_wrong_settings(name, changes, message):
    with pytest.raises(UsageError, match=message):
        made(name, **changes)
