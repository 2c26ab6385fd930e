"""ACPO's optimal policy on a 2-D bandit, from the support constraint to cloning.

Example:
  python benchmarks/acpo/spectrum.py --out results/acpo_spectrum

Writes `spectrum.png` and `spectrum.csv`.  The policy is the closed form
`pi* ~ beta^kappa exp(Q / alpha)` on a grid of actions; nothing is trained.  The
behaviour has three modes, each a Gaussian cut off at three standard deviations, so that
its support is known: the oftener a mode, the lower its values.  The highest values of
all lie where there are no data, as an extrapolating critic would have it.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro

from offrl_jax.constraint import closed_form
from offrl_jax.errors import OffrlError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Mode(NamedTuple):
    """One mode of the behaviour, and the mark that stands for it in the figure."""

    name: str
    centre: tuple[float, float]
    weight: float
    mark: str


MODES = (
    Mode("frequent", (-0.50, -0.45), 0.80, "o"),
    Mode("occasional", (0.52, -0.48), 0.15, "s"),
    Mode("rare", (0.45, 0.48), 0.05, "^"),
)
STD, REACH = 0.14, 3.0
"""Standard deviation of every mode, and how many of them its support reaches."""

# Peaks of Q beside the modes: within each mode, too, one side is better.
PEAKS = (
    ((-0.38, -0.33), 0.40),
    ((0.42, -0.38), 0.75),
    ((0.50, 0.55), 1.25),
    ((-0.50, 0.55), 1.80),
)
PEAK_WIDTH = 0.22
VALUE_LEVELS = (0.3, 0.6, 1.0)
FAINTEST = 0.03
"""Lowest density that the figure colours."""
NAMES = {0.0: "support constraint", 1.0: "density (KL) point", 5.0: "towards cloning"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Draws the spectrum and writes its numbers."""

    out: Path
    """Folder for spectrum.png and spectrum.csv; it is made."""
    alpha: float = 0.4
    """Temperature, in units of Q."""
    kappas: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 5.0)
    """Values of the interpolation parameter, one panel each."""
    points: int = 301
    """Actions per axis of the grid."""
    dpi: int = 200
    """Resolution of the figure."""


class Bandit(NamedTuple):
    """The problem on a grid of `P x P` actions in [-1, 1]^2, float64.

    Attributes:
      axis: `[P]`, the coordinates.
      cell: area of one cell.
      beta: `[P, P]`, density of the behaviour (first axis: first action dimension).
      q: `[P, P]`, action values.
      regions: name of a mode -> `[P, P]`, whether an action belongs to it.
    """

    axis: np.ndarray
    cell: float
    beta: np.ndarray
    q: np.ndarray
    regions: dict[str, np.ndarray]


class Numbers(NamedTuple):
    """One row of the CSV; entropies and log densities in nats.

    `effective_sample_size` is `1 / E_beta w^2` of the forward weights `w = pi* / beta`:
    the share of a large batch of data that a weighted projection effectively uses.
    """

    alpha: float
    kappa: float
    mean_q: float
    entropy: float
    mean_log_beta: float
    effective_sample_size: float
    mass_frequent: float
    mass_occasional: float
    mass_rare: float


def make_bandit(points: int) -> Bandit:
    """The bandit on `points` x `points` actions."""
    axis, step = np.linspace(-1.0, 1.0, points, retstep=True)
    x, y = np.meshgrid(axis, axis, indexing="ij")

    def square(centre: tuple[float, float]) -> np.ndarray:
        return (x - centre[0]) ** 2 + (y - centre[1]) ** 2

    regions = {m.name: square(m.centre) < (REACH * STD) ** 2 for m in MODES}
    beta = np.zeros_like(x)
    for mode in MODES:
        bell = mode.weight * np.exp(-0.5 * square(mode.centre) / STD**2)
        beta += np.where(regions[mode.name], bell, 0.0)
    cell = float(step) ** 2
    q = sum(h * np.exp(-0.5 * square(at) / PEAK_WIDTH**2) for at, h in PEAKS)
    return Bandit(axis, cell, beta / (beta.sum() * cell), np.asarray(q), regions)


