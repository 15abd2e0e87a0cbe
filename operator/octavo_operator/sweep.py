"""Compares what is there with what the watches told, and finds what they lost. Called by run.py, twice a minute.

A watch can die without a word: a proxy that swallows events, a connection that is half open, a stream that was cut and
taken up a moment too late. Lists of metadata show it: an object that is there in a newer state, or gone, while nothing
was told within GRACE_S. It is read then, its server is looked at, and an operator that loses again starts anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from octavo_operator import metrics
from octavo_operator.cache import WATCHED, Cache, key_of, selector_of
from octavo_operator.cluster import Cluster
from octavo_operator.names import Key

log = logging.getLogger(__name__)

GRACE_S = 2.0
"""How far behind the list a watch may be."""


class Sweep:
    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        wake: Callable[[Key], None],
        namespaces: Sequence[str],
        grace_s: float = GRACE_S,
    ) -> None:
        self._cluster, self._cache, self._wake = cluster, cache, wake
        self._grace_s = grace_s
        self._namespaces: Sequence[str | None] = namespaces or (None,)

    async def fill(self) -> None:
        """Reads everything, before anything is decided: what is not read yet must not seem to be missing."""
        for kind in WATCHED:
            for namespace in self._namespaces:
                async for documents, _ in self._cluster.pages(kind, namespace, labels=selector_of(kind)):
                    for document in documents:
                        self._cache.put(kind, document)

    async def lost(self) -> dict[str, int]:
        """How many objects of each kind the watches did not tell of. They are in the cache now."""
        behind: dict[str, list[dict[str, Any]]] = {}
        gone: dict[str, list[tuple[Key, dict[str, Any]]]] = {}
        for kind in WATCHED:
            behind[kind], gone[kind] = await self._compare(kind)
        if not any(behind.values()) and not any(gone.values()):
            return {}
        await asyncio.sleep(self._grace_s)
        found: dict[str, int] = {}
        for kind in WATCHED:
            for metadata in behind[kind]:
                if (self._cache.version(kind, metadata) or 0) < int(metadata["resourceVersion"]):
                    found[kind] = found.get(kind, 0) + await self._read(kind, metadata)
            for key, metadata in gone[kind]:
                if self._cache.version(kind, metadata) == int(metadata["resourceVersion"]):
                    found[kind] = found.get(kind, 0) + self._cache.drop(kind, metadata)
                    self._wake(key)
        found = {kind: count for kind, count in found.items() if count}
        for kind, count in found.items():
            metrics.LOST.labels(kind).inc(count)
            log.warning("a watch did not tell of changes kind=%s count=%d", kind, count)
        return found

    async def _compare(self, kind: str) -> tuple[list[dict[str, Any]], list[tuple[Key, dict[str, Any]]]]:
        """Metadata of what is newer than we know, and of what we know but is not there."""
        behind: list[dict[str, Any]] = []
        there: set[str] = set()
        listed_at: int | None = None
        for namespace in self._namespaces:
            async for documents, version in self._cluster.pages(
                kind, namespace, labels=selector_of(kind), only_metadata=True
            ):
                listed_at = min(version, listed_at) if listed_at is not None else version
                for document in documents:
                    metadata = document["metadata"]
                    there.add(metadata["uid"])
                    if (self._cache.version(kind, metadata) or 0) < int(metadata["resourceVersion"]):
                        metadata.pop("managedFields", None)
                        behind.append(metadata)
        gone = [
            (key, metadata)
            for key, metadata in self._cache.known(kind)
            # What is newer than the list was made after it.
            if metadata["uid"] not in there and int(metadata["resourceVersion"]) <= (listed_at or 0)
        ]
        return behind, gone

    async def _read(self, kind: str, metadata: dict[str, Any]) -> int:
        document = await self._cluster.get(kind, metadata["namespace"], metadata["name"])
        news = document is not None and self._cache.put(kind, document)
        if news:
            self._wake(key_of(kind, metadata))
        return int(news)
