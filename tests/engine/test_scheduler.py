"""The scheduler: who runs next, for how many tokens, on which blocks; and random traffic through the engine's step.

The runner here is a naive model of a device: each cached position holds what a transformer's keys and values depend
on (the salt's name and every token up to it), so that a block that was shared, overwritten or handed on wrongly is
seen by the next step that reads it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from octavo_engine.core.engine import Engine
from octavo_engine.core.messages import FinishReason, Submit
from octavo_engine.core.request import Request
from octavo_engine.core.scheduler import LOOKED_AT, Commit, Scheduler, SchedulerConfig
from octavo_engine.core.step import Sampled, StepPlan
from octavo_engine.sampling_params import SamplingParams

EOS = 2
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


def make_scheduler(num_blocks: int = 16, **settings: Any) -> Scheduler:
    defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "block_size": 4}
    return Scheduler(SchedulerConfig(**{**defaults, **settings}), num_blocks)


_arrivals = iter(range(10**9))


def make_request(prompt: int | list[int] = 5, name: str = "r", salt: str | None = None, **settings: Any) -> Request:
    """prompt: its tokens, or how many (then they differ from every other request's)."""
    arrival = next(_arrivals)
    tokens = prompt if isinstance(prompt, list) else [arrival * 1000 + i for i in range(prompt)]
    priority = settings.pop("priority", 0)
    ends = settings.pop("eos", ())
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **settings})
    submit = Submit(name, tokens, sampling, eos_token_ids=ends, priority=priority, cache_salt=salt)
    return Request.of(submit, arrival, 0.0, seed=0)


def step(scheduler: Scheduler, token: Callable[[int], int] = lambda row: 7) -> tuple[StepPlan, list[Commit]]:
    """Plan, "compute" and commit one step."""
    plan = scheduler.schedule(1.0)
    commits = scheduler.commit(plan, [token(i.row) for i in plan.items if i.samples], 2.0) if plan.items else []
    scheduler.check_integrity()
    return plan, commits


def shape(plan: StepPlan) -> list[tuple[int, int, bool]]:
    return [(item.start, item.count, item.samples) for item in plan.items]


# ---- one step


def test_a_prompt_is_computed_at_once_and_then_token_by_token():
    scheduler = make_scheduler()
    scheduler.add(make_request(5))

    assert shape(step(scheduler)[0]) == [(0, 5, True)]
    assert shape(step(scheduler)[0]) == [(5, 1, True)]


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks():
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.add(make_request(14))

    assert [shape(step(scheduler)[0]) for _ in range(4)] == [
        [(0, 6, False)], [(6, 6, False)], [(12, 2, True)], [(14, 1, True)],
    ]  # fmt: skip


def test_decodes_come_before_a_chunk_and_take_from_its_budget():
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.add(make_request(3))
    step(scheduler)
    scheduler.add(make_request(12))

    assert shape(step(scheduler)[0]) == [(3, 1, True), (0, 5, False)]
    assert shape(step(scheduler)[0]) == [(4, 1, True), (5, 5, False)]


def test_prompts_take_no_more_than_the_step_allows_them_and_decodes_are_not_counted():
    scheduler = make_scheduler(num_blocks=32)
    scheduler.add(make_request(3))
    step(scheduler)
    scheduler.add(make_request(12))

    asked: list[tuple[int, int]] = []

    def allow(tokens: int | None) -> Callable[[int, int], int | None]:
        def allowed(decodes: int, context: int) -> int | None:
            asked.append((decodes, context))
            return tokens

        return allowed

    assert shape(scheduler.schedule(1.0, allow(4))) == [(3, 1, True), (0, 4, False)]
    assert shape(scheduler.schedule(1.0, allow(6))) == [(4, 1, True), (4, 6, False)]
    assert shape(scheduler.schedule(1.0, allow(None))) == [(5, 1, True), (10, 2, True)]
    assert asked == [(1, 3), (1, 4), (1, 5)]


