"""Conditional densities of actions, p(a|s), fitted by maximum likelihood.

What an algorithm needs of a behaviour policy: a log-likelihood that is finite wherever
an action may lie, samples, and a loss.  The kinds differ in what they can represent:

  gaussian  one diagonal Gaussian: a single mode, nothing about the bounds
  mixture   several, weighted by the state: several modes
  censored  several, seen through a clip to [-1, 1]: saturated actions are atoms

Observations are taken as they come: standardise them before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from offrl_jax import distributions, errors, networks
from offrl_jax.types import Array, Key, Spec

KINDS = ("gaussian", "mixture", "censored")
"""Names that `make_density` knows."""

# Customary bounds of a policy's log standard deviation.  The lower one bounds the
# density where data are deterministic: at most e^5 / sqrt(2 pi) per dimension.
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
# A censored mean may leave the box, so that a component can put all its mass on a
# bound, but not without limit: extrapolation would make its tails astronomic.
LARGEST_CENSORED_MEAN = 4.0


class InitFn(Protocol):
    """Type of `Density.init`."""

    def __call__(self, key: Key) -> networks.Params:
        """Draws fresh parameters."""
        ...


class LogProbFn(Protocol):
    """Type of `Density.log_prob`."""

    def __call__(
        self, key: Key, params: networks.Params, obs: Array, action: Array
    ) -> Array:
        """Log densities `[B]` of `action` `[B, A]` in `obs` `[B, O]`."""
        ...


class LossFn(Protocol):
    """Type of `Density.loss`."""

    def __call__(
        self, key: Key, params: networks.Params, obs: Array, action: Array
    ) -> Array:
        """Mean negative log-likelihood `[]`, in nats per action vector."""
        ...


class SampleFn(Protocol):
    """Type of `Density.sample`."""

    def __call__(self, key: Key, params: networks.Params, obs: Array) -> Array:
        """One action per observation `[B, O]`: `[B, A]` in [-1, 1]."""
        ...


class Density(NamedTuple):
    """A conditional density p(a|s): pure functions, made for one structure and `Spec`.

    Attributes:
      init: `(key) -> params`.
      log_prob: `(key, params, obs, action) -> [B]`, in nats.
      loss: `(key, params, obs, action) -> []`, to be minimised.
      sample: `(key, params, obs) -> [B, A]`, in [-1, 1].
    """

    init: InitFn
    log_prob: LogProbFn
    loss: LossFn
    sample: SampleFn


ComponentLogProb = Callable[[Array, Array, Array], Array]
"""`(mean, log_std, action) -> log-likelihood`, elementwise."""


def _bounded_log_std(raw: Array) -> Array:
    return distributions.soft_bound(raw, LOG_STD_MIN, LOG_STD_MAX)


def _exact(
    init: InitFn,
    log_prob: Callable[[networks.Params, Array, Array], Array],
    sample: SampleFn,
) -> Density:
    """A density whose likelihood is known exactly: its loss is the mean of it."""

    def keyed(key: Key, params: networks.Params, obs: Array, action: Array) -> Array:
        del key
        return log_prob(params, obs, action)

    def loss(key: Key, params: networks.Params, obs: Array, action: Array) -> Array:
        return -jnp.mean(keyed(key, params, obs, action))

    return Density(init, keyed, loss, sample)


def gaussian(hidden: tuple[int, ...], spec: Spec) -> Density:
    """Diagonal Gaussian with mean in (-1, 1) by tanh, not squashed itself.

    The standard deviation depends on the state: data of several policies, or of one
    that is noisy in some states, are sharp in one place and broad in another, and a
    common one would be wrong by nats in both.  `log_prob` is the density over R^A;
    `sample` clips.

    Args:
      hidden: widths of the hidden layers.
      spec: dimensions.
    """
    network = networks.GaussianActor(hidden, spec.action_dim)

    def head(params: networks.Params, obs: Array) -> tuple[Array, Array]:
        mean, raw = networks.apply(network, params, obs)
        return jnp.tanh(mean), _bounded_log_std(raw)

    def init(key: Key) -> networks.Params:
        return network.init(key, jnp.zeros((1, spec.obs_dim)))

    def log_prob(params: networks.Params, obs: Array, action: Array) -> Array:
        mean, log_std = head(params, obs)
        return jnp.sum(distributions.normal_log_prob(mean, log_std, action), axis=-1)

    def sample(key: Key, params: networks.Params, obs: Array) -> Array:
        mean, log_std = head(params, obs)
        noise = jax.random.normal(key, mean.shape)
        return jnp.clip(mean + jnp.exp(log_std) * noise, -1.0, 1.0)

    return _exact(init, log_prob, sample)


class _MixtureHead(nn.Module):
    """`obs [..., O] -> (logits [..., K], mean [..., K, A], log_std [..., K, A])`.

    Nothing is bounded.  `location` spreads the components: with the small biases of a
    linear layer they would start, and often stay, on top of each other.
    """

    hidden: tuple[int, ...]
    components: int
    action_dim: int

    @nn.compact
    def __call__(self, obs: Array) -> tuple[Array, Array, Array]:
        shape = (self.components, self.action_dim)
        out = networks.MLP(self.hidden, self.components * (1 + 2 * self.action_dim))(
            obs
        )
        logits, rest = jnp.split(out, [self.components], axis=-1)
        mean, log_std = jnp.split(rest.reshape(*obs.shape[:-1], 2, *shape), 2, axis=-3)
        location = self.param("location", _spread, shape)
        location = jnp.broadcast_to(location, (*obs.shape[:-1], *shape))
        return logits, mean.squeeze(-3) + location, log_std.squeeze(-3)


def _spread(key: Key, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def _mixture_of(
    hidden: tuple[int, ...],
    spec: Spec,
    components: int,
    component_log_prob: ComponentLogProb,
    bound_mean: Callable[[Array], Array],
) -> Density:
    """Mixture of products over A; samples are the Normals', clipped to [-1, 1]."""
    if components < 1:
        raise errors.UsageError(
            f"a mixture of {components} components; give at least 1"
        )
    network = _MixtureHead(hidden, components, spec.action_dim)

    def head(params: networks.Params, obs: Array) -> tuple[Array, Array, Array]:
        logits, mean, log_std = networks.apply(network, params, obs)
        return logits, bound_mean(mean), _bounded_log_std(log_std)

    def init(key: Key) -> networks.Params:
        return network.init(key, jnp.zeros((1, spec.obs_dim)))

    def log_prob(params: networks.Params, obs: Array, action: Array) -> Array:
        logits, mean, log_std = head(params, obs)
        each = component_log_prob(
            mean, log_std, jnp.broadcast_to(action[:, None, :], mean.shape)
        )
        return jax.nn.logsumexp(
            jax.nn.log_softmax(logits) + jnp.sum(each, axis=-1), axis=-1
        )

    def sample(key: Key, params: networks.Params, obs: Array) -> Array:
        logits, mean, log_std = head(params, obs)
        which_key, noise_key = jax.random.split(key)
        which = jax.random.categorical(which_key, logits)[:, None, None]
        mean = jnp.take_along_axis(mean, which, axis=1)[:, 0]
        log_std = jnp.take_along_axis(log_std, which, axis=1)[:, 0]
        noise = jax.random.normal(noise_key, mean.shape)
        return jnp.clip(mean + jnp.exp(log_std) * noise, -1.0, 1.0)

    return _exact(init, log_prob, sample)


