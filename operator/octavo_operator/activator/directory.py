"""Which server a port stands for, what the server asks of clients, and where its engines are. Reads the API server.

The operator gives each server that may sleep a port of the activator, in the EndpointSlice by which the server's
Service leads here. So a request says by the way it came which server it is for: neither a Host header that an Ingress
has changed nor one that a client made up can lead it to another one. What is read is kept for a second.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo_operator import names
from octavo_operator.cluster import Cluster
from octavo_operator.names import Key, Name, Namespace

FRESH_S = 1.0
PORTS_KEPT = 1024


@dataclass(frozen=True)
class Facts:
    """Of the resource, as far as clients are concerned."""

    asks_for_keys: bool
    served_names: tuple[str, ...]
    max_model_len: int | None = None
    stage: str | None = None
    """Of the pod that is farthest along, as the operator tells it; None where there is no pod."""
    port: int | None = None
    """Of the activator, by the operator's word."""
    failed: bool = False
    """Its engine ended, or it cannot have what it needs; the resource says which."""


@dataclass(frozen=True)
class Endpoint:
    address: str
    ready: bool


class Directory:
    def __init__(self, cluster: Cluster, namespaces: Sequence[str]) -> None:
        self._cluster = cluster
        self._namespaces: Sequence[str | None] = namespaces or (None,)
        self._ports: dict[int, tuple[float, tuple[Key, ...]]] = {}

    async def servers_at(self, port: int) -> tuple[Key, ...]:
        """One, where all is well. None: the server is gone. Several: the operator is about to give others out."""
        read_at, found = self._ports.get(port, (-FRESH_S, ()))
        if time.monotonic() - read_at < FRESH_S:
            return found
        selector = f"{names.ACTIVATOR_PORT_LABEL}={port},{names.SLICE_MANAGED_BY_LABEL}={names.MANAGED_BY}"
        slices = [
            document
            for namespace in self._namespaces
            for document in await self._cluster.list("EndpointSlice", namespace, labels=selector)
        ]
        found = tuple(map(_owner, slices))
        if len(self._ports) >= PORTS_KEPT:
            self._ports.clear()
        self._ports[port] = time.monotonic(), found
        return found

    async def facts(self, key: Key) -> Facts | None:
        """None where there is no such server."""
        document = await self._cluster.get(names.KIND, *key)
        return None if document is None else read_facts(document)

    async def endpoints(self, key: Key) -> list[Endpoint]:
        """The server's engine pods that have an address and are not about to end."""
        slices = await self._cluster.list("EndpointSlice", key[0], labels=f"{names.SERVICE_NAME_LABEL}={key[1]}")
        return [endpoint for document in slices for endpoint in read_endpoints(document)]


def _owner(document: Mapping[str, Any]) -> Key:
    metadata = document["metadata"]
    return Namespace(metadata["namespace"]), Name(metadata["labels"][names.SERVER_LABEL])


def read_facts(document: Mapping[str, Any]) -> Facts:
    spec, status = document.get("spec") or {}, document.get("status") or {}
    pods = [pod for pod in status.get("pods") or [] if pod.get("stage") != names.POD_TERMINATING]
    return Facts(
        asks_for_keys="apiKeysSecretRef" in (spec.get("expose") or {}),
        served_names=tuple(spec["model"].get("servedNames") or [document["metadata"]["name"]]),
        max_model_len=(status.get("engine") or {}).get("maxModelLen"),
        stage=pods[0].get("stage") if pods else None,
        port=status.get("activatorPort"),
        failed=status.get("phase") == names.FAILED,
    )


def read_endpoints(document: Mapping[str, Any]) -> list[Endpoint]:
    if document["metadata"].get("labels", {}).get(names.SLICE_MANAGED_BY_LABEL) == names.MANAGED_BY:
        return []  # it leads here
    found = []
    for endpoint in document.get("endpoints") or []:
        conditions = endpoint.get("conditions") or {}
        if not conditions.get("terminating"):
            found += [Endpoint(address, bool(conditions.get("ready"))) for address in endpoint["addresses"][:1]]
    return found
