"""The `offrl` command: parse, run, and tell every error in one line."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence

import tyro

from offrl_jax.cli.commands import Command
from offrl_jax.cli.messages import one_line
from offrl_jax.errors import OffrlError, UsageError


def _parse(arguments: Sequence[str]):
    """The command as a dataclass; tyro's box of an error becomes one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                Command,
                prog="offrl",
                description="Offline reinforcement learning in JAX, honestly compared.",
                args=arguments,
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(one_line(box.getvalue(), arguments)) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors become one line on standard error and an exit code."""
    argv = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = _parse(argv or ["--help"]).run()
    except OffrlError as error:
        # Reasons that libraries give may span lines.
        print(f"offrl: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("offrl: stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    raise SystemExit(code)
