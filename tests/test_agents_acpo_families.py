"""ACPO beside the families that it spans, as agents of their own, after training.

test_agents_acpo.py has AWAC at kappa = 1 under forward projection; here are the support
end, the density point under reverse projection, and the independence of the three.
"""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy_mdps
from toy_mdps import SPEC, lab, solve

import offrl_jax
from offrl_jax import networks
from offrl_jax.agents import acpo, brac, inac

pytestmark = pytest.mark.little_optimised

HERE = jnp.ones((1, 2))
RATES = {"actor_lr": 3e-3, "critic_lr": 3e-3, "tau": 0.05, "behaviour_lr": 3e-3}
AGENTS = Path(offrl_jax.__file__).parent / "agents"


def acpo_mean(label: str, data, temperature: float, kappa: float) -> float:
    """The policy's action after training with a fixed kappa, alpha = `temperature`."""
    spread = float(np.std(np.asarray(data.reward, np.float64)))
    state = solve(
        label,
        data,
        2500,
        1000,
        alpha=temperature / spread,
        kappa=kappa,
        kappa_lr=0.0,
        value_lr=3e-3,
        **RATES,
    )
    assert float(state.kappa) == kappa
    raw, _ = networks.apply(acpo.actor_of(lab(label).config, SPEC), state.actor, HERE)
    return float(np.tanh(raw[0, 0]))


def test_support_end_is_inac():
    """kappa = 0 and InAC, on data whose good action is rare; kappa = 1 is elsewhere."""
    data, temperature = toy_mdps.two_point_bandit(), 1.0
    ours = acpo_mean("acpo@paper", data, temperature, 0.0)
    other = solve("inac", data, 2500, temperature=temperature, value_lr=3e-3, **RATES)
    raw, _ = networks.apply(inac.actor_of(lab("inac").config, SPEC), other.actor, HERE)
    assert ours == pytest.approx(float(np.tanh(raw[0, 0])), abs=0.08)
    # By hand: w = exp(r / T) / beta, beta being the Gaussian fitted to both points.
    share, points = np.array([0.7, 0.3]), np.array([-0.5, 0.5])
    beta = scipy.stats.norm.pdf(points, share @ points, np.sqrt(0.25 - 0.2**2))
    for kappa, near in ((0.0, True), (1.0, False)):
        weight = share * beta ** (kappa - 1.0) * np.exp(np.array([0.0, 1.0]))
        want = np.average(points, weights=weight)
        assert (abs(ours - want) < 0.06) == near


def test_density_point_by_reverse_projection_is_brac():
    """kappa = 1: both solve the KL-regularised problem, in coordinates of their own."""
    quantile = (np.arange(toy_mdps.N) + 0.5) / toy_mdps.N
    action = -0.2 + 0.2 * scipy.stats.norm.ppf(quantile)
    data = toy_mdps.bandit(action, 1.0 - (action - 0.3) ** 2)
    temperature = 0.1
    ours = acpo_mean("acpo", data, temperature, 1.0)
    other = solve("brac", data, 2500, 1000, alpha=temperature, **RATES)
    raw, _ = networks.apply(brac.actor_of(lab("brac").config, SPEC), other.actor, HERE)
    assert ours == pytest.approx(float(np.tanh(raw[0, 0])), abs=0.06)
    precision = 1.0 / 0.2**2 + 2.0 / temperature
    want = (-0.2 / 0.2**2 + 2.0 * 0.3 / temperature) / precision
    assert ours == pytest.approx(want, abs=0.06)
    # Far from the behaviour's mean and from the best action.
    assert -0.12 < want < 0.2


@pytest.mark.parametrize("name", ["awr", "awac", "inac", "brac"])
def test_families_import_nothing_of_what_acpo_is_made_of(name):
    """In the source: a function imported by its name would be no module at run time."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse((AGENTS / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {x for x in imported if x.startswith("offrl_jax")}
    assert ours
    allowed = ("distributions", "losses", "networks", "agents.optim", "agents.entry")
    allowed += ("types",)
    roots = tuple(f"offrl_jax.{x}" for x in allowed)
    assert [x for x in ours if not x.startswith(roots)] == []


def test_a_policy_at_its_broadest_becomes_narrow_again():
    """First entropy alone (kappa = 0, one reward for all), then narrow data at 5."""
    quantile = (np.arange(toy_mdps.N) + 0.5) / toy_mdps.N
    data = toy_mdps.bandit(0.4 * quantile - 0.2, np.zeros(toy_mdps.N))
    it = lab("acpo")
    hyper = toy_mdps.as_arrays(it.hyper.replace(kappa_lr=0.0, alpha=1e4, **RATES))
    state = it.init(jax.random.key(0), hyper)
    state = it.phases[0].train(state, jax.random.key(3), data, hyper, 0, 500)
    spreads = []
    for kappa in (0.0, 5.0):
        state = state.replace(kappa=jnp.float32(kappa))
        state = it.train(state, jax.random.key(1), data, hyper, 0, 400)
        spreads.append(float(state.actor["params"]["log_std"][0]))
    # Before the bound: it was far up, and came back all the way.
    assert spreads[0] > 0.5
    assert spreads[1] < -0.5
