"""What is written of a job: rows, and when and as what training metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from offrl_jax.benchmark import provenance
from offrl_jax.results import Job, MetricFile, MetricPoint, Row, RowFile

POINTS = 50
"""Points per phase."""


def recording_steps(updates: int, stride: int) -> tuple[int, ...]:
    """Updates of a phase after which a point is written, ascending to its end.

    They depend on nothing but the phase: neither on the clock nor on evaluations.

    Args:
      updates: of the phase, a multiple of `stride`.
      stride: updates of one call.

    Returns:
      `POINTS` steps as evenly spread as whole calls allow; every call where a phase
      has fewer than that.
    """
    calls = updates // stride
    points = min(POINTS, calls)
    return tuple(stride * (calls * i // points) for i in range(1, points + 1))


def record_point(
    file: MetricFile,
    job: Job,
    phase: str,
    step: int,
    metrics: Mapping[str, np.ndarray],
    diverged: np.ndarray,
) -> None:
    """Writes one point of every member.

    Args:
      file: of the job.
      job: whose members they are.
      phase: its name.
      step: updates of the phase done.
      metrics: means over the interval, `[M]` by name.
      diverged: `[M]`, bool.  Where true, every value is NaN: a member is frozen at the
        end of the chunk in which it diverged, so what it reports depends on the clock.

    Raises:
      ResultsError: the disk is full or fails.
    """
    file.append(
        MetricPoint(
            run_id=job.run_id,
            agent=job.agent,
            task=member.task,
            setting=member.setting,
            seed=member.seed,
            phase=phase,
            step=step,
            values={
                name: float("nan") if diverged[index] else _shortest(values[index])
                for name, values in metrics.items()
            },
        )
        for index, member in enumerate(job.members)
    )


def _shortest(value: np.floating) -> float:
    """The float with the fewest digits that name this float32: 0.1, not 0.100000001."""
    return float(str(np.float32(value)))


def row_of(job: Job, index: int, **outcome: Any) -> Row:
    """The row of a member: what the plan says of it, and what became of it."""
    member = job.members[index]
    return Row(
        run_id=job.run_id,
        suite=job.suite,
        role=job.role,
        agent=job.agent,
        config=job.config,
        setting=member.setting,
        hyper=member.hyper,
        task=member.task,
        family=member.family,
        recipe_hash=job.datasets[member.task]["recipe_hash"],
        dataset_hash=job.datasets[member.task]["dataset_hash"],
        seed=member.seed,
        updates_total=job.updates_total,
        phase_updates=job.phase_updates,
        protocol=job.protocol,
        device=provenance.device(),
        flags=provenance.flags(),
        commit=provenance.commit(),
        **outcome,
    )


def has_all_rows(job: Job, rows: RowFile) -> bool:
    """Whether every member has a row of every evaluation, and none of them failed."""
    there = rows.row_ids.keys() - rows.failed
    return all(
        job.row_key(member, step) in there
        for member in job.members
        for step in job.eval_steps
    )


def write_failure(job: Job, rows: RowFile, reason: str) -> None:
    """Rows that say why a job's runs have no result; a later attempt replaces them."""
    for index, member in enumerate(job.members):
        step = job.updates_total
        if job.row_key(member, step) in rows.row_ids:
            continue
        rows.append(
            row_of(
                job,
                index,
                step=step,
                returns=[],
                lengths=[],
                successes=None,
                score=None,
                status="failed",
                error=reason,
                split_changed=False,
                updates_per_s=None,
                wall_s=None,
                compile_s=None,
                eval_s=None,
                versions=provenance.versions(),
                population=dict(job.split),
            )
        )
