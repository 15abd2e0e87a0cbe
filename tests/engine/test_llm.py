"""LLM in this process, on the real model: what it returns, what it refuses, what it leaves behind."""

from __future__ import annotations

import shutil

import pytest

import models
from octavo_engine import LLM, SamplingParams
from octavo_engine.status import FatalError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(models.smollm2()), kv_cache_memory_bytes=64 * 2**20, max_num_seqs=16)


def test_france_has_its_capital(llm):
    (output,) = llm.generate("The capital of France is", GREEDY, use_tqdm=False)

    assert output.outputs[0].text.startswith(" Paris")
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 8
    assert output.prompt == "The capital of France is"


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = ["One, two, three,", "The capital of France is", "A, B, C, D,"]

    together = llm.generate(prompts, GREEDY, use_tqdm=False)

    assert [output.prompt for output in together] == prompts
    assert [output.outputs[0].token_ids for output in together] == [
        llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts
    ]


def test_token_ids_text_and_mappings_are_the_same_prompt(llm):
    ids = llm.get_tokenizer().encode("The capital of France is")
    forms = ["The capital of France is", ids, {"prompt": "The capital of France is"}, {"prompt_token_ids": ids}]

    outputs = llm.generate(forms, GREEDY, use_tqdm=False)

    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert llm.generate(ids, GREEDY, use_tqdm=False)[0].prompt_token_ids == ids


def test_a_chat_is_answered_through_the_template(llm):
    (output,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY, use_tqdm=False)

    assert "Paris" in output.outputs[0].text
    assert output.prompt.endswith("<|im_start|>assistant\n")


def test_several_answers_to_one_prompt_differ_and_repeat_with_the_seed(llm):
    sampling = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=12)

    first = llm.generate("Once upon a time", sampling, use_tqdm=False)[0].outputs
    again = llm.generate("Once upon a time", sampling, use_tqdm=False)[0].outputs

    assert [answer.index for answer in first] == [0, 1, 2]
    assert len({answer.text for answer in first}) == 3
    assert [answer.text for answer in first] == [answer.text for answer in again]


def test_a_stop_string_ends_the_text_before_it(llm):
    sampling = SamplingParams(temperature=0.0, max_tokens=40, stop=["."])
    (output,) = llm.generate("The capital of France is", sampling, use_tqdm=False)

    assert output.outputs[0].text == " Paris"
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason == "."


def test_a_stop_token_id_is_named_as_the_reason(llm):
    (dot,) = llm.get_tokenizer().encode(".")
    sampling = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=[dot])
    (output,) = llm.generate("The capital of France is", sampling, use_tqdm=False)

    assert output.outputs[0].stop_reason == dot
    assert output.outputs[0].text == " Paris"


