"""Grammars of tool calls: what the model writes under them is what the format's parser reads, in every format."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("llguidance")

import models
from octavo_engine import LLM, SamplingParams, StructuredOutputsParams
from octavo_engine.api.output.forms import FORMS, Function, function_of
from octavo_engine.api.output.parser import TOOL_PARSERS, OutputFormat, OutputParser, Parsed
from octavo_engine.structured.grammar import check

WEATHER = function_of(
    "get_weather",
    {
        "properties": {
            "days": {"type": "integer", "minimum": 1, "maximum": 9}, "unit": {"enum": ["C", "F"]},
            "city": {"type": "string", "maxLength": 12}, "at": {"$ref": "#/$defs/point"},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"point": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}},
    },
)  # fmt: skip
NOW = function_of("now", None)
SWITCH = function_of(
    "switch", {"properties": {"on": {"type": "boolean"}, "level": {"type": "null"}}, "additionalProperties": False}
)
FUNCTIONS = [WEATHER, NOW, SWITCH]


PROMPT: Any = [{"role": "user", "content": "How is the weather in Paris for the next 3 days?"}]
Answers = list[tuple[str, str | None]]


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], Answers]:
    """Each format's under each of its grammars, and why each ended. All are written at once, which takes a minute."""
    llm = LLM(str(models.smollm2()), kv_cache_memory_bytes=256 * 2**20, max_num_seqs=128)
    special_id, wanted, sampling = llm.get_tokenizer().special_id, [], []
    for parser, form in FORMS.items():
        for kind, grammar, count in (
            ("some", form.demanded(FUNCTIONS, True, special_id), 6),
            ("one", form.demanded([WEATHER], False, special_id), 3),
            ("free", form.free(FUNCTIONS, special_id), 2),
        ):
            check(grammar)
            wanted += [(parser, kind)] * count
            sampling += [
                SamplingParams(
                    temperature=0.8, seed=seed, max_tokens=160, skip_special_tokens=False,
                    structured_outputs=StructuredOutputsParams(grammar=grammar),
                )
                for seed in range(count)
            ]  # fmt: skip
    found: dict[tuple[str, str], Answers] = {}
    for key, output in zip(wanted, llm.chat([PROMPT] * len(sampling), sampling, use_tqdm=False), strict=True):
        found.setdefault(key, []).append((output.outputs[0].text, output.outputs[0].finish_reason))
    return found


def parsed(parser: str, text: str, functions: list[Function] = FUNCTIONS) -> Parsed:
    schemas = {function.name: function.schema for function in functions}
    return OutputParser(OutputFormat(TOOL_PARSERS[parser], schemas)).push(text, last=True)


def check_arguments(name: str, text: str) -> None:
    arguments = json.loads(text)
    if name == "get_weather":
        assert {"city", "days"} <= set(arguments) <= {"city", "days", "unit", "at"}
        assert 1 <= arguments["days"] <= 9
        assert arguments.get("unit", "C") in ("C", "F")
        assert len(arguments.get("at", [1, 2])) == 2
    elif name == "now":
        assert arguments == {}
    else:
        assert set(arguments) <= {"on", "level"}
        assert arguments.get("on", True) in (True, False)


@pytest.mark.parametrize("parser", FORMS)
def test_demanded_calls_come_and_are_read_with_arguments_of_their_schema(answers, parser) -> None:
    complete = 0
    for text, reason in answers[parser, "some"]:
        if reason != "stop":  # still calling when its tokens ran out
            continue
        found = parsed(parser, text)
        assert found.calls, text
        assert not found.content.strip(), text
        for call in found.calls:
            check_arguments(call.name, call.arguments)
        complete += 1

    assert complete


@pytest.mark.parametrize("parser", FORMS)
def test_one_function_is_called_once_where_one_call_is_wanted(answers, parser) -> None:
    complete = 0
    for text, reason in answers[parser, "one"]:
        if reason != "stop":
            continue
        ((name, arguments),) = [(call.name, call.arguments) for call in parsed(parser, text, [WEATHER]).calls]
        assert name == "get_weather"
        check_arguments(name, arguments)
        complete += 1

    assert complete


@pytest.mark.parametrize("parser", FORMS)
def test_free_text_stays_free_and_what_begins_as_a_call_is_one(answers, parser) -> None:
    texts = [text for text, _ in answers[parser, "free"]]

    assert all(text and not parsed(parser, text).calls for text in texts)


def test_functions_of_every_kind_of_name_and_schema_can_be_written() -> None:
    odd = [
        function_of('say "hi"', {"properties": {"a b": {"type": "string"}, 'q"': {"type": ["string", "null"]}}}),
        function_of("keine_größe", {"properties": {}, "required": ["x"]}),
        function_of("any", {"type": "object"}),
        function_of("nested", {"properties": {"p": {"type": "object", "properties": {"x": {"const": 3}}}}}),
    ]
    for form in FORMS.values():
        for grammar in (form.demanded(odd, True, lambda text: None), form.free(odd, lambda text: 7)):
            check(grammar)
