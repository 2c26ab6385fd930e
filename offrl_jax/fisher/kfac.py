"""K-FAC for networks of flax `Dense` layers (Martens & Grosse 2015, arXiv:1503.05671).

The Fisher matrix of a layer's weights (kernel and bias stacked, `[in + 1, out]`) is
taken as `A kron G`: A the second moment of the layer's inputs with a 1 for the bias, G
that of the gradients of the log-likelihood with respect to the layer's outputs.  Other
layers are independent.  Exact for one input and one layer.

The targets behind G are drawn from the model, inside `kfac_factors`, and never taken
from data: that would be a factored *empirical* Fisher.

Parameters of no Dense layer (a free log standard deviation, a `LayerNorm`) get the
diagonal of the Fisher matrix, from the gradients of the same targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from offrl_jax.fisher.solvers import Numeric, solve_spd
from offrl_jax.fisher.tree_algebra import Tree
from offrl_jax.types import Array, Key

Forward = Callable[..., Tree]
"""`forward(params, *inputs) -> outputs`; leaves of inputs and outputs `[n, ...]`."""

_EXACT = jax.lax.Precision.HIGHEST
# Bounds of Martens & Grosse's pi; reached only where a factor is all but zero.
_SMALLEST_PI, _LARGEST_PI = 1e-4, 1e4


class KFACFactors(NamedTuple):
    """What `kfac_factors` estimates; a pytree of fixed structure, fit for `scan`.

    Attributes:
      dense: by the path of each layer, such as "MLP_0/Dense_1": A
        `[in + 1, in + 1]` (`[in, in]` without a bias) and G `[out, out]`.
      diagonal: by the path of each other parameter: the diagonal of its Fisher matrix,
        shaped like it.
    """

    dense: dict[str, tuple[Array, Array]]
    diagonal: dict[str, Array]


class _Trace:
    """What one evaluation of the model showed of its Dense layers, by path."""

    def __init__(self) -> None:
        self.inputs: dict[str, Array] = {}
        self.outputs: dict[str, jax.ShapeDtypeStruct] = {}
        self.biased: dict[str, bool] = {}


def _traced(
    forward: Forward, params: Tree, inputs: tuple, added: dict[str, Array] | None
) -> tuple[Tree, _Trace]:
    """Evaluates the model, adding `added` to the outputs of its Dense layers."""
    trace = _Trace()

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if not isinstance(context.module, nn.Dense):
            return out
        if context.method_name != "__call__":
            return out
        path = "/".join(context.module.path)
        x = args[0]
        if path in trace.inputs:
            raise ValueError(f"layer '{path}' is used twice: K-FAC needs it used once")
        if x.ndim != 2:
            raise ValueError(f"layer '{path}' has inputs {x.shape}: K-FAC needs [n, I]")
        if context.module.use_bias:
            x = jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1)
        trace.inputs[path] = x
        trace.outputs[path] = jax.ShapeDtypeStruct(out.shape, out.dtype)
        trace.biased[path] = context.module.use_bias
        return out if added is None else out + added[path]

    with nn.intercept_methods(intercept):
        return forward(params, *inputs), trace


def _shapes(forward: Forward, params: Tree, inputs: tuple) -> _Trace:
    """The trace without computing anything; its inputs are only shapes."""
    found: list[_Trace] = []

    def run(params: Tree, inputs: tuple) -> Tree:
        outputs, trace = _traced(forward, params, inputs, None)
        found.append(trace)
        return outputs

    jax.eval_shape(run, params, inputs)
    return found[0]


def _named(tree: Tree) -> list[str]:
    """Paths of the leaves, as flax names modules: without a leading "params"."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("params/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _leaf(path: str, name: str) -> str:
    """Path of a parameter of a layer; a model that is one layer has the path ""."""
    return f"{path}/{name}" if path else name


