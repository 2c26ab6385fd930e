"""A2C: the advantage actor-critic, one policy gradient step per rollout.

Mnih et al. (2016), "Asynchronous Methods for Deep Reinforcement Learning",
arXiv:1602.01783, in its synchronous form.  With advantages A of the rollout,

    L(theta) = -mean A log pi_theta(a | s) - c_H * mean H(pi_theta(. | s)) .

`optimiser` says how the policy moves along g, the gradient of L; the plain rules are
what natural gradients must be compared with:

    adam               Adam (arXiv:1412.6980)
    sgd                theta <- theta - lr * g
    normalised_sgd     theta <- theta - lr * g / sqrt(damping + |g|^2)

Deviations from the paper: no asynchrony, policy and critic share no layers, Adam in the
place of RMSProp, and the advantages are generalised estimates, normalised per rollout.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import fisher, networks
from offrl_jax.agents import actor_critic, optim
from offrl_jax.agents.actor_critic import Experience, PolicyStep
from offrl_jax.agents.entry import (
    NON_NEGATIVE,
    AgentEntry,
    Preset,
    check_choices,
    one_of,
    within,
)
from offrl_jax.types import Agent, Key, Metrics, Spec

OPTIMISERS = ("adam", "sgd", "normalised_sgd")


@dataclasses.dataclass(frozen=True)
class Config(actor_critic.Config):
    """Structure of the rollouts and networks, and of the policy's step."""

    optimiser: str = one_of(OPTIMISERS, "adam")


@struct.dataclass
class Hyper(actor_critic.Hyper):
    """Traced settings."""

    # Squared gradient norm below which a normalised step shrinks.
    damping: float = within(NON_NEGATIVE, 1e-8)


def policy_step(config: Config, spec: Spec) -> PolicyStep:
    """How the policy moves, for one structure and one `Spec`."""
    check_choices("a2c", config)
    policy = actor_critic.make_policy(config.hidden, spec)
    adam = config.optimiser == "adam"

    def init_opt(actor: networks.Params) -> Any:
        return optim.adam_init(actor) if adam else ()

    def improve(
        key: Key, actor: Any, opt: Any, experience: Experience, hyper: Any
    ) -> tuple[Any, Any, Metrics]:
        del key
        grads = jax.grad(actor_critic.objective, argnums=1)(
            policy, actor, experience, hyper.entropy
        )
        size = jnp.sqrt(fisher.norm2(grads))
        if adam:
            actor, opt = optim.adam_step(grads, opt, actor, hyper.actor_lr)
        else:
            lr = hyper.actor_lr
            if config.optimiser == "normalised_sgd":
                lr = lr / jnp.sqrt(hyper.damping + jnp.square(size))
            actor = jax.tree.map(lambda p, g: p - lr * g, actor, grads)
        return actor, opt, {"grad_norm": size}

    return PolicyStep(policy, init_opt, improve)


def make_a2c(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    return actor_critic.make_actor_critic(config, spec, policy_step(config, spec))


ENTRY = AgentEntry(
    name="a2c",
    title="A2C",
    reference="Mnih et al., ICML 2016, arXiv:1602.01783 (synchronous)",
    config=Config,
    hyper=Hyper,
    make=make_a2c,
    on_policy=True,
    presets=actor_critic.presets(
        sgd=Preset(
            config={"optimiser": "sgd"},
            hyper={"actor_lr": 0.1},
            source="ours: the plain policy gradient; else as quick",
        ),
        normalised_sgd=Preset(
            config={"optimiser": "normalised_sgd"},
            hyper={"actor_lr": 0.03},
            source="ours: steps of equal length; else as quick",
        ),
    ),
)
