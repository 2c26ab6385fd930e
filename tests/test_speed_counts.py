"""The arithmetic of an update: counted by hand, by our script, and by the compiler."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from offrl_jax.agents.entry import resolve
from offrl_jax.agents.registry import REGISTRY, parse_label
from offrl_jax.types import Spec

SPEC = Spec(obs_dim=11, action_dim=3, horizon=1000)
BATCH, WIDTH = 32, 64

updates = scripts.load("speed/updates")


def _settings(label: str, **overrides: Any) -> tuple[Any, Any]:
    """Of `NAME[@PRESET] [SETTING=VALUE ...]`, the label of a row of the table."""
    agent, *settings = label.split()
    name, preset = parse_label(agent)
    told = dict(setting.split("=") for setting in settings)
    return resolve(
        REGISTRY[name], family="", preset=preset, overrides={**told, **overrides}
    )


def _agent(label: str, **overrides: Any) -> Any:
    structure = {"hidden": (WIDTH, WIDTH), "batch_size": BATCH, **overrides}
    config, hyper = _settings(label, **structure)
    name, _ = parse_label(label.split()[0])
    return REGISTRY[name].make(config, SPEC), hyper


def _flops(label: str, **overrides: Any) -> float:
    agent, hyper = _agent(label, **overrides)
    return updates.update_flops(agent, agent.phases[-1], hyper, SPEC)


# The hand count.  A layer I -> J costs 2 B I J forwards, as much for the gradient of
# its kernel, and as much for the gradient of its input.


def _layers(inputs: int, outputs: int) -> tuple[int, int]:
    """First layer, and all the others."""
    unit = 2 * BATCH
    return unit * inputs * WIDTH, unit * (WIDTH * WIDTH + WIDTH * outputs)


def _forward(inputs: int, outputs: int) -> int:
    return sum(_layers(inputs, outputs))


def _training(inputs: int, outputs: int) -> int:
    """Forwards and backwards; nobody asks for the gradient of the inputs."""
    first, others = _layers(inputs, outputs)
    return 2 * first + 3 * others


def _through(inputs: int, outputs: int) -> int:
    """Forwards, and backwards to the inputs with the parameters held."""
    return 2 * _forward(inputs, outputs)


O_DIM, A_DIM = SPEC.obs_dim, SPEC.action_dim
CRITIC, VALUE = (O_DIM + A_DIM, 1), (O_DIM, 1)
# Mean alone, and mean with a standard deviation that depends on the state.
MEAN, GAUSSIAN = (O_DIM, A_DIM), (O_DIM, 2 * A_DIM)
# A velocity field, which sees the time, too, and a map of actions.
FLOW, ACTION_MAP = (O_DIM + A_DIM + 1, A_DIM), (O_DIM + A_DIM, A_DIM)
TARGETS = _forward(*MEAN) + 2 * _forward(*CRITIC)


def _acpo(critics: int = 4) -> int:
    """What all variants of ACPO have in common."""
    return (
        # The policy in s: draws for V's target and the dual, and its own gradient.
        _training(*MEAN)
        # Beta in s: of the policy's actions for the dual, of the data's for eps.
        + _forward(*GAUSSIAN)
        # Q' of the data: weights of the forward projection, in every variant reported.
        + critics * _forward(*CRITIC)
        + _training(*VALUE)
        + critics * _training(*CRITIC)
    )


def _acpo_soft(critics: int = 4) -> int:
    """Targets of V and of Q: Q' of the policy's actions in s and in s'."""
    return 2 * critics * _forward(*CRITIC) + _forward(*MEAN)


def _acpo_reverse(critics: int = 4) -> int:
    """Through all critics, the policy being counted; beta of the actions drawn here,
    whose gradient does not pass through the network."""
    return critics * _through(*CRITIC) + _forward(*GAUSSIAN)


def _misa(samples: int, gradients: int = 0) -> int:
    """MISA with K samples and that many gradients of T per state in the chains."""
    return (
        # Targets; critics of the data's action and of K drawn ones.
        _forward(*GAUSSIAN)
        + 2 * _forward(*CRITIC)
        + 2 * (1 + samples) * _training(*CRITIC)
        # T is the least of two critics.
        + gradients * 2 * _through(*CRITIC)
        # The actor's passes hold those that the K samples are drawn from.
        + _training(*GAUSSIAN)
        + 2 * _through(*CRITIC)
    )


def _decorated(velocities: int) -> int:
    """DeFlow, FiDec: so many evaluations of the flow per state, and its training."""
    return (
        velocities * _forward(*FLOW)
        + _training(*FLOW)
        + _forward(*ACTION_MAP)
        + 2 * _forward(*CRITIC)
        + 2 * _training(*CRITIC)
        + _training(*ACTION_MAP)
        + 2 * _through(*CRITIC)
    )


