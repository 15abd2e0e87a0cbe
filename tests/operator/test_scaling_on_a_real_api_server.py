"""The operator scales by what engines say, and leaves replicas alone where others do."""

from __future__ import annotations

import time

import pytest
from stage import ApiError, says, wait_for

from octavo_engine.status import Load, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]


def replicas(stage):
    return stage.get("llmservers", "qwen")["spec"]["replicas"]


def test_a_queue_brings_a_second_replica_within_seconds_and_idleness_takes_both(stage):
    bounds = {"minReplicas": 0, "maxReplicas": 3, "scaleDownDelaySeconds": 1, "idleSeconds": 10}
    stage.serve(autoscaling=bounds)
    (pod,) = stage.wait_pods(1)
    address = stage.up(pod, load=Load(running=8, waiting=20, predicted_queue_s=3.9))
    began = time.monotonic()
    pods = stage.wait_pods(2)
    took_s = time.monotonic() - began
    time.sleep(3)
    stays = replicas(stage)
    (second,) = [p for p in pods if p["metadata"]["uid"] != pod["metadata"]["uid"]]
    stage.up(second)
    stage.engines.say(address, says(Stage.READY, load=Load()))
    with stage.kubelet():
        wait_for(lambda: replicas(stage) == 0, "no replicas")
        stage.wait_condition("Ready", "False", "ScaledToZero")

    print(f"from a queue to the second pod: {took_s:.1f} s")
    assert took_s < 10  # 0.4 s on a quiet machine
    assert stays == 2
    stage.wait_event("Normal", "Scaled")


def test_without_autoscaling_nobody_but_its_owner_writes_replicas(stage):
    stage.serve()
    (pod,) = stage.wait_pods(1)
    stage.up(pod, load=Load(running=8, waiting=200, predicted_queue_s=60.0))
    stage.wait_condition("Ready", "True", "AllReplicasReady")
    stage.api.merge(stage.path("llmservers", "qwen", "scale"), {"spec": {"replicas": 2}})
    stage.wait_pods(2)
    time.sleep(3)

    managers = {entry["manager"]: entry for entry in stage.get("llmservers", "qwen")["metadata"]["managedFields"]}
    assert replicas(stage) == 2
    assert stage.get("deployments", "qwen")["spec"]["replicas"] == 2
    assert "f:spec" not in managers["octavo-operator"]["fieldsV1"]


def test_an_hpa_is_made_and_goes_with_the_wish_for_it(stage):
    stage.serve(autoscaling={"mode": "HPA", "maxReplicas": 4})
    path = f"/apis/autoscaling/v2/namespaces/{stage.namespace}/horizontalpodautoscalers/qwen"
    hpa = wait_for(lambda: stage.api.get(path), "the HPA")
    # It finds its scale and its pods' selector; what it lacks here is the metrics' adapter.
    wait_for(lambda: "AbleToScale" in str(stage.api.get(path).get("status")), "the HPA's controller to look")
    able = {c["type"]: c for c in stage.api.get(path)["status"]["conditions"]}["AbleToScale"]
    stage.patch("qwen", {"autoscaling": None})
    wait_for(lambda: stage.api.get(path) is None, "the HPA to be gone")

    assert hpa["spec"]["maxReplicas"] == 4
    assert able["status"] == "True"


@pytest.mark.parametrize(
    ("autoscaling", "message"),
    [
        ({"minReplicas": 3, "maxReplicas": 2}, "must not be above autoscaling.maxReplicas"),
        ({"mode": "HPA", "minReplicas": 0, "maxReplicas": 2}, "which an HPA cannot do"),
        ({"mode": "KEDA", "maxReplicas": 2}, "belongs to mode KEDA"),
        ({"mode": "HPA", "maxReplicas": 2, "scaleDownDelaySeconds": 3601}, "the most that an HPA takes"),
        ({"maxReplicas": 2, "prometheusAddress": "http://p"}, "belongs to mode KEDA"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_would_be_right(stage, autoscaling, message):
    with pytest.raises(ApiError, match=message):
        stage.serve(autoscaling=autoscaling)
