"""/metrics has every name, label and bucket that vLLM 0.25.1 has, and the names that older boards read."""

from __future__ import annotations

import asyncio
import re
import subprocess

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo_engine.api.board import Board, Limits
from octavo_engine.api.metrics import Metrics
from octavo_engine.config import EngineConfig
from octavo_engine.core.messages import StepStats

BASE = {"model_name", "engine"}
TTFT = (
    ".001,.005,.01,.02,.04,.06,.08,.1,.25,.5,.75,1,2.5,5,7.5,10,20,40,80,160,640,2560"
)  # fmt: skip
TOKEN_LATENCY = ".01,.025,.05,.075,.1,.15,.2,.3,.4,.5,.75,1,2.5,5,7.5,10,20,40,80"
LATENCY = ".3,.5,.8,1,1.5,2,2.5,5,10,15,20,30,40,50,60,120,240,480,960,1920,7680"
LENGTHS = "1,2,5,10,20,50,100,200,500"  # up to the model's 512
ITERATION = "1,8,16,32,64,128,256,512,1024,2048,4096,8192,16384"
GAUGES = {
    "vllm:num_requests_running": set(),
    "vllm:num_requests_waiting": set(),
    "vllm:num_requests_waiting_by_reason": {"reason"},
    "vllm:kv_cache_usage_perc": set(),
    "vllm:engine_sleep_state": {"sleep_state"},
}
COUNTERS = {
    "vllm:prefix_cache_queries": set(),
    "vllm:prefix_cache_hits": set(),
    "vllm:external_prefix_cache_queries": set(),
    "vllm:external_prefix_cache_hits": set(),
    "vllm:mm_cache_queries": set(),
    "vllm:mm_cache_hits": set(),
    "vllm:num_preemptions": set(),
    "vllm:prompt_tokens": set(),
    "vllm:generation_tokens": set(),
    "vllm:prompt_tokens_cached": set(),
    "vllm:prompt_tokens_by_source": {"source"},
    "vllm:request_success": {"finished_reason"},
    "vllm:corrupted_requests": set(),
}
HISTOGRAMS = {
    "vllm:request_prompt_tokens": LENGTHS,
    "vllm:request_generation_tokens": LENGTHS,
    "vllm:request_max_num_generation_tokens": LENGTHS,
    "vllm:request_params_max_tokens": LENGTHS,
    "vllm:request_prefill_kv_computed_tokens": LENGTHS,
    "vllm:request_params_n": "1,2,5,10,20",
    "vllm:iteration_tokens_total": ITERATION,
    "vllm:time_to_first_token_seconds": TTFT,
    "vllm:inter_token_latency_seconds": TOKEN_LATENCY,
    "vllm:request_time_per_output_token_seconds": TOKEN_LATENCY,
    "vllm:e2e_request_latency_seconds": LATENCY,
    "vllm:request_queue_time_seconds": LATENCY,
    "vllm:request_inference_time_seconds": LATENCY,
    "vllm:request_prefill_time_seconds": LATENCY,
    "vllm:request_decode_time_seconds": LATENCY,
}
VALUES = {
    "reason": {"capacity", "deferred"},
    "sleep_state": {"awake", "weights_offloaded", "discard_all"},
    "source": {"local_compute", "local_cache_hit", "external_kv_transfer"},
    "finished_reason": {"stop", "length", "abort", "error", "repetition"},
}
HTTP = {
    "http_requests": ("counter", {"handler", "method", "status"}),
    "http_request_duration_seconds": ("histogram", {"handler", "method"}),
    "http_request_duration_highr_seconds": ("histogram", set()),
    "http_request_size_bytes": ("summary", {"handler"}),
    "http_response_size_bytes": ("summary", {"handler"}),
}
OLDER = {
    "vllm:gpu_cache_usage_perc": "gauge",
    "vllm:gpu_prefix_cache_hit_rate": "gauge",
    "vllm:gpu_prefix_cache_hits": "counter",
    "vllm:gpu_prefix_cache_queries": "counter",
    "vllm:avg_prompt_throughput_toks_per_s": "gauge",
    "vllm:avg_generation_throughput_toks_per_s": "gauge",
    "vllm:time_per_output_token_seconds": "histogram",
    "vllm:num_requests_swapped": "gauge",
    "vllm:cpu_cache_usage_perc": "gauge",
    "vllm:cpu_prefix_cache_hit_rate": "gauge",
    "vllm:request_params_best_of": "histogram",
}
# vLLM has these only while a feature is on that this version refuses: LoRA (lora_requests_info), speculation
# (spec_decode_…), --kv-cache-metrics (kv_block_…), --enable-mfu-metrics (estimated_flops_per_gpu and the like).


async def generate(url: str, **body: object) -> int:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "temperature": 0, "ignore_eos": True, **body}
    async with aiohttp.ClientSession() as http, http.post(url + "/v1/completions", json=body) as answer:
        await answer.read()
        return answer.status


