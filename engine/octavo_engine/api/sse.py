"""Bytes of answers: server-sent events while streaming, one JSON body otherwise.

The hot path: a chunk's constant parts are made once per request, and only the new text is encoded per chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from octavo_engine import __version__
from octavo_engine.api.answer import Piece, Rated, TokenChance
from octavo_engine.api.errors import ApiError

FINGERPRINT = f"octavo-{__version__}"
DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # nginx and its ingress would otherwise collect tokens into larger pieces.
    "X-Accel-Buffering": "no",
}

_encode = msgspec.json.Encoder().encode
_CONTENT, _NO_MORE = b',"delta":{"content":', b'},"logprobs":null,"finish_reason":null}]}\n\n'
_NOTHING_MORE = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'


class Writer(Protocol):
    """How one kind of answer is written."""

    wants_usage: bool
    """Whether a choice's first chunk needs the usage although the request did not ask for it."""

    def chunk(self, piece: Piece, usage: dict[str, Any] | None) -> bytes:
        """The event or events for a piece; b"" when it has nothing to tell. usage: so far, where it is wanted."""

    def text(self, text: str) -> bytes:
        """As `chunk`, of the first choice's text alone, neither its first piece nor its last."""

    def end(self, usage: dict[str, Any], *, include_usage: bool) -> bytes:
        """The last events of a stream. usage: of the whole request; include_usage: the request asks for it."""

    def failure(self, error: ApiError) -> bytes:
        """The last events of a stream that fails."""

    def body(self, choices: list[Piece], usage: dict[str, Any]) -> bytes:
        """The whole answer; each choice's pieces joined into one."""


class OpenAiWriter:
    """What streams of chats and completions have in common: a chunk with the usage if it is wanted, then [DONE]."""

    wants_usage = False
    object: str
    _id: str
    _created: int
    _model: str

    def end(self, usage: dict[str, Any], *, include_usage: bool) -> bytes:
        if not include_usage:
            return DONE
        fields = {"id": self._id, "object": self.object, "created": self._created, "model": self._model}
        fields |= {"choices": [], "usage": usage, "system_fingerprint": FINGERPRINT}
        return b"data: " + _encode(fields) + b"\n\n" + DONE

    def failure(self, error: ApiError) -> bytes:
        return b"data: " + error.body_bytes() + b"\n\n" + DONE


