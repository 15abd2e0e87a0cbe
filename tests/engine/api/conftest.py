"""Fixtures of the API process's tests: a small model folder, and a real server with a scripted engine behind it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import tokenizers

from ports import free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PATIENCE_S = 120.0
"""For what comes by itself: a wait ends when it has come, so that a busy machine needs no shorter one."""


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Path:
    """The folder of a real checkpoint; only its tokenizer files are read here."""
    import models

    return models.smollm2()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a chat template, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    core.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": TEMPLATE})
    write_json(folder / "config.json", {"vocab_size": core.get_vocab_size(), "eos_token_id": 256})
    return folder


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


@dataclass
class Server:
    """A running server process."""

    process: subprocess.Popen[str]
    port: int
    management_port: int
    certificate: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def management_url(self) -> str:
        return f"http://127.0.0.1:{self.management_port}"

    def get(self, path: str, timeout: float = 20.0) -> tuple[int, Any]:
        """Status and JSON (or text) of a management route."""
        try:
            with urllib.request.urlopen(self.management_url + path, timeout=timeout) as response:
                status, body = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode()

    def wait_ready(self, timeout_s: float = PATIENCE_S) -> Server:
        def ready() -> bool:
            assert self.process.poll() is None, "the server has ended"
            return self.get("/readyz")[0] == 200

        wait_until(ready, timeout_s)
        return self

    def wait_bound(self, timeout_s: float = PATIENCE_S) -> Server:
        """Until the management port answers, which it does before anything heavy is imported."""
        wait_until(lambda: self.get("/livez")[0] == 200, timeout_s)
        return self

    def wait_idle(self, timeout_s: float = 60.0) -> None:
        """The engine has nothing running and nothing waiting."""

        def idle() -> bool:
            load = self.get("/statusz")[1]["load"]
            return load["running"] == 0 and load["waiting"] == 0 and load["kv_usage"] == 0

        wait_until(idle, timeout_s)

    def metric(self, name: str, **labels: str) -> float:
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_exit(self, timeout_s: float = PATIENCE_S) -> int:
        return self.process.wait(timeout_s)

    def stop(self) -> str:
        """End it if it still runs; its log."""
        if self.process.poll() is None:
            self.process.kill()
        _, log = self.process.communicate(timeout=60)
        return log


Start = Callable[..., Server]


@contextlib.contextmanager
def servers(
    folder: Path, scratch: Path, program: tuple[str, ...] = (str(HERE / "serve_scripted.py"),)
) -> Iterator[Start]:
    """start(*flags, script={…}, ready=True): servers that end with the block."""
    started: list[Server] = []

    def start(*flags: str, script: dict[str, Any] | None = None, ready: bool = True, **environ: str) -> Server:
        port, management_port = free_port(), free_port()
        certificate = scratch / f"termination-{len(started)}.log"
        command = [
            sys.executable, *program, f"--model={folder}", "--served-model-name=tiny",
            f"--port={port}", f"--management-port={management_port}", f"--termination-log={certificate}", *flags,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "engine"),
            "OCTAVO_SCRIPT": json.dumps(script or {}),
            **environ,
        }
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        server = Server(process, port, management_port, certificate)
        started.append(server)
        return server.wait_ready() if ready else server

    try:
        yield start
    finally:
        for server in started:
            log = server.stop()
            sys.stderr.write(log)
            assert "Traceback" not in log, log


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """A function that starts servers of this test's own."""
    with servers(model_folder, tmp_path) as function:
        yield function


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests of a file that leave it as they found it."""
    with servers(model_folder, tmp_path_factory.mktemp("server")) as function:
        yield function()


@pytest.fixture(scope="module")
def start_shared(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A function that starts servers for a file's own fixtures."""
    with servers(model_folder, tmp_path_factory.mktemp("shared")) as function:
        yield function


@pytest.fixture(scope="module")
def start_real(smollm2_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A function that starts servers of SmolLM2 with the real engine, for a file's own fixtures."""
    program = ("-m", "octavo_engine.cli", "serve")
    with servers(smollm2_tokenizer, tmp_path_factory.mktemp("real"), program) as function:
        yield function


@pytest.fixture
async def http() -> Iterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:
        yield session


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.02)
    raise TimeoutError(f"not within {timeout_s} s")


SIGKILL, SIGTERM = signal.SIGKILL, signal.SIGTERM
