"""Ports for servers that tests start."""

from __future__ import annotations

import secrets
import socket

_FIRST, _END = 21_000, 32_000
"""Below those of connections on their way out (32,768 on), one of which might have it before the server has."""
_given: set[int] = set()


def free_port() -> int:
    """A port on which nobody listens, and which this process has not been told before."""
    while True:
        port = _FIRST + secrets.randbelow(_END - _FIRST)
        with socket.socket() as sock:
            try:
                sock.bind(("", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port
