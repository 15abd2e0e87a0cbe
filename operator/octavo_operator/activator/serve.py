"""The activator as a process: ports, signals, the end. Called by `octavo-operator activator`."""

from __future__ import annotations

import asyncio
import json
import logging
import signal

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from octavo_operator.activator.bounds import Room
from octavo_operator.activator.directory import Directory
from octavo_operator.activator.held import Held
from octavo_operator.activator.metrics import REGISTRY, HeldCollector
from octavo_operator.activator.proxy import Proxy
from octavo_operator.activator.settings import ActivatorSettings
from octavo_operator.activator.watch import Watches
from octavo_operator.cluster import Cluster
from octavo_operator.engine_client import EngineClient

log = logging.getLogger(__name__)

STATUSZ_TIMEOUT_S = 1.0
LAST_S = 1.0
"""For what is being sent when everything else is over."""
LONGEST_ANSWER_S = 30.0
"""Of /held, while nothing changes."""
BACKLOG = 2048
"""Connections that may wait for the event loop, as the engine has it: one that finds no place tries again after a
second.
"""


async def serve(settings: ActivatorSettings) -> int:
    """The exit status: 0, when asked to end. Raises UnavailableError and OSError, where it cannot begin."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    cluster, engines = await Cluster.connect(), EngineClient(STATUSZ_TIMEOUT_S)
    held, room = Held(), Room(settings.bounds)
    directory = Directory(cluster, settings.watch_namespaces)
    proxy = Proxy(directory, Watches(directory, engines.statusz), room, held)
    collector = HeldCollector(lambda: held.counts, lambda: room.bytes)
    REGISTRY.register(collector)
    management = await _listen(_management(held, stop), settings.listen_host, [settings.management_port])
    try:
        api = web.Application()
        api.router.add_route("*", "/{path:.*}", proxy.handle)
        requests = await _listen(api, settings.listen_host, list(settings.ports))
        log.info("taking requests ports=%d-%d", settings.ports[0], settings.ports[-1])
        await stop.wait()
        # Not ready any more: the operator takes our address out of the Services. Who has it yet is still served.
        log.info("ending held=%d", sum(held.counts.values()))
        await asyncio.sleep(settings.leave_s)
        # Not by the runner's own waiting: it waits for every task of the process, and the operator's question is one.
        for site in list(requests.sites):
            await site.stop()
        if not await proxy.empty(settings.grace_s):
            log.warning("ended with requests after grace_s=%.0f", settings.grace_s)
        await requests.cleanup()
    finally:
        await management.cleanup()
        await proxy.close()
        await engines.close()
        await cluster.close()
        REGISTRY.unregister(collector)
    return 0


async def _listen(app: web.Application, host: str, ports: list[int]) -> web.AppRunner:
    # A handler is cancelled when its client hangs up: what it holds for it is given back at once.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=LAST_S)
    await runner.setup()
    for port in ports:
        await web.TCPSite(runner, host, port, backlog=BACKLOG).start()
    return runner


def _management(held: Held, stop: asyncio.Event) -> web.Application:
    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(request: web.Request) -> web.Response:
        if stop.is_set():
            return web.Response(status=503, text="it is ending\n")
        return web.Response(text="ok\n")

    async def held_now(request: web.Request) -> web.Response:
        """For the operator. ?seen=VERSION waits until there is something newer, and at most half a minute."""
        seen = request.query.get("seen", "")
        if seen.isdigit():
            await held.beyond(int(seen), LONGEST_ANSWER_S)
        servers = [
            {"namespace": namespace, "name": name, "requests": n} for (namespace, name), n in held.counts.items()
        ]
        return web.Response(
            body=json.dumps({"version": held.version, "servers": servers}), content_type="application/json"
        )

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    for path, handler in (("/healthz", healthz), ("/readyz", readyz), ("/held", held_now), ("/metrics", metrics)):
        app.router.add_get(path, handler)
    return app
