"""From what a request asks for to a grammar, in llguidance's language; and whether that can be compiled.

Called where requests are read: by the API off its event loop, by LLM. The engine compiles the same text again, with
the model's tokens (matcher.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octavo_engine.structured.params import StructuredOutputsError, StructuredOutputsParams

WHITE_SPACE = r"( |\n[ \t]{0,32})"
"""Between the parts of JSON: a space, or a line's end and an indentation. With any, small models are known to write
white space until their tokens run out."""
MAX_DEPTH = 100
MAX_TAGS = 256
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

OnSpecial = Callable[[str], int | None]
"""The id of a text that is one special token, which no ordinary text can stand for; else None."""


def grammar_of(params: StructuredOutputsParams, on_special: OnSpecial | None = None) -> str:
    """Raises StructuredOutputsError for what is no JSON, no grammar, or needs what this version does not have."""
    match params.kind:
        case "json":
            return json_rule(_schema(params), params)
        case "json_object":
            return json_rule({"type": "object"}, params)
        case "regex":
            from llguidance import LLMatcher

            assert params.regex is not None
            text: str = LLMatcher.grammar_from_regex(params.regex)
            return text
        case "choice":
            assert params.choice is not None
            return "start: " + " | ".join(map(quoted, params.choice))
        case "grammar":
            assert params.grammar is not None
            return _lark(params.grammar)
        case _:
            return _tags(params, on_special)


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


def quoted(text: str) -> str:
    """As a text of the grammar's language."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Any, params: StructuredOutputsParams | None = None) -> str:
    return f"start: {json_part(schema, params)}"


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


def _schema(params: StructuredOutputsParams) -> Any:
    assert isinstance(params.json, str)
    return _document("json", params.json)


def _document(param: str, text: str) -> Any:
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


def _lark(grammar: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    if grammar.lstrip().startswith("{"):
        raise StructuredOutputsError("grammar", "must be a grammar in Lark's language or in GBNF.")
    try:
        text: str = any_to_lark(grammar)
    except Exception as error:  # noqa: BLE001 - the converter raises what it meets
        raise StructuredOutputsError("grammar", f"is neither Lark nor GBNF ({str(error)[:300]}).") from None
    return text


# ---- free text with tags


def _tags(params: StructuredOutputsParams, on_special: OnSpecial | None) -> str:
    assert isinstance(params.structural_tag, str)
    document = _document("structural_tag", params.structural_tag)
    structures, triggers = document.get("structures"), document.get("triggers")
    if "format" in document:
        raise StructuredOutputsError(
            "structural_tag", "the form with `format` is not supported; give `structures` and `triggers`."
        )
    if not _is_list(structures, dict) or not _is_list(triggers, str):
        raise StructuredOutputsError("structural_tag", "needs `structures`, a list of objects, and `triggers`, texts.")
    found = []
    for structure in structures:
        begin, end = structure.get("begin"), structure.get("end", "")
        if not isinstance(begin, str) or not isinstance(end, str):
            raise StructuredOutputsError("structural_tag", "each structure needs `begin` and `end`, texts.")
        trigger = next((t for t in triggers if begin.startswith(t)), None)
        if trigger is None:
            raise StructuredOutputsError("structural_tag", f"no trigger begins {begin[:100]!r}.")
        body = " ".join([quoted(begin[len(trigger) :]), json_part(structure.get("schema", True), params), quoted(end)])
        found.append((trigger, body.removeprefix('"" ').removesuffix(' ""')))
    return tagged_text(found, on_special)


def tagged_text(tags: Sequence[tuple[str, str]], on_special: OnSpecial | None = None, first: str = "") -> str:
    """Any text, in which each trigger is followed by the rule beside it. Tags with one trigger are alternatives."""
    bodies: dict[str, list[str]] = {}
    for trigger, body in tags:
        bodies.setdefault(trigger, []).append(body)
    rules = [f"start: {first}({' | '.join(f'tag_{i}' for i in range(len(bodies)))})* TEXT", "TEXT: /(.|\\n)*/"]
    for i, (trigger, alternatives) in enumerate(bodies.items()):
        body = " | ".join(f"body_{i}_{j}" for j in range(len(alternatives)))
        rules += [f"body_{i}_{j}: {alternative}" for j, alternative in enumerate(alternatives)]
        token = on_special(trigger) if on_special is not None else None
        if token is not None:
            rules.append(f"tag_{i}: TEXT <[{token}]> ({body})")
        else:
            rules += [f"head_{i}[lazy]: TEXT {quoted(trigger)}", f"tag_{i}: head_{i} ({body})"]
    return "\n".join(rules)


def either(one: str, other: str) -> str:
    """The grammar of what one of two allows."""
    named = [{"name": "one", "lark_grammar": one}, {"name": "other", "lark_grammar": other}]
    return json.dumps({"grammars": [{"lark_grammar": "start: @one | @other"}, *named]}, ensure_ascii=False)


def literal(text: str, on_special: OnSpecial | None) -> str:
    """A part of a rule that stands for exactly this text, which may be a special token."""
    token = on_special(text) if on_special is not None else None
    return quoted(text) if token is None else f"<[{token}]>"


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_TAGS and all(isinstance(part, kind) for part in value)


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
