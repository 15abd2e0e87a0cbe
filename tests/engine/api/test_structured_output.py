"""Structured output over HTTP, from the real engine and model: forms hold, refusals are clear, nobody is held up."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import aiohttp
import openai
import pytest

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
FLAGS = ["--reasoning-parser=qwen3", "--enable-auto-tool-choice", "--tool-call-parser=hermes"]
MESSAGES: Any = [{"role": "user", "content": "Describe a person as JSON: name, age, colour."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colour": {"enum": ["red", "blue"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}  # fmt: skip
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


@pytest.fixture(scope="module")
def real_server(start_real: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("torch")
    template = tmp_path_factory.mktemp("template") / "chatml.jinja"
    template.write_text(TEMPLATE)
    return start_real("--kv-cache-memory-bytes=256M", "--max-num-seqs=32", f"--chat-template={template}", *FLAGS)


@pytest.fixture(scope="module")
def client(real_server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=real_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, **asked: Any) -> Any:
    asked = {"temperature": 0, "max_tokens": 100, "model": "tiny", "messages": MESSAGES, **asked}
    return client.chat.completions.create(**asked)


def holds(text: str) -> bool:
    person = json.loads(text)
    return (
        set(person) == {"name", "age", "colour"} and 0 <= person["age"] <= 150 and person["colour"] in ("red", "blue")
    )


def test_an_answer_keeps_to_its_json_schema_whole_and_streamed(client) -> None:
    whole = create(client, response_format=SCHEMA).choices[0]
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in create(client, response_format=SCHEMA, stream=True)
    )

    assert holds(whole.message.content)
    assert whole.finish_reason == "stop"
    assert streamed == whole.message.content


def test_drawn_answers_keep_to_it_too_and_differ(client) -> None:
    answer = create(client, response_format=SCHEMA, n=4, temperature=1.5, seed=5, max_tokens=200)

    texts = [choice.message.content for choice in answer.choices]
    assert all(map(holds, texts))
    assert len(set(texts)) > 1


def test_the_openai_clients_own_parsing_works(client) -> None:
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Person, temperature=0, max_tokens=100
    )

    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2,4}!"}}, r"[0-9]{3}-[a-f]{2,4}!"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9] "b"'}}, "a[0-9]b"),
        ({"guided_regex": "x{3}"}, "xxx"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'start: "up" | "down"'}, "up|down"),
    ],
)
def test_vllms_names_and_the_older_ones_hold_too(client, body, pattern) -> None:
    text = create(client, extra_body=body).choices[0].message.content

    assert re.fullmatch(pattern, text), text


def test_any_json_object_will_do_where_only_that_is_asked(client) -> None:
    for body in ({"response_format": {"type": "json_object"}}, {"guided_json": {"type": "object"}}):
        answer = create(client, extra_body=body, max_tokens=300).choices[0]
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.message.content), dict)
        else:  # cut off, and so far the beginning of one
            assert answer.message.content.startswith("{")


def test_completions_keep_to_a_form_as_well(client) -> None:
    answer = client.completions.create(
        model="tiny", prompt="One, two,", max_tokens=20, extra_body={"structured_outputs": {"regex": " [a-z]+,"}}
    )

    assert re.fullmatch(" [a-z]+,", answer.choices[0].text)


def test_a_form_goes_with_penalties_biases_and_logprobs(client) -> None:
    answer = create(
        client, extra_body={"structured_outputs": {"regex": "[ab]{6}"}}, frequency_penalty=1.5, logprobs=True,
        top_logprobs=2,
    ).choices[0]  # fmt: skip

    assert re.fullmatch("[ab]{6}", answer.message.content)
    # What the model itself thought of them: some of the forced tokens were not its choice.
    assert min(token.logprob for token in answer.logprobs.content) < -1


def test_min_tokens_and_ignore_eos_do_not_carry_an_answer_beyond_its_form(client) -> None:
    body = {"structured_outputs": {"choice": ["yes"]}, "min_tokens": 20, "ignore_eos": True}

    answer = create(client, extra_body=body).choices[0]

    assert (answer.message.content, answer.finish_reason) == ("yes", "stop")


REFUSED = [
    ({"response_format": {"type": "json_schema"}}, "response_format", "name and schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "zap"}}}},
     "response_format", "Invalid type: zap"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "1 to 1000"),
    ({"structured_outputs": {"json": ""}}, "structured_outputs", "must not be empty"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", "must be true"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", "unknown name"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "response_format", "one form"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "said"), REFUSED)
def test_what_has_no_form_is_refused_in_words_and_the_next_request_served(client, body, param, said) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, extra_body=body)

    assert refused.value.param == param
    assert said in refused.value.message
    assert create(client, max_tokens=1).choices[0].finish_reason == "length"


async def test_others_stream_on_beside_forms_and_all_of_them_hold(real_server) -> None:
    async def ask(http: aiohttp.ClientSession, **asked: Any) -> str:
        body = {"model": "tiny", "messages": MESSAGES, "temperature": 1, "max_tokens": 150, **asked}
        async with http.post(real_server.url + "/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            return str((await answer.json())["choices"][0]["message"]["content"])

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
        forms = [ask(http, response_format=SCHEMA, seed=i) for i in range(12)]
        free = [ask(http, seed=i, max_tokens=40, ignore_eos=True) for i in range(6)]
        answers = await asyncio.gather(*forms, *free)

    assert all(map(holds, answers[:12]))
    assert all(answers[12:])
    real_server.wait_idle()


async def test_hanging_up_in_the_middle_of_a_form_leaves_nothing_behind(real_server) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 400, "structured_outputs": {"regex": "[a-z ]+"}}
    async with aiohttp.ClientSession() as http:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(http.post(real_server.url + "/v1/chat/completions", json=body), 0.3)

    real_server.wait_idle()


# ---- tools

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object", "required": ["city", "days"], "additionalProperties": False,
                "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [1, 2, 3]}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
STRICT: Any = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def check_calls(calls: Any, names: set[str]) -> None:
    assert calls
    for call in calls:
        arguments = json.loads(call.function.arguments)
        assert call.function.name in names
        if call.function.name == "get_weather":
            assert set(arguments) == {"city", "days"}
            assert arguments["days"] in (1, 2, 3)
        else:
            assert arguments == {}


def test_a_required_tool_is_called_with_arguments_of_its_schema(client) -> None:
    for seed in range(4):
        choice = create(
            client, tools=TOOLS, tool_choice="required", temperature=1.2, seed=seed, parallel_tool_calls=False
        ).choices[0]

        check_calls(choice.message.tool_calls, {"get_weather", "now"})
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert len(choice.message.tool_calls) == 1


def test_a_named_tool_is_the_one_that_is_called(client) -> None:
    choice = create(client, tools=TOOLS, tool_choice=NAMED).choices[0]

    check_calls(choice.message.tool_calls, {"get_weather"})
    assert choice.finish_reason == "stop"


def test_a_demanded_call_is_streamed_like_one_that_the_model_decided_on(client) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, tools=STRICT, tool_choice=NAMED, temperature=0, max_tokens=100
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message

    check_calls(message.tool_calls, {"get_weather"})


def test_strict_tools_leave_the_model_free_to_answer(client) -> None:
    choice = create(client, tools=STRICT, max_tokens=10).choices[0]

    assert choice.message.content


def test_a_form_and_tools_that_the_model_may_call_go_together(client) -> None:
    choice = create(client, tools=TOOLS, response_format=SCHEMA).choices[0]

    assert bool(choice.message.tool_calls) or holds(choice.message.content)


# ---- the other APIs


WEATHER = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}


def test_responses_keep_to_a_form_and_call_the_tools_that_they_must(client) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
    formed = client.responses.create(model="tiny", input=MESSAGES, text=text, temperature=0, max_output_tokens=100)
    tools: Any = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": False}]
    for choice in ("required", {"type": "function", "name": "weather"}):
        called = client.responses.create(
            model="tiny", input="What is the weather in Paris?", tools=tools, tool_choice=choice, temperature=0
        )
        calls = [item for item in called.output if item.type == "function_call"]
        assert calls
        assert calls[0].name == "weather"
        assert isinstance(json.loads(calls[0].arguments)["city"], str)

    assert holds(formed.output_text)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input="x", text={"format": {"type": "json_schema", "name": "x"}})
    assert caught.value.param == "text.format"


def test_anthropics_messages_call_the_tools_that_they_must(real_server) -> None:
    import anthropic

    tools: Any = [{"name": "weather", "input_schema": WEATHER}]
    with anthropic.Anthropic(base_url=real_server.url, api_key="none", max_retries=0) as client:
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            body: Any = {"model": "tiny", "max_tokens": 200, "tools": tools, "tool_choice": choice}
            body["messages"] = [{"role": "user", "content": "What is the weather in Paris?"}]
            answer = client.messages.create(**body, extra_body={"temperature": 0})
            with client.messages.stream(**body, extra_body={"temperature": 0}) as stream:
                streamed = stream.get_final_message()

            assert answer.stop_reason == "tool_use"
            (call,) = [block for block in answer.content if block.type == "tool_use"][:1]
            assert call.name == "weather"
            assert isinstance(call.input["city"], str)
            assert [block.type for block in streamed.content] == [block.type for block in answer.content]
            assert streamed.stop_reason == "tool_use"
