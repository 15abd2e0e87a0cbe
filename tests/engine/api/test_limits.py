"""Each row of the table of limits: its status, body and `param`, and an ordinary request served right after it.

Against the real engine, so that what slips through a check meets what it would break.
"""

from __future__ import annotations

from typing import Any

import pytest

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
CONTEXT, VOCABULARY = 256, 49152
HELLO = [{"role": "user", "content": "Hello"}]
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TOOL: Any = {"tools": [FUNCTION]}
NAMED = {"type": "function", "function": {"name": "g"}}


@pytest.fixture(scope="module")
def small(start_real: Any) -> Any:
    flags = (
        "--kv-cache-memory-bytes=64M",
        f"--max-model-len={CONTEXT}",
        "--max-num-seqs=8",
        "--max-num-queued-reqs=200",
    )
    return start_real(*flags, ready=False).wait_ready(60)


BOTH: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 0}, "n", "1 to 128"),
    ({"n": 129}, "n", "1 to 128"),
    ({"n": 2, "temperature": 0}, "n", "1 when temperature is 0"),
    ({"n": 2.5}, "body.n", "integer"),
    ({"presence_penalty": 2.1}, "presence_penalty", "[-2, 2]"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "[-2, 2]"),
    ({"repetition_penalty": 0}, "repetition_penalty", "[0.01, 100]"),
    ({"repetition_penalty": -1}, "repetition_penalty", "[0.01, 100]"),
    ({"temperature": -0.1}, "temperature", "[0, 2]"),
    ({"temperature": 2.1}, "temperature", "[0, 2]"),
    ({"top_p": 0}, "top_p", "(0, 1]"),
    ({"top_p": 1.1}, "top_p", "(0, 1]"),
    ({"top_k": -2}, "top_k", "-1"),
    ({"top_k": 1.5}, "body.top_k", "integer"),
    ({"min_p": -0.1}, "min_p", "[0, 1]"),
    ({"min_p": 1.1}, "min_p", "[0, 1]"),
    ({"max_tokens": 0}, "max_tokens", "1"),
    ({"min_tokens": -1}, "min_tokens", "0"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "max_tokens (4)"),
    ({"max_tokens": CONTEXT + 1}, "max_tokens", f"cannot be greater than max_model_len={CONTEXT}"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "greater than max allowed: 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "`stream=True`"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", "in logit_bias contain out-of-vocab token ids"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "1 to"),
    ({"allowed_token_ids": [VOCABULARY]}, "allowed_token_ids", "out of vocabulary"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids", "from 0"),
    ({"stop_token_ids": ["x"]}, "body.stop_token_ids.0", "integer"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", "out of vocabulary"),
    ({"stop": [""]}, "stop", "not empty"),
    ({"stop": ["x"] * 65}, "stop", "at most 64"),
    ({"stop": "x" * 1025}, "stop", "at most 1024"),
    ({"bad_words": [""]}, "bad_words", "not empty"),
    ({"bad_words": ["x"] * 257}, "bad_words", "at most 256"),
    ({"seed": 2**63}, "body.seed", "less than or equal"),
    ({"seed": -(2**63) - 1}, "body.seed", "greater than or equal"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "Stream options can only be defined when"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "-1"),
    ({"truncate_prompt_tokens": CONTEXT + 1}, "truncate_prompt_tokens", "smaller truncation size"),
    ({"cache_salt": ""}, "cache_salt", "1 to"),
    ({"cache_salt": 5}, "body.cache_salt", "string"),
    ({"priority": 2**31}, "body.priority", "less than or equal"),
]
ONLY_TEXT: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "x " * 2 * CONTEXT}, "prompt", f"maximum context length is {CONTEXT} tokens"),
    ({"prompt": [5] * CONTEXT}, "prompt", f"maximum context length is {CONTEXT} tokens"),
    ({"prompt": [VOCABULARY]}, "prompt", "out of vocabulary"),
    ({"prompt": [-1]}, "body.prompt", ""),
    ({"prompt": ""}, "prompt", "must be provided and non-empty"),
    ({"prompt": ["x"] * 209}, "prompt", "at most 208"),
    ({"prompt": ["x"] * 105, "n": 2}, "prompt", "at most 208"),
    ({"logprobs": 21}, "logprobs", "greater than max allowed: 20"),
    ({"logprobs": -1}, "logprobs", "0 to 20"),
    ({"logprobs": 21, "echo": True}, "logprobs", "greater than max allowed: 20"),
    ({"suffix": "x"}, "suffix", "suffix is not currently supported"),
    ({"use_beam_search": True, "stream": True}, "use_beam_search", ""),
]
ONLY_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [{"role": "user", "content": "x " * 2 * CONTEXT}]}, "messages", "maximum context length"),
    ({"messages": []}, "body.messages", "at least 1"),
    ({"messages": HELLO * 4097}, "body.messages", "at most 4096"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "1"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "greater than max allowed: 20"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "0 to 20"),
    ({"top_logprobs": 1}, "top_logprobs", "`logprobs` must be set to true"),
    ({"response_format": {"type": "json_schema"}}, "response_format", ""),
    ({"tools": []}, "tools", "empty"),
    ({"tools": [FUNCTION] * 1025}, "body.tools", "at most 1024"),
    ({"tool_choice": "auto"}, "tool_choice", "`tools` must be set"),
    ({**TOOL, "tool_choice": NAMED}, "tool_choice", "'g'"),
    (TOOL, "tool_choice", "requires --enable-auto-tool-choice and --tool-call-parser"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "both"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "not taken from requests"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
]
ROWS = (
    [(path, *row) for path in (TEXT, CHAT) for row in BOTH]
    + [(TEXT, *row) for row in ONLY_TEXT]
    + [(CHAT, *row) for row in ONLY_CHAT]
)


