"""Why a pod does not serve: one cause with the next step, read from what Kubernetes and the engine left behind.

Pure; called by status.py for each pod, and once for what keeps pods from being made at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from octavo_engine.status import MANAGEMENT_PORT
from octavo_operator.failures import Failure, failure_of
from octavo_operator.observed import Pod, PodEvent


class About(IntEnum):
    """What a cause is about. The order is that of the headline: what people can mend at once comes first."""

    OBJECTS = 0
    ADMISSION = 1
    CRASH = 2
    START = 3
    SCHEDULING = 4


@dataclass(frozen=True)
class Cause:
    about: About
    reason: str
    """CamelCase, for programs."""
    message: str
    """A sentence with the next step."""
    code: str | None = None
    """The engine's failure code, where it died of one."""


@dataclass(frozen=True)
class Wanted:
    """What each pod asks for, to be named in sentences."""

    gpu_resource: str
    gpus: int
    memory_limit: str | None
    claim: str | None


_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CONFIG_REASONS = ("CreateContainerConfigError",)
_START_REASONS = ("CreateContainerError", "RunContainerError", "ContainerCannotRun", "StartError")


def cause_of(
    pod: Pod,
    events: Sequence[PodEvent],
    wanted: Wanted,
    *,
    engine_is_up: bool = False,
    engine_is_silent: bool = False,
) -> Cause | None:
    """What keeps this pod from serving, or None while nothing is wrong (it may simply be loading).

    engine_is_up: the engine says of itself that it is. The failure before that is history then; until then it is the
    cause, so that it does not come and go with each new try.
    """
    if not pod.ready and not pod.terminating and any(e.reason == "NodeNotReady" and e.pod == pod.name for e in events):
        return Cause(About.START, "NodeLost", _node_lost(pod))
    if pod.ready and engine_is_silent and not pod.terminating:
        return Cause(About.START, "EngineUnreachable", _SILENT)
    if pod.ready or pod.terminating or pod.over:
        return None
    beside = Cause(About.START, "SidecarFailed", _beside(pod.beside)) if pod.beside else None
    if engine_is_up:
        return beside
    if pod.unschedulable is not None:
        return _scheduling(pod.unschedulable, wanted)
    if pod.waiting in _IMAGE_REASONS:
        return Cause(About.START, "ImagePull", _image(pod))
    if pod.waiting in _CONFIG_REASONS:
        return _missing(pod.waiting_message) or Cause(About.START, "ContainerConfig", _sentence(pod.waiting_message))
    if pod.waiting in _START_REASONS:
        return Cause(About.START, "ContainerStart", _sentence(pod.waiting_message))
    if failure := failure_of(pod, wanted.memory_limit):
        return _crash(pod, failure)
    if beside:
        return beside
    if not pod.running:
        mounts = [e.message for e in events if e.pod == pod.name and e.reason in ("FailedMount", "FailedAttachVolume")]
        sandbox = [e.message for e in events if e.pod == pod.name and e.reason == "FailedCreatePodSandBox"]
        if mounts:
            return _missing(mounts[-1]) or Cause(About.START, "VolumeMount", _sentence(mounts[-1]))
        if sandbox:
            return Cause(About.START, "PodSandbox", _sentence(sandbox[-1]))
    return None


def _beside(what: str) -> str:
    return f"{_sentence(f'A container of podTemplate does not run, {what}')} Next: correct it in podTemplate."


def _node_lost(pod: Pod) -> str:
    return (
        f"The node {pod.node} is not ready, and what runs on it is not known: look at it with kubectl describe node "
        f"{pod.node}. Kubernetes ends the pod when that lasts for five minutes, and another one takes its place."
    )


_SILENT = (
    f"The pod passes its probes, but its engine does not answer the operator on port {MANAGEMENT_PORT}: let the "
    "operator's namespace through to it (NetworkPolicy), or check that engine.image is Octavo's engine."
)


_PROJECTS = {
    "HTTPRoute": ("expose.gateway", "install the Gateway API, or remove the field"),
    "InferencePool": ("expose.inferencePool", "install the Gateway API Inference Extension, or remove the field"),
    "PodMonitor": ("observability.podMonitor", "install the Prometheus operator, or set Auto"),
    "ScaledObject": ("autoscaling.mode KEDA", "install KEDA, or set mode BuiltIn, which needs nothing else"),
}


