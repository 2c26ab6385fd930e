"""The commands `offrl data ...`.

Heavy imports happen inside them, so that help is instant.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand

from offrl_jax.cli.options import Count, DataDir
from offrl_jax.cli.running import open_store


@dataclasses.dataclass(frozen=True)
class DataList:
    """List the datasets in the store.

    Example: offrl data list
    """

    data_dir: DataDir = None

    def run(self) -> int:
        """Prints."""
        from offrl_jax import reports

        reports.data_list(open_store(self.data_dir))
        return 0


@dataclasses.dataclass(frozen=True)
class DataPrepare:
    """Generate the data of tasks that need no download.

    Example: offrl data prepare classic/pendulum-mixed-v0
    """

    tasks: Positional[
        Annotated[tuple[str, ...], arg(metavar="[TASK ...]", help_behavior_hint="")]
    ] = ()
    """Task ids; default: the whole classic family."""
    data_dir: DataDir = None

    def run(self) -> int:
        """Generates what is not there yet."""
        from offrl_jax import reports

        reports.data_prepare(open_store(self.data_dir), self.tasks)
        return 0


@dataclasses.dataclass(frozen=True)
class DataGenerate:
    """Generate an OGBench dataset by its authors' procedure; goes on where it stopped.

    Example: offrl data generate ogbench/cube-single-play-v0 --trajectories 100
    """

    dataset: Positional[Annotated[str, arg(metavar="DATASET")]]
    """ogbench/NAME-v0 (its five tasks share it), or the id of one of its tasks."""
    trajectories: Count = None
    """Of the training split; a tenth as many more are val. Default: the authors'."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Of all randomness."""
    processes: Count = None
    """How many work at once; the data do not depend on it. Default: one per core."""
    data_dir: DataDir = None

    def run(self) -> int:
        """Generates what is not there yet."""
        from offrl_jax import reports

        reports.data_generate(
            open_store(self.data_dir),
            self.dataset,
            self.trajectories,
            self.seed,
            self.processes,
        )
        return 0


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """Check every dataset of the store against its checksums and the schema.

    Example: offrl data check
    """

    data_dir: DataDir = None

    def run(self) -> int:
        """Checks; the exit code is 3 if something is damaged."""
        from offrl_jax import reports

        return reports.data_check(open_store(self.data_dir))


@dataclasses.dataclass(frozen=True)
class DataImport:
    """Put a file into the store, checked: official NeoRL-2 or OGBench, or your own.

    Example: offrl data import DMSD-train.npz --task neorl2/DMSD-v1
    """

    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    """The file; it is copied, never changed."""
    task: Annotated[str, arg(metavar="TASK")]
    """neorl2/NAME-v1 or ogbench/NAME-v0 for official files, local/NAME-v0 for yours."""
    split: Annotated[
        Literal["train", "val"] | None,
        arg(metavar="{train,val}", help_behavior_hint=""),
    ] = None
    """Default: told by the file; of your own data, 5 % of the episodes are val."""
    data_dir: DataDir = None

    def run(self) -> int:
        """Imports."""
        from offrl_jax import reports

        reports.data_import(open_store(self.data_dir), self.file, self.task, self.split)
        return 0


@dataclasses.dataclass(frozen=True)
class Data:
    """List, generate, check or import datasets.

    Example: offrl data import DMSD-train.npz --task neorl2/DMSD-v1
    """

    action: (
        Annotated[DataList, subcommand("list")]
        | Annotated[DataPrepare, subcommand("prepare")]
        | Annotated[DataGenerate, subcommand("generate")]
        | Annotated[DataCheck, subcommand("check")]
        | Annotated[DataImport, subcommand("import")]
    )

    def run(self) -> int:
        """Does what was asked."""
        return self.action.run()
