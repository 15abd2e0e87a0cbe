"""Disks, prefetching and ways in, on a real API server : what is made, held back, and taken away."""

from __future__ import annotations

from typing import Any

import pytest
from stage import is_served, says, wait_for

from octavo_engine.status import Failure, FailureCode
from octavo_engine.status import Stage as EngineStage

pytestmark = pytest.mark.cluster

SHARED = {"mode": "Shared", "size": "1Gi", "storageClassName": "", "prefetch": True}


def volume_for(stage, name: str = "qwen") -> None:
    """What a provisioner would make."""
    claim = {"namespace": stage.namespace, "name": name}
    spec = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "storageClassName": "", "claimRef": claim}
    spec["hostPath"] = {"path": "/tmp"}
    body = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"pv-{stage.namespace}"}, "spec": spec}
    stage.api.request("POST", "/api/v1/persistentvolumes", body)


def prefetch_pod(stage) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found = stage.list("pods", "?labelSelector=octavo.dev/prefetch%3Dqwen")
        going = [p for p in found if p["spec"].get("nodeName") and "deletionTimestamp" not in p["metadata"]]
        fresh = [p for p in going if p["status"]["phase"] not in ("Succeeded", "Failed")]
        return fresh[0] if fresh else None

    return wait_for(look, "a pod of the Job on the node")


def succeed(stage, pod: dict[str, Any]) -> None:
    end = {"exitCode": 0, "reason": "Completed", "startedAt": None, "finishedAt": None}
    container = {"name": "engine", "ready": False, "restartCount": 0, "image": "x", "imageID": ""}
    container["state"] = {"terminated": end}
    status = {"phase": "Succeeded", "containerStatuses": [container]}
    stage.api.merge(stage.path("pods", pod["metadata"]["name"], "status"), {"status": status})


def test_a_model_is_downloaded_before_pods_ask_for_gpus(operator, stage):
    stage.serve(cache=SHARED)
    stage.wait_condition("ModelCached", "False", "ClaimPending")
    assert stage.get("deployments", "qwen") is None
    volume_for(stage)
    pod = prefetch_pod(stage)
    address = stage.run_pod(pod, ready=True)  # it has no probe that would say otherwise
    stage.engines.say(address, says(EngineStage.DOWNLOADING, 61, done=61 * 2**20, total=100 * 2**20, eta=40.0))

    def told() -> dict[str, Any] | None:
        found = stage.condition("ModelCached")
        return found if "61 %" in found["message"] else None

    condition = wait_for(told, "the progress on the resource")
    assert condition["reason"] == "Prefetching"
    assert stage.condition("Ready")["reason"] == "Prefetching"
    assert stage.status()["phase"] == "Downloading"
    assert stage.get("deployments", "qwen") is None
    succeed(stage, pod)

    (engine,) = stage.wait_pods(1)
    stage.up(engine)
    stage.wait_condition("Ready", "True", "AllReplicasReady")
    stage.wait_condition("ModelCached", "True", "InStore")
    stage.wait_condition("Progressing", "False", "Settled")


def test_why_a_download_fails_is_on_the_resource_and_it_goes_on_by_itself(operator, stage):
    stage.serve(cache=SHARED)
    volume_for(stage)
    pod = prefetch_pod(stage)
    gated = Failure(FailureCode.MODEL_GATED, "org/name is gated.", "accept its terms and set HF_TOKEN")
    stage.crash_pod(pod, gated.to_json(), exit_code=21)

    condition = stage.wait_condition("ModelCached", "False", "ModelGated")
    assert "accept its terms" in condition["message"]
    assert "accept its terms" in stage.condition("Ready")["message"]
    stage.run_pod(pod, restarts=1)
    succeed(stage, pod)
    stage.wait_pods(1)


def test_another_revision_is_downloaded_while_the_pods_of_the_one_before_go_on(operator, stage):
    stage.serve(cache=SHARED)
    volume_for(stage)
    succeed(stage, prefetch_pod(stage))
    (engine,) = stage.wait_pods(1)
    stage.up(engine)
    stage.wait_condition("Progressing", "False", "Settled")
    first = stage.get("jobs", "qwen")["metadata"]["uid"]
    stage.patch("qwen", {"model": {"revision": "v2"}})
    pod = wait_for(lambda: another(stage, first), "a Job of the new revision")

    stage.wait_condition("Progressing", "True", "Prefetching")
    assert stage.condition("Ready")["status"] == "True"
    assert [p["metadata"]["name"] for p in stage.wait_pods(1)] == [engine["metadata"]["name"]]
    assert "--revision=v2" in pod["spec"]["template"]["spec"]["containers"][0]["args"]
    succeed(stage, prefetch_pod(stage))
    wait_for(
        lambda: "--revision=v2" in str(stage.get("deployments", "qwen")["spec"]["template"]), "the rollout to begin"
    )


