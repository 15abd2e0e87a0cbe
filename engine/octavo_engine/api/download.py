"""`octavo download`: a model into a store or the Hub's cache; status port and death certificate are as a server's."""

from __future__ import annotations

import concurrent.futures
import logging
import sys
import threading
import time

from octavo_engine.api.board import Board, Limits
from octavo_engine.api.find_model import ModelFolder, download, local_folder, stalled, store_of
from octavo_engine.api.listen import listen
from octavo_engine.api.management import ManagementServer
from octavo_engine.api.screen import Screen
from octavo_engine.api.serve import leave
from octavo_engine.config import ConfigError, EngineConfig, ServerConfig
from octavo_engine.status import ExitStatus, FatalError, Stage

TICK_S = 0.2


def run(engine: EngineConfig, config: ServerConfig) -> int:
    """The exit status; a failure ends the process with its own."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=config.log_level.upper(), stream=sys.stderr
    )
    if not engine.model:
        raise ConfigError("--model", engine.model, "a Hugging Face id, or s3://bucket/folder")
    started = time.monotonic()
    limits = Limits(config.startup_stall_s, config.liveness_stall_s, max_num_queued_reqs=0, max_num_queued_tokens=0)
    board = Board(limits)
    try:
        management = ManagementServer(listen(config.host, config.management_port, "--management-port"), board, 0)
        management.start()
        screen = Screen(board, sys.stderr, started)
        screen.keep_apart(logging.getLogger())
        folder = _download(engine, config, board, screen)
    except FatalError as error:
        board.fail(error.failure)
        leave(error.failure, config.termination_log)
    print(folder.path)
    return ExitStatus.OK


def _download(engine: EngineConfig, config: ServerConfig, board: Board, screen: Screen) -> ModelFolder:
    if folder := local_folder(engine.model):
        return folder
    store = store_of(engine, engine.model)
    board.enter(Stage.DOWNLOADING)
    moved_at = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal moved_at
        moved_at = time.monotonic()
        board.enter(Stage.DOWNLOADING, done, total)

    result: concurrent.futures.Future[ModelFolder] = concurrent.futures.Future()

    def work() -> None:
        try:
            result.set_result(download(engine.model, engine.revision, engine.download_dir, report, store=store))
        except BaseException as error:  # noqa: BLE001 -- it is raised in the thread that waits
            result.set_exception(error)

    # A daemon, as a hung download must not hold up the end.
    threading.Thread(target=work, name="download", daemon=True).start()
    while True:
        done, _ = concurrent.futures.wait([result], timeout=TICK_S)
        if done:
            screen.clear()
            return result.result()
        now = time.monotonic()
        screen.tick(now)
        if (idle := now - moved_at) > config.startup_stall_s:
            raise FatalError(stalled(engine.model, idle))
