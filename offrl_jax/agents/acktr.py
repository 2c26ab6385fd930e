"""ACKTR: the natural gradient by Kronecker factors, in a trust region.

Wu et al. (2017), "Scalable trust-region method for deep reinforcement learning using
Kronecker-factored approximation", arXiv:1708.05144.  With g the policy gradient of a
rollout and F the K-FAC approximation of the true Fisher information (`fisher.kfac`:
per layer a product of two moments, with actions drawn from the policy), averaged over
updates,

    x     = (F + damping * I)^-1 g
    theta <- theta + min(actor_lr, sqrt(2 * kl / <x, g>)) * x .

A Gaussian's free log standard deviations have the exact information 2.

Deviations from the paper: no momentum; the critic is fitted by Adam and not by K-FAC;
policy and critic share no layers; factors are inverted at every update.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import fisher, networks
from offrl_jax.agents import actor_critic
from offrl_jax.agents.actor_critic import Config, Experience, PolicyStep
from offrl_jax.agents.entry import POSITIVE, UNIT, AgentEntry, within
from offrl_jax.types import Agent, Array, Key, Metrics, Spec

# Of the log standard deviation of a Gaussian, whatever its mean and scale.
LOG_STD_INFORMATION = 2.0


@struct.dataclass
class Hyper(actor_critic.Hyper):
    """Traced settings; `actor_lr` is the largest step."""

    actor_lr: float = within(POSITIVE, 0.25)
    kl: float = within(POSITIVE, 0.001)
    damping: float = within(POSITIVE, 0.01)
    # Of the running average of the factors.
    decay: float = within(UNIT, 0.99)


def policy_step(config: Config, spec: Spec) -> PolicyStep:
    """How the policy moves, for one structure and one `Spec`."""
    policy = actor_critic.make_policy(config.hidden, spec)

    def forward(mlp: networks.Params, obs: Array) -> Array:
        return policy.outputs({"mlp": mlp}, obs)

    def init_opt(actor: networks.Params) -> Any:
        obs = jnp.zeros((1, spec.obs_dim))
        factors = fisher.empty_factors(forward, actor["mlp"], (obs,))
        return {"factors": factors, "count": jnp.zeros(())}

    def improve(
        key: Key, actor: Any, opt: Any, experience: Experience, hyper: Any
    ) -> tuple[Any, Any, Metrics]:
        grads = jax.grad(actor_critic.objective, argnums=1)(
            policy, actor, experience, hyper.entropy
        )
        found = fisher.kfac_factors(
            key,
            forward,
            actor["mlp"],
            (experience.obs,),
            lambda key, out: policy.draw(key, actor, out),
            lambda out, action: policy.likelihood(actor, out, action),
        )
        count = opt["count"] + 1.0
        decay = jnp.minimum(1.0 - 1.0 / count, hyper.decay)
        factors = fisher.average_factors(opt["factors"], found, decay)
        x = dict(grads)
        x["mlp"] = fisher.kfac_direction(grads["mlp"], factors, hyper.damping)
        if not policy.discrete:
            x["log_std"] = grads["log_std"] / (LOG_STD_INFORMATION + hyper.damping)
        slope = fisher.inner(x, grads)
        rate = fisher.trust_region_rate(hyper.kl, hyper.actor_lr, slope)
        actor = jax.tree.map(lambda p, d: p - rate * d, actor, x)
        metrics = {"grad_norm": jnp.sqrt(fisher.norm2(grads)), "rate": rate}
        return actor, {"factors": factors, "count": count}, metrics

    return PolicyStep(policy, init_opt, improve)


def make_acktr(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    return actor_critic.make_actor_critic(config, spec, policy_step(config, spec))


ENTRY = AgentEntry(
    name="acktr",
    title="ACKTR",
    reference="Wu et al., NeurIPS 2017, arXiv:1708.05144",
    config=Config,
    hyper=Hyper,
    make=make_acktr,
    on_policy=True,
    presets=actor_critic.presets(),
)
