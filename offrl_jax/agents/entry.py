"""What the registry knows of an algorithm, and how its settings are resolved.

A *setting* is either structural (a field of the agent's `Config`: it changes shapes or
the program) or numeric (a field of its `Hyper`: traced, so sweeps never recompile).
Settings come in layers: class defaults < base < family < preset < overrides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import flax.linen as nn

from offrl_jax import errors
from offrl_jax.types import Agent, Spec


@dataclasses.dataclass(frozen=True)
class Range:
    """Allowed values of a number (for a tuple: of each of its entries).

    Attributes:
      low: smallest value; itself excluded if `open_low`.
      high: largest value; itself excluded if `open_high`.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is finite and inside."""
        if not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        left = "(" if self.open_low or math.isinf(self.low) else "["
        right = ")" if self.open_high or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


POSITIVE = Range(low=0.0, open_low=True)
NON_NEGATIVE = Range(low=0.0)
UNIT = Range(low=0.0, high=1.0)
POSITIVE_UNIT = Range(low=0.0, high=1.0, open_low=True)
OPEN_UNIT = Range(low=0.0, high=1.0, open_low=True, open_high=True)
COUNT = Range(low=1.0)


def within(allowed: Range, default: Any) -> Any:
    """A dataclass field of a `Config` or `Hyper` whose values must lie in `allowed`."""
    return dataclasses.field(default=default, metadata={"range": allowed})


def one_of(choices: Sequence[str], default: str) -> Any:
    """A dataclass field of a `Config` whose value is one of `choices`."""
    return dataclasses.field(default=default, metadata={"choices": tuple(choices)})


def check_choices(agent: str, config: Any) -> None:
    """Refuses a config that was not made by `resolve` and holds an unknown choice.

    Args:
      agent: name, for the message.
      config: a `Config` with `one_of` fields.

    Raises:
      UsageError: a value is none of its field's choices.
    """
    for field in dataclasses.fields(config):
        _check_choice(agent, field.name, getattr(config, field.name), field.metadata)


def _check_choice(
    agent: str, name: str, value: Any, metadata: Mapping[str, Any]
) -> None:
    choices = metadata.get("choices")
    if choices is not None and value not in choices:
        raise errors.unknown_name(f"{name} of {agent}", value, choices)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Named values for some settings of one agent.

    Attributes:
      config: structural settings by field name.
      hyper: numeric settings by field name.
      source: where the values come from.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hyper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    source: str = ""


@dataclasses.dataclass(frozen=True)
class AgentEntry:
    """One algorithm of the registry.

    Attributes:
      name: how commands and rows call it.
      title: for tables and figures.
      reference: the paper, in one line.
      config: frozen dataclass of structural settings.
      hyper: `flax.struct.dataclass` of numeric settings.
      make: `(config, spec) -> Agent`.
      presets: named settings, chosen by `NAME@PRESET`; every agent has `quick`.
      families: settings that hold for all tasks of a family.
      critic: `config -> module` of the action value, `(obs, action) -> [...]`, where
        the agent's state has `critics`, a tuple of its parameters; None elsewhere.
      on_policy: whether the agent gathers its own experience in an environment; the
        others learn from data.
      base: settings that make this algorithm of the `config` and `hyper` that it shares
        with another one; below every other layer.
    """

    name: str
    title: str
    reference: str
    config: type
    hyper: type
    make: Callable[[Any, Spec], Agent]
    presets: Mapping[str, Preset] = dataclasses.field(default_factory=dict)
    families: Mapping[str, Preset] = dataclasses.field(default_factory=dict)
    critic: Callable[[Any], nn.Module] | None = None
    on_policy: bool = False
    base: Preset = Preset()


def resolve(
    entry: AgentEntry,
    *,
    family: str,
    preset: str | None,
    overrides: Mapping[str, Any],
) -> tuple[Any, Any]:
    """The settings of one run: class defaults < base < family < preset < overrides.

    Args:
      entry: the algorithm.
      family: the task's family; one that the agent has no settings for changes nothing.
      preset: name of one of the entry's presets, or None.
      overrides: values by setting name; strings are parsed to the setting's type.

    Returns:
      `(config, hyper)`; the leaves of `hyper` are Python floats.

    Raises:
      UsageError: an unknown preset or setting, or a value of the wrong type or range.
    """
    if preset is not None and preset not in entry.presets:
        raise errors.unknown_name(f"preset of {entry.name}", preset, entry.presets)
    config_types = _settings(entry.config)
    hyper_types = _settings(entry.hyper)
    config: dict[str, Any] = {}
    hyper: dict[str, Any] = {}
    layers = [entry.base, entry.families.get(family), entry.presets.get(preset or "")]
    for layer in layers:
        if layer is not None:
            config.update(layer.config)
            hyper.update(layer.hyper)
    for name, value in overrides.items():
        if name in config_types:
            config[name] = value
        elif name in hyper_types:
            hyper[name] = value
        else:
            known = (*config_types, *hyper_types)
            raise errors.unknown_name(f"setting of {entry.name}", name, known)
    return (
        entry.config(**_checked(entry, config, config_types)),
        entry.hyper(**_checked(entry, hyper, hyper_types)),
    )


def _settings(cls: type) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Type and metadata of every field of a `Config` or `Hyper`, by name."""
    hints = get_type_hints(cls)
    return {
        field.name: (hints[field.name], field.metadata)
        for field in dataclasses.fields(cls)
    }


def _checked(
    entry: AgentEntry,
    values: Mapping[str, Any],
    settings: Mapping[str, tuple[Any, Mapping[str, Any]]],
) -> dict[str, Any]:
    checked = {}
    for name, value in values.items():
        if name not in settings:
            raise errors.unknown_name(f"setting of {entry.name}", name, settings)
        kind, metadata = settings[name]
        parsed = _parse(entry, name, value, kind)
        _check_choice(entry.name, name, parsed, metadata)
        allowed = metadata.get("range")
        numbers = parsed if isinstance(parsed, tuple) else (parsed,)
        if allowed is not None and not all(allowed.holds(x) for x in numbers):
            raise errors.UsageError(
                f"setting '{name}' of {entry.name} is {value!r}; "
                f"choose a value in {allowed}"
            )
        checked[name] = parsed
    return checked


def _parse(entry: AgentEntry, name: str, value: Any, kind: Any) -> Any:
    parsers: dict[Any, tuple[str, Callable[[Any], Any]]] = {
        bool: ("true or false", _to_bool),
        int: ("an integer", _to_int),
        float: ("a number", _to_float),
        str: ("a name", _to_str),
        tuple[int, ...]: ("integers such as 256,256", _to_ints),
    }
    expected, parse = parsers[kind]
    try:
        return parse(value)
    except ValueError:
        raise errors.UsageError(
            f"setting '{name}' of {entry.name} is {value!r}; expected {expected}"
        ) from None


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    names = {"true": True, "false": False}
    if isinstance(value, str) and value.strip().lower() in names:
        return names[value.strip().lower()]
    raise ValueError


def _to_int(value: Any) -> int:
    if isinstance(value, str):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError


def _to_float(value: Any) -> float:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return float(value)
    raise ValueError


def _to_str(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError


def _to_ints(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        text = value.strip().removeprefix("(").removesuffix(")")
        text = text.removeprefix("[").removesuffix("]").removesuffix(",")
        value = text.split(",")
    elif not isinstance(value, (list, tuple)):
        raise ValueError
    numbers = tuple(_to_int(x) for x in value)
    if not numbers:
        raise ValueError
    return numbers
