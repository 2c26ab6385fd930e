"""Prints pip constraints: the lowest version pyproject.toml admits of each package.

`make test-lowest` installs under them, so that a lower bound is a tested claim.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def constraints(project: dict) -> list[str]:
    """`name==lowest` of every direct dependency, and of the `test` extra and its own.

    Args:
      project: the `[project]` table.

    Returns:
      One line per package.  jaxlib follows jax: they are released in pairs.

    Raises:
      ValueError: a dependency has no lower bound.
    """
    lines = []
    extras = project["optional-dependencies"]
    items = project["dependencies"] + extras["test"]
    for item in items:
        own = re.match(rf"{project['name']}\[([a-z0-9]+)\]", item)
        if own is not None:  # An extra made of another one: read on there.
            items += extras[own[1]]
            continue
        found = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?>=([0-9.]+)", item)
        if found is None:
            raise ValueError(f"'{item}' in pyproject.toml has no lower bound")
        name, version = found.groups()
        lines.append(f"{name}=={version}")
        if name == "jax":
            lines.append(f"jaxlib=={version}")
    return lines


if __name__ == "__main__":
    with PYPROJECT.open("rb") as file:
        print("\n".join(constraints(tomllib.load(file)["project"])))
