"""One request for a server that may sleep: refused, held until an engine is ready, passed on. Called by serve.py.

A request's life:

1. The port that it came to says which server it is for (directory.py).
2. Where an engine is ready, which happens while the Service's change spreads, it is passed on at once.
3. Only a POST wakes a server. Probes, scrapes and lists of models are answered here: what asks every few seconds must
   not keep a GPU from being given back.
4. It is held within the bounds. One that asks for a stream gets its headers at once, and each second a comment with
   what the server does; any other just waits.
5. It is passed on once. It goes to another engine only if the first one did not take it: no connection, or a 503, by
   which engines that load or drain refuse. If an engine ends with it, the client is told, for who knows what was done.

A client that hangs up ends its request at whatever point it is; the engine sees its own connection end. Each answer
closes its connection, so that the client's next one goes by the Service, and past the activator once pods are ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from octavo_engine.status import API_PORT
from octavo_operator.activator import answers
from octavo_operator.activator.bounds import FullError, Room
from octavo_operator.activator.directory import Directory
from octavo_operator.activator.held import Held
from octavo_operator.activator.keys import Keys
from octavo_operator.activator.metrics import HOLD, REQUESTS, WAKES
from octavo_operator.activator.watch import Watch, Watches
from octavo_operator.cluster import UnavailableError
from octavo_operator.names import Key

log = logging.getLogger(__name__)

COMMENT_S = 1.0
"""Between comments in a stream that waits, and between looks of any request at whether that is still of use."""
BODY_TIMEOUT_S = 30.0
"""For the whole of a request's body: who sends more slowly takes room that others need."""
CONNECT_TIMEOUT_S = 3.0
ERROR_BYTES = 64 * 2**10
"""Of an engine's refusal that is told within a stream."""
API_RETRY_S = 5
FAILED_RETRY_S = 60
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-connection", "te", "trailer", "transfer-encoding")
) | frozenset(("upgrade", "content-length", "expect"))
LIVES = ("/health", "/ping")


