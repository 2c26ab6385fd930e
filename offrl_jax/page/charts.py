"""Where the marks of a chart lie; the template turns them into SVG.

A chart is plain numbers in the units of its own view box, so that it can be tested
without a browser and drawn without a script.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping, Sequence

from offrl_jax.leaderboard import text
from offrl_jax.leaderboard.model import Entry
from offrl_jax.leaderboard.progress import AgentProgress, Point, Progress
from offrl_jax.leaderboard.ranking import Bounds

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 40
"""Margins of the plotting area inside of `WIDTH` x `HEIGHT`."""
_LABEL_HEIGHT, _CHARACTER = 13, 6.1  # of the text beside a point, in units of the box
NAME = 26
"""Characters of a name beside a point; longer ones are cut, and whole in the table."""
_TROUBLE = 60.0  # square units that a name may hide of others
_LOG_SPAN = 4.0  # costs that differ by more are drawn on a logarithmic axis


class Scale:
    """Maps values to a line of pixels, linearly or by their logarithms."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, log: bool = False
    ) -> None:
        """A range of a single value is widened, so that it lies in the middle."""
        self._of: Callable[[float], float] = math.log10 if log else float
        self._low, self._high = self._of(low), self._of(high)
        if self._high <= self._low:
            self._low, self._high = self._low - 0.5, self._high + 0.5
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        """The place of a value, to a tenth of a unit; beyond the range is cut."""
        share = (self._of(value) - self._low) / (self._high - self._low)
        share = min(max(share, 0.0), 1.0)
        return round(self._start + share * (self._end - self._start), 1)


@dataclasses.dataclass(frozen=True)
class Tick:
    """A labelled place of an axis."""

    at: float
    label: str


@dataclasses.dataclass(frozen=True)
class Line:
    """One agent's line: an SVG path, and its band (empty where there is none)."""

    agent: int
    path: str
    band: str
    dots: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Lines:
    """A chart of lines."""

    title: str
    about: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]


@dataclasses.dataclass(frozen=True)
class Dot:
    """One agent's point with the ends of its interval, and where its name stands."""

    agent: int
    x: float
    y: float
    low: float | None
    high: float | None
    name: str
    name_x: float
    name_y: float
    anchor: str


@dataclasses.dataclass(frozen=True)
class Dots:
    """A chart of points."""

    title: str
    about: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    dots: tuple[Dot, ...]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values inside of a range, about `count` of them."""
    if high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (m * step) - count))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside of a range; powers alone if it is wide."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) > 3 else (1, 2, 5)
    found = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in found if low <= value <= high]


def short(value: float) -> str:
    """`20k` for 20,000, `1.5M`; small numbers as they are."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _axis(scale: Scale, values: Sequence[float]) -> tuple[Tick, ...]:
    return tuple(Tick(scale(value), short(value)) for value in values)


def _horizontal(low: float, high: float, *, log: bool = False) -> Scale:
    return Scale(low, high, LEFT, WIDTH - RIGHT, log=log)


def _vertical(low: float, high: float) -> Scale:
    return Scale(low, high, HEIGHT - BOTTOM, TOP)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)


def _line(
    agent: int,
    points: Sequence[tuple[float, Bounds]],
    x: Scale,
    y: Scale,
    *,
    dots: bool,
) -> Line:
    places = [(x(at), y(bounds.value)) for at, bounds in points]
    ends = [(x(at), b.low, b.high) for at, b in points]
    known = [
        (at, y(low), y(high))
        for at, low, high in ends
        if low is not None and high is not None
    ]
    band = ""
    if len(known) == len(points) > 1:
        upper = [(at, high) for at, _, high in known]
        lower = [(at, low) for at, low, _ in reversed(known)]
        band = _path(upper + lower) + "Z"
    return Line(agent, _path(places), band, tuple(places) if dots else ())


def profiles(
    found: Mapping[str, tuple[Sequence[float], Sequence[Bounds]]],
    numbers: Mapping[str, int],
    unit: str,
) -> Lines | None:
    """Performance profiles: thresholds and fractions of runs above them, by label.

    Args:
      found: by label of ranked agents.
      numbers: of the agents of the section, by label.
      unit: words for the horizontal axis.
    """
    if not found:
        return None
    grid = next(iter(found.values()))[0]
    x, y = _horizontal(grid[0], grid[-1]), _vertical(0.0, 1.0)
    lines = [
        _line(numbers[label], list(zip(*own, strict=True)), x, y, dots=False)
        for label, own in found.items()
    ]
    return Lines(
        title="Performance profiles",
        about="Share of all runs above a score; a line above and to the right of "
        "another is better. Bands: 95 % intervals, point by point.",
        x_label=unit,
        y_label="share of runs above",
        x_ticks=_axis(x, ticks(grid[0], grid[-1])),
        y_ticks=_axis(y, (0.0, 0.25, 0.5, 0.75, 1.0)),
        lines=tuple(lines),
    )


