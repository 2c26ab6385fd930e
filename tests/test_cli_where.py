"""Options that say where to run, and what a command says of jobs that others hold."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cli_runner import RUN, SETTINGS, SMALL, USAGE, offrl

from offrl_jax.results import lock_path, read_plan, row_path, try_lock

pytest_plugins = ["cli_fixtures"]

BUSY, STOPPED, TERMINATED = 5, 130, 128 + 15
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "slurm" / "array.sh"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--executor slurm", ("slurm", "local", "ray")),
        ("--ray-address 10.0.0.1:6379", "--ray-address goes with --executor ray"),
        ("--ray-cpus 2", "--ray-cpus goes with --executor ray"),
        ("--executor ray --ray-cpus 0", "--ray-cpus must be at least 1, got 0"),
        ("--executor ray --ray-cpus two", ("'two'", "whole number")),
        ("--executor ray --ray-address here", "--ray-address takes HOST:PORT"),
    ],
)
def test_of_where(options, said, tiny, refused):
    refused(USAGE, said, *RUN, *SMALL, *SETTINGS, *options.split())


def test_all_that_is_left_is_held_by_others(results, capsys):
    """The tables are drawn, and nobody waits."""
    plan = read_plan(results)
    assert plan is not None
    (name,) = (job.run_id for job in plan.jobs)
    rows = row_path(results, name)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    before = rows.read_bytes()
    with try_lock(lock_path(results, name)) as ours:
        assert ours
        assert offrl(*RUN, *SMALL, *SETTINGS) == BUSY
    out, err = capsys.readouterr()
    assert f"{name}: another process is working on it" in err
    assert "other processes work on 1 of the populations in out; --wait" in err
    assert "missing" in out and rows.read_bytes() == before
    assert offrl(*RUN, *SMALL, *SETTINGS, "--wait") == 0


@pytest.mark.parametrize(
    ("code", "want", "requeued"),
    [
        (0, 0, False),
        (BUSY, 0, False),
        (STOPPED, 0, True),
        (TERMINATED, 0, True),
        (1, 1, False),
        (4, 4, False),
    ],
)
def test_the_array_of_slurm(code, want, requeued, tmp_path):
    """With stand-ins for srun and scontrol: this tests the script, not SLURM."""
    for name, body in (
        ("srun", f'echo "$@" >srun.txt; exit {code}'),
        ("scontrol", 'echo "$@" >scontrol.txt'),
    ):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPT, "classic", "/shared/results"],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_ARRAY_JOB_ID": "17",
            "SLURM_ARRAY_TASK_ID": "3",
        },
        check=False,
    )
    assert done.returncode == want
    called = (tmp_path / "srun.txt").read_text().split()
    assert called == ["offrl", "benchmark", "classic", "--results", "/shared/results"]
    told = tmp_path / "scontrol.txt"
    assert told.exists() is requeued
    if requeued:
        assert told.read_text().split() == ["requeue", "17_3"]
