"""Puts a user's file into the store: `offrl data import FILE --task ID [--split S]`."""

from __future__ import annotations

from pathlib import Path

from offrl_jax import envs
from offrl_jax.datasets import local, neorl2, ogbench, schema
from offrl_jax.datasets.store import SPLITS, Record, Store
from offrl_jax.errors import DataError, UsageError


def import_file(
    path: Path | str, task_id: str, store: Store, split: str | None = None
) -> str:
    """Reads, checks and stores a file.

    Args:
      path: the file.
      task_id: `neorl2/<name>-v1` for an official file (its split is told by its MD5),
        `ogbench/<dataset>-v0` (stored as the dataset's five tasks, its split told by
        the number of rows), or `local/<name>-v<number>` for own data, see
        `datasets.local`.
      store: where to.
      split: `train` or `val`.  Own data without it are split: the last 5 % of episodes
        become `val`.

    Returns:
      One line that says what was stored.

    Raises:
      UsageError: the task takes no files, or `split` is wrong.
      DataError: the file is damaged, not the official one, or breaks the schema; other
        data are already stored under that id; the disk is full.
    """
    path = Path(path)
    if split not in (None, *SPLITS):
        raise UsageError(f"unknown split '{split}'; use train or val")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if task_id.startswith("neorl2/"):
        episodes, name, source = neorl2.read_official(path, task_id, split)
        schema.validate(episodes, str(path))
        return _message([store.write(task_id, name, episodes, source=source)])
    if task_id.startswith("ogbench/"):
        return ogbench.import_official(path, task_id, store, split)
    if task_id.startswith("local/"):
        return _import_local(path, task_id, store, split)
    if task_id.startswith("minari/"):
        raise UsageError(
            f"'{task_id}' is not imported from a file; put the Minari dataset's folder "
            f"under {store.minari_root}"
        )
    raise UsageError(
        f"cannot import into '{task_id}'; files go to neorl2/<name>-v1, "
        "ogbench/<dataset>-v0 or local/<name>-v<number>"
    )


def _import_local(path: Path, task_id: str, store: Store, split: str | None) -> str:
    local.check_id(task_id)
    episodes, env_id, source = local.read_npz(path)
    schema.validate(episodes, str(path))
    if env_id is not None:
        spec = envs.spec_of(env_id)
        shape = (episodes.obs.shape[1], episodes.action.shape[1])
        if shape != (spec.obs_dim, spec.action_dim):
            raise DataError(
                f"{path}: observations and actions have {shape[0]} and {shape[1]} "
                f"components, env_id '{env_id}' has {spec.obs_dim} and "
                f"{spec.action_dim}"
            )
    info = {"env_id": env_id}
    if split is not None:
        parts = {split: episodes}
    else:
        train, validation = schema.split_validation(episodes)
        parts = {"train": train}
        if validation is not None:
            parts["val"] = validation
        source["split"] = "last 5 % of episodes held out"
    # Checked for all before the first is written, so that no half of a file stays.
    for name, part in parts.items():
        if store.has(task_id, name):
            stored = store.record(task_id, name).dataset_hash
            if stored != schema.dataset_hash(part):
                raise DataError(
                    f"{task_id} ({name}) is already in the store with other data; use "
                    f"another id or remove {store.folder(task_id, name)}"
                )
    return _message(
        [
            store.write(task_id, name, part, source=source, info=info)
            for name, part in parts.items()
        ]
    )


def _message(records: list[Record]) -> str:
    parts = [
        f"{r.split}: {r.episodes} episodes, {r.transitions} transitions, mean return "
        f"{r.return_mean:.4g}"
        for r in records
    ]
    return f"{records[0].task_id} stored; {'; '.join(parts)}"