class RefusedError(Exception):
    """What the client is told instead of an answer. outcome: the metric's word."""

    def __init__(self, outcome: str, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.outcome, self.status, self.message, self.retry_after_s = outcome, status, message, retry_after_s


@dataclass
class Asked:
    """A request on its way through here."""

    request: web.Request
    server: Key
    watch: Watch
    credentials: list[str]
    body: bytes = b""
    has_room: bool = False
    """Whether it is counted among those that wait."""
    stream: web.StreamResponse | None = None
    """The answer, where it has begun before an engine had the request."""


class Proxy:
    def __init__(
        self, directory: Directory, watches: Watches, room: Room, held: Held, *, engine_port: int = API_PORT
    ) -> None:
        self._directory, self._watches, self._room, self._held = directory, watches, room, held
        self._engine_port = engine_port
        self._keys = Keys()
        self._session: aiohttp.ClientSession | None = None
        self._here = 0
        self._empty = asyncio.Event()
        self._empty.set()

    async def empty(self, timeout_s: float) -> bool:
        """Waits until no request is here, and says whether that came within the timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        return self._empty.is_set()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        asked: Asked | None = None
        self._here += 1
        self._empty.clear()
        try:
            asked = await self._received(request)
            if asked.watch.pick() is None and not _wakes(request):
                return self._answer_asleep(asked)
            return await self._pass_on(asked)
        except RefusedError as error:
            REQUESTS.labels(error.outcome).inc()
            return await _refuse(request, asked.stream if asked else None, error)
        except asyncio.CancelledError:
            REQUESTS.labels("gone").inc()
            raise
        finally:
            self._here -= 1
            if not self._here:
                self._empty.set()

    async def _received(self, request: web.Request) -> Asked:
        if not request.raw_path.startswith("/"):
            # Put behind an engine's address, anything else could name another one.
            raise RefusedError("answered", 400, "The target of a request begins with a slash.")
        port = request.transport.get_extra_info("sockname")[1] if request.transport else 0
        try:
            server = await self._server_at(port)
            watch = self._watches.of(server)
            await watch.fresh()
        except UnavailableError as error:
            log.warning("the API server does not tell: %s", error)
            raise RefusedError("late", 503, "The cluster's API server does not answer.", API_RETRY_S) from error
        if watch.facts is None:
            raise RefusedError("answered", 404, "This LLMServer is gone.")
        return Asked(request, server, watch, _credentials(request))

    async def _server_at(self, port: int) -> Key:
        found = await self._directory.servers_at(port)
        if len(found) > 1:
            # Who may write EndpointSlices in one namespace can say of a port what is another's. The resource's status
            # is the operator's alone.
            told = await asyncio.gather(*(self._directory.facts(key) for key in found))
            found = tuple(key for key, facts in zip(found, told, strict=True) if facts and facts.port == port)
        if len(found) != 1:
            message = "No LLMServer has this port of the activator: ask a server by the name of its Service."
            raise RefusedError("answered", 421, message)
        return found[0]

    # ---- while it sleeps

    def _answer_asleep(self, asked: Asked) -> web.StreamResponse:
        """What can be told without an engine, to a request that wakes none."""
        path, facts = asked.request.path, asked.watch.facts
        assert facts is not None
        if path in LIVES:
            # 200, as a request sent now is answered. A load balancer that saw 503 would send none, and nothing would
            # ever wake the server.
            return _own(b'{"status":"asleep","message":"The first request to the API wakes it."}')
        if path == "/v1/models":
            if facts.asks_for_keys and not any(self._keys.knows(asked.server, one) for one in asked.credentials):
                if not asked.credentials:
                    raise _no_key()
                raise RefusedError(
                    "closed", 503, "The server is asleep, and only its engine can check this key: a POST wakes it.", 30
                )
            return _own(answers.models(facts.served_names, facts.max_model_len))
        raise RefusedError("answered", 503, "The server is asleep. A POST to its API wakes it; a GET does not.", 30)

    def _may_wake(self, asked: Asked) -> None:
        if asked.watch.facts is None or not asked.watch.facts.asks_for_keys:
            return
        if not asked.credentials:
            raise _no_key()
        now = time.monotonic()
        closed_s = min(self._keys.closed_s(asked.server, one, now) for one in asked.credentials)
        if closed_s:
            message = (
                "The server is asleep, and woke in vain for keys that it did not accept. Nor has it accepted this."
            )
            raise RefusedError("closed", 503, message, round(closed_s) + 1)

    def _beyond(self, asked: Asked, error: FullError) -> RefusedError:
        watch = asked.watch
        again_s = answers.retry_after_s(watch.waited_s, watch.last_wake_s, watch.eta_s)
        return RefusedError("refused", 503, f"The server wakes, and no more can wait for it. {error.message}", again_s)

    # ---- passing on

    async def _pass_on(self, asked: Asked) -> web.StreamResponse:
        """Once, to whichever engine takes it; held until there is one."""
        with ExitStack() as kept:
            if asked.watch.pick() is None:
                self._take_room(asked, kept)
            await self._read_body(asked, kept)
            began, waits = time.monotonic(), False
            while True:
                address = asked.watch.pick()
                if address is None:
                    if not _wakes(asked.request):
                        return self._answer_asleep(asked)
                    if not waits:
                        self._wait(asked, kept)
                        waits = True
                    address = await self._an_engine(asked, began + self._room.bounds.hold_s)
                answer = await self._try(asked, address)
                if answer is None:
                    asked.watch.refused(address)
                    continue
                with contextlib.closing(answer):
                    # It is the engine's now: it waits no longer, and its body is kept no longer.
                    asked.body = b""
                    kept.close()
                    if waits:
                        HOLD.observe(time.monotonic() - began)
                    REQUESTS.labels("forwarded").inc()
                    self._learn(asked, answer.status, woke=waits)
                    return await _copy(asked, answer)

    def _take_room(self, asked: Asked, kept: ExitStack) -> None:
        """Raises RefusedError where the server may not be woken for it, or no more can wait."""
        self._may_wake(asked)
        try:
            kept.enter_context(self._room.request(asked.server))
        except FullError as error:
            raise self._beyond(asked, error) from None
        asked.has_room = True

    def _wait(self, asked: Asked, kept: ExitStack) -> None:
        """Has the server woken, until `kept` is left."""
        key = asked.server
        if not asked.has_room:  # an engine was there when it came
            self._take_room(asked, kept)
        if key not in self._held.counts:
            WAKES.labels(f"{key[0]}/{key[1]}").inc()
            log.info("a request waits server=%s/%s", *key)
        kept.enter_context(self._held.request(key))
        kept.enter_context(asked.watch.waiting())

    def _learn(self, asked: Asked, status: int, *, woke: bool) -> None:
        if asked.watch.facts is not None and asked.watch.facts.asks_for_keys:
            for credential in asked.credentials:
                self._keys.answered(asked.server, credential, status, time.monotonic(), woke=woke)

    async def _read_body(self, asked: Asked, kept: ExitStack) -> None:
        """The whole of it, as it may have to be sent to a second engine; within the bounds."""
        request, bounds = asked.request, self._room.bounds
        too_large = RefusedError("refused", 413, f"A request that may wait has at most {bounds.body_bytes:,} bytes.")
        if (request.content_length or 0) > bounds.body_bytes:
            raise too_large
        held = kept.enter_context(_HeldBytes(self._room))
        chunks = []
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.content.iter_any():
                    if held.count + len(chunk) > bounds.body_bytes:
                        raise too_large
                    held.add(len(chunk))
                    chunks.append(chunk)
        except TimeoutError:
            raise RefusedError("refused", 408, f"The body did not come within {BODY_TIMEOUT_S:.0f} s.") from None
        except FullError as error:
            raise self._beyond(asked, error) from None
        asked.body = b"".join(chunks)

    async def _an_engine(self, asked: Asked, deadline: float) -> str:
        """The address of an engine that is ready, when there is one."""
        streams = answers.wants_stream(asked.body)
        while True:
            if (address := asked.watch.pick()) is not None:
                return address
            left_s = deadline - time.monotonic()
            if left_s <= 0 or asked.watch.facts is None or asked.watch.failed:
                raise self._late(asked)
            if streams:
                if asked.stream is None:
                    asked.stream = await _begin_stream(asked.request)
                await asked.stream.write(answers.comment(asked.watch.words))
            await asked.watch.until_ready(min(COMMENT_S, left_s))

    def _late(self, asked: Asked) -> RefusedError:
        watch, (namespace, name) = asked.watch, asked.server
        if watch.facts is None:
            return RefusedError("late", 404, "This LLMServer was deleted while the request waited for it.")
        why = f"kubectl describe llm {name} -n {namespace}"
        if watch.failed:
            return RefusedError("late", 503, f"The server cannot start. Why, tells: {why}", FAILED_RETRY_S)
        message = f"The server did not wake within {self._room.bounds.hold_s:.0f} s; it is at: {watch.words}."
        again_s = answers.retry_after_s(watch.waited_s, None, watch.eta_s)
        return RefusedError("late", 503, f"{message} Why, tells: {why}", again_s)

    async def _try(self, asked: Asked, address: str) -> aiohttp.ClientResponse | None:
        """The engine's answer, of which the head is there; None where the engine did not take the request."""
        if self._session is None:
            # A connection for each request: one that is kept may be closed by the other side in the moment in which a
            # request is sent, and nobody knows then whether it was taken.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, trust_env=False, auto_decompress=False
            )
        request = asked.request
        host = f"[{address}]" if ":" in address else address
        # The body is here as it was before it was compressed, so nothing is said of that either.
        dropped = HOP_BY_HOP | {"content-encoding"}
        headers = CIMultiDict((k, v) for k, v in request.headers.items() if k.lower() not in dropped)
        if request.remote:
            headers.add("X-Forwarded-For", request.remote)
        try:
            answer = await self._session.request(
                request.method,
                URL(f"http://{host}:{self._engine_port}{request.raw_path}", encoded=True),
                headers=headers,
                data=asked.body or None,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return None
        except (aiohttp.ClientError, OSError) as error:
            raise RefusedError("broken", 502, "The engine ended with the request, and may have begun it.") from error
        if answer.status == 503:
            answer.close()
            return None
        return answer


class _HeldBytes:
    """Bytes of a body that are taken from the room, until it is left."""

    def __init__(self, room: Room) -> None:
        self._room, self.count = room, 0

    def add(self, count: int) -> None:
        self._room.take(count)
        self.count += count

    def __enter__(self) -> _HeldBytes:
        return self

    def __exit__(self, *error: object) -> None:
        self._room.give_back(self.count)
        self.count = 0


def _own(body: bytes) -> web.Response:
    REQUESTS.labels("answered").inc()
    return _closing(web.Response(body=body, content_type="application/json"))


async def _begin_stream(request: web.Request) -> web.StreamResponse:
    stream = web.StreamResponse(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    stream.content_type = "text/event-stream"
    _closing(stream)
    await stream.prepare(request)
    return stream


async def _copy(asked: Asked, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """The engine's answer to the client, as it comes."""
    stream = asked.stream
    if stream is not None and (answer.status != 200 or answer.content_type != "text/event-stream"):
        body = await _read(answer, ERROR_BYTES)
        return await _end_stream(asked.request, stream, body)
    if stream is None:
        headers = CIMultiDict((k, v) for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP)
        stream = _closing(web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers))
        stream.content_length = answer.content_length
        await stream.prepare(asked.request)
    while True:
        try:
            chunk = await answer.content.readany()
        except (aiohttp.ClientError, OSError):
            # Half an answer is not an answer: a stream says so, and anything else is cut where the client sees it.
            if stream.content_type == "text/event-stream":
                body = answers.error_body(asked.request.path, 502, "The engine ended before its answer did.")
                return await _end_stream(asked.request, stream, body)
            if asked.request.transport is not None:
                asked.request.transport.abort()
            return stream
        if not chunk:
            await stream.write_eof()
            return stream
        await stream.write(chunk)


async def _read(answer: aiohttp.ClientResponse, most: int) -> bytes:
    body = b""
    with contextlib.suppress(aiohttp.ClientError, OSError):  # what came is told
        while len(body) < most and (chunk := await answer.content.readany()):
            body += chunk
    return body[:most]


async def _refuse(request: web.Request, stream: web.StreamResponse | None, error: RefusedError) -> web.StreamResponse:
    body = answers.error_body(request.path, error.status, error.message)
    if stream is not None:
        return await _end_stream(request, stream, body)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return _closing(web.Response(status=error.status, body=body, content_type="application/json", headers=headers))


async def _end_stream(request: web.Request, stream: web.StreamResponse, body: bytes) -> web.StreamResponse:
    await stream.write(answers.error_event(request.path, body))
    await stream.write_eof()
    return stream


R = TypeVar("R", bound=web.StreamResponse)


def _closing(response: R) -> R:
    response.force_close()
    return response


def _wakes(request: web.Request) -> bool:
    return request.method == "POST" and request.path not in LIVES


def _no_key() -> RefusedError:
    return RefusedError("closed", 401, "Missing API key: send one as `Authorization: Bearer KEY`.")


def _credentials(request: web.Request) -> list[str]:
    """What a client may have put its key into, as the engine reads it; Anthropic's clients send it bare."""
    bare = [f"Bearer {key}" for key in request.headers.getall("X-Api-Key", ())]
    return [one for one in (*request.headers.getall("Authorization", ()), *bare) if one.strip()]
