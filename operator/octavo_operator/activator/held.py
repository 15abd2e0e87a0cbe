"""For which servers requests are held: kept by proxy.py, asked by the operator, which wakes the servers by it.

The operator asks and the activator answers, not the other way about: so the activator needs no right to write anything
in the cluster, and who controls it can wake servers that may be woken, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from octavo_operator.names import Key


class Held:
    def __init__(self) -> None:
        self._counts: Counter[Key] = Counter()
        self._changed = asyncio.Event()
        self.version = secrets.randbits(48)
        """Grows whenever a server comes or goes; the operator's next question names the one that it has seen. Begins
        anywhere, so that a process that starts again is not taken for the one before it."""

    @contextmanager
    def request(self, key: Key) -> Iterator[None]:
        self._counts[key] += 1
        if self._counts[key] == 1:
            self._change()
        try:
            yield
        finally:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
                self._change()

    @property
    def counts(self) -> dict[Key, int]:
        return dict(self._counts)

    async def beyond(self, version: int, timeout_s: float) -> None:
        """Returns when the version is another one than the given, and after the timeout at the latest."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.version == version:
                    await self._changed.wait()

    def _change(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()
