"""Suites: which agents on which tasks, with how many seeds, under which protocol.

A suite is a TOML file; the ones that ship with the project are `quick`, `classic` and
`neorl2`.  Any path that ends in `.toml` works wherever a suite's name does.
"""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offrl_jax.benchmark.rules import Choice, Selection
from offrl_jax.benchmark.search import drawn_settings
from offrl_jax.errors import UsageError, unknown_name

ALL_AGENTS = "*"
ROLES = ("test", "tune")
FIRST_TUNING_SEED = 1000
"""Seeds from here on are for choosing settings, those below for reporting them."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How policies are evaluated; printed with every table.

    Attributes:
      episodes: evaluation episodes per run after the last update; only they are ranked.
      evaluations: points of the learning curve, the last update included.
      curve_episodes: episodes at the other points.
      seed: of the evaluation episodes.
      version: changes whenever the meaning of a score does.
    """

    episodes: int = 100
    evaluations: int = 10
    curve_episodes: int = 10
    seed: int = 0
    version: int = 1

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(
                f"protocol setting seed must be at least 0, got {self.seed}"
            )
        for name in ("episodes", "evaluations", "curve_episodes"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"protocol setting {name} must be at least 1, got "
                    f"{getattr(self, name)}"
                )


@dataclasses.dataclass(frozen=True)
class Suite:
    """A benchmark in words.

    Attributes:
      name: of the suite; also the default results folder.
      description: one line.
      tasks: task ids.
      agents: names or `name@preset` labels; `*` is every registered agent.
      preset: appended to the agents that name none; empty for their defaults.
      seeds: runs per agent, task and setting: `first_seed`, `first_seed + 1`, ...
      updates: of the policy phase.
      protocol: evaluation.
      pretraining_updates: of the phases before the policy phase, for agents that have
        such; 0 means a tenth of `updates`.
      settings: per agent name, named settings: `{agent: {setting: {name: value}}}`.
        An agent without an entry runs its default setting.
      role: `test`, or `tune`: its runs choose settings, and no leaderboard counts them.
      first_seed: tuning seeds must be other ones than those of the test.
      selection: how the settings of agents without an entry in `settings` are chosen
        from the runs of a suite that tunes; None: they run their defaults.
      choices: by label, what was chosen; of `selection.chosen`, never of a file.
    """

    name: str
    description: str
    tasks: tuple[str, ...]
    agents: tuple[str, ...]
    preset: str
    seeds: int
    updates: int
    protocol: Protocol
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]] = dataclasses.field(
        default_factory=dict
    )
    pretraining_updates: int = 0
    role: str = "test"
    first_seed: int = 0
    selection: Selection | None = None
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seeds", "updates"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.role not in ROLES:
            raise unknown_name("role", self.role, ROLES)
        if self.role == "tune" and self.first_seed < FIRST_TUNING_SEED:
            raise UsageError(
                f"first_seed is {self.first_seed}: a suite that tunes takes seeds from "
                f"{FIRST_TUNING_SEED} on, which no test uses"
            )
        last = self.first_seed + self.seeds
        if self.role == "test" and not 0 <= self.first_seed < last <= FIRST_TUNING_SEED:
            raise UsageError(
                f"seeds {self.first_seed} to {last - 1}: a test takes seeds from 0 to "
                f"{FIRST_TUNING_SEED - 1}; later ones are for tuning"
            )
        if self.pretraining_updates < 0:
            raise UsageError(
                "pretraining_updates must be at least 0, got "
                f"{self.pretraining_updates}"
            )
        if self.selection is not None and self.role != "test":
            raise UsageError(
                f"suite '{self.name}' tunes and has a selection; only a test has one"
            )
        if not self.tasks:
            raise UsageError(f"suite '{self.name}' has no tasks")
        if not self.agents:
            raise UsageError(f"suite '{self.name}' has no agents")


def suite_folders() -> list[Path]:
    """Where suites lie: in an installed package, or in the repository beside it."""
    package = Path(__file__).resolve().parent.parent
    folders = [package / "suites", package.parent / "benchmarks" / "suites"]
    return [folder for folder in folders if folder.is_dir()]


def known_suites() -> dict[str, Path]:
    """The files of the suites that ship with the project, by name."""
    return {
        path.stem: path
        for folder in reversed(suite_folders())
        for path in sorted(folder.glob("*.toml"))
    }


def load_suite(name: str) -> Suite:
    """Reads a suite by its name or from the path of a TOML file.

    Raises:
      UsageError: if there is none of that name, or the file is malformed.
    """
    path = Path(name) if name.endswith(".toml") else known_suites().get(name)
    if path is None:
        raise unknown_name("suite", name, known_suites())
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"suite file {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"suite file {path} is not valid TOML: {error}") from error
    return _parse(path, table)


