"""DeFlow: a residual on a behaviour flow, kept small by a multiplier that tunes itself.

"DeFlow" (2026), arXiv:2601.10471, a successor of FQL; `fidec` is this agent with
another penalty.  A velocity field v with its Euler solution b = mu_v(s, z), a residual
delta, critics Q_1, Q_2 with targets Q', a multiplier lambda and a budget eps; agg is
the mean or the minimum:

    policy(s)   = clip(b + delta(s, b)),  z standard normal
    y           = r + gamma * d * agg_i Q'_i(s', policy(s'))
    L(Q)        = E mean_i (Q_i(s, a) - y)^2
    L(v)        = E |v(s, x_t, t) - (a - z)|^2 / A                  (flow matching)
    D           = E_s |delta|^2 / A
    L(delta)    = lambda * D - scale * E mean_i Q_i(s, policy(s))
    L(log lambda) = -log lambda * (D - eps)

scale is 1 / E |mean_i Q_i| without gradient, or 1.  v and b are constants of L(delta);
all losses use the parameters of before the update, and targets follow the critics of
before it.  d is 0 at terminal states only.  The policy draws, in evaluation too.

Reconstructed from notes on its code and that of FiDec, which holds a modified copy of
it (preset `as_in_fidec`); what is whose: docs/algorithms/deflow.md.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import decorator, flows, losses, networks
from offrl_jax.agents import optim
from offrl_jax.agents.entry import (
    COUNT,
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
      flow_steps: steps of the integrator from noise to action.
      integrator: one of `flows.INTEGRATORS`.
      layer_norm: in the critics.
      q_aggregation: agg of the target, one of `flows.AGGREGATIONS`.
      normalise_q: divides the Q term of the residual's loss by its mean size.
      multiplier_rule: `learned` by dual descent, or `fixed`.
      clip_gradients: clips the joint norm of all gradients.
      play: what is evaluated.  `sample`: the policy; `best_of`: of `candidates` base
        actions the one with the highest mean Q, then displaced; `refine`: displaced
        `refinements` times, the result with the highest mean Q.
    """

    hidden: tuple[int, ...] = within(COUNT, (512, 512, 512, 512))
    batch_size: int = within(COUNT, 256)
    flow_steps: int = within(COUNT, 10)
    integrator: str = one_of(flows.INTEGRATORS, "euler")
    layer_norm: bool = True
    q_aggregation: str = one_of(flows.AGGREGATIONS, "mean")
    normalise_q: bool = True
    multiplier_rule: str = one_of(("learned", "fixed"), "learned")
    clip_gradients: bool = False
    play: str = one_of(("sample", "best_of", "refine"), "sample")
    candidates: int = within(COUNT, 10)
    refinements: int = within(COUNT, 5)
    obs_transform: str = "none"
    reward_transform: str = "none"


@struct.dataclass
class Hyper:
    """Traced settings of DeFlow's code; `budget` is tuned per task there."""

    flow_lr: float = within(POSITIVE, 3e-4)
    actor_lr: float = within(POSITIVE, 3e-4)
    critic_lr: float = within(POSITIVE, 3e-4)
    multiplier_lr: float = within(POSITIVE, 3e-4)
    discount: float = within(UNIT, 0.99)
    tau: float = within(POSITIVE_UNIT, 0.005)
    # lambda at the start, and for ever with the rule `fixed`.
    multiplier: float = within(POSITIVE, math.e)
    # eps: mean square per action dimension.
    budget: float = within(POSITIVE, 1e-3)
    # Of the joint norm of all gradients, with `clip_gradients`.
    max_grad_norm: float = within(POSITIVE, 5.0)


@struct.dataclass
class State:
    """Parameters and Adam moments; `actor` is the residual.

    Attributes:
      log_growth: `[]`, log of lambda over its start, `Hyper.multiplier`.
    """

    flow: networks.Params
    actor: networks.Params
    critics: tuple[networks.Params, ...]
    target_critics: tuple[networks.Params, ...]
    log_growth: Array
    flow_opt: optim.OptState
    actor_opt: optim.OptState
    critic_opt: optim.OptState
    multiplier_opt: optim.OptState


def velocity_of(config: Config, spec: Spec) -> flows.Velocity:
    """The behaviour's velocity field."""
    return flows.Velocity(config.hidden, spec.action_dim)


