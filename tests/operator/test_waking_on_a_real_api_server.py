"""A server at zero behind its Service: a real kube-proxy, operator and activators, and stand-ins for its engines."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import time

import pytest
from stage import Activator, ApiError, Operator, chart, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ZERO = {"minReplicas": 0, "maxReplicas": 2, "scaleDownDelaySeconds": 1, "idleSeconds": 10}
SLICES = "/apis/discovery.k8s.io/v1/namespaces/octavo-system/endpointslices"
DEPLOYMENT = "/apis/apps/v1/namespaces/octavo-system/deployments/octavo-activator"
ADDRESSES = ("10.250.0.11", "10.250.0.12")
FULL = 3
"""Requests that each activator holds for one server here."""
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def activators(cluster, api):
    """Two activators as processes, with the chart's rights, and the objects by which the operator finds them."""
    documents = chart("octavo", "activator", values=("operator.image=localhost/pause:1",))
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=documents)
    running = [
        Activator(cluster, address, OCTAVO_ACTIVATOR_REQUESTS_PER_SERVER=str(FULL), OCTAVO_ACTIVATOR_HOLD_SECONDS="60")
        for address in ADDRESSES
    ]
    for one in running:
        one.wait_serving()
    yield running
    for one in running:
        if one.process.poll() is None:
            one.kill()
            one.process.wait(60)
    cluster.kubectl("delete", "--wait=false", "-f", "-", stdin=documents)
    tell(api, ())


@pytest.fixture(scope="module")
def operator(cluster, api, activators):
    """A list with the one that runs, so that a test may put another in its place."""
    running = [an_operator(cluster)]
    try:
        running[0].wait_leading()
        yield running
        assert running[0].process.poll() is None, f"the operator ended: {running[0].log()[-3000:]}"
    finally:
        running[0].stop()


def an_operator(cluster):
    return Operator(
        cluster,
        "wakes",
        18320,
        OCTAVO_ACTIVATOR="octavo-activator",
        OCTAVO_ACTIVATOR_REPLICAS="2",
        OCTAVO_LEASE_SECONDS="15",
    )


def tell(api, addresses, ending=()):
    """What the controller of EndpointSlices would say of the activator's pods, which are processes here."""
    with contextlib.suppress(ApiError):
        api.request("DELETE", f"{SLICES}/octavo-activator-test")
    if addresses:
        labels = {"kubernetes.io/service-name": "octavo-activator"}
        body = {"metadata": {"name": "octavo-activator-test", "labels": labels}, "addressType": "IPv4"}
        body["endpoints"] = [
            {"addresses": [address], "conditions": {"ready": address not in ending}} for address in addresses
        ]
        api.request("POST", SLICES, {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **body})


@pytest.fixture
def asleep(stage, cluster, operator, activators):
    """A server that fell asleep before anybody asked it, and the address of its Service."""
    tell(stage.api, ADDRESSES)
    cluster.run(["ip", "route", "replace", "local", "10.246.0.0/16", "dev", "lo"])
    stage.serve(autoscaling=ZERO, replicas=0)
    leads_to(stage, ADDRESSES)
    made = Asleep(stage, cluster)
    wait_for(lambda: ends(made.ask(path="/health"))[0] == "200", "kube-proxy to know the way")
    return made


class Asleep:
    def __init__(self, stage, cluster):
        self.stage, self.cluster = stage, cluster
        self.address = stage.get("services", "qwen")["spec"]["clusterIP"]
        self.engine = ""

    def ask(self, *more, path="/v1/chat/completions", body=None, at=None):
        """curl on the node, by the address of the Service or of one activator. Ends with a line of the status."""
        port = self.stage.get("endpointslices", "qwen")["ports"][0]["port"] if at else 80
        address = f"{at or self.address}:{port}"
        command = ["curl", "-sSN", "--max-time", "90", "-w", "\n%{http_code}", f"http://{address}{path}"]
        command += ["-d", json.dumps(body)] if body is not None else []
        command = self.cluster.inside([*command, *more])
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def up(self):
        """Its pod comes up on the staged node, at an address that leads to the stand-in."""
        (pod,) = self.stage.wait_pods(1)
        self.engine = f"10.246.0.{next(numbers)}"
        pod["status"]["podIP"] = self.engine
        self.stage.up(pod)


