"""Commands written down beside the results that they asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from offrl_jax.errors import ResultsError
from offrl_jax.results import note_command, read_commands


def note(folder: Path, words: str, *run_ids: str) -> None:
    note_command(folder, words.split(), "c0ffee", run_ids, lambda line: None)


def test_the_first_that_asked_for_a_run(tmp_path: Path) -> None:
    assert read_commands(tmp_path) == {}
    note(tmp_path, "offrl benchmark a", "one", "two")
    note(tmp_path, "offrl benchmark a", "one", "two")  # the same once more
    note(tmp_path, "offrl benchmark a --seeds 9", "two", "three")
    first, second = (tmp_path / "commands.jsonl").read_text().splitlines()
    assert '"commit":"c0ffee"' in first and '"run_ids":["three"]' in second
    found = read_commands(tmp_path)
    assert found["two"] == ("offrl", "benchmark", "a")
    assert found["three"] == ("offrl", "benchmark", "a", "--seeds", "9")
    assert set(found) == {"one", "two", "three"}


def test_the_first_counts_in_a_file_of_two(tmp_path: Path) -> None:
    """As of two folders put together."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        note(tmp_path / name, f"offrl benchmark {name}", "one", name)
    parts = [(tmp_path / name / "commands.jsonl").read_text() for name in ("a", "b")]
    (tmp_path / "commands.jsonl").write_text("".join(parts))
    found = read_commands(tmp_path)
    assert found["one"] == found["a"] == ("offrl", "benchmark", "a")
    assert found["b"] == ("offrl", "benchmark", "b")


def test_nothing_asked_leaves_no_file(tmp_path: Path) -> None:
    note_command(tmp_path, (), None, ["one"], lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_torn_line_is_moved_aside(tmp_path: Path) -> None:
    note(tmp_path, "offrl benchmark a", "one")
    path = tmp_path / "commands.jsonl"
    path.write_bytes(path.read_bytes() + b'{"command":["off')
    assert set(read_commands(tmp_path)) == {"one"}
    said: list[str] = []
    note_command(tmp_path, ["offrl"], None, ["two"], said.append)
    assert len(said) == 1 and "a command is forgotten" in said[0]
    assert set(read_commands(tmp_path)) == {"one", "two"}


@pytest.mark.parametrize("line", ['{"command":["offrl"]}', "[1]"])
def test_something_else_is_told_with_file_and_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "commands.jsonl").write_text(line + "\n")
    with pytest.raises(ResultsError, match=r"commands\.jsonl:1: not a command"):
        read_commands(tmp_path)
    with pytest.raises(ResultsError, match=r"commands\.jsonl:1: not a command"):
        note(tmp_path, "offrl", "one")
