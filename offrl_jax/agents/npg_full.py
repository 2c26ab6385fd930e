"""The full natural policy gradient: exact Fisher information, dense solve; small nets.

Kakade (2001), "A Natural Policy Gradient", NeurIPS 14.  With g the policy gradient of a
rollout and F the true Fisher information of the policy, averaged over the rollout's
states and exact over actions (not sampled),

    x     = (F + damping * I)^-1 g
    theta <- theta + min(actor_lr, sqrt(2 * kl / <x, g>)) * x .

F is d x d for d parameters and is solved densely at every step: what the cheaper
methods approximate, for nets of some hundred parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import fisher, networks
from offrl_jax.agents import actor_critic
from offrl_jax.agents.actor_critic import Experience, PolicyStep
from offrl_jax.agents.entry import COUNT, POSITIVE, AgentEntry, within
from offrl_jax.types import Agent, Array, Key, Metrics, Spec


@dataclasses.dataclass(frozen=True)
class Config(actor_critic.Config):
    """Structure of the rollouts and networks; the defaults keep d in the hundreds."""

    hidden: tuple[int, ...] = within(COUNT, (16, 16))


@struct.dataclass
class Hyper(actor_critic.Hyper):
    """Traced settings; `actor_lr` is the largest step."""

    actor_lr: float = within(POSITIVE, 1.0)
    kl: float = within(POSITIVE, 0.01)
    damping: float = within(POSITIVE, 1e-3)


def policy_step(config: Config, spec: Spec) -> PolicyStep:
    """How the policy moves, for one structure and one `Spec`."""
    policy = actor_critic.make_policy(config.hidden, spec)

    def outputs(actor: networks.Params, obs: Array) -> Any:
        """Logits, or mean and log standard deviation, of one state."""
        out = policy.outputs(actor, obs)
        return out if policy.discrete else (out, actor["log_std"])

    exact = fisher.categorical_fisher if policy.discrete else fisher.gaussian_fisher

    def improve(
        key: Key, actor: Any, opt: Any, experience: Experience, hyper: Any
    ) -> tuple[Any, Any, Metrics]:
        del key
        grads = jax.grad(actor_critic.objective, argnums=1)(
            policy, actor, experience, hyper.entropy
        )
        information = exact(outputs, actor, experience.obs)
        x = fisher.dense_direction(information, grads, hyper.damping)
        slope = fisher.inner(x, grads)
        rate = fisher.trust_region_rate(hyper.kl, hyper.actor_lr, slope)
        actor = jax.tree.map(lambda p, d: p - rate * d, actor, x)
        metrics = {
            "grad_norm": jnp.sqrt(fisher.norm2(grads)),
            "rate": rate,
            "fisher_trace": jnp.trace(information),
        }
        return actor, opt, metrics

    return PolicyStep(policy, lambda actor: (), improve)


def make_npg_full(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    return actor_critic.make_actor_critic(config, spec, policy_step(config, spec))


ENTRY = AgentEntry(
    name="npg_full",
    title="Full NPG",
    reference="Kakade, NeurIPS 2001",
    config=Config,
    hyper=Hyper,
    make=make_npg_full,
    on_policy=True,
    presets=actor_critic.presets(),
)
