"""A proxy before the API server that fails as it is told to, in a file of orders. Run inside the cluster's network.

    faults.py PORT UPSTREAM CA ORDERS

Orders, all optional: `refuse`, the share of requests that get one of `statuses` for an answer (half of the writes
among them are carried out all the same, as when an answer is lost); `cut_s`, how long a watch lives before it is cut at
a random moment; `gone`, the share of cut watches that end with a 410; `deaf`, plural names of kinds whose watches stay
open and tell nothing; `seed`; `record`, a file to which each request is added as a line: method, path and query;
`busy_s`, after how many seconds each request, watches too, is told to come again, and `refused`, a file to which those
are added, with the time before them.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

PORT, UPSTREAM, CA, ORDERS = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
HOP = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding")
rng = random.Random()
seeded: list[Any] = [None]


def orders() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ORDERS.read_text())
    if found.get("seed") != seeded[0]:
        seeded[0] = found.get("seed")
        rng.seed(seeded[0])
    return found


def refusal(status: int, retry_after_s: int = 1) -> web.Response:
    reason = {409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "reason": reason[status]}
    headers = {"Retry-After": str(retry_after_s)} if status == 429 else {}
    return web.json_response({**body, "message": f"injected: {status}"}, status=status, headers=headers)


def record(file: str, line: str) -> None:
    with Path(file).open("a") as handle:
        handle.write(line)


async def handle(request: web.Request) -> web.StreamResponse:
    session: aiohttp.ClientSession = request.app["session"]
    headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
    url = UPSTREAM + request.raw_path
    told = orders()
    if file := told.get("record"):
        record(file, f"{request.method} {request.path_qs}\n")
    if busy_s := told.get("busy_s"):
        record(told["refused"], f"{time.monotonic()} {request.method} {request.path_qs}\n")
        return refusal(429, busy_s)
    if request.query.get("watch") == "true":
        return await watch(request, session, url, headers, told)
    body = await request.read()
    wrong = "leases" not in request.path and rng.random() < told.get("refuse", 0.0)
    status = rng.choice(told["statuses"]) if wrong else 0
    if wrong and (request.method == "GET" or rng.random() < 0.5):
        return refusal(status)
    async with session.request(request.method, url, data=body or None, headers=headers) as answer:
        content = await answer.read()
        if wrong:
            return refusal(500)  # done, but nobody is told so
        kept = {name: value for name, value in answer.headers.items() if name in ("Content-Type", "Retry-After")}
        return web.Response(body=content, status=answer.status, headers=kept)


async def watch(
    request: web.Request, session: aiohttp.ClientSession, url: str, headers: dict[str, str], told: dict[str, Any]
) -> web.StreamResponse:
    plural = request.path.rpartition("/")[2]
    life = told.get("cut_s")
    limit = rng.uniform(0, life) if life else None
    timeout = aiohttp.ClientTimeout(total=None)
    async with session.get(url, headers=headers, timeout=timeout) as answer:
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": "application/json"})
        await response.prepare(request)
        try:
            async with asyncio.timeout(limit):
                async for line in answer.content:
                    if plural not in orders().get("deaf", ()):
                        await response.write(line)
        except TimeoutError:
            if rng.random() < told.get("gone", 0.0):
                gone = {"kind": "Status", "apiVersion": "v1", "code": 410, "reason": "Expired", "message": "injected"}
                await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
        return response


async def start(app: web.Application) -> None:
    context = ssl.create_default_context(cafile=CA)
    context.check_hostname = False
    connector = aiohttp.TCPConnector(ssl=context, limit=0)
    app["session"] = aiohttp.ClientSession(connector=connector, read_bufsize=2**24, auto_decompress=True)


app = web.Application(client_max_size=2**26)
app.on_startup.append(start)
app.router.add_route("*", "/{path:.*}", handle)
web.run_app(app, host="127.0.0.1", port=PORT, access_log=None, print=lambda *_: None)
