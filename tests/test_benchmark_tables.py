"""benchmarks/tables.py against sums done by hand, from rows written to a folder."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import scripts
from test_results_metrics import make_point
from test_results_rows import make_row

from offrl_jax import results
from offrl_jax.errors import UsageError

SCRIPT = scripts.BENCHMARKS / "tables.py"


tables = scripts.load("tables")
TASK = "classic/pendulum-mixed-v0"


def score_row(setting: str, seed: int, score: float | None, **changes):
    values = {"task": TASK, "agent": "acpo", "step": 100, "updates_total": 100}
    values |= {"setting": setting, "seed": seed, "score": score}
    return make_row(**{**values, "updates_per_s": 1000.0, **changes})


ROWS = [
    score_row("a", 0, 10.0),
    score_row("a", 1, 20.0),
    score_row("a", 2, 30.0),
    score_row("b", 0, 12.0, updates_per_s=800.0),
    score_row("b", 1, 22.0),
    score_row("b", 2, 35.0),
    # Not final, and of a behaviour: neither counts.
    score_row("b", 0, 99.0, step=50),
    make_row(task=TASK, agent="behaviour", setting="dataset", seed=None),
]


def cells(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_means_intervals_and_paired_differences_by_hand():
    found = tables.final_evaluations(ROWS)
    text = tables.table(TASK, found, {}, against="a")
    by_name = cells(text)
    # t(0.975, 2 degrees) = 4.30265; a: sd 10; differences 2, 2, 5: mean 3, sd sqrt(3).
    half = 4.30265 * 10.0 / math.sqrt(3.0)
    assert by_name["a"] == [
        "20.0",
        f"[{20 - half:.1f}, {20 + half:.1f}]",
        "10.0 to 30.0 (3)",
        "",
        "1,000",
    ]
    assert by_name["b"][0] == "23.0"
    assert by_name["b"][3] == f"+3.0 [{3 - 4.30265:+.1f}, {3 + 4.30265:+.1f}]"
    assert by_name["b"][4] == "800"
    assert text.index("| b |") < text.index("| a |"), "best first"


def test_a_failed_run_shows_and_sorts_last():
    rows = [*ROWS, score_row("c", 0, None), score_row("c", 1, 90.0)]
    lines = tables.table(TASK, tables.final_evaluations(rows), {}).splitlines()
    assert lines[-1].startswith("| c | nan")


def test_returns_of_a_task_without_a_reference():
    rows = [
        score_row("a", 0, None, returns=[1.0, 2.0], lengths=[3, 3]),
        score_row("a", 1, None, returns=[4.0, 5.0], lengths=[3, 3]),
        score_row("b", 0, None, returns=[], lengths=[]),
    ]
    found = tables.final_evaluations(rows, tables.mean_return)
    assert found[TASK, "acpo", "a"].scores == {0: 1.5, 1: 4.5}
    shown = tables.table(TASK, found, {}, what="return").splitlines()
    assert shown[0].startswith(f"| {TASK} | mean return |")
    assert shown[2].startswith("| a | 3.0 |") and shown[3].startswith("| b | nan |")


def test_two_agents_setting_by_setting():
    rows = [
        score_row("a", seed, 10.0 * seed + shift, agent=agent)
        for agent, shift in (("one", 3.0), ("other", 1.0))
        for seed in range(3)
    ]
    rows += [score_row("b", 0, 5.0, agent="one")]
    found = tables.final_evaluations(rows)
    shown = tables.differences(TASK, found, "one", "other").splitlines()
    assert shown[0] == f"| {TASK} | one minus other | seeds |"
    assert shown[2:] == ["| a | +2.0 [+2.0, +2.0] | 3 |"]
    asked = tables.Tables(Path(), against="a", between=("one", "other"))
    with pytest.raises(UsageError, match="--between makes a table of its own"):
        tables.main(asked)
    with pytest.raises(UsageError, match="no setting that both one and none have"):
        tables.differences(TASK, found, "one", "none")


def test_medians_of_the_last_finite_points():
    points = [
        make_point(agent="acpo", setting="a", seed=seed, step=step, values={"kappa": k})
        for seed, step, k in ((0, 90, 9.0), (0, 100, 1.0), (1, 100, 2.0), (2, 100, 7.0))
    ]
    points.append(make_point(agent="acpo", setting="a", seed=3, values={"kappa": 99.0}))
    points.append(
        make_point(agent="acpo", setting="a", phase="behaviour", step=500, values={})
    )
    recorded = tables.final_metrics(points)
    assert recorded == {(TASK, "acpo", "a"): {"kappa": (2.0 + 7.0) / 2}}
    found = tables.final_evaluations(ROWS)
    by_name = cells(tables.table(TASK, found, recorded, metrics=("kappa", "absent")))
    assert by_name[TASK][-1] == "`kappa`" and by_name["a"][-1] == "4.5"


@pytest.mark.parametrize("name", ["nobody", "acpo"])
def test_a_reference_that_is_not_one_arm_is_refused(name):
    with pytest.raises(UsageError, match=f"'{name}' names [02] arms .* acpo, b"):
        tables.table(TASK, tables.final_evaluations(ROWS), {}, against=name)


def test_the_command_reads_a_folder_and_survives_a_closed_pipe(tmp_path):
    with results.RowFile(results.row_path(tmp_path, "run-a"), pytest.fail) as file:
        for row in ROWS:
            if row.agent == "acpo":
                file.append(row)
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| b | 23.0 |" in done.stdout and done.stderr == ""
    closed = subprocess.run(
        f"set -o pipefail; {sys.executable} {SCRIPT} {tmp_path} | true",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (closed.returncode, closed.stderr) == (0, "")
    empty = subprocess.run(
        [*command[:2], str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert empty.returncode != 0 and len(empty.stderr.splitlines()) == 1
