"""InAC: in-sample actor-critic, a soft policy within the support of the data.

Xiao, Wang, Pan, White & White (2023), "The In-Sample Softmax for Offline Reinforcement
Learning", arXiv:2302.14372.  With the behaviour's density beta, Q' = min(Q'_1, Q'_2) of
the target critics, Q = min(Q_1, Q_2), a~ ~ pi(. | s) and a' ~ pi(. | s'):

    L(beta) = -E log beta(a | s)
    L(V)    = E (Q'(s, a~) - temperature * log pi(a~ | s) - V(s))^2
    y       = r + gamma * d * (Q'(s', a') - temperature * log pi(a' | s'))
    L(Q_i)  = E (y - Q_i(s, a))^2
    L(pi)   = -E w log pi(a | s)
    w       = exp((Q(s, a) - V(s)) / temperature) / beta(a | s)

d is 0 at terminal states only; w is bounded to [1e-8, 1e4].  The minimiser of L(pi)
over all policies is exp(Q / temperature) normalised over the support of beta: how often
the data take an action does not matter, only that they do.

As in the authors' code: beta, V, critics and policy learn in this order at every
update, each from the new ones before it, and the targets of the critics move last; beta
is a network of its own; means are squashed by tanh (the densities are not) and log
standard deviations, free of the state, lie in [-6, 0].  Evaluated with the mean.

Deviations from the authors' code: log densities are those of the Normal itself (theirs
subtract the correction of a tanh that is not applied to the action); sampled actions
are clipped to [-1, 1] before a critic sees them; standard deviations begin at 0.49
instead of 0.05.  Written from the equations.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import distributions, losses, networks
from offrl_jax.agents import optim
from offrl_jax.agents.entry import (
    COUNT,
    POSITIVE,
    POSITIVE_UNIT,
    UNIT,
    AgentEntry,
    Preset,
    within,
)
from offrl_jax.types import Agent, Array, Key, Metrics, Phase, Spec, Transitions

# Authors' code: bounds of log standard deviations, and of the weight.
LOG_STD_MIN, LOG_STD_MAX = -6.0, 0.0
# Standard deviations begin at 0.49 (theirs: 0.05).  Where the data are many standard
# deviations away, 1 / beta puts every weight at its bound; Adam's second moments would
# remember such gradients for some 20,000 updates.
_RAW_LOG_STD_OFFSET = 1.0
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-8, 1e4


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure of the networks and names of the data's transforms."""

    hidden: tuple[int, ...] = within(COUNT, (256, 256))
    batch_size: int = within(COUNT, 256)
    obs_transform: str = "none"
    reward_transform: str = "none"


@struct.dataclass
class Hyper:
    """Traced settings."""

    # Authors' code: one rate for all networks, and temperature 0.1 by default.
    actor_lr: float = within(POSITIVE, 3e-4)
    critic_lr: float = within(POSITIVE, 3e-4)
    value_lr: float = within(POSITIVE, 3e-4)
    behaviour_lr: float = within(POSITIVE, 3e-4)
    temperature: float = within(POSITIVE, 0.1)
    # Of the target average; the paper calls the temperature tau.
    tau: float = within(POSITIVE_UNIT, 0.005)
    discount: float = within(UNIT, 0.99)


@struct.dataclass
class State:
    """Parameters and Adam moments; critics are tuples of two."""

    actor: networks.Params
    behaviour: networks.Params
    critics: tuple[networks.Params, ...]
    value: networks.Params
    target_critics: tuple[networks.Params, ...]
    actor_opt: optim.OptState
    behaviour_opt: optim.OptState
    critic_opt: optim.OptState
    value_opt: optim.OptState


