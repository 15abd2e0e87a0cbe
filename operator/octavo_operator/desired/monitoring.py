"""How Prometheus finds a server's metrics: a PodMonitor, or annotations on the pods.

The annotations are not part of the Deployment's template: whether they are wanted depends on what is installed in the
cluster, and installing the Prometheus operator must not restart engines. They are applied to the pods themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo_engine.status import MANAGEMENT_PORT
from octavo_operator import names
from octavo_operator.desired import common
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server

POD_MONITOR_API = "monitoring.coreos.com/v1"
SCRAPE_ANNOTATIONS = {
    "prometheus.io/scrape": "true",
    "prometheus.io/port": str(MANAGEMENT_PORT),
    "prometheus.io/path": "/metrics",
}


def wants_pod_monitor(server: Server, *, pod_monitors_known: bool) -> bool:
    return pod_monitors_known and server.spec.observability.pod_monitor != "Disabled"


def pod_annotations(server: Server, *, pod_monitors_known: bool) -> dict[str, str]:
    """What the server's pods should be annotated with, and nothing where a PodMonitor does the work."""
    if server.spec.observability.pod_monitor != "Auto" or pod_monitors_known:
        return {}
    # Whoever writes these annotations into podTemplate knows better; the pods are born with them.
    given = server.spec.pod_template.metadata.annotations or {}
    return {name: value for name, value in SCRAPE_ANNOTATIONS.items() if name not in given}


def pod_monitor_labels(server: Server, common_ones: Mapping[str, str]) -> dict[str, str]:
    """common_ones: of the operator's settings, for every PodMonitor; the server's own come before them."""
    return {**common_ones, **(server.spec.observability.labels or {}), **common.labels(server)}


def pod_monitor(server: Server, defaults: EngineDefaults) -> dict[str, Any]:
    metadata = common.metadata(server)
    metadata["labels"] = pod_monitor_labels(server, defaults.pod_monitor_labels)
    return {
        "apiVersion": POD_MONITOR_API,
        "kind": "PodMonitor",
        "metadata": metadata,
        "spec": {
            "selector": {"matchLabels": common.selector(server)},
            "podMetricsEndpoints": [{"port": names.MANAGEMENT_PORT_NAME, "path": "/metrics"}],
            "podTargetLabels": [names.SERVER_LABEL],
        },
    }
