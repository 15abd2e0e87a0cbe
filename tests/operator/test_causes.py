"""From Kubernetes' many wordings to one reason and one sentence with the next step."""

from __future__ import annotations

import pytest
from build import end, pod

from octavo_engine.status import Failure, FailureCode
from octavo_operator.causes import (
    About,
    Wanted,
    alteration,
    cause_of,
    not_scaling,
    refusal_of_object,
    refusal_of_pods,
)
from octavo_operator.failures import last_failure
from octavo_operator.observed import PodEvent
from octavo_operator.report import LastFailure, PodStatus

WANTED = Wanted("nvidia.com/gpu", 1, "4Gi", "models")
EIGHT = Wanted("nvidia.com/gpu", 8, None, None)


@pytest.mark.parametrize(
    ("message", "wanted", "reason", "words"),
    [
        (
            "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. no new claims to deallocate, preemption: 0/1 "
            "nodes are available: 1 No preemption victims found for incoming pod.",
            WANTED,
            "InsufficientGPU",
            "1 of 1 node has no nvidia.com/gpu free, and each pod needs 1: free one",
        ),
        (
            "0/5 nodes are available: 1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, 2 "
            "Insufficient nvidia.com/gpu, 2 node(s) didn't match Pod's node affinity/selector. preemption: 0/5 nodes "
            "are available: 5 Preemption is not helpful for scheduling.",
            EIGHT,
            "InsufficientGPU",
            "2 of 5 nodes have too few nvidia.com/gpu free, and each pod needs 8 (1 node(s) had untolerated taint",
        ),
        ("0/2 nodes are available: 2 Insufficient cpu.", WANTED, "InsufficientCPU", "2 of 2 nodes have too little cpu"),
        (
            "0/3 nodes are available: 1 Insufficient memory, 2 node(s) were unschedulable.",
            WANTED,
            "InsufficientMemory",
            "1 of 3 nodes has too little memory free (2 node(s) were unschedulable)",
        ),
        (
            "0/2 nodes are available: 2 node(s) had untolerated taint {gpu: yes}.",
            WANTED,
            "UntoleratedTaint",
            "add hardware.tolerations",
        ),
        (
            "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector. no new claims to "
            "deallocate, preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling.",
            WANTED,
            "NoMatchingNode",
            "No node of 1 takes the pod: 1 node(s) didn't match Pod's node affinity/selector. Next: correct",
        ),
        ('persistentvolumeclaim "m" not found', WANTED, "ClaimMissing", "PersistentVolumeClaim m was not found"),
        (
            '0/1 nodes are available: persistentvolumeclaim "m" is being deleted. preemption: 0/1',
            WANTED,
            "ClaimMissing",
            "PersistentVolumeClaim m is being deleted",
        ),
        (
            "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. preemption: 0/1",
            WANTED,
            "ClaimPending",
            "PersistentVolumeClaim models is not bound",
        ),
        (
            "0/1 nodes are available: 1 node(s) had volume node affinity conflict.",
            WANTED,
            "VolumeUnreachable",
            "volume node affinity conflict",
        ),
        ("0/1 nodes are available: 1 Too many pods.", WANTED, "Unschedulable", "1 Too many pods."),
        ("something that no scheduler says today", WANTED, "Unschedulable", "Something that no scheduler says today."),
        ("", WANTED, "Unschedulable", "The scheduler found no node."),
    ],
)
def test_the_schedulers_sentence_becomes_a_reason_and_a_step(message, wanted, reason, words):
    cause = cause_of(pod(node=None, unschedulable=message), [], wanted)

    assert cause is not None
    assert cause.reason == reason
    assert words in cause.message


