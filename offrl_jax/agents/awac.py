"""AWAC: weighted behaviour cloning with critics of actions.

Nair, Gupta, Dalal & Levine (2020), "AWAC: Accelerating Online Reinforcement Learning
with Offline Datasets", arXiv:2006.09359; its offline part.  Q = min(Q_1, Q_2), targets
Q', actions a' ~ pi(. | s') and a~ ~ pi(. | s), clipped to [-1, 1]:

    L(Q_i) = E (r + gamma * d * Q'(s', a') - Q_i(s, a))^2
    A      = Q(s, a) - Q(s, a~)
    L(pi)  = -E min(exp(A / temperature), 100) * log pi(a | s)           (equation 13)

d is 0 at terminal states only.  The minimiser of L(pi) over all policies is
proportional to beta(a | s) exp(Q(s, a) / temperature), beta being the behaviour policy:
the maximiser of E_pi Q - temperature * KL(pi || beta).  The one sample of V(s) = Q(s,
a~) is independent of a and only rescales the weights, as long as none is clipped.

The critics are updated first, the actor then uses the new ones and the targets move
last.  Evaluated with the mean.

Deviations: weights are cut off at 100 as in CORL's implementation (the authors
normalise them over the batch); the policy's mean is squashed by tanh; no weight decay.
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
    # As in CORL's runs.
    obs_transform: str = "standardise"
    reward_transform: str = "none"


@struct.dataclass
class Hyper:
    """Traced settings; the defaults are those of CORL's offline runs."""

    actor_lr: float = within(POSITIVE, 3e-4)
    critic_lr: float = within(POSITIVE, 3e-4)
    discount: float = within(UNIT, 0.99)
    tau: float = within(POSITIVE_UNIT, 0.005)
    temperature: float = within(POSITIVE, 1.0)
    largest_weight: float = within(POSITIVE, 100.0)


@struct.dataclass
class State:
    """Parameters and Adam moments; critics are tuples of two."""

    actor: networks.Params
    critics: tuple[networks.Params, ...]
    target_critics: tuple[networks.Params, ...]
    actor_opt: optim.OptState
    critic_opt: optim.OptState


def actor_of(config: Config, spec: Spec) -> networks.GaussianActor:
    """The policy network; the mean is squashed by tanh outside of it."""
    return networks.GaussianActor(
        config.hidden, spec.action_dim, state_dependent_std=False
    )


def critic_of(config: Config) -> networks.Critic:
    """The network of one critic."""
    return networks.Critic(config.hidden)


def make_awac(config: Config, spec: Spec) -> Agent:
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
            # A copy: a donated state must not hold one buffer twice.
            target_critics=jax.tree.map(jnp.copy, critics),
            actor_opt=optim.adam_init(actor_params),
            critic_opt=optim.adam_init(critics),
        )

    def policy_of(params: networks.Params, obs: Array) -> tuple[Array, Array]:
        mean, log_std = networks.apply(actor, params, obs)
        return jnp.tanh(mean), jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)

    def perturbed(mean: Array, log_std: Array, noise: Array) -> Array:
        return jnp.clip(mean + jnp.exp(log_std) * noise, -1.0, 1.0)

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
        critics: tuple[networks.Params, ...],
        batch: Transitions,
        q: Array,
        noise: Array,
        hyper: Hyper,
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        # One forward pass gives the action that stands for V(s) and the likelihood.
        mean, log_std = policy_of(params, batch.obs)
        own_action = jax.lax.stop_gradient(perturbed(mean, log_std, noise))
        advantage = q - networks.smallest_q(critic, critics, batch.obs, own_action)
        weight = jax.vmap(losses.awr_weight, (0, None, None))(
            advantage, 1.0 / hyper.temperature, hyper.largest_weight
        )
        log_prob = distributions.normal(mean, log_std).log_prob(batch.action)
        aux = jnp.mean(advantage), jnp.mean(weight), jnp.mean(jnp.exp(log_std))
        return -jnp.mean(weight * log_prob), aux

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        next_key, value_key = jax.random.split(key)
        next_noise = jax.random.normal(next_key, batch.action.shape)
        next_action = perturbed(*policy_of(state.actor, batch.next_obs), next_noise)
        target = jax.vmap(losses.td_target, (0, 0, 0, None))(
            batch.reward,
            batch.discount,
            networks.smallest_q(
                critic, state.target_critics, batch.next_obs, next_action
            ),
            hyper.discount,
        )
        q_loss, grads = jax.value_and_grad(critic_loss)(state.critics, batch, target)
        critics, critic_opt = optim.adam_step(
            grads, state.critic_opt, state.critics, hyper.critic_lr
        )

        q = networks.smallest_q(critic, critics, batch.obs, batch.action)
        noise = jax.random.normal(value_key, batch.action.shape)
        (pi_loss, (advantage, weight, std)), grads = jax.value_and_grad(
            actor_loss, has_aux=True
        )(state.actor, critics, batch, q, noise, hyper)
        actor_params, actor_opt = optim.adam_step(
            grads, state.actor_opt, state.actor, hyper.actor_lr
        )
        state = State(
            actor=actor_params,
            critics=critics,
            target_critics=optim.polyak(state.target_critics, critics, hyper.tau),
            actor_opt=actor_opt,
            critic_opt=critic_opt,
        )
        return state, {
            "critic_loss": q_loss,
            "actor_loss": pi_loss,
            "q_mean": jnp.mean(q),
            "advantage_mean": advantage,
            "weight_mean": weight,
            "std": std,
        }

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del key, hyper
        return policy_of(state.actor, obs)[0]

    return Agent(init, act, (Phase("train", update),), config.batch_size)


ENTRY = AgentEntry(
    name="awac",
    title="AWAC",
    reference="Nair, Gupta, Dalal & Levine, 2020, arXiv:2006.09359",
    config=Config,
    hyper=Hyper,
    make=make_awac,
    critic=critic_of,
    presets={
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper={"actor_lr": 1e-3, "critic_lr": 1e-3},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
    },
)
