"""`octavo bench serve`: send requests to a server that speaks the OpenAI API and time what comes back."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
from tqdm import tqdm

from octavo_engine.bench.datasets import Sample
from octavo_engine.bench.report import Answer

READY_PAUSE_S = 1.0


@dataclass(frozen=True)
class Load:
    """How requests arrive. request_rate: per second, inf for all at once, with gaps of a gamma distribution.

    burstiness 1 is a Poisson process, less comes in bursts, more is steadier. max_concurrency: None for no limit.
    """

    request_rate: float = float("inf")
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Target:
    base_url: str
    model: str
    api_key: str | None = None
    ignore_eos: bool = True
    endpoint: str = "/v1/completions"
    body: Mapping[str, object] = field(default_factory=dict)
    """What each request has beside its prompt: sampling and the like."""
    headers: Mapping[str, str] = field(default_factory=dict)
    request_id_prefix: str = ""
    timeout_s: float = 6 * 3600.0


def arrivals(count: int, load: Load) -> list[float]:
    """Seconds after the start at which each request is sent, in order."""
    if load.request_rate == float("inf"):
        return [0.0] * count
    draw = random.Random(load.seed)
    scale = 1.0 / (load.request_rate * load.burstiness)
    moments, now = [], 0.0
    for _ in range(count):
        moments.append(now)
        now += draw.gammavariate(load.burstiness, scale)
    return moments


async def run(target: Target, samples: Sequence[Sample], load: Load, show_progress: bool) -> tuple[list[Answer], float]:
    """Every request's answer, in order, and the seconds that all of them took together."""
    limit = asyncio.Semaphore(load.max_concurrency or len(samples))
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    headers |= target.headers
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        begin = time.perf_counter()
        with tqdm(total=len(samples), desc="requests", disable=not show_progress, dynamic_ncols=True) as bar:

            async def one(number: int, sample: Sample, at: float) -> Answer:
                await asyncio.sleep(max(begin + at - time.perf_counter(), 0.0))
                async with limit:
                    answer = await ask(session, target, sample, begin, number)
                bar.update()
                return answer

            moments = arrivals(len(samples), load)
            calls = enumerate(zip(samples, moments, strict=True))
            answers = await asyncio.gather(*(one(number, s, at) for number, (s, at) in calls))
        return list(answers), time.perf_counter() - begin


async def ask(session: aiohttp.ClientSession, target: Target, sample: Sample, begin: float, number: int = 0) -> Answer:
    """One streamed completion, the so-many-th. A failure is an answer with its reason, never an exception."""
    body: dict[str, object] = {
        "model": target.model, "prompt": sample.prompt, "max_tokens": sample.output_len, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": target.ignore_eos,
    }  # fmt: skip
    body |= target.body
    headers = {"X-Request-Id": f"{target.request_id_prefix}{number}"} if target.request_id_prefix else {}
    started = last = time.perf_counter()
    answer = Answer(len(sample.prompt), started_s=started - begin)
    try:
        async with session.post(target.base_url + target.endpoint, json=body, headers=headers) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return answer
            async for event in events(response.content):
                chunk = json.loads(event)
                if "error" in chunk:
                    answer.error = str(chunk["error"])[:200]
                    return answer
                if chunk.get("choices"):
                    now = time.perf_counter()
                    if answer.ttft_s:
                        answer.itls_s.append(now - last)
                    else:
                        answer.ttft_s = now - started
                    last = now
                elif usage := chunk.get("usage"):
                    answer.output_len = usage["completion_tokens"]
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:200]
        return answer
    # Who tells nothing of tokens, although asked to, is taken to send one with each event.
    answer.output_len = answer.output_len or (len(answer.itls_s) + 1 if answer.ttft_s else 0)
    answer.latency_s = last - started
    if not answer.ttft_s:
        answer.error = "the stream ended without a token"
    return answer


async def events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each server-sent event, up to [DONE]. Comments are skipped."""
    async for line in content:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield data


async def served_model(base_url: str, api_key: str | None, wait_s: float = 0.0) -> str:
    """The name under which the server serves its model; waits so long for it. Raises OSError with what is wrong."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return await _served_model(base_url, api_key)
        except OSError:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(READY_PAUSE_S)


async def _served_model(base_url: str, api_key: str | None) -> str:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(f"{base_url}/v1/models", timeout=aiohttp.ClientTimeout(total=10)) as response,
        ):
            if response.status != 200:
                raise OSError(
                    f"{base_url}/v1/models answers HTTP {response.status}: is the model loaded, the key right?"
                )
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError) as error:
        cause = getattr(error, "os_error", error)  # without what aiohttp adds of TLS
        raise OSError(f"no server answers at {base_url}: {cause}. Start one with `octavo serve MODEL`") from error
