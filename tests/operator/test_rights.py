"""The role of the chart beside the calls that the operator makes: nothing it may not, and nothing it need not.

Every call of an operator that lives through all it can do goes through a proxy that writes it down.
"""

from __future__ import annotations

import contextlib
import time
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from stage import KINDS, LEASE, Activator, ApiError, Faults, Operator, certificate, chart, says, wait_for

from octavo_engine.status import Failure, FailureCode, Load, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

PROMETHEUS_OPERATOR = {"podmonitors", "prometheusrules", "prometheuses", "prometheusagents"}
NOT_HERE = {"scaledobjects", "httproutes", "inferencepools"} | PROMETHEUS_OPERATOR
"""Kinds whose CRDs this cluster does not have; what is done with them is done by the code for the others."""


@pytest.fixture(scope="module")
def activator_objects(cluster, api):
    """What the chart makes for the activator; its pods' image is one that the node has."""
    documents = chart("octavo", "activator", values=("operator.image=localhost/pause:1",))
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=documents)
    yield
    cluster.kubectl("delete", "--wait=false", "-f", "-", stdin=documents)


@pytest.mark.usefixtures("activator_objects")
def test_the_operator_is_granted_what_it_calls_and_nothing_more(stage, cluster, api):
    record = cluster.state / "calls"
    forget_lease(api)  # the first operator of a cluster makes it
    faults = Faults(cluster, 18220)
    faults.do(record=str(record))
    settings = {"OCTAVO_RESYNC_SECONDS": "4", "OCTAVO_ACTIVATOR": "octavo-activator"}
    running = Operator(cluster, "rights", 18120, server=faults.url, **settings)
    try:
        running.wait_leading()
        live(stage)
        # What a watch has lost is read by name.
        faults.do(record=str(record), deaf=["pods", "llmservers"])
        (pod,) = stage.pods("slow")
        stage.api.merge(stage.path("pods", pod["metadata"]["name"]), {"metadata": {"labels": {"x": "y"}}})
        stage.patch("slow", {"engine": {"maxModelLen": 1024}})
        wait_for(lambda: running.log().count("a watch did not tell of changes") >= 2, "a sweep")
        with contextlib.suppress(AssertionError):  # which would not say what is missing
            wait_for(lambda: not unused(called(record)), "what comes late on a busy machine", 60, every_s=0.5)
        log = running.log()
    finally:
        running.stop()
        forget_lease(api)
    found, granted = called(record), set(rights("rbac"))

    assert found <= granted, f"called and not granted: {sorted(found - granted)}"
    assert unused(found) == set(), f"granted and never called: {sorted(unused(found))}"
    assert "forbidden" not in log.lower()
    assert not any(resource == "secrets" for _, resource, _ in granted)
    assert not any("*" in right for right in granted)


@pytest.mark.usefixtures("activator_objects")
def test_the_activator_is_granted_what_it_calls_and_nothing_more(stage, cluster):
    record = cluster.state / "calls-of-the-activator"
    faults = Faults(cluster, 18221)
    faults.do(record=str(record))
    stage.serve()
    labels = {"kubernetes.io/service-name": "qwen", "endpointslice.kubernetes.io/managed-by": "octavo-operator"}
    labels |= {"octavo.dev/server": "qwen", "octavo.dev/activator-port": "20499"}
    body = {"metadata": {"name": "qwen", "labels": labels}, "addressType": "IPv4", "endpoints": []}
    stage.create("endpointslices", {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **body})
    running = Activator(cluster, "10.250.0.13", server=faults.url, OCTAVO_ACTIVATOR_HOLD_SECONDS="2")
    try:
        running.wait_serving()
        answer = cluster.run(["curl", "-sS", "--max-time", "30", "-d", "{}", "http://10.250.0.13:20499/v1/x"]).stdout
    finally:
        running.stop()

    assert "did not wake within 2 s" in answer
    assert rights_of(record) == set(rights("activator"))