def learning(
    progress: Progress | None, numbers: Mapping[str, int], shown: Container[str]
) -> Lines | None:
    """The IQM, or the mean of a single raw task, against updates, of labels `shown`."""
    if progress is None:
        return None
    tasks = list(progress.units)
    single = tasks[0] if len(tasks) == 1 else None

    def points_of(own: AgentProgress) -> Sequence[Point]:
        return own.pooled or (own.by_task.get(single, ()) if single else ())

    found = {
        own.label: points_of(own)
        for own in progress.agents
        if own.label in shown and points_of(own)
    }
    every = [point for points in found.values() for point in points]
    if len({point.step for point in every}) < 2:
        return None
    ends = [e for p in every for e in p.value.__dict__.values() if e is not None]
    low, high = min([*ends, 0.0] if progress.pooled else ends), max(ends)
    last = max(point.step for point in every)
    x, y = _horizontal(0.0, last), _vertical(low, high)
    count = len(progress.pooled)
    over = f"{count} tasks" if count > 1 else "the task"
    return Lines(
        title="While training" if count else "Mean return while training",
        about=f"IQM over {over} at every evaluation; only the last one counts."
        if count
        else "Mean over seeds at every evaluation; only the last one counts.",
        x_label=text.steps_name(progress.key.family),
        y_label="IQM" if count else "return",
        x_ticks=_axis(x, ticks(0.0, last)),
        y_ticks=_axis(y, ticks(low, high)),
        lines=tuple(
            _line(numbers[label], [(p.step, p.value) for p in own], x, y, dots=True)
            for label, own in found.items()
        ),
    )


def cost(
    entries: Sequence[Entry], unit: str, numbers: Mapping[str, int]
) -> Dots | None:
    """IQM against device seconds of a run.

    Args:
      entries: ranked ones.
      unit: of the IQM.
      numbers: of the agents of the section, by label.
    """
    found = [
        (entry.label, entry.cost_s, entry.iqm)
        for entry in entries
        if entry.iqm is not None and entry.cost_s
    ]
    if len(found) < 2:
        return None
    costs = [seconds for _, seconds, _ in found if seconds is not None]
    log = max(costs) > _LOG_SPAN * min(costs)
    left, right = (
        (min(costs) * 0.8, max(costs) * 1.25) if log else (0, max(costs) * 1.1)
    )
    ends = [
        end
        for _, _, iqm in found
        for end in (iqm.value, iqm.low, iqm.high)
        if end is not None
    ]
    low, high = min(ends), max(ends)
    # Zoomed in: whoever is dear and not better shall be seen.
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    x, y = _horizontal(left, right, log=log), _vertical(low, high)
    dots = [
        Dot(
            agent=numbers[label],
            x=x(seconds),
            y=y(iqm.value),
            low=None if iqm.low is None else y(iqm.low),
            high=None if iqm.high is None else y(iqm.high),
            name=_cut(label),
            name_x=0,
            name_y=0,
            anchor="start",
        )
        for label, seconds, iqm in found
        if seconds is not None
    ]
    widths = {dot.agent: len(dot.name) * _CHARACTER for dot in dots}
    return Dots(
        title="Score against cost",
        about="Up is better, left is cheaper. Seconds of one device for one run, as "
        "trained inside of its population, without compilation and evaluation.",
        x_label="device seconds per run" + (", logarithmic" if log else ""),
        y_label="IQM",
        x_ticks=_axis(x, log_ticks(left, right) if log else ticks(left, right)),
        y_ticks=_axis(y, ticks(low, high)),
        dots=tuple(place_names(dots, widths)),
    )


def _cut(label: str) -> str:
    name = text.printable(label)
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def place_names(dots: Sequence[Dot], widths: Mapping[int, float]) -> list[Dot]:
    """Names beside their points, from the highest point down.

    Six places are tried for each; a name that would hide another one is left out.
    """
    taken: list[tuple[float, float, float, float]] = [
        (dot.x - 4, dot.y - 4, dot.x + 4, dot.y + 4) for dot in dots
    ]
    taken += [
        (dot.x - 1, dot.high, dot.x + 1, dot.low)
        for dot in dots
        if dot.low is not None and dot.high is not None
    ]
    placed: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.y, dot.x)):
        width = widths[dot.agent]
        options = [
            (dot.x + 7, dot.y + 4, "start"),
            (dot.x - 7, dot.y + 4, "end"),
            (dot.x + 7, dot.y - 8, "start"),
            (dot.x - 7, dot.y - 8, "end"),
            (dot.x + 7, dot.y + 16, "start"),
            (dot.x - 7, dot.y + 16, "end"),
        ]

        def box(option: tuple[float, float, str], width: float = width):
            at, base, anchor = option
            start = at if anchor == "start" else at - width
            return (start, base - _LABEL_HEIGHT + 3, start + width, base + 3)

        def trouble(option: tuple[float, float, str]) -> float:
            own = box(option)
            outside = max(0.0, LEFT - own[0]) + max(0.0, own[2] - WIDTH)
            return 50 * outside + sum(_overlap(own, other) for other in taken)

        best = min(options, key=trouble)
        if trouble(best) > _TROUBLE:
            placed.append(dataclasses.replace(dot, name=""))
            continue
        taken.append(box(best))
        placed.append(
            dataclasses.replace(dot, name_x=best[0], name_y=best[1], anchor=best[2])
        )
    return placed


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return max(wide, 0.0) * max(high, 0.0)
