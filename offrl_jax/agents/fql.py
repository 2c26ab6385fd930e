"""FQL: flow Q-learning, a one-step policy distilled from a behaviour flow.

Park, Li & Levine (2025), "Flow Q-Learning", arXiv:2502.02538.  A velocity field v with
its Euler solution mu_v(s, z), a one-step policy mu(s, z), critics Q_1, Q_2 with targets
Q'; z is standard normal, agg the mean or the minimum, |.|^2 / A a mean over dimensions:

    y     = r + gamma * d * agg_i Q'_i(s', clip(mu(s', z)))
    L(Q)  = E mean_i (Q_i(s, a) - y)^2
    L(v)  = E |v(s, x_t, t) - (a - z)|^2 / A                  (flow matching)
    L(mu) = E [alpha * |mu(s, z) - mu_v(s, z)|^2 / A - lambda * mean_i Q_i(s, clip(mu))]

with lambda = 1, or 1 / E |mean_i Q_i| (no gradient) with `normalise_q`.  d is 0 at
terminal states only.  All losses use the parameters of before the update, and the
targets follow the critics of before it.  The policy draws, in evaluation too.

Written from these equations; what was not read in the authors' code and is second-hand
is named in docs/algorithms/fql.md.
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
    NON_NEGATIVE,
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
    """Structure of networks and losses, and names of the data's transforms.

    Attributes:
      flow_steps: steps of the integrator that the policy is distilled from.
      integrator: one of `flows.INTEGRATORS`.
      layer_norm: in the critics.
      q_aggregation: agg of the target, one of `flows.AGGREGATIONS`.
      normalise_q: divides the Q term of the policy's loss by its mean size.
    """

    hidden: tuple[int, ...] = within(COUNT, (512, 512, 512, 512))
    batch_size: int = within(COUNT, 256)
    flow_steps: int = within(COUNT, 10)
    integrator: str = one_of(flows.INTEGRATORS, "euler")
    layer_norm: bool = True
    q_aggregation: str = one_of(flows.AGGREGATIONS, "mean")
    normalise_q: bool = False
    obs_transform: str = "none"
    reward_transform: str = "none"


@struct.dataclass
class Hyper:
    """Traced settings: the authors' defaults; `alpha` is theirs per task."""

    flow_lr: float = within(POSITIVE, 3e-4)
    actor_lr: float = within(POSITIVE, 3e-4)
    critic_lr: float = within(POSITIVE, 3e-4)
    discount: float = within(UNIT, 0.99)
    tau: float = within(POSITIVE_UNIT, 0.005)
    alpha: float = within(NON_NEGATIVE, 10.0)


@struct.dataclass
class State:
    """Parameters and Adam moments; `actor` is the one-step policy."""

    flow: networks.Params
    actor: networks.Params
    critics: tuple[networks.Params, ...]
    target_critics: tuple[networks.Params, ...]
    flow_opt: optim.OptState
    actor_opt: optim.OptState
    critic_opt: optim.OptState


def velocity_of(config: Config, spec: Spec) -> flows.Velocity:
    """The behaviour's velocity field."""
    return flows.Velocity(config.hidden, spec.action_dim)


