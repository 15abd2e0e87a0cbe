"""Start-up, probes, overload, disconnects, draining and death, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from octavo_engine.status import ExitStatus, Failure, FailureCode, Stage, Statusz
from waiting import is_gone, least_below, wait_for

ENDLESS = {"ignore_eos": True, "max_tokens": 450}


async def complete(http: aiohttp.ClientSession, server: Any, prompt: str = "hello", **body: Any) -> tuple[int, Any]:
    async with http.post(server.url + "/v1/completions", json={"prompt": prompt, **body}) as response:
        return response.status, await response.json()


async def stream(http: aiohttp.ClientSession, server: Any, prompt: str = "hello", **body: Any) -> list[str]:
    """The data of every event until the server closes the stream."""
    body = {"prompt": prompt, "stream": True, **body}
    async with http.post(server.url + "/v1/completions", json=body) as response:
        raw = (await response.read()).decode()
    return [event.removeprefix("data: ") for event in raw.split("\n\n") if event]


async def running(server: Any, count: int, waiting: int = 0) -> None:
    """Wait until the engine runs this many, and at least so many wait behind them."""

    def enough() -> bool:
        load = server.get("/statusz")[1]["load"]
        return bool(load["running"] >= count and load["waiting"] >= waiting)

    await asyncio.to_thread(wait_for, enough, f"{count} to run and {waiting} to wait", every_s=0.01)


def certificate(server: Any) -> Failure:
    failure = Failure.from_json(server.certificate.read_text())
    assert failure is not None
    return failure


# ---- start-up


def test_the_management_port_answers_within_300_ms_of_the_processs_start(start) -> None:
    start(ready=False).stop()  # the interpreter and its files are warm then, as in a container's second start
    # The best of five counts, waiting for a processor does not, and more than one process for each processor has a
    # share of it: this machine's other work is not what is measured.
    bound_s = 0.3 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    times = [math.inf]
    while min(times) >= bound_s and len(times) <= 5:
        begun = time.monotonic()
        server = start(ready=False)
        while True:
            with contextlib.suppress(OSError):
                status, _ = server.get("/startupz")
                break
            time.sleep(0.002)
        computed_s, waited_s = spent(server.process.pid)
        times.append(max(time.monotonic() - begun - waited_s, computed_s))
        assert status == 200
        server.stop()

    assert min(times) < bound_s, times


def spent(pid: int) -> tuple[float, float]:
    """Seconds that a process's main thread computed, and that it waited for a processor; 0 where no kernel counts."""
    try:
        computed, waited, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    except OSError:
        return 0.0, 0.0
    return int(computed) / 1e9, int(waited) / 1e9


async def test_while_loading_health_tells_the_stage_and_v1_asks_to_come_again(start, http) -> None:
    server = start(script={"load_s": 5.0}, ready=False).wait_bound()
    wait_for(lambda: server.get("/statusz")[1]["progress"]["percent"] > 20, "a part of the load", every_s=0.02)

    async with http.get(server.url + "/health") as response:
        health, retry = await response.json(), response.headers["Retry-After"]
        assert response.status == 503
    status, body = await complete(http, server)
    ready_status, ready = server.get("/readyz")
    document = Statusz.from_dict(server.get("/statusz")[1])

    assert health["stage"] == "loading_weights"
    assert health["percent"] > 20
    assert 1 <= int(retry) <= 5
    assert status == 503
    assert body["error"]["type"] == "ServiceUnavailableError"
    assert "loading_weights" in body["error"]["message"]
    assert ready_status == 503
    assert "loading_weights" in ready["reason"]
    assert document.stage is Stage.LOADING_WEIGHTS
    assert document.progress.eta_s is not None
    assert server.get("/livez")[0] == 200
    assert server.get("/startupz")[0] == 200
    server.wait_ready()
    assert (await complete(http, server))[0] == 200


def test_400_connections_at_once_wait_for_a_busy_event_loop_and_none_is_turned_away(start) -> None:
    server = start()
    server.signal(signal.SIGSTOP)  # busier than it can ever be
    try:
        with contextlib.ExitStack() as connections:
            for _ in range(400):  # one that finds no place tries again after a second
                connections.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=0.9))
    finally:
        server.signal(signal.SIGCONT)


