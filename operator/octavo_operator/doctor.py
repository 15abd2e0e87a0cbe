"""Looks for what keeps Octavo from working in a cluster, and says what to do about it. `octavo-operator doctor`.

Reads only, with the rights of whoever runs it; what they may not read is said and is no failure.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from octavo_operator import names, wake
from octavo_operator.cluster import Cluster, UnavailableError
from octavo_operator.crd import custom_resource_definition
from octavo_operator.monitoring import What, called, selecting, why_none
from octavo_operator.neighbours import Neighbours
from octavo_operator.observed import read_time
from octavo_operator.settings import Settings

OLDEST = (1, 30)
"""CEL with messageExpression and the fields that pods use are there since."""
MONITORED: dict[What, str] = {"podMonitor": "PodMonitor", "rule": "PrometheusRule"}
OPERATORS = "app.kubernetes.io/name=octavo-operator"
"""On what the chart makes."""
INSTALL = "octavo-operator crd | kubectl apply --server-side -f -"
OPTIONAL = {
    "PrometheusRule": "there are no alerts",
    "PodMonitor": "servers are found by Prometheus through scrape annotations instead",
    "HTTPRoute": "expose.gateway cannot be used",
    "InferencePool": "expose.gateway cannot route by load",
    "ScaledObject": "autoscaling.mode KEDA cannot be used",
}


@dataclass(frozen=True)
class Verdict:
    level: Literal["ok", "note", "FAIL"]
    sentence: str


async def examine(cluster: Cluster, namespace: str, now: datetime) -> list[Verdict]:
    """namespace: where the operator is installed."""
    found: list[Verdict] = []
    for check in (_version, _definition, _leader, _gpus, _storage, _kinds, _monitoring, _servers):
        try:
            found += await check(cluster, namespace, now)
        except UnavailableError as error:
            found.append(Verdict("note", f"not looked at: {error}"))
    return found


def report(verdicts: list[Verdict]) -> str:
    return "".join(f"{verdict.level:<5} {verdict.sentence}\n" for verdict in verdicts)


async def _version(cluster: Cluster, namespace: str, now: datetime) -> list[Verdict]:
    told = await cluster.version()
    numbers = tuple(int("".join(filter(str.isdigit, told[name]))) for name in ("major", "minor"))
    if numbers < OLDEST:
        needed = ".".join(map(str, OLDEST))
        return [Verdict("FAIL", f"Kubernetes is {told['gitVersion']}, and Octavo needs {needed}: upgrade the cluster")]
    return [Verdict("ok", f"Kubernetes {told['gitVersion']}")]


async def _definition(cluster: Cluster, namespace: str, now: datetime) -> list[Verdict]:
    wanted = custom_resource_definition()
    present = await cluster.get("CustomResourceDefinition", None, wanted["metadata"]["name"])
    if present is None:
        return [
            Verdict("FAIL", "there is no CRD of LLMServers: octavo-operator crd | kubectl apply --server-side -f -")
        ]
    if _schema(present) != _schema(wanted):
        text = "the CRD of LLMServers is of another version, and fields that it lacks are dropped in silence"
        return [Verdict("FAIL", f"{text}: {INSTALL}")]
    return [Verdict("ok", "the CRD of LLMServers is this version's")]


def _schema(definition: dict[str, Any]) -> str:
    """What of it matters, as one text: the API server adds defaults of its own beside it."""
    version = definition["spec"]["versions"][0]
    return json.dumps(version["schema"]["openAPIV3Schema"]["properties"]["spec"], sort_keys=True)


async def _leader(cluster: Cluster, namespace: str, now: datetime) -> list[Verdict]:
    lease = await cluster.get("Lease", namespace, names.LEASE)
    if lease is None or not lease["spec"].get("holderIdentity"):
        return [Verdict("FAIL", f"no operator leads in namespace {namespace}: kubectl get pods -n {namespace}")]
    spec = lease["spec"]
    holder, seconds = spec["holderIdentity"], int(spec["leaseDurationSeconds"])
    age_s = (now.astimezone(UTC) - read_time(spec["renewTime"])).total_seconds()
    # That is the time of one machine less that of another. Where it cannot be, or says that nobody leads, what counts
    # is whether the lease is renewed while we look.
    if not 0 <= age_s <= seconds and not await _is_renewed(cluster, namespace, spec["renewTime"], seconds):
        return [Verdict("FAIL", f"the operator {holder} has not renewed its lease for {seconds} s: see its pod")]
    return [Verdict("ok", f"the operator {holder} leads")]


async def _is_renewed(cluster: Cluster, namespace: str, before: str, seconds: int) -> bool:
    for _ in range(seconds):
        await asyncio.sleep(1)
        lease = await cluster.get("Lease", namespace, names.LEASE)
        if lease is not None and lease["spec"].get("renewTime") != before:
            return True
    return False


async def _gpus(cluster: Cluster, namespace: str, now: datetime) -> list[Verdict]:
    nodes = await cluster.list("Node")
    offered: dict[str, int] = {}
    for node in nodes:
        for resource, amount in node.get("status", {}).get("allocatable", {}).items():
            if "/" in resource and "gpu" in resource and str(amount).isdigit() and int(amount):
                offered[resource] = offered.get(resource, 0) + int(amount)
    if not offered:
        return [Verdict("note", "no node offers GPUs: install the device plugin, or serve with hardware.gpus 0")]
    told = ", ".join(f"{amount} {resource}" for resource, amount in sorted(offered.items()))
    return [Verdict("ok", f"{len(nodes)} nodes offer {told}")]


async def _storage(cluster: Cluster, namespace: str, now: datetime) -> list[Verdict]:
    classes = await cluster.list("StorageClass")
    mark = "storageclass.kubernetes.io/is-default-class"
    chosen = [c["metadata"]["name"] for c in classes if c["metadata"].get("annotations", {}).get(mark) == "true"]
    if chosen:
        return [Verdict("ok", f"claims without a class get {chosen[0]}")]
    return [Verdict("note", "no StorageClass is the default: name one in a server's cache, or bring a claim")]


async def _kinds(cluster: Cluster, namespace: str, now: datetime) -> list[Verdict]:
    found = []
    for kind, without in OPTIONAL.items():
        known = await cluster.knows(kind)
        found.append(Verdict("ok", f"{kind} is known") if known else Verdict("note", f"no {kind} kind: {without}"))
    return found


async def _monitoring(cluster: Cluster, namespace: str, now: datetime) -> list[Verdict]:
    """What no Prometheus takes. The labels are those that are there; who made them is all the same."""
    seen = await Neighbours(cluster, Settings()).monitoring()
    found = []
    for what, kind in MONITORED.items():
        takers = [one for one in seen.prometheuses if what == "podMonitor" or one["kind"] == "Prometheus"]
        ours = f"{names.MANAGED_BY_LABEL}={names.MANAGED_BY}" if what == "podMonitor" else OPERATORS
        if not takers or not await cluster.knows(kind):
            continue
        for document in await cluster.list(kind, labels=ours):
            labels, place = document["metadata"].get("labels") or {}, document["metadata"]["namespace"]
            name = f"the {kind} {place}/{document['metadata']['name']}"
            if taking := selecting(takers, what, labels, place):
                found.append(Verdict("ok", f"{name} is selected by {called(taking[0])}"))
            else:
                why = why_none(takers, what, labels, place)
                found.append(Verdict("note", f"no Prometheus selects {name}: {why}"))
    return found


async def _servers(cluster: Cluster, namespace: str, now: datetime) -> list[Verdict]:
    found, fine = [], 0
    for document in await cluster.list(names.KIND):
        metadata, status = document["metadata"], document.get("status", {})
        conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
        ready = conditions.get(names.READY)
        name = f"{metadata['namespace']}/{metadata['name']}"
        if ready is None or status.get("observedGeneration") != metadata["generation"]:
            found.append(Verdict("FAIL", f"{name}: no operator has looked at it in its present form"))
        elif ready["message"].startswith(wake.UNWAKEABLE):
            found.append(Verdict("note", f"{name}: {ready['message']}"))
        elif ready["message"].startswith(wake.UNATTENDED):
            found.append(Verdict("FAIL", f"{name}: {ready['message']}"))
        elif ready["status"] == "True" and conditions.get(names.WAKEABLE, {}).get("status") == "False":
            found.append(Verdict("note", f"{name} serves, but: {conditions[names.WAKEABLE]['message']}"))
        elif ready["status"] == "True" and _is_stopped(doing := conditions.get(names.PROGRESSING, {})):
            found.append(Verdict("note", f"{name} serves, but: {doing['message']}"))
        elif ready["status"] == "True" or ready["reason"] in ("Suspended", "ScaledToZero"):
            fine += 1
        else:
            found.append(Verdict("FAIL", f"{name}: {ready['message']}"))
    return [*found, Verdict("ok", f"{fine} {'server is as it' if fine == 1 else 'servers are as they'} should be")]


def _is_stopped(progressing: dict[str, Any]) -> bool:
    """It is not as specified, and nothing is on its way: rolled back, or kept otherwise by the cluster."""
    return progressing.get("status") == "False" and progressing.get("reason") != "Settled"
