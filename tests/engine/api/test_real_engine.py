"""The whole server with the real engine and model: cancelled, killed and drained under load."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
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

pytestmark = pytest.mark.slow

LONG = {"model": "smollm2", "max_tokens": 2000, "ignore_eos": True, "stream": True, "temperature": 0}


@dataclass
class Real:
    process: subprocess.Popen[bytes]
    url: str
    management_url: str
    certificate: Path

    def statusz(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.management_url + "/statusz", timeout=5) as answer:
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
        for _ in range(600):
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


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def is_gone(pid: int) -> bool:
    """Ended; where nobody reaps orphans, a zombie is left of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


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
    for _ in range(600):
        if server.statusz()["load"]["running"] >= count:
            return
        await asyncio.sleep(0.05)
    raise TimeoutError(server.statusz()["load"])


async def test_two_hundred_streams_cancelled_at_random_leave_nothing(real: Real, http: aiohttp.ClientSession) -> None:
    rng = random.Random(1)

    async def cancelled(index: int) -> None:
        prompt = f"Story {index}: " + "and then " * rng.randrange(1, 60)
        task = asyncio.create_task(events(http, real, prompt))
        await asyncio.sleep(rng.uniform(0.0, 4.0))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*(cancelled(index) for index in range(200)))
    ended = time.monotonic()
    for _ in range(200):
        load = real.statusz()["load"]
        if load["running"] == load["waiting"] == 0 and load["kv_usage"] == 0:
            break
        await asyncio.sleep(0.05)
    idle_after_s = time.monotonic() - ended

    assert (load["running"], load["waiting"], load["kv_usage"], load["waiting_prefill_tokens"]) == (0, 0, 0, 0)
    assert idle_after_s < 5
    started = time.monotonic()
    final = json.loads((await events(http, real, "The capital of France is", max_tokens=4))[-2])
    assert final["choices"][0]["finish_reason"] == "length"
    assert time.monotonic() - started < 5


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
    assert real.process.wait(10) == ExitStatus.ENGINE_DIED
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
    for _ in range(100):
        if is_gone(engine):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the engine outlived the API process")


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
