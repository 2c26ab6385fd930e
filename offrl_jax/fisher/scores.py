"""Scores: gradients of a log-likelihood with respect to the parameters.

Letters: n samples, d parameters.  A score `psi = grad_theta log p(y | x; theta)` at a
`y` drawn from the model has mean zero and the Fisher matrix as its covariance; at a `y`
of the data it has neither (see `matrices.empirical_fisher`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from offrl_jax.fisher.tree_algebra import Tree, wide
from offrl_jax.types import Array

LogProb = Callable[..., Array]
"""`log_prob(params, x, y) -> []`, of one sample, in nats."""


def per_sample_scores(log_prob: LogProb, params: Tree, *args: Tree) -> Tree:
    """The score of every sample, by `vmap(grad)`.

    Args:
      log_prob: `(params, *one_sample) -> []`.
      params: any pytree.
      args: pytrees with a leading axis n.

    Returns:
      Structured like `params`, leaves `[n, ...]`.
    """
    return jax.vmap(lambda *sample: jax.grad(log_prob)(params, *sample))(*args)


def flatten_scores(scores: Tree) -> Array:
    """`[n, d]` of scores with leaves `[n, ...]`, ordered as `ravel_pytree` does.

    In float32 or wider.
    """
    leaves = [wide(leaf) for leaf in jax.tree.leaves(scores)]
    rows = [leaf.reshape(leaf.shape[0], -1) for leaf in leaves]
    return jnp.concatenate(rows, axis=1)


def pseudo_likelihood_score(
    mean: Callable[[Tree], Array], params: Tree, noise: Array, std: Array | float
) -> Tree:
    """A score for a deterministic map, read as the mean of `N(mean(theta), std^2 I)`.

    At the sample `mean + std * noise` it is `J^T noise / std`: one product of a vector
    with the Jacobian.  Its covariance over standard normal noise is `J^T J / std^2`.

    Args:
      mean: `params -> [A]` (or any shape), for one state.
      params: any pytree.
      noise: shaped like the mean, standard normal.
      std: `[]`, in units of the mean.

    Returns:
      Structured like `params`.
    """
    _, pull_back = jax.vjp(mean, params)
    (score,) = pull_back(noise / jnp.asarray(std, noise.dtype))
    return score
