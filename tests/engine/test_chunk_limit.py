"""How many prompt tokens a step takes beside running streams."""

from __future__ import annotations

import random

import pytest
from simulated import CONTEXT_SHARE, COSTS, serve

from octavo_engine.core.cost import CHUNK_UNIT, FIRST_CHUNK, ChunkLimit
from octavo_engine.core.step import StepItem, StepPlan

H200 = COSTS["H200"]


EACH = 300
"""Tokens that a decode has."""


def seconds(decodes: int, tokens: int, context: float = 0.0) -> float:
    """A GPU's step: 6 ms of weights, arithmetic hidden behind them up to 200 tokens, attention over the context."""
    work = 0.000021 * (decodes + tokens) + context * tokens
    return max(0.006, work) + 0.00002 * decodes + (0.003 if tokens else 0.0)


def allowed(limit: ChunkLimit, decodes: int) -> int:
    tokens = limit.tokens(decodes, EACH * decodes)
    assert tokens is not None
    return tokens


def observe(limit: ChunkLimit, decodes: int, tokens: int, seconds: float) -> None:
    limit.observe(decodes, EACH * decodes, tokens, seconds)


def gpu_seconds(decodes: int, each: int, tokens: int = 0) -> float:
    """decodes: with so many tokens each. tokens: of a new prompt beside them."""
    items = [StepItem(row, each - 1, 1, [], True) for row in range(decodes)]
    chunk = [StepItem(decodes, 0, tokens, [], False)] if tokens else []
    return H200.step(StepPlan(items + chunk))[0]


def settle(limit: ChunkLimit, decodes: int, steps: int = 40, context: float = 0.0) -> int:
    for _ in range(10):
        observe(limit, decodes, 0, seconds(decodes, 0))
    for _ in range(steps):
        tokens = allowed(limit, decodes)
        observe(limit, decodes, tokens, seconds(decodes, tokens, context))
    return tokens


@pytest.mark.parametrize("decodes", [1, 32, 256])
@pytest.mark.parametrize("context", [0.0, 0.00001, 0.00003])
def test_steps_with_prompts_settle_near_what_is_allowed_and_use_it(decodes: int, context: float):
    tokens = settle(ChunkLimit(2.5), decodes, context=context)

    quiet = seconds(decodes, 0)
    assert tokens % CHUNK_UNIT == 0
    assert seconds(decodes, tokens, context) <= 2.6 * quiet
    assert seconds(decodes, tokens + 4 * CHUNK_UNIT, context) > 2.2 * quiet


def test_where_nobody_is_held_up_nothing_is_limited():
    assert settle(ChunkLimit(2.5), 8)
    assert ChunkLimit(2.5).tokens(0, 0) is None


def test_before_anything_is_known_the_chunk_is_a_modest_one():
    limit = ChunkLimit(2.5)
    assert allowed(limit, 4) == FIRST_CHUNK
    observe(limit, 0, 4000, 0.1)
    assert allowed(limit, 4) == FIRST_CHUNK


def test_one_slow_step_does_not_open_the_gate():
    limit = ChunkLimit(2.5)
    before = settle(limit, 32)
    observe(limit, 32, 0, 1.0)
    assert allowed(limit, 32) < 1.5 * before


def test_a_prompt_always_goes_on_even_where_a_token_costs_more_than_is_allowed():
    limit = ChunkLimit(1.1)
    observe(limit, 4, 0, 0.01)
    observe(limit, 4, 64, 10.0)
    assert allowed(limit, 4) == CHUNK_UNIT


@pytest.mark.parametrize("decodes", [8, 32])
def test_short_prompts_do_not_hold_up_the_long_one_behind_them(decodes: int):
    limit = ChunkLimit(2.5)
    before = settle(limit, decodes)
    for _ in range(20):
        observe(limit, decodes, 20, seconds(decodes, 20))  # 3 ms for 20 tokens: 150 us each, where a long one's cost 21
        assert allowed(limit, decodes) >= before - CHUNK_UNIT


def test_costs_that_rise_are_followed_however_low_they_began():
    limit = ChunkLimit(2.5)
    observe(limit, 8, 0, 0.006)
    observe(limit, 8, 8192, 0.006)  # nothing, so far
    assert allowed(limit, 8) > 8192
    observe(limit, 8, 8192, 0.180)
    assert allowed(limit, 8) < 1024


