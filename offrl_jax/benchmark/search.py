"""Random search: settings drawn from the distributions that a suite file names.

Independent draws from a product of distributions, as in Bergstra and Bengio, *Random
Search for Hyper-Parameter Optimization* (JMLR 2012).  A draw depends on nothing but the
seed, the names of agent, search and setting, and its number: another setting, another
agent or a larger count change none that were there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

from offrl_jax.errors import UsageError, unknown_name

MOST = 1_000
"""Largest count of one search: more is a slip of the keyboard."""
DIGITS = 3
"""Digits of a number that is drawn, so that names can be read: significant ones on a
logarithm, else those that tell a thousandth of the interval."""
TRIES = 100
"""Draws per setting, repeated ones included, before a search is called too narrow."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A uniform or log-uniform distribution.

    Attributes:
      low: smallest value.
      high: largest value.
      log: whether the logarithm is uniform, instead of the value.
      integer: whether the value is a whole number.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def at(self, quantile: float) -> float | int:
        """The value at a quantile in [0, 1), rounded as `DIGITS` says unless whole."""
        # Of whole numbers, every one has an interval of its own.
        high = self.high + 1 if self.integer else self.high
        if self.log:
            ends = math.log(self.low), math.log(high)
            value = math.exp(ends[0] + quantile * (ends[1] - ends[0]))
        else:
            value = self.low + quantile * (high - self.low)
        if self.integer:
            return int(min(max(math.floor(value), self.low), self.high))
        if self.log:
            rounded = float(f"{value:.{DIGITS}g}")
        else:
            scale = math.floor(math.log10(self.high - self.low))
            rounded = round(value, DIGITS - scale)
        return float(min(max(rounded, self.low), self.high))


Distribution = Interval | tuple[Any, ...]
"""An interval, or a choice among values of equal probability."""


def parse_distribution(where: str, value: object) -> Distribution:
    """What a suite file says of a setting, as a distribution.

    Args:
      where: of the entry, for messages.
      value: a list of values, or a table of `low`, `high`, `log` and `integer`.

    Raises:
      UsageError: neither of the two, or an interval without values.
    """
    if isinstance(value, list):
        if not value:
            raise UsageError(f"{where} is an empty list; name the values to choose of")
        return tuple(value)
    if not isinstance(value, Mapping):
        raise UsageError(
            f"{where} is {value!r}; write a list of values, or {{low = 0.1, "
            "high = 1.0} with log = true or integer = true"
        )
    known = [field.name for field in dataclasses.fields(Interval)]
    for name in value:
        if name not in known:
            raise unknown_name(f"entry of {where}:", str(name), known)
    for name in ("low", "high"):
        if name not in value:
            raise UsageError(f"{where} lacks '{name}'; give low and high, or a list")
        number = value[name]
        if type(number) not in (int, float) or not math.isfinite(number):
            raise UsageError(f"{where}: {name} is {number!r}; expected a finite number")
    for name in ("log", "integer"):
        if type(value.get(name, False)) is not bool:
            raise UsageError(
                f"{where}: {name} is {value[name]!r}; expected true or false"
            )
    found = Interval(**value)
    if found.low >= found.high:
        raise UsageError(
            f"{where}: low is {found.low} and high {found.high}; low must be below high"
        )
    if found.log and found.low <= 0:
        raise UsageError(
            f"{where}: low is {found.low}; a logarithm needs low above 0, or leave out "
            "log = true"
        )
    if found.integer and not all(type(value[name]) is int for name in ("low", "high")):
        raise UsageError(
            f"{where}: low is {found.low} and high {found.high}; integer = true takes "
            "whole numbers"
        )
    return found


def draw(distribution: Distribution, key: str) -> Any:
    """The value that `key` names: equal keys, equal values, on every machine."""
    digest = hashlib.sha256(key.encode()).digest()
    quantile = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    if isinstance(distribution, Interval):
        return distribution.at(quantile)
    return distribution[int(quantile * len(distribution))]


def drawn_settings(
    where: str, agent: str, title: str, table: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The settings of one search, by name, in the order of their draws.

    A setting is called `title` and after what was drawn for it; a repeated draw is
    passed over.

    Args:
      where: of the table, for messages.
      agent: name of the agent.
      title: name of the search.
      table: `count`, `seed` (0 if left out), and a distribution per setting.

    Raises:
      UsageError: a senseless count, seed or distribution, or fewer different settings
        than `count`.
    """
    entries = dict(table)
    count, seed = entries.pop("count", None), entries.pop("seed", 0)
    if type(count) is not int or not 1 <= count <= MOST:
        raise UsageError(
            f"{where}: count is {count}; give how many settings to draw, from 1 to "
            f"{MOST:,}"
        )
    if type(seed) is not int or seed < 0:
        raise UsageError(f"{where}: seed is {seed!r}; expected a whole number from 0")
    if not entries:
        raise UsageError(f"{where} names no setting to draw; see: offrl agents {agent}")
    space = {
        name: parse_distribution(f"'{name}' of {where}", value)
        for name, value in entries.items()
    }
    found: dict[str, dict[str, Any]] = {}
    for number in range(TRIES * count):
        values = {
            name: draw(one, f"{seed}/{agent}/{title}/{name}/{number}")
            for name, one in space.items()
        }
        varied = [
            f"{name}={value}"
            for name, value in values.items()
            if not isinstance(one := space[name], tuple) or len(one) > 1
        ]
        found.setdefault(",".join([title, *varied]), values)
        if len(found) == count:
            return found
    raise UsageError(
        f"{where}: count is {count}, but {TRIES * count:,} draws gave only "
        f"{len(found)} different settings; lower count or widen the distributions"
    )
