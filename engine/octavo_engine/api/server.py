"""The event loop's part of the API process: start-up, serving, draining, and noticing that the engine has died."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import uvloop
from aiohttp import web

from octavo_engine.api import find_model
from octavo_engine.api.admission import QueueLimits
from octavo_engine.api.app import Api
from octavo_engine.api.auth import Keys
from octavo_engine.api.board import Board
from octavo_engine.api.chat_template import ChatTemplate
from octavo_engine.api.connection import ApiRunner
from octavo_engine.api.engine_client import EngineClient
from octavo_engine.api.engine_process import EngineProcess, died
from octavo_engine.api.find_model import ModelFolder
from octavo_engine.api.listen import BACKLOG, port_of
from octavo_engine.api.management import ManagementServer
from octavo_engine.api.metrics import CONTENT_TYPE, Metrics
from octavo_engine.api.screen import Screen
from octavo_engine.api.served_model import ServedModel
from octavo_engine.api.tls import Tls
from octavo_engine.api.tokenizer import GenerationDefaults, Tokenizer, chosen_defaults
from octavo_engine.api.tracing import Tracer
from octavo_engine.api.verify import verify
from octavo_engine.config import EngineConfig, ServerConfig
from octavo_engine.core.messages import Shutdown, Start
from octavo_engine.plan import LARGE_STEP
from octavo_engine.status import Failure, FatalError, Stage

log = logging.getLogger("octavo")

BEAT_S = 1.0
SCREEN_S = 0.2
YOUNG_OBJECTS = 20_000
"""More than there were at the last look make the collector look again."""
LAST_WORDS_S = 5.0
"""How long the last events may take to reach their clients once nothing more will be generated."""


def run(
    engine_config: EngineConfig,
    config: ServerConfig,
    board: Board,
    management: ManagementServer,
    engine: EngineProcess,
    keys: Keys,
    tls: Tls | None,
    listener: socket.socket,
    started: float,
) -> Failure | None:
    """Serve until drained (None) or until something fatal, which is returned."""

    async def main() -> Failure | None:
        server = _Server(engine_config, config, board, management, engine, keys, tls, listener, started)
        return await server.run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


class _Server:
    def __init__(
        self,
        engine_config: EngineConfig,
        config: ServerConfig,
        board: Board,
        management: ManagementServer,
        engine: EngineProcess,
        keys: Keys,
        tls: Tls | None,
        listener: socket.socket,
        started: float,
    ) -> None:
        self._engine_config, self._config, self._board = engine_config, config, board
        self._management, self._engine, self._tls, self._listener = management, engine, tls, listener
        self._loop = asyncio.get_running_loop()
        self._names = config.served_model_name or (engine_config.model,)
        self._metrics = Metrics(board, engine_config, self._names[0], config.older_metric_names)
        # What suits the device is known once it is loaded. Too large a number here does no harm: as soon as a request
        # waits, the engine's own count of running ones is what counts.
        limits = QueueLimits(
            engine_config.max_num_seqs or LARGE_STEP[0],
            engine_config.max_num_queued_reqs,
            engine_config.max_num_queued_tokens,
        )
        self._client = EngineClient(board, self._metrics, limits)
        endpoint = config.otlp_traces_endpoint
        self._tracer = None if endpoint is None else Tracer(endpoint, config.port)
        self._api = Api(board, self._client, self._metrics, keys, config, self._tracer)
        interval = None if config.disable_log_stats else config.log_stats_interval_s
        self._screen = Screen(board, sys.stderr, started, interval, log_format=config.log_format)
        self._screen.keep_apart(logging.getLogger())
        self._drain = asyncio.Event()
        self._hurry = asyncio.Event()  # a second signal: end running requests now

    async def run(self) -> Failure | None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal)
        self._board.on_drain(self._drain_from_any_thread)
        if self._config.enable_metrics:
            self._management.provide_metrics(self._metrics.render, CONTENT_TYPE)
        runner = ApiRunner(
            self._api.application(), handler_cancellation=True, access_log=None, shutdown_timeout=LAST_WORDS_S
        )
        await runner.setup()
        ssl_context = None if self._tls is None else self._tls.context
        if self._config.uds is None:
            # Told again, as the site listens a second time: of 128, its own, 256 connections at once wait a second.
            await web.SockSite(runner, self._listener, ssl_context=ssl_context, backlog=BACKLOG).start()
        else:  # aiohttp's own site would bind the path a second time
            assert runner.server is not None
            # Held: a server that nobody holds is closed.
            self._unix = await self._loop.create_unix_server(
                runner.server, sock=self._listener, ssl=ssl_context, backlog=BACKLOG
            )
        await self._client.connect(self._engine.sock)
        self._screen.hello(self._engine_config.model, self._url, f"http://{self._host}:{self._management.port}")
        background = [self._loop.create_task(self._beat()), self._loop.create_task(self._draw())]
        try:
            return await self._live()
        finally:
            for task in background:
                task.cancel()
            self._screen.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(runner.cleanup(), LAST_WORDS_S)
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)

    async def _live(self) -> Failure | None:
        start_up = self._loop.create_task(self._start_up())
        drain = self._loop.create_task(self._drain.wait())
        waiting: set[asyncio.Future[object]] = {start_up, drain, self._client.gone}  # type: ignore[arg-type]
        while True:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._client.gone in done:
                start_up.cancel()
                return await self._engine_gone()
            if start_up in done:
                waiting.discard(start_up)
                if (error := start_up.exception()) is not None:
                    if not isinstance(error, FatalError):
                        raise error
                    self._board.fail(error.failure)
                    await self._end_engine()
                    return error.failure
            if drain in done:
                start_up.cancel()
                return await self._drain_and_end()

    # ---- start-up

    async def _start_up(self) -> None:
        folder = await self._find(self._engine_config.model, self._engine_config.revision, weights=True)
        text_folder = folder
        if self._engine_config.tokenizer is not None:
            name, revision = self._engine_config.tokenizer, self._engine_config.tokenizer_revision
            text_folder = await self._find(name, revision, weights=False)
        elif (revision := self._engine_config.tokenizer_revision) is not None:
            text_folder = await self._find(self._engine_config.model, revision, weights=False)
        # The engine loads weights while we read the tokenizer.
        self._client.send(Start(str(folder.path), folder.resolved_revision, str(text_folder.path)))
        text = await asyncio.to_thread(_load_text, folder.path, text_folder.path, self._config)
        tokenizer, template, defaults = text
        effective = await self._client.ready
        model = ServedModel(
            names=self._names,
            root=self._engine_config.model,
            tokenizer=tokenizer,
            template=template,
            defaults=defaults,
            max_model_len=effective.max_model_len,
            created=int(time.time()),
            template_defaults=json.loads(self._config.default_chat_template_kwargs or "{}"),
        )
        await verify(self._client, model, self._config)
        # What start-up made stays for good, and each step brings a list for each of its tokens, which live for as long
        # as the step is read: collections after every 700 of them find nothing and take a twentieth of a busy loop.
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, 20, 20)
        self._api.model = model
        self._board.ready(effective)
        self._screen.clear()
        self._screen.ready(effective, self._url, self._names[0], self._curl, self._page)

    async def _find(self, name: str, revision: str | None, *, weights: bool) -> ModelFolder:
        if (folder := find_model.local_folder(name, of="model" if weights else "tokenizer")) is not None:
            return folder
        self._board.enter(Stage.DOWNLOADING)
        moved_at = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal moved_at
            moved_at = time.monotonic()
            self._board.enter(Stage.DOWNLOADING, done, total)

        weights = weights and self._engine_config.load_format != "dummy"
        config = self._engine_config
        store = find_model.store_of(config, name)
        download = _in_daemon_thread(
            self._loop,
            lambda: find_model.download(name, revision, config.download_dir, report, weights=weights, store=store),
        )
        while not (await asyncio.wait([download], timeout=1.0))[0]:
            if (idle := time.monotonic() - moved_at) > self._config.startup_stall_s:
                raise FatalError(find_model.stalled(name, idle))
        return download.result()

    # ---- the end

    def _on_signal(self) -> None:
        if self._drain.is_set():
            self._hurry.set()
        else:
            log.info("draining running=%d timeout_s=%g", self._api.active, self._config.drain_timeout_s)
            self._board.drain()

    def _drain_from_any_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._drain.set)

    async def _drain_and_end(self) -> Failure | None:
        """Running requests go on to their end, up to the deadline; then the rest is ended; then the engine."""
        idle = self._loop.create_task(self._api.idle.wait())
        hurry = self._loop.create_task(self._hurry.wait())
        try:
            await self._first_of(idle, hurry, timeout=self._config.drain_timeout_s)
            if not self._api.idle.is_set() and not self._client.gone.done():
                log.warning("ending requests that are still running count=%d", self._api.active)
                self._client.abort_all()
                await self._first_of(idle, timeout=LAST_WORDS_S)
            if self._client.gone.done():
                return await self._engine_gone()
            await self._end_engine()
            return None
        finally:
            idle.cancel()
            hurry.cancel()

    async def _first_of(self, *tasks: asyncio.Task[object], timeout: float) -> None:
        await asyncio.wait({*tasks, self._client.gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]

    async def _end_engine(self) -> None:
        if self._client.ready.done():
            self._client.send(Shutdown())
        else:
            # While it loads it takes no messages, but it ends by itself when our end of the socket closes.
            self._client.close()
        await asyncio.to_thread(self._engine.end)

    async def _engine_gone(self) -> Failure:
        status = await asyncio.to_thread(self._engine.end)
        failure = self._client.gone.result() or died(status)
        self._board.fail(failure)
        if self._api.active:
            log.error("the engine has ended code=%s active_requests=%d", failure.code, self._api.active)
        # Every stream has its final error event by now; let it reach its client.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._api.idle.wait(), LAST_WORDS_S)
        return failure

    # ---- background

    async def _beat(self) -> None:
        while True:
            self._board.beat()
            now = time.monotonic()
            self._metrics.tick(now)
            self._screen.load(self._metrics, now)
            if self._tls is not None:
                self._tls.refresh()
            await asyncio.sleep(BEAT_S)

    async def _draw(self) -> None:
        while self._api.model is None:
            self._screen.tick(time.monotonic())
            await asyncio.sleep(SCREEN_S)

    @property
    def _host(self) -> str:
        host = self._config.host
        return "localhost" if host in ("", "0.0.0.0", "::") else host

    @property
    def _page(self) -> str | None:
        return f"{self._url}/" if self._config.ui and self._config.uds is None else None

    @property
    def _curl(self) -> str:
        """What a request begins with: `curl`, and how to get in."""
        words = ["curl"]
        if self._config.uds is not None:
            words.append(f"--unix-socket {self._config.uds}")
        if self._tls is not None:
            words.append("--cacert CA.pem" if not self._config.ssl_cert_reqs else "--cacert CA.pem --cert ME.pem")
        if self._api.keys.required:
            words.append("-H 'Authorization: Bearer KEY'")
        return " ".join(words)

    @property
    def _url(self) -> str:
        scheme = "http" if self._tls is None else "https"
        if self._config.uds is not None:
            return f"{scheme}://localhost{self._config.root_path}"
        return f"{scheme}://{self._host}:{port_of(self._listener)}{self._config.root_path}"


def _load_text(
    folder: Path, text_folder: Path, config: ServerConfig
) -> tuple[Tokenizer, ChatTemplate | None, GenerationDefaults]:
    tokenizer = Tokenizer.load(text_folder, model_folder=folder)
    template = ChatTemplate.load(text_folder, tokenizer.special_tokens, config.chat_template)
    return tokenizer, template, chosen_defaults(folder, config)


def _in_daemon_thread(loop: asyncio.AbstractEventLoop, work: Callable[[], ModelFolder]) -> asyncio.Future[ModelFolder]:
    """The result of blocking work that may hang for ever, in a thread that does not outlive the process's end."""
    future: asyncio.Future[ModelFolder] = loop.create_future()

    def finish(result: ModelFolder | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def body() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to who waits for the result
            loop.call_soon_threadsafe(finish, None, error)
        else:
            loop.call_soon_threadsafe(finish, result, None)

    threading.Thread(target=body, name="download", daemon=True).start()
    return future
