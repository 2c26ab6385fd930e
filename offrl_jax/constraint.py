"""Continuous constraint interpolation (CCI): the formulas that ACPO is made of.

One problem contains support constraints, density regularisation and weighted behaviour
cloning.  For a behaviour density beta, an action value Q, a temperature alpha > 0 and
an interpolation parameter kappa = lambda / alpha >= 0:

    max_pi  E_pi Q + alpha * H(pi)   subject to   E_{s, a~pi} log beta(a|s) >= eps
    pi*(a|s) = beta(a|s)^kappa exp(Q(s, a) / alpha) / Z(s),   V(s) = alpha log Z(s)

lambda is the multiplier of the constraint.  kappa = 0 leaves only the support of beta,
kappa = 1 is the density (KL) point, kappa -> inf tends to the modes of beta.

Equations 7 to 15 of ACPO (arXiv:2601.23010) as others quote them; everything between
them is a reconstruction: docs/algorithms/acpo.md tells them apart.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from offrl_jax.types import Array

Numeric = Array | float

# Log densities are bounded to these, per action dimension, before anything multiplies
# them: a density of zero would make a weight infinite, or NaN at kappa = 1.
LOWEST_LOG_DENSITY, HIGHEST_LOG_DENSITY = -20.0, 5.0
_LOWEST_FINITE = -1e30


def bounded_log_density(log_density: Array, action_dim: int) -> Array:
    """`log_density` (any shape), tamed: exact from -20 to 5 per action dimension.

    Above it is cut.  Below it goes on as a logarithm, `low - log(1 + low - x)`, so that
    the reverse projection still feels which way the density rises: one dimension in
    which the data never vary would otherwise silence all others.  -inf becomes some
    -70 below, with no gradient; NaN stays NaN.
    """
    low, high = LOWEST_LOG_DENSITY * action_dim, HIGHEST_LOG_DENSITY * action_dim
    # Both branches see numbers at which they are finite, and so are their gradients.
    below = jnp.clip(log_density, _LOWEST_FINITE, low)
    inside = jnp.clip(log_density, low, high)
    return inside - jnp.log1p(low - below)


def closed_form(
    q: Array, log_beta: Array, alpha: Numeric, kappa: Numeric
) -> tuple[Array, Array]:
    """The optimal policy over finitely many actions, and its value.

    Args:
      q: `[K]`, action values.
      log_beta: `[K]`, log probabilities of the behaviour; -inf outside its support,
        which is not empty.  A NaN makes everything NaN.
      alpha: `[]`, temperature.
      kappa: `[]`, interpolation parameter; 0 keeps the support of beta.

    Returns:
      `[K]`, log probabilities of `pi*`, -inf outside the support whatever kappa and q
      are there, and `[]`, `alpha * log Z`.
    """
    chex.assert_rank((q, log_beta, alpha, kappa), (1, 1, 0, 0))
    supported = ~jnp.isneginf(log_beta)
    # Relative to the mode: a large kappa costs no digits of the probabilities.
    mode = jnp.max(log_beta)
    # Not kappa * -inf: NaN at kappa = 0, and NaN in the derivative at any kappa.
    tempered = kappa * jnp.where(supported, log_beta - mode, 0.0)
    relative = jnp.where(supported, tempered + q / alpha, -jnp.inf)
    log_z = jax.nn.logsumexp(relative) + kappa * mode
    return jax.nn.log_softmax(relative), alpha * log_z


def log_weight(
    advantage: Array, log_beta: Array, alpha: Numeric, kappa: Numeric
) -> Array:
    """Log of `pi* / beta` at a data action: the weight of the forward projection.

    `A / alpha + (kappa - 1) * log beta`: the paper's weight with kappa = lambda/alpha.

    Args:
      advantage: `[]`, `Q - V`.
      log_beta: `[]`, finite (see `bounded_log_density`).
      alpha: `[]`, temperature.
      kappa: `[]`, interpolation parameter.

    Returns:
      `[]`, without gradient.
    """
    chex.assert_rank((advantage, log_beta, alpha, kappa), 0)
    return jax.lax.stop_gradient(advantage / alpha + (kappa - 1.0) * log_beta)


def self_normalised(log_weights: Array, largest: Numeric) -> tuple[Array, Array]:
    """Weights of mean one over the batch, cut off at `largest`.

    Self-normalisation removes V(s)'s error that is common to the batch, and the
    arbitrary unit of a density: changing the unit of actions adds a constant to log
    beta.  The cut follows, so that the mean of the cut weights is at most one.

    Args:
      log_weights: `[B]`, of any common offset; not all -inf.
      largest: `[]`, bound of a weight in units of the batch's mean weight.

    Returns:
      `[B]`, weights, and `[]`, the fraction of them that was cut; no gradient.
    """
    chex.assert_rank((log_weights, largest), (1, 0))
    size = log_weights.shape[0]
    weights = size * jax.nn.softmax(jax.lax.stop_gradient(log_weights))
    cut = jnp.mean((weights > largest).astype(weights.dtype))
    return jax.lax.stop_gradient(jnp.minimum(weights, largest)), cut


def effective_sample_size(weights: Array) -> Array:
    """Kish's `(sum w)^2 / (B * sum w^2)`, in [1/B, 1]: `[B] -> []`; not all zero."""
    chex.assert_rank(weights, 1)
    # The scale cancels, and without it no square overflows.
    relative = weights / jnp.max(weights)
    return jnp.square(jnp.mean(relative)) / jnp.mean(jnp.square(relative))


def dual_gradient(log_beta: Array, threshold: Numeric) -> Array:
    """Derivative of the dual function with respect to lambda.

    The dual is `g(lambda) = E_s V_lambda(s) - lambda * eps`, convex; at the inner
    optimum its derivative is the constraint's slack.

    Args:
      log_beta: `[B]`, log density of the *policy's* actions under the behaviour.
      threshold: `[]`, eps.

    Returns:
      `[]`, `E log beta - eps`, without gradient: positive when the constraint is slack.
    """
    chex.assert_rank((log_beta, threshold), (1, 0))
    return jax.lax.stop_gradient(jnp.mean(log_beta) - threshold)


def dual_step(
    kappa: Numeric, gradient: Numeric, lr: Numeric, largest: Numeric
) -> Array:
    """Projected descent of the dual: `clip(kappa - lr * gradient, 0, largest)`.

    A projection and not a softplus or exp: a slack constraint gives exactly kappa = 0.

    Args:
      kappa: `[]`.
      gradient: `[]`, see `dual_gradient`; a slack in nats.
      lr: `[]`.
      largest: `[]`, a guard, not part of the problem.

    Returns:
      `[]`, the new kappa.
    """
    chex.assert_rank((kappa, gradient, lr, largest), 0)
    return jnp.clip(kappa - lr * gradient, 0.0, largest)