class ChatWriter(OpenAiWriter):
    """echo: text that goes before each choice's own."""

    object = "chat.completion.chunk"

    def __init__(self, request_id: str, created: int, model: str, role: str = "assistant", echo: str = "") -> None:
        self._id, self._created, self._model, self._role = request_id, created, model, role
        self._echo = echo
        self._head = _head(request_id, self.object, created, model)
        self._text_head = self._head + b"0" + _CONTENT
        self._role_delta = (
            b',"delta":{"role":' + _encode(role) + b',"content":""},"logprobs":null,"finish_reason":null}'
        )

    def chunk(self, piece: Piece, usage: dict[str, Any] | None) -> bytes:
        index = b"%d" % piece.index
        special = piece.first or piece.finish_reason or piece.tokens or piece.calls or piece.reasoning
        if usage is None and piece.text and not special and piece.token_ids is None:  # as most are
            return b"".join((self._head, index, _CONTENT, _encode(piece.text), _NO_MORE))
        tail = b"]}\n\n" if usage is None else b'],"usage":' + _encode(usage) + b"}\n\n"
        events = []
        if piece.first:
            first_usage = {**usage, "completion_tokens": 0, "total_tokens": usage["prompt_tokens"]} if usage else None
            first_tail = tail if first_usage is None else b'],"usage":' + _encode(first_usage) + b"}\n\n"
            prompt_ids = b"" if piece.prompt_ids is None else b',"prompt_token_ids":' + _encode(piece.prompt_ids)
            events.append(self._head + index + self._role_delta + b"]" + prompt_ids + first_tail[1:])
            if self._echo:
                events.append(self._delta(index, {"content": self._echo}, first_tail))
        if piece.reasoning:
            events.append(self._delta(index, {"reasoning": piece.reasoning}, tail))
        if piece.calls:
            if piece.text:  # before the calls, and in an event of its own: so clients expect it
                events.append(self._delta(index, {"content": piece.text}, tail))
            for call in piece.calls:
                function = {"name": call.name, "arguments": ""}
                named = {"index": call.index, "id": call.id, "type": "function", "function": function}
                if call.begins:
                    events.append(self._delta(index, {"tool_calls": [named]}, tail))
                arguments = {"index": call.index, "function": {"arguments": call.arguments}}
                if call.arguments:
                    events.append(self._delta(index, {"tool_calls": [arguments]}, tail))
            piece = replace(piece, text="")
        if piece.finish_reason is not None:
            delta = b'{"content":' + _encode(piece.text) + b"}" if piece.text else b"{}"
            fields = {
                "logprobs": chat_logprobs(piece.tokens),
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
                **_ids(piece),
            }
            end = b',"system_fingerprint":' + _encode(FINGERPRINT)
            # b'{"logprobs":…}' continues the choice's object in place of its opening brace.
            events.append(
                self._head + index + b',"delta":' + delta + b"," + _encode(fields)[1:] + b"]" + end + tail[1:]
            )
        elif piece.text or piece.tokens or piece.token_ids:
            logprobs = b"null" if not piece.tokens else _encode(chat_logprobs(piece.tokens))
            content = b',"delta":{"content":' + _encode(piece.text) + b'},"logprobs":' + logprobs
            ids = b"" if piece.token_ids is None else b',"token_ids":' + _encode(piece.token_ids)
            content += b',"finish_reason":null' + ids + b"}"
            events.append(self._head + index + content + tail)
        return b"".join(events)

    def text(self, text: str) -> bytes:
        return self._text_head + _encode(text) + _NO_MORE

    def _delta(self, index: bytes, delta: dict[str, Any], tail: bytes) -> bytes:
        body = b',"delta":' + _encode(delta) + b',"logprobs":null,"finish_reason":null}'
        return self._head + index + body + tail

    def body(self, choices: list[Piece], usage: dict[str, Any]) -> bytes:
        return _encode(
            {
                "id": self._id,
                "object": "chat.completion",
                "created": self._created,
                "model": self._model,
                "choices": [
                    {
                        "index": piece.index,
                        "message": self._message(piece),
                        "logprobs": chat_logprobs(piece.tokens),
                        "finish_reason": piece.finish_reason,
                        "stop_reason": piece.stop_reason,
                        **_ids(piece),
                    }
                    for piece in choices
                ],
                "usage": usage,
                "system_fingerprint": FINGERPRINT,
                **({"prompt_logprobs": prompt_logprobs(choices[0])} if choices[0].prompt else {}),
                **({} if choices[0].prompt_ids is None else {"prompt_token_ids": choices[0].prompt_ids}),
            }
        )

    def _message(self, piece: Piece) -> dict[str, Any]:
        apart = bool(piece.reasoning or piece.calls)
        text = self._echo + piece.text
        message: dict[str, Any] = {
            "role": self._role,
            "content": None if apart and not text else text,
            "refusal": None,
            "annotations": [],
        }
        if piece.reasoning:
            message["reasoning"] = piece.reasoning
        if piece.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in piece.calls
            ]
        return message


