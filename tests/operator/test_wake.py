"""Whether a request wakes a server, by which port, and what the Service's slice says: values in, values out."""

from __future__ import annotations

import asyncio

import pytest
from build import NOW, server

from octavo_operator import names
from octavo_operator.activator.held import Held
from octavo_operator.activator.serve import _listen, _management
from octavo_operator.activators import Activators, ports_given_out, read_held
from octavo_operator.cache import Cache
from octavo_operator.conditions import View, conditions
from octavo_operator.desired.autoscalers import autoscaler
from octavo_operator.desired.wake import endpoint_slice
from octavo_operator.status import status_of
from octavo_operator.wake import PORTS, Waking, barrier, may_sleep, port_for, port_of, sentence

ZERO = {"minReplicas": 0, "maxReplicas": 2}
KEDA = {**ZERO, "mode": "KEDA", "prometheusAddress": "http://p:9090"}
THERE = {"kubernetes.io/metadata.name": "octavo-system"}


@pytest.mark.parametrize(
    ("spec", "sleeps"),
    [
        ({"autoscaling": ZERO}, True),
        ({"autoscaling": KEDA}, True),
        ({"autoscaling": {"minReplicas": 1, "maxReplicas": 2}}, False),
        ({"autoscaling": ZERO, "suspend": True}, False),
        ({"replicas": 0}, False),
        ({}, False),
    ],
)
def test_only_a_server_that_scales_to_zero_is_woken(spec, sleeps):
    assert may_sleep(server(**spec)) is sleeps


@pytest.mark.parametrize(
    ("expose", "words"),
    [
        ({}, ""),
        ({"tls": {"secretName": "t"}}, "expose.tls ends at the pods"),
        ({"networkPolicy": {}}, "does not let the activator in: add a peer with namespaceLabels"),
        ({"networkPolicy": {"allowFrom": [{"podLabels": {"a": "b"}}]}}, "does not let the activator in"),
        ({"networkPolicy": {"allowFrom": [{"namespaceLabels": {"team": "a"}}]}}, "does not let the activator in"),
        ({"networkPolicy": {"allowFrom": [{"namespaceLabels": THERE, "podLabels": {"a": "b"}}]}}, "does not let"),
        ({"networkPolicy": {"allowFrom": [{"podLabels": {"a": "b"}}, {"namespaceLabels": THERE}]}}, ""),
        ({"networkPolicy": {"allowFrom": [{"namespaceLabels": {}}]}}, ""),
    ],
)
def test_what_keeps_requests_from_waking_it_is_named_with_what_would_be_right(expose, words):
    of = server(autoscaling=ZERO, expose=expose)
    found = barrier(of, "octavo-system", activator=True)

    assert (words in found) if words else found == ""
    assert "activator.enabled" in barrier(of, "octavo-system", activator=False)


def test_a_server_keeps_its_port_and_two_never_share_one():
    taken: dict = {}
    for number in range(len(PORTS)):
        key = ("ml", f"s{number}")
        port = port_for(key, None, taken)
        assert port in PORTS
        assert port not in taken
        taken[port] = key
    assert port_for(("ml", "one-more"), None, taken) is None
    for port, key in taken.items():
        assert port_for(key, slice_at(port), taken) == port
    assert port_for(("ml", "s0"), slice_at(9), taken) in PORTS, "a port that is none of ours is not kept"


def slice_at(port):
    return {"metadata": {"labels": {names.ACTIVATOR_PORT_LABEL: str(port)}}}


def test_the_slice_leads_to_the_activator_by_the_name_of_the_services_port():
    of = server(autoscaling=ZERO)
    leads = endpoint_slice(of, Waking(20007, ("10.0.0.1", "10.0.0.2")), leads=True)
    rests = endpoint_slice(of, Waking(20007, ("10.0.0.1",)), leads=False)
    six = endpoint_slice(of, Waking(20007, ("fd00::1",)), leads=True)

    assert leads["metadata"]["labels"]["kubernetes.io/service-name"] == "qwen"
    assert leads["metadata"]["ownerReferences"][0]["uid"] == "uid-server"
    assert [(p["name"], p["port"]) for p in leads["ports"]] == [("http", 20007)]
    assert [e["addresses"] for e in leads["endpoints"]] == [["10.0.0.1"], ["10.0.0.2"]]
    assert (rests["endpoints"], port_of(rests)) == ([], 20007)
    assert (leads["addressType"], six["addressType"]) == ("IPv4", "IPv6")
    assert endpoint_slice(of, Waking(barrier="x"), leads=True) is None


