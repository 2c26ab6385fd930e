"""Distributions over actions in [-1, 1]: the only place that imports distrax.

distrax (and TFP below it) is imported when a distribution is first built, so that
`import offrl_jax` stays quick.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

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


def log_tanh_slope(x: Array) -> Array:
    """`log(1 - tanh(x)^2)`, elementwise, exact also where tanh rounds to +-1."""
    return 2.0 * (math.log(2.0) - x - jax.nn.softplus(-2.0 * x))


def tanh_normal_log_prob(mean: Array, log_std: Array, pre_tanh: Array) -> Array:
    """Log density of a squashed Gaussian at `tanh(pre_tanh)`.

    The same as `tanh_normal(mean, log_std).log_prob(tanh(pre_tanh))`, but exact also
    where tanh rounds to +-1.

    Args:
      mean, log_std: `[..., A]`, before tanh.
      pre_tanh: `[..., A]`.

    Returns:
      `[...]`, the sum over A.
    """
    gaussian = normal_log_prob(mean, log_std, pre_tanh)
    return jnp.sum(gaussian - log_tanh_slope(pre_tanh), axis=-1)


_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
# Below this many standard deviations the four-term series of the tail is exact in
# float32.
_FAR_TAIL = -10.0


def normal_log_prob(mean: Array | float, log_std: Array | float, x: Array) -> Array:
    """Log density of Normals at `x` (any shape), elementwise.

    `mean` and `log_std` have the shape of `x` or none.
    """
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


# Smallest width and height of a bin, as a fraction of all bins, and bounds of the log
# slope at a knot: they bound the density that a spline can give to a single action.
_SMALLEST_BIN = 1e-2
_LARGEST_LOG_SLOPE = 4.0


class Spline(NamedTuple):
    """Monotone rational-quadratic bijections of [-1, 1], one per leading index.

    Attributes:
      x: `[..., K + 1]`, knots from -1 to 1, increasing.
      y: `[..., K + 1]`, their images, likewise.
      slope: `[..., K + 1]`, derivatives at the knots, positive.
    """

    x: Array
    y: Array
    slope: Array


def spline_outputs(bins: int) -> int:
    """Numbers that a network must put out per spline of `bins` bins."""
    return 3 * bins + 1


def spline(raw: Array) -> Spline:
    """Splines from unbounded numbers `[..., 3 K + 1]`; zeros are the identity."""
    bins = (raw.shape[-1] - 1) // 3
    widths, heights, slopes = jnp.split(raw, [bins, 2 * bins], axis=-1)

    def knots(logits: Array) -> Array:
        share = _SMALLEST_BIN + (1.0 - bins * _SMALLEST_BIN) * jax.nn.softmax(logits)
        inner = -1.0 + 2.0 * jnp.cumsum(share[..., :-1], axis=-1)
        end = jnp.ones_like(logits[..., :1])
        return jnp.concatenate([-end, inner, end], axis=-1)

    limit = _LARGEST_LOG_SLOPE
    slope = jnp.exp(soft_bound(slopes / limit, -limit, limit))
    return Spline(knots(widths), knots(heights), slope)


class _Bin(NamedTuple):
    """The bin that a number falls into: corner, extent and slopes at its two knots."""

    x: Array
    y: Array
    width: Array
    height: Array
    left: Array
    right: Array


def _bin(spline: Spline, knots: Array, value: Array) -> _Bin:
    """The bin of `value` `[...]` among `knots` `[..., K + 1]`, x's or y's."""
    index = jnp.sum(value[..., None] >= knots[..., 1:-1], axis=-1)
    # A product with a one-hot vector, and no gather: faster under `vmap`.
    chosen = jax.nn.one_hot(index, knots.shape[-1] - 1, dtype=value.dtype)

    def pick(per_bin: Array) -> Array:
        return jnp.sum(chosen * per_bin, axis=-1)

    return _Bin(
        x=pick(spline.x[..., :-1]),
        y=pick(spline.y[..., :-1]),
        width=pick(jnp.diff(spline.x)),
        height=pick(jnp.diff(spline.y)),
        left=pick(spline.slope[..., :-1]),
        right=pick(spline.slope[..., 1:]),
    )


def spline_forward(spline: Spline, x: Array) -> tuple[Array, Array]:
    """Image and log derivative of `x`, elementwise.

    Gregory & Delbourgo (1982); Durkan et al. (2019), arXiv:1906.04032, equations 4, 5.

    Args:
      spline: leading axes as `x`.
      x: `[...]`, in [-1, 1].

    Returns:
      `[...]`, in [-1, 1], and `[...]`.
    """
    b = _bin(spline, spline.x, x)
    mean_slope = b.height / b.width
    t = (x - b.x) / b.width
    mixed = t * (1.0 - t)
    below = mean_slope + (b.left + b.right - 2.0 * mean_slope) * mixed
    y = b.y + b.height * (mean_slope * jnp.square(t) + b.left * mixed) / below
    above = (
        b.right * jnp.square(t)
        + 2.0 * mean_slope * mixed
        + b.left * jnp.square(1.0 - t)
    )
    return y, 2.0 * jnp.log(mean_slope / below) + jnp.log(above)


def spline_inverse(spline: Spline, y: Array) -> Array:
    """The `x` in [-1, 1] whose image is `y` `[...]`: a quadratic equation per element.

    Equations 6 to 8 of Durkan et al., whose discriminant is here a sum of squares and
    whose solution a ratio of positive terms, so that nothing cancels in float32.
    """
    b = _bin(spline, spline.y, y)
    mean_slope = b.height / b.width
    rise = jnp.clip((y - b.y) / b.height, 0.0, 1.0)
    tilt = b.left * (1.0 - rise) - b.right * rise
    rest = 4.0 * jnp.square(mean_slope) * rise * (1.0 - rise)
    root = jnp.sqrt(jnp.square(tilt) + rest)
    # root + tilt, where that is no difference; else times (root - tilt) over itself.
    sum_of_both = jnp.where(tilt > 0.0, root + tilt, rest / (root + jnp.abs(tilt)))
    t = 2.0 * mean_slope * rise / (2.0 * mean_slope * rise + sum_of_both)
    return jnp.clip(b.x + t * b.width, -1.0, 1.0)
