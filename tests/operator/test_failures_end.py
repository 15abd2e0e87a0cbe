"""Each cause of failure on a real API server: told with its fix, then taken away, and the server is Ready by itself.

Nobody touches the LLMServer after it is applied. What only a kubelet can say is in test_on_a_real_node.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from stage import certificate, says, wait_for

from octavo_engine.status import Failure, FailureCode, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(180), pytest.mark.usefixtures("operator")]


@dataclass(frozen=True)
class Case:
    spec: dict[str, Any]
    type: str
    reason: str
    says: tuple[str, ...]
    mend: Callable[[Any], None]
    break_: Callable[[Any], None] = lambda stage: None


def staged(stage, name):
    return f"/api/v1/nodes/{stage.node}{name}"


def quota(stage):
    stage.create("resourcequotas", {"metadata": {"name": "small"}, "spec": {"hard": {"pods": "0"}}})
    wait_for(lambda: stage.get("resourcequotas", "small").get("status", {}).get("hard"), "the quota")


POLICY = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolic"


def policy(stage):
    match = {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"]}]}
    match["resourceRules"][0]["resources"] = ["pods"]
    match["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": stage.namespace}}
    rule = {"expression": "false", "message": "pods need a cost centre"}
    spec = {"matchConstraints": match, "validations": [rule], "failurePolicy": "Fail"}
    stage.api.request("POST", f"{POLICY}ies", {"metadata": {"name": stage.namespace}, "spec": spec})
    binding = {"policyName": stage.namespace, "validationActions": ["Deny"]}
    stage.api.request("POST", f"{POLICY}ybindings", {"metadata": {"name": stage.namespace}, "spec": binding})

    def refused():
        try:
            pod = {"metadata": {"name": "try"}, "spec": {"containers": [{"name": "x", "image": "x"}]}}
            stage.api.request("POST", f"{stage.path('pods')}?dryRun=All", pod)
        except Exception as error:  # noqa: BLE001 -- the API's own, which a policy that is in force makes
            return "cost centre" in str(error) or None
        return None

    wait_for(refused, "the policy to be in force", every_s=0.2)


def no_policy(stage):
    for kind in ("ybindings", "ies"):
        stage.api.request("DELETE", f"{POLICY}{kind}/{stage.namespace}")


def claim(stage):
    volume = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume |= {"hostPath": {"path": "/tmp"}, "claimRef": {"namespace": stage.namespace, "name": "models"}}
    stage.api.request("POST", "/api/v1/persistentvolumes", {"metadata": {"name": stage.namespace}, "spec": volume})
    asked = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "resources": {"requests": {"storage": "1Gi"}}}
    path = f"/api/v1/namespaces/{stage.namespace}/persistentvolumeclaims"
    stage.api.request("POST", path, {"metadata": {"name": "models"}, "spec": asked})


def taint(stage):
    taints = [{"key": "broken", "effect": "NoSchedule", "value": "yes"}]
    stage.api.merge(staged(stage, ""), {"spec": {"taints": taints}})


CASES = {
    "no GPU": Case(
        {"hardware": {"gpus": 1}},
        "Schedulable",
        "InsufficientGPU",
        ("1 of 2 nodes has no nvidia.com/gpu free, and each pod needs 1", "add nodes"),
        lambda stage: stage.add_node(f"{stage.node}-gpu", gpus=1),
    ),
    "too little CPU": Case(
        {"hardware": {"resources": {"requests": {"cpu": "65"}}}},
        "Schedulable",
        "InsufficientCPU",
        ("1 of 2 nodes has too little cpu free", "hardware.resources.requests"),
        lambda stage: stage.add_node(f"{stage.node}-big", cpu="128"),
    ),
    "a selector that no node has": Case(
        {"hardware": {"nodeSelector": {"gpu": "h900"}}},
        "Schedulable",
        "NoMatchingNode",
        ("No node of 2 takes the pod", "hardware.nodeSelector"),
        lambda stage: stage.api.merge(staged(stage, ""), {"metadata": {"labels": {"gpu": "h900"}}}),
    ),
    "a taint": Case(
        {},
        "Schedulable",
        "UntoleratedTaint",
        ("untolerated taint", "hardware.tolerations"),
        lambda stage: stage.api.merge(staged(stage, ""), {"spec": {"taints": None}}),
        taint,
    ),
    "a quota": Case(
        {},
        "Schedulable",
        "QuotaExceeded",
        ("small", "raise the ResourceQuota"),
        lambda stage: stage.delete("resourcequotas", "small"),
        quota,
    ),
    "a policy of admission": Case(
        {}, "Schedulable", "AdmissionRefused", ("pods need a cost centre",), no_policy, policy
    ),
    "no claim": Case(
        {"model": {"source": "pvc://models/folder"}},
        "ModelCached",
        "ClaimMissing",
        ("PersistentVolumeClaim models was not found", "create it in this namespace"),
        claim,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_keeps_pods_from_running_is_told_and_over_when_it_is_mended(stage, case):
    case.break_(stage)
    stage.serve(**case.spec)
    told = stage.wait_condition(case.type, "False", case.reason)
    ready = stage.condition("Ready")
    stage.wait_event("Warning", case.reason)
    generation = stage.get("llmservers", "qwen")["metadata"]["generation"]
    case.mend(stage)
    with stage.kubelet():
        # The ReplicaSet's controller comes back to a refusal after a growing while.
        stage.wait_condition("Ready", "True", "AllReplicasReady")
        stage.wait_condition("Progressing", "False", "Settled")

    for words in case.says:
        assert words in told["message"]
    assert (ready["status"], ready["reason"]) == ("False", case.reason)
    assert stage.condition("Schedulable")["status"] == "True"
    assert stage.get("llmservers", "qwen")["metadata"]["generation"] == generation
    assert stage.events().count(("Warning", case.reason)) == 1


ENDS = {
    "host memory": (("", 137, "OOMKilled"), "Ready", "OOMKilled", "set hardware.resources.requests.memory"),
    "a stalled download": (
        (Failure(FailureCode.DOWNLOAD_STALLED, "No byte came for 60 s.", "check the proxy"), 0, "Error"),
        "ModelCached",
        "DownloadStalled",
        "Fix: check the proxy",
    ),
    "a corrupt file": (
        (Failure(FailureCode.WEIGHTS_CORRUPT, "x.safetensors is cut short.", "download it again"), 0, "Error"),
        "ModelCached",
        "WeightsCorrupt",
        "Fix: download it again",
    ),
    "a cache too small": (
        (Failure(FailureCode.KV_CACHE_TOO_SMALL, "Too small.", "set --max-model-len <= 9216"), 0, "Error"),
        "Fits",
        "KvCacheTooSmall",
        "Fix: set spec.engine.maxModelLen <= 9216",
    ),
    "a crash": (("RuntimeError: boom", 1, "Error"), "Ready", "Exited", "its last words: RuntimeError: boom"),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_an_engine_that_ends_is_told_with_the_fix_and_ready_when_it_comes_up(stage, end):
    (words, status, why), kind, reason, fix = end
    stage.serve()
    (pod,) = stage.wait_pods(1)
    address = stage.run_pod(pod)
    stage.engines.say(address, says(Stage.DOWNLOADING, 10))
    wait_for(lambda: stage.status().get("phase") == "Downloading", "the download")
    if isinstance(words, Failure):
        stage.crash_pod(pod, certificate(words), words.code.exit_status, why)
    else:
        stage.crash_pod(pod, words, status, why)
    told = stage.wait_condition(kind, "False", reason)
    failure = stage.status()["lastFailure"]
    stage.up(pod)
    stage.wait_condition("Ready", "True", "AllReplicasReady")

    assert fix in told["message"]
    assert failure["pod"] == pod["metadata"]["name"]
    assert stage.status()["lastFailure"] == failure
    stage.wait_event("Warning", reason)


def test_a_node_that_is_lost_is_named_and_the_pod_counts_again_when_it_is_back(stage):
    stage.serve()
    (pod,) = stage.wait_pods(1)
    address = stage.up(pod)
    stage.wait_condition("Ready", "True", "AllReplicasReady")
    stage.engines.say(address, None)
    stage.lose_node()
    told = stage.wait_condition("Ready", "False", "NodeLost")
    stage.find_node()
    stage.up(pod)
    stage.wait_condition("Ready", "True", "AllReplicasReady")

    assert f"The node {stage.node} is not ready" in told["message"]
    assert "kubectl describe node" in told["message"]
    assert stage.pods()[0]["metadata"]["uid"] == pod["metadata"]["uid"]