def test_the_second_time_a_long_prompt_comes_from_the_cache(llm):
    prompt = "All work and no play makes Jack a dull boy. " * 20
    llm.generate(prompt, GREEDY, use_tqdm=False)

    (again,) = llm.generate(prompt, GREEDY, use_tqdm=False)

    assert again.num_cached_tokens >= 64


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "1 to"),
        ([], "1 to"),
        ([49152], "vocabulary"),
        ([-1], "vocabulary"),
        ({"text": "x"}, "prompt_token_ids"),
        (list(range(1, 9000)), "max_model_len"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_and_nothing_stays_behind(llm, prompt, words):
    with pytest.raises(ValueError, match=words):
        llm.generate([prompt], GREEDY, use_tqdm=False)

    assert llm.generate("The capital of France is", GREEDY, use_tqdm=False)[0].outputs[0].text.startswith(" Paris")


def test_a_stop_token_outside_the_vocabulary_is_refused(llm):
    with pytest.raises(ValueError, match="stop_token_ids: 49152 is outside the vocabulary of 49152"):
        llm.generate("x", SamplingParams(stop_token_ids=[1, 49152]), use_tqdm=False)

    assert not llm._engine.has_work


def test_an_interrupt_leaves_the_engine_empty(llm, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("octavo_engine.llm._Answer.take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Hello", "World"], GREEDY, use_tqdm=False)

    assert not llm._engine.has_work
    llm._engine.check_integrity()


def test_settings_are_checked_by_name():
    with pytest.raises(TypeError, match="did you mean max_model_len"):
        LLM("x", max_model_length=4)
    with pytest.raises(ValueError, match="--block-size: got 17"):
        LLM("x", block_size=17)
    with pytest.raises(ValueError, match="--max-model-len: got 9000"):
        LLM(str(models.smollm2()), max_model_len=9000)
    with pytest.raises(FatalError, match="neither a folder nor"):
        LLM("./nowhere")


def test_a_tokenizer_may_come_from_a_folder_of_its_own(tmp_path):
    """It was refused for having no config.json, and the model's own end tokens and vocabulary were not read."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.smollm2() / name, tmp_path)
    llm = LLM(str(models.smollm2()), tokenizer=str(tmp_path), kv_cache_memory_bytes=2**26, max_num_seqs=16)
    (output,) = llm.generate("The capital of France is", GREEDY, use_tqdm=False)

    assert output.outputs[0].text.startswith(" Paris")
    assert llm.get_tokenizer().eos_token_ids == (2,)
    assert llm.get_tokenizer().vocab_size == 49152
    with pytest.raises(FatalError, match=r"has no tokenizer.json, so it is not a tokenizer's folder"):
        LLM(str(models.smollm2()), tokenizer=str(tmp_path.parent))


def test_logprobs_are_the_models_own_and_agree_with_transformers():
    import torch
    from transformers import AutoModelForCausalLM

    folder = str(models.smollm2())
    llm = LLM(folder, dtype="float32", kv_cache_memory_bytes=64 * 2**20, max_num_seqs=4)
    # Temperature, penalties and biases change the draw, and not the probabilities that are told.
    sampling = SamplingParams(
        temperature=1.5, seed=3, max_tokens=6, logprobs=3, repetition_penalty=1.2, logit_bias={260: 2.0}
    )
    (output,) = llm.generate("The capital of France is", sampling, use_tqdm=False)
    answer = output.outputs[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([output.prompt_token_ids + answer.token_ids])).logits[0]
    expected = logits[len(output.prompt_token_ids) - 1 : -1].log_softmax(-1)

    assert answer.logprobs is not None
    for row, token, found in zip(expected, answer.token_ids, answer.logprobs, strict=True):
        best = row.topk(3)
        assert found[token].logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert found[token].rank == int((row > row[token]).sum()) + 1
        assert {*best.indices.tolist(), token} == set(found)
        assert found[token].decoded_token == llm.get_tokenizer().decode_one(token)
    assert answer.cumulative_logprob == pytest.approx(
        sum(float(row[token]) for row, token in zip(expected, answer.token_ids, strict=True)), abs=1e-2
    )


def test_a_bias_forces_or_forbids_a_token(llm):
    tokenizer = llm.get_tokenizer()
    (paris,) = tokenizer.encode(" Paris")
    (london,) = tokenizer.encode(" London")

    def first(**settings: object) -> int:
        sampling = SamplingParams(temperature=0.0, max_tokens=1, **settings)
        return llm.generate("The capital of France is", sampling, use_tqdm=False)[0].outputs[0].token_ids[0]

    assert first() == paris
    assert first(logit_bias={paris: -100}) != paris
    assert first(logit_bias={str(london): 100}) == london
    assert first(allowed_token_ids=[london, 5, 6]) == london


def test_a_bad_word_does_not_come_at_the_beginning_of_a_word_or_inside(llm):
    sampling = SamplingParams(temperature=0.0, max_tokens=24)
    free = llm.generate("The capital of France is", sampling, use_tqdm=False)[0].outputs[0]
    banned = SamplingParams(temperature=0.0, max_tokens=24, bad_words=["Paris", "the capital"])
    without = llm.generate("The capital of France is", banned, use_tqdm=False)[0].outputs[0]

    assert "Paris" in free.text
    assert "Paris" not in without.text
    assert "the capital" not in without.text


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
def test_an_id_outside_the_vocabulary_is_refused_by_the_field_that_names_it(llm, field):
    value = {49152: 1.0} if field == "logit_bias" else [49152]

    with pytest.raises(ValueError, match=field):
        llm.generate("x", SamplingParams(**{field: value}), use_tqdm=False)
