"""ACPO: updates recomputed in NumPy, optima on paper, independent agents, bad data.

The formulas themselves are tested in test_constraint.py; here is what the agent makes
of them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import toy_mdps
from test_agents_first_update import STILL, close, critic_values, mlp
from toy_mdps import SPEC, forward, lab

from offrl_jax import networks
from offrl_jax.agents import acpo, awac
from offrl_jax.agents.entry import resolve
from offrl_jax.errors import UsageError
from offrl_jax.types import Spec, Transitions

WIDE = Spec(obs_dim=3, action_dim=2, horizon=4)
ROWS = 64
AVERAGING = 0.005
LEVEL = 0.1
LEARNING_RATES = ("actor_lr", "critic_lr", "value_lr", "behaviour_lr")


def wide_data(rows: int = ROWS) -> dict[str, np.ndarray]:
    """Random transitions of two action dimensions; every third one terminates."""
    rng = np.random.default_rng(5)
    return {
        "obs": rng.normal(size=(rows, 3)),
        "action": rng.uniform(-1.0, 1.0, (rows, 2)),
        "reward": rng.normal(size=rows) * 2.0,
        "discount": (np.arange(rows) % 3 != 1).astype(float),
        "next_obs": rng.normal(size=(rows, 3)),
        "next_action": np.zeros((rows, 2)),
        "has_next_action": np.zeros(rows),
    }


def as_batch(fields: dict[str, np.ndarray]) -> Transitions:
    return Transitions(**{k: jnp.float32(v) for k, v in fields.items()})


@functools.cache
def program(batch_size: int, **structure: Any) -> tuple:
    """An agent with nets of 8 units, its settings, and one compiled training:
    `(data, hyper, pretraining, updates) -> (initial, between, after, metrics)`, where
    `metrics` are summed over the updates: one NaN among them stays visible."""
    config, hyper = resolve(
        acpo.ENTRY,
        family="none",
        preset=None,
        overrides={"hidden": (8,), "batch_size": batch_size, "critics": 2} | structure,
    )
    agent = acpo.make_acpo(config, WIDE)

    # Compiled as one function, so that its shapes and its loop share one trace.
    @functools.partial(jax.jit, static_argnums=0)
    def one(which: int, step: Any, state: Any, data: Transitions, hyper: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(which), step)
        index = jax.random.randint(key, (batch_size,), 0, ROWS)
        batch = jax.tree.map(lambda x: x[index], data)
        return agent.phases[which].update(key, state, batch, hyper)

    def phase(which: int, state: Any, data: Transitions, hyper: Any, steps: Any):
        metrics = jax.eval_shape(lambda *x: one(which, *x), steps, state, data, hyper)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics[1])

        def body(step: Any, carry: Any) -> Any:
            state, metrics = one(which, step, carry[0], data, hyper)
            return state, jax.tree.map(jnp.add, carry[1], metrics)

        return jax.lax.fori_loop(0, steps, body, (state, zeros))

    def train(data: Transitions, hyper: Any, pretraining: Any, updates: Any):
        initial = agent.init(jax.random.key(7), hyper)
        between, fitting = phase(0, initial, data, hyper, pretraining)
        after, metrics = phase(1, between, data, hyper, updates)
        return initial, between, after, {**fitting, **metrics}

    # Many structures are compiled and hardly run: compiling is most of the time.
    options = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(train, compiler_options=options)
    return agent, toy_mdps.as_arrays(hyper), compiled


def assert_finite(tree: Any) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(x).all(), jax.tree_util.keystr(path)


# --- one update ----------------------------------------------------------------------


def log_normal(mean: np.ndarray, log_std: np.ndarray, x: np.ndarray) -> np.ndarray:
    return scipy.stats.norm.logpdf(x, mean, np.exp(log_std)).sum(-1)


def log_beta(state: Any, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    mean, raw = np.split(forward(mlp(state.behaviour), obs), 2, axis=-1)
    # Between -5 and 2.
    found = log_normal(np.tanh(mean), -1.5 + 3.5 * np.tanh(raw), action)
    low, high = -20.0 * WIDE.action_dim, 5.0 * WIDE.action_dim
    return np.clip(found, low, high) - np.log1p(np.maximum(low - found, 0.0))


def policy(state: Any, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    log_std = np.asarray(state.actor["params"]["log_std"], np.float64)
    mean = np.tanh(forward(mlp(state.actor), obs))
    return mean, np.broadcast_to(-2.5 + 2.5 * np.tanh(log_std + 1.0), mean.shape)


def sample(state: Any, obs: np.ndarray, key: Any) -> tuple[np.ndarray, np.ndarray]:
    mean, log_std = policy(state, obs)
    noise = np.asarray(jax.random.normal(key, mean.shape), np.float64)
    action = mean + np.exp(log_std) * noise
    return np.clip(action, -1.0, 1.0), log_normal(mean, log_std, action)


def ess(weights: np.ndarray) -> float:
    return weights.sum() ** 2 / (len(weights) * (weights**2).sum())


def threshold_by_hand(
    rule: str, advantage: np.ndarray, density: np.ndarray, alpha: float
) -> float:
    if rule == "quantile":
        return float(np.quantile(density, LEVEL))
    if rule == "nll":
        return density.mean() - 0.7 * WIDE.action_dim
    for kappa in np.linspace(0.0, 4.0, 33):
        weights = np.exp(advantage / alpha + (kappa - 1.0) * density)
        if ess(weights) >= LEVEL:
            assert 0.0 < kappa < 1.0, "the rule has nothing to choose"
            return float(np.average(density, weights=weights))
    raise AssertionError("no kappa reaches the level: choose another one")


NUMBERS = {"alpha": 0.4, "kappa": 0.6, "kappa_lr": 0.25, "discount": 0.9}
NUMBERS |= {"level": LEVEL, "delta": 0.7, "expectile": 0.8, "largest_weight": 2.0}
SETTINGS = NUMBERS | {"hidden": (16, 16), "batch_size": ROWS, "critics": 2}


CASES = "soft-reverse-quantile regularised-reverse-nll expectile-forward-ess"


@pytest.mark.parametrize("case", CASES.split())
def test_every_metric_of_one_update(case):
    critic, actor, threshold = case.split("-")
    structure = {"critic": critic, "actor": actor, "threshold": threshold}
    overrides = SETTINGS | structure | dict.fromkeys(LEARNING_RATES, STILL)
    config, hyper = resolve(acpo.ENTRY, family="none", preset=None, overrides=overrides)
    agent = acpo.make_acpo(config, WIDE)
    hyper, fields = toy_mdps.as_arrays(hyper), wide_data()
    state = jax.jit(agent.init)(jax.random.key(0), hyper)
    # Away from where they start, so that no factor of 0 or 1 hides anything.
    state = state.replace(threshold=jnp.float32(-1.3), reward_variance=jnp.float32(2.5))
    # Early averages are plain means (variance: of both phases); late rates are fixed.
    fitted, trained = (6, 3) if threshold != "quantile" else (10**4, 10**3)
    for opt, count in (("behaviour_opt", fitted), ("critic_opt", trained)):
        moments = getattr(state, opt)._replace(count=jnp.int32(count))
        state = state.replace(**{opt: moments})
    eps_rate = max(AVERAGING, 1.0 / (trained + 1))
    variance_rate = max(AVERAGING, 1.0 / (fitted + trained + 1))
    update, key = jax.jit(agent.phases[1].update), jax.random.key(3)
    after, got = update(key, state, as_batch(fields), hyper)
    got = {k: float(v) for k, v in got.items()}

    obs, action, next_obs = fields["obs"], fields["action"], fields["next_obs"]
    variance = 2.5 + variance_rate * (fields["reward"].var() - 2.5)
    alpha = 0.4 * np.sqrt(variance)
    keys = jax.random.split(key, 4)
    own, log_pi = sample(state, obs, keys[0])
    own_density, density = log_beta(state, obs, own), log_beta(state, obs, action)
    q = critic_values(state, obs, action, True, "target_critics").min(0)
    v = forward(mlp(state.value), obs)[:, 0]
    close(float(after.reward_variance), variance)
    close(got["lambda"], alpha * 0.6)
    close(got["log_density_policy"], own_density.mean())
    close(got["log_density_data"], density.mean())
    close(got["entropy"], -log_pi.mean())
    close(got["q_mean"], q.mean())

    if critic == "expectile":
        error = q - v
        next_value = forward(mlp(state.value), next_obs)[:, 0]
    else:
        q_own = critic_values(state, obs, own, True, "target_critics").min(0)
        error = q_own - alpha * log_pi + alpha * 0.6 * own_density - v
        following, next_log_pi = sample(state, next_obs, keys[1])
        next_value = critic_values(state, next_obs, following, True, "target_critics")
        next_value = next_value.min(0) - alpha * next_log_pi
        if critic == "regularised":
            next_value += alpha * 0.6 * log_beta(state, next_obs, following)
    level = 0.8 if critic == "expectile" else 0.5
    expectile = np.where(error < 0, 1.0 - level, level) * error**2
    close(got["value_loss"], expectile.mean())
    target = fields["reward"] + 0.9 * fields["discount"] * next_value
    online = critic_values(state, obs, action, True)
    close(got["critic_loss"], ((online - target) ** 2).mean(1).sum())

    weights = np.exp((q - v) / alpha + (0.6 - 1.0) * density)
    weights /= weights.mean()
    cut = np.minimum(weights, 2.0)
    assert 0.0 < (weights > 2.0).mean() < 1.0
    close(got["cut_fraction"], (weights > 2.0).mean())
    close(got["effective_sample_size"], ess(cut))
    if actor == "forward":
        nll = -log_normal(*policy(state, obs), action)
        close(got["actor_loss"], (cut * nll).mean())
    else:
        drawn, log_prob = sample(state, obs, jax.random.split(keys[3])[0])
        q_drawn = critic_values(state, obs, drawn, True).min(0)
        penalty = 0.6 * log_beta(state, obs, drawn)
        close(got["actor_loss"], (log_prob - penalty - q_drawn / alpha).mean())

    found = threshold_by_hand(threshold, q - v, density, alpha)
    epsilon = -1.3 + eps_rate * (found + 1.3)
    close(got["epsilon"], epsilon)
    assert float(after.threshold) == got["epsilon"]
    assert got["kappa"] == pytest.approx(0.6)
    slack = (own_density.mean() - epsilon) / WIDE.action_dim
    assert 0.0 < 0.6 - 0.25 * slack < 10.0
    close(float(after.kappa), 0.6 - 0.25 * slack)
    # With steps far too long, kappa stops at both ends.
    for sign, end in ((-1.0, 3.0), (1.0, 0.0)):
        far = state.replace(threshold=jnp.float32(-100.0 * sign))
        limited = hyper.replace(kappa_lr=jnp.float32(9.0), kappa_max=jnp.float32(3.0))
        assert float(update(key, far, as_batch(fields), limited)[0].kappa) == end
    # Rewards that never vary: alpha has a smallest unit, and nothing is divided by 0.
    fields["reward"] = np.full(ROWS, 2.0)
    still = state.replace(reward_variance=jnp.float32(0.0))
    after, metrics = update(key, still, as_batch(fields), hyper)
    close(float(metrics["lambda"]), 0.4 * 1e-3 * 0.6)
    assert_finite((after, metrics))


def changed(before: Any, after: Any) -> set[str]:
    """Fields of the state of which any leaf is not bit for bit the same."""
    pairs = {name: (leaf, getattr(after, name)) for name, leaf in vars(before).items()}
    same = {k: jax.tree.map(np.array_equal, *pair) for k, pair in pairs.items()}
    return {name for name, leaves in same.items() if not jax.tree.all(leaves)}


@pytest.mark.parametrize("behaviour", ["gaussian", "censored"])
def test_each_phase_changes_only_what_is_its_own(behaviour):
    _, hyper, train = program(16, **STRUCTURES[behaviour])
    initial, between, after, _ = train(as_batch(wide_data()), hyper, 5, 5)
    own = {"behaviour", "behaviour_opt"}
    assert changed(initial, between) == own | {"reward_variance"}
    # The density is frozen in the second phase, and everything else learns.
    assert changed(between, after) == set(vars(initial)) - own


# --- optima on paper -----------------------------------------------------------------

# Not 0: nothing then holds a policy that starts broad to these data, and it may end in
# the box's corner, of which the critic has seen next to nothing.  The automatic member
# that is slack comes to 0 from within; a fixed 0 has the uniform bandit below.
MEMBERS_FIXED = (0.25, 0.5, 1.0, 2.0, 10.0)
MEMBERS_AUTOMATIC = (1.42, 0.16, -0.15)
BEHAVIOUR, BEST, TEMPERATURE = (-0.05, 0.33), 0.3, 0.1


def optimum(kappa: float) -> tuple[float, float]:
    """Mean and standard deviation of `beta^kappa exp(Q / T)`, Q = 1 - (a - best)^2."""
    mean, std = BEHAVIOUR
    precision = kappa / std**2 + 2.0 / TEMPERATURE
    weighted = kappa * mean / std**2 + 2.0 * BEST / TEMPERATURE
    return weighted / precision, precision**-0.5


def expected_log_beta(kappa: float) -> float:
    """E log beta(a) under that optimum, less the constant of beta."""
    mean, std = optimum(kappa)
    return -((mean - BEHAVIOUR[0]) ** 2 + std**2) / (2.0 * BEHAVIOUR[1] ** 2)


def root(delta: float) -> float:
    """The kappa that solves the dual for the mean of log beta less delta: 0 if slack.

    log beta of beta's own actions is minus half a chi-square variable, less the same
    constant.
    """
    threshold = -0.5 - delta
    if expected_log_beta(0.0) >= threshold:
        return 0.0
    return float(
        scipy.optimize.brentq(lambda k: expected_log_beta(k) - threshold, 0.0, 50.0)  # pyright: ignore[reportArgumentType]
    )


def population(label: str, data: Transitions, pretraining: int, updates: int, **axes):
    """States after training, one per entry of the settings in `axes`."""
    it = lab(label)
    hyper = toy_mdps.as_arrays(it.hyper)
    rates = dict.fromkeys(LEARNING_RATES, jnp.float32(3e-3))
    hyper = hyper.replace(**rates, tau=jnp.float32(0.05))
    state = it.init(jax.random.key(0), hyper)
    state = it.phases[0].train(state, jax.random.key(3), data, hyper, 0, pretraining)
    axes = {k: np.asarray(v, np.float32) for k, v in axes.items()}
    size = len(next(iter(axes.values())))

    def many(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), tree)

    hypers = many(hyper).replace(**{k: jnp.asarray(v) for k, v in axes.items()})
    states = many(state).replace(kappa=hypers.kappa)
    keys = jax.random.split(jax.random.key(1), size)
    # Critics first: the actor's tanh would saturate while they know nothing, and the
    # dual would wind up while the policy is still as broad as it starts.
    train = it.phases[1].train_many
    still = hypers.replace(actor_lr=jnp.full(size, STILL), kappa_lr=jnp.zeros(size))
    states = train(states, keys, data, still, 0, 400)
    return train(states, keys, data, hypers, 400, updates)


def policies(label: str, states: Any) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations in the bandits' only observation, one per state."""
    actor = acpo.actor_of(lab(label).config, SPEC)
    here = jnp.ones((1, 2))
    mean, log_std = jax.vmap(lambda p: networks.apply(actor, p, here))(states.actor)
    log_std = -2.5 + 2.5 * np.tanh(log_std + 1.0)
    return np.tanh(mean)[:, 0, 0], np.exp(log_std)[:, 0, 0]


