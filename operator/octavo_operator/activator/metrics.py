"""The activator's own metrics. `server` is namespace/name in one label, as Prometheus sets `namespace` itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo_operator.names import Key

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

WAKES = Counter(
    "octavo_activator_wakes",
    "Times that a request came for a server without a ready engine and none was held for it yet.",
    ["server"],
    registry=REGISTRY,
)
REQUESTS = Counter(
    "octavo_activator_requests",
    "Requests by what became of them: forwarded, refused (beyond a bound), late (not awake in time), closed (its key "
    "may not wake the server), answered (by the activator), broken (an engine ended with it), gone (the client).",
    ["outcome"],
    registry=REGISTRY,
)
HOLD = Histogram(
    "octavo_activator_hold_seconds",
    "How long a request was held until an engine took it.",
    buckets=(0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600),
    registry=REGISTRY,
)


class HeldCollector(Collector):
    """What is held now, made when asked for. KEDA wakes servers by octavo_activator_held_requests."""

    def __init__(self, counts: Callable[[], dict[Key, int]], held_bytes: Callable[[], int]) -> None:
        self._counts, self._bytes = counts, held_bytes

    def collect(self) -> Iterator[Metric]:
        requests = GaugeMetricFamily("octavo_activator_held_requests", "Requests held now.", labels=["server"])
        for (namespace, name), count in self._counts().items():
            requests.add_metric([f"{namespace}/{name}"], count)
        yield requests
        yield GaugeMetricFamily("octavo_activator_held_bytes", "Bytes of the bodies that are held.", self._bytes())
