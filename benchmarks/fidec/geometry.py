"""What FiDec's Fisher metric does to a displacement of 2-D actions, and what it misses.

Example:
  python benchmarks/fidec/geometry.py --out results/fidec_geometry

Writes `geometry.png`, `estimators.csv` and `kl.csv`.  Nothing is trained: the behaviour
is a correlated Gaussian, whose flow, scores and divergences are closed forms, and KL
is computed by quadrature of the change of variables, without any expansion.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tyro

from offrl_jax.errors import OffrlError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEAN = np.array([0.30, -0.25])
COVARIANCE = np.array([[0.0625, 0.0400], [0.0400, 0.0361]])
GRADIENT = np.array([0.2, 1.0])
"""Of Q, which is linear here; its direction is far from the density's long axis."""

CONSTANT, SCALING, SLIDING = "constant", "scaling", "sliding"
NODES = 40
"""Gauss-Hermite points per dimension."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Draws the geometry and writes its numbers."""

    out: Path
    """Folder for geometry.png, estimators.csv and kl.csv; it is made."""
    budget: float = 0.01
    """Of both penalties, in DeFlow's unit: mean square per action dimension."""
    sizes: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
    """Sizes of the displacements of kl.csv, in standard deviations."""
    dpi: int = 200
    """Resolution of the figure."""


class Estimator(NamedTuple):
    """One row of estimators.csv.

    Attributes:
      name: how scores are taken, and how their products are normalised.
      time: of the scores.
      anisotropy: ratio of the eigenvalues of the matrix that the penalty sees.
      angle: degrees between its displacement and the one of the true Fisher.
      efficiency: gain of Q by its displacement, over the largest at the same true KL.
      matrix: `[2, 2]`, of unit trace.
    """

    name: str
    time: float
    anisotropy: float
    angle: float
    efficiency: float
    matrix: np.ndarray


class Divergence(NamedTuple):
    """One row of kl.csv, in nats.

    Attributes:
      displacement: `constant`, `scaling` (delta = size (a - mean)) or `sliding`
        (along the level sets of the density, to one side of it).
      size: of the constant, and of the largest sliding, in standard deviations; or the
        factor of the scaling.
      true: KL of the displaced density from the behaviour.
      second_order: `1/2 E (div delta + delta . g)^2`.
      without_divergence: `1/2 E (delta . g)^2`, FiDec's form.
    """

    displacement: str
    size: float
    true: float
    second_order: float
    without_divergence: float


def path_covariance(t: float) -> np.ndarray:
    """Covariance of x_t = (1 - t) z + t a, `[2, 2]`."""
    return (1.0 - t) ** 2 * np.eye(2) + t**2 * COVARIANCE


def exact_at_renoised(t: float) -> np.ndarray:
    """E g g^T over x_t, the Fisher information of the time-t density, `[2, 2]`."""
    return np.linalg.inv(path_covariance(t))


def exact_at_base(t: float) -> np.ndarray:
    """E g g^T with the time-t score taken at actions, which x_t is not, `[2, 2]`."""
    inverse = np.linalg.inv(path_covariance(t))
    offset = (1.0 - t) * MEAN
    return inverse @ (COVARIANCE + np.outer(offset, offset)) @ inverse


def velocity_at_renoised(t: float) -> np.ndarray:
    """E v v^T / (1 - t)^2 over x_t, `[2, 2]`."""
    inverse = np.linalg.inv(path_covariance(t))
    cross = t * COVARIANCE - (1.0 - t) * np.eye(2)
    return (np.outer(MEAN, MEAN) + cross @ inverse @ cross) / (1.0 - t) ** 2


def directions_at_base(t: float) -> np.ndarray:
    """E g g^T / |g|^2 over actions, by quadrature: one score per state by its own
    trace, which is the default of `fidec`; at t = 1 of the true scores, `[2, 2]`."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(2 * NODES)
    u = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    weight = np.outer(weights, weights).ravel() / (2.0 * np.pi)
    action = MEAN + u @ np.linalg.cholesky(COVARIANCE).T
    g = np.linalg.solve(path_covariance(t), (action - t * MEAN).T)
    return (weight * g / (g**2).sum(0)) @ g.T


def estimator(name: str, t: float, matrix: np.ndarray) -> Estimator:
    """The numbers of one estimate of the Fisher information."""
    delta = np.linalg.solve(matrix, GRADIENT)
    best = COVARIANCE @ GRADIENT
    cosine = delta @ best / (np.linalg.norm(delta) * np.linalg.norm(best))
    # At equal KL, 1/2 delta^T COVARIANCE^-1 delta, the gain of the best is
    # sqrt(GRADIENT^T COVARIANCE GRADIENT).
    length = np.sqrt(delta @ np.linalg.solve(COVARIANCE, delta))
    efficiency = GRADIENT @ delta / length / np.sqrt(GRADIENT @ best)
    values = np.linalg.eigvalsh(matrix)
    return Estimator(
        name,
        t,
        float(values[1] / values[0]),
        float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))),
        float(efficiency),
        matrix / np.trace(matrix),
    )


def estimators() -> list[Estimator]:
    """Every way to read the metric off the flow that `fidec` offers, and DeFlow's."""
    return [
        estimator("true Fisher", 1.0, np.linalg.inv(COVARIANCE)),
        estimator("isotropic (deflow)", 1.0, np.eye(2)),
        *(
            estimator(name, t, matrix(t))
            for name, matrix in (
                ("exact, renoised", exact_at_renoised),
                ("exact, base", exact_at_base),
                ("exact, base, own trace", directions_at_base),
                ("velocity, renoised", velocity_at_renoised),
            )
            for t in (0.8, 0.9, 0.95, 0.99)
        ),
    ]