@pytest.mark.long
def test_reverse_projection_and_dual_find_the_optimum_on_paper():
    """Fixed kappas: mean and spread.  Automatic: the dual's root, 0 where slack."""
    quantiles = (np.arange(toy_mdps.N) + 0.5) / toy_mdps.N
    action = BEHAVIOUR[0] + BEHAVIOUR[1] * scipy.stats.norm.ppf(quantiles)
    reward = 1.0 - (action - BEST) ** 2
    automatic = [root(delta) for delta in MEMBERS_AUTOMATIC]
    assert automatic[0] == 0.0
    assert 0.2 < automatic[1] < 0.8 < automatic[2]
    count = len(MEMBERS_FIXED), len(MEMBERS_AUTOMATIC)
    axes = {"alpha": [TEMPERATURE / reward.std()] * sum(count)}
    axes["kappa"] = [*MEMBERS_FIXED, *([1.0] * count[1])]
    axes["kappa_lr"] = [*([0.0] * count[0]), *([1e-2] * count[1])]
    axes["delta"] = [*([0.0] * count[0]), *MEMBERS_AUTOMATIC]
    data = toy_mdps.bandit(np.clip(action, -1.0, 1.0), reward)
    states = population("acpo", data, 1500, 3000, **axes)
    # A fixed kappa does not move by one bit.
    np.testing.assert_array_equal(states.kappa[: count[0]], MEMBERS_FIXED)
    assert float(states.kappa[count[0]]) == 0.0
    np.testing.assert_allclose(states.kappa[count[0] :], automatic, rtol=0.1, atol=0.15)
    mean, std = policies("acpo", states)
    want = np.array([optimum(kappa) for kappa in (*MEMBERS_FIXED, *automatic)])
    np.testing.assert_allclose(mean, want[:, 0], atol=0.06)
    np.testing.assert_allclose(std, want[:, 1], atol=0.04)


