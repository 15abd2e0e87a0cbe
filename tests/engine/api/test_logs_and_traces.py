"""Logs for people and for programs, with ids and without secrets; traces to a collector."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from octavo_engine.api.tracing import Tracer
from octavo_engine.status import FailureCode, FatalError
from waiting import least_below

SECRET = "sk-this-is-a-secret"
PROMPT = "what nobody else shall read"


def post(url: str, body: dict[str, Any], **headers: str) -> int:
    async def send() -> int:
        async with aiohttp.ClientSession() as http, http.post(url, json=body, headers=headers) as answer:
            await answer.read()
            return answer.status

    return asyncio.run(send())


def ask(server: Any, path: str = "/v1/completions", **body: Any) -> int:
    headers = {"Authorization": f"Bearer {SECRET}", **body.pop("headers", {})}
    return post(server.url + path, {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, **body}, **headers)


def log_of(server: Any) -> list[str]:
    server.process.terminate()
    _, text = server.process.communicate(timeout=60)
    return [line for line in text.splitlines() if line]


def test_each_line_of_a_json_log_is_an_object_with_time_level_and_message(start) -> None:
    server = start("--log-format=json", "--log-level=debug")
    ask(server)
    lines = [json.loads(line) for line in log_of(server)]

    assert any(line["message"].startswith("ready in") for line in lines)
    assert all({"time", "level", "logger", "process", "message"} <= set(line) for line in lines)
    assert all(line["time"].endswith("Z") for line in lines)


def test_requests_are_logged_with_their_ids_when_asked_for(start) -> None:
    server = start("--log-format=json", "--enable-log-requests", f"--api-key={SECRET}")
    assert ask(server, headers={"X-Request-Id": "mine-1"}) == 200
    lines = [json.loads(line) for line in log_of(server) if "octavo.requests" in line]

    assert [line["message"].split()[0] for line in lines] == ["received", "ended"]
    assert {line["request_id"] for line in lines} == {"mine-1"}
    assert (lines[0]["prompt_tokens"], lines[1]["completion_tokens"]) == (len(PROMPT), 3)


def test_without_being_asked_no_request_is_logged(start) -> None:
    server = start("--disable-log-stats", f"--api-key={SECRET}")
    ask(server)

    assert all("ended id" not in line and "POST" not in line for line in log_of(server))


def test_the_access_log_leaves_out_what_it_is_told_to_and_every_query(start) -> None:
    server = start(
        "--access-log",
        "--disable-access-log-for-endpoints=/health,/metrics",
        f"--api-key={SECRET}",
        "--log-format=json",
    )

    async def get(*paths: str) -> None:
        async with aiohttp.ClientSession() as http:
            for path in paths:
                await (await http.get(server.url + path)).read()

    asyncio.run(get("/health", "/metrics", "/v1/models?key=hidden", "/no%0Asuch"))
    ask(server)
    lines = [json.loads(line) for line in log_of(server) if "octavo.access" in line]

    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("GET", "/v1/models", 401), ("GET", "/no%0Asuch", 401), ("POST", "/v1/completions", 200),
    ]  # fmt: skip
    assert all("hidden" not in str(line) for line in lines)


def test_no_prompt_no_answer_and_no_key_is_ever_logged(start) -> None:
    server = start("--log-level=debug", "--enable-log-requests", "--access-log", f"--api-key={SECRET}")
    assert ask(server) == 200
    assert ask(server, stream=True) == 200
    assert ask(server, prompt=f"!error {PROMPT}") == 500
    assert ask(server, temperature=f"{PROMPT}") == 400
    assert ask(server, "/v1/chat/completions", messages=[{"role": "user", "content": PROMPT}]) == 200
    assert post(server.url + "/v1/completions", {"prompt": PROMPT}, Authorization="Bearer sk-other-secret") == 401
    for raw in (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization Bearer {SECRET}\r\n\r\n",
        f"{PROMPT.split()[0].upper()} / HTTP/1.1\r\nX: {SECRET}\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(raw.encode())
            sock.settimeout(5)
            assert b" 400 " in sock.recv(4096)
    text = "\n".join(log_of(server))

    assert "not an HTTP request" in text
    for secret in (SECRET, "sk-other-secret", PROMPT, "nobody"):
        assert secret not in text


def test_the_level_decides_what_is_logged(start) -> None:
    assert log_of(start("--log-level=error")) == []


def test_a_configuration_of_pythons_logging_is_obeyed(start, tmp_path: Path) -> None:
    file = tmp_path / "logging.json"
    document = {
        "version": 1,
        "formatters": {"own": {"format": "OWN %(message)s"}},
        "handlers": {"err": {"class": "logging.StreamHandler", "formatter": "own"}},
        "root": {"level": "INFO", "handlers": ["err"]},
    }
    file.write_text(json.dumps(document))
    lines = log_of(start(f"--log-config-file={file}"))

    assert any(line.startswith("OWN ready in") for line in lines)


def test_a_logging_configuration_that_is_none_is_named(start, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"version": 7}')
    server = start(f"--log-config-file={tmp_path / 'bad.json'}", ready=False)

    assert server.wait_exit() == FailureCode.INVALID_CONFIG.exit_status
    assert "--log-config-file" in server.certificate.read_text()


def test_the_line_for_the_load_comes_as_often_as_asked_for(start) -> None:
    server = start("--log-stats-interval-s=0.5", script={"step_s": 0.02})
    ask(server, max_tokens=100, ignore_eos=True)
    lines = log_of(server)

    (line,) = [line for line in lines if "Avg generation throughput" in line][:1]
    assert "Engine 000: Avg prompt throughput: " in line
    assert "Running: 1 reqs, Waiting: 0 reqs, GPU KV cache usage: " in line
    assert "Prefix cache hit rate: " in line


# ---- traces


@pytest.fixture
def collector() -> Iterator[Any]:
    """Takes OTLP over HTTP; its `spans` are those that came, with the attributes of their resource."""
    spans: list[tuple[Any, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            message = ExportTraceServiceRequest.FromString(body)
            if self.path == "/v1/traces":
                for resource in message.resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend((span, values(resource.resource.attributes)) for span in scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.spans = spans  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def values(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


def endpoint(collector: Any) -> str:
    return f"--otlp-traces-endpoint=http://127.0.0.1:{collector.server_address[1]}"


def traced(collector: Any, server: Any, count: int) -> list[tuple[Any, dict[str, Any]]]:
    log_of(server)  # its end sends what is left
    deadline = time.monotonic() + 60
    while len(collector.spans) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(collector.spans) == count
    return list(collector.spans)


def test_a_request_is_a_span_with_vllms_attributes_in_the_clients_trace(start, collector) -> None:
    server = start(endpoint(collector), f"--api-key={SECRET}")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ask(server, headers={"traceparent": parent, "X-Request-Id": "mine-2"}, temperature=0.5, top_p=0.9, stream=True)
    ((span, resource),) = traced(collector, server, 1)

    assert (span.name, span.kind) == ("llm_request", 2)  # SPAN_KIND_SERVER
    assert span.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert span.parent_span_id.hex() == "b7ad6b7169203331"
    found = values(span.attributes)
    latencies = {name: found.pop(name) for name in list(found) if name.startswith("gen_ai.latency.")}
    assert set(latencies) == {
        f"gen_ai.latency.{name}"
        for name in (
            "e2e", "time_to_first_token", "time_in_queue", "time_in_model_prefill", "time_in_model_decode",
            "time_in_model_inference",
        )
    }  # fmt: skip
    assert 0 < latencies["gen_ai.latency.time_to_first_token"] <= latencies["gen_ai.latency.e2e"]
    assert found == {
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "octavo", "gen_ai.request.id": "mine-2",
        "gen_ai.request.model": "tiny", "gen_ai.response.model": "tiny", "gen_ai.request.n": 1,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.9, "gen_ai.request.max_tokens": 3,
        "gen_ai.usage.prompt_tokens": len(PROMPT), "gen_ai.usage.completion_tokens": 3,
        "gen_ai.usage.input_tokens": len(PROMPT), "gen_ai.usage.output_tokens": 3,
        "http.route": "/v1/completions", "server.port": server.port,
    }  # fmt: skip
    assert resource["service.name"] == "octavo"
    assert PROMPT not in str(span)
    assert SECRET not in str(span)


def test_a_failed_and_a_cancelled_request_are_spans_that_say_so(start, collector) -> None:
    server = start(endpoint(collector), script={"step_s": 0.02})
    ask(server, prompt="!error x")

    async def hang_up() -> None:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with aiohttp.ClientSession() as http, http.post(server.url + "/v1/completions", json=body) as answer:
            await answer.content.readline()

    asyncio.run(hang_up())
    time.sleep(0.5)
    spans = traced(collector, server, 2)

    assert [values(span.attributes)["error.type"] for span, _ in spans] == ["InternalServerError", "cancelled"]
    assert all(span.status.code == 2 for span, _ in spans)


def test_a_collector_that_is_away_does_not_hold_up_requests(start) -> None:
    server = start("--otlp-traces-endpoint=http://127.0.0.1:1")

    def seconds() -> float:
        began = time.monotonic()
        assert ask(server) == 200
        return time.monotonic() - began

    assert least_below(2.0, seconds) < 2.0


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(FatalError) as refused:
        Tracer("http://collector:4318", 8000)

    assert "pip install 'octavo[otel]'" in refused.value.failure.fix


@pytest.mark.parametrize("url", ["http://collector:port", "http://collector:99999"])
def test_an_endpoint_with_a_port_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(FatalError, match=url):
        Tracer(url, 8000)


@pytest.mark.parametrize("url", ["grpc://collector:4317", "collector:4317", ""])
def test_an_endpoint_that_is_not_http_is_refused(url: str) -> None:
    with pytest.raises(FatalError) as refused:
        Tracer(url, 8000)

    assert "http://collector:4318/v1/traces" in refused.value.failure.fix
    assert "not over gRPC" in refused.value.failure.message


def test_a_protocol_that_is_not_http_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    with pytest.raises(FatalError, match="'grpc'"):
        Tracer("http://collector:4318", 8000)


def test_the_port_of_grpc_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    Tracer("http://127.0.0.1:4317", 8000).close()

    assert "over HTTP, which is port 4318" in caplog.text
