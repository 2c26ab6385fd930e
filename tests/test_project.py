"""What the repository promises as a whole: its files, its commands, its installer."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLER = ROOT / "tools" / "install.sh"
BINARY = {".png", ".gz", ".npz", ".npy", ".hdf5", ".ico"}
MAKE_VARIABLES = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "SUITE", "ARGS"} | {
    "PYTHON",
    "ACCEL",
    "WHEELS",
    "SYSTEM",
    "EXTRAS",
}


def run(
    *command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The finished process; nothing of its exit status is checked."""
    # What a `make` around this test run was told must not reach the one under test.
    ours = {k: v for k, v in os.environ.items() if k not in MAKE_VARIABLES}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**ours, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="session")
def committed() -> list[Path]:
    """Every file under version control that still exists."""
    listing = run("git", "ls-files", "-z")
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


def texts(files: list[Path]) -> list[tuple[Path, str]]:
    return [(f, f.read_text("utf-8")) for f in files if f.suffix not in BINARY]


class TestFiles:
    def test_no_registry_address(self, committed: list[Path]) -> None:
        # The pieces are joined here, so that this file does not find itself.
        hosts = ["py" + "pi.org", "python" + "hosted.org", "registry.npm" + "js.org"]
        options = r"--(?:extra-)?index-url"
        pattern = re.compile("|".join([*map(re.escape, hosts), options]))
        assert [file for file, text in texts(committed) if pattern.search(text)] == []
        assert pattern.search("see " + hosts[0])

    def test_no_path_of_this_machine(self, committed: list[Path]) -> None:
        places = {str(ROOT), str(ROOT.parent) + os.sep, str(Path.home()) + os.sep}
        short = {"/", "/root/", "/home/", "/tmp/"}
        found = [
            (file.name, place)
            for file, text in texts(committed)
            for place in places - short
            if re.search(rf"(?<![\w./-]){re.escape(place)}", text)
        ]
        assert found == []

    def test_no_file_is_long(self, committed: list[Path]) -> None:
        sources = [f for f in committed if f.suffix in {".py", ".sh"}]
        long = {
            f.name: n for f, t in texts(sources) if (n := len(t.splitlines())) > 500
        }
        assert len(sources) > 10
        assert long == {}

    def test_no_result_or_data_is_committed(self, committed: list[Path]) -> None:
        assert [
            f for f in committed if f.suffix in {".hdf5", ".npz", ".npy", ".whl"}
        ] == []

    def test_test_modules_have_unique_names(self) -> None:
        names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
        assert sorted(names) == sorted(set(names))

    def test_no_module_called_utils(self, committed: list[Path]) -> None:
        vague = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
        assert [f for f in committed if f.name in vague] == []


class TestImports:
    def test_rules_of_the_house_hold(self) -> None:
        linter = Path(sys.executable).with_name("lint-imports")
        result = run(linter, "--no-logo", "--no-cache")
        assert result.returncode == 0, result.stdout
        assert "0 broken" in result.stdout

    def test_a_broken_rule_is_found(self, tmp_path: Path) -> None:
        # A copy whose agents reach for files: the rules must not be decoration.
        shutil.copytree(ROOT / "offrl_jax", tmp_path / "offrl_jax")
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        wrong = tmp_path / "offrl_jax" / "agents" / "wrong.py"
        wrong.write_text("import os\nimport distrax\nfrom offrl_jax import datasets\n")
        stray = tmp_path / "offrl_jax" / "leaderboard" / "stray.py"
        stray.write_text("from offrl_jax.envs import base\n")
        (tmp_path / "offrl_jax" / "attic.py").touch()
        linter = Path(sys.executable).with_name("lint-imports")
        result = run(
            linter, "--no-logo", "--no-cache", cwd=tmp_path, env={"PYTHONPATH": "."}
        )
        assert result.returncode == 1
        for found in (
            "offrl_jax.agents.wrong -> os",
            "offrl_jax.agents.wrong -> distrax",
            "offrl_jax.agents.wrong -> offrl_jax.datasets",
            "offrl_jax.leaderboard.stray -> offrl_jax.envs",
            "offrl_jax.attic",
        ):
            assert found in result.stdout

    @pytest.mark.parametrize(
        ("module", "too"), [("offrl_jax", ()), ("offrl_jax.cli", ("jax", "numpy"))]
    )
    def test_importing_stays_light(self, module: str, too: tuple[str, ...]) -> None:
        # The command's help must not wait for jax, the package not for its leaves.
        leaves = ("distrax", "orbax", "mujoco", "minari", "gymnasium", "matplotlib")
        heavy = leaves + too
        code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
        result = run(sys.executable, "-c", code)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == "[]"


