"""Conditional densities of actions, p(a|s), fitted by maximum likelihood.

What an algorithm needs of a behaviour policy: a log-likelihood that is finite wherever
an action may lie, samples, and a loss.  The kinds differ in what they can represent:

  gaussian  one diagonal Gaussian: a single mode, nothing about the bounds
  mixture   several, weighted by the state: several modes
  censored  several, seen through a clip to [-1, 1]: saturated actions are atoms
  flow      any shape within the box, exactly normalised; the slowest to fit
  cvae      a latent-variable model with a broad decoder; only bounds of its likelihood

Observations are taken as they come: standardise them before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from offrl_jax import distributions, errors, networks
from offrl_jax.types import Array, Key, Spec

KINDS = ("gaussian", "mixture", "censored", "flow", "cvae")
"""Names that `make_density` knows."""

# Customary bounds of a policy's log standard deviation.  The lower one bounds the
# density where data are deterministic: at most e^5 / sqrt(2 pi) per dimension.
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
# A censored mean may leave the box, so that a component can put all its mass on a
# bound, but not without limit: extrapolation would make its tails astronomic.
LARGEST_CENSORED_MEAN = 4.0

FLOW_BINS = 16
# Each half of the action is transformed twice, given the other half.
COUPLING_LAYERS = 4

# SPOT's weights: mean square error over A plus 0.5 times the KL averaged over 2 A
# latents.  That is an ELBO, up to a factor, if the decoder's variance is 0.5 / 4.
CVAE_DECODER_LOG_STD = 0.5 * math.log(0.5 / 4.0)
CVAE_LOG_STD_MIN, CVAE_LOG_STD_MAX = -4.0, 15.0
CVAE_SAMPLES = 10


InitFn = Callable[[Key], networks.Params]
"""`key -> params`."""


class LogProbFn(Protocol):
    """Type of `Density.log_prob` and `Density.loss`."""

    def __call__(
        self, key: Key, params: networks.Params, obs: Array, action: Array
    ) -> Array:
        """Of `action` `[B, A]` in `obs` `[B, O]`: `[B]`, or `[]` for the loss."""
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
      log_prob: `(key, params, obs, action) -> [B]`, in nats.  Only `cvae` uses the key.
      loss: `(key, params, obs, action) -> []`, mean negative log-likelihood in nats per
        action; the negative ELBO for `cvae`.
      sample: `(key, params, obs) -> [B, A]`, in [-1, 1].
    """

    init: InitFn
    log_prob: LogProbFn
    loss: LogProbFn
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


class Bijection(NamedTuple):
    """Bijections of the box [-1, 1]^A onto itself, one per observation.

    Attributes:
      init: `(key) -> params`.
      forward: `(params, obs [B, O], x [B, A]) -> (y [B, A], log |det dy/dx| [B])`.
      inverse: `(params, obs, y) -> x`.
    """

    init: InitFn
    forward: Callable[[networks.Params, Array, Array], tuple[Array, Array]]
    inverse: Callable[[networks.Params, Array, Array], Array]


