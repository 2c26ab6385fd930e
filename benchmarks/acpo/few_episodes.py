"""The first episodes of a dataset, as a file to import: how an agent fares on few data.

Example:
  python benchmarks/acpo/few_episodes.py neorl2/DMSD-v1 --episodes 40 --out few.npz
  offrl data import few.npz --task local/dmsd-few-v0 --split train
  offrl benchmark acpo_few
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro
from tyro.conf import Positional

import offrl_jax
from offrl_jax.errors import OffrlError, UsageError


@dataclasses.dataclass(frozen=True)
class FewEpisodes:
    """Writes the first episodes of a task's training data."""

    task: Positional[str]
    """Its data are in the store, or can be generated."""
    out: Path
    """The `.npz` file to write."""
    episodes: int = 40
    """How many."""


def main(arguments: FewEpisodes) -> None:
    """Reads, cuts and writes.

    Raises:
      UsageError: the dataset has fewer episodes.
      DataError: it is absent or damaged.
    """
    loaded = offrl_jax.load_task(arguments.task)
    lengths = loaded.train.lengths
    if not 1 <= arguments.episodes <= len(lengths):
        raise UsageError(
            f"--episodes is {arguments.episodes}, but {arguments.task} has "
            f"{len(lengths)} episodes to train on"
        )
    rows = int(lengths[: arguments.episodes].sum())
    fields = {
        name: np.asarray(values)[:rows]
        for name, values in dataclasses.asdict(loaded.train).items()
    }
    if loaded.task.env_id is not None:
        fields["env_id"] = np.array(loaded.task.env_id)
    np.savez_compressed(arguments.out, allow_pickle=False, **fields)
    print(f"{arguments.episodes} episodes, {rows} transitions: {arguments.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(FewEpisodes, description=__doc__))
    except OffrlError as error:
        sys.exit(f"error: {error}")
