"""Watches, by kopf: an event about a server or one of its children wakes the server's key. Nothing else happens here.

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
from octavo_operator.names import Key, Name, Namespace

CHILDREN = (
    ("apps", "v1", "deployments"),
    ("", "v1", "services"),
    ("", "v1", "pods"),
    ("policy", "v1", "poddisruptionbudgets"),
)


def registry(wake: Callable[[Key], None]) -> kopf.OperatorRegistry:
    found = kopf.OperatorRegistry()

    @kopf.on.login(registry=found)
    def login(**kwargs: Any) -> Any:
        # The same order as in cluster.py, so that both ways lead to one API server.
        if os.environ.get("KUBECONFIG") or not os.environ.get("KUBERNETES_SERVICE_HOST"):
            return kopf.login_with_kubeconfig(**kwargs)
        return kopf.login_with_service_account(**kwargs)

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=found)
    async def server(type: str | None, body: Mapping[str, Any], **_: Any) -> None:
        if is_news(type, body):
            wake(key_of_server(body))

    async def child(body: Mapping[str, Any], **_: Any) -> None:
        wake(key_of_child(body))

    for group, version, plural in CHILDREN:
        labels = {names.SERVER_LABEL: kopf.PRESENT}
        kopf.on.event(group, version, plural, id=f"child-{plural}", labels=labels, registry=found)(child)
    return found


def settings() -> kopf.OperatorSettings:
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False
    chosen.peering.standalone = True
    # Kinds are known, and namespaces are given or all: nothing to discover, and no rights on CRDs and namespaces.
    chosen.scanning.disabled = True
    for resource in CHILDREN:
        chosen.watching.label_selectors[resource] = names.SERVER_LABEL
    logging.getLogger("kopf").setLevel(logging.WARNING)
    return chosen


def is_news(event_type: str | None, body: Mapping[str, Any]) -> bool:
    """Whether an event about a server is more than the echo of the status that we wrote ourselves.

    event_type is None for what was there when the watch began. A new spec raises the generation above the observed one.
    """
    metadata = body.get("metadata", {})
    observed = body.get("status", {}).get("observedGeneration")
    return event_type != "MODIFIED" or metadata.get("generation") != observed or "deletionTimestamp" in metadata


def key_of_server(body: Mapping[str, Any]) -> Key:
    return Namespace(body["metadata"]["namespace"]), Name(body["metadata"]["name"])


def key_of_child(body: Mapping[str, Any]) -> Key:
    metadata = body["metadata"]
    return Namespace(metadata["namespace"]), Name(metadata["labels"][names.SERVER_LABEL])