def test_a_port_in_use_is_named_in_the_certificate(start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = start(f"--port={port}", ready=False)

        assert server.wait_exit() == ExitStatus.PORT_IN_USE
    failure = certificate(server)
    assert failure.code is FailureCode.PORT_IN_USE
    assert str(port) in failure.message
    assert "--port" in failure.fix


def test_port_0_takes_a_free_one_and_prints_it(start) -> None:
    server = start("--port=0", "--management-port=0", ready=False)
    assert server.process.stderr is not None
    line = next(line for line in server.process.stderr if "url=" in line)

    url = line.split("url=")[1].split()[0]
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(url + "/health")
    assert not url.endswith(":0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--max-modle-len", "5"], "--max-model-len"),
        (["serve", "x", "--port", "abc"], "--port"),
        (["serve", "x", "--port=99999"], "0 to 65535"),
        (["serve"], "--model"),
        (["srve", "x"], "did you mean serve?"),
        (["serve", "a", "--model", "b"], "twice"),
        (["serve", "a", "--verify-expect=b"], "--verify-prompt"),
    ],
)
def test_bad_usage_is_one_line_a_certificate_and_status_2(tmp_path: Path, arguments, words) -> None:
    log = tmp_path / "termination.log"
    environment = {"PYTHONPATH": str(Path(__file__).parents[3] / "engine")}
    extra = [f"--termination-log={log}"] if arguments[0] == "serve" else []
    done = subprocess.run(
        [sys.executable, "-m", "octavo_engine.cli", *arguments, *extra], env=environment, text=True, capture_output=True
    )

    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
    if extra:
        failure = Failure.from_json(log.read_text())
        assert failure is not None
        assert failure.code is FailureCode.INVALID_CONFIG


def test_an_unknown_model_ends_before_an_engine_is_started(start) -> None:
    server = start("--model=/nowhere/at/all", ready=False)

    assert server.wait_exit() == ExitStatus.MODEL_NOT_FOUND
    assert certificate(server).code is FailureCode.MODEL_NOT_FOUND


def test_a_failure_while_loading_is_the_processs_own(start) -> None:
    server = start(script={"fail_loading": "KV_CACHE_TOO_SMALL"}, ready=False)

    assert server.wait_exit() == ExitStatus.KV_CACHE_TOO_SMALL
    assert certificate(server).message == "The script says so."


def test_the_question_of_verify_prompt_is_answered_before_the_server_is_ready(start) -> None:
    """The scripted engine says its prompt again, with the template around it."""
    flags = ("--verify-prompt=sum", "--verify-expect=<user>sum", "--verify-min-tokens-per-s=0.5")
    server = start(*flags)
    metrics = server.get("/metrics")[1]

    assert server.get("/readyz")[0] == 200
    assert "vllm:request_success_total{" in metrics
    assert server.get("/statusz")[1]["load"]["running"] == 0


@pytest.mark.parametrize(
    ("flags", "message", "fix"),
    [
        (["--verify-expect=four"], "lacks 'four': '<user>sum", "--verify-expect"),
        (["--verify-expect=sum", "--verify-max-tokens=3"], "lacks 'sum': '<us'", "--verify-max-tokens"),
        (["--verify-min-tokens-per-s=999999"], "tokens a second, expected 999999 or more", "or lower"),
    ],
)
def test_an_answer_that_is_not_as_it_should_be_ends_the_start_with_the_answer(start, flags, message, fix) -> None:
    server = start("--verify-prompt=sum", *flags, ready=False)

    assert server.wait_exit() == ExitStatus.SELF_TEST_FAILED
    failure = certificate(server)
    assert failure.code is FailureCode.SELF_TEST_FAILED
    assert message in failure.message
    assert fix in failure.fix


def test_a_question_that_does_not_fit_is_named(start) -> None:
    server = start(f"--verify-prompt={'x' * 600}", ready=False)

    assert server.wait_exit() == ExitStatus.SELF_TEST_FAILED
    assert "--verify-prompt cannot be asked" in certificate(server).message


def test_importing_the_server_brings_in_neither_torch_nor_transformers() -> None:
    code = "import sys, octavo_engine.api.server; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    environment = {"PYTHONPATH": str(Path(__file__).parents[3] / "engine")}

    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"


# ---- keys


