"""The leaderboard as plain data, ready to be drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from offrl_jax.leaderboard.published import PublishedTable
from offrl_jax.leaderboard.ranking import Bounds

FEW_SEEDS = 5
"""Fewer runs per task than this carry a mark."""
FEW_EPISODES = 20
"""Fewer evaluation episodes per run than this carry a mark."""
ONE_SETTING = "one setting for all tasks"
PER_TASK = "settings chosen per task"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One agent with one setting on one task.

    Attributes:
      task: task id.
      seeds: of the runs that count, ascending.
      values: of these runs, in the unit of the task.
      mean: with its interval; None without runs (and no ends with a single one).
      episodes: fewest evaluation episodes of these runs.
      diverged: seeds that count as the floor.
      failed: seeds whose run failed.
      missing: planned seeds without a result, failed ones not among them.
      episode_share: share of the variance between runs that is noise of their
        evaluation episodes, in [0, 1], see `noise`; diverged runs are left out.  None
        with fewer than two runs of two episodes, or where nothing varies.
    """

    task: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: Bounds | None
    episodes: int
    diverged: tuple[int, ...]
    failed: tuple[int, ...]
    missing: tuple[int, ...]
    episode_share: float | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a ranking.

    Attributes:
      label: agent, with its setting where the section has several of that agent.
      agent: label of the agent.
      setting: name of the setting.
      rank: None where runs of a ranked task are absent.
      iqm: with its interval, None where unranked.
      mean: over ranked tasks.
      median: over ranked tasks of the mean over runs.
      optimality_gap: to a score of 100; None for raw returns.
      leader: label of the agent that leads this rank or the one above it.
      leader_better: probability that a run of the leader beats one of this agent.
      cost_s: device seconds per run: training seconds of the population times its
        devices over its members, averaged over runs; None if rows do not say.
      tuned: settings tried times tuning seeds, as the runs say how their setting was
        chosen, else from rows of role `tune`; None without either.
      cells: of every task of the section.
      episode_share: share of the variance of `mean` that is noise of evaluation
        episodes, over ranked tasks, see `noise.pooled_share`.
    """

    label: str
    agent: str
    setting: str
    rank: int | None
    iqm: Bounds | None
    mean: Bounds | None
    median: Bounds | None
    optimality_gap: Bounds | None
    leader: str | None
    leader_better: Bounds | None
    cost_s: float | None
    tuned: tuple[int, int] | None
    cells: tuple[Cell, ...]
    episode_share: float | None

    @property
    def few(self) -> bool:
        """Whether some task has few seeds or few episodes."""
        return any(
            cell.seeds and (len(cell.seeds) < FEW_SEEDS or cell.episodes < FEW_EPISODES)
            for cell in self.cells
        )

    @property
    def diverged(self) -> int:
        """Runs that count as the floor."""
        return sum(len(cell.diverged) for cell in self.cells)

    @property
    def incomplete(self) -> bool:
        """Whether planned runs are absent."""
        return any(cell.failed or cell.missing or not cell.seeds for cell in self.cells)


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """A task of a section.

    Attributes:
      task: task id.
      unit: `score` (normalised x100), or `return` where there is no reference.
      ranked: whether it enters the ranking.
      behaviour: mean of the dataset's episodes in that unit, None if not written.
    """

    task: str
    unit: str
    ranked: bool
    behaviour: float | None


@dataclasses.dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
      suite: as in `SectionKey`.
      family: as in `SectionKey`.
      preset: as in `SectionKey`.
      updates_total: as in `SectionKey`.
      protocol: as in `SectionKey`, decoded; `{"pooled": [...]}` of several.
      tuning: `ONE_SETTING` or `PER_TASK`.
      tasks: sorted by id.
      entries: ranked ones first, by rank and IQM, then the others by label.
      runs: that count.
      planned: runs that were planned or begun.
      absent: one line per cell that lacks runs.
      warnings: one line each.
      devices: in words, sorted.
    """

    suite: str
    family: str
    preset: str
    updates_total: int
    protocol: Mapping[str, Any]
    tuning: str
    tasks: tuple[TaskInfo, ...]
    entries: tuple[Entry, ...]
    runs: int
    planned: int
    absent: tuple[str, ...]
    warnings: tuple[str, ...]
    devices: tuple[str, ...]

    @property
    def partial(self) -> bool:
        """Whether planned runs are absent."""
        return self.runs < self.planned

    @property
    def unit(self) -> str:
        """Unit of the ranking."""
        ranked = [task.unit for task in self.tasks if task.ranked]
        return ranked[0] if ranked else "score"


@dataclasses.dataclass(frozen=True)
class Leaderboard:
    """All tables of a results folder.

    Attributes:
      sections: sorted.
      messages: about the folder as a whole, one line each.
      published: numbers of others, in tables of their own.
    """

    sections: tuple[Section, ...]
    messages: tuple[str, ...]
    published: tuple[PublishedTable, ...] = ()
