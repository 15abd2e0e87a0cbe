"""Workers: one look at a time for each key, nothing lost, failures tried again."""

from __future__ import annotations

import asyncio
import random

import pytest

from octavo_operator import workers as module
from octavo_operator.cache import key_of
from octavo_operator.handlers import is_news
from octavo_operator.workers import LAST_RETRY_S, Next, Workers, retry_delay

A, B = ("ns", "a"), ("ns", "b")


class Looks:
    """A look that does what the test says, and remembers what happened."""

    def __init__(self, *outcomes, takes_s: float = 0.0) -> None:
        self.outcomes, self.takes_s = list(outcomes), takes_s
        self.seen: list[tuple] = []
        self.errors: list[Exception] = []
        self.wait_s = 0.0
        self.running, self.most = 0, 0
        self.by_key: dict = {}

    async def __call__(self, key, changed):
        assert not self.by_key.get(key), "two looks at one key"
        self.by_key[key] = True
        self.running += 1
        self.most = max(self.most, self.running)
        self.seen.append((key, changed))
        try:
            await asyncio.sleep(self.takes_s)
            outcome = self.outcomes.pop(0) if self.outcomes else Next()
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        finally:
            self.running -= 1
            self.by_key[key] = False

    def on_error(self, key, error):
        self.errors.append(error)
        return self.wait_s


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "MIN_INTERVAL_S", 0.005)
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.01)


async def until(condition, timeout_s: float = 60.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 -- what is waited for is inside the code under test
            await asyncio.sleep(0.001)


async def test_a_wake_is_a_look_and_silence_is_none():
    looks = Looks()
    workers = Workers(looks, looks.on_error)
    workers.wake(A)
    await until(lambda: len(looks.seen) == 1)
    await asyncio.sleep(0.03)
    await workers.close()

    assert looks.seen == [(A, True)]


async def test_many_wakes_during_a_look_are_one_more_look():
    looks = Looks(takes_s=0.02)
    workers = Workers(looks, looks.on_error)
    workers.wake(A)
    await until(lambda: looks.running == 1)
    for _ in range(100):
        workers.wake(A)
    await until(lambda: len(looks.seen) == 2 and looks.running == 0)
    await asyncio.sleep(0.03)
    await workers.close()

    assert looks.seen == [(A, True), (A, True)]


async def test_time_that_passes_is_a_look_without_news():
    looks = Looks(Next(0.01), Next(0.01), Next())
    workers = Workers(looks, looks.on_error)
    workers.wake(A)
    await until(lambda: len(looks.seen) == 3)
    await workers.close()

    assert looks.seen == [(A, True), (A, False), (A, False)]


async def test_a_failed_look_is_tried_again_with_everything_read_anew():
    looks = Looks(RuntimeError("x"), RuntimeError("y"), Next())
    workers = Workers(looks, looks.on_error)
    workers.wake(A)
    await until(lambda: len(looks.seen) == 3)
    await workers.close()

    assert looks.seen == [(A, True)] * 3
    assert [str(error) for error in looks.errors] == ["x", "y"]


async def test_a_look_that_is_to_wait_longer_than_its_delay_does():
    looks = Looks(RuntimeError("x"), Next())
    looks.wait_s = 0.2
    workers = Workers(looks, looks.on_error)
    workers.wake(A)
    await until(lambda: looks.errors)
    await asyncio.sleep(0.1)
    early = len(looks.seen)
    await until(lambda: len(looks.seen) == 2)
    await workers.close()

    assert early == 1


async def test_a_failure_of_one_key_leaves_the_others_alone():
    class Half(Looks):
        async def __call__(self, key, changed):
            if key == A:
                raise RuntimeError("a")
            return await super().__call__(key, changed)

    looks = Half()
    workers = Workers(looks, looks.on_error)
    workers.wake(A)
    workers.wake(B)
    await until(lambda: looks.seen == [(B, True)])
    await workers.close()


async def test_a_worker_ends_with_its_object_and_comes_back_with_it():
    looks = Looks(Next(gone=True), Next())
    workers = Workers(looks, looks.on_error)
    workers.wake(A)
    await until(lambda: not workers.keys)
    workers.wake(A)
    await until(lambda: len(looks.seen) == 2)
    await workers.close()

    assert looks.seen == [(A, True), (A, True)]


async def test_a_wake_while_the_object_is_found_gone_is_not_lost():
    looks = Looks(Next(gone=True), Next(), takes_s=0.01)
    workers = Workers(looks, looks.on_error)
    workers.wake(A)
    await until(lambda: looks.running == 1)
    workers.wake(A)
    await until(lambda: len(looks.seen) == 2)
    await workers.close()


async def test_no_more_looks_at_once_than_allowed():
    looks = Looks(takes_s=0.005)
    workers = Workers(looks, looks.on_error, concurrency=3)
    for number in range(20):
        workers.wake(("ns", f"s{number}"))
    await until(lambda: len(looks.seen) == 20)
    await workers.close()

    assert looks.most == 3


async def test_keys_that_wait_for_their_turn_are_counted():
    looks = Looks(takes_s=0.02)
    workers = Workers(looks, looks.on_error, concurrency=2)
    for number in range(5):
        workers.wake(("ns", f"s{number}"))
    await until(lambda: looks.running == 2)
    waiting = workers.waiting
    await until(lambda: len(looks.seen) == 5)
    after = workers.waiting
    for number in range(5):
        workers.wake(("ns", f"s{number}"))
    await until(lambda: workers.waiting == 3)
    await workers.close()

    assert (waiting, after, workers.waiting) == (3, 0, 0)


async def test_random_wakes_never_run_two_looks_of_a_key_and_the_last_wake_is_answered():
    rng = random.Random(3)
    looks = Looks(takes_s=0.001)
    workers = Workers(looks, looks.on_error)
    keys = [("ns", f"s{number}") for number in range(5)]
    for _ in range(200):
        workers.wake(rng.choice(keys))
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() / 500)
    await asyncio.sleep(0.05)
    seen = len(looks.seen)
    for key in keys:
        workers.wake(key)
    await until(lambda: len(looks.seen) == seen + 5)
    await workers.close()

    assert looks.errors == []


def test_delays_grow_to_a_bound(monkeypatch):
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.5)
    delays = [retry_delay(failures) for failures in range(1, 60)]

    assert delays[0] < 0.7
    assert max(delays) <= LAST_RETRY_S * 1.25
    assert min(delays[10:]) >= LAST_RETRY_S


@pytest.mark.parametrize(
    ("event", "generation", "observed", "metadata", "news"),
    [
        (None, 1, 1, {}, True),
        ("ADDED", 1, None, {}, True),
        ("DELETED", 1, 1, {}, True),
        ("MODIFIED", 2, 1, {}, True),
        ("MODIFIED", 1, 1, {}, False),
        ("MODIFIED", 1, 1, {"deletionTimestamp": "x"}, True),
    ],
)
def test_our_own_status_is_no_news(event, generation, observed, metadata, news):
    body = {"metadata": {"generation": generation, **metadata}, "status": {"observedGeneration": observed}}

    assert is_news(event, body) is news


def test_a_child_tells_its_server_by_its_label():
    body = {"metadata": {"namespace": "ns", "name": "x-1", "labels": {"octavo.dev/server": "x"}}}

    assert key_of("Service", body["metadata"]) == ("ns", "x")