def test_reverse_projection_without_constraint_takes_the_best_action():
    size = len(MEMBERS_FIXED) + len(MEMBERS_AUTOMATIC)  # As above: compiled once.
    axes = {"alpha": [0.02], "kappa": [0.0], "kappa_lr": [0.0], "delta": [0.0]}
    axes = {k: v * size for k, v in axes.items()}
    states = population("acpo", toy_mdps.uniform_bandit(), 200, 2000, **axes)
    np.testing.assert_allclose(policies("acpo", states)[0], 0.5, atol=0.06)


@pytest.mark.long
def test_forward_projection_weighs_the_actions_of_the_data():
    """The rare action of two is good.  Against paper, at kappa = 1 AWAC; nll ends."""
    data, kappas = toy_mdps.two_point_bandit(), (0.0, 1.0, 5.0)
    reward = np.asarray(data.reward, np.float64)
    temperature = reward.std()
    axes = {"alpha": [1.0] * 5, "kappa": [*kappas, 1.0, 1.0]}
    axes["kappa_lr"] = [0.0, 0.0, 0.0, 0.05, 0.05]
    axes["delta"] = [0.0, 0.0, 0.0, 20.0, -20.0]
    axes["kappa_max"] = [10.0, 10.0, 4.0, 10.0, 4.0]  # Of the dual, not of fixed ones.
    states = population("acpo@paper", data, 1500, 2500, **axes)
    np.testing.assert_array_equal(states.kappa, [*kappas, 0.0, 4.0])
    mean, std = policies("acpo@paper", states)
    share = np.array([1.0 - reward.mean(), reward.mean()])
    points = np.array([-0.5, 0.5])
    centre = share @ points
    spread = np.sqrt(share @ (points - centre) ** 2)
    # The behaviour model is one Gaussian, whose likelihood both points have.
    density = scipy.stats.norm.logpdf(points, centre, spread)
    for i, kappa in enumerate((*kappas, 0.0)):
        weights = share * np.exp(
            np.array([0.0, 1.0]) / temperature + (kappa - 1.0) * density
        )
        want = np.average(points, weights=weights)
        assert mean[i] == pytest.approx(want, abs=0.06)
        assert std[i] == pytest.approx(np.sqrt(0.25 - want**2), abs=0.06)
    # The spectrum's two sides differ in the action that they choose.
    assert mean[0] > mean[1] > 0.2 and mean[2] < -0.2

    rates = {"actor_lr": 3e-3, "critic_lr": 3e-3, "tau": 0.05}
    other = toy_mdps.solve("awac", data, 2500, temperature=temperature, **rates)
    actor = awac.actor_of(lab("awac").config, SPEC)
    raw = networks.apply(actor, other.actor, jnp.ones((1, 2)))[0]
    assert mean[1] == pytest.approx(float(np.tanh(raw[0, 0])), abs=0.08)