def test_a_prompt_longer_than_a_step_leaves_half_of_it_to_the_ones_behind():
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=8)
    scheduler.add(make_request(30))
    assert shape(step(scheduler)[0]) == [(0, 8, False)]

    scheduler.add(make_request(3))
    scheduler.add(make_request(12))
    assert shape(step(scheduler)[0]) == [(0, 1, False), (8, 4, False), (0, 3, True)]
    assert sorted(shape(step(scheduler)[0])) == [(1, 4, False), (3, 1, True), (12, 3, False)]


def test_of_two_long_prompts_the_first_is_computed_before_the_second_and_a_short_one_passes_both():
    scheduler = make_scheduler(num_blocks=48, max_num_batched_tokens=8)
    for length in (30, 40, 3):
        scheduler.add(make_request(length, max_tokens=1))

    assert shape(step(scheduler)[0]) == [(0, 5, False), (0, 3, True)]
    assert [shape(step(scheduler)[0]) for _ in range(4)] == [
        [(5, 8, False)], [(13, 8, False)], [(21, 8, False)], [(29, 1, True), (0, 7, False)],
    ]  # fmt: skip


def test_a_long_prompt_that_is_cached_passes_a_long_one_that_is_not():
    scheduler = make_scheduler(num_blocks=48, max_num_batched_tokens=8)
    known = list(range(40))
    scheduler.add(make_request(known, max_tokens=1))
    for _ in range(5):
        step(scheduler)

    scheduler.add(make_request(30, max_tokens=1))
    scheduler.add(make_request(known, max_tokens=1))
    assert shape(step(scheduler)[0]) == [(0, 4, False), (36, 4, True)]


def test_an_urgent_prompt_does_not_wait_for_a_long_one_that_is_not():
    scheduler = make_scheduler(num_blocks=48, max_num_batched_tokens=8)
    scheduler.add(make_request(30, priority=1))
    step(scheduler)

    scheduler.add(make_request(40))
    assert shape(step(scheduler)[0]) == [(8, 4, False), (0, 4, False)]
    assert shape(step(scheduler)[0]) == [(4, 4, False), (12, 4, False)]


def test_no_more_than_a_few_long_prompts_are_looked_at_behind_one():
    scheduler = make_scheduler(num_blocks=48, max_num_batched_tokens=8, max_num_seqs=32)
    for length in (*[30] * (LOOKED_AT + 1), 3):
        scheduler.add(make_request(length, max_tokens=1))

    assert shape(step(scheduler)[0]) == [(0, 8, False)]


def test_without_chunks_a_prompt_waits_until_the_budget_has_room_for_all_of_it():
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=64, enable_chunked_prefill=False)
    scheduler.add(make_request(40))
    scheduler.add(make_request(30))

    assert shape(step(scheduler)[0]) == [(0, 40, True)]
    assert shape(step(scheduler)[0]) == [(40, 1, True), (0, 30, True)]


def test_no_more_run_than_there_are_rows():
    scheduler = make_scheduler(max_num_seqs=2)
    for _ in range(3):
        scheduler.add(make_request(2))

    assert len(step(scheduler)[0].items) == 2
    assert (len(scheduler.running), len(scheduler.waiting)) == (2, 1)


def test_a_request_is_admitted_only_when_all_of_its_prompt_fits():
    scheduler = make_scheduler(num_blocks=16, max_num_batched_tokens=8)
    scheduler.add(make_request(40))  # 10 of 16 blocks
    for _ in range(5):
        step(scheduler)
    scheduler.add(make_request(30))  # 8 blocks, and 6 are free

    step(scheduler)
    assert len(scheduler.running) == 1