@pytest.mark.parametrize(
    ("waiting", "message", "reason", "words"),
    [
        ("ErrImagePull", 'failed to resolve "r/x:1"', "ImagePull", 'resolve "r/x:1". Next: check engine.image'),
        ("ImagePullBackOff", "", "ImagePull", "ImagePullBackOff"),
        ("InvalidImageName", "couldn't parse image name", "ImagePull", "Couldn't parse image name"),
        ("CreateContainerConfigError", 'secret "hf" not found', "SecretMissing", "The Secret hf was not found"),
        ("CreateContainerConfigError", 'configmap "c" not found', "ConfigMapMissing", "The ConfigMap c was not found"),
        (
            "CreateContainerConfigError",
            "couldn't find key token in Secret default/hf",
            "SecretKeyMissing",
            "The Secret hf has no key token",
        ),
        ("CreateContainerConfigError", "container has runAsNonRoot", "ContainerConfig", "Container has runAsNonRoot."),
        ("CreateContainerError", "failed to create", "ContainerStart", "Failed to create."),
    ],
)
def test_what_a_container_waits_for_is_named(waiting, message, reason, words):
    cause = cause_of(pod(waiting=waiting, waiting_message=message), [], WANTED)

    assert cause is not None
    assert cause.reason == reason
    assert words in cause.message


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (("FailedMount", 'MountVolume.SetUp failed for volume "api-keys" : secret "k" not found'), "SecretMissing"),
        (("FailedMount", "references non-existent secret key: keys"), "SecretKeyMissing"),
        (("FailedMount", "mount failed: exit status 32"), "VolumeMount"),
        (("FailedAttachVolume", "Multi-Attach error for volume"), "VolumeMount"),
        (("FailedCreatePodSandBox", "failed to set up sandbox: no runtime for nvidia"), "PodSandbox"),
        (("Pulling", "pulling image"), None),
    ],
)
def test_events_tell_what_stands_nowhere_else(event, reason):
    events = [PodEvent("p", *event), PodEvent("other", "FailedMount", "of another pod")]
    cause = cause_of(pod("p", waiting="ContainerCreating"), events, WANTED)

    assert (cause and cause.reason) == reason


@pytest.mark.parametrize(
    ("message", "reason", "words"),
    [
        (
            'pods "qwen-7f-" is forbidden: exceeded quota: small, requested: pods=1, used: pods=0, limited: pods=0',
            "QuotaExceeded",
            "Exceeded quota: small, requested: pods=1",
        ),
        ('pods "a-" is forbidden: failed quota: q: must specify limits.cpu', "QuotaExceeded", "set hardware.resources"),
        ('pods "a-" is forbidden: violates PodSecurity "restricted:latest": x', "PodSecurity", "Violates PodSecurity"),
        ('admission webhook "w" denied the request: no', "AdmissionRefused", "denied the request: no."),
    ],
)
def test_pods_that_may_not_be_made_are_told_without_their_names(message, reason, words):
    cause = refusal_of_pods(message)

    assert cause.reason == reason
    assert words in cause.message
    assert "qwen-7f-" not in cause.message


@pytest.mark.parametrize(
    ("termination", "reason", "words"),
    [
        (
            end(20, Failure(FailureCode.MODEL_NOT_FOUND, "There is no model at x.", "check --model").to_json()),
            "ModelNotFound",
            "There is no model at x. Fix: check spec.model.source.",
        ),
        (end(137, reason="OOMKilled"), "OOMKilled", "at its memory limit of 4Gi"),
        (end(0, reason="Completed"), "Restarted", "most likely as a probe failed"),
        (end(1), "Exited", "ended with status 1 without a word"),
        (end(139, "a\nboom\n\n"), "Exited", "status 139 (SIGSEGV); its last words: boom"),
        (end(255), "Exited", "status 255 without a word"),
        (end(1, '{"code": "NOT_OURS", "message": "x"}'), "Exited", "NOT_OURS"),
    ],
)
def test_an_end_of_the_engine_is_told(termination, reason, words):
    crashed = pod(waiting="CrashLoopBackOff", terminations=(termination,), restarts=2)
    cause = cause_of(crashed, [], WANTED)

    assert cause is not None
    assert cause.reason == reason
    assert words in cause.message
    assert cause.message.endswith("Restarted 2 times.")


def test_a_kill_for_memory_without_a_limit_is_the_nodes():
    cause = cause_of(pod(terminations=(end(137, reason="OOMKilled"),)), [], EIGHT)

    assert cause is not None
    assert "the node ran out of memory" in cause.message