async def post(http: Any, server: Any, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    base: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "The capital of France is"}
    async with http.post(server.url + path, json={**base, **body}) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize(("path", "fields", "param", "words"), ROWS, ids=lambda value: str(value)[:40])
async def test_beyond_a_limit_is_a_400_that_names_the_field_and_nothing_else(
    small, http, path, fields, param, words
) -> None:
    status, body = await post(http, small, path, fields)
    after, answer = await post(http, small, TEXT, {"max_tokens": 1, "temperature": 0})

    error = body["error"]
    assert status == 400, body
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] in ("BadRequestError", "Bad Request")
    assert error["code"] == 400
    assert error["param"].startswith(param), error
    assert words in error["message"], error
    assert (after, answer["choices"][0]["text"]) == (200, " Paris")


WITHIN: list[dict[str, Any]] = [
    {"n": 8, "max_tokens": 1, "seed": -1}, {"temperature": 0.001}, {"temperature": 2}, {"top_k": -1}, {"top_k": 0},
    {"top_p": 1}, {"min_p": 1}, {"presence_penalty": -2, "frequency_penalty": 2}, {"prompt_logprobs": 20},
    {"logit_bias": {"5": 1e6, "6": -1e6}}, {"seed": 2**63 - 1}, {"stop": ["x" * 1024] * 64}, {"stop": []},
    {"stop_token_ids": []}, {"max_tokens": CONTEXT, "stop": "."}, {"min_tokens": 3, "max_tokens": 3},
    {"allowed_token_ids": [5]}, {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 1},
    {"bad_words": ["x"] * 256},
    {"ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False},
]  # fmt: skip


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("fields", WITHIN, ids=lambda value: str(value)[:40])
async def test_at_a_limit_is_answered(small, http, path, fields) -> None:
    status, body = await post(http, small, path, {"max_tokens": 3, **fields})

    assert status == 200, body
    assert len(body["choices"]) == fields.get("n", 1)


async def test_more_tokens_than_the_room_left_are_cut_to_it(small, http) -> None:
    _, body = await post(http, small, TEXT, {"prompt": [5] * (CONTEXT - 3), "max_tokens": 100, "ignore_eos": True})

    assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (3, "length")