# --- every structure, and data that degenerate ---------------------------------------

STRUCTURES = {"gaussian": {"behaviour": "gaussian"}}
STRUCTURES["censored"] = {"behaviour": "censored", "actor": "forward"}
STRUCTURES["censored"] |= {"critic": "expectile", "threshold": "ess"}
# Every behaviour, critic, actor and threshold; the reverse projection, which needs
# derivatives of the density by the action, with every behaviour.
COVERING = [
    {"behaviour": "gaussian", "actor": "forward", "threshold": "nll"},
    {"behaviour": "censored", "critic": "regularised", "threshold": "nll"},
    {"behaviour": "mixture", "actor": "forward", "critic": "regularised"},
    {"behaviour": "mixture", "critic": "expectile", "threshold": "ess"},
    {"behaviour": "flow", "critic": "expectile", "threshold": "nll"},
    {"behaviour": "cvae", "critic": "regularised", "threshold": "ess"},
]
COVERING += STRUCTURES.values()


@pytest.mark.parametrize("structure", COVERING, ids=lambda s: "-".join(s.values()))
def test_every_structure_learns_and_stays_finite(structure):
    _, hyper, train = program(16, **structure)
    initial, between, after, metrics = train(as_batch(wide_data()), hyper, 20, 20)
    assert_finite((between, after, metrics))
    assert {"behaviour", "reward_variance"} <= changed(initial, between)
    assert {"actor", "critics", "value", "kappa", "threshold"} <= changed(
        between, after
    )
    assert float(metrics["effective_sample_size"]) <= 20.0 * (1.0 + 1e-5)


