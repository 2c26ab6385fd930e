"""IQL: implicit Q-learning, which never evaluates actions outside of the data.

Kostrikov, Nair & Levine (2021), "Offline Reinforcement Learning with Implicit
Q-Learning", arXiv:2110.06169.  With target critics Q' and Q' = min(Q'_1, Q'_2):

    L(V)   = E |tau - 1(u < 0)| u^2,  u = Q'(s, a) - V(s)                       (eq. 5)
    L(Q_i) = E (r + gamma * d * V(s') - Q_i(s, a))^2                            (eq. 6)
    L(pi)  = -E min(exp(beta * (Q'(s, a) - V(s))), 100) * log pi(a | s)         (eq. 7)

d is 0 at terminal states only.  As in the authors' code: V is updated first, policy and
critics then use the new V and the old Q', and Q' moves last; weights are clipped at
100; the policy is a Gaussian whose mean is squashed by tanh (its density is not) and
whose standard deviation does not depend on the state; initialisation is orthogonal;
the actor's learning rate falls along a cosine to 0 at `actor_decay_updates` and stays
there.  Evaluated with the mean.

Deviations from the authors' code: no dropout (they use 0.1 on Adroit and Kitchen).
`actor_optimiser` offers others than their Adam, see `optim.actor_step`.
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
    NON_NEGATIVE,
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

# Bounds of the policy's log standard deviation in the authors' code.
LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
LARGEST_WEIGHT = 100.0
_INIT = networks.orthogonal(math.sqrt(2.0))


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure of the networks and names of the data's transforms."""

    hidden: tuple[int, ...] = within(COUNT, (256, 256))
    batch_size: int = within(COUNT, 256)
    obs_transform: str = "none"
    reward_transform: str = "none"
    actor_optimiser: str = one_of(optim.ACTOR_OPTIMISERS, "adam")


@struct.dataclass
class Hyper:
    """Traced settings; defaults: the authors' locomotion configuration."""

    actor_lr: float = within(POSITIVE, 3e-4)
    critic_lr: float = within(POSITIVE, 3e-4)
    value_lr: float = within(POSITIVE, 3e-4)
    discount: float = within(UNIT, 0.99)
    tau: float = within(POSITIVE_UNIT, 0.005)
    expectile: float = within(OPEN_UNIT, 0.7)
    beta: float = within(NON_NEGATIVE, 3.0)
    # The authors train for 1e6 updates and decay over all of them.
    actor_decay_updates: float = within(POSITIVE, 1e6)
    # Of `actor_optimiser = rank1`, relative to the mean squared score.
    actor_damping: float = within(POSITIVE, 0.1)


@struct.dataclass
class State:
    """Parameters and Adam moments; critics are tuples of two."""

    actor: networks.Params
    critics: tuple[networks.Params, ...]
    value: networks.Params
    target_critics: tuple[networks.Params, ...]
    actor_opt: optim.OptState
    critic_opt: optim.OptState
    value_opt: optim.OptState
    # [], float32: updates done, exact up to 2^24, for the actor's schedule.
    updates: Array


