"""The commands that filled a results folder, as they were typed.

Rows and plan say all that a run depends on; this says how somebody asked for it.  A
folder without the file is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from offrl_jax.errors import ResultsError
from offrl_jax.results.folder import command_path
from offrl_jax.results.lines import LineFile, Record, parse_lines


def note_command(
    folder: Path,
    words: Sequence[str],
    commit: str | None,
    run_ids: Iterable[str],
    on_message: Callable[[str], None],
) -> None:
    """Writes down who asked first for each of `run_ids`; the plan's lock is held.

    Args:
      folder: of results.
      words: of the command, the program's name first.
      commit: of the package, None outside of a checkout.
      run_ids: that the command is to make; none or known ones leave the file as it is.
      on_message: told of a torn last line.

    Raises:
      ResultsError: the file cannot be written, or holds something else.
    """
    if not words:
        return
    path = command_path(folder)
    with closing(LineFile(path, on_message, "a command is forgotten")) as file:
        known = _by_run(file.found)
        new = [name for name in run_ids if name not in known]
        if new:
            entry = {"command": list(words), "commit": commit, "run_ids": new}
            file.append([json.dumps(entry, separators=(",", ":"))])


def read_commands(folder: Path) -> dict[str, tuple[str, ...]]:
    """Words of the command that first asked for a run, by run id.

    Raises:
      ResultsError: the file cannot be read, or holds something else.
    """
    path = command_path(folder)
    if not path.exists():
        return {}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error})") from error
    return _by_run(parse_lines(data, path)[0])


def _by_run(records: Iterable[Record]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for where, content in records:
        try:
            words = tuple(map(str, content["command"]))
            for name in content["run_ids"]:
                found.setdefault(name, words)
        except (KeyError, TypeError) as error:
            raise ResultsError(f"{where}: not a command ({error})") from error
    return found