def test_a_failure_stays_the_cause_until_the_engine_is_up_again():
    again = pod(running=True, terminations=(end(1),), restarts=1)

    assert cause_of(again, [], WANTED) is not None
    assert cause_of(again, [], WANTED, engine_is_up=True) is None


@pytest.mark.parametrize(
    "fine",
    [
        pod(ready=True, running=True, terminations=(end(1),)),
        pod(terminating=True, terminations=(end(137),)),
        pod(phase="Failed", reason="Evicted"),
        pod(waiting="ContainerCreating"),
        pod(running=True),
    ],
    ids=["ready", "ending", "over", "being created", "running"],
)
def test_nothing_is_wrong_with_a_pod_that_is_on_its_way(fine):
    assert cause_of(fine, [], WANTED) is None


BEFORE = LastFailure(time="2026-01-01T00:00:05Z", pod="old", code="EXITED", message="m")
CRASHED = end(1, at=4)
AGAIN = {"running": True, "restarts": 1, "terminations": (CRASHED,)}


def told(*pods: PodStatus) -> dict[str, PodStatus]:
    return {pod.name: pod for pod in pods}


def was(name: str, stage: str = "ready", restarts: int | None = None) -> PodStatus:
    return PodStatus(name=name, stage=stage, restarts=restarts)


MANY = told(*(was(f"p{number}") for number in range(16)))


@pytest.mark.parametrize(
    ("pods", "before", "newest"),
    [
        ([], {}, "old"),
        # Its node's clock is behind that of the failure before, and all the same it has just ended.
        ([pod("a", terminations=(CRASHED,))], told(was("a")), "a"),
        ([pod("a", terminations=(CRASHED,))], {}, "a"),
        ([pod("a", terminations=(end(1, at=59),))], told(was("a", "crashed")), "old"),
        # The restart after an end is not another one.
        ([pod("a", **AGAIN)], told(was("a", "crashed")), "old"),
        ([pod("a", **AGAIN)], told(was("a", restarts=1)), "old"),
        ([pod("a", **AGAIN | {"restarts": 2})], told(was("a", "crashed", 1)), "old"),
        ([pod("a", **AGAIN | {"restarts": 2})], told(was("a", restarts=1)), "a"),
        ([pod("a", restarts=1, terminations=(CRASHED,))], told(was("a", restarts=1)), "a"),
        # Two at once: the one that the API server made last.
        (
            [
                pod("a", created="2026-01-01T00:00:09Z", terminations=(CRASHED,)),
                pod("b", created="2026-01-01T00:00:08Z", terminations=(CRASHED,)),
            ],
            {},
            "a",
        ),
        ([pod("a", terminations=(CRASHED,)), pod("b", terminations=(CRASHED,))], {}, "b"),
        # One whose node is an hour ahead does not stay newest for an hour.
        ([pod("a", **AGAIN | {"terminations": (end(1, at=59),)}), pod("b", terminations=(CRASHED,))],
         told(was("a", restarts=1), was("b")), "b"),
        # Told to end, and killed as it did not: that is no failure. One before that was.
        ([pod("a", terminating=True, terminations=(end(137, at=9),))], told(was("a")), "old"),
        ([pod("a", terminating=True, restarts=1, terminations=(end(0, at=9), end(1, at=8)))], told(was("a")), "a"),
        (
            [pod("a", terminating=True, restarts=1, terminations=(end(0, at=9), end(1, at=8)))],
            told(was("a", restarts=1)),
            "old",
        ),
        # Ended as a whole: new when the status before knew it alive.
        ([pod("a", phase="Failed", reason="Evicted")], told(was("a")), "a"),
        ([pod("a", phase="Failed", reason="Evicted")], {}, "old"),
        # More pods than a status lists: those that it leaves out have no trouble.
        ([pod("a", **AGAIN)], MANY, "old"),
        ([pod("a", terminations=(CRASHED,))], MANY, "a"),
    ],
)  # fmt: skip
def test_the_newest_failure_is_told_by_counting_and_not_by_the_clocks_of_nodes(pods, before, newest):
    failure = last_failure(pods, BEFORE, before, None)

    assert failure is not None
    assert failure.pod == newest


