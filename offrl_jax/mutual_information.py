"""Lower bounds of the mutual information I(S; A) of states and actions under the data.

For the data's p(a|s), a policy pi(a|s) and any critic T(s, a), with E_D over the data:

    BA     E_D log pi(a|s) + H(A)                            Barber & Agakov (2003)
    f      BA + E_D T - E_{s~D, a~pi} exp(T - 1)             NWJ, arXiv:0809.0853
    DV     BA + E_D T - log E_{s~D, a~pi} exp T              Donsker & Varadhan (1983)
    MISA   BA + E_D T - E_{s~D} log E_{a~pi(.|s)} exp T      arXiv:2210.07484

What a bound adds to BA is its *gain* (`nwj_gain`, `donsker_varadhan_gain`,
`misa_gain`): a lower bound of what BA misses, E_s KL(p(.|s) || pi(.|s)).  `bounds` adds
BA, for all of them at once.  For the same T, f <= DV <= MISA <= I(S; A); a gain is
positive, and f above BA, only for a T near enough to the optimum 1 + log p / pi, where
all three are tight.  Adding a constant to T changes f alone, adding a function of the
state f and DV.

That holds for expectations.  The functions take K samples of pi per state, and:

* a log-mean-exp over K samples is on average below the logarithm of the expectation
  (Jensen), so the estimates of DV and MISA are biased **upwards** and may exceed
  I(S; A), the more the smaller K; f's estimate has no bias;
* with the data's own action among the samples (`with_positive`), MISA's estimate is a
  lower bound again for every K (InfoNCE with negatives of pi, arXiv:1905.06922), and
  none of the three gains can exceed log(K + 1).

The formulas are reconstructed from the paper's abstract and its authors' code:
docs/algorithms/misa.md tells whose is what.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from offrl_jax.errors import unknown_name
from offrl_jax.types import Array

Numeric = Array | float

BOUNDS = ("misa", "dv", "f", "ba")
"""Names of the bounds, the tightest first."""

LARGEST_T = 20.0
"""Above it `nwj_gain` goes on along the tangent of its exponential; exp(19) = 2e8."""


class Bounds(NamedTuple):
    """The four bounds of I(S; A), `[]` each, in nats: see `bounds`.

    Attributes:
      ba: Barber & Agakov's.
      f: with `nwj_gain`.
      dv: with `donsker_varadhan_gain`.
      misa: with `misa_gain`.
    """

    ba: Array
    f: Array
    dv: Array
    misa: Array


def ba_bound(log_policy: Array, action_entropy: Numeric) -> Array:
    """Barber & Agakov's bound `E_D log pi(a|s) + H(A)`.

    Args:
      log_policy: `[B]`, log density of the policy at the data's actions, in nats.
      action_entropy: `[]`, differential entropy H(A) of the data's actions over all
        states, in nats; a constant that no gradient needs.

    Returns:
      `[]`.
    """
    chex.assert_rank((log_policy, action_entropy), (1, 0))
    return jnp.mean(log_policy) + action_entropy


def with_positive(t_data: Array, t_policy: Array) -> Array:
    """The data's action as one more sample: `[B], [K, B] -> [K + 1, B]`.

    To be passed as `t_policy`.
    """
    _check(t_data, t_policy)
    return jnp.concatenate([t_policy, t_data[None, :]], axis=0)


def log_mean_exp(t_policy: Array, normaliser: Numeric | None = None) -> Array:
    """`log(1 / normaliser * sum_k exp T_k)` of every state, without overflow.

    Its gradient with respect to T_k is the k-th weight of a softmax over the samples,
    whatever the normaliser.

    Args:
      t_policy: `[K, B]`, the critic at K samples per state.
      normaliser: `[]`, what the sum is divided by; None: the number K of terms, the
        positive counted.  The authors' code divides by its batch size, 256, for K = 50:
        all values lower by log(256 / 50) = 1.63, which only shows where they are
        compared with a number, such as the gap of a Lagrange multiplier.

    Returns:
      `[B]`.
    """
    chex.assert_rank(t_policy, 2)
    count = t_policy.shape[0] if normaliser is None else normaliser
    return jax.nn.logsumexp(t_policy, axis=0) - jnp.log(
        jnp.asarray(count, t_policy.dtype)
    )


def nwj_gain(t_data: Array, t_policy: Array, largest: Numeric = LARGEST_T) -> Array:
    """What f adds to BA: `E_D T - E exp(T - 1)`.

    Where a sample's T exceeds `largest`, the exponential is replaced by its tangent
    there.  The result and its gradient stay finite, and the gradient goes on pulling T
    down, which that of a clipped T would not; but the gain then is too large, and no
    lower bound, by the mean of `exp(T - 1) - exp(largest - 1) * (1 + T - largest)` over
    such samples.

    Args:
      t_data: `[B]`, the critic at the data's actions.
      t_policy: `[K, B]`, at K samples of the policy per state.
      largest: `[]`, last T of which the exponential is exact.

    Returns:
      `[]`, in nats.
    """
    _check(t_data, t_policy)
    below = jnp.minimum(t_policy, largest)
    beyond = t_policy - below
    return jnp.mean(t_data) - jnp.mean(jnp.exp(below - 1.0) * (1.0 + beyond))


def donsker_varadhan_gain(
    t_data: Array, t_policy: Array, normaliser: Numeric | None = None
) -> Array:
    """What DV adds to BA: `E_D T - log E exp T`, one logarithm for all states.

    Args:
      t_data: `[B]`, the critic at the data's actions.
      t_policy: `[K, B]`, at K samples of the policy per state.
      normaliser: `[]`, as in `log_mean_exp`: the sum of all is divided by B times it.

    Returns:
      `[]`, in nats.
    """
    _check(t_data, t_policy)
    per_state = log_mean_exp(t_policy, normaliser)
    over_states = jax.nn.logsumexp(per_state) - math.log(per_state.shape[0])
    return jnp.mean(t_data) - over_states


def misa_gain(
    t_data: Array, t_policy: Array, normaliser: Numeric | None = None
) -> Array:
    """What MISA adds to BA: `E_D T - E_s log E_a exp T`, a logarithm per state.

    Its negative, with T = Q, is the regulariser of MISA's critics.

    Args:
      t_data: `[B]`, the critic at the data's actions.
      t_policy: `[K, B]`, at K samples of the policy per state.
      normaliser: `[]`, as in `log_mean_exp`.

    Returns:
      `[]`, in nats.
    """
    _check(t_data, t_policy)
    return jnp.mean(t_data) - jnp.mean(log_mean_exp(t_policy, normaliser))


def gain(
    bound: str, t_data: Array, t_policy: Array, normaliser: Numeric | None = None
) -> Array:
    """What the bound of that name, one of `BOUNDS`, adds to BA; `ba` adds 0.

    Args:
      bound: name.
      t_data, t_policy, normaliser: as in `misa_gain`; `f` does not use the last.

    Returns:
      `[]`, in nats.

    Raises:
      UsageError: an unknown name.
    """
    if bound == "ba":
        return jnp.zeros(())
    if bound == "f":
        return nwj_gain(t_data, t_policy)
    if bound == "dv":
        return donsker_varadhan_gain(t_data, t_policy, normaliser)
    if bound == "misa":
        return misa_gain(t_data, t_policy, normaliser)
    raise unknown_name("bound", bound, BOUNDS)


def state_weight(bound: str, log_z: Array) -> Array:
    """How much each state counts in the gradient of a gain with respect to pi.

    That gradient is `-E_s w(s) E_p* grad log pi(a|s)` with `p* = pi exp T / Z(s)`, and
    w is 1 for MISA, `Z(s) / E_s Z` for DV and `Z(s) / e` for f (there, no more than at
    a Z of `exp(LARGEST_T)`).  BA's gain has no gradient, and w is 0.

    Args:
      bound: one of `BOUNDS`.
      log_z: `[B]`, `log E_{a~pi} exp T(s, a)`, as `log_mean_exp` estimates it.

    Returns:
      `[B]`.

    Raises:
      UsageError: an unknown name.
    """
    if bound == "misa":
        return jnp.ones_like(log_z)
    if bound == "dv":
        return jax.nn.softmax(log_z) * log_z.shape[0]
    if bound == "f":
        return jnp.exp(jnp.minimum(log_z, LARGEST_T) - 1.0)
    if bound == "ba":
        return jnp.zeros_like(log_z)
    raise unknown_name("bound", bound, BOUNDS)


def bounds(
    log_policy: Array, action_entropy: Numeric, t_data: Array, t_policy: Array
) -> Bounds:
    """All four bounds, from the same batch and samples; each is BA plus its gain.

    Args:
      log_policy: `[B]`, see `ba_bound`.
      action_entropy: `[]`, see `ba_bound`.
      t_data: `[B]`, the critic at the data's actions.
      t_policy: `[K, B]`, at K samples of the policy per state.
    """
    chex.assert_equal_shape((log_policy, t_data))
    ba = ba_bound(log_policy, action_entropy)
    return Bounds(
        ba=ba,
        f=ba + nwj_gain(t_data, t_policy),
        dv=ba + donsker_varadhan_gain(t_data, t_policy),
        misa=ba + misa_gain(t_data, t_policy),
    )


def _check(t_data: Array, t_policy: Array) -> None:
    chex.assert_rank((t_data, t_policy), (1, 2))
    chex.assert_equal(t_data.shape[0], t_policy.shape[1])
