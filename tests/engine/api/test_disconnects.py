"""A client that hangs up ends its request wherever it is: queued, prefilling, decoding, preempted, n > 1, streaming or
not. Against the real engine, with a cache that three long answers do not fit into."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from waiting import wait_for

TEXT = "/v1/completions"
SLOW = {"temperature": 1, "ignore_eos": True, "max_tokens": 450}


@pytest.fixture(scope="module")
def tight(start_real: Any) -> Any:
    """Four rows, prompts in chunks of 16 tokens, and 512 tokens of cache."""
    flags = ("--max-num-seqs=4", "--max-num-batched-tokens=16", "--max-model-len=512", "--block-size=16")
    return start_real(*flags, "--num-gpu-blocks-override=32", ready=False).wait_ready(60)


@pytest.fixture
async def many() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        yield session


def load(server: Any) -> dict[str, Any]:
    document: dict[str, Any] = server.get("/statusz")[1]["load"]
    return document


def aborted(server: Any) -> float:
    return float(server.metric("vllm:request_success_total", finished_reason="abort"))


def generated(server: Any) -> float:
    return float(server.metric("vllm:generation_tokens_total"))


def preempted(server: Any) -> float:
    return float(server.metric("vllm:num_preemptions_total"))


def queued(server: Any, since: float) -> bool:
    return bool(load(server)["waiting"] >= 2)


def prefilling(server: Any, since: float) -> bool:
    return bool(load(server)["running"] >= 1)


def decoding(server: Any, since: float) -> bool:
    return generated(server) > since + 30


def has_preempted(server: Any, since: float) -> bool:
    return preempted(server) > since and load(server)["waiting"] >= 1


STATES: dict[str, tuple[int, dict[str, Any], Callable[[Any, float], bool], Callable[[Any], float]]] = {
    "queued": (6, {"prompt": "Once upon a time", **SLOW}, queued, generated),
    "prefilling": (1, {"prompt": [5] * 450, **SLOW, "max_tokens": 60}, prefilling, generated),
    "decoding": (3, {"prompt": "Once upon a time", **SLOW}, decoding, generated),
    "preempted": (4, {"prompt": [5] * 420, **SLOW, "max_tokens": 60}, has_preempted, preempted),
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("state", STATES)
async def test_hanging_up_ends_a_request_wherever_it_is(tight, many, state, stream, n) -> None:
    clients, body, reached, figure = STATES[state]
    clients = max(1, clients // n) if state != "queued" else clients
    since, ends = figure(tight), aborted(tight)

    async def ask() -> None:
        async with many.post(tight.url + TEXT, json={**body, "n": n, "stream": stream}) as answer:
            await answer.read()

    tasks = [asyncio.create_task(ask()) for _ in range(clients)]
    await asyncio.to_thread(wait_for, lambda: reached(tight, since), state, every_s=0.01)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(tight.wait_idle)

    assert aborted(tight) - ends == clients * n
    assert load(tight)["kv_usage"] == 0
    async with many.post(
        tight.url + TEXT, json={"prompt": "The capital of France is", "temperature": 0, "max_tokens": 1}
    ) as answer:
        assert (await answer.json())["choices"][0]["text"] == " Paris"


async def test_hanging_up_while_the_body_is_sent_or_the_prompt_is_encoded_leaves_nothing(tight, many) -> None:
    for delay in (0.0, 0.001, 0.005, 0.02, 0.05):
        body = {"prompt": "a long text that is cut " * 40_000, "truncate_prompt_tokens": 50, **SLOW}
        task = asyncio.create_task(many.post(tight.url + TEXT, json=body))
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.3)

    await asyncio.to_thread(tight.wait_idle)


async def test_when_to_come_again_is_the_schedulers_own_prediction(start, many) -> None:
    server = start("--max-num-seqs=1", "--max-num-queued-reqs=1", script={"step_s": 0.02, "predicted_queue_s": 7.2})
    body = {"prompt": "x" * 50, "max_tokens": 400, "ignore_eos": True}
    tasks = [asyncio.create_task(many.post(server.url + TEXT, json=body)) for _ in range(2)]
    await asyncio.to_thread(wait_for, lambda: load(server)["waiting"] == 1, "one to wait", every_s=0.01)

    async with many.post(server.url + TEXT, json=body) as answer:
        refusal = await answer.json()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert (answer.status, answer.headers["Retry-After"]) == (429, "8")
    assert refusal["error"]["type"] == "RateLimitError"
