"""Answers GET /statusz on every address with what the test wrote for that address. Run inside the cluster's network.

A pod on a staged node has an address of the loopback network; FOLDER/ADDRESS.json is what its engine says.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[1])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        document = FOLDER / f"{self.connection.getsockname()[0]}.json"
        body = document.read_bytes() if document.exists() else b""
        self.send_response(200 if body else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64


Server(("0.0.0.0", 8001), Handler).serve_forever()