def forget_lease(api):
    with contextlib.suppress(ApiError):
        api.request("DELETE", LEASE)


def rights_of(record):
    return {right for line in record.read_text().splitlines() if (right := right_of(line))}


def called(record):
    """Applying what is not there yet is a patch on the wire, and asks for the right to create."""
    found = rights_of(record)
    return found | {(group, kind, "create") for group, kind, verb in found if verb == "patch" and is_made(kind)}


def unused(found):
    return {right for right in set(rights("rbac")) - found if right[1] not in NOT_HERE}


def is_made(kind):
    return "/" not in kind and kind != "pods"


def live(stage):
    """All that the operator does with a server: makes, scales, rolls out and back, serves others' kinds, deletes."""
    stage.serve(autoscaling={"maxReplicas": 3}, engine={"maxModelLen": 2048})
    (pod,) = stage.wait_pods(1)
    address = stage.up(pod)
    stage.wait_condition("Progressing", "False", "Settled")
    stage.engines.say(address, says(Stage.READY, load=Load(running=9, waiting=9, predicted_queue_s=9.0)))
    wait_for(lambda: stage.get("llmservers", "qwen")["spec"]["replicas"] == 2, "the second replica")
    stage.patch("qwen", {"autoscaling": {"mode": "HPA", "maxReplicas": 3}, "replicas": 1})
    stage.engines.say(address, says(Stage.READY))
    hpa = f"/apis/autoscaling/v2/namespaces/{stage.namespace}/horizontalpodautoscalers/qwen"
    wait_for(lambda: stage.api.get(hpa), "the HPA")
    stage.patch("qwen", {"autoscaling": {"maxReplicas": 2}})
    wait_for(lambda: stage.api.get(hpa)["spec"]["maxReplicas"] == 2, "its change")
    stage.patch("qwen", {"autoscaling": None})
    wait_for(lambda: stage.api.get(hpa) is None, "its end")
    stage.patch("qwen", {"engine": {"maxModelLen": 4096}})
    known = pod["metadata"]["uid"]
    fresh = wait_for(lambda: next((p for p in stage.pods() if is_new(p, known)), None), "the new revision's pod")
    failure = Failure(FailureCode.KV_CACHE_TOO_SMALL, "Too small.", "")
    stage.crash_pod(fresh, certificate(failure), 41, restarts=3)
    stage.wait_condition("Progressing", "False", "RolledBack")
    expose = {"ingress": {"hostname": "x.example"}, "networkPolicy": {}}
    stage.patch("qwen", {"expose": expose})
    kinds = ("ingresses", "networkpolicies")
    path = f"/apis/networking.k8s.io/v1/namespaces/{stage.namespace}"
    wait_for(lambda: all(stage.api.get(f"{path}/{kind}/qwen") for kind in kinds), "an Ingress and a NetworkPolicy")
    stage.patch("qwen", {"expose": None})
    wait_for(lambda: not any(stage.api.get(f"{path}/{kind}/qwen") for kind in kinds), "them to be gone")
    stage.serve("cached", cache={"mode": "Shared", "size": "1Gi", "prefetch": True})
    jobs = f"/apis/batch/v1/namespaces/{stage.namespace}/jobs"
    wait_for(lambda: stage.api.get(jobs)["items"], "the Job that downloads")
    time.sleep(1)
    stage.patch("cached", {"cache": None})
    wait_for(lambda: not stage.api.get(jobs)["items"], "it to be gone")
    stage.serve("sleeps", autoscaling={"minReplicas": 0, "maxReplicas": 1}, replicas=0)
    slices = f"/apis/discovery.k8s.io/v1/namespaces/{stage.namespace}/endpointslices"
    wait_for(lambda: stage.api.get(f"{slices}/sleeps"), "the slice that leads to the activator")
    deployment = "/apis/apps/v1/namespaces/octavo-system/deployments/octavo-activator"
    wait_for(lambda: stage.api.get(deployment)["spec"]["replicas"] == 2, "the activator to be started")
    stage.patch("sleeps", {"autoscaling": None})
    wait_for(lambda: stage.api.get(f"{slices}/sleeps") is None, "its slice to go")
    stage.serve("slow")
    stage.wait_pods(1, "slow")
    time.sleep(5)  # its container is being created for so long that its events are read
    taken(stage)
    stage.patch("slow", {"expose": {"service": {"port": 81}}})
    stage.delete("services", "slow")
    time.sleep(1)
    stage.delete("llmservers", "qwen")
    time.sleep(1)


