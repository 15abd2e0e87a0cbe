"""The API process's end of the channel: submits sequences, and hands what each step produced to their streams.

Life of a sequence here: submit → live → (ended by us: its stream closed, or a stop string; the engine is told to
abort) → the engine's final event → gone. Only the final event takes it out of the count of live sequences, because
only then has the engine freed its memory. When the engine is gone, every live sequence gets its final event from us.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from octavo_engine.api.admission import QueueLimits, QueueState, refusal
from octavo_engine.api.board import Board, retry_seconds
from octavo_engine.api.metrics import Finished, Metrics
from octavo_engine.core.channel import HEADER, MAX_FRAME_BYTES, decode, encode
from octavo_engine.core.messages import (
    NOT_FINITE,
    Abort,
    Fatal,
    FinishReason,
    Grammar,
    Ready,
    StageChanged,
    StepOutput,
    Submit,
    ToEngine,
    TokenEvent,
    TokenLogprobs,
)
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.status import Effective, Failure

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """Too much waits already; the text says what."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class EngineGoneError(Exception):
    """The engine process has ended."""


@dataclass(frozen=True)
class Prompt:
    """One sequence to be: a prompt and how to sample. sampling.n is 1 and max_tokens is set."""

    token_ids: list[int]
    sampling: SamplingParams
    grammar: Grammar | None = None


@dataclass(slots=True)
class Output:
    """What arrived for one sequence of a stream since it was read last. A slow reader gets many steps in one."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int | None = None
    error: str | None = None
    error_param: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None


class _Sequence:
    """One live sequence. `ended`: its stream wants no more of it. `direct`: takes its tokens where they are read."""

    __slots__ = (
        "arrived", "cached", "direct", "ended", "first_at", "id", "index", "last_at", "max_tokens", "num_tokens",
        "output", "prefill_s", "prompt_tokens", "queue_s", "stream",
    )  # fmt: skip

    def __init__(self, id: str, stream: Stream, index: int, prompt: Prompt, arrived: float) -> None:
        self.id, self.stream, self.index = id, stream, index
        self.prompt_tokens = len(prompt.token_ids)
        self.max_tokens = prompt.sampling.max_tokens or 0
        self.arrived = arrived
        self.first_at: float | None = None
        self.last_at = arrived
        self.num_tokens = 0
        self.cached = 0
        self.queue_s: float | None = None
        self.prefill_s: float | None = None
        self.output: Output | None = None
        self.direct: Callable[[Sequence[int]], None] | None = None
        self.ended = False


@dataclass
class Timing:
    """Seconds of a request's life so far; of several sequences, the first that got there. None: not yet."""

    queue_s: float | None = None
    prefill_s: float | None = None
    first_token_s: float | None = None
    """From arrival."""
    last_token_s: float | None = None
    """From arrival, of the last sequence."""

    @property
    def decode_s(self) -> float | None:
        if self.first_token_s is None or self.last_token_s is None:
            return None
        return self.last_token_s - self.first_token_s

    @property
    def inference_s(self) -> float | None:
        if self.prefill_s is None or self.decode_s is None:
            return None
        return self.prefill_s + self.decode_s


