"""How many prompt tokens a step takes beside running streams."""

from __future__ import annotations

import pytest

from octavo_engine.core.cost import CHUNK_UNIT, FIRST_CHUNK, ChunkLimit


def seconds(decodes: int, tokens: int, context: float = 0.0) -> float:
    """A GPU's step: 6 ms of weights, arithmetic hidden behind them up to 200 tokens, attention over the context."""
    work = 0.000021 * (decodes + tokens) + context * tokens
    return max(0.006, work) + 0.00002 * decodes + (0.003 if tokens else 0.0)


def settle(limit: ChunkLimit, decodes: int, steps: int = 40, context: float = 0.0) -> int:
    for _ in range(10):
        limit.observe(decodes, 0, seconds(decodes, 0))
    for _ in range(steps):
        tokens = limit.tokens(decodes)
        assert tokens is not None
        limit.observe(decodes, tokens, seconds(decodes, tokens, context))
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
    assert ChunkLimit(2.5).tokens(0) is None


def test_before_anything_is_known_the_chunk_is_a_modest_one():
    limit = ChunkLimit(2.5)
    assert limit.tokens(4) == FIRST_CHUNK
    limit.observe(0, 4000, 0.1)
    assert limit.tokens(4) == FIRST_CHUNK


def test_one_slow_step_does_not_open_the_gate():
    limit = ChunkLimit(2.5)
    before = settle(limit, 32)
    limit.observe(32, 0, 1.0)
    assert limit.tokens(32) < 1.5 * before


def test_a_prompt_always_goes_on_even_where_a_token_costs_more_than_is_allowed():
    limit = ChunkLimit(1.1)
    limit.observe(4, 0, 0.01)
    limit.observe(4, 64, 10.0)
    assert limit.tokens(4) == CHUNK_UNIT


@pytest.mark.parametrize("decodes", [8, 32])
def test_short_prompts_do_not_hold_up_the_long_one_behind_them(decodes: int):
    limit = ChunkLimit(2.5)
    before = settle(limit, decodes)
    for _ in range(20):
        limit.observe(decodes, 20, seconds(decodes, 20))  # 3 ms for 20 tokens: 150 us each, where a long one's cost 21
        assert limit.tokens(decodes) >= before - CHUNK_UNIT


def test_costs_that_rise_are_followed_however_low_they_began():
    limit = ChunkLimit(2.5)
    limit.observe(8, 0, 0.006)
    limit.observe(8, 8192, 0.006)  # nothing, so far
    assert limit.tokens(8) > 8192
    limit.observe(8, 8192, 0.180)
    assert limit.tokens(8) < 1024