def refusal_of_object(kind: str, message: str) -> Cause:
    """A child that the API server does not take."""
    if kind == "Deployment" and "must specify a volume type" in message:
        # An API server without the feature drops the field, and then misses what it dropped.
        return Cause(About.OBJECTS, "ImageVolumeMissing", _NO_IMAGE_VOLUMES)
    # The first where the cluster has the group, in another version, the second where it has nothing of it.
    if kind in _PROJECTS and ("could not find the requested resource" in message or "page not found" in message):
        field, step = _PROJECTS[kind]
        text = f"The cluster has no {kind}, which {field} asks for: {step}."
        return Cause(About.OBJECTS, "KindMissing", text)
    return Cause(About.OBJECTS, "ObjectRefused", f"The API server refused the {kind}: {message}")


def not_scaling(autoscaler: Mapping[str, Any]) -> str | None:
    """Why a HorizontalPodAutoscaler or ScaledObject of ours does nothing; None where it works, or has not said yet."""
    conditions = {condition["type"]: condition for condition in autoscaler.get("status", {}).get("conditions", [])}
    if autoscaler.get("kind") == "ScaledObject":
        told, mode = conditions.get("Ready", {}), "KEDA"
        # Of several triggers some may fail: then it says that it does not know whether it is ready.
        fails = told.get("status") == "False" or told.get("reason") == "PartialTriggerError"
        name = autoscaler["metadata"]["name"]
        step = (
            "check that autoscaling.prometheusAddress is Prometheus as KEDA's pods reach it; its events say more "
            f"(kubectl describe scaledobject {name})"
        )
    else:
        told, mode = conditions.get("ScalingActive", {}), "HPA"
        # Of no replicas it says that scaling is disabled, which is as it should be.
        fails = told.get("status") == "False" and told.get("reason") != "ScalingDisabled"
        step = "let an adapter serve the engines' metrics to it (prometheus-adapter), or set mode BuiltIn"
    if not fails:
        return None
    return f"autoscaling.mode {mode} does not scale the server. {_sentence(told.get('message', ''))} Next: {step}."


_NO_IMAGE_VOLUMES = (
    "The cluster does not mount images: Kubernetes' ImageVolume must be enabled in its API servers and kubelets, and "
    "the nodes' container runtime must know it (containerd 2.1, CRI-O 1.31). Enable it, or use another model.source, "
    "such as pvc://."
)


def alteration(at: Collection[str], image_volumes: Collection[str]) -> Cause | None:
    """What follows from a Deployment that the cluster keeps otherwise than applied, where that is known to be fatal.

    image_volumes: names of the volumes that are images. An API server without the feature drops them without a word.
    """
    lost = tuple(f"spec.template.spec.volumes[{name}]" for name in image_volumes)
    if any(place.startswith(lost) for place in at):
        return Cause(About.OBJECTS, "ImageVolumeMissing", _NO_IMAGE_VOLUMES)
    return None


def refusal_of_pods(message: str) -> Cause:
    """Pods that may not even be made: the API server's sentence, without the name of a pod that never was."""
    why = re.sub(r'^.*?pods "[^"]*" is forbidden: ', "", message)
    if "exceeded quota" in why:
        step = "raise the ResourceQuota, or lower replicas or what each pod asks for"
        return Cause(About.ADMISSION, "QuotaExceeded", f"{_sentence(why)} Next: {step}.")
    if "failed quota" in why:
        step = "the namespace's ResourceQuota wants these amounts to be named: set hardware.resources"
        return Cause(About.ADMISSION, "QuotaExceeded", f"{_sentence(why)} Next: {step}.")
    if "violates PodSecurity" in why:
        return Cause(About.ADMISSION, "PodSecurity", _sentence(why))
    return Cause(About.ADMISSION, "AdmissionRefused", _sentence(why or message))


