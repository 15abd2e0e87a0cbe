"""The clients that people use, with their usual calls, against the real engine and model.

Greedy answers of SmolLM2: what is asked has one right beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "The capital of France is"
NAME = "tiny"


@pytest.fixture(scope="module")
def url(start_real: Any) -> str:
    flags = ("--kv-cache-memory-bytes=256M", "--max-num-seqs=16", "--api-key=secret")
    server = start_real(*flags, ready=False)
    return str(server.wait_ready(60).url)


# ---- openai


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_openai_chats(client) -> None:
    answer = client.chat.completions.create(model=NAME, messages=QUESTION, temperature=0, max_tokens=12, seed=1)
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=QUESTION, temperature=0, max_tokens=12, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip

    text = answer.choices[0].message.content
    assert "Paris" in text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == answer.usage


def test_openai_streams_with_its_own_helper(client) -> None:
    with client.chat.completions.stream(model=NAME, messages=QUESTION, temperature=0, max_tokens=12) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()

    assert "Paris" in final.choices[0].message.content
    assert "".join(deltas) == final.choices[0].message.content


def test_openai_completes_and_scores(client) -> None:
    answer = client.completions.create(
        model=NAME, prompt=[TEXT, "2, 4, 6,"], max_tokens=4, temperature=0, echo=True, logprobs=2,
        extra_body={"top_k": 5, "min_p": 0.0, "repetition_penalty": 1.0},
    )  # fmt: skip

    assert answer.choices[0].text.startswith(TEXT + " Paris")
    assert answer.choices[1].text.startswith("2, 4, 6, 8")
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    (scored,) = client.completions.create(model=NAME, prompt=TEXT, max_tokens=0, echo=True, logprobs=0).choices
    assert scored.text == TEXT
    assert scored.logprobs.token_logprobs == pytest.approx(
        logprobs.token_logprobs[: len(scored.logprobs.tokens)], abs=0.2
    )


def test_openai_responds(client) -> None:
    answer = client.responses.create(model=NAME, input="What is the capital of France?", temperature=0)
    with client.responses.stream(model=NAME, input=QUESTION, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")

    assert "Paris" in answer.output_text
    assert text == answer.output_text
    assert answer.status == "completed"


def test_openai_lists_models_and_reads_errors(client, url) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=QUESTION, temperature=5)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    wrong = openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


async def test_openai_works_asynchronously(url) -> None:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="secret", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model=NAME, messages=QUESTION, max_tokens=12, n=2, temperature=1, seed=5, logprobs=True, top_logprobs=2
        )
        stream = await client.completions.create(model=NAME, prompt=TEXT, max_tokens=6, temperature=0, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])

    assert len(answer.choices) == 2
    assert all(len(token.top_logprobs) == 2 for token in answer.choices[1].logprobs.content)
    assert text.startswith(" Paris")


# ---- litellm


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    # Its tables of prices, and who uses it how, are not to be fetched or told.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    litellm.telemetry = False
    return litellm


# litellm warns of its own models, and leaves sessions to the garbage collector.
quiet = pytest.mark.filterwarnings("ignore")


@quiet
def test_litellm_calls_it_as_a_hosted_vllm(litellm, url) -> None:
    given = {"model": f"hosted_vllm/{NAME}", "api_base": url + "/v1", "api_key": "secret", "temperature": 0}
    answer = litellm.completion(**given, messages=QUESTION, max_tokens=12)
    streamed = litellm.completion(**given, messages=QUESTION, max_tokens=12, stream=True)
    text = litellm.text_completion(**given, prompt=TEXT, max_tokens=4)

    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer.choices[0].message.content
    assert text.choices[0].text.startswith(" Paris")


@quiet
async def test_litellm_calls_it_asynchronously_and_knows_its_errors(litellm, url) -> None:
    given = {"model": f"hosted_vllm/{NAME}", "api_base": url + "/v1", "api_key": "secret", "num_retries": 0}
    stream = await litellm.acompletion(**given, messages=QUESTION, max_tokens=12, temperature=0, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert "Paris" in text
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        await litellm.acompletion(**given, messages=QUESTION, temperature=7)


# ---- langchain


def test_langchain_invokes_streams_and_batches(url) -> None:
    from langchain_openai import ChatOpenAI, OpenAI

    chat = ChatOpenAI(model=NAME, base_url=url + "/v1", api_key="secret", temperature=0, max_tokens=12, max_retries=0)
    answer = chat.invoke("What is the capital of France?")

    assert "Paris" in answer.content
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("What is the capital of France?")) == answer.content
    assert [one.content for one in chat.batch(["What is the capital of France?"] * 3)] == [answer.content] * 3
    text = OpenAI(model=NAME, base_url=url + "/v1", api_key="secret", temperature=0, max_tokens=4, max_retries=0)
    assert text.invoke(TEXT).startswith(" Paris")


async def test_langchain_works_asynchronously(url) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=NAME, base_url=url + "/v1", api_key="secret", temperature=0, max_tokens=12, max_retries=0)

    assert "Paris" in (await chat.ainvoke(QUESTION)).content
    assert "Paris" in "".join([chunk.content async for chunk in chat.astream(QUESTION)])


# ---- anthropic


def test_anthropic_creates_streams_and_counts(url) -> None:
    body: Any = {"model": NAME, "messages": QUESTION, "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
        answer = client.messages.create(**body, max_tokens=12)
        with client.messages.stream(**body, max_tokens=12) as stream:
            text = "".join(stream.text_stream)
        count = client.messages.count_tokens(model=NAME, messages=QUESTION, system="Be brief.")
        prefilled = client.messages.create(
            **{**body, "messages": [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]},
            max_tokens=3,
        )

    assert "Paris" in answer.content[0].text
    assert text == answer.content[0].text
    assert count.input_tokens > 10
    assert prefilled.content[0].text.startswith(" Paris")


async def test_anthropic_works_asynchronously(url) -> None:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="secret", max_retries=0) as client:
        body: Any = {"model": NAME, "messages": QUESTION, "max_tokens": 12, "extra_body": {"temperature": 0}}
        answer = await client.messages.create(**body)
        events = [event async for event in await client.messages.create(**body, stream=True)]

    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert "Paris" in text
    assert text == answer.content[0].text