def coupling_splines(hidden: tuple[int, ...], spec: Spec) -> Bijection:
    """Coupling layers of rational-quadratic splines: arXiv:1906.04032, section 3.

    Even and odd dimensions take turns, each moved given the observation and the others;
    with A = 1 there is a single layer, given the observation alone.

    Args:
      hidden: widths of the hidden layers of each layer's conditioner.
      spec: dimensions.
    """
    layers = COUPLING_LAYERS if spec.action_dim > 1 else 1
    outputs = distributions.spline_outputs(FLOW_BINS)

    def moved(layer: int) -> slice:
        return slice(layer % 2, spec.action_dim, 2)

    def kept(layer: int) -> slice:
        return slice(1 - layer % 2, spec.action_dim, 2)

    def size(dims: slice) -> int:
        return len(range(spec.action_dim)[dims])

    def conditioner(layer: int) -> networks.MLP:
        # Small outputs: the bijection starts close to the identity.
        return networks.MLP(
            hidden, size(moved(layer)) * outputs, out_init=networks.uniform(1e-3)
        )

    def splines(
        params: networks.Params, layer: int, obs: Array, x: Array
    ) -> distributions.Spline:
        given = jnp.concatenate([obs, x[:, kept(layer)]], axis=-1)
        raw = networks.apply(conditioner(layer), params[layer], given)
        return distributions.spline(raw.reshape(obs.shape[0], -1, outputs))

    def init(key: Key) -> networks.Params:
        return tuple(
            conditioner(layer).init(k, jnp.zeros((1, spec.obs_dim + size(kept(layer)))))
            for layer, k in enumerate(jax.random.split(key, layers))
        )

    def forward(params: networks.Params, obs: Array, x: Array) -> tuple[Array, Array]:
        log_det = jnp.zeros(x.shape[:1])
        for layer in range(layers):
            y, log_slope = distributions.spline_forward(
                splines(params, layer, obs, x), x[:, moved(layer)]
            )
            x = x.at[:, moved(layer)].set(y)
            log_det = log_det + jnp.sum(log_slope, axis=-1)
        return x, log_det

    def inverse(params: networks.Params, obs: Array, y: Array) -> Array:
        for layer in reversed(range(layers)):
            x = distributions.spline_inverse(
                splines(params, layer, obs, y), y[:, moved(layer)]
            )
            y = y.at[:, moved(layer)].set(x)
        return y

    return Bijection(init, forward, inverse)


def flow(hidden: tuple[int, ...], spec: Spec) -> Density:
    """The uniform density on the box, moved by `coupling_splines`.

    Bounds map onto bounds, so the density integrates to one over the box and is finite
    on its faces: recorded actions there need no shift inwards.  Atoms become a narrow
    peak, whose height the smallest bin and the largest slope limit.  Actions outside
    the box are moved onto it.

    Args:
      hidden: widths of the hidden layers of each of the networks, four if A > 1.
      spec: dimensions.
    """
    bijection = coupling_splines(hidden, spec)

    def log_prob(params: networks.Params, obs: Array, action: Array) -> Array:
        _, log_det = bijection.forward(params, obs, jnp.clip(action, -1.0, 1.0))
        return log_det - spec.action_dim * math.log(2.0)

    def sample(key: Key, params: networks.Params, obs: Array) -> Array:
        shape = (obs.shape[0], spec.action_dim)
        base = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
        return bijection.inverse(params, obs, base)

    return _exact(bijection.init, log_prob, sample)


def importance_weighted_bound(
    noise: Array,
    mean: Array,
    log_std: Array,
    decode: Callable[[Array], Array],
    decoder_log_std: float,
    action: Array,
) -> Array:
    """Lower bound of log p(a) in a model a = decode(z) + noise, z standard normal.

    `log 1/L sum_l p(a | z_l) p(z_l) / q(z_l)`: Burda et al. (2016), arXiv:1509.00519,
    equation 8.  In expectation it grows with L, from the ELBO to log p(a).

    Args:
      noise: `[L, B, Z]`, standard normal.
      mean: `[B, Z]`, of the proposal q.
      log_std: `[B, Z]`, of q.
      decode: latents `[L, B, Z]` -> means of the action `[L, B, A]`.
      decoder_log_std: of every dimension of the action given z.
      action: `[B, A]`.

    Returns:
      `[B]`, in nats.
    """
    z = mean[None] + jnp.exp(log_std)[None] * noise
    log_proposal = distributions.normal_log_prob(0.0, 0.0, noise) - log_std[None]
    log_prior = distributions.normal_log_prob(0.0, 0.0, z)
    decoded = decode(z)
    log_likelihood = distributions.normal_log_prob(
        decoded, decoder_log_std, jnp.broadcast_to(action[None], decoded.shape)
    )
    log_weight = jnp.sum(log_likelihood, axis=-1) + jnp.sum(
        log_prior - log_proposal, axis=-1
    )
    return jax.nn.logsumexp(log_weight, axis=0) - math.log(noise.shape[0])


