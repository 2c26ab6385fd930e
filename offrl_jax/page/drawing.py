"""From a results folder to the text of its page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
import markupsafe

from offrl_jax.leaderboard import board, progress, text
from offrl_jax.leaderboard.sections import read_contents
from offrl_jax.page import charts
from offrl_jax.page.cells import encode
from offrl_jax.page.view import section_view
from offrl_jax.version import __version__


def render(folder: Path, *, pool_protocols: bool = False, live: bool = False) -> str:
    """The page of a results folder; the same rows and plan give the same text.

    Args:
      folder: of results.
      pool_protocols: as in `leaderboard.build`.
      live: whether the page asks its server for changes, see `server`.

    Raises:
      ResultsError: as `leaderboard.build`.
    """
    contents = read_contents(folder, pool_protocols)
    built = board.of_contents(contents)
    curves, _ = progress.of_contents(contents)
    by_key = {(own.key, own.tuning): own for own in curves}
    anchors = _anchors([text.title(section) for section in built.sections])
    sections = [
        section_view(section, by_key.get((group.key, group.tuning)), group.runs, anchor)
        for group, section, anchor in zip(
            contents.groups, built.sections, anchors, strict=True
        )
    ]
    script, style = _part("page.js"), _part("page.css")
    data = json.dumps(encode(contents, built.sections), separators=(",", ":"))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html.jinja").render(
        sections=sections,
        families=sorted({section.family for section in built.sections}),
        published=built.published,
        published_heading=text.PUBLISHED,
        messages=[text.printable(message) for message in built.messages],
        how_to_read=text.HOW_TO_READ,
        version=__version__,
        box=charts,
        live=live,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        # No "</script>" can end the block, whatever a name holds.
        data=data.replace("<", "\\u003c"),
    )


def _anchors(titles: Sequence[str]) -> list[str]:
    """A name per section for links to it, which another section does not change."""
    found: list[str] = []
    for title in titles:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:80] or "table"
        again = sum(earlier.partition(".")[0] == name for earlier in found)
        found.append(f"{name}.{again + 1}" if again else name)
    return found


def _breakable(name: str) -> markupsafe.Markup:
    """A name, escaped, that may be broken before its preset and after its words."""
    escaped = str(markupsafe.escape(name))
    return markupsafe.Markup(re.sub(r"[_,=/]|(?=@)", r"\g<0><wbr>", escaped))


def _part(name: str) -> str:
    return resources.files("offrl_jax.page").joinpath(name).read_text(encoding="utf-8")
