"""Fisher preconditioners on the three spirals of docs/fisher.md, outside of RL.

Examples:
  python benchmarks/onpolicy/spirals.py
  python benchmarks/onpolicy/spirals.py --optimisers sgd adam --every-rate

A perceptron with 32 hidden units learns 600 points of three arms from minibatches; a
score is that of one point (of k points) with a label drawn from the model.  All seeds
and learning rates of an optimiser are one compiled program.  Printed is, per optimiser,
the learning rate with the smallest mean of the final training loss over seeds, that
mean and the standard deviation over seeds, and `removed`, the share of the gradient's
square that the rule took (mean over steps and seeds at that rate).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from numpy.typing import NDArray

from offrl_jax import fisher, networks
from offrl_jax.errors import OffrlError, UsageError, unknown_name
from offrl_jax.types import Array, Key

ROWS, CLASSES, HIDDEN = 600, 3, 32


class Optimiser(NamedTuple):
    """A rule without a learning rate.

    Attributes:
      title: in the table.
      rule: what turns gradients, and scores, into directions.
      scores: k, how many scores it takes.
    """

    title: str
    rule: optax.GradientTransformationExtraArgs
    scores: int = 0


def shortened(damping: float) -> optax.GradientTransformation:
    """`g / (damping + g . g)`: rank 1 with the gradient itself as the score."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = 1.0 / (damping + fisher.norm2(updates))
        return jax.tree.map(lambda g: scale * g, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rank1(damping: float) -> Optimiser:
    rule = fisher.scale_by_rank1_fisher(damping, relative=True)
    return Optimiser(f"rank 1, relative damping {damping:g}", rule, 1)


def _woodbury(damping: float) -> Optimiser:
    rule = fisher.scale_by_woodbury_fisher(damping, relative=True)
    return Optimiser(f"16 scores, {damping:g}", rule, 16)


def _plain(title: str, rule: optax.GradientTransformation) -> Optimiser:
    return Optimiser(title, optax.with_extra_args_support(rule))


OPTIMISERS: dict[str, Optimiser] = {
    "sgd": _plain("SGD", optax.identity()),
    "rank1-0.01": _rank1(0.01),
    "rank1-0.1": _rank1(0.1),
    "rank1-1": _rank1(1.0),
    "woodbury-0.01": _woodbury(0.01),
    "woodbury-0.1": _woodbury(0.1),
    "shortened-0.01": _plain("`g / (0.01 + g . g)`", shortened(0.01)),
    "shortened-1": _plain("`g / (1 + g . g)`", shortened(1.0)),
    "adam": _plain("Adam", optax.scale_by_adam()),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains the classifier with every optimiser, learning rate and seed."""

    optimisers: tuple[str, ...] = tuple(OPTIMISERS)
    """Which of them."""
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates that are tried."""
    seeds: int = 5
    """Of the network, the minibatches and the scores."""
    steps: int = 3000
    batch: int = 64
    """Rows of a minibatch."""
    every_rate: bool = False
    """Print the mean loss at every rate, too."""


def spirals() -> tuple[Array, Array]:
    """Points `[600, 2]` and labels `[600]` of the three arms of docs/fisher.md."""
    noise = 0.2 * jax.random.normal(jax.random.key(1), (ROWS,))
    r = jax.random.uniform(jax.random.key(0), (ROWS,))
    label = jnp.arange(ROWS) % CLASSES
    angle = 5.0 * r + 2.1 * label.astype(jnp.float32) + noise
    x = 3.0 * jnp.stack([r * jnp.cos(angle), r * jnp.sin(angle)], axis=1)
    return x, label


_NET = networks.MLP((HIDDEN,), CLASSES)


def _log_prob(params: networks.Params, x: Array, y: Array) -> Array:
    return jax.nn.log_softmax(networks.apply(_NET, params, x))[y]


def loss(params: networks.Params, x: Array, y: Array) -> Array:
    """Mean cross-entropy, `[]`."""
    return -jnp.mean(jax.vmap(_log_prob, (None, 0, 0))(params, x, y))


def _scores(key: Key, params: networks.Params, x: Array, count: int) -> Any:
    """Scores of labels of the model's, leaves `[count, ...]`; one has no such axis."""
    row_key, label_key = jax.random.split(key)
    shape = () if count == 1 else (count,)
    points = x[jax.random.randint(row_key, shape, 0, x.shape[0])]
    y = jax.random.categorical(label_key, networks.apply(_NET, params, points))
    if count == 1:
        return jax.grad(_log_prob)(params, points, y)
    return fisher.per_sample_scores(_log_prob, params, points, y)


def train(
    seed: Array,
    rate: Array,
    data: tuple[Array, Array],
    optimiser: Optimiser,
    steps: int,
    batch: int,
) -> tuple[Array, Array]:
    """Final loss on all rows and mean of `removed`, NaN without scores; both `[]`."""
    x, label = data
    init_key, step_key = jax.random.split(jax.random.key(seed))

    def step(carry: tuple[Any, Any], key: Key) -> tuple[tuple[Any, Any], Array]:
        params, state = carry
        row_key, score_key = jax.random.split(key)
        i = jax.random.randint(row_key, (batch,), 0, x.shape[0])
        grads = jax.grad(loss)(params, x[i], label[i])
        score = None
        if optimiser.scores:
            score = _scores(score_key, params, x, optimiser.scores)
        # optax mixes its integer counts with floats, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            u, state = optimiser.rule.update(grads, state, params, score=score)
        params = jax.tree.map(lambda p, d: p - rate * d, params, u)
        seen = fisher.diagnostics(state).get("removed", jnp.full((), jnp.nan))
        return (params, state), seen

    params = _NET.init(init_key, x[0])
    start = params, optimiser.rule.init(params)
    (params, _), removed = jax.lax.scan(step, start, jax.random.split(step_key, steps))
    return loss(params, x, label), jnp.mean(removed)


class Trained(NamedTuple):
    """All runs of one optimiser: `[rates, seeds]` each."""

    loss: NDArray[np.floating]
    removed: NDArray[np.floating]


def train_all(optimiser: Optimiser, settings: Settings) -> Trained:
    """Every rate and seed as one program."""
    run = functools.partial(
        train, optimiser=optimiser, steps=settings.steps, batch=settings.batch
    )
    over_seeds = jax.vmap(run, (0, None, None))
    over_rates = jax.jit(jax.vmap(over_seeds, (None, 0, None)))
    seeds = jnp.arange(settings.seeds)
    rates = jnp.asarray(settings.rates, jnp.float32)
    return Trained(*map(np.asarray, over_rates(seeds, rates, spirals())))


def best_rate(found: Trained) -> int:
    """Index of the rate with the smallest mean loss; a NaN loses to every number."""
    mean = found.loss.mean(axis=1)
    return int(np.argmin(np.where(np.isnan(mean), np.inf, mean)))


def _deviation(values: NDArray[np.floating]) -> str:
    return f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""


def _markdown(lines: list[list[str]]) -> str:
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def table(found: Mapping[str, Trained], rates: tuple[float, ...]) -> str:
    """The Markdown table of docs/fisher.md."""
    lines = [["optimiser", "best rate", "loss", "removed"]]
    for name, trained in found.items():
        best = best_rate(trained)
        values = trained.loss[best]
        removed = float(trained.removed[best].mean())
        lines.append(
            [
                OPTIMISERS[name].title,
                f"{rates[best]:g}",
                f"{values.mean():.4f}{_deviation(values)}",
                "" if math.isnan(removed) else f"{removed:.2f}",
            ]
        )
    return _markdown(lines)


def rates_table(found: Mapping[str, Trained], rates: tuple[float, ...]) -> str:
    """Mean loss at every rate, as Markdown."""
    lines = [["optimiser", *(f"{rate:g}" for rate in rates)]]
    for name, trained in found.items():
        means = [f"{values.mean():.3g}" for values in trained.loss]
        lines.append([OPTIMISERS[name].title, *means])
    return _markdown(lines)


def check(settings: Settings) -> None:
    """Refuses settings that cannot be trained.

    Raises:
      UsageError: an unknown optimiser, or a number out of its range.
    """
    for name in settings.optimisers:
        if name not in OPTIMISERS:
            raise unknown_name("optimiser", name, OPTIMISERS)
    for name in ("seeds", "steps", "batch"):
        if getattr(settings, name) < 1:
            raise UsageError(
                f"--{name} must be positive, not {getattr(settings, name)}"
            )
    if not settings.optimisers or not settings.rates:
        raise UsageError("--optimisers and --rates need at least one each")
    for rate in settings.rates:
        if not 0.0 < rate < math.inf:
            raise UsageError(f"--rates must be positive, not {rate:g}")


def main(settings: Settings) -> None:
    """Trains everything and prints the table with its conditions."""
    check(settings)
    found = {
        name: train_all(OPTIMISERS[name], settings) for name in settings.optimisers
    }
    print(table(found, settings.rates))
    if settings.every_rate:
        print()
        print(rates_table(found, settings.rates))
    print()
    print(
        f"{settings.steps:,} steps, batch {settings.batch}, {settings.seeds} seeds, "
        f"{jax.local_devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"jax {importlib.metadata.version('jax')}"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except OffrlError as error:
        sys.exit(f"error: {error}")