def actor_of(config: Config, spec: Spec) -> flows.ActionMap:
    """The residual: base action to displacement, unbounded."""
    return flows.ActionMap(config.hidden, spec.action_dim)


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic."""
    return flows.gelu_critic(config.hidden, config.layer_norm)


def make_deflow(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`.

    Raises:
      UsageError: a structural choice that does not exist.
    """
    check_choices("deflow", config)
    velocity, residual = velocity_of(config, spec), actor_of(config, spec)
    critic = critic_of(config)

    def init(key: Key, hyper: Hyper) -> State:
        flow_key, actor_key, critic_key = jax.random.split(key, 3)
        obs, action = jnp.zeros((1, spec.obs_dim)), jnp.zeros((1, spec.action_dim))
        flow = velocity.init(flow_key, obs, action, jnp.zeros(1))
        actor_params = residual.init(actor_key, obs, action)
        critics = networks.init_critics(
            critic, critic_key, spec.obs_dim, spec.action_dim, 2
        )
        log_growth = jnp.zeros(())
        return State(
            flow=flow,
            actor=actor_params,
            critics=critics,
            # A copy: a donated state must not hold one buffer twice.
            target_critics=jax.tree.map(jnp.copy, critics),
            log_growth=log_growth,
            flow_opt=optim.adam_init(flow),
            actor_opt=optim.adam_init(actor_params),
            critic_opt=optim.adam_init(critics),
            multiplier_opt=optim.adam_init(log_growth),
        )

    def base_actions(key: Key, params: networks.Params, obs: Array) -> Array:
        noise = jax.random.normal(key, (*obs.shape[:-1], spec.action_dim))
        field = flows.field_of(velocity, params, obs)
        return flows.sample(field, noise, config.flow_steps, config.integrator)

    def policy(params: networks.Params, obs: Array, base: Array) -> Array:
        return decorator.displaced(
            lambda x: networks.apply(residual, params, obs, x), base
        )

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
        multiplier: Array,
        obs: Array,
        base: Array,
    ) -> tuple[Array, dict[str, Array]]:
        delta = networks.apply(residual, params, obs, base)
        penalty = decorator.isotropic_quadratic(delta)
        values = flows.all_values(
            critic, state.critics, obs, jnp.clip(base + delta, -1.0, 1.0)
        )
        q = jnp.mean(values, axis=0)
        scale = losses.q_scale(q, 1.0) if config.normalise_q else jnp.ones(())
        loss = multiplier * penalty - scale * jnp.mean(q)
        return loss, {
            "penalty": penalty,
            "displacement": jnp.sqrt(jnp.mean(jnp.square(delta))),
            "q_policy": jnp.mean(q),
        }

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        base_key, flow_key = jax.random.split(key)
        # One integration for both observations of a transition.
        obs = jnp.concatenate([batch.obs, batch.next_obs])
        base, next_base = jnp.split(base_actions(base_key, state.flow, obs), 2)

        next_values = flows.all_values(
            critic,
            state.target_critics,
            batch.next_obs,
            policy(state.actor, batch.next_obs, next_base),
        )
        target = jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward,
            batch.discount,
            flows.pooled(next_values, config.q_aggregation),
            hyper.discount,
        )
        (q_loss, q_mean), critic_grads = jax.value_and_grad(critic_loss, has_aux=True)(
            state.critics, batch, target
        )
        v_loss, flow_grads = jax.value_and_grad(flow_loss)(state.flow, flow_key, batch)
        multiplier = hyper.multiplier * jnp.exp(state.log_growth)
        (loss, seen), actor_grads = jax.value_and_grad(actor_loss, has_aux=True)(
            state.actor, state, multiplier, batch.obs, base
        )
        multiplier_grad = jax.grad(decorator.multiplier_loss)(
            state.log_growth, seen["penalty"], hyper.budget
        )
        if config.multiplier_rule == "fixed":
            multiplier_grad = jnp.zeros_like(multiplier_grad)

        largest = hyper.max_grad_norm if config.clip_gradients else jnp.inf
        grads, grad_norm = decorator.clip_together(
            (critic_grads, flow_grads, actor_grads, multiplier_grad), largest
        )
        critics, critic_opt = optim.adam_step(
            grads[0], state.critic_opt, state.critics, hyper.critic_lr
        )
        flow, flow_opt = optim.adam_step(
            grads[1], state.flow_opt, state.flow, hyper.flow_lr
        )
        actor, actor_opt = optim.adam_step(
            grads[2], state.actor_opt, state.actor, hyper.actor_lr
        )
        log_growth, multiplier_opt = optim.adam_step(
            grads[3], state.multiplier_opt, state.log_growth, hyper.multiplier_lr
        )
        metrics = {
            "critic_loss": q_loss,
            "q_mean": q_mean,
            "flow_loss": v_loss,
            "actor_loss": loss,
            **seen,
            "multiplier": multiplier,
            "grad_norm": grad_norm,
        }
        state = State(
            flow=flow,
            actor=actor,
            critics=critics,
            target_critics=optim.polyak(state.target_critics, state.critics, hyper.tau),
            log_growth=log_growth,
            flow_opt=flow_opt,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            multiplier_opt=multiplier_opt,
        )
        return state, metrics

    def mean_value(state: State, obs: Array, action: Array) -> Array:
        return jnp.mean(flows.all_values(critic, state.critics, obs, action), axis=0)

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del hyper
        if config.play == "best_of":
            many = flows.repeated(obs, config.candidates)
            candidates = base_actions(key, state.flow, many)
            base = flows.best_of(mean_value(state, many, candidates), candidates)
            return policy(state.actor, obs, base)
        base = base_actions(key, state.flow, obs)
        if config.play == "sample":
            return policy(state.actor, obs, base)
        return decorator.refined(
            lambda x: networks.apply(residual, state.actor, obs, x),
            lambda x: mean_value(state, obs, x),
            base,
            config.refinements,
        )

    return Agent(init, act, (Phase("train", update),), config.batch_size)


