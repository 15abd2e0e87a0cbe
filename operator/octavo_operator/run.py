"""The operator as a process: connect, wait for the lease, watch, look. Called by `octavo-operator run`.

Everything that is not one server's business is here: the ports, the lease, the resync, the order of the end.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from datetime import UTC, datetime

import kopf

from octavo_operator import handlers, metrics, names
from octavo_operator.cluster import Cluster, UnavailableError
from octavo_operator.endpoints import serve
from octavo_operator.engine_client import EngineClient
from octavo_operator.leader import Leader
from octavo_operator.names import Key
from octavo_operator.reconcile import Reconciler
from octavo_operator.settings import Settings
from octavo_operator.workers import Next, Workers

log = logging.getLogger(__name__)

KINDS_POLL_S = 10.0
"""Between looks at whether the cluster has PodMonitors."""


async def run(settings: Settings) -> int:
    """The exit status: 0 when asked to end, 1 when the lease is lost or a watch failed beyond repair."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    cluster = await Cluster.connect(_count)
    leader = Leader(
        cluster,
        settings.namespace,
        settings.identity,
        settings.lease_seconds,
        clock=_now,
        monotonic=time.monotonic,
    )
    http = await serve(settings.listen_host, settings.listen_port, lambda: leader.reached)
    try:
        if await _first(stop.wait(), leader.acquire()) == 0:
            return 0
        metrics.LEADER.set(1)
        try:
            return await _lead(settings, cluster, leader, stop)
        finally:
            metrics.LEADER.set(0)
            await leader.release()
            log.info("ended identity=%s", settings.identity)
    finally:
        await http.cleanup()
        await cluster.close()


async def _lead(settings: Settings, cluster: Cluster, leader: Leader, stop: asyncio.Event) -> int:
    engines = EngineClient(settings.statusz_timeout_s)
    reconciler = Reconciler(cluster, engines, settings, _now)

    async def look(key: Key, changed: bool) -> Next:
        with metrics.LOOKS.time():
            return await reconciler.look(key, changed)

    await reconciler.learn_kinds()
    workers = Workers(look, _on_error)
    metrics.SERVERS.set_function(lambda: len(workers.keys))
    watches = kopf.operator(
        registry=handlers.registry(workers.wake),
        settings=handlers.settings(),
        standalone=True,
        clusterwide=not settings.watch_namespaces,
        namespaces=settings.watch_namespaces,
        stop_flag=stop,
    )
    try:
        # kopf has its own handlers for signals from here on, and its end is ours.
        ended = await _first(watches, stop.wait(), leader.hold(), _tend(settings, cluster, reconciler, workers))
        return 1 if ended == 2 else 0
    finally:
        await workers.close()
        await engines.close()


async def _tend(settings: Settings, cluster: Cluster, reconciler: Reconciler, workers: Workers) -> None:
    """What no watch tells: kinds that come and go, and from time to time every server, in case a watch lost one."""
    resync_at = time.monotonic() + settings.resync_s
    while True:
        await asyncio.sleep(min(KINDS_POLL_S, settings.resync_s))
        try:
            if await reconciler.learn_kinds() or time.monotonic() >= resync_at:
                resync_at = time.monotonic() + settings.resync_s
                for namespace in settings.watch_namespaces or (None,):
                    for document in await cluster.list(names.KIND, namespace):
                        workers.wake(handlers.key_of_server(document))
                for key in workers.keys:  # those that are gone, too
                    workers.wake(key)
        except UnavailableError as error:
            log.warning("the servers could not be listed: %s", error)


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


def _on_error(key: Key, error: Exception) -> None:
    metrics.ERRORS.inc()
    if isinstance(error, UnavailableError):
        log.warning("will look again server=%s/%s: %s", *key, error)
    else:
        log.exception("a look failed server=%s/%s", *key, exc_info=error)


def _count(verb: str, kind: str, code: int) -> None:
    metrics.REQUESTS.labels(verb, kind, str(code)).inc()


def _now() -> datetime:
    return datetime.now(UTC)