@pytest.fixture(scope="session")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


class TestPackage:
    def test_version_is_one(self, pyproject: dict) -> None:
        import offrl_jax

        version = pyproject["project"]["version"]
        assert offrl_jax.__version__ == version
        assert f"version: {version}" in (ROOT / "CITATION.cff").read_text("utf-8")
        assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")

    def test_every_dependency_has_a_lower_bound(self) -> None:
        result = run(sys.executable, "tools/lowest.py")
        assert result.returncode == 0, result.stderr
        lines = result.stdout.split()
        assert len({line.split("==")[0] for line in lines}) == len(lines)
        pairs = dict(line.split("==") for line in lines)
        assert pairs["jax"] == pairs["jaxlib"]

    def test_what_is_installed_satisfies_the_bounds(self, pyproject: dict) -> None:
        from importlib.metadata import version

        requirements = pytest.importorskip("packaging.requirements")
        for item in pyproject["project"]["dependencies"]:
            wanted = requirements.Requirement(item)
            assert wanted.specifier.contains(version(wanted.name), prereleases=True), (
                item
            )

    @pytest.mark.long  # builds in an environment of its own, from the package index
    def test_wheel_holds_the_suites(self, tmp_path: Path) -> None:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--wheel-dir",
            tmp_path,
        ]
        result = run(*pip, ROOT)
        assert result.returncode == 0, result.stderr
        (wheel,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        suites = {f.name for f in (ROOT / "benchmarks" / "suites").glob("*.toml")}
        assert suites
        assert {f"offrl_jax/suites/{name}" for name in suites} <= names
        tops = {name.split("/")[0] for name in names}
        assert {top.split("-")[0] for top in tops} == {"offrl_jax"}


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


class TestCommands:
    def test_every_target_is_declared_and_explained(self) -> None:
        makefile = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", " ")
        (phony,) = re.findall(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)
        assert set(phony.split()) == targets()
        shown = run("make", "help").stdout
        assert [t for t in targets() if f"make {t} " not in shown] == []

    def test_documented_commands_exist(self, committed: list[Path]) -> None:
        pages = [f for f in committed if f.suffix == ".md"]
        named = {
            (file.name, target)
            for file, text in texts(pages)
            for target in re.findall(r"(?:`|^\s*\$? ?)make ([a-z][a-z-]*)", text, re.M)
        }
        assert {target for _, target in named} >= {"benchmark", "test", "install"}
        assert {(name, t) for name, t in named if t not in targets()} == set()

    def test_ci_runs_what_people_run(self) -> None:
        script = ROOT / ".ci" / "run"
        assert script.stat().st_mode & stat.S_IXUSR
        assert "make lint test" in script.read_text("utf-8")

    def test_benchmark_hands_its_variables_on(self) -> None:
        dry = run("make", "-n", "benchmark", "SUITE=classic", "ARGS=--seeds 5").stdout
        assert "offrl benchmark classic --seeds 5" in dry
        # Without SUITE the command itself chooses, by the device that it finds.
        assert re.search(r"offrl benchmark *$", run("make", "-n", "benchmark").stdout)


def script(path: Path, body: str) -> Path:
    """An executable shell script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


class TestDetection:
    """`tools/install.sh --detect` against machines made of a few fake files."""

    def detect(self, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
        script(tmp_path / "bin" / "uname", "echo Linux")
        env = {"ACCEL": "", "SYSTEM": "", "PCI_DEVICES": str(tmp_path / "pci"), **env}
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return run("sh", INSTALLER, "--detect", env={**env, "PATH": path})

    def nvidia(self, tmp_path: Path, driver: str, capability: str) -> None:
        body = f'case "$1" in *driver*) {driver} ;; *) {capability} ;; esac'
        script(tmp_path / "bin" / "nvidia-smi", body)

    @pytest.mark.parametrize(
        ("driver", "capability", "want"),
        [
            ("580.65.06", "9.0", "cuda13"),
            ("610.10", "12.0", "cuda13"),
            ("580.65.06", "7.5", "cuda13"),
            ("580.65.06", "7.0", "cuda12"),  # CUDA 13 does not know a V100
            ("579.99", "9.0", "cuda12"),
            ("525.60.13", "8.0", "cuda12"),
        ],
    )
    def test_driver_decides(
        self, tmp_path: Path, driver: str, capability: str, want: str
    ) -> None:
        self.nvidia(tmp_path, f"echo {driver}", f"echo {capability}")
        assert self.detect(tmp_path).stdout.split() == [want]

    def test_weakest_of_several_gpus_decides(self, tmp_path: Path) -> None:
        self.nvidia(tmp_path, "printf '580.1\\n580.1\\n'", "printf '12.0\\n6.1\\n'")
        assert self.detect(tmp_path).stdout.split() == ["cuda12"]

    def test_old_driver_is_told(self, tmp_path: Path) -> None:
        self.nvidia(tmp_path, "echo 470.82.01", "exit 1")
        result = self.detect(tmp_path)
        assert result.stdout.split() == ["cpu"]
        assert "driver 470.82.01 is older than 525" in result.stderr

    def test_driver_without_device_means_cpu(self, tmp_path: Path) -> None:
        self.nvidia(tmp_path, "echo 'No devices were found'; exit 6", "exit 6")
        assert self.detect(tmp_path).stdout.split() == ["cpu"]

    @pytest.mark.parametrize(
        ("vendor", "device", "want"),
        [
            ("0x1ae0", "0x0063", "tpu"),
            ("0x1ae0", "0x0042", "cpu"),  # Google's network card
            ("0x10de", "0x0063", "cpu"),
        ],
    )
    def test_tpu(self, tmp_path: Path, vendor: str, device: str, want: str) -> None:
        self.nvidia(tmp_path, "exit 1", "exit 1")
        slot = tmp_path / "pci" / "0000:00:05.0"
        slot.mkdir(parents=True)
        (slot / "vendor").write_text(f"{vendor}\n")
        (slot / "device").write_text(f"{device}\n")
        assert self.detect(tmp_path).stdout.split() == [want]

    def test_wish_overrides_the_machine(self, tmp_path: Path) -> None:
        self.nvidia(tmp_path, "echo 580.1", "echo 9.0")
        assert self.detect(tmp_path, ACCEL="cpu").stdout.split() == ["cpu"]
        assert self.detect(tmp_path, SYSTEM="1").stdout.split() == ["cpu"]
        result = self.detect(tmp_path, ACCEL="cuda11")
        assert result.returncode == 1
        assert result.stderr.splitlines() == [
            "install: unknown ACCEL 'cuda11'; choose cpu, cuda12, cuda13 or tpu"
        ]


# Stands for python3 and, once it has "made" the environment, for .venv/bin/python.
# It writes down every pip call, and fails in pip while the file `fail` lies there.
FAKE_PYTHON = r"""
case "$*" in
    *version_info\[:2\]*python=*) echo "python=$(cat "$FAKE/version")" ;;
    *'python=%d'*) echo "python=$(cat "$FAKE/version")" ;;
    *version_info\[:2\]*) cat "$FAKE/version" ;;
    *'< (3, 11)'*) case $(cat "$FAKE/version") in 3.[0-9] | 3.10) exit 1 ;; esac ;;
    *'import ensurepip'*) [ ! -e "$FAKE/no-venv" ] ;;
    *'-m venv'*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *'-m pip install'*)
        shift 2
        echo "$*" >>"$FAKE/pip.log"
        [ ! -e "$FAKE/fail" ]
        ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


