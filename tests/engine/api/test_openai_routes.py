"""Generating routes, as a client sees them."""

from __future__ import annotations

import json
import re
from typing import Any

import aiohttp
import openai
import pytest


async def post(http: aiohttp.ClientSession, server: Any, path: str, **body: Any) -> tuple[int, Any]:
    async with http.post(server.url + path, json=body) as response:
        return response.status, await response.json()


async def chat(http: aiohttp.ClientSession, server: Any, text: str = "hello", **body: Any) -> tuple[int, Any]:
    return await post(http, server, "/v1/chat/completions", messages=[{"role": "user", "content": text}], **body)


async def complete(http: aiohttp.ClientSession, server: Any, prompt: Any = "hello", **body: Any) -> tuple[int, Any]:
    return await post(http, server, "/v1/completions", prompt=prompt, **body)


async def events(http: aiohttp.ClientSession, server: Any, path: str, **body: Any) -> list[Any]:
    """The stream's events, parsed; the last is the string [DONE]."""
    async with http.post(server.url + path, json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        raw = (await response.read()).decode()
    assert raw.endswith("\n\n")
    out: list[Any] = []
    for event in raw[:-2].split("\n\n"):
        data = event.removeprefix("data: ")
        out.append(data if data == "[DONE]" else json.loads(data))
    return out


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [c for chunk in chunks[:-1] for c in chunk.get("choices", []) if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


# ---- whole answers


async def test_a_chat_completion_has_the_shape_of_openais_schema(server, http) -> None:
    status, body = await chat(http, server, "Grüße 你好", max_tokens=200)

    assert status == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "<user>Grüße 你好<assistant>",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 31, "total_tokens": 63, "completion_tokens": 32},
        "system_fingerprint": "octavo-0.1.0",
    }


async def test_a_completion_defaults_to_sixteen_tokens(server, http) -> None:
    _, body = await complete(http, server, "abcdefghijklmnopqrstuvwxyz")

    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "abcdefghijklmnop"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 26, "total_tokens": 42, "completion_tokens": 16}


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), (["ab", "cd"], ["ab", "cd"]), ([65, 66], ["bc"]), ([[65], [66, 67]], ["b", "cd"])],
)
async def test_a_prompt_may_be_text_or_ids_one_or_many(server, http, prompt, texts) -> None:
    status, body = await complete(http, server, prompt)

    assert status == 200, body
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))


async def test_n_answers_to_each_prompt_are_numbered_prompt_by_prompt(server, http) -> None:
    _, body = await complete(http, server, ["ab", "cd"], n=2)

    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "ab"), (1, "ab"), (2, "cd"), (3, "cd")]
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 12


async def test_echo_puts_the_prompt_before_the_answer(server, http) -> None:
    _, body = await complete(http, server, "abc", echo=True, max_tokens=2)
    streamed = await events(http, server, "/v1/completions", prompt=[65, 66], echo=True, max_tokens=1)

    assert body["choices"][0]["text"] == "abcab"
    assert text_of(streamed) == "bcb"


async def test_a_stop_string_ends_the_answer_and_is_named(server, http) -> None:
    _, body = await complete(http, server, "one END two", stop=["END"], max_tokens=50)

    assert body["choices"][0]["text"] == "one "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["stop_reason"] == "END"
    assert body["usage"]["completion_tokens"] == 7
    server.wait_idle()


async def test_a_stop_token_is_named_and_the_end_of_text_is_not(server, http) -> None:
    _, chosen = await complete(http, server, [65, 66, 67], stop_token_ids=[66])
    _, natural = await complete(http, server, [65, 66, 67])

    assert (chosen["choices"][0]["text"], chosen["choices"][0]["stop_reason"]) == ("b", 66)
    assert (natural["choices"][0]["text"], natural["choices"][0]["stop_reason"]) == ("bcd", None)


async def test_special_tokens_show_only_when_asked_for(server, http) -> None:
    _, hidden = await complete(http, server, [65, 256, 66], ignore_eos=True, max_tokens=3)
    _, shown = await complete(http, server, [65, 256, 66], ignore_eos=True, max_tokens=3, skip_special_tokens=False)

    assert hidden["choices"][0]["text"] == "bc"
    assert shown["choices"][0]["text"] == "b<|end|>c"


async def test_max_tokens_beyond_the_room_left_is_cut_to_it(server, http) -> None:
    _, body = await complete(http, server, "a" * 500, max_tokens=400, ignore_eos=True)

    assert body["usage"]["total_tokens"] == 512


