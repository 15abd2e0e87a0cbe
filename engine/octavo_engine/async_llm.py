"""The engine in this process for asyncio: `async for output in AsyncLLM(model).generate(prompt, …)`, as vLLM has it.

A thread of its own runs the steps; requests join and leave while others run. What a step brought reaches the event loop
with one wake-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from octavo_engine.api.tokenizer import Tokenizer
from octavo_engine.config import EngineConfig
from octavo_engine.core.messages import FinishReason, TokenEvent
from octavo_engine.llm import LLM, NOT_HERE, Begun, Prompt, refuse
from octavo_engine.outputs import CompletionOutput, RequestOutput
from octavo_engine.sampling_params import RequestOutputKind, SamplingParams
from octavo_engine.status import Effective


class EngineDeadError(RuntimeError):
    """The engine failed or was shut down: it takes no more requests."""


class AsyncLLM:
    """A loaded model. Takes what LLM takes, and raises what it raises. Loading blocks; make it before the loop runs.

    `shutdown` ends its thread; requests that still run end with EngineDeadError.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        if settings.get("max_decode_slowdown") is None:
            # Its answers are read as they grow, so prompts hold them up no more than those of a server.
            settings["max_decode_slowdown"] = EngineConfig.max_decode_slowdown
        self._llm = LLM(model, **settings)
        self._requests: dict[str, _Request] = {}
        self._commands: queue.SimpleQueue[_Request | _Abort | _Forget | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._dead: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def effective(self) -> Effective:
        return self._llm.effective

    @property
    def is_running(self) -> bool:
        return self._dead is None

    @property
    def is_stopped(self) -> bool:
        return self._dead is not None

    @property
    def errored(self) -> bool:
        return self._dead is not None

    @property
    def dead_error(self) -> EngineDeadError:
        return EngineDeadError(self._dead or "the engine runs")

    async def check_health(self) -> None:
        """Raises EngineDeadError."""
        if self._dead is not None:
            raise self.dead_error

    async def is_tracing_enabled(self) -> bool:
        return False

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget the blocks of earlier prompts, before the next step; True when it is asked for."""
        self._commands.put(_Forget())
        return True

    async def do_log_stats(self) -> None:
        """No statistics are logged."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"AsyncLLM.{name}: {NOT_HERE.get(name, 'there is no such attribute')}")

    @property
    def tokenizer(self) -> Tokenizer:
        return self._llm.get_tokenizer()

    def get_tokenizer(self) -> Tokenizer:
        return self._llm.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        return self._llm.get_default_sampling_params()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        prompt_text: str | None = None,
        lora_request: None = None,
        tokenization_kwargs: None = None,
        trace_headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as they grow, the last one finished. sampling_params.output_kind says whether each has all of the
        answer so far, what is new, or whether only the last one comes. A slow reader gets several steps in one.

        Leaving the loop, or cancelling the task, aborts the request. request_id: for `abort`; must not be in use.
        prompt_text: what prompt's ids are as text, for the output. trace_headers: traces are the server's alone.
        Raises ValueError as LLM.generate does, EngineDeadError, and RuntimeError when the engine fails on the request.
        """
        refuse(lora_request=lora_request, tokenization_kwargs=tokenization_kwargs, trace_headers=trace_headers)
        params = self._llm.get_default_sampling_params() if sampling_params is None else sampling_params
        id = uuid.uuid4().hex if request_id is None else request_id
        # Off the loop: long texts take their time, and so do grammars.
        begun = await asyncio.to_thread(lambda: self._llm.begin(id, self._llm._encode(prompt), params, priority))
        begun.output.prompt = prompt_text if begun.output.prompt is None else begun.output.prompt
        request = _Request(id, begun, params.output_kind, asyncio.get_running_loop())
        with self._lock:
            if self._dead is not None:
                raise EngineDeadError(self._dead)
            if id in self._requests:
                raise ValueError(f"the request id {id!r} is in use")
            self._requests[id] = request
        self._commands.put(request)
        try:
            while True:
                await request.changed.wait()
                request.changed.clear()
                with self._lock:
                    output, finished, error = request.take()
                if error is not None:
                    raise error
                if output is not None:
                    yield output
                if finished:
                    return
        finally:
            with self._lock:
                self._requests.pop(id, None)
            self._commands.put(_Abort([id]))

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """End these requests: their generators give what there is, with the finish reason "abort"."""
        self._commands.put(_Abort([request_id] if isinstance(request_id, str) else list(request_id)))

    def shutdown(self) -> None:
        """End the thread. Idempotent."""
        self._commands.put(None)
        self._thread.join()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            self._serve()
            self._die("the engine was shut down")
        except Exception as error:
            self._die(f"the engine failed: {type(error).__name__}: {error}")
            raise

    def _serve(self) -> None:
        engine = self._llm._engine
        live: dict[str, _Request] = {}
        while True:
            try:
                # As in the engine's own process: the next step waits for who may still join it.
                command = self._commands.get(timeout=engine.hold_s() if engine.has_work else None)
            except queue.Empty:
                self._deliver(engine.step().events, live)
                continue
            if command is None:
                return
            if isinstance(command, _Forget):
                engine.scheduler.pool.forget_cached()
            elif isinstance(command, _Abort):
                engine.abort([id for id, request in live.items() if request.id in command.ids])
            else:
                live.update(dict.fromkeys(command.begun.answers, command))
                for submit in command.begun.submits:
                    engine.submit(submit)

    def _deliver(self, events: list[TokenEvent], live: dict[str, _Request]) -> None:
        changed: dict[_Request, None] = {}
        with self._lock:
            for event in events:
                request = live[event.request_id]
                if event.finish_reason is not None:
                    del live[event.request_id]
                try:
                    if request.begun.answers[event.request_id].take(event):
                        self._llm._engine.abort([event.request_id])
                    if event.finish_reason is FinishReason.ERROR:
                        request.error = RuntimeError(event.error or "the engine failed on this request")
                except ValueError as error:
                    request.error = error
                changed[request] = None
        loops: dict[asyncio.AbstractEventLoop, list[_Request]] = {}
        for request in changed:
            loops.setdefault(request.loop, []).append(request)
        for loop, requests in loops.items():
            _wake(loop, requests)

    def _die(self, reason: str) -> None:
        with self._lock:
            self._dead = reason
            requests = list(self._requests.values())
            for request in requests:
                request.error = EngineDeadError(reason)
        for request in requests:
            _wake(request.loop, [request])


class _Forget:
    pass


@dataclass
class _Abort:
    ids: list[str]


@dataclass(eq=False)
class _Request:
    """Its output is written by the engine's thread and read by the loop's, each with the lock held."""

    id: str
    begun: Begun
    kind: RequestOutputKind
    loop: asyncio.AbstractEventLoop
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self._given: dict[int, tuple[int, int]] = {}

    def take(self) -> tuple[RequestOutput | None, bool, Exception | None]:
        """(what is to be given now, whether it is the last, what went wrong)"""
        output = self.begun.output
        if self.kind is RequestOutputKind.FINAL_ONLY and not output.finished:
            return None, False, self.error
        delta = self.kind is RequestOutputKind.DELTA
        outputs = [self._part(one) if delta else _copy(one) for one in output.outputs]
        return replace(output, outputs=outputs), output.finished, self.error

    def _part(self, one: CompletionOutput) -> CompletionOutput:
        text, tokens = self._given.get(one.index, (0, 0))
        self._given[one.index] = (len(one.text), len(one.token_ids))
        logprobs = None if one.logprobs is None else one.logprobs[tokens:]
        return replace(one, text=one.text[text:], token_ids=one.token_ids[tokens:], logprobs=logprobs)


def _copy(one: CompletionOutput) -> CompletionOutput:
    logprobs = None if one.logprobs is None else list(one.logprobs)
    return replace(one, token_ids=list(one.token_ids), logprobs=logprobs)


def _wake(loop: asyncio.AbstractEventLoop, requests: list[_Request]) -> None:
    def wake() -> None:
        for request in requests:
            request.changed.set()

    with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody reads any more
        loop.call_soon_threadsafe(wake)
