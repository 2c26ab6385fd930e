"""Losses and targets of offline RL, each written for **one** example.

Batch them with `jax.vmap`; scalars are float32 `[]` and actions `[A]` unless a
docstring says otherwise.  Nothing here knows a network, an agent or a dataset.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from offrl_jax.types import Array

Numeric = Array | float

# Below this mean |Q| the scale of `q_scale` is no longer divided further down.
_SMALLEST_Q = 1e-6


def td_target(
    reward: Numeric, discount: Numeric, next_value: Numeric, gamma: Numeric
) -> Array:
    """One-step target `r + gamma * discount * V(s')`.

    Args:
      reward: `[]`, reward of the transition.
      discount: `[]`, 0 where the episode terminated, else 1 (time-outs bootstrap).
      next_value: `[]`, value of the next observation.
      gamma: `[]`, the discount factor.

    Returns:
      The target, `[]`, through which no gradient flows.
    """
    chex.assert_rank((reward, discount, next_value, gamma), 0)
    return jax.lax.stop_gradient(jnp.asarray(reward + gamma * discount * next_value))


def smoothed_action(
    action: Array, noise: Array, scale: Numeric, clip: Numeric
) -> Array:
    """The action of TD3's target policy smoothing, clipped to [-1, 1].

    Fujimoto, van Hoof & Meger (2018), arXiv:1802.09477, equation 14.

    Args:
      action: `[A]`, of the target policy.
      noise: `[A]`, standard normal.
      scale: `[]`, standard deviation of the noise before it is clipped.
      clip: `[]`, largest absolute perturbation.

    Returns:
      `clip(action + clip(scale * noise, -clip, clip), -1, 1)`, `[A]`.
    """
    chex.assert_rank((action, noise), 1)
    chex.assert_equal_shape((action, noise))
    return jnp.clip(action + jnp.clip(scale * noise, -clip, clip), -1.0, 1.0)


def expectile(difference: Array, level: Numeric) -> Array:
    """Asymmetric square `|level - 1(difference < 0)| * difference**2`.

    Kostrikov, Nair & Levine (2021), arXiv:2110.06169, equation 4.

    Args:
      difference: `[]`, target minus prediction.
      level: `[]`, in (0, 1); 0.5 is half the squared error, towards 1 the maximum.

    Returns:
      The loss, `[]`.
    """
    chex.assert_rank(difference, 0)
    weight = jnp.where(difference < 0.0, 1.0 - level, level)
    return weight * jnp.square(difference)


def awr_weight(advantage: Array, beta: Numeric, maximum: Numeric) -> Array:
    """Weight of advantage-weighted regression, `min(exp(beta * A), maximum)`.

    Peng et al. (2019), arXiv:1910.00177; the clip is that of IQL's authors' code.

    Args:
      advantage: `[]`.
      beta: `[]`, inverse temperature; 0 gives plain behaviour cloning.
      maximum: `[]`, upper bound of the weight.

    Returns:
      The weight, `[]`, through which no gradient flows.
    """
    chex.assert_rank(advantage, 0)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(beta * advantage), maximum))


def mean_square(action: Array, target: Array) -> Array:
    """Squared distance of two actions, averaged over dimensions: `[A], [A] -> []`.

    The behaviour-cloning term of TD3+BC (`F.mse_loss` averages over dimensions too).
    """
    chex.assert_rank((action, target), 1)
    chex.assert_equal_shape((action, target))
    return jnp.mean(jnp.square(action - target))


def sum_square(action: Array, target: Array) -> Array:
    """Squared distance of two actions, summed over dimensions: `[A], [A] -> []`.

    The penalty of ReBRAC; for A > 1 its scale differs from `mean_square`'s.
    """
    chex.assert_rank((action, target), 1)
    chex.assert_equal_shape((action, target))
    return jnp.sum(jnp.square(action - target))


def q_scale(q: Array, alpha: Numeric) -> Array:
    """`alpha / mean |Q|` over a batch: frees an actor's Q term of the reward's scale.

    Fujimoto & Gu (2021), arXiv:2106.06860, equation 5.

    Args:
      q: `[B]`, values of the actor's actions.
      alpha: `[]`, weight of the Q term against behaviour cloning.

    Returns:
      The factor, `[]`, through which no gradient flows.  A mean below 1e-6 counts as
      1e-6, so that critics that are exactly zero give a finite factor.
    """
    chex.assert_rank(q, 1)
    size = jnp.maximum(jnp.mean(jnp.abs(q)), _SMALLEST_Q)
    return jnp.asarray(jax.lax.stop_gradient(alpha / size))
