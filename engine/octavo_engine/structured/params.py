"""What a request may ask of the form of its answer: vLLM's StructuredOutputsParams, checked when made. Pure values."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MAX_CHARS = 128 * 1024
"""Longest schema, regular expression, grammar, or list of choices as JSON."""
MAX_CHOICES = 1000
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class StructuredOutputsError(ValueError):
    """What is asked for cannot be had; `param` names the field that is at fault."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param}: {problem}")
        self.param, self.problem = param, problem


@dataclass(frozen=True)
class StructuredOutputsParams:
    """Exactly one of json (a schema, as text or as an object), regex (of the whole answer), choice (one of these
    texts), grammar (Lark or GBNF), json_object (any object) and structural_tag (free text with schemas between tags).

    disable_any_whitespace: JSON without white space between its parts. disable_additional_properties: objects have no
    properties that their schema does not name. whitespace_pattern: a regular expression of what may stand between the
    parts of JSON. Raises StructuredOutputsError.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("json", "structural_tag"):
            # As text, so that the value stays immutable, can be hashed and has one form.
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, _as_text(name, value))
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            said = "none" if not given else " and ".join(given)
            raise StructuredOutputsError("structured_outputs", f"give exactly one of {', '.join(KINDS)}; got {said}.")
        self._check(given[0])

    def _check(self, kind: str) -> None:
        value = getattr(self, kind)
        if kind == "choice":
            if isinstance(value, str) or not isinstance(value, Sequence) or not 0 < len(value) <= MAX_CHOICES:
                raise StructuredOutputsError(kind, f"must be a list of 1 to {MAX_CHOICES} texts.")
            if not all(isinstance(text, str) and text for text in value):
                raise StructuredOutputsError(kind, "its members must be texts that are not empty.")
            object.__setattr__(self, "choice", tuple(value))
            value = "".join(value)
        elif kind == "json_object":
            if value is not True:
                raise StructuredOutputsError(kind, "must be true, or left out.")
            return
        elif not isinstance(value, str) or not value.strip():
            raise StructuredOutputsError(kind, "must not be empty.")
        if len(value) > MAX_CHARS:
            raise StructuredOutputsError(kind, f"has {len(value)} characters; at most {MAX_CHARS} are taken.")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise StructuredOutputsError(name, "must be true or false.")
        pattern = self.whitespace_pattern
        if pattern is not None and not (isinstance(pattern, str) and 0 < len(pattern) <= 256):
            raise StructuredOutputsError("whitespace_pattern", "must be a regular expression of 1 to 256 characters.")

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name) not in (None, False))


def from_document(document: Mapping[str, Any]) -> StructuredOutputsParams:
    """From a request's `structured_outputs`. Raises StructuredOutputsError."""
    known = {f.name for f in fields(StructuredOutputsParams)}
    unknown = sorted(name for name, value in document.items() if name not in known and value is not None)
    if unknown:
        raise StructuredOutputsError("structured_outputs", f"there is no {unknown[0][:100]!r} among its fields.")
    # null is a field that was left out; false and empty values are what the checks refuse.
    given = {name: value for name, value in document.items() if value is not None}
    if given.get("json_object") is False:
        raise StructuredOutputsError("json_object", "must be true, or left out.")
    return StructuredOutputsParams(**given)


def _as_text(name: str, value: object) -> str:
    try:
        return json_module.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise StructuredOutputsError(name, "is not JSON, or is nested too deeply.") from None