def cvae(hidden: tuple[int, ...], spec: Spec) -> Density:
    """Conditional variational autoencoder, the density of SPOT.

    Wu et al. (2022), arXiv:2202.06239: latents of dimension 2 A, decoder mean by tanh,
    weights of the loss as in the authors' code, here scaled so that it is a negative
    ELBO in nats.  The decoder's standard deviation is fixed at sqrt(1/8) = 0.35, so the
    density over R^A is never sharper than that.  `log_prob` is the importance-weighted
    bound with 10 samples.

    `sample` follows the model, decoder's noise included, and clips; the authors draw
    latents cut off at 0.5 and no noise.

    Args:
      hidden: widths of the hidden layers, of encoder and decoder alike.
      spec: dimensions.
    """
    latent_dim = 2 * spec.action_dim
    encoder = networks.MLP(hidden, 2 * latent_dim)
    decoder = networks.MLP(hidden, spec.action_dim)

    def encode(
        params: networks.Params, obs: Array, action: Array
    ) -> tuple[Array, Array]:
        x = jnp.concatenate([obs, action], axis=-1)
        mean, raw = jnp.split(networks.apply(encoder, params["encoder"], x), 2, axis=-1)
        return mean, jnp.clip(raw, CVAE_LOG_STD_MIN, CVAE_LOG_STD_MAX)

    def decode(params: networks.Params, obs: Array, z: Array) -> Array:
        """Means of the action for latents `[..., B, Z]`."""
        obs = jnp.broadcast_to(
            obs[(None,) * (z.ndim - 2)], (*z.shape[:-1], obs.shape[-1])
        )
        x = jnp.concatenate([obs, z], axis=-1)
        return jnp.tanh(networks.apply(decoder, params["decoder"], x))

    def init(key: Key) -> networks.Params:
        encoder_key, decoder_key = jax.random.split(key)
        return {
            "encoder": encoder.init(
                encoder_key, jnp.zeros((1, spec.obs_dim + spec.action_dim))
            ),
            "decoder": decoder.init(
                decoder_key, jnp.zeros((1, spec.obs_dim + latent_dim))
            ),
        }

    def log_prob(key: Key, params: networks.Params, obs: Array, action: Array) -> Array:
        mean, log_std = encode(params, obs, action)
        return importance_weighted_bound(
            jax.random.normal(key, (CVAE_SAMPLES, *mean.shape)),
            mean,
            log_std,
            lambda z: decode(params, obs, z),
            CVAE_DECODER_LOG_STD,
            action,
        )

    def loss(key: Key, params: networks.Params, obs: Array, action: Array) -> Array:
        mean, log_std = encode(params, obs, action)
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        log_likelihood = distributions.normal_log_prob(
            decode(params, obs, z), CVAE_DECODER_LOG_STD, action
        )
        kl = 0.5 * (jnp.square(mean) + jnp.exp(2.0 * log_std) - 1.0) - log_std
        return jnp.mean(jnp.sum(kl, axis=-1) - jnp.sum(log_likelihood, axis=-1))

    def sample(key: Key, params: networks.Params, obs: Array) -> Array:
        latent_key, noise_key = jax.random.split(key)
        mean = decode(
            params, obs, jax.random.normal(latent_key, (obs.shape[0], latent_dim))
        )
        noise = jax.random.normal(noise_key, mean.shape)
        return jnp.clip(mean + math.exp(CVAE_DECODER_LOG_STD) * noise, -1.0, 1.0)

    return Density(init, log_prob, loss, sample)


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
    if kind == "flow":
        return flow(hidden, spec)
    if kind == "cvae":
        return cvae(hidden, spec)
    raise errors.unknown_name("behaviour density", kind, KINDS)