def _free(params: Tree, trace: _Trace) -> list[int]:
    """Numbers of the leaves that belong to no Dense layer."""
    names = _named(params)
    owned = {_leaf(path, "kernel") for path in trace.biased}
    owned |= {_leaf(path, "bias") for path, biased in trace.biased.items() if biased}
    if absent := sorted(owned - set(names)):
        raise ValueError(
            f"no parameters for {absent}: K-FAC needs one flax variable tree, "
            f"it got {names}"
        )
    return [index for index, name in enumerate(names) if name not in owned]


def kfac_factors(
    key: Key,
    forward: Forward,
    params: Tree,
    inputs: tuple,
    sample: Callable[[Key, Tree], Tree],
    log_prob: Callable[[Tree, Tree], Array],
    samples: int = 1,
) -> KFACFactors:
    """Factors of the true Fisher matrix, with outcomes drawn from the model.

    One forward pass and `samples` backward passes over the batch; a further one of
    each per sample and row if there are parameters outside of Dense layers.

    Args:
      key: for the outcomes.
      forward: `(params, *inputs) -> outputs`; calls flax modules, every Dense once.
      params: the variable tree of `module.init`, with or without its "params".
      inputs: arguments of `forward`, leaves `[n, ...]`.
      sample: `(key, outputs) -> y`, leaves `[n, ...]`, from the model.
      log_prob: `(outputs, y) -> [n]`, in nats.
      samples: outcomes per row.

    Returns:
      The factors, means over rows and outcomes.

    Raises:
      ValueError: a Dense layer used twice or on inputs that are not `[n, I]`, or
        parameters that are not those of the layers used.
    """
    shapes = _shapes(forward, params, inputs)
    free = _free(params, shapes)
    zeros = {path: jnp.zeros(s.shape, s.dtype) for path, s in shapes.outputs.items()}

    def perturbed(added: dict[str, Array]) -> tuple[Tree, dict[str, Array]]:
        outputs, trace = _traced(forward, params, inputs, added)
        return outputs, trace.inputs

    outputs, pull_back, layer_inputs = jax.vjp(perturbed, zeros, has_aux=True)

    def outcome(key: Key) -> tuple[dict[str, Array], list[Array]]:
        y = sample(key, outputs)
        slope = jax.grad(lambda out: jnp.sum(log_prob(out, y)))(outputs)
        (gradients,) = pull_back(slope)
        moments = {path: _moment(g) for path, g in gradients.items()}
        squares = _free_squares(forward, params, inputs, log_prob, y, free)
        return moments, squares

    drawn = jax.vmap(outcome)(jax.random.split(key, samples))
    moments, squares = jax.tree.map(lambda x: jnp.mean(x, axis=0), drawn)
    names = _named(params)
    return KFACFactors(
        dense={p: (_moment(x), moments[p]) for p, x in layer_inputs.items()},
        diagonal={names[i]: s for i, s in zip(free, squares, strict=True)},
    )


def _moment(rows: Array) -> Array:
    return jnp.matmul(rows.T, rows, precision=_EXACT) / float(rows.shape[0])


def _free_squares(
    forward: Forward,
    params: Tree,
    inputs: tuple,
    log_prob: Callable[[Tree, Tree], Array],
    y: Tree,
    free: list[int],
) -> list[Array]:
    """Mean squared score of the leaves numbered `free`."""
    leaves, structure = jax.tree.flatten(params)

    def of_row(chosen: list[Array], row: tuple, y_row: Tree) -> Array:
        changed = list(leaves)
        for index, leaf in zip(free, chosen, strict=True):
            changed[index] = leaf
        row, y_row = jax.tree.map(lambda x: x[None], (row, y_row))
        out = forward(jax.tree.unflatten(structure, changed), *row)
        return log_prob(out, y_row)[0]

    if not free:
        return []
    scores = jax.vmap(jax.grad(of_row), (None, 0, 0))(
        [leaves[index] for index in free], inputs, y
    )
    return [jnp.mean(jnp.square(score), axis=0) for score in scores]


