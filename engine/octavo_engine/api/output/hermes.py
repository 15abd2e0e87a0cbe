"""Hermes 2 Pro, Qwen2.5, Qwen3: <tool_call>{"name": …, "arguments": {…}}</tool_call>, as many as there are calls."""

from __future__ import annotations

from octavo_engine.api.output.calls import (
    Balance,
    Call,
    Candidate,
    Found,
    ToolParser,
    call_in,
    marker_opening,
    may_begin,
    skip_blank,
)

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    def opening(self, text: str, line_start: bool, after_call: bool, last: bool) -> tuple[int, bool]:
        return marker_opening(text, (OPEN,), last)

    def candidate(self) -> Candidate:
        return _Block()


class _Block:
    def __init__(self) -> None:
        self._balance = Balance()
        self._call: Call | None = None
        self._end: int | None = None

    def resolve(self, text: str, last: bool) -> Found | None:
        start = skip_blank(text, len(OPEN))
        if start == len(text):
            return Found(len(text)) if last else None
        if text[start] != "{":
            return Found(len(OPEN))
        if self._end is None:
            # By brackets, not by the closing tag: an argument may contain one.
            self._end = self._balance.end(text, start)
            if self._end is None:
                return Found(len(text)) if last else None
            self._call = call_in(text[start : self._end])
        if self._call is None:
            return Found(self._end)
        tag = skip_blank(text, self._end)
        if text.startswith(CLOSE, tag):
            return Found(tag + len(CLOSE), (self._call,))
        # The closing tag is forgotten often enough, above all where the answer ends.
        if last or not may_begin(text[tag:], (CLOSE,)):
            return Found(self._end, (self._call,))
        return None