def another(stage, uid: str) -> dict[str, Any] | None:
    found = stage.get("jobs", "qwen")
    return found if found and found["metadata"]["uid"] != uid else None


def test_a_server_that_is_suspended_stops_at_once_and_not_after_the_download(operator, stage):
    stage.serve(cache=SHARED)
    volume_for(stage)
    succeed(stage, prefetch_pod(stage))
    stage.wait_pods(1)
    stage.patch("qwen", {"model": {"revision": "v2"}, "suspend": True})

    wait_for(lambda: stage.get("deployments", "qwen")["spec"]["replicas"] == 0, "no replicas")


def test_without_prefetching_the_job_goes_and_a_retained_claim_is_found_again(operator, stage):
    retained = {**SHARED, "deletionPolicy": "Retain"}
    stage.serve(cache=retained, replicas=0)
    wait_for(lambda: stage.get("jobs", "qwen"), "the Job")
    claim = wait_for(lambda: stage.get("persistentvolumeclaims", "qwen"), "the claim")
    stage.patch("qwen", {"cache": {"prefetch": False}})
    wait_for(lambda: stage.get("jobs", "qwen") is None, "the Job to be gone")
    stage.delete("llmservers", "qwen")
    wait_for(lambda: stage.get("services", "qwen") is None, "the Service to be collected")
    stage.serve(cache={**retained, "prefetch": False})
    wait_for(lambda: stage.get("deployments", "qwen"), "a Deployment")

    assert stage.get("persistentvolumeclaims", "qwen")["metadata"]["uid"] == claim["metadata"]["uid"]
    assert "NameTaken" not in str(stage.status())


def test_ways_in_come_and_go_with_their_fields(operator, stage):
    stage.serve(expose={"ingress": {"hostname": "llm.example.com"}, "networkPolicy": {}})
    ingress = wait_for(lambda: stage.get("ingresses", "qwen"), "the Ingress")
    policy = wait_for(lambda: stage.get("networkpolicies", "qwen"), "the NetworkPolicy")
    stage.api.request("DELETE", stage.path("ingresses", "qwen"))
    wait_for(
        lambda: (stage.get("ingresses", "qwen") or ingress)["metadata"]["uid"] != ingress["metadata"]["uid"],
        "the Ingress to be made again",
    )
    stage.patch("qwen", {"expose": None})

    wait_for(lambda: stage.get("ingresses", "qwen") is None, "the Ingress to be gone")
    wait_for(lambda: stage.get("networkpolicies", "qwen") is None, "the NetworkPolicy to be gone")
    assert policy["spec"]["podSelector"] == {"matchLabels": {"octavo.dev/server": "qwen"}}


@pytest.mark.slow
def test_a_route_waits_for_its_kind_and_says_so(operator, stage, api):
    stage.serve(expose={"gateway": {"parentRefs": [{"name": "g"}]}})
    condition = stage.wait_condition("Ready", "False", "KindMissing")
    assert "install the Gateway API" in condition["message"]

    with_definition(api, "httproutes", "HTTPRoute", "gateway.networking.k8s.io")
    try:
        route = wait_for(lambda: stage.get("httproutes", "qwen"), "the route")
        assert route["spec"]["rules"][0]["backendRefs"] == [{"name": "qwen", "port": 80}]
        wait_for(lambda: stage.condition("Ready")["reason"] != "KindMissing", "the cause to be gone")
        stage.patch("qwen", {"expose": None})
        wait_for(lambda: stage.get("httproutes", "qwen") is None, "the route to be gone")
    finally:
        api.request(
            "DELETE", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/httproutes.gateway.networking.k8s.io"
        )


def with_definition(api, plural: str, kind: str, group: str) -> None:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    version = {"name": "v1", "served": True, "storage": True, "schema": schema}
    # A group of k8s.io is kept for those whom the community has approved.
    approved = {"api-approved.kubernetes.io": "unapproved, a test's"}
    body = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}", "annotations": approved},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural},
            "versions": [version],
        },
    }
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    api.request("POST", path, body)
    wait_for(lambda: is_served(api.request("GET", f"{path}/{plural}.{group}")), "the kind to be served")
