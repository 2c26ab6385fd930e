"""How much of the spread between runs is noise of their evaluation episodes.

One-way random effects, per agent and task: run s has a true mean `m_s`, its evaluation
is the mean of E_s independent episodes around it.  The variance between evaluated runs
(`total`) estimates `Var(m_s)` plus the noise of an evaluation, and the variance of the
episodes of one run over their number (`within`) estimates that noise alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """The variance between the evaluated runs of a cell, and the noise in it.

    Attributes:
      within: mean over runs of the variance of the returns over their number.
      total: variance over runs of their mean returns.
      scale: from variances of returns to those of the cell's values.
      runs: behind it.
    """

    within: float
    total: float
    scale: float
    runs: int


def spread(
    returns: Sequence[Sequence[float]], values: Sequence[float]
) -> Spread | None:
    """The spread of a cell's runs; None with fewer than two that have two episodes.

    Args:
      returns: finite, of the episodes of every run.
      values: of these runs: an affine function of their mean returns.
    """
    kept = [
        (np.asarray(own), value)
        for own, value in zip(returns, values, strict=True)
        if len(own) > 1
    ]
    if len(kept) < 2:
        return None
    within = float(np.mean([own.var(ddof=1) / len(own) for own, _ in kept]))
    total = float(np.var([own.mean() for own, _ in kept], ddof=1))
    # A score is a return moved and stretched by constants that rows do not hold.
    stretched = float(np.var([value for _, value in kept], ddof=1))
    return Spread(within, total, stretched / total if total else 0.0, len(kept))


def share(own: Spread | None) -> float | None:
    """Share of the variance between runs that is noise, at most 1; None for 0 / 0."""
    if own is None or own.within == own.total == 0.0:
        return None
    return round(min(1.0, own.within / own.total), 4) if own.total else 1.0


def pooled_share(spreads: Iterable[Spread | None]) -> float | None:
    """Share of the variance of an agent's mean over tasks that is noise, at most 1.

    That mean has the variance `sum_t total_t / n_t` (over T^2) with noise `within_t` in
    place of `total_t` in it, in the unit of the values; so tasks weigh as they do in
    the uncertainty of the mean, and a ratio of sums is steadier than a mean of ratios.
    Cells without a spread are left out; None if none is left, or for 0 / 0.
    """
    known = [own for own in spreads if own is not None]
    noise = sum(own.scale * own.within / own.runs for own in known)
    total = sum(own.scale * own.total / own.runs for own in known)
    return round(min(1.0, noise / total), 4) if total else None