async def test_text_parts_are_joined_and_a_final_message_is_continued(server, http) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    _, joined = await post(
        http, server, "/v1/chat/completions", messages=[{"role": "user", "content": parts}], max_tokens=99
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so far "}]
    _, continued = await post(
        http, server, "/v1/chat/completions", messages=messages, continue_final_message=True, max_tokens=99
    )

    assert joined["choices"][0]["message"]["content"] == "<user>a\nb<assistant>"
    assert continued["choices"][0]["message"]["content"] == "<user>q<assistant>so far "


# ---- streams


async def test_a_chat_stream_opens_with_the_role_and_ends_with_the_reason_the_usage_and_done(server, http) -> None:
    chunks = await events(
        http, server, "/v1/chat/completions", messages=[{"role": "user", "content": "€"}], max_tokens=60,
        stream_options={"include_usage": True},
    )  # fmt: skip

    *deltas, final, usage, done = chunks
    assert done == "[DONE]"
    assert deltas[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert deltas[0]["object"] == "chat.completion.chunk"
    assert all("usage" not in chunk and "system_fingerprint" not in chunk for chunk in deltas)
    assert final["choices"][0]["finish_reason"] == "stop"
    assert final["choices"][0]["stop_reason"] is None
    assert final["system_fingerprint"] == "octavo-0.1.0"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 20, "total_tokens": 41, "completion_tokens": 21}
    assert text_of(chunks) == "<user>€<assistant>"
    assert all("\ufffd" not in json.dumps(chunk, ensure_ascii=False) for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1


async def test_continuous_usage_is_on_every_chunk_and_starts_at_nothing(server, http) -> None:
    chunks = await events(
        http, server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=5,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip

    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 5


async def test_choices_of_a_stream_each_have_a_role_and_an_end(server, http) -> None:
    chunks = await events(
        http, server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=50, n=3
    )

    for index in range(3):
        choices = [c for chunk in chunks[:-1] for c in chunk["choices"] if c["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]
        assert text_of(chunks, index) == "<user>x<assistant>"


async def test_a_completion_stream_carries_text_and_stops_at_a_stop_string(server, http) -> None:
    chunks = await events(http, server, "/v1/completions", prompt="abc STOP d", stop="STOP", max_tokens=50)

    assert text_of(chunks) == "abc "
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["choices"][0]["stop_reason"] == "STOP"
    server.wait_idle()


async def test_an_engine_error_after_the_first_token_ends_the_stream_with_an_error_and_done(server, http) -> None:
    chunks = await events(http, server, "/v1/completions", prompt=["abcdefgh", "!late"], max_tokens=8)

    assert chunks[-1] == "[DONE]"
    assert "not finite" in chunks[-2]["error"]["message"]
    assert chunks[-2]["error"]["code"] == 500
    server.wait_idle()


async def test_an_engine_error_before_the_first_token_has_its_own_status(server, http) -> None:
    status, body = await complete(http, server, "!error", stream=True)

    assert status == 500
    assert body["error"]["type"] == "InternalServerError"


# ---- refusals

ASKS = {
    "use_beam_search": True,
    "response_format": {"type": "xml"}, "structured_outputs": {"regex": "("}, "guided_json": "{",
    "return_prompt_text": True, "kv_transfer_params": {"a": 1}, "repetition_detection": {}, "service_tier": "flex",
    "length_penalty": 2.0,
    "thinking_token_budget": 5, "vllm_xargs": {"a": 1}, "return_token_offsets": True,
}  # fmt: skip
CHAT_ASKS = {
    **ASKS, "tools": [], "tool_choice": "auto", "functions": [],
    "chat_template": "x", "modalities": ["audio"], "audio": {}, "mm_processor_kwargs": {"a": 1},
    "return_assistant_tokens_mask": True,
}  # fmt: skip
COMPLETION_ASKS = {**ASKS, "suffix": "x", "best_of": 2, "prompt_embeds": "x"}


@pytest.mark.parametrize(("field", "value"), CHAT_ASKS.items())
async def test_chat_refuses_by_name_what_it_does_not_do(server, http, field, value) -> None:
    status, body = await chat(http, server, **{field: value})

    assert status == 400
    assert body["error"]["param"] == field
    assert body["error"]["type"] == "BadRequestError"
    assert body["error"]["code"] == 400
    assert field in body["error"]["message"]


@pytest.mark.parametrize(("field", "value"), COMPLETION_ASKS.items())
async def test_completions_refuse_by_name_what_they_do_not_do(server, http, field, value) -> None:
    status, body = await complete(http, server, **{field: value})

    assert (status, body["error"]["param"]) == (400, field)


async def test_fields_that_ask_for_nothing_are_accepted(server, http) -> None:
    nothing = dict.fromkeys([*CHAT_ASKS, "seed", "stop", "max_tokens", "stream_options", "temperature", "n"])
    harmless = {
        **nothing, "logprobs": False, "top_logprobs": 0, "tool_choice": "none", "user": "me", "store": True,
        "metadata": {"a": "b"}, "response_format": {"type": "text"}, "logit_bias": {}, "priority": 0,
        "parallel_tool_calls": True, "nobody_knows_this": {"deep": [1]}, "service_tier": "auto",
    }  # fmt: skip
    status, body = await chat(http, server, **harmless)

    assert status == 200, body


LIMITS = [
    ("temperature", 2.5), ("temperature", -0.1), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2),
    ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0), ("max_tokens", 0),
    ("max_tokens", 513), ("n", 0), ("n", 129), ("stop", [""]), ("stop", "x" * 2000), ("stop_token_ids", [-1]),
    ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("allowed_token_ids", []), ("bad_words", [""]),
    ("cache_salt", ""), ("stream_options", {"include_usage": True}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), LIMITS)
async def test_values_outside_their_range_are_refused_by_name(server, http, field, value) -> None:
    for status, body in (
        await chat(http, server, **{field: value}),
        await complete(http, server, **{field: value}),
    ):
        assert (status, body["error"]["param"]) == (400, field), body
        assert body["error"]["type"] == "BadRequestError"


async def test_a_whole_number_may_be_written_with_a_point(server, http) -> None:
    status, body = await complete(http, server, "abc", max_tokens=2.0, n=1.0, temperature=1, seed=3.0)

    assert (status, body["choices"][0]["text"]) == (200, "ab")


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"truncate_prompt_tokens": 3}, "efg"), ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, "efg"), ({"truncate_prompt_tokens": 100}, "abcdefg"),
        ({"truncate_prompt_tokens": None, "truncation_side": "left"}, "abcdefg"),
    ],
)  # fmt: skip
async def test_a_prompt_is_truncated_where_it_was_asked_for(server, http, fields, seen) -> None:
    for prompt in ("abcdefg", [64 + i for i in range(7)]):
        _, body = await complete(http, server, prompt, **fields)
        assert (body["choices"][0]["text"], body["usage"]["prompt_tokens"]) == (seen, len(seen))

    _, body = await chat(http, server, **fields)
    assert body["usage"]["prompt_tokens"] == min(len("<user>hello<assistant>"), fields["truncate_prompt_tokens"] or 99)