_KINDS = {
    "tasks": list,
    "agents": list,
    "settings": dict,
    "grids": dict,
    "search": dict,
    "selection": dict,
    "protocol": dict,
    "seeds": int,
    "updates": int,
    "pretraining_updates": int,
    "name": str,
    "description": str,
    "preset": str,
    "role": str,
    "first_seed": int,
}


def _parse(path: Path, table: dict[str, Any]) -> Suite:
    table = {"name": path.stem, "description": "", "preset": "", **table}
    for name, value in table.items():
        if name not in _KINDS:
            raise unknown_name(f"entry in suite file {path}:", name, _KINDS)
        kind = _KINDS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(
                f"suite file {path}: '{name}' must be of type {kind.__name__}, "
                f"got {value!r}"
            )
    for agent, named in table.get("settings", {}).items():
        if not _is_table_of_tables(named):
            raise UsageError(
                f"suite file {path}: [settings.{agent}] must hold tables, one for "
                f"each setting to be run, such as [settings.{agent}.mine]"
            )
    if {"grids", "search"} & set(table):
        table["settings"] = _all_settings(path, table)
        table.pop("grids", None)
        table.pop("search", None)
    required = {
        field.name
        for field in dataclasses.fields(Suite)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    missing = required - {"protocol"} - set(table)
    if missing:
        raise UsageError(f"suite file {path}: '{sorted(missing)[0]}' is missing")
    protocol = table.pop("protocol", {})
    known = {field.name for field in dataclasses.fields(Protocol)}
    for name, value in protocol.items():
        if name not in known:
            raise unknown_name(f"protocol entry in suite file {path}:", name, known)
        if type(value) is not int:
            raise UsageError(
                f"suite file {path}: protocol entry '{name}' must be of type int, "
                f"got {value!r}"
            )
    for name in ("tasks", "agents"):
        for entry in table[name]:
            if not isinstance(entry, str):
                raise UsageError(
                    f"suite file {path}: {entry!r} is no name of anything in '{name}'"
                )
    if "selection" in table:
        table["selection"] = _selection(path, table["selection"])
    lists = {name: tuple(table.pop(name)) for name in ("tasks", "agents")}
    return Suite(protocol=Protocol(**protocol), **lists, **table)


def _selection(path: Path, table: Mapping[str, Any]) -> Selection:
    """`[selection]` of a suite file."""
    kinds = {"from": str, "rule": str, "incomplete": bool, "other_updates": bool}
    for name, value in table.items():
        if name not in kinds:
            raise unknown_name(f"selection entry in suite file {path}:", name, kinds)
        if type(value) is not kinds[name]:
            raise UsageError(
                f"suite file {path}: selection entry '{name}' must be of type "
                f"{kinds[name].__name__}, got {value!r}"
            )
    for name in ("from", "rule"):
        if name not in table:
            raise UsageError(f"suite file {path}: selection entry '{name}' is missing")
    rest = {name: value for name, value in table.items() if name != "from"}
    return Selection(source=table["from"], **rest)


def _all_settings(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a suite file, and those of its grids and searches.

    `[grids.AGENT.NAME]` holds a list of alternatives per entry; every combination is a
    setting, called NAME and after the entries that have several.  `[search.AGENT.NAME]`
    is explained by `search`.
    """
    settings = {
        agent: dict(named) for agent, named in table.get("settings", {}).items()
    }
    for kind, expanded in (("grids", _combinations), ("search", drawn_settings)):
        for agent, named in table.get(kind, {}).items():
            if not _is_table_of_tables(named):
                raise UsageError(
                    f"suite file {path}: [{kind}.{agent}] must hold tables, such as "
                    f"[{kind}.{agent}.mine]"
                )
            own = settings.setdefault(agent, {})
            for title, inner in named.items():
                where = f"[{kind}.{agent}.{title}] in suite file {path}"
                for name, values in expanded(where, agent, title, inner).items():
                    if name in own:
                        raise UsageError(f"suite file {path}: two settings '{name}'")
                    own[name] = values
    return settings


def _combinations(
    where: str, agent: str, title: str, grid: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The settings of one grid, by name."""
    del agent
    for entry, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UsageError(
                f"'{entry}' of {where} must be a list of alternatives, got {values!r}"
            )
    found: dict[str, dict[str, Any]] = {}
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        varied = [f"{k}={v}" for k, v in values.items() if len(grid[k]) > 1]
        name = ",".join([title, *varied])
        if name in found:
            raise UsageError(f"{where}: two settings '{name}'")
        found[name] = values
    return found


def _is_table_of_tables(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(inner, Mapping) for inner in value.values())
    )
