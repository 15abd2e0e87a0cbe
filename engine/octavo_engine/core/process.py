"""The engine process: takes messages from the API process, runs steps, sends back what they produced.

One hot thread computes; a reader thread only moves messages into the inbox. When the API process is gone the
reader ends this process at once: nobody could receive what it computes.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_engine import logs
from octavo_engine.config import (
    ArgumentParser,
    ConfigError,
    EngineConfig,
    add_arguments,
    from_namespace,
)
from octavo_engine.core.channel import Channel, ChannelClosedError
from octavo_engine.core.constraint import Constraints
from octavo_engine.core.engine import Engine
from octavo_engine.core.messages import Abort, Fatal, FromEngine, Ready, Shutdown, StageChanged, Start, Submit, ToEngine
from octavo_engine.core.scheduler import Scheduler
from octavo_engine.loader.page_in import PageIn
from octavo_engine.status import ExitStatus, Failure, FailureCode, FatalError, Stage

if TYPE_CHECKING:
    from octavo_engine.runner.model_runner import Loaded, ModelRunner

log = logging.getLogger("octavo.engine")

PROGRESS_INTERVAL_S = 0.1
"""The API process is told of progress no more often than this."""
CHECK_INTERVAL_S = 30.0
"""An idle engine checks its own books this often."""


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="octavo-engine")
    parser.add_argument("--fd", type=int, required=True, help="socket to the API process")
    add_arguments(parser, [EngineConfig])
    namespace = parser.parse_args(argv)
    logs.configure_engine(os.environ)
    # Ctrl-C in a terminal reaches the whole group: the API process decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=namespace.fd))
    try:
        run(from_namespace(EngineConfig, namespace), channel)
    except FatalError as error:
        return _die(channel, error.failure)
    except ConfigError as error:
        return _die(channel, Failure(FailureCode.INVALID_CONFIG, f"{error}.", f"set {error.flag} to {error.expected}"))
    except ChannelClosedError:
        return ExitStatus.OK
    except Exception as error:
        log.exception("the engine failed")
        return _die(channel, _unexpected(error))
    return ExitStatus.OK


def run(config: EngineConfig, channel: Channel) -> None:
    """Load the model and serve until Shutdown."""
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    paging = PageIn()

    def begin(start: Start) -> None:
        if config.load_format != "dummy":
            paging.begin(Path(start.model_path))

    threading.Thread(target=_read, args=(channel, inbox, begin), name="inbox", daemon=True).start()
    # Threads that spin while they wait starve each other when cores are shared, as they are in pods: with another
    # busy process beside it a step took fifteen times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from octavo_engine.runner.quick_torch import import_torch

    import_torch()  # seconds, while the model is looked for and its files come into the page cache
    from octavo_engine.runner.model_runner import ModelRunner

    runner = ModelRunner(config)
    start = inbox.get()
    if isinstance(start, Shutdown):
        return
    assert isinstance(start, Start), start
    # Its threads read the vocabulary while the weights are loaded.
    constraints = _constraints(Path(start.tokenizer_path or start.model_path), Path(start.model_path))
    paging.stop()  # from here on the loader reads, with more threads
    loaded = runner.load(Path(start.model_path), _Progress(channel.send), start.resolved_revision)
    engine = engine_of(config, runner, loaded, constraints)
    # What start-up made stays for good: later collections need not walk through it.
    gc.collect()
    gc.freeze()
    channel.send(Ready(loaded.effective))
    serve(engine, inbox, channel)


def engine_of(config: EngineConfig, runner: ModelRunner, loaded: Loaded, constraints: Constraints | None) -> Engine:
    """The engine as the settings have it: the one road to it, so that LLM ignores none that this process honours."""
    scheduler = Scheduler.of(config, loaded.plan)
    return Engine(
        scheduler, runner, time.monotonic, config.seed, config.max_decode_slowdown, constraints,
        loaded.plan.context_share,
    )  # fmt: skip


def _constraints(tokenizer: Path, model: Path) -> Constraints | None:
    """None when the checkpoint has no tokenizer: then its clients send and get ids, which no grammar knows."""
    # Here and not above: LLM and the tests of this process need no llguidance.
    from octavo_engine.models.config import load_config
    from octavo_engine.structured.matcher import Matchers

    file = tokenizer / "tokenizer.json"
    return Matchers(file, load_config(model).vocab_size) if file.is_file() else None


def serve(engine: Engine, inbox: queue.SimpleQueue[ToEngine], channel: Channel) -> None:
    """Steps while there is work, waits while there is none; returns on Shutdown."""
    while True:
        message = _arrived(inbox, engine.hold_s()) if engine.has_work else _next(inbox, engine)
        if isinstance(message, Shutdown):
            return
        if message is not None:
            _take(engine, message)
        else:
            channel.send(engine.step())


def _arrived(inbox: queue.SimpleQueue[ToEngine], within_s: float) -> ToEngine | None:
    try:
        return inbox.get(timeout=within_s) if within_s else inbox.get_nowait()
    except queue.Empty:
        return None


def _next(inbox: queue.SimpleQueue[ToEngine], engine: Engine) -> ToEngine:
    while inbox.empty() and engine.prepare():
        pass
    while True:
        try:
            return inbox.get(timeout=CHECK_INTERVAL_S)
        except queue.Empty:
            engine.check_integrity()


def _take(engine: Engine, message: ToEngine) -> None:
    if isinstance(message, Submit):
        engine.submit(message)
    elif isinstance(message, Abort):
        engine.abort(message.request_ids)
    else:
        raise AssertionError(f"{type(message).__name__} after the start")


def _read(channel: Channel, inbox: queue.SimpleQueue[ToEngine], on_start: Callable[[Start], None]) -> None:
    while True:
        try:
            message = channel.receive()
        except ChannelClosedError:
            # The hot thread may be inside a step for seconds; nothing is left to be saved.
            os._exit(ExitStatus.OK)
        assert isinstance(message, (Start, Submit, Abort, Shutdown)), message
        if isinstance(message, Start):
            on_start(message)
        inbox.put(message)


class _Progress:
    """Forwards stages at once and progress within one at most every PROGRESS_INTERVAL_S."""

    def __init__(self, send: Callable[[FromEngine], None]) -> None:
        self._send = send
        self._last: tuple[Stage | None, float] = (None, 0.0)

    def __call__(self, stage: Stage, done: int, total: int) -> None:
        now = time.monotonic()
        last_stage, last_s = self._last
        if stage != last_stage or now - last_s >= PROGRESS_INTERVAL_S or (total and done == total):
            self._last = (stage, now)
            self._send(StageChanged(stage, done, total))


def _unexpected(error: Exception) -> Failure:
    text = f"{type(error).__name__}: {error}"
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return Failure(
            FailureCode.OUT_OF_MEMORY, "The device ran out of memory during a step.",
            "lower --gpu-memory-utilization or --max-num-batched-tokens and report this: sizes are planned to fit",
            detail=text[:800],
        )  # fmt: skip
    if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
        return Failure(
            FailureCode.DEVICE_ERROR, "The GPU reported an error and its context is lost.",
            "restart; if it comes back on the same node, check the GPU (nvidia-smi -q, Xid messages in dmesg)",
            detail=text[:800],
        )  # fmt: skip
    return Failure(
        FailureCode.INTERNAL_ERROR, "The engine met an error that it does not know.",
        "restart; please report it with the lines around it from the log", detail=text[:800],
    )  # fmt: skip


def _die(channel: Channel, failure: Failure) -> int:
    try:
        channel.send(Fatal(failure))  # the API process prints it, once for both
    except ChannelClosedError:
        log.error("%s: %s", failure.code, failure)
    return failure.code.exit_status


if __name__ == "__main__":
    # Not sys.exit: joining torch's threads at interpreter exit has been seen to hang after a device error.
    status = main()
    sys.stderr.flush()
    os._exit(status)