def taken(stage):
    """Every child's name is somebody else's already: each is read to see whose."""
    labels = {"matchLabels": {"x": "y"}}
    containers = [{"name": "x", "image": "y"}]
    template = {"metadata": {"labels": {"x": "y"}}, "spec": {"containers": containers}}
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    scaled = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "taken"}
    port = {"service": {"name": "x", "port": {"number": 80}}}
    theirs = {
        "deployments": {"replicas": 0, "selector": labels, "template": template},
        "services": {"ports": [{"port": 80}]},
        "poddisruptionbudgets": {"minAvailable": 0, "selector": labels},
        "persistentvolumeclaims": claim,
        "ingresses": {"defaultBackend": port},
        "networkpolicies": {"podSelector": labels},
        "jobs": {"suspend": True, "template": {"spec": {"containers": containers, "restartPolicy": "Never"}}},
        "horizontalpodautoscalers": {"scaleTargetRef": scaled, "maxReplicas": 2},
    }
    for kind, spec in theirs.items():
        group = "/apis/autoscaling/v2" if kind == "horizontalpodautoscalers" else KINDS[kind]
        path = f"{group}/namespaces/{stage.namespace}/{kind}"
        # The Deployment of the one with a cache waits for its download.
        name = "taken-sleeps" if kind == "deployments" else "taken"
        stage.api.request("POST", path, {"metadata": {"name": name}, "spec": spec})
    body = {"metadata": {"name": "taken-sleeps"}, "addressType": "IPv4", "endpoints": []}
    stage.create("endpointslices", {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **body})
    expose = {"ingress": {"hostname": "y.example"}, "networkPolicy": {}}
    cache = {"mode": "Shared", "size": "1Gi", "prefetch": True}
    stage.serve("taken", expose=expose, cache=cache, autoscaling={"mode": "HPA", "maxReplicas": 3})
    stage.serve("taken-sleeps", autoscaling={"minReplicas": 0, "maxReplicas": 1}, replicas=0)
    for name in ("taken", "taken-sleeps"):
        stage.wait_condition("Ready", "False", "NameTaken", name)


def is_new(pod, known):
    template = pod["spec"]["containers"][0]["args"]
    return pod["metadata"]["uid"] != known and "--max-model-len=4096" in template and pod["spec"].get("nodeName")


def right_of(line):
    """(group, resource, verb) of a request, as RBAC sees it; None for what is no resource."""
    method, _, target = line.partition(" ")
    parts = urlsplit(target)
    words = [word for word in parts.path.split("/") if word]
    if words[0] not in ("api", "apis") or len(words) < (3 if words[0] == "api" else 4):
        return None
    group, words = ("", words[2:]) if words[0] == "api" else (words[1], words[3:])
    if words[0] == "namespaces" and len(words) > 2:
        words = words[2:]
    resource, name, subresource = (*words, "", "", "")[:3]
    if subresource:
        resource = f"{resource}/{subresource}"
    reads = "watch" if parse_qs(parts.query).get("watch") == ["true"] else "get" if name else "list"
    verbs = {"GET": reads, "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    return group, resource, verbs[method]


def rights(template):
    for document in yaml.safe_load_all(chart("octavo", template)):
        if not document or document["metadata"]["name"].endswith(("-edit", "-view")):
            continue
        for rule in document.get("rules", []):
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    yield from ((group, resource, verb) for verb in rule["verbs"])
