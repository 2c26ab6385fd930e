"""The `offrl` command as a user meets it: help, mistakes, lists."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from cli_runner import (
    CLI,
    DATA,
    RESULTS,
    RUN,
    TINY,
    USAGE,
    arrays,
    files,
    offrl,
    write_npz,
)

from offrl_jax.cli import commands as cli_commands

pytest_plugins = ["cli_fixtures"]

COMMANDS = (
    "benchmark",
    "run",
    "leaderboard",
    "curves",
    "progress",
    "tuning",
    "figures",
    "agents",
    "tasks",
    "data list",
    "data prepare",
    "data generate",
    "data check",
    "data import",
    "doctor",
)
LISTS = """
agents = ["bc"]
tasks = ["classic/dmsd-mixed-v0"]
seeds = 1
updates = 10
"""


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_shows_an_example(self, command, home, capsys):
        assert offrl(*command.split(), "--help") == 0
        out = capsys.readouterr().out
        assert f"Example: offrl {command}" in out
        assert "None" not in out

    def test_without_a_command_shows_all(self, home, capsys):
        assert offrl() == 0
        out = capsys.readouterr().out
        for command in COMMANDS:
            assert command.split()[0] in out

    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_example_is_understood(self, command, home, capsys, monkeypatch):
        offrl(*command.split(), "--help")
        text = capsys.readouterr().out.split("Example: offrl ")[1]
        words = text.split("\n\n")[0].replace("\\", " ").split()
        parsed = []
        from offrl_jax.cli import commands, data_commands

        for name in (
            "Benchmark",
            "Run",
            "Leaderboard",
            "Curves",
            "Progress",
            "Tuning",
            "Figures",
            "Agents",
            "Tasks",
            "Doctor",
        ):
            monkeypatch.setattr(
                getattr(commands, name), "run", lambda self: parsed.append(self) or 0
            )
        for name in ("List", "Prepare", "Generate", "Check", "Import"):
            monkeypatch.setattr(
                getattr(data_commands, f"Data{name}"),
                "run",
                lambda self: parsed.append(self) or 0,
            )
        assert offrl(*words) == 0
        assert len(parsed) == 1


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            ("benchmak quick", ("benchmak", "benchmark", "offrl --help")),
            ("run --agent bc", ("--task", "--results", "offrl run --help")),
            ("run --agent", ("--agent", "one value")),
            ("data", ("list", "prepare", "check", "import", "offrl data --help")),
            ("data improt x", ("improt", "import")),
            ("agents bc iql", ("iql", "offrl agents --help")),
            ("leaderboard out --format pdf", ("'pdf'", "'md'", "'json'")),
            ("data import x --task local/a-v0 --split test", ("'test'", "'val'")),
            ("benchmark quick --seed 3", ("--seed", "--seeds")),
            ("benchmark quick --seeds 1.5", ("--seeds", "'1.5'", "whole number")),
            ("benchmark quick --memory x", ("--memory", "'x'", "not a number")),
            ("benchmark quick --memory 0", ("--memory", "above 0")),
            ("benchmark quick --waves 0", ("--waves", "at least 1, got 0")),
            ("benchmark quick --agents", ("--agents", "at least one name")),
            ("benchmark quick --tasks", ("--tasks", "at least one name")),
        ],
    )
    def test_a_wrong_command_line(self, arguments, parts, refused):
        refused(USAGE, parts, *arguments.split())

    @pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
    def test_is_told_the_same_with_and_without_boxes(self, encoding, home):
        """tyro draws its boxes of ASCII where the output is not UTF-8."""
        done = subprocess.run(
            [sys.executable, *CLI, "run", "--agent", "bc"],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            text=True,
        )
        assert done.returncode == USAGE
        assert done.stderr == (
            "offrl: Missing from offrl run: --task TASK ... --results DIR "
            "(see: offrl run --help)\n"
        )

    def test_a_narrow_terminal_breaks_no_name(self, refused, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        refused(USAGE, ("--seeds", "'many'"), *RUN, "--seeds", "many")


class TestUnknownNames:
    """All told before the data of the classic task are generated."""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ("--agent td3bc", "unknown agent 'td3bc'; did you mean 'td3_bc'?"),
            ("--agent bc@quik", "unknown preset of bc 'quik'; did you mean 'quick'?"),
            ("--agent bc@", "'bc@' is malformed"),
            (
                "--task classic/pendulum-medum-v0",
                "did you mean 'classic/pendulum-medium-v0'?",
            ),
            ("--task nowhere/x-v0", "unknown task 'nowhere/x-v0'"),
            (
                "--set hiden=8,8",
                "unknown setting of bc 'hiden'; did you mean 'hidden'?",
            ),
            ("--set lr=fast", "setting 'lr' of bc is 'fast'; expected a number"),
            ("--set batch_size=1.5", "is '1.5'; expected an integer"),
            ("--set hidden=8,x", "expected integers such as 256,256"),
            ("--set lr=-1", "setting 'lr' of bc is '-1'; choose a value in (0"),
            ("--set lr", "--set takes NAME=VALUE, got 'lr'"),
            ("--set lr=1 --set lr=2", "--set lr is given twice: 1 and 2"),
            ("--seeds 0", "seeds must be at least 1, got 0"),
            ("--seeds -2", "seeds must be at least 1, got -2"),
            ("--updates 0", "updates must be at least 1, got 0"),
            ("--episodes 0", "episodes must be at least 1, got 0"),
            ("--evaluations 0", "evaluations must be at least 1, got 0"),
            ("--max-parallel 0", "--max-parallel must be at least 1, got 0"),
            ("--task neorl2/Fusion-v1", "'neorl2/Fusion-v1' has no environment"),
        ],
    )
    def test_of_run(self, arguments, said, refused):
        request = {"--agent": "bc", "--task": "classic/dmsd-mixed-v0"}
        words = arguments.split()
        request |= {words[0]: words[1]} if words[0] in request else {}
        rest = [] if words[0] in request else words
        named = [word for pair in request.items() for word in pair]
        refused(USAGE, said, "run", *named, "--results", "out", *rest)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ("quik", "unknown suite 'quik'; did you mean 'quick'?"),
            ("quick --agents td3 iql", "did you mean 'td3_bc'?"),
            ("quick --tasks classic/dmds-mixed-v0", "'classic/dmsd-mixed-v0'"),
            ("quick --seeds 0", "seeds must be at least 1, got 0"),
            ("quick --max-parallel -1", "--max-parallel must be at least 1, got -1"),
            ("absent.toml", "absent.toml: No such file"),
        ],
    )
    def test_of_benchmark(self, arguments, said, refused):
        refused(USAGE, said, "benchmark", *arguments.split())

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("seeds = ", "not valid TOML"),
            ("sedes = 3", "did you mean 'seeds'?"),
            ('seeds = "3"', "'seeds' must be of type int, got '3'"),
            ("", "is missing"),
            (LISTS + "[protocol]\nepisode = 3", "did you mean 'episodes'?"),
            (LISTS + "[protocol]\nepisodes = 0", "episodes must be at least 1"),
            (LISTS.replace('"bc"', "1"), "1 is no name"),
            (LISTS.replace('"classic/dmsd-mixed-v0"', ""), "has no tasks"),
        ],
    )
    def test_of_a_suite_file(self, text, said, home, refused):
        (home / "my.toml").write_text(text)
        refused(USAGE, said, "benchmark", "my.toml")

    @pytest.mark.parametrize(
        ("table", "said"),
        [
            ("[settings.bcc.wide]\nlr = 0.1", "unknown agent 'bcc'"),
            ("[settings.bc.wide]\nlrr = 0.1", "unknown setting of bc 'lrr'"),
            ('[settings.bc.wide]\nlr = "fast"', "expected a number"),
            ("[settings.bc]\nlr = 0.1", "such as [settings.bc.mine]"),
            ("[settings]\nbc = 0.1", "such as [settings.bc.mine]"),
            ("[settings.bc]", "such as [settings.bc.mine]"),
        ],
    )
    def test_of_the_settings_in_a_suite_file(self, table, said, home, refused):
        (home / "my.toml").write_text(LISTS + table)
        refused(USAGE, said, "benchmark", "my.toml")

    def test_of_the_lists(self, refused):
        refused(USAGE, "did you mean 'iql'?", "agents", "iqll")
        refused(USAGE, "no task has 'atari' in its id", "tasks", "atari")

    def test_of_prepare_before_anything_is_generated(self, refused):
        good, wrong = "classic/dmsd-mixed-v0", "classic/dmsd-mixt-v0"
        refused(USAGE, f"unknown task '{wrong}'", "data", "prepare", good, wrong)


class TestAbsentData:
    """No data, and no network to get them from: sockets are blocked here."""

    @pytest.mark.parametrize(
        ("task", "parts"),
        [
            ("neorl2/DMSD-v1", ("DMSD-train.npz", "offrl data import")),
            ("minari/D4RL/pointmaze/umaze-v2", ("D4RL/pointmaze/umaze-v2", "minari")),
            ("local/mine-v0", ("offrl data import FILE.npz --task local/mine-v0",)),
        ],
    )
    def test_says_what_to_do(self, task, parts, refused):
        refused(DATA, parts, "run", "--agent", "bc", "--task", task, "--results", "out")
        refused(DATA, parts, "data", "prepare", task)

    def test_of_a_suite_names_every_file(self, refused):
        parts = ("DMSD-train.npz", "SafetyHalfCheetah-train.npz")
        refused(DATA, parts, "benchmark", "neorl2")

    def test_nothing_is_left_when_all_is_skipped(self, refused):
        refused(DATA, "DMSD-train.npz", "benchmark", "neorl2", "--skip-missing")


class TestLists:
    def test_tasks_fit_into_80_columns(self, tiny, capsys, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert offrl("tasks") == 0
        out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        table = out.split("\n\n")[0].splitlines()
        assert max(map(len, table)) <= 80
        assert "…" not in "".join(table)
        row = next(line for line in table if line.startswith(TINY)).split()
        assert row[1:] == ["3", "1", "200", "return", "present"]

    def test_tasks_tell_everything_where_there_is_no_terminal(self, home, capsys):
        assert offrl("tasks", "dmsd-mixed") == 0
        out = capsys.readouterr().out
        line = next(x for x in out.splitlines() if x.startswith("classic/dmsd-mixed"))
        assert line.split()[1:6] == ["6", "2", "100", "0-100", "on"]
        assert "controllers" in line

    def test_data_list_counts_what_was_imported(self, tiny, capsys):
        assert offrl("data", "list") == 0
        line = capsys.readouterr().out.splitlines()[2].split()
        data = arrays()
        returns = data["reward"].astype(np.float64).reshape(6, 5)[:5].sum(axis=1)
        numbers = [returns.mean(), returns.min(), returns.max()]
        assert line[:5] == [TINY, "train", "25", "5", "0"]
        assert line[5:8] == [f"{number:.1f}" for number in numbers]

    def test_an_agent_shows_what_set_takes(self, home, capsys):
        assert offrl("agents", "iql") == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["expectile", "0.7", "(0,", "1)", "number"] in lines
        assert ["hidden", "256,256", "[1,", "inf)", "structure"] in lines

    def test_defaults_shown_are_those_that_run(self, home, capsys):
        """Also of an agent that is another one with settings of its own."""
        from offrl_jax.agents.entry import resolve
        from offrl_jax.agents.registry import REGISTRY

        for name in ("rank1_iql", "iql", "rank1_ac"):
            assert offrl("agents", name) == 0
            lines = [line.split() for line in capsys.readouterr().out.splitlines()]
            shown = {line[0]: line[1] for line in lines if len(line) > 2}
            config, hyper = resolve(
                REGISTRY[name], family="", preset=None, overrides={}
            )
            for settings in (config, hyper):
                for field in dataclasses.fields(settings):
                    value = getattr(settings, field.name)
                    if isinstance(value, float):
                        assert float(shown[field.name]) == value
                    elif isinstance(value, str):
                        assert shown[field.name] == value

    def test_agents_lists_all(self, home, capsys):
        from offrl_jax.agents.registry import REGISTRY

        assert offrl("agents") == 0
        out = capsys.readouterr().out
        for entry in REGISTRY.values():
            assert entry.name in out
            assert entry.title in out

    def test_doctor_names_versions_devices_and_store(self, home, capsys):
        assert offrl("doctor") == 0
        out = capsys.readouterr().out
        assert f"jax {jax.__version__}" in out
        assert f"devices: {jax.local_device_count()} x " in out
        assert str(home / "data") in out
        assert "neorl2: needs data of neorl2/DMSD-v1" in out


class TestProcess:
    """The command as a process of its own: what only the system can show."""

    def start(self, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            cwd=home,
            timeout=60,
        )

    def test_a_mistake_has_no_traceback(self, home):
        done = self.start(home, *CLI, *RUN[:2], "td3", *RUN[3:])
        assert done.returncode == USAGE
        assert done.stdout == ""
        assert done.stderr == "offrl: unknown agent 'td3'; did you mean 'td3_bc'?\n"

    def test_a_disk_that_fills_up_leaves_no_half_dataset(self, home):
        path = write_npz(home / "tiny.npz")
        before = files(home)
        code = (
            "import resource, sys\nfrom offrl_jax.cli import main\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n"
            "main(sys.argv[1:])"
        )
        command = ("data", "import", str(path), "--task", TINY)
        done = self.start(home, "-c", code, *command)
        assert done.returncode == DATA, done.stderr
        assert done.stderr.startswith("offrl: no space left under ")
        assert done.stderr.count("\n") == 1
        assert files(home) == before

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_below_the_output_is_one_line(self, home):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, *CLI, "agents"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                cwd=home,
            )
        assert done.returncode == RESULTS
        assert done.stderr == "offrl: No space left on device; free some\n"

    def test_help_needs_no_jax(self, home):
        code = (
            "import sys\nfrom offrl_jax.cli import main\n"
            "try: main(['run', '--help'])\n"
            "except SystemExit: print(sorted({'jax', 'numpy'} & set(sys.modules)))"
        )
        done = self.start(home, "-c", code)
        assert done.stdout.endswith("[]\n")
        assert done.stderr == ""

    def test_a_reader_that_leaves_is_no_error(self, home):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, *CLI, "agents"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            cwd=home,
        )
        os.close(writer)
        assert "Traceback" not in done.stderr
        assert done.stderr == ""


def test_sigterm_ends_any_command_as_ctrl_c_does(monkeypatch, capsys):
    def terminated(self):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(cli_commands.Doctor, "run", terminated)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert offrl("doctor") == 130
        assert capsys.readouterr().err == "offrl: stopped\n"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