async def test_a_prompt_that_is_too_long_fits_once_it_is_truncated(server, http) -> None:
    _, whole = await complete(http, server, "ab" * 300_000, truncate_prompt_tokens=-1, max_tokens=12)
    _, most = await chat(http, server, "ab" * 300_000, truncate_prompt_tokens=-1)

    assert whole["usage"]["prompt_tokens"] == 500
    assert most["usage"] == {"prompt_tokens": 511, "total_tokens": 512, "completion_tokens": 1}


@pytest.mark.parametrize("value", [0, -2, 513])
async def test_a_truncation_to_nothing_or_beyond_the_context_is_refused(server, http, value) -> None:
    status, body = await complete(http, server, "abc", truncate_prompt_tokens=value)

    assert (status, body["error"]["param"]) == (400, "truncate_prompt_tokens")


async def test_min_tokens_above_max_tokens_and_n_with_greedy_are_refused(server, http) -> None:
    _, first = await chat(http, server, min_tokens=9, max_tokens=5)
    _, second = await chat(http, server, n=2, temperature=0)
    _, third = await chat(http, server, max_completion_tokens=0)

    assert first["error"]["param"] == "min_tokens"
    assert second["error"]["param"] == "n"
    assert third["error"]["param"] == "max_completion_tokens"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {}, "body.messages"),
        ("/v1/chat/completions", {"messages": []}, "body.messages"),
        ("/v1/chat/completions", {"messages": "x"}, "body.messages"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "body.messages.0.role"),
        ("/v1/completions", {"prompt": 7}, "body.prompt"),
        ("/v1/completions", {"prompt": "x", "n": "many"}, "body.n"),
        ("/v1/completions", {"prompt": "x", "seed": 2**70}, "body.seed"),
        ("/v1/completions", {"prompt": [-1]}, "body.prompt"),
        ("/v1/completions", {"prompt": ["x", 1]}, "body.prompt"),
        ("/v1/completions", {"prompt": "x", "max_tokens": "3"}, "body.max_tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 3.5}, "body.max_tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": True}, "body.max_tokens"),
        ("/v1/completions", {"prompt": "x", "temperature": "0.5"}, "body.temperature"),
        ("/v1/completions", {"prompt": "x", "echo": "yes"}, "body.echo"),
        ("/v1/completions", {"prompt": "x", "echo": 1}, "body.echo"),
        ("/v1/completions", {"prompt": "x", "stop": [1]}, "body.stop"),
        ("/v1/completions", {"prompt": "x", "logprobs": False}, "body.logprobs"),
        ("/v1/completions", {"prompt": "x", "stream": "true"}, "body.stream"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"5": "1"}}, "body.logit_bias"),
        ("/v1/chat/completions", {"messages": [{"role": 1, "content": "x"}]}, "body.messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "body.messages.0.content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": 1}, "body.logprobs"),
    ],
)
async def test_a_body_of_the_wrong_shape_names_the_place(server, http, path, body, param) -> None:
    status, answer = await post(http, server, path, **body)

    assert status == 400
    assert answer["error"]["type"] == "Bad Request"
    assert answer["error"]["param"].startswith(param)


