"""Dense Fisher matrices `[d, d]`, for models of up to some thousand parameters.

Three things share the name, and none may stand in for another:

    true, exact        mean_s E_{y ~ p(.|x_s; theta)} psi psi^T, in closed form
    true, Monte Carlo  the same, with y drawn from the model: unbiased
    empirical          mean_s psi psi^T at the data's own y

The empirical one is no estimate of the other two: at a perfect fit it vanishes, and it
equals them only where the model is true and fitted (Kunstner, Balles & Hennig 2019,
"Limitations of the empirical Fisher approximation", arXiv:1905.12558).

`x` is a pytree with a leading axis n, the mean is over n, and the order of parameters
is that of `ravel_pytree`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from offrl_jax.fisher.scores import LogProb, flatten_scores, per_sample_scores
from offrl_jax.fisher.tree_algebra import Tree
from offrl_jax.types import Array, Key

# The default on NVIDIA GPUs, TF32, keeps three digits of a float32 product.
_EXACT = jax.lax.Precision.HIGHEST


def second_moment(scores: Array) -> Array:
    """`mean_s psi_s psi_s^T`, `[n, d] -> [d, d]`, not centred."""
    return jnp.matmul(scores.T, scores, precision=_EXACT) / float(scores.shape[0])


def _jacobians(outputs: Callable[..., Array], params: Tree, x: Tree) -> Array:
    """`[n, K, d]` of `outputs(params, x_s) -> [K]`."""
    flat, unravel = ravel_pytree(params)

    def of(vector: Array, sample: Tree) -> Array:
        return outputs(unravel(vector), sample)

    return jax.vmap(jax.jacrev(of), (None, 0))(flat, x)


def categorical_fisher(
    logits: Callable[[Tree, Tree], Array], params: Tree, x: Tree
) -> Array:
    """True Fisher matrix of a categorical model, by enumeration of its outcomes.

    `mean_s sum_a p(a|x_s) psi psi^T`.

    Args:
      logits: `(params, one x) -> [K]`.
      params: any pytree.
      x: leading axis n.

    Returns:
      `[d, d]`.
    """

    def log_probs(theta: Tree, sample: Tree) -> Array:
        return jax.nn.log_softmax(logits(theta, sample))

    scores = _jacobians(log_probs, params, x)
    weight = jnp.exp(jax.vmap(log_probs, (None, 0))(params, x))
    rows = (jnp.sqrt(weight)[..., None] * scores).reshape(-1, scores.shape[-1])
    # The weights of a state add up to 1: the mean is over states, not over rows.
    return second_moment(rows) * float(scores.shape[1])


def gaussian_fisher(
    mean_and_log_std: Callable[[Tree, Tree], tuple[Array, Array]],
    params: Tree,
    x: Tree,
) -> Array:
    """True Fisher matrix of a diagonal Gaussian with log standard deviations.

    `mean_s [ J_mu^T diag(1 / sigma^2) J_mu + 2 J_ls^T J_ls ]`; the cross terms vanish.
    A tanh behind the sample changes nothing: its slope does not depend on theta.

    Args:
      mean_and_log_std: `(params, one x) -> ([A], [A])`.
      params: any pytree.
      x: leading axis n.

    Returns:
      `[d, d]`.
    """

    def outputs(theta: Tree, sample: Tree) -> Array:
        return jnp.concatenate(mean_and_log_std(theta, sample))

    def output_fisher(out: Array) -> Array:
        return gaussian_output_fisher(*jnp.split(out, 2))

    return output_space_fisher(outputs, output_fisher, params, x)


def categorical_output_fisher(logits: Array) -> Array:
    """`diag(p) - p p^T`, `[K] -> [K, K]`: Fisher matrix with respect to logits."""
    p = jax.nn.softmax(logits)
    return jnp.diag(p) - p[:, None] * p[None, :]


def gaussian_output_fisher(mean: Array, log_std: Array) -> Array:
    """`diag(1 / sigma^2, 2)`, `[2 A, 2 A]`, with respect to `(mean, log_std)`."""
    precision = jnp.exp(-2.0 * log_std)
    return jnp.diag(jnp.concatenate([precision, jnp.full_like(mean, 2.0)]))


def output_space_fisher(
    outputs: Callable[[Tree, Tree], Array],
    output_fisher: Callable[[Array], Array],
    params: Tree,
    x: Tree,
) -> Array:
    """True Fisher matrix through that of the outputs, `mean_s J^T F_out J`.

    Equals the generalised Gauss-Newton matrix of the log-likelihood (Martens 2020,
    "New insights and perspectives on the natural gradient method", arXiv:1412.1193).

    Args:
      outputs: `(params, one x) -> [K]`, what the distribution is made of.
      output_fisher: `[K] -> [K, K]`, its Fisher matrix with respect to them.
      params: any pytree.
      x: leading axis n.

    Returns:
      `[d, d]`.
    """
    jacobian = _jacobians(outputs, params, x)
    middle = jax.vmap(lambda s: output_fisher(outputs(params, s)))(x)
    right = jnp.einsum("nkl,nld->nkd", middle, jacobian, precision=_EXACT)
    total = jnp.einsum("nkc,nkd->cd", jacobian, right, precision=_EXACT)
    return total / float(jacobian.shape[0])


def monte_carlo_fisher(
    key: Key,
    sample: Callable[[Key, Tree, Tree], Tree],
    log_prob: LogProb,
    params: Tree,
    x: Tree,
    samples: int = 1,
) -> Array:
    """True Fisher matrix, estimated without bias from outcomes drawn of the model.

    Its rank is at most `n * samples`; its error falls as `1 / sqrt(n * samples)`.

    Args:
      key: for the outcomes.
      sample: `(key, params, one x) -> y`, from the model itself.
      log_prob: `(params, one x, y) -> []`.
      params: any pytree.
      x: leading axis n.
      samples: outcomes per x.

    Returns:
      `[d, d]`.
    """
    n = jax.tree.leaves(x)[0].shape[0]

    def one(key: Key) -> Array:
        y = jax.vmap(sample, (0, None, 0))(jax.random.split(key, n), params, x)
        return flatten_scores(per_sample_scores(log_prob, params, x, y))

    scores = jax.vmap(one)(jax.random.split(key, samples))
    return second_moment(scores.reshape(-1, scores.shape[-1]))


def empirical_fisher(log_prob: LogProb, params: Tree, x: Tree, y: Tree) -> Array:
    """Second moment of the scores at the data's own outcomes: not the Fisher matrix.

    Args:
      log_prob: `(params, one x, one y) -> []`.
      params: any pytree.
      x, y: leading axis n.

    Returns:
      `[d, d]`.
    """
    return second_moment(flatten_scores(per_sample_scores(log_prob, params, x, y)))
