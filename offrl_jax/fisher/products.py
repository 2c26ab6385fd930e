"""Products of a Fisher matrix with a vector, without the matrix.

Two routes to the same thing: the Hessian of a Kullback-Leibler divergence where it is
zero, and `J^T F_out J` (Schraudolph 2002).  The second costs less and its result is
positive semi-definite up to rounding whatever the outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from offrl_jax.fisher.tree_algebra import Tree
from offrl_jax.types import Array


def fisher_vector_product(
    divergence: Callable[[Tree], Array], params: Tree, vector: Tree
) -> Tree:
    """`F v` as the Hessian of a divergence times v, forward over reverse.

    Args:
      divergence: `params -> []`, the mean KL of the distributions at `params` from
        fixed ones, in nats, such as `mean_s KL(p(.|s; theta_0) || p(.|s; theta))`; in
        either order.
      params: theta_0, where the divergence is 0: elsewhere its Hessian is no Fisher
        matrix.
      vector: structured like `params`.

    Returns:
      Structured like `params`.
    """
    return jax.jvp(jax.grad(divergence), (params,), (vector,))[1]


def gauss_newton_product(
    outputs: Callable[[Tree], Tree],
    output_fisher_product: Callable[[Tree, Tree], Tree],
    params: Tree,
    vector: Tree,
) -> Tree:
    """`J^T F_out J v`: a jvp through the model, F_out, and a vjp back.

    Args:
      outputs: `params -> ` what the distributions are made of, for a whole batch.
      output_fisher_product: `(outputs, tangent) -> F_out tangent`, structured like
        the outputs.  It decides on sum or mean over the batch; the two of this module,
        `categorical_output_product` and `gaussian_output_product`, take the mean.
      params: any pytree.
      vector: structured like `params`.

    Returns:
      Structured like `params`.
    """
    out, tangent = jax.jvp(outputs, (params,), (vector,))
    _, pull_back = jax.vjp(outputs, params)
    (product,) = pull_back(output_fisher_product(out, tangent))
    return product


def categorical_output_product(logits: Array, tangent: Array) -> Array:
    """`F_out t / n` of a batch of categoricals, both `[n, K]`."""
    p = jax.nn.softmax(logits)
    along = jnp.sum(p * tangent, axis=-1, keepdims=True)
    return p * (tangent - along) / float(logits.shape[0])


def gaussian_output_product(
    mean_and_log_std: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """`F_out t / n` of a batch of diagonal Gaussians, each of the four `[n, A]`."""
    mean, log_std = mean_and_log_std
    rows = float(mean.shape[0])
    return tangents[0] * jnp.exp(-2.0 * log_std) / rows, 2.0 * tangents[1] / rows


def categorical_kl(logits: Array, other: Array) -> Array:
    """`KL(p || q)` in nats of categoricals with these logits, `[..., K] -> [...]`."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def gaussian_kl(
    mean: Array, log_std: Array, other_mean: Array, other_log_std: Array
) -> Array:
    """`KL(p || q)` in nats of diagonal Gaussians, each `[..., A]`, to `[...]`."""
    square = jnp.exp(2.0 * log_std) + jnp.square(mean - other_mean)
    ratio = 0.5 * square * jnp.exp(-2.0 * other_log_std)
    return jnp.sum(other_log_std - log_std + ratio - 0.5, axis=-1)
