"""The operator among many GPUs, on nodes whose kubelet KWOK plays: pods become ready there."""

from __future__ import annotations

import pytest
from fixtures import built
from stage import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def kwok(cluster, engines):
    built("kwok")
    cluster.start_kwok()
    engines.answer_for_kwok()


def running(stage) -> int:
    return sum(pod.get("status", {}).get("phase") == "Running" for pod in stage.pods())


def test_what_does_not_fit_on_many_gpus_waits_until_a_node_comes(operator, kwok, stage):
    for number in range(3):
        stage.add_node(f"{stage.node}-gpu-{number}", gpus=8, kwok=True)
    stage.serve(replicas=25, hardware={"gpus": 1, "nodeSelector": {"octavo.dev/staged": stage.node}})
    found = stage.wait_condition("Schedulable", "False", "InsufficientGPU")
    wait_for(lambda: running(stage) == 24, "24 pods that run", every_s=0.2)
    wait_for(lambda: stage.status()["pods"][0]["stage"] == "pending", "the waiting pod to be told first")

    assert "no nvidia.com/gpu free, and each pod needs 1" in found["message"]
    # KWOK calls its pods ready, and the stand-in answers for their engines.
    wait_for(lambda: stage.status().get("ready") == "24/25", "24 that are ready", every_s=0.2)
    assert stage.status()["phase"] == "Degraded"
    assert {pod["stage"] for pod in stage.status()["pods"]} == {"pending", "ready"}

    stage.add_node(f"{stage.node}-gpu-3", gpus=8, kwok=True)
    wait_for(lambda: running(stage) == 25, "the last pod to run on the new node", every_s=0.2)
    stage.wait_condition("Schedulable", "True", "Scheduled")
