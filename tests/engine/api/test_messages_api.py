"""/v1/messages with the official anthropic client, and the conversions behind it by themselves.

The scripted engine says its prompt again, and the template shows the last message alone: so a message's text is the
answer to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from octavo_engine.api.anthropic.protocol import MessagesRequest, chat_request
from octavo_engine.api.errors import ApiError
from octavo_engine.api.protocol import parse_body

TEMPLATE = "{{ messages[-1].content }}{% if tools %}{{ '\n' * tools|length }}{% endif %}"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 漢"}}\n</tool_call>'
TOOLS: Any = [{"name": "weather", "description": "The weather.", "input_schema": {"type": "object", "properties": {}}}]
PATH = "/v1/messages"


@pytest.fixture(scope="module")
def tooled(start_shared: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    template = tmp_path_factory.mktemp("messages") / "template.jinja"
    template.write_text(TEMPLATE)
    flags = ("--enable-auto-tool-choice", "--tool-call-parser=hermes", "--reasoning-parser=qwen3", "--api-key=secret")
    return start_shared(f"--chat-template={template}", *flags)


@pytest.fixture
def client(tooled: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=tooled.url, api_key="secret", max_retries=0) as client:
        yield client


def says(text: str) -> Any:
    return {"model": "tiny", "max_tokens": 400, "messages": [{"role": "user", "content": text}]}


def test_a_message_is_answered(client) -> None:
    answer = client.messages.create(**says("Hello 漢字"))

    assert answer.content[0].type == "text"
    assert answer.content[0].text == "Hello 漢字"
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    assert answer.usage.input_tokens == len("Hello 漢字".encode())
    assert answer.usage.output_tokens == answer.usage.input_tokens + 1
    assert answer.id.startswith("msg_")


def test_a_stream_gathers_to_the_whole_message(client) -> None:
    with client.messages.stream(**says("Hello 漢字, how are you?")) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()

    assert text == final.content[0].text == "Hello 漢字, how are you?"
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", final.usage.input_tokens + 1)


async def test_an_asynchronous_stream(tooled) -> None:
    async with anthropic.AsyncAnthropic(base_url=tooled.url, api_key="secret") as client:
        kinds = [event.type async for event in await client.messages.create(**says("Hi"), stream=True)]

    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_text_and_tool_use_are_blocks_of_their_own(client, stream) -> None:
    request = says(f"<think>\nHm.\n</think>\n\nI look.{CALL}{CALL}")
    if stream:
        with client.messages.stream(**request, tools=TOOLS) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**request, tools=TOOLS)

    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert answer.content[0].thinking.strip() == "Hm."
    assert answer.content[1].text.strip() == "I look."
    assert answer.content[2].name == "weather"
    assert answer.content[2].input == answer.content[3].input == {"city": "Zürich 漢"}
    assert answer.content[2].id != answer.content[3].id
    assert answer.stop_reason == "tool_use"


def test_the_reasons_of_an_end_have_anthropics_names(client) -> None:
    stopped = client.messages.create(**says("abcdef"), stop_sequences=["de"])
    cut = client.messages.create(**{**says("abcdef"), "max_tokens": 3})
    with client.messages.stream(**says("abcdef"), stop_sequences=["de"]) as stream:
        streamed = stream.get_final_message()

    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("abc", "stop_sequence", "de")
    assert (streamed.content[0].text, streamed.stop_reason, streamed.stop_sequence) == ("abc", "stop_sequence", "de")
    assert (cut.content[0].text, cut.stop_reason) == ("abc", "max_tokens")


def test_tokens_are_counted_with_the_tools(client) -> None:
    body = {key: value for key, value in says("abc").items() if key != "max_tokens"}

    assert client.messages.count_tokens(**body).input_tokens == 3
    assert client.messages.count_tokens(**body, tools=TOOLS).input_tokens == 4


def test_errors_become_the_clients_own_types(client, tooled) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**says("x"), "model": "other"})
    with pytest.raises(anthropic.BadRequestError, match="temperature") as caught:
        client.messages.create(**says("x"), extra_body={"temperature": 3.0})
    wrong = anthropic.Anthropic(base_url=tooled.url, api_key="wrong", max_retries=0)
    with wrong, pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(**says("x"))
    with pytest.raises(anthropic.APIError, match="not finite"):
        list(client.messages.create(**says("!late ab"), stream=True))

    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert client.messages.create(**says("Hi")).content[0].text == "Hi"


def test_a_key_may_come_as_a_bearer_too(tooled) -> None:
    with anthropic.Anthropic(base_url=tooled.url, auth_token="secret", max_retries=0) as client:
        assert client.messages.create(**says("Hi")).content[0].text == "Hi"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"), ({"container": "x"}, "container"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "budget_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ({"tool_choice": {"type": "tool", "name": "nothing"}, "tools": TOOLS}, "nothing"),
        ({"tool_choice": {"type": "any"}}, "tool"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role"), ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"), ({"top_p": 2}, "top_p"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"tools": [{**TOOLS[0], "defer_loading": True}]}, "defer_loading"),
        ({"stop_sequences": [""]}, "stop"), ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)  # fmt: skip
async def test_what_cannot_be_honoured_is_refused_and_the_next_is_answered(tooled, http, fields, words) -> None:
    headers = {"x-api-key": "secret"}
    async with http.post(tooled.url + PATH, json={**says("Hi"), **fields}, headers=headers) as response:
        status, body = response.status, await response.json()
    async with http.post(tooled.url + PATH, json=says("Hi"), headers=headers) as response:
        after = await response.json()

    assert (status, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert words in body["error"]["message"]
    assert after["content"] == [{"type": "text", "text": "Hi"}]


def converted(**fields: Any) -> dict[str, Any]:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}], **fields}
    request = chat_request(parse_body(MessagesRequest, json.dumps(body).encode()))
    return request.model_dump(exclude_none=True)


def test_a_conversation_with_tools_becomes_chat_messages_in_order() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "let me see"},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
            {"type": "text", "text": "and tomorrow?", "cache_control": {"type": "ephemeral"}},
        ]},
    ]  # fmt: skip
    chat = converted(messages=messages, system=[{"type": "text", "text": "Be brief."}], tools=TOOLS)

    call = {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert chat["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "let me see", "reasoning": "hm",
         "tool_calls": [{"id": "t1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
        {"role": "user", "content": "and tomorrow?"},
    ]  # fmt: skip
    assert chat["tools"][0]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert "continue_final_message" not in chat


def test_words_put_into_the_models_mouth_are_continued() -> None:
    chat = converted(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "The answer is"}])

    assert (chat["continue_final_message"], chat["add_generation_prompt"]) == (True, False)


def test_choices_and_fields_of_chat_completions_are_passed_on() -> None:
    named = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    chat = converted(tools=TOOLS, tool_choice=named, seed=3, ignore_eos=True, thinking={"type": "disabled"})

    assert chat["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert (chat["parallel_tool_calls"], chat["seed"], chat["ignore_eos"]) == (False, 3, True)
    assert chat["chat_template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(ApiError, match="not supported"):
        converted(vllm_xargs={"a": 1})


@pytest.mark.parametrize("wrap", [lambda f: {"output_config": {"format": f}}, lambda f: {"output_format": f}])
def test_a_form_of_the_answer_is_that_of_chat_completions(wrap) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    chat = converted(**wrap({"type": "json_schema", "schema": schema}))

    assert chat["response_format"]["json_schema"]["schema"] == schema


def test_effort_and_strictness_are_passed_on() -> None:
    chat = converted(output_config={"effort": "high"}, tools=[{**TOOLS[0], "strict": True}])

    assert chat["reasoning_effort"] == "high"
    assert chat["tools"][0]["function"]["strict"] is True