def mixture(hidden: tuple[int, ...], spec: Spec, components: int) -> Density:
    """Diagonal Gaussians as in `gaussian`, with weights that depend on the state.

    Args:
      hidden: widths of the hidden layers.
      spec: dimensions.
      components: number of Gaussians.

    Raises:
      UsageError: no component.
    """
    return _mixture_of(
        hidden, spec, components, distributions.normal_log_prob, jnp.tanh
    )


def censored(hidden: tuple[int, ...], spec: Spec, components: int) -> Density:
    """Mixture of diagonal Gaussians seen through the clip of the action bounds.

    See `distributions.censored_normal_log_prob`.  `log_prob` is a density with respect
    to Lebesgue measure plus an atom at each bound of each dimension: compare it with
    nothing but itself.

    Args:
      hidden: widths of the hidden layers.
      spec: dimensions.
      components: number of Gaussians.

    Raises:
      UsageError: no component.
    """

    def bound_mean(raw: Array) -> Array:
        limit = LARGEST_CENSORED_MEAN
        return distributions.soft_bound(raw / limit, -limit, limit)

    return _mixture_of(
        hidden, spec, components, distributions.censored_normal_log_prob, bound_mean
    )


def make_density(
    kind: str, hidden: tuple[int, ...], spec: Spec, components: int = 5
) -> Density:
    """Makes the density of a name in `KINDS`.

    Args:
      kind: see the head of this file.
      hidden: widths of the hidden layers of every network in it.
      spec: dimensions.
      components: Gaussians of `mixture` and `censored`; the others have none.

    Raises:
      UsageError: unknown kind, or a mixture without components.
    """
    if kind == "gaussian":
        return gaussian(hidden, spec)
    if kind == "mixture":
        return mixture(hidden, spec, components)
    if kind == "censored":
        return censored(hidden, spec, components)
    raise errors.unknown_name("behaviour density", kind, KINDS)
