"""Watches, by kopf: what an event brings goes into the cache, and if it is news its server's key is woken. No more.

Only `on.event` is used: kopf's other handlers write annotations or finalizers into the objects. Watches carry a label
selector, so that of other people's objects none is sent.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import kopf

from octavo_operator import names
from octavo_operator.cache import WATCHED, Cache, key_of, selector_of
from octavo_operator.cluster import KINDS
from octavo_operator.names import Key


def registry(cache: Cache, wake: Callable[[Key], None]) -> kopf.OperatorRegistry:
    found = kopf.OperatorRegistry()

    @kopf.on.login(registry=found)
    def login(**kwargs: Any) -> Any:
        # The same order as in cluster.py, so that both ways lead to one API server.
        if os.environ.get("KUBECONFIG") or not os.environ.get("KUBERNETES_SERVICE_HOST"):
            return kopf.login_with_kubeconfig(**kwargs)
        return kopf.login_with_service_account(**kwargs)

    for kind in WATCHED:
        group, version, plural = _resource(kind)
        labels = None if kind == names.KIND else {names.SERVER_LABEL: kopf.PRESENT}
        kopf.on.event(group, version, plural, id=plural, labels=labels, registry=found)(_handler(kind, cache, wake))
    return found


def _handler(kind: str, cache: Cache, wake: Callable[[Key], None]) -> Callable[..., Any]:
    async def handler(type: str | None, event: Mapping[str, Any], **_: Any) -> None:
        document = event["object"]
        news = cache.drop(kind, document["metadata"]) if type == "DELETED" else cache.put(kind, document)
        if news and (kind != names.KIND or is_news(type, document)):
            wake(key_of(kind, document["metadata"]))

    return handler


def settings() -> kopf.OperatorSettings:
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False
    chosen.peering.standalone = True
    chosen.persistence.diffbase_storage = _NoDiffs()
    chosen.persistence.progress_storage = _NoProgress()
    # Kinds are known, and namespaces are given or all: nothing to discover, and no rights on CRDs and namespaces.
    chosen.scanning.disabled = True
    for kind in WATCHED[1:]:
        chosen.watching.label_selectors[_resource(kind)] = selector_of(kind) or names.SERVER_LABEL
    logging.getLogger("kopf").setLevel(logging.WARNING)
    return chosen


class _NoDiffs(kopf.DiffBaseStorage):
    """kopf compares each object with its state before, for handlers that we have none of. That is half of its time."""

    def build(self, *, body: Any, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: Any) -> None:
        return None

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        pass


class _NoProgress(kopf.ProgressStorage):
    """Nor is there progress of handlers to be kept: an event is handled when it is in the cache."""

    def fetch(self, *, key: Any, body: Any) -> None:
        return None

    def store(self, *, key: Any, record: Any, body: Any, patch: Any) -> None:
        pass

    def purge(self, *, key: Any, body: Any, patch: Any) -> None:
        pass

    def touch(self, *, body: Any, patch: Any, value: Any) -> None:
        pass

    def clear(self, *, essence: Any) -> Any:
        return essence


def is_news(event_type: str | None, body: Mapping[str, Any]) -> bool:
    """Whether an event about a server is more than the echo of the status that we wrote ourselves.

    event_type is None for what was there when the watch began. A new spec raises the generation above the observed one.
    """
    metadata = body.get("metadata", {})
    observed = body.get("status", {}).get("observedGeneration")
    return event_type != "MODIFIED" or metadata.get("generation") != observed or "deletionTimestamp" in metadata


def _resource(kind: str) -> tuple[str, str, str]:
    group, _, version = KINDS[kind].group_version.rpartition("/")
    return group, version, KINDS[kind].plural
