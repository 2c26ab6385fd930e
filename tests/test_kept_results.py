"""The leaderboard that the documentation shows is that of the rows that are kept."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from offrl_jax import leaderboard

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ROOT / "docs" / "leaderboard.md"
AGAIN = "offrl leaderboard results --format md --out docs/leaderboard.md"
NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"


def kept_files() -> list[str]:
    """Files below `results/` that git keeps: a user's own runs lie beside them."""
    listed = subprocess.run(
        ["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so what is kept is not known")
    return listed.stdout.splitlines()


def test_the_kept_leaderboard_is_drawn_from_the_kept_rows(tmp_path: Path) -> None:
    for name in kept_files():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    drawn = leaderboard.render(tmp_path / "results", "md")
    shown = SHOWN.read_text(encoding="utf-8")
    # Sums in another order may move a last digit, so numbers are compared as such.
    assert re.sub(NUMBER, "#", drawn) == re.sub(NUMBER, "#", shown), AGAIN

    def numbers(text: str) -> list[float]:
        return [float(found.replace(",", "")) for found in re.findall(NUMBER, text)]

    assert numbers(drawn) == pytest.approx(numbers(shown), rel=1e-3, abs=0.11), AGAIN
