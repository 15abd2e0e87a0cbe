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
    marker_opening,
    may_begin,
    read_json,
    skip_blank,
    written,
)

OPEN, FUNCTION, END, CLOSE = "<tool_call>", "<function=", "</function>", "</tool_call>"
_HEAD = re.compile(r"<function=([^<>\n]{1,256})>")
_HEAD_SO_FAR = re.compile(r"<function=[^<>\n]{0,256}")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]{1,256})>")
PARAMETER, VALUE_END = "<parameter=", "</parameter>"


class Qwen3CoderParser(ToolParser):
    def opening(self, text: str, line_start: bool, after_call: bool, last: bool) -> tuple[int, bool]:
        # The model now and then leaves the outer tag out.
        return marker_opening(text, (OPEN, FUNCTION), last)

    def candidate(self) -> Candidate:
        return _Block(self.schemas)


class _Block(Candidate):
    """A call is certain with its first whole parameter, and grows by one after the other."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._name: str | None = None
        self._properties: Mapping[str, Any] = {}
        self._body = 0
        self._at = 0
        """Past the last whole parameter."""
        self._searched = 0
        self._seen = 0
        self._end: int | None = None
        self._written: dict[str, str] = {}
        self._call: Call | None = None

    def resolve(self, text: str, last: bool) -> Found | None:
        prefix = len(OPEN) if text.startswith(OPEN) else 0
        start = skip_blank(text, prefix)
        if not may_begin(text[start : start + len(FUNCTION)], (FUNCTION,)):
            return Found(prefix)
        if self._name is None:
            head = _HEAD.match(text, start)
            if head is None:
                if len(text) >= start + len(FUNCTION) and not _HEAD_SO_FAR.fullmatch(text, start):
                    return Found(start + len(FUNCTION))
                return Found(len(text)) if last else None
            self._name, self._body, self._at = head[1], head.end(), head.end()
            properties = self._schemas.get(head[1], {}).get("properties")
            self._properties = properties if isinstance(properties, dict) else {}
        if self._end is None:
            self._read(text)
            self._end = self._find_end(text, self._body)
            if self._end is None:
                return Found(len(text), self.so_far(text)) if last else None
            # Anything else that stands between the parameters ends a call that is certain, and makes another none.
            whole = skip_blank(text, self._at) >= self._end - len(END)
            if (whole or self._written) and self._name.strip():
                self._call = Call(self._name, self._arguments() + "}")
        if self._call is None:
            return Found(self._end)
        tag = skip_blank(text, self._end)
        if prefix and text.startswith(CLOSE, tag):
            return Found(tag + len(CLOSE), (self._call,))
        if prefix and not last and may_begin(text[tag:], (CLOSE,)):
            return None
        return Found(self._end, (self._call,))

    def so_far(self, text: str) -> tuple[Call, ...]:
        if self._call is not None:
            return (self._call,)
        if self._name is None or not self._name.strip() or not self._written:
            return ()
        return (Call(self._name, self._arguments()),)

    def _arguments(self) -> str:
        return "{" + ", ".join(f"{written(name)}: {value}" for name, value in self._written.items())

    def _read(self, text: str) -> None:
        """Take the parameters that are whole."""
        while (head := _PARAMETER.match(text, self._at)) is not None:
            end = self._value_end(text, head.end())
            if end is None:
                break
            value = text[head.end() : end].removeprefix("\n").removesuffix("\n")
            self._written.setdefault(head[1], _written(value, self._properties.get(head[1])))
            self._at, self._searched = end + len(VALUE_END), 0

    def _value_end(self, text: str, start: int) -> int | None:
        """Where the tag is that ends a value: the first that another parameter or the function's end follows."""
        at = max(start, self._searched)
        while (at := text.find(VALUE_END, at)) >= 0:
            following = text[skip_blank(text, at + len(VALUE_END)) :][: len(PARAMETER)]
            if following.startswith((PARAMETER, END)):
                return at
            if may_begin(following, (PARAMETER, END)):
                break
            at += len(VALUE_END)
        self._searched = max(start, len(text) - len(VALUE_END) if at < 0 else at)
        return None

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


def _written(text: str, schema: object) -> str:
    """A parameter's value as JSON; its text where JSON cannot say what it says."""
    try:
        return written(_value(text, schema))
    except (ValueError, RecursionError):
        return written(text)


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
