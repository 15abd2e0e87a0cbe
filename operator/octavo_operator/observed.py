"""What was seen around a server, as values: its pods, their containers' ends, and its children. Read by the decisions.

Documents of the API server come in, frozen dataclasses go out, so that the decisions deal in facts and not in
Kubernetes' many ways of leaving a field out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from octavo_engine.status import Statusz
from octavo_operator import names

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Termination:
    """One end of a container."""

    reason: str
    """Kubernetes' word: Completed, Error, OOMKilled, ContainerCannotRun, …"""
    exit_code: int
    message: str
    """What the container left in its termination log, or its last lines."""
    finished_at: datetime | None
    """By the node's clock, which may be hours off: to be told, and to know an end again, never to order by."""


@dataclass(frozen=True, slots=True)
class Pod:
    name: str
    uid: str
    phase: str
    revision: str | None
    known_since: float = 0.0
    """When this operator saw it first, in seconds of its own monotonic clock: every age is counted from there. What
    stands on the pod is of other machines' clocks, and those may be hours off."""
    created: str = ""
    """When the API server made it, by its clock, as it writes times."""
    node: str | None = None
    ip: str | None = None
    ready: bool = False
    terminating: bool = False
    reason: str = ""
    """Why a pod failed as a whole: Evicted, Preempting, NodeLost, …"""
    message: str = ""
    unschedulable: str | None = None
    """The scheduler's sentence, where it found no node."""
    waiting: str | None = None
    """Why the container is not running: ContainerCreating, ImagePullBackOff, CrashLoopBackOff, …"""
    waiting_message: str = ""
    running: bool = False
    restarts: int = 0
    terminations: tuple[Termination, ...] = ()
    """Newest first: at most the present state and the one before it, as Kubernetes keeps no more."""
    beside: str | None = None
    """Why a container of podTemplate does not run, beside the engine or before it."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    annotated_by_us: bool = False

    @property
    def over(self) -> bool:
        """It will not run again; its Deployment has replaced it."""
        return self.phase in ("Failed", "Succeeded")


@dataclass(frozen=True)
class PodEvent:
    """A Kubernetes event about a pod, for causes that stand nowhere else (a volume that cannot be mounted)."""

    pod: str
    reason: str
    message: str


@dataclass(frozen=True)
class World:
    """Everything that the decisions about one server depend on, beside its spec."""

    children: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """The object of each child's kind that has the server's name, whoever owns it."""
    pods: tuple[Pod, ...] = ()
    engines: Mapping[str, Statusz] = field(default_factory=dict)
    """By pod, what its engine says of itself. A pod whose engine did not answer is absent."""
    answered: Mapping[str, float] = field(default_factory=dict)
    """By pod that runs, when its engine last answered, or was first asked: seconds of the monotonic clock."""
    events: tuple[PodEvent, ...] = ()
    pod_monitors_known: bool = False

    def own(self, kind: str, uid: str) -> dict[str, Any] | None:
        """The child of that kind, unless it is somebody else's. uid: the server's."""
        child = self.children.get(kind)
        owners = child["metadata"].get("ownerReferences", []) if child else []
        return child if any(owner.get("uid") == uid and owner.get("controller") for owner in owners) else None

    @property
    def refused_pods(self) -> str | None:
        """Why the API server refuses to let pods be made: quota, admission. The Deployment repeats its ReplicaSet."""
        deployment = self.children.get("Deployment", {})
        for condition in deployment.get("status", {}).get("conditions", []):
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                return str(condition.get("message", ""))
        return None


def read_pod(document: Document) -> Pod:
    metadata, status = document["metadata"], document.get("status", {})
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    scheduled = conditions.get("PodScheduled", {})
    container: Document = next(
        (c for c in status.get("containerStatuses", []) if c["name"] == names.ENGINE_CONTAINER), {}
    )
    state, last = container.get("state", {}), container.get("lastState", {})
    ends = [s["terminated"] for s in (state, last) if "terminated" in s]
    waiting = state.get("waiting") or {}
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        phase=status.get("phase", "Pending"),
        revision=metadata.get("labels", {}).get(names.REVISION_LABEL),
        created=metadata.get("creationTimestamp", ""),
        node=document.get("spec", {}).get("nodeName"),
        ip=status.get("podIP"),
        ready=conditions.get("Ready", {}).get("status") == "True",
        terminating="deletionTimestamp" in metadata,
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        unschedulable=scheduled.get("message", "") if scheduled.get("status") == "False" else None,
        waiting=waiting.get("reason"),
        waiting_message=waiting.get("message", ""),
        running="running" in state,
        restarts=container.get("restartCount", 0),
        terminations=tuple(_read_termination(end) for end in ends),
        beside=_read_beside(status),
        annotations=metadata.get("annotations", {}),
        annotated_by_us=any(
            entry.get("manager") == names.FIELD_MANAGER
            and set(entry.get("fieldsV1", {}).get("f:metadata", {}).get("f:annotations", {})) - {"."}
            for entry in metadata.get("managedFields", [])
        ),
    )


_ON_ITS_WAY = ("ContainerCreating", "PodInitializing")


def _read_beside(status: Document) -> str | None:
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        waiting = container.get("state", {}).get("waiting") or {}
        if container["name"] == names.ENGINE_CONTAINER or waiting.get("reason", "ContainerCreating") in _ON_ITS_WAY:
            continue
        end = container.get("lastState", {}).get("terminated")
        words = (end or {}).get("message") or waiting.get("message") or ""
        how = f"it ended with {end.get('exitCode')}" if end else str(waiting["reason"])
        return f"{container['name']}: {how}. {words}".strip()
    return None


def _read_termination(document: Document) -> Termination:
    finished = document.get("finishedAt")
    return Termination(
        reason=document.get("reason", ""),
        exit_code=int(document.get("exitCode", 0)),
        message=document.get("message", ""),
        finished_at=read_time(finished) if finished else None,
    )


def read_events(documents: Iterable[Document]) -> tuple[PodEvent, ...]:
    """In the order in which the API server took them: their times, and their names by which it lists them, are of the
    clocks of nodes."""
    return tuple(map(_read_event, sorted(documents, key=lambda event: int(event["metadata"]["resourceVersion"]))))


def _read_event(document: Document) -> PodEvent:
    return PodEvent(
        pod=document.get("involvedObject", {}).get("name", ""),
        reason=document.get("reason", ""),
        message=document.get("message", ""),
    )


def read_time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def write_time(time: datetime) -> str:
    """As the API server writes times in conditions: UTC, whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
