"""What a server that strangers can reach must hold against: each test is a hole that an engine of this kind has had."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gzip
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from octavo_engine.api.auth import MAX_KEYS_TRIED, Keys
from octavo_engine.api.chat_template import ChatTemplate, TemplateRefusedError
from octavo_engine.api.errors import bad_request, without_folders
from octavo_engine.api.openapi import ROUTES

ENGINE = Path(__file__).resolve().parents[3] / "engine" / "octavo_engine"
KEY = "a-secret-key"


@pytest.fixture(scope="module")
def locked(start_shared: Any) -> Any:
    return start_shared(f"--api-key={KEY}", "--log-level=debug")


async def raw(server: Any, head: bytes, body: bytes = b"") -> tuple[int, str]:
    """Status and whole answer to bytes as they are; 0 when the connection was closed without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    with contextlib.suppress(ConnectionError):
        writer.write(head + body)
        await writer.drain()
    answer = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        answer = await asyncio.wait_for(_whole_answer(reader), 60)
    writer.close()
    match = re.match(rb"HTTP/1\.\d (\d+) ", answer)
    return int(match[1]) if match else 0, answer.decode("latin-1")


async def _whole_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return head + (await reader.readexactly(int(length[1])) if length else b"")


async def serves(http: Any, server: Any) -> bool:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with http.post(server.url + "/v1/completions", json={"prompt": "ab"}, headers=headers) as answer:
        return answer.status == 200 and (await answer.json())["choices"][0]["text"] == "ab"


# ---- keys


async def test_every_route_but_the_open_ones_needs_a_key(locked, http) -> None:
    for route in ROUTES:
        async with http.request(route.method, locked.url + route.path.replace("{model}", "tiny")) as answer:
            # The open ones answer without; a route that is not open never tells that it exists.
            assert (answer.status == 401) != route.open, route
    assert await serves(http, locked)


PATHS = [
    "/v1/models", "//v1/models", "/v1//models", "/v1/models/", "/./v1/models", "/health/../v1/models", "/%76%31/models",
    "/v1%2fmodels", "/health/..%2fv1/models", "/health%2f..%2f..%2fv1/models", "/v1/models?/health",
    "/v1/models#/health",
    "/v1/models;/health", "/health/v1/models", "/V1/models", "/v1/models%00/health", "/v1\\models", "/v1/models%20",
    "http://127.0.0.1/v1/models", "http://health/v1/models", "http://x/health/../v1/models", "/metrics/../v1/models",
    "/tokenize", "/load", "/docs", "/openapi.json", "/v1/models/tiny",
]  # fmt: skip
HOSTS = ["x", "/health", "127.0.0.1/health", "health", "x/../health", "localhost:8000/health?", "", "a@health"]


@pytest.mark.parametrize("path", PATHS)
async def test_no_spelling_of_a_path_and_no_host_gets_past_the_key(locked, path) -> None:
    for host in HOSTS:
        status, answer = await raw(locked, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())

        assert status in (400, 401, 404), (path, host, answer)
        assert "max_model_len" not in answer
        assert "server_load" not in answer


@pytest.mark.parametrize(
    "headers",
    ["X-Forwarded-Path: /health", "X-Original-URL: /health", "X-Rewrite-URL: /health",
     "X-HTTP-Method-Override: OPTIONS",
     "Authorization: Bearer", "Authorization: Bearer null", f"Authorization: Basic {KEY}", f"Authorization: {KEY}",
     f"Authorization: Bearer x{KEY}", f"Authorization: Bearer {KEY[:-1]}", "X-Api-Key:", f"X-Api-Key: Bearer {KEY}",
     f"Cookie: api_key={KEY}", f"Authorization: Bearer {KEY.upper()}"],
)  # fmt: skip
async def test_no_header_but_the_key_gets_past_it(locked, headers) -> None:
    status, _ = await raw(locked, f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n".encode())
    query, _ = await raw(locked, f"GET /v1/models?api_key={KEY}&key={KEY} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    assert (status, query) == (401, 401)


@pytest.mark.parametrize(
    "header", [f"Authorization: Bearer {KEY}", f"authorization: bearer   {KEY}", f"X-API-Key: {KEY}"]
)
async def test_the_key_opens_in_either_header(locked, header) -> None:
    status, _ = await raw(locked, f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())

    assert status == 200


def test_every_key_is_compared_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    keys = Keys(["one", "two", "a much longer third key"])

    for given in ("one", "two", "a much longer third key", "wrong", "", "o"):
        compared.clear()
        keys.admits(f"Bearer {given}")
        assert compared == [(32, 32)] * 3
    assert not keys.admits(*["Bearer no"] * MAX_KEYS_TRIED, "Bearer one")


# ---- sizes


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + b"s3cr3t" * 50_000 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(5000)) + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"s3cr3t" * 50_000,
    ],
    ids=["value", "count", "path", "name"],
)
async def test_a_head_beyond_the_limits_is_refused_in_the_apis_shape(locked, http, head) -> None:
    status, answer = await raw(locked, head)

    assert status in (0, 400, 431), answer
    if status:
        assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == status
    assert "s3cr3t" not in answer
    assert await serves(http, locked)


