"""The life of the API process, from its first line to its exit status.

1. Bind both ports and answer probes: within 300 ms of the process's start, so nothing heavy is imported here.
2. Start the engine process, which imports torch while we go on.
3. Import the rest (aiohttp, tokenizers: a second), find the model, serve until drained or until the engine is gone.
4. Say why: death certificate, exit status.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from octavo_engine import logs
from octavo_engine.api.auth import Keys
from octavo_engine.api.board import Board, Limits
from octavo_engine.api.certificate import write_certificate
from octavo_engine.api.engine_process import ENGINE_COMMAND, EngineProcess
from octavo_engine.api.find_model import local_folder
from octavo_engine.api.listen import listen, listen_unix
from octavo_engine.api.management import ManagementServer
from octavo_engine.api.tls import Tls
from octavo_engine.config import EngineConfig, ServerConfig
from octavo_engine.status import ExitStatus, Failure, FailureCode, FatalError

log = logging.getLogger("octavo")


def serve(
    engine_config: EngineConfig,
    config: ServerConfig,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    warnings: Sequence[str] = (),
) -> NoReturn:
    """Ends the process with its exit status. engine_command: what speaks the channel; its flags are appended.

    warnings: what reading the command line had to say, for the log.
    """
    started = time.monotonic()
    try:
        if config.log_config_file is not None:
            logs.configure_from_file(config.log_config_file)
        else:
            logs.configure(config.log_level, config.log_format)
        for warning in warnings:
            log.warning("%s", warning)
        failure = _serve(engine_config, config, engine_command, started)
    except FatalError as error:
        failure = error.failure
    if failure is not None:
        leave(failure, config.termination_log)
    _exit(ExitStatus.OK)


def leave(failure: Failure, termination_log: str) -> NoReturn:
    """End the process for this reason: one line for people, the certificate for the operator, the status for all."""
    print(f"octavo: {failure.code}: {failure}", file=sys.stderr)
    if failure.detail:
        print(f"  {failure.detail}", file=sys.stderr)
    write_certificate(failure, termination_log)
    _exit(failure.code.exit_status)


def _serve(
    engine_config: EngineConfig, config: ServerConfig, engine_command: Sequence[str], started: float
) -> Failure | None:
    management_socket = listen(config.host, config.management_port, "--management-port")
    api_socket = listen_unix(config.uds) if config.uds is not None else listen(config.host, config.port, "--port")
    board = Board(
        Limits(
            startup_stall_s=config.startup_stall_s,
            liveness_stall_s=config.liveness_stall_s,
            max_num_queued_reqs=engine_config.max_num_queued_reqs,
            max_num_queued_tokens=engine_config.max_num_queued_tokens,
        )
    )
    management = ManagementServer(management_socket, board, config.drain_timeout_s)
    # Until the event loop takes them over. As process 1 of a container, signals without a handler are ignored.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _EarlySignal(board))
    management.start()
    try:
        # What can be refused is refused before an engine is started for it.
        keys = Keys.from_config(config, os.environ)
        tls = Tls.from_config(config)
        _check_generation_config(config.generation_config)
        local_folder(engine_config.model)
        variables = logs.for_engine(config.log_level, config.log_format)
        engine = EngineProcess.start(engine_config, engine_command, variables)
        # Here and not above: aiohttp and tokenizers take a second to import, and probes are answered meanwhile.
        from octavo_engine.api.server import run

        failure = run(engine_config, config, board, management, engine, keys, tls, api_socket, started)
    except FatalError as error:
        board.fail(error.failure)
        failure = error.failure
    if config.uds is not None:
        with contextlib.suppress(OSError):
            os.unlink(config.uds)
    board.drained()
    management.stop()
    return failure


def _check_generation_config(name: str) -> None:
    if name not in ("auto", "vllm") and not (Path(name) / "generation_config.json").is_file():
        fix = "give auto, vllm, or a folder with generation_config.json"
        raise FatalError(Failure(FailureCode.INVALID_CONFIG, f"--generation-config: got {name!r}.", fix))


class _EarlySignal:
    """The first signal asks for an end as soon as the loop runs, the second ends at once."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        if self._board.draining:
            _exit(ExitStatus.OK)
        # Not from the handler itself: it may have interrupted the holder of the board's lock.
        threading.Thread(target=self._board.drain, daemon=True).start()


def _exit(status: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: it joins every thread, and a hung download or template must not hold up the end.
    os._exit(status)
