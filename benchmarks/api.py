"""What the API process itself costs per token: `python benchmarks/api.py [--streams 1000] [--step-ms 20]`.

An engine without a model sends one token of every stream at a fixed pace; a client process opens all streams, checks
each event, and the CPU seconds of the API process are read before and after. The figure is CPU time per token, so what
else the machine does matters little; tokens per second and core is its inverse. --profile FILE writes a cProfile of the
API process instead of a figure.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import datetime
import json
import os
import platform
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "tests")]

ROUTES = {
    "chat": "/v1/chat/completions",
    "text": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}
WORDS = " the river runs down to the sea and nobody asks it why"


# ---- the engine: a token of every sequence each step


def engine(fd: int, step_s: float) -> None:
    from octavo_engine.core.channel import Channel, ChannelClosedError
    from octavo_engine.core.messages import FinishReason, Ready, StepOutput, StepStats, Submit, TokenEvent
    from octavo_engine.status import Effective, Load

    channel = Channel(socket.socket(fileno=fd))
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        while True:
            try:
                inbox.put(channel.receive())
            except ChannelClosedError:
                os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    start = inbox.get()
    channel.send(
        Ready(
            Effective(
                model=start.model_path, dtype="float32", kv_dtype="float32", max_model_len=4096, block_size=16,
                num_blocks=10**6, kv_tokens=16 * 10**6, attention_backend="none", engine_version="none",
            )
        )
    )  # fmt: skip
    running: dict[str, list[Any]] = {}
    due = time.monotonic()
    while True:
        while not inbox.empty() or not running:
            message = inbox.get()
            if isinstance(message, Submit):
                running[message.request_id] = [message, 0]
            due = max(due, time.monotonic())
        due += step_s
        time.sleep(max(0.0, due - time.monotonic()))
        events = []
        for id, state in list(running.items()):
            submit, made = state
            prompt = submit.prompt_token_ids
            state[1] = made + 1
            last = made + 1 == submit.sampling.max_tokens
            first = {"num_cached_tokens": 0, "queue_s": 0.0, "prefill_s": 0.0} if made == 0 else {}
            reason = FinishReason.LENGTH if last else None
            events.append(TokenEvent(id, [prompt[made % len(prompt)]], reason, **first))
            if last:
                del running[id]
        channel.send(StepOutput(events, Load(running=len(running)), StepStats()))


# ---- the client: every stream at once, each event looked at


class Reader(asyncio.Protocol):
    """One stream, kept as it came; done when its last event has come."""

    def __init__(self, request: bytes, end: bytes) -> None:
        self.request, self.end = request, end
        self.pieces: list[bytes] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        before = self.pieces[-1][-len(self.end) :] if self.pieces else b""
        self.pieces.append(data)
        if self.end in before + data and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"lost after {len(self.pieces)} reads: {error}"))

    def text(self, pattern: re.Pattern[bytes]) -> tuple[int, str]:
        """How many events carried text, and the text."""
        # The chunks of the transfer encoding lie between events, never within one: each write is whole events.
        found = pattern.findall(b"".join(self.pieces))
        return len(found), "".join(json.loads(b'"' + one + b'"') for one in found)


STRING = rb'"((?:[^"\\]|\\.)*)"'
MARKS = {
    "chat": (rb'"delta":\{"content":' + STRING, b"[DONE]"),
    "text": (rb'"text":' + STRING, b"[DONE]"),
    "messages": (rb'"type":"text_delta","text":' + STRING, b'"type":"message_stop"'),
    "responses": (rb'"delta":' + STRING, b'"type":"response.incomplete"'),
}


async def client(port: int, streams: int, tokens: int, route: str) -> None:
    messages = [{"role": "user", "content": WORDS * 4}]
    body: dict[str, Any] = {
        "chat": {"messages": messages, "max_tokens": tokens}, "text": {"prompt": WORDS * 4, "max_tokens": tokens},
        "messages": {"messages": messages, "max_tokens": tokens},
        "responses": {"input": messages, "max_output_tokens": tokens},
    }[route]  # fmt: skip
    data = json.dumps({**body, "stream": True, "ignore_eos": True}).encode()
    head = f"POST {ROUTES[route]} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    readers = []
    for _ in range(streams):
        _, reader = await loop.create_connection(
            lambda: Reader(head.encode() + data, MARKS[route][1]), "127.0.0.1", port
        )
        readers.append(reader)
    await asyncio.gather(*(reader.done for reader in readers))
    found = [reader.text(re.compile(MARKS[route][0])) for reader in readers]
    texts = {text for _, text in found}
    print(json.dumps({"texts": len(texts), "chars": len(max(texts)), "events": sum(count for count, _ in found)}))


# ---- the measurement


@dataclass(frozen=True)
class Result:
    route: str
    tokens: int
    wall_s: float
    cpu_s: float
    events: int
    texts: int
    """How many different texts the streams had: all were asked the same, so anything but one is an error."""

    def row(self) -> str:
        us = self.cpu_s / self.tokens * 1e6
        figures = f"{self.tokens:,} | {self.events:,} | {self.tokens / self.wall_s:,.0f} | {self.cpu_s:.2f}"
        return f"| {self.route} | {figures} | {us:.1f} | {1e6 / us:,.0f} |"


def measure(route: str, streams: int, tokens: int, step_ms: float, profile: str | None) -> Result:
    import models

    with tempfile.TemporaryDirectory() as scratch, socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0)), two.bind(("127.0.0.1", 0))
        port, management = one.getsockname()[1], two.getsockname()[1]
        one.close(), two.close()
        server_args = ["server", str(models.smollm2()), str(port), str(management), str(streams), str(step_ms)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT / "engine")}
        server = subprocess.Popen([sys.executable, __file__, *server_args, scratch, profile or ""], env=environ)
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{management}/readyz", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            process = psutil.Process(server.pid)
            before, begun = process.cpu_times(), time.monotonic()
            run = [sys.executable, __file__, "client", str(port), str(streams), str(tokens), route]
            out = json.loads(subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout)
            after, wall = process.cpu_times(), time.monotonic() - begun
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
    cpu = after.user + after.system - before.user - before.system
    return Result(route, streams * tokens, wall, cpu, out["events"], out["texts"])


def serve(arguments: list[str]) -> None:
    from octavo_engine.api import serve as module
    from octavo_engine.config import EngineConfig, ServerConfig

    model, port, management, streams, step_ms, scratch, profile = arguments
    if profile:
        profiler = cProfile.Profile()
        profiler.enable()
        leave = module._exit
        module._exit = lambda status: (profiler.dump_stats(profile), leave(status))  # type: ignore[assignment,return-value]
    config = EngineConfig(
        model=model, max_num_seqs=int(streams), max_num_batched_tokens=max(2048, int(streams)),
        max_num_queued_tokens=10**8,
    )  # fmt: skip
    server = ServerConfig(port=int(port), management_port=int(management), termination_log=f"{scratch}/log")
    module.serve(config, server, [sys.executable, __file__, "engine", step_ms])


def main() -> None:
    if sys.argv[1:2] == ["engine"]:
        fd = int(sys.argv[sys.argv.index("--fd") + 1])
        return engine(fd, float(sys.argv[2]) / 1000)
    if sys.argv[1:2] == ["client"]:
        import uvloop

        port, streams, tokens, route = sys.argv[2:6]
        return uvloop.run(client(int(port), int(streams), int(tokens), route))
    if sys.argv[1:2] == ["server"]:
        return serve(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--routes", nargs="+", default=list(ROUTES), choices=list(ROUTES))
    parser.add_argument("--runs", type=int, default=3, help="of each route; the cheapest counts: company only adds")
    parser.add_argument("--profile", help="file for a cProfile of the API process")
    parser.add_argument("--save", help="folder of the result file, named by date")
    given = parser.parse_args()
    lines = [
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {given.streams} streams, "
        f"{given.tokens} tokens each, a step every {given.step_ms:g} ms, the cheapest of {given.runs} runs; load "
        f"of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors",
        "",
        "| route | tokens | events | tokens/s | API CPU s | µs per token | tokens/s of one core |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for route in given.routes:
        results = [measure(route, given.streams, given.tokens, given.step_ms, given.profile) for _ in range(given.runs)]
        for result in results:
            assert result.texts == 1, f"{result.texts} different texts: events were lost or doubled"
        result = min(results, key=lambda one: one.cpu_s)
        lines.append(result.row())
        print(lines[-1], flush=True)
    if given.save:
        path = Path(given.save) / f"api-{datetime.date.today()}.md"
        path.write_text(
            "# The API process's own cost\n\n`python " + " ".join(sys.argv) + "`\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
