"""Answers taken apart: what each format's texts come to, however they are cut, and that nothing of them is lost."""

# ruff: noqa: E501 - samples are read best as one row each

from __future__ import annotations

import json
import random
import typing
from typing import Any

import pytest

from octavo_engine.api.output.calls import Call
from octavo_engine.api.output.parser import REASONING_PARSERS, TOOL_PARSERS, OutputFormat, OutputParser, joined
from octavo_engine.api.output.reasoning import begun_by
from octavo_engine.config import ServerConfig

SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"},
            "where": {"type": "object"}, "unit": {"type": ["string", "null"]}, "ratio": {"anyOf": [{"type": "number"}]},
        },
    },
    "now": {},
}  # fmt: skip

PARIS = ("weather", {"city": "Paris"})
NOW = ("now", {})
ODD = ("weather", {"city": 'Zürich 漢 😀 "}" </tool_call> \\ [', "where": {"a": [{"b": "}]"}], "c": {}}})


def hermes(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def llama(name: str, arguments: Any) -> str:
    return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


def mistral(name: str, arguments: Any) -> str:
    return f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments, ensure_ascii=False)}"


def mistral_array(*calls: tuple[str, Any]) -> str:
    return "[TOOL_CALLS] " + json.dumps([{"name": n, "arguments": a} for n, a in calls], ensure_ascii=False)


CODER = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
CODER_NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"