class TestInstaller:
    """`tools/install.sh` in a copy of the project; its python only takes notes."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        (tmp_path / "project" / "tools").mkdir(parents=True)
        shutil.copy(INSTALLER, tmp_path / "project" / "tools")
        (tmp_path / "project" / "pyproject.toml").write_text("[project]\n")
        script(tmp_path / "python3", FAKE_PYTHON)
        (tmp_path / "version").write_text("3.11\n")
        return tmp_path

    def install(self, place: Path, **env: str) -> subprocess.CompletedProcess[str]:
        clean = dict.fromkeys(("PYTHON", "WHEELS", "SYSTEM", "EXTRAS"), "")
        path = f"{place}{os.pathsep}{os.environ['PATH']}"
        env = {**clean, "ACCEL": "cpu", "FAKE": str(place), "PATH": path, **env}
        return run("sh", "tools/install.sh", cwd=place / "project", env=env)

    def calls(self, place: Path) -> list[str]:
        log = place / "pip.log"
        return log.read_text().splitlines() if log.exists() else []

    def test_installs_once(self, place: Path) -> None:
        first = self.install(place)
        assert first.returncode == 0, first.stderr
        (call,) = self.calls(place)
        assert call == "install --disable-pip-version-check --editable .[test]"
        second = self.install(place)
        assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
        assert len(self.calls(place)) == 1

    def test_changed_pyproject_installs_again(self, place: Path) -> None:
        self.install(place)
        (place / "project" / "pyproject.toml").write_text("[project]\nname = 'x'\n")
        assert self.install(place).returncode == 0
        assert len(self.calls(place)) == 2

    def test_interrupted_install_is_begun_anew(self, place: Path) -> None:
        (place / "fail").touch()
        broken = self.install(place)
        assert broken.returncode == 1
        assert "pip failed" in broken.stderr
        assert not (place / "project" / ".venv" / ".installed").exists()
        half = place / "project" / ".venv" / "half-written"
        half.touch()
        (place / "fail").unlink()
        again = self.install(place)
        assert again.returncode == 0, again.stderr
        assert "interrupted; starting anew" in again.stderr
        assert not half.exists()
        assert (place / "project" / ".venv" / ".installed").exists()

    def test_two_at_once_is_refused(self, place: Path) -> None:
        (place / "project" / ".venv").mkdir()
        busy = place / "project" / ".venv" / ".installing"
        busy.write_text(f"{os.getpid()}\n")
        result = self.install(place)
        assert result.returncode == 1
        assert f"(process {os.getpid()}) is at work" in result.stderr
        assert self.calls(place) == []

    def test_accelerator_is_an_extra_and_survives(self, place: Path) -> None:
        self.install(place, ACCEL="cuda12")
        assert self.calls(place)[-1].endswith(".[cuda12,test]")
        # The same folder on a node without a GPU: nothing to do; then more extras.
        assert self.install(place, ACCEL="cpu").stderr == ""
        self.install(place, ACCEL="cpu", EXTRAS="test dev")
        assert self.calls(place)[-1].endswith(".[cuda12,test,dev]")

    def test_other_accelerator_starts_anew(self, place: Path) -> None:
        self.install(place, ACCEL="cuda12")
        old = place / "project" / ".venv" / "old"
        old.touch()
        self.install(place, ACCEL="cuda13")
        assert not old.exists()
        assert self.calls(place)[-1].endswith(".[cuda13,test]")

    def test_moved_project_starts_anew(self, place: Path) -> None:
        self.install(place)
        (place / "project" / ".venv" / "old").touch()
        moved = place / "moved"
        (place / "project").rename(moved)
        env = {"ACCEL": "cpu", "FAKE": str(place), "PYTHON": str(place / "python3")}
        result = run("sh", "tools/install.sh", cwd=moved, env=env)
        assert result.returncode == 0, result.stderr
        assert not (moved / ".venv" / "old").exists()
        assert (moved / ".venv" / ".installed").exists()

    def test_environment_made_by_hand_is_kept(self, place: Path) -> None:
        script(place / "project" / ".venv" / "bin" / "python", FAKE_PYTHON)
        mine = place / "project" / ".venv" / "mine"
        mine.touch()
        assert self.install(place).returncode == 0
        assert mine.exists()

    def test_wheels_shut_the_network_out(self, place: Path) -> None:
        wheels = place / "my wheels"
        wheels.mkdir()
        missing = self.install(place, WHEELS=str(place / "nowhere"))
        assert missing.stderr == f"install: WHEELS: no folder '{place / 'nowhere'}'\n"
        assert "no wheel in" in self.install(place, WHEELS=str(wheels)).stderr
        (wheels / "a-1-py3-none-any.whl").touch()
        assert self.install(place, WHEELS=str(wheels)).returncode == 0
        assert f"--no-index --find-links {wheels} " in self.calls(place)[-1]

    @pytest.mark.parametrize(
        ("version", "flag", "words"),
        [
            ("3.10", "", "is Python 3.10; 3.11 or newer is needed"),
            ("3.12", "no-venv", "apt install python3.12-venv"),
        ],
    )
    def test_unfit_python_is_told_in_one_line(
        self, place: Path, version: str, flag: str, words: str
    ) -> None:
        (place / "version").write_text(f"{version}\n")
        if flag:
            (place / flag).touch()
        result = self.install(place)
        assert result.returncode == 1
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (place / "project" / ".venv").exists()

    def test_absent_python_is_told_in_one_line(self, place: Path) -> None:
        result = self.install(place, PYTHON="python9.9")
        assert result.returncode == 1
        assert result.stderr.startswith("install: no 'python9.9' here")