class CompletionWriter(OpenAiWriter):
    """prefixes: the prompts' texts, one for each choice, when they are to be echoed; else empty.

    tells_prompt: the log-probabilities of the prompt have a field of their own (vLLM's `prompt_logprobs`).
    """

    object = "text_completion"

    def __init__(
        self, request_id: str, created: int, model: str, prefixes: list[str], *, tells_prompt: bool = False
    ) -> None:
        self._id, self._created, self._model, self._prefixes = request_id, created, model, prefixes
        self._tells_prompt = tells_prompt
        self._head = _head(request_id, self.object, created, model)
        self._text_head = self._head + b'0,"text":'
        self._offsets: dict[int, int] = {}

    def chunk(self, piece: Piece, usage: dict[str, Any] | None) -> bytes:
        text = self._prefixes[piece.index] + piece.text if piece.first and self._prefixes else piece.text
        tail = b"]}\n\n" if usage is None else b'],"usage":' + _encode(usage) + b"}\n\n"
        head = self._head + str(piece.index).encode() + b',"text":' + _encode(text)
        if piece.finish_reason is not None:
            fields = {
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
                **_all_ids(piece),
            }
            end = b'],"system_fingerprint":' + _encode(FINGERPRINT)
            return head + b"," + _encode(fields)[1:] + end + tail[1:]
        logprobs = _encode(self._logprobs(piece))
        ids = _all_ids(piece)
        if not text and logprobs == b"null" and not ids:
            return b""
        more = b"," + _encode(ids)[1:] if ids else b"}"
        return head + b',"logprobs":' + logprobs + b',"finish_reason":null,"stop_reason":null' + more + tail

    def text(self, text: str) -> bytes:
        return self._text_head + _encode(text) + _NOTHING_MORE

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """OpenAI's older form: parallel lists; offsets count the characters of the choice's tokens."""
        echoed = piece.prompt if self._prefixes else []
        if not piece.tokens and not echoed:
            return None
        start = len(self._prefixes[piece.index]) if self._prefixes and not echoed else 0
        offset = self._offsets.get(piece.index, start)
        offsets = []
        tokens = [*(one.token for one in echoed), *(chance.token for chance in piece.tokens)]
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[piece.index] = offset
        # The token itself is always among the likeliest, as in OpenAI's. Nothing is before a prompt's first token.
        tops: list[dict[str, float] | None] = [
            {of.decoded_token: of.logprob for of in reversed(one.rated.values())} or None for one in echoed
        ]
        tops += [{**dict(chance.top), chance.token: chance.logprob} for chance in piece.tokens]
        own = [one.rated[one.id].logprob if one.rated else None for one in echoed]
        return {
            "text_offset": offsets,
            "token_logprobs": [*own, *(chance.logprob for chance in piece.tokens)],
            "tokens": tokens,
            "top_logprobs": tops,
        }

    def body(self, choices: list[Piece], usage: dict[str, Any]) -> bytes:
        return _encode(
            {
                "id": self._id,
                "object": "text_completion",
                "created": self._created,
                "model": self._model,
                "choices": [
                    {
                        "index": piece.index,
                        "text": (self._prefixes[piece.index] if self._prefixes else "") + piece.text,
                        "logprobs": self._logprobs(piece),
                        "finish_reason": piece.finish_reason,
                        "stop_reason": piece.stop_reason,
                        **({"prompt_logprobs": prompt_logprobs(piece)} if self._tells_prompt else {}),
                        **_all_ids(piece),
                    }
                    for piece in choices
                ],
                "usage": usage,
                "system_fingerprint": FINGERPRINT,
            }
        )


def _ids(piece: Piece) -> dict[str, Any]:
    return {} if piece.token_ids is None else {"token_ids": piece.token_ids}


def _all_ids(piece: Piece) -> dict[str, Any]:
    return _ids(piece) if piece.prompt_ids is None else {**_ids(piece), "prompt_token_ids": piece.prompt_ids}


def prompt_logprobs(piece: Piece) -> list[dict[int, Rated] | None]:
    """vLLM's form: of each token of the prompt, by id; null for the first."""
    return [one.rated or None for one in piece.prompt]


def chat_logprobs(tokens: Sequence[TokenChance]) -> dict[str, Any] | None:
    if not tokens:
        return None
    return {"content": logprob_entries(tokens)}


def logprob_entries(tokens: Sequence[TokenChance]) -> list[dict[str, Any]]:
    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return [
        {**entry(chance.token, chance.logprob), "top_logprobs": [entry(*one) for one in chance.top]}
        for chance in tokens
    ]


def _head(request_id: str, object: str, created: int, model: str) -> bytes:
    """Everything of a chunk up to the choice's index."""
    fields = {"id": request_id, "object": object, "created": created, "model": model}
    return b"data: " + _encode(fields)[:-1] + b',"choices":[{"index":'