def actor_of(config: Config, spec: Spec) -> networks.GaussianActor:
    """The policy network; the mean is squashed by tanh outside of it."""
    return networks.GaussianActor(
        config.hidden,
        spec.action_dim,
        state_dependent_std=False,
        hidden_init=_INIT,
        out_init=_INIT,
    )


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic."""
    return networks.Critic(config.hidden, hidden_init=_INIT, out_init=_INIT)


def value_of(config: Config) -> networks.Value:
    """The network of the state value."""
    return networks.Value(config.hidden, hidden_init=_INIT, out_init=_INIT)


def make_iql(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    check_choices("iql", config)
    actor, critic = actor_of(config, spec), critic_of(config)
    value = value_of(config)

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        actor_key, critic_key, value_key = jax.random.split(key, 3)
        obs = jnp.zeros((1, spec.obs_dim))
        actor_params = actor.init(actor_key, obs)
        value_params = value.init(value_key, obs)
        critics = networks.init_critics(
            critic, critic_key, spec.obs_dim, spec.action_dim, 2
        )
        return State(
            actor=actor_params,
            critics=critics,
            value=value_params,
            # A copy: a donated state must not hold one buffer twice.
            target_critics=jax.tree.map(jnp.copy, critics),
            actor_opt=optim.actor_init(config.actor_optimiser, actor_params),
            critic_opt=optim.adam_init(critics),
            value_opt=optim.adam_init(value_params),
            updates=jnp.zeros(()),
        )

    def value_loss(
        params: networks.Params, obs: Array, q: Array, level: Array
    ) -> Array:
        difference = q - networks.apply(value, params, obs)
        return jnp.mean(jax.vmap(losses.expectile, (0, None))(difference, level))

    def critic_loss(
        critics: tuple[networks.Params, ...], batch: Transitions, target: Array
    ) -> Array:
        q = [
            networks.apply(critic, params, batch.obs, batch.action)
            for params in critics
        ]
        return jnp.asarray(sum(jnp.mean(jnp.square(q_i - target)) for q_i in q))

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
        q = networks.smallest_q(critic, state.target_critics, batch.obs, batch.action)

        v_loss, grads = jax.value_and_grad(value_loss)(
            state.value, batch.obs, q, hyper.expectile
        )
        value_params, value_opt = optim.adam_step(
            grads, state.value_opt, state.value, hyper.value_lr
        )

        advantage = q - networks.apply(value, value_params, batch.obs)
        weight = jax.vmap(losses.awr_weight, (0, None, None))(
            advantage, hyper.beta, LARGEST_WEIGHT
        )
        (pi_loss, std), grads = jax.value_and_grad(actor_loss, has_aux=True)(
            state.actor, batch, weight
        )
        done = jnp.minimum(state.updates / hyper.actor_decay_updates, 1.0)
        actor_lr = hyper.actor_lr * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        actor_params, actor_opt = optim.actor_step(
            config.actor_optimiser,
            key,
            policy_of,
            batch.obs,
            grads,
            state.actor_opt,
            state.actor,
            actor_lr,
            hyper.actor_damping,
        )

        target = jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward,
            batch.discount,
            networks.apply(value, value_params, batch.next_obs),
            hyper.discount,
        )
        q_loss, grads = jax.value_and_grad(critic_loss)(state.critics, batch, target)
        critics, critic_opt = optim.adam_step(
            grads, state.critic_opt, state.critics, hyper.critic_lr
        )
        state = State(
            actor=actor_params,
            critics=critics,
            value=value_params,
            target_critics=optim.polyak(state.target_critics, critics, hyper.tau),
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            value_opt=value_opt,
            updates=state.updates + 1.0,
        )
        return state, {
            "value_loss": v_loss,
            "critic_loss": q_loss,
            "actor_loss": pi_loss,
            "q_mean": jnp.mean(q),
            "advantage_mean": jnp.mean(advantage),
            "weight_mean": jnp.mean(weight),
            "std": std,
        }

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del key, hyper
        return policy_of(state.actor, obs)[0]

    return Agent(init, act, (Phase("train", update),), config.batch_size)


ENTRY = AgentEntry(
    name="iql",
    title="IQL",
    reference="Kostrikov, Nair & Levine, ICLR 2022, arXiv:2110.06169",
    config=Config,
    hyper=Hyper,
    make=make_iql,
    critic=critic_of,
    presets={
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper={"actor_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
        "d4rl-locomotion": Preset(
            config={"reward_transform": "return_range"},
            source="authors' locomotion configuration and reward rule",
        ),
        "antmaze": Preset(
            config={"reward_transform": "minus_one"},
            hyper={"expectile": 0.9, "beta": 10.0},
            source="authors' antmaze configuration and reward rule",
        ),
        "adroit": Preset(
            hyper={"beta": 0.5},
            source="the paper's appendix B (its dropout of 0.1 is not implemented)",
        ),
    },
)
