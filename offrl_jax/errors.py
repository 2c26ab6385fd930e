"""Errors for people: what was wrong, with which value, and what to do.

Every problem that a user can cause or cure is raised as an `OffrlError` whose message
is one line; the command line prints that line and exits with the code of the class,
without a traceback.  Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OffrlError(Exception):
    """A problem to be told to the user in one line; `exit_code` is the command's."""

    exit_code = 1


class UsageError(OffrlError):
    """The request itself is wrong: an unknown name, a setting of the wrong type."""

    exit_code = 2


class DataError(OffrlError):
    """A dataset is absent, damaged or breaks the schema."""

    exit_code = 3


class ResultsError(OffrlError):
    """A results folder cannot be written, or holds rows that contradict each other."""

    exit_code = 4


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for `name` not being one of the `known` names, with the nearest one."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
    return UsageError(f"unknown {kind} '{name}'; {hint}")
