"""What a user sees of a long run: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol, TextIO

QUIET_SECONDS = 10.0
"""Pause between two plain lines of one job."""


class Reporter(Protocol):
    """What a job tells of itself: to `Progress`, or to a driver elsewhere."""

    def say(self, line: str) -> None:
        """Takes a line to be kept."""
        ...

    def begin(self, label: str, total: int, done: int = 0) -> None:
        """Takes what the job is called, its updates, and how many are done."""
        ...

    def update(self, done: int, note: str) -> None:
        """Takes the updates done."""
        ...

    def end(self, line: str) -> None:
        """Takes the job's last line."""
        ...


class Progress:
    """One bar for everything and one for the job at work, or plain lines.

    Use as a context manager.  Messages go above the bars.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bars = None
        self._job = None
        self._all = None
        self._label = ""
        self._total = 0
        self._spoke_at = 0.0
        self._others: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import (
                Progress as Bars,
            )

            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def say(self, line: str) -> None:
        """Shows one line and keeps it."""
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def begin_all(self, label: str, total: float) -> None:
        """Starts the bar for everything, `total` in any unit."""
        if self._bars is not None:
            self._all = self._bars.add_task(label, total=total, note="")

    def advance_all(self, amount: float) -> None:
        """Moves the bar for everything."""
        if self._bars is not None and self._all is not None:
            self._bars.advance(self._all, amount)

    def begin(self, label: str, total: int, done: int = 0) -> None:
        """Starts the bar of a job of `total` updates, of which some are done."""
        self._label, self._total = label, total
        self._spoke_at = time.monotonic()
        if self._bars is not None:
            self._job = self._bars.add_task(label, total=total, completed=done, note="")
        else:
            self.say(f"{label}: begins" if done == 0 else f"{label}: goes on at {done}")

    def update(self, done: int, note: str) -> None:
        """Moves the bar of the job to `done` updates."""
        if self._bars is not None and self._job is not None:
            self._bars.update(self._job, completed=done, note=note)
        elif time.monotonic() - self._spoke_at > QUIET_SECONDS:
            self._spoke_at = time.monotonic()
            self.say(f"{self._label}: {100 * done / self._total:3.0f}%  {note}")

    def end(self, line: str) -> None:
        """Removes the bar of the job and keeps one line about it."""
        if self._bars is not None and self._job is not None:
            self._bars.remove_task(self._job)
            self._job = None
        self.say(line)

    def show(self, name: str, label: str, done: int, total: int, note: str) -> None:
        """Moves the bar of a job that runs elsewhere, one bar for each `name`."""
        known = self._others.get(name)
        if self._bars is not None:
            if known is None:
                known = self._others[name] = self._bars.add_task(
                    label, total=total, note=""
                )
            self._bars.update(
                known, description=label, total=total, completed=done, note=note
            )
        elif known is None or time.monotonic() - known > QUIET_SECONDS:
            self._others[name] = time.monotonic()
            self.say(f"{label}: {100 * done / max(total, 1):3.0f}%  {note}")

    def drop(self, name: str) -> None:
        """Removes the bar of a job that runs elsewhere."""
        known = self._others.pop(name, None)
        if self._bars is not None and known is not None:
            self._bars.remove_task(known)