def test_requests_are_served_by_priority_and_then_in_order_of_arrival():
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in (("late", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        scheduler.add(make_request(2, name, priority=priority, max_tokens=1))

    order = []
    while scheduler.has_work:
        order += [commit.request.id for commit in step(scheduler)[1]]
    assert order == ["urgent", "first", "second", "late"]


# ---- the prefix cache


def test_a_known_prefix_is_not_computed_again():
    scheduler = make_scheduler()
    prompt = list(range(100, 113))
    scheduler.add(make_request(prompt, max_tokens=1))
    step(scheduler)
    again = make_request(prompt, max_tokens=1)
    scheduler.add(again)

    assert shape(step(scheduler)[0]) == [(12, 1, True)]
    assert again.num_cached_prompt == 12
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (26, 12)


def test_the_last_token_of_a_prompt_is_always_computed():
    scheduler = make_scheduler()
    prompt = list(range(100, 112))  # exactly three blocks
    scheduler.add(make_request(prompt, max_tokens=1))
    step(scheduler)
    scheduler.add(make_request(prompt, max_tokens=1))

    assert shape(step(scheduler)[0]) == [(8, 4, True)]


def test_another_salt_shares_nothing():
    scheduler = make_scheduler()
    prompt = list(range(100, 113))
    scheduler.add(make_request(prompt, max_tokens=1, salt="a"))
    step(scheduler)
    scheduler.add(make_request(prompt, max_tokens=1, salt="b"))

    assert shape(step(scheduler)[0]) == [(0, 13, True)]


def test_without_prefix_caching_everything_is_computed():
    scheduler = make_scheduler(enable_prefix_caching=False)
    prompt = list(range(100, 113))
    for _ in range(2):
        scheduler.add(make_request(prompt, max_tokens=1))
        assert shape(step(scheduler)[0]) == [(0, 13, True)]

    assert scheduler.prefix_queries == 0


# ---- preemption


def test_the_youngest_gives_way_and_comes_back_with_its_output():
    scheduler = make_scheduler(num_blocks=6, max_model_len=24)
    old, young = make_request(11, "old", max_tokens=12), make_request(11, "young", max_tokens=12)
    scheduler.add(old)
    scheduler.add(young)
    while young.num_preemptions == 0:
        step(scheduler)
    known = list(young.tokens)
    assert old.num_preemptions == 0
    while scheduler.has_work:
        step(scheduler)

    assert young.tokens[: len(known)] == known
    assert (len(old.tokens), len(young.tokens)) == (23, 23)
    assert scheduler.num_preemptions == young.num_preemptions


def test_a_step_that_preempts_admits_nobody():
    scheduler = make_scheduler(num_blocks=6, max_model_len=24)
    scheduler.add(make_request(11, "old", max_tokens=12))
    scheduler.add(make_request(11, "young", max_tokens=12))
    while scheduler.num_preemptions == 0:
        plan, _ = step(scheduler)

    assert len(plan.items) == 1
    assert [request.id for request in scheduler.waiting] == ["young"]


def test_a_request_that_gives_way_to_one_planned_after_it_is_not_in_the_step():
    scheduler = make_scheduler(num_blocks=8, max_model_len=32, max_num_batched_tokens=9)
    scheduler.add(make_request(9, "young", max_tokens=20))
    for _ in range(2):
        step(scheduler)
    scheduler.add(make_request(20, "old", max_tokens=1, priority=-1))

    # In the last one the decode was planned first and had taken the last block.
    assert [shape(step(scheduler)[0]) for _ in range(3)] == [
        [(10, 1, True), (0, 8, False)], [(11, 1, True), (8, 8, False)], [(16, 4, True)],
    ]  # fmt: skip
    assert [request.id for request in scheduler.waiting] == ["young"]


def test_preempting_all_changes_no_output():
    scheduler = make_scheduler()
    request = make_request(5, max_tokens=6)
    scheduler.add(request)
    tokens = iter(range(10, 20))
    while scheduler.has_work:
        step(scheduler, lambda row: next(tokens))
        scheduler.preempt_all()
        scheduler.check_integrity()

    assert request.tokens[5:] == [10, 11, 12, 13, 14, 15]


# ---- the end of a request


@pytest.mark.parametrize(
    ("settings", "tokens", "reason", "stop", "length"),
    [
        ({"max_tokens": 3}, [5, 5, 5], FinishReason.LENGTH, None, 3),
        ({"max_tokens": 9}, [5, EOS], FinishReason.STOP, EOS, 2),
        ({"max_tokens": 9, "stop_token_ids": [5]}, [4, 5], FinishReason.STOP, 5, 2),
        ({"max_tokens": 4, "ignore_eos": True}, [EOS, EOS, EOS, EOS], FinishReason.LENGTH, None, 4),
        ({"max_tokens": 9, "ignore_eos": True, "stop_token_ids": [EOS]}, [EOS], FinishReason.STOP, EOS, 1),
        ({"max_tokens": 9, "min_tokens": 2}, [EOS, EOS, EOS], FinishReason.STOP, EOS, 3),
        ({"max_tokens": 2}, [5, EOS], FinishReason.STOP, EOS, 2),
        ({"max_tokens": None}, [5] * 11, FinishReason.LENGTH, None, 11),
    ],
)
def test_a_request_ends_where_its_parameters_say(settings, tokens, reason, stop, length):
    scheduler = make_scheduler(max_model_len=16)
    request = make_request(5, eos=(EOS,), **settings)
    scheduler.add(request)
    given = iter(tokens)
    last: list[Commit] = []
    while scheduler.has_work:
        last = step(scheduler, lambda row: next(given))[1]

    assert (last[-1].finish_reason, last[-1].stop_token_id) == (reason, stop)
    assert request.num_output == length
    assert next(given, None) is None


def test_logits_that_are_not_finite_end_one_request_and_no_other():
    scheduler = make_scheduler()
    broken, whole = make_request(3, "broken"), make_request(3, "whole")
    scheduler.add(broken)
    scheduler.add(whole)
    step(scheduler)
    broken_row = broken.row
    _, commits = step(scheduler, lambda row: -1 if row == broken_row else 7)

    assert {c.request.id: c.finish_reason for c in commits} == {"broken": FinishReason.ERROR, "whole": None}
    assert broken.num_output == 1
    assert scheduler.running == [whole]


def test_aborting_works_wherever_a_request_is_and_skips_the_unknown():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request(3, "running"))
    scheduler.add(make_request(3, "waiting"))
    step(scheduler)

    assert [r.id for r in scheduler.abort(["waiting", "running", "nobody"])] == ["running", "waiting"]
    assert scheduler.abort(["running"]) == []
    assert not scheduler.has_work
    assert scheduler.kv_usage == 0
    scheduler.check_integrity()


def test_a_cache_too_small_for_one_request_is_refused_when_made():
    with pytest.raises(AssertionError):
        make_scheduler(num_blocks=3, max_model_len=13)


# ---- the engine's step


@dataclass
class Row:
    tokens: list[int]
    num_prompt: int
    salt: str | None
    table: list[int] = field(default_factory=list)


class NaiveDevice:
    """Computes plans the slow way, and asserts that every position it reads holds what it should."""

    def __init__(self, scheduler: Scheduler, depth: int, broken: frozenset[int] = frozenset()) -> None:
        self.depth = depth
        self.num_compilations = 0
        self.prepare = lambda: False
        self._scheduler = scheduler
        self._size = scheduler.config.block_size
        self._broken = broken
        self._rows: dict[int, Row] = {}
        self._cache: dict[tuple[int, int], int] = {}
        self.num_steps = 0

    def launch(self, plan: StepPlan) -> list[int]:
        config = self._scheduler.config
        assert 0 < plan.num_tokens <= config.max_num_batched_tokens
        assert len(plan.items) <= config.max_num_seqs
        assert len({item.row for item in plan.items}) == len(plan.items), "a row twice in one step"
        counts = [item.count for item in plan.items]
        assert counts == sorted(counts, key=lambda count: count > 1), "decodes come first"
        salts = {request.row: request.cache_salt for request in self._scheduler.running}
        limits = {r.row: r.sampling.max_tokens or config.max_model_len for r in self._scheduler.running}
        self.num_steps += 1
        sampled = []
        for item in plan.items:
            if item.admission is not None:
                tokens = list(item.admission.tokens)
                self._rows[item.row] = Row(tokens, item.admission.num_prompt, salts[item.row])
            row = self._rows[item.row]
            row.table += item.new_blocks
            end = item.start + item.count
            assert item.samples == (end == len(row.tokens)), "the step that reaches the last token samples"
            assert len(row.table) == -(-end // self._size), "neither more nor fewer blocks than its tokens need"
            assert len(row.tokens) < config.max_model_len, "a step for a request that has its last token"
            assert len(row.tokens) - row.num_prompt < limits[item.row], "a step for a request that has its last token"
            context = keys(row.salt, row.tokens[:end])
            for position in range(item.start):
                assert self._cache[self._slot(row, position)] == context[position], "a block holds another's content"
            for position in range(item.start, end):
                self._cache[self._slot(row, position)] = context[position]
            if item.samples:
                token = -1 if row.tokens[0] in self._broken else next_token(row.tokens)
                row.tokens.append(token)
                sampled.append(token)
        return sampled

    def is_done(self, launched: list[int]) -> bool:
        return False

    def collect(self, launched: list[int]) -> Sampled:
        return Sampled(launched)

    def _slot(self, row: Row, position: int) -> tuple[int, int]:
        return row.table[position // self._size], position % self._size


def keys(salt: str | None, tokens: list[int]) -> list[int]:
    """What the cache holds at each position: a function of everything up to it."""
    state, states = hash(salt), []
    for token in tokens:
        state = hash((state, token))
        states.append(state)
    return states


def next_token(tokens: list[int]) -> int:
    """The model: 0 to 40 by everything so far."""
    state = len(tokens)
    for token in tokens:
        state = (state * 1_000_003 + token) % (2**61 - 1)
    return state % 41


def expected(submit: Submit, max_model_len: int) -> tuple[list[int], FinishReason]:
    """The output of a request that is left alone."""
    s, tokens, output = submit.sampling, list(submit.prompt_token_ids), []
    ends = {*s.stop_token_ids, *(() if s.ignore_eos else submit.eos_token_ids)}
    while True:
        output.append(next_token(tokens))
        tokens.append(output[-1])
        if output[-1] in ends and len(output) > s.min_tokens:
            return output, FinishReason.STOP
        if len(output) == s.max_tokens or len(tokens) == max_model_len:
            return output, FinishReason.LENGTH


@dataclass
class Traffic:
    """Random requests into an engine; every event is checked as it comes."""

    engine: Engine
    rng: random.Random
    max_model_len: int
    broken: frozenset[int] = frozenset()
    submits: dict[str, Submit] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, FinishReason] = field(default_factory=dict)
    asked_to_abort: set[str] = field(default_factory=set)

    @property
    def live(self) -> list[str]:
        return [id for id in self.submits if id not in self.ends]

    def submit(self) -> None:
        rng = self.rng
        # Prompts come from few families, so that prefixes are shared; lengths favour the short.
        family = [rng.randrange(3)] * 3 + [rng.randrange(2) for _ in range(rng.randrange(6))]
        length = max(1, min(int(rng.expovariate(1 / (self.max_model_len / 4))), self.max_model_len - 1))
        prompt = (family + [rng.randrange(3) for _ in range(length)])[:length]
        max_tokens = rng.choice([None, 1, 2, rng.randrange(1, self.max_model_len)])
        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, min_tokens=rng.randrange(4) if max_tokens is None else 0,
            ignore_eos=rng.random() < 0.3, stop_token_ids=rng.choice([(), (), (5,), (6, 7)]),
        )  # fmt: skip
        id = str(len(self.submits))
        salt = rng.choice([None, None, "a"])
        submit = Submit(id, prompt, sampling, eos_token_ids=(EOS,), priority=rng.choice([0, 0, 0, 1]), cache_salt=salt)
        self.submits[id] = submit
        self.outputs[id] = []
        self.engine.submit(submit)

    def abort(self) -> None:
        ids = self.rng.sample(self.live, min(len(self.live), self.rng.randrange(1, 4)))
        ids.append("nobody")
        self.asked_to_abort.update(ids)
        self.engine.abort(ids)

    def step(self) -> None:
        output = self.engine.step()
        self.engine.check_integrity()
        for request in (*self.engine.scheduler.running, *self.engine.scheduler.waiting):
            request.check()
        for event in output.events:
            assert event.request_id not in self.ends, "an event after the last one"
            self.outputs[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                self.ends[event.request_id] = event.finish_reason
            else:
                assert event.token_ids, "an event that says nothing"
        load = self.engine.load()
        assert 0 <= load.kv_usage <= 1
        assert load.running + load.waiting == len(self.engine._live)

    def check_ends(self) -> None:
        """Every request ended once, with the tokens that it would have had alone."""
        assert set(self.ends) == set(self.submits)
        for id, submit in self.submits.items():
            output, reason = expected(submit, self.max_model_len)
            if submit.prompt_token_ids[0] in self.broken:
                assert self.ends[id] is FinishReason.ERROR or id in self.asked_to_abort
                assert self.outputs[id] == []
            elif self.ends[id] is FinishReason.ABORT:
                assert id in self.asked_to_abort
                assert self.outputs[id] == output[: len(self.outputs[id])]
            else:
                assert (self.outputs[id], self.ends[id]) == (output, reason)


def make_traffic(seed: int, depth: int, broken: frozenset[int] = frozenset(), **settings: Any) -> Traffic:
    rng = random.Random(seed)
    size = rng.choice([1, 3, 4, 8])
    max_model_len = rng.randrange(12, 64)
    least = -(-max_model_len // size)
    chunked = rng.random() < 0.75
    config = SchedulerConfig(
        max_num_seqs=rng.choice([1, 3, 8]), block_size=size, max_model_len=max_model_len,
        max_num_batched_tokens=rng.choice([8, 13, 40]) if chunked else max_model_len,
        enable_prefix_caching=rng.random() < 0.75, enable_chunked_prefill=chunked,
    )  # fmt: skip
    scheduler = Scheduler(config, least + rng.randrange(2 * least))
    ticks = iter(range(10**9))
    engine = Engine(scheduler, NaiveDevice(scheduler, depth, broken), lambda: next(ticks) * 1e-3)
    engine._prompt_tokens = lambda decodes, context: rng.choice([None, 1, 3, 9])  # whatever the cost of steps may say
    return Traffic(engine, rng, max_model_len, broken, **settings)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("seed", range(20))
def test_random_traffic_ends_every_request_once_with_the_tokens_it_would_have_alone(seed: int, depth: int):
    traffic = make_traffic(seed, depth, broken=frozenset({1}) if seed % 4 == 0 else frozenset())
    rng, scheduler = traffic.rng, traffic.engine.scheduler
    for _ in range(1000):
        # Bursts and lulls: a full queue, an empty engine and everything between.
        if len(traffic.live) < 14 and rng.random() < 0.5:
            for _ in range(rng.randrange(1, 5)):
                traffic.submit()
        if traffic.live and rng.random() < 0.04:
            traffic.abort()
        if rng.random() < 0.01:
            scheduler.preempt_all()
        traffic.step()
    for _ in range(20_000):
        if not traffic.engine.has_work:
            break
        traffic.step()

    assert not traffic.engine.has_work, "it does not come to an end"
    traffic.check_ends()
    assert scheduler.kv_usage == 0
    assert traffic.engine.load().waiting_prefill_tokens == 0


def test_the_random_traffic_above_meets_what_it_is_there_for():
    """Preemptions, prefix hits, aborts, errors and all other ends do occur; otherwise it would show nothing."""
    ends: Counter[FinishReason] = Counter()
    preemptions = hits = steps = 0
    for seed in range(20):
        traffic = make_traffic(seed, depth=1, broken=frozenset({1}))
        for _ in range(300):
            if len(traffic.live) < 14:
                traffic.submit()
            if traffic.rng.random() < 0.03:
                traffic.abort()
            traffic.step()
        ends.update(traffic.ends.values())
        stats = traffic.engine.scheduler
        preemptions, hits = preemptions + stats.num_preemptions, hits + stats.prefix_hits
        steps += traffic.engine._runner.num_steps

    assert set(ends) == set(FinishReason)
    assert min(ends.values()) > 20
    assert preemptions > 50
    assert hits > 500
    assert steps > 5000


def make_engine(depth: int = 0, **settings: Any) -> Engine:
    scheduler = make_scheduler(**settings)
    ticks = iter(range(10**9))
    return Engine(scheduler, NaiveDevice(scheduler, depth), lambda: float(next(ticks)))


def run(engine: Engine) -> list[Any]:
    events = []
    while engine.has_work:
        events += engine.step().events
    return events


@pytest.mark.parametrize(
    ("prompt", "words"), [([], "has 0 tokens"), (list(range(64)), "has 64 tokens, allowed are 1 to 63")]
)
def test_a_prompt_that_can_never_run_ends_in_an_error_event(prompt: list[int], words: str):
    engine = make_engine()
    engine.submit(Submit("bad", prompt, GREEDY))

    (event,) = run(engine)
    assert event.finish_reason is FinishReason.ERROR
    assert words in event.error


def test_an_id_in_use_is_refused_and_free_again_after_its_request():
    engine = make_engine()
    for _ in range(2):
        engine.submit(Submit("same", [1, 2], GREEDY))
    events = run(engine)

    assert [e.error for e in events if e.finish_reason is FinishReason.ERROR] == ["the request id same is in use"]
    assert sum(e.finish_reason is FinishReason.LENGTH for e in events) == 1
    engine.submit(Submit("same", [1, 2], GREEDY))
    assert run(engine)[-1].finish_reason is FinishReason.LENGTH


def test_the_first_event_tells_the_waits_and_the_cached_tokens():
    engine = make_engine()
    engine.submit(Submit("a", list(range(10)), GREEDY))
    first, second, *_ = run(engine)

    assert first.num_cached_tokens == 0
    assert first.queue_s > 0
    assert first.prefill_s > 0
    assert (second.num_cached_tokens, second.queue_s, second.prefill_s) == (None, None, None)


@pytest.mark.parametrize("depth", [0, 1])
def test_an_abort_ends_a_request_in_one_event_and_leaves_nothing(depth: int):
    engine = make_engine(depth)
    engine.submit(Submit("a", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=50)))
    for _ in range(5):
        engine.step()
    engine.abort(["a", "a"])
    events = run(engine)

    assert [e.finish_reason for e in events] == [FinishReason.ABORT]
    engine.check_integrity()
    assert engine.load().kv_usage == 0


def test_requests_without_a_seed_differ_and_repeat_with_the_engines_seed():
    def seeds(seed: int) -> list[int]:
        scheduler = make_scheduler()
        engine = Engine(scheduler, NaiveDevice(scheduler, 0), lambda: 0.0, seed)
        for name in "abc":
            engine.submit(Submit(name, [1], GREEDY))
        return [request.seed for request in scheduler.waiting]

    assert seeds(3) == seeds(3)
    assert len({*seeds(3), *seeds(4)}) == 6
