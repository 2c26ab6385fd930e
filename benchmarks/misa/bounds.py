"""The bounds of mutual information on correlated Gaussians, beside its true value.

Example:
  python benchmarks/misa/bounds.py --out results/misa_bounds

Writes `bounds.png` and `bounds.csv`.  S is standard normal and A = rho S + noise of
variance 1 - rho^2, so I(S; A) = -log(1 - rho^2) / 2.  All bounds share one imperfect
policy, Normal(0.75 rho s, 1.3 (1 - rho^2)), whose slope and width are off, and one
imperfect critic: 0.7 of the log ratio of the data's density to the policy's, plus
0.5 + 0.4 sin(2 s).  Left, their exact values, by Gauss-Hermite quadrature.  Right,
expectations of MISA's estimate from K samples of the policy per state, with the
*optimal* critic, so that the exact bound is the true information and what differs from
it is the bias; by Monte Carlo.  Nothing is trained.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from offrl_jax import mutual_information as mi
from offrl_jax.errors import OffrlError, UsageError
from offrl_jax.figures import PALETTE
from offrl_jax.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SLOPE, VARIANCE = 0.75, 1.3
"""Of the policy, relative to the data's."""
SCALE, SHIFT, WAVE = 0.7, 0.5, 0.4
"""Of the critic: share of the log ratio, constant, and height of its function of s."""
SAMPLES = (1, 10, 50)
ACTION_ENTROPY = 0.5 * math.log(2.0 * math.pi * math.e)
"""H(A) in nats: actions are standard normal over all states."""
NODES = 100


@dataclasses.dataclass(frozen=True)
class Settings:
    """Draws the bounds and writes their numbers."""

    out: Path
    """Folder for bounds.png and bounds.csv; it is made."""
    points: int = 25
    """Values of rho, evenly spaced in the true information, from 0 to --largest-rho."""
    largest_rho: float = 0.99
    """Last correlation, below 1."""
    states: int = 20_000
    """States of one Monte Carlo estimate."""
    seed: int = 0
    """Of the Monte Carlo estimates."""
    dpi: int = 200
    """Resolution of the figure."""


class Estimate(NamedTuple):
    """Mean and standard error of a bound's estimate, in nats."""

    mean: float
    error: float


class Point(NamedTuple):
    """What one correlation gives, in nats.

    Attributes:
      rho: the correlation.
      true: the mutual information.
      exact: the four bounds, with the imperfect critic.
      estimates: MISA's with the optimal critic, by K and whether the data's action is
        among the samples.
    """

    rho: float
    true: float
    exact: mi.Bounds
    estimates: dict[tuple[int, bool], Estimate]


def _log_normal(x: Array, mean: Array, variance: Array) -> Array:
    square = jnp.square(x - mean) / variance
    return -0.5 * (square + jnp.log(2.0 * math.pi * variance))


def log_policy(rho: Array, s: Array, a: Array) -> Array:
    """Log density of the imperfect policy, elementwise."""
    return _log_normal(a, SLOPE * rho * s, VARIANCE * (1.0 - rho**2))


def log_ratio(rho: Array, s: Array, a: Array) -> Array:
    """Log of the data's density over the policy's, elementwise."""
    return _log_normal(a, rho * s, 1.0 - rho**2) - log_policy(rho, s, a)


def critic(rho: Array, s: Array, a: Array) -> Array:
    """The imperfect critic, elementwise."""
    return SCALE * log_ratio(rho, s, a) + SHIFT + WAVE * jnp.sin(2.0 * s)


def _actions(rho: Array, s: Array, noise: Array) -> tuple[Array, Array]:
    """The data's actions and the policy's, from standard normal numbers."""
    std = jnp.sqrt(1.0 - rho**2)
    policy = SLOPE * rho * s + math.sqrt(VARIANCE) * std * noise
    return rho * s + std * noise, policy


@jax.jit
def exact_bounds(rho: Array) -> mi.Bounds:
    """The four bounds of the imperfect critic at population level, by quadrature.

    They are the library's functions: weights of the actions go beside T as logarithms,
    with a normaliser of 1; where a bound is a mean over states, each state is a batch
    of its own.
    """
    nodes, plain = np.polynomial.hermite_e.hermegauss(NODES)
    w = jnp.asarray(plain / plain.sum())
    log_w = jnp.log(w)
    grid = jnp.meshgrid(jnp.asarray(nodes), jnp.asarray(nodes), indexing="ij")
    s, (data, policy) = grid[0], _actions(rho, *grid)
    ba = mi.ba_bound((w @ log_policy(rho, s, data) @ w)[None], ACTION_ENTROPY)
    t_data = critic(rho, s, data) @ w
    weighted = critic(rho, s, policy) + log_w[None, :]
    mean_t, flat = (w @ t_data)[None], (weighted + log_w[:, None]).reshape(-1, 1)
    # The mean inside f divides by the number of nodes; no node may lie on its tangent.
    f = mi.nwj_gain(mean_t, flat + math.log(flat.size), largest=500.0)
    dv = mi.donsker_varadhan_gain(mean_t, flat, normaliser=1.0)
    misa = jax.vmap(lambda t, terms: mi.misa_gain(t[None], terms[:, None], 1.0))(
        t_data, weighted
    )
    return mi.Bounds(ba=ba, f=ba + f, dv=ba + dv, misa=ba + w @ misa)


