"""Tokens that are written where the engine's message is read: the same bytes as where pieces are made of them."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from octavo_engine.api import sse
from octavo_engine.api.admission import QueueLimits
from octavo_engine.api.answer import Answer
from octavo_engine.api.anthropic.writer import MessagesWriter
from octavo_engine.api.board import Board, Limits
from octavo_engine.api.engine_client import EngineClient, Prompt
from octavo_engine.api.metrics import Metrics
from octavo_engine.api.push import PUSHED, Push, chunks_of
from octavo_engine.api.responses import protocol as responses
from octavo_engine.api.responses.writer import ResponsesWriter
from octavo_engine.api.tokenizer import Tokenizer
from octavo_engine.config import EngineConfig
from octavo_engine.core.channel import encode
from octavo_engine.core.messages import FinishReason, StepOutput, TokenEvent
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.status import Load

TEXT = 'The river runs 漢字 🙂 — naïve\n"quoted" \\ and so on. '
WRITERS: dict[str, Callable[[], sse.Writer]] = {
    "chat": lambda: sse.ChatWriter("chatcmpl-1", 7, "m"),
    "completions": lambda: sse.CompletionWriter("cmpl-1", 7, "m", []),
    "messages": lambda: MessagesWriter("msg_1", "m"),
    "responses": lambda: ResponsesWriter("1", 7, "m", responses.ResponsesRequest(input="x")),
}


class Transport:
    def __init__(self) -> None:
        self.data = b""
        self.closing, self.buffered = False, 0

    def write(self, data: bytes) -> None:
        assert not self.closing
        self.data += data

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.buffered


class Stream:
    """One stream behind a client of the engine that is spoken to in frames."""

    def __init__(self, tokenizer: Tokenizer, make: Callable[[], sse.Writer], sampling: SamplingParams | None = None):
        sampling = SamplingParams(max_tokens=1000) if sampling is None else sampling
        board = Board(Limits(300, 60, 10, 1000))
        self.metrics = Metrics(board, EngineConfig(model="m"), "m")
        self.clock = 0.0
        self.client = EngineClient(board, self.metrics, QueueLimits(10, 10, 1000), lambda: self.clock)
        sent = SimpleNamespace(write=lambda data: None, is_closing=lambda: False)
        self.client._transport = sent  # type: ignore[assignment]
        stream = self.client.submit([Prompt([1], sampling)], n=1, eos_token_ids=(), cache_salt=None)
        self.answer = Answer(tokenizer, stream, sampling, [[1]])
        self.writer, self.transport = make(), Transport()
        self.response = web.StreamResponse(headers={"Transfer-Encoding": "chunked"})
        request: Any = SimpleNamespace(transport=self.transport)
        self.push = Push(request, self.response, self.answer, self.writer)

    def step(self, token_ids: list[int], last: bool = False) -> None:
        self.clock += 0.015
        event = TokenEvent("0", token_ids, FinishReason.LENGTH if last else None)
        self.client.data_received(encode(StepOutput([event], Load())))

    async def run(self, tokens: list[list[int]], stop_at: int | None = None) -> bytes:
        """All of it as bytes; stop_at: the step after which the client has fallen behind for three steps."""
        self.step(tokens[0])
        first = chunks_of(self.writer, self.answer, self.answer.take(), False)
        running = asyncio.ensure_future(self.push.run(False))
        await asyncio.sleep(0)
        for index, ids in enumerate(tokens[1:]):
            if index == stop_at:
                self.transport.buffered = 10**6
            self.step(ids, last=index == len(tokens) - 2)
            if index == stop_at:
                await running
            if stop_at is not None and index == stop_at + 3:
                self.transport.buffered = 0
                more = chunks_of(self.writer, self.answer, self.answer.take(), False)
                self.transport.write(b"%x\r\n%b\r\n" % (len(more), more) if more else b"")
                running = asyncio.ensure_future(self.push.run(False))
                await asyncio.sleep(0)
        await running
        return first + self.transport.data


def steps(tokenizer: Tokenizer) -> list[list[int]]:
    ids, rng, found = tokenizer.encode(TEXT * 6), random.Random(5), []
    while ids:
        count = 1 if rng.random() < 0.8 else rng.randint(2, 5)
        found.append(ids[:count])
        ids = ids[count:]
    return found


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    """A token a byte: most characters of TEXT are split over several."""
    return Tokenizer.load(model_folder)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("real", [False, True])
async def test_what_is_written_at_once_is_what_pieces_give(
    name, real, tokenizer, smollm2_tokenizer, monkeypatch
) -> None:
    tokenizer = Tokenizer.load(smollm2_tokenizer) if real else tokenizer
    tokens = steps(tokenizer)
    straight = Stream(tokenizer, WRITERS[name])
    written = await straight.run(tokens)
    assert straight.client._live == {}
    monkeypatch.setattr(Answer, "text_of", lambda self: None)
    of_pieces = Stream(tokenizer, WRITERS[name])

    assert written == await of_pieces.run(tokens)
    assert "漢字".encode() in written
    assert straight.answer.usage() == of_pieces.answer.usage()
    assert straight.response[PUSHED] == of_pieces.response[PUSHED]
    assert straight.metrics.itl.samples() == of_pieces.metrics.itl.samples()
    assert straight.metrics.itl.samples()[0][-1] == ("+Inf", len(tokens) - 1)


@pytest.mark.parametrize("name", WRITERS)
async def test_a_client_that_falls_behind_and_catches_up_misses_nothing(name, tokenizer) -> None:
    tokens = steps(tokenizer)
    slow = Stream(tokenizer, WRITERS[name])
    await slow.run(tokens, stop_at=20)
    quick = Stream(tokenizer, WRITERS[name])
    await quick.run(tokens)

    assert slow.answer.usage() == quick.answer.usage()
    assert slow.client._live == {}
    assert text_in(slow.transport.data) == text_in(quick.transport.data)
    assert text_in(slow.transport.data) in TEXT * 6


def text_in(data: bytes) -> str:
    events = [json.loads(found) for found in re.findall(rb"data: (\{.*\})", data)]
    texts = []
    for event in events:
        choice = event.get("choices", [{}])[0]
        delta = choice.get("delta", event.get("delta", {}))
        texts.append(choice.get("text") or (delta if isinstance(delta, str) else None) or "")
        if isinstance(delta, dict):
            texts[-1] += delta.get("content") or delta.get("text") or ""
    return "".join(texts)


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(max_tokens=1000, stop=("x",)), SamplingParams(max_tokens=1000, logprobs=1)],
)
async def test_an_answer_that_is_more_than_its_text_is_made_of_pieces(sampling, tokenizer) -> None:
    stream = Stream(tokenizer, WRITERS["chat"], sampling)
    stream.step([5])
    stream.answer.take()

    assert stream.answer.text_of() is None


async def test_what_fails_while_it_is_written_fails_its_own_stream(tokenizer, monkeypatch) -> None:
    def fail(self: object, text: str) -> bytes:
        raise RuntimeError("broken")

    monkeypatch.setattr(sse.ChatWriter, "text", fail)
    stream = Stream(tokenizer, WRITERS["chat"])

    with pytest.raises(RuntimeError, match="broken"):
        await stream.run(steps(tokenizer))


async def test_nothing_is_written_to_a_client_that_is_gone(tokenizer) -> None:
    stream = Stream(tokenizer, WRITERS["chat"])
    stream.step([5])
    stream.answer.take()
    running = asyncio.ensure_future(stream.push.run(False))
    await asyncio.sleep(0)
    stream.transport.closing = True
    stream.step([6])
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    stream.answer.close()
    stream.step([7])

    assert stream.transport.data == b""
