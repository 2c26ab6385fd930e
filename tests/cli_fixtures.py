"""Folders to run `offrl` in; named as a plugin by the tests that use them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import RUN, SETTINGS, SMALL, TINY, files, offrl, settings, write_npz


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a data store of its own."""
    for name, value in settings(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(home: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """`home` with `local/tiny-v0` in the store."""
    assert (
        offrl("data", "import", str(write_npz(home / "tiny.npz")), "--task", TINY) == 0
    )
    capsys.readouterr()
    return home


@pytest.fixture
def refused(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Asserts that a command is refused in one line, and changes no file."""

    def check(code: int, parts: tuple[str, ...] | str, *arguments: str) -> None:
        before = files(home)
        assert offrl(*arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("offrl: ")
        for part in (parts,) if isinstance(parts, str) else parts:
            assert part in err
        assert files(home) == before

    return check


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store and the results folder of a small finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings(folder).items():
            patch.setenv(name, value)
        npz = write_npz(folder / "tiny.npz")
        assert offrl("data", "import", str(npz), "--task", TINY) == 0
        command = (*RUN[:-1], str(folder / "out"), *SMALL, *SETTINGS)
        assert offrl(*command) == 0
    return folder / "data", folder / "out"


@pytest.fixture
def results(
    home: Path, finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> Path:
    """A copy of the finished run in `home`, where the tests may damage it."""
    data, out = finished
    shutil.copytree(data, home / "data")
    shutil.copytree(out, home / "out")
    capsys.readouterr()
    return home / "out"