@jax.jit
def _per_state(
    rho: Array, s: Array, data_noise: Array, policy_noise: Array
) -> tuple[Array, Array]:
    """What MISA's bound is the mean of, without and with the positive: `[B]` each.

    Args:
      rho: `[]`.
      s: `[B]`.
      data_noise: `[B]`.
      policy_noise: `[K, B]`.
    """
    data, _ = _actions(rho, s, data_noise)
    _, policy = _actions(rho, s[None, :], policy_noise)
    t_data = 1.0 + log_ratio(rho, s, data)
    t_policy = 1.0 + log_ratio(rho, s[None, :], policy)
    # log pi + T = 1 + log p, whose mean over the data is known: no need to sample it.
    upper = 1.0 - 0.5 * jnp.log(1.0 - rho**2)
    alone = mi.log_mean_exp(t_policy)
    together = mi.log_mean_exp(mi.with_positive(t_data, t_policy))
    return upper - alone, upper - together


def estimates(
    rho: float, samples: int, states: int, seed: int
) -> tuple[Estimate, Estimate]:
    """MISA's bound from `samples` per state, without and with the data's action.

    The same seed draws the same numbers for every rho: curves are smooth.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    noise = [
        jax.random.normal(key, shape)
        for key, shape in zip(
            keys, ((states,), (states,), (samples, states)), strict=True
        )
    ]
    found = []
    for values in _per_state(jnp.asarray(rho), *noise):
        error = np.std(values, ddof=1) / math.sqrt(states)
        found.append(Estimate(float(np.mean(values)), float(error)))
    return found[0], found[1]


def measure(settings: Settings) -> list[Point]:
    """All points, in float64."""
    last = -0.5 * math.log1p(-(settings.largest_rho**2))
    found = []
    with jax.enable_x64(True):
        for true in np.linspace(0.0, last, settings.points).tolist():
            rho = math.sqrt(-math.expm1(-2.0 * true))
            by_kind = {}
            for samples in SAMPLES:
                pair = estimates(rho, samples, settings.states, settings.seed)
                by_kind[samples, False], by_kind[samples, True] = pair
            found.append(Point(rho, true, exact_bounds(jnp.asarray(rho)), by_kind))
    return found


def columns(point: Point) -> dict[str, float]:
    """One row of the CSV."""
    row = {"rho": point.rho, "true": point.true}
    row |= {name: float(value) for name, value in point.exact._asdict().items()}
    for (samples, positive), value in point.estimates.items():
        name = f"misa_k{samples}" + ("_positive" if positive else "")
        row |= {name: value.mean, f"{name}_se": value.error}
    return row


def draw(points: list[Point]) -> Figure:
    """The figure: exact bounds on the left, estimates from K samples on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    true = np.array([point.true for point in points])
    for axes in (left, right):
        axes.plot(true, true, color="0.25", lw=1.2, ls="--", label="true information")
        axes.set_xlabel("true mutual information (nats)", fontsize=9)
        axes.set_xlim(0, true[-1])
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, lw=0.5)
    names = {"misa": "MISA", "dv": "DV", "f": "f (NWJ)", "ba": "BA"}
    for (field, name), colour in zip(names.items(), PALETTE, strict=False):
        values = [float(getattr(point.exact, field)) for point in points]
        left.plot(true, values, color=colour, lw=1.8, label=name)
    left.set_ylabel("bound (nats)", fontsize=9)
    left.set_title("exact bounds, imperfect policy and critic", fontsize=10)
    for samples, colour in zip(SAMPLES, PALETTE, strict=False):
        for positive, style in ((False, "-"), (True, ":")):
            found = [point.estimates[samples, positive] for point in points]
            mean = np.array([value.mean for value in found])
            error = 2.0 * np.array([value.error for value in found])
            label = f"K = {samples}" + (" and the data's action" if positive else "")
            right.plot(true, mean, style, color=colour, lw=1.8, label=label)
            right.fill_between(
                true, mean - error, mean + error, color=colour, alpha=0.18, lw=0
            )
    right.set_ylabel("expected estimate (nats)", fontsize=9)
    right.set_title("MISA from K samples, optimal critic: the bias", fontsize=10)
    right.set_ylim(left.get_ylim()[0], 1.6 * true[-1])
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def checked(settings: Settings) -> Settings:
    """The settings, or a `UsageError` that says which one cannot be."""
    if not 0.0 < settings.largest_rho < 1.0:
        raise UsageError(
            f"--largest-rho is {settings.largest_rho}: choose a correlation in (0, 1)"
        )
    if settings.points < 2:
        raise UsageError(f"--points is {settings.points}: a curve needs 2 or more")
    if settings.states < 100:
        raise UsageError(f"--states is {settings.states}: 100 or more have an error")
    return settings


def main(settings: Settings) -> None:
    """Writes the figure and the CSV, and prints the numbers."""
    points = measure(checked(settings))
    settings.out.mkdir(parents=True, exist_ok=True)
    rows = [columns(point) for point in points]
    with (settings.out / "bounds.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([f"{value:.6g}" for value in row.values()])
            shown = {k: v for k, v in row.items() if not k.endswith("_se")}
            print("  ".join(f"{k}={v:.3f}" for k, v in shown.items()))
    draw(points).savefig(settings.out / "bounds.png", dpi=settings.dpi)
    print(f"wrote {settings.out / 'bounds.png'} and bounds.csv")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except OffrlError as error:
        raise SystemExit(f"bounds: {error}") from None
