"""How good a picture of the Fisher matrix is: spectrum, cosines, predicted KL.

The first two run on the host (LAPACK, see `solvers`), the others anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpy.typing import ArrayLike, NDArray

from offrl_jax.fisher.products import fisher_vector_product
from offrl_jax.fisher.solvers import Numeric
from offrl_jax.fisher.tree_algebra import Tree, add_scaled, inner, norm2
from offrl_jax.types import Array


def spectrum(fisher: ArrayLike) -> NDArray[np.floating]:
    """Eigenvalues of a Fisher matrix `[d, d]`, the largest first, `[d]`."""
    matrix = np.asarray(fisher, np.float64)
    return np.linalg.eigvalsh(0.5 * (matrix + matrix.T))[::-1]


def top_energy(fisher: ArrayLike, count: int = 1) -> float:
    """Share of the trace in the `count` largest eigenvalues, in [0, 1].

    Near 1 a picture of so many directions can be good; `lambda_1 / tr F` by default.
    """
    values = spectrum(fisher)
    return float(values[:count].sum() / values.sum())


def cosine(left: Tree, right: Tree) -> Array:
    """Cosine of two trees, `[]`; 0 where one of them is zero."""
    lengths = jnp.sqrt(norm2(left)) * jnp.sqrt(norm2(right))
    return jnp.where(
        lengths > 0.0, inner(left, right) / jnp.where(lengths > 0.0, lengths, 1.0), 0.0
    )


def cosine_to_natural(
    direction: Tree,
    fisher: ArrayLike,
    gradient: Tree,
    damping: float = 0.0,
    rtol: float = 1e-6,
) -> float:
    """Cosine of a direction to the natural gradient `(F + damping I)^+ g`.

    Args:
      direction, gradient: trees of d numbers.
      fisher: `[d, d]`, in the order of `ravel_pytree`.
      damping: in units of F.
      rtol: eigenvalues of the damped F below so much of the largest count as zero, and
        their directions are left out.
    """
    g = np.asarray(ravel_pytree(gradient)[0], np.float64)
    d = np.asarray(ravel_pytree(direction)[0], np.float64)
    matrix = np.asarray(fisher, np.float64) + damping * np.eye(len(g))
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    kept = values > rtol * values[-1]
    natural = vectors[:, kept] @ ((vectors[:, kept].T @ g) / values[kept])
    lengths = np.linalg.norm(d) * np.linalg.norm(natural)
    return float(d @ natural / lengths) if lengths > 0.0 else 0.0


def kl_of_step(
    divergence: Callable[[Tree], Array], params: Tree, direction: Tree, rate: Numeric
) -> tuple[Array, Array]:
    """KL of the step `rate * direction`, predicted and measured, in nats.

    Args:
      divergence: `params -> []`, as in `products.fisher_vector_product`.
      params: where it is zero.
      direction: structured like `params`.
      rate: `[]`.

    Returns:
      `1/2 rate^2 d^T F d`, `[]`, with the true Fisher matrix of the batch, and
      `divergence(params + rate * d)`, `[]`.
    """
    curvature = inner(direction, fisher_vector_product(divergence, params, direction))
    rate = jnp.asarray(rate, curvature.dtype)
    moved = add_scaled(params, rate, direction)
    return 0.5 * jnp.square(rate) * curvature, divergence(moved)
