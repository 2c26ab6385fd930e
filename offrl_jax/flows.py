"""Flow matching on straight paths: velocity fields, integrators, densities, scores.

Lipman et al. (2023), arXiv:2210.02747; Liu, Gong & Liu (2023), arXiv:2209.03003.  Time
runs from 0 (noise z, standard normal) to 1 (action a) along x_t = (1 - t) z + t a.  The
velocity field is the conditional expectation of the path's direction,

    v(t, x) = E[a - z | x_t = x],   trained by   E |v(t, x_t) - (a - z)|^2,

and dx/dt = v(t, x) carries noise into actions.  Everything but the networks takes a
field as a function `(x, t) -> velocity`, in which observations and parameters are
already bound, so that tests can put in fields that are known on paper.

Actions of a flow are clipped to [-1, 1] once, after the last step: clipping in between
would change the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from offrl_jax import errors, networks
from offrl_jax.types import Array, Key

Field = Callable[[Array, Array], Array]
"""`(x [..., A], t [...]) -> velocity [..., A]`, each row on its own."""

INTEGRATORS = ("euler", "midpoint", "rk4")
"""Explicit methods of order 1, 2 and 4, with 1, 2 and 4 evaluations per step."""

AGGREGATIONS = ("mean", "min")
"""How the values of several critics become one: FQL's default, and clipped double Q."""

# Integrations of up to so many steps are compiled without a loop: on GPUs each of its
# turns would cost launches, and policies take about ten steps.
_WRITTEN_OUT = 16


def xavier_uniform(
    fan_in: int,
) -> tuple[networks.Initializer, networks.Initializer]:
    """Kernel uniform of variance 2 / (fan_in + fan_out), bias zero."""
    del fan_in
    return nn.initializers.xavier_uniform(), nn.initializers.zeros_init()


def gelu_mlp(
    hidden: tuple[int, ...], out_dim: int, layer_norm: bool = False
) -> networks.MLP:
    """The perceptron of the flow policies' authors: GELU (in its tanh approximation),
    normalised after it if at all, `xavier_uniform`."""
    return networks.MLP(
        hidden, out_dim, layer_norm, xavier_uniform, xavier_uniform, nn.gelu
    )


def gelu_critic(hidden: tuple[int, ...], layer_norm: bool) -> networks.Critic:
    """A critic `(obs [..., O], action [..., A]) -> [...]` that is a `gelu_mlp`."""
    return networks.Critic(hidden, layer_norm, xavier_uniform, xavier_uniform, nn.gelu)


def gelu_value(hidden: tuple[int, ...], layer_norm: bool) -> networks.Value:
    """A state value `obs [..., O] -> [...]` that is a `gelu_mlp`."""
    return networks.Value(hidden, layer_norm, xavier_uniform, xavier_uniform, nn.gelu)


class Velocity(nn.Module):
    """Velocity field `(obs [..., O], x [..., A], t [...]) -> [..., A]`, unbounded.

    The time enters as it is, as one more input.

    Attributes:
      hidden: widths of the hidden layers.
      action_dim: A.
    """

    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs: Array, x: Array, t: Array) -> Array:
        """The velocity at `x` and time `t`."""
        inputs = jnp.concatenate([obs, x, t[..., None]], axis=-1)
        return gelu_mlp(self.hidden, self.action_dim)(inputs)


class ActionMap(nn.Module):
    """Map of actions or noise `(obs [..., O], x [..., A]) -> [..., A]`, unbounded.

    Attributes:
      hidden: widths of the hidden layers.
      action_dim: A.
    """

    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs: Array, x: Array) -> Array:
        """The image of `x`."""
        inputs = jnp.concatenate([obs, x], axis=-1)
        return gelu_mlp(self.hidden, self.action_dim)(inputs)


def all_values(
    critic: networks.Critic,
    params: tuple[networks.Params, ...],
    obs: Array,
    action: Array,
) -> Array:
    """Values of every critic, `[E, ...]`, at `obs` `[..., O]`, `action` `[..., A]`."""
    return jnp.stack([networks.apply(critic, member, obs, action) for member in params])


