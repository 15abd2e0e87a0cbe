"""How the API server is asked again: when it says so, not before, and not for ever."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from octavo_operator import run
from octavo_operator.cluster import PATIENCE_S, Cluster, Refusal, UnavailableError, together

SERVER = {"kind": "Service", "metadata": {"namespace": "ns", "name": "a"}}
LEASE = {"kind": "Lease", "metadata": {"namespace": "ns", "name": "a", "resourceVersion": "1"}}


class World:
    """An API server that answers as it is told to, in that order, and a client that notes how long it slept."""

    def __init__(self, *answers):
        self.answers, self.slept, self.told, self.seen = list(answers), [], [], []

    async def __aenter__(self):
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self.server = TestServer(app)
        await self.server.start_server()
        configuration = Configuration(host=str(self.server.make_url("")).rstrip("/"))
        self.cluster = Cluster(ApiClient(configuration), lambda *told: self.told.append(told), self._sleep)
        return self

    async def __aexit__(self, *_):
        await self.cluster.close()
        await self.server.close()

    async def _sleep(self, seconds):
        self.slept.append(seconds)

    async def _answer(self, request):
        self.seen.append((request.method, request.path, dict(request.query), await request.text()))
        status, headers = self.answers.pop(0) if self.answers else (200, {})
        body = {"message": f"told {status}"} if status >= 300 else {"items": [], "metadata": {}}
        return web.json_response(body, status=status, headers=headers)


BUSY = (429, {"Retry-After": "2"})
CALLS = {
    "list": lambda cluster: cluster.list("Pod"),
    "get": lambda cluster: cluster.get("Pod", "ns", "a"),
    "discover": lambda cluster: cluster.knows("PodMonitor"),
    "apply": lambda cluster: cluster.apply(SERVER),
    "make": lambda cluster: cluster.apply_new(SERVER),
    "scale": lambda cluster: cluster.scale(LEASE, 3),
    "event": lambda cluster: cluster.create({"kind": "Event", "metadata": {"namespace": "ns"}}),
    "lease": lambda cluster: cluster.replace(LEASE),
    "delete": lambda cluster: cluster.delete({**SERVER, "metadata": {**SERVER["metadata"], "uid": "u"}}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_every_call_waits_as_long_as_a_busy_api_server_asks_for(call):
    async with World(BUSY, BUSY) as world:
        answer = await call(world.cluster)

    assert not isinstance(answer, Refusal)
    assert [2 <= seconds <= 2.5 for seconds in world.slept] == [True, True]
    assert [status for *_, status in world.told] == [429, 429, 200]
    assert len(set(map(str, world.seen))) == 1


async def test_a_busy_api_server_is_left_alone_in_the_end_and_the_error_says_for_how_long():
    async with World(*[BUSY] * 20) as world:
        with pytest.raises(UnavailableError) as caught:
            await world.cluster.apply(SERVER)

    assert PATIENCE_S - 2.5 <= sum(world.slept) <= PATIENCE_S
    assert caught.value.retry_after_s == 2
    assert str(caught.value) == "apply services: told 429"


async def test_what_is_asked_together_ends_together():
    """One of two questions went on asking a busy API server beside the next one of its kind."""
    told = []

    async def refused():
        raise UnavailableError("busy")

    async def waits():
        try:
            await asyncio.sleep(600)
        finally:
            told.append("ended")

    with pytest.raises(UnavailableError):
        await together([refused(), waits()])

    assert told == ["ended"]


async def test_after_a_busy_api_servers_last_word_the_next_look_for_kinds_waits_as_well(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            raise asyncio.CancelledError

    class Busy:
        async def learn(self):
            raise UnavailableError("told 429", 429, 30.0)

    monkeypatch.setattr(run.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await run._tend(SimpleNamespace(resync_s=1.0), Busy(), None, None)

    assert slept == [1.0, 30.0, 30.0]


@pytest.mark.parametrize(
    ("status", "headers", "slept"),
    [
        (429, {}, True),  # without a time, a second
        (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, True),
        (503, {"Retry-After": "1"}, True),
        (500, {"Retry-After": "1"}, True),
        (500, {}, False),
        (503, {}, False),
        (429, {"Retry-After": "3600"}, False),  # that is for the one who asked
    ],
)
async def test_only_what_is_said_to_pass_is_waited_for(status, headers, slept):
    async with World((status, headers)) as world:
        if slept:
            await world.cluster.list("Pod")
        else:
            with pytest.raises(UnavailableError):
                await world.cluster.list("Pod")

    assert bool(world.slept) is slept
    assert all(1 <= seconds <= 1.25 for seconds in world.slept)


@pytest.mark.parametrize("status", [404, 409, 422, 403])
async def test_a_refusal_is_an_answer_and_carries_the_api_servers_sentence(status):
    async with World((status, {})) as world:
        answer = await world.cluster.apply(SERVER)

    assert answer == Refusal(status, f"told {status}")


async def test_what_is_made_new_carries_a_version_that_nothing_has_any_more():
    async with World() as world:
        await world.cluster.apply_new(SERVER)
        await world.cluster.apply(SERVER)

    (_, _, query, new), (_, _, forced, old) = world.seen
    assert query == {"fieldManager": "octavo-operator", "force": "false"}
    assert json.loads(new)["metadata"]["resourceVersion"] == "1"
    assert forced["force"] == "true"
    assert "resourceVersion" not in json.loads(old)["metadata"]
