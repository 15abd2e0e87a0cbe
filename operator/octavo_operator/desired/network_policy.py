"""Who reaches a server's pods, and whom they reach; and who reaches it while it sleeps, at the activator.

A server that may sleep lets the activator in, and so whoever reaches the activator at the server's port there. Those
are kept to the ones whom the server itself lets in, by a policy of the activator's pods with a rule for each such port.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from octavo_engine.status import API_PORT, MANAGEMENT_PORT
from octavo_operator import names
from octavo_operator.desired import common
from octavo_operator.expose import NetworkPolicy, Peer
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server
from octavo_operator.wake import ACTIVATOR_LABELS, NAMESPACE_NAME, PORTS, may_sleep

Peers = list[dict[str, Any]]

EVERY_NAMESPACE: dict[str, Any] = {"namespaceSelector": {}}
DNS = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]


def network_policy(server: Server, defaults: EngineDefaults) -> dict[str, Any] | None:
    asked = server.spec.expose.network_policy
    if asked is None:
        return None
    operator = {"namespaceSelector": {"matchLabels": {NAMESPACE_NAME: defaults.operator_namespace}}}
    metrics = _peers(asked.allow_metrics_from) if asked.allow_metrics_from else [EVERY_NAMESPACE]
    clients = _peers(asked.allow_from) if asked.allow_from else [{"podSelector": {}}]
    if may_sleep(server):
        clients.append({**operator, "podSelector": {"matchLabels": dict(ACTIVATOR_LABELS)}})
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


def clients_elsewhere(asked: NetworkPolicy, namespace: str) -> Peers:
    """Who may ask the API, for a policy in another namespace. namespace: the server's."""
    here = {"namespaceSelector": {"matchLabels": {NAMESPACE_NAME: namespace}}}
    return [{**here, **peer} for peer in _peers(asked.allow_from)] if asked.allow_from else [here]


def activator_policy(deployment: Mapping[str, Any], name: str, allowed: Mapping[int, Peers]) -> dict[str, Any]:
    """Who reaches which port of the activator. Ports of servers without a policy, and free ones, are for everybody.

    deployment: the activator's, which the policy goes with. allowed: by port, whom a server with a policy lets in; none
    means nobody.
    """
    metadata = deployment["metadata"]
    owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": metadata["name"], "uid": metadata["uid"]}
    # An empty list, of ports as of peers, would mean all of them to Kubernetes: such a rule is left out.
    rules: list[dict[str, Any]]
    rules = [{"ports": [_port(port)], "from": peers} for port, peers in sorted(allowed.items()) if peers]
    if free := list(_others(allowed)):
        rules.append({"ports": free})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": name,
            "namespace": metadata["namespace"],
            "labels": {names.MANAGED_BY_LABEL: names.MANAGED_BY, **ACTIVATOR_LABELS},
            "ownerReferences": [owner],
        },
        "spec": {
            "podSelector": {"matchLabels": deployment["spec"]["selector"]["matchLabels"]},
            "policyTypes": ["Ingress"],
            "ingress": rules,
        },
    }


def _others(taken: Mapping[int, Peers]) -> Iterator[dict[str, Any]]:
    """Ranges of the activator's ports between those that are taken."""
    first = PORTS.start
    for port in (*sorted(taken), PORTS.stop):
        if port > first:
            yield {"port": first, "endPort": port - 1, "protocol": "TCP"}
        first = port + 1


def _port(number: int) -> dict[str, Any]:
    return {"port": number, "protocol": "TCP"}


def _peers(peers: Sequence[Peer]) -> Peers:
    found = []
    for peer in peers:
        selectors: dict[str, Any] = {}
        if peer.namespace_labels is not None:
            selectors["namespaceSelector"] = {"matchLabels": peer.namespace_labels} if peer.namespace_labels else {}
        if peer.pod_labels is not None:
            selectors["podSelector"] = {"matchLabels": peer.pod_labels} if peer.pod_labels else {}
        found.append(selectors)
    return found
