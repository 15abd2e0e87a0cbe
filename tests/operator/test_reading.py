"""Reading the world: pods as the API server gives them, engines as they answer or do not."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from build import engine, pod

from octavo_engine.status import Stage
from octavo_operator import engine_client
from octavo_operator.engine_client import EngineClient
from octavo_operator.observed import World, read_events, read_pod, read_time, write_time


def document(**status):
    metadata = {"name": "p", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"metadata": metadata, "spec": {}, "status": status}


def test_a_pod_that_was_just_made_has_no_status_yet():
    found = read_pod({"metadata": document()["metadata"]})

    assert (found.phase, found.node, found.ip, found.ready, found.unschedulable) == ("Pending", None, None, False, None)
    assert found.terminations == ()


def test_a_crashed_container_is_read_with_both_of_its_ends():
    ended = {"exitCode": 2, "reason": "Error", "message": "now", "finishedAt": "2026-01-01T00:00:09Z"}
    before = {"exitCode": 1, "reason": "Error", "message": "before", "finishedAt": "2026-01-01T00:00:05Z"}
    container = {"name": "engine", "restartCount": 1, "state": {"terminated": ended}}
    sidecar = {"name": "sidecar", "restartCount": 9, "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
    found = read_pod(document(containerStatuses=[sidecar, container | {"lastState": {"terminated": before}}]))

    assert [end.message for end in found.terminations] == ["now", "before"]
    assert (found.restarts, found.running) == (1, False)


def test_events_come_in_the_order_of_the_api_server_and_not_of_a_nodes_clock():
    """By its name, which has the time in it, the older one came last after a node's clock had been set back."""

    def event(version, name, message):
        metadata = {"name": name, "resourceVersion": version}
        return {"metadata": metadata, "involvedObject": {"name": "p"}, "reason": "FailedMount", "message": message}

    found = read_events([event("1000", "p.18ac", "after"), event("999", "p.18bd", "before")])

    assert [one.message for one in found] == ["before", "after"]


def test_the_schedulers_word_counts_only_when_it_found_no_node():
    scheduled = {"type": "PodScheduled", "status": "True", "message": "x"}
    refused = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}

    assert read_pod(document(conditions=[scheduled])).unschedulable is None
    assert read_pod(document(conditions=[refused])).unschedulable == "0/1 nodes"


def test_whether_we_annotated_a_pod_is_read_from_who_owns_the_fields():
    def owned(manager, fields):
        entry = {"manager": manager, "fieldsV1": {"f:metadata": {"f:annotations": fields}}}
        body = document()
        return read_pod({**body, "metadata": body["metadata"] | {"managedFields": [entry]}}).annotated_by_us

    assert owned("octavo-operator", {"f:prometheus.io/scrape": {}})
    assert not owned("octavo-operator", {".": {}})
    assert not owned("kubectl", {"f:prometheus.io/scrape": {}})


def test_the_deployment_repeats_why_its_pods_are_refused():
    failure = {"type": "ReplicaFailure", "status": "True", "message": "quota"}
    available = {"type": "Available", "status": "True", "message": "fine"}

    assert World({"Deployment": {"status": {"conditions": [available, failure]}}}).refused_pods == "quota"
    assert World({"Deployment": {"status": {"conditions": [available]}}}).refused_pods is None
    assert World().refused_pods is None


def test_times_go_through_unchanged():
    assert write_time(read_time("2026-01-01T00:00:09Z")) == "2026-01-01T00:00:09Z"


@pytest.fixture
async def serve(monkeypatch):
    """A management port that answers as the test wants; returns its calls."""
    runners = []

    async def start(answer):
        app = web.Application()
        app.router.add_get("/statusz", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        monkeypatch.setattr(engine_client, "MANAGEMENT_PORT", runner.addresses[0][1])

    yield start
    for runner in runners:
        await runner.cleanup()


async def ask(*pods, timeout_s=0.3):
    client = EngineClient(timeout_s)
    try:
        return await client.statuses(pods)
    finally:
        await client.close()


RUNNING = pod("p", running=True, ip="127.0.0.1")


async def test_an_engines_word_is_read(serve):
    word = engine(Stage.LOADING_WEIGHTS, 61)

    async def answer(request):
        return web.json_response(word.to_dict() | {"a field of tomorrow": 1})

    await serve(answer)

    assert await ask(RUNNING) == {"p": word}


@pytest.mark.parametrize(
    "body", [b"", b"no json", b"[]", b"{}", b'{"stage": "dreaming"}', b'{"stage": 1}', b"x" * 200_000]
)
async def test_what_is_no_status_is_no_answer(serve, body):
    async def answer(request):
        return web.Response(body=body)

    await serve(answer)

    assert await ask(RUNNING) == {}


async def test_engines_are_asked_at_once_and_slow_ones_do_not_hold_up_the_look(serve):
    async def answer(request):
        await asyncio.sleep(5 if "127.0.0.2" in request.host else 0)
        return web.Response(body=json.dumps(engine(Stage.READY).to_dict()))

    await serve(answer)
    slow = [pod(f"slow-{n}", running=True, ip="127.0.0.2") for n in range(20)]
    started = asyncio.get_running_loop().time()
    found = await ask(RUNNING, *slow)

    assert list(found) == ["p"]
    assert asyncio.get_running_loop().time() - started < 3  # one after the other they would take six


async def test_pods_that_do_not_run_are_not_asked(serve):
    asked = []

    async def answer(request):
        asked.append(request)
        return web.Response(status=500)

    await serve(answer)
    found = await ask(pod("a", ip="127.0.0.1"), pod("b", running=True))

    assert found == {}
    assert asked == []


@pytest.mark.parametrize(
    ("state", "last", "told"),
    [
        ({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}, {"exitCode": 3, "message": "no upstream"},
         "proxy: it ended with 3. no upstream"),
        ({"waiting": {"reason": "ImagePullBackOff", "message": "none"}}, None, "proxy: ImagePullBackOff. none"),
        ({"waiting": {"reason": "PodInitializing"}}, None, None),
        ({"running": {"startedAt": "2026-01-01T00:00:00Z"}}, {"exitCode": 3}, None),
        ({"terminated": {"exitCode": 0, "reason": "Completed"}}, None, None),
    ],
)  # fmt: skip
def test_a_container_beside_the_engine_is_told_of_when_it_does_not_run(state, last, told):
    proxy = {"name": "proxy", "state": state, "lastState": {"terminated": last} if last else {}}
    engine_waits = {"name": "engine", "state": {"waiting": {"reason": "PodInitializing"}}}

    assert read_pod(document(containerStatuses=[engine_waits, proxy])).beside == told
    assert read_pod(document(initContainerStatuses=[proxy], containerStatuses=[engine_waits])).beside == told
