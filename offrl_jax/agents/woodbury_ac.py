"""Natural policy gradient with k scores, by Woodbury's identity.

Ours: what rank-1 (arXiv:2601.18626, see `rank1_ac`) becomes with more than one sample.
With g the policy gradient of a rollout and V `[k, d]` the scores of k states of the
rollout, each with an action drawn anew from the policy,

    F^    = damping * I + V^T V / k                   k samples of the true Fisher
    theta <- theta + actor_lr * (g - V^T (k * damping * I + V V^T)^-1 V g)

which is `damping * F^^-1 g`, deflated as in `rank1_ac`, at the price of a k x k system.
k = 1 is `rank1_ac` with `vector = fresh`.
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
from offrl_jax.agents.entry import (
    COUNT,
    POSITIVE,
    AgentEntry,
    Preset,
    check_choices,
    one_of,
    within,
)
from offrl_jax.types import Agent, Array, Key, Metrics, Spec

STEPS = ("fixed", "trust_region")


@dataclasses.dataclass(frozen=True)
class Config(actor_critic.Config):
    """Structure of the rollouts, the networks and the preconditioner."""

    # k.
    samples: int = within(COUNT, 16)
    step: str = one_of(STEPS, "fixed")
    relative_damping: bool = False


@struct.dataclass
class Hyper(actor_critic.Hyper):
    """Traced settings."""

    actor_lr: float = within(POSITIVE, 0.1)
    damping: float = within(POSITIVE, 0.1)
    # Of `step = trust_region`.
    kl: float = within(POSITIVE, 0.01)


def policy_step(config: Config, spec: Spec) -> PolicyStep:
    """How the policy moves, for one structure and one `Spec`."""
    check_choices("woodbury_ac", config)
    policy = actor_critic.make_policy(config.hidden, spec)

    in_region = config.step == "trust_region"

    def rule(damping: Any, kl: Any, rate: Any) -> Any:
        return fisher.scale_by_woodbury_fisher(
            damping,
            relative=config.relative_damping,
            kl=kl if in_region else None,
            largest_step=rate,
        )

    def log_prob(params: networks.Params, obs: Array, action: Array) -> Array:
        return policy.log_prob(params, obs[None], action[None])[0]

    def improve(
        key: Key, actor: Any, opt: Any, experience: Experience, hyper: Any
    ) -> tuple[Any, Any, Metrics]:
        row_key, action_key = jax.random.split(key)
        grads = jax.grad(actor_critic.objective, argnums=1)(
            policy, actor, experience, hyper.entropy
        )
        rows = experience.advantage.shape[0]
        obs = experience.obs[jax.random.randint(row_key, (config.samples,), 0, rows)]
        action = policy.sample(action_key, actor, obs)
        scores = fisher.per_sample_scores(log_prob, actor, obs, action)
        direction, found = rule(hyper.damping, hyper.kl, hyper.actor_lr).update(
            grads, opt, actor, score=scores
        )
        # Inside of a trust region the rule has chosen the rate, `actor_lr` at most.
        rate = 1.0 if in_region else hyper.actor_lr
        actor = jax.tree.map(lambda p, d: p - rate * d, actor, direction)
        metrics = {
            "removed": found.removed,
            "score_norm2": found.score_norm2,
            "grad_norm": jnp.sqrt(fisher.norm2(grads)),
            "rate": rate * found.step,
        }
        return actor, found, metrics

    # The rule's state does not depend on its numbers.
    init_opt = rule(1.0, 1.0, 1.0).init
    return PolicyStep(policy, init_opt, improve)


def make_woodbury_ac(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    return actor_critic.make_actor_critic(config, spec, policy_step(config, spec))


ENTRY = AgentEntry(
    name="woodbury_ac",
    title="Woodbury NPG",
    reference="ours, after Huo et al., 2026, arXiv:2601.18626",
    config=Config,
    hyper=Hyper,
    make=make_woodbury_ac,
    on_policy=True,
    presets=actor_critic.presets(
        trust_region=Preset(
            config={"step": "trust_region"},
            hyper={"actor_lr": 1.0},
            source="ours: the closed-form step, at most 1; else as quick",
        ),
    ),
)
