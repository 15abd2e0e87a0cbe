"""Mistral: [TOOL_CALLS][{"name": …, "arguments": {…}}, …], and since 2025 [TOOL_CALLS]name[ARGS]{…} for each call."""

from __future__ import annotations

import re
from typing import ClassVar

from octavo_engine.api.output.calls import (
    Balance,
    Call,
    Candidate,
    Found,
    GrowingCall,
    ToolParser,
    call_of,
    marker_opening,
    read_json,
    skip_blank,
)

OPEN = "[TOOL_CALLS]"
_HEAD = re.compile(r"([\w.:/-]{1,256})\s{0,8}(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?\s{0,8}(?=\{)")
_HEAD_SO_FAR = re.compile(r"[\w.:/-]{0,256}\s{0,8}[\[\]\w]{0,96}\s{0,8}")


class MistralParser(ToolParser):
    shows_special_tokens: ClassVar[bool] = True
    short_ids: ClassVar[bool] = True

    def opening(self, text: str, line_start: bool, after_call: bool, last: bool) -> tuple[int, bool]:
        return marker_opening(text, (OPEN,), last)

    def candidate(self) -> Candidate:
        return _Calls()


class _Calls(Candidate):
    def __init__(self) -> None:
        self._balance = Balance()
        self._end: int | None = None
        self._at: int | None = None
        self._between = False
        self._done: list[Call] = []
        self._growing = GrowingCall()
        self._name: tuple[str, int] | None = None

    def resolve(self, text: str, last: bool) -> Found | None:
        start = skip_blank(text, len(OPEN))
        if start == len(text):
            return Found(len(text)) if last else None
        if text[start] in "[{":
            return self._array(text, start, last)
        if self._name is None:
            head = _HEAD.match(text, start)
            if head is None:
                if not _HEAD_SO_FAR.fullmatch(text, start):
                    return Found(len(OPEN))
                return Found(len(text)) if last else None
            self._name = head[1], head.end()
        self._end = self._balance.end(text, self._name[1])
        if self._end is None and not last:
            return None
        return Found(len(text) if self._end is None else self._end, self.so_far(text))

    def so_far(self, text: str) -> tuple[Call, ...]:
        if self._name is not None:
            return (Call(self._name[0], text[self._name[1] : self._end]),)
        if self._at is None:
            return ()
        return (*self._done, *self._growing.so_far(text))

    def _array(self, text: str, start: int, last: bool) -> Found | None:
        if self._at is None:
            first = skip_blank(text, start + 1) if text[start] == "[" else start
            if first < len(text) and text[first] == "{":
                self._growing.read(text, first)
                if self._growing.so_far(text) and self._growing.certain:
                    self._at = first
        if self._at is None:
            return self._whole(text, start, last)
        end = self._objects(text, text[start] == "[")
        if end is None and not last:
            return None
        return Found(len(text) if end is None else end, self.so_far(text))

    def _objects(self, text: str, many: bool) -> int | None:
        """Read on from the first object, which is a call for certain; the end of them all."""
        assert self._at is not None
        while True:
            if self._between:
                at = skip_blank(text, self._at)
                if text.startswith(",", at):
                    at = skip_blank(text, at + 1)
                if at == len(text):
                    return None
                if text[at] != "{":
                    return at + (text[at] == "]")
                self._at, self._between, self._growing = at, False, GrowingCall()
            end = self._growing.read(text, self._at)
            if end is None:
                return None
            self._done += self._growing.so_far(text)
            self._at, self._between, self._growing = end, True, GrowingCall()
            if not many:
                return end

    def _whole(self, text: str, start: int, last: bool) -> Found | None:
        """A list whose first object does not begin like a call is read when it is whole."""
        end = self._balance.end(text, start)
        if end is None:
            return Found(len(text)) if last else None
        try:
            documents = read_json(text[start:end])
        except ValueError:
            return Found(end)
        found = [call_of(one) for one in (documents if isinstance(documents, list) else [documents])]
        calls: tuple[Call, ...] = tuple(call for call in found if call is not None)
        # All or none: half of an array would lose the other half.
        return Found(end, calls) if len(calls) == len(found) else Found(end)
