"""What a real kubelet says of pods that do not come up, and what becomes of it on the resource.

The image is the cluster's own pause: it is on the node, runs as any user, and answers nobody.
"""

from __future__ import annotations

from pathlib import Path

import images
import pytest
from stage import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("operator")]

NODE_FILES = Path(__file__).resolve().parents[1] / "cluster/node"
PAUSE = {"image": "localhost/pause:1"}
NODE = {"nodeSelector": {"kubernetes.io/hostname": "node1"}}


def serve(stage, **spec):
    hardware = NODE | {"gpus": 0} | spec.pop("hardware", {})
    engine = PAUSE | spec.pop("engine", {})
    lifecycle = {"drainTimeoutSeconds": 0}
    body = {"model": {"source": "hf://org/name"}, "engine": engine, "hardware": hardware, "lifecycle": lifecycle}
    metadata = {"name": "qwen"}
    document = {"apiVersion": "octavo.dev/v1alpha1", "kind": "LLMServer", "metadata": metadata, "spec": body | spec}
    return stage.create("llmservers", document)


def test_four_gpus_are_given_and_the_fifth_pod_waits_with_the_reason(stage):
    serve(stage, replicas=5, hardware={"gpus": 1})
    found = stage.wait_condition("Schedulable", "False", "InsufficientGPU")
    wait_for(lambda: sum("node" in pod for pod in stage.status()["pods"]) == 4, "four pods on the node")

    assert "no nvidia.com/gpu free, and each pod needs 1" in found["message"]
    assert "free one, add nodes, or lower replicas or hardware.gpus" in found["message"]
    assert stage.status()["pods"][0]["stage"] == "pending"
    assert stage.condition("Ready")["reason"] == "InsufficientGPU"


@pytest.fixture(scope="module")
def engine(cluster) -> str:
    """An image on the node that answers as an engine does (tests/cluster/node/engine.c)."""
    archive = images.program_archive(NODE_FILES / "engine.c", "localhost/engine:1")
    cluster.run(["ctr", "-n", "k8s.io", "images", "import", str(archive)])
    return "localhost/engine:1"


def test_a_claim_that_is_not_there_is_named_and_its_coming_is_enough(stage, engine):
    serve(stage, model={"source": "pvc://models/folder"}, engine={"image": engine})
    found = stage.wait_condition("Schedulable", "False", "ClaimMissing")
    cached = stage.condition("ModelCached")
    volume = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume |= {"hostPath": {"path": "/tmp"}, "claimRef": {"namespace": stage.namespace, "name": "models"}}
    volumes = "/api/v1/persistentvolumes"
    stage.api.request("POST", volumes, {"metadata": {"name": stage.namespace}, "spec": volume})
    try:
        asked = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        asked["resources"] = {"requests": {"storage": "1Gi"}}
        stage.create("persistentvolumeclaims", {"metadata": {"name": "models"}, "spec": asked})
        stage.wait_condition("Ready", "True", "AllReplicasReady")
        on_claim = stage.wait_condition("ModelCached", "True", "OnClaim")
    finally:
        stage.api.request("DELETE", f"{volumes}/{stage.namespace}")

    assert "PersistentVolumeClaim models was not found" in found["message"]
    assert "create it in this namespace" in found["message"]
    assert cached["reason"] == "ClaimMissing"
    assert "PersistentVolumeClaim models" in on_claim["message"]


def test_a_config_map_that_is_not_there_is_named_and_its_coming_is_enough(stage, engine):
    reference = {"valueFrom": {"configMapKeyRef": {"name": "settings", "key": "level"}}}
    container = {"name": "engine", "env": [{"name": "LEVEL", **reference}]}
    container["volumeMounts"] = [{"name": "settings", "mountPath": "/settings"}]
    volumes = [{"name": "settings", "configMap": {"name": "settings", "optional": True}}]
    serve(stage, engine={"image": engine}, podTemplate={"spec": {"containers": [container], "volumes": volumes}})
    found = stage.wait_condition("Ready", "False", "ConfigMapMissing")
    maps = f"/api/v1/namespaces/{stage.namespace}/configmaps"
    stage.api.request("POST", maps, {"metadata": {"name": "settings"}, "data": {"other": "x"}})
    key = stage.wait_condition("Ready", "False", "ConfigMapKeyMissing")
    stage.api.merge(f"{maps}/settings", {"data": {"level": "info"}})
    stage.wait_condition("Ready", "True", "AllReplicasReady")

    assert "The ConfigMap settings was not found in this namespace: create it" in found["message"]
    assert "The ConfigMap settings has no key level: add it" in key["message"]
    stage.wait_event("Warning", "ConfigMapMissing")


