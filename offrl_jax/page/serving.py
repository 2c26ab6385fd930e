"""The page of a folder that is being filled, for a browser on the same machine."""

from __future__ import annotations

import errno
import hashlib
import html
import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from offrl_jax.errors import OffrlError, UsageError
from offrl_jax.page.drawing import render
from offrl_jax.results import files_below, plan_path

HOST = "127.0.0.1"
"""Rows are nobody else's business: other machines are not answered."""


def server(
    folder: Path, port: int, *, pool_protocols: bool = False
) -> ThreadingHTTPServer:
    """A server of the page of `folder`, bound but not yet serving.

    `/` is the page, drawn anew when a row file or the plan has changed; `/version`
    names the state of the files, by which the page knows when to reload.

    Args:
      folder: of results; it is read at every request.
      port: 0 for any that is free.
      pool_protocols: as in `leaderboard.build`.

    Raises:
      UsageError: the port is taken or not allowed.
      ResultsError: as `render`, if there is nothing to show yet.
    """
    page = _Page(folder, pool_protocols)
    page.draw()
    try:
        return ThreadingHTTPServer((HOST, port), _handler(page))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            why = "it is taken"
        raise UsageError(f"port {port} cannot be served ({why}); choose --port") from (
            error
        )


class _Page:
    """The page as last drawn; requests of several browsers draw it once."""

    def __init__(self, folder: Path, pool_protocols: bool) -> None:
        self._folder, self._pool = folder, pool_protocols
        self._lock = threading.Lock()
        self._version, self._content = "", ""

    def version(self) -> str:
        """A hash over names, sizes and times of the files that the page is made of."""
        plans = plan_path(Path()).name
        known = []
        for path in files_below(self._folder):
            if path.parent.name != "rows" and path.name != plans:
                continue
            try:
                about = path.stat()
            except FileNotFoundError:
                continue
            known.append((str(path), about.st_size, about.st_mtime_ns))
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def draw(self) -> str:
        """The page of the files as they are.

        Raises:
          OffrlError: they cannot be drawn.
        """
        with self._lock:
            version = self.version()
            if version != self._version:
                self._content = render(
                    self._folder, pool_protocols=self._pool, live=True
                )
                self._version = version
            return self._content


def _handler(page: _Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A site whose name was made to lead here asks for that name.
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (HOST, "localhost"):
                self._send(HTTPStatus.FORBIDDEN, "text/plain", "this machine alone")
                return
            path = self.path.partition("?")[0]
            if path == "/":
                status, content = _answer(page.draw)
                self._send(status, "text/html", content)
            elif path == "/version":
                record = {"version": page.version()}
                self._send(HTTPStatus.OK, "application/json", json.dumps(record))
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", "no such page")

        def _send(self, status: HTTPStatus, kind: str, content: str) -> None:
            body = content.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests of the page itself are no news."""

    return Handler


def _answer(draw: Callable[[], str]) -> tuple[HTTPStatus, str]:
    """The page, or a page that says why there is none and tries again."""
    try:
        return HTTPStatus.OK, draw()
    except OffrlError as error:
        words = html.escape(" ".join(str(error).split()))
        return HTTPStatus.OK, (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta http-equiv="refresh" content="5"><title>offrl_jax</title>'
            f"<p>The rows cannot be drawn just now: {words}</p></html>"
        )
