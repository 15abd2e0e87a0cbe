"""Who reaches a server's pods, and whom they reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo_engine.status import API_PORT, MANAGEMENT_PORT
from octavo_operator.desired import common
from octavo_operator.expose import Peer
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server
from octavo_operator.wake import NAMESPACE_NAME

EVERY_NAMESPACE: dict[str, Any] = {"namespaceSelector": {}}
DNS = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]


def network_policy(server: Server, defaults: EngineDefaults) -> dict[str, Any] | None:
    asked = server.spec.expose.network_policy
    if asked is None:
        return None
    operator = {"namespaceSelector": {"matchLabels": {NAMESPACE_NAME: defaults.operator_namespace}}}
    metrics = _peers(asked.allow_metrics_from) if asked.allow_metrics_from else [EVERY_NAMESPACE]
    clients = _peers(asked.allow_from) if asked.allow_from else [{"podSelector": {}}]
    ingress = [
        {"ports": [_port(API_PORT)], "from": clients},
        {"ports": [_port(MANAGEMENT_PORT)], "from": [operator, *metrics]},
    ]
    everything = asked.egress == "All" or server.spec.model.is_downloaded
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": common.metadata(server),
        "spec": {
            "podSelector": {"matchLabels": common.selector(server)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            # Names are asked for even where nobody is called; waiting for their answers would take seconds.
            "egress": [{}] if everything else [{"ports": DNS}],
        },
    }


def _port(number: int) -> dict[str, Any]:
    return {"port": number, "protocol": "TCP"}


def _peers(peers: Sequence[Peer]) -> list[dict[str, Any]]:
    found = []
    for peer in peers:
        selectors: dict[str, Any] = {}
        if peer.namespace_labels is not None:
            selectors["namespaceSelector"] = {"matchLabels": peer.namespace_labels} if peer.namespace_labels else {}
        if peer.pod_labels is not None:
            selectors["podSelector"] = {"matchLabels": peer.pod_labels} if peer.pod_labels else {}
        found.append(selectors)
    return found
