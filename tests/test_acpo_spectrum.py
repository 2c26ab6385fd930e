"""The spectrum figure's numbers against quadrature over the discs of the support."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import scripts

from offrl_jax.errors import UsageError

spectrum = scripts.load("acpo/spectrum")


def _by_quadrature(alpha: float, kappa: float) -> dict[str, float]:
    """All columns, in polar coordinates around each mode: no grid, no logarithms.

    The discs do not overlap, and inside one of them the behaviour is one Gaussian.
    """
    nodes, weights = np.polynomial.legendre.leggauss(60)
    reach = spectrum.REACH * spectrum.STD
    radius, angle = np.meshgrid(
        reach * (nodes + 1) / 2, np.pi * (nodes + 1), indexing="ij"
    )
    area = reach / 2 * np.pi * weights[:, None] * weights[None, :] * radius
    inside = 2 * np.pi * spectrum.STD**2 * (1 - np.exp(-(spectrum.REACH**2) / 2))
    beta, q = [], []
    for mode in spectrum.MODES:
        x = mode.centre[0] + radius * np.cos(angle)
        y = mode.centre[1] + radius * np.sin(angle)
        bell = np.exp(-(radius**2) / (2 * spectrum.STD**2))
        beta.append(mode.weight * bell / inside)
        values = np.zeros_like(x)
        for (a, b), height in spectrum.PEAKS:
            distance = (x - a) ** 2 + (y - b) ** 2
            values += height * np.exp(-distance / (2 * spectrum.PEAK_WIDTH**2))
        q.append(values)
    beta, q = np.array(beta), np.array(q)
    np.testing.assert_allclose((beta * area).sum(), 1.0)
    policy = beta**kappa * np.exp(q / alpha)
    policy /= (policy * area).sum()
    mass = (policy * area).sum((1, 2))
    return {
        "alpha": alpha,
        "kappa": kappa,
        "mean_q": (policy * q * area).sum(),
        "entropy": -(policy * np.log(policy) * area).sum(),
        "mean_log_beta": (policy * np.log(beta) * area).sum(),
        "effective_sample_size": 1 / (policy**2 / beta * area).sum(),
        "mass_frequent": mass[0],
        "mass_occasional": mass[1],
        "mass_rare": mass[2],
    }


def test_csv_and_figure(tmp_path):
    settings = spectrum.Settings(out=tmp_path / "deep" / "down", dpi=40)
    spectrum.main(settings)
    with (settings.out / "spectrum.csv").open(newline="") as stream:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]
    assert [row["kappa"] for row in rows] == [0.0, 0.25, 0.5, 1.0, 2.0, 5.0]
    for row in rows:
        want = _by_quadrature(row["alpha"], row["kappa"])
        assert row.keys() == want.keys()
        for name, value in want.items():
            # The grid resolves the rim of a disc to about a hundredth of its radius.
            assert row[name] == pytest.approx(value, rel=0.01, abs=0.004), name
    # What the figure is there to show.
    assert rows[0]["mass_rare"] > 0.5 and rows[3]["mass_frequent"] > 0.5
    assert rows[-1]["mass_frequent"] > 0.99
    assert (np.diff([row["mean_log_beta"] for row in rows]) > 0).all()
    from matplotlib.image import imread

    image = imread(settings.out / "spectrum.png")
    assert image.shape[:2] == (260, 400)
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 200


def test_the_highest_value_lies_where_there_are_no_data():
    bandit = spectrum.make_bandit(151)
    assert bandit.beta.ravel()[bandit.q.argmax()] == 0.0
    assert bandit.q.max() > bandit.q[bandit.beta > 0.0].max() + 0.3
    density = spectrum.optimal_density(bandit, 0.4, 0.0)
    np.testing.assert_array_equal(density > 0.0, bandit.beta > 0.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"alpha": 0.0}, "--alpha is 0.0"),
        ({"kappas": (0.5, -1.0)}, r"--kappas has \[-1.0\]"),
        ({"kappas": (float("nan"),)}, "--kappas has"),
        ({"kappas": ()}, "--kappas has"),
        ({"points": 3}, "--points is 3"),
    ],
)
def test_settings_that_cannot_be(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        spectrum.main(spectrum.Settings(out=tmp_path, **change))
    assert not list(tmp_path.iterdir())