def pooled(values: Array, aggregation: str) -> Array:
    """Over the critics of `values` `[E, ...]`: one of `AGGREGATIONS`.

    Raises:
      ValueError: an aggregation that is none of them.
    """
    if aggregation == "mean":
        return jnp.mean(values, axis=0)
    if aggregation == "min":
        return jnp.min(values, axis=0)
    raise ValueError(f"aggregation is '{aggregation}'; choose one of {AGGREGATIONS}")


def field_of(velocity: Velocity, params: networks.Params, obs: Array) -> Field:
    """The velocity field in `obs` `[..., O]`, for `x` `[..., A]` with the same axes."""
    return lambda x, t: networks.apply(velocity, params, obs, x, t)


def interpolate(noise: Array, action: Array, t: Array) -> Array:
    """The straight path `x_t = (1 - t) noise + t action`.

    Args:
      noise: `[..., A]`.
      action: `[..., A]`.
      t: `[...]`, in [0, 1].

    Returns:
      `[..., A]`.
    """
    t = t[..., None]
    return (1.0 - t) * noise + t * action


def matching_loss(field: Field, noise: Array, action: Array, t: Array) -> Array:
    """Conditional flow matching, averaged over the batch **and** action dimensions.

    Lipman et al. (2023), equation 14 for the straight path; it is least, over all
    fields, at `v(t, x) = E[action - noise | x_t = x]`.

    Args:
      field: velocity field.
      noise: `[B, A]`, standard normal.
      action: `[B, A]`, data.
      t: `[B]`, uniform in [0, 1].

    Returns:
      The loss, `[]`.
    """
    velocity = field(interpolate(noise, action, t), t)
    return jnp.mean(jnp.square(velocity - (action - noise)))


def keyed_matching_loss(key: Key, field: Field, action: Array) -> Array:
    """`matching_loss` of `action` `[B, A]` at noise and times drawn with `key`."""
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, action.shape)
    return matching_loss(
        field, noise, action, jax.random.uniform(time_key, action.shape[:1])
    )


def _step(field: Field, method: str, x: Array, t: Array, h: float) -> Array:
    """One step of size `h` (negative: backwards) from `x` `[..., A]` at `t` `[...]`."""
    first = field(x, t)
    if method == "euler":
        return x + h * first
    second = field(x + (0.5 * h) * first, t + 0.5 * h)
    if method == "midpoint":
        return x + h * second
    third = field(x + (0.5 * h) * second, t + 0.5 * h)
    fourth = field(x + h * third, t + h)
    return x + (h / 6.0) * (first + 2.0 * second + 2.0 * third + fourth)


def integrate(
    field: Field,
    x: Array,
    steps: int,
    method: str = "euler",
    start: float = 0.0,
    stop: float = 1.0,
) -> Array:
    """Solves dx/dt = v(t, x) in `steps` equal steps; nothing is clipped.

    Args:
      field: velocity field.
      x: `[..., A]`, at time `start`.
      steps: structural; 1 or more.
      method: one of `INTEGRATORS`.
      start: time of `x`.
      stop: time of the result; before `start` to go backwards.

    Returns:
      `[..., A]`, at time `stop`.

    Raises:
      UsageError: no step, or an unknown method.
    """
    if method not in INTEGRATORS:
        raise errors.unknown_name("integrator", method, INTEGRATORS)
    if steps < 1:
        raise errors.UsageError(f"a flow in {steps} steps: take 1 or more")
    h = (stop - start) / steps

    def advance(x: Array, i: Array) -> tuple[Array, None]:
        t = jnp.full(x.shape[:-1], start + h * i)
        return _step(field, method, x, t, h), None

    times = jnp.arange(steps, dtype=x.dtype)
    x, _ = jax.lax.scan(advance, x, times, unroll=steps <= _WRITTEN_OUT)
    return x


def sample(field: Field, noise: Array, steps: int, method: str = "euler") -> Array:
    """Actions of the flow from `noise` `[..., A]`, clipped to [-1, 1] at the end."""
    return jnp.clip(integrate(field, noise, steps, method), -1.0, 1.0)


