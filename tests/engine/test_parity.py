"""Real SmolLM2 in float32: the greedy tokens of transformers' generate, in every way of running.

A difference counts as rounding only where the reference's two best logits are within 1e-4 of each other; what follows
such a place is another text and is not compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import models
from octavo_engine import LLM, RequestOutput, SamplingParams

pytestmark = pytest.mark.timeout(900)  # minutes on two cores that something else keeps busy as well
NUM_TOKENS = 64
TIE = 1e-4
LONG = "The lighthouse keeper wrote down the weather, the ships and the birds of every single day. "
PROMPTS = [
    "The capital of France is", "The capital of Japan is", "The capital of Brazil is", "Water boils at",
    "The largest planet of the solar system is", "Photosynthesis is the process by which", "E = mc^2 means that",
    "The three laws of robotics are", "To be, or not to be,", "It was the best of times, it was the worst of times,",
    "Once upon a time, in a village by the sea,", "Once upon a time, in a village in the mountains,",
    "Dear Sir or Madam,\n\nI am writing to", "Roses are red, violets are blue,", "Knock knock. Who's there?",
    "1, 2, 3, 4, 5,", "2, 4, 8, 16, 32,", "1 + 1 =", "12 * 12 =", "The first ten prime numbers are",
    "def fibonacci(n):\n    ", "import numpy as np\n\ndef softmax(x):\n", "SELECT name, count(*) FROM users WHERE",
    "#include <stdio.h>\n\nint main(", "<html>\n<head>\n<title>", '{"name": "Alice", "age": 30, "city":',
    "fn main() {\n    println!(", "apiVersion: v1\nkind: Pod\nmetadata:\n", "# Installation\n\nTo install, run\n\n```",
    "Die Hauptstadt von Deutschland ist", "La capital de España es", "La capitale de l'Italie est",
    "Столица России", "日本の首都は", "中国的首都是", "עיר הבירה של ישראל היא", "naïve café — “quoted” …",
    "\U0001f600 \U0001f680 \U0001f30d", "A", " ", "\n\n\n", "the the the the the the the the",
    "Question: How many legs has a spider?\nAnswer:",
    "Translate to French: The cat sits on the table.\nFrench:",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    LONG * 4, LONG * 9 + "On the last page it said:", "Summary of the following text. " + LONG * 14 + "\nSummary:",
]  # fmt: skip
HALF = slice(1, 50, 2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)


@dataclass(frozen=True)
class Expected:
    """tokens: what transformers generates. margins: its best logit less its second best, where each was chosen."""

    prompt: list[int]
    tokens: list[int]
    margins: list[float]


@pytest.fixture(scope="session")
def expected() -> list[Expected]:
    """One batched generate, checked position by position against a plain forward of each text without padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(models.smollm2())
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="<|endoftext|>")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    results: dict[int, Expected] = {}
    order = sorted(range(len(PROMPTS)), key=lambda index: len(prompts[index]))
    with torch.inference_mode():
        for members in (order[:-3], order[-3:]):  # apart, so that the short ones are not padded to the long ones
            inputs = tokenizer([PROMPTS[index] for index in members], padding=True, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
            for index, row in zip(members, out[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
                tokens = row[: row.index(2) + 1] if 2 in row else row
                results[index] = _checked(model, prompts[index], tokens)
    return [results[index] for index in range(len(PROMPTS))]


def _checked(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> Expected:
    logits: Tensor = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2)
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    for token, choice, margin in zip(tokens, best.indices[:, 0].tolist(), margins, strict=True):
        assert token == choice or margin < TIE, "the reference contradicts itself"
    return Expected(prompt, tokens, margins)


def compare(outputs: list[RequestOutput], expected: list[Expected]) -> None:
    """Every token, up to a place where rounding may decide."""
    ties = 0
    for output, reference in zip(outputs, expected, strict=True):
        assert output.prompt_token_ids == reference.prompt
        ours, theirs = output.outputs[0].token_ids, reference.tokens
        if ours == theirs:
            assert output.outputs[0].finish_reason == ("stop" if theirs[-1] == 2 else "length")
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        assert reference.margins[at] < TIE, f"{output.prompt!r} differs at token {at}"
        ties += 1
    print(f"{ties} of {len(outputs)} outputs went another way at a tie")


@contextmanager
def engine(**settings: object) -> Iterator[LLM]:
    llm = LLM(str(models.smollm2()), dtype="float32", **{"kv_cache_memory_bytes": 2**29, **settings})
    yield llm
    llm._engine.check_integrity()
    assert llm._engine.load().kv_usage == 0


def generate(llm: LLM, prompts: list[str] = PROMPTS) -> list[RequestOutput]:
    return llm.generate(prompts, GREEDY, use_tqdm=False)


def test_the_prompts_are_fifty_different_ones_of_many_lengths(expected):
    lengths = {len(reference.prompt) for reference in expected}

    assert len(set(PROMPTS)) == 50
    assert min(lengths) == 1
    assert max(lengths) > 256
    assert sum(len(reference.tokens) for reference in expected) > 2500


@pytest.mark.slow
def test_fifty_at_once_and_again_on_a_prefix_hit(expected):
    with engine(block_size=16) as llm:
        first = generate(llm)
        compare(first, expected)
        assert all(output.num_cached_tokens < len(output.prompt_token_ids) for output in first)
        again = generate(llm)
        compare(again, expected)
        for output in again:
            assert output.num_cached_tokens == (len(output.prompt_token_ids) - 1) // 16 * 16

    assert first[0].outputs[0].text.startswith(" Paris")


@pytest.mark.slow
@pytest.mark.parametrize(("block_size", "some"), [(32, slice(0, 50, 3)), (64, slice(1, 50, 3))])
def test_blocks_of_other_sizes(expected, block_size: int, some: slice):
    with engine(block_size=block_size) as llm:
        outputs = generate(llm, PROMPTS[some])
        compare(outputs, expected[some])
        assert all(output.num_cached_tokens < len(output.prompt_token_ids) for output in outputs)


@pytest.mark.slow
def test_one_at_a_time(expected):
    some = slice(0, 50, 5)  # alone, each token reads all weights: ten take a minute, fifty five
    with engine(enable_prefix_caching=False) as llm:
        compare([output for prompt in PROMPTS[some] for output in generate(llm, [prompt])], expected[some])


@pytest.mark.slow
def test_in_chunks_of_sixteen(expected):
    with engine(max_num_batched_tokens=16, max_num_seqs=16) as llm:
        compare(generate(llm, PROMPTS[HALF]), expected[HALF])


@pytest.mark.slow
def test_after_forced_preemption(expected):
    one = 2 * 30 * 3 * 64 * 4  # bytes of a token's keys and values in float32
    with engine(block_size=16, max_model_len=512, kv_cache_memory_bytes=40 * 16 * one) as llm:
        compare(generate(llm, PROMPTS[HALF]), expected[HALF])

        assert llm.effective.num_blocks == 40
        assert llm._engine.scheduler.num_preemptions > 10


@pytest.mark.slow
def test_preempting_everything_again_and_again(expected):
    with engine(block_size=16, enable_prefix_caching=False) as llm:
        step, count = llm._engine.step, 0

        def interrupted():
            nonlocal count
            count += 1
            if count % 20 == 0:
                llm._engine.scheduler.preempt_all()
            return step()

        llm._engine.step = interrupted
        few = slice(0, 50, 5)
        compare(generate(llm, PROMPTS[few]), expected[few])
        assert llm._engine.scheduler.num_preemptions > 20
