"""One server while it is asked for: whether an engine is ready, and what it does until then. Called by proxy.py.

Engines are asked themselves, five times a second while somebody waits: that is sooner than the kubelet's probe and the
Service tell, and their own words are what the waiting client is told. An engine that does not answer on its management
port counts as ready when Kubernetes says so.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from octavo_engine.status import Stage, Statusz
from octavo_operator.activator import answers
from octavo_operator.activator.directory import Directory, Endpoint, Facts
from octavo_operator.cluster import UnavailableError
from octavo_operator.names import Key

log = logging.getLogger(__name__)

LOOK_S = 0.2
"""Between looks at the engines while a request is held."""
READ_S = 1.0
"""Between reads of the API server, for each server."""
FAILED_S = 15.0
"""A server that has been Failed for this long is not waited for: its first restart may be all that it needs."""
SERVERS = 1024
"""That are remembered, for how long their last wake took."""

Ask = Callable[[str], Awaitable[Statusz | None]]


class Watch:
    def __init__(self, key: Key, directory: Directory, ask: Ask, read_s: float) -> None:
        self._key, self._directory, self._ask, self._read_s = key, directory, ask, read_s
        self.facts: Facts | None = None
        """None where there is no such server."""
        self.ready: tuple[str, ...] = ()
        """Addresses of engines that take requests."""
        self.words = answers.words_of_stage(None)
        """What happens now, for clients."""
        self.eta_s: float | None = None
        self._failed_since: float | None = None
        self.last_wake_s: float | None = None
        """How long the last wake took, from the first held request to an engine that is ready."""
        self._endpoints: list[Endpoint] = []
        self._read_at = self._looked_at = float("-inf")
        self._lock = asyncio.Lock()
        self._is_ready = asyncio.Event()
        self._waiting = 0
        self._waiting_since = 0.0
        self._task: asyncio.Task[None] | None = None

    async def fresh(self, within_s: float = LOOK_S) -> None:
        """Looks, unless that was done a moment ago. Raises UnavailableError where nothing is known of the server."""
        async with self._lock:
            if time.monotonic() - self._looked_at >= within_s:
                await self._look()
                self._looked_at = time.monotonic()

    def pick(self) -> str | None:
        """An engine that takes requests. Any: those that wait are spread, and there is one for most wakes."""
        return random.choice(self.ready) if self.ready else None

    def refused(self, address: str) -> None:
        """The engine did not take a request after all."""
        self.ready = tuple(other for other in self.ready if other != address)
        if not self.ready:
            self._is_ready.clear()

    @property
    def failed(self) -> bool:
        """Whether it is no use to wait: nothing comes up before somebody has mended something."""
        return self._failed_since is not None and time.monotonic() - self._failed_since >= FAILED_S

    @property
    def waited_s(self) -> float:
        """Since when somebody has been waiting."""
        return time.monotonic() - self._waiting_since if self._waiting else 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this lasts, the server is looked at again and again."""
        self._waiting += 1
        if self._waiting == 1:
            self._waiting_since = time.monotonic()
            self._task = asyncio.create_task(self._go_on_looking())
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting and self._task is not None:
                self._task.cancel()
                self._task = None

    async def until_ready(self, timeout_s: float) -> None:
        """Returns when an engine is ready, and after the timeout at the latest."""
        try:
            async with asyncio.timeout(max(timeout_s, 0)):
                await self._is_ready.wait()
        except TimeoutError:
            pass

    async def _go_on_looking(self) -> None:
        while True:
            try:
                await self.fresh()
            except UnavailableError as error:
                log.warning("the API server does not tell server=%s/%s: %s", *self._key, error)
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        now = time.monotonic()
        if now - self._read_at >= self._read_s:
            try:
                self.facts, self._endpoints = await asyncio.gather(
                    self._directory.facts(self._key), self._directory.endpoints(self._key)
                )
                self._read_at = now
            except UnavailableError:
                if self._read_at == float("-inf"):
                    raise
                # The engines can be asked all the same, as long as their addresses stay.
                self._read_at = time.monotonic()
        told = await asyncio.gather(*(self._ask(endpoint.address) for endpoint in self._endpoints))
        both = list(zip(self._endpoints, told, strict=True))
        self.ready = tuple(
            endpoint.address
            for endpoint, engine in both
            if (engine.stage is Stage.READY if engine is not None else endpoint.ready)
        )
        if not (self.facts and self.facts.failed):
            self._failed_since = None
        elif self._failed_since is None:
            self._failed_since = now
        loading = [engine for engine in told if engine is not None and engine.stage is not Stage.READY]
        farthest = max(loading, key=lambda engine: list(Stage).index(engine.stage), default=None)
        stage = self.facts.stage if self.facts else None
        self.words = answers.words_of(farthest) if farthest else answers.words_of_stage(stage)
        self.eta_s = farthest.progress.eta_s if farthest else None
        if self.ready and not self._is_ready.is_set():
            if self._waiting:
                self.last_wake_s = self.waited_s
            self._is_ready.set()
        elif not self.ready:
            self._is_ready.clear()


class Watches:
    """One for each server that is asked for."""

    def __init__(self, directory: Directory, ask: Ask, read_s: float = READ_S) -> None:
        self._directory, self._ask, self._read_s = directory, ask, read_s
        self._watches: OrderedDict[Key, Watch] = OrderedDict()

    def of(self, key: Key) -> Watch:
        watch = self._watches.get(key)
        if watch is None:
            watch = self._watches[key] = Watch(key, self._directory, self._ask, self._read_s)
            while len(self._watches) > SERVERS:
                # One that somebody waits on is kept alive by who waits.
                self._watches.popitem(last=False)
        self._watches.move_to_end(key)
        return watch
