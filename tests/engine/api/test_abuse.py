"""Requests that nobody means, made at random from ones that somebody might: each is answered or refused, in the API's
shape and without a trace of the program, and the next one is served."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
MESSAGE = {"role": "user", "content": "hello"}
BODIES: dict[str, list[dict[str, Any]]] = {
    CHAT: [
        {"messages": [MESSAGE], "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "logprobs": True,
         "top_logprobs": 2, "max_completion_tokens": 3, "n": 2, "temperature": 0.7, "seed": 1, "stop": ["x"],
         "logit_bias": {"5": 1}},
        {"messages": [MESSAGE, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "1"}], "tools": [TOOL], "max_tokens": 3},
        {"messages": [MESSAGE], "max_tokens": 3, "response_format": {"type": "json_schema", "json_schema": {
            "name": "a", "schema": {"type": "object", "properties": {"a": {"enum": [1, 2]}}}}}},
        {"messages": [MESSAGE], "max_tokens": 3, "structured_outputs": {"regex": "[ab]+"}, "cache_salt": "s",
         "chat_template_kwargs": {"a": 1}, "documents": [{"text": "x"}], "priority": 1, "bad_words": ["q"]},
    ],
    TEXT: [
        {"prompt": "hello", "max_tokens": 3, "stream": True, "echo": True, "logprobs": 1},
        {"prompt": [[1, 2], [3]], "max_tokens": 2, "n": 2, "allowed_token_ids": [1, 2], "stop_token_ids": [3]},
        {"prompt": ["a", "b"], "max_tokens": 2, "prompt_logprobs": 1, "truncate_prompt_tokens": 5, "min_tokens": 1},
    ],
    RESPONSES: [
        {"input": "hello", "max_output_tokens": 3, "stream": True, "reasoning": {"effort": "low"}},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                   {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                   {"type": "function_call_output", "call_id": "c", "output": "1"}], "max_output_tokens": 3,
         "tools": [{"type": "function", "name": "f", "parameters": {}}], "tool_choice": "auto",
         "text": {"format": {"type": "text"}}, "include": [], "metadata": {}},
    ],
    MESSAGES: [
        {"messages": [MESSAGE], "max_tokens": 3, "stream": True, "system": "s", "stop_sequences": ["x"]},
        {"messages": [MESSAGE, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]}],
         "max_tokens": 3, "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
         "output_config": {"effort": "low"}, "thinking": {"type": "disabled"}},
    ],
    "/v1/messages/count_tokens": [{"messages": [MESSAGE], "system": [{"type": "text", "text": "s"}]}],
    "/tokenize": [{"prompt": "a", "return_token_strs": True}, {"messages": [MESSAGE], "tools": [TOOL]}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, "", " ", "a", "0", "\x00",
    "\ud800", "\udfff\ud800", "漢字🙂", "{{ 7 * 7 }}", "{% for i in range(10**9) %}x{% endfor %}", "../../etc/passwd",
    "http://127.0.0.1/x", "a" * 3000, [], {}, [None], [[]], [{}], {"": ""}, {"a": None}, {"type": "text"},
    {"type": "function"}, ["a", 1, None], [1, -1, 2**40], [True], {"regex": "(" * 200}, {"regex": "(a*)*" * 30},
    {"json": "{"}, {"grammar": "start: start"}, {"choice": []}, {"$ref": "#"}, {"type": ["x"]}, nested(60), nested(400),
]  # fmt: skip
RAW = [
    b"", b"null", b"[]", b'"x"', b"1", b"{", b'{"a":}', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{}" * 2, b"NaN",
    b'{"messages":[{"role":"user","content":"a"}],"temperature":NaN}', b'{"prompt":"a","prompt":1}',
    b'{"prompt":"\xff"}',
    b'{"prompt":"a","top_p":1e999}', b'{"prompt":"a","seed":1e30}', b"[" * 5000, b'{"a":' * 5000, b"\x00" * 100,
    b'{"prompt":"\\ud800"}', b'{"prompt":"a","max_tokens":1e2}', b"prompt=a&x=b",
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, child in inside for place in places(child, (*at, key)))]


def mutated(rng: random.Random, body: Any) -> Any:
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.choice(places(body))
        odd = copy.deepcopy(rng.choice(ODD))
        if not place:
            if isinstance(body, dict):
                body[rng.choice(("x", "n", "stop", "model", "stream", "tools", "user", "echo", "\ud800"))] = odd
            continue
        holder = body
        for key in place[:-1]:
            holder = holder[key]
        match rng.randrange(4):
            case 0 if isinstance(holder, dict):
                del holder[place[-1]]
            case 1 if isinstance(holder, list):
                holder.append(odd)
            case _:
                holder[place[-1]] = odd
    return body


def as_json(body: Any) -> bytes:
    return json.dumps(body).encode()


def told_properly(path: str, status: int, text: str) -> None:
    """Nothing of the program shows, and what is refused has the shape of the API."""
    for word in ("Traceback", 'File "', "site-packages", " object at 0x", "octavo_engine", "pydantic"):
        assert word not in text, (path, text[:500])
    assert status < 500, (path, status, text[:500])
    if status >= 400:
        error = json.loads(text)["error"]
        assert error["message"], path
        assert path.startswith("/v1/messages") or {"message", "type", "param", "code"} <= error.keys(), (path, error)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls }}{% endfor %}{{ tools }}"
FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser=hermes", "--reasoning-parser=qwen3", "--max-num-seqs=64")


@pytest.fixture(scope="module")
def abused(start_shared: Any) -> Any:
    return start_shared(*FLAGS, f"--chat-template={TEMPLATE}", "--max-request-bytes=200k")


async def still_serves(server: Any, http: aiohttp.ClientSession) -> None:
    async with http.post(server.url + TEXT, json={"prompt": "ab", "max_tokens": 2}) as answer:
        assert (answer.status, (await answer.json())["choices"][0]["text"]) == (200, "ab")


async def send(server: Any, http: aiohttp.ClientSession, path: str, data: bytes, **headers: str) -> None:
    headers = {"Content-Type": "application/json", **headers}
    async with http.post(server.url + path, data=data, headers=headers) as answer:
        told_properly(path, answer.status, await answer.text())


@pytest.mark.parametrize("seed", range(4))
async def test_bodies_made_wrong_at_random_are_answered_or_refused(abused, http, seed) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        bodies = [(path, as_json(mutated(rng, rng.choice(BODIES[path])))) for path in rng.choices(list(BODIES), k=16)]
        async with asyncio.timeout(60):
            await asyncio.gather(*(send(abused, http, path, data) for path, data in bodies))
        await still_serves(abused, http)
    abused.wait_idle(30)


async def test_bodies_that_are_no_json_are_refused(abused, http) -> None:
    rng = random.Random(1)
    for path in BODIES:
        whole = as_json(BODIES[path][0])
        cuts = [whole[: rng.randrange(len(whole))] for _ in range(3)]
        flips = [bytes(byte ^ (rng.random() < 0.05) * 128 for byte in whole) for _ in range(3)]
        await asyncio.gather(*(send(abused, http, path, data) for data in (*RAW, *cuts, *flips)))
    await still_serves(abused, http)
    abused.wait_idle(30)


HEADERS: list[dict[str, str]] = [
    {"Content-Type": ""}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json; charset=utf-16"},
    {"Content-Type": "application/json;" * 200}, {"Content-Encoding": "gzip"}, {"Content-Encoding": "nonsense"},
    {"Accept": "x" * 5000}, {"Accept-Encoding": "br;q=nan"}, {"X-Request-Id": "\t\x01" * 20},
    {"Expect": "100-continue"}, {"Expect": "cake"}, {"Authorization": "Bearer " + "x" * 7000},
    {"Cookie": "a=b; " * 1000}, {"Origin": "null"},
    {"Host": "a b"}, {"Host": ""}, {"Connection": "upgrade", "Upgrade": "websocket"}, {"traceparent": "00-zz-zz-zz"},
    {"Range": "bytes=0-"}, {"If-Match": "*"}, {"Transfer-Encoding": "gzip"}, {"endpoint-load-metrics-format": "X" * 50},
]  # fmt: skip
LINES = [
    b"GET /%00 HTTP/1.1", b"GET //v1//models HTTP/1.1", b"GET /v1/models/../../etc/passwd HTTP/1.1",
    b"GET /v1/models/%2e%2e%2f HTTP/1.1", b"GET /v1/models/" + b"a" * 6000 + b" HTTP/1.1", b"GET * HTTP/1.1",
    b"GET http://[::1/ HTTP/1.1", b"GET /\xff\xfe HTTP/1.1", b"PUT /v1/models HTTP/1.1", b"DELETE /metrics HTTP/1.1",
    b"TRACE / HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"BREW /v1/chat/completions HTTP/1.1",
    b"GET /?" + b"a=b&" * 1500 + b" HTTP/1.1",
    b"HEAD /v1/models HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET / HTTP/9.9", b"GET /", b"\x16\x03\x01\x02\x00\x01", b"",
]  # fmt: skip


def raw(server: Any, data: bytes) -> bytes:
    """What comes back on a connection of its own until it is closed, or nothing more does."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        got = b""
        while piece := sock.recv(65536):
            got += piece
        return got