def test_a_first_status_tells_any_failure_that_there_is():
    assert last_failure([], None, {}, None) is None
    failure = last_failure([pod("a", ready=True, **AGAIN)], None, told(was("a", restarts=1)), None)

    assert failure is not None
    assert failure.pod == "a"


@pytest.mark.parametrize("engine_is_up", [True, False])
def test_a_sidecar_that_does_not_run_is_told_also_while_the_engine_does(engine_is_up):
    sick = pod(beside="proxy: it ended with 1. no such upstream", running=engine_is_up)
    found = cause_of(sick, (), Wanted("nvidia.com/gpu", 1, None, None), engine_is_up=engine_is_up)

    assert found is not None
    assert found.reason == "SidecarFailed"
    assert "proxy: it ended with 1. no such upstream. Next: correct it in podTemplate." in found.message


VOLUME = "spec.template.spec.volumes[models]"


def test_a_deployment_without_the_image_volume_that_it_was_given_is_told_as_what_the_cluster_lacks():
    cause = alteration(["spec.template.spec.containers[engine].volumeMounts", VOLUME], ["models"])
    assert cause is not None

    assert (cause.about, cause.reason) == (About.OBJECTS, "ImageVolumeMissing")
    assert "use another model.source" in cause.message
    assert alteration(["spec.template.spec.volumes[tmp]"], ["models"]) is None
    assert alteration(["spec.template.spec.containers[engine].image"], ["models"]) is None


def test_an_image_volume_that_the_api_server_dropped_is_told_as_what_the_cluster_lacks():
    words = 'Deployment.apps "x" is invalid: spec.template.spec.volumes[2]: Required value: must specify a volume type'

    assert refusal_of_object("Deployment", words).reason == "ImageVolumeMissing"
    assert refusal_of_object("HTTPRoute", "404 page not found").reason == "KindMissing"
    assert refusal_of_object("Service", "no").message == "The API server refused the Service: no"


def test_a_kind_that_the_cluster_lacks_is_told_with_the_field_that_asks_for_it():
    told = refusal_of_object("ScaledObject", "404 page not found").message

    assert told == (
        "The cluster has no ScaledObject, which autoscaling.mode KEDA asks for: install KEDA, or set mode BuiltIn, "
        "which needs nothing else."
    )


def hpa(status: str, reason: str):
    conditions = [{"type": "AbleToScale", "status": "True"}]
    message = "the HPA was unable to compute the replica count: no metrics returned"
    return {
        "status": {
            "conditions": [
                *conditions,
                {"type": "ScalingActive", "status": status, "reason": reason, "message": message},
            ]
        }
    }


def test_an_autoscaler_of_the_clusters_that_does_nothing_is_told_with_what_it_lacks():
    told = not_scaling(hpa("False", "FailedGetPodsMetric"))

    assert told is not None
    assert "The HPA was unable to compute the replica count: no metrics returned. Next: let an adapter" in told
    assert not_scaling(hpa("False", "ScalingDisabled")) is None
    assert not_scaling(hpa("True", "ValidMetricFound")) is None
    assert not_scaling({}) is None


def scaled_object(status: str, reason: str, message: str):
    ready = {"type": "Ready", "status": status, "reason": reason, "message": message}
    conditions = [ready, {"type": "Active", "status": "False", "reason": "ScalerNotActive", "message": "not active"}]
    return {"kind": "ScaledObject", "metadata": {"name": "qwen"}, "status": {"conditions": conditions}}


def test_a_scaled_object_that_does_nothing_is_told_with_where_its_reason_stands():
    words = "Triggers defined in ScaledObject are not working correctly"
    told = not_scaling(scaled_object("False", "TriggerError", words))

    assert told == (
        "autoscaling.mode KEDA does not scale the server. Triggers defined in ScaledObject are not working correctly. "
        "Next: check that autoscaling.prometheusAddress is Prometheus as KEDA's pods reach it; its events say more "
        "(kubectl describe scaledobject qwen)."
    )
    assert not_scaling(scaled_object("Unknown", "PartialTriggerError", "Some triggers are not working")) is not None
    assert not_scaling(scaled_object("True", "ScaledObjectReady", "ScaledObject is defined correctly")) is None
    assert not_scaling(scaled_object("Unknown", "", "")) is None