DEGENERATE = ("on the bounds", "constant dimension", "constant at a corner")
DEGENERATE += ("constant reward", "one transition")


def degenerate(kind: str) -> dict[str, np.ndarray]:
    fields = wide_data()
    if kind == "on the bounds":
        fields["action"] = np.where(fields["action"] > 0.0, 1.0, -1.0)
    elif kind == "constant dimension":
        fields["action"][:, 1] = 0.3
    elif kind == "constant at a corner":
        fields["action"] = np.ones((ROWS, 2))
    elif kind == "constant reward":
        fields["reward"] = np.full(ROWS, 3.0)
    else:
        fields = {k: np.repeat(v[:1], ROWS, axis=0) for k, v in fields.items()}
    return fields


@pytest.mark.parametrize("behaviour", ["gaussian", "censored"])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_data_stay_finite(behaviour, kind):
    agent, hyper, train = program(16, **STRUCTURES[behaviour])
    # Long enough strides that the density reaches its bounds and kappa moves.
    rates = dict.fromkeys(LEARNING_RATES, jnp.float32(1e-2))
    hyper = hyper.replace(**rates, kappa_lr=jnp.float32(0.1))
    fields = degenerate(kind)
    _, between, after, metrics = train(as_batch(fields), hyper, 300, 300)
    assert_finite((between, after, metrics))
    assert 0.0 <= float(after.kappa) <= float(hyper.kappa_max)
    if kind in ("constant reward", "one transition"):
        assert float(after.reward_variance) < 1e-9
    acted = agent.act(jax.random.key(0), after, jnp.float32(fields["obs"]), hyper)
    assert acted.shape == (ROWS, 2) and np.abs(acted).max() <= 1.0


# --- settings that are refused -------------------------------------------------------


MISSPELT = "behaviour=gausian=gaussian critic=softt=soft actor=backward=forward "
MISSPELT += "threshold=quantil=quantile"


@pytest.mark.parametrize("given", MISSPELT.split())
def test_unknown_structure_names_the_nearest(given):
    setting, value, nearest = given.split("=")
    config = acpo.Config(**{setting: value})
    with pytest.raises(UsageError) as caught:
        acpo.make_acpo(config, WIDE)
    message = str(caught.value)
    assert f"'{value}'" in message and f"'{nearest}'" in message
    assert setting in message and "acpo" in message and "\n" not in message


OUT_OF_RANGE = (
    "alpha=0 alpha=-0.1 alpha=nan kappa=-0.001 kappa=inf kappa_lr=-1 kappa_max=0 "
    "level=1 delta=20.5 largest_weight=0 components=0"
)


@pytest.mark.parametrize("given", OUT_OF_RANGE.split())
def test_numbers_out_of_range_are_refused(given):
    setting, value = given.split("=")
    with pytest.raises(UsageError, match=f"'{setting}' of acpo is {value!r}"):
        resolve(acpo.ENTRY, family="none", preset=None, overrides={setting: value})
