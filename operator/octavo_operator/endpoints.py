"""The operator's HTTP port: /healthz, /readyz and /metrics. Called by run.py."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from octavo_operator.metrics import REGISTRY


async def serve(host: str, port: int, ready: Callable[[], bool]) -> web.AppRunner:
    """Listens until the returned runner is cleaned up.

    /healthz answers from the event loop that does all the work, so its answer is the proof that the loop turns.
    /readyz does not ask for leadership: one that waits for its turn is a healthy operator, and a rollout that waited
    for its lease would wait for the pod that it is to replace.
    """

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(request: web.Request) -> web.Response:
        if ready():
            return web.Response(text="ok\n")
        return web.Response(status=503, text="the API server has not answered yet\n")

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
