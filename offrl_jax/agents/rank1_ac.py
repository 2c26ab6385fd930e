"""Rank-1 natural policy gradient (SM-ActorCritic): one score, Sherman-Morrison.

A reconstruction.  Huo, Dash, Stoican, Kaski & Sun (2026), arXiv:2601.18626: the
abstract is verified, the formula comes from summaries by others, and everything around
it (which sample, which scale, which optimiser) is a choice made here; see
docs/algorithms/rank1.md.  With g the policy gradient of a rollout (ascent) and v the
score of a single state and action,

    F^    = damping * I + v v^T                       one-sample empirical Fisher
    c     = <v, g> / (damping + |v|^2)
    theta <- theta + actor_lr * (g - c v)             = damping * F^^-1 g, deflated

in O(d) time and memory.  `actor_lr` is the rate of the deflated direction, so a large
damping gives plain SGD at the same rate; as theta + eta F^^-1 g it is eta / damping.
With `step = trust_region` the rate is at most

    sqrt(2 * kl / (damping * <g - c v, g>)) ,

the one at which the damped one-sample model's KL is `kl`, without a pass over the data;
the policy's own may be tens of times as large.

`vector` says which v:

    pair        of one pair of the rollout, drawn uniformly: the paper, as reported
    left_out    the same, and g is without that pair's term
    fresh       of one state of the rollout with a new action of the policy: one sample
                of the true Fisher
    mean        the mean score of the rollout
    gradient    g itself: a shorter step in the same direction
    average     an exponential moving average of `pair`'s scores

`blockwise` gives every leaf of the parameters its own c; `relative_damping` multiplies
damping by a running mean of |v|^2.
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
    POSITIVE,
    AgentEntry,
    Preset,
    check_choices,
    one_of,
    within,
)
from offrl_jax.errors import UsageError
from offrl_jax.types import Agent, Array, Key, Metrics, Spec

VECTORS = ("pair", "left_out", "fresh", "mean", "gradient", "average")
STEPS = ("fixed", "trust_region")
# Of `vector = average`.
AVERAGE_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class Config(actor_critic.Config):
    """Structure of the rollouts, the networks and the preconditioner."""

    vector: str = one_of(VECTORS, "pair")
    step: str = one_of(STEPS, "fixed")
    blockwise: bool = False
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
    check_choices("rank1_ac", config)
    if config.vector == "left_out" and config.steps * config.environments == 1:
        raise UsageError("vector 'left_out' of rank1_ac needs rollouts of two or more")
    policy = actor_critic.make_policy(config.hidden, spec)

    in_region = config.step == "trust_region"

    def rule(damping: Any, kl: Any, rate: Any) -> Any:
        return fisher.scale_by_rank1_fisher(
            damping,
            blockwise="leaf" if config.blockwise else False,
            relative=config.relative_damping,
            kl=kl if in_region else None,
            largest_step=rate,
        )

    def init_opt(actor: networks.Params) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, actor)
        averaged = config.vector == "average"
        # The rule's state does not depend on its numbers.
        found = rule(1.0, 1.0, 1.0).init(actor)
        return {"fisher": found, "average": zeros if averaged else ()}

    def score(actor: networks.Params, obs: Array, action: Array) -> networks.Params:
        """Of the mean over rows: of one row, its score."""

        def log_prob(params: networks.Params) -> Array:
            return jnp.mean(policy.log_prob(params, obs, action))

        return jax.grad(log_prob)(actor)

    def improve(
        key: Key, actor: Any, opt: Any, experience: Experience, hyper: Any
    ) -> tuple[Any, Any, Metrics]:
        obs, action, advantage = experience
        rows = advantage.shape[0]
        row_key, action_key = jax.random.split(key)
        one = jax.random.randint(row_key, (1,), 0, rows)
        if config.vector == "left_out":
            advantage = advantage.at[one].set(0.0) * (rows / (rows - 1.0))
        grads = jax.grad(actor_critic.objective, argnums=1)(
            policy, actor, Experience(obs, action, advantage), hyper.entropy
        )
        average = opt["average"]
        if config.vector == "gradient":
            v = grads
        elif config.vector == "mean":
            v = score(actor, obs, action)
        elif config.vector == "fresh":
            v = score(actor, obs[one], policy.sample(action_key, actor, obs[one]))
        else:
            v = score(actor, obs[one], action[one])
            if config.vector == "average":
                average = jax.tree.map(
                    lambda old, new: AVERAGE_DECAY * old + (1.0 - AVERAGE_DECAY) * new,
                    average,
                    v,
                )
                v = average
        direction, found = rule(hyper.damping, hyper.kl, hyper.actor_lr).update(
            grads, opt["fisher"], actor, score=v
        )
        # Inside of a trust region the rule has chosen the rate, `actor_lr` at most.
        rate = 1.0 if in_region else hyper.actor_lr
        actor = jax.tree.map(lambda p, d: p - rate * d, actor, direction)
        metrics = {
            "cos2": found.cos2,
            "removed": found.removed,
            "score_norm2": found.score_norm2,
            "grad_norm": jnp.sqrt(fisher.norm2(grads)),
            "rate": rate * found.step,
        }
        return actor, {"fisher": found, "average": average}, metrics

    return PolicyStep(policy, init_opt, improve)


def make_rank1_ac(config: Config, spec: Spec) -> Agent:
    """Makes the agent for one structure and one `Spec`."""
    return actor_critic.make_actor_critic(config, spec, policy_step(config, spec))


ENTRY = AgentEntry(
    name="rank1_ac",
    title="Rank-1 NPG",
    reference="Huo et al., 2026, arXiv:2601.18626 (reconstruction)",
    config=Config,
    hyper=Hyper,
    make=make_rank1_ac,
    on_policy=True,
    presets=actor_critic.presets(
        trust_region=Preset(
            config={"step": "trust_region"},
            hyper={"actor_lr": 1.0},
            source="ours: the closed-form step, at most 1; else as quick",
        ),
    ),
)
