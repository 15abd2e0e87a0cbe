"""What the process knows about itself, as one value with a lock: stage, progress, load, draining, failure.

The event loop and the start-up thread write it; the management server reads it from its own threads, so probes are
answered whatever the event loop is doing. Every transition is pure arithmetic on a passed clock.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from octavo_engine.status import Effective, Failure, Load, Progress, Stage, Statusz

EARLIEST_RETRY_S = 1
LATEST_RETRY_S = 120
"""Clients of the openai package obey a Retry-After up to this long."""
UNKNOWN_RETRY_S = 5

_LOADING = (Stage.STARTING, Stage.DOWNLOADING, Stage.LOADING_WEIGHTS, Stage.CAPTURING, Stage.WARMING_UP)


@dataclass(frozen=True)
class Verdict:
    """A probe's answer: passed or not, and why in a sentence."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class Limits:
    """The thresholds of the probes."""

    startup_stall_s: float
    liveness_stall_s: float
    max_num_queued_reqs: int
    max_num_queued_tokens: int


class Board:
    """Thread-safe. Its life: STARTING → … → READY → DRAINING; FAILED may follow any of them."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        now = clock()
        self._stage = Stage.STARTING
        self._stage_since = now
        self._spent: dict[Stage, float] = {}
        self._progress_at = now  # when start-up last moved
        self._done_bytes = 0
        self._total_bytes = 0
        self._first_done_bytes: int | None = None  # done_bytes when this stage first reported any: the rate's origin
        self._first_done_at = now
        self._effective: Effective | None = None
        self._load = Load()
        self._step_at: float | None = None
        self._busy_since: float | None = None  # when work arrived at an idle engine
        self._loop_beat_at: float | None = None
        self._failure: Failure | None = None
        self._drain = threading.Event()
        self._drained = threading.Event()
        self._on_drain: Callable[[], None] | None = None

    # ---- written by start-up and the event loop

    def enter(self, stage: Stage, done_bytes: int = 0, total_bytes: int = 0) -> None:
        """A stage began or moved on. A stage that the process is past is ignored, and so is all after a failure."""
        with self._lock:
            now = self._clock()
            if stage != self._stage:
                if not self._may_follow(stage):
                    return
                self._spent[self._stage] = self._spent.get(self._stage, 0.0) + now - self._stage_since
                self._stage, self._stage_since, self._progress_at = stage, now, now
                self._done_bytes = self._total_bytes = 0
                self._first_done_bytes = None
            if done_bytes != self._done_bytes:
                self._progress_at = now
            if done_bytes and self._first_done_bytes is None:
                # What was there before (a cache, an interrupted download) arrives at once and says nothing of the rate.
                self._first_done_bytes, self._first_done_at = done_bytes, now
            self._done_bytes, self._total_bytes = done_bytes, total_bytes

    def ready(self, effective: Effective) -> None:
        with self._lock:
            self._effective = effective
        self.enter(Stage.READY)

    def step(self, load: Load) -> None:
        """A step finished."""
        with self._lock:
            self._load = load
            self._step_at = self._clock()

    def busy(self, requests: int) -> None:
        """The API process has this many unfinished requests at the engine."""
        with self._lock:
            if requests == 0:
                self._busy_since = None
            elif self._busy_since is None:
                self._busy_since = self._clock()

    def beat(self) -> None:
        """The event loop is alive."""
        self._loop_beat_at = self._clock()

    def fail(self, failure: Failure) -> None:
        """The first failure is the cause; what follows from it is not recorded."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
        self.enter(Stage.FAILED)

    # ---- draining: asked for from any thread, done by the event loop

    def on_drain(self, callback: Callable[[], None]) -> None:
        """Call this when draining begins, from whatever thread asks for it; now if it has been asked for already."""
        with self._lock:
            self._on_drain = callback
            asked = self._drain.is_set()
        if asked:
            callback()

    def drain(self) -> None:
        """Ask for draining. Asking again changes nothing."""
        with self._lock:
            first = not self._drain.is_set()
            self._drain.set()
            callback = self._on_drain
        self.enter(Stage.DRAINING)
        if first and callback is not None:
            callback()

    def wait_draining(self, timeout_s: float) -> bool:
        return self._drain.wait(timeout_s)

    def drained(self) -> None:
        self._drained.set()

    def wait_drained(self, timeout_s: float) -> bool:
        return self._drained.wait(timeout_s)

    # ---- read by anyone

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def draining(self) -> bool:
        return self._drain.is_set()

    @property
    def failure(self) -> Failure | None:
        return self._failure

    @property
    def effective(self) -> Effective | None:
        return self._effective

    @property
    def load(self) -> Load:
        return self._load

    def statusz(self) -> Statusz:
        with self._lock:
            now = self._clock()
            seconds = {str(stage): spent for stage, spent in self._spent.items()}
            seconds[str(self._stage)] = seconds.get(str(self._stage), 0.0) + now - self._stage_since
            age = None if self._step_at is None else now - self._step_at
            return Statusz(
                stage=self._stage,
                stage_seconds={stage: round(spent, 3) for stage, spent in seconds.items()},
                progress=self._progress(now),
                effective=self._effective,
                load=replace(self._load, last_step_age_s=None if age is None else round(age, 3)),
                failure=self._failure,
            )

    def startup(self) -> Verdict:
        """/startupz: fails on a stall, never on a clock."""
        with self._lock:
            if self._failure is not None:
                return Verdict(False, f"failed: {self._failure}")
            if self._stage not in _LOADING:
                return Verdict(True, "started")
            idle, limit = self._clock() - self._progress_at, self._limits.startup_stall_s
            where = f"{self._stage}{self._percent_text()}"
            if idle > limit:
                return Verdict(
                    False,
                    f"stalled: {where} made no progress for {idle:.0f} s (limit {limit:g} s)",
                )
            return Verdict(True, f"{where}, last progress {idle:.0f} s ago")

    def alive(self) -> Verdict:
        """/livez: dead only when waiting longer would not help."""
        with self._lock:
            now, limit = self._clock(), self._limits.liveness_stall_s
            if self._failure is not None:
                return Verdict(False, f"failed: {self._failure}")
            if self._loop_beat_at is not None and now - self._loop_beat_at > limit:
                return Verdict(False, f"the API's event loop has not run for {now - self._loop_beat_at:.0f} s")
            if self._drain.is_set():
                return Verdict(True, "draining")
            if self._stage in _LOADING:
                return Verdict(True, f"{self._stage}: start-up is judged by /startupz")
            if self._busy_since is None:
                return Verdict(True, "idle")
            stalled = now - max(self._busy_since, self._step_at or 0.0)
            if stalled > limit:
                return Verdict(False, f"requests run and no step finished for {stalled:.0f} s (limit {limit:g} s)")
            return Verdict(True, "running")

    def readiness(self) -> Verdict:
        """/readyz: whether new requests are welcome here."""
        with self._lock:
            if self._failure is not None:
                return Verdict(False, f"failed: {self._failure}")
            if self._drain.is_set():
                return Verdict(False, "draining")
            if self._stage is not Stage.READY:
                return Verdict(False, f"{self._stage}{self._percent_text()}")
            load, limits = self._load, self._limits
            if load.waiting >= limits.max_num_queued_reqs:
                return Verdict(False, f"the queue is full: {load.waiting} requests wait")
            if load.waiting > 0 and load.waiting_prefill_tokens >= limits.max_num_queued_tokens:
                return Verdict(False, f"the queue is full: {load.waiting_prefill_tokens} prompt tokens wait")
            return Verdict(True, "ready")

    def retry_after_s(self) -> int:
        """Seconds after which a refused client should come again: a whole number, as the header wants it."""
        with self._lock:
            if self._stage in _LOADING:
                return retry_seconds(self._progress(self._clock()).eta_s)
            return retry_seconds(self._load.predicted_queue_s or None)

    # ---- private; the lock is held

    def _may_follow(self, stage: Stage) -> bool:
        if self._stage is Stage.FAILED:
            return False
        if stage is Stage.FAILED:
            return True
        if self._drain.is_set():
            return stage is Stage.DRAINING
        order = list(Stage)
        return order.index(stage) > order.index(self._stage)

    def _progress(self, now: float) -> Progress:
        done, total = self._done_bytes, self._total_bytes
        if self._stage not in _LOADING:
            return Progress(percent=100.0 if self._effective is not None else 0.0)
        percent = round(100.0 * min(done, total) / total, 1) if total else 0.0
        eta: float | None = None
        if total and self._first_done_bytes is not None and done > self._first_done_bytes:
            rate = (done - self._first_done_bytes) / max(now - self._first_done_at, 1e-6)
            # Counted from the last report, so that a stalled start-up's estimate grows instead of standing still.
            eta = round(max(0, total - done) / rate, 1)
        return Progress(done, total, percent, eta)

    def _percent_text(self) -> str:
        return f" {100 * self._done_bytes / self._total_bytes:.0f}%" if self._total_bytes else ""


def retry_seconds(estimate_s: float | None) -> int:
    """An estimate as a Retry-After value, within what clients obey."""
    seconds = UNKNOWN_RETRY_S if estimate_s is None else math.ceil(estimate_s)
    return min(max(seconds, EARLIEST_RETRY_S), LATEST_RETRY_S)