def _task(discount: float, q_aggregation: str, budget: float) -> Preset:
    return Preset(
        config={"q_aggregation": q_aggregation},
        hyper={"discount": discount, "budget": budget},
        source="DeFlow's budgets per task, second-hand",
    )


_SMALL_TASKS = Preset(
    config={"hidden": (256, 256)},
    source="ours: the width of the other agents; the authors' tasks are larger",
)
# A budget and a scale of Q at which pendulum and point maze move within some thousand
# updates; the authors' budgets are for a million.
_FAST = {
    "flow_lr": 1e-3,
    "actor_lr": 1e-3,
    "critic_lr": 1e-3,
    "multiplier_lr": 1e-3,
    "multiplier": 1.0,
    "budget": 0.05,
}
_SMALL = {
    "hidden": (64, 64),
    "batch_size": 128,
    "normalise_q": True,
    "clip_gradients": True,
}

ENTRY = AgentEntry(
    name="deflow",
    title="DeFlow (reconstruction)",
    reference="DeFlow 2026, arXiv:2601.10471, from second-hand equations",
    config=Config,
    hyper=Hyper,
    make=make_deflow,
    critic=critic_of,
    presets={
        "quick": Preset(
            config=_SMALL | {"flow_steps": 5},
            hyper=_FAST,
            source="ours: for some 6,000 updates on two CPU cores",
        ),
        "small": Preset(
            config=_SMALL,
            hyper=_FAST,
            source="ours: small nets, the authors' ten steps",
        ),
        "as_in_fidec": Preset(
            config={"normalise_q": False, "clip_gradients": True},
            hyper={"multiplier": 10.0},
            source="the copy in FiDec's code: FiDec's settings, this penalty",
        ),
        "ogbench-antmaze": _task(0.99, "min", 0.01),
        "ogbench-antmaze-giant": _task(0.995, "min", 0.01),
        "ogbench-humanoidmaze": _task(0.995, "mean", 0.001),
        "ogbench-antsoccer": _task(0.995, "mean", 0.01),
        "ogbench-cube": _task(0.99, "mean", 0.001),
        "ogbench-scene": _task(0.99, "mean", 0.001),
        "ogbench-puzzle": _task(0.99, "mean", 0.005),
        "d4rl-antmaze": _task(0.99, "mean", 0.015),
        "adroit-pen": _task(0.99, "min", 0.01),
        "adroit": _task(0.99, "min", 0.001),
    },
    families={
        "classic": _SMALL_TASKS,
        "neorl2": _SMALL_TASKS,
    },
)
