"""Problems with answers on paper, and one compiled trainer per agent to solve them.

All problems share one shape (2 observations, 1 action, N transitions), so that every
test of an agent runs the same compiled program: only data, settings and lengths differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from offrl_jax.agents import registry
from offrl_jax.agents.entry import resolve
from offrl_jax.types import Agent, Phase, Spec, Transitions

N = 512
SPEC = Spec(obs_dim=2, action_dim=1, horizon=2)
TINY = {"hidden": (32, 32), "batch_size": 64, "obs_transform": "none"}
# Of agents that gather their own experience: a rollout of as many transitions.
TINY_ROLLOUT = {"hidden": (8,), "environments": 4, "steps": 16}
# Further counts of single agents, where theirs would be most of the tests' time.
TINY_OF = {
    "misa": {"samples": 4, "chains": 2, "draws": 2, "burn_in": 1},
    # Steps so long that the line search has something to refuse, and a trust region
    # that is not wider than the largest step.
    "trpo": {"actor_lr": 3.0, "backtrack": 0.7},
    "woodbury_ac": {"damping": 10.0},
}


def _transitions(
    obs: np.ndarray,
    action: np.ndarray,
    reward: np.ndarray,
    discount: np.ndarray,
    next_obs: np.ndarray,
    has_next_action: np.ndarray,
) -> Transitions:
    fields = (obs, action, reward, discount, next_obs, action, has_next_action)
    return Transitions(*(jnp.asarray(x, jnp.float32) for x in fields))


def bandit(action: np.ndarray, reward: np.ndarray) -> Transitions:
    """One-step episodes that all terminate, in one and the same observation."""
    obs, zeros = np.ones((N, 2)), np.zeros(N)
    return _transitions(obs, action[:, None], reward, zeros, obs, zeros)


def two_point_bandit() -> Transitions:
    """Actions -0.5 (reward 0, 70 % of the data) and +0.5 (reward 1, 30 %)."""
    good = np.arange(N) < 0.3 * N
    return bandit(np.where(good, 0.5, -0.5), good.astype(float))


def uniform_bandit() -> Transitions:
    """Actions spread evenly over [-1, 1]; reward `1 - (a - 0.5)^2`, best at 0.5."""
    action = np.linspace(-1.0, 1.0, N)
    return bandit(action, 1.0 - (action - 0.5) ** 2)


CHAIN_OBS = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])


def chain() -> Transitions:
    """Three observations whose values do not depend on the actions (drawn at random).

    0 goes to 1 with reward 1; 1 terminates with reward 2; 2 comes back to itself with
    reward 0.3 and is cut by a time-out after every step.  Where there is a next action,
    it repeats the action.
    """
    rng = np.random.default_rng(0)
    at = np.arange(N) % 3
    action = rng.uniform(-1.0, 1.0, (N, 1))
    reward = np.array([1.0, 2.0, 0.3])[at]
    discount = np.array([1.0, 0.0, 1.0])[at]
    following = np.array([1, 1, 2])[at]
    has_next = np.array([1.0, 0.0, 0.0])[at]
    return _transitions(
        CHAIN_OBS[at], action, reward, discount, CHAIN_OBS[following], has_next
    )


def chain_values(gamma: float) -> np.ndarray:
    """The value of each observation of `chain`, by hand."""
    return np.array([1.0 + gamma * 2.0, 2.0, 0.3 / (1.0 - gamma)])


def random_data() -> Transitions:
    """Random transitions: a third goes on, a third terminates, a third times out."""
    rng = np.random.default_rng(1)
    at = np.arange(N) % 3
    data = _transitions(
        rng.normal(size=(N, 2)),
        rng.uniform(-1.0, 1.0, (N, 1)),
        rng.normal(size=N),
        (at != 1).astype(float),
        rng.normal(size=(N, 2)),
        (at == 0).astype(float),
    )
    next_action = rng.uniform(-1.0, 1.0, (N, 1)) * (at == 0)[:, None]
    return data._replace(next_action=jnp.asarray(next_action, jnp.float32))


class Runner(NamedTuple):
    """Compiled training in one phase of an agent.

    Attributes:
      phase: what is trained.
      traces: how often `train` has been traced, as a list of one number.
      train: `(state, key, data, hyper, start, stop) -> state`; stop is excluded.
      train_many: the same with a leading axis on state, key and hyper.
    """

    phase: Phase
    traces: list[int]
    train: Callable[..., Any]
    train_many: Callable[..., Any]


class Lab(NamedTuple):
    """An agent with tiny networks and its default settings; compiled when first used.

    Attributes:
      init: compiled `(key, hyper) -> state`.
      phases: one `Runner` per phase of the agent, in their order.
    """

    agent: Agent
    config: Any
    hyper: Any
    init: Callable[..., Any]
    phases: tuple[Runner, ...]

    @property
    def train(self) -> Callable[..., Any]:
        """`train` of the last phase: the whole training of most agents."""
        return self.phases[-1].train


def phase_names(name: str) -> list[str]:
    """Names of an agent's phases, without touching a device."""
    return [phase.name for phase in _tiny(name)[0].phases]


