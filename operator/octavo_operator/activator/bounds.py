"""How much the activator holds, for one server and in all. Pure; asked by proxy.py for each request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from octavo_operator.names import Key


@dataclass(frozen=True)
class Bounds:
    requests_per_server: int = 64
    """Held at once for one server."""
    requests: int = 512
    """Held at once for all servers: each is an open connection."""
    body_bytes: int = 32 * 2**20
    """Of one request; the engine's own default."""
    bytes: int = 128 * 2**20
    """Of the bodies of all requests that are held or being passed on."""
    hold_s: float = 300.0
    """How long a request waits for an engine."""


class FullError(Exception):
    """What does not fit any more, in a sentence for the client."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Room:
    """What is held now. Whoever enters leaves again, whatever becomes of the request."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._requests: Counter[Key] = Counter()
        self._bytes = 0

    def check(self, key: Key) -> None:
        """Raises FullError where one more request for the server would be too many."""
        if self._requests[key] >= self.bounds.requests_per_server:
            raise FullError("server", f"{self._requests[key]} requests wait for this server already.")
        if self._requests.total() >= self.bounds.requests:
            raise FullError("requests", f"{self._requests.total()} requests wait for servers already.")

    @contextmanager
    def request(self, key: Key) -> Iterator[None]:
        self.check(key)
        self._requests[key] += 1
        try:
            yield
        finally:
            self._requests[key] -= 1
            if not self._requests[key]:
                del self._requests[key]

    def take(self, count: int) -> None:
        if self._bytes + count > self.bounds.bytes:
            raise FullError("bytes", "The requests that wait already are as large as may be held at once.")
        self._bytes += count

    def give_back(self, count: int) -> None:
        self._bytes -= count
        assert self._bytes >= 0

    @property
    def requests(self) -> dict[Key, int]:
        return dict(self._requests)

    @property
    def bytes(self) -> int:
        return self._bytes
