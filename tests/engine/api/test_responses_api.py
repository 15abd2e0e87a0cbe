"""/v1/responses with the official openai client, and the conversions behind it by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from octavo_engine.api.protocol import parse_body
from octavo_engine.api.responses.protocol import ResponsesRequest, chat_request

TEMPLATE = "{{ messages[-1].content }}{% if tools %}{{ '\n' * tools|length }}{% endif %}"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 漢"}}\n</tool_call>'
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}]
PATH = "/v1/responses"


@pytest.fixture(scope="module")
def tooled(start_shared: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    template = tmp_path_factory.mktemp("responses") / "template.jinja"
    template.write_text(TEMPLATE)
    flags = ("--enable-auto-tool-choice", "--tool-call-parser=hermes", "--reasoning-parser=qwen3")
    return start_shared(f"--chat-template={template}", *flags)


@pytest.fixture
def client(tooled: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=tooled.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_response(client) -> None:
    answer = client.responses.create(model="tiny", input="Hello 漢字", instructions="Be brief.", metadata={"a": "b"})

    size = len("Hello 漢字".encode())
    assert answer.output_text == "Hello 漢字"
    assert (answer.status, answer.error, answer.metadata) == ("completed", None, {"a": "b"})
    assert answer.usage.input_tokens == size
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (size + 1, 2 * size + 1)


def test_a_response_cut_by_its_length_is_incomplete(client) -> None:
    answer = client.responses.create(model="tiny", input="abcdef", max_output_tokens=3)

    assert (answer.output_text, answer.status) == ("abc", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_message_and_calls_are_items_of_their_own(client, stream) -> None:
    text = f"<think>\nHm.\n</think>\n\nI look.{CALL}{CALL}"
    if stream:
        with client.responses.stream(model="tiny", input=text, tools=TOOLS) as events:
            for _ in events:
                pass
            answer = events.get_final_response()
    else:
        answer = client.responses.create(model="tiny", input=text, tools=TOOLS)

    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    assert answer.output[0].content[0].text.strip() == "Hm."
    assert answer.output_text.strip() == "I look."
    assert [json.loads(item.arguments) for item in answer.output[2:]] == [{"city": "Zürich 漢"}] * 2
    assert len({item.id for item in answer.output}) == 4
    assert answer.output[2].call_id != answer.output[3].call_id
    assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens


@pytest.mark.parametrize("asked", [{"summary": "auto"}, {"summary": "detailed"}, {"generate_summary": "auto"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_summary_of_the_thinking_is_the_thinking(client, asked, stream) -> None:
    request = {"model": "tiny", "input": "<think>\nHm, so.\n</think>\n\nYes.", "reasoning": asked}
    said, kinds = "", []
    if stream:
        with client.responses.stream(**request) as events:
            for event in events:
                kinds.append(event.type)
                if event.type == "response.reasoning_summary_text.delta":
                    said += event.delta
            answer = events.get_final_response()
    else:
        answer = client.responses.create(**request)

    thinking, message = answer.output
    assert [part.text.strip() for part in thinking.summary] == ["Hm, so."]
    assert thinking.content[0].text == thinking.summary[0].text
    assert message.content[0].text.strip() == "Yes."
    assert answer.reasoning.summary == next(iter(asked.values()))
    if stream:
        assert said == thinking.summary[0].text
        about = [kind.removeprefix("response.reasoning_summary_") for kind in kinds if "summary" in kind]
        assert about[0] == "part.added"
        assert about[-2:] == ["text.done", "part.done"]
        assert set(about[1:-2]) == {"text.delta"}


def test_without_being_asked_for_there_is_no_summary(client) -> None:
    answer = client.responses.create(model="tiny", input="<think>\nHm.\n</think>\n\nYes.", reasoning={"effort": "low"})

    assert answer.output[0].summary == []
    assert answer.reasoning.summary is None


def test_a_summary_alone_is_taken_back_as_the_thinking() -> None:
    """Clients that show summaries keep nothing else."""
    items = [
        {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}], "content": None},
        {"type": "message", "role": "assistant", "content": "ok"},
        {"role": "user", "content": "c"},
    ]

    assert converted(input=items)["messages"][0] == {"role": "assistant", "content": "ok", "reasoning": "hm"}


def test_events_are_numbered_and_tell_the_text_piece_by_piece(client) -> None:
    events = list(client.responses.create(model="tiny", input="Hello 漢字", stream=True))
    kinds = [event.type for event in events]

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == events[-4].text == "Hello 漢字"
    assert {event.item_id for event in deltas} == {events[-1].response.output[0].id}


async def test_an_asynchronous_stream_that_fails_says_so(tooled) -> None:
    async with openai.AsyncOpenAI(base_url=tooled.url + "/v1", api_key="none", max_retries=0) as client:
        events = [event async for event in await client.responses.create(model="tiny", input="!late ab", stream=True)]

    assert events[-1].type == "response.failed"
    assert "not finite" in events[-1].response.error.message


def test_log_probabilities_come_with_the_text(client) -> None:
    answer = client.responses.create(
        model="tiny", input="cat", include=["message.output_text.logprobs"], top_logprobs=1, max_output_tokens=2
    )

    tokens = answer.output[0].content[0].logprobs
    assert [token.token for token in tokens] == ["c", "a"]
    assert tokens[0].top_logprobs[0].token == "b"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"), ({"truncation": "auto"}, "truncation"), ({"prompt": {}}, "prompt"),
        ({"include": ["file_search_call.results"]}, "include"), ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"), ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"), ({"temperature": 3}, "temperature"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"), ({"input": []}, "body.input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"), ({"input": 5}, "body.input"),
        ({"input": "ab" * 1000}, "input"), ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
        ({"reasoning": {"generate_summary": "short"}}, "reasoning.generate_summary"),
        ({"previous_input_messages": []}, "previous_input_messages"),
        ({"enable_response_messages": True}, "enable_response_messages"),
    ],
)  # fmt: skip
async def test_what_cannot_be_honoured_is_refused_and_the_next_is_answered(tooled, http, fields, param) -> None:
    async with http.post(tooled.url + PATH, json={"input": "Hi", **fields}) as response:
        status, body = response.status, await response.json()
    async with http.post(tooled.url + PATH, json={"input": "Hi"}) as response:
        after = await response.json()

    assert status == 400
    assert body["error"]["param"].startswith(param), body
    assert after["output"][0]["content"][0]["text"] == "Hi"


def converted(**fields: Any) -> dict[str, Any]:
    request = chat_request(parse_body(ResponsesRequest, json.dumps({"input": "x", **fields}).encode()))
    return request.model_dump(exclude_none=True)


def test_a_conversation_with_tools_becomes_chat_messages_in_order() -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok", "annotations": []}]},
        {"role": "user", "content": "c"},
    ]
    chat = converted(input=items, instructions="Be brief.", tools=TOOLS, max_output_tokens=7)

    function = {"name": "weather", "arguments": "{}"}
    assert chat["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "reasoning": "hm", "tool_calls": [
            {"id": "c1", "type": "function", "function": function},
            {"id": "c2", "type": "function", "function": {**function, "arguments": ""}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "c"},
    ]  # fmt: skip
    assert chat["max_completion_tokens"] == 7
    assert chat["tools"] == [
        {"type": "function", "function": {"name": "weather", "parameters": TOOLS[0]["parameters"]}}
    ]
