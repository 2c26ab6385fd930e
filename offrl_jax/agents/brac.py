"""BRAC: actor-critic regularised by the divergence from a model of the behaviour.

Wu, Tucker & Nachum (2019), "Behavior Regularized Offline Reinforcement Learning",
arXiv:1911.11361; the variant with the KL divergence in its primal form and a fixed
weight alpha.  Two phases: beta is fitted by maximum likelihood, then frozen.

    L(beta) = -E log beta(a | s)                                    phase `behaviour`

    K(s)   = log pi(a~ | s) - log beta(a~ | s),  a~ ~ pi(. | s)     one sample of KL
    y      = r + gamma * d * (min_i Q'_i(s', a~') - alpha * K(s'))  with value_penalty
    L(Q_i) = E (y - Q_i(s, a))^2                                    phase `train`
    L(pi)  = E [alpha * K(s) - min_i Q_i(s, a~)],  a~ reparameterised

d is 0 at terminal states only.  `value_penalty` chooses the paper's BRAC-v; without it
y has no K and this is BRAC-p.  pi and beta are Gaussians squashed by tanh.  K is
evaluated before the squashing: tanh is the same bijection for both, so its Jacobian
cancels exactly, also where a~ rounds to +-1.  The policy that maximises E_pi Q -
alpha * KL is proportional to beta exp(Q / alpha), the limit of AWAC, reached by
reverse projection.  Evaluated with tanh(mean).

Deviations from the authors' code: one sample per divergence (theirs: 4), the same for
K and Q; instead of 20,000 updates in which the actor only minimises K, pi starts as a
copy of beta, where K is 0; all networks have one width (theirs: critics of 300, 300 and
policies of 200, 200).
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
    NON_NEGATIVE,
    POSITIVE,
    POSITIVE_UNIT,
    UNIT,
    AgentEntry,
    Preset,
    within,
)
from offrl_jax.types import Agent, Array, Key, Metrics, Phase, Spec, Transitions

# Bounds of log standard deviations before squashing in the authors' code.
LOG_STD_MIN, LOG_STD_MAX = -5.0, 0.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure of networks and losses, and names of the data's transforms."""

    hidden: tuple[int, ...] = within(COUNT, (256, 256))
    batch_size: int = within(COUNT, 256)
    obs_transform: str = "none"
    reward_transform: str = "none"
    # Whether the critics' targets pay for the divergence, too (BRAC-v), or not (-p).
    value_penalty: bool = True


@struct.dataclass
class Hyper:
    """Traced settings; the defaults are those of the authors' code and run script."""

    actor_lr: float = within(POSITIVE, 3e-4)
    critic_lr: float = within(POSITIVE, 1e-3)
    behaviour_lr: float = within(POSITIVE, 1e-3)
    discount: float = within(UNIT, 0.99)
    tau: float = within(POSITIVE_UNIT, 0.005)
    alpha: float = within(NON_NEGATIVE, 0.1)


@struct.dataclass
class State:
    """Parameters and Adam moments; critics are tuples of two."""

    actor: networks.Params
    behaviour: networks.Params
    critics: tuple[networks.Params, ...]
    target_critics: tuple[networks.Params, ...]
    actor_opt: optim.OptState
    behaviour_opt: optim.OptState
    critic_opt: optim.OptState


