"""The board's arithmetic, with a clock that the tests turn."""

from __future__ import annotations

import pytest

from octavo_engine.api.board import Board, Limits, retry_seconds
from octavo_engine.status import Effective, Failure, FailureCode, Load, Stage

LIMITS = Limits(startup_stall_s=300, liveness_stall_s=60, max_num_queued_reqs=10, max_num_queued_tokens=1000)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Board:
    return Board(LIMITS, clock)


def make_ready(board: Board) -> Board:
    board.ready(Effective(max_model_len=512, kv_tokens=1600))
    return board


def test_seconds_are_counted_per_stage_and_the_current_one_goes_on(board: Board, clock: Clock) -> None:
    clock.now += 2
    board.enter(Stage.LOADING_WEIGHTS, 0, 100)
    clock.now += 3
    board.enter(Stage.WARMING_UP)
    clock.now += 1
    make_ready(board)
    clock.now += 5

    assert board.statusz().stage_seconds == {
        "starting": 2.0, "loading_weights": 3.0, "warming_up": 1.0, "ready": 5.0
    }  # fmt: skip


def test_a_stage_that_is_past_does_not_come_back(board: Board) -> None:
    board.enter(Stage.WARMING_UP)
    board.enter(Stage.LOADING_WEIGHTS, 5, 10)

    assert board.stage is Stage.WARMING_UP


def test_nothing_follows_a_failure_and_the_first_one_stays(board: Board) -> None:
    first = Failure(FailureCode.OUT_OF_MEMORY, "first")
    board.fail(first)
    board.fail(Failure(FailureCode.ENGINE_DIED, "second"))
    make_ready(board)

    assert board.stage is Stage.FAILED
    assert board.statusz().failure == first
    assert not board.startup().ok
    assert not board.alive().ok
    assert not board.readiness().ok


@pytest.mark.parametrize(
    ("reports", "percent", "eta"),
    [
        ([(0, 0, 0)], 0.0, None),
        ([(0, 0, 1000)], 0.0, None),
        ([(0, 100, 1000)], 10.0, None),  # a single report has no rate
        ([(0, 100, 1000), (10, 300, 1000)], 30.0, 35.0),
        ([(0, 500, 1000), (1, 600, 1000)], 60.0, 4.0),  # what was cached already does not count as speed
        ([(0, 1, 1000), (10, 1000, 1000)], 100.0, 0.0),
    ],
)
def test_the_time_left_comes_from_the_rate(board: Board, clock: Clock, reports, percent, eta) -> None:
    start = clock.now
    for second, done, total in reports:
        clock.now = start + second
        board.enter(Stage.LOADING_WEIGHTS, done, total)

    progress = board.statusz().progress
    assert progress.percent == percent
    assert progress.eta_s == (None if eta is None else pytest.approx(eta, abs=0.1))


def test_startup_fails_on_a_stall_and_not_on_a_clock(board: Board, clock: Clock) -> None:
    board.enter(Stage.DOWNLOADING, 0, 1000)
    for done in range(1, 10):
        clock.now += 299
        board.enter(Stage.DOWNLOADING, done, 1000)
        assert board.startup().ok
    clock.now += 301

    verdict = board.startup()
    assert not verdict.ok
    assert "downloading 1%" in verdict.reason
    assert "301 s" in verdict.reason


def test_the_same_progress_again_is_no_progress(board: Board, clock: Clock) -> None:
    board.enter(Stage.LOADING_WEIGHTS, 5, 10)
    clock.now += 200
    board.enter(Stage.LOADING_WEIGHTS, 5, 10)
    clock.now += 101

    assert not board.startup().ok


def test_startup_passes_for_ever_once_ready(board: Board, clock: Clock) -> None:
    make_ready(board)
    clock.now += 10_000

    assert board.startup().ok


def test_an_idle_engine_is_alive(board: Board, clock: Clock) -> None:
    make_ready(board)
    board.step(Load())
    clock.now += 10_000

    assert board.alive().ok


@pytest.mark.parametrize(("since_work", "since_step", "alive"), [(59, 59, True), (61, 61, False), (500, 5, True)])
def test_running_work_without_a_finished_step_is_dead(board, clock, since_work, since_step, alive) -> None:
    make_ready(board)
    end = clock.now + since_work
    board.busy(3)
    clock.now = end - since_step
    if since_step < since_work:
        board.step(Load(running=3))
    clock.now = end

    assert board.alive().ok is alive


def test_work_that_arrives_after_a_long_idle_time_has_its_own_minute(board: Board, clock: Clock) -> None:
    make_ready(board)
    board.step(Load())
    clock.now += 10_000
    board.busy(1)
    clock.now += 30

    assert board.alive().ok


def test_a_draining_engine_is_alive_and_not_ready(board: Board, clock: Clock) -> None:
    make_ready(board)
    board.busy(1)
    board.drain()
    clock.now += 100

    assert board.alive().ok
    assert not board.readiness().ok
    assert board.startup().ok
    assert board.stage is Stage.DRAINING


def test_a_blocked_event_loop_is_dead_even_when_draining(board: Board, clock: Clock) -> None:
    make_ready(board)
    board.beat()
    board.drain()
    clock.now += 61

    assert not board.alive().ok
    assert "event loop" in board.alive().reason


def test_loading_is_alive_however_long_it_takes(board: Board, clock: Clock) -> None:
    clock.now += 100_000

    assert board.alive().ok


@pytest.mark.parametrize(
    ("load", "ready"),
    [
        (Load(), True),
        (Load(running=256, waiting=9), True),
        (Load(waiting=10), False),
        (Load(waiting=1, waiting_prefill_tokens=1000), False),
        (Load(waiting=0, waiting_prefill_tokens=5000), True),  # they are being computed, nobody waits behind
    ],
)
def test_a_full_queue_is_not_ready(board: Board, load: Load, ready: bool) -> None:
    make_ready(board)
    board.step(load)

    assert board.readiness().ok is ready


def test_draining_is_told_once_to_whoever_registers_early_or_late(board: Board) -> None:
    told: list[int] = []
    board.on_drain(lambda: told.append(1))
    board.drain()
    board.drain()
    board.on_drain(lambda: told.append(2))

    assert told == [1, 2]


def test_loading_goes_on_silently_while_draining(board: Board) -> None:
    board.drain()
    board.enter(Stage.WARMING_UP)

    assert board.stage is Stage.DRAINING


def test_the_age_of_the_last_step_is_counted_when_asked(board: Board, clock: Clock) -> None:
    make_ready(board)
    assert board.statusz().load.last_step_age_s is None
    board.step(Load(running=1))
    clock.now += 2.5

    assert board.statusz().load.last_step_age_s == 2.5


@pytest.mark.parametrize(("estimate", "seconds"), [(None, 5), (0.0, 1), (0.2, 1), (7.01, 8), (9999, 120)])
def test_retry_after_is_a_whole_number_that_clients_obey(estimate, seconds) -> None:
    assert retry_seconds(estimate) == seconds
