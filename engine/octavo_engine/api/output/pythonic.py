"""Llama 3.2 and 4, ToolACE and others: [get_weather(city="Paris", days=3), now()], a Python list of calls.

The text is parsed and never evaluated: only literals count as arguments. Nothing marks a call, so only lists of calls
of the request's functions are taken for one; and as its last member may yet say otherwise, a list is given out whole.
"""

from __future__ import annotations

import ast
import warnings
from typing import Any

from octavo_engine.api.output.calls import (
    Balance,
    Call,
    Candidate,
    Found,
    Schemas,
    ToolParser,
    line_opening,
    make_call,
    marker_opening,
    may_begin,
    skip_blank,
)

START, STOP = "<|python_start|>", "<|python_end|>"
MAX_CHARS = 256 * 1024
"""Longest list that is parsed; Python's parser takes a hundred times a text's size in memory."""
MAX_DEPTH = 50


class PythonicParser(ToolParser):
    def opening(self, text: str, line_start: bool, after_call: bool, last: bool) -> tuple[int, bool]:
        end, found = marker_opening(text, (START,), last)
        bracket = line_opening(text, "[", line_start)
        if bracket is not None and (bracket < end or not found):
            return bracket, True
        return end, found

    def candidate(self) -> Candidate:
        return _List(self.schemas)


class _List(Candidate):
    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._beginnings = [name + "(" for name in schemas]
        self._longest = max(map(len, self._beginnings), default=0)
        self._balance = Balance(quotes="\"'")
        self._end: int | None = None
        self._calls: tuple[Call, ...] = ()

    def resolve(self, text: str, last: bool) -> Found | None:
        prefix = len(START) if text.startswith(START) else 0
        start = skip_blank(text, prefix)
        if start < len(text) and text[start] != "[":
            return Found(prefix)
        name = skip_blank(text, start + 1) if start < len(text) else start
        if name < len(text) and not may_begin(text[name : name + self._longest], self._beginnings):
            return Found(start + 1)
        if self._end is None:
            self._end = self._balance.end(text, start) if start < len(text) else None
            if self._end is None:
                return Found(len(text)) if last else None
            self._calls = _calls(text[start : self._end])
            if any(call.name not in self._schemas for call in self._calls):
                self._calls = ()
        if not self._calls:
            return Found(self._end)
        tag = skip_blank(text, self._end)
        if text.startswith(STOP, tag):
            return Found(tag + len(STOP), self._calls)
        if not last and may_begin(text[tag:], (STOP,)):
            return None
        return Found(self._end, self._calls)


def _calls(text: str) -> tuple[Call, ...]:
    """Empty when the list is not one of calls with literal keyword arguments."""
    if len(text) > MAX_CHARS:
        return ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the model's escapes, which are nobody's to mend
            body = ast.parse(text, mode="eval").body
        if not isinstance(body, ast.List):
            return ()
        found = [_call(one) for one in body.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    calls = tuple(call for call in found if call is not None)
    return calls if len(calls) == len(found) else ()


def _call(node: ast.expr) -> Call | None:
    if not isinstance(node, ast.Call) or node.args:
        return None
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            return None
        arguments[keyword.arg] = _literal(keyword.value, MAX_DEPTH)
    return make_call(ast.unparse(node.func) if isinstance(node.func, (ast.Name, ast.Attribute)) else None, arguments)


def _literal(node: ast.expr, depth: int) -> Any:
    """Raises ValueError for what is no literal or what JSON cannot say."""
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=str() | bool() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id="true" | "false" | "null" as name):
            return {"true": True, "false": False, "null": None}[name]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(element, depth - 1) for element in elements]
        case ast.Dict(keys=keys, values=elements):
            literal = {}
            for key, element in zip(keys, elements, strict=True):
                if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                    raise ValueError("a key that is no text")
                literal[key.value] = _literal(element, depth - 1)
            return literal
    raise ValueError("not a literal")
