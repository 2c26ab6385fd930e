"""Workers of the tests of Ray: many checkpoints, and files that say who began where."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from offrl_jax.benchmark import ray_worker


def work(
    job: Any, attempt: int, data_dir: str, folder: Path, *others: Any
) -> ray_worker.Verdict:
    """`ray_worker.work` in tiny chunks, and long enough to be disturbed.

    In `RUN_ID.workers` beside the results it leaves, as a line for every worker that
    begins to train, its process id and the updates that were done before.
    """
    from offrl_jax.benchmark import jobs

    begin, update = ray_worker.Link.begin, ray_worker.Link.update

    def noted(link: ray_worker.Link, label: str, total: int, done: int, members: int):
        with (folder.parent / f"{job.run_id}.workers").open("a") as file:
            file.write(f"{os.getpid()} {done}\n")
        begin(link, label, total, done, members)

    def slowly(link: ray_worker.Link, done: int, note: str) -> None:
        update(link, done, note)
        time.sleep(0.02)

    ray_worker.Link.begin = noted  # type: ignore[method-assign]
    ray_worker.Link.update = slowly  # type: ignore[method-assign]
    ray_worker.TELL_SECONDS = 0.1
    jobs.FIRST_CHUNK, jobs.CHUNK_SECONDS, jobs.CHECKPOINT_SECONDS = 1, 0.0, 0.3
    return ray_worker.work(job, attempt, data_dir, folder, *others)
