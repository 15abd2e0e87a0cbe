"""What clients are told while no engine can tell them: refusals, stages, lists of models. Pure.

In the forms of the APIs that the engine speaks, so that clients' libraries raise what they raise otherwise: OpenAI's,
and Anthropic's below /v1/messages.
"""

from __future__ import annotations

import json
from typing import Any

from octavo_engine.status import Stage, Statusz
from octavo_operator import names

EARLIEST_RETRY_S = 1
LATEST_RETRY_S = 120
"""Clients of the openai package obey a Retry-After up to this long."""
UNKNOWN_RETRY_S = 10
_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 408: "RequestTimeoutError",
    413: "RequestTooLargeError", 421: "NotFoundError", 502: "BadGatewayError", 503: "ServiceUnavailableError",
}  # fmt: skip
_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large",
    421: "not_found_error", 503: "overloaded_error",
}  # fmt: skip


def error_body(path: str, status: int, message: str) -> bytes:
    if _is_anthropic(path):
        error = {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": message}
        return _dump({"type": "error", "error": error})
    kind = _TYPES.get(status, "InternalServerError")
    return _dump({"error": {"message": message, "type": kind, "param": None, "code": status}})


def error_event(path: str, body: bytes) -> bytes:
    """The error as the last event of a stream that began before anybody knew of it. body: as error_body makes it."""
    line = b"".join(body.splitlines())
    if _is_anthropic(path) or path.rstrip("/").endswith("/responses"):
        return b"event: error\ndata: " + line + b"\n\n"
    return b"data: " + line + b"\n\ndata: [DONE]\n\n"


def comment(words: str) -> bytes:
    """An SSE comment: every client's parser skips it, and proxies see that the stream lives."""
    return f": octavo stage={' '.join(words.split())}\n\n".encode()


def wants_stream(body: bytes) -> bool:
    """Whether the request asks for a stream. A body that is no JSON asks for nothing; the engine will say so."""
    if b'"stream"' not in body:
        return False
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("stream") is True


def words_of(engine: Statusz) -> str:
    """'loading weights 42 % ETA 3 s'"""
    words, progress = str(engine.stage).replace("_", " "), engine.progress
    if engine.stage in (Stage.READY, Stage.DRAINING, Stage.FAILED):
        return words
    if progress.percent:
        words += f" {int(progress.percent)} %"
    if progress.eta_s:
        words += f" ETA {max(round(progress.eta_s), 1)} s"
    return words


_STAGES = {
    names.POD_PENDING: "waiting for a node",
    names.POD_CREATING: "creating the container",
    names.POD_CRASHED: "starting again",
    names.POD_UNREACHABLE: "starting",
    names.POD_TERMINATING: "waking",
}


def words_of_stage(stage: str | None) -> str:
    """Of a pod's stage on the resource, where there is no engine to ask yet; None where there is no pod."""
    return _STAGES.get(stage or "", (stage or "waking").replace("_", " "))


def retry_after_s(waited_s: float, last_wake_s: float | None, eta_s: float | None) -> int:
    """When to come again: when the server is ready if this wake takes as long as the last, or as the engine says."""
    if last_wake_s is not None and last_wake_s > waited_s:
        left = last_wake_s - waited_s
    else:
        left = eta_s + 1 if eta_s else UNKNOWN_RETRY_S
    return min(max(round(left), EARLIEST_RETRY_S), LATEST_RETRY_S)


def models(served_names: tuple[str, ...], max_model_len: int | None) -> bytes:
    """As the engine answers GET /v1/models, as far as it is known while no engine runs."""
    cards = [
        {"id": name, "object": "model", "created": 0, "owned_by": "octavo", "root": served_names[0], "parent": None}
        | ({"max_model_len": max_model_len} if max_model_len else {})
        for name in served_names
    ]
    return _dump({"object": "list", "data": cards})


def _is_anthropic(path: str) -> bool:
    return "/messages" in path


def _dump(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
