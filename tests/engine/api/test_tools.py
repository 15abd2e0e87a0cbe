"""Tools and reasoning over HTTP: what reaches the template, and what the official client reads of the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from octavo_engine.api.anthropic.writer import _object
from octavo_engine.api.chat_template import ChatTemplate
from octavo_engine.api.errors import ApiError
from octavo_engine.api.protocol import ChatRequest
from octavo_engine.api.served_model import ServedModel
from octavo_engine.api.tokenizer import GenerationDefaults, Tokenizer
from octavo_engine.config import ArgumentParser, ConfigError, ServerConfig, add_arguments, from_namespace

# The scripted engine says the prompt again: what the last message holds is the model's answer.
TEMPLATE = (
    "{% for m in messages if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}:"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %} {% endfor %}{% endfor %}"
    "{{ messages[-1].content }}{% if tools %}{{ '\n' * tools|length }}{% endif %}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 漢"}}\n</tool_call>'
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "now"}},
]
AUTO = ("--enable-auto-tool-choice", "--tool-call-parser=hermes", "--reasoning-parser=qwen3")


@pytest.fixture(scope="module")
def tooled(start_shared: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    template = tmp_path_factory.mktemp("tools") / "template.jinja"
    template.write_text(TEMPLATE)
    return start_shared(f"--chat-template={template}", *AUTO)


@pytest.fixture
def client(tooled) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=tooled.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def says(text: str) -> Any:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}]}


def test_the_client_reads_calls_of_a_whole_answer(client) -> None:
    answer = client.chat.completions.create(**says(f"I look.\n{CALL}\n{CALL}"), tools=TOOLS)

    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    assert [json.loads(c.function.arguments) for c in choice.message.tool_calls] == [{"city": "Zürich 漢"}] * 2
    assert {c.function.name for c in choice.message.tool_calls} == {"weather"}
    assert len({c.id for c in choice.message.tool_calls}) == 2


def test_what_tool_parsers_find_is_counted(client, tooled) -> None:
    def counts() -> dict[tuple[str, str], float]:
        name = "vllm:tool_call_parser_invocations_total"
        return {
            (mode, outcome): tooled.metric(name, mode=mode, outcome=outcome, request_type="chat_completions")
            for mode in ("streaming", "non_streaming")
            for outcome in ("tool_call", "no_tool_call")
        }

    before = counts()
    client.chat.completions.create(**says(CALL), tools=TOOLS, n=2)
    client.chat.completions.create(**says("No call."), tools=TOOLS)
    list(client.chat.completions.create(**says(CALL), tools=TOOLS, stream=True))
    client.chat.completions.create(**says(CALL))

    assert {key: value - before[key] for key, value in counts().items()} == {
        ("non_streaming", "tool_call"): 2, ("non_streaming", "no_tool_call"): 1,
        ("streaming", "tool_call"): 1, ("streaming", "no_tool_call"): 0,
    }  # fmt: skip


def test_content_is_null_beside_calls_alone_and_one_call_is_given_where_one_is_wanted(client) -> None:
    answer = client.chat.completions.create(**says(CALL + CALL), tools=TOOLS, parallel_tool_calls=False)

    assert answer.choices[0].message.content is None
    assert len(answer.choices[0].message.tool_calls) == 1


def test_the_client_reads_calls_of_a_stream(client) -> None:
    text = f"<think>\nHm.\n</think>\n\nI look.\n{CALL}\n{CALL}"
    with client.chat.completions.stream(**says(text), tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    chunks = [event.chunk for event in events if event.type == "chunk"]

    message = final.choices[0].message
    assert final.choices[0].finish_reason == "tool_calls"
    assert message.content == "I look."
    assert [json.loads(c.function.arguments) for c in message.tool_calls] == [{"city": "Zürich 漢"}] * 2
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert [(call.index, call.type, call.function.name) for call in deltas if call.id] == [
        (0, "function", "weather"), (1, "function", "weather"),
    ]  # fmt: skip
    assert all(call.function.name is None for call in deltas if not call.id)
    reasoning = "".join(getattr(c.delta, "reasoning", None) or "" for chunk in chunks for c in chunk.choices)
    assert reasoning == "Hm."


def test_reasoning_is_a_field_of_its_own_and_can_be_left_out(client) -> None:
    text = "<think>\nHm.\n</think>\n\nHello."
    given = client.chat.completions.create(**says(text))
    left_out = client.chat.completions.create(**says(text), extra_body={"include_reasoning": False})

    assert (given.choices[0].message.reasoning, given.choices[0].message.content) == ("Hm.", "Hello.")
    assert given.choices[0].finish_reason == "stop"
    assert left_out.choices[0].message.content == "Hello."
    assert not hasattr(left_out.choices[0].message, "reasoning")


def test_a_call_that_was_cut_by_the_length_is_content(client) -> None:
    answer = client.chat.completions.create(**says(CALL), tools=TOOLS, max_tokens=20)

    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("length", CALL[:20])
    assert answer.choices[0].message.tool_calls is None


def test_nothing_is_looked_for_where_no_call_is_allowed(client) -> None:
    without = client.chat.completions.create(**says(CALL))
    none = client.chat.completions.create(**says(CALL), tools=TOOLS, tool_choice="none")

    assert without.choices[0].message.content == CALL
    assert none.choices[0].message.content == CALL + "\n\n"
    assert none.choices[0].finish_reason == "stop"


def test_arguments_are_streamed_as_they_are_written(client) -> None:
    chunks = list(client.chat.completions.create(**says(CALL + CALL), tools=TOOLS, stream=True))

    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    for index in (0, 1):
        arguments = [call.function.arguments for call in deltas if call.index == index and call.function.arguments]
        assert len(arguments) > 5
        assert json.loads("".join(arguments)) == {"city": "Zürich 漢"}
    assert [call.function.name for call in deltas if call.id] == ["weather", "weather"]


def test_a_call_that_was_cut_off_comes_as_far_as_it_came(client) -> None:
    answer = client.chat.completions.create(**says(CALL), tools=TOOLS, max_tokens=60).choices[0]

    assert answer.finish_reason == "length"
    assert answer.message.tool_calls[0].function.arguments.startswith('{"ci')
    assert _object(answer.message.tool_calls[0].function.arguments) == {}


def test_each_of_several_choices_has_its_own_calls(client) -> None:
    answer = client.chat.completions.create(**says(CALL), tools=TOOLS, n=3)

    assert [len(choice.message.tool_calls) for choice in answer.choices] == [1, 1, 1]
    assert len({choice.message.tool_calls[0].id for choice in answer.choices}) == 3


def test_earlier_calls_reach_the_template_as_objects(client) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    empty = {"id": "2", "type": "function", "function": {"name": "now", "arguments": ""}}
    messages: Any = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call, empty], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "Rain."}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS)

    assert answer.choices[0].message.content == "weather:city=Paris now: Rain.\n\n"


REFUSED = [
    ({"tools": []}, "tools", "must not be empty"),
    ({"tools": [{"type": "function"}]}, "body.tools.0.function", "required"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "zap"}}}]},
        "tools", "Invalid type: zap",
    ),
    ({"tool_choice": "auto"}, "tool_choice", "`tools` must be set"),
    ({"tool_choice": "required"}, "tool_choice", "`tools` must be set"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no tool 'x'"),
    ({"messages": [{"role": "tool"}]}, "messages.0.content", "what the tool answered"),
    ({"messages": [{"role": "user", "tool_calls": [{}]}]}, "messages.0.tool_calls", "only the assistant"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls.0", "must be"),
    *(
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]},
            "messages.0.tool_calls.0.function.arguments",
            "JSON object",
        )
        for arguments in ("{", "[1]", 3, "[" * 5000)
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
async def test_what_cannot_be_honoured_is_refused_and_the_next_is_answered(tooled, http, fields, param, words) -> None:
    async with http.post(tooled.url + "/v1/chat/completions", json={**says("Hi"), **fields}) as answer:
        status, body = answer.status, await answer.json()
    async with http.post(tooled.url + "/v1/chat/completions", json=says("Hi")) as after:
        assert after.status == 200

    assert (status, body["error"]["param"]) == (400, param), body
    assert words in body["error"]["message"]


@pytest.mark.parametrize("choice", ["auto", None])
async def test_auto_without_the_flags_is_refused_in_the_words_that_clients_know(server, http, choice) -> None:
    request = {**says("Hi"), "tools": TOOLS, "tool_choice": choice, "include_reasoning": None}
    async with http.post(server.url + "/v1/chat/completions", json=request) as answer:
        error = (await answer.json())["error"]

    assert (answer.status, error["param"]) == (400, "tool_choice")
    words = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    assert error["message"] == words


async def test_without_a_parser_there_is_no_reasoning_to_leave_out(server, http) -> None:
    async with http.post(
        server.url + "/v1/chat/completions", json={**says("Hi"), "include_reasoning": False}
    ) as answer:
        body = await answer.json()

    assert answer.status == 200, body
    assert "Hi" in body["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS},
        {"messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}]},
            {"role": "tool", "content": "noon"},
        ]},
    ],
)  # fmt: skip
def test_a_real_template_that_knows_no_tools_is_refused_by_name(smollm2_tokenizer: Path, fields: Any) -> None:
    tokenizer = Tokenizer.load(smollm2_tokenizer)
    template = ChatTemplate.load(smollm2_tokenizer, tokenizer.special_tokens)
    model = ServedModel(("m",), "m", tokenizer, template, GenerationDefaults(), max_model_len=8192, created=0)
    request = ChatRequest.model_validate({**says("Hi"), **fields})

    with pytest.raises(ApiError, match="chat template knows no tools") as refused:
        model.chat_prompt(request)
    assert refused.value.status == 400


async def test_tokenize_counts_the_tools_too(tooled, http) -> None:
    async def count(**fields: Any) -> int:
        async with http.post(tooled.url + "/tokenize", json={**says("Hi"), **fields}) as answer:
            return int((await answer.json())["count"])

    assert await count(tools=TOOLS) == await count() + 2


def test_auto_tool_choice_needs_a_parser_and_a_parser_must_be_known() -> None:
    parser = ArgumentParser(prog="octavo serve")
    add_arguments(parser, [ServerConfig])

    with pytest.raises(ConfigError, match="--tool-call-parser beside it"):
        from_namespace(ServerConfig, parser.parse_args(["--enable-auto-tool-choice"]))
    with pytest.raises(ConfigError, match="hermes, llama3_json"):
        from_namespace(ServerConfig, parser.parse_args(["--tool_call_parser=x"]))
