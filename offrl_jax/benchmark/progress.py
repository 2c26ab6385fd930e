"""What a user sees of a long run: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TextIO

QUIET_SECONDS = 10.0
"""Pause between two plain lines of one job."""


class Reporter(Protocol):
    """What a job tells of itself: to `Progress`, or to a driver elsewhere."""

    def say(self, line: str) -> None:
        """Takes a line to be kept."""
        ...

    def begin(self, label: str, total: int, done: int = 0, members: int = 1) -> None:
        """Takes what a population is, its updates, how many are done, and M."""
        ...

    def update(self, done: int, note: str) -> None:
        """Takes the updates done."""
        ...

    def end(self, line: str) -> None:
        """Takes the population's last line."""
        ...


class Work(NamedTuple):
    """A job's share of a suite, in updates summed over its members.

    Attributes:
      total: of all phases.
      done: before this process began.
    """

    total: float
    done: float = 0.0


class Progress:
    """One bar for everything and one for the job at work, or plain lines.

    Use as a context manager.  Messages go above the bars.  Of a suite, `begin_jobs`
    tells all jobs, `begin_job` and `end_job` frame each, and `begin`, `update` and
    `end` are those of populations, of which a job may have several.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bars = None
        self._job = None
        self._all = None
        self._label = ""
        self._total = 0
        self._spoke_at = 0.0
        self._work: dict[str, Work] = {}
        self._over: list[str] = []
        self._at_work = ""
        self._members = 1
        self._ended = 0.0
        self._begun_at = 0.0
        self._gained = 0.0
        self._started_at = 0.0
        self._done_before = 0
        self._elsewhere: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import (
                Progress as Bars,
            )

            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[note]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
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
            self._all = self._bars.add_task(label, total=total, note="", left="")

    def advance_all(self, amount: float) -> None:
        """Moves the bar for everything."""
        if self._bars is not None and self._all is not None:
            self._bars.advance(self._all, amount)

    def begin_jobs(self, work: Mapping[str, Work], finished: float = 0.0) -> None:
        """Starts the bar of a suite.

        Args:
          work: of the jobs that are to be run, by run id.
          finished: updates of the suite's other runs, which were there before.
        """
        self._work, self._over = dict(work), []
        self._begun_at, self._gained = time.monotonic(), 0.0
        if self._bars is not None:
            total = finished + sum(each.total for each in work.values())
            self._all = self._bars.add_task(
                f"0 of {len(work)} jobs",
                total=total,
                completed=round(finished + sum(each.done for each in work.values())),
                note="",
                left="",
            )

    def begin_job(self, run_id: str) -> None:
        """What follows is about this job."""
        self._at_work, self._ended = run_id, 0.0

    def end_job(self, run_id: str) -> None:
        """The job is over, however it ended: nothing of it is left to be done."""
        if run_id not in self._work:
            return
        self._close()
        self._count(self._work[run_id].total, run_id, gained=False)
        self._over.append(run_id)
        self._at_work = ""
        line = f"{len(self._over)} of {len(self._work)} jobs"
        if self._bars is not None and self._all is not None:
            self._bars.update(self._all, description=line)
        else:
            left = self.seconds_left()
            known = left is not None and len(self._over) < len(self._work)
            self.say(f"{line}, about {duration(left)} left" if known and left else line)

    def seconds_left(self) -> float | None:
        """Estimated time until all jobs are over; None before anything was done.

        Every update of a member is taken to cost what they cost so far in this process,
        compilation and evaluation included.
        """
        left = sum(each.total - each.done for each in self._work.values())
        if self._gained <= 0:
            return None
        return (time.monotonic() - self._begun_at) * left / self._gained

    def _count(self, done: float, run_id: str, gained: bool = True) -> None:
        """Of a job so many updates are done, by this process if `gained`."""
        before = self._work[run_id]
        self._work[run_id] = before._replace(done=done)
        if gained:
            self._gained += done - before.done
        if self._bars is not None and self._all is not None:
            left = self.seconds_left()
            self._bars.update(
                self._all,
                advance=done - before.done,
                left="" if left is None else f"{duration(left)} left",
            )

    def begin(self, label: str, total: int, done: int = 0, members: int = 1) -> None:
        """Starts the bar of a population.

        Args:
          label: what it is.
          total: updates of each member.
          done: some of them, before.
          members: M.
        """
        self._close()
        self._label, self._total, self._members = label, total, members
        self._spoke_at = self._started_at = time.monotonic()
        self._done_before = done
        if self._at_work in self._work:
            now = self._ended + members * done
            self._count(now, self._at_work, gained=False)
        if self._bars is not None:
            self._job = self._bars.add_task(
                label, total=total, completed=done, note="", left=""
            )
        else:
            self.say(f"{label}: begins" if done == 0 else f"{label}: goes on at {done}")

    def update(self, done: int, note: str) -> None:
        """Moves the bar of the population to `done` updates."""
        if self._at_work in self._work:
            self._count(self._ended + self._members * done, self._at_work)
        if self._bars is not None and self._job is not None:
            self._bars.update(
                self._job, completed=done, note=note, left=self._left(done)
            )
        elif time.monotonic() - self._spoke_at > QUIET_SECONDS:
            self._spoke_at = time.monotonic()
            self.say(f"{self._label}: {100 * done / self._total:3.0f}%  {note}")

    def _left(self, done: int) -> str:
        """Time that the population still takes at its speed so far."""
        gained = done - self._done_before
        if gained <= 0:
            return ""
        passed = time.monotonic() - self._started_at
        return f"{duration(passed * (self._total - done) / gained)} left"

    def end(self, line: str) -> None:
        """Removes the bar of the population and keeps one line about it."""
        self._ended += self._members * self._total
        self._close()
        self.say(line)

    def _close(self) -> None:
        if self._bars is not None and self._job is not None:
            self._bars.remove_task(self._job)
        self._job = None

    def show(
        self, run_id: str, label: str, done: int, total: int, note: str, amount: float
    ) -> None:
        """Moves the bar of a job that runs elsewhere, beside those of other such jobs.

        Args:
          run_id: of the job.
          label: of its population.
          done: updates of each member.
          total: of these.
          note: for people.
          amount: updates of the job summed over its members.
        """
        bar = self._elsewhere.get(run_id)
        if run_id in self._work and total > 0:
            self._count(amount, run_id, gained=bar is not None)
        if self._bars is not None:
            if bar is None:
                bar = self._elsewhere[run_id] = self._bars.add_task(
                    label, total=total, note="", left=""
                )
            self._bars.update(
                bar, description=label, total=total, completed=done, note=note
            )
        elif bar is None or time.monotonic() - bar > QUIET_SECONDS:
            self._elsewhere[run_id] = time.monotonic()
            self.say(f"{label}: {100 * done / max(total, 1):3.0f}%  {note}")

    def drop(self, run_id: str) -> None:
        """Removes the bar of a job that runs elsewhere."""
        bar = self._elsewhere.pop(run_id, None)
        if self._bars is not None and bar is not None:
            self._bars.remove_task(bar)


def duration(seconds: float) -> str:
    """A duration for people: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"
