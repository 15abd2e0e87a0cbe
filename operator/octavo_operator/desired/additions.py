"""What podTemplate adds to the engine's pod: sidecars by name, the engine's variables and mounts, volumes.

pod_template.py decides what may be asked for; here nothing is decided but where it goes, and that a sidecar is as
confined as the engine.
"""

from __future__ import annotations

from typing import Any

from octavo_operator import names
from octavo_operator.pod_template import Container, PodSpec, Volume

CONFINED: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
"""What every container of an engine's pod has, as the restricted Pod Security Standard asks for."""


def add(pod: dict[str, Any], extra: PodSpec) -> dict[str, Any]:
    """The pod's spec with what `extra` adds; an absent field leaves no trace, so that it restarts nobody."""
    engine, *others = pod["containers"]
    sidecars = []
    for container in extra.containers or ():
        if container.name == names.ENGINE_CONTAINER:
            mine = _document(container)
            engine = {
                **engine,
                "env": [*engine["env"], *mine.get("env", [])],
                "volumeMounts": [*engine["volumeMounts"], *mine.get("volumeMounts", [])],
            }
        else:
            sidecars.append(_sidecar(container))
    pod = {**pod, "containers": [engine, *others, *sidecars]}
    if extra.init_containers:
        pod["initContainers"] = [*pod.get("initContainers", []), *map(_sidecar, extra.init_containers)]
    if extra.volumes:
        pod["volumes"] = [*pod["volumes"], *map(_volume, extra.volumes)]
    if extra.scheduler_name:
        pod["schedulerName"] = extra.scheduler_name
    if extra.host_aliases:
        pod["hostAliases"] = [alias.model_dump(by_alias=True) for alias in extra.host_aliases]
    return pod


def _sidecar(container: Container) -> dict[str, Any]:
    given = container.security_context
    chosen = given.model_dump(by_alias=True, exclude_none=True) if given else {}
    allowed = ("runAsUser", "runAsGroup", "readOnlyRootFilesystem")
    document = _document(container)
    if container.resources:
        document["resources"] = container.resources.document()
    return {**document, "securityContext": {**CONFINED, **{name: chosen[name] for name in allowed if name in chosen}}}


def _document(container: Container) -> dict[str, Any]:
    return container.model_dump(
        by_alias=True, exclude_none=True, exclude={"security_context", "resources"}, mode="json"
    )


def _volume(volume: Volume) -> dict[str, Any]:
    document = volume.model_dump(by_alias=True, exclude_none=True, mode="json")
    if limit := document.get("emptyDir", {}).get("sizeLimit"):
        document["emptyDir"]["sizeLimit"] = str(limit)
    return document