def leads_to(stage, addresses):
    def look():
        found = stage.get("endpointslices", "qwen")
        there = [endpoint["addresses"][0] for endpoint in (found or {}).get("endpoints") or []]
        return found if found and sorted(there) == sorted(addresses) else None

    found = wait_for(look, f"the Service to lead to {addresses}: {stage.get('endpointslices', 'qwen')}")
    # kube-proxy hears of it a moment later: a request that comes before goes the old way, to an activator that is gone.
    if addresses:
        wait_for(lambda: destinations(stage) == set(addresses), f"kube-proxy to lead to {addresses}", every_s=0.1)
    return found


def destinations(stage):
    rules = stage.api.cluster.run(["iptables-save", "-t", "nat"]).stdout.splitlines()
    mine = [rule for rule in rules if f'"{stage.namespace}/qwen' in rule and "--to-destination" in rule]
    return {rule.rpartition("--to-destination ")[2].rpartition(":")[0] for rule in mine}


def replicas(stage):
    return stage.get("llmservers", "qwen")["spec"]["replicas"]


def ends(process):
    text, _ = process.communicate(timeout=100)
    body, _, code = text.rpartition("\n")
    return code, body


def test_requests_wake_their_server_and_are_answered_and_then_it_sleeps_again(asleep, stage):
    told = stage.wait_condition("Ready", "False", "ScaledToZero")
    phase = stage.status()["phase"]
    probes = [ends(asleep.ask(path=path)) for path in ("/health", "/v1/models", "/metrics")]
    time.sleep(2)
    still = replicas(stage)
    plain, stream = asleep.ask(body={"n": 1}), asleep.ask(body={"n": 2, "stream": True})
    wait_for(lambda: replicas(stage) == 1, "the wake")
    began = time.monotonic()
    asleep.up()
    answers = [ends(plain), ends(stream)]
    took_s = time.monotonic() - began
    stage.wait_condition("Ready", "True", "AllReplicasReady")
    leads_to(stage, ())

    def by_itself():
        code, text = ends(asleep.ask(body={"n": 3}))
        return code if "X-Forwarded-For" not in text else None

    straight = wait_for(by_itself, "the Service to lead to the pod alone")
    with stage.kubelet():
        wait_for(lambda: replicas(stage) == 0, "it to go to sleep")
        slept = leads_to(stage, ADDRESSES)
        wait_for(lambda: stage.status().get("phase") == "Asleep", "its last pod to be gone")

    assert "The first request wakes it, through the activator." in told["message"]
    assert phase == "Asleep"
    assert [code for code, _ in probes] == ["200", "200", "503"]
    assert json.loads(probes[1][1])["data"][0]["id"] == "qwen"
    assert still == 0, "what only looks wakes nothing"
    assert [code for code, _ in answers] == ["200", "200"]
    assert "POST /v1/chat/completions" in answers[0][1]
    assert asleep.engine in answers[0][1]
    assert ": octavo stage=" in answers[1][1]
    assert straight == "200"
    assert slept["metadata"]["ownerReferences"][0]["kind"] == "LLMServer"
    print(f"from the pod's readiness to both answers: {took_s:.2f} s")
    stage.wait_event("Normal", "Scaled")


def held(activators):
    """Requests that each activator holds by now."""
    found = [json.loads(one.get("/held")[:-3])["servers"] for one in activators]
    return [sum(server["requests"] for server in servers) for servers in found]