def _tiny(label: str) -> tuple[Agent, Any, Any]:
    name, preset = registry.parse_label(label)
    entry = registry.get_entry(name)
    tiny = TINY_ROLLOUT if entry.on_policy else TINY
    config, hyper = resolve(
        entry, family="toy", preset=preset, overrides=tiny | TINY_OF.get(name, {})
    )
    return entry.make(config, SPEC), config, hyper


@functools.cache
def lab(label: str) -> Lab:
    """The laboratory of `NAME` or `NAME@PRESET`, compiled once per test process."""
    agent, config, hyper = _tiny(label)
    runners = tuple(_runner(agent, phase) for phase in agent.phases)
    return Lab(agent, config, as_arrays(hyper), jax.jit(agent.init), runners)


def _runner(agent: Agent, phase: Phase) -> Runner:
    rows = agent.batch_size * phase.stride
    traces = [0]

    def one(state: Any, key: Any, data: Transitions, hyper: Any, step: Any) -> Any:
        sample_key, update_key = jax.random.split(jax.random.fold_in(key, step))
        index = jax.random.randint(sample_key, (rows,), 0, N)
        batch = jax.tree.map(lambda x: x[index], data)
        return phase.update(update_key, state, batch, hyper)[0]

    def train(
        state: Any, key: Any, data: Transitions, hyper: Any, start: Any, stop: Any
    ) -> Any:
        traces[0] += 1
        return jax.lax.fori_loop(
            start, stop, lambda i, s: one(s, key, data, hyper, i), state
        )

    many = jax.vmap(train, (0, 0, None, 0, None, None))
    return Runner(phase, traces, jax.jit(train), jax.jit(many))


def as_arrays(hyper: Any) -> Any:
    """The settings as float32 scalars, as the population passes them."""
    return jax.tree.map(jnp.float32, hyper)


def solve(
    name: str,
    data: Transitions,
    calls: int,
    pretraining: int = 0,
    /,
    **settings: float,
) -> Any:
    """The state after `calls` calls on `data`, with some settings replaced.

    Each phase before the last is called `pretraining` times, which must not be 0 then.
    """
    it = lab(name)
    assert (pretraining > 0) == (len(it.phases) > 1), "pretraining: for several phases"
    hyper = as_arrays(it.hyper.replace(**settings))
    state = it.init(jax.random.key(0), hyper)
    for runner in it.phases[:-1]:
        state = runner.train(state, jax.random.key(3), data, hyper, 0, pretraining)
    return it.train(state, jax.random.key(1), data, hyper, 0, calls)


def action_at(name: str, state: Any, obs: Any) -> np.ndarray:
    """The evaluated policy's actions `[B, A]` in `obs` `[B, O]`."""
    it = lab(name)
    return np.asarray(
        it.agent.act(jax.random.key(2), state, jnp.asarray(obs, jnp.float32), it.hyper)
    )


def forward(layers: Any, x: np.ndarray, layer_norm: bool = False) -> np.ndarray:
    """A ReLU perceptron in float64 NumPy, from the parameters of `networks.MLP`."""
    dense = [layers[f"Dense_{i}"] for i in range(sum("Dense" in k for k in layers))]
    for i, layer in enumerate(dense):
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
        if i < len(dense) - 1:
            x = np.maximum(x, 0.0)
            if layer_norm:
                norm = layers[f"LayerNorm_{i}"]
                x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
                    x.var(-1, keepdims=True) + 1e-6
                )
                x = x * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
    return x
