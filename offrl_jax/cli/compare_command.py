"""`offrl compare`: did a change help?"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from offrl_jax.cli.options import Names
from offrl_jax.cli.running import tell_some, write
from offrl_jax.errors import ResultsError, UsageError

if TYPE_CHECKING:
    from offrl_jax.leaderboard.compare import Comparisons


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare two results folders agent by agent: did a change help?  Runs nothing.

    Example: offrl compare results/before results/after --fail-on worse
    """

    baseline: Positional[Annotated[Path, arg(metavar="DIR_A")]]
    """Results folder of the baseline, A."""
    change: Positional[Annotated[Path, arg(metavar="DIR_B")]]
    """Results folder of the change, B."""
    agent: Names = None
    """Only these agents: names, or NAME@PRESET. Default: all."""
    task: Names = None
    """Only these tasks; the interquartile mean is over them. Default: all."""
    format: Literal["table", "md", "json"] = "table"
    """What to write."""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """File to write. Default: the screen."""
    fail_on: Annotated[
        Literal["worse", "changed"] | None,
        arg(metavar="{worse,changed}", help_behavior_hint=""),
    ] = None
    """Exit with 1 if an agent is worse, or if any run is not the same, bit for bit."""
    tolerance: Annotated[float | None, arg(metavar="POINTS", help_behavior_hint="")] = (
        None
    )
    """Loss of IQM that --fail-on worse accepts. Default: 0."""

    def run(self) -> int:
        """Compares; the exit code is 1 if what --fail-on names is so."""
        for name in ("agent", "task"):
            if getattr(self, name) == ():
                raise UsageError(f"--{name} needs at least one name")
        if self.tolerance is not None:
            if self.fail_on != "worse":
                raise UsageError("--tolerance needs --fail-on worse")
            if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
                raise UsageError(
                    f"--tolerance must be a number of points, at least 0, got "
                    f"{self.tolerance:g}"
                )
        # A benchmark that runs beside it keeps the accelerator's memory.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from offrl_jax.benchmark.jax_settings import configure_jax

        configure_jax()
        from offrl_jax import leaderboard

        found = leaderboard.compare(self.baseline, self.change, self.agent, self.task)
        terminal = sys.stdout.isatty() and self.out is None
        width = shutil.get_terminal_size().columns if terminal else 100
        drawn = leaderboard.draw_comparison(
            found, self.format, width=width, colour=terminal
        )
        if self.out is None:
            print(drawn, end="")
        else:
            write(self.out, drawn)
            print(f"wrote {self.out}")
        failures = _failures(found, self.fail_on, self.tolerance or 0.0)
        tell_some(failures)
        return 1 if failures else 0


def _failures(found: Comparisons, fail_on: str | None, tolerance: float) -> list[str]:
    """What --fail-on names and is so, one line each.

    Raises:
      ResultsError: agents are to be judged, and none can be.
    """
    from offrl_jax.leaderboard.compare import UNJUDGED

    if fail_on == "changed" and not found.identical:
        changed = sum(not agent.identical for agent in found.agents)
        return [
            f"changed: {changed} of {len(found.agents)} agents differ; without a "
            f"counterpart are {found.unmatched_baseline} cells of A and "
            f"{found.unmatched_change} of B"
        ]
    if fail_on != "worse":
        return []
    unjudged = [agent.label for agent in found.agents if agent.verdict == UNJUDGED]
    if len(unjudged) == len(found.agents):
        raise ResultsError(
            f"no agent can be judged ({', '.join(unjudged)}): intervals need two "
            "seeds, and raw returns of several tasks are not pooled; run more seeds "
            "or choose one task by --task"
        )
    accepted = f", where a loss of {tolerance:g} is accepted" if tolerance else ""
    lost = []
    for agent in found.agents:
        if agent.lost(tolerance) and agent.iqm is not None:
            bounds = agent.iqm
            lost.append(
                f"worse: {agent.label}, IQM B - A {bounds.value:+.1f} "
                f"[{bounds.low:+.1f}, {bounds.high:+.1f}]{accepted}"
            )
    return lost