async def test_keys_guard_every_route_but_the_documented_open_ones(start, http) -> None:
    server = start("--api-key", "first", "second")

    async def status(method: str, path: str, authorization: str | None = None) -> int:
        headers = {"Authorization": authorization} if authorization else {}
        async with http.request(method, server.url + path, headers=headers, json={}) as response:
            body = await response.read()
            if response.status == 401:
                assert json.loads(body)["error"]["code"] == 401
            return response.status

    for path in ("/health", "/ping", "/version", "/metrics"):
        assert await status("GET", path) == 200
    guarded = [
        ("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"),
        ("POST", "/detokenize"), ("GET", "/load"), ("GET", "/nothing"), ("GET", "//v1/models"), ("POST", "/version"),
    ]  # fmt: skip
    for method, path in guarded:
        assert await status(method, path) == 401, path
        assert await status(method, path, "Bearer wrong") == 401, path
        assert await status(method, path, "Basic first") == 401, path
    assert await status("GET", "/v1/models", "Bearer first") == 200
    assert await status("GET", "/v1/models", "bearer second") == 200


async def test_a_key_file_is_read_again_when_it_changes(start, http, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    server = start(f"--api-key-file={file}")

    async def status(key: str) -> int:
        async with http.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
            return response.status

    assert (await status("old"), await status("newer")) == (200, 401)
    file.write_text("newer\n")
    assert (await status("old"), await status("newer")) == (401, 200)
    file.unlink()
    assert await status("newer") == 200


async def test_the_engine_does_not_inherit_the_keys(start, http) -> None:
    server = start(VLLM_API_KEY="secret")

    async with http.get(server.url + "/v1/models") as response:
        assert response.status == 401
    assert b"secret" not in environment_of(server.engine_pid())


async def test_a_body_above_the_limit_is_refused(start, http) -> None:
    server = start("--max-request-bytes=2000")
    status, body = await complete(http, server, "x" * 3000)

    assert status == 413
    assert body["error"]["code"] == 413


# ---- overload and disconnects


async def test_a_full_queue_is_refused_with_retry_after(start, http) -> None:
    server = start("--max-num-seqs=2", "--max-num-queued-reqs=2", script={"step_s": 0.02})
    tasks = [asyncio.create_task(stream(http, server, **ENDLESS)) for _ in range(4)]
    await running(server, 2, waiting=2)

    async with http.post(server.url + "/v1/completions", json={"prompt": "x"}) as response:
        body = await response.json()
    assert response.status == 429
    assert body["error"]["type"] == "RateLimitError"
    assert 1 <= int(response.headers["Retry-After"]) <= 120
    assert server.get("/readyz")[0] == 503
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(server.wait_idle)
    assert (await complete(http, server))[0] == 200


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"stream": False, "n": 3}])
async def test_a_client_that_hangs_up_ends_its_request(start, http, body) -> None:
    server = start("--max-num-seqs=2", script={"step_s": 0.02})
    running_and_waiting = [asyncio.create_task(complete(http, server, **ENDLESS, **body)) for _ in range(4)]
    await running(server, 2)
    for task in running_and_waiting:
        task.cancel()
    await asyncio.gather(*running_and_waiting, return_exceptions=True)
    await asyncio.to_thread(server.wait_idle)

    aborted = 4 * body.get("n", 1)
    assert server.metric("vllm:request_success_total", finished_reason="abort") == aborted
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


async def test_200_streams_cancelled_at_random_leave_an_engine_that_answers(start) -> None:
    server = start("--max-num-seqs=64", script={"step_s": 0.02})
    rng = random.Random(1)

    async def one(http: aiohttp.ClientSession) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stream(http, server, **ENDLESS), rng.uniform(0.0, 1.0))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*[one(http) for _ in range(200)])
        await asyncio.to_thread(server.wait_idle)
        status, body = await complete(http, server, "0123456789", max_tokens=10)

    assert status == 200
    # Nine seconds long each, none of them was computed to its end.
    assert server.metric("vllm:request_success_total", finished_reason="length") == 1
    assert body["choices"][0]["text"] == "0123456789"
    assert server.get("/statusz")[1]["load"]["waiting"] == 0


async def test_a_slow_reader_gets_everything_and_holds_up_nobody(start, http) -> None:
    name = "long" * 500  # repeated in every event, so that a few thousand of them fill every buffer between
    server = start("--served-model-name", name, script={"step_s": 0.0005, "max_model_len": 20_000})
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**16)
    body = json.dumps(
        {"model": name, "prompt": "abcde", "stream": True, "max_tokens": 5000, "ignore_eos": True}
    ).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    status, _ = await complete(http, server, "fast", max_tokens=4)  # before the other reads
    await asyncio.to_thread(server.wait_idle, 60.0)
    raw = await reader.read()
    writer.close()

    texts = [
        json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]
        for line in raw.split(b"\n")
        if line.startswith(b"data: {")
    ]
    assert status == 200
    assert "".join(texts) == "abcde" * 1000
    assert len(texts) < 5000  # what came while nobody read was put together


