"""Behaviour cloning by maximum likelihood with a tanh-squashed Gaussian.

    L(pi) = -E log pi(a | s),   pi(. | s) = tanh(N(mean(s), diag(std(s))^2))

The form of NeoRL-2's BC baseline (arXiv:2503.19267; OfflineRL's code: a squashed
Gaussian with a state-dependent standard deviation).  Evaluated with `tanh(mean)`.

Deviations from that code: recorded actions are moved to +-(1 - 1e-6) where they sit on
the bounds (the squashed density is infinite there), and the log standard deviation is
bounded softly, so that it keeps a gradient at the bounds.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import distributions, networks
from offrl_jax.agents import optim
from offrl_jax.agents.entry import COUNT, POSITIVE, AgentEntry, Preset, Range, within
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

    # Adam's customary rate; NeoRL-2 sweeps 1e-4, 5e-4, 1e-3.
    lr: float = within(POSITIVE, 3e-4)
    # Bounds of log std before squashing: -5 and 2 are customary for squashed Gaussians.
    log_std_min: float = within(Range(-20.0, -1.0), -5.0)
    log_std_max: float = within(Range(0.0, 5.0), 2.0)


@struct.dataclass
class State:
    """Parameters and Adam moments of the policy."""

    actor: networks.Params
    actor_opt: optim.OptState


def actor_of(config: Config, spec: Spec) -> networks.GaussianActor:
    """The policy network; its outputs are unbounded."""
    return networks.GaussianActor(config.hidden, spec.action_dim)


def make_gaussian_bc(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    actor = actor_of(config, spec)

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        params = actor.init(key, jnp.zeros((1, spec.obs_dim)))
        return State(actor=params, actor_opt=optim.adam_init(params))

    def actor_loss(
        params: networks.Params, batch: Transitions, hyper: Hyper
    ) -> tuple[Array, Array]:
        mean, raw = networks.apply(actor, params, batch.obs)
        log_std = distributions.soft_bound(raw, hyper.log_std_min, hyper.log_std_max)
        policy = distributions.tanh_normal(mean, log_std)
        log_prob = distributions.log_prob_of_data(policy, batch.action)
        return -jnp.mean(log_prob), jnp.mean(jnp.exp(log_std))

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        del key
        (loss, std), grads = jax.value_and_grad(actor_loss, has_aux=True)(
            state.actor, batch, hyper
        )
        params, opt = optim.adam_step(grads, state.actor_opt, state.actor, hyper.lr)
        metrics = {"actor_loss": loss, "std_before_tanh": std}
        return State(actor=params, actor_opt=opt), metrics

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del key, hyper
        mean, _ = networks.apply(actor, state.actor, obs)
        return jnp.tanh(mean)

    return Agent(init, act, (Phase("train", update),), config.batch_size)


ENTRY = AgentEntry(
    name="gaussian_bc",
    title="BC (likelihood)",
    reference="Maximum-likelihood behaviour cloning, as in NeoRL-2 (arXiv:2503.19267)",
    config=Config,
    hyper=Hyper,
    make=make_gaussian_bc,
    presets={
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper={"lr": 1e-3},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
    },
)
