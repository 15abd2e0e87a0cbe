"""HTTP requests in /metrics, under the names and buckets that vLLM's servers have. Written by the event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric, SummaryMetricFamily

from octavo_engine.api.histogram import Histogram

NOT_COUNTED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", "/ui/status"})
"""Asked every few seconds by machines: they would drown everything else."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
FINE_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)  # fmt: skip
COARSE_BUCKETS = (0.1, 0.5, 1)


class HttpMetrics:
    """Label values come from closed sets: routes of ours, METHODS, classes of status."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self._fine = Histogram(FINE_BUCKETS)
        self._coarse: dict[tuple[str, str], Histogram] = {}
        self._request_bytes: dict[str, list[int]] = {}
        self._response_bytes: dict[str, list[int]] = {}

    def add(
        self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        """handler: the matched route as it is declared, or "none"."""
        if handler in NOT_COUNTED:
            return
        method = method if method in METHODS else "other"
        self.requests[handler, method, f"{status // 100}xx"] += 1
        self._fine.observe(seconds)
        self._coarse.setdefault((handler, method), Histogram(COARSE_BUCKETS)).observe(seconds)
        for sizes, size in ((self._request_bytes, request_bytes), (self._response_bytes, response_bytes)):
            count_and_sum = sizes.setdefault(handler, [0, 0])
            count_and_sum[0] += 1
            count_and_sum[1] += size

    def families(self) -> Iterator[Metric]:
        counted = CounterMetricFamily(
            "http_requests", "HTTP requests by route, method and status class.", labels=["handler", "method", "status"]
        )
        for key, count in list(self.requests.items()):
            counted.add_metric(list(key), count)
        yield counted
        fine = HistogramMetricFamily("http_request_duration_highr_seconds", "Duration of HTTP requests.")
        fine.add_metric([], *self._fine.samples())
        yield fine
        coarse = HistogramMetricFamily(
            "http_request_duration_seconds", "Duration of HTTP requests by route.", labels=["handler", "method"]
        )
        for labels, histogram in list(self._coarse.items()):
            coarse.add_metric(list(labels), *histogram.samples())
        yield coarse
        for name, what, sizes in (
            ("http_request_size_bytes", "Bodies of HTTP requests, in bytes.", self._request_bytes),
            ("http_response_size_bytes", "Bodies of HTTP responses, in bytes.", self._response_bytes),
        ):
            summary = SummaryMetricFamily(name, what, labels=["handler"])
            for handler, (count, total) in list(sizes.items()):
                summary.add_metric([handler], count, total)
            yield summary
