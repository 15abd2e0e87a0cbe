"""What the watches have told: the newest known state of every server, child and pod, by server. Read by reconcile.py.

With it a look asks the API server nothing, so that a thousand servers cost what they write. Three sources fill it: the
watches, the answers to our own writes, and the sweep, which lists what is there and finds what a watch has lost. They
overtake one another, so of two states of one object the one with the higher resourceVersion counts (Kubernetes has
promised since 1.35 that these are numbers that grow; etcd has always made them so).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from octavo_operator import names, observed
from octavo_operator.names import Key, Name, Namespace
from octavo_operator.observed import Pod

Document = dict[str, Any]
WATCHED = (
    *(names.KIND, "Deployment", "Service", "PodDisruptionBudget", "Pod"),
    *("Job", "PersistentVolumeClaim", "Ingress", "NetworkPolicy", "HorizontalPodAutoscaler", "EndpointSlice"),
)
"""Kinds that every cluster has. Others, such as PodMonitors, come and go with their CRDs, and are read at each look."""
SELECTORS = {
    # The controller of EndpointSlices copies the Service's labels onto its own ones, which are many and change often.
    "EndpointSlice": f"{names.SERVER_LABEL},{names.SLICE_MANAGED_BY_LABEL}={names.MANAGED_BY}",
}
Id = tuple[str, str]
"""Kind and name, within a server's namespace."""
GRAVES = 4096
"""Deleted objects that are remembered, so that an answer which comes late does not raise them from the dead."""


@dataclass(frozen=True, slots=True)
class _Entry:
    version: int
    uid: str
    state: bytes | Pod
    """Documents are kept as compact JSON: as Python objects they take eight times as much."""


@dataclass(frozen=True)
class Seen:
    resource: Document
    children: Mapping[str, Document]
    """By kind, those with the server's name."""
    pods: tuple[Pod, ...]


class Cache:
    def __init__(self) -> None:
        self._servers: dict[Key, dict[Id, _Entry]] = {}
        self._graves: dict[tuple[Namespace, Id], int] = {}

    def put(self, kind: str, document: Mapping[str, Any]) -> bool:
        """Whether this is newer than what was known."""
        metadata = document["metadata"]
        key, identity, version = _place(kind, metadata)
        old = self._servers.get(key, {}).get(identity)
        newest = max(old.version if old else 0, self._graves.get((key[0], identity), 0))
        if version <= newest:
            return False
        state = observed.read_pod(document) if kind == "Pod" else _pack(kind, document)
        self._servers.setdefault(key, {})[identity] = _Entry(version, metadata["uid"], state)
        return True

    def drop(self, kind: str, metadata: Mapping[str, Any]) -> bool:
        """The object is gone. metadata: its last, with the version of its deletion. Whether that is news."""
        key, identity, version = _place(kind, metadata)
        entries = self._servers.get(key, {})
        old = entries.get(identity)
        if old is not None and old.version > version:
            return False  # another of that name has come since
        self._graves[key[0], identity] = version
        while len(self._graves) > GRAVES:
            del self._graves[next(iter(self._graves))]
        if entries.pop(identity, None) is None:
            return False
        if not entries:
            del self._servers[key]
        return True

    def version(self, kind: str, metadata: Mapping[str, Any]) -> int | None:
        key, identity, _ = _place(kind, metadata)
        entry = self._servers.get(key, {}).get(identity)
        return entry.version if entry else None

    def seen(self, key: Key) -> Seen | None:
        """None where there is no such server."""
        entries = self._servers.get(key, {})
        resource = entries.get((names.KIND, key[1]))
        if resource is None:
            return None
        children = {
            kind: json.loads(entry.state)
            for (kind, name), entry in entries.items()
            if isinstance(entry.state, bytes) and kind != names.KIND and name == key[1]
        }
        pods = tuple(entry.state for entry in entries.values() if isinstance(entry.state, Pod))
        assert isinstance(resource.state, bytes)
        return Seen(json.loads(resource.state), children, pods)

    def servers(self) -> list[Key]:
        """Of all of which anything is known: of some there may be children alone, whose server has gone before them."""
        return list(self._servers)

    def present(self) -> list[Key]:
        """Servers that are there."""
        return [key for key, entries in self._servers.items() if (names.KIND, key[1]) in entries]

    def documents(self, kind: str) -> Iterator[tuple[Key, Document]]:
        """Every child of the kind that has its server's name."""
        for key, entries in self._servers.items():
            entry = entries.get((kind, key[1]))
            if entry is not None and isinstance(entry.state, bytes):
                yield key, json.loads(entry.state)

    def known(self, kind: str) -> Iterator[tuple[Key, Document]]:
        """Of each object of the kind: its server, and as much metadata as `drop` wants."""
        for key, entries in list(self._servers.items()):
            for (of_kind, name), entry in list(entries.items()):
                if of_kind == kind:
                    labels = {names.SERVER_LABEL: key[1]}
                    metadata = {"namespace": key[0], "name": name, "labels": labels, "uid": entry.uid}
                    yield key, {**metadata, "resourceVersion": str(entry.version)}


def selector_of(kind: str) -> str | None:
    """Labels of the objects of a kind that the watches and lists ask for."""
    return None if kind == names.KIND else SELECTORS.get(kind, names.SERVER_LABEL)


def key_of(kind: str, metadata: Mapping[str, Any]) -> Key:
    """The server that the object is, or belongs to."""
    name = metadata["name"] if kind == names.KIND else metadata["labels"][names.SERVER_LABEL]
    return Namespace(metadata["namespace"]), Name(name)


def _place(kind: str, metadata: Mapping[str, Any]) -> tuple[Key, Id, int]:
    return key_of(kind, metadata), (kind, metadata["name"]), int(metadata["resourceVersion"])


def _pack(kind: str, document: Mapping[str, Any]) -> bytes:
    # The items of a list do not say of what kind they are, and whoever deletes or scales one has to know.
    kept = {name: value for name, value in document["metadata"].items() if name != "managedFields"}
    return json.dumps({**document, "kind": kind, "metadata": kept}, separators=(",", ":")).encode()
