"""Random search in suite files: what is drawn, what it depends on, what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from test_benchmark_planning import wanted

from offrl_jax.benchmark import planning
from offrl_jax.benchmark.search import Interval, drawn_settings
from offrl_jax.benchmark.suites import Suite, load_suite
from offrl_jax.errors import UsageError

SEARCH = """
agents = ["td3_bc"]
preset = "quick"
tasks = ["local/a-v0", "local/b-v0"]
seeds = 2
updates = 100
[search.td3_bc.wide]
count = 6
seed = 3
alpha = {low = 0.5, high = 10.0}
actor_lr = {low = 1e-5, high = 1e-2, log = true}
"""


def suite_of(tmp_path: Path, text: str) -> Suite:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_suite(str(path))


def values(count: int, name: str = "x", agent: str = "iql", **entries) -> list:
    table = {"count": count, **entries}
    found = drawn_settings("[here]", agent, "wide", table)
    return [one[name] for one in found.values()]


def test_draws_have_the_distribution_that_was_asked_for():
    """Kolmogorov-Smirnov against scipy's; the draws are fixed, so is the answer."""
    other = {"low": 0.0, "high": 1.0}  # so that no draw is repeated, and passed over
    flat = values(1000, x={"low": -2.0, "high": 5.0}, other=other)
    assert scipy.stats.kstest(flat, scipy.stats.uniform(-2, 7).cdf).pvalue > 0.05
    log = values(1000, x={"low": 1e-5, "high": 1e-2, "log": True}, other=other)
    assert scipy.stats.kstest(log, scipy.stats.loguniform(1e-5, 1e-2).cdf).pvalue > 0.05
    # What is not asked for would be seen.
    assert scipy.stats.kstest(log, scipy.stats.uniform(0, 1e-2).cdf).pvalue < 1e-6


def test_whole_numbers_and_choices_are_even():
    dice = {"low": 1, "high": 6, "integer": True}
    spread = {"low": 0.0, "high": 1.0}
    thrown = values(900, x=dice, other=spread)
    assert {type(x) for x in thrown} == {int}
    counts = np.bincount(thrown, minlength=7)[1:]
    assert len(counts) == 6 and scipy.stats.chisquare(counts).pvalue > 0.05
    chosen = values(900, x=["a", "b", "c"], other=spread)
    counts = [chosen.count(letter) for letter in "abc"]
    assert sum(counts) == 900 and scipy.stats.chisquare(counts).pvalue > 0.05


def test_whole_numbers_on_a_logarithm():
    """[2^0, 2^1), [2^1, 2^2) ... [2^9, 2^10) are equally likely."""
    sizes = values(
        900,
        x={"low": 1, "high": 1023, "log": True, "integer": True},
        other={"low": 0.0, "high": 1.0},
    )
    counts = np.bincount([int(math.log2(size)) for size in sizes], minlength=10)
    assert max(sizes) <= 1023 and min(sizes) == 1
    assert scipy.stats.chisquare(counts).pvalue > 0.05


def test_numbers_can_be_read_and_stay_inside():
    for value in values(200, x={"low": 0.9903, "high": 0.9996}):
        assert 0.9903 <= value <= 0.9996 and value == round(value, 6)
    for value in values(200, x={"low": 1e-5, "high": 1e-2, "log": True}):
        assert value == float(f"{value:.3g}")
    assert Interval(0.0, 1.0).at(0.123456) == 0.123
    assert Interval(0.99, 0.999).at(0.123456) == 0.991111
    assert Interval(0.0, 1e6).at(0.123456) == 123_000.0
    assert Interval(1, 4, integer=True).at(0.9999) == 4


def test_a_draw_depends_on_its_own_names_alone():
    flat, log = {"low": 0.0, "high": 1.0}, {"low": 1e-4, "high": 1.0, "log": True}
    alone = values(5, x=flat)
    assert values(5, x=flat, y=log) == alone
    assert values(9, x=flat)[:5] == alone
    assert values(5, x=flat, seed=0) == alone
    assert values(5, x=flat, seed=1) != alone
    assert values(5, x=flat, agent="bc") != alone
    assert values(5, name="y", y=flat) != alone
    # Two settings of one search are independent.
    both = drawn_settings("", "iql", "wide", {"count": 500, "x": flat, "y": flat})
    pairs = np.array([[one["x"], one["y"]] for one in both.values()])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.1


def test_names_say_what_was_drawn():
    table = {"count": 2, "x": {"low": 0.0, "high": 1.0}, "kind": ["sgd"]}
    found = drawn_settings("", "iql", "wide", table)
    for name, one in found.items():
        assert name == f"wide,x={one['x']}" and one["kind"] == "sgd"


