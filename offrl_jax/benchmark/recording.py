"""When training metrics are written, and as what."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from offrl_jax.results import Job, MetricFile, MetricPoint

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