@pytest.mark.parametrize(
    "sent",
    [b"GARBAGE\r\n\r\n", b"GET /v1/models HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"G\x00T / HTTP/1.1\r\n\r\n",
     b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
     b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
     b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\nabcde",
     b"GET /version HTTP/1.1\r\nHost: x\r\nA: b\r\n \x00c\r\n\r\n"],
)  # fmt: skip
async def test_what_is_no_http_request_is_told_so_and_nothing_of_the_server(locked, http, sent) -> None:
    status, answer = await raw(locked, sent)

    assert status in (0, 400, 401), answer
    if status == 400:
        assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["type"] == "Bad Request"
    assert not re.search(r"aiohttp|Python/|GARBAGE|chunked", answer)
    assert await serves(http, locked)


def test_what_was_sent_instead_of_a_request_is_not_logged(start, http) -> None:
    server = start(f"--api-key={KEY}", "--log-level=debug")
    asyncio.run(raw(server, b"GET / HTTP/1.1\r\nAuthorization: Bearer " + b"s3cr3t" * 5000 + b"\r\n\r\n"))
    asyncio.run(raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cr3t\r\n\r\n"))
    server.signal(15)
    server.wait_exit()

    log = server.stop()
    assert "not an HTTP request" in log
    assert "s3cr3t" not in log
    assert KEY not in log


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_body_counts_by_its_real_size(locked, http, encoding) -> None:
    bomb = gzip.compress(b'{"prompt": "' + b"a" * 200 * 2**20 + b'"}')
    before = psutil.Process(locked.process.pid).memory_info().rss
    headers = {"Authorization": f"Bearer {KEY}", "Content-Encoding": encoding, "Content-Type": "application/json"}
    async with http.post(locked.url + "/v1/completions", data=bomb, headers=headers) as answer:
        assert answer.status in (400, 413)
        assert (await answer.json())["error"]["code"] == answer.status

    assert psutil.Process(locked.process.pid).memory_info().rss - before < 150 * 2**20
    assert await serves(http, locked)


async def test_a_body_that_never_ends_holds_up_nobody(locked, http) -> None:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    connections = [await asyncio.open_connection("127.0.0.1", locked.port) for _ in range(50)]
    for _, writer in connections:
        writer.write(head.encode() + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")

    assert await serves(http, locked)
    for _, writer in connections:
        writer.close()


# ---- templates


def template(source: str, render_s: float = 0.2) -> ChatTemplate:
    made = ChatTemplate(source, {})
    made.render_s = render_s
    return made


MANY: Any = [{"role": "user", "content": "x" * 10}] * 2000


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in messages %}{% for b in messages %}{{ b.content }}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% for b in messages %}{% set c = b.content ~ a.content %}{% endfor %}{% endfor %}",
        "{% macro again(n) %}{{ again(n + 1) if n < 500 }}{{ again(n + 1) if n < 500 }}{% endmacro %}{{ again(0) }}",
    ],
)
def test_a_rendering_that_takes_too_long_is_ended(source: str) -> None:
    # Seconds of this thread: what bounds a rendering, and what a machine that does other things does not lengthen.
    begun = time.thread_time()
    with pytest.raises(TemplateRefusedError):
        template(source).render(MANY)

    assert time.thread_time() - begun < 2


