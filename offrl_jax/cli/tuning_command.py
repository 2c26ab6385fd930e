"""`offrl tuning`: what it costs online to choose among an agent's trained policies."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from offrl_jax.cli.options import Names
from offrl_jax.cli.running import tell_some, write
from offrl_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Draw what choosing among trained policies is worth online; runs nothing.

    Per agent, over all its settings and seeds: the expected best of n evaluated
    policies, and the policy that a bandit would deploy after n episodes.

    Example: offrl tuning results/onpolicy_tuning --out tuning.png
    """

    results: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Results folder; runs that tune are taken, of an agent without them its others."""
    out: Annotated[Path, arg(metavar="FILE")]
    """File to write: .png, .pdf or .svg; the numbers go beside it as .csv."""
    agent: Names = None
    """Only these agents: names, or NAME@PRESET. Default: all."""
    task: Names = None
    """Only these tasks, means are over them. Default: all."""
    policies: Annotated[int, arg(metavar="N")] = 8
    """Policies that the bandit chooses from."""
    episodes: Annotated[int, arg(metavar="N")] = 200
    """Episodes that the bandit may play."""

    def run(self) -> int:
        """Draws."""
        for name in ("agent", "task"):
            if getattr(self, name) == ():
                raise UsageError(f"--{name} needs at least one name")
        # A benchmark that runs beside it keeps the accelerator's memory.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from offrl_jax.benchmark.jax_settings import configure_jax

        configure_jax()
        from offrl_jax import figures, leaderboard

        suffix = figures.check_suffix(self.out)
        sections, messages = leaderboard.tuning_of(
            self.results,
            self.agent,
            self.task,
            arms=self.policies,
            pulls=self.episodes,
        )
        figure = figures.render(figures.draw_tuning(sections), suffix)
        table = self.out.with_suffix(".csv")
        write(table, leaderboard.tuning_csv(sections))
        write(self.out, figure)
        tell_some([*messages, *(line for own in sections for line in own.messages)])
        print(f"wrote {self.out} and {table}")
        return 0
