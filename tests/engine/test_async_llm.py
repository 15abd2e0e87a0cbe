"""AsyncLLM on the real model: streams side by side, aborts, errors, and the end of the engine."""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import models
from octavo_engine import AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams, StructuredOutputsParams
from octavo_engine.async_llm import EngineDeadError
from waiting import wait_for

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
LONG = SamplingParams(temperature=0.0, max_tokens=2000, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(models.smollm2()), kv_cache_memory_bytes=128 * 2**20, max_num_seqs=16)
    yield llm
    llm.shutdown()


async def idle(llm: AsyncLLM) -> None:
    await asyncio.to_thread(wait_for, lambda: not llm._llm._engine.has_work, "the engine to have no work", every_s=0.02)


async def outputs_of(
    llm: AsyncLLM, prompt: str | list[int], sampling: SamplingParams, **more: Any
) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, sampling, **more)]


async def test_outputs_grow_to_what_the_offline_class_gives(llm) -> None:
    outputs = await outputs_of(llm, "The capital of France is", GREEDY)

    texts = [output.outputs[0].text for output in outputs]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1].startswith(" Paris")
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len(outputs) > 2
    assert outputs[-1].outputs[0].finish_reason == "length"


async def test_deltas_joined_are_the_answer_and_a_final_output_comes_alone(llm) -> None:
    whole = (await outputs_of(llm, "Once upon a time", GREEDY))[-1].outputs[0]
    delta = SamplingParams(temperature=0.0, max_tokens=8, output_kind=RequestOutputKind.DELTA, logprobs=1)
    final = SamplingParams(temperature=0.0, max_tokens=8, output_kind=RequestOutputKind.FINAL_ONLY)

    parts = [output.outputs[0] for output in await outputs_of(llm, "Once upon a time", delta)]
    (last,) = await outputs_of(llm, "Once upon a time", final)

    assert "".join(part.text for part in parts) == whole.text == last.outputs[0].text
    assert [token for part in parts for token in part.token_ids] == whole.token_ids
    assert sum(len(part.logprobs or []) for part in parts) == 8


async def test_requests_run_side_by_side_and_join_while_others_run(llm) -> None:
    long = asyncio.create_task(outputs_of(llm, "A story:", SamplingParams(temperature=0.0, max_tokens=60)))
    await asyncio.sleep(0.1)

    short = await asyncio.gather(*(outputs_of(llm, f"{i}, {i + 1},", GREEDY) for i in range(6)))

    assert not long.done()
    assert all(outputs[-1].finished for outputs in short)
    assert len((await long)[-1].outputs[0].token_ids) > 8


async def test_several_answers_and_forms_come_too(llm) -> None:
    form = StructuredOutputsParams(regex="[0-9]{2}")
    sampling = SamplingParams(n=3, seed=1, max_tokens=9, structured_outputs=form)

    last = (await outputs_of(llm, "The number is", sampling))[-1]

    assert [one.index for one in last.outputs] == [0, 1, 2]
    assert all(re.fullmatch("[0-9]{2}", one.text) for one in last.outputs)


async def test_an_abort_ends_the_generator_with_what_there_is(llm) -> None:
    task = asyncio.create_task(outputs_of(llm, "A story:", LONG, request_id="mine"))
    await asyncio.sleep(0.3)

    await llm.abort("mine")
    last = (await asyncio.wait_for(task, 60))[-1]

    assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
    await idle(llm)


async def test_leaving_the_loop_or_cancelling_the_task_frees_the_engine(llm) -> None:
    stream = llm.generate("A story:", LONG)
    async for _ in stream:
        break
    await stream.aclose()
    task = asyncio.create_task(outputs_of(llm, "A story:", LONG))
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    await idle(llm)
    llm._llm._engine.check_integrity()


async def test_what_cannot_be_is_refused_and_the_next_request_served(llm) -> None:
    for prompt, sampling, words in (
        ("", GREEDY, "1 to"),
        ("x", SamplingParams(stop_token_ids=[10**6]), "vocabulary"),
        ("x", SamplingParams(structured_outputs=StructuredOutputsParams(regex="(")), "unclosed"),
    ):
        with pytest.raises(ValueError, match=words):
            await outputs_of(llm, prompt, sampling)
    first = llm.generate("A story:", LONG, "same")
    await anext(first)
    with pytest.raises(ValueError, match="in use"):
        await anext(llm.generate("A story:", LONG, "same"))
    await first.aclose()

    assert (await outputs_of(llm, "The capital of France is", GREEDY))[-1].finished


