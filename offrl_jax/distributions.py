"""Policy distributions over actions in [-1, 1]: the only place that imports distrax.

distrax (and TFP below it) is imported when a distribution is first built, so that
`import offrl_jax` stays quick.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import TYPE_CHECKING

import jax.numpy as jnp

from offrl_jax.types import Array

if TYPE_CHECKING:
    import distrax

LARGEST_ACTION = 1.0 - 1e-6
"""Data actions are clipped to this before `atanh`; 1e-6 is well resolved in float32."""


def _distrax() -> ModuleType:
    with warnings.catch_warnings():
        # TFP touches names that jax has deprecated; nothing a user could cure.
        warnings.simplefilter("ignore", DeprecationWarning)
        import distrax
    return distrax


def soft_bound(x: Array, low: Array | float, high: Array | float) -> Array:
    """Squashes `x` (any shape) into (low, high) by a tanh, which keeps a gradient."""
    return low + 0.5 * (high - low) * (jnp.tanh(x) + 1.0)


def normal(mean: Array, log_std: Array) -> distrax.Distribution:
    """Diagonal Gaussian over actions, not squashed.

    Args:
      mean: `[..., A]`.
      log_std: `[..., A]`.

    Returns:
      A distribution with event shape `[A]`: `log_prob` sums over A.
    """
    distrax = _distrax()
    return distrax.Independent(distrax.Normal(mean, jnp.exp(log_std)), 1)


def tanh_normal(mean: Array, log_std: Array) -> distrax.Distribution:
    """Diagonal Gaussian squashed into (-1, 1) by tanh; `mean` is the one before tanh.

    Its `log_prob` is infinite at |a| = 1: evaluate data with `log_prob_of_data`.

    Args:
      mean: `[..., A]`.
      log_std: `[..., A]`.

    Returns:
      A distribution with event shape `[A]`: `log_prob` sums over A.
    """
    distrax = _distrax()
    base = distrax.Normal(mean, jnp.exp(log_std))
    return distrax.Independent(distrax.Transformed(base, distrax.Tanh()), 1)


def log_prob_of_data(policy: distrax.Distribution, action: Array) -> Array:
    """Log density of recorded actions `[..., A]` -> `[...]`, finite at |a| = 1.

    Recorded actions often sit exactly on the bounds, where the density of a squashed
    Gaussian does not exist; they are moved inwards to +-(1 - 1e-6) first.
    """
    inside = jnp.clip(action, -LARGEST_ACTION, LARGEST_ACTION)
    return jnp.asarray(policy.log_prob(inside))
