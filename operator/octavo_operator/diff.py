"""How the cluster's objects would change if manifests were applied, by the API server's dry run.

Nothing is written. The server's spec and each of its children are applied with dryRun=All under the operator's name, so
that defaults, admission and other people's fields are as they would be.
"""

from __future__ import annotations

import difflib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import yaml

from octavo_operator import names
from octavo_operator.cluster import Cluster, Refusal, UnavailableError
from octavo_operator.desired import objects
from octavo_operator.desired.deployment import revision
from octavo_operator.render import manifests
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server

NOISE = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp")


async def diff(cluster: Cluster, text: str, defaults: EngineDefaults, namespace: str) -> str:
    """Unified diffs of all children that would change, with what that does to pods; empty when nothing would."""
    found: list[str] = []
    monitors = await cluster.knows("PodMonitor")
    for server in manifests(text, namespace, defaults):
        live = await cluster.get(names.KIND, server.namespace, server.name)
        uid = live["metadata"]["uid"] if live else ""
        for body in objects(server, defaults, pod_monitors_known=monitors):
            found += [chunk async for chunk in _of(cluster, server, body, uid)]
    return "".join(found)


async def _of(cluster: Cluster, server: Server, body: dict[str, Any], uid: str) -> AsyncIterator[str]:
    present = await cluster.get(body["kind"], server.namespace, body["metadata"]["name"])
    metadata = {name: value for name, value in body["metadata"].items() if name != "ownerReferences"}
    if uid:
        owners = [{**owner, "uid": uid} for owner in body["metadata"]["ownerReferences"]]
        metadata["ownerReferences"] = owners
    answer = await cluster.apply({**body, "metadata": metadata}, dry_run=True)
    if isinstance(answer, Refusal):
        raise UnavailableError(f"{body['kind']} {server.name}: the API server would refuse it: {answer.message}")
    lines = list(_lines(f"{body['kind']}/{server.namespace}/{server.name}", present, answer))
    if lines and body["kind"] == "Deployment" and present and revision(present) != revision(body):
        yield f"# the pod template changes, so the engine pods of {server.name} are replaced\n"
    for line in lines:
        yield line


def _lines(title: str, before: dict[str, Any] | None, after: dict[str, Any]) -> Iterator[str]:
    def text(document: dict[str, Any] | None) -> list[str]:
        if document is None:
            return []
        kept = {name: value for name, value in document.items() if name != "status"}
        annotations = kept["metadata"].get("annotations", {})
        annotations = {k: v for k, v in annotations.items() if not k.startswith("octavo.dev/")}
        kept["metadata"] = {k: v for k, v in kept["metadata"].items() if k not in NOISE} | {"annotations": annotations}
        return yaml.safe_dump(kept, sort_keys=True, width=120).splitlines(keepends=True)

    return difflib.unified_diff(text(before), text(after), f"live/{title}", f"wanted/{title}")
