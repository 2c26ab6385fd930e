"""`offrl reproduce`: a row, what made it, and the same once more."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from offrl_jax.cli.options import DataDir
from offrl_jax.cli.running import open_store, tell


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Show what made a row, run it again, and compare; changes no results.

    The row's whole population is trained again up to the row's step, because the bits
    of a run depend on those beside it. The exit code is 1 if the returns differ.

    Example: offrl reproduce 3fa2b41c --results results/quick
    """

    row_id: Positional[Annotated[str, arg(metavar="ROW-ID")]]
    """A row_id of rows/*.jsonl, or the first six or more digits of it."""
    results: Annotated[Path, arg(metavar="DIR")]
    """Results folder of the row."""
    member_only: bool = False
    """Train the row's run alone: faster, and equal within a tolerance only."""
    data_dir: DataDir = None

    def run(self) -> int:
        """Runs; the exit code is 0 if the row came out again, else 1."""
        from offrl_jax.benchmark.jax_settings import configure_jax

        configure_jax()
        from offrl_jax.benchmark import reproduction
        from offrl_jax.benchmark.progress import Progress
        from offrl_jax.leaderboard.text import printable

        origin = reproduction.trace(
            self.results, self.row_id, tell, member_only=self.member_only
        )
        found = reproduction.differences(origin)
        lines = reproduction.describe(origin)
        lines += [
            ("differs", f"{one.what}: {one.then} then, {one.now} here") for one in found
        ]
        for heading, text in lines:
            print(f"{heading:<10} {printable(text)}", flush=True)
        with Progress() as progress:
            tasks = reproduction.load_data(origin, open_store(self.data_dir), tell)
            again = reproduction.run_again(origin, tasks, progress)
        verdict = reproduction.compare(origin.row, again, found)
        print(verdict.text)
        return 0 if verdict.equal else 1
