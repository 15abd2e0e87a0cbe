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
QUEUE = Gauge(
    "octavo_operator_queue_length",
    "LLMServers that are due for a look and wait for their turn, as so many are looked at already.",
    registry=REGISTRY,
)
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
LOST = Counter(
    "octavo_operator_watch_lost",
    "Changes that a list showed and no watch told of; a growing number is a watch that does not work.",
    ["kind"],
    registry=REGISTRY,
)


_Told = tuple[dict[str, int], tuple[tuple[str, str, float], ...]]
"""Counts of pods; and of each condition its type, its reason and whether it holds."""


class ServersCollector(Collector):
    """What the resources' statuses say, for alerts: made when asked for, so that a thousand servers cost nothing."""

    def __init__(self) -> None:
        self._told: dict[Key, _Told] = {}

    def tell(self, key: Key, status: Mapping[str, Any]) -> None:
        """status: the document as it was written."""
        desired = str(status["ready"]).rpartition("/")[2]
        counts = {"ready": int(status["readyReplicas"]), "updated": int(status["updatedReplicas"])}
        if desired.isdigit():  # of a spec that is not understood nobody knows how many it wants
            counts["desired"] = int(desired)
        conditions = tuple(
            (str(condition["type"]), str(condition["reason"]), float(condition["status"] == "True"))
            for condition in status["conditions"]
            if condition["status"] != "Unknown"
        )
        self._told[key] = counts, conditions

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
        for (namespace, name), (counts, told) in list(self._told.items()):
            for state, count in counts.items():
                replicas.add_metric([namespace, name, state], count)
            for kind, reason, value in told:
                conditions.add_metric([namespace, name, kind, reason], value)
        yield replicas
        yield conditions


STATUSES = ServersCollector()
REGISTRY.register(STATUSES)