def optimal_density(bandit: Bandit, alpha: float, kappa: float) -> np.ndarray:
    """Density of `pi*`, `[P, P]`, by the library's closed form."""
    with np.errstate(divide="ignore"):
        log_beta = np.log(bandit.beta)
    log_policy, _ = closed_form(
        jnp.asarray(bandit.q.ravel(), jnp.float32),
        jnp.asarray(log_beta.ravel(), jnp.float32),
        alpha,
        kappa,
    )
    policy = np.exp(np.asarray(log_policy, np.float64)).reshape(bandit.q.shape)
    return policy / bandit.cell


def measure(bandit: Bandit, density: np.ndarray, alpha: float, kappa: float) -> Numbers:
    """The numbers of a density `[P, P]` whose support lies in the behaviour's."""
    inside = density > 0.0
    share = density[inside] * bandit.cell
    beta = bandit.beta[inside]
    return Numbers(
        alpha=alpha,
        kappa=kappa,
        mean_q=float(share @ bandit.q[inside]),
        entropy=float(-share @ np.log(density[inside])),
        mean_log_beta=float(share @ np.log(beta)),
        effective_sample_size=float(1.0 / (share @ (density[inside] / beta))),
        **{
            f"mass_{name}": float(density[region].sum() * bandit.cell)
            for name, region in bandit.regions.items()
        },
    )