# (format, text, content, calls)
SAMPLES: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    *((name, text, text, []) for name in TOOL_PARSERS for text in (
        "", "Hello.", "  Hello \n\n", "1 < 2 and {a: [b]} \n [x](y)\n{}\n[]\n <tool", "[TOOL", "{", "[", "\n", "<|python",
        '{"answer": {"name": "weather"}}', "[1, 2]\n", "Zürich 漢 😀 <tool_cal> [TOOL_CALL] <function",
        "if (x) {\n  [weather]\n}\n",
    )),
    # hermes
    ("hermes", hermes(*PARIS), "", [PARIS]),
    ("hermes", hermes(*ODD), "", [ODD]),
    ("hermes", f"\n\n{hermes(*PARIS)}\n{hermes(*NOW)}\n", "", [PARIS, NOW]),
    ("hermes", f"I look. \n\n{hermes(*PARIS)}\n", "I look.", [PARIS]),
    ("hermes", f"{hermes(*PARIS)}\nThat is all.\n", "\nThat is all.\n", [PARIS]),
    ("hermes", f"a {hermes(*PARIS)} b {hermes(*NOW)} c", "a b c", [PARIS, NOW]),
    ("hermes", hermes(*PARIS).removesuffix("</tool_call>"), "", [PARIS]),
    ("hermes", hermes(*PARIS).removesuffix("\n</tool_call>") + " so", " so", [PARIS]),
    ("hermes", hermes(*PARIS)[:-16], "", [("weather", '{"city": "Paris')]),
    ("hermes", hermes(*PARIS)[:30], hermes(*PARIS)[:30], []),
    ("hermes", f"a\n{hermes(*NOW)}{hermes(*PARIS)[:30]}", f"a{hermes(*PARIS)[:30]}", [NOW]),
    ("hermes", "<tool_call>{'name': 'now'}</tool_call>", "<tool_call>{'name': 'now'}</tool_call>", []),
    ("hermes", '<tool_call>{"name": 3}</tool_call>.', '<tool_call>{"name": 3}</tool_call>.', []),
    ("hermes", '<tool_call>{"name": "a", "arguments": [1]}</tool_call>', '<tool_call>{"name": "a", "arguments": [1]}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": NaN}}', "", [("a", '{"x": NaN}')]),
    ("hermes", '<tool_call>{"arguments": {"x": 1e999}, "name": "a"}', '<tool_call>{"arguments": {"x": 1e999}, "name": "a"}', []),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "a"}</tool_call>', "", [("a", {"x": 1})]),
    ("hermes", '<tool_call>{"type": "function", "name": "a", "arguments": {}, "id": "7"}</tool_call>', "", [("a", {})]),
    ("hermes", "The tag <tool_call> opens.", "The tag <tool_call> opens.", []),
    ("hermes", f"<tool_call> no {hermes(*NOW)}", "<tool_call> no", [NOW]),
    ("hermes", '<tool_call>{"name": "other"}</tool_call>', "", [("other", {})]),
    ("hermes", '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("a", {"x": 1})]),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": "\\ud83d"}}</tool_call>', "", [("a", {"x": "\ud83d"})]),
    ("hermes", '<tool_call>{"name": "\\ud83d"}</tool_call>', '<tool_call>{"name": "\\ud83d"}</tool_call>', []),
    ("hermes", "<tool_call>" + "{" * 3000, "<tool_call>" + "{" * 3000, []),
    # llama3_json
    ("llama3_json", llama(*PARIS), "", [PARIS]),
    ("llama3_json", llama(*ODD), "", [ODD]),
    ("llama3_json", f"<|python_tag|>{llama(*PARIS)}; {llama(*NOW)}", "", [PARIS, NOW]),
    ("llama3_json", f"{llama(*PARIS)}\n{llama(*NOW)};", ";", [PARIS, NOW]),
    ("llama3_json", f"Let me see:\n{llama(*PARIS)}", "Let me see:", [PARIS]),
    ("llama3_json", f"Say {llama(*PARIS)}", f"Say {llama(*PARIS)}", []),
    ("llama3_json", llama("unknown", {}), llama("unknown", {}), []),
    ("llama3_json", llama(*PARIS)[:-1], "", [PARIS]),
    ("llama3_json", llama(*PARIS)[:-3], "", [("weather", '{"city": "Paris')]),
    ("llama3_json", f"{llama(*NOW)}; that", "; that", [NOW]),
    ("llama3_json", '{"type": "function", "function": {"name": "now", "parameters": {}}}', "", [NOW]),
    ("llama3_json", '<|python_tag|>print("x")', '<|python_tag|>print("x")', []),
    # mistral
    ("mistral", mistral(*PARIS), "", [PARIS]),
    ("mistral", mistral(*ODD) + mistral(*NOW), "", [ODD, NOW]),
    ("mistral", mistral_array(ODD, PARIS, NOW), "", [ODD, PARIS, NOW]),
    ("mistral", f"I look.\n{mistral_array(PARIS)}\n", "I look.", [PARIS]),
    ("mistral", "[TOOL_CALLS]now[CALL_ID]abc123[ARGS]{}", "", [NOW]),
    ("mistral", '[TOOL_CALLS]weather{"city": "Paris"}', "", [PARIS]),
    ("mistral", '[TOOL_CALLS]{"name": "now", "arguments": {}}', "", [NOW]),
    ("mistral", mistral(*PARIS)[:-3], "", [("weather", '{"city": "Pari')]),
    ("mistral", mistral_array(NOW, PARIS)[:-4], "", [NOW, ("weather", '{"city": "Paris')]),
    ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}, 3] x', "3] x", [NOW]),
    ("mistral", "[TOOL_CALLS] sorry, no.", "[TOOL_CALLS] sorry, no.", []),
    ("mistral", "[TOOL_CALLS] sorry. [TOOL_CALLS]now[ARGS]{}", "[TOOL_CALLS] sorry.", [NOW]),
    ("mistral", '[TOOL_CALLS][{"name": "now"}, 3]', '[TOOL_CALLS][{"name": "now"}, 3]', []),
    ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", []),
    ("mistral", "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    # qwen3_coder
    ("qwen3_coder", CODER, "", [PARIS]),
    ("qwen3_coder", f"I look.\n\n{CODER}\n{CODER_NOW}", "I look.", [PARIS, NOW]),
    ("qwen3_coder", CODER.removeprefix("<tool_call>\n"), "\n</tool_call>", [PARIS]),
    ("qwen3_coder", CODER.removesuffix("\n</tool_call>"), "", [PARIS]),
    ("qwen3_coder", CODER[:-30], CODER[:-30], []),
    ("qwen3_coder", CODER[:-12].replace("</function>", "<parameter=days>\n3\n</para"), "", [("weather", '{"city": "Paris"')]),
    ("qwen3_coder", CODER.replace("</function>", "so</function></parameter></function>"), "", [("weather", {"city": "Paris\n</parameter>\nso</function>"})]),
    ("qwen3_coder", "<function=weather><parameter=where>1e999</parameter></function>", "", [("weather", {"where": "1e999"})]),
    ("qwen3_coder", "<tool_call> <function name>", "<tool_call> <function name>", []),
    ("qwen3_coder", "<function=a\nb>", "<function=a\nb>", []),
    ("qwen3_coder", f"<function=a\nb> {CODER_NOW}", "<function=a\nb>", [NOW]),
    ("qwen3_coder", "<function=now>x</function></parameter></function>", "<function=now>x</function></parameter></function>", []),
    (
        "qwen3_coder",
        "<tool_call><function=weather><parameter=city>\n</function> 漢\n <parameter> </parameter> \n</parameter>"
        "<parameter=days>3</parameter>\n<parameter=exact>True</parameter><parameter=where>{\"a\": [1]}</parameter>"
        "<parameter=unit>null</parameter><parameter=ratio>1.5</parameter><parameter=other>7</parameter></function>"
        "</tool_call>",
        "",
        [("weather", {"city": "</function> 漢\n <parameter> </parameter> ", "days": 3, "exact": True,
                      "where": {"a": [1]}, "unit": None, "ratio": 1.5, "other": "7"})],
    ),
    ("qwen3_coder", "<function=weather><parameter=days>many</parameter></function>", "", [("weather", {"days": "many"})]),
    # pythonic
    ("pythonic", '[weather(city="Paris")]', "", [PARIS]),
    ("pythonic", "[weather(city='Paris'), now()]", "", [PARIS, NOW]),
    ("pythonic", "<|python_start|>[now()]<|python_end|>", "", [NOW]),
    ("pythonic", "I look.\n[now()]\nDone", "I look.\nDone", [NOW]),
    (
        "pythonic",
        "[weather(city='Z\\'ü)]\" 漢 😀', days=-3, exact=True, unit=None, where={'a': [1, (2.5, '}')], 'b': false})]",
        "",
        [("weather", {"city": "Z'ü)]\" 漢 😀", "days": -3, "exact": True, "unit": None,
                      "where": {"a": [1, [2.5, "}"]], "b": False}})],
    ),
    ("pythonic", "[weather(city='\\d')]", "", [("weather", {"city": "\\d"})]),
    *(("pythonic", text, text, []) for text in (
        "[weather(city='Par", "[weather('Paris')]", "[weather(city=open('x'))]", "[weather(city=1+1)]", "[other(a=1)]",
        "[now(), other()]", "[now() for x in y]", "[weather(**{})]", "[now(), 3]", "[weather(city=f'{x}')]",
        "[now(1e999)]", "[weather(days=1e999)]", "[weather(where={1: 2})]", "[now()\n", "[weather(days=" + "[" * 300 + "]" * 300 + ")]",
        "[weather(days=" + "-" * 3000 + "1)]", "so [now()]",
    )),
]  # fmt: skip


