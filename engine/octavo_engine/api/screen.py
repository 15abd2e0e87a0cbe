"""What a person sees on stderr: a few lines and a bar on a terminal, plain log lines everywhere else."""

from __future__ import annotations

import logging
import os
import time
from typing import TextIO

from octavo_engine import __version__
from octavo_engine.api.board import Board
from octavo_engine.api.metrics import Metrics
from octavo_engine.status import Effective, Stage, Statusz

log = logging.getLogger("octavo")

WORDS = {
    Stage.STARTING: "starting",
    Stage.DOWNLOADING: "downloading",
    Stage.LOADING_WEIGHTS: "loading weights",
    Stage.CAPTURING: "preparing kernels",
    Stage.WARMING_UP: "warming up",
}
BAR_WIDTH = 28
LOG_EVERY_S = 10.0
"""Without a terminal: a line of progress this often."""


class Screen:
    """Fed by tick() a few times a second."""

    def __init__(
        self,
        board: Board,
        stream: TextIO,
        started: float,
        stats_every_s: float | None = None,
        log_format: str = "console",
    ) -> None:
        """stats_every_s: seconds between two lines for the load; None: no such lines."""
        self._board = board
        self._stream = stream
        self._stats_every_s = stats_every_s
        # Whoever asks for JSON reads the lines with a program, also when they run by on a terminal.
        self._is_terminal = stream.isatty() and log_format == "console" and os.environ.get("TERM") != "dumb"
        self._started = started
        self._said: tuple[Stage, bool] | None = None
        """The stage that the last line was about, and whether its bytes were known."""
        self._said_at = started
        self._bar_shown = False

    def hello(self, model: str, url: str, management_url: str) -> None:
        if self._is_terminal:
            self._line(f"\n  octavo {__version__}   {model}\n  {url}   status at {management_url}/statusz\n")
        else:
            log.info("octavo %s model=%s url=%s management=%s", __version__, model, url, management_url)

    def tick(self, now: float) -> None:
        statusz = self._board.statusz()
        if statusz.stage not in WORDS:
            return
        counts = statusz.progress.total_bytes > 0
        if self._is_terminal:
            # A line that wraps cannot be drawn over: each tick would add one.
            self._stream.write("\r\x1b[K" + f"  {bar(statusz)}"[: self._columns() - 1])
            self._stream.flush()
            self._bar_shown = True
        elif (statusz.stage, counts) != self._said or now - self._said_at >= LOG_EVERY_S:
            self._said_at, self._said = now, (statusz.stage, counts)
            log.info("%s", bar(statusz, width=0))

    def ready(self, effective: Effective, url: str, name: str, curl: str, page: str | None = None) -> None:
        """curl: the program and its flags for getting in. page: where a browser finds the chat."""
        seconds = time.monotonic() - self._started
        facts = f"{effective.gpu or 'CPU'} · {effective.dtype} · context {effective.max_model_len:,} tokens"
        if effective.kv_tokens:
            facts += f" · cache {effective.kv_tokens:,} tokens"
        if not self._is_terminal:
            log.info("ready in %.1f s url=%s model=%s %s", seconds, url, name, facts)
            return
        self.clear()
        self._line(
            f"  ready in {seconds:.1f} s   {facts}\n"
            f"  listening on {url}{f'   chat at {page}' if page else ''}\n\n"
            f"  {curl} {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f'    -d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n'
        )

    def load(self, metrics: Metrics, now: float) -> None:
        """One line now and then while there is something to tell; vLLM's, which people know how to read."""
        if self._stats_every_s is None or now - self._said_at < self._stats_every_s:
            return
        load, (prompt, generated) = self._board.load, metrics.throughput()
        if load.running or load.waiting or generated:
            self._said_at = now
            log.info(
                "Engine 000: Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
                "Running: %d reqs, Waiting: %d reqs, GPU KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
                prompt, generated, load.running, load.waiting, 100 * load.kv_usage, 100 * metrics.prefix_hit_rate,
            )  # fmt: skip

    def clear(self) -> None:
        if self._bar_shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._bar_shown = False

    def keep_apart(self, logger: logging.Logger) -> None:
        """Let no line of the log begin behind the bar."""
        for handler in logger.handlers:
            handler.addFilter(self._make_room)

    def _make_room(self, record: logging.LogRecord) -> bool:
        self.clear()
        return True

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:  # what says of itself that it is a terminal, and is none
            return 80

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def bar(statusz: Statusz, width: int = BAR_WIDTH) -> str:
    """One line for the current stage: a bar where bytes are counted, seconds where they are not."""
    progress, seconds = statusz.progress, statusz.stage_seconds.get(str(statusz.stage), 0.0)
    text = f"{WORDS[statusz.stage]:<17}"
    if not progress.total_bytes:
        return f"{text} {seconds:.0f} s"
    if width:
        full = int(width * min(progress.percent, 100.0) / 100)
        text += " " + "━" * full + "─" * (width - full)
    unit, size = ("GB", 1e9) if progress.total_bytes >= 1e9 else ("MB", 1e6)
    done, total = progress.done_bytes / size, progress.total_bytes / size
    eta = f", {progress.eta_s:.0f} s left" if progress.eta_s is not None else ""
    return f"{text} {progress.percent:3.0f}%  {done:.2f} of {total:.2f} {unit}{eta}"
