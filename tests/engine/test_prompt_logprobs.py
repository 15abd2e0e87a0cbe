"""Log-probabilities of prompts: the model's own, however the prompt is computed."""

from __future__ import annotations

import pytest
import torch

import models
from octavo_engine import LLM, RequestOutput, SamplingParams

LONG = "The lighthouse keeper wrote down the weather, the ships and the birds of every single day. " * 6
PROMPTS = [LONG, "The capital of France is Paris.", LONG + "On the last page it said nothing.", "A"]
SCORED = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=2)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Chunks of 48 tokens, and blocks that the third prompt could share with the first."""
    return LLM(
        str(models.smollm2()), dtype="float32", kv_cache_memory_bytes=64 * 2**20, max_num_seqs=4,
        max_num_batched_tokens=48, block_size=16, max_model_len=512,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(models.smollm2()), dtype=torch.float32)


@torch.inference_mode()
def compare(outputs: list[RequestOutput], reference: torch.nn.Module) -> None:
    for output in outputs:
        ids, told = output.prompt_token_ids, output.prompt_logprobs
        assert told is not None
        assert told[0] is None
        assert len(told) == len(ids)
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, (token, found) in enumerate(zip(ids[1:], told[1:], strict=True)):
            row = expected[place]
            assert found[token].logprob == pytest.approx(row[token].item(), abs=1e-3)
            near = (row > row[token] - 1e-3).sum(), (row > row[token] + 1e-3).sum()
            assert near[1] < found[token].rank <= near[0] + 1
            best = sorted((one.logprob for one in found.values()), reverse=True)[:2]
            assert best == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)


def test_prompts_are_scored_as_transformers_scores_them_in_chunks_and_beside_each_other(llm, reference):
    compare(llm.generate(PROMPTS, SCORED, use_tqdm=False), reference)


def test_a_prompt_that_is_in_the_cache_is_scored_all_the_same(llm, reference):
    llm.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)

    (output,) = llm.generate(PROMPTS[0], SCORED, use_tqdm=False)

    compare([output], reference)
    assert output.num_cached_tokens == 0


def test_a_prompt_is_scored_once_after_preemptions(llm, reference, monkeypatch):
    engine, steps = llm._engine, iter(range(10**6))
    ordinary = engine.step

    def step_and_preempt():
        if next(steps) in (2, 5, 9):
            engine.scheduler.preempt_all()
        return ordinary()

    monkeypatch.setattr(engine, "step", step_and_preempt)
    outputs = llm.generate(PROMPTS, SCORED, use_tqdm=False)

    compare(outputs, reference)
    assert all(len(output.outputs[0].token_ids) == 3 for output in outputs)


def test_who_does_not_ask_gets_none(llm):
    (output,) = llm.generate("The capital", SamplingParams(max_tokens=1), use_tqdm=False)

    assert output.prompt_logprobs is None
