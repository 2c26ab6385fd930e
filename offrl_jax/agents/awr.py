"""AWR: advantage-weighted regression with a state value, no critic of actions.

Peng, Kumar, Zhang & Levine (2019), "Advantage-Weighted Regression: Simple and Scalable
Off-Policy Reinforcement Learning", arXiv:1910.00177.  With a target value V':

    L(V)  = E (r + gamma * d * V'(s') - V(s))^2
    A     = r + gamma * d * V(s') - V(s)
    L(pi) = -E min(exp(A / temperature), 20) * log pi(a | s)

d is 0 at terminal states only.  Weighted behaviour cloning: where A is exact, the
minimiser of L(pi) over all policies is proportional to beta(a | s) exp(A / temperature)
(theorem of the paper's section 3.1), beta being the behaviour policy.  In a stochastic
environment one sample of A favours lucky transitions, which critics of actions do not.

Deviations from the authors' code: TD(0) with a target value in place of TD(lambda) over
whole episodes; advantages are not standardised over the data, so `temperature` has the
unit of returns, as in the paper's equations; both networks learn at every update, by
Adam instead of momentum; the policy's mean is squashed by tanh (so that there is no
loss on its bounds) and its standard deviation is learned (theirs is a constant).
"""

from __future__ import annotations

import dataclasses

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
    check_choices,
    one_of,
    within,
)
from offrl_jax.types import Agent, Array, Key, Metrics, Phase, Spec, Transitions

# Bounds of the policy's log standard deviation, those of IQL's authors.
LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure of the networks and names of the data's transforms."""

    hidden: tuple[int, ...] = within(COUNT, (256, 256))
    batch_size: int = within(COUNT, 256)
    # The authors normalise observations.
    obs_transform: str = "standardise"
    reward_transform: str = "none"
    actor_optimiser: str = one_of(optim.ACTOR_OPTIMISERS, "adam")


@struct.dataclass
class Hyper:
    """Traced settings."""

    # Adam's customary rate; the authors use momentum.
    actor_lr: float = within(POSITIVE, 3e-4)
    value_lr: float = within(POSITIVE, 3e-4)
    # Authors' code: discount 0.99, temperature 1 and weights of at most 20.
    discount: float = within(UNIT, 0.99)
    temperature: float = within(POSITIVE, 1.0)
    largest_weight: float = within(POSITIVE, 20.0)
    # The target average that is customary for continuous control (TD3, SAC).
    tau: float = within(POSITIVE_UNIT, 0.005)
    # Of `actor_optimiser = rank1`, relative to the mean squared score.
    actor_damping: float = within(POSITIVE, 0.1)


@struct.dataclass
class State:
    """Parameters and Adam moments."""

    actor: networks.Params
    value: networks.Params
    target_value: networks.Params
    actor_opt: optim.OptState
    value_opt: optim.OptState


def actor_of(config: Config, spec: Spec) -> networks.GaussianActor:
    """The policy network; the mean is squashed by tanh outside of it."""
    return networks.GaussianActor(
        config.hidden, spec.action_dim, state_dependent_std=False
    )


def value_of(config: Config) -> networks.Value:
    """The network of the state value."""
    return networks.Value(config.hidden)


def make_awr(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    check_choices("awr", config)
    actor, value = actor_of(config, spec), value_of(config)

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        actor_key, value_key = jax.random.split(key)
        obs = jnp.zeros((1, spec.obs_dim))
        actor_params = actor.init(actor_key, obs)
        value_params = value.init(value_key, obs)
        return State(
            actor=actor_params,
            value=value_params,
            # A copy: a donated state must not hold one buffer twice.
            target_value=jax.tree.map(jnp.copy, value_params),
            actor_opt=optim.actor_init(config.actor_optimiser, actor_params),
            value_opt=optim.adam_init(value_params),
        )

    def bootstrap(
        params: networks.Params, batch: Transitions, gamma: Array | float
    ) -> Array:
        return jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward,
            batch.discount,
            networks.apply(value, params, batch.next_obs),
            gamma,
        )

    def value_loss(params: networks.Params, obs: Array, target: Array) -> Array:
        return jnp.mean(jnp.square(networks.apply(value, params, obs) - target))

    def policy_of(params: networks.Params, obs: Array) -> tuple[Array, Array]:
        mean, log_std = networks.apply(actor, params, obs)
        return jnp.tanh(mean), jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)

    def actor_loss(
        params: networks.Params, batch: Transitions, weight: Array
    ) -> tuple[Array, Array]:
        mean, log_std = policy_of(params, batch.obs)
        policy = distributions.normal(mean, log_std)
        loss = -jnp.mean(weight * policy.log_prob(batch.action))
        return loss, jnp.mean(jnp.exp(log_std))

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        target = bootstrap(state.target_value, batch, hyper.discount)
        v_loss, grads = jax.value_and_grad(value_loss)(state.value, batch.obs, target)
        value_params, value_opt = optim.adam_step(
            grads, state.value_opt, state.value, hyper.value_lr
        )

        v = networks.apply(value, value_params, batch.obs)
        advantage = bootstrap(value_params, batch, hyper.discount) - v
        weight = jax.vmap(losses.awr_weight, (0, None, None))(
            advantage, 1.0 / hyper.temperature, hyper.largest_weight
        )
        (pi_loss, std), grads = jax.value_and_grad(actor_loss, has_aux=True)(
            state.actor, batch, weight
        )
        actor_params, actor_opt = optim.actor_step(
            config.actor_optimiser,
            key,
            policy_of,
            batch.obs,
            grads,
            state.actor_opt,
            state.actor,
            hyper.actor_lr,
            hyper.actor_damping,
        )
        state = State(
            actor=actor_params,
            value=value_params,
            target_value=optim.polyak(state.target_value, value_params, hyper.tau),
            actor_opt=actor_opt,
            value_opt=value_opt,
        )
        return state, {
            "value_loss": v_loss,
            "actor_loss": pi_loss,
            "v_mean": jnp.mean(v),
            "advantage_mean": jnp.mean(advantage),
            "weight_mean": jnp.mean(weight),
            "std": std,
        }

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del key, hyper
        return policy_of(state.actor, obs)[0]

    return Agent(init, act, (Phase("train", update),), config.batch_size)


ENTRY = AgentEntry(
    name="awr",
    title="AWR",
    reference="Peng, Kumar, Zhang & Levine, 2019, arXiv:1910.00177",
    config=Config,
    hyper=Hyper,
    make=make_awr,
    presets={
        "rank1": Preset(
            config={"actor_optimiser": "rank1"},
            hyper={"actor_lr": 1e-3},
            source="ours: rank-1 natural gradients for the policy, untuned",
        ),
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper={"actor_lr": 1e-3, "value_lr": 1e-3},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
    },
)
