"""A box of tyro's, which tells a wrong command line, as one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NOT_WHOLE = r"\1 is not a whole number"
_NO_NUMBER = r"\1 is not a number"
_PLAINER = (
    (r"invalid literal for int\(\) with base 10: ('.*')", _NOT_WHOLE),
    (r"no type matching .*INT could be instantiated from \[('.*')\]", _NOT_WHOLE),
    (r"no type matching .*FLOAT could be instantiated from \[('.*')\]", _NO_NUMBER),
    (r"'None', |, 'None'", ""),
    (r"Expected 1 values", "Expected one value"),
)
"""What tyro says, as patterns, and how a person would."""


def one_line(box: str, arguments: Sequence[str]) -> str:
    """What a box of tyro's says, without its title and its help texts.

    Inside the box, or below the title where the terminal can draw none, a message is
    indented by two, what it is about by six and help texts by ten; a rule parts one
    message from the next.
    """
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line[2:].rstrip(" │")
        if set(text) <= set("─-╯"):
            parts.append([])
            continue
        if text.startswith(("Got errors", "Argument helptext", "For full helptext")):
            break
        if len(text) - len(text.lstrip()) <= 4:
            parts[-1].append(text.strip())
    message = "; ".join(" ".join(part) for part in parts if part)
    for pattern, plain in _PLAINER:
        message = re.sub(pattern, plain, message)
    shown = [*_subcommands(arguments), "--help"]
    return f"{message.rstrip('.')} (see: offrl {' '.join(shown)})"


def _subcommands(arguments: Sequence[str]) -> list[str]:
    """The words of a command line that name a command."""
    if arguments[:1] == ["data"]:
        actions = ("list", "prepare", "generate", "check", "import")
        return ["data", *(word for word in arguments[1:2] if word in actions)]
    known = ("benchmark", "run", "leaderboard", "curves", "progress", "embed")
    known += ("compare", "figures", "tuning", "reproduce", "agents", "tasks", "doctor")
    return [word for word in arguments[:1] if word in known]