HAND_COUNT = {
    "bc": _training(*MEAN),
    "gaussian_bc": _training(*GAUSSIAN),
    # The targets, two critics trained, and every second time the actor through Q_1.
    "td3_bc": TARGETS
    + 2 * _training(*CRITIC)
    + (_training(*MEAN) + _through(*CRITIC)) / 2,
    # The same, but the actor's loss looks at both critics.
    "rebrac": TARGETS
    + 2 * _training(*CRITIC)
    + (_training(*MEAN) + 2 * _through(*CRITIC)) / 2,
    # Q' of the data, V trained, its new values in s and s', actor and critics trained.
    "iql": 2 * _forward(*CRITIC)
    + _training(*VALUE)
    + 2 * _forward(*VALUE)
    + _training(*MEAN)
    + 2 * _training(*CRITIC),
    # And one action drawn and scored in one row.
    "rank1_iql": 2 * _forward(*CRITIC)
    + _training(*VALUE)
    + 2 * _forward(*VALUE)
    + _training(*MEAN)
    + 2 * _training(*CRITIC)
    + (_forward(*MEAN) + _training(*MEAN)) / BATCH,
    # V' in s', V trained, its new values in s and s', actor trained.
    "awr": _forward(*VALUE)
    + _training(*VALUE)
    + 2 * _forward(*VALUE)
    + _training(*MEAN),
    # The new critics of the data's action and of the policy's, then the actor, whose
    # passes the policy's action comes from.
    "awac": TARGETS + 2 * _training(*CRITIC) + 4 * _forward(*CRITIC) + _training(*MEAN),
    # Behaviour trained; the policy's action in s for V's target; V trained; critics
    # trained; new Q, V and beta of the data for the weight; the policy trained, in the
    # pass that the action in s came from.
    "inac": _training(*MEAN)
    + 2 * _forward(*CRITIC)
    + _training(*VALUE)
    + TARGETS
    + 2 * _training(*CRITIC)
    + 2 * _forward(*CRITIC)
    + _forward(*VALUE)
    + _forward(*MEAN)
    + _training(*MEAN),
    # Policy and beta in s' and Q' there; critics; policy and beta in s, through both.
    "brac": 2 * _forward(*GAUSSIAN)
    + 2 * _forward(*CRITIC)
    + 2 * _training(*CRITIC)
    + _training(*GAUSSIAN)
    + _forward(*GAUSSIAN)
    + 2 * _through(*CRITIC),
    "acpo": _acpo() + _acpo_soft() + _acpo_reverse(),
    "acpo actor=forward": _acpo() + _acpo_soft(),
    "acpo@paper": _acpo(2) + _acpo_soft(2),
    # Beta in s', too.
    "acpo critic=regularised": _acpo()
    + _acpo_soft()
    + _acpo_reverse()
    + _forward(*GAUSSIAN),
    # V's target is Q' of the data, and Q's the new V in s'.
    "acpo critic=expectile": _acpo() + _acpo_reverse() + _forward(*VALUE),
    "acpo@in_sample": _acpo(2) + _forward(*VALUE),
    # Ten chains: where each starts, and two leapfrogs per transition, 5 + 5 of them.
    "misa": _misa(50, 10 * (1 + 2 * 10)),
    "misa burn_in=0": _misa(50, 10 * (1 + 2 * 5)),
    # One chain of 5 + 50 transitions.
    "misa@released": _misa(50, 1 + 2 * 55),
    # Weights of values that the critics' loss has computed anyway: for nothing.
    "misa correction=importance": _misa(50),
    "misa correction=none": _misa(50),
    "misa correction=importance samples=10": _misa(10),
    "misa@quick": _misa(4),
    # There is no gain, and nothing to draw for it.
    "misa bound=ba": _misa(0),
    "flow_bc": _training(*FLOW),
    # Q' of the data, V trained, V in s', critics and flow trained.
    "ifql": 2 * _forward(*CRITIC)
    + _training(*VALUE)
    + _forward(*VALUE)
    + 2 * _training(*CRITIC)
    + _training(*FLOW),
    # One-step policy and Q' in s'; critics; flow; ten steps of it in s; the policy.
    "fql": _forward(*ACTION_MAP)
    + 2 * _forward(*CRITIC)
    + 2 * _training(*CRITIC)
    + _training(*FLOW)
    + 10 * _forward(*FLOW)
    + _training(*ACTION_MAP)
    + 2 * _through(*CRITIC),
    # Ten steps of the flow in s and ten in s'.
    "deflow": _decorated(20),
    "deflow@quick": _decorated(2 * 5),
    # And one score, or eight, each at the end of ten steps of its own.
    "fidec": _decorated(20 + 1),
    "fidec@paper": _decorated(20 + 1),
    "fidec@code": _decorated(20 + 8 * (10 + 1)),
    "fidec@kl": _decorated(20 + 1),
}
# XLA counts the body of a loop once, however often it runs.  With loops that run once
# both counts mean the same; that ours takes a scan as often as it turns is tested with
# `TestMatmulFlops.test_scan_counts_every_turn` and, for agents, in the hand count.
SINGLE_TURN = {
    "fql": {"flow_steps": 1},
    "deflow": {"flow_steps": 1},
    "fidec": {"flow_steps": 1},
    # Few samples and chains: the counts grow alike, the time to compile does not.
    "misa": {"samples": 4, "chains": 2, "draws": 1, "burn_in": 0, "leapfrogs": 1},
}


