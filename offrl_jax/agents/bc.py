"""Behaviour cloning with a deterministic policy.

Pomerleau (1991), "Efficient training of artificial neural networks for autonomous
navigation".  The policy minimises the squared error to the actions of the data,

    L(pi) = E |pi(s) - a|^2 / A ,

whose minimiser is the conditional mean of the behaviour: the baseline that every
offline algorithm must beat.  No reward, next observation or discount is looked at.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import losses, networks
from offrl_jax.agents import optim
from offrl_jax.agents.entry import COUNT, POSITIVE, AgentEntry, Preset, within
from offrl_jax.types import Agent, Array, Key, Metrics, Phase, Spec, Transitions


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure of the network and names of the data's transforms."""

    hidden: tuple[int, ...] = within(COUNT, (256, 256))
    batch_size: int = within(COUNT, 256)
    obs_transform: str = "none"
    reward_transform: str = "none"


@struct.dataclass
class Hyper:
    """Traced settings."""

    # Adam's customary rate, and that of TD3+BC's own BC baseline.
    lr: float = within(POSITIVE, 3e-4)


@struct.dataclass
class State:
    """Parameters and Adam moments of the policy."""

    actor: networks.Params
    actor_opt: optim.OptState


def actor_of(config: Config, spec: Spec) -> networks.Actor:
    """The policy network."""
    return networks.Actor(config.hidden, spec.action_dim)


def make_bc(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    actor = actor_of(config, spec)

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        params = actor.init(key, jnp.zeros((1, spec.obs_dim)))
        return State(actor=params, actor_opt=optim.adam_init(params))

    def actor_loss(params: networks.Params, batch: Transitions) -> Array:
        action = networks.apply(actor, params, batch.obs)
        return jnp.mean(jax.vmap(losses.mean_square)(action, batch.action))

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        del key
        loss, grads = jax.value_and_grad(actor_loss)(state.actor, batch)
        params, opt = optim.adam_step(grads, state.actor_opt, state.actor, hyper.lr)
        return State(actor=params, actor_opt=opt), {"actor_loss": loss}

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del key, hyper
        return networks.apply(actor, state.actor, obs)

    return Agent(init, act, (Phase("train", update),), config.batch_size)


ENTRY = AgentEntry(
    name="bc",
    title="BC",
    reference="Pomerleau, Neural Computation 1991 (behaviour cloning by least squares)",
    config=Config,
    hyper=Hyper,
    make=make_bc,
    presets={
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper={"lr": 1e-3},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
    },
)
