"""TD3+BC: TD3 with a behaviour-cloning term in the actor's loss.

Fujimoto & Gu (2021), "A Minimalist Approach to Offline Reinforcement Learning",
arXiv:2106.06860.  Critics Q_1, Q_2 with targets Q', policy pi with target pi':

    a~     = clip(pi'(s') + clip(sigma * n, -c, c), -1, 1),  n standard normal
    y      = r + gamma * d * min_i Q'_i(s', a~)
    L(Q_i) = E (Q_i(s, a) - y)^2                                at every update
    L(pi)  = E [-lambda * Q_1(s, pi(s)) + |pi(s) - a|^2 / A]    every policy_delay-th
    lambda = alpha / E |Q_1(s, pi(s))|   (no gradient)

d is 0 at terminal states only.  As in the authors' code, the targets move once per
actor update; they are thus constant within one call of `update`, which computes the
targets of all its `policy_delay` minibatches in a single pass.

Deviations from the authors' code: none in the losses; Adam is optax's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import losses, networks
from offrl_jax.agents import optim
from offrl_jax.agents.entry import (
    COUNT,
    NON_NEGATIVE,
    POSITIVE,
    POSITIVE_UNIT,
    UNIT,
    AgentEntry,
    Preset,
    within,
)
from offrl_jax.types import Agent, Array, Key, Metrics, Phase, Spec, Transitions


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure of networks and update, and names of the data's transforms."""

    hidden: tuple[int, ...] = within(COUNT, (256, 256))
    batch_size: int = within(COUNT, 256)
    # The paper standardises observations ("normalise states", section 5).
    obs_transform: str = "standardise"
    reward_transform: str = "none"
    # Critic updates per actor update: the stride of the phase.
    policy_delay: int = within(COUNT, 2)


@struct.dataclass
class Hyper:
    """Traced settings; the defaults are those of the paper's appendix C, table 3."""

    actor_lr: float = within(POSITIVE, 3e-4)
    critic_lr: float = within(POSITIVE, 3e-4)
    discount: float = within(UNIT, 0.99)
    tau: float = within(POSITIVE_UNIT, 0.005)
    policy_noise: float = within(NON_NEGATIVE, 0.2)
    noise_clip: float = within(NON_NEGATIVE, 0.5)
    alpha: float = within(NON_NEGATIVE, 2.5)


@struct.dataclass
class State:
    """Online and target parameters, and Adam moments; critics are tuples of two."""

    actor: networks.Params
    critics: tuple[networks.Params, ...]
    target_actor: networks.Params
    target_critics: tuple[networks.Params, ...]
    actor_opt: optim.OptState
    critic_opt: optim.OptState


def actor_of(config: Config, spec: Spec) -> networks.Actor:
    """The policy network."""
    return networks.Actor(config.hidden, spec.action_dim)


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic."""
    return networks.Critic(config.hidden)


def make_td3_bc(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    actor, critic = actor_of(config, spec), critic_of(config)

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        actor_key, critic_key = jax.random.split(key)
        actor_params = actor.init(actor_key, jnp.zeros((1, spec.obs_dim)))
        critics = networks.init_critics(
            critic, critic_key, spec.obs_dim, spec.action_dim, 2
        )
        return State(
            actor=actor_params,
            critics=critics,
            # Copies: a donated state must not hold one buffer twice.
            target_actor=jax.tree.map(jnp.copy, actor_params),
            target_critics=jax.tree.map(jnp.copy, critics),
            actor_opt=optim.adam_init(actor_params),
            critic_opt=optim.adam_init(critics),
        )

    def targets(key: Key, state: State, batch: Transitions, hyper: Hyper) -> Array:
        noise = jax.random.normal(key, batch.action.shape)
        next_action = jax.vmap(losses.smoothed_action, (0, 0, None, None))(
            networks.apply(actor, state.target_actor, batch.next_obs),
            noise,
            hyper.policy_noise,
            hyper.noise_clip,
        )
        next_q = networks.smallest_q(
            critic, state.target_critics, batch.next_obs, next_action
        )
        return jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward, batch.discount, next_q, hyper.discount
        )

    def critic_loss(
        critics: tuple[networks.Params, ...], batch: Transitions, target: Array
    ) -> tuple[Array, Array]:
        q = [
            networks.apply(critic, params, batch.obs, batch.action)
            for params in critics
        ]
        loss = sum(jnp.mean(jnp.square(q_i - target)) for q_i in q)
        return jnp.asarray(loss), jnp.mean(q[0])

    def actor_loss(
        params: networks.Params, q1: networks.Params, batch: Transitions, alpha: Array
    ) -> tuple[Array, Array]:
        action = networks.apply(actor, params, batch.obs)
        q = networks.apply(critic, q1, batch.obs, action)
        cloning = jnp.mean(jax.vmap(losses.mean_square)(action, batch.action))
        return cloning - losses.q_scale(q, alpha) * jnp.mean(q), cloning

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        target = targets(key, state, batch, hyper).reshape(config.policy_delay, -1)
        critics, critic_opt = state.critics, state.critic_opt
        minibatches = optim.minibatches(batch, config.policy_delay)
        critic_losses, q_means = [], []
        for minibatch, y in zip(minibatches, target, strict=True):
            (loss, q_mean), grads = jax.value_and_grad(critic_loss, has_aux=True)(
                critics, minibatch, y
            )
            critics, critic_opt = optim.adam_step(
                grads, critic_opt, critics, hyper.critic_lr
            )
            critic_losses.append(loss)
            q_means.append(q_mean)
        (loss, cloning), grads = jax.value_and_grad(actor_loss, has_aux=True)(
            state.actor, critics[0], minibatches[-1], hyper.alpha
        )
        actor_params, actor_opt = optim.adam_step(
            grads, state.actor_opt, state.actor, hyper.actor_lr
        )
        state = State(
            actor=actor_params,
            critics=critics,
            target_actor=optim.polyak(state.target_actor, actor_params, hyper.tau),
            target_critics=optim.polyak(state.target_critics, critics, hyper.tau),
            actor_opt=actor_opt,
            critic_opt=critic_opt,
        )
        return state, {
            "critic_loss": jnp.mean(jnp.stack(critic_losses)),
            "q_mean": jnp.mean(jnp.stack(q_means)),
            "actor_loss": loss,
            "cloning_loss": cloning,
        }

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del key, hyper
        return networks.apply(actor, state.actor, obs)

    phase = Phase("train", update, config.policy_delay)
    return Agent(init, act, (phase,), config.batch_size)


ENTRY = AgentEntry(
    name="td3_bc",
    title="TD3+BC",
    reference="Fujimoto & Gu, NeurIPS 2021, arXiv:2106.06860",
    config=Config,
    hyper=Hyper,
    make=make_td3_bc,
    critic=critic_of,
    presets={
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper={"actor_lr": 1e-3, "critic_lr": 1e-3},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
    },
    families={
        # No pair of values wins on all tasks: .2/.5 is the commonest of the winners.
        "neorl2": Preset(
            hyper={"alpha": 0.2, "policy_noise": 0.5},
            source="NeoRL-2's published grid alpha {.05,.1,.2} x policy noise "
            "{.5,1.5,2.5}; its commonest winner",
        ),
    },
)
