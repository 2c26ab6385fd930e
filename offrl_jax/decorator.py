"""The geometry of a displaced behaviour policy: penalties, KL, test-time search.

A residual delta moves the actions of a behaviour policy beta, T(a) = a + delta(s, a);
the policy is the law of T(a), a ~ beta.  To second order in delta (`second_order_kl`)

    KL(T# beta || beta) = 1/2 E_beta (div delta + delta . grad log beta)^2

and for a delta that does not depend on a, 1/2 delta^T I delta with the Fisher
information I = E g g^T of the scores g = grad_a log beta(a|s).  FiDec (Cheng et al.
2026, arXiv:2604.17919) penalises the latter; DeFlow (arXiv:2601.10471) takes the
identity for I.  Nothing here forms a matrix or solves with one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from offrl_jax import flows
from offrl_jax.types import Array

Tree = TypeVar("Tree")

TRACES = ("state", "batch", "none")
"""What `fisher_quadratic` divides by."""

# Of the divisor in `clip_together`, as in FiDec's released code.
_TINY_NORM = 1e-6


def isotropic_quadratic(delta: Array) -> Array:
    """`mean |delta|^2 / A` over `[B, A]`: DeFlow's penalty, `[]`."""
    return jnp.mean(jnp.square(delta))


def fisher_quadratic(
    scores: Array, delta: Array, damping: Array | float, trace: str = "state"
) -> Array:
    """`mean_s delta^T F(s) delta`, up to a factor, with F estimated by scores.

    `F(s) = mean_m g_m g_m^T + damping * identity`, never formed.  By `trace`:

      state  `delta^T F delta / tr F(s)`: FiDec's `delta^T Fbar delta / A`, where Fbar
             has a mean eigenvalue of 1 in every state.  With one score per state the
             length of the score cancels and only its direction counts.
      batch  the same with tr F averaged over the batch: a state, or an action, where
             the behaviour is sharp keeps its greater weight, and the expectation over
             the scores is the Fisher form even with one score per state.
      none   `1/2 delta^T F delta`: second-order KL in nats, for scores of the density
             itself.

    The first two equal `isotropic_quadratic` if F is a multiple of the identity.

    Args:
      scores: `[B, M, A]`.
      delta: `[B, A]`.
      damping: `[]`, rho >= 0, in units of squared scores.
      trace: one of `TRACES`.

    Returns:
      The penalty, `[]`.

    Raises:
      ValueError: `trace` is none of `TRACES`.
    """
    along = jnp.sum(scores * delta[:, None, :], axis=-1)
    form = jnp.mean(jnp.square(along), axis=1)
    form = form + damping * jnp.sum(jnp.square(delta), axis=-1)
    if trace == "none":
        return 0.5 * jnp.mean(form)
    size = jnp.mean(jnp.sum(jnp.square(scores), axis=-1), axis=1)
    size = size + damping * float(delta.shape[-1])
    if trace == "state":
        return jnp.mean(form / size)
    if trace == "batch":
        return jnp.mean(form) / jnp.mean(size)
    raise ValueError(f"trace is '{trace}'; choose one of {TRACES}")


def second_order_kl(
    score: Callable[[Array], Array],
    displacement: Callable[[Array], Array],
    action: Array,
) -> tuple[Array, Array]:
    """Integrands of the second-order KL of a displaced density, exact and FiDec's.

    To first order the displaced density is `beta - div(beta delta)`, that is beta times
    1 - u with `u = div delta + delta . g`; KL is 1/2 E u^2 to second order, since E u
    is 0.  FiDec's form leaves the divergence out.

    Args:
      score: g, `[N, A] -> [N, A]`, row-wise.
      displacement: delta, likewise.
      action: `[N, A]`.

    Returns:
      `1/2 (div delta + delta . g)^2` and `1/2 (delta . g)^2`, each `[N]`, whose
      expectations under beta are the two forms, in nats.
    """
    along = jnp.sum(displacement(action) * score(action), axis=-1)
    change = flows.divergence(displacement, action) + along
    return 0.5 * jnp.square(change), 0.5 * jnp.square(along)


def multiplier_loss(
    log_multiplier: Array, penalty: Array, budget: Array | float
) -> Array:
    """Dual descent, `-log_multiplier * (penalty - budget)`, on scalars `[]`.

    Its gradient raises the multiplier while the penalty is above its budget, and none
    reaches the penalty.  A constant may be left out of `log_multiplier`.
    """
    return -log_multiplier * (jax.lax.stop_gradient(penalty) - budget)


def clip_together(grads: Tree, largest: Array | float) -> tuple[Tree, Array]:
    """Scales all gradients by one factor to a joint norm of at most `largest`.

    Returns:
      `min(1, largest / (norm + 1e-6))` times `grads`, and the norm before, `[]`.
    """
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)))
    scale = jnp.minimum(1.0, largest / (norm + _TINY_NORM))
    return jax.tree.map(lambda leaf: scale * leaf, grads), norm


def displaced(residual: Callable[[Array], Array], action: Array) -> Array:
    """`clip(action + residual(action), -1, 1)`, `[..., A]`."""
    return jnp.clip(action + residual(action), -1.0, 1.0)


def refined(
    residual: Callable[[Array], Array],
    value: Callable[[Array], Array],
    action: Array,
    count: int,
) -> Array:
    """Displaces `count` times, each from the last, and keeps the most valued result.

    Args:
      residual: `[B, A] -> [B, A]`.
      value: `[B, A] -> [B]`.
      action: `[B, A]`, where it starts; itself not a candidate.
      count: 1 or more.

    Returns:
      `[B, A]`.
    """
    best = action = displaced(residual, action)
    highest = value(best)
    for _ in range(count - 1):
        action = displaced(residual, action)
        found = value(action)
        best = jnp.where((found > highest)[:, None], action, best)
        highest = jnp.maximum(found, highest)
    return best
