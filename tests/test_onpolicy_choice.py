"""benchmarks/onpolicy/choose.py against sums done by hand, and grids of suites."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import scripts
from test_results_rows import make_row

from offrl_jax import results
from offrl_jax.benchmark import planning
from offrl_jax.benchmark.suites import Suite, load_suite
from offrl_jax.errors import UsageError

TASKS = ("online/CartPole-v1", "online/Acrobot-v1")


choose = scripts.load("onpolicy/choose")


def run(setting: str, task: int, seed: int, score: float | None, **changes):
    values = {
        "role": "tune",
        "agent": "a2c@quick",
        "setting": setting,
        "task": TASKS[task],
        "seed": seed,
        "score": score,
        "step": 100,
        "updates_total": 100,
    }
    return make_row(**{**values, **changes})


SMALL, LARGE = "sgd,actor_lr=0.1", "sgd,actor_lr=0.3"
ROWS = [
    run(SMALL, 0, 1000, 10.0),
    run(SMALL, 0, 1001, 20.0),
    run(SMALL, 1, 1000, 50.0),
    run(SMALL, 1, 1001, 50.0),
    run(LARGE, 0, 1000, 90.0),
    run(LARGE, 0, 1001, None, status="diverged", returns=[]),
    run(LARGE, 1, 1000, 0.0),
    run(LARGE, 1, 1001, 0.0),
    # Not final, and of a test: neither counts.
    run(SMALL, 0, 1000, 99.0, step=50),
    run(LARGE, 1, 1, 99.0, role="test"),
]


def test_the_best_mean_over_tasks_is_chosen():
    """Small: (15 + 50) / 2.  Large: the diverged run counts as the 10 of its task's
    worst, (50 + 0) / 2."""
    (ranked,) = choose.arms_of(ROWS).values()
    assert [one.setting for one in ranked] == [SMALL, LARGE]
    assert [one.merit for one in ranked] == [32.5, 25.0]
    assert choose.varied(ranked[0].setting) == {"actor_lr": "0.1"}


def test_the_table_shows_how_close_it_was():
    text = choose.table(choose.arms_of(ROWS))
    last = [cell.strip() for cell in text.splitlines()[-1].strip("| ").split("|")]
    chosen = ["a2c@quick sgd", "2", "actor_lr 0.1"]
    assert last == [*chosen, "50.0", "15.0", "32.5", "25.0", "28.8"]


def test_settings_are_compared_on_the_same_runs():
    with pytest.raises(UsageError, match="3 of 4 runs are there"):
        choose.arms_of(ROWS[1:])


def test_test_rows_choose_nothing():
    with pytest.raises(UsageError, match="no rows of finished tuning runs"):
        choose.arms_of([row for row in ROWS if row.role == "test"])


def test_raw_returns_choose_nothing():
    with pytest.raises(UsageError, match="no reference scores"):
        choose.arms_of([run(SMALL, 0, 1000, None)])


GRID = """
agents = ["a2c"]
tasks = ["online/CartPole-v1"]
seeds = 2
updates = 1024
role = "tune"
first_seed = 1000
[grids.a2c.sgd]
optimiser = ["sgd"]
actor_lr = [0.1, 0.3]
hidden = [[8, 8], [16, 16]]
[settings.a2c.mine]
actor_lr = 1e-3
"""


def suite_of(tmp_path: Path, text: str) -> Suite:
    path = tmp_path / "tuning.toml"
    path.write_text(text)
    return load_suite(str(path))


def test_a_grid_is_every_combination(tmp_path):
    settings = suite_of(tmp_path, GRID).settings["a2c"]
    assert list(settings) == [
        "mine",
        "sgd,actor_lr=0.1,hidden=[8, 8]",
        "sgd,actor_lr=0.1,hidden=[16, 16]",
        "sgd,actor_lr=0.3,hidden=[8, 8]",
        "sgd,actor_lr=0.3,hidden=[16, 16]",
    ]
    last = {"optimiser": "sgd", "actor_lr": 0.3, "hidden": [16, 16]}
    assert settings["sgd,actor_lr=0.3,hidden=[16, 16]"] == last


def test_chosen_settings_hold_what_the_grid_fixes(tmp_path):
    suite = suite_of(tmp_path, GRID.replace("hidden = [[8, 8], [16, 16]]\n", ""))
    found = tomllib.loads(choose.settings(choose.arms_of(ROWS), suite))
    assert found["settings"]["a2c"]["sgd"] == {"optimiser": "sgd", "actor_lr": 0.1}
    with pytest.raises(UsageError, match="has no setting 'sgd,actor_lr"):
        choose.settings(choose.arms_of(ROWS), suite_of(tmp_path, GRID))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("actor_lr = [0.1, 0.3]", "actor_lr = 0.1"), "must be a list of alternatives"),
        (("actor_lr = [0.1, 0.3]", "actor_lr = []"), "must be a list of alternatives"),
        (("actor_lr = [0.1, 0.3]", "actor_lr = [0.1, 0.1]"), "two settings"),
        (("[grids.a2c.sgd]", "[grids.a2c]"), "must hold tables"),
        (('role = "tune"', 'role = "tuning"'), "role 'tuning'"),
        (("first_seed = 1000", "first_seed = 999"), "seeds from 1000 on"),
        (('role = "tune"', 'role = "test"'), "a test takes seeds from 0 to 999"),
    ],
)
def test_bad_grids_and_seeds_are_told_in_one_line(tmp_path, change, message):
    with pytest.raises(UsageError, match=message) as caught:
        suite_of(tmp_path, GRID.replace(*change))
    assert "\n" not in str(caught.value)


def test_on_policy_agents_and_data_do_not_mix(tmp_path):
    online = suite_of(tmp_path, GRID)
    everything = suite_of(tmp_path, GRID.replace('["a2c"]', '["*"]'))
    found = planning.agent_labels(everything)
    assert "ppo" in found and "rank1_ac" in found and "iql" not in found
    with pytest.raises(UsageError, match="iql learns from data, and online/CartPole"):
        planning.agent_labels(suite_of(tmp_path, GRID.replace('["a2c"]', '["iql"]')))
    offline = GRID.replace("online/CartPole-v1", "classic/pendulum-mixed-v0")
    with pytest.raises(UsageError, match="a2c gathers its own experience"):
        planning.agent_labels(suite_of(tmp_path, offline))
    assert planning.agent_labels(online) == ["a2c"]


def test_rows_of_the_tuning_suite_are_no_leaderboard(tmp_path):
    from offrl_jax import leaderboard
    from offrl_jax.errors import ResultsError

    with results.RowFile(results.row_path(tmp_path, "x"), print) as file:
        for row in ROWS[:4]:
            file.append(row)
    with pytest.raises(ResultsError, match="only tuning"):
        leaderboard.build(tmp_path)
