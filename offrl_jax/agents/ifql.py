"""IFQL: implicit Q-learning with a behaviour flow, of which the best of N is played.

The flow version of IDQL (Hansen-Estruch et al. 2023, arXiv:2304.10573) that Park, Li &
Levine (2025), arXiv:2502.02538, compare FQL with.  With Q' = min(Q'_1, Q'_2):

    L(V)   = E |tau - 1(u < 0)| u^2,  u = Q'(s, a) - V(s)
    L(Q_i) = E (r + gamma * d * V(s') - Q_i(s, a))^2
    L(v)   = E |v(s, x_t, t) - (a - z)|^2 / A                 (flow matching)
    policy: a_1 .. a_N from the flow; the one with the largest min_i Q_i(s, a_n)

d is 0 at terminal states only.  No loss evaluates an action outside of the data, and
the flow knows no reward: all improvement is in the choice, so N sets how greedy it is.
All losses use the parameters of before the update, and the targets follow the critics
of before it (IQL updates V first).

The published settings of IFQL were not at hand: second-hand, docs/algorithms/ifql.md.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import flows, losses, networks
from offrl_jax.agents import optim
from offrl_jax.agents.entry import (
    COUNT,
    OPEN_UNIT,
    POSITIVE,
    POSITIVE_UNIT,
    UNIT,
    AgentEntry,
    Preset,
    check_choices,
    one_of,
    within,
)
from offrl_jax.types import Agent, Array, Key, Metrics, Phase, Spec, Transitions


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure of networks and policy, and names of the data's transforms.

    Attributes:
      flow_steps: steps of the integrator from noise to action.
      integrator: one of `flows.INTEGRATORS`.
      layer_norm: in the critics and the state value.
      candidates: N, actions of the flow that the policy chooses from.
    """

    hidden: tuple[int, ...] = within(COUNT, (512, 512, 512, 512))
    batch_size: int = within(COUNT, 256)
    flow_steps: int = within(COUNT, 10)
    integrator: str = one_of(flows.INTEGRATORS, "euler")
    layer_norm: bool = True
    candidates: int = within(COUNT, 32)
    obs_transform: str = "none"
    reward_transform: str = "none"


@struct.dataclass
class Hyper:
    """Traced settings, second-hand as FQL's defaults for this agent."""

    flow_lr: float = within(POSITIVE, 3e-4)
    critic_lr: float = within(POSITIVE, 3e-4)
    value_lr: float = within(POSITIVE, 3e-4)
    discount: float = within(UNIT, 0.99)
    tau: float = within(POSITIVE_UNIT, 0.005)
    expectile: float = within(OPEN_UNIT, 0.9)


@struct.dataclass
class State:
    """Parameters and Adam moments; `actor` is the behaviour's velocity field."""

    actor: networks.Params
    critics: tuple[networks.Params, ...]
    value: networks.Params
    target_critics: tuple[networks.Params, ...]
    actor_opt: optim.OptState
    critic_opt: optim.OptState
    value_opt: optim.OptState


