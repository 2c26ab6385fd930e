"""Cost of one step of the policy, over that of SGD, as parameters grow.

Examples:
  python benchmarks/onpolicy/cost.py
  python benchmarks/onpolicy/cost.py --parameters 1e5 --batches 128 --repeats 15

Timed is what an on-policy agent does with a batch of experience and nothing else: the
policy's gradient, the direction and the step, with the numbers that the agent records
(`policy_step` of the agents' modules); no rollout, no critic.  As in training, updates
follow one another in one compiled loop.  A cell reads

    1.08 (1.05 to 1.12), 1.01

the median over repeats of the time over SGD's in the same repeat, its middle half, and
the ratio that the matrix products alone explain.

Arithmetic, in multiply-and-adds of matrix products: let W be the weights of the net, V
those of its first layer, d all parameters, B the batch.  A row costs W forwards and
2 W - V backwards (the inputs need no gradient).

    sgd        B (3 W - V)
    pair       and 3 W - V: the score of one row
    fresh      and 4 W - V: its action is drawn anew, which takes the mean first
    woodbury   and k (4 W - V) for k scores, d (k^2 + 2 k) for V V^T, V g and V^T c
    kfac       and B (2 W - V) for a pass to the layers' outputs, B rows into the two
               factors of every layer, n^3 / 3 for each factor of n, and two products
    trpo       and, for `iterations` + 1 products with the Fisher matrix, B (9 W - 5 V)
               each, 30 B W for 10 step lengths, B W for the old likelihoods
    npg        and, for K outputs, B (2 W + K (2 W - V) + K^2 d + K d^2) and d^3 / 3

So rank 1 adds 1 / B to 4 / (3 B) of SGD's arithmetic, and passes over d numbers: SGD
makes about 7 (weights twice, the gradient thrice, parameters twice), rank 1 reads the
weights twice more, writes the score once, reads it thrice and the gradient once more.
That, and some dozen tiny operations where d is small, is what it can cost, and not the
arithmetic.

What would take longer than `--longest` per update or more than `--memory` is skipped,
with a word; both are predicted, from SGD's speed and the counts above.  Repeats are
interleaved; still, measure on an idle machine.  The policy is Gaussian.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from offrl_jax.agents import a2c, acktr, npg_full, rank1_ac, trpo, woodbury_ac
from offrl_jax.agents.actor_critic import Experience
from offrl_jax.errors import OffrlError, UsageError, unknown_name
from offrl_jax.types import Array, Spec

RANK1 = ("pair", "fresh")
BOUND = 1.5
"""What rank 1 may cost of SGD, from batches of `FROM` rows on."""
FROM = 128
# Steps so short that the policy stays where it is: every update does the same work.
_RATE = 1e-7
_BYTES = 4


class Method(NamedTuple):
    """An agent's module and the structure that it is timed with."""

    module: ModuleType
    config: dict[str, Any]


