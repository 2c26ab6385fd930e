"""How long jobs take: speeds of earlier runs, from rows and a table that runs keep.

Nothing is guessed: a job's duration is known if the same agent in the same structure
was trained on the same kind of device, and evaluated in the same environments.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offrl_jax.agents.registry import parse_label
from offrl_jax.results import BEHAVIOUR, Job, Row
from offrl_jax.results.rows import strict_json

LINES = 2_000
"""Speeds that the table keeps, the newest ones."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """What one finished job measured.

    Attributes:
      agent: name without preset.
      config: its structure.
      device: in words, as in `Row`.
      platform: as jax calls it.
      envs: ids of the environments that evaluated it, sorted.
      members: M.
      devices: that they were spread over.
      updates_per_s: summed over members.
      eval_s: seconds per evaluation episode and member.
      compile_s: seconds of compilation.
    """

    agent: str
    config: Mapping[str, Any]
    device: str
    platform: str
    envs: tuple[str, ...]
    members: int
    devices: int
    updates_per_s: float
    eval_s: float
    compile_s: float


def of_rows(rows: Iterable[Row], env_of: Mapping[str, str]) -> list[Speed]:
    """The speeds of finished jobs, one per run id and number of members.

    Args:
      rows: of any number of jobs, in any order.
      env_of: environment id by task; jobs on other tasks are left out.
    """
    jobs: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        timed = row.agent != BEHAVIOUR and row.updates_per_s and row.population
        if timed and row.task in env_of and row.returns:
            members = int(row.population["members"])
            jobs.setdefault((row.run_id, members), []).append(row)
    found = []
    for (_, members), group in jobs.items():
        last = max(group, key=lambda row: row.step)
        if last.step < last.updates_total:
            continue
        # Rows of one evaluation in one environment share its duration, that of all
        # members there together.
        evaluations = {(row.step, env_of[row.task]): row for row in group}.values()
        seconds = sum(row.eval_s or 0.0 for row in evaluations)
        episodes = sum(len(row.returns) for row in group)
        found.append(
            Speed(
                agent=parse_label(last.agent)[0],
                config=dict(last.config),
                device=last.device,
                platform=str(last.population.get("platform", "")),
                envs=tuple(sorted({env_of[row.task] for row in group})),
                members=members,
                devices=int(last.population["devices"]),
                updates_per_s=float(last.updates_per_s or 0.0),
                eval_s=seconds / max(episodes, 1),
                compile_s=last.compile_s or 0.0,
            )
        )
    return found


def estimate_seconds(
    job: Job, speeds: Sequence[Speed], env_of: Mapping[str, str], device: str
) -> float | None:
    """Seconds that a job takes from its start; None where nothing is known of it.

    Of several speeds, the one whose number of members per device is nearest counts.  On
    a CPU an update of twice the members is taken to last twice as long; elsewhere with
    more members as well, but with fewer ones as long as with the known number.

    Args:
      job: with its split.
      speeds: known ones.
      env_of: environment id by task.
      device: in words, as `provenance.device()`.
    """
    envs = {env_of.get(member.task) for member in job.members}
    agent, config = parse_label(job.agent)[0], strict_json(job.config)
    each = -(-len(job.members) // job.split["devices"])
    fitting = [
        speed
        for speed in speeds
        if (speed.agent, speed.device) == (agent, device)
        and envs <= set(speed.envs)
        and strict_json(speed.config) == config
    ]
    if not fitting:
        return None

    def distance(speed: Speed) -> float:
        return abs(math.log(each * speed.devices / speed.members))

    # Of equally near ones the last, which is the newest.
    speed = min(reversed(fitting), key=distance)
    ratio = each / -(-speed.members // speed.devices)
    if speed.platform != "cpu":
        ratio = max(ratio, 1.0)
    updates = sum(job.phase_updates.values())
    training = ratio * updates * speed.members / speed.updates_per_s
    episodes = job.protocol["episodes"] + job.protocol["curve_episodes"] * (
        len(job.eval_steps) - 1
    )
    evaluation = speed.eval_s * episodes * len(job.members)
    return training + evaluation + speed.compile_s


def read_table(path: Path) -> list[Speed]:
    """The speeds that runs kept in `path`; lines that cannot be read are left out."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            record = json.loads(line)
            found.append(Speed(**{**record, "envs": tuple(record["envs"])}))
        except (ValueError, TypeError, KeyError):
            continue
    return found


def keep(path: Path, speeds: Iterable[Speed]) -> None:
    """Adds speeds to the table; where that is not possible, nothing happens.

    A table of twice `LINES` is cut to its newest half.
    """
    text = "".join(strict_json(dataclasses.asdict(speed)) + "\n" for speed in speeds)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if len(lines) > 2 * LINES:
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_text("".join(lines[-LINES:]), encoding="utf-8")
            temporary.replace(path)
    except (OSError, ValueError):
        return
