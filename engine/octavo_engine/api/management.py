"""The management port: probes, /statusz, /drain and /metrics, from threads of its own.

Up before anything heavy is imported, and independent of the event loop: a server too busy to answer here would be
restarted for being busy. Standard library only, for the same reason.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from octavo_engine.api.board import Board, Verdict

READ_TIMEOUT_S = 10.0
"""A client that connects and says nothing is let go."""
DRAIN_MARGIN_S = 10.0
DRAIN_DELAY_MAX_S = 60.0


class ManagementServer:
    """Serves an already listening socket until stop()."""

    def __init__(self, listener: socket.socket, board: Board, drain_timeout_s: float) -> None:
        self._http = _Server(listener)
        self._http.board = board
        self._http.drain_timeout_s = drain_timeout_s
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), name="management", daemon=True)

    @property
    def port(self) -> int:
        port: int = self._http.server_address[1]
        return port

    def start(self) -> None:
        self._thread.start()

    def provide_metrics(self, render: Callable[[], bytes], content_type: str) -> None:
        """/metrics answers 503 until this is called: its library is imported later than the port is bound."""
        self._http.metrics = (render, content_type)

    def stop(self, grace_s: float = 1.0) -> None:
        """Let answers in progress (that to /drain, first of all) go out, then stop."""
        self._http.idle.wait(grace_s)
        self._http.shutdown()
        self._http.server_close()


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True
    board: Board
    drain_timeout_s: float
    metrics: tuple[Callable[[], bytes], str] | None = None

    def __init__(self, listener: socket.socket) -> None:
        # The socket is bound and listening already; the base class must not make another.
        socketserver.BaseServer.__init__(self, listener.getsockname(), _Handler)
        self.socket = listener
        self._active = 0
        self._count = threading.Lock()
        self.idle = threading.Event()
        self.idle.set()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._count:
            self._active += 1
            self.idle.clear()
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._count:
                self._active -= 1
                if self._active == 0:
                    self.idle.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A probe that hung up is nobody's problem."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = READ_TIMEOUT_S
    protocol_version = "HTTP/1.0"  # one request per connection: no idle keep-alive threads
    server_version = "octavo"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        board = self.server.board
        url = urlsplit(self.path)
        # kubelet's httpGet hooks can only GET, so /drain takes both; it is idempotent.
        if self.command == "POST" and url.path != "/drain":
            return self._send(405, {"error": "only /drain takes POST"})
        match url.path:
            case "/startupz":
                self._send_verdict(board.startup())
            case "/livez":
                self._send_verdict(board.alive())
            case "/readyz":
                self._send_verdict(board.readiness())
            case "/statusz":
                self._send(200, board.statusz().to_dict())
            case "/drain" if self.command != "HEAD":
                query = parse_qs(url.query)
                wait = query.get("wait", ["true"])[-1].lower() not in ("false", "0", "no")
                self._drain(query.get("after", ["0"])[-1], wait=wait)
            case "/metrics":
                self._send_metrics()
            case _:
                routes = "/startupz /livez /readyz /statusz /drain /metrics"
                self._send(404, {"error": f"no such route; there are {routes}"})

    def _drain(self, after: str, *, wait: bool) -> None:
        board = self.server.board
        # A pod that ends gets new requests until every node has taken it out of the Service, a second or two later.
        # Refusing those at once would fail them; `after` seconds they are still taken.
        try:
            after_s = float(after)
        except ValueError:
            after_s = -1.0
        if not 0 <= after_s <= DRAIN_DELAY_MAX_S:
            return self._send(400, {"error": f"after must be 0..{DRAIN_DELAY_MAX_S:g} seconds, got {after!r}"})
        board.wait_draining(after_s)
        board.drain()
        if not wait:
            return self._send(202, {"status": "draining"})
        # The event loop ends requests at the deadline by itself; the margin is for it to have done so.
        if board.wait_drained(self.server.drain_timeout_s + DRAIN_MARGIN_S):
            return self._send(200, {"status": "drained"})
        return self._send(504, {"status": "draining", "error": "not drained in time"})

    def _send_verdict(self, verdict: Verdict) -> None:
        self._send(200 if verdict.ok else 503, {"ok": verdict.ok, "reason": verdict.reason})

    def _send_metrics(self) -> None:
        if self.server.metrics is None:
            return self._send(503, {"error": "starting: no metrics yet"})
        render, content_type = self.server.metrics
        return self._send_body(200, render(), content_type)

    def _send(self, status: int, document: dict[str, Any]) -> None:
        self._send_body(status, json.dumps(document).encode() + b"\n", "application/json")

    def _send_body(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds; a line for each would bury the rest of the log."""