def parse(format: OutputFormat, pieces: list[str]) -> tuple[str, str, list[Call]]:
    """(reasoning, content, calls), joined."""
    parser = OutputParser(format)
    parts = [parser.push(piece) for piece in pieces[:-1]] + [parser.push(pieces[-1], last=True)]
    pieces_of_calls = [call for part in parts for call in part.calls]
    assert len({call.id for call in pieces_of_calls}) == sum(call.begins for call in pieces_of_calls)
    calls = joined(pieces_of_calls)
    assert [call.index for call in calls] == list(range(len(calls)))
    return (
        "".join(part.reasoning for part in parts),
        "".join(part.content for part in parts),
        [Call(call.name, call.arguments) for call in calls],
    )


def cuts(text: str) -> list[list[str]]:
    """All in one, one by one, every cut in two, and some of everything; with an empty end as engines send it."""
    rng = random.Random(text)
    ways = [[text], [*text, ""]]
    ways += [[text[:at], text[at:]] for at in range(1, min(len(text), 400))]
    for _ in range(20):
        places = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 12)))})
        ways.append([text[a:b] for a, b in zip(places, [*places[1:], len(text)], strict=True)])
    return ways


@pytest.mark.parametrize(("name", "text", "content", "calls"), SAMPLES, ids=lambda value: str(value)[:40])
def test_a_text_comes_to_its_content_and_calls_however_it_is_cut(
    name: str, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    format = OutputFormat(tools=TOOL_PARSERS[name], schemas=SCHEMAS)
    whole = parse(format, [text])

    assert whole[1] == content
    # What is expected as text is a call that was cut off, or is no JSON: it comes as the model wrote it.
    texts = [isinstance(arguments, str) for _, arguments in calls]
    assert [
        (call.name, call.arguments if as_text else json.loads(call.arguments))
        for call, as_text in zip(whole[2], texts, strict=True)
    ] == calls
    for pieces in cuts(text):
        assert parse(format, pieces) == whole, pieces


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_random_mixtures_of_marks_do_not_depend_on_their_cuts(name: str) -> None:
    rng = random.Random(name)
    marks = [
        "<tool_call>", "</tool_call>", "{", "}", '"', "\\", "\n", " ", ";", "[", "]", "[TOOL_CALLS]", "[ARGS]", "now", "(",
        ")", "<function=", ">", "</function>", "<parameter=city>", "</parameter>", hermes(*NOW), llama(*NOW), CODER_NOW,
        "[now()]", mistral(*NOW), "<|python_tag|>", "<|python_start|>", "<think>", "</think>", "'", "x=1", '{"name"',
    ]  # fmt: skip
    for _ in range(400):
        text = "".join(rng.choices(marks, k=rng.randrange(1, 14)))
        for reasoning in (None, REASONING_PARSERS["qwen3"], REASONING_PARSERS["deepseek_r1"]):
            format = OutputFormat(tools=TOOL_PARSERS[name], schemas=SCHEMAS, reasoning=reasoning)
            whole = parse(format, [text])
            assert parse(format, [*text, ""]) == whole, text
            at = rng.randrange(len(text))
            assert parse(format, [text[:at], text[at:]]) == whole, (text, at)


def test_a_long_call_is_read_in_time_that_grows_with_its_length() -> None:
    arguments = {"code": 'x = {"a": [1, 2]}\n' * 10_000}
    for name, text in (("hermes", hermes("now", arguments)), ("mistral", mistral("now", arguments))):
        pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
        _, content, calls = parse(OutputFormat(tools=TOOL_PARSERS[name]), pieces)
        assert (content, [json.loads(call.arguments) for call in calls]) == ("", [arguments])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", hermes(*ODD)),
        ("llama3_json", llama(*ODD)),
        ("mistral", mistral(*ODD)),
        ("mistral", mistral_array(ODD, PARIS)),
    ],
)
def test_arguments_come_as_they_are_written(name: str, text: str) -> None:
    parser = OutputParser(OutputFormat(TOOL_PARSERS[name], SCHEMAS))

    parts = [call for character in text for call in parser.push(character).calls]

    assert [part.begins for part in parts if part.index == 0] == [True] + [False] * (
        len(parts) - 1 - sum(p.index for p in parts)
    )
    assert all(len(part.arguments) <= 1 for part in parts)
    assert json.loads(joined(parts)[0].arguments) == ODD[1]