# ---- metrics


async def test_metrics_count_what_was_done_exactly(start, http) -> None:
    server = start()
    for _ in range(3):
        await complete(http, server, "abcd", max_tokens=5, ignore_eos=True)

    assert server.metric("vllm:prompt_tokens_total") == 12
    assert server.metric("vllm:generation_tokens_total") == 15
    assert server.metric("vllm:iteration_tokens_total_sum") == 3 * (4 + 5)
    assert server.metric("vllm:inter_token_latency_seconds_count") == 3 * (5 - 1)
    assert server.metric("vllm:time_to_first_token_seconds_count") == 3
    assert server.metric("vllm:e2e_request_latency_seconds_count") == 3
    assert server.metric("vllm:request_params_max_tokens_sum") == 15
    assert server.metric("vllm:request_success_total", finished_reason="length", model_name="tiny") == 3
    assert server.metric("vllm:cache_config_info", block_size="16", num_gpu_blocks="100") == 1
    assert server.metric("http_requests_total", handler="/v1/completions", method="POST", status="2xx") == 3


# ---- draining


async def test_sigterm_lets_20_streams_finish_and_refuses_new_requests(start, http) -> None:
    server = start(script={"step_s": 0.02})
    streams = [asyncio.create_task(stream(http, server, max_tokens=200, ignore_eos=True)) for _ in range(20)]
    await running(server, 20)
    server.signal(signal.SIGTERM)
    await asyncio.to_thread(wait_for, lambda: server.get("/readyz")[0] == 503, "the drain")

    async with http.post(server.url + "/v1/completions", json={"prompt": "late"}) as response:
        late = await response.json()
    assert response.status == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert "shutting down" in late["error"]["message"]
    assert server.get("/readyz")[0] == 503
    assert server.get("/livez")[0] == 200
    assert server.get("/statusz")[1]["stage"] == "draining"
    for events in await asyncio.gather(*streams):
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert await asyncio.to_thread(server.wait_exit) == 0
    assert not server.certificate.exists()


@pytest.mark.parametrize("deaf", [False, True])
async def test_what_still_runs_at_the_deadline_is_ended(start, http, deaf) -> None:
    server = start("--drain-timeout-s=0.3", script={"step_s": 0.05, "deaf": deaf})
    task = asyncio.create_task(stream(http, server, **ENDLESS))
    await running(server, 1)
    server.signal(signal.SIGTERM)

    if deaf:  # even an engine that does not listen
        with contextlib.suppress(aiohttp.ClientError):
            await task
    else:
        events = await task
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "abort"
    assert await asyncio.to_thread(server.wait_exit, 25) == 0


async def test_a_second_signal_ends_running_requests_at_once(start, http) -> None:
    server = start(script={"step_s": 0.05})
    task = asyncio.create_task(stream(http, server, **ENDLESS))
    await running(server, 1)
    server.signal(signal.SIGTERM)
    await asyncio.to_thread(wait_for, lambda: server.get("/statusz")[1]["stage"] == "draining", "the drain")
    server.signal(signal.SIGTERM)
    events = await task

    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "abort"
    assert await asyncio.to_thread(server.wait_exit, 15) == 0


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_drain_answers_when_the_last_request_is_done(start, http, method) -> None:
    server = start(script={"step_s": 0.01})
    task = asyncio.create_task(stream(http, server, max_tokens=60, ignore_eos=True))
    await running(server, 1)
    begun = time.monotonic()
    async with http.request(method, server.management_url + "/drain") as response:
        assert response.status == 200
        assert await response.json() == {"status": "drained"}
    took = time.monotonic() - begun

    assert (await task)[-1] == "[DONE]"
    assert took > 0.2
    assert await asyncio.to_thread(server.wait_exit) == 0


async def test_a_drain_that_begins_later_takes_requests_until_then(start, http) -> None:
    server = start(script={"step_s": 0.01})
    begun = time.monotonic()
    drain = asyncio.create_task(asyncio.to_thread(server.get, "/drain?after=1"))
    await asyncio.sleep(0.2)

    events = await stream(http, server, max_tokens=10, ignore_eos=True)
    status, answer = await drain

    assert events[-1] == "[DONE]"
    assert (status, answer) == (200, {"status": "drained"})
    assert time.monotonic() - begun >= 1
    assert await asyncio.to_thread(server.wait_exit) == 0