OFFLINE = sorted(name for name, entry in REGISTRY.items() if not entry.on_policy)


def test_every_agent_is_counted_by_hand() -> None:
    assert {label.split()[0].split("@")[0] for label in HAND_COUNT} == set(OFFLINE)


@pytest.mark.parametrize("label", HAND_COUNT)
def test_an_update_multiplies_what_its_losses_need_and_nothing_more(label: str) -> None:
    assert _flops(label) == HAND_COUNT[label]


def test_actor_at_every_update_counts_whole() -> None:
    every = TARGETS + 2 * _training(*CRITIC)
    actor = _training(O_DIM, A_DIM) + _through(*CRITIC)
    assert _flops("td3_bc", policy_delay=1) == every + actor
    assert _flops("td3_bc", policy_delay=4) == every + actor / 4


@pytest.mark.parametrize("name", OFFLINE)
def test_count_agrees_with_the_compilers(name: str) -> None:
    # XLA counts element-wise work, too: some per cent at a width of 256, where a
    # product of B x 256 x 256 stands against a few operations on B x 256.
    single = SINGLE_TURN.get(name, {})
    agent, hyper = _agent(name, hidden=(256, 256), batch_size=256, **single)
    phase = agent.phases[-1]
    key = jax.random.key(0)
    batch = updates.synthetic_transitions(SPEC, 256 * phase.stride)
    state = jax.eval_shape(agent.init, key, hyper)
    hyper = jax.tree.map(np.float32, hyper)
    compiled = jax.jit(phase.update).lower(key, state, batch, hyper).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    counted = updates.update_flops(agent, phase, hyper, SPEC) * phase.stride
    assert counted < analysis["flops"] < 1.15 * counted


class TestMatmulFlops:
    x = jax.ShapeDtypeStruct((5, 7), jnp.float32)
    w = jax.ShapeDtypeStruct((7, 7), jnp.float32)

    def test_one_product(self) -> None:
        assert updates.matmul_flops(jnp.matmul, self.x, self.w) == 2 * 5 * 7 * 7

    def test_batched_product(self) -> None:
        many = jax.ShapeDtypeStruct((3, 5, 7), jnp.float32)
        product = jax.vmap(jnp.matmul, (0, None))
        assert updates.matmul_flops(product, many, self.w) == 3 * 2 * 5 * 7 * 7

    def test_contraction_of_two_axes(self) -> None:
        def trace(x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.tensordot(x, y, axes=2)

        assert updates.matmul_flops(trace, self.w, self.w) == 2 * 7 * 7

    def test_scan_counts_every_turn(self) -> None:
        def chain(x: jax.Array, w: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda y, _: (y @ w, None), x, length=4)[0]

        assert updates.matmul_flops(chain, self.x, self.w) == 4 * 2 * 5 * 7 * 7

    def test_calls_are_looked_into(self) -> None:
        wrapped = jax.jit(jax.checkpoint(jnp.matmul))
        assert updates.matmul_flops(wrapped, self.x, self.w) == 2 * 5 * 7 * 7

    def test_element_wise_work_does_not_count(self) -> None:
        assert updates.matmul_flops(jnp.tanh, self.x) == 0

    def test_loops_without_products_do_not_matter(self) -> None:
        # jax.random.normal holds such a loop.
        def noise(key: jax.Array) -> jax.Array:
            return jax.lax.while_loop(lambda n: n < 3.0, lambda n: n + 1.0, key)

        assert updates.matmul_flops(noise, jax.ShapeDtypeStruct((), jnp.float32)) == 0

    @pytest.mark.parametrize("kind", ["while", "cond"])
    def test_refuses_to_guess(self, kind: str) -> None:
        def loop(x: jax.Array, w: jax.Array) -> jax.Array:
            return jax.lax.while_loop(lambda y: y[0, 0] < 1.0, lambda y: y @ w, x)

        def branch(x: jax.Array, w: jax.Array) -> jax.Array:
            return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

        function = {"while": loop, "cond": branch}[kind]
        with pytest.raises(ValueError, match=f"a '{kind}' of the program"):
            updates.matmul_flops(function, self.x, self.w)


def test_misa_runs_with_every_price_of_its_gradient() -> None:
    found = updates.variants(REGISTRY["misa"])
    assert list(found) == [
        "misa",
        "misa@released",
        "misa@quick",
        "misa burn_in=0",
        "misa correction=importance",
        "misa correction=importance samples=10",
        "misa correction=none",
    ]
    # Labels say what they stand for: the settings that the hand count reads off them.
    for label, overrides in found.items():
        assert label in HAND_COUNT
        config, hyper = resolve(
            REGISTRY["misa"], family="", preset=None, overrides=overrides
        )
        assert (config, hyper) == _settings(label)


def test_unit_of_arithmetic_makes_td3_bc_about_fourteen() -> None:
    # Three for the targets, three for each net that is trained, two through Q_1; less
    # the gradients of the inputs of the nets that are trained.
    unit = updates.forward_flops(BATCH, WIDTH, SPEC)
    assert unit == _forward(*CRITIC)
    assert 13 < _flops("td3_bc", policy_delay=1) / unit < 14
