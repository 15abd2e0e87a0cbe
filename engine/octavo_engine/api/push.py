"""Tokens from the engine's message straight to the client's socket, without waking a task for each.

A task that is woken, and aiohttp's writer below it, take twice as long as everything else that a token costs here. So
while a client reads as fast as it is written to, its pieces are made and written where the engine's message is read.
A client that falls behind goes back to the ordinary road, where its outputs gather and the writing waits for it.
Where an answer is nothing but the text of its tokens, as most are, not even a piece is made of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from aiohttp import web

from octavo_engine.api.answer import Answer, Piece
from octavo_engine.api.sse import Writer

MOST_BUFFERED = 64 * 1024
"""Bytes that may wait for a client before it counts as slow."""
PUSHED = web.ResponseKey("pushed", int)
"""Bytes of an answer's body that aiohttp did not see."""


def chunks_of(writer: Writer, answer: Answer, pieces: Sequence[Piece], counts: bool) -> bytes:
    """counts: the request wants the usage on every chunk."""
    return b"".join(
        [
            writer.chunk(
                piece, answer.usage(piece.num_tokens) if counts or (piece.first and writer.wants_usage) else None
            )
            for piece in pieces
        ]
    )


class Push:
    """One stream whose response is prepared, and has been written to: aiohttp holds the head back until then."""

    def __init__(self, request: web.Request, response: web.StreamResponse, answer: Answer, writer: Writer) -> None:
        self._response, self._answer, self._writer = response, answer, writer
        self._counts = False
        self._transport = request.transport
        self._chunked = response.headers.get("Transfer-Encoding") == "chunked"  # response.chunked tells what was asked
        self._left: asyncio.Future[None] | None = None
        self._sent = 0

    @property
    def possible(self) -> bool:
        """Whether the client has read what it was sent. Scores of prompts are made in a thread, and so not here."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._answer.scores_prompts:
            return False
        return transport.get_write_buffer_size() < MOST_BUFFERED // 4

    async def run(self, counts: bool) -> None:
        """Write until the answer is finished or the client falls behind. Raises what making a piece raises."""
        self._counts = counts
        self._left = asyncio.get_running_loop().create_future()
        self._answer.listen(self._write, None if counts else self._direct())
        try:
            await self._left
        finally:
            self._answer.listen(None)
            self._response[PUSHED] = self._response.get(PUSHED, 0) + self._sent
            self._sent = 0

    def _write(self) -> None:
        """Called when the engine's message has been read and something of it was for this stream."""
        assert self._left is not None
        assert self._transport is not None
        if self._left.done():
            return
        answer = self._answer
        try:
            pieces = answer.take()
            data = chunks_of(self._writer, answer, pieces, self._counts)
        except Exception as error:  # noqa: BLE001 - it belongs to the stream's task, and not to who reads messages
            self._leave(error)
            return
        transport = self._transport
        if data and not transport.is_closing():
            self._sent += len(data)
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        if answer.finished or transport.get_write_buffer_size() > MOST_BUFFERED:
            self._leave()

    def _direct(self) -> Callable[[Sequence[int]], None] | None:
        """What does for plain tokens what `_write` does for all; None where the answer is more than text."""
        text_of, transport = self._answer.text_of(), self._transport
        if text_of is None or transport is None:
            return None
        chunked, event = self._chunked, self._writer.text
        write, is_closing, buffered = transport.write, transport.is_closing, transport.get_write_buffer_size

        def direct(token_ids: Sequence[int]) -> None:
            try:
                text = text_of(token_ids)
                data = event(text) if text else b""
            except Exception as error:  # noqa: BLE001 - as above
                self._leave(error)
                return
            if not data or is_closing():
                return
            self._sent += len(data)
            write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
            if buffered() > MOST_BUFFERED:
                self._leave()

        return direct

    def _leave(self, error: Exception | None = None) -> None:
        """Back to the stream's task. What comes before it runs gathers for it."""
        assert self._left is not None
        self._answer.listen(None)
        if error is None:
            self._left.set_result(None)
        else:
            self._left.set_exception(error)
