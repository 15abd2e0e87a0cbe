"""The activator: a client, an engine and the proxy between them over real sockets; what may wake what, as tables."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import socket
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web

from octavo_engine.status import Progress, Stage, Statusz
from octavo_operator.activator import answers
from octavo_operator.activator.bounds import Bounds, FullError, Room
from octavo_operator.activator.directory import Endpoint, Facts, read_endpoints, read_facts
from octavo_operator.activator.held import Held
from octavo_operator.activator.keys import FIRST_CLOSED_S, LAST_CLOSED_S, Keys
from octavo_operator.activator.proxy import Proxy
from octavo_operator.activator.serve import _listen, _management
from octavo_operator.activator.settings import from_environment
from octavo_operator.activator.watch import Watches
from octavo_operator.settings import SettingsError

KEY = ("ml", "qwen")
QUESTION = {"model": "qwen", "messages": [{"role": "user", "content": "Hello"}]}
SOON_S = 50
"""An upper bound for what takes milliseconds."""


class World:
    """The cluster as the activator sees it, and one engine in it. Stands for directory.py and /statusz."""

    def __init__(self) -> None:
        self.facts_now: Facts | None = Facts(asks_for_keys=False, served_names=("qwen", "q"), max_model_len=2048)
        self.stage: Stage | None = None
        self.percent, self.eta_s = 0.0, None
        self.servers: tuple = (KEY,)
        self.requests: list[tuple[web.Request, bytes]] = []
        self.aborted = 0
        self.asked_for: set = set()
        self.answer = _echo
        self.url = ""
        self.held = Held()

    async def servers_at(self, port):
        return self.servers

    async def facts(self, key):
        return self.facts_now

    async def endpoints(self, key):
        self.asked_for.add(key)
        return [Endpoint("127.0.0.1", ready=False)] if self.stage is not None else []

    async def ask(self, address):
        if self.stage is None:
            return None
        return Statusz(self.stage, progress=Progress(0, 0, self.percent, self.eta_s))

    async def handle(self, request):
        self.requests.append((request, await request.read()))
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            self.aborted += 1
            raise

    @asynccontextmanager
    async def running(self, **bounds):
        engine = web.Application()
        engine.router.add_route("*", "/{path:.*}", self.handle)
        engines = await _listen(engine, "127.0.0.1", [0])
        self.room = Room(Bounds(**bounds))
        proxy = Proxy(
            *(self, Watches(self, self.ask, read_s=0.05), self.room, self.held),
            engine_port=engines.addresses[0][1],
        )
        api = web.Application()
        api.router.add_route("*", "/{path:.*}", proxy.handle)
        served = await _listen(api, "127.0.0.1", [0])
        self.url = f"http://127.0.0.1:{served.addresses[0][1]}"
        try:
            async with aiohttp.ClientSession() as self.client:
                yield self
        finally:
            await served.cleanup()
            await proxy.close()
            await engines.cleanup()

    def post(self, path="/v1/chat/completions", body=QUESTION, **more):
        return asyncio.create_task(self._post(path, body, more))

    async def _post(self, path, body, more):
        async with self.client.post(self.url + path, json=body, **more) as answer:
            return answer.status, answer.headers, await answer.read()

    async def get(self, path, **more):
        async with self.client.get(self.url + path, **more) as answer:
            return answer.status, await answer.read()

    async def raw(self, data):
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        try:
            return await asyncio.wait_for(reader.readline(), SOON_S)
        finally:
            writer.close()
            await writer.wait_closed()

    async def waits(self, count=1):
        await until(lambda: self.held.counts.get(KEY, 0) == count)


async def until(look):
    async with asyncio.timeout(SOON_S):
        while not look():  # noqa: ASYNC110 -- what is waited for is in another's hands
            await asyncio.sleep(0.01)


async def _echo(request):
    told = {"path": request.raw_path, "asked": json.loads(await request.read() or b"null")}
    return web.json_response(told, headers={"X-Engine": "1"})


async def _tokens(request):
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await stream.prepare(request)
    for word in ("a", "b"):
        await stream.write(f'data: {{"w": "{word}"}}\n\n'.encode())
    await stream.write(b"data: [DONE]\n\n")
    return stream


# ---- held and passed on


async def test_a_request_waits_for_its_server_and_is_passed_on_once():
    async with World().running() as world:
        asking = world.post("/v1/chat/completions?x=%26")
        await world.waits()
        told = world.held.version
        world.stage = Stage.READY
        status, headers, body = await asyncio.wait_for(asking, SOON_S)

        assert (status, json.loads(body)) == (200, {"path": "/v1/chat/completions?x=%26", "asked": QUESTION})
        assert len(world.requests) == 1
        assert headers["X-Engine"] == "1"
        assert headers["Connection"] == "close", "the next one goes by the Service"
        assert world.held.counts == {}
        assert world.held.version > told


async def test_while_an_engine_is_ready_nothing_is_held():
    world = World()
    world.stage = Stage.READY
    async with world.running() as world:
        before = world.held.version
        status, _, _ = await world.post()
        got = await world.get("/version")

        assert status == 200
        assert got[0] == 200
        assert world.held.version == before


async def test_a_stream_begins_at_once_with_what_the_server_does_and_goes_on_with_its_answer():
    async with World().running() as world:
        world.answer = _tokens
        async with world.client.post(f"{world.url}/v1/chat/completions", json={**QUESTION, "stream": True}) as answer:
            first = await asyncio.wait_for(answer.content.readline(), SOON_S)
            world.stage, world.percent, world.eta_s = Stage.LOADING_WEIGHTS, 42.4, 3.2
            lines = [first]
            while b"42" not in lines[-1]:
                lines.append(await asyncio.wait_for(answer.content.readline(), SOON_S))
            world.stage = Stage.READY
            rest = await asyncio.wait_for(answer.content.read(), SOON_S)

        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        assert first == b": octavo stage=waking\n"
        assert lines[-1] == b": octavo stage=loading weights 42 % ETA 3 s\n"
        assert rest.endswith(b'data: {"w": "a"}\n\ndata: {"w": "b"}\n\ndata: [DONE]\n\n')
        assert len(world.requests) == 1


@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("/v1/chat/completions", b'data: {"error"'),
        ("/v1/messages", b"event: error\ndata: "),
        ("/v1/responses", b"event: error\ndata: "),
    ],
)
async def test_an_error_after_the_stream_has_begun_comes_as_an_event_of_it(path, start):
    async def refuse(request):
        return web.json_response({"error": {"message": "No such model.", "code": 404}}, status=404)

    async with World().running() as world:
        world.answer = refuse
        asking = world.post(path, {**QUESTION, "stream": True})
        await world.waits()
        world.stage = Stage.READY
        status, _, body = await asyncio.wait_for(asking, SOON_S)
        event = body.split(b"\n\n", 1)[1] if body.startswith(b":") else body

        assert status == 200
        assert event[event.index(start[:5]) :].startswith(start)
        assert b"No such model." in event


async def test_a_client_that_hangs_up_while_it_waits_is_forgotten():
    async with World().running() as world:
        asking, other = world.post(), world.post(body={**QUESTION, "stream": True})
        await world.waits(2)
        asking.cancel()
        await world.waits(1)
        other.cancel()
        await until(lambda: world.held.counts == {})
        world.stage = Stage.READY
        await asyncio.sleep(0.5)

        assert world.requests == []


async def test_a_client_that_hangs_up_later_ends_its_request_at_the_engine():
    async def long(request):
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        while True:
            await stream.write(b"data: x\n\n")
            await asyncio.sleep(0.01)

    world = World()
    world.stage, world.answer = Stage.READY, long
    async with world.running() as world:
        asking = world.post(body={**QUESTION, "stream": True})
        await until(lambda: world.requests)
        asking.cancel()

        # Its engine sees it as any other client that hung up: a cancelled handler, or a write that fails.
        transport = world.requests[0][0]
        await until(lambda: world.aborted or transport.transport is None or transport.transport.is_closing())


async def test_an_engine_that_refuses_is_asked_again_and_one_that_ended_with_the_request_is_not():
    calls = []

    async def drains_first(request):
        calls.append(1)
        return web.json_response({}, status=503) if len(calls) < 3 else await _echo(request)

    async def dies(request):
        request.transport.abort()
        return web.Response()

    world = World()
    world.stage, world.answer = Stage.READY, drains_first
    async with world.running() as world:
        again = await asyncio.wait_for(world.post(), SOON_S)
        world.answer, world.requests[:] = dies, []
        status, _, body = await asyncio.wait_for(world.post(), SOON_S)

        assert (again[0], len(calls)) == (200, 3)
        assert (status, len(world.requests)) == (502, 1), "nobody knows how far it got"
        assert "may have begun it" in json.loads(body)["error"]["message"]


async def test_half_an_answer_is_told_as_such():
    async def cut(request):
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        await stream.write(b"data: x\n\n")
        request.transport.abort()
        return stream

    world = World()
    world.stage, world.answer = Stage.READY, cut
    async with world.running() as world:
        _, _, body = await asyncio.wait_for(world.post(body={**QUESTION, "stream": True}), SOON_S)

        assert body.startswith(b"data: x\n\n")
        assert b"The engine ended before its answer did." in body


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_happens_each_request_ends_once_and_is_computed_at_most_once(seed):
    """Engines come, drain, refuse and die, and clients hang up, at random."""
    rng = random.Random(seed)
    taken: Counter = Counter()
    whole: Counter = Counter()

    async def engine(request):
        number = json.loads(await request.read())["number"]
        if world.stage is not Stage.READY or rng.random() < 0.1:
            return web.json_response({}, status=503)
        taken[number] += 1
        await asyncio.sleep(rng.random() * 0.02)
        if rng.random() < 0.1:
            request.transport.abort()
            return web.Response()
        if rng.random() < 0.5:
            return await _tokens(request)
        return web.json_response({"number": number})

    async def client(number):
        await asyncio.sleep(rng.random() * 2)
        body = {"number": number, "stream": rng.random() < 0.5}
        asking = world.post(body=body)
        if rng.random() < 0.2:
            await asyncio.sleep(rng.random() * 0.2)
            asking.cancel()
        try:
            status, _, text = await asking
        except asyncio.CancelledError:
            return "gone"
        if status == 200 and b'"error"' not in text:
            whole[number] += 1
        return status

    async def weather():
        while True:
            world.stage = rng.choice((None, Stage.LOADING_WEIGHTS, Stage.READY, Stage.READY, Stage.DRAINING))
            await asyncio.sleep(0.1 + rng.random() * 0.2)

    async with World().running(requests_per_server=30) as world:
        world.answer = engine
        blowing = asyncio.create_task(weather())
        clients = [asyncio.create_task(client(number)) for number in range(120)]
        await asyncio.sleep(2)
        blowing.cancel()
        world.stage = Stage.READY
        ends = await asyncio.wait_for(asyncio.gather(*clients), 3 * SOON_S)

        assert set(ends) <= {200, 502, 503, "gone"}
        assert 200 in ends
        assert max(taken.values()) == 1, "a request was computed twice"
        assert all(taken[number] == 1 for number in whole)
        await until(lambda: world.held.counts == {} and world.room.requests == {} and world.room.bytes == 0)


# ---- bounds


async def test_beyond_the_bound_is_a_503_that_says_when_to_come_again():
    async with World().running(requests_per_server=2) as world:
        waiting = [world.post(), world.post(body={**QUESTION, "stream": True})]
        await world.waits(2)
        status, headers, body = await asyncio.wait_for(world.post(), SOON_S)
        streams, _, _ = await asyncio.wait_for(world.post(body={**QUESTION, "stream": True}), SOON_S)
        world.stage = Stage.READY
        served = [(await asyncio.wait_for(one, SOON_S))[0] for one in waiting]

        assert (status, streams) == (503, 503)
        assert 1 <= int(headers["Retry-After"]) <= 120
        assert json.loads(body)["error"]["type"] == "ServiceUnavailableError"
        assert served == [200, 200]
        assert len(world.requests) == 2


async def test_a_server_that_does_not_wake_in_time_is_told_with_what_it_does():
    async with World().running(hold_s=0.3) as world:
        world.stage = Stage.DOWNLOADING
        plain = await asyncio.wait_for(world.post(), SOON_S)
        stream = await asyncio.wait_for(world.post(body={**QUESTION, "stream": True}), SOON_S)
        message = json.loads(plain[2])["error"]["message"]

        assert plain[0] == 503
        assert "did not wake within 0 s; it is at: downloading" in message
        assert "kubectl describe llm qwen -n ml" in message
        assert int(plain[1]["Retry-After"]) >= 1
        assert stream[0] == 200
        assert b'data: {"error"' in stream[2]
        assert world.requests == []


async def test_a_server_that_cannot_start_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("octavo_operator.activator.watch.FAILED_S", 0.3)
    async with World().running() as world:
        asking = world.post()
        await world.waits()
        world.facts_now = Facts(asks_for_keys=False, served_names=("qwen",), failed=True)
        status, headers, body = await asyncio.wait_for(asking, SOON_S)

        assert (status, headers["Retry-After"]) == (503, "60")
        assert "cannot start" in json.loads(body)["error"]["message"]


async def test_bodies_are_bounded_one_by_one_and_together():
    async with World().running(body_bytes=1000, bytes=1500) as world:
        large = await asyncio.wait_for(world.post(body={"x": "x" * 1000}), SOON_S)
        waiting = world.post(body={"x": "x" * 900})
        await world.waits()
        more = await asyncio.wait_for(world.post(body={"x": "x" * 900}), SOON_S)
        waiting.cancel()
        await until(lambda: world.held.counts == {})
        after = world.post(body={"x": "x" * 900})
        await world.waits()
        world.stage = Stage.READY

        assert large[0] == 413
        assert more[0] == 503
        assert (await asyncio.wait_for(after, SOON_S))[0] == 200


def test_room_is_given_back_whatever_happens():
    room = Room(Bounds(requests_per_server=1, requests=2))
    with room.request(KEY):
        with pytest.raises(FullError, match="for this server"), room.request(KEY):
            pass
        with room.request(("ml", "b")), pytest.raises(FullError, match="for servers"), room.request(("ml", "c")):
            pass

    assert room.requests == {}


# ---- what wakes and what does not


@pytest.mark.parametrize("path", ["/health", "/ping", "/v1/models", "/metrics", "/version", "/", "/v1/models/qwen"])
async def test_what_only_looks_does_not_wake(path):
    async with World().running() as world:
        before = world.held.version
        status, body = await world.get(path)

        assert world.held.version == before
        assert status == (200 if path in ("/health", "/ping", "/v1/models") else 503)
        assert path != "/v1/models" or [card["id"] for card in json.loads(body)["data"]] == ["qwen", "q"]


async def test_a_port_that_stands_for_no_server_is_told_so():
    async with World().running() as world:
        world.servers = ()
        nobody = await world.post()
        world.servers = (KEY, ("ml", "b"))
        two = await world.post()
        head = b"POST @10.0.0.1/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        elsewhere = await world.raw(head)
        absolute = await world.raw(head.replace(b"@10.0.0.1/", b"http://x@10.0.0.1/"))

        assert (nobody[0], two[0]) == (421, 421)
        assert b" 400 " in elsewhere
        assert b" 400 " in absolute
        assert "by the name of its Service" in json.loads(nobody[2])["error"]["message"]


async def test_a_port_that_two_claim_is_his_of_whom_the_operator_says_so():
    world = World()
    world.stage, world.servers = Stage.READY, (("evil", "b"), KEY)
    mine = Facts(asks_for_keys=False, served_names=("qwen",), port=20007)
    async with world.running() as world:
        port = int(world.url.rpartition(":")[2])
        world.facts = lambda key: told({KEY: replace(mine, port=port), ("evil", "b"): mine}[key])
        status, _, _ = await world.post()

        assert status == 200
        assert world.asked_for == {KEY}


async def told(facts):
    return facts


async def test_a_body_that_was_compressed_is_passed_on_as_it_was_before():
    world = World()
    world.stage = Stage.READY
    async with world.running() as world:
        data, kind = gzip.compress(json.dumps(QUESTION).encode()), {"Content-Type": "application/json"}
        headers = {"Content-Encoding": "gzip", **kind}
        async with world.client.post(f"{world.url}/v1/chat/completions", data=data, headers=headers) as answer:
            assert (await answer.json())["asked"] == QUESTION


async def test_a_server_that_is_deleted_meanwhile_lets_its_clients_go():
    async with World().running() as world:
        asking = world.post(body={**QUESTION, "stream": True})
        await world.waits()
        world.facts_now = None
        _, _, body = await asyncio.wait_for(asking, SOON_S)

        assert b"was deleted" in body


async def test_without_a_key_a_server_that_asks_for_keys_is_not_woken():
    world = World()
    world.facts_now = Facts(asks_for_keys=True, served_names=("qwen",))
    async with world.running() as world:
        before = world.held.version
        bare = await asyncio.wait_for(world.post(), SOON_S)
        listed = await world.get("/v1/models")
        probed = await world.get("/health")

        assert (bare[0], listed[0], probed[0]) == (401, 401, 200)
        assert json.loads(bare[2])["error"]["type"] == "AuthenticationError"
        assert world.held.version == before


async def test_a_key_that_an_engine_refused_does_not_wake_the_server_again_and_a_known_one_does():
    async def checks(request):
        good = request.headers.get("Authorization") == "Bearer good"
        return await _echo(request) if good else web.json_response({}, status=401)

    world = World()
    world.facts_now = Facts(asks_for_keys=True, served_names=("qwen",))
    async with world.running() as world:
        world.answer = checks

        async def wake(key):
            world.stage = None
            await asyncio.sleep(0.3)
            asking = world.post(headers={"Authorization": f"Bearer {key}"})
            await until(lambda: asking.done() or world.held.counts)
            world.stage = Stage.READY
            status, headers, _ = await asyncio.wait_for(asking, SOON_S)
            return status, headers.get("Retry-After")

        good = await wake("good")
        bad = await wake("bad")
        other = await wake("other")
        known = await wake("good")
        world.stage = None
        await asyncio.sleep(0.3)
        cards = await world.get("/v1/models", headers={"X-Api-Key": "good"})

        assert (good[0], bad[0], known[0]) == (200, 401, 200)
        assert other[0] == 503
        assert FIRST_CLOSED_S - SOON_S < int(other[1]) <= FIRST_CLOSED_S + 1
        assert cards[0] == 200


def test_strangers_wake_a_server_ever_more_seldom_until_somebody_has_a_key():
    keys, closed = Keys(), []
    now = 0.0
    for _ in range(8):
        keys.answered(KEY, "bad", 401, now)
        keys.answered(KEY, "worse", 401, now)
        closed.append(keys.closed_s(KEY, "unknown", now))
        now += closed[-1]
    keys.answered(KEY, "bad", 401, now)
    still = keys.closed_s(KEY, "unknown", now)
    keys.answered(KEY, "good", 200, now)

    keys.answered(KEY, "bad", 401, now, woke=False)

    assert keys.closed_s(KEY, "unknown", now) == 0, "it was awake anyway"
    assert closed[:3] == [FIRST_CLOSED_S, 2 * FIRST_CLOSED_S, 4 * FIRST_CLOSED_S]
    assert (closed[-1], still) == (LAST_CLOSED_S, LAST_CLOSED_S)
    assert keys.closed_s(KEY, "unknown", now) == 0
    assert keys.closed_s(("ml", "other"), "unknown", 0) == 0
    assert keys.knows(KEY, "good")
    keys.answered(KEY, "good", 401, now)
    assert not keys.knows(KEY, "good"), "it was taken back"


# ---- what the operator asks


async def test_the_operator_is_told_at_once_for_whom_a_request_is_held():
    held, stop = Held(), asyncio.Event()
    runner = await _listen(_management(held, stop), "127.0.0.1", [0])
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession() as client:

            async def ask(path):
                async with client.get(url + path) as answer:
                    return answer.status, await answer.text()

            first = json.loads((await ask("/held"))[1])
            waiting = asyncio.create_task(ask(f"/held?seen={first['version']}"))
            await asyncio.sleep(0.2)
            waited = not waiting.done()
            with held.request(KEY), held.request(KEY):
                second = json.loads((await asyncio.wait_for(waiting, SOON_S))[1])
                third = json.loads((await ask("/held"))[1])
            ready = await ask("/readyz")
            stop.set()
            ending = await ask("/readyz")
    finally:
        await runner.cleanup()

    assert first["servers"] == []
    assert waited
    assert [(s["namespace"], s["name"]) for s in second["servers"]] == [KEY]
    assert third["servers"][0]["requests"] == 2
    assert (ready[0], ending[0]) == (200, 503)


# ---- words


@pytest.mark.parametrize(
    ("waited_s", "last_s", "eta_s", "expected"),
    [(0, None, None, 10), (4, 10, None, 6), (12, 10, 3.0, 4), (0, None, 500, 120), (9.9, 10, None, 1)],
)
def test_when_to_come_again_is_predicted_from_the_last_wake_or_by_the_engine(waited_s, last_s, eta_s, expected):
    assert answers.retry_after_s(waited_s, last_s, eta_s) == expected


@pytest.mark.parametrize(
    ("body", "streams"),
    [
        (b'{"stream": true}', True),
        (b'{"stream": false}', False),
        (b'{"x": "\\"stream\\": true"}', False),
        (b'["stream", true]', False),
        (b'{"stream": 1}', False),
        (b'{"stream": true', False),
        (b"", False),
    ],
)
def test_only_a_request_for_a_stream_gets_one(body, streams):
    assert answers.wants_stream(body) is streams


def test_no_text_of_the_cluster_can_end_a_comment():
    assert answers.comment("a\n\ndata: x\rb") == b": octavo stage=a data: x b\n\n"


def test_facts_and_endpoints_are_read_from_documents():
    document = {
        "metadata": {"name": "qwen"},
        "spec": {"model": {"source": "hf://o/n"}, "expose": {"apiKeysSecretRef": {"name": "k"}}},
        "status": {
            "engine": {"maxModelLen": 8},
            "activatorPort": 20007,
            "pods": [{"stage": "terminating"}, {"stage": "pending"}],
        },
    }
    ours = {"metadata": {"labels": {"endpointslice.kubernetes.io/managed-by": "octavo-operator"}}}
    theirs = {
        "metadata": {"labels": {}},
        "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": True}},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": False}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": False, "serving": True, "terminating": True}},
        ],
    }

    assert read_facts(document) == Facts(True, ("qwen",), 8, "pending", 20007)
    assert read_facts({"metadata": {"name": "q"}, "spec": {"model": {"servedNames": ["a"]}}}) == Facts(False, ("a",))
    assert read_endpoints(ours | {"endpoints": theirs["endpoints"]}) == []
    assert read_endpoints(theirs) == [Endpoint("10.0.0.1", True), Endpoint("10.0.0.2", False)]
    assert read_endpoints({"metadata": {}, "endpoints": None}) == []


def test_settings_outside_their_range_are_named():
    given = from_environment({"OCTAVO_ACTIVATOR_REQUESTS_PER_SERVER": "3", "OCTAVO_ACTIVATOR_BYTES_MIB": "1"})

    assert (given.bounds.requests_per_server, given.bounds.bytes) == (3, 2**20)
    with pytest.raises(SettingsError, match="OCTAVO_ACTIVATOR_HOLD_SECONDS: got '0', expected 1 to 3600"):
        from_environment({"OCTAVO_ACTIVATOR_HOLD_SECONDS": "0"})


async def test_400_connections_at_once_wait_for_a_busy_activator_and_none_is_turned_away():
    runner = await _listen(web.Application(), "127.0.0.1", [0])
    port = runner.addresses[0][1]
    try:
        with contextlib.ExitStack() as connections:  # made in the event loop's thread, which takes none meanwhile
            for _ in range(400):
                connections.enter_context(socket.create_connection(("127.0.0.1", port), timeout=0.9))
    finally:
        await runner.cleanup()