def test_requests_beyond_the_bound_are_told_when_to_come_again_and_the_others_are_answered(asleep, stage, activators):
    # kube-proxy draws lots: one activator may get them all, which holds FULL of them then and refuses the others.
    waiting = [asleep.ask("-i", body={"n": n}) for n in range(2 * FULL + 4)]

    def settled():
        return sum(one.poll() is not None for one in waiting) + sum(held(activators)) == len(waiting)

    wait_for(settled, "each to be held or refused")
    refused = [ends(one) for one in waiting if one.poll() is not None]
    rest = [one for one in waiting if one.returncode is None]
    wait_for(lambda: replicas(stage) == 1, "the wake")
    asleep.up()
    answered = [ends(one) for one in rest]

    assert len(refused) >= 4
    assert {code for code, _ in refused} == {"503"}
    assert all(1 <= int(re.search(r"Retry-After: (\d+)", text)[1]) <= 120 for _, text in refused)
    assert all('"type": "ServiceUnavailableError"' in text for _, text in refused)
    assert FULL <= len(answered) <= 2 * FULL
    assert {code for code, _ in answered} == {"200"}
    assert len({re.search(r'"n": (\d+)', text.rpartition("\r\n\r\n")[2])[1] for _, text in answered}) == len(rest)


def test_an_activator_that_is_killed_takes_its_own_requests_along_and_no_others(asleep, stage, activators, cluster):
    waiting = [asleep.ask(body={"n": n}, at=address) for n, address in enumerate((*ADDRESSES, ADDRESSES[0]))]
    wait_for(lambda: replicas(stage) == 1, "the wake")
    wait_for(lambda: held(activators) == [2, 1], "all to be held")
    activators[0].kill()
    activators[0].process.wait(60)
    tell(stage.api, ADDRESSES[1:])
    leads_to(stage, ADDRESSES[1:])
    later = asleep.ask(body={"n": 9})
    asleep.up()
    found = [ends(one) for one in waiting]
    after = ends(later)
    activators[0] = Activator(cluster, ADDRESSES[0], OCTAVO_ACTIVATOR_REQUESTS_PER_SERVER=str(FULL))
    activators[0].wait_serving()

    assert [code for code, _ in found] == ["000", "200", "000"]
    assert after[0] == "200"


def test_an_activator_that_is_asked_to_end_answers_first_whom_it_holds(asleep, stage, activators, cluster):
    tell(stage.api, ADDRESSES[:1])
    leads_to(stage, ADDRESSES[:1])
    waiting = asleep.ask(body={"n": 1})
    wait_for(lambda: replicas(stage) == 1, "the wake")
    activators[0].kill(15)
    # As Kubernetes tells of a pod that ends: it is not ready, and it is there. The operator goes on asking it.
    tell(stage.api, ADDRESSES, ending=ADDRESSES[:1])
    leads_to(stage, ADDRESSES[1:])
    time.sleep(3)  # it takes no more requests by now
    runs = activators[0].process.poll() is None
    asleep.up()
    answer = ends(waiting)
    status = activators[0].process.wait(60)
    activators[0] = Activator(cluster, ADDRESSES[0], OCTAVO_ACTIVATOR_REQUESTS_PER_SERVER=str(FULL))
    activators[0].wait_serving()

    assert runs
    assert answer[0] == "200"
    assert status == 0


def test_a_request_that_comes_while_no_operator_is_there_wakes_its_server_when_one_is(asleep, stage, operator, cluster):
    operator[0].kill()
    operator[0].process.wait(60)
    waiting = asleep.ask(body={"n": 1, "stream": True})
    time.sleep(2)
    meanwhile = replicas(stage), waiting.poll()
    operator[0] = an_operator(cluster)
    operator[0].wait_leading()
    wait_for(lambda: replicas(stage) == 1, "the wake")
    asleep.up()
    code, text = ends(waiting)

    assert meanwhile == (0, None)
    assert code == "200"
    assert text.count(": octavo stage=") >= 2
    assert "POST /v1/chat/completions" in text


