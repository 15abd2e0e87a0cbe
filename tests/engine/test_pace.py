"""When a step is launched behind the one under way."""

from __future__ import annotations

import queue
import random
import threading
from typing import Any

import pytest
from simulated import COSTS, Served, serve

from octavo_engine.core import process
from octavo_engine.core.messages import Shutdown, Submit
from octavo_engine.core.pace import EARLIER_S, FIRST_LEAD_S, LATER_S, REMEMBERED, Pace
from octavo_engine.sampling_params import SamplingParams

STEP_S = 0.006


def settled() -> Pace:
    pace = Pace()
    for _ in range(REMEMBERED):
        pace.observe(20, STEP_S)
    return pace


def launch(pace: Pace, in_time: bool) -> float:
    """What it was held for."""
    held = pace.hold_s(20, 0.0)
    pace.launched(in_time)
    return held


def test_while_nothing_is_known_of_a_step_the_next_is_launched_at_once():
    assert Pace().hold_s(20, 0.0) == 0


def test_the_next_step_is_launched_shortly_before_the_end_of_the_one_under_way():
    pace = settled()
    assert pace.hold_s(20, 0.0) == pytest.approx(STEP_S - FIRST_LEAD_S)
    assert pace.hold_s(20, 0.001) == pytest.approx(STEP_S - FIRST_LEAD_S - 0.001)
    assert pace.hold_s(20, STEP_S) == 0


def test_a_step_of_fewer_decodes_may_be_as_much_shorter():
    pace = settled()
    assert pace.hold_s(40, 0.0) == pace.hold_s(20, 0.0) > pace.hold_s(18, 0.0)
    assert pace.hold_s(2, 0.0) == 0


def test_a_step_that_seemed_long_once_is_not_believed():
    pace = settled()
    pace.observe(20, 10 * STEP_S)
    assert pace.hold_s(20, 0.0) == pytest.approx(STEP_S - FIRST_LEAD_S)


def test_a_host_that_was_late_launches_earlier_and_only_slowly_later_again():
    pace = settled()
    before = launch(pace, in_time=False)
    assert launch(pace, in_time=True) == pytest.approx(before - EARLIER_S)
    for _ in range(int(EARLIER_S / LATER_S)):
        after = launch(pace, in_time=True)
    assert after == pytest.approx(before)


def test_a_host_that_is_always_late_launches_at_once_until_it_has_time_again():
    pace = settled()
    for _ in range(50):
        held = launch(pace, in_time=False)
    assert held == 0
    for _ in range(500):
        held = launch(pace, in_time=True)
    assert held > 0.8 * STEP_S


def poisson(rate: float, seconds: float, hold: bool, seed: int = 0) -> Served:
    chance, now, requests = random.Random(seed), 0.0, []
    while (now := now + chance.expovariate(rate)) < seconds:
        requests.append((now, chance.randint(20, 300), chance.randint(50, 300)))
    return serve(COSTS["H200"], requests, hold=hold)


@pytest.mark.parametrize("rate", [5.0, 30.0])
def test_requests_get_their_first_token_earlier_and_the_device_hardly_waits(rate: float):
    at_once, late = (poisson(rate, 150 / rate, hold) for hold in (False, True))

    assert late.at(0.5, late.first_s) < 0.85 * at_once.at(0.5, at_once.first_s)
    assert late.at(0.99, late.first_s) < 1.05 * at_once.at(0.99, at_once.first_s)
    assert late.at(0.5, late.gaps_s) < 1.01 * at_once.at(0.5, at_once.gaps_s)
    assert late.idle_s < at_once.idle_s + 0.01 * late.seconds


@pytest.mark.parametrize("crowd", [1, 150, 400])
def test_where_nobody_arrives_any_more_holding_back_costs_nothing(crowd: int):
    requests = [(0.0, 100, 40 + number % 9) for number in range(crowd)]
    at_once, late = (serve(COSTS["H200"], requests, hold=hold, slowdown=None) for hold in (False, True))
    assert late.seconds < 1.01 * at_once.seconds


class Held:
    """An engine whose next step may wait for a minute, or for the first request."""

    has_work = True

    def __init__(self, inbox: queue.SimpleQueue[Any]) -> None:
        self._inbox = inbox
        self.did: list[str] = []

    def hold_s(self) -> float:
        return 0.0 if self.did else 60.0

    def submit(self, submit: Submit) -> None:
        self.did.append(submit.request_id)

    def step(self) -> str:
        self._inbox.put(Shutdown())
        return "output"


@pytest.mark.timeout(20)
def test_a_request_that_arrives_while_a_step_is_held_back_is_taken_at_once():
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engine, sent = Held(inbox), []
    arrival = threading.Timer(0.05, inbox.put, [Submit("late", [1], SamplingParams())])
    arrival.start()

    process.serve(engine, inbox, type("Channel", (), {"send": sent.append}))

    assert engine.did == ["late"]
    assert sent == ["output"]
