"""Fisher preconditioners as optax transformations, for one score or k of them.

The rule is that of "rank-1 natural policy gradient" (arXiv:2601.18626), whose formula
is known here from summaries of the paper; see docs/fisher.md for what is ours.

**Convention.**  With `F = damping I + v v^T` (or `damping I + V^T V / k`)

    deflate=False   emits       F^-1 g
    deflate=True    emits  u =  damping F^-1 g = g - c v      (the default)

so that the learning rate of the default is eta / damping: `damping -> inf` is plain
gradient descent at that very rate, and `damping -> 0` only removes the component along
v.  F is symmetric: the sign of the gradient does not matter.

Scores come as the extra argument `score` of `update`, which `optax.chain` hands on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from offrl_jax.fisher import solvers, tree_algebra
from offrl_jax.fisher.solvers import Numeric
from offrl_jax.fisher.tree_algebra import Tree, inner, norm2
from offrl_jax.types import Array

# A relative damping is 0 as long as all scores were: nothing is divided by it then.
_SMALLEST_DAMPING = 1e-12
_SMALLEST_KL = 1e-30


class ScaleByFisherState(NamedTuple):
    """State of `scale_by_rank1_fisher` and `scale_by_woodbury_fisher`.

    g is what came in, u what goes out, F the damped matrix that was used.  With blocks,
    sums go over blocks; L is their number.  All float32 but the count.

    Attributes:
      count: `[]` int32, updates so far.
      score_average: `[L]`, running mean of `|v|^2` per block (of the mean over k), as
        `decay * old + (1 - decay) * new` from 0, not yet divided by `1 - decay^count`.
      damping: `[L]`, the damping of the last update, absolute, in squared scores.
      cos2: `[]`, `(v.g)^2 / (v.v g.g)`, squared cosine of score and gradient; the mean
        over k scores; with blocks the share of `|g|^2` along the scores of the blocks.
      removed: `[]`, `(v.g)^2 / ((damping + v.v) g.g) = c v.g / g.g`, by how much of
        itself the gradient's square shrank in `g . u / g.g = 1 - removed` (deflated).
      score_norm2: `[]`, `|v|^2`; the mean over k scores.
      step: `[]`, factor of the trust region; 1 without one.
      predicted_kl: `[]`, `1/2 u^T F u` in nats: the KL that the damped F predicts for a
        parameter step of u.  A later learning rate multiplies it by its square.
    """

    count: Array
    score_average: Array
    damping: Array
    cos2: Array
    removed: Array
    score_norm2: Array
    step: Array
    predicted_kl: Array


class ScaleByTrustRegionState(NamedTuple):
    """State of `scale_by_trust_region`.

    Attributes:
      step: `[]`, the last factor.
      predicted_kl: `[]`, `1/2 u^T F u` in nats of what went out.
    """

    step: Array
    predicted_kl: Array


def trust_region_rate(kl: Numeric, largest_step: Numeric, quadratic: Array) -> Array:
    """`min(largest_step, sqrt(2 kl / d^T F d))`: the rate that spends a KL of `kl`.

    Args:
      kl: `[]`, in nats.
      largest_step: `[]`.
      quadratic: `[]`, `d^T F d` of the direction at rate 1: `d . g` for
        `d = F^-1 g`, and `damping * (d . g)` for `d = damping F^-1 g`.
    """
    quadratic = jnp.maximum(quadratic, _SMALLEST_KL)
    reach = jnp.sqrt(2.0 * jnp.asarray(kl, quadratic.dtype) / quadratic)
    return jnp.minimum(jnp.asarray(largest_step, quadratic.dtype), reach)


def scale_by_rank1_fisher(
    damping: Numeric,
    *,
    deflate: bool = True,
    blockwise: bool | str = False,
    relative: bool = False,
    decay: Numeric = 0.99,
    kl: Numeric | None = None,
    largest_step: Numeric = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions with the inverse of `damping I + v v^T` (Sherman & Morrison 1950).

    `update(updates, state, params=None, *, score)`: `score` is v, structured and shaped
    like the updates: the gradient of one sampled log-likelihood.

    Args:
      damping: `[]`, positive; a float or a traced scalar.  In squared scores, or
        relative to them.
      deflate: emits `g - c v`; otherwise that divided by the damping.
      blockwise: False: one v for all parameters.  True or "layer": every layer (leaves
        with the same parent) for itself.  "leaf": every leaf.
      relative: the damping is `damping` times the running mean of `|v|^2`, the current
        one included and the start from 0 corrected for; per block.  Its smallest value
        is 1e-12.
      decay: of that running mean, in [0, 1).
      kl: None, or the KL in nats that the emitted update may be predicted to cost: it
        is then scaled by `trust_region_rate`, and wants no other learning rate than -1.
      largest_step: largest such factor, in the convention chosen by `deflate`.

    Returns:
      A transformation with a `ScaleByFisherState`.  `update` raises ValueError without
      a score or with one that does not fit.
    """
    per = _blocks_per(blockwise)

    def measure(score: Tree, g: Tree, lam: Array) -> tuple[Tree, Array, Array]:
        along, size, length = inner(score, g), norm2(score), norm2(g)
        c = solvers.rank1_coefficient(score, g, lam)
        kept = tree_algebra.add_scaled(g, -c, score)
        return kept, c * along, _cos2(along, size, length) * length

    return _transformation(
        measure, norm2, 0, per, damping, deflate, relative, decay, kl, largest_step
    )


