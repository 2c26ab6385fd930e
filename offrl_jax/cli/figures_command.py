"""`offrl figures`: the figures of a paper from a results folder."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from offrl_jax.cli.options import Names
from offrl_jax.cli.running import tell_some, write
from offrl_jax.errors import ResultsError, UsageError


@dataclasses.dataclass(frozen=True)
class Figures:
    """Draw the figures of a paper from a results folder; runs nothing.

    Per section of the leaderboard: the ranking, performance profiles, who beats whom,
    scores against cost, task by task, and while training.

    Example: offrl figures results/quick --out figures --format pdf png
    """

    results: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Results folder."""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """Folder for the files SUITE-FAMILY[-PRESET]-FIGURE.FORMAT."""
    format: tuple[Literal["pdf", "png", "svg"], ...] = ("pdf",)
    """Formats, one file for each."""
    figure: Names = None
    """Only these: ranking, profiles, improvement, cost, tasks, progress. Default:
    all."""
    agent: Names = None
    """Only these agents: names, or NAME@PRESET; with the ranks that they have among
    all. Default: all."""
    task: Names = None
    """Only these tasks, all numbers are over them. Default: all."""

    def run(self) -> int:
        """Draws."""
        for name in ("format", "figure", "agent", "task"):
            if getattr(self, name) == ():
                raise UsageError(f"--{name} needs at least one name")
        # A benchmark that runs beside it keeps the accelerator's memory.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from offrl_jax.benchmark.jax_settings import configure_jax

        configure_jax()
        from offrl_jax import figures
        from offrl_jax.leaderboard import board, choice, names, progress, sections

        chosen = figures.FIGURES if self.figure is None else self.figure
        figures.check_names(chosen)
        contents = choice.of_tasks(sections.read_contents(self.results), self.task)
        drawn = choice.of_agents(board.of_contents(contents), self.agent)
        parts, messages = (), drawn.messages
        if "progress" in chosen:
            parts, messages = progress.of_contents(contents, self.agent)
        reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
        count = 0
        stems = names.stems(drawn.sections)
        for section, stem in zip(drawn.sections, stems, strict=True):
            part = figures.progress_of(section, parts)
            for figure, reason in figures.left_out(section, part).items():
                reasons[figure, reason].append(stem)
            for picture in figures.draw_section(section, part, chosen):
                for suffix in dict.fromkeys(self.format):
                    file = figures.picture_file(picture, f".{suffix}")
                    self._write(f"{stem}-{picture.name}.{suffix}", file)
                    count += 1
        lines = [
            f"{figure}: left out of {', '.join(of)}: {reason}"
            for (figure, reason), of in reasons.items()
            if figure in chosen
        ]
        if not count:
            raise ResultsError(f"{self.results}: nothing to draw; {'; '.join(lines)}")
        tell_some([*lines, *messages])
        print(f"wrote {count} files to {self.out}")
        return 0

    def _write(self, name: str, content: bytes) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(
                f"{self.out}: cannot be made ({error.strerror}); choose another folder"
            ) from error
        write(self.out / name, content)
