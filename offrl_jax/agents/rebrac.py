"""ReBRAC: TD3+BC with decoupled penalties, deeper networks and normalised critics.

Tarasov, Kurenkov, Nikulin & Kolesnikov (2023), "Revisiting the Minimalist Approach to
Offline Reinforcement Learning", arXiv:2305.09836.  With d = 0 at terminal states only,
h = 1 where the data hold a next action a' and a~ = smoothed pi'(s') as in TD3:

    y      = r + gamma * d * (min_i Q'_i(s', a~) - h * beta_2 * |a~ - a'|^2)
    L(Q_i) = E (Q_i(s, a) - y)^2                                  at every update
    L(pi)  = E [beta_1 * |pi(s) - a|^2 - lambda * min_i Q_i(s, pi(s))]
    lambda = 1 / E |min_i Q_i(s, pi(s))|   (no gradient)          every policy_delay-th

Squared distances are sums over action dimensions (TD3+BC averages them).  Critics are
normalised by LayerNorm after each ReLU; the actor is not.  The targets move once per
actor update, as in the authors' code.

Deviations from the authors' code: it leaves out the last transition before a time-out,
whose a' is unknown; here it is kept and its critic penalty is 0.  The target actor
follows the actor after its step, as in TD3 (the authors' follows the one before it).
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

    # The authors' code: three hidden layers, LayerNorm in the critics only.
    hidden: tuple[int, ...] = within(COUNT, (256, 256, 256))
    batch_size: int = within(COUNT, 256)
    obs_transform: str = "none"
    reward_transform: str = "none"
    actor_layer_norm: bool = False
    critic_layer_norm: bool = True
    # Critic updates per actor update: the stride of the phase.
    policy_delay: int = within(COUNT, 2)


@struct.dataclass
class Hyper:
    """Traced settings: the authors' defaults (penalties are tuned per dataset)."""

    actor_lr: float = within(POSITIVE, 1e-3)
    critic_lr: float = within(POSITIVE, 1e-3)
    discount: float = within(UNIT, 0.99)
    tau: float = within(POSITIVE_UNIT, 0.005)
    policy_noise: float = within(NON_NEGATIVE, 0.2)
    noise_clip: float = within(NON_NEGATIVE, 0.5)
    actor_penalty: float = within(NON_NEGATIVE, 1.0)
    critic_penalty: float = within(NON_NEGATIVE, 1.0)


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
    """The policy network, initialised as in EDAC."""
    return networks.Actor(
        config.hidden,
        spec.action_dim,
        layer_norm=config.actor_layer_norm,
        hidden_init=networks.torch_linear_bias(0.1),
        out_init=networks.uniform(1e-3),
    )


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic, initialised as in EDAC."""
    return networks.Critic(
        config.hidden,
        layer_norm=config.critic_layer_norm,
        hidden_init=networks.torch_linear_bias(0.1),
        out_init=networks.uniform(3e-3),
    )


def make_rebrac(config: Config, spec: Spec) -> Agent:
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
        distance = jax.vmap(losses.sum_square)(next_action, batch.next_action)
        penalty = hyper.critic_penalty * batch.has_next_action * distance
        return jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward, batch.discount, next_q - penalty, hyper.discount
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
        params: networks.Params,
        critics: tuple[networks.Params, ...],
        batch: Transitions,
        penalty: Array,
    ) -> tuple[Array, Array]:
        action = networks.apply(actor, params, batch.obs)
        q = networks.smallest_q(critic, critics, batch.obs, action)
        cloning = jnp.mean(jax.vmap(losses.sum_square)(action, batch.action))
        return penalty * cloning - losses.q_scale(q, 1.0) * jnp.mean(q), cloning

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
            state.actor, critics, minibatches[-1], hyper.actor_penalty
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
    name="rebrac",
    title="ReBRAC",
    reference="Tarasov et al., NeurIPS 2023, arXiv:2305.09836",
    config=Config,
    hyper=Hyper,
    make=make_rebrac,
    critic=critic_of,
    presets={
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
        # Penalties differ per dataset in all three; these are common winners.
        "d4rl-locomotion": Preset(
            config={"batch_size": 1024},
            hyper={"actor_penalty": 0.01, "critic_penalty": 0.01},
            source="authors' configuration of hopper-medium-v2",
        ),
        "adroit": Preset(
            hyper={
                "actor_lr": 3e-4,
                "critic_lr": 3e-4,
                "actor_penalty": 0.05,
                "critic_penalty": 0.5,
            },
            source="authors' configuration of pen-cloned-v1",
        ),
        "antmaze": Preset(
            hyper={
                "actor_lr": 3e-4,
                "critic_lr": 5e-5,
                "discount": 0.999,
                "actor_penalty": 0.001,
                "critic_penalty": 0.0005,
            },
            source="authors' configuration of antmaze-medium-play-v2, without its "
            "factor 100 on rewards",
        ),
    },
)