@pytest.mark.parametrize(
    ("body", "param", "kinds"),
    [
        ({"prompt": 7}, "body.prompt", "a valid string or a valid array"),
        ({"prompt": [1, "a"]}, "body.prompt.1", "a valid integer"),
        ({"prompt": [[1], ["a"]]}, "body.prompt.1.0", "a valid integer"),
        ({"prompt": "x", "stop": 5}, "body.stop", "a valid string or a valid array"),
        ({"messages": [{"role": "user", "content": [5]}]}, "body.messages.0.content.0", "an object"),
        ({"messages": [{"role": "user", "content": "x"}], "tool_choice": 5}, "body.tool_choice", "or an object"),
        ({"messages": [{"role": "user", "content": "x"}], "tool_choice": {"type": "function"}},
         "body.tool_choice.function", "Field required"),
    ],
)  # fmt: skip
async def test_of_a_field_of_several_kinds_all_are_named(server, http, body, param, kinds) -> None:
    status, answer = await post(http, server, f"/v1/{'chat/' if 'messages' in body else ''}completions", **body)

    assert (status, answer["error"]["param"]) == (400, param)
    assert kinds in answer["error"]["message"]


@pytest.mark.parametrize(
    ("data", "content_type"),
    [(b"{", "application/json"), (b"[]", "application/json"), (b"{}", "text/plain"), (b"\xff", "application/json"),
     (b'{"messages":' + b"[" * 5000, "application/json")],
)  # fmt: skip
async def test_what_is_no_json_object_is_refused(server, http, data, content_type) -> None:
    async with http.post(
        server.url + "/v1/chat/completions", data=data, headers={"Content-Type": content_type}
    ) as response:
        body = await response.json()

    assert (response.status, body["error"]["type"]) == (400, "Bad Request")


@pytest.mark.parametrize("prompt", ["", [], None, [""], [[]]])
async def test_an_empty_prompt_is_refused(server, http, prompt) -> None:
    status, body = await complete(http, server, prompt)

    assert status == 400
    assert body["error"]["message"].startswith("Either prompt or prompt_embeds must be provided and non-empty.")


@pytest.mark.parametrize("size", [512, 513, 100_000])
async def test_a_prompt_that_leaves_no_room_is_refused_with_the_context_length(server, http, size) -> None:
    status, body = await complete(http, server, "a" * size)

    assert status == 400
    assert "maximum context length is 512 tokens" in body["error"]["message"]