def velocity_of(config: Config, spec: Spec) -> flows.Velocity:
    """The behaviour's velocity field."""
    return flows.Velocity(config.hidden, spec.action_dim)


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic."""
    return flows.gelu_critic(config.hidden, config.layer_norm)


def value_of(config: Config) -> networks.Value:
    """The network of the state value."""
    return flows.gelu_value(config.hidden, config.layer_norm)


def make_ifql(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`.

    Raises:
      UsageError: a structural choice that does not exist.
    """
    check_choices("ifql", config)
    velocity, critic = velocity_of(config, spec), critic_of(config)
    value = value_of(config)

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        flow_key, critic_key, value_key = jax.random.split(key, 3)
        obs, action = jnp.zeros((1, spec.obs_dim)), jnp.zeros((1, spec.action_dim))
        flow = velocity.init(flow_key, obs, action, jnp.zeros(1))
        value_params = value.init(value_key, obs)
        critics = networks.init_critics(
            critic, critic_key, spec.obs_dim, spec.action_dim, 2
        )
        return State(
            actor=flow,
            critics=critics,
            value=value_params,
            # A copy: a donated state must not hold one buffer twice.
            target_critics=jax.tree.map(jnp.copy, critics),
            actor_opt=optim.adam_init(flow),
            critic_opt=optim.adam_init(critics),
            value_opt=optim.adam_init(value_params),
        )

    def value_loss(
        params: networks.Params, obs: Array, q: Array, level: Array
    ) -> tuple[Array, Array]:
        v = networks.apply(value, params, obs)
        return jnp.mean(jax.vmap(losses.expectile, (0, None))(q - v, level)), v

    def critic_loss(
        critics: tuple[networks.Params, ...], batch: Transitions, target: Array
    ) -> Array:
        q = flows.all_values(critic, critics, batch.obs, batch.action)
        return jnp.mean(jnp.square(q - target[None, :]))

    def flow_loss(params: networks.Params, key: Key, batch: Transitions) -> Array:
        field = flows.field_of(velocity, params, batch.obs)
        return flows.keyed_matching_loss(key, field, batch.action)

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        q = jnp.min(
            flows.all_values(critic, state.target_critics, batch.obs, batch.action), 0
        )
        (v_loss, v), grads = jax.value_and_grad(value_loss, has_aux=True)(
            state.value, batch.obs, q, hyper.expectile
        )
        value_params, value_opt = optim.adam_step(
            grads, state.value_opt, state.value, hyper.value_lr
        )

        target = jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward,
            batch.discount,
            networks.apply(value, state.value, batch.next_obs),
            hyper.discount,
        )
        q_loss, grads = jax.value_and_grad(critic_loss)(state.critics, batch, target)
        critics, critic_opt = optim.adam_step(
            grads, state.critic_opt, state.critics, hyper.critic_lr
        )

        f_loss, grads = jax.value_and_grad(flow_loss)(state.actor, key, batch)
        flow, actor_opt = optim.adam_step(
            grads, state.actor_opt, state.actor, hyper.flow_lr
        )
        state = State(
            actor=flow,
            critics=critics,
            value=value_params,
            target_critics=optim.polyak(state.target_critics, state.critics, hyper.tau),
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            value_opt=value_opt,
        )
        return state, {
            "value_loss": v_loss,
            "critic_loss": q_loss,
            "flow_loss": f_loss,
            "q_mean": jnp.mean(q),
            "advantage_mean": jnp.mean(q - v),
        }

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del hyper
        shape = (obs.shape[0], config.candidates, spec.action_dim)
        obs = flows.repeated(obs, config.candidates)
        actions = flows.sample(
            flows.field_of(velocity, state.actor, obs),
            jax.random.normal(key, shape),
            config.flow_steps,
            config.integrator,
        )
        values = flows.all_values(critic, state.critics, obs, actions)
        return flows.best_of(jnp.min(values, axis=0), actions)

    return Agent(init, act, (Phase("train", update),), config.batch_size)


_SMALL_TASKS = Preset(
    config={"hidden": (256, 256)},
    source="ours: the width of the other agents; the authors' tasks are larger",
)
_FAST = {"flow_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3}

ENTRY = AgentEntry(
    name="ifql",
    title="IFQL (reconstruction)",
    reference="baseline of Park, Li & Levine, ICML 2025, arXiv:2502.02538",
    config=Config,
    hyper=Hyper,
    make=make_ifql,
    critic=critic_of,
    presets={
        "quick": Preset(
            config={
                "hidden": (64, 64),
                "batch_size": 128,
                "flow_steps": 5,
                "candidates": 8,
            },
            hyper=_FAST,
            source="ours: for some 6,000 updates on two CPU cores",
        ),
        "small": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper=_FAST,
            source="ours: small nets, ten steps, 32 candidates",
        ),
    },
    families={"classic": _SMALL_TASKS, "neorl2": _SMALL_TASKS},
)
