"""A trace of each request to an OpenTelemetry collector, with --otlp-traces-endpoint. Needs octavo[otel].

One span a request, as vLLM names it and its attributes, with the newer names of the GenAI conventions beside them.
A client's own trace goes on in it (W3C traceparent). No prompt, no answer, no key.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from octavo_engine import __version__
from octavo_engine.api.engine_client import Timing
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.status import Failure, FailureCode, FatalError

log = logging.getLogger(__name__)

SPAN = "llm_request"
GRPC_PORT = 4317
OPERATIONS = {"/v1/completions": "text_completion"}
FLUSH_MS = 2000


@dataclass(frozen=True)
class Asked:
    """What is known of a request when it is accepted. headers: those of HTTP."""

    id: str
    route: str
    model: str
    sampling: SamplingParams
    max_tokens: int | None
    stream: bool
    prompt_tokens: int
    num_sequences: int
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Ended:
    """error: what went wrong, as a word, or None. seconds: from acceptance to the end."""

    completion_tokens: int
    seconds: float
    timing: Timing
    error: str | None


class Tracer:
    """Sends in batches from a thread of its own; a collector that is away costs requests nothing."""

    def __init__(self, endpoint: str, port: int) -> None:
        """port: of the API, for the span. Raises FatalError."""
        url = _traces_url(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, StatusCode
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise FatalError(
                Failure(
                    FailureCode.INVALID_CONFIG,
                    f"--otlp-traces-endpoint needs OpenTelemetry, and {error.name} is not installed.",
                    "pip install 'octavo[otel]', or leave the flag out",
                )
            ) from error
        # service.name and more come from OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, where they are set.
        resource = Resource.create().merge(Resource({"service.version": __version__}))
        if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "octavo"}))
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("octavo", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._server_kind, self._error_status = SpanKind.SERVER, StatusCode.ERROR
        self._port = port

    def ended(self, asked: Asked, ended: Ended) -> None:
        """Record a request that began `ended.seconds` ago."""
        now = time.time_ns()
        carrier = {name: asked.headers[name] for name in ("traceparent", "tracestate") if name in asked.headers}
        span = self._tracer.start_span(
            SPAN,
            context=self._propagator.extract(carrier),
            kind=self._server_kind,
            start_time=now - int(ended.seconds * 1e9),
            attributes=attributes(asked, ended, self._port),
        )
        if ended.error is not None:
            span.set_status(self._error_status, ended.error)
        span.end(now)

    def close(self) -> None:
        """Send what is left; blocks for FLUSH_MS at most."""
        self._provider.force_flush(FLUSH_MS)


def attributes(asked: Asked, ended: Ended, port: int) -> dict[str, Any]:
    sampling, timing = asked.sampling, ended.timing
    values: dict[str, Any] = {
        "gen_ai.operation.name": OPERATIONS.get(asked.route, "chat"),
        "gen_ai.provider.name": "octavo",
        "gen_ai.request.id": asked.id,
        "gen_ai.request.model": asked.model,
        "gen_ai.response.model": asked.model,
        "gen_ai.request.n": sampling.n,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.max_tokens": asked.max_tokens,
        "gen_ai.usage.prompt_tokens": asked.prompt_tokens,
        "gen_ai.usage.completion_tokens": ended.completion_tokens,
        "gen_ai.usage.input_tokens": asked.prompt_tokens,
        "gen_ai.usage.output_tokens": ended.completion_tokens,
        "gen_ai.latency.e2e": ended.seconds,
        "gen_ai.latency.time_to_first_token": timing.first_token_s,
        "gen_ai.latency.time_in_queue": timing.queue_s,
        "gen_ai.latency.time_in_model_prefill": timing.prefill_s,
        "gen_ai.latency.time_in_model_decode": timing.decode_s,
        "gen_ai.latency.time_in_model_inference": timing.inference_s,
        "http.route": asked.route,
        "server.port": port,
        "error.type": ended.error,
    }
    return {name: value for name, value in values.items() if value is not None}


def _traces_url(endpoint: str, environ: Mapping[str, str] = os.environ) -> str:
    """Raises FatalError for what is not HTTP."""
    parts = urlsplit(endpoint)
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
    wrong, port = "", None
    try:
        port = parts.port
    except ValueError as error:
        wrong = f"--otlp-traces-endpoint: got {endpoint!r}: {error}."
    if parts.scheme not in ("http", "https") or not parts.netloc:
        wrong = f"--otlp-traces-endpoint: got {endpoint!r}; traces are sent over HTTP, not over gRPC."
    elif protocol not in ("", "http/protobuf"):
        wrong = f"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: got {protocol!r}; traces are sent as http/protobuf alone."
    if wrong:
        raise FatalError(
            Failure(
                FailureCode.INVALID_CONFIG,
                wrong,
                "give the collector's HTTP address, as http://collector:4318/v1/traces (its port for gRPC is 4317)",
            )
        )
    if port == GRPC_PORT:
        log.warning(
            "--otlp-traces-endpoint %s: collectors take gRPC on port %d, and traces are sent over HTTP, which is port "
            "4318 with them", endpoint, GRPC_PORT,
        )  # fmt: skip
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
