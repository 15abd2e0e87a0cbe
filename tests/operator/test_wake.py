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
from octavo_operator.cluster import Refusal
from octavo_operator.conditions import View, conditions
from octavo_operator.desired import objects
from octavo_operator.desired.autoscalers import autoscaler
from octavo_operator.desired.network_policy import activator_policy, clients_elsewhere
from octavo_operator.desired.wake import endpoint_slice
from octavo_operator.expose import NetworkPolicy
from octavo_operator.settings import EngineDefaults
from octavo_operator.status import status_of
from octavo_operator.wake import PORTS, Waking, barrier, may_sleep, port_for, port_of, sentence

ZERO = {"minReplicas": 0, "maxReplicas": 2}
KEDA = {**ZERO, "mode": "KEDA", "prometheusAddress": "http://p:9090"}
POOL = {
    "gateway": {"parentRefs": [{"name": "g"}]},
    "inferencePool": {"endpointPicker": {"name": "p"}},
}
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
        ({"networkPolicy": {}}, ""),
        ({"networkPolicy": {"allowFrom": [{"podLabels": {"a": "b"}}]}}, ""),
        (POOL, ""),
    ],
)
def test_what_keeps_requests_from_waking_it_is_named_with_what_would_be_right(expose, words):
    of = server(autoscaling=ZERO, expose=expose)
    found = barrier(of, activator=True)

    assert (words in found) if words else found == ""
    assert "activator.enabled" in barrier(of, activator=False)


def test_a_route_goes_by_the_service_while_no_pod_takes_requests():
    """An InferencePool has pods to choose from or none; the Service leads to the activator, which wakes the server."""

    def backend(*, sleeps):
        made = objects(server(autoscaling=ZERO, expose=POOL), EngineDefaults(), pod_monitors_known=False, sleeps=sleeps)
        (route,) = [body for body in made if body["kind"] == "HTTPRoute"]
        return route["spec"]["rules"][0]["backendRefs"]

    assert backend(sleeps=True) == [{"name": "qwen", "port": 80}]
    assert backend(sleeps=False) == [{"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "qwen"}]


def policy_of(**spec):
    made = objects(server(**spec), EngineDefaults(operator_namespace="octavo-system"), pod_monitors_known=False)
    (policy,) = [body for body in made if body["kind"] == "NetworkPolicy"]
    return policy["spec"]["ingress"][0]["from"]


def test_a_server_that_may_sleep_lets_the_activator_in_and_no_other_server_does():
    activator = {
        "namespaceSelector": {"matchLabels": THERE},
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "activator"}},
    }

    assert policy_of(expose={"networkPolicy": {}}) == [{"podSelector": {}}]
    assert policy_of(autoscaling=ZERO, expose={"networkPolicy": {}}) == [{"podSelector": {}}, activator]


ACTIVATOR = {
    "metadata": {"name": "octavo-activator", "namespace": "octavo-system", "uid": "uid-activator"},
    "spec": {"selector": {"matchLabels": {"app.kubernetes.io/name": "octavo-activator"}}, "replicas": 2},
}
ML = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ml"}}}


def ingress(allowed):
    return activator_policy(ACTIVATOR, "x", allowed)["spec"]["ingress"]


def ports(first, last):
    return {"port": first, "endPort": last, "protocol": "TCP"}


def test_only_those_whom_a_server_lets_in_reach_its_port_at_the_activator():
    guarded = ingress({20000: [ML], 20007: [ML]})

    assert ingress({}) == [{"ports": [ports(20000, 20499)]}]
    assert [rule["ports"] for rule in guarded] == [
        [{"port": 20000, "protocol": "TCP"}],
        [{"port": 20007, "protocol": "TCP"}],
        [ports(20001, 20006), ports(20008, 20499)],
    ]
    assert [rule.get("from") for rule in guarded] == [[ML], [ML], None]
    # To Kubernetes, no peers are all of them, and no ports too.
    assert ingress({20499: []}) == [{"ports": [ports(20000, 20498)]}]
    assert [rule["from"] for rule in ingress({port: [ML] for port in PORTS})] == [[ML]] * len(PORTS)


