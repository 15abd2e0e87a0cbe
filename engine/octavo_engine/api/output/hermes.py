"""Hermes 2 Pro, Qwen2.5, Qwen3: <tool_call>{"name": …, "arguments": {…}}</tool_call>, as many as there are calls."""

from __future__ import annotations

from octavo_engine.api.output.calls import (
    Call,
    Candidate,
    Found,
    GrowingCall,
    ToolParser,
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


class _Block(Candidate):
    def __init__(self) -> None:
        self._call = GrowingCall()

    def resolve(self, text: str, last: bool) -> Found | None:
        start = skip_blank(text, len(OPEN))
        if start == len(text):
            return Found(len(text)) if last else None
        if text[start] != "{":
            return Found(len(OPEN))
        # By brackets, not by the closing tag: an argument may contain one.
        end = self._call.read(text, start)
        calls = self._call.so_far(text)
        if end is None:
            return Found(len(text), calls) if last else None
        if not calls:
            return Found(end)
        tag = skip_blank(text, end)
        if text.startswith(CLOSE, tag):
            return Found(tag + len(CLOSE), calls)
        # The closing tag is forgotten often enough, above all where the answer ends.
        if last or not may_begin(text[tag:], (CLOSE,)):
            return Found(end, calls)
        return None

    def so_far(self, text: str) -> tuple[Call, ...]:
        return self._call.so_far(text)
