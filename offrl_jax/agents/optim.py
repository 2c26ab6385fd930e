"""What every agent does with parameters: Adam steps, target averages, minibatches."""

from __future__ import annotations

from typing import TypeVar

import chex
import jax
import optax

from offrl_jax.types import Array, Transitions

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