def test_a_repeated_draw_is_passed_over():
    found = values(6, x={"low": 1, "high": 6, "integer": True})
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UsageError, match=r"count is 7, but .* only 6 different"):
        values(7, x={"low": 1, "high": 6, "integer": True})


def test_numbers_are_one_population_and_structure_splits_jobs(tmp_path):
    suite = suite_of(tmp_path, SEARCH)
    (job,) = wanted(suite)
    assert len(job.members) == 6 * 2 * 2
    drawn = {m.setting: (m.hyper["alpha"], m.hyper["actor_lr"]) for m in job.members}
    assert drawn == {
        name: (one["alpha"], one["actor_lr"])
        for name, one in suite.settings["td3_bc"].items()
    }
    split = suite_of(tmp_path, SEARCH + "hidden = [[8, 8], [16, 16]]\n")
    jobs = wanted(split)
    assert {tuple(job.config["hidden"]) for job in jobs} == {(8, 8), (16, 16)}
    assert len(jobs) == 2 and sum(len(job.members) for job in jobs) == 24
    # What was drawn of the numbers is what it was without the structure.
    assert [one["alpha"] for one in split.settings["td3_bc"].values()] == [
        one["alpha"] for one in suite.settings["td3_bc"].values()
    ]


def test_searches_stand_beside_grids_and_settings(tmp_path):
    more = "[grids.td3_bc.few]\nalpha = [1.0, 2.0]\n[settings.td3_bc.mine]\nalpha = 5.0"
    names = list(suite_of(tmp_path, SEARCH + more).settings["td3_bc"])
    assert names[:3] == ["mine", "few,alpha=1.0", "few,alpha=2.0"]
    assert len(names) == 9 and all(name.startswith("wide,") for name in names[3:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("count = 6", "count = 0"), "count is 0; .* from 1 to 1,000"),
        (("count = 6", "count = 100_000"), "count is 100000; .* from 1 to 1,000"),
        (("count = 6", "count = 2.0"), "count is 2.0"),
        (("count = 6", ""), "count is None; give how many"),
        (("seed = 3", "seed = -1"), "seed is -1"),
        (("low = 0.5", "low = 20"), "low is 20 and high 10.0; low must be below high"),
        (("low = 0.5", "low = 10.0"), "low must be below high"),
        (("low = 1e-5", "low = 0"), "a logarithm needs low above 0"),
        (("low = 1e-5", "low = -1.0"), "a logarithm needs low above 0"),
        (("low = 0.5", 'low = "0.5"'), "low is '0.5'; expected a finite number"),
        (("high = 10.0", "high = inf"), "high is inf; expected a finite number"),
        (("low = 0.5, ", ""), "lacks 'low'"),
        (("log = true", "log = 1"), "log is 1; expected true or false"),
        (("log = true", "logg = true"), "did you mean 'log'"),
        (("high = 10.0", "high = 10.0, integer = true"), "takes whole numbers"),
        (("{low = 0.5, high = 10.0}", "2.5"), r"is 2.5; write a list .* \{low = 0.1"),
        (("{low = 0.5, high = 10.0}", "[]"), "is an empty list"),
        (("td3_bc.wide", "td3_bc"), "must hold tables"),
        (("[search", "[serch"), "did you mean 'search'"),
    ],
)
def test_bad_searches_are_told_in_one_line(tmp_path, change, message):
    text = SEARCH.replace(*change)
    assert text != SEARCH
    with pytest.raises(UsageError, match=message) as caught:
        suite_of(tmp_path, text)
    assert "\n" not in str(caught.value) and "mine.toml" in str(caught.value)


def test_a_search_of_nothing_is_refused():
    with pytest.raises(UsageError, match="names no setting to draw"):
        drawn_settings("[here]", "iql", "wide", {"count": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("alpha =", "alfa ="), "did you mean 'alpha'"),
        (("[search.td3_bc.wide]", "[search.td3bc.wide]"), "did you mean 'td3_bc'"),
        (("alpha =", "batch_size ="), "'batch_size' of td3_bc is .* an integer"),
        (("low = 0.5, high = 10.0", "low = -3.0, high = -1.0"), "choose a value in"),
    ],
)
def test_unknown_names_and_impossible_values_are_told(tmp_path, change, message):
    suite = suite_of(tmp_path, SEARCH.replace(*change))
    with pytest.raises(UsageError, match=message) as caught:
        planning.check_request(suite, ["local"], {}, None)
    assert "\n" not in str(caught.value)


def test_no_agent_has_a_setting_that_a_search_could_not_name():
    from offrl_jax.agents.registry import REGISTRY

    for entry in REGISTRY.values():
        fields = (*dataclasses.fields(entry.config), *dataclasses.fields(entry.hyper))
        assert not {"count", "seed"} & {field.name for field in fields}, entry.name
