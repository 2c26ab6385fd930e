"""Workers of the tests of Ray: many checkpoints, and process ids in files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from offrl_jax.benchmark import ray_worker


def work(job: Any, data_dir: str, folder: Path, *others: Any) -> ray_worker.Verdict:
    """`ray_worker.work` in tiny chunks, and long enough to be disturbed."""
    with (folder.parent / f"{job.run_id}.pids").open("a") as file:
        file.write(f"{os.getpid()}\n")
    from offrl_jax.benchmark import jobs

    tell = ray_worker.Link.update

    def slowly(link: ray_worker.Link, done: int, note: str) -> None:
        tell(link, done, note)
        time.sleep(0.02)

    ray_worker.Link.update = slowly  # type: ignore[method-assign]
    ray_worker.TELL_SECONDS = 0.1
    jobs.FIRST_CHUNK, jobs.CHUNK_SECONDS, jobs.CHECKPOINT_SECONDS = 1, 0.0, 0.3
    return ray_worker.work(job, data_dir, folder, *others)
