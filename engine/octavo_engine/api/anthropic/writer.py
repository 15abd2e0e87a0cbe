"""Answers of /v1/messages: Anthropic's body, and its events while streaming."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec

from octavo_engine.api.answer import Piece
from octavo_engine.api.errors import ApiError

_encode = msgspec.json.Encoder().encode
_TEXT_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
    b'"delta":{"type":"text_delta","text":%b}}\n\n'
)

_ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def error_body(error: ApiError) -> bytes:
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    body = {"type": "error", "error": {"type": kind, "message": error.message}}
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


class MessagesWriter:
    """One choice. Its content is a row of blocks (thinking, text, tool use), of which one is open at a time."""

    wants_usage = True

    def __init__(self, request_id: str, model: str) -> None:
        self._id, self._model = request_id, model
        self._open: Literal["thinking", "text", "tool_use"] | None = None
        self._next_block = 0
        self._called = False
        self._stop: dict[str, Any] = {}

    def chunk(self, piece: Piece, usage: dict[str, Any] | None) -> bytes:
        events: list[bytes] = []
        if piece.first:
            assert usage is not None
            tokens = {"input_tokens": usage["prompt_tokens"], "output_tokens": 0}
            events.append(_event("message_start", message=self._message([], {}, tokens)))
        if piece.reasoning:
            self._grow("thinking", {"type": "thinking_delta", "thinking": piece.reasoning}, events)
        if piece.text:
            self._grow("text", {"type": "text_delta", "text": piece.text}, events)
        for call in piece.calls:
            if call.begins:
                self._close(events)
                self._called, self._open = True, "tool_use"
                block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
                events.append(_event("content_block_start", index=self._next_block, content_block=block))
            if call.arguments:
                delta = {"type": "input_json_delta", "partial_json": call.arguments}
                events.append(_event("content_block_delta", index=self._next_block, delta=delta))
        if piece.finish_reason is not None:
            self._close(events)
            self._stop = _stop(piece, self._called)
        return b"".join(events)

    def text(self, text: str) -> bytes:
        if self._open == "text":
            return _TEXT_DELTA % (self._next_block, _encode(text))
        events: list[bytes] = []
        self._grow("text", {"type": "text_delta", "text": text}, events)
        return b"".join(events)

    def end(self, usage: dict[str, Any], *, include_usage: bool) -> bytes:
        tokens = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
        return _event("message_delta", delta=self._stop, usage=tokens) + _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + error_body(error) + b"\n\n"

    def body(self, choices: list[Piece], usage: dict[str, Any]) -> bytes:
        (piece,) = choices
        content: list[dict[str, Any]] = []
        if piece.reasoning:
            content.append({"type": "thinking", "thinking": piece.reasoning, "signature": ""})
        if piece.text or not (piece.reasoning or piece.calls):
            content.append({"type": "text", "text": piece.text})
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": _object(call.arguments)}
            for call in piece.calls
        ]
        tokens = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
        return _encode(self._message(content, _stop(piece, bool(piece.calls)), tokens))

    def _message(self, content: list[Any], stop: dict[str, Any], usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content,
            "stop_reason": None, "stop_sequence": None, **stop, "usage": usage,
        }  # fmt: skip

    def _grow(self, kind: Literal["thinking", "text"], delta: dict[str, Any], events: list[bytes]) -> None:
        if self._open != kind:
            self._close(events)
            block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            events.append(_event("content_block_start", index=self._next_block, content_block=block))
            self._open = kind
        text = delta.get("text")
        if text is None:
            events.append(_event("content_block_delta", index=self._next_block, delta=delta))
        else:  # most events are this one
            events.append(_TEXT_DELTA % (self._next_block, _encode(text)))

    def _close(self, events: list[bytes]) -> None:
        if self._open is not None:
            events.append(_event("content_block_stop", index=self._next_block))
            self._open = None
            self._next_block += 1


def _stop(piece: Piece, called: bool) -> dict[str, Any]:
    reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(piece.finish_reason or "", "end_turn")
    if called and piece.finish_reason == "stop":  # a tool that was named by the request
        reason = "tool_use"
    named = piece.stop_reason if isinstance(piece.stop_reason, str) else None
    return {"stop_reason": "stop_sequence" if named is not None else reason, "stop_sequence": named}


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + _encode({"type": kind, **fields}) + b"\n\n"


def _object(arguments: str) -> Any:
    """What there is of arguments that were cut off, or that the model wrote wrongly, is no object: then it is empty."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
