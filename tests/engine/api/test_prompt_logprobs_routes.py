"""echo, prompt_logprobs and scoring without generating, over HTTP. The scripted engine makes the numbers up:
a token's log-probability is its id over -100, and "b", "c", … (65, 66, …) are the likeliest everywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def own(text: str) -> list[float]:
    return [-IDS[character] / 100 for character in text]


IDS = {character: index for index, character in enumerate(map(chr, range(33, 127)))}
"""Of printable ASCII in the byte-level alphabet."""


async def post(http: Any, server: Any, path: str, **body: Any) -> tuple[int, Any]:
    async with http.post(server.url + path, json=body) as answer:
        return answer.status, await answer.json()


async def test_echo_with_logprobs_tells_the_prompts_tokens_before_the_answers(server, http) -> None:
    status, body = await post(http, server, TEXT, prompt="cat", max_tokens=2, echo=True, logprobs=1)

    (choice,) = body["choices"]
    assert (status, choice["text"]) == (200, "catca")
    assert choice["logprobs"]["tokens"] == ["c", "a", "t", "c", "a"]
    assert choice["logprobs"]["token_logprobs"] == [None, *own("at"), *own("ca")]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][2] == {"b": -0.01, "t": -IDS["t"] / 100}
    assert "prompt_logprobs" not in choice


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_with_echo_opens_with_the_prompts_logprobs(server, http, n) -> None:
    body = {"prompt": ["cat", "do"], "n": n, "max_tokens": 2, "echo": True, "logprobs": 0, "stream": True}
    choices: dict[int, list[Any]] = {}
    async with http.post(server.url + TEXT, json=body) as answer:
        for event in (await answer.text()).split("\n\n"):
            if event.startswith("data: {"):
                for choice in json.loads(event[6:])["choices"]:
                    choices.setdefault(choice["index"], []).append(choice)

    assert len(choices) == 2 * n
    for index, of in choices.items():
        prompt = ["cat", "do"][index // n]
        assert "".join(choice["text"] for choice in of) == prompt + prompt[:2]
        logprobs = [choice["logprobs"] for choice in of if choice["logprobs"]]
        assert [value for one in logprobs for value in one["token_logprobs"]] == [
            None,
            *own(prompt[1:]),
            *own(prompt[:2]),
        ]
        assert [value for one in logprobs for value in one["text_offset"]] == list(range(len(prompt) + 2))


async def test_no_tokens_with_echo_scores_the_prompt_alone(server, http) -> None:
    status, body = await post(http, server, TEXT, prompt=["cat", "do"], max_tokens=0, echo=True, logprobs=0)

    assert status == 200
    assert [choice["text"] for choice in body["choices"]] == ["cat", "do"]
    assert [choice["logprobs"]["token_logprobs"] for choice in body["choices"]] == [
        [None, *own("at")],
        [None, *own("o")],
    ]
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}
    assert (await post(http, server, TEXT, prompt="cat", max_tokens=0))[0] == 400


async def test_prompt_logprobs_are_a_field_of_a_completions_choices(server, http) -> None:
    _, body = await post(http, server, TEXT, prompt="cat", max_tokens=1, prompt_logprobs=1)

    (choice,) = body["choices"]
    assert choice["text"] == "c"
    assert choice["logprobs"] is None
    a, b = str(IDS["a"]), str(IDS["b"])
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1] == {
        a: {"logprob": -IDS["a"] / 100, "rank": 2, "decoded_token": "a"},
        b: {"logprob": -0.01, "rank": 1, "decoded_token": "b"},
    }
    assert len(choice["prompt_logprobs"]) == 3


async def test_prompt_logprobs_are_a_field_of_a_chats_body(server, http) -> None:
    messages = [{"role": "user", "content": "hi"}]
    _, body = await post(http, server, CHAT, messages=messages, max_tokens=1, n=2, prompt_logprobs=0)

    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert body["prompt_logprobs"][0] is None
    assert [len(of) for of in body["prompt_logprobs"][1:]] == [1] * (len(body["prompt_logprobs"]) - 1)


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt_logprobs": 21}, "20"),
        ({"prompt_logprobs": -2}, "-2"),
        ({"prompt_logprobs": 1, "stream": True}, "stream"),
    ],
)
async def test_prompt_logprobs_have_limits_and_no_stream(server, http, path, fields, words) -> None:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}

    status, body = await post(http, server, path, **prompt, **fields)

    assert (status, body["error"]["param"]) == (400, "prompt_logprobs")
    assert words in body["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_with_echo_gives_the_message_that_it_continues(server, http, stream) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}],
        "continue_final_message": True, "add_generation_prompt": False, "echo": True, "max_tokens": 3, "stream": stream,
    }  # fmt: skip
    async with http.post(server.url + CHAT, json=body) as answer:
        text = await answer.text()
    if stream:
        events = [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]
        content = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    else:
        content = json.loads(text)["choices"][0]["message"]["content"]

    assert content == "Well<us"

    body["echo"] = False
    async with http.post(server.url + CHAT, json=body) as answer:
        assert "Well" not in await answer.text()


# ---- ids in place of texts


async def stream_of(http: Any, server: Any, path: str, **body: Any) -> list[Any]:
    async with http.post(server.url + path, json={**body, "stream": True}) as answer:
        return [json.loads(event[6:]) for event in (await answer.text()).split("\n\n") if event.startswith("data: {")]


async def test_token_ids_come_with_the_answer_and_the_prompts_when_asked_for(server, http) -> None:
    ask: dict[str, Any] = {"prompt": ["cat", "do"], "n": 2, "max_tokens": 2, "return_token_ids": True}
    _, whole = await post(http, server, TEXT, **ask)
    events = await stream_of(http, server, TEXT, **ask)

    for index, choice in enumerate(whole["choices"]):
        prompt = [IDS[character] for character in ["cat", "do"][index // 2]]
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt, prompt[:2])
        streamed = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        assert streamed[0]["prompt_token_ids"] == prompt
        assert [id for choice in streamed for id in choice["token_ids"]] == prompt[:2]
    _, plain = await post(http, server, TEXT, prompt="cat")
    assert not {"token_ids", "prompt_token_ids"} & plain["choices"][0].keys()


async def test_a_chat_tells_token_ids_too_and_leaves_out_what_a_stop_string_cut(server, http) -> None:
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "stop": "er>", "return_token_ids": True}
    _, whole = await post(http, server, CHAT, **ask)
    events = await stream_of(http, server, CHAT, **ask)

    choice = whole["choices"][0]
    assert choice["message"]["content"] == "<us"
    assert choice["token_ids"] == [IDS[character] for character in "<user>"]
    assert len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [id for event in events for id in event["choices"][0].get("token_ids", [])] == choice["token_ids"]


async def test_tokens_are_called_by_their_ids_when_asked_for(server, http) -> None:
    _, body = await post(http, server, TEXT, prompt="cat", max_tokens=1, logprobs=1, return_tokens_as_token_ids=True)
    messages = [{"role": "user", "content": "hi"}]
    _, chat = await post(
        http, server, CHAT, messages=messages, max_tokens=1, logprobs=True, return_tokens_as_token_ids=True
    )

    assert body["choices"][0]["logprobs"]["tokens"] == [f"token_id:{IDS['c']}"]
    assert body["choices"][0]["logprobs"]["top_logprobs"][0].keys() == {f"token_id:{IDS['c']}", f"token_id:{IDS['b']}"}
    assert chat["choices"][0]["logprobs"]["content"][0]["token"] == f"token_id:{IDS['<']}"


async def test_echo_shows_what_was_left_of_a_truncated_prompt(server, http) -> None:
    _, body = await post(
        http, server, TEXT, prompt="abcdef", truncate_prompt_tokens=2, echo=True, max_tokens=1, logprobs=0
    )

    (choice,) = body["choices"]
    assert choice["text"] == "efe"
    assert choice["logprobs"]["tokens"] == ["e", "f", "e"]


async def test_more_answers_than_could_ever_be_queued_are_refused(start, http) -> None:
    server = start("--max-num-seqs=2", "--max-num-queued-reqs=3")
    status, body = await post(http, server, CHAT, messages=[{"role": "user", "content": "hi"}], n=6)

    assert (status, body["error"]["param"]) == (400, "n")
