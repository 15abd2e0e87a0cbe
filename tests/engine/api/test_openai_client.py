"""The official openai package against the server."""

from __future__ import annotations

from typing import Any

import openai
import pytest

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(server) -> openai.OpenAI:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_completion(client) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=50)

    assert answer.choices[0].message.content == "<user>Hi<assistant>"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 39


def test_a_chat_stream(client) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, max_tokens=50, stream_options={"include_usage": True}
        )
    )

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "<user>Hi<assistant>"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


async def test_an_asynchronous_chat_stream(server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, max_tokens=50)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert text == "<user>Hi<assistant>"


def test_completions_and_models(client) -> None:
    answer = client.completions.create(model="tiny", prompt=["a", "b"], n=1)
    streamed = client.completions.create(model="tiny", prompt="abc", stream=True)

    assert [choice.text for choice in answer.choices] == ["a", "b"]
    assert "".join(chunk.choices[0].text for chunk in streamed) == "abc"
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_errors_become_the_clients_own_types(client) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(model="tiny", prompt=["abcdef", "!late"], stream=True))

    assert unknown.value.param == "model"
    assert refused.value.param == "temperature"
    assert refused.value.request_id