def actor_of(config: Config, spec: Spec) -> networks.GaussianActor:
    """The network of the policy, and of the behaviour; its outputs are unbounded."""
    return networks.GaussianActor(config.hidden, spec.action_dim)


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic."""
    return networks.Critic(config.hidden)


def make_brac(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    actor, critic = actor_of(config, spec), critic_of(config)

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        behaviour_key, critic_key = jax.random.split(key)
        behaviour = actor.init(behaviour_key, jnp.zeros((1, spec.obs_dim)))
        critics = networks.init_critics(
            critic, critic_key, spec.obs_dim, spec.action_dim, 2
        )
        # Copies: a donated state must not hold one buffer twice.
        actor_params = jax.tree.map(jnp.copy, behaviour)
        return State(
            actor=actor_params,
            behaviour=behaviour,
            critics=critics,
            target_critics=jax.tree.map(jnp.copy, critics),
            actor_opt=optim.adam_init(actor_params),
            behaviour_opt=optim.adam_init(behaviour),
            critic_opt=optim.adam_init(critics),
        )

    def density_of(params: networks.Params, obs: Array) -> tuple[Array, Array]:
        """Mean and log standard deviation before tanh."""
        mean, raw = networks.apply(actor, params, obs)
        return mean, distributions.soft_bound(raw, LOG_STD_MIN, LOG_STD_MAX)

    def sample(
        params: networks.Params, behaviour: networks.Params, obs: Array, noise: Array
    ) -> tuple[Array, Array]:
        """An action of the policy, and its `log pi - log beta`."""
        mean, log_std = density_of(params, obs)
        before = mean + jnp.exp(log_std) * noise
        log_pi = distributions.normal(mean, log_std).log_prob(before)
        beta = distributions.normal(*density_of(behaviour, obs))
        divergence = jnp.asarray(log_pi) - jnp.asarray(beta.log_prob(before))
        return jnp.tanh(before), divergence

    def behaviour_loss(params: networks.Params, batch: Transitions) -> Array:
        beta = distributions.tanh_normal(*density_of(params, batch.obs))
        return -jnp.mean(distributions.log_prob_of_data(beta, batch.action))

    def critic_loss(
        critics: tuple[networks.Params, ...], batch: Transitions, target: Array
    ) -> Array:
        q = [
            networks.apply(critic, params, batch.obs, batch.action)
            for params in critics
        ]
        return jnp.asarray(sum(jnp.mean(jnp.square(q_i - target)) for q_i in q))

    def actor_loss(
        params: networks.Params,
        behaviour: networks.Params,
        critics: tuple[networks.Params, ...],
        obs: Array,
        noise: Array,
        alpha: Array | float,
    ) -> tuple[Array, tuple[Array, Array]]:
        action, divergence = sample(params, behaviour, obs, noise)
        q = networks.smallest_q(critic, critics, obs, action)
        kl, q_mean = jnp.mean(divergence), jnp.mean(q)
        return alpha * kl - q_mean, (kl, q_mean)

    def fit_behaviour(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        del key
        loss, grads = jax.value_and_grad(behaviour_loss)(state.behaviour, batch)
        behaviour, opt = optim.adam_step(
            grads, state.behaviour_opt, state.behaviour, hyper.behaviour_lr
        )
        state = State(
            # The policy starts where its divergence from beta is 0.
            actor=jax.tree.map(jnp.copy, behaviour),
            behaviour=behaviour,
            critics=state.critics,
            target_critics=state.target_critics,
            actor_opt=state.actor_opt,
            behaviour_opt=opt,
            critic_opt=state.critic_opt,
        )
        return state, {"behaviour_loss": loss}

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        next_key, actor_key = jax.random.split(key)
        next_noise = jax.random.normal(next_key, batch.action.shape)
        noise = jax.random.normal(actor_key, batch.action.shape)
        next_action, divergence = sample(
            state.actor, state.behaviour, batch.next_obs, next_noise
        )
        next_value = networks.smallest_q(
            critic, state.target_critics, batch.next_obs, next_action
        )
        if config.value_penalty:
            next_value = next_value - hyper.alpha * divergence
        target = jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward, batch.discount, next_value, hyper.discount
        )
        q_loss, grads = jax.value_and_grad(critic_loss)(state.critics, batch, target)
        critics, critic_opt = optim.adam_step(
            grads, state.critic_opt, state.critics, hyper.critic_lr
        )

        (pi_loss, (kl, q_mean)), grads = jax.value_and_grad(actor_loss, has_aux=True)(
            state.actor, state.behaviour, critics, batch.obs, noise, hyper.alpha
        )
        actor_params, actor_opt = optim.adam_step(
            grads, state.actor_opt, state.actor, hyper.actor_lr
        )
        state = State(
            actor=actor_params,
            behaviour=state.behaviour,
            critics=critics,
            target_critics=optim.polyak(state.target_critics, critics, hyper.tau),
            actor_opt=actor_opt,
            behaviour_opt=state.behaviour_opt,
            critic_opt=critic_opt,
        )
        return state, {
            "critic_loss": q_loss,
            "actor_loss": pi_loss,
            "q_mean": q_mean,
            "kl": kl,
        }

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del key, hyper
        return jnp.tanh(density_of(state.actor, obs)[0])

    phases = (Phase("behaviour", fit_behaviour), Phase("train", update))
    return Agent(init, act, phases, config.batch_size)


ENTRY = AgentEntry(
    name="brac",
    title="BRAC",
    reference="Wu, Tucker & Nachum, 2019, arXiv:1911.11361",
    config=Config,
    hyper=Hyper,
    make=make_brac,
    critic=critic_of,
    presets={
        "quick": Preset(
            # A smaller batch than the others': it pays for the first phase.
            config={"hidden": (64, 64), "batch_size": 96},
            hyper={"actor_lr": 1e-3},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
        "p": Preset(
            config={"value_penalty": False},
            source="the paper's BRAC-p: the penalty in the actor's loss only",
        ),
    },
)
