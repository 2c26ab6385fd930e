"""A part of a leaderboard: only some of its tasks, or of its agents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from offrl_jax.errors import unknown_name
from offrl_jax.leaderboard.model import Leaderboard
from offrl_jax.leaderboard.runs import base_of
from offrl_jax.leaderboard.sections import Contents, Group


def of_tasks(contents: Contents, tasks: Sequence[str] | None) -> Contents:
    """Tables of these tasks alone: aggregates and ranks are then over them.

    Args:
      contents: of a results folder.
      tasks: ids; None leaves everything.

    Raises:
      UsageError: a task of which the folder holds no run.
    """
    if tasks is None:
        return contents
    there = {run.cell.task for group in contents.groups for run in group.runs}
    for task in tasks:
        if task not in there:
            raise unknown_name("task of these results", task, there)
    groups = [_group_of(group, set(tasks)) for group in contents.groups]
    return dataclasses.replace(contents, groups=[g for g in groups if g.runs])


def _group_of(group: Group, tasks: set[str]) -> Group:
    runs = [run for run in group.runs if run.cell.task in tasks]
    lines = {run.cell[:2] for run in runs}
    return dataclasses.replace(
        group,
        runs=runs,
        labels={line: label for line, label in group.labels.items() if line in lines},
        units={task: unit for task, unit in group.units.items() if task in tasks},
    )


def of_agents(board: Leaderboard, agents: Sequence[str] | None) -> Leaderboard:
    """Lines of these agents alone, with the ranks that they have among all.

    Sections without any of them are left out.

    Args:
      board: of a results folder.
      agents: labels, or names, which stand for every preset; None leaves everything.

    Raises:
      UsageError: an agent that no section has.
    """
    if agents is None:
        return board
    every = [entry.agent for section in board.sections for entry in section.entries]
    there = {name for agent in every for name in (agent, base_of(agent))}
    for agent in agents:
        if agent not in there:
            raise unknown_name("agent of these results", agent, there)
    chosen = set(agents)
    sections = [
        dataclasses.replace(
            section,
            entries=tuple(
                entry
                for entry in section.entries
                if {entry.agent, base_of(entry.agent)} & chosen
            ),
        )
        for section in board.sections
    ]
    kept = tuple(section for section in sections if section.entries)
    return dataclasses.replace(board, sections=kept)
