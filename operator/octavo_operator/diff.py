"""How the cluster's objects would change if manifests were applied, by the API server's dry run.

Nothing is written. Each of a server's children is applied with dryRun=All under the operator's name, so that defaults,
admission and other people's fields are as they would be. What is not in a manifest stays as it is in the cluster: the
number of replicas that an autoscaler has set, and pods that only another operator would make differently.
"""

from __future__ import annotations

import difflib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

import yaml

from octavo_operator import names
from octavo_operator.causes import Wanted
from octavo_operator.cluster import Cluster, Refusal, UnavailableError
from octavo_operator.conditions import OPERATOR_CHANGED
from octavo_operator.desired import objects
from octavo_operator.desired.deployment import revision
from octavo_operator.observed import World, read_pod
from octavo_operator.render import manifests
from octavo_operator.replicas import replicas
from octavo_operator.report import RevisionStatus
from octavo_operator.rollout import Decision, decide
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server, parse
from octavo_operator.status import read_part

NOISE = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp")


async def diff(cluster: Cluster, text: str, defaults: EngineDefaults, namespace: str, now: datetime) -> str:
    """Unified diffs of all children that would change, with what that does to pods; empty when nothing would."""
    found: list[str] = []
    monitors = await cluster.knows("PodMonitor")
    for manifest in manifests(text, namespace, defaults):
        live = await cluster.get(names.KIND, manifest.namespace, manifest.name)
        server = _in_place_of(live, manifest) if live else manifest
        wanted = objects(server, defaults, pod_monitors_known=monitors)
        if live:
            rollout = await _rollout(cluster, server, wanted[0], live, now)
            wanted[0] = rollout.deployment
            if rollout.held == "update":
                found.append(f"# {server.name}: {OPERATOR_CHANGED}\n")
        for body in wanted:
            found += [chunk async for chunk in _of(cluster, server, body)]
    return "".join(found)


def _in_place_of(live: dict[str, Any], manifest: Server) -> Server:
    """The server as it would be: applying a manifest leaves replicas alone where it does not name them."""
    spec = manifest.spec
    if "replicas" not in spec.model_fields_set:
        spec = spec.model_copy(update={"replicas": live["spec"]["replicas"]})
    return replace(manifest, uid=live["metadata"]["uid"], spec=spec)


async def _rollout(
    cluster: Cluster, server: Server, wanted: dict[str, Any], live: dict[str, Any], now: datetime
) -> Decision:
    """What the operator would make of a changed pod template. Engines are not asked: whether they are busy passes.

    What it has made of the age of pods stands in the status, so here they have none.
    """
    present = await cluster.get("Deployment", server.namespace, server.name)
    pods = await cluster.list("Pod", server.namespace, labels=f"{names.SERVER_LABEL}={server.name}")
    found = replicas(World(pods=tuple(map(read_pod, pods))), Wanted("", 0, None, None), 0.0)
    before = read_part(RevisionStatus, live.get("status", {}).get("revision"))
    asked = getattr(parse(live), "asked", None)
    generation = server.generation if asked == server.asked else None
    return decide(server, wanted, present, found, before, None, now, 0.0, seen_generation=generation)


async def _of(cluster: Cluster, server: Server, body: dict[str, Any]) -> AsyncIterator[str]:
    present = await cluster.get(body["kind"], server.namespace, body["metadata"]["name"])
    answer = await cluster.apply(body, dry_run=True)
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
