"""The `offrl` command: parse, run, and tell every error in one line."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import tyro

from offrl_jax.cli.commands import Command
from offrl_jax.cli.messages import one_line
from offrl_jax.cli.running import COMMAND
from offrl_jax.errors import OffrlError, ResultsError, UsageError


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
    COMMAND.set(("offrl", *argv))
    try:
        with _term_is_an_interrupt():
            code = _parse(argv or ["--help"]).run()
        sys.stdout.flush()
    except OffrlError as error:
        # Reasons that libraries give may span lines.
        print(f"offrl: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("offrl: stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        _drop_output()
        code = 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        where = f" for {error.filename}" if error.filename else ""
        print(f"offrl: {error.strerror}{where}; free some", file=sys.stderr)
        code = ResultsError.exit_code
    raise SystemExit(code)


@contextlib.contextmanager
def _term_is_an_interrupt() -> Iterator[None]:
    """What a scheduler sends ends a command as Ctrl-C does, with the same exit code."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _drop_output() -> None:
    """Keeps the interpreter from writing again, at its end, what cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
