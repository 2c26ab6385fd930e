"""What a user must do to have a task's data."""

from __future__ import annotations

from offrl_jax.datasets import neorl2, ogbench
from offrl_jax.results import ONLINE


def how_to_get(task_id: str) -> str:
    """What the user has to do for a task's data, in one line."""
    family = task_id.partition("/")[0]
    if family == ONLINE:
        return f"{task_id} needs no data: agents act in its environment"
    if family == "classic":
        return f"{task_id} is generated when it is first used"
    if family == "neorl2":
        name = neorl2.file_name(task_id, "train")
        return (
            f"{task_id} needs {name}: get it as told in docs/data.md, then run: "
            f"offrl data import {name} --task {task_id}"
        )
    if family == "ogbench":
        dataset = ogbench.dataset_id(ogbench.dataset_of(task_id))
        return (
            f"{task_id} needs data that are made or imported by hand; run: offrl data "
            f"generate {dataset}"
        )
    if family == "minari":
        return (
            f"{task_id} needs the Minari dataset '{task_id.removeprefix('minari/')}': "
            "put its folder into the folder 'minari' of the data folder, as told in "
            "docs/data.md"
        )
    return (
        f"{task_id} needs your own file: run: offrl data import FILE.npz --task "
        f"{task_id}"
    )
