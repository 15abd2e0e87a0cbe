"""LLM in this process, on the real model: what it returns, what it refuses, what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from dataclasses import replace

import pytest

import models
from octavo_engine import LLM, AsyncLLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from octavo_engine.api.output.parser import REASONING_PARSERS
from octavo_engine.beam_search import search
from octavo_engine.config import EngineConfig
from octavo_engine.loader import weights
from octavo_engine.outputs import Logprob
from octavo_engine.status import FailureCode, FatalError
from octavo_engine.structured.settings import StructuredOutputsSettings

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


def test_a_mapping_says_more_of_a_prompt_or_is_refused(llm):
    ids = llm.get_tokenizer().encode("Once upon a time, in a village by the sea, " * 12)

    def cached(salt):
        prompt = {"prompt_token_ids": ids, "prompt": "a story", "cache_salt": salt, "multi_modal_data": None}
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert output.prompt == "a story"
        return output.num_cached_tokens > 0

    assert [cached("a"), cached("a"), cached("b"), cached("b")] == [False, True, False, True]
    for wrong in ({"prompt": "x", "multi_modal_data": {"image": 1}}, {"prompt_embeds": [1.0]}):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]} is not supported"):
            llm.generate(wrong, GREEDY, use_tqdm=False)


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


def test_a_model_that_does_not_fit_is_refused_with_the_numbers_before_anything_is_allocated(tmp_path, monkeypatch):
    config = json.loads((models.smollm2() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 65536, "num_hidden_layers": 9000}))
    monkeypatch.setattr(weights, "allocate", lambda *_: pytest.fail("memory was asked for"))

    with pytest.raises(FatalError) as caught:
        LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, dtype="float32")

    failure = caught.value.failure
    assert failure.code is FailureCode.WEIGHTS_TOO_LARGE
    assert float((failure.need or "").split()[0]) > 10_000 > float((failure.have or "").split()[0])
    assert "of memory, or choose a smaller model" in failure.fix


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


def test_a_chat_takes_tools_a_template_and_its_variables(llm):
    template = (
        "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{% for m in messages %}{{ m.role }}:"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %};{% endfor %}"
        "{{ mood }}"
    )
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}]},
    ]

    (output,) = llm.chat(
        messages, GREEDY, use_tqdm=False, chat_template=template, tools=[{"function": {"name": "f"}}],
        chat_template_kwargs={"mood": "kind"},
    )  # fmt: skip

    assert output.prompt == "<f>user:a\nb;assistant:7;kind"


def test_a_last_message_can_be_continued(llm):
    messages = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "The capital is"}]

    (output,) = llm.chat(
        messages, GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True
    )  # fmt: skip

    assert output.prompt.endswith("The capital is")
    with pytest.raises(ValueError, match="add_generation_prompt=False"):
        llm.chat(messages, GREEDY, continue_final_message=True)


def test_priorities_decide_who_goes_first_and_progress_can_be_shown_in_another_way(monkeypatch):
    llm = LLM(str(models.smollm2()), kv_cache_memory_bytes=64 * 2**20, max_num_seqs=1)
    order, bars = [], []

    class Bar:
        def __init__(self, total, **settings):
            bars.append(total)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731
        update = set_postfix_str = lambda self, *text: None

    step = llm._engine.step

    def watched():
        output = step()
        order.extend(event.request_id for event in output.events if event.finish_reason is not None)
        return output

    monkeypatch.setattr(llm._engine, "step", watched)
    outputs = llm.generate(["a", "b", "c"], GREEDY, use_tqdm=Bar, priority=[2, 0, 1])

    assert order == ["1-0", "2-0", "0-0"]
    assert bars == [3]
    assert all(output.finished for output in outputs)
    with pytest.raises(ValueError, match="2 priorities"):
        llm.generate(["a", "b", "c"], GREEDY, priority=[1, 2])


@pytest.mark.parametrize("name", ["encode", "embed", "classify", "score", "sleep", "collective_rpc", "get_metrics"])
def test_what_the_class_does_not_do_is_refused_with_a_reason(llm, name):
    assert not hasattr(llm, name)
    with pytest.raises(AttributeError, match=f"LLM.{name}: .*[a-z]{{4}}"):
        getattr(llm, name)


def test_the_models_defaults_are_taken_overridden_and_left_out(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models.smollm2(), folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "top_k": 7, "max_new_tokens": 33}')

    def defaults(**settings):
        return LLM(str(folder), kv_cache_memory_bytes=2**26, max_num_seqs=4, **settings).get_default_sampling_params()

    own, overridden = defaults(), defaults(override_generation_config={"temperature": 0.7})
    assert (own.temperature, own.top_k, own.max_tokens) == (0.3, 7, 33)
    assert (overridden.temperature, overridden.top_k) == (0.7, 7)
    assert defaults(generation_config="vllm") == SamplingParams()


def test_forgetting_the_prefix_cache_makes_a_prompt_new_again(llm):
    prompt = list(range(100, 300))
    llm.generate(prompt, GREEDY, use_tqdm=False)
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens > 0

    assert llm.reset_prefix_cache()

    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
    llm._engine.check_integrity()


def test_answers_keep_to_a_form_and_a_form_that_cannot_be_is_refused(llm):
    sampling = SamplingParams(max_tokens=20, structured_outputs=StructuredOutputsParams(regex="[0-9]{2}:[0-9]{2}"))

    (output,) = llm.generate("The time is", sampling, use_tqdm=False)

    assert re.fullmatch("[0-9]{2}:[0-9]{2}", output.outputs[0].text)
    assert output.outputs[0].finish_reason == "stop"
    with pytest.raises(ValueError, match="unclosed group"):
        llm.generate("x", SamplingParams(structured_outputs=StructuredOutputsParams(regex="(")), use_tqdm=False)


def test_where_a_model_thinks_the_form_begins_after_its_thinking(llm, monkeypatch):
    monkeypatch.setattr(llm, "_thinking", REASONING_PARSERS["qwen3"])
    form = StructuredOutputsParams(regex="[0-9]{2}!")
    sampling = [SamplingParams(temperature=0, max_tokens=6, structured_outputs=of) for of in (form, None)]
    ids = llm.get_tokenizer().encode("The time is <think>")

    thinking, free = llm.generate(["The time is <think>"] * 2, sampling, use_tqdm=False)
    of_ids = llm.generate(ids, sampling[0], use_tqdm=False)[0]
    over = llm.generate("The time is <think>\n</think>\n\n", sampling[0], use_tqdm=False)[0]

    assert thinking.outputs[0].text == free.outputs[0].text == of_ids.outputs[0].text
    assert re.fullmatch("[0-9]{2}!", over.outputs[0].text)
    monkeypatch.setattr(llm, "_structured", StructuredOutputsSettings(enable_in_reasoning=True))
    assert re.fullmatch("[0-9]{2}!", llm.generate(ids, sampling[0], use_tqdm=False)[0].outputs[0].text)
    with pytest.raises(ValueError, match="expected one of deepseek_r1, qwen3"):
        LLM("x", reasoning_parser="qwen9")


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"lora_request": object()}, "adapters"), ({"tokenization_kwargs": {"truncation": True}}, "prompt_token_ids"),
        ({"mm_processor_kwargs": {"a": 1}}, "text alone"),
    ],
)  # fmt: skip
def test_arguments_of_vllms_that_ask_for_what_is_not_here_are_refused(llm, given, word):
    with pytest.raises(ValueError, match=word):
        llm.generate("x", GREEDY, use_tqdm=False, **given)
    with pytest.raises(ValueError, match=word):
        llm.chat([{"role": "user", "content": "x"}], GREEDY, use_tqdm=False, **given)


# ---- beam search


def test_a_beam_search_keeps_the_likeliest_continuations_of_all():
    llm = LLM(str(models.smollm2()), dtype="float32", kv_cache_memory_bytes=2**27, max_num_seqs=16)
    prompt = llm.get_tokenizer().encode("The best thing about the sea is")
    params = BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)

    (output,) = llm.beam_search([prompt], params)

    # The same search by hand, over the whole of each step's distribution.
    beams = [(0.0, list(prompt))]
    for _ in range(4):
        greedy = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)
        found = llm.generate([tokens for _, tokens in beams], greedy, use_tqdm=False)
        grown = [
            (total + chance.logprob, [*tokens, token])
            for (total, tokens), one in zip(beams, found, strict=True)
            for token, chance in one.outputs[0].logprobs[0].items()
        ]
        beams = sorted(grown, reverse=True)[:3]
    assert [beam.tokens for beam in output.sequences] == [tokens for _, tokens in beams]
    assert [beam.cum_logprob for beam in output.sequences] == pytest.approx([total for total, _ in beams], abs=1e-3)
    assert all(beam.text.startswith("The best thing about the sea is") for beam in output.sequences)
    greedy = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0))[0]
    assert output.sequences[0].cum_logprob >= greedy.outputs[0].cumulative_logprob - 1e-3


def test_a_beam_ends_with_the_end_of_text_and_its_length_counts():
    def next_tokens(beams, many):
        assert many == 4
        return [
            {9: Logprob(-0.1), 5: Logprob(-2.5)} if beam[-1] == 5 else {5: Logprob(-0.2), 9: Logprob(-1.9)}
            for beam in beams
        ]

    ((best, second),) = search([[1, 2]], BeamSearchParams(2, 3), [9], next_tokens)

    # -0.3 over three tokens, -2.8 over four, -1.9 over two.
    assert (best.tokens, best.finish_reason, best.stop_reason) == ([1, 2, 5, 9], "stop", 9)
    assert second.tokens == [1, 2, 5, 5, 9]
    for wrong in ({"beam_width": 0}, {"beam_width": 11}, {"max_tokens": 0}, {"temperature": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **wrong})


@pytest.fixture
def tiny(tmp_path):
    """Settings of a model of two small layers, whose prompts of thousands of tokens take a moment."""
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 64,
        "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
    }))  # fmt: skip
    return {
        "model": str(tmp_path), "load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu",
        "kv_cache_memory_bytes": 2**24, "max_num_batched_tokens": 2048,
    }  # fmt: skip


def chunks_of(llm, monkeypatch):
    """Prompt tokens of each step that has decodes too, in a list that grows."""
    chunks, runner = [], llm._engine._runner
    launch = runner.launch

    def watched(plan):
        if {True} < {item.count == 1 for item in plan.items}:
            chunks.append(plan.num_tokens - sum(item.count == 1 for item in plan.items))
        return launch(plan)

    monkeypatch.setattr(runner, "launch", watched)
    return chunks


STREAM = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, detokenize=False)
SLOW = 1.001
"""As max_decode_slowdown: hardly any prompt fits beside a stream."""


@pytest.mark.parametrize(("settings", "split"), [({}, False), ({"max_decode_slowdown": SLOW}, True)])
def test_prompts_fill_the_steps_of_generate_unless_a_limit_is_given(tiny, monkeypatch, settings, split):
    """The limit was taken and ignored."""
    llm = LLM(**tiny, **settings)
    chunks = chunks_of(llm, monkeypatch)

    # The first two fill a step; the third comes when they decode.
    llm.generate([[5] * 20, [6] * 2028, [7] * 1800], STREAM, use_tqdm=False)

    assert (len(chunks) > 1) is split
    assert (max(chunks) == 1800) is not split


def test_streams_of_async_llm_have_the_limit_of_a_server(tiny, monkeypatch):
    """A prompt of 1,800 tokens beside a stream of SmolLM2 on a CPU made a gap of 3.5 s; `octavo serve` has 0.2 s."""

    async def both(llm):
        stream = llm.generate([5] * 20, replace(STREAM, max_tokens=4000))
        await anext(stream)
        async with asyncio.timeout(60):
            last = [output async for output in llm.generate([7] * 1800, STREAM)][-1]
        await stream.aclose()
        return last

    usual = AsyncLLM(**tiny)
    limit = usual._llm._engine._limit
    usual.shutdown()
    slow = AsyncLLM(**tiny, max_decode_slowdown=SLOW)
    chunks = chunks_of(slow._llm, monkeypatch)
    last = asyncio.run(both(slow))
    slow.shutdown()

    assert limit is not None
    assert limit._slowdown == EngineConfig(model="m").max_decode_slowdown
    assert limit._context_share > 0
    assert last.finished
    assert len(chunks) > 1


def test_a_step_of_async_llm_waits_for_who_may_still_join_it(tiny, monkeypatch):
    llm = AsyncLLM(**tiny)
    waits, step = [], llm._llm._engine.step
    monkeypatch.setattr(llm._llm._engine, "hold_s", lambda: waits.append(time.monotonic()) or 0.05)
    steps = []
    monkeypatch.setattr(llm._llm._engine, "step", lambda: steps.append(time.monotonic()) or step())

    async def answer():
        return [output async for output in llm.generate([5] * 20, replace(STREAM, max_tokens=5))][-1]

    assert len(asyncio.run(answer()).outputs[0].token_ids) == 5
    llm.shutdown()
    assert len(steps) >= 5
    assert all(began - waited >= 0.05 for waited, began in zip(waits, steps, strict=True))