def test_without_parallel_calls_only_the_first_is_given() -> None:
    format = OutputFormat(tools=TOOL_PARSERS["hermes"], parallel=False)

    _, _, calls = parse(format, [hermes(*PARIS) + hermes(*NOW)])
    assert [call.name for call in calls] == ["weather"]


def test_ids_differ_and_mistrals_are_nine_letters_and_digits() -> None:
    def ids(name: str, text: str) -> list[str]:
        return [call.id for call in OutputParser(OutputFormat(TOOL_PARSERS[name])).push(text, last=True).calls]

    assert len(set(ids("hermes", hermes(*NOW) * 3))) == 3
    assert all(len(id) == 9 and id.isalnum() for id in ids("mistral", mistral(*NOW) * 3))


# (format, what the prompt did, text, reasoning, content)
THOUGHTS = [
    ("qwen3", None, "<think>\nHm.\n\nYes.\n</think>\n\nHello.\n", "Hm.\n\nYes.", "Hello.\n"),
    ("qwen3", None, "Hello.", "", "Hello."),
    ("qwen3", None, "No <think>later</think>", "", "No <think>later</think>"),
    ("qwen3", None, "<thin", "", "<thin"),
    ("qwen3", None, "", "", ""),
    ("qwen3", None, "\n<think>\n\n</think>\n\nHello.", "", "Hello."),
    ("qwen3", None, "<think>\ncut of", "cut of", ""),
    ("qwen3", None, "<think>\ncut off\n</thi", "cut off\n</thi", ""),
    ("qwen3", True, "Hm 漢 </x>\n</think>Hello.</think>", "Hm 漢 </x>", "Hello.</think>"),
    ("qwen3", False, "<think>Hello.", "", "<think>Hello."),
    ("deepseek_r1", None, "Hm.\n</think>\n\nHello.", "Hm.", "Hello."),
    ("deepseek_r1", None, "<think>\nHm.\n</think>\n\nHello.", "Hm.", "Hello."),
    ("deepseek_r1", True, "Hm. Never done", "Hm. Never done", ""),
    ("deepseek_r1", True, "</think>\nHello.", "", "Hello."),
    ("deepseek_r1", False, "Hello.", "", "Hello."),
]