METHODS = {
    "sgd": Method(a2c, {"optimiser": "sgd"}),
    "pair": Method(rank1_ac, {"vector": "pair"}),
    "fresh": Method(rank1_ac, {"vector": "fresh"}),
    "woodbury": Method(woodbury_ac, {"samples": 16}),
    "kfac": Method(acktr, {}),
    "trpo": Method(trpo, {"iterations": 10, "backtracks": 10}),
    "npg": Method(npg_full, {}),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times one step of the policy for every method, interleaved."""

    parameters: tuple[float, ...] = (1e3, 1e4, 1e5, 1e6, 1e7)
    """About so many parameters; the nearest net with two equal hidden layers."""
    batches: tuple[int, ...] = (128, 1024)
    """Rows of experience."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Compared with `sgd`, which is always timed."""
    obs_dim: int = 17
    action_dim: int = 6
    seconds: float = 0.3
    """Length of one measurement, of one update at least."""
    repeats: int = 9
    """Measurements of each method."""
    longest: float = 10.0
    """Seconds per update beyond which a method is skipped."""
    memory: float = 4.0
    """GiB beyond which a method is skipped."""


class Net(NamedTuple):
    """Sizes of a policy's network.

    Attributes:
      layers: inputs and outputs of every layer.
      parameters: d, with biases and log standard deviations.
      outputs: numbers that a distribution is made of.
    """

    layers: tuple[tuple[int, int], ...]
    parameters: int
    outputs: int

    @property
    def weights(self) -> int:
        """W, without biases."""
        return sum(i * o for i, o in self.layers)

    @property
    def first(self) -> int:
        """V, the weights of the first layer."""
        return self.layers[0][0] * self.layers[0][1]


def net_of(width: int, spec: Spec) -> Net:
    """The network with two hidden layers of `width` units."""
    sizes = (spec.obs_dim, width, width, spec.action_dim)
    layers = tuple(itertools.pairwise(sizes))
    count = sum(i * o + o for i, o in layers) + spec.action_dim
    return Net(layers, count, 2 * spec.action_dim)


def width_for(parameters: float, spec: Spec) -> int:
    """Width of the two hidden layers that comes nearest to so many parameters."""
    # w^2 + linear * w + rest
    linear = spec.obs_dim + spec.action_dim + 2
    rest = 2 * spec.action_dim
    root = math.sqrt(max(linear**2 / 4.0 + parameters - rest, 0.0)) - linear / 2.0
    below = max(1, math.floor(root))
    return min(
        below,
        below + 1,
        key=lambda width: abs(net_of(width, spec).parameters - parameters),
    )


def _solve(unknowns: int, columns: int) -> float:
    """Multiply-and-adds of `fisher.solve_spd`, about: factor, then two triangles."""
    return unknowns**3 / 3.0 + unknowns**2 * columns


def arithmetic(method: str, net: Net, batch: int) -> float:
    """Multiply-and-adds of one update: the module's docstring, line by line."""
    w, v, d = net.weights, net.first, net.parameters
    row = 3 * w - v
    config = METHODS[method].config
    total = float(batch * row)
    if method == "pair":
        total += row
    elif method == "fresh":
        total += w + row
    elif method == "woodbury":
        k = config["samples"]
        total += k * (w + row) + d * (k**2 + 2 * k) + _solve(k, 1)
    elif method == "kfac":
        total += batch * (2 * w - v)
        for i, o in net.layers:
            total += batch * ((i + 1) ** 2 + o**2)
            total += _solve(i + 1, o) + _solve(o, i + 1)
    elif method == "trpo":
        total += (config["iterations"] + 1) * batch * (9 * w - 5 * v)
        total += (3 * config["backtracks"] + 1) * batch * w
    elif method == "npg":
        k = net.outputs
        total += batch * (2 * w + k * (2 * w - v) + k**2 * d + k * d**2) + _solve(d, 1)
    return total


def gibibytes(method: str, net: Net, batch: int) -> float:
    """Memory of one update, about: copies of parameters, activations, matrices."""
    d, k = float(net.parameters), float(net.outputs)
    numbers = 6 * d + 8.0 * batch * sum(o for _, o in net.layers)
    if method == "woodbury":
        numbers += 2 * METHODS[method].config["samples"] * d
    elif method == "kfac":
        numbers += 5 * sum((i + 1) ** 2 + o**2 for i, o in net.layers)
    elif method == "trpo":
        numbers += 8 * d
    elif method == "npg":
        numbers += 4 * d**2 + 2 * batch * k * d
    return numbers * _BYTES / 2**30


Run = Callable[[int], None]
"""Does that many updates and waits."""


def parameters_like(shapes: Any, seed: int = 0) -> Any:
    """Normal weights of variance 1 / inputs, zeros elsewhere.

    Not the agents' orthogonal weights: those take minutes to draw for wide layers.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> Array:
        if leaf.ndim < 2:
            return jnp.zeros(leaf.shape, leaf.dtype)
        drawn = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(drawn / np.float32(math.sqrt(leaf.shape[0])))

    return jax.tree.map(draw, shapes)


def experience_of(batch: int, spec: Spec) -> Experience:
    """Normal observations, actions and advantages."""
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((batch, spec.obs_dim), np.float32)
    action = rng.standard_normal((batch, spec.action_dim), np.float32)
    advantage = rng.standard_normal(batch, np.float32)
    return Experience(*map(jnp.asarray, (obs, action, advantage)))


def parts(method: str, width: int, batch: int, spec: Spec) -> tuple[Any, tuple]:
    """The agent's `improve`, and arguments for it."""
    module, config = METHODS[method]
    step = module.policy_step(module.Config(hidden=(width, width), **config), spec)
    hyper = jax.tree.map(jnp.float32, module.Hyper(actor_lr=_RATE))
    key = jax.random.key(0)
    actor = parameters_like(jax.eval_shape(step.policy.init, key, hyper))
    opt = step.init_opt(actor)
    return step.improve, (key, actor, opt, experience_of(batch, spec), hyper)


def updates(method: str, width: int, batch: int, spec: Spec) -> Run:
    """A warmed-up loop of updates, compiled once; parameters are donated to it."""
    improve, arguments = parts(method, width, batch, spec)
    key, actor, opt, experience, hyper = arguments
    shapes = jax.eval_shape(improve, *arguments)[2]
    metrics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def many(carry: tuple, experience: Experience, hyper: Any, count: Array) -> tuple:
        def one(index: Array, carry: tuple) -> tuple:
            key, actor, opt, _ = carry
            # Carried, so that methods without a use for it pay for it as well.
            key = jax.random.fold_in(key, index)
            return key, *improve(key, actor, opt, experience, hyper)

        return jax.lax.fori_loop(0, count, one, carry)

    compiled = jax.jit(many, donate_argnums=0)
    # Copies: an array that stands in several places cannot be donated.
    carry = jax.tree.map(jnp.copy, (key, actor, opt, metrics))

    def run(count: int) -> None:
        nonlocal carry
        carry = compiled(carry, experience, hyper, np.int32(count))
        jax.block_until_ready(carry)

    run(1)
    return run


def seconds_per_update(run: Run, count: int) -> float:
    """Time of `count` updates, each."""
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


def _count_for(run: Run, seconds: float) -> int:
    """How many updates take about `seconds`, from a call of half of it at least."""
    count = 1
    while (each := seconds_per_update(run, count)) * count < seconds / 2:
        count = math.ceil(count * min(8.0, max(1.5, seconds / (each * count))))
    return max(1, round(seconds / each))


@dataclasses.dataclass(frozen=True)
class Measured:
    """One method at one size.

    Attributes:
      method: of `METHODS`.
      parameters: d.
      batch: B.
      seconds: per update, by repeat; empty if it was skipped.
      ratios: to SGD's of the same repeat.
      counted: the ratio by arithmetic.
      skipped: why, or "".
    """

    method: str
    parameters: int
    batch: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    counted: float
    skipped: str = ""

    @property
    def ratio(self) -> float:
        """Median of `ratios`."""
        return float(np.median(self.ratios))


def why_skipped(
    method: str, net: Net, batch: int, sgd_seconds: float, settings: Settings
) -> str:
    """Which limit an update would break by prediction; "" if none."""
    need = gibibytes(method, net, batch)
    if need > settings.memory:
        return f"about {need:,.1f} GiB"
    ratio = arithmetic(method, net, batch) / arithmetic("sgd", net, batch)
    if ratio * sgd_seconds > settings.longest:
        return f"about {ratio * sgd_seconds:,.0f} s"
    return ""


def _tell(word: str) -> None:
    print(word, file=sys.stderr, flush=True)


def measure(
    parameters: float, batch: int, spec: Spec, settings: Settings
) -> list[Measured]:
    """All methods at one size, interleaved, SGD first."""
    width = width_for(parameters, spec)
    net = net_of(width, spec)
    wanted = ["sgd", *(name for name in settings.methods if name != "sgd")]
    if need := why_skipped("sgd", net, batch, 0.0, settings):
        raise UsageError(f"SGD with {parameters:g} parameters takes {need}: --memory")
    runs: dict[str, tuple[Run, int]] = {}
    skipped: dict[str, str] = {}
    sgd_seconds = 0.0
    for name in wanted:
        if name != "sgd":
            word = why_skipped(name, net, batch, sgd_seconds, settings)
            if word:
                skipped[name] = word
                _tell(f"{name}, d = {net.parameters:,}, batch {batch}: skipped, {word}")
                continue
        run = updates(name, width, batch, spec)
        runs[name] = run, _count_for(run, settings.seconds)
        if name == "sgd":
            sgd_seconds = seconds_per_update(*runs[name])
    times: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(settings.repeats):
        for name, (run, count) in runs.items():
            times[name].append(seconds_per_update(run, count))
    base = arithmetic("sgd", net, batch)
    return [
        Measured(
            method=name,
            parameters=net.parameters,
            batch=batch,
            seconds=tuple(times[name]),
            ratios=tuple(
                own / sgd for own, sgd in zip(times[name], times["sgd"], strict=False)
            ),
            counted=arithmetic(name, net, batch) / base,
            skipped=skipped.get(name, ""),
        )
        for name in wanted
    ]


def _cell(one: Measured) -> str:
    if one.skipped:
        return f"skipped: {one.skipped}"
    low, high = np.quantile(one.ratios, [0.25, 0.75])
    return f"{one.ratio:.2f} ({low:.2f} to {high:.2f}), {one.counted:.2f}"


def table(measured: Sequence[Measured]) -> str:
    """A Markdown table: a row per size, a column per method."""
    methods = list(dict.fromkeys(one.method for one in measured))
    header = ["parameters", "batch", "sgd, ms", *methods[1:]]
    lines = [header, ["---"] * len(header)]
    sizes = dict.fromkeys((one.parameters, one.batch) for one in measured)
    for size in sizes:
        row = {o.method: o for o in measured if (o.parameters, o.batch) == size}
        milliseconds = 1e3 * float(np.median(row["sgd"].seconds))
        cells = [f"{size[0]:,}", f"{size[1]:,}", f"{milliseconds:.3g}"]
        lines.append(cells + [_cell(row[name]) for name in methods[1:]])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def verdict(measured: Sequence[Measured]) -> str:
    """Whether rank 1 kept the bound, where it was measured; else ""."""
    held = [
        one
        for one in measured
        if one.method in RANK1 and one.batch >= FROM and not one.skipped
    ]
    if not held:
        return ""
    worst = max(held, key=lambda one: one.ratio)
    told = "kept" if worst.ratio <= BOUND else "BROKEN"
    return (
        f"rank 1 within {BOUND:g} times of SGD from batch {FROM} on: {told}; the "
        f"largest median is {worst.ratio:.2f}, of {worst.method} with "
        f"{worst.parameters:,} parameters and batch {worst.batch:,}"
    )


def check(settings: Settings) -> None:
    """Refuses settings that cannot be measured.

    Raises:
      UsageError: an unknown method, or a number out of its range.
    """
    for name in settings.methods:
        if name not in METHODS:
            raise unknown_name("method", name, METHODS)
    spec = Spec(settings.obs_dim, settings.action_dim, 1)
    if min(settings.obs_dim, settings.action_dim) < 1:
        raise UsageError("--obs-dim and --action-dim must be positive")
    least = net_of(1, spec).parameters
    for count in settings.parameters:
        if not least <= count < math.inf:
            raise UsageError(f"--parameters {count:g}: nets have {least} and more")
    if not settings.parameters or not settings.batches or min(settings.batches) < 1:
        raise UsageError("--parameters and --batches need positive numbers")
    numbers = ("seconds", "repeats", "longest", "memory")
    for name in numbers:
        if not 0.0 < getattr(settings, name) < math.inf:
            raise UsageError(
                f"--{name} must be positive, not {getattr(settings, name)}"
            )


def main(settings: Settings) -> None:
    """Measures every size and prints the table with its conditions."""
    check(settings)
    load = os.getloadavg()[0]
    spec = Spec(settings.obs_dim, settings.action_dim, 1)
    measured: list[Measured] = []
    for parameters in settings.parameters:
        for batch in settings.batches:
            measured += measure(parameters, batch, spec, settings)
            _tell(table(measured).splitlines()[-1])
    print(table(measured))
    print()
    if told := verdict(measured):
        print(told)
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")
    )
    print(
        f"{jax.local_devices()[0].device_kind} ({platform.machine()}), "
        f"{os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} "
        f"after, Python {platform.python_version()}, {versions}; "
        f"Gaussian policy, O={spec.obs_dim}, A={spec.action_dim}, "
        f"{settings.repeats} x {settings.seconds:g} s"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except OffrlError as error:
        sys.exit(f"error: {error}")