@pytest.mark.parametrize("after", ["-1", "61", "soon", "nan"])
def test_a_drain_that_begins_too_late_is_refused(start, after) -> None:
    server = start()
    status, answer = server.get(f"/drain?after={after}")

    assert status == 400
    assert after in answer["error"]
    assert server.get("/readyz")[0] == 200


def test_octavo_drain_waits_for_the_end(start) -> None:
    server = start()
    environment = {"PYTHONPATH": str(Path(__file__).parents[3] / "engine")}
    command = [sys.executable, "-m", "octavo_engine.cli", "drain", "--management-port", str(server.management_port)]
    done = subprocess.run(command, env=environment)
    again = subprocess.run(command, env=environment, stderr=subprocess.DEVNULL)

    assert done.returncode == 0
    assert server.wait_exit() == 0
    assert again.returncode == 1


def test_drain_without_waiting_answers_at_once(start) -> None:
    server = start(script={"step_s": 0.01})

    assert server.get("/drain?wait=false")[0] == 202
    assert server.wait_exit() == 0


def test_a_signal_during_start_up_ends_with_status_0(start) -> None:
    server = start(script={"load_s": 120}, ready=False).wait_bound()
    server.signal(signal.SIGTERM)

    assert server.wait_exit(60) == 0


# ---- death


async def test_a_killed_engine_ends_every_stream_once_and_names_the_oom_killer(start, http) -> None:
    server = start(script={"step_s": 0.02})
    streams = [asyncio.create_task(stream(http, server, **ENDLESS)) for _ in range(5)]
    whole = asyncio.create_task(complete(http, server, **ENDLESS))
    await running(server, 6)
    os.kill(server.engine_pid(), signal.SIGKILL)

    for events in await asyncio.gather(*streams):
        assert events[-1] == "[DONE]"
        assert sum('"error"' in event for event in events) == 1
        assert json.loads(events[-2])["error"]["code"] == 500
    assert (await whole)[0] == 500
    assert await asyncio.to_thread(server.wait_exit) == ExitStatus.ENGINE_DIED
    failure = certificate(server)
    assert failure.code is FailureCode.ENGINE_DIED
    assert "SIGKILL" in failure.message
    assert "memory" in failure.message


async def test_an_engine_that_says_why_it_dies_is_quoted(start, http) -> None:
    server = start()
    status, body = await complete(http, server, "!fatal")

    assert status == 500
    assert "fell off the bus" in body["error"]["message"]
    assert await asyncio.to_thread(server.wait_exit) == ExitStatus.DEVICE_ERROR
    assert certificate(server).fix == "replace it"


async def test_an_engine_dies_with_its_api_process(start) -> None:
    server = start()
    engine = server.engine_pid()
    server.signal(signal.SIGKILL)
    server.wait_exit()

    await asyncio.to_thread(wait_for, lambda: is_gone(engine), "the engine to end with its API process", 30)


# ---- a process in trouble


async def test_a_hung_engine_is_not_alive(start, http) -> None:
    server = start("--liveness-stall-s=3")
    task = asyncio.create_task(complete(http, server, "!hang"))
    await asyncio.sleep(0.5)
    assert server.get("/livez")[0] == 200
    await asyncio.to_thread(wait_for, lambda: server.get("/livez")[0] == 503, "the hang to be noticed")

    status, body = server.get("/livez")
    assert status == 503
    assert "no step finished" in body["reason"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_the_management_port_answers_while_the_event_loop_is_blocked(server) -> None:
    # A body of many megabytes keeps the loop and its threads busy; and 20 of them at once.
    document = json.dumps({"prompt": ["x" * 1000] * 20_000}).encode()

    def flood() -> None:
        request = urllib.request.Request(server.url + "/v1/completions", document, {"Content-Type": "application/json"})
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=60)

    def slowest_s() -> float:
        threads = [threading.Thread(target=flood) for _ in range(8)]
        for thread in threads:
            thread.start()
        worst = 0.0
        while any(thread.is_alive() for thread in threads):
            begun = time.monotonic()
            assert server.get("/livez")[0] == 200
            worst = max(worst, time.monotonic() - begun)
        print(f"slowest answer of /livez: {1000 * worst:.0f} ms")
        return worst

    assert least_below(1.0, slowest_s) < 1.0


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()
