"""What /metrics tells: vLLM's names, its older ones, and Octavo's own.

Counting is plain arithmetic on the event loop, once per step where it can be; Prometheus' types are made from it when
somebody asks. Its own counters take a lock per observation, which at 100,000 tokens a second is a tenth of a core.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo_engine import __version__
from octavo_engine.api.board import Board
from octavo_engine.api.histogram import Histogram
from octavo_engine.api.http_metrics import HttpMetrics
from octavo_engine.config import EngineConfig
from octavo_engine.core.messages import FinishReason, StepStats
from octavo_engine.status import Effective, Stage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RATE_WINDOW = 10
"""Ticks (seconds) that the avg_…_throughput gauges look back."""

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
N_BUCKETS = (1, 2, 5, 10, 20)


@dataclass(frozen=True)
class Finished:
    """One sequence's figures at its end. Times are seconds; None where the sequence did not get that far."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    max_tokens: int
    cached_tokens: int
    e2e_s: float
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None


class Metrics:
    """Written by the event loop; rendered by any thread."""

    def __init__(self, board: Board, config: EngineConfig, model_name: str, older_names: bool = True) -> None:
        """older_names: give vLLM's earlier names beside today's."""
        self._board = board
        self._config = config
        self._older_names = older_names
        self.model_name = model_name
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.cached_tokens = 0
        self.success: Counter[FinishReason] = Counter(dict.fromkeys(FinishReason, 0))
        self.corrupted = 0
        """Sequences that ended because the model's output was not finite."""
        self.tool_parser: Counter[tuple[str, str, str]] = Counter()
        """Choices that a tool parser read, by (mode, outcome, request_type)."""
        self.http = HttpMetrics()
        self.stats = StepStats()
        self.ttft = Histogram(TTFT_BUCKETS)
        self.itl = Histogram(ITL_BUCKETS)
        self.tpot = Histogram(ITL_BUCKETS)
        self.e2e = Histogram(LATENCY_BUCKETS)
        self.queue = Histogram(LATENCY_BUCKETS)
        self.prefill = Histogram(LATENCY_BUCKETS)
        self.decode = Histogram(LATENCY_BUCKETS)
        self.inference = Histogram(LATENCY_BUCKETS)
        self.iteration = Histogram(ITERATION_BUCKETS)
        self.step = Histogram(STEP_BUCKETS)
        self.params_n = Histogram(N_BUCKETS)
        self._set_lengths(1)
        self._rates: deque[tuple[float, int, int]] = deque(maxlen=RATE_WINDOW + 1)
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(self))
        for kind in (ProcessCollector, PlatformCollector, GCCollector):
            kind(registry=self._registry)

    def ready(self, effective: Effective) -> None:
        """The context length is known: histograms of lengths get their buckets."""
        self._set_lengths(effective.max_model_len)

    def step_done(self, stats: StepStats, prompt_tokens: int, generated_tokens: int) -> None:
        """prompt_tokens: of the sequences that got their first token in this step."""
        self.prompt_tokens += prompt_tokens
        self.generation_tokens += generated_tokens
        self.stats = stats
        if stats.step_s > 0:
            self.step.observe(stats.step_s)
        if prompt_tokens or generated_tokens:
            self.iteration.observe(prompt_tokens + generated_tokens)

    def finished(self, end: Finished) -> None:
        self.success[end.reason] += 1
        self.e2e.observe(end.e2e_s)
        self.prompt_lengths.observe(end.prompt_tokens)
        self.generation_lengths.observe(end.generated_tokens)
        self.max_generation_lengths.observe(end.generated_tokens)
        self.params_max_tokens.observe(end.max_tokens)
        self.prefill_computed.observe(end.prompt_tokens - end.cached_tokens)
        if end.queue_s is not None:
            self.queue.observe(end.queue_s)
        if end.prefill_s is not None and end.decode_s is not None:
            self.prefill.observe(end.prefill_s)
            self.decode.observe(end.decode_s)
            self.inference.observe(end.prefill_s + end.decode_s)
            if end.generated_tokens > 1:
                self.tpot.observe(end.decode_s / (end.generated_tokens - 1))

    def tick(self, now: float) -> None:
        """Called once a second: the origin of the throughput gauges."""
        self._rates.append((now, self.prompt_tokens, self.generation_tokens))

    def throughput(self) -> tuple[float, float]:
        """Prompt and generated tokens per second over the last RATE_WINDOW ticks."""
        if len(self._rates) < 2:
            return 0.0, 0.0
        (start, prompt0, generated0), (end, prompt1, generated1) = self._rates[0], self._rates[-1]
        span = max(end - start, 1e-6)
        return (prompt1 - prompt0) / span, (generated1 - generated0) / span

    @property
    def prefix_hit_rate(self) -> float:
        """Since the start, 0 to 1."""
        return self.stats.prefix_hits / self.stats.prefix_queries if self.stats.prefix_queries else 0.0

    def render(self) -> bytes:
        text: bytes = generate_latest(self._registry)
        return text

    def _set_lengths(self, max_model_len: int) -> None:
        bounds = one_two_five(max_model_len)
        self.prompt_lengths = Histogram(bounds)
        self.generation_lengths = Histogram(bounds)
        self.max_generation_lengths = Histogram(bounds)
        self.params_max_tokens = Histogram(bounds)
        self.prefill_computed = Histogram(bounds)

    # ---- made when asked for

    def families(self) -> Iterator[Metric]:
        board, labels = self._board, {"model_name": self.model_name, "engine": "0"}
        statusz = board.statusz()
        load, stats = statusz.load, self.stats

        yield gauge("vllm:num_requests_running", "Requests computed in the last step.", labels, load.running)
        yield gauge("vllm:num_requests_waiting", "Requests waiting for a slot or memory.", labels, load.waiting)
        by_reason = {"capacity": load.waiting, "deferred": 0}
        yield gauges("vllm:num_requests_waiting_by_reason", "Waiting requests by cause.", labels, "reason", by_reason)
        yield gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", labels, load.kv_usage)
        sleep = {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
        yield gauges("vllm:engine_sleep_state", "1 for the state the engine is in.", labels, "sleep_state", sleep)
        if statusz.effective is not None:
            yield self._cache_config(statusz.effective)
        for prefix, of, queries, hits in (
            ("vllm:prefix_cache", "the prefix cache", stats.prefix_queries, stats.prefix_hits),
            ("vllm:external_prefix_cache", "another engine's cache; there is none", 0, 0),
            ("vllm:mm_cache", "the cache of images; there is none", 0, 0),
        ):
            yield counter(f"{prefix}_queries", f"Tokens looked up in {of}.", labels, queries)
            yield counter(f"{prefix}_hits", f"Tokens found in {of}.", labels, hits)
        yield counter("vllm:num_preemptions", "Requests put back for lack of memory.", labels, stats.preemptions)
        yield counter("vllm:prompt_tokens", "Prompt tokens processed.", labels, self.prompt_tokens)
        yield counter("vllm:generation_tokens", "Tokens generated.", labels, self.generation_tokens)
        yield counter("vllm:prompt_tokens_cached", "Prompt tokens taken from the cache.", labels, self.cached_tokens)
        yield counters(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where they came from.", labels, "source",
            {
                "local_compute": self.prompt_tokens - self.cached_tokens,
                "local_cache_hit": self.cached_tokens,
                "external_kv_transfer": 0,
            },
        )  # fmt: skip
        success = {str(reason): count for reason, count in self.success.items()}
        success.setdefault("repetition", 0)
        yield counters("vllm:request_success", "Requests ended, by reason.", labels, "finished_reason", success)
        yield counter("vllm:corrupted_requests", "Requests whose output was not finite.", labels, self.corrupted)
        yield self._tool_family()

        for name, help, histogram in (
            ("vllm:time_to_first_token_seconds", "From arrival to the first token.", self.ttft),
            ("vllm:inter_token_latency_seconds", "Between two tokens of a request.", self.itl),
            ("vllm:request_time_per_output_token_seconds", "A request's mean time per token.", self.tpot),
            ("vllm:e2e_request_latency_seconds", "From arrival to the end.", self.e2e),
            ("vllm:request_queue_time_seconds", "From arrival to the first schedule.", self.queue),
            ("vllm:request_prefill_time_seconds", "From first schedule to first token.", self.prefill),
            ("vllm:request_decode_time_seconds", "From first token to last.", self.decode),
            ("vllm:request_inference_time_seconds", "From first schedule to last token.", self.inference),
            ("vllm:iteration_tokens_total", "Prompt and generated tokens of a step.", self.iteration),
            ("vllm:request_prompt_tokens", "Prompt tokens of a request.", self.prompt_lengths),
            ("vllm:request_generation_tokens", "Generated tokens of a request.", self.generation_lengths),
            ("vllm:request_max_num_generation_tokens", "Longest answer of a request.", self.max_generation_lengths),
            ("vllm:request_params_max_tokens", "max_tokens of a request.", self.params_max_tokens),
            ("vllm:request_params_n", "n of a request.", self.params_n),
            ("vllm:request_prefill_kv_computed_tokens", "Prompt tokens not found in the cache.", self.prefill_computed),
            ("octavo:step_seconds", "Duration of a step.", self.step),
        ):
            yield histogram_family(name, help, labels, histogram)

        if self._older_names:
            yield from self._older_families(labels, load.kv_usage)

        yield gauges("octavo:stage_seconds", "Seconds spent in each stage.", labels, "stage", statusz.stage_seconds)
        stages = {str(stage): int(stage is statusz.stage) for stage in Stage}
        yield gauges("octavo:stage", "1 for the stage the engine is in.", labels, "stage", stages)
        yield gauge(
            "octavo:predicted_queue_seconds", "How long a new request would wait.", labels, load.predicted_queue_s
        )
        headroom = 0.0 if statusz.effective is None else statusz.effective.kv_tokens * (1 - load.kv_usage)
        yield gauge("octavo:kv_headroom_tokens", "Tokens that still fit in the KV cache.", labels, headroom)
        yield gauge("octavo:waiting_prefill_tokens", "Prompt tokens that wait.", labels, load.waiting_prefill_tokens)
        yield counter("octavo:steps", "Steps computed.", labels, stats.num_steps)
        yield counter(
            "octavo:kernel_compilations",
            "Kernels compiled since the engine was ready, each while requests waited; 0 is right.",
            labels,
            stats.compilations,
        )
        info = GaugeMetricFamily("octavo:build_info", "Version of the engine.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        yield from self.http.families()

    def _older_families(self, labels: dict[str, str], kv_usage: float) -> Iterator[Metric]:
        """What boards, routers and autoscalers of earlier years read."""
        stats, (prompt_rate, generation_rate) = self.stats, self.throughput()
        for name, help, value in (
            ("vllm:gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", kv_usage),
            ("vllm:cpu_cache_usage_perc", "0: there is no cache beside the device's.", 0),
            ("vllm:num_requests_swapped", "0: what is preempted is computed again.", 0),
            ("vllm:gpu_prefix_cache_hit_rate", "Prefix cache hits per query, 0 to 1.", self.prefix_hit_rate),
            ("vllm:cpu_prefix_cache_hit_rate", "0: there is no cache beside the device's.", 0),
            ("vllm:avg_prompt_throughput_toks_per_s", "Prompt tokens per second, last 10 s.", prompt_rate),
            ("vllm:avg_generation_throughput_toks_per_s", "Generated tokens per second, last 10 s.", generation_rate),
        ):
            yield gauge(name, help, labels, value)
        name = "vllm:gpu_prefix_cache"
        yield counter(f"{name}_queries", "Older name of prefix_cache_queries.", labels, stats.prefix_queries)
        yield counter(f"{name}_hits", "Older name of prefix_cache_hits.", labels, stats.prefix_hits)
        for name, help, histogram in (
            ("vllm:time_per_output_token_seconds", "Older name of inter_token_latency_seconds.", self.itl),
            ("vllm:request_params_best_of", "Older name of request_params_n.", self.params_n),
        ):
            yield histogram_family(name, help, labels, histogram)

    def _tool_family(self) -> Metric:
        family = CounterMetricFamily(
            "vllm:tool_call_parser_invocations", "Choices that a tool parser read.",
            labels=["model_name", "mode", "outcome", "request_type"],
        )  # fmt: skip
        for mode in ("streaming", "non_streaming"):
            for outcome in ("tool_call", "no_tool_call"):
                for kind in ("chat_completions", "responses", "other"):
                    family.add_metric([self.model_name, mode, outcome, kind], self.tool_parser[mode, outcome, kind])
        return family

    def _cache_config(self, effective: Effective) -> Metric:
        values = {
            "block_size": effective.block_size,
            "num_gpu_blocks": effective.num_blocks,
            "num_gpu_blocks_override": self._config.num_gpu_blocks_override,
            "num_cpu_blocks": None,
            "cpu_offload_gb": 0,
            "swap_space": 0,
            "sliding_window": None,
            "calculate_kv_scales": False,
            "is_attention_free": False,
            "prefix_caching_hash_algo": "blake2b",
            "kv_cache_memory_bytes": self._config.kv_cache_memory_bytes,
            "cache_dtype": effective.kv_dtype,
            "gpu_memory_utilization": self._config.gpu_memory_utilization,
            "enable_prefix_caching": self._config.enable_prefix_caching,
            "kv_cache_size_tokens": effective.kv_tokens,
            "kv_cache_max_concurrency": effective.max_concurrency_at_max_len,
            "engine": "0",
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's configuration.", labels=list(values))
        family.add_metric([str(value) for value in values.values()], 1)
        return family


class _Collector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.families()


def one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 … up to `most`: vLLM's buckets for lengths."""
    bounds: list[int] = []
    scale = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * scale > most:
                return bounds
            bounds.append(mantissa * scale)
        scale *= 10


def gauge(name: str, help: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def gauges(
    name: str, help: str, labels: dict[str, str], label: str, values: dict[str, int] | dict[str, float]
) -> Metric:
    family = GaugeMetricFamily(name, help, labels=[*labels, label])
    for value_label, value in values.items():
        family.add_metric([*labels.values(), value_label], value)
    return family


def counter(name: str, help: str, labels: dict[str, str], value: float) -> Metric:
    family = CounterMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def counters(name: str, help: str, labels: dict[str, str], label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, help, labels=[*labels, label])
    for value_label, value in values.items():
        family.add_metric([*labels.values(), value_label], value)
    return family


def histogram_family(name: str, help: str, labels: dict[str, str], histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, help, labels=list(labels))
    buckets, total = histogram.samples()
    family.add_metric(list(labels.values()), buckets, total)
    return family
