"""What the speed scripts measure and print; never a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scripts
from rich.console import Console

from offrl_jax.agents.registry import REGISTRY
from offrl_jax.errors import UsageError
from offrl_jax.leaderboard import build as build_leaderboard
from offrl_jax.population import make_mesh
from offrl_jax.types import Spec

FOLDER = scripts.BENCHMARKS / "speed"
SPEC = Spec(obs_dim=11, action_dim=3, horizon=1000)


updates = scripts.load("speed/updates")
startup = scripts.load("speed/startup")
leaderboards = scripts.load("speed/leaderboard")


def test_synthetic_transitions_are_whole_episodes() -> None:
    data = updates.synthetic_transitions(SPEC, 2500)
    assert data.obs.shape == (2500, 11) and data.action.shape == (2500, 3)
    assert all(leaf.dtype == np.float32 for leaf in data)
    ends = np.flatnonzero(data.has_next_action == 0)
    np.testing.assert_array_equal(ends, [999, 1999, 2499])
    assert not data.next_action[ends].any()
    inside = data.has_next_action[:-1] == 1
    np.testing.assert_array_equal(
        data.next_action[:-1][inside], data.action[1:][inside]
    )
    np.testing.assert_array_equal(data.next_obs[:-1][inside], data.obs[1:][inside])


def test_every_agent_runs_as_it_is_and_with_an_undelayed_actor() -> None:
    assert updates.variants(REGISTRY["bc"]) == {"bc": {}}
    assert updates.variants(REGISTRY["td3_bc"]) == {
        "td3_bc": {},
        "td3_bc policy_delay=1": {"policy_delay": 1},
    }


@pytest.mark.parametrize("devices", [1, 2])
def test_products_do_as_much_as_they_are_counted_for(devices: int) -> None:
    mesh = make_mesh(jax.local_devices()[:devices])
    # On CPU, one pair of matrices per device, however many members there are.
    assert updates.products_flops(8, 16, mesh, 5) == devices * 2 * 8 * 16 * 16
    updates.products(8, 16, mesh, 5)(3)


def test_rows_hold_what_was_measured() -> None:
    settings = updates.Settings(batch_size=8, transitions=50, seconds=1e-3, repeats=3)
    (row,) = updates.measure([REGISTRY["bc"]], 16, 3, settings)
    assert (row.label, row.width, row.seeds, row.devices) == ("bc", 16, 3, 2)
    layers = 11 * 16 + 16 * 16 + 16 * 3
    assert row.flops == 2 * 8 * (3 * layers - 11 * 16)
    # Of one Q net: 11 + 3 inputs, one output.
    unit = 2 * 8 * (14 * 16 + 16 * 16 + 16)
    assert row.passes == pytest.approx(row.flops / unit)
    assert row.updates_per_s > 0 and row.matmul_rate > 0
    assert len(row.shares) == 3 and min(row.shares) <= row.share <= max(row.shares)


def test_rows_of_one_and_of_two_devices() -> None:
    settings = updates.Settings(
        batch_size=8, transitions=50, seconds=1e-3, repeats=2, devices=(1, 2)
    )
    one, two = updates.measure([REGISTRY["bc"]], 16, 3, settings)
    assert (one.label, one.devices, one.to_first) == ("bc", 1, 1.0)
    assert (two.label, two.devices) == ("bc", 2)
    assert two.to_first > 0 and two.flops == one.flops
    with pytest.raises(UsageError, match="--devices 3: there are 1 to 2"):
        updates.measure([], 16, 3, updates.Settings(devices=(3,)))


def test_speeds_are_compared_repeat_by_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    # Products, first agent, products, second agent, products; three times.
    rates = iter([1, 10, 3, 5, 1, 1, 20, 3, 4, 1, 1, 40, 3, 30, 1])
    monkeypatch.setattr(updates, "_rate", lambda run, count: float(next(rates)))
    monkeypatch.setattr(updates, "_count_for", lambda run, seconds, stride: 1)
    monkeypatch.setattr(updates, "training", lambda *arguments: (None, 1))
    settings = updates.Settings(batch_size=8, transitions=50, repeats=3)
    entries = [REGISTRY["bc"], REGISTRY["gaussian_bc"]]
    first, second = updates.measure(entries, 16, 2, settings)
    # Two seeds each; the ratio of medians would be 1/4.
    assert (first.updates_per_s, second.updates_per_s) == (40.0, 10.0)
    assert (first.to_first, second.to_first) == (1.0, 0.5)
    # Products count as they ran on either side: at 2 per second.
    unit = updates.products_flops(8, 16, make_mesh(jax.local_devices()[:2]), 2)
    assert first.matmul_rate == second.matmul_rate == 2 * unit
    assert first.share == pytest.approx(first.flops * 40 / (2 * unit))


def test_measurements_are_long_enough_where_calls_cost_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]

    def run(updates: int) -> None:
        clock[0] += 0.1 + 0.01 * updates

    monkeypatch.setattr(updates.time, "perf_counter", lambda: clock[0])
    count = updates._count_for(run, 1.0, 2)
    # Extrapolated from its first call it would be 16 updates, a quarter of the time.
    assert count % 2 == 0 and 0.75 <= 0.1 + 0.01 * count <= 1.25


def test_table_shows_rates_and_shares() -> None:
    row = updates.Measurement(
        "x", 64, 5, 2, 2e9, 13.77, 1234.0, 0.123, 4e12, (0.5, 0.61, 0.7)
    )
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(updates.tabulate([row]))
        text = console.export_text()
    shown = ("64x64", "2.0000", "13.8", "1,234", "0.123", "2468.0", "4000.0", "61%")
    for cell in (*shown, "50%-70%"):
        assert cell in text


def test_unknown_agent_is_refused() -> None:
    with pytest.raises(
        UsageError, match="unknown agent 'td3bc'; did you mean 'td3_bc'"
    ):
        updates.main(updates.Settings(agents=("td3bc",)))


def test_updates_script_runs(tmp_path: Path) -> None:
    # Its own process: it sets the number of devices and the cache.
    environment = startup.environment_of(tmp_path) | {"JAX_PLATFORMS": "cpu"}
    options = "--agents bc --widths 8 --seeds 1 --batch-size 4 --transitions 20"
    command = [sys.executable, str(FOLDER / "updates.py"), *options.split()]
    command += ["--seconds", "0.001", "--repeats", "1"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "8x8" in done.stdout and "batch 4, O=11, A=3" in done.stdout


def test_first_update_tells_its_stages(tmp_path: Path) -> None:
    environment = startup.environment_of(tmp_path)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
    assert "PYTHONDONTWRITEBYTECODE" not in environment
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    timed = startup.run_timed([str(FOLDER / "first_update.py")], environment)
    assert list(timed.stages) == ["imports", "initial state", "first update"]
    times = [*timed.stages.values(), timed.total]
    assert times == sorted(times)
    assert startup._programs(tmp_path)


def test_failed_process_is_not_a_measurement(tmp_path: Path) -> None:
    code = "import sys; sys.exit('out of luck')"
    with pytest.raises(RuntimeError, match="exited with 1: out of luck"):
        startup.run_timed(["-c", code], startup.environment_of(tmp_path))


def test_startup_table_shows_medians() -> None:
    rounds = [
        {"a": {"end": s}, "b": {"one": 1.0, "two": 2 * s}} for s in (1.0, 9.0, 3.0)
    ]
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(startup.tabulate(rounds))
        lines = console.export_text().splitlines()
    cells = [line.replace("│", " ").split() for line in lines if "│" in line]
    assert ["a", "end", "3.00", "1.00-9.00"] in cells
    assert ["two", "6.00", "2.00-18.00"] in cells


def test_synthetic_results_are_a_whole_leaderboard(tmp_path: Path) -> None:
    settings = leaderboards.Settings(agents=2, tasks=3, seeds=2, episodes=5)
    rows = leaderboards.synthetic_rows(settings)
    assert len(rows) == 3 + 2 * 3 * 2
    leaderboards.write_rows(tmp_path, rows)
    (section,) = build_leaderboard(tmp_path).sections
    assert not section.partial and not section.warnings
    assert len(section.entries) == 2 and len(section.tasks) == 3
    assert all(task.ranked and task.behaviour is not None for task in section.tasks)
    (first,) = [entry for entry in section.entries if entry.agent == "agent_000"]
    values = tuple(row.score for row in rows if row.seed is not None)
    assert first.cells[0].values == values[:2]


def test_leaderboard_script_runs(tmp_path: Path) -> None:
    options = "--agents 2 --tasks 2 --seeds 2 --episodes 3 --repeats 1"
    command = [sys.executable, str(FOLDER / "leaderboard.py"), *options.split()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "offrl leaderboard, filled cache" in done.stdout
    assert "10 rows: 2 agents, 2 tasks, 2 seeds, 3 episodes" in done.stdout