def test_the_activator_runs_while_a_server_may_go_to_zero_and_not_otherwise(stage, operator, activators):
    tell(stage.api, ADDRESSES)
    stage.serve(autoscaling=ZERO)
    wait_for(lambda: stage.api.get(DEPLOYMENT)["spec"]["replicas"] == 2, "the activator to be started")
    own = wait_for(lambda: stage.get("endpointslices", "qwen"), "a port")
    leads_to(stage, ADDRESSES)
    before = stage.get("endpointslices", "qwen")["metadata"]["resourceVersion"]
    stage.patch("qwen", {"autoscaling": {"idleSeconds": 11}})
    wait_for(lambda: stage.status().get("activatorPort") == own["ports"][0]["port"], "another look")
    after = stage.get("endpointslices", "qwen")["metadata"]["resourceVersion"]
    stage.patch("qwen", {"autoscaling": None})
    wait_for(lambda: stage.api.get(DEPLOYMENT)["spec"]["replicas"] == 0, "it to be ended")
    wait_for(lambda: stage.get("endpointslices", "qwen") is None, "the slice to go")

    assert 20000 <= own["ports"][0]["port"] < 20500
    assert before == after, "what is as it should be is not written again"


POLICIES = "/apis/networking.k8s.io/v1/namespaces/octavo-system/networkpolicies"


def test_a_server_with_a_policy_is_woken_and_its_port_is_kept_to_those_whom_it_lets_in(asleep, stage):
    """The network of these tests enforces no policies: what one says is compared, and that the request goes through."""
    port = stage.status()["activatorPort"]
    stage.patch("qwen", {"expose": {"networkPolicy": {"allowFrom": [{"podLabels": {"app": "chat"}}]}}})

    def mine():
        rules = stage.api.get(f"{POLICIES}/octavo-activator-ports")["spec"]["ingress"]
        found = [rule for rule in rules if rule["ports"] == [{"port": port, "protocol": "TCP"}]]
        return found[0]["from"] if found else None

    peers = wait_for(mine, "the activator's policy to know of it")
    own = wait_for(lambda: stage.get("networkpolicies", "qwen"), "its own policy")
    stage.wait_condition("Wakeable", "True", "ByRequest")
    waiting = asleep.ask(body={"n": 1})
    wait_for(lambda: replicas(stage) == 1, "the wake")
    asleep.up()
    code, _ = ends(waiting)
    stage.api.request("DELETE", f"{POLICIES}/octavo-activator-ports")
    wait_for(lambda: stage.api.get(f"{POLICIES}/octavo-activator-ports"), "it to be made again", 60)
    again = mine()
    stage.patch("qwen", {"expose": None})
    wait_for(lambda: mine() is None, "the port to be everybody's")

    clients = {"podSelector": {"matchLabels": {"app": "chat"}}}
    there = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "octavo-system"}}}
    assert peers == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": stage.namespace}}, **clients}
    ]
    assert own["spec"]["ingress"][0]["from"] == [
        clients,
        {**there, "podSelector": {"matchLabels": {"app.kubernetes.io/component": "activator"}}},
    ]
    assert code == "200"
    assert again == peers


def test_a_server_that_no_request_could_wake_keeps_its_last_replica_and_says_so(stage, operator, activators):
    tell(stage.api, ADDRESSES)
    stage.serve(autoscaling=ZERO, expose={"tls": {"secretName": "t"}})
    (pod,) = stage.wait_pods(1)
    stage.up(pod)
    stage.wait_condition("Ready", "True", "AllReplicasReady")
    told = stage.wait_condition("Wakeable", "False", "NotByRequest")
    time.sleep(ZERO["idleSeconds"] + 4)

    assert replicas(stage) == 1
    assert "expose.tls ends at the pods" in told["message"]
    assert "So its last replica stays" in told["message"]
    stage.wait_event("Warning", "NotByRequest")


def test_without_an_activator_a_server_at_zero_says_so(stage, operator):
    tell(stage.api, ())
    stage.serve(autoscaling=ZERO, replicas=0)
    wait_for(lambda: "when a pod of the activator is ready" in stage.condition("Ready")["message"], "the sentence")
    stage.serve("secret", autoscaling=ZERO, replicas=0, expose={"tls": {"secretName": "t"}})
    found = stage.wait_condition("Ready", "False", "ScaledToZero", "secret")

    assert "expose.tls ends at the pods" in found["message"]
    assert "kubectl scale llm secret" in found["message"]
    assert stage.get("endpointslices", "secret") is None
