"""Distributions over actions in [-1, 1]: the only place that imports distrax.

distrax (and TFP below it) is imported when a distribution is first built, so that
`import offrl_jax` stays quick.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

import jax
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


_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
# Below this many standard deviations the four-term series of the tail is exact in
# float32.
_FAR_TAIL = -10.0


def normal_log_prob(mean: Array, log_std: Array, x: Array) -> Array:
    """Log density of Normals, elementwise: three arrays of one shape -> that shape."""
    z = (x - mean) * jnp.exp(-log_std)
    return -0.5 * jnp.square(z) - log_std - _LOG_SQRT_2PI


def normal_log_cdf(z: Array) -> Array:
    """`log Phi(z)` (any shape), with derivatives that stay exact far in the tail.

    Below -10 it is the asymptotic series of the tail (Abramowitz & Stegun 26.2.12):
    `jax.scipy.special.log_ndtr` takes the difference of two numbers of size z^2 / 2 for
    its derivative, of which float32 leaves nothing once z is some thousands.
    """
    far = z < _FAR_TAIL
    # Both branches see arguments at which they are finite: a NaN in the branch that is
    # not taken would reach the gradient.
    near_z = jnp.where(far, _FAR_TAIL, z)
    far_z = jnp.where(far, z, _FAR_TAIL)
    inverse = 1.0 / jnp.square(far_z)
    series = inverse * (-1.0 + inverse * (3.0 - 15.0 * inverse))
    tail = (
        -0.5 * jnp.square(far_z) - jnp.log(-far_z) - _LOG_SQRT_2PI + jnp.log1p(series)
    )
    return jnp.where(far, tail, jax.scipy.special.log_ndtr(near_z))


def censored_normal_log_prob(mean: Array, log_std: Array, action: Array) -> Array:
    """Log-likelihood of Normals that are observed through a clip to [-1, 1].

    The model of an actuator that saturates, Tobin's (1958): an action inside (-1, 1)
    has the Normal's density; one on a bound, `|a| >= 1 - 1e-6`, has the probability of
    the tail behind it.  A density with respect to Lebesgue measure plus an atom at each
    bound, so its values compare only with those of other censored models.

    Args:
      mean: `[..., A]`, before the clip; it may lie outside [-1, 1].
      log_std: `[..., A]`.
      action: `[..., A]`, in [-1, 1].

    Returns:
      `[..., A]`: sum over A for the action's; gradients are finite everywhere.
    """
    above, below = action >= LARGEST_ACTION, action <= -LARGEST_ACTION
    # On a bound the tail starts at the bound itself: the clip moved everything there.
    side = jnp.where(above, 1.0, -1.0)
    tail = normal_log_cdf((side * mean - 1.0) * jnp.exp(-log_std))
    inside = normal_log_prob(mean, log_std, action)
    return jnp.where(above | below, tail, inside)
