"""benchmarks/onpolicy/: counts, tables and tiny runs of two scripts; never a time."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from offrl_jax.errors import UsageError
from offrl_jax.types import Spec

DOCS = scripts.BENCHMARKS.parent / "docs"


cost = scripts.load("onpolicy/cost")
spirals = scripts.load("onpolicy/spirals")
traced = scripts.load("speed/updates")
SPEC = Spec(17, 6, 1)
# The time goes into compiling, not into running.
COMPILER = {"xla_backend_optimization_level": 0}


def cells(text: str) -> list[list[str]]:
    """Rows of a Markdown table, the rule below its head checked and left out."""
    head, rule, *rows = (line.strip("| ").split(" | ") for line in text.splitlines())
    assert set(rule) == {"---"} and all(len(row) <= len(head) for row in rows)
    return [head, *rows]


# Cost


def test_parameters_are_counted_as_the_policy_has_them():
    _, arguments = cost.parts("sgd", 5, 2, SPEC)
    have = sum(leaf.size for leaf in jax.tree.leaves(arguments[1]))
    assert cost.net_of(5, SPEC).parameters == have


@pytest.mark.parametrize("parameters", [1e3, 1e4, 1e7])
def test_widths_come_nearest(parameters: float):
    width = cost.width_for(parameters, SPEC)
    off = [abs(cost.net_of(w, SPEC).parameters - parameters) for w in range(1, 3300)]
    assert width == 1 + int(np.argmin(off))


@pytest.mark.parametrize("method", cost.METHODS)
def test_arithmetic_by_hand_is_that_of_the_program(method: str):
    width, batch = (9 if method == "npg" else 48), 128
    improve, arguments = cost.parts(method, width, batch, SPEC)
    operations = traced.matmul_flops(improve, *arguments)
    counted = 2.0 * cost.arithmetic(method, cost.net_of(width, SPEC), batch)
    if method in ("sgd", *cost.RANK1):
        assert operations == counted
    else:
        assert counted == pytest.approx(operations, rel=0.15)


def test_rank_one_adds_a_row():
    net = cost.net_of(64, SPEC)
    sgd, pair = (cost.arithmetic(name, net, 128) for name in ("sgd", "pair"))
    assert pair / sgd == pytest.approx(1 + 1 / 128, rel=1e-12)


@pytest.mark.parametrize("method", ["pair", "trpo"])
def test_every_update_does_the_same(method: str):
    """The timed steps are short: parameters stay where they are."""
    improve, arguments = cost.parts(method, 4, 8, SPEC)
    actor, _, metrics = jax.jit(improve, compiler_options=COMPILER)(*arguments)
    old = jax.tree.leaves(arguments[1])
    for new, was in zip(jax.tree.leaves(actor), old, strict=True):
        np.testing.assert_allclose(new, was, atol=1e-5)
    assert metrics and all(np.isfinite(value) for value in metrics.values())


def test_what_is_too_long_or_too_large_is_skipped():
    settings = cost.Settings(longest=1.0, memory=4.0)
    net = cost.net_of(88, SPEC)
    assert not cost.why_skipped("npg", net, 128, 1e-9, settings)
    ratio = cost.arithmetic("npg", net, 128) / cost.arithmetic("sgd", net, 128)
    told = cost.why_skipped("npg", net, 128, 10.0 / ratio, settings)
    assert told == "about 10 s"
    wide = cost.net_of(304, SPEC)
    assert re.fullmatch(
        r"about [\d,.]+ GiB", cost.why_skipped("npg", wide, 128, 1e-9, settings)
    )


def made(method: str, ratios: tuple[float, ...], **changes):
    values = {"parameters": 1000, "batch": 128, "seconds": (0.002,), "counted": 1.01}
    return cost.Measured(method=method, ratios=ratios, **{**values, **changes})


def test_table_shows_medians_and_the_middle_half():
    measured = [
        made("sgd", (1.0,) * 5, seconds=(0.001, 0.009, 0.002)),
        made("pair", (1.0, 9.0, 1.1, 1.3, 1.2)),
        made("npg", (), skipped="about 12 s"),
    ]
    head, row = cells(cost.table(measured))
    assert head == ["parameters", "batch", "sgd, ms", "pair", "npg"]
    assert row[:3] == ["1,000", "128", "2"]
    assert row[3:] == ["1.20 (1.10 to 1.30), 1.01", "skipped: about 12 s"]


def test_verdict_is_about_rank_one_at_large_batches():
    kept = [made("pair", (1.4,)), made("kfac", (9.0,)), made("sgd", (1.0,))]
    small = made("fresh", (3.0,), batch=64)
    assert "kept; the largest median is 1.40, of pair" in cost.verdict([*kept, small])
    broken = cost.verdict([*kept, dataclasses.replace(small, batch=1024)])
    assert "BROKEN" in broken and "3.00, of fresh" in broken
    assert cost.verdict([made("kfac", (9.0,))]) == ""


def test_ratios_are_taken_repeat_by_repeat(monkeypatch: pytest.MonkeyPatch):
    # A sizing run, then SGD and pair by turns: the ratio of medians would be 2.
    times = iter([1.0, 1.0, 4.0, 2.0, 2.0, 3.0, 12.0])
    monkeypatch.setattr(cost, "seconds_per_update", lambda run, count: next(times))
    monkeypatch.setattr(cost, "_count_for", lambda run, seconds: 1)
    monkeypatch.setattr(cost, "updates", lambda *arguments: lambda count: None)
    settings = cost.Settings(methods=("pair",), repeats=3)
    sgd, pair = cost.measure(1e3, 128, SPEC, settings)
    assert (sgd.method, pair.method) == ("sgd", "pair")
    assert pair.seconds == (4.0, 2.0, 12.0) and pair.ratios == (4.0, 1.0, 4.0)
    assert pair.ratio == 4.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("rank1",)}, "unknown method 'rank1'"),
        ({"parameters": (3.0,)}, "--parameters 3: nets have"),
        ({"parameters": (float("nan"),)}, "--parameters nan"),
        ({"batches": (0,)}, "--batches need positive"),
        ({"repeats": 0}, "--repeats must be positive"),
        ({"longest": float("inf")}, "--longest must be positive"),
        ({"obs_dim": 0}, "--obs-dim and --action-dim"),
    ],
)
def test_cost_refuses_what_it_cannot_measure(changes: dict, message: str):
    with pytest.raises(UsageError, match=message):
        cost.main(cost.Settings(**changes))


def test_cost_runs_and_prints_its_conditions(capsys: pytest.CaptureFixture[str]):
    settings = cost.Settings(
        parameters=(100.0,),
        batches=(4,),
        methods=("pair", "npg"),
        obs_dim=3,
        action_dim=2,
        seconds=1e-4,
        repeats=2,
        memory=1e-4,
    )
    cost.main(settings)
    printed, told = capsys.readouterr()
    assert re.search(r"^npg, d = \d+, batch 4: skipped, about", told, re.MULTILINE)
    head, row = cells("\n".join(re.findall(r"^\|.*$", printed, re.MULTILINE)))
    assert head[3:] == ["pair", "npg"] and row[1] == "4"
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\), 1\.25", row[3])
    assert row[4].startswith("skipped: about")
    assert "Gaussian policy, O=3, A=2, 2 x 0.0001 s" in printed


# Spirals

TINY = spirals.Settings(rates=(0.1, 1.0), seeds=2, steps=3, batch=4)


def test_spirals_are_those_of_the_page():
    page = (DOCS / "fisher.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(block[: block.index("net =")], names)
    x, label = spirals.spirals()
    np.testing.assert_allclose(x, names["x"], rtol=1e-6)
    np.testing.assert_array_equal(label, names["label"])


def test_rows_of_the_page_are_the_optimisers():
    page = (DOCS / "fisher.md").read_text("utf-8")
    shown = re.findall(r"^\| optimiser \|.*\n(?:\|.*\n)+", page, re.MULTILINE)
    head, *rows = cells(shown[0].strip())
    assert head == ["optimiser", "best rate", "loss", "removed"]
    titles = [optimiser.title for optimiser in spirals.OPTIMISERS.values()]
    assert [row[0] for row in rows] == titles
    assert all(re.fullmatch(r"0\.\d{4} ± 0\.\d{4}", row[2].strip(" |")) for row in rows)


def test_a_member_is_the_run_alone():
    optimiser = spirals.OPTIMISERS["rank1-0.1"]
    found = spirals.train_all(optimiser, TINY)
    assert found.loss.shape == found.removed.shape == (2, 2)
    alone, removed = spirals.train(
        jnp.asarray(1), jnp.float32(1.0), spirals.spirals(), optimiser, 3, 4
    )
    np.testing.assert_allclose(found.loss[1, 1], alone, rtol=1e-4)
    np.testing.assert_allclose(found.removed[1, 1], removed, rtol=1e-3)
    assert 0.0 < removed < 1.0
    assert len(np.unique(found.loss)) == 4


def test_shortened_is_the_gradient_over_its_square():
    rule = spirals.shortened(0.5)
    g = {"w": jnp.array([3.0, 4.0])}
    u, _ = rule.update(g, rule.init(g))
    assert isinstance(u, dict)
    np.testing.assert_allclose(u["w"], np.array([3.0, 4.0]) / 25.5, rtol=1e-6)


def test_the_best_rate_has_the_smallest_mean_and_is_no_nan():
    nan = float("nan")
    loss = np.array([[nan, 0.0], [0.5, 0.3], [0.1, 0.5], [0.2, 0.6]])
    removed = np.full((4, 2), nan)
    sgd = spirals.Trained(loss, removed)
    assert spirals.best_rate(sgd) == 2
    rank1 = spirals.Trained(loss[1:], np.array([[0.1, 0.2], [0.3, 0.4], [0.9, 0.9]]))
    found = {"sgd": sgd, "rank1-0.1": rank1}
    text = spirals.table({"sgd": sgd}, (0.1, 0.2, 0.3, 1.0))
    assert cells(text)[1] == ["SGD", "0.3", "0.3000 ± 0.2828"]
    row = cells(spirals.table({"rank1-0.1": rank1}, (0.2, 0.3, 1.0)))[1]
    assert row == ["rank 1, relative damping 0.1", "0.3", "0.3000 ± 0.2828", "0.35"]
    head, first, _ = cells(spirals.rates_table(found, (0.1, 0.2, 0.3, 1.0)))
    assert head[1:] == ["0.1", "0.2", "0.3", "1"]
    assert first == ["SGD", "nan", "0.4", "0.3", "0.4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimisers": ("adma",)}, "unknown optimiser 'adma'; did you mean 'adam'"),
        ({"steps": 0}, "--steps must be positive, not 0"),
        ({"rates": ()}, "need at least one"),
        ({"rates": (0.1, -1.0)}, "--rates must be positive, not -1"),
    ],
)
def test_spirals_refuse_what_cannot_be_trained(changes: dict, message: str):
    with pytest.raises(UsageError, match=message):
        spirals.main(spirals.Settings(**changes))


def test_spirals_print_both_tables(capsys: pytest.CaptureFixture[str]):
    settings = dataclasses.replace(TINY, optimisers=("sgd",), every_rate=True)
    spirals.main(settings)
    printed = capsys.readouterr().out
    first, second, told = printed.strip().split("\n\n")
    assert cells(first)[1][0] == "SGD" and cells(second)[0][1:] == ["0.1", "1"]
    assert told.startswith("3 steps, batch 4, 2 seeds")


def test_a_mistake_is_one_line():
    command = [sys.executable, str(scripts.BENCHMARKS / "onpolicy" / "spirals.py")]
    done = subprocess.run(
        [*command, "--seeds", "0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "error: --seeds must be positive, not 0\n"
