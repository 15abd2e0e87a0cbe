"""What is told of a request beside its answer: two lines of log, what tool parsers found, a trace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from octavo_engine.api.answer import Answer
from octavo_engine.api.errors import ApiError
from octavo_engine.api.metrics import Metrics
from octavo_engine.api.tracing import Asked, Ended, Tracer

log = logging.getLogger("octavo.requests")

REQUEST_TYPES = {"/v1/chat/completions": "chat_completions", "/v1/responses": "responses"}


@dataclass(frozen=True)
class Watch:
    """logs: whether requests are logged. tracer: None where nobody collects traces."""

    metrics: Metrics
    logs: bool
    tracer: Tracer | None

    @contextlib.contextmanager
    def over(self, asked: Asked, answer: Answer) -> Iterator[None]:
        """Around the reading of an answer, which it closes: also when the client hangs up, which cancels the reader."""
        began, error = time.monotonic(), None
        if self.logs:
            log.info(
                "received id=%s prompt_tokens=%d sequences=%d", asked.id, asked.prompt_tokens, asked.num_sequences,
                extra={"request_id": asked.id, "route": asked.route, "prompt_tokens": asked.prompt_tokens},
            )  # fmt: skip
        try:
            yield
            # A stream tells its client of an error itself, and a client that hangs up in it is no error to the road.
            error = answer.error or (None if answer.finished else "cancelled")
        except asyncio.CancelledError:
            error = "cancelled"
            raise
        except ApiError as refused:
            error = refused.type
            raise
        except BaseException as failed:
            error = type(failed).__name__
            raise
        finally:
            # Whatever happened: the engine stops working for nobody.
            answer.close()
            self._tell(asked, Ended(answer.num_tokens, time.monotonic() - began, answer.timing, error), answer)

    def _tell(self, asked: Asked, ended: Ended, answer: Answer) -> None:
        mode, kind = "streaming" if asked.stream else "non_streaming", REQUEST_TYPES.get(asked.route, "other")
        for called in answer.choices_with_calls():
            self.metrics.tool_parser[mode, "tool_call" if called else "no_tool_call", kind] += 1
        if self.logs:
            log.info(
                "ended id=%s completion_tokens=%d seconds=%.3f error=%s", asked.id, ended.completion_tokens,
                ended.seconds, ended.error,
                extra={
                    "request_id": asked.id, "completion_tokens": ended.completion_tokens,
                    "seconds": round(ended.seconds, 6), "error": ended.error,
                },
            )  # fmt: skip
        if self.tracer is not None:
            self.tracer.ended(asked, ended)
