"""What all children have in common: labels and the owner, who takes them along when it goes."""

from __future__ import annotations

from typing import Any

from octavo_operator import names
from octavo_operator.spec import Server


def selector(server: Server) -> dict[str, str]:
    """Which pods are the server's. The Deployment's selector is made of it and can never change."""
    return {names.SERVER_LABEL: server.name}


def labels(server: Server) -> dict[str, str]:
    return {
        **selector(server),
        "app.kubernetes.io/name": "octavo",
        "app.kubernetes.io/instance": server.name,
        "app.kubernetes.io/component": "engine",
        names.MANAGED_BY_LABEL: names.MANAGED_BY,
    }


def metadata(server: Server) -> dict[str, Any]:
    """Name, labels and owner of a child. A server that is only a manifest (no uid) owns nothing yet.

    blockOwnerDeletion is left out: it needs rights on the owner's finalizers, and nothing here waits for children.
    """
    owner = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": server.name,
        "uid": server.uid,
        "controller": True,
    }
    made: dict[str, Any] = {"name": server.name, "namespace": server.namespace, "labels": labels(server)}
    return made | ({"ownerReferences": [owner]} if server.uid else {})
