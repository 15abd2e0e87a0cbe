"""Llama 3.1 and 3.2: {"name": …, "parameters": {…}} on a line of its own, several with semicolons between.

Nothing marks a call, so only objects that name one of the request's functions are taken for one.
"""

from __future__ import annotations

from octavo_engine.api.output.calls import (
    Call,
    Candidate,
    Found,
    GrowingCall,
    Schemas,
    ToolParser,
    line_opening,
    marker_opening,
    may_begin,
    skip_blank,
)

TAG = "<|python_tag|>"
_FIRST_KEYS = ('"name"', '"type"', '"function"', '"parameters"', '"arguments"')


class Llama3JsonParser(ToolParser):
    def opening(self, text: str, line_start: bool, after_call: bool, last: bool) -> tuple[int, bool]:
        end, found = marker_opening(text, (TAG,), last)
        brace = line_opening(text, "{", line_start)
        if after_call and text.lstrip().startswith(";"):
            return text.index(";"), True
        if brace is not None and (brace < end or not found):
            return brace, True
        return end, found

    def candidate(self) -> Candidate:
        return _Object(self.schemas)


class _Object(Candidate):
    def __init__(self, schemas: Schemas) -> None:
        self._call = GrowingCall(schemas)

    def resolve(self, text: str, last: bool) -> Found | None:
        prefix = len(TAG) if text.startswith(TAG) else 1 if text.startswith(";") else 0
        start = skip_blank(text, prefix)
        if start < len(text) and text[start] != "{":
            return Found(prefix)
        key = skip_blank(text, start + 1) if start < len(text) else start
        if key < len(text) and not may_begin(text[key:], _FIRST_KEYS):
            # Other JSON is content, and streams as such.
            return Found(start + 1)
        end = self._call.read(text, start) if start < len(text) else None
        calls = self._call.so_far(text)
        if end is None:
            return Found(len(text), calls) if last else None
        return Found(end, calls)

    def so_far(self, text: str) -> tuple[Call, ...]:
        return self._call.so_far(text)
