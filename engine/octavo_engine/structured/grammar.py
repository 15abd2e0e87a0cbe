"""From what a request asks for to a grammar, in llguidance's language; and whether that can be compiled.

Called where requests are read: by the API off its event loop, by LLM. The engine compiles the same text again, with
the model's tokens (matcher.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from octavo_engine.structured.params import StructuredOutputsError, StructuredOutputsParams
from octavo_engine.structured.parts import OnSpecial, document_of, json_part, quoted, regex_part
from octavo_engine.structured.tags import structural

LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,  # some 20 ms
    "step_lexer_fuel": 200_000,  # some 15 ms
    "step_max_items": 50_000,
    "max_lexer_states": 30_000,  # up to 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # those would tell of the answer in the log
}
"""Of one grammar's compilation, and of one mask. They are counts, so that what is refused is always refused."""


def grammar_of(params: StructuredOutputsParams, on_special: OnSpecial | None = None) -> str:
    """Raises StructuredOutputsError for what is no JSON, no grammar, or needs what this version does not have."""
    match params.kind:
        case "json":
            assert isinstance(params.json, str)
            return "start: " + json_part(document_of("json", params.json), params)
        case "json_object":
            return "start: " + json_part({"type": "object"}, params)
        case "regex":
            assert params.regex is not None
            return "start: " + regex_part(params.regex)
        case "choice":
            assert params.choice is not None
            return "start: " + " | ".join(map(quoted, params.choice))
        case "grammar":
            assert params.grammar is not None
            return _lark(params.grammar)
        case _:
            return structural(params, on_special)


def check(grammar: str) -> None:
    """Compile it without a tokenizer. Raises StructuredOutputsError with what is wrong."""
    from llguidance import LLMatcher

    problem: str = LLMatcher.validate_grammar(grammar, limits=limits())
    if problem and not problem.startswith("WARNING"):
        raise StructuredOutputsError("structured_outputs", explained(problem))


def limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(**LIMITS)


def explained(problem: str) -> str:
    """llguidance's message, without the state that it appends and within a line's length."""
    problem = problem.partition("\n<")[0].strip()
    schema = problem.partition("failed to compile JSON schema: ")[2]
    # Of a schema the grammar's own line, which the message shows, tells nobody anything.
    return "the grammar cannot be compiled: " + (schema.partition("\n")[0] if schema else problem)[:600]


def _lark(grammar: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    if grammar.lstrip().startswith("{"):
        raise StructuredOutputsError("grammar", "must be a grammar in Lark's language or in GBNF.")
    try:
        text: str = any_to_lark(grammar)
    except Exception as error:  # noqa: BLE001 - the converter raises what it meets
        raise StructuredOutputsError("grammar", f"is neither Lark nor GBNF ({str(error)[:300]}).") from None
    return text


def either(one: str, other: str) -> str:
    """The grammar of what one of two allows."""
    named = [{"name": "one", "lark_grammar": one}, {"name": "other", "lark_grammar": other}]
    return json.dumps({"grammars": [{"lark_grammar": "start: @one | @other"}, *named]}, ensure_ascii=False)


def from_response_format(document: Mapping[str, Any] | None) -> StructuredOutputsParams | None:
    """OpenAI's response_format; None where any text will do. Raises StructuredOutputsError."""
    if document is None:
        return None
    kind = document.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "json_schema":
        inner = document.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if schema is None:
            raise StructuredOutputsError("response_format", "json_schema needs an object with name and schema.")
        return StructuredOutputsParams(json=json.dumps(schema, ensure_ascii=False))
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag={k: v for k, v in document.items() if k != "type"})
    raise StructuredOutputsError(
        "response_format", f"type must be text, json_object, json_schema or structural_tag, got {str(kind)[:100]!r}."
    )
