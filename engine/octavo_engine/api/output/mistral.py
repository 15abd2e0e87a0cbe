"""Mistral: [TOOL_CALLS][{"name": …, "arguments": {…}}, …], and since 2025 [TOOL_CALLS]name[ARGS]{…} for each call."""

from __future__ import annotations

import re
from typing import ClassVar

from octavo_engine.api.output.calls import (
    Balance,
    Call,
    Candidate,
    Found,
    ToolParser,
    call_of,
    make_call,
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


class _Calls:
    def __init__(self) -> None:
        self._balance = Balance()

    def resolve(self, text: str, last: bool) -> Found | None:
        start = skip_blank(text, len(OPEN))
        if start == len(text):
            return Found(len(text)) if last else None
        if text[start] in "[{":
            return self._array(text, start, last)
        head = _HEAD.match(text, start)
        if head is None:
            if not _HEAD_SO_FAR.fullmatch(text, start):
                return Found(len(OPEN))
            return Found(len(text)) if last else None
        end = self._balance.end(text, head.end())
        if end is None:
            return Found(len(text)) if last else None
        call = make_call(head[1], text[head.end() : end])
        return Found(end) if call is None else Found(end, (call,))

    def _array(self, text: str, start: int, last: bool) -> Found | None:
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