@pytest.mark.parametrize(
    ("waking", "scaling", "words"),
    [
        (Waking(20000, ("10.0.0.1",)), ZERO, "Asleep. The first request wakes it, through the activator."),
        (Waking(20000, ("10.0.0.1",)), KEDA, "KEDA wakes it by octavo_activator_held_requests"),
        (Waking(20000), ZERO, "when a pod of the activator is ready: kubectl get pods"),
        (Waking(barrier="the sky fell"), ZERO, "as the sky fell. By hand: kubectl scale llm qwen -n default"),
    ],
)
def test_the_status_says_what_wakes_it(waking, scaling, words):
    of = server(autoscaling=scaling, replicas=0)
    seen = View(of, (), "r1", waking=waking)
    status = status_of(seen, conditions(seen), [], {}, NOW)

    assert words in sentence(of, waking)
    assert status.phase == "Asleep"
    assert words in status.message
    assert status.activator_port == waking.port


def test_keda_wakes_by_what_waits_and_counts_one_replica_for_it():
    zero, one = autoscaler(server(autoscaling=KEDA)), autoscaler(server(autoscaling={**KEDA, "minReplicas": 1}))
    wakes = zero["spec"]["triggers"][-1]["metadata"]

    assert wakes["query"] == 'sum(octavo_activator_held_requests{server="default/qwen"})'
    assert int(wakes["threshold"]) > 10_000, "the most that two activators may be told to hold"
    assert len(one["spec"]["triggers"]) == len(zero["spec"]["triggers"]) - 1


def test_ports_are_read_from_slices_and_the_first_of_two_keeps_it():
    cache = Cache()
    for version, (name, port) in enumerate((("b", 20001), ("a", 20001), ("c", 20002)), start=1):
        labels = {names.SERVER_LABEL: name, names.ACTIVATOR_PORT_LABEL: str(port)}
        metadata = {"name": name, "namespace": "ml", "uid": name, "resourceVersion": str(version), "labels": labels}
        cache.put("EndpointSlice", {"metadata": metadata})

    assert ports_given_out(cache) == {20001: ("ml", "a"), 20002: ("ml", "c")}


def test_what_an_activator_holds_is_read_and_nonsense_is_an_error():
    document = {"version": 7, "servers": [{"namespace": "ml", "name": "qwen", "requests": 2}]}

    assert read_held(document) == ("7", frozenset({("ml", "qwen")}))
    for broken in ({}, {"version": "x", "servers": []}, {"version": 1, "servers": [{}]}, {"version": 1, "servers": 3}):
        with pytest.raises((ValueError, KeyError, TypeError)):
            read_held(broken)


async def test_the_operator_learns_at_once_for_whom_requests_are_held_and_forgets_what_a_dead_activator_held(
    monkeypatch,
):
    monkeypatch.setattr("octavo_operator.activators.RETRY_S", 0.05)
    held, woken = Held(), []
    runner = await _listen(_management(held, asyncio.Event()), "127.0.0.1", [0])
    monkeypatch.setattr("octavo_operator.activators.MANAGEMENT_PORT", runner.addresses[0][1])
    activators = Activators(None, Cache(), woken.append, "octavo-system", "octavo-activator", 2)
    key = ("ml", "qwen")
    activators.need(key, needed=True)
    asking = asyncio.create_task(activators._go_on_asking("127.0.0.1"))
    try:
        await asyncio.sleep(0.2)
        before = activators.asked(key)
        with held.request(key), held.request(("ml", "awake")):
            await until(lambda: activators.asked(key))
            await runner.cleanup()
            await until(lambda: not activators.asked(key))
    finally:
        asking.cancel()
        await activators.close()

    assert not before
    assert woken == [key], "of one that may not sleep nobody is told"


async def until(look):
    async with asyncio.timeout(10):
        while not look():  # noqa: ASYNC110 -- what is waited for is in another's hands
            await asyncio.sleep(0.01)


def test_the_activator_runs_while_a_server_may_sleep_and_is_left_alone_until_all_are_known():
    cache = Cache()
    for version, name in enumerate(("a", "b"), start=1):
        metadata = {"name": name, "namespace": "ml", "uid": name, "resourceVersion": str(version)}
        cache.put(names.KIND, {"metadata": metadata})
    activators = Activators(None, cache, lambda key: None, "octavo-system", "octavo-activator", 3)
    unknown = activators._wanted()
    activators.need(("ml", "a"), needed=False)
    half = activators._wanted()
    activators.know(("ml", "b"))
    none = activators._wanted()
    activators.need(("ml", "b"), needed=True)
    activators.know(("ml", "b"))
    some = activators._wanted()
    activators.forget(("ml", "b"))
    cache.drop(names.KIND, {**metadata, "resourceVersion": "9"})
    labels = {names.SERVER_LABEL: "b"}
    cache.put("Service", {"metadata": {**metadata, "labels": labels, "resourceVersion": "10"}})

    assert (unknown, half, none, some, activators._wanted()) == (None, None, 0, 3, 0)