def scale_by_woodbury_fisher(
    damping: Numeric,
    *,
    deflate: bool = True,
    blockwise: bool | str = False,
    relative: bool = False,
    decay: Numeric = 0.99,
    kl: Numeric | None = None,
    largest_step: Numeric = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions with the inverse of `damping I + V^T V / k` (Woodbury 1950).

    `update(updates, state, params=None, *, score)`: the leaves of `score` have a
    leading axis k; with k = 1 it is `scale_by_rank1_fisher`.

    Args:
      damping, deflate, blockwise, relative, decay, kl, largest_step: as there, `|v|^2`
        being the mean over the k scores.

    Returns:
      A transformation with a `ScaleByFisherState`.  `update` raises ValueError without
      a score or with one that does not fit.
    """
    per = _blocks_per(blockwise)

    def measure(scores: Tree, g: Tree, lam: Array) -> tuple[Tree, Array, Array]:
        gram, along = solvers.score_products(scores, g)
        length = norm2(g)
        coefficients = solvers.woodbury_coefficients(gram, along, lam)
        kept = solvers.remove_scores(scores, g, coefficients)
        cos2 = jnp.mean(_cos2(along, jnp.diagonal(gram), jnp.full_like(along, length)))
        return kept, jnp.sum(along * coefficients), cos2 * length

    def mean_norm2(scores: Tree) -> Array:
        return norm2(scores) / float(jax.tree.leaves(scores)[0].shape[0])

    return _transformation(
        measure, mean_norm2, 1, per, damping, deflate, relative, decay, kl, largest_step
    )


def _blocks_per(blockwise: bool | str) -> str:
    if isinstance(blockwise, str):
        return blockwise
    return "layer" if blockwise else "all"


def _cos2(along: Array, size: Array, length: Array) -> Array:
    """Squared cosine from `v.g`, `v.v`, `g.g`; 0 where v or g is."""
    known = (size > 0.0) & (length > 0.0)
    # One root at a time: the product of two small squares underflows in float32.
    cosine = along / jnp.sqrt(jnp.where(known, size, 1.0))
    cosine = cosine / jnp.sqrt(jnp.where(known, length, 1.0))
    return jnp.where(known, jnp.square(cosine), 0.0)


def _along(length: Array, removed: Array, damping: Array, size: Array) -> Array:
    """`u . g` of the deflated u, without another pass over parameters.

    `g.g - c . V g`, and not below `g.g damping / (damping + |v|^2)`, which no F of that
    trace undercuts: where the difference has lost its digits, the bound has not.
    """
    damping, size = damping.astype(length.dtype), size.astype(length.dtype)
    total = damping + size
    share = jnp.where(total > 0.0, damping / jnp.where(total > 0.0, total, 1.0), 0.0)
    return jnp.maximum(length - removed, share * length)


def _transformation(
    measure: Any,
    score_size: Any,
    leading: int,
    per: str,
    damping: Numeric,
    deflate: bool,
    relative: bool,
    decay: Numeric,
    kl: Numeric | None,
    largest_step: Numeric,
) -> optax.GradientTransformationExtraArgs:
    """Blocks, damping, convention, trust region and state, common to both rules.

    `measure(score, g, damping)` returns `g - V^T c`, `c . V g` and `cos2 * g.g` of one
    block, `score_size(score)` its `|v|^2`.
    """

    def init(params: optax.Params) -> ScaleByFisherState:
        blocks = len(tree_algebra.block_indices(params, per))
        zero = jnp.zeros((), jnp.float32)
        return ScaleByFisherState(
            count=jnp.zeros((), jnp.int32),
            score_average=jnp.zeros((blocks,), jnp.float32),
            damping=jnp.zeros((blocks,), jnp.float32),
            cos2=zero,
            removed=zero,
            score_norm2=zero,
            step=zero,
            predicted_kl=zero,
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        score: Tree | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ScaleByFisherState]:
        del params, extra
        assert isinstance(state, ScaleByFisherState)
        if score is None:
            raise ValueError(
                "the Fisher preconditioner needs a score: call "
                "update(updates, state, params, score=...) with the gradient of a "
                "sampled log-likelihood"
            )
        tree_algebra.check_like("score", score, updates, leading)
        blocks = tree_algebra.block_indices(updates, per)
        scores = tree_algebra.take_blocks(score, blocks)
        gradients = tree_algebra.take_blocks(updates, blocks)

        sizes = jnp.stack([score_size(v) for v in scores]).astype(jnp.float32)
        count = state.count + 1
        rho = jnp.asarray(decay, jnp.float32)
        average = rho * state.score_average + (1.0 - rho) * sizes
        lam = jnp.full_like(sizes, jnp.asarray(damping, jnp.float32))
        if relative:
            corrected = average / (1.0 - rho ** count.astype(jnp.float32))
            lam = jnp.maximum(lam * corrected, _SMALLEST_DAMPING)

        parts, taken, aligned, quadratic, lengths = [], [], [], [], []
        for index, (v, g) in enumerate(zip(scores, gradients, strict=True)):
            kept, removed, cos2 = measure(v, g, lam[index])
            lengths.append(norm2(g))
            # u^T F u: u . g for u = F^-1 g, damping u . g for u = damping F^-1 g.
            form = _along(lengths[-1], removed, lam[index], sizes[index])
            if deflate:
                form = form * lam[index].astype(form.dtype)
            else:
                kept = tree_algebra.scaled(1.0 / lam[index], kept)
                form = form / lam[index].astype(form.dtype)
            parts.append(kept)
            taken.append(removed)
            aligned.append(cos2)
            quadratic.append(form)
        emitted = tree_algebra.put_blocks(updates, blocks, parts)
        form = tree_algebra.total(quadratic)
        step = jnp.ones_like(form)
        if kl is not None:
            step = trust_region_rate(kl, largest_step, form)
            emitted = tree_algebra.scaled(step, emitted)

        length = tree_algebra.total(lengths)
        length = jnp.where(length > 0.0, length, 1.0)
        new = ScaleByFisherState(
            count=count,
            score_average=average,
            damping=lam,
            cos2=tree_algebra.total(aligned) / length,
            removed=tree_algebra.total(taken) / length,
            score_norm2=jnp.sum(sizes),
            step=step,
            predicted_kl=0.5 * jnp.square(step) * form,
        )
        floats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), new)
        return emitted, floats._replace(count=count)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_trust_region(
    kl: Numeric, largest_step: Numeric = 1.0, *, scale: Numeric = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Scales a natural direction u to a predicted KL of `kl`, at most `largest_step`.

    `update(updates, state, params=None, *, gradient)`: `gradient` is the g that u was
    made from.  The quadratic form is `u^T F u = scale * (u . g)`: exact for
    `u = F^-1 g` with `scale = 1`, and for `u = damping F^-1 g`, the deflated
    convention, with `scale = damping`; not for anything between, such as momentum.  A
    damping that is relative is known only inside of the preconditioner: use its `kl`.

    Args:
      kl: `[]`, in nats.
      largest_step: `[]`, largest factor.
      scale: `[]`, see above.

    Returns:
      A transformation with a `ScaleByTrustRegionState`.  `update` raises ValueError
      without a gradient or with one that does not fit.
    """

    def init(params: optax.Params) -> ScaleByTrustRegionState:
        del params
        zero = jnp.zeros((), jnp.float32)
        return ScaleByTrustRegionState(zero, zero)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        gradient: Tree | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ScaleByTrustRegionState]:
        del state, params, extra
        if gradient is None:
            raise ValueError(
                "the trust region needs the gradient before preconditioning: call "
                "update(updates, state, params, gradient=...)"
            )
        tree_algebra.check_like("gradient", gradient, updates)
        # The form of -u is that of u, so the order with a change of sign is free.
        along = jnp.abs(inner(updates, gradient))
        form = along * jnp.asarray(scale, along.dtype)
        step = trust_region_rate(kl, largest_step, form)
        predicted = 0.5 * jnp.square(step) * form
        new = ScaleByTrustRegionState(
            step.astype(jnp.float32), predicted.astype(jnp.float32)
        )
        return tree_algebra.scaled(step, updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def diagnostics(opt_state: optax.OptState) -> dict[str, Array]:
    """What the transformations of this module, anywhere in a chain, last measured.

    Returns:
      Scalars `[]` under the names of `ScaleByFisherState` but for the running mean,
      float32 (`count` too), `damping` as its mean over blocks; `step` and
      `predicted_kl` of a `scale_by_trust_region` in place of those before it.  Empty if
      there is none.
    """
    ours = (ScaleByFisherState, ScaleByTrustRegionState)
    found: dict[str, Array] = {}
    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ours)):
        if isinstance(state, ScaleByFisherState):
            found.update(
                {
                    "count": state.count.astype(jnp.float32),
                    "damping": jnp.mean(state.damping, axis=-1),
                    "cos2": state.cos2,
                    "removed": state.removed,
                    "score_norm2": state.score_norm2,
                }
            )
        if isinstance(state, ours):
            found.update(step=state.step, predicted_kl=state.predicted_kl)
    return found
