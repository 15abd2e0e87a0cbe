"""On a device: a steady step waits for nothing on the host, and nothing is allocated once the engine is ready."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from octavo_engine.config import EngineConfig
from octavo_engine.core.engine import Engine
from octavo_engine.core.messages import Submit
from octavo_engine.core.scheduler import Scheduler
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LARGE = Path(__file__).parents[2] / "docker" / "models" / "llama-3.1-8b"


@pytest.fixture(autouse=True)
def emptied() -> None:
    """What engines of earlier tests held is free again: a share of the whole card is asked for here."""
    gc.collect()
    torch.cuda.empty_cache()


def engine_of(folder: Path, **settings: Any) -> Engine:
    config = EngineConfig(model=str(folder), device="cuda", dtype="bfloat16", **settings)
    runner = ModelRunner(config)
    loaded = runner.load(folder, lambda stage, done, total: None)
    engine = Engine(Scheduler.of(config, loaded.plan), runner, time.monotonic)
    while engine.prepare():
        pass
    return engine


@contextmanager
def no_waiting() -> Iterator[None]:
    """An operation that waits for the device raises. (Taking a result waits for its event, which is meant.)"""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> int:
    """Tokens that they gave."""
    began, tokens = time.monotonic(), 0
    for index, (prompt, sampling) in enumerate(requests):
        engine.submit(Submit(f"{began}-{index}", prompt, sampling))
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None, event
            tokens += len(event.token_ids)
    engine.check_integrity()
    return tokens


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cut": {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "lists": {"logit_bias": {5: 2.0}, "min_tokens": 10, "bad_words_ids": ((7,), (8, 9))},
    "allowed": {"allowed_token_ids": tuple(range(100, 400))},
    "logprobs": {"logprobs": 20},
}


@pytest.mark.parametrize("eager", [False, True])
def test_steps_wait_for_nothing_whatever_requests_ask_for(eager: bool):
    engine = engine_of(
        models.smollm2(), kv_cache_memory_bytes=2**30, max_num_seqs=64, max_num_batched_tokens=512, enforce_eager=eager
    )
    requests = [
        (list(range(3, 20 + 40 * (index % 5))), SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True, **kind))
        for index, kind in enumerate([*KINDS.values()] * 6)
        if "temperature" not in kind
    ]
    run(engine, requests[:7])
    # Prompts come and go beside the streams: admissions, chunks and decodes, none of them may wait.
    with no_waiting():
        assert run(engine, requests) == 60 * len(requests)


def test_the_largest_batch_and_the_longest_prompt_allocate_nothing_at_95_percent():
    engine = engine_of(LARGE, load_format="dummy", gpu_memory_utilization=0.95)
    config = engine.scheduler.config
    asks = {"temperature": 1.0, "top_p": 0.9, "ignore_eos": True}
    kinds = [KINDS[name] for name in ("logprobs", "penalties", "plain", "lists")]
    many = [
        ([3 + (index * 7 + i) % 9000 for i in range(30)], SamplingParams(max_tokens=12, **asks, **kinds[index % 4]))
        for index in range(config.max_num_seqs)
    ]
    prompt = [3 + i % 9000 for i in range(config.max_model_len - 8)]
    longest = [(prompt, SamplingParams(max_tokens=8, logprobs=20, **asks))]
    run(engine, many[:3])
    before = torch.cuda.memory_stats()

    assert run(engine, [*longest, *many]) == 8 + 12 * len(many)

    after = torch.cuda.memory_stats()
    for name in ("segment.all.allocated", "num_alloc_retries", "num_ooms", "allocation.all.allocated"):
        assert after[name] == before[name], f"{name}: {before[name]} before, {after[name]} after"
    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.95 * total + 2**20


def test_scoring_a_long_prompt_beside_the_largest_batch_stays_within_95_percent():
    """What it needs, copies of a few rows of logits, is counted in the plan though it is not set aside."""
    engine = engine_of(LARGE, load_format="dummy", gpu_memory_utilization=0.95)
    asks = {"temperature": 1.0, "top_p": 0.9, "ignore_eos": True}
    many = [([3 + index % 900] * 30, SamplingParams(max_tokens=12, **asks)) for index in range(256)]
    scored = ([3 + i % 9000 for i in range(20_000)], SamplingParams(max_tokens=4, prompt_logprobs=20, **asks))

    assert run(engine, [scored, *many]) == 4 + 12 * len(many)

    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.95 * total + 2**20
