"""Draws from the improved policy `p*(a|s) ~ pi(a|s) exp Q(s, a)`.

Batched Hamiltonian Monte Carlo (Neal 2011, arXiv:1206.1901) and self-normalised
importance weights.  Rows of a batch are independent chains that advance together: one
product of `M` rows per gradient, whatever the number of states and chains.  blackjax is
not used: it would be a dependency for some 60 lines, and its kernels hold one chain and
one step size each, where this room shares one adapted step among all rows of an agent.

With `pi` a tanh-Gaussian, `a = tanh(mean + std * zeta)`, there are two spaces to sample
in:

  `whitened`  zeta; where Q is flat the target is a standard normal, so that one step
              size suits all states.  What `hmc` is meant for.
  `raw`       a itself, as the authors' code of MISA (Ma et al., arXiv:2210.07484) does,
              with a target that ends at +-1.  What `hmc_released` reproduces.

Draws carry no gradient.  Take them before, not inside, what is differentiated: the
gradient of `E_p* log pi_theta(a|s)` in theta then costs one pass over fixed draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from offrl_jax import distributions, errors
from offrl_jax.types import Array, Key

LogDensity = Callable[[Array], Array]
"""`[M, D] -> [M]`, up to a constant per row; no row may depend on another."""

SMALLEST_STEP = 1e-4
"""Lower bound of `adapt_step`; the upper one is `largest_step`."""

# TFP's `SimpleStepSizeAdaptation` with its defaults, as the authors' code calls it.
RELEASED_FIRST_STEP = 1.0
RELEASED_TARGET = 0.75
RELEASED_RATE = 0.01
RELEASED_ADAPTING = 0.8
"""Share of the burn-in during which the released step size changes."""


class Draws(NamedTuple):
    """What a sampler returns; no gradient flows through it.

    Attributes:
      positions: `[K, M, D]`, K draws of each of M chains, after the burn-in.
      acceptance: `[]`, mean acceptance probability of all transitions and rows, the
        burn-in included.
      moved: `[]`, the share of these transitions that were accepted.
    """

    positions: Array
    acceptance: Array
    moved: Array


class Whitened(NamedTuple):
    """A tanh-Gaussian policy tilted by `exp Q`, in the policy's own noise `zeta`.

    Attributes:
      log_density: of `zeta` `[M, A]`.
      pre_tanh: `zeta [..., M, A] -> mean + std * zeta`, the same shape.  With these u
        held fixed, `grad log pi(tanh u|s)` is the gradient of the *Gaussian's* log
        density at u (`distributions.normal_log_prob`): the Jacobian of tanh at u does
        not depend on the policy, so that nobody needs `atanh` of a saturated action.
      action: `zeta [..., M, A] -> tanh(mean + std * zeta)`.
      noise: the inverse of `action`, for actions inside (-1, 1).
    """

    log_density: LogDensity
    pre_tanh: Callable[[Array], Array]
    action: Callable[[Array], Array]
    noise: Callable[[Array], Array]


class _Point(NamedTuple):
    """Where the chains are, with what the next transition needs to know of it."""

    position: Array  # [M, D]
    log_density: Array  # [M]
    gradient: Array  # [M, D]


def whitened(q_of: Callable[[Array], Array], mean: Array, log_std: Array) -> Whitened:
    """The target `pi(a|s) exp Q(s, a)` as a density of `zeta = (atanh a - mean) / std`.

    A change of variables divides a density by `|da/dzeta|`, and the policy is one
    itself: `pi(a) = N(zeta; 0, I) / |da/dzeta|`.  So, as a density of zeta, the target

        pi(a) exp Q(a) |da/dzeta| = N(zeta; 0, I) exp Q(tanh(mean + std * zeta))

    holds exactly, and no Jacobian is left to compute.

    Args:
      q_of: actions `[M, A]` in [-1, 1] -> `[M]`; row m in the state of row m.
      mean: `[M, A]`, of the policy before tanh.
      log_std: `[M, A]`.

    Returns:
      The log density, up to a constant, and the ways back to actions.
    """
    std = jnp.exp(log_std)

    def pre_tanh(zeta: Array) -> Array:
        shape = zeta.shape
        return jnp.broadcast_to(mean, shape) + jnp.broadcast_to(std, shape) * zeta

    def action(zeta: Array) -> Array:
        return jnp.tanh(pre_tanh(zeta))

    def noise(action: Array) -> Array:
        shape = action.shape
        centred = jnp.arctanh(action) - jnp.broadcast_to(mean, shape)
        return centred / jnp.broadcast_to(std, shape)

    def log_density(zeta: Array) -> Array:
        return q_of(action(zeta)) - 0.5 * jnp.sum(jnp.square(zeta), axis=-1)

    return Whitened(log_density, pre_tanh, action, noise)


def raw(q_of: Callable[[Array], Array], mean: Array, log_std: Array) -> LogDensity:
    """The target `log pi(a|s) + Q(s, a)` as a density of the action itself.

    Args:
      q_of, mean, log_std: as for `whitened`.

    Returns:
      `[M, A] -> [M]`; NaN outside (-1, 1), which the samplers take for a rejection.
    """

    def log_density(action: Array) -> Array:
        gaussian = distributions.normal_log_prob(mean, log_std, jnp.arctanh(action))
        log_slope = jnp.log1p(-jnp.square(action))
        return q_of(action) + jnp.sum(gaussian - log_slope, axis=-1)

    return log_density


def hmc(
    key: Key,
    log_density: LogDensity,
    initial: Array,
    *,
    step_size: Array,
    draws: int,
    burn_in: int,
    leapfrogs: int,
) -> Draws:
    """Hamiltonian Monte Carlo with a given step size and unit mass.

    One value-and-gradient of `log_density` for the start and `leapfrogs` per
    transition: the gradient of the present point is carried along.  A proposal with a
    density, gradient or energy that is not finite is rejected, so that no row ever
    becomes NaN; a row whose *first* density is not finite stays where it is.

    Args:
      key: of the momenta and acceptances.
      log_density: see `LogDensity`.
      initial: `[M, D]`, one start per chain.
      step_size: `[]`, above 0; see `adapt_step`.
      draws: K, consecutive positions kept per chain; at least 1.
      burn_in: transitions before the first draw is kept; at least 0.
      leapfrogs: steps of one trajectory; at least 1.

    Returns:
      K draws per chain.

    Raises:
      UsageError: a count that is too small.
    """
    _check_counts(draws, burn_in, leapfrogs)
    value_and_grad = _by_rows(log_density)

    def step(point: _Point, key: Key) -> tuple[_Point, tuple[Array, Array, Array]]:
        point, acceptance, accepted = _transition(
            key, value_and_grad, point, step_size, leapfrogs
        )
        return point, (point.position, acceptance, accepted)

    keys = jax.random.split(key, burn_in + draws)
    _, history = jax.lax.scan(step, _start(value_and_grad, initial), keys)
    return _collect(*history, burn_in)


def hmc_released(
    key: Key,
    log_density: LogDensity,
    initial: Array,
    *,
    draws: int,
    burn_in: int,
    leapfrogs: int,
) -> tuple[Draws, Array]:
    """The sampler as MISA's authors call it: a new step size from 1 in every update.

    A reconstruction of TFP's `HamiltonianMonteCarlo` under `SimpleStepSizeAdaptation`
    with its defaults.  In each of the first `int(0.8 burn_in)` transitions the step is
    multiplied by 1.01 if the acceptance probability, averaged over all chains, is
    above 0.75, else divided by it.  At a burn-in of 5 the step thus ends within
    [0.961, 1.041] whatever the target: far above the scale of a policy in action space
    (`raw`), where nearly all proposals leave (-1, 1) and are rejected, and the "draws"
    repeat the start.  Kept to measure and to compare; use `hmc`.

    Args:
      key, log_density, draws, burn_in, leapfrogs: as for `hmc`.
      initial: `[M, D]`; the authors start at the actions of the data.

    Returns:
      K draws per chain, and the last step size, `[]`.

    Raises:
      UsageError: a count that is too small.
    """
    _check_counts(draws, burn_in, leapfrogs)
    value_and_grad = _by_rows(log_density)

    def step(
        carry: tuple[_Point, Array], inputs: tuple[Key, Array]
    ) -> tuple[tuple[_Point, Array], tuple[Array, Array, Array]]:
        (point, step_size), (key, adapting) = carry, inputs
        point, acceptance, accepted = _transition(
            key, value_and_grad, point, step_size, leapfrogs
        )
        factor = jnp.where(
            jnp.mean(acceptance) > RELEASED_TARGET,
            1.0 + RELEASED_RATE,
            1.0 / (1.0 + RELEASED_RATE),
        )
        step_size = jnp.where(adapting, step_size * factor, step_size)
        return (point, step_size), (point.position, acceptance, accepted)

    keys = jax.random.split(key, burn_in + draws)
    adapting = jnp.arange(burn_in + draws) < int(RELEASED_ADAPTING * burn_in)
    start = (_start(value_and_grad, initial), jnp.float32(RELEASED_FIRST_STEP))
    (_, step_size), history = jax.lax.scan(step, start, (keys, adapting))
    return _collect(*history, burn_in), jax.lax.stop_gradient(step_size)


def largest_step(leapfrogs: int) -> float:
    """The step size at which a trajectory in a standard normal is a quarter turn.

    There `leapfrogs` steps turn (position, momentum) by `leapfrogs * 2 asin(step / 2)`;
    after a quarter turn the position is the momentum that was drawn, up to scale: an
    independent draw.  Longer trajectories come back to where they started, with a high
    acceptance that hides it.
    """
    return 2.0 * math.sin(math.pi / (4.0 * leapfrogs))


def adapt_step(
    log_step: Array,
    acceptance: Array,
    *,
    leapfrogs: int,
    target: Array | float = 0.8,
    rate: Array | float = 0.1,
) -> Array:
    """One step of Robbins & Monro (1951) on the log step size, once per update.

    Keep `log_step` in the agent's state.  The rate is constant, since the target keeps
    changing with the policy and the critics; the acceptance is a mean over thousands of
    transitions, so its noise hardly reaches the step size.  Meant for `whitened`
    targets: where Q is nearly flat and A small, the upper bound binds, and acceptance
    settles above `target`.

    Args:
      log_step: `[]`, natural logarithm of the step size used.
      acceptance: `[]`, `Draws.acceptance` under it.
      leapfrogs: steps of one trajectory.
      target: `[]`, acceptance probability to settle at; 0.6 to 0.9 is customary.
      rate: `[]`, change of `log_step` per unit of acceptance.

    Returns:
      The next `log_step`, `[]`, within the logs of `SMALLEST_STEP` and
      `largest_step(leapfrogs)`.
    """
    return jnp.clip(
        log_step + rate * (acceptance - target),
        math.log(SMALLEST_STEP),
        math.log(largest_step(leapfrogs)),
    )


def self_normalised_weights(q: Array) -> Array:
    """Weights that turn draws of `pi(.|s)` into a sample of `pi(.|s) exp Q(s, .)`.

    The bias of a weighted mean falls as 1/K (Owen 2013, "Monte Carlo theory, methods
    and examples", section 9.2), with a constant that grows with the spread of exp Q.

    Args:
      q: `[K, B]`, Q of K draws from the policy in each of B states.

    Returns:
      `[K, B]`, softmax over K, through which no gradient flows.
    """
    return jax.lax.stop_gradient(jax.nn.softmax(q, axis=0))


def resampled(key: Key, q: Array, positions: Array, chains: int) -> Array:
    """Starts for chains: draws of the policy, chosen with probability as their weights.

    Rubin's (1987) sampling importance resampling; the chains start closer to `p*` than
    at draws of the policy, without an evaluation where Q of these draws is known.

    Args:
      key: of the choices, which are with replacement and independent.
      q: `[K, B]`, Q of the draws.
      positions: `[K, B, D]`, the draws.
      chains: C, starts per state.

    Returns:
      `[C, B, D]`.
    """
    _, states = q.shape
    chosen = jax.random.categorical(key, q, axis=0, shape=(chains, states))
    return jnp.take_along_axis(positions, chosen[..., None], axis=0)


def _check_counts(draws: int, burn_in: int, leapfrogs: int) -> None:
    counts = (("draws", draws, 1), ("burn_in", burn_in, 0), ("leapfrogs", leapfrogs, 1))
    for name, value, least in counts:
        if value < least:
            raise errors.UsageError(
                f"sampler setting '{name}' is {value}; choose {least} or more"
            )


def _by_rows(log_density: LogDensity) -> Callable[[Array], tuple[Array, Array]]:
    """Value `[M]` and gradient `[M, D]` of every row in one pass each way."""

    def value_and_grad(position: Array) -> tuple[Array, Array]:
        value, pullback = jax.vjp(log_density, position)
        # Rows are independent: the gradient of the sum holds every row's own.
        (gradient,) = pullback(jnp.ones_like(value))
        return value, gradient

    return value_and_grad


def _start(
    value_and_grad: Callable[[Array], tuple[Array, Array]], initial: Array
) -> _Point:
    initial = jax.lax.stop_gradient(initial)
    return _Point(initial, *value_and_grad(initial))


def _leapfrog(
    value_and_grad: Callable[[Array], tuple[Array, Array]],
    point: _Point,
    momentum: Array,
    step_size: Array,
    leapfrogs: int,
) -> tuple[_Point, Array]:
    """The trajectory's end and its momentum `[M, D]`, after `leapfrogs` gradients."""

    def step(carry: tuple[_Point, Array], _: None) -> tuple[tuple[_Point, Array], None]:
        point, momentum = carry
        position = point.position + step_size * momentum
        point = _Point(position, *value_and_grad(position))
        return (point, momentum + step_size * point.gradient), None

    # Half a kick at either end and whole ones between: the last is halved afterwards.
    half = 0.5 * step_size
    start = (point, momentum + half * point.gradient)
    (point, momentum), _ = jax.lax.scan(step, start, length=leapfrogs)
    return point, momentum - half * point.gradient


def _transition(
    key: Key,
    value_and_grad: Callable[[Array], tuple[Array, Array]],
    point: _Point,
    step_size: Array,
    leapfrogs: int,
) -> tuple[_Point, Array, Array]:
    """One proposal per row: the next point, acceptance probabilities, who accepted."""
    momentum_key, uniform_key = jax.random.split(key)
    momentum = jax.random.normal(momentum_key, point.position.shape)
    proposal, reached = _leapfrog(value_and_grad, point, momentum, step_size, leapfrogs)
    kinetic_before = 0.5 * jnp.sum(jnp.square(momentum), axis=-1)
    kinetic_after = 0.5 * jnp.sum(jnp.square(reached), axis=-1)
    log_ratio = (
        proposal.log_density - point.log_density + kinetic_before - kinetic_after
    )
    # A NaN or infinity on either side, in the density or through a gradient.
    log_ratio = jnp.where(jnp.isfinite(log_ratio), log_ratio, -jnp.inf)
    acceptance = jnp.exp(jnp.minimum(log_ratio, 0.0))
    # Strictly below: a uniform of exactly 0 must not accept the impossible.
    accepted = jax.random.uniform(uniform_key, acceptance.shape) < acceptance
    point = _Point(
        jnp.where(accepted[:, None], proposal.position, point.position),
        jnp.where(accepted, proposal.log_density, point.log_density),
        jnp.where(accepted[:, None], proposal.gradient, point.gradient),
    )
    return point, acceptance, accepted


def _collect(
    positions: Array, acceptance: Array, accepted: Array, burn_in: int
) -> Draws:
    draws = Draws(positions[burn_in:], jnp.mean(acceptance), jnp.mean(accepted))
    return jax.tree.map(jax.lax.stop_gradient, draws)
