"""The same engine on a CUDA device: still the torch references, so right before fast.

Run on a machine with a GPU: `pytest -m gpu tests/engine/test_gpu.py -s`.
"""

from __future__ import annotations

import re
import time

import pytest
import torch

import models
from octavo_engine import LLM, SamplingParams, StructuredOutputsParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "Dear Sir or Madam, I am writing to you because",
    "The three laws of robotics are",
    "1, 2, 3, 4, 5,",
    "Die Hauptstadt von Deutschland ist",
    "Question: How many legs has a spider?\nAnswer:",
    "To be, or not to be, that is the question:",
]
TOKENS = 64


@pytest.fixture(scope="module")
def reference():
    """transformers in float32 on the same device: (model, prompts' greedy continuations)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(models.smollm2())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda")
    outputs = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to("cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        outputs.append(out[0, ids.shape[1] :].tolist())
    return model, outputs


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 16, "block_size": 16}])
def test_a_gpu_gives_the_tokens_of_transformers(reference, settings):
    model, expected = reference
    llm = LLM(str(models.smollm2()), device="cuda", dtype="float32", kv_cache_memory_bytes=2**30, **settings)

    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=TOKENS), use_tqdm=False)

    assert llm.effective.gpu
    for output, tokens in zip(outputs, expected, strict=True):
        got = output.outputs[0].token_ids
        if got != tokens:
            at = next(i for i, pair in enumerate(zip(got, tokens, strict=False)) if pair[0] != pair[1])
            ids = torch.tensor([output.prompt_token_ids + tokens[:at]], device="cuda")
            best = model(ids).logits[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-4, f"{output.prompt!r} differs at token {at}"


def test_bfloat16_on_a_gpu_answers_the_question(capsys):
    llm = LLM(str(models.smollm2()), device="cuda", kv_cache_memory_bytes=2**30)
    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    llm.generate(PROMPTS, greedy, use_tqdm=False)

    started = time.perf_counter()
    outputs = llm.generate(PROMPTS, greedy, use_tqdm=False)
    seconds = time.perf_counter() - started

    with capsys.disabled():
        speed = len(PROMPTS) * TOKENS / seconds
        print(f"\n{llm.effective.gpu}, {llm.effective.dtype}, 10 streams, torch references: {speed:.0f} tokens/s")
    assert llm.effective.dtype == "bfloat16"
    assert outputs[0].outputs[0].text.startswith(" Paris")


def test_sampling_on_a_gpu_depends_on_the_seed_alone():
    llm = LLM(str(models.smollm2()), device="cuda", kv_cache_memory_bytes=2**30)
    sampling = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=7, max_tokens=20)

    alone = llm.generate(PROMPTS[:1], sampling, use_tqdm=False)[0].outputs[0].token_ids
    beside = llm.generate(PROMPTS, sampling, use_tqdm=False)[0].outputs[0].token_ids

    assert beside[:3] == alone[:3]


def test_graphs_keep_to_grammars_beside_free_requests():
    llm = LLM(str(models.smollm2()), device="cuda", kv_cache_memory_bytes=2**30)
    form = StructuredOutputsParams(regex="[0-9]{3}-[a-f]{2,4}!")
    sampling = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=30, structured_outputs=form if i % 2 else None,
                       repetition_penalty=1.1 if i % 3 == 0 else 1.0)
        for i in range(12)
    ]  # fmt: skip

    outputs = llm.generate(["The code is"] * 12, sampling, use_tqdm=False)

    texts = [output.outputs[0].text for output in outputs]
    assert all(re.fullmatch("[0-9]{3}-[a-f]{2,4}!", text) for text in texts[1::2]), texts
    assert not any(re.fullmatch("[0-9]{3}-[a-f]{2,4}!", text) for text in texts[::2]), texts
    llm._engine.check_integrity()
