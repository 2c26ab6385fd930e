"""PPO: several epochs on each rollout under a clipped likelihood ratio.

Schulman et al. (2017), "Proximal Policy Optimization Algorithms", arXiv:1707.06347,
eq. 7.  With r = pi_theta(a | s) / pi_old(a | s),

    L(theta) = -mean min(r A, clip(r, 1 - eps, 1 + eps) A) - c_H * mean H .

The policy takes `epochs * batches` Adam steps per rollout on shuffled minibatches.

Deviations from the paper's code: policy and critic share no layers and have their own
epochs, values are not clipped, rates do not decay, advantages are normalised per
rollout and not per minibatch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import networks
from offrl_jax.agents import actor_critic, optim
from offrl_jax.agents.actor_critic import Experience, PolicyStep
from offrl_jax.agents.entry import COUNT, POSITIVE, AgentEntry, within
from offrl_jax.types import Agent, Array, Key, Metrics, Spec


@dataclasses.dataclass(frozen=True)
class Config(actor_critic.Config):
    """Structure of the rollouts, networks and passes over a rollout."""

    environments: int = within(COUNT, 8)
    steps: int = within(COUNT, 128)
    epochs: int = within(COUNT, 4)
    batches: int = within(COUNT, 4)
    critic_epochs: int = within(COUNT, 4)
    critic_batches: int = within(COUNT, 4)


@struct.dataclass
class Hyper(actor_critic.Hyper):
    """Traced settings."""

    # eps.
    clip: float = within(POSITIVE, 0.2)


def policy_step(config: Config, spec: Spec) -> PolicyStep:
    """How the policy moves, for one structure and one `Spec`."""
    everything = config.steps * config.environments
    optim.check_batches("ppo", "batches", config.batches, everything)
    policy = actor_critic.make_policy(config.hidden, spec)

    def loss(
        actor: networks.Params, experience: Experience, old: Array, hyper: Any
    ) -> tuple[Array, Array]:
        obs, action, advantage = experience
        ratio = jnp.exp(policy.log_prob(actor, obs, action) - old)
        inside = jnp.clip(ratio, 1.0 - hyper.clip, 1.0 + hyper.clip)
        gain = jnp.mean(jnp.minimum(ratio * advantage, inside * advantage))
        bonus = hyper.entropy * jnp.mean(policy.entropy(actor, obs))
        return -gain - bonus, jnp.mean((ratio != inside).astype(jnp.float32))

    def improve(
        key: Key, actor: Any, opt: Any, experience: Experience, hyper: Any
    ) -> tuple[Any, Any, Metrics]:
        old = policy.log_prob(actor, experience.obs, experience.action)
        rows = experience.advantage.shape[0]

        def step(carry: Any, picked: Array) -> tuple[Any, Array]:
            actor, opt = carry
            part = jax.tree.map(lambda x: x[picked], experience)
            grads, clipped = jax.grad(loss, has_aux=True)(
                actor, part, old[picked], hyper
            )
            return optim.adam_step(grads, opt, actor, hyper.actor_lr), clipped

        keys = jax.random.split(key, config.epochs)
        batches = jax.vmap(lambda key: optim.shuffled(key, rows, config.batches))(keys)
        (actor, opt), clipped = jax.lax.scan(
            step, (actor, opt), batches.reshape(-1, rows // config.batches)
        )
        return actor, opt, {"clipped": jnp.mean(clipped)}

    return PolicyStep(policy, optim.adam_init, improve)


def make_ppo(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    return actor_critic.make_actor_critic(config, spec, policy_step(config, spec))


ENTRY = AgentEntry(
    name="ppo",
    title="PPO",
    reference="Schulman et al., 2017, arXiv:1707.06347",
    config=Config,
    hyper=Hyper,
    make=make_ppo,
    on_policy=True,
    presets=actor_critic.presets(),
)
