"""A thousand streams at once through one API process: every event once, in order, each stream its own."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

STREAMS, TOKENS = 1000, 40


async def one(http: aiohttp.ClientSession, server: Any, number: int) -> list[str]:
    """The parts of a stream's text, one for each event that has some."""
    body = {"prompt": f"{number:04}-abcdefghij", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    async with http.post(server.url + "/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        raw = (await answer.read()).decode()
    events = raw.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    return [choice["text"] for choice in choices]


@pytest.mark.slow
async def test_a_thousand_streams_lose_and_double_nothing(start) -> None:
    server = start("--max-num-seqs=1000", "--max-num-batched-tokens=2048", script={"step_s": 0.01})
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        streams = await asyncio.gather(*(one(http, server, number) for number in range(STREAMS)))

    for number, parts in enumerate(streams):
        prompt = f"{number:04}-abcdefghij"
        assert "".join(parts) == (prompt * 3)[:TOKENS]
    # Were all of it one event each, nothing would have been streamed.
    assert sum(map(len, streams)) > STREAMS * TOKENS // 4
    await asyncio.to_thread(server.wait_idle)
    assert server.metric("vllm:generation_tokens_total") == STREAMS * TOKENS
    assert server.metric("vllm:request_success_total", finished_reason="length") == STREAMS


async def test_a_client_of_http_1_0_gets_the_events_without_chunks(server) -> None:
    body = json.dumps({"prompt": "abcde", "max_tokens": 20, "ignore_eos": True, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    answered, _, events = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()

    assert "chunked" not in answered.lower()
    *parts, done, rest = events.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    texts = [json.loads(part.removeprefix("data: "))["choices"][0]["text"] for part in parts]
    assert "".join(texts) == "abcde" * 4