def _panel(axes: Axes, bandit: Bandit, title: str) -> None:
    """What all panels share: limits, behaviour and value contours, marks."""
    axes.set_title(title, fontsize=9.5)
    axes.set_aspect("equal")
    axes.set(xlim=(-1, 1), ylim=(-1, 1), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    axes.tick_params(labelsize=8)
    axis = bandit.axis
    # Each mode's own standard deviations: at levels of the density that suit the
    # frequent mode, the rare one would have no line at all.
    x, y = np.meshgrid(axis, axis, indexing="ij")
    for mode in MODES:
        away = np.hypot(x - mode.centre[0], y - mode.centre[1]) / STD
        axes.contour(
            axis, axis, away.T, (1, 2, REACH), colors="0.3", linewidths=(0.4, 0.4, 1)
        )
        axes.plot(
            *mode.centre, mode.mark, ms=5, mfc="white", mec="black", mew=0.9, zorder=5
        )
    axes.plot(*PEAKS[-1][0], "x", color="black", ms=6, mew=1.4, zorder=5)


def _value_lines(axes: Axes, bandit: Bandit) -> Any:
    return axes.contour(
        bandit.axis,
        bandit.axis,
        bandit.q.T,
        VALUE_LEVELS,
        colors="tab:red",
        linewidths=0.9,
        linestyles="dashed",
    )


def draw(settings: Settings, bandit: Bandit, densities: list[np.ndarray]) -> Figure:
    """The figure: behaviour and values on the left, the spectrum on the right."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = -(-len(densities) // 2)
    figure = Figure(figsize=(2.35 * (columns + 1) + 0.6, 6.5), layout="constrained")
    grid = figure.subplots(2, columns + 1, squeeze=False)
    panels = [*grid[0, 1:], *grid[1, 1:]]
    # A logarithm: one scale shows a flat policy and a peaked one.
    highest = max(float(d.max()) for d in (bandit.beta, *densities))
    norm = LogNorm(FAINTEST, highest)

    def show(axes: Axes, density: np.ndarray) -> Any:
        return axes.pcolormesh(
            bandit.axis,
            bandit.axis,
            np.ma.masked_less(density.T, FAINTEST),
            norm=norm,
            cmap="YlGnBu",
            rasterized=True,
        )

    def caption(axes: Axes, numbers: Numbers) -> None:
        text = (
            rf"$E\,\log\beta$ = {numbers.mean_log_beta:.2f}   "
            rf"$H$ = {numbers.entropy:.2f}"
            "\n"
            rf"$E\,Q$ = {numbers.mean_q:.2f}   "
            f"ESS = {100 * numbers.effective_sample_size:.0f} %"
        )
        axes.set_xlabel(text.replace("-", "\N{MINUS SIGN}"), fontsize=8.5)

    image = show(grid[0, 0], bandit.beta)
    _panel(grid[0, 0], bandit, r"Behaviour $\beta(a)$")
    caption(grid[0, 0], measure(bandit, bandit.beta, settings.alpha, 0.0))
    _panel(grid[1, 0], bandit, r"Action value $Q(a)$")
    grid[1, 0].pcolormesh(
        bandit.axis, bandit.axis, bandit.q.T, cmap="Reds", vmax=3.0, rasterized=True
    )
    grid[1, 0].clabel(_value_lines(grid[1, 0], bandit), fontsize=7.5, fmt="%g")
    grid[1, 0].set_xlabel("first action dimension\n", fontsize=8.5)
    for axes in grid[:, 0]:
        axes.set_ylabel("second action dimension", fontsize=8.5)
    for axes, density, kappa in zip(panels, densities, settings.kappas, strict=False):
        show(axes, density)
        name = NAMES.get(kappa)
        _panel(axes, bandit, rf"$\kappa$ = {kappa:g}" + (f":  {name}" if name else ""))
        _value_lines(axes, bandit)
        caption(axes, measure(bandit, density, settings.alpha, kappa))
    for axes in panels[len(densities) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=grid, shrink=0.75, aspect=32, pad=0.015)
    bar.set_label(rf"density; white below {FAINTEST:g}", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    plain: dict[str, Any] = {"ls": "", "mfc": "white", "mec": "black"}
    handles = [
        *(
            Line2D(
                [], [], marker=m.mark, label=f"{m.name} mode ({m.weight:.0%})", **plain
            )
            for m in MODES
        ),
        Line2D([], [], marker="x", color="black", ls="", label="highest Q, no data"),
        Line2D([], [], color="0.35", lw=1, label="behaviour: 1, 2, 3 std (support)"),
        Line2D([], [], color="tab:red", ls="--", lw=1, label="Q = 0.3, 0.6, 1"),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3,
        fontsize=8.5,
        frameon=False,
        handletextpad=0.4,
        columnspacing=1.4,
    )
    figure.suptitle(
        r"$\pi^*_\kappa \propto \beta^\kappa\,\exp(Q/\alpha)$ on a 2-D bandit, "
        rf"$\alpha$ = {settings.alpha:g}",
        fontsize=11,
    )
    return figure


def checked(settings: Settings) -> Settings:
    """The settings, or a `UsageError` that says which one cannot be."""
    if not settings.alpha > 0.0:
        raise UsageError(f"--alpha is {settings.alpha}: a temperature is above 0")
    bad = [kappa for kappa in settings.kappas if not 0.0 <= kappa < np.inf]
    if bad or not settings.kappas:
        raise UsageError(f"--kappas has {bad}: give one or more finite numbers >= 0")
    if settings.points < 51:
        raise UsageError(f"--points is {settings.points}: 51 or more resolve a mode")
    return settings


def main(settings: Settings) -> None:
    """Writes the figure and the CSV, and prints the numbers."""
    bandit = make_bandit(checked(settings).points)
    densities = [optimal_density(bandit, settings.alpha, k) for k in settings.kappas]
    settings.out.mkdir(parents=True, exist_ok=True)
    with (settings.out / "spectrum.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(Numbers._fields)
        for kappa, density in zip(settings.kappas, densities, strict=True):
            row = measure(bandit, density, settings.alpha, kappa)
            writer.writerow([f"{value:.6g}" for value in row])
            print("  ".join(f"{k}={v:.3g}" for k, v in row._asdict().items()))
    figure = draw(settings, bandit, densities)
    figure.savefig(settings.out / "spectrum.png", dpi=settings.dpi)
    print(f"wrote {settings.out / 'spectrum.png'} and spectrum.csv")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except OffrlError as error:
        raise SystemExit(f"spectrum: {error}") from None
