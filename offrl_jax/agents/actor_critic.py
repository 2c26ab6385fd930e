"""What on-policy actor-critics share: everything but the step of the policy.

One update sees one rollout: T steps of E environments, gathered by the policy as it is
(`collection.on_policy_collector`).  Its advantages are generalised estimates (Schulman
et al. 2016, arXiv:1506.02438, eq. 16): with V the critic,

    delta_t = r_t + gamma * d_t * V(s_{t+1}) - V(s_t)
    A_t     = delta_t + gamma * lambda * g_t * A_{t+1} ,

where d is 0 at terminal states only, so that a time limit bootstraps from the state it
cut off, and g is 0 where the episode or the rollout ends.  The critic is fitted to
A + V by Adam.  How the policy moves is what sets the algorithms apart: each brings a
function `improve` and nothing else.

Policies are softmax over alternatives, or Gaussians with a free log standard deviation
per action dimension, unbounded: the environment clips, the likelihood does not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from offrl_jax import distributions, fisher, networks
from offrl_jax.agents import optim
from offrl_jax.agents.entry import (
    COUNT,
    NON_NEGATIVE,
    POSITIVE,
    UNIT,
    Preset,
    Range,
    within,
)
from offrl_jax.types import (
    Agent,
    Array,
    Collection,
    Key,
    Metrics,
    Phase,
    Spec,
    Transitions,
)

# Standardised observations beyond this many deviations are cut off, as is customary.
LARGEST_OBS = 10.0
SMALLEST_STD = 1e-8
_HIDDEN_INIT = networks.orthogonal(math.sqrt(2.0))


@dataclasses.dataclass(frozen=True)
class Config:
    """Structure that all on-policy agents have.

    Attributes:
      hidden: widths of the policy's and of the critic's hidden layers (tanh).
      environments: E, episodes advanced side by side.
      steps: T, steps of each in one rollout.
      critic_epochs: passes of the critic over a rollout.
      critic_batches: minibatches, and Adam steps, of one such pass.
      normalise_obs: observations are standardised by running moments.
      normalise_advantage: advantages of a rollout get mean 0 and deviation 1.
    """

    hidden: tuple[int, ...] = within(COUNT, (64, 64))
    environments: int = within(COUNT, 8)
    steps: int = within(COUNT, 16)
    critic_epochs: int = within(COUNT, 1)
    critic_batches: int = within(COUNT, 1)
    normalise_obs: bool = False
    normalise_advantage: bool = True


@struct.dataclass
class Hyper:
    """Traced settings that all on-policy agents have.

    Attributes:
      actor_lr: size of the policy's step, in the units of the algorithm.
      critic_lr: Adam's, of the critic.
      discount: gamma.
      gae_lambda: lambda.
      entropy: weight of the policy's mean entropy in its objective.
      reward_scale: rewards are multiplied by it before they are learned from.
      log_std: of a Gaussian policy at the start.
    """

    actor_lr: float = within(POSITIVE, 1e-3)
    critic_lr: float = within(POSITIVE, 1e-3)
    discount: float = within(UNIT, 0.99)
    gae_lambda: float = within(UNIT, 0.95)
    entropy: float = within(NON_NEGATIVE, 0.0)
    reward_scale: float = within(POSITIVE, 1.0)
    log_std: float = within(Range(low=-10.0, high=2.0), -0.5)


def presets(**more: Preset) -> dict[str, Preset]:
    """The presets that all on-policy agents have, and `more` of one agent's own.

    Critic and network are the same for all, so that agents differ by how their policies
    move (and in `quick` by the length of their rollouts); a preset of an agent's own
    goes over `quick`.
    """
    quick = Preset(
        config={"hidden": (16, 16), "critic_epochs": 4, "critic_batches": 4},
        hyper={"critic_lr": 3e-3, "reward_scale": 0.1},
        source="ours: classic control on two CPU cores",
    )
    mujoco = Preset(
        config={
            "hidden": (64, 64),
            "environments": 8,
            "steps": 256,
            "critic_epochs": 5,
            "critic_batches": 16,
            "normalise_obs": True,
        },
        hyper={"reward_scale": 0.1},
        source="ours: rollouts of 2,048 steps, observations standardised",
    )
    over = {
        name: Preset(
            {**quick.config, **one.config}, {**quick.hyper, **one.hyper}, one.source
        )
        for name, one in more.items()
    }
    return {"quick": quick, "mujoco": mujoco, **over}


class Moments(NamedTuple):
    """Running moments of observations.

    Attributes:
      count: `[]`.
      mean: `[O]`.
      square: `[O]`, sum of squared deviations.
    """

    count: Array
    mean: Array
    square: Array


@struct.dataclass
class State:
    """Policy, critic, what their optimisers remember, moments of observations."""

    actor: networks.Params
    critic: networks.Params
    actor_opt: Any
    critic_opt: optim.OptState
    moments: Moments


class Policy(NamedTuple):
    """A family of stochastic policies; observations `[B, O]`, actions `[B, A]`.

    Attributes:
      init: `(key, hyper) -> params`, a dictionary: `mlp`, and `log_std` of Gaussians.
      outputs: `(params, obs) -> [B, A]`, the network's: logits, or means.
      draw: `(key, params, outputs) -> action`.
      likelihood: `(params, outputs, action) -> [B]`, logarithmic.
      mode: `(params, obs) -> action`, the most likely one that the environment takes.
      entropy: `(params, obs) -> [B]`.
      divergence: `(old, new, obs) -> [B]`, KL(old || new).
      discrete: whether the policy is a softmax.
    """

    init: Callable[[Key, Any], networks.Params]
    outputs: Callable[[networks.Params, Array], Array]
    draw: Callable[[Key, networks.Params, Array], Array]
    likelihood: Callable[[networks.Params, Array, Array], Array]
    mode: Callable[[networks.Params, Array], Array]
    entropy: Callable[[networks.Params, Array], Array]
    divergence: Callable[[networks.Params, networks.Params, Array], Array]
    discrete: bool

    def sample(self, key: Key, params: networks.Params, obs: Array) -> Array:
        """Actions drawn in `obs`."""
        return self.draw(key, params, self.outputs(params, obs))

    def log_prob(self, params: networks.Params, obs: Array, action: Array) -> Array:
        """`log pi(action | obs)`, `[B]`."""
        return self.likelihood(params, self.outputs(params, obs), action)


class Experience(NamedTuple):
    """What the policy learns from; leading axis B = T * E.

    Attributes:
      obs: `[B, O]`, as the policy sees them.
      action: `[B, A]`, as drawn.
      advantage: `[B]`.
    """

    obs: Array
    action: Array
    advantage: Array


class Improve(Protocol):
    """The one thing an algorithm brings."""

    def __call__(
        self, key: Key, actor: Any, opt: Any, experience: Experience, hyper: Any
    ) -> tuple[Any, Any, Metrics]:
        """The policy's parameters after a step, its optimiser's state, metrics."""
        ...


class PolicyStep(NamedTuple):
    """What sets on-policy agents apart: how the policy moves.

    Attributes:
      policy: from `make_policy`.
      init_opt: `actor -> opt`, what `improve` remembers at the start.
      improve: see `Improve`.
    """

    policy: Policy
    init_opt: Callable[[networks.Params], Any]
    improve: Improve


def make_policy(hidden: tuple[int, ...], spec: Spec) -> Policy:
    """A softmax policy if `spec.discrete`, else a Gaussian one."""
    module = networks.MLP(
        hidden,
        spec.action_dim,
        hidden_init=_HIDDEN_INIT,
        # Nearly uniform, or nearly zero, actions at first.
        out_init=networks.orthogonal(0.01),
        activation=nn.tanh,
    )
    make = _softmax if spec.discrete else _gaussian
    return make(module, spec)


def _softmax(module: networks.MLP, spec: Spec) -> Policy:
    def init(key: Key, hyper: Any) -> networks.Params:
        del hyper
        return {"mlp": module.init(key, jnp.zeros((1, spec.obs_dim)))}

    def logits(params: networks.Params, obs: Array) -> Array:
        return networks.apply(module, params["mlp"], obs)

    def one_hot(index: Array) -> Array:
        return jax.nn.one_hot(index, spec.action_dim)

    def draw(key: Key, params: networks.Params, out: Array) -> Array:
        del params
        return one_hot(jax.random.categorical(key, out))

    def likelihood(params: networks.Params, out: Array, action: Array) -> Array:
        del params
        return jnp.sum(action * jax.nn.log_softmax(out), axis=-1)

    def mode(params: networks.Params, obs: Array) -> Array:
        return one_hot(jnp.argmax(logits(params, obs), axis=-1))

    def entropy(params: networks.Params, obs: Array) -> Array:
        log_p = jax.nn.log_softmax(logits(params, obs))
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def divergence(old: networks.Params, new: networks.Params, obs: Array) -> Array:
        return fisher.categorical_kl(logits(old, obs), logits(new, obs))

    return Policy(init, logits, draw, likelihood, mode, entropy, divergence, True)


def _gaussian(module: networks.MLP, spec: Spec) -> Policy:
    def init(key: Key, hyper: Any) -> networks.Params:
        params = module.init(key, jnp.zeros((1, spec.obs_dim)))
        return {"mlp": params, "log_std": jnp.full((spec.action_dim,), hyper.log_std)}

    def mean(params: networks.Params, obs: Array) -> Array:
        return networks.apply(module, params["mlp"], obs)

    def wide(log_std: Array, like: Array) -> Array:
        return jnp.broadcast_to(log_std, like.shape)

    def draw(key: Key, params: networks.Params, out: Array) -> Array:
        noise = jax.random.normal(key, out.shape)
        return out + jnp.exp(wide(params["log_std"], out)) * noise

    def likelihood(params: networks.Params, out: Array, action: Array) -> Array:
        log_std = wide(params["log_std"], out)
        each = distributions.normal_log_prob(out, log_std, action)
        return jnp.sum(each, axis=-1)

    def mode(params: networks.Params, obs: Array) -> Array:
        return jnp.clip(mean(params, obs), -1.0, 1.0)

    def entropy(params: networks.Params, obs: Array) -> Array:
        one = 0.5 * math.log(2.0 * math.pi * math.e)
        return jnp.broadcast_to(jnp.sum(params["log_std"] + one), obs.shape[:-1])

    def divergence(old: networks.Params, new: networks.Params, obs: Array) -> Array:
        before, after = mean(old, obs), mean(new, obs)
        log_std, new_log_std = wide(old["log_std"], before), wide(new["log_std"], after)
        return fisher.gaussian_kl(before, log_std, after, new_log_std)

    return Policy(init, mean, draw, likelihood, mode, entropy, divergence, False)


def advantages(
    reward: Array,
    discount: Array,
    goes_on: Array,
    value: Array,
    next_value: Array,
    gamma: Array,
    gae_lambda: Array,
) -> Array:
    """Generalised advantage estimates (arXiv:1506.02438, eq. 16), `[T, E]`.

    Args:
      reward: `[T, E]`.
      discount: `[T, E]`, 0 where the episode terminated.
      goes_on: `[T, E]`, 0 where the episode or the rollout ends after the step.
      value: `[T, E]`, of the states before the steps.
      next_value: `[T, E]`, of the states after them, of the same episode.
      gamma: `[]`.
      gae_lambda: `[]`.
    """
    delta = reward + gamma * discount * next_value - value

    def back(later: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        found = row[0] + gamma * gae_lambda * row[1] * later
        return found, found

    start = jnp.zeros_like(delta[0])
    return jax.lax.scan(back, start, (delta, goes_on), reverse=True)[1]


def _no_moments(obs_dim: int) -> Moments:
    return Moments(jnp.zeros(()), jnp.zeros(obs_dim), jnp.zeros(obs_dim))


def _with(moments: Moments, obs: Array) -> Moments:
    """`moments` with those of `obs` `[B, O]` (Chan, Golub & LeVeque 1983)."""
    more = float(obs.shape[0])
    mean = jnp.mean(obs, axis=0)
    count = moments.count + more
    apart = mean - moments.mean
    square = jnp.sum(jnp.square(obs - mean[None]), axis=0)
    return Moments(
        count,
        moments.mean + apart * (more / count),
        moments.square + square + jnp.square(apart) * (moments.count * more / count),
    )


def _standardised(moments: Moments, obs: Array) -> Array:
    """`obs` `[B, O]` in deviations from the mean; as they are before the first."""
    known = moments.count > 0.0
    variance = moments.square / jnp.maximum(moments.count, 1.0)
    std = jnp.where(known, jnp.sqrt(variance) + SMALLEST_STD, 1.0)
    scaled = (obs - moments.mean[None]) / std[None]
    return jnp.where(known, jnp.clip(scaled, -LARGEST_OBS, LARGEST_OBS), obs)


def objective(
    policy: Policy, actor: networks.Params, experience: Experience, entropy: Array
) -> Array:
    """`-mean A log pi(a | s) - entropy * mean H(pi(. | s))`, `[]`.

    Its gradient is that of the policy gradient theorem (Sutton et al. 2000), with the
    sign of a loss.

    Args:
      policy: the family.
      actor: its parameters.
      experience: leading axis B.
      entropy: `[]`, weight of the bonus, in advantages per nat.
    """
    log_prob = policy.log_prob(actor, experience.obs, experience.action)
    bonus = entropy * jnp.mean(policy.entropy(actor, experience.obs))
    return -jnp.mean(experience.advantage * log_prob) - bonus


def make_actor_critic(config: Config, spec: Spec, step: PolicyStep) -> Agent:
    """An agent whose policy moves by `step`.

    Args:
      config: structure.
      spec: of the task.
      step: the agent's own.

    Raises:
      UsageError: more minibatches than a rollout has transitions.
    """
    policy, init_opt, improve = step
    critic = networks.Value(
        config.hidden,
        hidden_init=_HIDDEN_INIT,
        out_init=networks.orthogonal(1.0),
        activation=nn.tanh,
    )
    rollout = config.steps, config.environments
    rows = config.steps * config.environments
    optim.check_batches(
        "an on-policy agent", "critic_batches", config.critic_batches, rows
    )

    def init(key: Key, hyper: Any) -> State:
        actor_key, critic_key = jax.random.split(key)
        actor = policy.init(actor_key, hyper)
        value = critic.init(critic_key, jnp.zeros((1, spec.obs_dim)))
        moments = _no_moments(spec.obs_dim)
        return State(actor, value, init_opt(actor), optim.adam_init(value), moments)

    def seen(state: State, obs: Array) -> Array:
        return _standardised(state.moments, obs) if config.normalise_obs else obs

    def critic_loss(params: networks.Params, obs: Array, target: Array) -> Array:
        return 0.5 * jnp.mean(jnp.square(networks.apply(critic, params, obs) - target))

    def fit_critic(
        key: Key, state: State, obs: Array, target: Array, hyper: Any
    ) -> tuple[networks.Params, optim.OptState, Array]:
        def step(carry: Any, picked: Array) -> tuple[Any, Array]:
            params, opt = carry
            loss, grads = jax.value_and_grad(critic_loss)(
                params, obs[picked], target[picked]
            )
            return optim.adam_step(grads, opt, params, hyper.critic_lr), loss

        keys = jax.random.split(key, config.critic_epochs)
        cut = functools.partial(optim.shuffled, rows=rows, count=config.critic_batches)
        batches = jax.vmap(cut)(keys).reshape(-1, rows // config.critic_batches)
        start = state.critic, state.critic_opt
        (params, opt), losses = jax.lax.scan(step, start, batches)
        return params, opt, jnp.mean(losses)

    def update(
        key: Key, state: State, batch: Transitions, hyper: Any
    ) -> tuple[State, Metrics]:
        actor_key, critic_key = jax.random.split(key)
        obs, next_obs = seen(state, batch.obs), seen(state, batch.next_obs)
        value = networks.apply(critic, state.critic, obs)
        next_value = networks.apply(critic, state.critic, next_obs)
        rows_of = (
            hyper.reward_scale * batch.reward,
            batch.discount,
            batch.has_next_action,
            value,
            next_value,
        )
        reward, discount, goes_on, now, after = (x.reshape(rollout) for x in rows_of)
        gained = advantages(
            reward, discount, goes_on, now, after, hyper.discount, hyper.gae_lambda
        ).reshape(rows)
        advantage = gained
        if config.normalise_advantage:
            advantage = (gained - jnp.mean(gained)) / (jnp.std(gained) + SMALLEST_STD)
        experience = Experience(obs, batch.action, advantage)
        actor, actor_opt, metrics = improve(
            actor_key, state.actor, state.actor_opt, experience, hyper
        )
        params, critic_opt, loss = fit_critic(
            critic_key, state, obs, gained + value, hyper
        )
        moments = _with(state.moments, batch.obs)
        if not config.normalise_obs:
            moments = state.moments
        metrics = dict(metrics) | {
            "critic_loss": loss,
            "entropy": jnp.mean(policy.entropy(actor, obs)),
            "kl": jnp.mean(policy.divergence(state.actor, actor, obs)),
            "reward_mean": jnp.mean(batch.reward),
        }
        return State(actor, params, actor_opt, critic_opt, moments), metrics

    def explore(key: Key, state: State, obs: Array, hyper: Any) -> Array:
        del hyper
        return policy.sample(key, state.actor, seen(state, obs))

    def act(key: Key, state: State, obs: Array, hyper: Any) -> Array:
        del key, hyper
        return policy.mode(state.actor, seen(state, obs))

    return Agent(
        init,
        act,
        (Phase("train", update, stride=rows),),
        batch_size=1,
        collection=Collection(explore, config.environments),
    )