def actor_of(config: Config, spec: Spec) -> networks.GaussianActor:
    """The network of the policy, and of the behaviour; means are squashed outside."""
    return networks.GaussianActor(
        config.hidden, spec.action_dim, state_dependent_std=False
    )


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic."""
    return networks.Critic(config.hidden)


def value_of(config: Config) -> networks.Value:
    """The network of the state value."""
    return networks.Value(config.hidden)


def make_inac(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    actor, critic = actor_of(config, spec), critic_of(config)
    value = value_of(config)

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        actor_key, behaviour_key, critic_key, value_key = jax.random.split(key, 4)
        obs = jnp.zeros((1, spec.obs_dim))
        actor_params = actor.init(actor_key, obs)
        behaviour = actor.init(behaviour_key, obs)
        value_params = value.init(value_key, obs)
        critics = networks.init_critics(
            critic, critic_key, spec.obs_dim, spec.action_dim, 2
        )
        return State(
            actor=actor_params,
            behaviour=behaviour,
            critics=critics,
            value=value_params,
            # A copy: a donated state must not hold one buffer twice.
            target_critics=jax.tree.map(jnp.copy, critics),
            actor_opt=optim.adam_init(actor_params),
            behaviour_opt=optim.adam_init(behaviour),
            critic_opt=optim.adam_init(critics),
            value_opt=optim.adam_init(value_params),
        )

    def density_of(params: networks.Params, obs: Array) -> tuple[Array, Array]:
        mean, raw = networks.apply(actor, params, obs)
        log_std = distributions.soft_bound(
            raw + _RAW_LOG_STD_OFFSET, LOG_STD_MIN, LOG_STD_MAX
        )
        return jnp.tanh(mean), log_std

    def soft_value(
        key: Key,
        density: tuple[Array, Array],
        critics: tuple[networks.Params, ...],
        obs: Array,
        temperature: Array | float,
    ) -> Array:
        mean, log_std = density
        action = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        log_prob = distributions.normal(mean, log_std).log_prob(action)
        q = networks.smallest_q(critic, critics, obs, jnp.clip(action, -1.0, 1.0))
        return q - temperature * jnp.asarray(log_prob)

    def value_loss(params: networks.Params, obs: Array, target: Array) -> Array:
        return jnp.mean(jnp.square(networks.apply(value, params, obs) - target))

    def critic_loss(
        critics: tuple[networks.Params, ...], batch: Transitions, target: Array
    ) -> Array:
        q = [
            networks.apply(critic, params, batch.obs, batch.action)
            for params in critics
        ]
        return jnp.asarray(sum(jnp.mean(jnp.square(q_i - target)) for q_i in q))

    def behaviour_loss(params: networks.Params, batch: Transitions) -> Array:
        beta = distributions.normal(*density_of(params, batch.obs))
        return -jnp.mean(jnp.asarray(beta.log_prob(batch.action)))

    def actor_loss(density: tuple[Array, Array], action: Array, weight: Array) -> Array:
        return -jnp.mean(weight * distributions.normal(*density).log_prob(action))

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        value_key, next_key = jax.random.split(key)
        beta_loss, grads = jax.value_and_grad(behaviour_loss)(state.behaviour, batch)
        behaviour, behaviour_opt = optim.adam_step(
            grads, state.behaviour_opt, state.behaviour, hyper.behaviour_lr
        )

        # One forward pass of the policy serves V's target and, below, its own gradient.
        density, pull_back = jax.vjp(lambda p: density_of(p, batch.obs), state.actor)
        v_target = soft_value(
            value_key, density, state.target_critics, batch.obs, hyper.temperature
        )
        v_loss, grads = jax.value_and_grad(value_loss)(state.value, batch.obs, v_target)
        value_params, value_opt = optim.adam_step(
            grads, state.value_opt, state.value, hyper.value_lr
        )

        next_value = soft_value(
            next_key,
            density_of(state.actor, batch.next_obs),
            state.target_critics,
            batch.next_obs,
            hyper.temperature,
        )
        target = jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward, batch.discount, next_value, hyper.discount
        )
        q_loss, grads = jax.value_and_grad(critic_loss)(state.critics, batch, target)
        critics, critic_opt = optim.adam_step(
            grads, state.critic_opt, state.critics, hyper.critic_lr
        )

        q = networks.smallest_q(critic, critics, batch.obs, batch.action)
        advantage = q - networks.apply(value, value_params, batch.obs)
        beta = distributions.normal(*density_of(behaviour, batch.obs))
        log_beta = jnp.asarray(beta.log_prob(batch.action))
        # Bounded before the exponential, which could overflow.
        weight = jnp.exp(
            jnp.clip(
                advantage / hyper.temperature - log_beta,
                math.log(SMALLEST_WEIGHT),
                math.log(LARGEST_WEIGHT),
            )
        )
        pi_loss, slope = jax.value_and_grad(actor_loss)(density, batch.action, weight)
        (grads,) = pull_back(slope)
        actor_params, actor_opt = optim.adam_step(
            grads, state.actor_opt, state.actor, hyper.actor_lr
        )
        state = State(
            actor=actor_params,
            behaviour=behaviour,
            critics=critics,
            value=value_params,
            target_critics=optim.polyak(state.target_critics, critics, hyper.tau),
            actor_opt=actor_opt,
            behaviour_opt=behaviour_opt,
            critic_opt=critic_opt,
            value_opt=value_opt,
        )
        return state, {
            "behaviour_loss": beta_loss,
            "value_loss": v_loss,
            "critic_loss": q_loss,
            "actor_loss": pi_loss,
            "q_mean": jnp.mean(q),
            "advantage_mean": jnp.mean(advantage),
            "weight_mean": jnp.mean(weight),
        }

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del key, hyper
        return density_of(state.actor, obs)[0]

    return Agent(init, act, (Phase("train", update),), config.batch_size)


ENTRY = AgentEntry(
    name="inac",
    title="InAC",
    reference="Xiao, Wang, Pan, White & White, ICLR 2023, arXiv:2302.14372",
    config=Config,
    hyper=Hyper,
    make=make_inac,
    critic=critic_of,
    presets={
        "quick": Preset(
            # Half of the others' batch: an update has half as many products again.
            config={"hidden": (64, 64), "batch_size": 64},
            hyper={
                "actor_lr": 1e-3,
                "critic_lr": 1e-3,
                "value_lr": 1e-3,
                "behaviour_lr": 1e-3,
            },
            source="ours: for some 6,000 updates on two CPU cores",
        ),
        "d4rl-expert": Preset(
            hyper={"temperature": 0.01},
            source="authors' list of temperatures, the same for all four robots",
        ),
        "d4rl-medium-replay": Preset(
            hyper={"temperature": 0.5},
            source="authors' list of temperatures, the same for all four robots",
        ),
    },
)
