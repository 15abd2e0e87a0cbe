"""Whether a request wakes a server that sleeps, by which port, and why not if not. Pure; asked by reconcile.py.

A server that may go to zero has an EndpointSlice of ours beside those of Kubernetes' own controller. While no pod is
ready the Service leads by it to the activator, at a port that stands for this server; else the slice is empty.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo_operator import names
from octavo_operator.names import Key
from octavo_operator.spec import Server

PORTS = range(20000, 20500)
"""The activator's. Each server that may sleep has one of them to itself, for as long as it may."""
NAMESPACE_NAME = "kubernetes.io/metadata.name"
"""Kubernetes puts it on every namespace."""
ACTIVATOR_LABELS = {"app.kubernetes.io/component": "activator"}


@dataclass(frozen=True)
class Waking:
    """How a server that may sleep is woken."""

    port: int | None = None
    """Of the activator, for this server; None where no request wakes it."""
    addresses: tuple[str, ...] = ()
    """Of the activator's pods that are ready."""
    barrier: str = ""
    """Why no request wakes the server: half a sentence, with what would be right."""
    keeps_last: bool = False
    """It does not go to sleep by itself, as nothing would wake it again."""


def may_sleep(server: Server) -> bool:
    """Whether its last replica may be taken away for want of requests. One that a person set to zero stays there."""
    scaling = server.spec.autoscaling
    return scaling is not None and scaling.min_replicas == 0 and not server.spec.suspend


def barrier(server: Server, *, activator: bool) -> str:
    """Why no request can wake the server; empty where one can."""
    if not activator:
        return "the activator is off: set activator.enabled of the chart to true"
    if server.spec.expose.tls is not None:
        return "expose.tls ends at the pods, whose certificate the activator has not: end TLS before the Service"
    return ""


def port_for(key: Key, present: Mapping[str, Any] | None, taken: Mapping[int, Key]) -> int | None:
    """The server's port; None where all are given out. present: its EndpointSlice. taken: the ports of all servers.

    It keeps the one that it has. A new one is the first free one from a place that its name decides, so that a port
    is seldom given to another server soon after its own has gone.
    """
    if present is not None:
        port = port_of(present)
        if port is not None and port in PORTS and taken.get(port, key) == key:
            return port
    start = zlib.crc32("/".join(key).encode()) % len(PORTS)
    for step in range(len(PORTS)):
        port = PORTS[(start + step) % len(PORTS)]
        if taken.get(port, key) == key:
            return port
    return None


def port_of(document: Mapping[str, Any]) -> int | None:
    """Of an EndpointSlice of ours."""
    text = document["metadata"].get("labels", {}).get(names.ACTIVATOR_PORT_LABEL, "")
    return int(text) if text.isdigit() else None


_ACTIVATORS = "kubectl get pods -A -l app.kubernetes.io/component=activator"
UNWAKEABLE = "Asleep. No request wakes it"
UNATTENDED = "Asleep. A request will wake it when a pod of the activator is ready"


def outlook(server: Server, waking: Waking) -> tuple[str, str]:
    """Of the condition Wakeable, which tells beforehand what will be when the server sleeps: reason and message."""
    if waking.barrier:
        kept = " So its last replica stays, and autoscaling.minReplicas 0 is as good as 1." if waking.keeps_last else ""
        return "NotByRequest", f"No request could wake it from zero, as {waking.barrier}.{kept}"
    if not waking.addresses:
        return "ActivatorNotReady", f"No pod of the activator is ready: {_ACTIVATORS}"
    assert server.spec.autoscaling is not None
    if server.spec.autoscaling.mode == "KEDA":
        return "ByKeda", "From zero, a request waits at the activator, and KEDA wakes it by that."
    return "ByRequest", "From zero, a request wakes it, through the activator."


def sentence(server: Server, waking: Waking) -> str:
    """What wakes the server that sleeps, for its status."""
    if waking.barrier:
        how = f"kubectl scale llm {server.name} -n {server.namespace} --replicas=1"
        return f"{UNWAKEABLE}, as {waking.barrier}. By hand: {how}"
    if not waking.addresses:
        return f"{UNATTENDED}: {_ACTIVATORS}"
    assert server.spec.autoscaling is not None
    if server.spec.autoscaling.mode == "KEDA":
        return "Asleep. A request waits at the activator, and KEDA wakes it by octavo_activator_held_requests."
    return "Asleep. The first request wakes it, through the activator."
