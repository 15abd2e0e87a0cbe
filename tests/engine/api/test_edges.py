"""What surrounds the API: TLS that is renewed under a running server, CORS, a proxy's prefix, a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from octavo_engine.api.cors import Cors
from octavo_engine.status import FailureCode

BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 2, "temperature": 0}


def certificate(folder: Path, name: str, *, issuer: str | None = None) -> tuple[Path, Path]:
    """(certificate, key) for localhost, signed by itself or by another one of the folder."""
    key, file, request = (folder / f"{name}.{kind}" for kind in ("key", "crt", "csr"))
    run = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key)]
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    if issuer is None:
        subprocess.run([*run, *subject, "-x509", "-days", "2", "-out", str(file)], check=True, capture_output=True)
    else:
        subprocess.run([*run, *subject, "-out", str(request)], check=True, capture_output=True)
        ca = ["-CA", str(folder / f"{issuer}.crt"), "-CAkey", str(folder / f"{issuer}.key"), "-CAcreateserial"]
        command = ["openssl", "x509", "-req", "-in", str(request), *ca, "-days", "2", "-out", str(file)]
        subprocess.run(command, check=True, capture_output=True)
    return file, key


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    return certificate(tmp_path, "first")


def tls(pair: tuple[Path, Path]) -> tuple[str, str]:
    return f"--ssl-certfile={pair[0]}", f"--ssl-keyfile={pair[1]}"


def served_name(port: int) -> str:
    """The common name in the certificate that new connections get."""
    pem = ssl.get_server_certificate(("127.0.0.1", port))
    text = subprocess.run(["openssl", "x509", "-noout", "-subject"], input=pem, capture_output=True, text=True)
    return text.stdout.strip().rpartition("= ")[2] or text.stdout.strip().rpartition("=")[2]


def complete(port: int, context: ssl.SSLContext) -> int:
    request = urllib.request.Request(
        f"https://localhost:{port}/v1/completions", json.dumps(BODY).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, context=context, timeout=60) as answer:
        return int(answer.status)


def test_requests_come_over_tls_and_the_management_port_stays_plain(start, pair) -> None:
    server = start(*tls(pair))

    assert complete(server.port, ssl.create_default_context(cafile=str(pair[0]))) == 200
    assert server.get("/readyz")[0] == 200
    with pytest.raises((http.client.HTTPException, OSError)):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=60)


def test_a_certificate_is_renewed_under_the_running_server_and_streams_go_on(start, pair, tmp_path: Path) -> None:
    server = start(*tls(pair), script={"step_s": 0.02})
    assert served_name(server.port) == "first"

    async def renew_during_a_stream() -> str:
        context = ssl.create_default_context(cafile=str(pair[0]))
        body = {**BODY, "stream": True, "max_tokens": 200, "ignore_eos": True}
        url = f"https://localhost:{server.port}/v1/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=body, ssl=context) as answer:
            first = await answer.content.readline()
            replace(certificate(tmp_path, "second"), pair)
            rest = await answer.content.read()
        chunks = [json.loads(line[6:]) for line in (first + rest).splitlines() if line.startswith(b"data: {")]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    assert asyncio.run(renew_during_a_stream()) == ("abc" * 67)[:200]
    assert served_name(server.port) == "second"


def replace(new: tuple[Path, Path], old: tuple[Path, Path]) -> None:
    for source, target in zip(new, old, strict=True):
        os.replace(source, target)


def test_a_certificate_that_does_not_fit_its_key_leaves_the_good_pair(start, pair, tmp_path: Path) -> None:
    server = start(*tls(pair))
    other, _ = certificate(tmp_path, "other")
    os.replace(other, pair[0])
    assert any("TLS files cannot be read" in said_since(server) for _ in range(50))
    assert served_name(server.port) == "first"


def said_since(server: Any) -> str:
    """What the server has logged since the last look; waits a moment for it."""
    os.set_blocking(server.process.stderr.fileno(), False)
    time.sleep(0.1)
    with contextlib.suppress(BlockingIOError):
        return os.read(server.process.stderr.fileno(), 65536).decode()
    return ""


def test_clients_must_show_a_certificate_where_one_is_required(start, pair, tmp_path: Path) -> None:
    authority, _ = certificate(tmp_path, "authority")
    mine, key = certificate(tmp_path, "client", issuer="authority")
    server = start(*tls(pair), f"--ssl-ca-certs={authority}", "--ssl-cert-reqs=2")
    context = ssl.create_default_context(cafile=str(pair[0]))
    with pytest.raises((ssl.SSLError, urllib.error.URLError, ConnectionError, http.client.HTTPException)):
        complete(server.port, context)

    context.load_cert_chain(mine, key)
    assert complete(server.port, context) == 200


@pytest.mark.parametrize("which", [0, 1])
def test_files_for_tls_that_do_not_do_are_named(start, pair, which: int) -> None:
    pair[which].write_text("no PEM")
    server = start(*tls(pair), ready=False)

    assert server.wait_exit() == FailureCode.INVALID_CONFIG.exit_status
    assert "--ssl-certfile" in server.certificate.read_text()


def test_the_ciphers_are_those_that_are_named(start, pair) -> None:
    server = start(*tls(pair), "--ssl-ciphers=ECDHE-ECDSA-AES256-GCM-SHA384")
    context = ssl.create_default_context(cafile=str(pair[0]))
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    plain = socket.create_connection(("127.0.0.1", server.port))
    with context.wrap_socket(plain, server_hostname="localhost") as sock:
        cipher = sock.cipher()

    assert cipher is not None
    assert cipher[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"
    context.set_ciphers("ECDHE-ECDSA-CHACHA20-POLY1305")
    with pytest.raises((ssl.SSLError, urllib.error.URLError, ConnectionError)):
        complete(server.port, context)


def test_ciphers_that_are_none_are_named(start, pair) -> None:
    server = start(*tls(pair), "--ssl-ciphers=NO-SUCH", ready=False)

    assert server.wait_exit() == FailureCode.INVALID_CONFIG.exit_status
    assert "--ssl-ciphers: 'NO-SUCH'" in server.certificate.read_text()


# ---- CORS


async def preflight(server: Any, origin: str, method: str = "POST", headers: str = "authorization") -> Any:
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    url = server.url + "/v1/completions"
    async with aiohttp.ClientSession() as session, session.options(url, headers=asked) as answer:
        return answer.status, answer.headers, await answer.text()


def test_pages_of_every_origin_may_call_unless_told_otherwise(start) -> None:
    server = start("--api-key=k")
    status, headers, _ = asyncio.run(preflight(server, "https://app.example"))

    assert status == 200  # before the key is asked for: browsers send none with the question
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert "POST" in headers["Access-Control-Allow-Methods"]
    assert headers["Access-Control-Allow-Headers"] == "authorization"


def test_only_the_origins_methods_and_headers_that_are_named_may(start) -> None:
    server = start(
        '--allowed-origins=["https://app.example"]', "--allowed-methods=POST", "--allowed-headers=authorization",
        "--allow-credentials",
    )  # fmt: skip

    async def ask() -> None:
        assert (await preflight(server, "https://app.example"))[0] == 200
        for refused, word in (
            (await preflight(server, "https://evil.example"), "origin"),
            (await preflight(server, "https://app.example", method="DELETE"), "method"),
            (await preflight(server, "https://app.example", headers="authorization, x-other"), "headers"),
        ):
            status, _, text = refused
            assert (status, text) == (400, f"Disallowed CORS {word}")
        async with aiohttp.ClientSession() as session:
            for origin, allowed in (("https://app.example", "https://app.example"), ("https://evil.example", None)):
                for stream in (False, True):
                    body = {**BODY, "stream": stream}
                    url = server.url + "/v1/completions"
                    async with session.post(url, json=body, headers={"Origin": origin}) as answer:
                        assert answer.headers.get("Access-Control-Allow-Origin") == allowed
                        assert (answer.headers.get("Access-Control-Allow-Credentials") == "true") == bool(allowed)

    asyncio.run(ask())


def test_a_request_without_an_origin_gets_no_cors_headers() -> None:
    assert Cors(("*",), ("*",), ("*",), False).response(None) == {}
    assert Cors(("*",), ("*",), ("*",), False).preflight({"Origin": "x"}) is None


# ---- a prefix, and a socket


def test_under_a_root_path_every_route_answers_with_the_prefix_and_without(start) -> None:
    server = start("--root-path=/llm", "--api-key=k")

    async def ask() -> None:
        async with aiohttp.ClientSession() as session:
            for prefix in ("", "/llm"):
                assert (await session.get(f"{server.url}{prefix}/health")).status == 200
                assert (await session.get(f"{server.url}{prefix}/v1/models")).status == 401
                url, key = f"{server.url}{prefix}/v1/completions", {"Authorization": "Bearer k"}
                assert (await session.post(url, json=BODY, headers=key)).status == 200
            assert (await session.get(f"{server.url}/llm/llm/health")).status == 401
            assert (await session.get(f"{server.url}/other/health")).status == 401

    asyncio.run(ask())
    assert server.metric("http_requests_total", handler="/v1/completions", method="POST", status="2xx") == 2


def test_the_api_answers_on_a_unix_socket_and_takes_it_along_when_it_ends(start, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()  # as a process that was killed leaves it
    server = start(f"--uds={path}")

    async def ask() -> int:
        url, connector = "http://localhost/v1/completions", aiohttp.UnixConnector(str(path))
        async with aiohttp.ClientSession(connector=connector) as session, session.post(url, json=BODY) as answer:
            return answer.status

    assert asyncio.run(ask()) == 200
    assert server.get("/readyz")[0] == 200
    server.process.terminate()
    assert server.wait_exit() == 0
    assert not path.exists()


def test_a_path_that_is_no_socket_or_in_use_is_named(start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with socket.socket(socket.AF_UNIX) as used:
        used.bind(str(tmp_path / "used.sock"))
        used.listen()
        for path, code in (
            (tmp_path / "file", FailureCode.PORT_IN_USE),
            (tmp_path / "used.sock", FailureCode.PORT_IN_USE),
            (tmp_path / "no" / "folder.sock", FailureCode.INVALID_CONFIG),
        ):
            server = start(f"--uds={path}", ready=False)
            assert server.wait_exit() == code.exit_status
            assert str(path) in server.certificate.read_text()
    assert (tmp_path / "file").read_text() == "mine"
