"""Directions `(F + damping I)^-1 g`, each for its own picture of F.

Nothing here calls LAPACK: batched by `vmap` on CPU with several devices, jaxlib 0.10.2
splits such a call over the thread pool it runs in and waits there, for ever if all
threads do so at once.  `solve_spd` is plain JAX instead.

F is symmetric, so all directions work on gradients of a loss or of an objective alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from offrl_jax.fisher import tree_algebra
from offrl_jax.fisher.tree_algebra import Tree, add_scaled, inner, norm2, wide
from offrl_jax.types import Array

Numeric = Array | float

# The default on NVIDIA GPUs, TF32, keeps three digits of a float32 product.
_EXACT = jax.lax.Precision.HIGHEST


# Columns that are worked on one by one; what is between blocks is matrix products.
_BLOCK = 32


class _Factor(NamedTuple):
    """A block of columns of the Cholesky factor L: what stands on and below it.

    Attributes:
      inverse: `[b, b]`, of the diagonal block of L.
      below: `[rest, b]`, L under it.
    """

    inverse: Array
    below: Array


def _cholesky(matrix: Array) -> Array:
    """Lower triangular `L` with `L L^T = matrix`, `[b, b]`, column by column."""
    rows = jnp.arange(matrix.shape[0])

    def fill(j: Array, lower: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(lower, j, 0, keepdims=False)
        column = jax.lax.dynamic_index_in_dim(matrix, j, 1, keepdims=False)
        column = column - jnp.matmul(lower, row, precision=_EXACT)
        pivot = jax.lax.dynamic_index_in_dim(column, j, 0, keepdims=False)
        column = jnp.where(rows >= j, column / jnp.sqrt(pivot), 0.0)
        return jax.lax.dynamic_update_slice_in_dim(lower, column[:, None], j, axis=1)

    return jax.lax.fori_loop(0, matrix.shape[0], fill, jnp.zeros_like(matrix))


def _inverse(lower: Array) -> Array:
    """`L^-1` of a lower triangular matrix `[b, b]`, row by row."""
    size = lower.shape[0]
    identity = jnp.eye(size, dtype=lower.dtype)

    def fill(j: Array, solution: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(lower, j, 0, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(row, j, 0, keepdims=False)
        known = jnp.matmul(row, solution, precision=_EXACT)
        value = jax.lax.dynamic_index_in_dim(identity, j, 0, keepdims=False) - known
        return jax.lax.dynamic_update_slice_in_dim(
            solution, (value / pivot)[None, :], j, axis=0
        )

    return jax.lax.fori_loop(0, size, fill, jnp.zeros_like(lower))


def _factors(matrix: Array) -> list[_Factor]:
    """The Cholesky factor by blocks of columns (right-looking)."""
    found = []
    rest = matrix
    while rest.shape[0]:
        width = min(_BLOCK, rest.shape[0])
        inverse = _inverse(_cholesky(rest[:width, :width]))
        below = jnp.matmul(rest[width:, :width], inverse.T, precision=_EXACT)
        rest = rest[width:, width:] - jnp.matmul(below, below.T, precision=_EXACT)
        found.append(_Factor(inverse, below))
    return found


def solve_spd(matrix: Array, rhs: Array) -> Array:
    """Solves with a symmetric positive definite matrix by Cholesky, in plain JAX.

    Made for systems of up to some hundred unknowns, under `jit` and `vmap`, on every
    backend; see the module's docstring for why.

    Args:
      matrix: `[d, d]`; its lower triangle is used.  A matrix that is not positive
        definite to working precision gives NaN.
      rhs: `[d]` or `[d, m]`.

    Returns:
      Shaped like `rhs`.

    Raises:
      ValueError: shapes that do not fit.
    """
    size = matrix.shape[0]
    if matrix.shape != (size, size) or rhs.ndim > 2 or rhs.shape[:1] != (size,):
        raise ValueError(f"no system: matrix {matrix.shape}, right side {rhs.shape}")
    factors = _factors(matrix)
    rest = rhs if rhs.ndim == 2 else rhs[:, None]
    forward = []
    for factor in factors:
        width = factor.inverse.shape[0]
        forward.append(jnp.matmul(factor.inverse, rest[:width], precision=_EXACT))
        known = jnp.matmul(factor.below, forward[-1], precision=_EXACT)
        rest = rest[width:] - known
    solution = rest  # no rows yet
    for factor, part in zip(reversed(factors), reversed(forward), strict=True):
        known = jnp.matmul(factor.below.T, solution, precision=_EXACT)
        first = jnp.matmul(factor.inverse.T, part - known, precision=_EXACT)
        solution = jnp.concatenate([first, solution])
    return solution.reshape(rhs.shape)


def dense_direction(fisher: Array, gradient: Tree, damping: Numeric) -> Tree:
    """`(F + damping I)^-1 g` with the whole matrix: the oracle of the others.

    Args:
      fisher: `[d, d]`, parameters in the order of `ravel_pytree`.
      gradient: any pytree of d numbers.
      damping: `[]`, in units of F; positive unless F has full rank.

    Returns:
      Structured like `gradient`.
    """
    flat, unravel = ravel_pytree(gradient)
    matrix = fisher + jnp.asarray(damping, fisher.dtype) * jnp.eye(
        fisher.shape[0], dtype=fisher.dtype
    )
    return unravel(solve_spd(matrix, flat.astype(fisher.dtype)).astype(flat.dtype))


def conjugate_gradient(
    product: Callable[[Tree], Tree],
    rhs: Tree,
    iterations: int,
    damping: Numeric = 0.0,
    tolerance: float = 1e-10,
) -> tuple[Tree, Array]:
    """Solves `(F + damping I) x = rhs` by conjugate gradients from zero.

    Hestenes & Stiefel (1952), with a fixed number of iterations: once converged, or in
    a direction without positive curvature, the rest of them change nothing.

    Args:
      product: `v -> F v`, from and to trees like `rhs`; evaluated `iterations` times.
      rhs: any pytree.
      iterations: at most so many steps.
      damping: `[]`, in units of F.
      tolerance: the squared residual, relative to `|rhs|^2`, at which it stops.

    Returns:
      The solution, and its squared residual by the recursion, `[]` (absolute).
    """
    start = norm2(rhs)
    enough = tolerance * start
    damping = jnp.asarray(damping, start.dtype)

    def step(_: Array, carry: tuple[Tree, Tree, Tree, Array]) -> tuple:
        x, residual, direction, size = carry
        image = add_scaled(product(direction), damping, direction)
        curvature = inner(direction, image)
        going = (size > enough) & (curvature > 0.0)
        length = jnp.where(going, size / jnp.where(going, curvature, 1.0), 0.0)
        x = add_scaled(x, length, direction)
        residual = add_scaled(residual, -length, image)
        new_size = norm2(residual)
        ratio = jnp.where(going, new_size / jnp.where(going, size, 1.0), 0.0)
        turned = add_scaled(residual, ratio, direction)
        direction = jax.tree.map(
            lambda new, old: jnp.where(going, new, old), turned, direction
        )
        return x, residual, direction, jnp.where(going, new_size, size)

    zeros = jax.tree.map(jnp.zeros_like, rhs)
    solution, _, _, size = jax.lax.fori_loop(
        0, iterations, step, (zeros, rhs, rhs, start)
    )
    return solution, size


def diagonal_direction(diagonal: Tree, gradient: Tree, damping: Numeric) -> Tree:
    """`g / (diag F + damping)`, leaf by leaf; `diagonal` is structured like g."""
    tree_algebra.check_like("diagonal", diagonal, gradient)

    def divide(f: Array, g: Array) -> Array:
        f = wide(f)
        return (wide(g) / (f + jnp.asarray(damping, f.dtype))).astype(g.dtype)

    return jax.tree.map(divide, diagonal, gradient)


def rank1_coefficient(score: Tree, gradient: Tree, damping: Numeric) -> Array:
    """`c = v . g / (damping + v . v)`, `[]`; 0 where damping and score are."""
    size = norm2(score)
    total = jnp.asarray(damping, size.dtype) + size
    return jnp.where(
        total > 0.0, inner(score, gradient) / jnp.where(total > 0.0, total, 1.0), 0.0
    )


def rank1_deflation(score: Tree, gradient: Tree, damping: Numeric) -> Tree:
    """`g - c v`: `damping` times `rank1_direction`, finite also at damping 0.

    There the component along v is gone entirely; for a large damping it is g itself.

    Args:
      score: v, structured like `gradient`.
      gradient: g.
      damping: `[]`, in units of squared scores.
    """
    tree_algebra.check_like("score", score, gradient)
    return add_scaled(gradient, -rank1_coefficient(score, gradient, damping), score)


def rank1_direction(score: Tree, gradient: Tree, damping: Numeric) -> Tree:
    """`(damping I + v v^T)^-1 g` by Sherman & Morrison (1950).

    `(g - c v) / damping` with `c = v . g / (damping + v . v)`.

    Args:
      score: v, structured like `gradient`.
      gradient: g.
      damping: `[]`, positive, in units of squared scores.

    Returns:
      Structured like `gradient`.

    Raises:
      ValueError: structures or shapes that differ.
    """
    return _over(damping, rank1_deflation(score, gradient, damping))


def _over(damping: Numeric, tree: Tree) -> Tree:
    return jax.tree.map(
        lambda x: (wide(x) / jnp.asarray(damping, wide(x).dtype)).astype(x.dtype), tree
    )


def score_products(scores: Tree, gradient: Tree) -> tuple[Array, Array]:
    """`V V^T`, `[k, k]`, and `V g`, `[k]`, of scores with a leading axis k."""
    tree_algebra.check_like("scores", scores, gradient, leading=1)
    grams, alongs = [], []
    for v, g in zip(jax.tree.leaves(scores), jax.tree.leaves(gradient), strict=True):
        rows = wide(v).reshape(v.shape[0], -1)
        grams.append(jnp.matmul(rows, rows.T, precision=_EXACT))
        alongs.append(jnp.matmul(rows, wide(g).reshape(-1), precision=_EXACT))
    return tree_algebra.total(grams), tree_algebra.total(alongs)


def woodbury_coefficients(gram: Array, along: Array, damping: Numeric) -> Array:
    """`(k damping I + V V^T)^-1 V g`, `[k]`, of what `score_products` returns."""
    count = gram.shape[0]
    ridge = float(count) * jnp.asarray(damping, gram.dtype)
    return solve_spd(gram + ridge * jnp.eye(count, dtype=gram.dtype), along)


def woodbury_deflation(scores: Tree, gradient: Tree, damping: Numeric) -> Tree:
    """`g - V^T (k damping I + V V^T)^-1 V g`: `damping` times `woodbury_direction`."""
    coefficients = woodbury_coefficients(*score_products(scores, gradient), damping)
    return remove_scores(scores, gradient, coefficients)


def remove_scores(scores: Tree, gradient: Tree, coefficients: Array) -> Tree:
    """`g - V^T coefficients`, scores `[k, ...]` and coefficients `[k]`."""

    def remove(v: Array, g: Array) -> Array:
        rows = wide(v).reshape(v.shape[0], -1)
        weight = coefficients.astype(rows.dtype)
        along = jnp.matmul(weight, rows, precision=_EXACT).reshape(g.shape)
        return (wide(g) - along).astype(g.dtype)

    return jax.tree.map(remove, scores, gradient)


def woodbury_direction(scores: Tree, gradient: Tree, damping: Numeric) -> Tree:
    """`(damping I + V^T V / k)^-1 g` for k scores, by Woodbury (1950).

    `(g - V^T (k damping I + V V^T)^-1 V g) / damping`: a system of k unknowns, whatever
    the number of parameters.

    Args:
      scores: V, structured like `gradient`, leaves `[k, ...]`.
      gradient: g.
      damping: `[]`, positive, in units of squared scores.  In float32 not much below
        1e-6 of the scores' mean squared norm if scores may be linearly dependent.

    Returns:
      Structured like `gradient`.

    Raises:
      ValueError: structures or shapes that differ.
    """
    return _over(damping, woodbury_deflation(scores, gradient, damping))


def blockwise_rank1_direction(
    score: Tree, gradient: Tree, damping: Numeric | Sequence, per: str = "layer"
) -> Tree:
    """`rank1_direction` of every block on its own: F is taken as block-diagonal.

    Args:
      score, gradient: as in `rank1_direction`.
      damping: `[]`, or `[L]` with one per block.
      per: one of `tree_algebra.BLOCKS`.

    Returns:
      Structured like `gradient`.

    Raises:
      ValueError: structures that differ, an unknown `per`, another number of dampings
        than of blocks.
    """
    tree_algebra.check_like("score", score, gradient)
    return _per_block(rank1_direction, score, gradient, damping, per)


def blockwise_woodbury_direction(
    scores: Tree, gradient: Tree, damping: Numeric | Sequence, per: str = "layer"
) -> Tree:
    """`woodbury_direction` of every block on its own.

    Args:
      scores, gradient: as in `woodbury_direction`.
      damping, per: as in `blockwise_rank1_direction`.

    Returns:
      Structured like `gradient`.

    Raises:
      ValueError: as in `blockwise_rank1_direction`.
    """
    tree_algebra.check_like("scores", scores, gradient, leading=1)
    return _per_block(woodbury_direction, scores, gradient, damping, per)


def _per_block(
    direction: Callable[[Tree, Tree, Numeric], Tree],
    score: Tree,
    gradient: Tree,
    damping: Numeric | Sequence,
    per: str,
) -> Tree:
    blocks = tree_algebra.block_indices(gradient, per)
    each = per_block_damping(damping, len(blocks))
    parts = [
        direction(v, g, lam)
        for v, g, lam in zip(
            tree_algebra.take_blocks(score, blocks),
            tree_algebra.take_blocks(gradient, blocks),
            each,
            strict=True,
        )
    ]
    return tree_algebra.put_blocks(gradient, blocks, parts)


def per_block_damping(damping: Numeric | Sequence, count: int) -> list[Array]:
    """`count` scalars `[]` of a damping `[]` or `[count]`.

    Raises:
      ValueError: another number of dampings.
    """
    values = jnp.asarray(damping)
    if values.ndim == 0:
        return [values] * count
    if values.shape != (count,):
        raise ValueError(f"damping is shaped {values.shape} for {count} blocks")
    return [values[index] for index in range(count)]
