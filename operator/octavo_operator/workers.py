"""One worker for each key: looks again when woken or when time is up, one look at a time. Called by handlers.py.

Level-based: waking says only *look at this key*. Many wakes during a look are one more look; nothing is queued, so
nothing can be lost or grow. A worker's life:

1. `wake` starts it, unless it lives.
2. It looks, then waits until it is woken or until the time that the look asked for. Looks are at least
   MIN_INTERVAL_S apart, as one change comes with a burst of events.
3. A look that fails is tried again, with a growing delay that wakes do not cut short.
4. It ends when its look says that the object is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from octavo_operator.logs import SERVER
from octavo_operator.names import Key

log = logging.getLogger(__name__)

MIN_INTERVAL_S = 0.1
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 30.0
CONCURRENCY = 16
"""Looks at once: bounds the load on the API server when an operator starts among many servers."""


@dataclass(frozen=True)
class Next:
    """What a look asks for: when to look again (None: when woken), or that there is nothing left to look at."""

    seconds: float | None = None
    gone: bool = False


Look = Callable[[Key, bool], Awaitable[Next]]
"""The bool says whether the API server may have something new; without it only time has passed."""


@dataclass
class _Slot:
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Workers:
    def __init__(self, look: Look, on_error: Callable[[Key, Exception], float], *, concurrency: int = CONCURRENCY):
        """on_error: is told of each look that failed, and says after how many seconds, at least, it may look again."""
        self._look = look
        self._on_error = on_error
        self._slots: dict[Key, _Slot] = {}
        self._waiting = 0
        self._turns = asyncio.Semaphore(concurrency)

    def wake(self, key: Key) -> None:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot()
            slot.wake.set()
            slot.task = asyncio.create_task(self._work(key, slot), name=f"{key[0]}/{key[1]}")
        slot.wake.set()

    @property
    def keys(self) -> frozenset[Key]:
        return frozenset(self._slots)

    @property
    def waiting(self) -> int:
        """Keys that are due and wait for their turn, as there are `concurrency` looks already."""
        return self._waiting

    async def close(self) -> None:
        tasks = [slot.task for slot in self._slots.values() if slot.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._slots.clear()

    async def _work(self, key: Key, slot: _Slot) -> None:
        SERVER.set(f"{key[0]}/{key[1]}")
        failures = 0
        while True:
            changed = slot.wake.is_set() or failures > 0
            slot.wake.clear()
            try:
                async with self._turn():
                    outcome = await self._look(key, changed)
            except Exception as error:  # noqa: BLE001 -- whatever one server's look does must not stop the others'
                failures += 1
                await asyncio.sleep(max(self._on_error(key, error), retry_delay(failures)))
                continue
            failures = 0
            if outcome.gone and not slot.wake.is_set():
                del self._slots[key]
                return
            await asyncio.sleep(MIN_INTERVAL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(outcome.seconds):
                    await slot.wake.wait()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turns.release()


def retry_delay(failures: int) -> float:
    """0.5 s, 1 s, 2 s, … 30 s, and up to a quarter more, so that servers that failed together do not come together."""
    delay: float = min(FIRST_RETRY_S * 2 ** min(failures - 1, 10), LAST_RETRY_S)
    return delay * (1 + random.random() / 4)
