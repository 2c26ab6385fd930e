"""Seconds from a process's start to its first result, cold and warm.

  python benchmarks/speed/startup.py --repeats 5

Every measurement is a process of its own, timed from outside: `import offrl_jax`,
`offrl --help`, and the way of `td3_bc@quick` with 5 members to its first finished
update (`first_update.py`), once with an empty compilation cache and then with the one
that this has filled.  The files themselves are warm: a first, unmeasured round reads
them and compiles byte code.  The table shows medians; times of stages count from the
process's start.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

FIRST_UPDATE = Path(__file__).with_name("first_update.py")
COMMANDS: dict[str, tuple[str, ...]] = {
    "import offrl_jax": ("-c", "import offrl_jax"),
    "offrl --help": ("-m", "offrl_jax.cli", "--help"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How often it is measured.

    Attributes:
      repeats: measurements of each; the first update is done twice in each.
    """

    repeats: int = 3


@dataclasses.dataclass(frozen=True)
class Timed:
    """One process.

    Attributes:
      stages: by printed line, seconds from the process's start.
      total: seconds to its end.
    """

    stages: Mapping[str, float]
    total: float


def run_timed(arguments: Sequence[str], environment: Mapping[str, str]) -> Timed:
    """Runs this Python with `arguments`.

    Raises:
      RuntimeError: the process failed; the message ends in its last line.
    """
    with tempfile.TemporaryFile("w+") as complaints:
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *arguments],
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        ) as process:
            assert process.stdout is not None
            stages = {
                line.strip(): time.perf_counter() - start for line in process.stdout
            }
        total = time.perf_counter() - start
        if process.returncode:
            complaints.seek(0)
            lines = complaints.read().strip().splitlines() or ["no message"]
            raise RuntimeError(
                f"{' '.join(arguments)} exited with {process.returncode}: {lines[-1]}"
            )
    return Timed(stages, total)


def environment_of(cache: Path) -> dict[str, str]:
    """The environment of a measured process, with its compilation cache in `cache`.

    Byte code may be written, as it is for whoever installed the package.
    """
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _programs(cache: Path) -> set[str]:
    # Each program is a file of its own; the files of last access beside them change.
    return {path.name for path in cache.iterdir() if path.name.endswith("-cache")}


def measure_once() -> dict[str, dict[str, float]]:
    """Seconds by stage, by what was started.

    Raises:
      RuntimeError: a process failed, or the cache did not serve the second first
        update: the cold one left nothing in it, or the warm one compiled anew.
    """
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        environment = environment_of(cache)
        for name, arguments in COMMANDS.items():
            found[name] = {"end": run_timed(arguments, environment).total}
        cold = run_timed([str(FIRST_UPDATE)], environment)
        programs = _programs(cache)
        warm = run_timed([str(FIRST_UPDATE)], environment)
        if not programs or _programs(cache) != programs:
            raise RuntimeError(
                f"the cache held {len(programs)} programs after the first process and "
                f"{len(_programs(cache))} after the second; it was not used"
            )
        found["first update, empty cache"] = dict(cold.stages)
        found["first update, filled cache"] = dict(warm.stages)
    return found


def tabulate(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> Table:
    """Medians and ranges over rounds of `measure_once`."""
    table = Table(title="seconds from the process's start")
    table.add_column("process")
    table.add_column("stage")
    table.add_column("median", justify="right")
    table.add_column("range", justify="right")
    for name, stages in rounds[0].items():
        for i, stage in enumerate(stages):
            seconds = [found[name][stage] for found in rounds]
            table.add_row(
                name if i == 0 else "",
                stage,
                f"{np.median(seconds):.2f}",
                f"{min(seconds):.2f}-{max(seconds):.2f}",
            )
    return table


def main(settings: Settings) -> None:
    """Measures and prints the table with its conditions."""
    load_before = os.getloadavg()[0]
    measure_once()
    rounds = [measure_once() for _ in range(settings.repeats)]
    console = Console()
    console.print(tabulate(rounds))
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib", "flax", "optax", "numpy", "tyro", "rich")
    )
    console.print(
        f"{os.cpu_count()} cores ({platform.machine()}), load before "
        f"{load_before:.2f}, Python {platform.python_version()}, {versions}; "
        f"{settings.repeats} rounds after one that is not counted",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
