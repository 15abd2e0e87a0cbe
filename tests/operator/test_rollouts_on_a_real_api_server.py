"""Rollouts as the cluster's own controllers and scheduler carry them out, with staged pods."""

from __future__ import annotations

import time

import pytest
from stage import Operator, certificate, says, wait_for

from octavo_engine.status import Failure, FailureCode, Load, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]


def up_and_settled(stage, **spec):
    stage.serve(**spec)
    pods = stage.wait_pods(spec.get("replicas", 1))
    for pod in pods:
        stage.up(pod)
    stage.wait_condition("Progressing", "False", "Settled")
    return pods


def newest(stage, than):
    known = {pod["metadata"]["uid"] for pod in than}
    return wait_for(lambda: next((p for p in stage.pods() if p["metadata"]["uid"] not in known), None), "a new pod")


def on_node(stage, name):
    def look():
        pod = stage.get("pods", name)
        return pod if pod and pod["spec"].get("nodeName") else None

    return wait_for(look, f"{name} on a node")


def test_a_surge_without_a_free_gpu_goes_on_in_place_and_says_why(stage):
    stage.add_node(f"{stage.node}-gpu", gpus=1)
    gpu = {"gpus": 1, "nodeSelector": {"octavo.dev/staged": stage.node}}
    (old,) = up_and_settled(stage, hardware=gpu, engine={"maxModelLen": 2048})
    stage.patch("qwen", {"engine": {"maxModelLen": 1024}})
    fresh = newest(stage, [old])
    still_there = "deletionTimestamp" not in stage.get("pods", old["metadata"]["name"])["metadata"]
    wait_for(lambda: stage.status().get("revision", {}).get("strategy") == "InPlace", "the change of mind")
    wait_for(lambda: "deletionTimestamp" in stage.get("pods", old["metadata"]["name"])["metadata"], "the old pod to go")
    why = stage.status()["revision"]["reason"]
    stage.forget(old["metadata"]["name"])
    stage.up(on_node(stage, fresh["metadata"]["name"]))
    stage.wait_condition("Progressing", "False", "Settled")

    assert still_there
    assert "replaced in place, as there is no room for one more" in why
    assert "no nvidia.com/gpu free" in why
    assert stage.condition("Verified")["status"] == "True"


def test_a_revision_that_does_not_come_up_is_rolled_back_and_a_corrected_one_is_tried(stage):
    (old,) = up_and_settled(stage, engine={"maxModelLen": 2048})
    verified = stage.status()["revision"]["verified"]
    stage.patch("qwen", {"engine": {"maxModelLen": 4096}})
    fresh = on_node(stage, newest(stage, [old])["metadata"]["name"])
    failure = Failure(FailureCode.KV_CACHE_TOO_SMALL, "The KV cache is too small.", "set --max-model-len <= 2048")
    stage.crash_pod(fresh, certificate(failure), FailureCode.KV_CACHE_TOO_SMALL.exit_status, restarts=2)
    told = stage.wait_condition("Progressing", "False", "RolledBack")
    wait_for(lambda: "deletionTimestamp" in stage.get("pods", fresh["metadata"]["name"])["metadata"], "it to go")
    stage.forget(fresh["metadata"]["name"])
    wait_for(lambda: len(stage.status().get("pods", [])) == 1, "one pod")
    time.sleep(2)
    stays, ready, revision = len(stage.pods()), stage.condition("Ready"), stage.status()["revision"]
    stage.patch("qwen", {"engine": {"maxModelLen": 1024}})
    stage.up(on_node(stage, newest(stage, [old])["metadata"]["name"]))
    with stage.kubelet():
        stage.wait_condition("Progressing", "False", "Settled")

    assert "Rolled back to the last revision that worked" in told["message"]
    assert "spec.engine.maxModelLen <= 2048" in told["message"]
    assert stays == 1
    assert ready["status"] == "True"
    assert revision["current"] == revision["verified"] == verified
    assert revision["failed"] not in (None, verified)
    assert stage.status()["lastFailure"]["code"] == "KV_CACHE_TOO_SMALL"
    assert "failed" not in stage.status()["revision"]
    stage.wait_event("Warning", "RolledBack")


def test_a_change_waits_for_the_queue_to_be_empty_when_asked_to(stage):
    (pod,) = up_and_settled(stage, rollout={"waitForIdle": True}, engine={"maxModelLen": 2048})
    address = stage.up(pod, load=Load(running=1, waiting=3))
    wait_for(lambda: stage.status()["pods"][0].get("queued") == 3, "the load to be known")
    stage.patch("qwen", {"engine": {"maxModelLen": 1024}})
    told = stage.wait_condition("Progressing", "True", "WaitingForIdle")
    time.sleep(2)
    waits = len(stage.pods())
    stage.engines.say(address, says(Stage.READY, load=Load()))
    newest(stage, [pod])

    assert "4 do" in told["message"]
    assert waits == 1


def test_the_idlest_pods_end_first(stage):
    pods = up_and_settled(stage, replicas=3)
    loads = (5, 0, 2)
    for pod, running in zip(pods, loads, strict=True):
        stage.up(pod, load=Load(running=running))
    wait_for(lambda: sorted(p.get("running", 0) for p in stage.status()["pods"]) == [0, 2, 5], "the loads")
    stage.api.merge(stage.path("llmservers", "qwen", "scale"), {"spec": {"replicas": 1}})

    def going():
        found = {p["metadata"]["name"] for p in stage.pods() if "deletionTimestamp" in p["metadata"]}
        return found if len(found) == 2 else None

    assert wait_for(going, "two pods to go") == {pods[1]["metadata"]["name"], pods[2]["metadata"]["name"]}


def test_another_operator_leaves_running_engines_alone_until_it_is_asked(stage, cluster, operator):
    (pod,) = up_and_settled(stage)
    operator.stop()
    upgraded = Operator(cluster, "operator", port=18081, OCTAVO_ENGINE_IMAGE="octavo/octavo-engine:next")
    try:
        upgraded.wait_leading()
        available = stage.wait_condition("UpdateAvailable", "True", "OperatorChanged")
        stage.api.merge(stage.path("llmservers", "qwen", "scale"), {"spec": {"replicas": 2}})
        (second,) = [p for p in stage.wait_pods(2) if p["metadata"]["uid"] != pod["metadata"]["uid"]]
        stage.up(second)
        stage.wait_condition("Progressing", "False", "Settled")
        images = {p["spec"]["containers"][0]["image"] for p in stage.pods()}
        untouched = pod["metadata"]["uid"] in {p["metadata"]["uid"] for p in stage.pods()}
        stage.patch("qwen", {"restart": {"id": "upgrade"}})
        third = newest(stage, [pod, second])
        stage.wait_condition("UpdateAvailable", "False", "UpToDate")
    finally:
        upgraded.stop()
        # The one that the other tests of this file act with.
        operator.__init__(cluster, "operator", port=18080)
        operator.wait_leading()

    assert "restart.id" in available["message"]
    assert untouched
    assert images == {pod["spec"]["containers"][0]["image"]}
    assert third["spec"]["containers"][0]["image"] == "octavo/octavo-engine:next"
