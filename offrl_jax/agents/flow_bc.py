"""Flow BC: behaviour cloning by flow matching, the behaviour part of FQL alone.

Park, Li & Levine (2025), "Flow Q-Learning", arXiv:2502.02538, of flow matching by
Lipman et al. (2023), arXiv:2210.02747.  With z standard normal, t uniform on [0, 1],
x_t = (1 - t) z + t a:

    L(v) = E |v(s, x_t, t) - (a - z)|^2 / A
    policy: dx/dt = v(s, x, t) from x_0 = z, in `flow_steps` Euler steps; clip(x_1)

Unlike a Gaussian it may have any number of modes; the policy that is evaluated draws.

Deviations from FQL's code: none known; second-hand (docs/algorithms/flow_bc.md).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import flows, networks
from offrl_jax.agents import optim
from offrl_jax.agents.entry import (
    COUNT,
    POSITIVE,
    AgentEntry,
    Preset,
    check_choices,
    one_of,
    within,
)
from offrl_jax.types import Agent, Array, Key, Metrics, Phase, Spec, Transitions


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure of the network and names of the data's transforms.

    Attributes:
      flow_steps: steps of the integrator from noise to action.
      integrator: one of `flows.INTEGRATORS`.
    """

    hidden: tuple[int, ...] = within(COUNT, (512, 512, 512, 512))
    batch_size: int = within(COUNT, 256)
    flow_steps: int = within(COUNT, 10)
    integrator: str = one_of(flows.INTEGRATORS, "euler")
    obs_transform: str = "none"
    reward_transform: str = "none"


@struct.dataclass
class Hyper:
    """Traced settings: FQL's."""

    lr: float = within(POSITIVE, 3e-4)


@struct.dataclass
class State:
    """Parameters of the velocity field and Adam moments."""

    actor: networks.Params
    actor_opt: optim.OptState


def velocity_of(config: Config, spec: Spec) -> flows.Velocity:
    """The velocity field."""
    return flows.Velocity(config.hidden, spec.action_dim)


def make_flow_bc(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`.

    Raises:
      UsageError: a structural choice that does not exist.
    """
    check_choices("flow_bc", config)
    velocity = velocity_of(config, spec)

    def init(key: Key, hyper: Hyper) -> State:
        del hyper
        obs, action = jnp.zeros((1, spec.obs_dim)), jnp.zeros((1, spec.action_dim))
        params = velocity.init(key, obs, action, jnp.zeros(1))
        return State(actor=params, actor_opt=optim.adam_init(params))

    def loss(params: networks.Params, key: Key, batch: Transitions) -> Array:
        field = flows.field_of(velocity, params, batch.obs)
        return flows.keyed_matching_loss(key, field, batch.action)

    def update(
        key: Key, state: State, batch: Transitions, hyper: Hyper
    ) -> tuple[State, Metrics]:
        value, grads = jax.value_and_grad(loss)(state.actor, key, batch)
        params, opt = optim.adam_step(grads, state.actor_opt, state.actor, hyper.lr)
        return State(actor=params, actor_opt=opt), {"flow_loss": value}

    def act(key: Key, state: State, obs: Array, hyper: Hyper) -> Array:
        del hyper
        noise = jax.random.normal(key, (obs.shape[0], spec.action_dim))
        field = flows.field_of(velocity, state.actor, obs)
        return flows.sample(field, noise, config.flow_steps, config.integrator)

    return Agent(init, act, (Phase("train", update),), config.batch_size)


_SMALL_TASKS = Preset(
    config={"hidden": (256, 256)},
    source="ours: the width of the other agents; the authors' tasks are larger",
)

ENTRY = AgentEntry(
    name="flow_bc",
    title="Flow BC",
    reference="Park, Li & Levine, ICML 2025, arXiv:2502.02538 (its behaviour part)",
    config=Config,
    hyper=Hyper,
    make=make_flow_bc,
    presets={
        "quick": Preset(
            config={"hidden": (64, 64), "batch_size": 128, "flow_steps": 5},
            hyper={"lr": 1e-3},
            source="ours: for some 6,000 updates on two CPU cores",
        ),
        "small": Preset(
            config={"hidden": (64, 64), "batch_size": 128},
            hyper={"lr": 1e-3},
            source="ours: small nets, the authors' ten steps",
        ),
    },
    families={"classic": _SMALL_TASKS, "neorl2": _SMALL_TASKS},
)
