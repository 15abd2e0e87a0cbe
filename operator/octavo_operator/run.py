"""The operator as a process: connect, wait for the lease, watch, look. Called by `octavo-operator run`.

Everything that is not one server's business is here: the ports, the lease, the resync, the order of the end.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import kopf

from octavo_operator import handlers, metrics
from octavo_operator.activators import Activators
from octavo_operator.cache import Cache
from octavo_operator.cluster import Cluster, UnavailableError
from octavo_operator.endpoints import serve
from octavo_operator.engine_client import EngineClient
from octavo_operator.leader import Leader
from octavo_operator.names import Key
from octavo_operator.reconcile import Reconciler
from octavo_operator.settings import Settings
from octavo_operator.sweep import Sweep
from octavo_operator.workers import Next, Workers

log = logging.getLogger(__name__)

KINDS_POLL_S = 10.0
"""Between looks at what of other projects the cluster has: kinds, Prometheus, alerts."""


Clock = Callable[[], datetime]
"""The time as people read it. It may jump: only what is written down is taken from it, and nothing decided by it."""


def _now() -> datetime:
    return datetime.now(UTC)


async def run(settings: Settings, clock: Clock = _now) -> int:
    """The exit status: 0 when asked to end, 1 when the lease is lost or the watches are. Raises UnavailableError."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    cluster = await Cluster.connect(_count)
    leader = Leader(
        cluster,
        settings.namespace,
        settings.identity,
        settings.lease_seconds,
        clock=clock,
        monotonic=time.monotonic,
    )
    http = await serve(settings.listen_host, settings.listen_port, lambda: leader.reached)
    try:
        if await _first(stop.wait(), leader.acquire()) == 0:
            return 0
        metrics.LEADER.set(1)
        try:
            return await _lead(settings, cluster, leader, stop, clock)
        finally:
            metrics.LEADER.set(0)
            await leader.release()
            log.info("ended identity=%s", settings.identity)
    finally:
        await http.cleanup()
        await cluster.close()


async def _lead(settings: Settings, cluster: Cluster, leader: Leader, stop: asyncio.Event, clock: Clock) -> int:
    engines = EngineClient(settings.statusz_timeout_s)
    cache = Cache()

    def wake(key: Key) -> None:
        workers.wake(key)

    activators = Activators(
        *(cluster, cache, wake, settings.namespace), settings.activator, settings.activator_replicas
    )
    reconciler = Reconciler(cluster, cache, engines, activators, settings, clock, time.monotonic)

    async def look(key: Key, changed: bool) -> Next:
        with metrics.LOOKS.time():
            return await reconciler.look(key, changed)

    workers = Workers(look, _on_error)
    metrics.SERVERS.set_function(lambda: len(workers.keys))
    metrics.QUEUE.set_function(lambda: workers.waiting)
    sweep = Sweep(cluster, cache, workers.wake, settings.watch_namespaces)
    try:
        if not await _before(stop, _begin(reconciler, sweep)):
            return 0
        for key in cache.servers():
            workers.wake(key)
        watches = _watch(settings, handlers.registry(cache, workers.wake), stop)
        tended = _tend(settings, reconciler, workers, sweep)
        ends = (watches, stop.wait(), leader.hold(), tended, activators.tend())
        return 1 if await _first(*ends) >= 2 else 0
    finally:
        await activators.close()
        await workers.close()
        await engines.close()


async def _begin(reconciler: Reconciler, sweep: Sweep) -> None:
    """Reads all that there is, as often as that takes."""
    while True:
        try:
            await reconciler.learn()
            return await sweep.fill()
        except UnavailableError as error:
            log.warning("the servers could not be read yet: %s", error)
            await asyncio.sleep(max(1.0, error.retry_after_s))


async def _before(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether the work was done before everything is to stop."""
    return await _first(stop.wait(), work) == 1


async def _watch(settings: Settings, registry: kopf.OperatorRegistry, stop: asyncio.Event) -> None:
    """Returns when kopf ends: by a signal, for which it has handlers of its own, or by an error that it cannot mend."""
    try:
        await kopf.operator(
            registry=registry,
            settings=handlers.settings(),
            standalone=True,
            clusterwide=not settings.watch_namespaces,
            namespaces=settings.watch_namespaces,
            stop_flag=stop,
        )
    except Exception as error:
        raise UnavailableError(f"the watches ended: {type(error).__name__} {error}") from error


async def _tend(settings: Settings, reconciler: Reconciler, workers: Workers, sweep: Sweep) -> None:
    """What no watch tells: kinds that come and go, and what a watch has lost. Returns when watches are found deaf.

    The process ends then. Another replica, or the kubelet's restart, comes with new watches and nothing half broken.
    """
    sweep_at = time.monotonic() + settings.resync_s
    deaf: set[str] = set()
    pause_s = wait_s = min(KINDS_POLL_S, settings.resync_s)
    while True:
        await asyncio.sleep(wait_s)
        wait_s = pause_s
        try:
            if await reconciler.learn():
                for key in workers.keys:
                    workers.wake(key)
            if time.monotonic() >= sweep_at:
                sweep_at = time.monotonic() + settings.resync_s
                lost = set(await sweep.lost())
                if lost & deaf:  # once may be a busy moment
                    log.error("the watches lose changes, so the operator starts anew kinds=%s", ",".join(sorted(lost)))
                    return
                deaf = lost
        except UnavailableError as error:
            log.warning("the servers could not be listed: %s", error)
            wait_s = max(pause_s, error.retry_after_s)


async def _first(*coroutines: object) -> int:
    """Which of these ends first. The others are cancelled; an error of the first is raised."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]  # type: ignore[call-overload]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = min(tasks.index(task) for task in done)
        tasks[first].result()
        return first
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _on_error(key: Key, error: Exception) -> float:
    metrics.ERRORS.inc()
    if isinstance(error, UnavailableError):
        log.warning("will look again server=%s/%s: %s", *key, error)
        return error.retry_after_s
    log.exception("a look failed server=%s/%s", *key, exc_info=error)
    return 0.0


def _count(verb: str, kind: str, code: int) -> None:
    metrics.REQUESTS.labels(verb, kind, str(code)).inc()