def test_streams_that_were_seen_beside_prompts_only_are_not_taken_for_the_cost_of_these():
    limit = ChunkLimit(2.2)
    for decodes, each in ((2, 300), (8, 300), (32, 1500)):  # what was served before
        limit.observe(decodes, each * decodes, 0, gpu_seconds(decodes, each))
    for _ in range(10):
        tokens = limit.tokens(200, 200 * 300)
        assert tokens is not None
        limit.observe(200, 200 * 300, tokens, gpu_seconds(200, 300, tokens))

    # A unit of the chunk is a tenth of such a step.
    assert 1.8 < gpu_seconds(200, 300, tokens) / gpu_seconds(200, 300) < 2.3


def test_streams_that_grow_are_known_to_take_longer_though_they_are_never_seen_alone():
    limit = ChunkLimit(2.2)
    limit.observe(2, 2 * 300, 0, gpu_seconds(2, 300))
    limit.observe(32, 32 * 2000, 0, gpu_seconds(32, 2000))
    for _ in range(10):
        limit.observe(32, 32 * 2000, 256, 2.2 * gpu_seconds(32, 2000))
    before = limit.tokens(32, 32 * 2000)
    for _ in range(10):
        limit.observe(32, 32 * 6000, 256, 2.2 * gpu_seconds(32, 2000) + 32 * 4000 * H200.context_token)

    assert limit.tokens(32, 32 * 6000) > before


def test_steps_that_hardly_differ_say_nothing_of_greater_ones():
    limit = ChunkLimit(2.2)
    limit.observe(1, 300, 0, 0.0040)
    limit.observe(2, 600, 0, 0.0042)  # 0.3 us a token: ten times what a GPU needs

    limit.observe(256, 256 * 300, 512, 0.020)
    assert limit.tokens(256, 256 * 300) < 512


def test_prompts_may_have_more_of_a_step_the_more_of_them_wait():
    limit = ChunkLimit(2.0)
    for _ in range(10):
        observe(limit, 8, 0, 0.010)
        observe(limit, 8, 990, 0.020)
    tokens = [limit.tokens(8, EACH * 8, waiting) for waiting in (0, 4, 8, 24, 1000)]

    assert tokens == [CHUNK_UNIT * (990 * share // CHUNK_UNIT) for share in (1, 2, 3, 7, 8)]


def test_where_one_stream_alone_was_seen_others_are_counted_by_the_bytes_that_they_read():
    limit = ChunkLimit(2.2, context_share=CONTEXT_SHARE)
    for each in range(300, 500):
        limit.observe(1, each, 0, gpu_seconds(1, each))
    for _ in range(10):
        tokens = limit.tokens(200, 200 * 300)
        assert tokens is not None
        limit.observe(200, 200 * 300, tokens, gpu_seconds(200, 300, tokens))

    assert 1.9 < gpu_seconds(200, 300, tokens) / gpu_seconds(200, 300) < 2.4


@pytest.mark.parametrize("before", [32, 1, 0])
@pytest.mark.parametrize("costs", [H200, COSTS["H100"]], ids=["H200", "H100"])
def test_a_crowd_that_arrives_is_nearly_as_fast_as_one_that_is_there(costs, before):
    arrivals = random.Random(0)
    crowd = [(arrivals.uniform(0, 0.2), 128, 512) for _ in range(256)]

    after = serve(costs, crowd, before=[(0.0, 512, 200)] * before)
    assert after.seconds < 1.02 * serve(costs, [(0.0, 128, 512)] * 256).seconds
    assert after.gaps_s[-1] < 0.060


def test_a_crowd_gets_its_first_tokens_as_soon_after_other_loads_as_on_a_fresh_engine():
    arrivals = random.Random(0)
    crowd = [(arrivals.uniform(0, 0.2), 128, 50) for _ in range(256)]

    fresh, after = serve(H200, crowd), serve(H200, crowd, before=[(0.0, 512, 200)] * 32)
    assert after.at(0.99, after.first_s) < 1.3 * fresh.at(0.99, fresh.first_s)  # 3.5 times, once


def test_of_streams_that_were_seen_alone_while_they_grew_each_length_is_known():
    limit = ChunkLimit(2.2)
    for each in range(500, 2000, 5):
        limit.observe(32, 32 * each, 0, gpu_seconds(32, each))
    for each in range(500, 600, 5):  # others, which are shorter again
        limit.observe(32, 32 * each, 0, gpu_seconds(32, each))
    for _ in range(10):
        tokens = limit.tokens(32, 32 * 1900)
        assert tokens is not None
        limit.observe(32, 32 * 1900, tokens, gpu_seconds(32, 1900, tokens))

    assert 2.0 < gpu_seconds(32, 1900, tokens) / gpu_seconds(32, 1900) < 2.35
