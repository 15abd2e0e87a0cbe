"""The operator's own metrics. Numbers that alerts are made of; stories are in the log."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

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
