"""Inner products and blocks of pytrees of parameters.

Sums are taken in float32 at least: a bfloat16 sum of 70,000 squares is wrong by tens
of percent.  Results keep the dtype of the tree they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from offrl_jax.types import Array

Tree = Any
"""A pytree of arrays, structured like the parameters."""

BLOCKS = ("all", "layer", "leaf")
"""What `block_indices` groups by."""


def wide(leaf: Array) -> Array:
    """`leaf` in float32, or in its own dtype if that is wider."""
    # Not by `jnp.promote_types`: strict promotion refuses it bfloat16 and float64.
    return leaf if leaf.dtype.itemsize >= 4 else leaf.astype(jnp.float32)


def total(numbers: Sequence[Array]) -> Array:
    """Sum of one or more arrays of equal shape."""
    result = numbers[0]
    for number in numbers[1:]:
        result = result + number
    return result


def inner(left: Tree, right: Tree) -> Array:
    """Inner product of two trees of equal structure, `[]`, float32 or wider."""
    products = jax.tree.map(lambda x, y: jnp.sum(wide(x) * wide(y)), left, right)
    leaves = jax.tree.leaves(products)
    return total(leaves) if leaves else jnp.zeros(())


def norm2(tree: Tree) -> Array:
    """Squared Euclidean norm of all leaves together, `[]`."""
    return inner(tree, tree)


def add_scaled(tree: Tree, scale: Array, direction: Tree) -> Tree:
    """`tree + scale * direction`, in the dtypes of `tree`; `scale` is `[]`."""

    def add(x: Array, d: Array) -> Array:
        moved = wide(x) + scale.astype(wide(x).dtype) * wide(d)
        return moved.astype(x.dtype)

    return jax.tree.map(add, tree, direction)


def scaled(scale: Array, tree: Tree) -> Tree:
    """`scale * tree`, in the dtypes of `tree`; `scale` is `[]`."""
    return jax.tree.map(
        lambda x: (scale.astype(wide(x).dtype) * wide(x)).astype(x.dtype), tree
    )


def block_indices(tree: Tree, per: str) -> tuple[tuple[int, ...], ...]:
    """Which leaves, by their number in `jax.tree.leaves`, make up each block.

    Args:
      tree: only its structure counts.
      per: one of `BLOCKS`: one block of all leaves; one per layer, that is of leaves
        with the same parent (kernel and bias of a `Dense`); one per leaf.

    Returns:
      The blocks, in the order of their first leaves.

    Raises:
      ValueError: `per` is none of `BLOCKS`.
    """
    if per not in BLOCKS:
        raise ValueError(f"blocks per '{per}'; choose one of {BLOCKS}")
    blocks: dict[Any, list[int]] = {}
    for index, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = {"all": (), "layer": path[:-1], "leaf": index}[per]
        blocks.setdefault(name, []).append(index)
    return tuple(tuple(block) for block in blocks.values())


def take_blocks(
    tree: Tree, blocks: Sequence[Sequence[int]]
) -> tuple[tuple[Array, ...], ...]:
    """The leaves of `tree`, sorted into blocks."""
    leaves = jax.tree.leaves(tree)
    return tuple(tuple(leaves[index] for index in block) for block in blocks)


def put_blocks(
    like: Tree, blocks: Sequence[Sequence[int]], parts: Sequence[Sequence[Array]]
) -> Tree:
    """The inverse of `take_blocks`: a tree structured like `like`."""
    leaves, structure = jax.tree.flatten(like)
    for block, part in zip(blocks, parts, strict=True):
        for index, leaf in zip(block, part, strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(structure, leaves)


def check_like(name: str, tree: Tree, like: Tree, leading: int = 0) -> None:
    """Refuses a tree whose leaves would broadcast, or not fit, against `like`'s.

    Args:
      name: of `tree`, for the message.
      tree: what is checked.
      like: the tree it has to resemble.
      leading: how many further axes every leaf of `tree` has in front.

    Raises:
      ValueError: other structure, or other shapes behind the leading axes.
    """
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            f"{name} is structured {jax.tree.structure(tree)}, "
            f"the gradient {jax.tree.structure(like)}"
        )
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        if x.ndim != y.ndim + leading or x.shape[leading:] != y.shape:
            axes = f" behind {leading} leading axis" if leading else ""
            raise ValueError(
                f"{name} has a leaf of shape {x.shape}, the gradient one of {y.shape}:"
                f" they must agree{axes}"
            )
