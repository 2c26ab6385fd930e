"""What a dataset is: whole episodes in NumPy arrays, checked before they are used.

Letters: N transitions, O observation and A action dimension, K episodes.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from offrl_jax.errors import DataError
from offrl_jax.types import Transitions

ACTION_TOLERANCE = 1e-6
"""How far beyond [-1, 1] an action may lie: float32 rounding of a scaled bound."""

_FLOAT_FIELDS = ("obs", "action", "reward", "next_obs")
_FLAG_FIELDS = ("terminated", "truncated")


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Whole episodes, one after the other, as NumPy arrays (possibly memory-mapped).

    An episode ends where `terminated` or `truncated`.  Both may be set at once, as in
    gymnasium: the terminal state was reached at the very step of the time limit; such
    a step counts as terminal.

    Attributes:
      obs: `[N, O]` float32.
      action: `[N, A]` float32, in [-1, 1].
      reward: `[N]` float32, raw.
      next_obs: `[N, O]` float32; the observation that followed, within the episode.
      terminated: `[N]` bool; a terminal state was reached, so nothing is bootstrapped.
      truncated: `[N]` bool; the episode was cut, by a time limit for instance.
    """

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray

    def __len__(self) -> int:
        """N, the number of transitions."""
        return len(self.reward)

    @property
    def ends(self) -> np.ndarray:
        """`[K]` int64: the row of the last transition of each episode."""
        return np.flatnonzero(self.terminated | self.truncated)

    @property
    def starts(self) -> np.ndarray:
        """`[K]` int64: the row of the first transition of each episode."""
        return _starts(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """`[K]` int64: the number of transitions of each episode."""
        return self.ends - self.starts + 1


FIELDS = tuple(field.name for field in dataclasses.fields(Episodes))
"""Names of the arrays, in the order in which they are stored and hashed."""


def _starts(ends: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: len(ends)]


def validate(episodes: Episodes, where: str) -> None:
    """Checks every promise of `Episodes`.

    Args:
      episodes: the arrays to check.
      where: the file or task that they come from; begins every message.

    Raises:
      DataError: a field has the wrong dtype or shape, holds a number that is not
        finite, an action lies outside of [-1, 1] (by more than `ACTION_TOLERANCE`), the
        last episode has no end, or `next_obs` is not the next row's `obs` inside an
        episode.  The message names field, row and episode.
    """
    _validate_arrays(episodes, where)
    ends = episodes.ends
    last = len(episodes) - 1
    if not len(ends) or ends[-1] != last:
        raise DataError(
            f"{where}: the last row {last} ends no episode; "
            "set 'truncated' there if the recording was cut"
        )

    def episode_of(row: int) -> str:
        return f"row {row} (episode {int(np.searchsorted(ends, row))})"

    for name in _FLOAT_FIELDS:
        array = getattr(episodes, name)
        bad = ~np.isfinite(array)
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise DataError(
                f"{where}: field '{name}', {episode_of(row)}: {array[row]} is not "
                f"finite; {int(bad.sum())} such numbers in all"
            )
    outside = np.abs(episodes.action) > 1 + ACTION_TOLERANCE
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise DataError(
            f"{where}: field 'action', {episode_of(int(row))}: component {column} is "
            f"{episodes.action[row, column]:.9g}, outside of [-1, 1]; scale actions by "
            "the bounds of their environment"
        )
    inside = np.ones(len(episodes), bool)
    inside[ends] = False
    rows = np.flatnonzero(inside)
    # Row by row rather than a copy of both arrays: `rows` is nearly all of N.
    broken = (episodes.next_obs[:-1] != episodes.obs[1:]).any(axis=1)
    broken &= inside[:-1]
    if broken.any():
        row = int(np.argmax(broken))
        raise DataError(
            f"{where}: field 'next_obs', {episode_of(row)} differs from 'obs' of row "
            f"{row + 1} of the same episode; {int(broken.sum())} of {len(rows)} steps "
            "do: an episode's end is missing, or rows were shuffled"
        )


def _validate_arrays(episodes: Episodes, where: str) -> None:
    """Checks dtypes and shapes."""
    for name in FIELDS:
        array = getattr(episodes, name)
        dtype = np.dtype(bool if name in _FLAG_FIELDS else np.float32)
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            found = getattr(array, "dtype", type(array).__name__)
            raise DataError(f"{where}: field '{name}' is {found}, must be {dtype}")
        rank = 2 if name in ("obs", "action", "next_obs") else 1
        if array.ndim != rank:
            raise DataError(
                f"{where}: field '{name}' has shape {array.shape}, must have {rank} "
                f"{'axes' if rank == 2 else 'axis'}"
            )
        if len(array) != len(episodes.reward):
            raise DataError(
                f"{where}: field '{name}' has {len(array)} rows, 'reward' has "
                f"{len(episodes.reward)}; all must agree"
            )
    if not len(episodes):
        raise DataError(f"{where}: holds no transition")
    if episodes.obs.shape != episodes.next_obs.shape:
        raise DataError(
            f"{where}: field 'next_obs' has shape {episodes.next_obs.shape}, 'obs' has "
            f"{episodes.obs.shape}; they must agree"
        )
    if not episodes.obs.shape[1] or not episodes.action.shape[1]:
        raise DataError(
            f"{where}: observations {episodes.obs.shape} and actions "
            f"{episodes.action.shape} must have at least one component"
        )


def to_transitions(episodes: Episodes) -> Transitions:
    """Turns episodes into transitions (NumPy leaves; N rows, in the same order).

    `discount` is 0 only where `terminated`; a time-out keeps 1.  The last transition of
    an episode has no next action: zeros, and `has_next_action` 0.
    """
    ended = episodes.terminated | episodes.truncated
    next_action = np.zeros_like(episodes.action)
    next_action[:-1] = episodes.action[1:]
    next_action[ended] = 0.0
    leaves = (
        episodes.obs,
        episodes.action,
        episodes.reward,
        (~episodes.terminated).astype(np.float32),
        episodes.next_obs,
        next_action,
        (~ended).astype(np.float32),
    )
    return Transitions(*leaves)  # pyright: ignore[reportArgumentType]


def episode_returns(episodes: Episodes) -> np.ndarray:
    """Undiscounted sum of rewards of each episode, `[K]` float64."""
    return np.add.reduceat(episodes.reward.astype(np.float64), episodes.starts)


def take_episodes(episodes: Episodes, first: int, last: int) -> Episodes:
    """Episodes `first` to `last - 1`, as views of the same arrays.

    Raises:
      ValueError: the range is empty or reaches beyond the K episodes.
    """
    if not 0 <= first < last <= len(episodes.ends):
        raise ValueError(
            f"episodes [{first}, {last}) of {len(episodes.ends)}: empty or out of range"
        )
    rows = slice(episodes.starts[first], episodes.ends[last - 1] + 1)
    return Episodes(*(getattr(episodes, name)[rows] for name in FIELDS))


def split_validation(
    episodes: Episodes, fraction: float = 0.05
) -> tuple[Episodes, Episodes | None]:
    """Holds out the last episodes, as views: `(train, validation)`.

    Args:
      episodes: K episodes.
      fraction: share of episodes to hold out, rounded to the nearest number of
        episodes, at least one; training always keeps at least one.

    Returns:
      The first and the last episodes; no validation (None) where K is 1 or `fraction`
      is 0.

    Raises:
      ValueError: `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction {fraction} is not in [0, 1)")
    count = len(episodes.ends)
    if count == 1 or fraction == 0:
        return episodes, None
    held_out = min(max(1, int(fraction * count + 0.5)), count - 1)
    return (
        take_episodes(episodes, 0, count - held_out),
        take_episodes(episodes, count - held_out, count),
    )


def dataset_hash(episodes: Episodes) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every array, in field order.

    Bytes are those of C order and little-endian numbers on every machine.
    """
    digest = hashlib.sha256()
    for name in FIELDS:
        array = getattr(episodes, name)
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(f"{name} {plain.dtype.str} {plain.shape}\n".encode())
        digest.update(plain.data)
    return digest.hexdigest()
