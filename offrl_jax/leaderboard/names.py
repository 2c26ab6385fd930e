"""Names of files for the sections of a leaderboard, and short ones of its tasks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from offrl_jax.leaderboard.model import PER_TASK, Section

_LONGEST = 60  # characters of a part; file systems allow 255 for all of them


def stems(sections: Sequence[Section]) -> list[str]:
    """`SUITE-FAMILY[-PRESET]` for each, with as much more as tells them apart.

    Letters, digits and `._+=-` alone, different even where case is ignored.
    """
    found = [
        "-".join(
            _safe(part)
            for part in (section.suite, section.family, section.preset)
            if part != "full"
        )
        for section in sections
    ]
    details: tuple[Callable[[Section], str], ...] = (
        lambda section: f"-{section.updates_total}_updates",
        lambda section: "-per_task" * (section.tuning == PER_TASK),
        lambda section: _safe(f"-{section.protocol.get('episodes')}_episodes"),
    )
    for detail in details:
        told: dict[str, set[str]] = defaultdict(set)
        for stem, section in zip(found, sections, strict=True):
            told[stem.lower()].add(detail(section))
        found = [
            stem + detail(section) if len(told[stem.lower()]) > 1 else stem
            for stem, section in zip(found, sections, strict=True)
        ]
    taken: set[str] = set()
    for i, stem in enumerate(found):
        number = 1
        while found[i].lower() in taken:
            number += 1
            found[i] = f"{stem}-{number}"
        taken.add(found[i].lower())
    return found


def short_tasks(section: Section) -> list[str]:
    """Names of the tasks, without the family, which the section's title tells."""
    return [task.task.removeprefix(f"{section.family}/") for task in section.tasks]


def _safe(name: str) -> str:
    # A leading dot hides a file, and one letter is the least.
    return re.sub(r"[^A-Za-z0-9._+=-]+", "_", name).lstrip(".")[:_LONGEST] or "_"