@pytest.mark.parametrize(
    ("asked", "peers"),
    [
        ({}, [ML]),
        ({"allowFrom": [{"podLabels": {"a": "b"}}]}, [{**ML, "podSelector": {"matchLabels": {"a": "b"}}}]),
        ({"allowFrom": [{"namespaceLabels": {}}]}, [{"namespaceSelector": {}}]),
        (
            {"allowFrom": [{"namespaceLabels": {"t": "a"}, "podLabels": {"a": "b"}}]},
            [{"namespaceSelector": {"matchLabels": {"t": "a"}}, "podSelector": {"matchLabels": {"a": "b"}}}],
        ),
    ],
)
def test_peers_mean_the_same_in_the_activators_namespace_as_in_the_servers_own(asked, peers):
    assert clients_elsewhere(NetworkPolicy.model_validate(asked), "ml") == peers


class Applying:
    """A cluster that has the activator, and takes or refuses its policy."""

    def __init__(self):
        self.applied, self.refuses, self.deployment = [], False, ACTIVATOR

    async def get(self, kind, namespace, name):
        return self.deployment if kind == "Deployment" else (self.applied or [None])[-1]

    async def apply(self, body):
        if self.refuses:
            return Refusal(403, "no")
        self.applied.append(body)
        return body


def stored(cache, name, version, expose=None):
    metadata = {"name": name, "namespace": "ml", "uid": name, "resourceVersion": str(version)}
    cache.put(names.KIND, {"metadata": metadata, "spec": {"expose": expose or {}}})
    return ("ml", name)


async def test_the_activators_policy_is_written_before_a_port_is_used_and_when_whom_it_lets_in_changes():
    cache, cluster = Cache(), Applying()
    open_, closed, broken = (
        stored(cache, "open", 1),
        stored(cache, "closed", 2, {"networkPolicy": {}}),
        stored(cache, "broken", 3, {"networkPolicy": {"allowFrom": 7}}),
    )
    activators = Activators(cluster, cache, lambda key: None, "octavo-system", "octavo-activator", 2)
    at = {key: activators.port(key, None) for key in (open_, closed, broken)}

    async def guard(key):
        found = await activators.guard(key, at[key])
        assert found == ""
        return {p["port"]: rule.get("from") for rule in cluster.applied[-1]["spec"]["ingress"] for p in rule["ports"]}

    first = await guard(open_)
    again = await guard(closed), await guard(broken), len(cluster.applied)
    stored(cache, "closed", 4, {"networkPolicy": {"allowFrom": [{"namespaceLabels": {}}]}})
    wider = await guard(closed)
    stored(cache, "closed", 5)
    gone = await guard(closed)
    cluster.refuses = True
    stored(cache, "open", 6, {"networkPolicy": {}})

    assert first[at[closed]] == [ML], "those that nobody has looked at yet are kept closed"
    assert at[broken] not in first
    assert again == (first, first, 1)
    assert wider[at[closed]] == [{"namespaceSelector": {}}]
    assert gone.get(at[closed]) is None
    assert "refused the activator's NetworkPolicy octavo-activator-ports: no" in await activators.guard(
        open_, at[open_]
    )
    assert cluster.applied[0]["metadata"]["ownerReferences"][0]["uid"] == "uid-activator"


async def test_a_policy_of_the_activator_that_somebody_took_away_comes_back():
    cache, cluster, woken = Cache(), Applying(), []
    key = stored(cache, "qwen", 1, {"networkPolicy": {}})
    activators = Activators(cluster, cache, woken.append, "octavo-system", "octavo-activator", 2)
    activators.need(key, needed=True)
    port = activators.port(key, None)
    await activators.guard(key, port)
    cluster.applied.clear()
    await activators._scale(2)
    await activators.guard(key, port)

    assert woken == [key]
    assert len(cluster.applied) == 1


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


@pytest.mark.parametrize(
    ("waking", "told"),
    [
        (Waking(20000, ("10.0.0.1",)), ("True", "ByRequest", "From zero, a request wakes it, through the activator.")),
        (Waking(20000), ("Unknown", "ActivatorNotReady", "No pod of the activator is ready: kubectl get pods -A -l ")),
        (Waking(barrier="the sky fell"), ("False", "NotByRequest", "No request could wake it from zero, as the sky")),
        (Waking(barrier="x", keeps_last=True), ("False", "NotByRequest", "as x. So its last replica stays")),
    ],
)
def test_whether_a_request_would_wake_it_is_told_before_it_sleeps(waking, told):
    of = server(autoscaling=ZERO)
    (found,) = [one for one in conditions(View(of, (), "r1", waking=waking)) if one.type == "Wakeable"]

    assert (found.status, found.reason) == told[:2]
    assert told[2] in found.message
    assert found.trouble is (found.status == "False")
    assert "Wakeable" not in [one.type for one in conditions(View(server(), (), "r1"))]


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
    async with asyncio.timeout(60):
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
