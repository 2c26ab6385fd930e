"""TRPO: the natural gradient by conjugate gradients, with a line search.

Schulman et al. (2015), "Trust Region Policy Optimization", arXiv:1502.05477, appendix
C.  With g the gradient of the surrogate mean(r A) at r = 1 and F the Hessian of the
mean KL(pi_old || pi_theta) there,

    (F + damping * I) x = g          some steps of conjugate gradients
    theta <- theta + b^j * sqrt(2 * kl / (x^T (F + damping * I) x)) * x

for the smallest j = 0, 1, ... that raises the surrogate and keeps the mean KL within
`kl`; no step is taken where none does.

Deviations from the authors' code: all `backtracks` are evaluated (under `vmap` there is
no stopping early), F is averaged over the whole rollout, an entropy bonus is possible,
the critic is fitted by Adam.
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
    OPEN_UNIT,
    POSITIVE,
    AgentEntry,
    within,
)
from offrl_jax.types import Agent, Array, Key, Metrics, Spec


@dataclasses.dataclass(frozen=True)
class Config(actor_critic.Config):
    """Structure of the rollouts, networks and solver."""

    environments: int = within(COUNT, 8)
    steps: int = within(COUNT, 128)
    critic_epochs: int = within(COUNT, 4)
    critic_batches: int = within(COUNT, 4)
    # Conjugate gradient steps, and step lengths that the line search tries.
    iterations: int = within(COUNT, 10)
    backtracks: int = within(COUNT, 10)


@struct.dataclass
class Hyper(actor_critic.Hyper):
    """Traced settings; `actor_lr` scales the first step that is tried."""

    actor_lr: float = within(POSITIVE, 1.0)
    kl: float = within(POSITIVE, 0.01)
    damping: float = within(POSITIVE, 0.1)
    # b.
    backtrack: float = within(OPEN_UNIT, 0.5)


def policy_step(config: Config, spec: Spec) -> PolicyStep:
    """How the policy moves, for one structure and one `Spec`."""
    policy = actor_critic.make_policy(config.hidden, spec)

    def improve(
        key: Key, actor: Any, opt: Any, experience: Experience, hyper: Any
    ) -> tuple[Any, Any, Metrics]:
        del key
        obs, action, advantage = experience
        old_log_prob = policy.log_prob(actor, obs, action)

        def surrogate(params: networks.Params) -> Array:
            ratio = jnp.exp(policy.log_prob(params, obs, action) - old_log_prob)
            bonus = hyper.entropy * jnp.mean(policy.entropy(params, obs))
            return jnp.mean(ratio * advantage) + bonus

        def divergence(params: networks.Params) -> Array:
            return jnp.mean(policy.divergence(actor, params, obs))

        def product(vector: networks.Params) -> networks.Params:
            return fisher.fisher_vector_product(divergence, actor, vector)

        before, grads = jax.value_and_grad(surrogate)(actor)
        x, residual = fisher.conjugate_gradient(
            product, grads, config.iterations, hyper.damping
        )
        curved = jax.tree.map(lambda f, v: f + hyper.damping * v, product(x), x)
        square = fisher.inner(x, curved)
        longest = hyper.actor_lr * jnp.sqrt(2.0 * hyper.kl / (square + 1e-12))

        def tried(length: Array) -> networks.Params:
            return jax.tree.map(lambda p, d: p + length * d, actor, x)

        def check(length: Array) -> Array:
            params = tried(length)
            better = surrogate(params) > before
            return better & (divergence(params) <= hyper.kl)

        lengths = longest * hyper.backtrack ** jnp.arange(
            config.backtracks, dtype=jnp.float32
        )
        good = jax.lax.map(check, lengths)
        # The first, which is the longest, of the good ones.
        found = jnp.any(good)
        length = jnp.where(found, lengths[jnp.argmax(good)], 0.0)
        # Not a step of length 0, which is NaN along a direction that is not finite.
        moved = jax.tree.map(
            lambda new, old: jnp.where(found, new, old), tried(length), actor
        )
        metrics = {
            "accepted": found.astype(jnp.float32),
            "residual": residual,
            "step": length,
        }
        return moved, opt, metrics

    return PolicyStep(policy, lambda actor: (), improve)


def make_trpo(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    return actor_critic.make_actor_critic(config, spec, policy_step(config, spec))


ENTRY = AgentEntry(
    name="trpo",
    title="TRPO",
    reference="Schulman et al., ICML 2015, arXiv:1502.05477",
    config=Config,
    hyper=Hyper,
    make=make_trpo,
    on_policy=True,
    presets=actor_critic.presets(),
)
