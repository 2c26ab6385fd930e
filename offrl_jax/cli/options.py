"""Types of options that several commands have."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import UseAppendAction, arg

from offrl_jax.errors import UsageError

if TYPE_CHECKING:
    from offrl_jax.benchmark.executors import Executor
    from offrl_jax.datasets.store import Store

# A hint of "" hides tyro's "(default: None)": the text says what happens without it.
Count = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Amount = Annotated[float | None, arg(metavar="GIB", help_behavior_hint="")]
Names = Annotated[
    tuple[str, ...] | None, arg(metavar="NAME ...", help_behavior_hint="")
]
Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
Folder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
DataDir = Annotated[
    Path | None,
    arg(
        metavar="DIR",
        help="Data store. Default: $OFFRL_DATA, else a folder in the user's cache.",
        help_behavior_hint="",
    ),
]
Settings = Annotated[
    tuple[str, ...],
    arg(metavar="NAME=VALUE", help_behavior_hint=""),
    UseAppendAction,
]


@dataclasses.dataclass(frozen=True)
class Where:
    """Where to run, and beside whom."""

    executor: Literal["local", "ray"] = "local"
    """local: this process; ray: workers of a Ray cluster (extra ray), one for each
    population."""
    ray_address: Annotated[
        str | None, arg(metavar="HOST:PORT", help_behavior_hint="")
    ] = None
    """The cluster's head, or auto. Default: $RAY_ADDRESS, else this machine alone."""
    ray_cpus: Count = None
    """Cores for each population. Default: all that most nodes have."""
    wait: bool = False
    """Stay until other commands have finished what they hold, and take over what they
    leave."""

    def configure_jax(self) -> None:
        """Sets JAX up for this process, which leaves accelerators to Ray's workers."""
        from offrl_jax.benchmark.jax_settings import configure_jax

        configure_jax(only_cpu=self.executor == "ray")

    def open(self, store: Store) -> AbstractContextManager[Executor]:
        """The executor, to be entered.

        Raises:
          UsageError: options of Ray without Ray, or a senseless number.
        """
        if self.executor == "ray":
            from offrl_jax.benchmark.ray_executor import cluster

            if self.ray_cpus is not None and self.ray_cpus < 1:
                raise UsageError(f"--ray-cpus must be at least 1, got {self.ray_cpus}")
            return cluster(store, self.ray_address, wait=self.wait, cpus=self.ray_cpus)
        from offrl_jax.benchmark.executors import LocalExecutor

        for name, value in (
            ("--ray-address", self.ray_address),
            ("--ray-cpus", self.ray_cpus),
        ):
            if value is not None:
                raise UsageError(f"{name} goes with --executor ray")
        return nullcontext(LocalExecutor(self.wait))


HERE = Where()
"""In this process."""