async def test_an_engine_that_is_shut_down_says_so_to_everybody() -> None:
    llm = AsyncLLM(str(models.smollm2()), kv_cache_memory_bytes=64 * 2**20, max_num_seqs=4)
    task = asyncio.create_task(outputs_of(llm, "A story:", LONG))
    await asyncio.sleep(0.3)

    await asyncio.to_thread(llm.shutdown)
    llm.shutdown()

    with pytest.raises(EngineDeadError, match="shut down"):
        await asyncio.wait_for(task, 60)
    with pytest.raises(EngineDeadError, match="shut down"):
        await outputs_of(llm, "x", GREEDY)
    with pytest.raises(EngineDeadError, match="shut down"):
        await llm.check_health()
    assert (llm.is_running, llm.is_stopped, llm.errored) == (False, True, True)


async def test_what_vllms_class_tells_of_itself_is_told_and_what_it_does_beyond_is_refused_with_a_reason(llm) -> None:
    await llm.check_health()
    assert (llm.is_running, llm.errored, await llm.is_tracing_enabled()) == (True, False, False)
    assert llm.tokenizer is llm.get_tokenizer()
    for name in ("encode", "add_lora", "sleep", "pause_generation", "from_engine_args", "collective_rpc"):
        with pytest.raises(AttributeError, match=f"AsyncLLM.{name}: .*[a-z]{{4}}"):
            getattr(llm, name)
    for given in ({"lora_request": "x"}, {"tokenization_kwargs": {"a": 1}}, {"trace_headers": {"traceparent": "x"}}):
        with pytest.raises(ValueError, match=next(iter(given))):
            await outputs_of(llm, "x", GREEDY, **given)


async def test_ids_come_with_their_text_and_the_prefix_cache_can_be_forgotten(llm) -> None:
    ids = llm.tokenizer.encode("Once upon a time, in a village by the sea, " * 12)
    first = await outputs_of(llm, ids, GREEDY, prompt_text="a story")
    again = await outputs_of(llm, ids, GREEDY)
    assert await llm.reset_prefix_cache()
    anew = await outputs_of(llm, ids, GREEDY)

    assert first[-1].prompt == "a story"
    assert again[-1].num_cached_tokens > 0
    assert anew[-1].num_cached_tokens == 0
    assert anew[-1].outputs[0].token_ids == first[-1].outputs[0].token_ids


SCRIPT = """
import asyncio
from octavo_engine import LLM, AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams, StructuredOutputsParams

llm = LLM(model="m", max_model_len=2048, dtype="bfloat16")
form = StructuredOutputsParams(json={"type": "object"})
sampling = SamplingParams(temperature=0.2, stop=["x"], logit_bias={1: 2.0}, stop_token_ids=[1], bad_words=["y"])
outputs: list[RequestOutput] = llm.generate(["a", "b"], sampling)
tools = [{"type": "function", "function": {"name": "f"}}]
chats = llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(structured_outputs=form), tools=tools)
text: str = outputs[0].outputs[0].text
ids: list[int] = chats[0].prompt_token_ids
beams = llm.beam_search(["a"], BeamSearchParams(beam_width=2, max_tokens=3))
score: float = beams[0].sequences[0].cum_logprob

async def main() -> str:
    engine = AsyncLLM("m")
    last = ""
    async for output in engine.generate("a", SamplingParams(max_tokens=None), request_id="1"):
        last = output.outputs[0].text
    await engine.abort("1")
    return last

asyncio.run(main())
"""
WRONG = [
    'llm.generate("a", 3)', 'SamplingParams(temperature="hot")', "llm.encode('a')",
    "number: int = llm.generate('a')[0].outputs[0].text", "llm.beam_search('a', SamplingParams())",
]  # fmt: skip


@pytest.mark.slow
def test_a_users_script_is_checked_by_mypy_and_mistakes_in_it_are_found(tmp_path: Path) -> None:
    engine = Path(__file__).parents[2] / "engine"
    script = tmp_path / "script.py"
    first = len(SCRIPT.splitlines()) + 1
    script.write_text(SCRIPT + "\n".join(WRONG) + "\n")
    # No signature has a tensor, and reading torch's modules takes minutes.
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = True\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n")

    done = subprocess.run(
        [sys.executable, "-m", "mypy", f"--config-file={settings}", str(script)],
        capture_output=True, text=True, timeout=250, env={"MYPYPATH": str(engine), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
    )  # fmt: skip

    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert found == {first + index for index in range(len(WRONG))}, done.stdout
    assert (engine / "octavo_engine" / "py.typed").is_file()