@pytest.mark.parametrize(
    "source",
    ["{{ 'a' * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ [1] * 10**9 }}", "{{ 9 ** 9 ** 9 }}", "{{ 10**7 ** 65 }}",
     "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}"],
)  # fmt: skip
def test_a_rendering_that_grows_too_large_is_ended(source: str) -> None:
    with pytest.raises(TemplateRefusedError):
        template(source, render_s=5).render(MANY)


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os }}",
     "{{ messages.append(1) }}", "{{ raise_exception.__globals__ }}", "{{ self.__init__ }}",
     "{% for m in messages %}{% set x = m.update({'role': 'x'}) %}{% endfor %}", "{{ ''|attr('__class__') }}",
     "{{ namespace.__class__ }}", "{{ '{0.__class__}'.format(messages) }}", "{% include '/etc/passwd' %}"],
)  # fmt: skip
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    text = ""
    with contextlib.suppress(TemplateRefusedError):
        text = template(source).render(MANY[:1])

    assert not re.search(r"class|module|object|root:|function", text), text


async def test_no_api_takes_a_template_or_its_reserved_names_from_a_request(locked, http) -> None:
    messages = [{"role": "user", "content": "x"}]
    bodies = {
        "/v1/chat/completions": {"messages": messages}, "/v1/responses": {"input": "x"},
        "/v1/messages": {"messages": messages, "max_tokens": 5}, "/v1/messages/count_tokens": {"messages": messages},
        "/tokenize": {"messages": messages},
    }  # fmt: skip
    kwargs = ("chat_template", "messages", "tools", "self", "add_generation_prompt")
    attempts: list[dict[str, Any]] = [{"chat_template_kwargs": {name: "{{ 1 }}"}} for name in kwargs]
    for path, body in bodies.items():
        for attempt in [{"chat_template": "{{ 1 }}"}, *attempts]:
            headers = {"Authorization": f"Bearer {KEY}"}
            async with http.post(locked.url + path, json={**body, **attempt}, headers=headers) as answer:
                assert answer.status == 400, (path, attempt, await answer.text())
                assert "chat_template" in await answer.text()


# ---- what a request makes the server do


async def test_nothing_is_fetched_on_a_clients_word(locked, http) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        image = {"type": "image_url", "image_url": {"url": url}}
        anthropic = {"type": "image", "source": {"type": "url", "url": url}}
        requests = [
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}),
            ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}),
            ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [anthropic]}]}),
            ("/v1/completions", {"prompt": "x", "kv_transfer_params": {"remote_host": url}}),
            ("/v1/completions", {"prompt": url, "max_tokens": 2}),
        ]
        for path, body in requests:
            headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": url, "Referer": url, "X-Forwarded-Host": url}
            async with http.post(locked.url + path, json=body, headers=headers) as answer:
                await answer.read()
        with pytest.raises(TimeoutError):
            listener.accept()


async def test_a_strange_method_or_path_makes_no_new_label(locked, http) -> None:
    for index in range(20):
        await raw(locked, f"X{index} /v1/models HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await raw(locked, f"GET /nowhere-{index} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    async with http.get(locked.url + "/metrics") as answer:
        text = await answer.text()

    assert "X7" not in text
    assert "nowhere" not in text


def test_errors_show_neither_addresses_nor_folders() -> None:
    assert bad_request("<Foo object at 0x7f1234567890>").message == "<Foo object>"
    assert without_folders("/models/org/Some-8B/config.json cannot be read") == "config.json cannot be read"
    assert without_folders("[Errno 2] no '/root/.cache/x/y.safetensors'") == "[Errno 2] no 'y.safetensors'"
    assert without_folders("see https://example.com/a/b and 1/2") == "see https://example.com/a/b and 1/2"


async def test_an_engines_error_reaches_the_client_without_folders(start, http) -> None:
    server = start(script={"error": "cannot open /srv/models/secret-place/x.bin at 0x7f0123456789"})
    async with http.post(server.url + "/v1/completions", json={"prompt": "!error x"}) as answer:
        text = await answer.text()

    assert (answer.status, "cannot open x.bin" in text) == (500, True)
    assert "secret-place" not in text
    assert "0x7f" not in text


# ---- the code


def test_nothing_is_unpickled_or_evaluated() -> None:
    """Of what comes from outside: engines have been taken over through pickle, torch.load, eval and yaml.load."""
    forbidden = {"eval", "exec", "__import__"}
    for path in ENGINE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                function = node.func
                if isinstance(function, ast.Name):
                    assert function.id not in forbidden, path
                if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                    called = f"{function.value.id}.{function.attr}"
                    assert called not in {"torch.load", "yaml.load", "yaml.unsafe_load", "np.load"}, path