@pytest.mark.parametrize(("name", "begun", "text", "reasoning", "content"), THOUGHTS)
def test_thinking_is_told_from_the_answer_however_it_is_cut(
    name: str, begun: bool | None, text: str, reasoning: str, content: str
) -> None:
    format = OutputFormat(reasoning=REASONING_PARSERS[name], begun=begun)

    for pieces in cuts(text):
        assert parse(format, pieces) == (reasoning, content, []), pieces


def test_calls_are_looked_for_after_the_thinking_only() -> None:
    format = OutputFormat(TOOL_PARSERS["hermes"], SCHEMAS, reasoning=REASONING_PARSERS["qwen3"])
    text = f"<think>\nShould I {hermes(*NOW)}?\n</think>\n\n{hermes(*PARIS)}"

    for pieces in cuts(text):
        reasoning, content, calls = parse(format, pieces)
        assert (reasoning, content) == (f"Should I {hermes(*NOW)}?", "")
        assert [call.name for call in calls] == ["weather"]


def test_thinking_is_left_out_where_it_is_not_wanted() -> None:
    format = OutputFormat(reasoning=REASONING_PARSERS["qwen3"], include_reasoning=False)

    assert parse(format, ["<think>Hm.</think>Hello."]) == ("", "Hello.", [])


def test_a_prompt_tells_whether_thinking_has_begun() -> None:
    assert begun_by("<|im_start|>assistant\n<think>\n") is True
    assert begun_by("<|im_start|>assistant\n<think>\n\n</think>\n\n") is False
    assert begun_by("<|im_start|>assistant\n") is None


def test_the_flags_name_the_parsers_that_there_are() -> None:
    choices = {f: typing.cast(Any, ServerConfig).__dataclass_fields__[f].metadata["choices"] for f in
               ("tool_call_parser", "reasoning_parser")}  # fmt: skip

    assert choices == {"tool_call_parser": tuple(TOOL_PARSERS), "reasoning_parser": tuple(REASONING_PARSERS)}
