"""What agents do with parameters: steps of optimisers, target averages, minibatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax

from offrl_jax import distributions, fisher
from offrl_jax.errors import UsageError
from offrl_jax.types import Array, Key, Transitions

Tree = TypeVar("Tree")
OptState = optax.OptState

# Without a learning rate: its one home is `hyper`, and `adam_step` applies it.
# b1 = 0.9, b2 = 0.999, eps = 1e-8 are optax's defaults and PyTorch's.
_ADAM = optax.scale_by_adam()


def adam_init(params: optax.Params) -> OptState:
    """Fresh Adam moments for `params`."""
    return _ADAM.init(params)


def adam_step(
    grads: Tree, opt_state: OptState, params: Tree, lr: chex.Numeric
) -> tuple[Tree, OptState]:
    """One step of Adam down `grads`.

    Args:
      grads: gradients, structured like `params`.
      opt_state: from `adam_init` or the step before.
      params: any pytree.
      lr: `[]`, the learning rate; traced, so a sweep over it never recompiles.

    Returns:
      New parameters and moments.
    """
    # optax mixes its integer count with floats, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        direction, opt_state = _ADAM.update(grads, opt_state)  # pyright: ignore[reportArgumentType]
    params = jax.tree.map(lambda p, d: p - lr * d, params, direction)
    return params, opt_state


def steps_taken(opt_state: OptState) -> Array:
    """`[]` int32: how many Adam steps made `opt_state`."""
    return opt_state.count  # pyright: ignore[reportAttributeAccessIssue]


ACTOR_OPTIMISERS = ("adam", "sgd", "rank1")
"""How a stochastic policy moves along its gradient, see `actor_step`."""


def actor_init(rule: str, params: optax.Params) -> OptState:
    """What the rule of `ACTOR_OPTIMISERS` remembers at the start."""
    if rule == "adam":
        return adam_init(params)
    if rule == "sgd":
        return optax.EmptyState()
    # The state does not depend on the damping.
    return fisher.scale_by_rank1_fisher(1.0, relative=True).init(params)


def actor_step(
    rule: str,
    key: Key,
    gaussian: Callable[[Tree, Array], tuple[Array, Array]],
    obs: Array,
    grads: Tree,
    opt_state: OptState,
    params: Tree,
    lr: chex.Numeric,
    damping: chex.Numeric,
) -> tuple[Tree, OptState]:
    """One step of a Gaussian policy, squashed by tanh or not, down `grads`.

    `rank1` removes what `grads` have in common with the score of one action, drawn
    from the policy in one state of the batch: one sample of the true Fisher
    information, as off-policy data need it (`fisher.scale_by_rank1_fisher`, with a
    damping relative to the running mean of the squared score).  The tanh behind a
    sample does not depend on the parameters, so the score is that of the Gaussian.

    Args:
      rule: one of `ACTOR_OPTIMISERS`.
      key: for the score; `adam` and `sgd` draw nothing.
      gaussian: `(params, obs [B, O]) -> (mean, log_std)`, each `[B, A]`.
      obs: `[B, O]`.
      grads: structured like `params`.
      opt_state: from `actor_init` or the step before.
      params: any pytree.
      lr: `[]`; that of `rank1` is the rate of the deflated direction.
      damping: `[]`, of `rank1`, relative.

    Returns:
      New parameters and state.
    """
    if rule == "adam":
        return adam_step(grads, opt_state, params, lr)
    direction: Any = grads
    if rule == "rank1":
        score = _sampled_score(key, gaussian, params, obs)
        transform = fisher.scale_by_rank1_fisher(jnp.asarray(damping), relative=True)
        direction, opt_state = transform.update(direction, opt_state, score=score)
    return jax.tree.map(lambda p, d: p - lr * d, params, direction), opt_state


def _sampled_score(
    key: Key,
    gaussian: Callable[[Tree, Array], tuple[Array, Array]],
    params: Tree,
    obs: Array,
) -> Tree:
    """The score of an action drawn in one row of `obs`."""
    row_key, action_key = jax.random.split(key)
    one = obs[jax.random.randint(row_key, (1,), 0, obs.shape[0])]
    mean, log_std = gaussian(params, one)
    action = mean + jnp.exp(log_std) * jax.random.normal(action_key, mean.shape)
    action = jax.lax.stop_gradient(action)

    def log_prob(params: Tree) -> Array:
        return jnp.sum(distributions.normal_log_prob(*gaussian(params, one), action))

    return jax.grad(log_prob)(params)


def polyak(target: Tree, online: Tree, tau: chex.Numeric) -> Tree:
    """Moves `target` towards `online`: `(1 - tau) * target + tau * online`."""
    return jax.tree.map(lambda t, o: t + tau * (o - t), target, online)


def minibatches(batch: Transitions, count: int) -> list[Transitions]:
    """Cuts the leading axis `[count * B, ...]` into `count` batches `[B, ...]`.

    Raises:
      ValueError: the leading axis is not a multiple of `count`.
    """
    rows = batch.reward.shape[0]
    if rows % count:
        raise ValueError(f"{rows} transitions cannot be cut into {count} minibatches")
    size = rows // count
    return [
        jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch)
        for i in range(count)
    ]


def check_batches(agent: str, name: str, count: int, rows: int) -> None:
    """Refuses more minibatches than a rollout has transitions.

    Raises:
      UsageError: `count`, the setting `name` of `agent`, is above `rows`.
    """
    if count > rows:
        raise UsageError(
            f"setting '{name}' of {agent} is {count}, but a rollout has only {rows} "
            "transitions (steps x environments); choose fewer minibatches"
        )


def shuffled(key: Key, rows: int, count: int) -> Array:
    """A random partition of `rows` indices into `count` equal minibatches.

    Returns:
      `[count, rows // count]`; what is left over is left out this time.
    """
    order = jax.random.permutation(key, rows)
    return order[: rows // count * count].reshape(count, -1)