async def test_ids_outside_the_vocabulary_are_refused(server, http) -> None:
    status, body = await complete(http, server, [1, 257])

    assert (status, body["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_stop_tokens_outside_the_vocabulary_are_refused(server, http, path) -> None:
    """With min_tokens such an id used to end the engine, and with it everybody's requests."""
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "stop_token_ids": [1, 257], "min_tokens": 1}
    status, answer = await post(http, server, path, **body)

    assert status == 400
    assert answer["error"]["param"] == "stop_token_ids"
    assert "257 is out of vocabulary: ids are 0 to 256" in answer["error"]["message"]


async def test_images_and_template_overrides_are_refused_with_their_place(server, http) -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
    _, first = await post(http, server, "/v1/chat/completions", messages=image)
    _, second = await chat(http, server, chat_template_kwargs={"messages": []})
    _, third = await chat(http, server, add_generation_prompt=True, continue_final_message=True)

    assert first["error"]["param"] == "messages.0.content"
    assert second["error"]["param"] == "chat_template_kwargs"
    assert third["error"]["param"] == "continue_final_message"


async def test_an_unknown_model_and_an_unknown_route_are_told_apart(server, http) -> None:
    status, body = await chat(http, server, model="other")
    async with http.get(server.url + "/v2/nothing") as response:
        route = await response.json()
    async with http.get(server.url + "/v1/completions") as response:
        method = await response.json()

    assert (status, body["error"]["type"], body["error"]["param"]) == (404, "NotFoundError", "model")
    assert body["error"]["message"] == "The model `other` does not exist."
    assert (route["error"]["code"], route["error"]["type"]) == (404, "Not Found")
    assert method["error"]["code"] == 405


async def test_more_sequences_than_could_ever_be_queued_are_refused(server, http) -> None:
    status, body = await complete(http, server, ["a"] * 2049)

    assert (status, body["error"]["param"]) == (400, "prompt")


# ---- about the server


async def test_models_version_load_and_health(server, http) -> None:
    async def get(path: str) -> Any:
        async with http.get(server.url + path) as response:
            assert response.status == 200
            return await response.read()

    models = json.loads(await get("/v1/models"))
    assert models["data"][0]["id"] == "tiny"
    assert models["data"][0]["max_model_len"] == 512
    assert json.loads(await get("/v1/models/tiny"))["id"] == "tiny"
    assert json.loads(await get("/version")) == {"version": "0.1.0"}
    assert json.loads(await get("/load")) == {"server_load": 0}
    assert await get("/health") == b""
    assert await get("/ping") == b""
    assert b"vllm:num_requests_running" in await get("/metrics")


async def test_tokenize_and_detokenize_are_inverse(server, http) -> None:
    _, body = await post(http, server, "/tokenize", prompt="naïve €", return_token_strs=True)
    _, back = await post(http, server, "/detokenize", tokens=body["tokens"])
    _, messages = await post(http, server, "/tokenize", messages=[{"role": "user", "content": "x"}])

    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 512
    assert back == {"prompt": "naïve €"}
    assert messages["count"] == 18


async def test_a_clients_request_id_is_cleaned_echoed_and_used(server, http) -> None:
    headers = {"X-Request-Id": "me-42 /<script>" + "x" * 300}
    async with http.post(server.url + "/v1/completions", json={"prompt": "a"}, headers=headers) as response:
        body = await response.json()

    echoed = response.headers["X-Request-Id"]
    assert echoed.startswith("me-42scriptx")
    assert len(echoed) == 128
    assert body["id"] == f"cmpl-{echoed}"


async def test_two_requests_with_one_id_do_not_share_their_answers(server, http) -> None:
    import asyncio

    async def one(text: str) -> str:
        async with http.post(
            server.url + "/v1/completions", json={"prompt": text * 50, "max_tokens": 50}, headers={"X-Request-Id": "x"}
        ) as response:
            return (await response.json())["choices"][0]["text"]

    assert await asyncio.gather(one("a"), one("b")) == ["a" * 50, "b" * 50]


async def test_no_response_is_found_again_and_why_is_told(server, http) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="no response is stored here"):
            await client.responses.retrieve("resp_1")
        with pytest.raises(openai.NotFoundError, match="no response is stored here"):
            await client.responses.cancel("resp_1")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_load_comes_in_the_head_when_it_is_asked_for(server, http, stream) -> None:
    async def told(format: str) -> str | None:
        body = {"prompt": "ab", "max_tokens": 2, "stream": stream}
        headers = {"endpoint-load-metrics-format": format}
        async with http.post(server.url + "/v1/completions", json=body, headers=headers) as answer:
            await answer.read()
            found: str | None = answer.headers.get("endpoint-load-metrics")
            return found

    as_json, text = await told("JSON"), await told("text")

    assert as_json is not None
    assert text is not None
    figures = json.loads(as_json.removeprefix("JSON "))["named_metrics"]
    assert figures.keys() == {"kv_cache_usage_perc", "num_requests_waiting"}
    assert all(isinstance(value, float) for value in figures.values())
    assert re.fullmatch(
        r"TEXT named_metrics\.kv_cache_usage_perc=[\d.]+, named_metrics\.num_requests_waiting=0\.0", text
    )
    assert await told("XML") is None
