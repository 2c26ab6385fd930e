"""Types of options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

# A hint of "" hides tyro's "(default: None)": the text says what happens without it.
Count = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Amount = Annotated[float | None, arg(metavar="GIB", help_behavior_hint="")]
Names = Annotated[
    tuple[str, ...] | None, arg(metavar="NAME ...", help_behavior_hint="")
]
Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
Folder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
DataDir = Annotated[
    Path | None,
    arg(
        metavar="DIR",
        help="Data store. Default: $OFFRL_DATA, else a folder in the user's cache.",
        help_behavior_hint="",
    ),
]
Settings = Annotated[
    tuple[str, ...],
    arg(metavar="NAME=VALUE", help_behavior_hint=""),
    UseAppendAction,
]
