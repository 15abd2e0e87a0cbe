"""Answers of /v1/responses: OpenAI's response object, and its events while streaming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from octavo_engine.api.answer import Piece, TokenChance
from octavo_engine.api.errors import ApiError
from octavo_engine.api.output.parser import ToolCall
from octavo_engine.api.responses.protocol import ResponsesRequest, summary_of
from octavo_engine.api.sse import logprob_entries

_encode = msgspec.json.Encoder().encode
_TEXT_DELTA = (
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":%d%b%b,'
    b'"logprobs":[]}\n\n'
)

Kind = Literal["reasoning", "message"]


@dataclass
class _Item:
    """The item that is being written; its text so far, in pieces."""

    kind: Kind
    id: str
    texts: list[str] = field(default_factory=list)
    tokens: list[TokenChance] = field(default_factory=list)
    place: bytes = b""
    """Where its text stands, as each delta says it."""


class ResponsesWriter:
    """One choice. Its output is a row of items (reasoning, message, function calls), of which one is open at a time."""

    wants_usage = True

    def __init__(self, request_id: str, created: int, model: str, request: ResponsesRequest) -> None:
        self._base, self._created, self._model = request_id, created, model
        self._request = request
        self._summary = summary_of(request)
        self._sequence = 0
        self._output: list[dict[str, Any]] = []
        self._open: _Item | None = None
        self._call: dict[str, Any] | None = None
        """The function call that is being written."""
        self._finish_reason: str | None = None
        self._reasoning_tokens = 0

    # ---- streaming

    def chunk(self, piece: Piece, usage: dict[str, Any] | None) -> bytes:
        self._reasoning_tokens = max(self._reasoning_tokens, piece.num_reasoning_tokens)
        events: list[bytes] = []
        if piece.first:
            response = self._response("in_progress", None)
            events += [self._event("response.created", response=response)]
            events += [self._event("response.in_progress", response=response)]
        if piece.reasoning:
            self._grow("reasoning", piece.reasoning, [], events)
        if piece.text or (piece.tokens and not piece.reasoning and not piece.calls):
            self._grow("message", piece.text, piece.tokens, events)
        for call in piece.calls:
            self._grow_call(call, events)
        if piece.finish_reason is not None:
            self._close(events)
            self._finish_reason = piece.finish_reason
        return b"".join(events)

    def text(self, text: str) -> bytes:
        if self._open is not None and self._open.kind == "message":
            return self._text_delta(self._open, text)
        events: list[bytes] = []
        self._grow("message", text, (), events)
        return b"".join(events)

    def _text_delta(self, item: _Item, text: str) -> bytes:
        item.texts.append(text)
        number = self._sequence
        self._sequence = number + 1
        return _TEXT_DELTA % (number, item.place, _encode(text))

    def end(self, usage: dict[str, Any], *, include_usage: bool) -> bytes:
        status = _status(self._finish_reason)
        return self._event(f"response.{status}", response=self._response(status, usage))

    def failure(self, error: ApiError) -> bytes:
        response = {**self._response("failed", None), "error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=response)

    def _grow(self, kind: Kind, text: str, tokens: Sequence[TokenChance], events: list[bytes]) -> None:
        if self._open is None or self._open.kind != kind:
            self._close(events)
            id, place = self._item_id(kind), {"output_index": len(self._output)}
            at = b',"item_id":"%b","output_index":%d,"content_index":0,"delta":' % (id.encode(), len(self._output))
            self._open = _Item(kind, id, place=at)
            shell = {**self._item(self._open, "in_progress"), "content": []}
            if kind == "reasoning":
                shell["summary"] = []
            events.append(self._event("response.output_item.added", **place, item=shell))
            part = {**self._part(self._open), "text": ""}
            events.append(self._event("response.content_part.added", **self._place(), part=part))
            if kind == "reasoning" and self._summary:
                events.append(self._summary_event("part.added", part={"type": "summary_text", "text": ""}))
        item = self._open
        if kind == "message" and not tokens:
            events.append(self._text_delta(item, text))
            return
        item.texts.append(text)
        item.tokens += tokens
        extra = {"logprobs": logprob_entries(tokens)} if kind == "message" else {}
        events.append(self._event(f"response.{_TEXT[kind]}.delta", **self._place(), delta=text, **extra))
        if kind == "reasoning" and self._summary:
            events.append(self._summary_event("text.delta", delta=text))

    def _close(self, events: list[bytes]) -> None:
        if self._call is not None:
            self._close_call(self._call, events)
        if (item := self._open) is None:
            return
        text, place = "".join(item.texts), self._place()
        extra = {"logprobs": logprob_entries(item.tokens)} if item.kind == "message" else {}
        events.append(self._event(f"response.{_TEXT[item.kind]}.done", **place, text=text, **extra))
        events.append(self._event("response.content_part.done", **place, part=self._part(item)))
        if item.kind == "reasoning" and self._summary:
            events.append(self._summary_event("text.done", text=text))
            events.append(self._summary_event("part.done", part={"type": "summary_text", "text": text}))
        whole = self._item(item, "completed")
        events.append(self._event("response.output_item.done", output_index=len(self._output), item=whole))
        self._output.append(whole)
        self._open = None

    def _grow_call(self, call: ToolCall, events: list[bytes]) -> None:
        if call.begins:
            self._close(events)
            self._call = self._call_item(replace(call, arguments=""))
            shell = {**self._call, "status": "in_progress"}
            events.append(self._event("response.output_item.added", output_index=len(self._output), item=shell))
        assert self._call is not None
        if call.arguments:
            self._call["arguments"] += call.arguments
            place = {"output_index": len(self._output), "item_id": self._call["id"]}
            events.append(self._event("response.function_call_arguments.delta", **place, delta=call.arguments))

    def _close_call(self, call: dict[str, Any], events: list[bytes]) -> None:
        index = {"output_index": len(self._output)}
        done = {"item_id": call["id"], "name": call["name"], "arguments": call["arguments"]}
        events.append(self._event("response.function_call_arguments.done", **index, **done))
        events.append(self._event("response.output_item.done", **index, item=call))
        self._output.append(call)
        self._call = None

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": len(self._output), "content_index": 0}

    def _summary_event(self, kind: str, **fields: Any) -> bytes:
        place = {**self._place(), "summary_index": 0}
        del place["content_index"]
        return self._event(f"response.reasoning_summary_{kind}", **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        fields = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: " + kind.encode() + b"\ndata: " + _encode(fields) + b"\n\n"

    # ---- whole

    def body(self, choices: list[Piece], usage: dict[str, Any]) -> bytes:
        (piece,) = choices
        self._reasoning_tokens = piece.num_reasoning_tokens
        if piece.reasoning:
            item = _Item("reasoning", self._item_id("reasoning"), [piece.reasoning])
            self._output.append(self._item(item, "completed"))
        if piece.text or not (piece.reasoning or piece.calls):
            item = _Item("message", self._item_id("message"), [piece.text], list(piece.tokens))
            self._output.append(self._item(item, "completed"))
        for call in piece.calls:  # one by one: an item's id counts the items before it
            self._output.append(self._call_item(call))
        return _encode(self._response(_status(piece.finish_reason), usage))

    def _response(self, status: str, usage: dict[str, Any] | None) -> dict[str, Any]:
        asked = self._request
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": f"resp_{self._base}", "object": "response", "created_at": self._created, "status": status,
            "error": None, "incomplete_details": cut, "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens, "model": self._model, "output": self._output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": self._summary},
            "store": False, "temperature": asked.temperature,
            "text": {"format": (asked.text.format if asked.text else None) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto", "tools": asked.tools or [], "top_p": asked.top_p,
            "truncation": "disabled", "usage": None if usage is None else self._usage(usage),
            "metadata": asked.metadata or {},
        }  # fmt: skip

    def _usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        details = usage.get("prompt_tokens_details") or {}
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": details.get("cached_tokens", 0)},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }

    def _item(self, item: _Item, status: str) -> dict[str, Any]:
        shared = {"id": item.id, "type": item.kind, "status": status, "content": [self._part(item)]}
        if item.kind == "message":
            return {**shared, "role": "assistant"}
        return {**shared, "summary": [{"type": "summary_text", "text": "".join(item.texts)}] if self._summary else []}

    def _part(self, item: _Item) -> dict[str, Any]:
        text = "".join(item.texts)
        if item.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprob_entries(item.tokens)}

    def _call_item(self, call: ToolCall) -> dict[str, Any]:
        return {
            "id": self._item_id("function_call"), "type": "function_call", "status": "completed", "call_id": call.id,
            "name": call.name, "arguments": call.arguments,
        }  # fmt: skip

    def _item_id(self, kind: str) -> str:
        prefix = {"reasoning": "rs", "message": "msg"}.get(kind, "fc")
        return f"{prefix}_{self._base}_{len(self._output)}"


_TEXT: dict[Kind, str] = {"reasoning": "reasoning_text", "message": "output_text"}


def _status(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"
