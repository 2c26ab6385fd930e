"""The figure of bounds against true information: its numbers against scipy."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import scripts

from offrl_jax.errors import UsageError

bounds = scripts.load("misa/bounds")


def _ba(rho):
    """In closed form: the policy is Normal(0.75 rho s, 1.3 (1 - rho^2))."""
    variance = 1.3 * (1 - rho**2)
    square = (1 - rho**2) + (0.25 * rho) ** 2  # E (a - 0.75 rho s)^2
    return 0.5 - 0.5 * np.log(variance) - 0.5 * square / variance


def _gains(rho):
    """f, DV and MISA by adaptive quadrature, with the critic that the script names."""
    std = np.sqrt(1 - rho**2)
    wide = np.sqrt(1.3) * std
    norm = scipy.stats.norm

    def critic(s, a):
        ratio = norm.logpdf(a, rho * s, std) - norm.logpdf(a, 0.75 * rho * s, wide)
        return 0.7 * ratio + 0.5 + 0.4 * np.sin(2 * s)

    def over_actions(function, s, mean, scale):
        # A fixed rule on a grid so fine that trapezoids are exact to 1e-9.
        a = np.linspace(mean - 10 * scale, mean + 10 * scale, 2001)
        return scipy.integrate.trapezoid(
            norm.pdf(a, mean, scale) * function(critic(s, a)), a
        )

    s = np.linspace(-12, 12, 1201)
    weight = norm.pdf(s)

    def over_states(values):
        return scipy.integrate.trapezoid(weight * values, s)

    mean_t = over_states([over_actions(lambda t: t, x, rho * x, std) for x in s])
    exp_t = np.array([over_actions(np.exp, x, 0.75 * rho * x, wide) for x in s])
    return {
        "f": mean_t - over_states(exp_t) / np.e,
        "dv": mean_t - np.log(over_states(exp_t)),
        "misa": mean_t - over_states(np.log(exp_t)),
    }


def test_csv_and_figure(tmp_path):
    settings = bounds.Settings(tmp_path / "deep" / "down", 5, states=2_000, dpi=40)
    bounds.main(settings)
    with (settings.out / "bounds.csv").open(newline="") as stream:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]
    assert len(rows) == 5 and rows[0]["rho"] == 0.0
    assert rows[-1]["rho"] == pytest.approx(0.99)
    for row in rows:
        rho, true, ba = row["rho"], row["true"], _ba(row["rho"])
        assert true == pytest.approx(-0.5 * np.log(1 - rho**2), abs=2e-4)
        assert row["ba"] == pytest.approx(ba, abs=2e-4)
        assert row["f"] <= row["dv"] <= row["misa"] <= true
        # One sample has no logarithm: BA + KL(p || pi) + KL(pi || p), as T is optimal.
        moved = (0.25 * rho) ** 2 / (1 - rho**2)
        both = 0.5 * ((1 + moved) / 1.3 + 1.3 + moved - 2)
        assert abs(row["misa_k1"] - ba - both) < 5 * row["misa_k1_se"] + 1e-4
        for samples in (1, 10, 50):
            name = f"misa_k{samples}_positive"
            slack = 3 * row[f"{name}_se"]
            assert row[name] < min(true, ba + np.log(samples + 1)) + slack
    for row in (rows[0], rows[2]):
        for name, gain in _gains(row["rho"]).items():
            assert row[name] - row["ba"] == pytest.approx(gain, abs=2e-4), name
    # What the figure is there to show: biased upwards, the more the fewer samples.
    last = rows[-1]
    assert last["misa_k1"] > last["misa_k10"] > last["misa_k50"] > last["true"] + 0.1
    assert last["misa_k1_positive"] < last["misa_k10_positive"] < last["true"] - 0.2
    from matplotlib.image import imread

    image = imread(settings.out / "bounds.png")
    assert image.shape[:2] == (180, 368)
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 200


@pytest.mark.parametrize(
    "change, message",
    [
        ({"largest_rho": 1.0}, "--largest-rho is 1.0"),
        ({"largest_rho": float("nan")}, "--largest-rho is nan"),
        ({"points": 1}, "--points is 1"),
        ({"states": 3}, "--states is 3"),
    ],
)
def test_settings_that_cannot_be(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        bounds.main(bounds.Settings(out=tmp_path, **change))
    assert not list(tmp_path.iterdir())