Map = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""`[N, 2]` -> displacement `[N, 2]` and its Jacobian `[N, 2, 2]`, whitened units."""


def displacements(size: float) -> dict[str, Map]:
    """Displacements of a standard normal in two dimensions, of the given size.

    KL does not change under the affine map that turns it into the behaviour.
    """

    def constant(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return size * np.eye(2)[:1].repeat(len(u), 0), np.zeros((len(u), 2, 2))

    def scaling(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return size * u, size * np.eye(2)[None].repeat(len(u), 0)

    def sliding(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # By an angle of size * x / sqrt(1 + |u|^2) about the origin.
        x, root = u[:, 0], np.sqrt(1.0 + (u**2).sum(1))
        slope = size * (np.eye(2)[:1] / root[:, None] - (x / root**3)[:, None] * u)
        cos, sin = np.cos(size * x / root), np.sin(size * x / root)
        turn = np.array([[cos, -sin], [sin, cos]]).transpose(2, 0, 1)
        moved = (turn @ u[:, :, None])[..., 0]
        across = np.stack([-moved[:, 1], moved[:, 0]], 1)
        jacobian = turn - np.eye(2) + across[:, :, None] * slope[:, None, :]
        return moved - u, jacobian

    return {CONSTANT: constant, SCALING: scaling, SLIDING: sliding}


def divergences(name: str, size: float) -> Divergence:
    """True KL and both second-order forms, by Gauss-Hermite quadrature.

    KL(T# p || p) = E_p [log p(a) - log det T'(a) - log p(T(a))], for a map T that does
    not fold.

    Raises:
      UsageError: the map folds where the quadrature looks.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    u = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    weight = np.outer(weights, weights).ravel() / (2.0 * np.pi)
    # Where the weights are nil, so is what the map does there.
    u, weight = u[weight > 1e-14], weight[weight > 1e-14]
    delta, jacobian = displacements(size)[name](u)
    volume = np.linalg.det(np.eye(2) + jacobian)
    if volume.min() <= 0.0:
        raise UsageError(
            f"--sizes has {size}: a {name} displacement of that size folds the plane; "
            "choose numbers below 1"
        )
    moved = u + delta
    true = 0.5 * (moved**2 - u**2).sum(1) - np.log(volume)
    along = -(delta * u).sum(1)
    change = np.trace(jacobian, axis1=1, axis2=2) + along
    return Divergence(
        name,
        size,
        float(weight @ true),
        float(weight @ (0.5 * change**2)),
        float(weight @ (0.5 * along**2)),
    )


def displacement(matrix: np.ndarray, budget: float) -> np.ndarray:
    """`argmax GRADIENT . delta` subject to `delta^T matrix delta = budget`, `[2]`."""
    delta = np.linalg.solve(matrix, GRADIENT)
    return delta * np.sqrt(budget / (GRADIENT @ delta))


def _ellipse(matrix: np.ndarray, level: float) -> np.ndarray:
    """Points of `{d: d^T matrix d = level}`, `[2, 200]`."""
    angle = np.linspace(0.0, 2.0 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    return np.sqrt(level) * np.linalg.solve(np.linalg.cholesky(matrix).T, circle)


def _draw_actions(axes: Axes, budget: float) -> None:
    """Behaviour, both constraint sets around its mean, both displacements."""
    axis = np.linspace(-1.1, 1.1, 331)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    away = np.stack([x - MEAN[0], y - MEAN[1]], -1)
    square = (away @ np.linalg.inv(COVARIANCE) * away).sum(-1)
    axes.contourf(axis, axis, np.exp(-0.5 * square).T, 12, cmap="Greys", alpha=0.7)
    fisher = np.linalg.inv(COVARIANCE)
    for name, matrix, color in (
        ("Fisher", fisher / np.trace(fisher), "tab:red"),
        ("isotropic", np.eye(2) / 2.0, "tab:blue"),
    ):
        delta = displacement(matrix, budget)
        kl = 0.5 * delta @ fisher @ delta
        axes.plot(*(MEAN[:, None] + _ellipse(matrix, budget)), color=color, lw=1.3)
        axes.annotate(
            "",
            tuple(MEAN + delta),
            tuple(MEAN),
            arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.8},
        )
        label = f"{name}: gain {GRADIENT @ delta:.2f}, KL {kl:.2f}"
        axes.plot([], [], color=color, label=label)
    unit = 0.25 * GRADIENT / np.linalg.norm(GRADIENT)
    arrow = {"arrowstyle": "->", "color": "black"}
    tail = np.array([-0.4, 0.05])
    axes.annotate("", tuple(tail + unit), tuple(tail), arrowprops=arrow)
    axes.text(-0.32, 0.12, r"$\nabla_a Q$", fontsize=9)
    axes.set(xlim=(-0.6, 1.0), ylim=(-1.1, 0.5))
    axes.set_aspect("equal")
    axes.legend(loc="lower left", fontsize=7.5)
    axes.set_title("behaviour, constraint sets, displacements", fontsize=9.5)


def _draw_estimators(axes: Axes, rows: Sequence[Estimator]) -> None:
    """The unit ball of the metric that each estimator sees."""
    shown = (
        ("true Fisher", 1.0, "black", "-"),
        ("isotropic (deflow)", 1.0, "tab:blue", "-"),
        ("exact, renoised", 0.9, "tab:orange", "-"),
        ("exact, base", 0.9, "tab:red", "--"),
        ("exact, base, own trace", 0.9, "tab:green", "--"),
        ("velocity, renoised", 0.9, "tab:purple", ":"),
    )
    for name, t, color, style in shown:
        row = next(r for r in rows if (r.name, r.time) == (name, t))
        label = name if t == 1.0 else f"{name}, t = {t:g}"
        label += f": {100 * row.efficiency:.0f} %"
        axes.plot(*_ellipse(row.matrix, 1.0), style, color=color, lw=1.3, label=label)
    axes.set_aspect("equal")
    axes.set(xlim=(-7, 7), ylim=(-6, 10), xlabel="in the legend: gain of Q at equal KL")
    axes.legend(loc="upper left", fontsize=7.5)
    axes.set_title("metrics read off the flow: unit balls", fontsize=9.5)


def _draw_divergences(axes: Axes, rows: Sequence[Divergence]) -> None:
    """Both expansions over the true KL, against the size of the displacement."""
    colors = {CONSTANT: "black", SCALING: "tab:orange", SLIDING: "tab:green"}
    for name, color in colors.items():
        some = [row for row in rows if row.displacement == name]
        sizes = [row.size for row in some]
        full = [row.second_order / row.true for row in some]
        lacking = [row.without_divergence / row.true for row in some]
        axes.plot(sizes, full, "o-", color=color, ms=3, label=f"{name}, exact form")
        axes.plot(sizes, lacking, "x--", color=color, ms=4, label=f"{name}, FiDec's")
    axes.axhline(1.0, color="0.7", lw=0.8, zorder=0)
    axes.set(xlabel="size", ylabel="second order / true KL", ylim=(-0.1, 3.4))
    axes.legend(fontsize=7.5, loc="upper left", ncols=2)
    axes.set_title("what the divergence is worth", fontsize=9.5)


def draw(
    settings: Settings, metrics: Sequence[Estimator], kl: Sequence[Divergence]
) -> Figure:
    """The figure: actions, metrics, and the second-order forms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 4.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_actions(left, settings.budget)
    _draw_estimators(middle, metrics)
    _draw_divergences(right, kl)
    return figure


def checked(settings: Settings) -> Settings:
    """The settings, or a `UsageError` that says which one cannot be."""
    if not 0.0 < settings.budget < np.inf:
        raise UsageError(f"--budget is {settings.budget}: give a number above 0")
    bad = [size for size in settings.sizes if not 0.0 < size < np.inf]
    if bad or not settings.sizes:
        raise UsageError(f"--sizes has {bad}: give one or more numbers above 0")
    return settings


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in row])


def main(settings: Settings) -> None:
    """Writes the figure and both tables, and prints the numbers."""
    names = (CONSTANT, SCALING, SLIDING)
    kl = [divergences(n, size) for n in names for size in checked(settings).sizes]
    metrics = estimators()
    settings.out.mkdir(parents=True, exist_ok=True)
    _write(
        settings.out / "estimators.csv",
        Estimator._fields[:-1],
        [row[:-1] for row in metrics],
    )
    _write(settings.out / "kl.csv", Divergence._fields, kl)
    for row in metrics:
        print(
            f"{row.name:22s} t={row.time:<5g} anisotropy={row.anisotropy:<8.3g} "
            f"angle={row.angle:<6.3g} efficiency={row.efficiency:.3g}"
        )
    for row in kl:
        print(
            f"{row.displacement:22s} size={row.size:<5g} true={row.true:<8.3g} "
            f"second_order={row.second_order:<8.3g} "
            f"without_divergence={row.without_divergence:.3g}"
        )
    draw(settings, metrics, kl).savefig(settings.out / "geometry.png", dpi=settings.dpi)
    print(f"wrote {settings.out / 'geometry.png'}, estimators.csv and kl.csv")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except OffrlError as error:
        raise SystemExit(f"geometry: {error}") from None