class Stream:
    """The outputs of one request's sequences, in the order in which they came. One reader."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._ready: list[_Sequence] = []
        self._waiter: asyncio.Future[None] | None = None
        self._open: dict[int, _Sequence] = {}
        self.timing = Timing()
        self._listener: Callable[[], None] | None = None

    @property
    def finished(self) -> bool:
        """Every sequence has ended and been read to its end."""
        return not self._open and not self._ready

    async def next(self) -> list[Output]:
        """What arrived since the last call, at least one output. Must not be called when finished."""
        if not self._ready:
            assert self._open, "read beyond the end"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take()

    def listen(
        self, listener: Callable[[], None] | None, direct: Callable[[Sequence[int]], None] | None = None
    ) -> None:
        """Call this, once for each of the engine's messages that has something for the stream, until told None.

        direct: gets the tokens of a stream's only sequence instead, where they are not its last. It must not raise.
        """
        self._listener = listener
        for sequence in self._open.values():
            sequence.direct = direct
        if listener is not None and self._ready:
            listener()

    def take(self) -> list[Output]:
        """What arrived since the last call."""
        ready, self._ready = self._ready, []
        outputs = []
        for sequence in ready:
            if (output := sequence.output) is not None:
                sequence.output = None
                outputs.append(output)
        return outputs

    def end(self, index: int, num_tokens: int) -> None:
        """A stop string ended this sequence after so many tokens: nothing more of it is wanted."""
        if (sequence := self._open.pop(index, None)) is not None:
            sequence.num_tokens = num_tokens
            self._client._end([sequence], FinishReason.STOP)

    def close(self) -> None:
        """Nothing more is wanted of any sequence. Every reader calls this, whatever happened."""
        if self._open:
            sequences = list(self._open.values())
            self._open.clear()
            self._client._end(sequences, FinishReason.ABORT)

    # ---- called by the client

    def notify(self) -> None:
        if self._listener is not None and self._ready:
            self._listener()

    def add(self, sequence: _Sequence) -> None:
        self._open[sequence.index] = sequence

    def put(self, sequence: _Sequence, event: TokenEvent) -> None:
        output = sequence.output
        if output is None:
            # The event's lists are nobody else's: they are taken over.
            output = sequence.output = Output(sequence.index, event.token_ids, logprobs=event.logprobs)
            if self._listener is not None and not self._ready:
                self._client.due.append(self)
            self._ready.append(sequence)
        else:
            output.token_ids += event.token_ids
            output.logprobs += event.logprobs
        if event.prompt_logprobs is not None:
            output.prompt_logprobs = event.prompt_logprobs
        if event.num_cached_tokens is not None:
            output.num_cached_tokens = event.num_cached_tokens
        if event.finish_reason is not None:
            output.finish_reason = event.finish_reason
            output.stop_token_id = event.stop_token_id
            output.error, output.error_param = event.error, event.error_param
            self._open.pop(sequence.index, None)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient(asyncio.Protocol):
    """All methods belong to the event loop's thread."""

    def __init__(
        self, board: Board, metrics: Metrics, limits: QueueLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._board, self._metrics, self.limits, self._clock = board, metrics, limits, clock
        self._live: dict[str, _Sequence] = {}
        self._unstarted_tokens = 0
        self._ids = itertools.count()
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Effective] = loop.create_future()
        self.gone: asyncio.Future[Failure | None] = loop.create_future()
        """Done when the engine is gone: with its own account of why, or with None when it gave none."""
        self._fatal: Failure | None = None
        self._stepped_at = 0.0
        self.due: list[Stream] = []
        """Streams that listen and have got something of the message that is being read."""

    async def connect(self, sock: socket.socket) -> None:
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=sock)

    def send(self, message: ToEngine) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))

    def close(self) -> None:
        """Hang up: an engine whose API process is gone ends at once."""
        if self._transport is not None:
            self._transport.close()

    def submit(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int,
        eos_token_ids: tuple[int, ...],
        cache_salt: str | None,
        priority: int = 0,
    ) -> Stream:
        """Queue all sequences of a request, or none. n: as the request said, for the metrics.

        Raises QueueFullError or EngineGoneError.
        """
        if self._transport is None or self.gone.done():
            raise EngineGoneError("the engine has ended")
        load = self._board.load
        state = QueueState(len(self._live), self._unstarted_tokens, load.running, load.waiting)
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        if reason := refusal(self.limits, state, len(prompts), tokens):
            raise QueueFullError(reason, retry_seconds(load.predicted_queue_s or None))
        now = self._clock()
        stream = Stream(self)
        frames = []
        for index, prompt in enumerate(prompts):
            # Ids are ours alone: two clients that send the same X-Request-Id must never share a sequence.
            sequence = _Sequence(f"{next(self._ids):x}", stream, index, prompt, now)
            stream.add(sequence)
            self._live[sequence.id] = sequence
            frames.append(
                encode(
                    Submit(
                        request_id=sequence.id,
                        prompt_token_ids=prompt.token_ids,
                        sampling=prompt.sampling,
                        eos_token_ids=eos_token_ids,
                        cache_salt=cache_salt,
                        priority=priority,
                        grammar=prompt.grammar,
                    )
                )
            )
        self._unstarted_tokens += tokens
        self._transport.write(b"".join(frames))
        self._metrics.params_n.observe(n)
        self._board.busy(len(self._live))
        return stream

    def abort_all(self) -> None:
        """End every live sequence; each stream gets its final event from the engine."""
        if self._live:
            self.send(Abort(list(self._live)))

    def _end(self, sequences: Sequence[_Sequence], reason: FinishReason) -> None:
        """Our side is done with these; the engine may not know yet."""
        ids = []
        for sequence in sequences:
            sequence.ended, sequence.direct = True, None
            self._count_end(sequence, reason)
            if sequence.id in self._live:
                ids.append(sequence.id)
        if ids:
            self.send(Abort(ids))

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of asyncio's

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start, size = 0, HEADER.size
        while len(buffer) - start >= size:
            length, kind = HEADER.unpack_from(buffer, start)
            assert length <= MAX_FRAME_BYTES, length
            end = start + size + length
            if len(buffer) < end:
                break
            self._receive(decode(kind, bytes(buffer[start + size : end])))
            start = end
        if start:
            del buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.gone.done():
            self.gone.set_result(self._fatal)
        reason = str(self._fatal) if self._fatal is not None else "The engine process has died."
        for sequence in list(self._live.values()):
            event = TokenEvent(sequence.id, [], FinishReason.ERROR, error=reason)
            self._finish(sequence, event)
        self._notify()
        self._board.busy(0)

    def _notify(self) -> None:
        due, self.due = self.due, []
        for stream in due:
            stream.notify()

    # ---- what the engine says

    def _receive(self, message: object) -> None:
        match message:
            case StepOutput():
                self._step(message)
            case StageChanged():
                self._board.enter(message.stage, message.done_bytes, message.total_bytes)
            case Ready():
                self._metrics.ready(message.effective)
                if not self.ready.done():
                    self.ready.set_result(message.effective)
            case Fatal():
                self._fatal = message.failure
            case _:
                raise AssertionError(f"the engine sent {type(message).__name__}")

    def _step(self, step: StepOutput) -> None:
        now = self._clock()
        before, self._stepped_at = self._stepped_at, now
        self._board.step(step.load)
        metrics, live = self._metrics, self._live
        prompt_tokens = generated = in_step = 0
        for event in step.events:
            sequence = live.get(event.request_id)
            if sequence is None:
                continue
            token_ids = event.token_ids
            if token_ids:
                new = len(token_ids)
                generated += new
                # Nearly all got a token in the step before, and so have the same gap: it is looked up once.
                if sequence.last_at is before:
                    in_step += 1
                elif sequence.first_at is None:
                    prompt_tokens += sequence.prompt_tokens
                    self._first_token(sequence, event, now)
                else:
                    metrics.itl.observe(now - sequence.last_at)
                sequence.last_at = now
                if not sequence.ended:
                    sequence.num_tokens += new
            if event.finish_reason is not None:
                self._finish(sequence, event)
            elif sequence.direct is not None:
                sequence.direct(token_ids)
            elif not sequence.ended:
                sequence.stream.put(sequence, event)
        if in_step:
            metrics.itl.observe(now - before, in_step)
        self._notify()
        metrics.step_done(step.stats, prompt_tokens, generated)
        if not live:
            self._board.busy(0)

    def _first_token(self, sequence: _Sequence, event: TokenEvent, now: float) -> None:
        sequence.first_at = now
        sequence.cached = event.num_cached_tokens or 0
        sequence.queue_s, sequence.prefill_s = event.queue_s, event.prefill_s
        self._unstarted_tokens -= sequence.prompt_tokens
        self._metrics.cached_tokens += sequence.cached
        self._metrics.ttft.observe(now - sequence.arrived)
        timing = sequence.stream.timing
        if timing.first_token_s is None:
            timing.first_token_s = now - sequence.arrived
            timing.queue_s, timing.prefill_s = event.queue_s, event.prefill_s

    def _finish(self, sequence: _Sequence, event: TokenEvent) -> None:
        del self._live[sequence.id]
        if sequence.first_at is None:
            self._unstarted_tokens -= sequence.prompt_tokens
        if event.error == NOT_FINITE:
            self._metrics.corrupted += 1
        if not sequence.ended:
            assert event.finish_reason is not None
            sequence.ended = True
            self._count_end(sequence, event.finish_reason)
            sequence.stream.put(sequence, event)

    def _count_end(self, sequence: _Sequence, reason: FinishReason) -> None:
        now = self._clock()
        started = sequence.first_at is not None
        if started:
            sequence.stream.timing.last_token_s = sequence.last_at - sequence.arrived
        self._metrics.finished(
            Finished(
                reason=reason,
                prompt_tokens=sequence.prompt_tokens,
                generated_tokens=sequence.num_tokens,
                max_tokens=sequence.max_tokens,
                cached_tokens=sequence.cached,
                e2e_s=now - sequence.arrived,
                queue_s=sequence.queue_s,
                prefill_s=sequence.prefill_s,
                decode_s=sequence.last_at - sequence.first_at if started and sequence.first_at is not None else None,
            )
        )


def one_sequence(sampling: SamplingParams, index: int, max_tokens: int) -> SamplingParams:
    """The parameters of one of n answers: a given seed is moved on, or all answers would be the same.

    structured_outputs are left out: the engine gets the grammar that was made of them.
    """
    seed = None if sampling.seed is None else _shifted(sampling.seed, index)
    min_tokens = min(sampling.min_tokens, max_tokens)
    return sampling.with_known(n=1, seed=seed, max_tokens=max_tokens, min_tokens=min_tokens, structured_outputs=None)


def _shifted(seed: int, index: int) -> int:
    """seed + index within 64 bits; -1 would mean "no seed"."""
    shifted = (seed + index + 2**63) % 2**64 - 2**63
    return 0 if shifted == -1 else shifted