@pytest.fixture(scope="module")
def server(start_shared):
    server = start_shared()
    assert asyncio.run(generate(server.url)) == 200
    return server


def families(server) -> dict:
    text = server.get("/metrics")[1]
    return {family.name: family for family in text_string_to_metric_families(text)}


def labels(family) -> set[str]:
    return set().union(*(set(sample.labels) for sample in family.samples)) - {"le"}


def bounds(family) -> list[float]:
    found = {float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")}
    return sorted(found - {float("inf")})


@pytest.mark.parametrize("name", [*GAUGES, *COUNTERS])
def test_each_of_vllms_figures_has_its_type_and_labels(server, name: str) -> None:
    family = families(server)[name]

    assert family.type == ("gauge" if name in GAUGES else "counter")
    assert labels(family) == BASE | {**GAUGES, **COUNTERS}[name]
    for label in labels(family) - BASE:
        assert {sample.labels[label] for sample in family.samples} == VALUES[label]


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_each_of_vllms_histograms_has_its_buckets(server, name: str) -> None:
    family = families(server)[name]

    assert family.type == "histogram"
    assert labels(family) == BASE
    assert bounds(family) == [float(bound) for bound in HISTOGRAMS[name].split(",")]


@pytest.mark.parametrize("name", HTTP)
def test_http_requests_are_counted_under_the_names_of_vllms_server(server, name: str) -> None:
    kind, expected = HTTP[name]
    family = families(server)[name]

    assert family.type == kind
    assert labels(family) == expected
    if "handler" in expected:
        assert any(sample.labels["handler"] == "/v1/completions" for sample in family.samples)


def test_sizes_of_bodies_are_those_that_were_sent(start) -> None:
    server = start()

    async def ask() -> int:
        url, body = server.url + "/tokenize", {"prompt": "abc"}
        async with aiohttp.ClientSession() as http, http.post(url, json=body) as answer:
            return len(await answer.read())

    received = asyncio.run(ask())
    found = families(server)
    sizes = {s.name: s.value for s in found["http_response_size_bytes"].samples if s.labels["handler"] == "/tokenize"}
    sent = {s.name: s.value for s in found["http_request_size_bytes"].samples if s.labels["handler"] == "/tokenize"}
    assert sizes == {"http_response_size_bytes_count": 1, "http_response_size_bytes_sum": received}
    assert sent["http_request_size_bytes_sum"] == len('{"prompt": "abc"}')


def test_probes_are_not_counted_and_a_method_of_the_clients_own_is_no_label(server) -> None:
    async def ask() -> None:
        async with aiohttp.ClientSession() as http:
            for path in ("/health", "/ping", "/version", "/load", "/metrics"):
                await (await http.get(server.url + path)).read()
            await (await http.request("PROPFIND", server.url + "/no/such/route")).read()

    asyncio.run(ask())
    samples = families(server)["http_requests"].samples
    handlers = {sample.labels["handler"] for sample in samples}
    assert not handlers & {"/health", "/ping", "/version", "/load", "/metrics", "/no/such/route"}
    assert "none" in handlers
    assert {sample.labels["method"] for sample in samples} <= {"GET", "POST", "other"}


@pytest.mark.parametrize("name", OLDER)
def test_older_names_are_there_and_can_be_left_out(server, name: str) -> None:
    assert families(server)[name].type == OLDER[name]


def test_without_older_names_todays_are_still_there(start) -> None:
    found = families(start("--no-older-metric-names"))

    assert not set(OLDER) & set(found)
    assert {*GAUGES, *COUNTERS, *HISTOGRAMS} <= set(found)


def test_the_cache_is_described(server) -> None:
    (sample,) = families(server)["vllm:cache_config_info"].samples

    assert sample.value == 1
    assert sample.labels["block_size"] == "16"
    assert sample.labels["num_gpu_blocks"] == "100"
    assert {"cache_dtype", "gpu_memory_utilization", "enable_prefix_caching", "kv_cache_size_tokens", "engine"} <= set(
        sample.labels
    )


def test_process_and_python_tell_of_themselves(server) -> None:
    found = families(server)

    assert {"process_resident_memory_bytes", "process_cpu_seconds", "process_open_fds", "python_info"} <= set(found)


def test_kernels_compiled_while_requests_waited_are_told() -> None:
    metrics = Metrics(Board(Limits(300, 60, 10, 1000)), EngineConfig(model="m"), "m")
    figure = 'octavo:kernel_compilations_total{engine="0",model_name="m"}'
    assert f"{figure} 0.0" in metrics.render().decode()

    metrics.step_done(StepStats(compilations=2), 0, 1)

    assert f"{figure} 2.0" in metrics.render().decode()


def test_figures_of_requests_are_exact(start) -> None:
    """As with vLLM: tokens of all steps are n times prompt and output, and tokens after the first have a latency."""
    server = start()

    async def ask() -> None:
        assert set(await asyncio.gather(*(generate(server.url) for _ in range(4)))) == {200}

    asyncio.run(ask())
    n, prompt, output = 4, 3, 5
    expected = {
        "vllm:iteration_tokens_total_sum": n * (prompt + output),
        "vllm:inter_token_latency_seconds_count": n * (output - 1),
        "vllm:time_per_output_token_seconds_count": n * (output - 1),
        "vllm:time_to_first_token_seconds_count": n,
        "vllm:e2e_request_latency_seconds_count": n,
        "vllm:request_prompt_tokens_sum": n * prompt,
        "vllm:request_generation_tokens_sum": n * output,
        "vllm:request_params_max_tokens_sum": n * output,
        "vllm:prompt_tokens_total": n * prompt,
        "vllm:generation_tokens_total": n * output,
    }
    assert {name: server.metric(name) for name in expected} == expected
    assert server.metric("vllm:request_success_total", finished_reason="length") == n


# ---- what others read

# Queries as boards and rules of vLLM's community ask them, of today and of the years before.
QUERIES = [
    'histogram_quantile(0.99, sum by(le) (rate(vllm:e2e_request_latency_seconds_bucket{model_name="$m"}[$i])))',
    "rate(vllm:e2e_request_latency_seconds_sum[$i]) / rate(vllm:e2e_request_latency_seconds_count[$i])",
    'rate(vllm:prompt_tokens_total{model_name="$model_name"}[$i])',
    'rate(vllm:generation_tokens_total{model_name="$model_name"}[$i])',
    "histogram_quantile(0.95, sum by(le) (rate(vllm:inter_token_latency_seconds_bucket[$i])))",
    "histogram_quantile(0.95, sum by(le) (rate(vllm:time_per_output_token_seconds_bucket[$i])))",
    "rate(vllm:time_per_output_token_seconds_sum[$i]) / rate(vllm:time_per_output_token_seconds_count[$i])",
    "vllm:num_requests_running",
    "vllm:num_requests_swapped",
    "vllm:num_requests_waiting",
    "histogram_quantile(0.5, sum by(le) (rate(vllm:time_to_first_token_seconds_bucket[$i])))",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:cpu_cache_usage_perc",
    "sum by(le) (increase(vllm:request_prompt_tokens_bucket[$i]))",
    "sum by(le) (increase(vllm:request_generation_tokens_bucket[$i]))",
    "sum by(finished_reason) (increase(vllm:request_success_total[$i]))",
    "rate(vllm:request_queue_time_seconds_sum[$i])",
    "rate(vllm:request_prefill_time_seconds_sum[$i])",
    "rate(vllm:request_decode_time_seconds_sum[$i])",
    "rate(vllm:request_max_num_generation_tokens_sum[$i])",
    "rate(vllm:gpu_prefix_cache_hits_total[$i]) / rate(vllm:gpu_prefix_cache_queries_total[$i])",
    "rate(vllm:prefix_cache_hits_total[$i]) / rate(vllm:prefix_cache_queries_total[$i])",
    "vllm:gpu_prefix_cache_hit_rate",
    "vllm:avg_prompt_throughput_toks_per_s + vllm:avg_generation_throughput_toks_per_s",
    "increase(vllm:num_preemptions_total[5m]) > 10",
    "vllm:num_requests_waiting > 50",
    "vllm:kv_cache_usage_perc > 0.95",
    "vllm:cache_config_info",
    'sum(rate(http_requests_total{status="5xx"}[5m])) by (handler)',
    "histogram_quantile(0.99, sum by(le) (rate(http_request_duration_seconds_bucket[5m])))",
    "process_resident_memory_bytes",
]


@pytest.mark.parametrize("query", QUERIES)
def test_boards_and_alerts_for_vllm_find_every_series(server, query: str) -> None:
    samples = {s.name: s for f in families(server).values() for s in f.samples}
    names = re.findall(r"(?:vllm:|http_|process_)\w+", query)

    assert names
    for name in names:
        assert name in samples
    for label in {"model_name", "finished_reason", "handler", "status"} & set(re.findall(r"\w+", query)):
        assert any(label in s.labels for f in families(server).values() for s in f.samples if s.name in names)


def test_promtool_finds_nothing_but_vllms_own_spellings_to_complain_of(server, promtool: str) -> None:
    done = subprocess.run(
        [promtool, "check", "metrics"], input=server.get("/metrics")[1], capture_output=True, text=True
    )
    complaints = (done.stdout + done.stderr).splitlines()

    # The colon is part of the names that everybody's boards read.
    assert complaints
    assert [line for line in complaints if not line.endswith("metric names should not contain ':'")] == [
        "vllm:avg_generation_throughput_toks_per_s metric names should not contain abbreviated units",
        "vllm:avg_prompt_throughput_toks_per_s metric names should not contain abbreviated units",
        'vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix',
    ]
    assert all(line.startswith(("vllm:", "octavo:")) for line in complaints)
