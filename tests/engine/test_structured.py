"""Structured output: what may be asked for, the grammars made of it, and the masks that a real vocabulary gives."""

# ruff: noqa: E402 - where the two libraries are missing, nothing here is run

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest

pytest.importorskip("llguidance")
tokenizers = pytest.importorskip("tokenizers")

import models
from octavo_engine.core.messages import Grammar
from octavo_engine.sampling_params import SamplingError, SamplingParams
from octavo_engine.structured.grammar import check, either, from_response_format, grammar_of
from octavo_engine.structured.matcher import Gate, Matcher, Matchers
from octavo_engine.structured.params import MAX_CHARS, StructuredOutputsError, StructuredOutputsParams, from_document
from octavo_engine.structured.parts import _closed
from octavo_engine.structured.settings import StructuredOutputsSettings

EOS = 2
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
    "required": ["name", "age"],
}


# ---- what may be asked for


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({}, "exactly one of"),
        ({"regex": "a", "json_object": True}, "regex and json_object"),
        ({"choice": []}, "1 to 1000 texts"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"choice": "yes"}, "list"),
        ({"grammar": ""}, "must not be empty"),
        ({"json": ""}, "must not be empty"),
        ({"json": 3}, "must not be empty"),
        ({"json_object": False}, "true"),
        ({"regex": "a" * (MAX_CHARS + 1)}, "at most"),
        ({"regex": "a", "whitespace_pattern": ""}, "whitespace_pattern"),
        ({"regex": "a", "disable_any_whitespace": 1}, "disable_any_whitespace"),
        ({"regexp": "a"}, "'regexp'"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_reason(document: dict[str, Any], said: str) -> None:
    with pytest.raises(StructuredOutputsError, match=said):
        from_document(document)


def test_fields_that_are_null_count_as_left_out() -> None:
    assert from_document({"json": None, "regex": "a"}) == StructuredOutputsParams(regex="a")


def test_a_schema_is_the_same_as_text_and_as_an_object() -> None:
    params = StructuredOutputsParams(json=PERSON)

    assert params == StructuredOutputsParams(json=json.dumps(PERSON))
    assert len({params, StructuredOutputsParams(json=PERSON)}) == 1


def test_sampling_params_take_structured_outputs_and_nothing_else_in_their_place() -> None:
    assert SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")).structured_outputs is not None
    with pytest.raises(SamplingError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("document", "found"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, StructuredOutputsParams(json_object=True)),
        ({"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}, StructuredOutputsParams(json=PERSON)),
    ],
)
def test_openais_response_format_means_the_same(document: Any, found: StructuredOutputsParams | None) -> None:
    assert from_response_format(document) == found


@pytest.mark.parametrize("document", [{"type": "json_schema"}, {"type": "xml"}, {}])
def test_a_response_format_that_says_nothing_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(StructuredOutputsError, match="response_format"):
        from_response_format(document)


def test_the_servers_settings_are_defaults_and_moot_ones_are_taken() -> None:
    settings = StructuredOutputsSettings.of('{"backend": "xgrammar", "disable_any_whitespace": true}')

    assert settings.applied(StructuredOutputsParams(json_object=True)).disable_any_whitespace
    assert not settings.enable_in_reasoning
    for wrong in ('{"backend": "other"}', '{"speed": 1}', '{"disable_any_whitespace": "yes"}', "[]"):
        with pytest.raises(ValueError, match=r"must|there is no"):
            StructuredOutputsSettings.of(wrong)


# ---- grammars


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"json": '{"a'}, "not JSON"),
        ({"json": '"text"'}, "JSON object"),
        ({"json": {"type": "zap"}}, "Invalid type: zap"),
        ({"json": {"$ref": "#/nowhere"}}, "/nowhere"),
        ({"json": {"not": {"type": "string"}}}, '"not"'),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: a"}, "unknown name"),
        ({"grammar": '{"grammars": []}'}, "Lark"),
        ({"structural_tag": {"structures": []}}, "structures"),
        ({"structural_tag": {"structures": [{"begin": "a", "end": "b"}], "triggers": ["<"]}}, "no trigger"),
        ({"structural_tag": {"format": {}}}, "format"),
    ],
)
def test_a_grammar_that_cannot_be_is_refused_in_words(params: dict[str, Any], said: str) -> None:
    with pytest.raises(StructuredOutputsError, match=said) as refused:
        check(grammar_of(StructuredOutputsParams(**params)))
    assert len(str(refused.value)) < 800


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = {
    "nested repetitions": {"regex": "((((a{1,60}){1,60}){1,60}){1,60}){1,60}"},
    "a large automaton": {"regex": "(.*a){200}.{3000}"},
    "choices of choices": {"regex": "(a|b|ab)*c" * 2000},
    "a deep schema": {"json": deep(2000)},
    "many patterns": {"json": {"properties": {f"p{i}": {"pattern": "^(a|b){1,99}$"} for i in range(900)}}},
    "a large enum": {"json": {"enum": [f"value {i}" for i in range(7000)]}},
    "a deep grammar": {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "a deep GBNF": {"grammar": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "a long GBNF": {"grammar": "root ::= " + " | ".join(f'"a{i}"' for i in range(8000))},
    "recursion": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
}  # fmt: skip


@pytest.mark.parametrize("params", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_grammar_is_compiled_or_refused_in_bounded_time(params: dict[str, Any]) -> None:
    began = time.process_time()
    with contextlib.suppress(StructuredOutputsError):
        check(grammar_of(StructuredOutputsParams(**params)))

    assert time.process_time() - began < 4.0


def test_objects_are_closed_where_asked_and_only_where_properties_are_named() -> None:
    schema = {"properties": {"properties": {"type": "object", "properties": {"x": {}}}, "y": {"type": "object"}}}

    closed = _closed(schema)

    assert closed["additionalProperties"] is False
    assert closed["properties"]["properties"]["additionalProperties"] is False
    assert "additionalProperties" not in closed["properties"]["y"]


# ---- masks


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    return tokenizers.Tokenizer.from_file(str(models.smollm2() / "tokenizer.json"))


@pytest.fixture(scope="module")
def matchers() -> Matchers:
    return Matchers(models.smollm2() / "tokenizer.json", 49152)


def begin(matchers: Matchers, text: str, **gate: Any) -> Matcher:
    matcher = matchers.start(Grammar(text, **gate), frozenset([EOS]))
    assert isinstance(matcher, Matcher)
    wait(matchers, matcher)
    return matcher


def wait(matchers: Matchers, matcher: Matcher) -> None:
    deadline = time.monotonic() + 120
    while not matcher.ready and time.monotonic() < deadline:
        matchers.settle(0.1, grammars=True)
    assert matcher.ready


def allowed(matcher: Matcher) -> set[int]:
    assert matcher.mask is not None
    return {i for i in range(49152) if matcher.mask[i >> 3] >> (i & 7) & 1}


def feed(matchers: Matchers, matcher: Matcher, ids: list[int]) -> None:
    """Each token must be allowed by the mask that came before it."""
    for token in ids:
        assert matcher.error is None, matcher.error
        assert matcher.mask is None or token in allowed(matcher), token
        matchers.advance([(matcher, token)])
        wait(matchers, matcher)


@pytest.mark.parametrize(
    ("params", "good", "bad"),
    [
        ({"json": PERSON}, '{"name": "Bo", "age": 3}', '{"name": 3'),
        ({"json": PERSON}, '{\n  "name": "Bo",\n  "age": 3\n}', '{"age": "'),
        ({"json": PERSON, "disable_any_whitespace": True}, '{"name":"Bo","age":3}', '{"name": '),
        ({"json": PERSON, "disable_additional_properties": True}, '{"name": "Bo", "age": 3}', '{"name": "Bo", "zz"'),
        ({"json_object": True}, '{"any": [1, true, null]}', "[1"),
        ({"choice": ['say "hi"', "no\nway"]}, 'say "hi"', "say no"),
        ({"regex": r"[0-9]{2}-[a-c]"}, "12-b", "1-b"),
        ({"grammar": 'root ::= "a" [0-9]'}, "a7", "b"),
        ({"grammar": 'start: NAME "!"\nNAME: /[a-z]+/'}, "hello!", "!"),
    ],
)
def test_a_mask_allows_what_the_form_allows_and_nothing_else(matchers, vocabulary, params, good, bad) -> None:
    text = grammar_of(StructuredOutputsParams(**params))
    matcher = begin(matchers, text)

    feed(matchers, matcher, vocabulary.encode(good).ids)

    assert matcher.complete
    other = begin(matchers, text)
    with pytest.raises(AssertionError):
        feed(matchers, other, vocabulary.encode(bad).ids)


def test_the_end_of_text_is_allowed_exactly_where_the_form_may_end(matchers, vocabulary) -> None:
    matcher = begin(matchers, grammar_of(StructuredOutputsParams(regex="[0-9]{2,4}")))

    ends = []
    for digit in vocabulary.encode("1234").ids:
        ends.append(EOS in allowed(matcher))
        feed(matchers, matcher, [digit])

    assert ends == [False, False, True, True]
    assert matcher.complete


def test_free_text_holds_to_schemas_between_tags(matchers, vocabulary) -> None:
    tag = {
        "structures": [{"begin": "<call=add>", "schema": {"type": "object", "properties": {"x": {"type": "integer"}},
                        "required": ["x"], "additionalProperties": False}, "end": "</call>"}],
        "triggers": ["<call="],
    }  # fmt: skip
    text = grammar_of(StructuredOutputsParams(structural_tag=tag))
    matcher = begin(matchers, text)

    feed(matchers, matcher, vocabulary.encode('Let me see. <call=add>{"x": 4}</call> Done <b>').ids)

    assert EOS in allowed(matcher)
    with pytest.raises(AssertionError):
        feed(matchers, begin(matchers, text), vocabulary.encode("Let me see. <call=sub>").ids)


YES = {"type": "const_string", "value": "yes"}
NUMBER = {"type": "json_schema", "json_schema": {"type": "integer"}}
CALL = {"type": "tag", "begin": "<call=add>", "content": NUMBER, "end": "</call>"}
ANY = {"type": "any_text"}
THOUGHT = {"type": "tag", "begin": "<think>", "content": ANY, "end": "</think>"}
CALLS = {"type": "triggered_tags", "triggers": ["<call="], "tags": [CALL]}


def any_of(elements: list[Any]) -> dict[str, Any]:
    return {"type": "or", "elements": elements}


def sequence(*elements: Any) -> dict[str, Any]:
    return {"type": "sequence", "elements": elements}


def separated(separator: str, **more: Any) -> dict[str, Any]:
    return {"type": "tags_with_separator", "tags": [CALL], "separator": separator, **more}


def end(matchers: Matchers, matcher: Matcher, ids: list[int]) -> None:
    """As `feed`, of an answer that may end there."""
    feed(matchers, matcher, ids)
    assert matcher.complete or EOS in allowed(matcher)


@pytest.mark.parametrize(
    ("format", "good", "bad"),
    [
        (YES, ["yes"], ["no", "yes!"]),
        ({"type": "regex", "pattern": "[ab]+/c"}, ["ab/c"], ["c"]),
        (ANY, ["", "What? <call=no>"], []),
        (CALL, ["<call=add>4</call>"], ["4", "<call=add>x"]),
        (any_of([CALL, YES]), ["yes", "<call=add>4</call>"], ["x"]),
        (sequence(THOUGHT, CALL), ["<think>a < b\n</think><call=add>4</call>"], ["<call=add>", "<think>a</think>b"]),
        (sequence(ANY, {"type": "const_string", "value": "!"}, NUMBER), ["well, then!5"], ["well!x"]),
        (CALLS, ["", "just words", "so <call=add>4</call> and <call=add>5</call>."], ["so <call=sub>"]),
        ({**CALLS, "at_least_one": True, "stop_after_first": True}, ["so <call=add>4</call>"],
         ["so <call=add>4</call>."]),
        (separated(", ", at_least_one=True), ["<call=add>4</call>", "<call=add>4</call>, <call=add>5</call>"],
         ["", "<call=add>4</call><"]),
        (separated(""), ["", "<call=add>4</call><call=add>5</call>"], ["x"]),
    ],
)  # fmt: skip
def test_formats_within_formats_hold(matchers, vocabulary, format: Any, good: list[str], bad: list[str]) -> None:
    text = grammar_of(from_response_format({"type": "structural_tag", "format": format}))

    for answer in good:
        end(matchers, begin(matchers, text), vocabulary.encode(answer).ids)
    for answer in bad:
        matcher = begin(matchers, text)
        with pytest.raises(AssertionError):
            end(matchers, matcher, vocabulary.encode(answer).ids)


@pytest.mark.parametrize(
    ("format", "said"),
    [
        (sequence(ANY, NUMBER), "any text must come last"), (sequence(any_of([ANY, NUMBER]), NUMBER), "come last"),
        (sequence(CALLS, NUMBER), "come last"), ({**CALL, "content": CALLS}, "come last"),
        ({**CALLS, "triggers": ["["]}, "no trigger begins"), ({**ANY, "excludes": ["x"]}, "excludes"),
        ({"type": "grammar", "grammar": "a"}, "must be one of"), ({**CALL, "end": ["b", "c"]}, "one text"),
        ({}, "must be one of"), ("x", "must be one of"), ({"type": "const_string"}, "needs `value`"),
        (any_of([]), "needs `elements`"),
        (any_of([any_of([any_of([YES])] * 20)] * 20), "more than 256"),
    ],
)  # fmt: skip
def test_formats_that_cannot_be_had_are_refused_with_a_reason(format: Any, said: str) -> None:
    with pytest.raises(StructuredOutputsError, match=said):
        check(grammar_of(StructuredOutputsParams(structural_tag={"format": format})))


def test_a_form_of_any_kind_may_stand_beside_calls() -> None:
    """A regular expression could not: it was a grammar of another kind."""
    for params in ({"regex": "[a/]+"}, {"choice": ["x"]}, {"grammar": 'start: "x"'}, {"json_object": True}):
        check(either('start: "call"', grammar_of(StructuredOutputsParams(**params))))


def test_the_form_holds_after_the_thinking(matchers, vocabulary) -> None:
    text = grammar_of(StructuredOutputsParams(regex="[0-9]+"))
    matcher = begin(matchers, text, after="</think>")

    assert matcher.mask is None
    feed(matchers, matcher, vocabulary.encode("So 5 or {6}? </think>").ids)

    assert matcher.mask is not None
    feed(matchers, matcher, vocabulary.encode("\n\n").ids[:1])
    assert allowed(matcher) & set(vocabulary.encode("0 a b").ids) == set(vocabulary.encode("0").ids)


def test_an_answer_may_begin_its_thinking_or_leave_it_out(matchers, vocabulary) -> None:
    text = grammar_of(StructuredOutputsParams(regex="[0-9]+"))

    plain = begin(matchers, text, after="</think>", opening="<think>")
    feed(matchers, plain, vocabulary.encode("42").ids)
    thinking = begin(matchers, text, after="</think>", opening="<think>")
    feed(matchers, thinking, vocabulary.encode("<think>Well</think>7").ids)

    assert EOS in allowed(plain)
    assert EOS in allowed(thinking)
    with pytest.raises(AssertionError):
        feed(matchers, begin(matchers, text, after="</think>", opening="<think>"), vocabulary.encode("Well").ids)


def test_a_gate_opens_wherever_tokens_are_cut() -> None:
    whole = b"<think>a < b</think>\n\n42"
    for size in range(1, len(whole)):
        gate = Gate("</think>", "<think>")
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]

        answer = b""
        while pieces and not answer:
            answer = gate.push(pieces.pop(0)) or b""

        # A blank line is the gate's only when it comes as a token of its own.
        assert (answer + b"".join(pieces)).strip(b"\n") == b"42", size


def test_requests_do_not_share_what_they_share_a_grammar_of(matchers, vocabulary) -> None:
    text = grammar_of(StructuredOutputsParams(choice=["ab", "cd"]))
    one, other = begin(matchers, text), begin(matchers, text)

    feed(matchers, one, vocabulary.encode("a").ids)

    assert vocabulary.encode("c").ids[0] in allowed(other)
    assert vocabulary.encode("c").ids[0] not in allowed(one)


def test_a_token_that_does_not_fit_ends_its_own_request_and_no_other(matchers, vocabulary) -> None:
    text = grammar_of(StructuredOutputsParams(regex="[0-9]{3}"))
    one, other = begin(matchers, text), begin(matchers, text)
    (seven, letter) = vocabulary.encode("7").ids[0], vocabulary.encode("x").ids[0]

    matchers.advance([(one, letter), (other, seven)])
    wait(matchers, one)
    wait(matchers, other)

    assert one.error is not None
    assert "form" in one.error
    assert other.error is None


def test_a_broken_tokenizer_refuses_structured_output_and_nothing_else(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    matchers = Matchers(tmp_path / "tokenizer.json", 100)

    matcher = begin(matchers, 'start: "a"')

    assert matcher.error is not None
    assert "tokenizer" in matcher.error


def test_a_grammar_that_fails_in_the_engine_is_an_error_and_not_an_exception(matchers) -> None:
    assert "cannot be compiled" in (begin(matchers, "start: nothing").error or "")
