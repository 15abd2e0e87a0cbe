"""--deterministic: a request's tokens and log-probabilities are the same bits however it is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from octavo_engine import LLM, RequestOutput, SamplingParams
from octavo_engine.kernels import invariant
from octavo_engine.kernels.invariant import Invariant
from preempting import preempting

TEXT = "The lighthouse keeper wrote down the weather, the ships and the birds of every single day. "
PROMPT = TEXT * 4 + "On the last page it said:"
"""More than a chunk of 64 tokens."""
OTHERS = ["A", "1, 2, 3, 4, 5,", TEXT + "Then", "def fibonacci(n):\n    "]
SAMPLING = [
    SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=6, logprobs=2, ignore_eos=True),
]
"""Of PROMPT, twice in each call."""
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 64,
    "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
Told = tuple[list[int], list[float]]


def told(output: RequestOutput) -> Told:
    """Tokens, and every log-probability to its last bit."""
    answer = output.outputs[0]
    assert answer.logprobs is not None
    return list(answer.token_ids), [chance.logprob for step in answer.logprobs for chance in step.values()]


def answers(llm: LLM, prompts: list[str], sampling: list[SamplingParams]) -> list[RequestOutput]:
    return llm.generate(prompts, sampling, use_tqdm=False)


def both(llm: LLM, *others: str) -> list[Told]:
    """PROMPT, greedily and drawn, with others before and after it."""
    half = len(others) // 2
    prompts = [*others[:half], PROMPT, PROMPT, *others[half:]]
    found = answers(llm, prompts, [SAMPLING[0]] * half + SAMPLING + [SAMPLING[1]] * (len(others) - half))
    return [told(output) for output in found[half : half + 2]]


def engine(**settings: object) -> LLM:
    common = {"device": "cpu", "kv_cache_memory_bytes": 2**28, "max_num_seqs": 16, "block_size": 16}
    return LLM(str(models.smollm2()), deterministic=True, **{**common, **settings})


def test_an_answer_is_the_same_bits_alone_in_company_in_chunks_from_the_cache_and_after_preemption():
    whole = engine(dtype="bfloat16", max_num_batched_tokens=8192)
    chunked = engine(dtype="bfloat16", max_num_batched_tokens=64, enable_prefix_caching=False)
    alone = [answers(chunked, [PROMPT], [sampling])[0] for sampling in SAMPLING]
    assert len(alone[0].prompt_token_ids) > 64
    expected = [told(output) for output in alone]

    assert both(whole) == expected
    assert both(whole, *OTHERS) == expected
    hit = answers(whole, [PROMPT], SAMPLING[:1])[0]
    assert hit.num_cached_tokens >= 64
    assert told(hit) == expected[0]
    with preempting(chunked, every=5):
        assert both(chunked) == expected
    assert chunked._engine.scheduler.num_preemptions > 1


def test_an_answer_is_the_same_bits_in_a_batch_of_256_as_alone_in_chunks_of_64(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    prompt, *others = [[3 + (7 * i + n) % 200 for i in range(1 + n % 12 if n else 150)] for n in range(256)]
    settings = [SAMPLING[n % 2] for n in range(256)]

    def tiny(**more: object) -> LLM:
        common = {"device": "cpu", "load_format": "dummy", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 2**26}
        return LLM(str(tmp_path), deterministic=True, dtype="float32", **{**common, **more})

    def ask(llm: LLM, prompts: list[list[int]], sampling: list[SamplingParams]) -> list[RequestOutput]:
        return llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)

    chunked = tiny(max_num_seqs=16, max_num_batched_tokens=64, enable_prefix_caching=False)
    alone = [
        told(ask(chunked, [of], [sampling])[0]) for of, sampling in ((prompt, SAMPLING[0]), (others[90], SAMPLING[1]))
    ]
    together = tiny(max_num_seqs=256, max_num_batched_tokens=8192, enable_prefix_caching=False)
    running = []
    schedule = together._engine.scheduler.schedule

    def watched(*arguments: Any) -> Any:
        plan = schedule(*arguments)
        running.append(len(plan.items))
        return plan

    together._engine.scheduler.schedule = watched  # type: ignore[method-assign]
    found = ask(together, [*others[:100], prompt, *others[100:]], [*settings[1:101], settings[0], *settings[101:]])

    assert max(running) == 256
    assert len(prompt) > 2 * 64
    assert told(found[100]) == alone[0]
    assert settings[91] == SAMPLING[1]
    assert told(found[90]) == alone[1]


def test_a_prompts_scores_are_the_same_bits_in_chunks_of_any_size():
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)

    def scores(llm: LLM) -> list[float]:
        found = answers(llm, [TEXT * 2], [scored])[0].prompt_logprobs
        assert found is not None
        return [chance.logprob for step in found[1:] if step for chance in step.values()]

    whole, chunked = scores(engine(dtype="float32")), scores(engine(dtype="float32", max_num_batched_tokens=17))

    assert len(whole) > 2 * 17
    assert chunked == whole


def test_products_give_a_row_the_same_bits_in_any_batch():
    x, weight, bias = torch.randn(70, 96), torch.randn(33, 96), torch.randn(33)
    operations = Invariant(invariant.block_rows([weight]))

    whole = operations.linear(x, weight, bias)

    torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight, bias))
    for first, end in ((0, 1), (7, 8), (3, 20), (16, 70)):
        assert torch.equal(operations.linear(x[first:end], weight, bias), whole[first:end])


def test_blocks_are_as_large_as_their_rows_are_alike(monkeypatch: pytest.MonkeyPatch):
    weights = [torch.randn(8, 16), torch.randn(5, 16)]
    tried = []

    def alike(weight: torch.Tensor, rows: int) -> bool:
        tried.append((weight.shape[0], rows))
        return rows <= 4

    monkeypatch.setattr(invariant, "_places_are_alike", alike)

    assert invariant.block_rows(weights) == 4
    assert tried == [(8, 16), (8, 8), (8, 4), (5, 4)]


@pytest.mark.parametrize("window", [None, 40])
def test_attention_is_the_references_and_a_tokens_own(window: int | None):
    from octavo_engine.kernels import paged_attention

    heads, kv_heads, dim, size = 6, 2, 32, 16
    cache, tables = torch.randn(2, 64, kv_heads, size, dim), torch.randperm(60).view(2, 30)
    query = torch.randn(300 + 1, heads, dim)
    blocks = 2 * kv_heads * size * dim * 4

    def gathers(starts: list[int], counts: list[int]) -> list[paged_attention.Gather]:
        return paged_attention.plan_gathers(starts, counts, tables, size, kv_heads, blocks, 2**24)

    together = gathers([90, 411], [300, 1])
    operations = Invariant(16)
    whole = operations.attention(query, cache, together, 0.2, window)

    torch.testing.assert_close(whole, paged_attention.reference(query, cache, together, 0.2, window))
    for start in (0, 63, 170, 299):
        one = operations.attention(query[start : start + 1], cache, gathers([90 + start], [1]), 0.2, window)
        assert torch.equal(one[0], whole[start])