async def test_heads_made_wrong_are_answered_or_refused(abused, http) -> None:
    body = as_json({"prompt": "ab", "max_tokens": 1})
    requests = [line + b"\r\nHost: x\r\nConnection: close\r\n\r\n" for line in LINES]
    for headers in HEADERS:
        given = {"Host": "x", "Content-Type": "application/json", "Connection": "close", **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items()).encode("latin-1")
        requests.append(b"POST /v1/completions HTTP/1.1\r\n" + head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    start = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    lengths = (b"-1", b"x", b"99999999999", b"5, 6", b"%d" % (len(body) + 10))
    requests += [start + b"Content-Length: " + length + b"\r\n\r\n" + body for length in lengths]
    chunks = (b"zz\r\n", b"5\r\nab", b"-5\r\nabcde\r\n0\r\n\r\n", b"ffffffffffffffff\r\na\r\n")
    requests += [start + b"Transfer-Encoding: chunked\r\n\r\n" + chunk for chunk in chunks]
    both = start + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    requests.append(both + b"0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n")

    answers = [await asyncio.to_thread(raw, abused, request) for request in requests]

    for request, answer in zip(requests, answers, strict=True):
        assert not answer or answer.startswith(b"HTTP/"), (request[:100], answer[:300])
        status = int(answer[9:12]) if answer else 400
        assert status < 500, (request[:100], answer[:300])
        assert b"Traceback" not in answer, request[:100]
        assert b"aiohttp" not in answer, request[:100]
        assert b"passwd:" not in answer
    await still_serves(abused, http)


def test_none_of_it_left_a_trace_in_the_log(start: Any, tmp_path: Path) -> None:
    """On a server of its own, as its log is read when it has ended."""
    server = start(*FLAGS, f"--chat-template={TEMPLATE}")
    rng = random.Random(9)

    async def abuse() -> None:
        async with aiohttp.ClientSession() as http:
            for _ in range(100):
                path = rng.choice(list(BODIES))
                await send(server, http, path, as_json(mutated(rng, rng.choice(BODIES[path]))))

    asyncio.run(abuse())
    for line in LINES:
        raw(server, line + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
    log = server.stop()

    assert "Traceback" not in log
    assert " ERROR " not in log, log[-2000:]
