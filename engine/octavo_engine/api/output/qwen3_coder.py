"""Qwen3-Coder: <tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>.

Values are plain text; the request's schema says which of them are numbers, objects and so on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from octavo_engine.api.output.calls import (
    Call,
    Candidate,
    Found,
    Schemas,
    ToolParser,
    make_call,
    marker_opening,
    may_begin,
    read_json,
    skip_blank,
)

OPEN, FUNCTION, END, CLOSE = "<tool_call>", "<function=", "</function>", "</tool_call>"
_HEAD = re.compile(r"<function=([^<>\n]{1,256})>")
_HEAD_SO_FAR = re.compile(r"<function=[^<>\n]{0,256}")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]{1,256})>")
_VALUE_END = re.compile(r"</parameter>(?=\s*(?:<parameter=|$))")


class Qwen3CoderParser(ToolParser):
    def opening(self, text: str, line_start: bool, after_call: bool, last: bool) -> tuple[int, bool]:
        # The model now and then leaves the outer tag out.
        return marker_opening(text, (OPEN, FUNCTION), last)

    def candidate(self) -> Candidate:
        return _Block(self.schemas)


class _Block:
    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._seen = 0
        self._end: int | None = None
        self._call: Call | None = None

    def resolve(self, text: str, last: bool) -> Found | None:
        prefix = len(OPEN) if text.startswith(OPEN) else 0
        start = skip_blank(text, prefix)
        if not may_begin(text[start : start + len(FUNCTION)], (FUNCTION,)):
            return Found(prefix)
        head = _HEAD.match(text, start)
        if head is None:
            if len(text) >= start + len(FUNCTION) and not _HEAD_SO_FAR.fullmatch(text, start):
                return Found(start + len(FUNCTION))
            return Found(len(text)) if last else None
        if self._end is None:
            self._end = self._find_end(text, head.end())
            if self._end is None:
                return Found(len(text)) if last else None
            values = _values(text[head.end() : self._end - len(END)], self._schemas.get(head[1], {}))
            self._call = None if values is None else make_call(head[1], values)
        if self._call is None:
            return Found(self._end)
        tag = skip_blank(text, self._end)
        if prefix and text.startswith(CLOSE, tag):
            return Found(tag + len(CLOSE), (self._call,))
        if prefix and not last and may_begin(text[tag:], (CLOSE,)):
            return None
        return Found(self._end, (self._call,))

    def _find_end(self, text: str, body: int) -> int | None:
        """Past the </function> that follows the last parameter: a value may contain the tag."""
        at = max(body, self._seen)
        while (at := text.find(END, at)) >= 0:
            before = at
            while before > body and text[before - 1].isspace():
                before -= 1
            if before == body or text.endswith("</parameter>", body, before):
                return at + len(END)
            at += len(END)
        self._seen = max(body, len(text) - len(END) + 1)
        return None


def _values(body: str, schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """None when something stands between the parameters that is none."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    values: dict[str, Any] = {}
    at = 0
    while skip_blank(body, at) < len(body):
        head = _PARAMETER.match(body, at)
        end = None if head is None else _VALUE_END.search(body, head.end())
        if head is None or end is None:
            return None
        text = body[head.end() : end.start()].removeprefix("\n").removesuffix("\n")
        values[head[1]] = _value(text, properties.get(head[1]))
        at = end.end()
    return values


def _value(text: str, schema: object) -> Any:
    kinds = kinds_of(schema)
    plain = text.strip()
    if kinds == {"string"} or (not kinds and not refers(schema)):
        return text
    if "boolean" in kinds and plain.lower() in ("true", "false"):
        return plain.lower() == "true"
    if "null" in kinds and plain.lower() in ("null", "none"):
        return None
    if kinds and kinds <= {"string", "null"}:
        return text
    try:
        value = read_json(plain)
    except ValueError:
        return text  # not what the schema says, but what the model said
    return text if "string" in kinds and not isinstance(value, (dict, list, int, float)) else value


def kinds_of(schema: object) -> set[str]:
    """The JSON types that a property's schema allows; empty when it does not say."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    kinds = {named} if isinstance(named, str) else {k for k in named if isinstance(k, str)} if named else set()
    for key in ("anyOf", "oneOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, dict) and isinstance(part.get("type"), str):
                kinds.add(part["type"])
    return kinds


def refers(schema: object) -> bool:
    """Whether a property's schema is said elsewhere, so that its value may be any JSON."""
    return isinstance(schema, dict) and ("$ref" in schema or "allOf" in schema)
