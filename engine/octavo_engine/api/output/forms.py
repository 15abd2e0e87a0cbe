"""Grammars in which a model writes tool calls, one for each format, so that what comes is a call of a known function.

Used where calls are demanded (tool_choice required, or a named function) and where functions are strict. What the
grammar lets through is what the format's parser reads. Parts of rules are in llguidance's language.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo_engine.api.output.qwen3_coder import kinds_of, refers
from octavo_engine.structured.parts import OnSpecial, json_part, literal, quoted
from octavo_engine.structured.tags import tagged_text

MAX_CALLS = 32
"""In one answer whose calls are demanded: small models would otherwise call until their tokens run out."""

Part = tuple[str, list[str]]
"""A part of a rule, and the rules that it refers to."""


@dataclass(frozen=True)
class Function:
    """schema: of its parameters, an object's."""

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class CallForm:
    """How one format writes calls: open, calls with separators between them, close.

    call(function, number): one call; number makes the names of its rules its own. trigger: what every call begins with,
    and nothing else does; None where nothing marks a call but its first character, `first`.
    """

    call: Callable[[Function, int, OnSpecial], Part]
    separator: str = ""
    open: str = ""
    close: str = ""
    trigger: str | None = None
    first: str = ""

    def demanded(self, functions: Sequence[Function], many: bool, on_special: OnSpecial) -> str:
        """The grammar of an answer that is one call, or with `many` one or more, and nothing else."""
        calls, rules = self._calls(functions, many, on_special)
        return "\n".join([f"start: {calls}", *rules])

    def free(self, functions: Sequence[Function], on_special: OnSpecial) -> str:
        """The grammar of an answer that is any text, in which what begins as a call is one of these."""
        if self.trigger is None:
            calls, rules = self._calls(functions, True, on_special)
            text = f"TEXT: /[^{self.first}](.|\\n)*/"
            return "\n".join(['start: calls | TEXT | ""', f"calls: {calls}", text, *rules])
        rules, tags = [], []
        for number, function in enumerate(functions):
            part, more = self.call(function, number, on_special)
            body = part.removeprefix(literal(self.trigger, on_special))
            assert body != part, (part, self.trigger)
            tags.append((self.trigger, body.strip()))
            rules += more
        return "\n".join([tagged_text(tags, on_special), *rules])

    def _calls(self, functions: Sequence[Function], many: bool, on_special: OnSpecial) -> Part:
        rules = []
        for number, function in enumerate(functions):
            part, more = self.call(function, number, on_special)
            rules += [f"call_{number}: {part}", *more]
        one = "(" + " | ".join(f"call_{number}" for number in range(len(functions))) + ")"
        # The trigger of a list of calls comes once.
        parts = [literal(self.open, on_special) if self.open else "", one]
        if many:
            parts.append(f"({quoted(self.separator) if self.separator else ''} {one}){{0,{MAX_CALLS - 1}}}")
        parts.append(quoted(self.close) if self.close else "")
        return " ".join(filter(None, parts)), rules


def function_of(name: str, parameters: Mapping[str, Any] | None) -> Function:
    """parameters: the request's; without them the function takes none."""
    if not parameters:
        return Function(name, {"type": "object", "properties": {}, "additionalProperties": False})
    return Function(name, {"type": "object", **parameters})


def _hermes(function: Function, number: int, on_special: OnSpecial) -> Part:
    begin, end = literal("<tool_call>", on_special), literal("</tool_call>", on_special)
    head, closing = quoted(f'\n{{"name": {_text(function.name)}, "arguments": '), "}\n"
    return f"{begin} {head} {json_part(function.schema)} {quoted(closing)} {end}", []


def _llama3_json(function: Function, number: int, on_special: OnSpecial) -> Part:
    head = quoted(f'{{"name": {_text(function.name)}, "parameters": ')
    return f"{head} {json_part(function.schema)} {quoted('}')}", []


def _mistral(function: Function, number: int, on_special: OnSpecial) -> Part:
    begin = literal("[TOOL_CALLS]", on_special)
    if on_special("[ARGS]") is not None:  # the tokenizers of 2025 and later
        return f"{begin} {quoted(function.name)} {literal('[ARGS]', on_special)} {json_part(function.schema)}", []
    head = quoted(f'[{{"name": {_text(function.name)}, "arguments": ')
    return f"{begin} {head} {json_part(function.schema)} {quoted('}]')}", []


def _qwen3_coder(function: Function, number: int, on_special: OnSpecial) -> Part:
    begin, end = literal("<tool_call>", on_special), literal("</tool_call>", on_special)
    end_of_value = quoted("\n</parameter>")
    parts, rules = [], [f"text_{number}[lazy]: /(.|\\n)*/ {end_of_value}"]
    for name, schema, needed in _properties(function):
        head = quoted(f"<parameter={name}>\n")
        kinds, choices = kinds_of(schema), _choices(schema)
        if choices and all(isinstance(choice, str) for choice in choices):
            value = f"({' | '.join(map(quoted, choices))}) {end_of_value}"
        elif not choices and ("string" in kinds or (not kinds and not refers(schema))):
            value = f"text_{number}"  # as the parser reads it
        else:
            value = f"{json_part(schema)} {end_of_value}"
        parts.append(f'({head} {value} "\\n"){"" if needed else "?"}')
    head, closing = quoted(f"\n<function={function.name}>\n"), quoted("</function>\n")
    return f"{begin} {head} {' '.join(parts)} {closing} {end}", rules


def _pythonic(function: Function, number: int, on_special: OnSpecial) -> Part:
    needed: list[str] = []
    optional: list[str] = []
    for name, schema, required in _properties(function):
        part = f"{quoted(name + '=')} {json_part(schema)}"
        (needed if required else optional).append(part)
    comma = quoted(", ")
    rules = []
    if needed:
        arguments = f" {comma} ".join(needed) + "".join(f" ({comma} {part})?" for part in optional)
    else:  # the first that is there has no comma before it
        firsts = [
            part + "".join(f" ({comma} {later})?" for later in optional[index + 1 :])
            for index, part in enumerate(optional)
        ]
        rules = [f"arguments_{number}: {' | '.join(firsts)}"] if firsts else []
        arguments = f"arguments_{number}?" if firsts else ""
    return f'{quoted(function.name + "(")} {arguments} ")"', rules


FORMS: Mapping[str, CallForm] = {
    "hermes": CallForm(_hermes, separator="\n", trigger="<tool_call>"),
    "llama3_json": CallForm(_llama3_json, separator="; ", first="{"),
    "mistral": CallForm(_mistral, trigger="[TOOL_CALLS]"),
    "qwen3_coder": CallForm(_qwen3_coder, separator="\n", trigger="<tool_call>"),
    "pythonic": CallForm(_pythonic, separator=", ", open="[", close="]", first="\\["),
}
"""By the names of --tool-call-parser."""


def _text(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _properties(function: Function) -> list[tuple[str, dict[str, Any], bool]]:
    """name, schema, whether it must be there; those that must come first."""
    properties, required = function.schema.get("properties"), function.schema.get("required")
    needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    definitions = {key: function.schema[key] for key in ("$defs", "definitions") if key in function.schema}
    found = [
        (name, {**schema, **definitions} if isinstance(schema, dict) else dict(definitions), name in needed)
        for name, schema in (properties.items() if isinstance(properties, dict) else ())
    ]
    return sorted(found, key=lambda one: not one[2])


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    return choices if isinstance(choices, list) else []