def actor_of(config: Config, spec: Spec) -> flows.ActionMap:
    """The one-step policy: noise to action, not clipped."""
    return flows.ActionMap(config.hidden, spec.action_dim)


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic."""
    return flows.gelu_critic(config.hidden, config.layer_norm)


def make_fql(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`.

    Raises:
      UsageError: a structural choice that does not exist.
    """
    check_choices("fql", config)
    velocity, actor = velocity_of(config, spec), actor_of(config, spec)
    critic = critic_of(config)

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        flow_key, actor_key, critic_key = jax.random.split(key, 3)
        obs, action = jnp.zeros((1, spec.obs_dim)), jnp.zeros((1, spec.action_dim))
        flow = velocity.init(flow_key, obs, action, jnp.zeros(1))
        actor_params = actor.init(actor_key, obs, action)
        critics = networks.init_critics(
            critic, critic_key, spec.obs_dim, spec.action_dim, 2
        )
        return State(
            flow=flow,
            actor=actor_params,
            critics=critics,
            # A copy: a donated state must not hold one buffer twice.
            target_critics=jax.tree.map(jnp.copy, critics),
            flow_opt=optim.adam_init(flow),
            actor_opt=optim.adam_init(actor_params),
            critic_opt=optim.adam_init(critics),
        )

    def policy(params: networks.Params, obs: Array, noise: Array) -> Array:
        return jnp.clip(networks.apply(actor, params, obs, noise), -1.0, 1.0)

    def critic_loss(
        critics: tuple[networks.Params, ...], batch: Transitions, target: Array
    ) -> tuple[Array, Array]:
        q = flows.all_values(critic, critics, batch.obs, batch.action)
        return jnp.mean(jnp.square(q - target[None, :])), jnp.mean(q)

    def flow_loss(params: networks.Params, key: Key, batch: Transitions) -> Array:
        field = flows.field_of(velocity, params, batch.obs)
        return flows.keyed_matching_loss(key, field, batch.action)

    def actor_loss(
        params: networks.Params,
        state: State,
        obs: Array,
        noise: Array,
        flow_action: Array,
        alpha: Array,
    ) -> tuple[Array, Array]:
        action = networks.apply(actor, params, obs, noise)
        distillation = jnp.mean(jnp.square(action - flow_action))
        values = flows.all_values(
            critic, state.critics, obs, jnp.clip(action, -1.0, 1.0)
        )
        q = jnp.mean(values, axis=0)
        scale = losses.q_scale(q, 1.0) if config.normalise_q else jnp.ones(())
        return alpha * distillation - scale * jnp.mean(q), distillation

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        next_key, flow_key, actor_key = jax.random.split(key, 3)
        next_noise = jax.random.normal(next_key, batch.action.shape)
        next_action = policy(state.actor, batch.next_obs, next_noise)
        next_values = flows.all_values(
            critic, state.target_critics, batch.next_obs, next_action
        )
        target = jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward,
            batch.discount,
            flows.pooled(next_values, config.q_aggregation),
            hyper.discount,
        )
        (q_loss, q_mean), grads = jax.value_and_grad(critic_loss, has_aux=True)(
            state.critics, batch, target
        )
        critics, critic_opt = optim.adam_step(
            grads, state.critic_opt, state.critics, hyper.critic_lr
        )

        v_loss, grads = jax.value_and_grad(flow_loss)(state.flow, flow_key, batch)
        flow, flow_opt = optim.adam_step(
            grads, state.flow_opt, state.flow, hyper.flow_lr
        )

        noise = jax.random.normal(actor_key, batch.action.shape)
        flow_action = flows.sample(
            flows.field_of(velocity, state.flow, batch.obs),
            noise,
            config.flow_steps,
            config.integrator,
        )
        (loss, distillation), grads = jax.value_and_grad(actor_loss, has_aux=True)(
            state.actor, state, batch.obs, noise, flow_action, hyper.alpha
        )
        actor_params, actor_opt = optim.adam_step(
            grads, state.actor_opt, state.actor, hyper.actor_lr
        )
        state = State(
            flow=flow,
            actor=actor_params,
            critics=critics,
            target_critics=optim.polyak(state.target_critics, state.critics, hyper.tau),
            flow_opt=flow_opt,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
        )
        return state, {
            "critic_loss": q_loss,
            "q_mean": q_mean,
            "flow_loss": v_loss,
            "actor_loss": loss,
            "distillation_loss": distillation,
        }

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del hyper
        noise = jax.random.normal(key, (obs.shape[0], spec.action_dim))
        return policy(state.actor, obs, noise)

    return Agent(init, act, (Phase("train", update),), config.batch_size)


def _task(discount: float, q_aggregation: str, alpha: float) -> Preset:
    return Preset(
        config={"q_aggregation": q_aggregation},
        hyper={"discount": discount, "alpha": alpha},
        source="the authors' setting per task, offline",
    )


_SMALL_TASKS = Preset(
    config={"hidden": (256, 256)},
    source="ours: the width of the other agents; the authors' tasks are larger",
)
_FAST = {"flow_lr": 1e-3, "actor_lr": 1e-3, "critic_lr": 1e-3}

ENTRY = AgentEntry(
    name="fql",
    title="FQL",
    reference="Park, Li & Levine, ICML 2025, arXiv:2502.02538",
    config=Config,
    hyper=Hyper,
    make=make_fql,
    critic=critic_of,
    presets={
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128, "flow_steps": 5},
            hyper=_FAST,
            source="ours: for some 6,000 updates on two CPU cores",
        ),
        "small": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper=_FAST,
            source="ours: small nets, the authors' ten steps",
        ),
        "ogbench-antmaze": _task(0.99, "min", 10.0),
        "ogbench-antmaze-giant": _task(0.995, "min", 10.0),
        "ogbench-humanoidmaze": _task(0.995, "mean", 30.0),
        "ogbench-antsoccer": _task(0.995, "mean", 10.0),
        "ogbench-cube": _task(0.99, "mean", 300.0),
        "ogbench-scene": _task(0.99, "mean", 300.0),
        "ogbench-puzzle": _task(0.99, "mean", 1000.0),
        "d4rl-antmaze": _task(0.99, "mean", 10.0),
        "d4rl-antmaze-large": _task(0.99, "mean", 3.0),
        "adroit-pen": _task(0.99, "min", 10_000.0),
        "adroit-pen-expert": _task(0.99, "min", 3_000.0),
        "adroit": _task(0.99, "min", 30_000.0),
        "adroit-hammer-cloned": _task(0.99, "min", 10_000.0),
        "adroit-relocate-human": _task(0.99, "min", 10_000.0),
    },
    families={"classic": _SMALL_TASKS, "neorl2": _SMALL_TASKS},
)
