"""Parts of rules in llguidance's language: texts, JSON, regular expressions, special tokens. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from octavo_engine.structured.params import StructuredOutputsError, StructuredOutputsParams

WHITE_SPACE = r"( |\n[ \t]{0,32})"
"""Between the parts of JSON: a space, or a line's end and an indentation. With any, small models are known to write
white space until their tokens run out."""
MAX_DEPTH = 100
OnSpecial = Callable[[str], int | None]
"""The id of a text that is one special token, which no ordinary text can stand for; else None."""


def quoted(text: str) -> str:
    """As a text of the grammar's language."""
    return json.dumps(text, ensure_ascii=False)


def json_part(schema: Any, params: StructuredOutputsParams | None = None) -> str:
    """A part of a rule that stands for a value of this schema."""
    options: dict[str, Any] = {"whitespace_pattern": WHITE_SPACE}
    if params is not None:
        if params.whitespace_pattern is not None:
            options = {"whitespace_pattern": params.whitespace_pattern}
        elif params.disable_any_whitespace:
            options = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
        if params.disable_additional_properties:
            schema = _closed(schema)
    schema = {**(schema if isinstance(schema, dict) else {"allOf": [schema]}), "x-guidance": options}
    return "%json " + json.dumps(schema, ensure_ascii=False)


def regex_part(pattern: str) -> str:
    """A part that stands for what the whole of this regular expression matches."""
    # In the language it stands between slashes, on one line.
    inside = re.sub(
        r"\\.|[/\n\r]", lambda m: {"/": "\\/", "\n": "\\n", "\r": "\\r"}.get(m[0], m[0]), pattern, flags=re.S
    )
    return f"/{inside}/"


def literal(text: str, on_special: OnSpecial | None) -> str:
    """A part of a rule that stands for exactly this text, which may be a special token."""
    token = on_special(text) if on_special is not None else None
    return quoted(text) if token is None else f"<[{token}]>"


def document_of(param: str, text: str) -> Any:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON ({error})"
        raise StructuredOutputsError(param, f"{problem}.") from None
    if not isinstance(document, (dict, bool) if param == "json" else dict):
        raise StructuredOutputsError(param, "must be a JSON object.")
    _check_depth(param, document)
    return document


def _check_depth(param: str, document: Any) -> None:
    level, depth = [document], 0
    while level := [part for value in level for part in _parts(value)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise StructuredOutputsError(param, f"is nested more than {MAX_DEPTH} levels deep.")


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _closed(schema: Any) -> Any:
    """With additionalProperties false wherever an object's properties are named and nothing is said of others."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    names = ("properties", "patternProperties", "$defs", "definitions")
    closed = {
        key: {name: _closed(part) for name, part in value.items()}
        if key in names and isinstance(value, dict)
        else value
        if key in ("enum", "const", "default", "examples")
        else _closed(value)
        for key, value in schema.items()
    }
    if "properties" in schema:
        closed.setdefault("additionalProperties", False)
    return closed
