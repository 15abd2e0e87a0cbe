"""Random models of every family in float32: the logits and the greedy tokens of transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_engine.config import EngineConfig
from octavo_engine.core.engine import Engine
from octavo_engine.core.messages import Submit
from octavo_engine.core.scheduler import Scheduler
from octavo_engine.core.step import Admission, StepItem, StepPlan
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.sampling_params import SamplingParams

COMMON = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with one head of keys": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama with as many heads of keys as of queries": ("Llama", {"num_key_value_heads": 4, "head_dim": 10}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama with gelu by tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama with linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama with llama3 rope": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama with yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 32}),
    "llama with yarn and its other settings": (
        "Llama",
        {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 1.5, "mscale_all_dim": 0.7,
                             "truncate": False}, "head_dim": 32},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 37}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window in some layers": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3 with a window in one layer": (
        "Qwen3",
        {"head_dim": 24, "use_sliding_window": True, "sliding_window": 20,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
}  # fmt: skip


def make(folder: Path, family: str, extra: dict[str, Any]) -> Any:
    """A random checkpoint in `folder`, and transformers' model of it."""
    import transformers

    kind = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(3)
    model = kind(kind.config_class(**{**COMMON, **extra})).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # the default deviation of 0.02 leaves all logits alike
            parameter.data.normal_(0, 1.0 if "embed" in name else 1.2 / parameter.shape[1] ** 0.5)
        else:
            parameter.data.normal_(0.0 if "bias" in name else 1.0, 0.2)
    model.save_pretrained(folder)
    return model


def load(folder: Path, **settings: Any) -> tuple[ModelRunner, Engine]:
    config = EngineConfig(
        model=str(folder), device="cpu", dtype="float32",
        **{"kv_cache_memory_bytes": 16 * 2**20, "max_num_seqs": 8, **settings},
    )  # fmt: skip
    runner = ModelRunner(config)
    plan = runner.load(folder, lambda stage, done, total: None).plan
    ticks = iter(range(10**9))
    return runner, Engine(Scheduler.of(config, plan), runner, lambda: float(next(ticks)))


def logits_of(runner: ModelRunner, tokens: list[int], cuts: list[int]) -> Tensor:
    """Logits at every position, [len(tokens), vocab], computed in chunks that end at `cuts`."""
    size = runner._plan.block_size
    admission = Admission(tokens, len(tokens), SamplingParams(temperature=0.0), (), 0)
    parts, start = [], 0
    for end in (*cuts, len(tokens)):
        # Blocks in a scattered order, so that no test passes by their lying side by side.
        held, needed = -(-start // size), -(-end // size)
        blocks = [(7 * index + 3) % runner._plan.num_blocks for index in range(held, needed)]
        plan = StepPlan([StepItem(0, start, end - start, blocks, True, admission if start == 0 else None)])
        runner._apply(plan)
        batch = dataclasses.replace(runner._batch(plan), logit_rows=None)
        parts.append(runner._decoder.forward(batch, runner._kv_cache))
        start = end
    return torch.cat(parts)


def generate(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    greedy = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.submit(Submit(str(index), prompt, greedy))
    while engine.has_work:
        for event in engine.step().events:
            outputs[event.request_id] += event.token_ids
    engine.check_integrity()
    return list(outputs.values())


@pytest.fixture(params=SHAPES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    return make(tmp_path, *SHAPES[request.param]), tmp_path


@pytest.mark.parametrize("cuts", [[], [1, 2, 40, 64, 65, 171]], ids=["at once", "in chunks"])
def test_the_logits_of_every_position_are_those_of_transformers(family, cuts: list[int]):
    model, folder = family
    runner, _ = load(folder, block_size=16)
    tokens = torch.randint(3, 211, (200,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        theirs = model(tokens.unsqueeze(0)).logits[0]

    ours = logits_of(runner, tokens.tolist(), cuts)
    assert theirs.std() > 0.5, "logits that are all alike would show nothing"
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_greedy_tokens_are_those_of_transformers_in_every_way_of_running(family):
    model, folder = family
    generator = torch.Generator().manual_seed(6)
    prompts = [torch.randint(3, 211, (n,), generator=generator).tolist() for n in (1, 2, 17, 64, 65, 130)]
    num_tokens = 40
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        model.generation_config.eos_token_id = None
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
        expected.append(out[0, len(prompt) :].tolist())

    runner, engine = load(folder)
    assert generate(engine, prompts, num_tokens) == expected
    assert generate(engine, prompts[::-1], num_tokens) == expected[::-1]  # prefix hits
    assert engine.scheduler.prefix_hits > 64
    _, chunked = load(folder, block_size=16, max_num_batched_tokens=16)
    assert generate(chunked, prompts, num_tokens) == expected
    room_for_one = runner._model.kv_bytes_per_token("float32") * 256
    _, tight = load(folder, block_size=16, max_model_len=256, kv_cache_memory_bytes=room_for_one)
    assert generate(tight, prompts, num_tokens) == expected
    assert tight.scheduler.num_preemptions > 0


def test_configs_of_older_transformers_give_the_same_model(tmp_path: Path):
    """rope_theta and rope_scaling side by side, torch_dtype for dtype: what nearly every published model has."""
    make(tmp_path, "Llama", {"rope_parameters": LLAMA3, "head_dim": 32})
    runner, _ = load(tmp_path)
    tokens = list(range(3, 180))
    expected = logits_of(runner, tokens, [])
    document = json.loads((tmp_path / "config.json").read_text())
    scaling = document.pop("rope_parameters")
    document |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": document.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(document))

    runner, _ = load(tmp_path)
    torch.testing.assert_close(logits_of(runner, tokens, []), expected, rtol=0, atol=0)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_request_whose_values_are_not_finite_harms_no_other(tmp_path: Path, enable_prefix_caching: bool):
    """Its keys and values stayed in blocks that later requests got, and a NaN times a weight of nothing is a NaN."""
    make(tmp_path, "Llama", {})
    settings = {"block_size": 16, "max_model_len": 128, "enable_prefix_caching": enable_prefix_caching}
    prompts = [[5] * n for n in (3, 30, 35, 50)]
    runner, clean = load(tmp_path, **settings)
    expected = generate(clean, prompts, 30)

    room = runner._model.kv_bytes_per_token("float32") * 260
    runner, engine = load(tmp_path, kv_cache_memory_bytes=room, **settings)
    runner._decoder._tensors["embedding"][200] = float("inf")
    sound, broken = [5] * 20, [200] * 40
    for _ in range(3):
        outputs = generate(engine, [broken, *prompts, sound + broken], 30)
        assert outputs[1:5] == expected
        assert outputs[0] == outputs[5] == []