def test_a_config_map_of_files_that_is_not_there_is_named(stage, engine):
    container = {"name": "engine", "volumeMounts": [{"name": "files", "mountPath": "/files"}]}
    spec = {"containers": [container], "volumes": [{"name": "files", "configMap": {"name": "files"}}]}
    serve(stage, engine={"image": engine}, podTemplate={"spec": spec})
    found = stage.wait_condition("Ready", "False", "ConfigMapMissing")

    assert "The ConfigMap files was not found" in found["message"]


def test_an_image_that_cannot_be_pulled_is_named_and_its_coming_is_enough(stage, cluster, engine):
    image = "localhost:1/no/engine:1"
    serve(stage, engine={"image": image})
    found = stage.wait_condition("Ready", "False", "ImagePull")
    cluster.run(["ctr", "-n", "k8s.io", "images", "tag", engine, image])
    try:
        stage.wait_condition("Ready", "True", "AllReplicasReady")
    finally:
        cluster.run(["ctr", "-n", "k8s.io", "images", "rm", image])

    assert "localhost:1/no/engine:1" in found["message"]
    assert "engine.image" in found["message"]
    stage.wait_event("Warning", "ImagePull")


def test_host_memory_that_ends_is_told_and_the_next_start_is_seen(stage, engine):
    limits = {"resources": {"limits": {"memory": "32Mi"}}}
    serve(stage, engine={"image": engine, "args": ["--seed=1"]}, hardware=limits)
    for _ in range(3):
        stage.wait_condition("Ready", "True", "AllReplicasReady")
        failure = stage.status()["lastFailure"]
        if failure["code"] == "OOM_KILLED":
            break
        # containerd 1.6 sometimes sees the end before the kernel's word on it, and the kubelet then says 137.
        assert "if nobody killed it, memory ended" in failure["fix"]
        (pod,) = stage.pods()
        stage.delete("pods", pod["metadata"]["name"])
        wait_for(
            lambda gone=pod["metadata"]["uid"]: gone not in {p["metadata"]["uid"] for p in stage.pods()}, "its end"
        )
        wait_for(lambda: stage.condition("Ready")["status"] == "False", "the new pod to be seen")

    assert failure["code"] == "OOM_KILLED"
    assert "at its memory limit of 32Mi" in failure["message"]
    assert "hardware.resources.limits.memory" in failure["fix"]
    stage.wait_event("Warning", "OOMKilled")


def test_a_death_certificate_is_read_from_a_real_termination_log(stage, engine):
    serve(stage, engine={"image": engine, "args": ["--seed=2"]})
    stage.wait_condition("Ready", "True", "AllReplicasReady")
    failure = stage.status()["lastFailure"]

    assert (failure["code"], failure["fix"]) == ("WEIGHTS_CORRUPT", "download it again")
    stage.wait_event("Warning", "WeightsCorrupt")


def test_a_token_secret_that_is_not_there_is_named_and_its_coming_is_seen(stage, engine):
    model = {"source": "hf://org/name", "tokenSecretRef": {"name": "hf"}}
    serve(stage, model=model, engine={"image": engine})
    found = stage.wait_condition("Ready", "False", "SecretMissing")
    stage.create("secrets", {"metadata": {"name": "hf"}, "stringData": {"other": "x"}})
    key = stage.wait_condition("Ready", "False", "SecretKeyMissing")
    stage.api.merge(stage.path("secrets", "hf"), {"stringData": {"token": "x"}})
    stage.wait_condition("Ready", "True", "AllReplicasReady")

    assert "The Secret hf was not found" in found["message"]
    assert "The Secret hf has no key token" in key["message"]


def test_a_secret_of_keys_that_is_not_there_is_named(stage):
    serve(stage, expose={"apiKeysSecretRef": {"name": "keys"}})
    found = stage.wait_condition("Ready", "False", "SecretMissing")

    assert "The Secret keys was not found" in found["message"]


def test_an_engine_that_does_not_answer_is_called_unreachable(stage):
    serve(stage)

    def unreachable():
        pods = stage.status().get("pods")
        return pods and pods[0]["stage"] == "unreachable"

    wait_for(unreachable, "the stage")
    assert "does not answer on the management port" in stage.condition("Ready")["message"]


def test_a_killed_container_is_told_with_its_signal(stage, cluster):
    serve(stage)
    wait_for(lambda: (stage.status().get("pods") or [{}])[0].get("stage") == "starting", "it to run")
    (pod,) = stage.pods()
    container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    cluster.run(["ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", container])
    found = stage.wait_condition("Ready", "False", "Exited")

    assert "status 137 (SIGKILL)" in found["message"]
    assert wait_for(lambda: stage.status()["pods"][0].get("restarts"), "the restart", 60) >= 1
    assert stage.status()["lastFailure"]["pod"] == pod["metadata"]["name"]