def divergence(function: Callable[[Array], Array], x: Array) -> Array:
    """Exact divergence `[...]` of a row-wise map `[..., A] -> [..., A]` at `x`.

    A directional derivatives, one per dimension: for small A.
    """

    def diagonal(direction: Array) -> Array:
        tangent = jnp.broadcast_to(direction, x.shape)
        _, derivative = jax.jvp(function, (x,), (tangent,))
        return jnp.sum(derivative * tangent, axis=-1)

    basis = jnp.eye(x.shape[-1]).reshape(-1, *(1,) * (x.ndim - 1), x.shape[-1])
    return jnp.sum(jax.vmap(diagonal)(basis), axis=0)


def log_density(
    field: Field, action: Array, steps: int, method: str = "rk4"
) -> tuple[Array, Array]:
    """Exact log density of the flow, and the noise that it came from.

    Instantaneous change of variables (Chen et al. 2018, arXiv:1806.07366, theorem 1):
    `log p(a) = log N(z) - integral of div v(t, x_t) over t`, solved backwards from the
    action.  It costs A + 1 derivatives of the field per evaluation: an oracle for small
    A, not a loss.  Of the flow before the clip.

    Args:
      field: velocity field.
      action: `[..., A]`.
      steps: structural; 1 or more.
      method: one of `INTEGRATORS`.

    Returns:
      `[...]` in nats, up to the error of the integrator, and `[..., A]`.
    """

    def augmented(state: Array, t: Array) -> Array:
        x = state[..., :-1]
        rate = divergence(lambda y: field(y, t), x)
        return jnp.concatenate([field(x, t), rate[..., None]], axis=-1)

    nothing = jnp.zeros((*action.shape[:-1], 1))
    state = jnp.concatenate([action, nothing], axis=-1)
    state = integrate(augmented, state, steps, method, start=1.0, stop=0.0)
    # Backwards in time, the last entry is minus the integral already.
    noise, change = state[..., :-1], state[..., -1]
    log_noise = -0.5 * jnp.sum(jnp.square(noise) + math.log(2.0 * math.pi), axis=-1)
    return log_noise + change, noise


def score(velocity: Array, x: Array, t: Array) -> Array:
    """Gradient of `log p_t` at `x`, from the velocity: `(t v - x) / (1 - t)`.

    Exact on the straight path: E[z | x_t = x] = x - t v, and by Tweedie's formula the
    score of x_t = t a + (1 - t) z is -E[z | x_t] / (1 - t).  It is the score of the
    time-t density, the action's blurred by noise of 1 - t; at t = 1 it does not exist.

    Args:
      velocity: `[..., A]`, the field's at `x` and `t`.
      x: `[..., A]`.
      t: `[...]`, in [0, 1).

    Returns:
      `[..., A]`.
    """
    t = t[..., None]
    return (t * velocity - x) / (1.0 - t)


def scaled_velocity(velocity: Array, t: Array) -> Array:
    """`v / (1 - t)`: what FiDec's released code takes for the score (second-hand).

    The exact score is this minus `E[action | x_t] / (1 - t)`.  Without that term it
    points along the path, to where actions lie, and at the mode of a density it
    vanishes only if the mode is 0.

    Args:
      velocity: `[..., A]`.
      t: `[...]`, in [0, 1).

    Returns:
      `[..., A]`.
    """
    return velocity / (1.0 - t[..., None])


def repeated(obs: Array, count: int) -> Array:
    """Each observation `count` times: `[B, O] -> [B, count, O]`."""
    return jnp.broadcast_to(obs[:, None], (obs.shape[0], count, obs.shape[1]))


def best_of(values: Array, candidates: Array) -> Array:
    """The candidate of the highest value: `[B, N], [B, N, A] -> [B, A]`."""
    best = jnp.argmax(values, axis=1)[:, None, None]
    return jnp.take_along_axis(candidates, best, axis=1)[:, 0]
