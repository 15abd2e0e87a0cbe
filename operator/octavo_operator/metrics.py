"""The operator's own metrics. Numbers that alerts are made of; stories are in the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo_operator.names import Key

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

LEADER = Gauge("octavo_operator_leader", "1 while this operator holds the lease.", registry=REGISTRY)
SERVERS = Gauge("octavo_operator_servers", "LLMServers that are looked after.", registry=REGISTRY)
LOOKS = Histogram(
    "octavo_operator_look_seconds",
    "Time of one look at a server: observe, decide, apply, report.",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 15),
    registry=REGISTRY,
)
ERRORS = Counter("octavo_operator_look_errors", "Looks that failed and are tried again.", registry=REGISTRY)
REQUESTS = Counter(
    "octavo_operator_api_requests",
    "Answers of the API server; code 0 stands for none.",
    ["verb", "kind", "code"],
    registry=REGISTRY,
)


class ServersCollector(Collector):
    """What the resources' statuses say, for alerts: made when asked for, so that a thousand servers cost nothing."""

    def __init__(self) -> None:
        self._told: dict[Key, Mapping[str, Any]] = {}

    def tell(self, key: Key, status: Mapping[str, Any]) -> None:
        """status: the document as it was written."""
        self._told[key] = status

    def forget(self, key: Key) -> None:
        self._told.pop(key, None)

    def collect(self) -> Iterator[Metric]:
        labels = ["namespace", "server"]
        replicas = GaugeMetricFamily(
            "octavo_server_replicas", "Engine pods of an LLMServer: desired, ready, updated.", labels=[*labels, "state"]
        )
        conditions = GaugeMetricFamily(
            "octavo_server_condition",
            "1 where the condition holds, 0 where not; none while it is Unknown.",
            labels=[*labels, "type", "reason"],
        )
        for (namespace, name), status in list(self._told.items()):
            counts = {
                "desired": int(str(status["ready"]).rpartition("/")[2]),
                "ready": status["readyReplicas"],
                "updated": status["updatedReplicas"],
            }
            for state, count in counts.items():
                replicas.add_metric([namespace, name, state], count)
            for condition in status["conditions"]:
                if condition["status"] != "Unknown":
                    value = float(condition["status"] == "True")
                    conditions.add_metric([namespace, name, condition["type"], condition["reason"]], value)
        yield replicas
        yield conditions


STATUSES = ServersCollector()
REGISTRY.register(STATUSES)
