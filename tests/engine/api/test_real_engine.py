"""The whole server with the real engine and model: cancelled, killed and drained under load."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import models
from octavo_engine.status import ExitStatus, Failure, FailureCode
from ports import free_port
from waiting import is_gone, wait_for

pytestmark = pytest.mark.slow

LONG = {"model": "smollm2", "max_tokens": 2000, "ignore_eos": True, "stream": True, "temperature": 0}


@dataclass
class Real:
    process: subprocess.Popen[bytes]
    url: str
    management_url: str
    certificate: Path

    def statusz(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.management_url + "/statusz", timeout=60) as answer:
            document: dict[str, Any] = json.load(answer)
            return document

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def failure(self) -> Failure | None:
        return Failure.from_json(self.certificate.read_text())


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Real]:
    port, management = free_port(), free_port()
    certificate = tmp_path / "termination.log"
    command = [sys.executable, "-m", "octavo_engine.cli", "serve", str(models.smollm2()), f"--port={port}"]
    command += [f"--management-port={management}", "--served-model-name=smollm2", "--kv-cache-memory-bytes=512M"]
    command += [f"--termination-log={certificate}", "--max-num-seqs=64", "--drain-timeout-s=120"]
    process = subprocess.Popen(command)
    server = Real(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{management}", certificate)
    try:
        for _ in range(2400):
            assert process.poll() is None, f"the server ended with {process.returncode}"
            try:
                urllib.request.urlopen(server.management_url + "/readyz", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture
async def http() -> Any:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=240)) as session:
        yield session


async def events(http: aiohttp.ClientSession, server: Real, prompt: str, **body: Any) -> list[str]:
    async with http.post(server.url + "/v1/completions", json={**LONG, "prompt": prompt, **body}) as answer:
        text = (await answer.read()).decode()
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


async def wait_running(server: Real, count: int) -> None:
    await asyncio.to_thread(wait_for, lambda: server.statusz()["load"]["running"] >= count, f"{count} to run")


async def wait_idle(server: Real) -> None:
    """Soon nothing runs, nothing waits and no block is held. A step of many prompts takes a busy machine seconds."""

    def idle() -> bool:
        load = server.statusz()["load"]
        return bool(load["running"] == load["waiting"] == 0 and load["kv_usage"] == 0)

    await asyncio.to_thread(wait_for, idle, "nothing to run, wait or be held")


async def test_two_hundred_streams_cancelled_at_random_leave_nothing(real: Real, http: aiohttp.ClientSession) -> None:
    rng = random.Random(1)

    async def cancelled(index: int) -> None:
        prompt = f"Story {index}: " + "and then " * rng.randrange(1, 60)
        task = asyncio.create_task(events(http, real, prompt))
        await asyncio.sleep(rng.uniform(0.0, 4.0))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*(cancelled(index) for index in range(200)))
    await wait_idle(real)

    assert real.statusz()["load"]["waiting_prefill_tokens"] == 0
    final = json.loads((await events(http, real, "The capital of France is", max_tokens=4))[-2])
    assert final["choices"][0]["finish_reason"] == "length"


async def test_a_killed_engine_ends_each_stream_once_and_the_server_with_its_status(
    real: Real, http: aiohttp.ClientSession
) -> None:
    streams = [asyncio.create_task(events(http, real, f"Story {index}")) for index in range(20)]
    await wait_running(real, 20)
    os.kill(real.engine_pid(), signal.SIGKILL)

    for stream in await asyncio.gather(*streams):
        assert stream[-1] == "[DONE]"
        assert [("error" in json.loads(event)) for event in stream[-2:-1]] == [True]
        assert sum('"error"' in event for event in stream) == 1
    assert real.process.wait(60) == ExitStatus.ENGINE_DIED
    failure = real.failure()
    assert failure is not None
    assert failure.code is FailureCode.ENGINE_DIED


async def test_a_killed_api_process_takes_the_engine_with_it(real: Real, http: aiohttp.ClientSession) -> None:
    engine = real.engine_pid()
    streams = [asyncio.create_task(events(http, real, f"Story {index}")) for index in range(5)]
    await wait_running(real, 5)
    real.process.kill()

    results = await asyncio.gather(*streams, return_exceptions=True)
    assert all(isinstance(result, aiohttp.ClientError) for result in results)
    await asyncio.to_thread(wait_for, lambda: is_gone(engine), "the engine to end with its API process", 30)


async def test_sigterm_lets_twenty_streams_finish_and_ends_with_status_0(
    real: Real, http: aiohttp.ClientSession
) -> None:
    streams = [asyncio.create_task(events(http, real, f"Story {index}", max_tokens=40)) for index in range(20)]
    await wait_running(real, 20)
    real.process.send_signal(signal.SIGTERM)

    for stream in await asyncio.gather(*streams):
        assert stream[-1] == "[DONE]"
        assert json.loads(stream[-2])["choices"][0]["finish_reason"] == "length"
    assert await asyncio.to_thread(real.process.wait, 20) == 0


TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
ODD: list[tuple[str, dict[str, Any] | bytes, int, str]] = [
    (TEXT, {"prompt": ""}, 400, "prompt"),
    (TEXT, {"prompt": ["a", ""]}, 400, "prompt"),
    (TEXT, {"prompt": "a\u0000b \U0001f600 \u200b", "max_tokens": 2}, 200, ""),
    (TEXT, {"prompt": [0, 49151], "max_tokens": 2}, 200, ""),
    (TEXT, {"prompt": [49152]}, 400, "49152 is out of vocabulary"),
    (TEXT, {"prompt": [2**70]}, 400, "prompt"),
    (TEXT, {"prompt": [1] * 8192, "max_tokens": 1}, 400, "maximum context length is 8192"),
    (TEXT, {"prompt": "x " * 2_000_000}, 400, "maximum context length is 8192"),
    (TEXT, {"prompt": "x", "logprobs": 21}, 400, "greater than max allowed: 20"),
    (TEXT, {"prompt": "x", "logprobs": -1}, 400, "logprobs must be"),
    (TEXT, {"prompt": "x", "logprobs": 21, "echo": True}, 400, "20"),
    (TEXT, {"prompt": "x", "logprobs": 20, "max_tokens": 3, "n": 2, "seed": 1}, 200, "top_logprobs"),
    (TEXT, {"prompt": "x", "logit_bias": {"49152": 1}}, 400, "out-of-vocab"),
    (TEXT, {"prompt": "x", "logit_bias": {"5": 1e9, "6": -1e9}, "max_tokens": 2}, 200, ""),
    (TEXT, {"prompt": "x", "allowed_token_ids": [49152]}, 400, "out of vocabulary"),
    (TEXT, {"prompt": "x", "bad_words": ["\u00e9\u00e9", " a", "the"], "max_tokens": 4}, 200, ""),
    (TEXT, {"prompt": "x", "priority": -5, "max_tokens": 2}, 200, ""),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "logprobs` must be set"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 3}, 200, '"top_logprobs":[{'),
    (TEXT, {"prompt": "x", "n": 2, "temperature": 0}, 400, "n must be 1"),
    (TEXT, {"prompt": "x", "n": 3, "max_tokens": 2, "seed": 1}, 200, ""),
    (TEXT, {"prompt": "x", "stop_token_ids": [999999], "min_tokens": 2}, 400, "out of vocabulary"),
    (TEXT, {"prompt": "x", "stop_token_ids": list(range(1000)), "min_tokens": 3, "max_tokens": 3}, 200, ""),
    (TEXT, {"prompt": "x", "top_k": 2**31 - 1, "top_p": 1e-30, "min_p": 1, "max_tokens": 2}, 200, ""),
    (TEXT, {"prompt": "x", "seed": -(2**63), "temperature": 2, "max_tokens": 2}, 200, ""),
    (TEXT, {"prompt": "x", "repetition_penalty": 1e-300}, 400, "repetition_penalty must be in [0.01, 100]"),
    (TEXT, {"prompt": "x x x", "repetition_penalty": 0.01, "max_tokens": 4}, 200, ""),
    (TEXT, {"prompt": "x x x", "repetition_penalty": 100, "max_tokens": 4}, 200, ""),
    (TEXT, {"prompt": "x", "presence_penalty": 2, "frequency_penalty": -2, "max_tokens": 4}, 200, ""),
    (TEXT, {"prompt": "x", "temperature": 1e-30, "max_tokens": 2}, 200, ""),
    (TEXT, {"prompt": "x", "max_tokens": 10**30}, 400, "max_tokens must be"),
    (TEXT, {"prompt": "x", "max_tokens": 8193}, 400, "max_model_len=8192"),
    (TEXT, b'{"prompt": "x", "temperature": NaN}', 400, "temperature must be"),
    (TEXT, b'{"prompt": "\\ud83d"}', 400, "not valid JSON"),
    (TEXT, b'{"prompt": "\xff"}', 400, "not valid JSON"),
    (TEXT, b'{"prompt":' + b"[" * 100_000, 400, "not valid JSON"),
    (TEXT, b'{"prompt": "' + b"a" * (33 * 2**20) + b'"}', 413, "too large"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "template"),
    (CHAT, {"messages": [{"role": "\u0000", "content": "<|im_end|>" * 50}], "max_tokens": 2}, 200, ""),
    (
        CHAT,
        {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]},
        400,
        "requires --enable-auto",
    ),
    (CHAT, {"messages": HELLO, "stop": ["\u00e9", "\n\n", "."], "max_tokens": 20}, 200, ""),
]


async def test_odd_requests_are_answered_and_so_is_the_next(real: Real, http: aiohttp.ClientSession) -> None:
    async def post(path: str, body: dict[str, Any] | bytes) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with http.post(
            real.url + path, data=io.BytesIO(data), headers={"Content-Type": "application/json"}
        ) as answer:
            return answer.status, await answer.text()

    plain = {"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}
    for path, body, status, words in ODD:
        got, text = await post(path, body)
        assert (got, words in text) == (status, True), (path, str(body)[:100], text[:300])
        assert "Traceback" not in text
        assert " Paris" in (await post(TEXT, plain))[1], f"after {str(body)[:100]}"

    together = await asyncio.gather(*(post(path, body) for path, body, _, _ in ODD))
    assert [status for status, _ in together] == [status for _, _, status, _ in ODD]
    await wait_idle(real)


async def test_logprobs_come_with_their_tokens_streamed_or_whole(real: Real, http: aiohttp.ClientSession) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    async with http.post(real.url + TEXT, json=body) as answer:
        whole = (await answer.json())["choices"][0]
    streamed: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
    for event in await events(http, real, **{**body, "ignore_eos": False}):
        for choice in [] if event == "[DONE]" else json.loads(event)["choices"]:
            for name, values in streamed.items():
                values += (choice["logprobs"] or {name: []})[name]

    logprobs = whole["logprobs"]
    assert "".join(logprobs["tokens"]) == whole["text"]
    assert len(logprobs["tokens"]) == 6
    assert logprobs["text_offset"] == [sum(map(len, logprobs["tokens"][:i])) for i in range(6)]
    for token, chance, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == chance == max(top.values())
        assert len(top) == 2
    assert streamed["tokens"] == logprobs["tokens"]
    assert streamed["text_offset"] == logprobs["text_offset"]
    assert streamed["token_logprobs"] == pytest.approx(logprobs["token_logprobs"], abs=0.05)

    chat = {"messages": HELLO, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    async with http.post(real.url + CHAT, json=chat) as answer:
        choice = (await answer.json())["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert [top["logprob"] for top in entry["top_logprobs"]] == sorted(
            (top["logprob"] for top in entry["top_logprobs"]), reverse=True
        )
        assert entry["top_logprobs"][0]["token"] == entry["token"]