def _scheduling(message: str, wanted: Wanted) -> Cause:
    if match := re.search(r'persistentvolumeclaim "([^"]+)" (not found|is being deleted)', message):
        what = {"not found": "was not found", "is being deleted": "is being deleted"}[match[2]]
        text = f"The PersistentVolumeClaim {match[1]} {what}: create it in this namespace, or correct model.source."
        return Cause(About.SCHEDULING, "ClaimMissing", text)
    if "unbound immediate PersistentVolumeClaims" in message:
        text = (
            f"The PersistentVolumeClaim {wanted.claim} is not bound: it waits for a volume. kubectl describe pvc "
            f"{wanted.claim} tells why; for a shared cache, cache.storageClassName must offer ReadWriteMany."
        )
        return Cause(About.SCHEDULING, "ClaimPending", text)
    match = re.match(r"0/(\d+) nodes are available: (.*?)\.?(?:,? preemption:.*| no new claims.*)?$", message, re.S)
    if not match:
        return Cause(About.SCHEDULING, "Unschedulable", _sentence(message or "the scheduler found no node"))
    total, text = int(match[1]), match[2].split(". no new claims")[0].split(". preemption")[0].rstrip(".")
    reasons = [(int(m[1]), m[2].strip()) for m in re.finditer(r"(\d+) (.*?)(?=, \d+ |$)", text, re.S)]
    gpu = f"Insufficient {wanted.gpu_resource}"
    if lacking := _count(reasons, gpu):
        step = "free one, add nodes, or lower replicas or hardware.gpus"
        few = "no" if wanted.gpus == 1 else "too few"
        text = f"{_nodes(lacking, total)} {few} {wanted.gpu_resource} free, and each pod needs {wanted.gpus}"
        return Cause(About.SCHEDULING, "InsufficientGPU", f"{text}{_others(reasons, gpu)}: {step}.")
    for _, why in reasons:
        if why.startswith("Insufficient "):
            resource = why.removeprefix("Insufficient ")
            name = {"cpu": "CPU", "memory": "Memory"}.get(resource, "Resources")
            text = f"{_nodes(_count(reasons, why), total)} too little {resource} free{_others(reasons, why)}"
            step = "lower hardware.resources.requests, or add nodes"
            return Cause(About.SCHEDULING, f"Insufficient{name}", f"{text}: {step}.")
    if any("taint" in why for _, why in reasons):
        step = "add hardware.tolerations, or take the taint away"
        return Cause(About.SCHEDULING, "UntoleratedTaint", f"No node of {total} takes the pod: {text}. Next: {step}.")
    if any("affinity/selector" in why for _, why in reasons):
        step = "correct hardware.nodeSelector, or label a node"
        return Cause(About.SCHEDULING, "NoMatchingNode", f"No node of {total} takes the pod: {text}. Next: {step}.")
    if any("volume" in why.lower() for _, why in reasons):
        return Cause(About.SCHEDULING, "VolumeUnreachable", f"No node of {total} takes the pod: {text}.")
    return Cause(About.SCHEDULING, "Unschedulable", f"No node of {total} takes the pod: {text}.")


def _nodes(lacking: int, total: int) -> str:
    have = "has" if lacking == 1 else "have"
    return f"{lacking} of {total} {'node' if total == 1 else 'nodes'} {have}"


def _count(reasons: Sequence[tuple[int, str]], why: str) -> int:
    return sum(count for count, other in reasons if other == why)


def _others(reasons: Sequence[tuple[int, str]], but: str) -> str:
    others = [f"{count} {why}" for count, why in reasons if why != but]
    return f" ({', '.join(others)})" if others else ""


def _image(pod: Pod) -> str:
    # BackOff's own message only says that it waits; the error stands behind it in newer kubelets.
    why = pod.waiting_message or str(pod.waiting)
    return f"{_sentence(why)} Next: check engine.image, and that its registry can be reached and asked from the node."


def _missing(message: str) -> Cause | None:
    """A Secret or ConfigMap that is named but not there, in the kubelet's several wordings."""
    if match := re.search(r'\b(secret|configmap) "([^"]+)" not found', message, re.I):
        kind = {"secret": "Secret", "configmap": "ConfigMap"}[match[1].lower()]
        text = f"The {kind} {match[2]} was not found in this namespace: create it, or correct its name in the spec."
        return Cause(About.START, f"{kind}Missing", text)
    if match := re.search(r"couldn't find key ([^ ]+) in (Secret|ConfigMap) ([^ ]+)", message):
        name = match[3].rpartition("/")[2]
        text = f"The {match[2]} {name} has no key {match[1]}: add it, or correct the key in the LLMServer."
        return Cause(About.START, f"{match[2]}KeyMissing", text)
    if match := re.search(r"references non-existent secret key: ([^ ]+)", message):
        text = f"The Secret of expose.apiKeysSecretRef has no key {match[1]}: add it, or correct the key."
        return Cause(About.START, "SecretKeyMissing", text)
    if match := re.search(r"references non-existent config key: ([^ ]+)", message):
        text = f"A ConfigMap of podTemplate.spec.volumes has no key {match[1]}: add it, or correct the key."
        return Cause(About.START, "ConfigMapKeyMissing", text)
    return None


def _crash(pod: Pod, failure: Failure) -> Cause:
    again = f" Restarted {pod.restarts} time{'s' if pod.restarts > 1 else ''}." if pod.restarts else ""
    return Cause(About.CRASH, failure.reason, failure.sentence + again, failure.code)


def _sentence(text: str) -> str:
    text = " ".join(text.split())[:700]
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