def empty_factors(forward: Forward, params: Tree, inputs: tuple) -> KFACFactors:
    """Zeros in the structure of `kfac_factors`, to begin an average with.

    With `average_factors(old, new, min(1 - 1 / k, decay))` at the k-th update, counted
    from 1, as in ACKTR (arXiv:1708.05144), the zeros are forgotten at once.

    Args:
      forward, params, inputs: as in `kfac_factors`; nothing is evaluated.

    Raises:
      ValueError: as in `kfac_factors`.
    """
    trace = _shapes(forward, params, inputs)
    names, leaves = _named(params), jax.tree.leaves(params)

    def square(size: int) -> Array:
        return jnp.zeros((size, size))

    return KFACFactors(
        dense={
            path: (square(x.shape[1]), square(trace.outputs[path].shape[1]))
            for path, x in trace.inputs.items()
        },
        diagonal={names[i]: jnp.zeros_like(leaves[i]) for i in _free(params, trace)},
    )


def average_factors(old: KFACFactors, new: KFACFactors, decay: Numeric) -> KFACFactors:
    """`decay * old + (1 - decay) * new`, with `decay` `[]` in [0, 1]."""
    return jax.tree.map(lambda o, n: n + decay * (o - n), old, new)


def kfac_direction(gradient: Tree, factors: KFACFactors, damping: Numeric) -> Tree:
    """`(F + damping I)^-1 g` with F as K-FAC sees it.

    Per layer `(A + pi sqrt(damping) I)^-1 W (G + sqrt(damping) / pi I)^-1` with
    `pi^2 = (tr A / dim A) / (tr G / dim G)`: section 6.3 of Martens & Grosse 2015,
    whose product of the damped factors only approximates `A kron G + damping I`.
    Elsewhere `g / (diagonal + damping)`.

    Args:
      gradient: structured like the parameters.
      factors: of the same parameters.
      damping: `[]`, positive, in units of the Fisher matrix.

    Returns:
      Structured like `gradient`.

    Raises:
      ValueError: the factors are not those of this tree.
    """
    leaves, structure = jax.tree.flatten(gradient)
    place = {name: index for index, name in enumerate(_named(gradient))}
    covered = set(factors.diagonal)
    for path in factors.dense:
        covered |= {_leaf(path, "kernel"), _leaf(path, "bias")} & set(place)
    if covered != set(place):
        raise ValueError(
            f"factors cover {sorted(covered)}, the gradient has {sorted(place)}"
        )
    for path, (a, g) in factors.dense.items():
        kernel = place[_leaf(path, "kernel")]
        bias = place.get(_leaf(path, "bias"))
        weights = leaves[kernel]
        if bias is not None:
            weights = jnp.concatenate([weights, leaves[bias][None, :]], axis=0)
        direction = _factored(weights, a, g, damping)
        leaves[kernel] = direction[: leaves[kernel].shape[0]]
        if bias is not None:
            leaves[bias] = direction[-1]
    for name, diagonal in factors.diagonal.items():
        leaves[place[name]] = leaves[place[name]] / (diagonal + damping)
    return jax.tree.unflatten(structure, leaves)


def _factored(weights: Array, a: Array, g: Array, damping: Numeric) -> Array:
    """The direction of one layer, `[in + 1, out]`."""
    size_a, size_g = a.shape[0], g.shape[0]
    mean_a = jnp.trace(a) / float(size_a)
    mean_g = jnp.trace(g) / float(size_g)
    # A ratio of zeros, before any factor is known, is taken as 1.
    known = (mean_a > 0.0) & (mean_g > 0.0)
    ratio = jnp.where(known, mean_a, 1.0) / jnp.where(known, mean_g, 1.0)
    pi = jnp.clip(jnp.sqrt(ratio), _SMALLEST_PI, _LARGEST_PI)
    root = jnp.sqrt(jnp.asarray(damping, a.dtype))
    left = solve_spd(a + pi * root * jnp.eye(size_a, dtype=a.dtype), weights)
    damped_g = g + root / pi * jnp.eye(size_g, dtype=g.dtype)
    return solve_spd(damped_g, left.T).T
