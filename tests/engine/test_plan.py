"""Sizes: what a checkpoint's config.json says, what the engine will allocate, and the fix when it does not fit."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from octavo_engine import plan as plan_module
from octavo_engine.checkpoint import find_files, read_headers
from octavo_engine.config import ConfigError, EngineConfig, parse_count
from octavo_engine.device_memory import GIB, DeviceMemory
from octavo_engine.models.config import DecoderConfig, load_config, parse_config
from octavo_engine.models.layout import ALIGNMENT, placements, slots
from octavo_engine.plan import Plan, choose_dtype, describe, make_plan
from octavo_engine.status import FailureCode, FatalError

TINY = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "dtype": "bfloat16", "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def model_of(raw: dict[str, Any] | None = None, **changes: Any) -> DecoderConfig:
    return parse_config({**(raw or TINY), **changes})


def gpu(gib: float, free_gib: float | None = None) -> DeviceMemory:
    return DeviceMemory("cuda", "a test GPU", int(gib * GIB), int((gib if free_gib is None else free_gib) * GIB))


def cpu(gib: float) -> DeviceMemory:
    return DeviceMemory("cpu", "a test CPU", int(gib * GIB), int(gib * GIB))


def plan(model: DecoderConfig, memory: DeviceMemory, dtype: str = "bfloat16", **settings: Any) -> Plan:
    return make_plan(EngineConfig(model="m", **settings), model, dtype, memory)


# ---- config.json


def test_a_config_is_read_with_its_defaults():
    model = model_of()

    assert model.head_dim == 4
    assert model.qkv_size == 16
    assert model.windows == (None, None)
    assert (model.qkv_bias, model.output_bias, model.mlp_bias, model.qk_norm, model.tied_embeddings) == (False,) * 5
    assert (model.rope.theta, model.rope.type) == (10_000.0, "default")
    assert model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, {"qkv_bias": True, "output_bias": False}),
        ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
        ({"mlp_bias": True}, {"mlp_bias": True}),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 6}, {"qk_norm": True, "head_dim": 6, "qkv_bias": False}),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 5}, {"windows": (5, 5)}),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, {"windows": (None, None)}),
        ({"sliding_window": 5}, {"windows": (None, None)}),  # Llama has none, whatever its file says
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 5}, {"windows": (None, None)}),
        (
            {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 5, "use_sliding_window": True,
             "max_window_layers": 1},
            {"windows": (None, 5)},
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 5, "use_sliding_window": True,
             "layer_types": ["sliding_attention", "full_attention"]},
            {"windows": (5, None)},
        ),
        ({"num_key_value_heads": None}, {"num_kv_heads": 2}),
        ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
        ({"dtype": "float32"}, {"dtype": "float32"}),
        ({"torch_dtype": "float8"}, {"dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_the_switches_of_each_family(changes: dict[str, Any], expected: dict[str, Any]):
    model = model_of(**changes)

    assert {name: getattr(model, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "theta", "kind", "factor"),
    [
        ({"rope_theta": 5e5}, 5e5, "default", None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, "linear", 2.0),
        ({"rope_scaling": LLAMA_8B["rope_scaling"], "rope_theta": 3e4}, 3e4, "llama3", 8.0),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7e4}}, 7e4, "yarn", 4.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}, "rope_theta": 1.0}, 2e4, "default", None),
    ],
)
def test_rope_is_read_in_the_old_and_the_new_spelling(changes, theta: float, kind: str, factor: float | None):
    rope = model_of(**changes).rope

    assert (rope.theta, rope.type, rope.parameters.get("factor")) == (theta, kind, factor)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, FailureCode.UNSUPPORTED_MODEL, "MambaForCausalLM"),
        ({"architectures": None}, FailureCode.UNSUPPORTED_MODEL, "architecture none"),
        ({"quantization_config": {"quant_method": "awq"}}, FailureCode.UNSUPPORTED_FEATURE, "awq"),
        ({"hidden_act": "relu"}, FailureCode.UNSUPPORTED_MODEL, "'relu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, FailureCode.UNSUPPORTED_MODEL, "'longrope'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            FailureCode.MODEL_INVALID,
            "lacks the number low_freq",
        ),
        ({"rope_scaling": {"type": "linear"}}, FailureCode.MODEL_INVALID, "'linear' lacks the number factor"),
        ({"hidden_size": None}, FailureCode.MODEL_INVALID, "hidden_size is None"),
        ({"hidden_size": "8"}, FailureCode.MODEL_INVALID, "hidden_size is '8'"),
        ({"num_hidden_layers": 0}, FailureCode.MODEL_INVALID, "num_hidden_layers is 0"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, FailureCode.MODEL_INVALID, "3 attention heads"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_by_what_is_wrong(changes, code: FailureCode, words: str):
    with pytest.raises(FatalError) as refused:
        model_of(**changes)

    assert refused.value.failure.code is code
    assert words in refused.value.failure.message
    assert refused.value.failure.fix


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, FailureCode.MODEL_INVALID, "has no config.json (it holds: README.md)"),
        ("{", FailureCode.MODEL_INVALID, "is not JSON"),
        ("[]", FailureCode.MODEL_INVALID, "holds no JSON object"),
    ],
)
def test_a_folder_without_a_readable_config_says_so(tmp_path: Path, content: str | None, code, words: str):
    (tmp_path / "README.md").touch()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(FatalError) as refused:
        load_config(tmp_path)

    assert refused.value.failure.code is code
    assert words in refused.value.failure.message


# ---- parameters and their places


FAMILIES = [
    {},
    {"tie_word_embeddings": True},
    {"architectures": ["Qwen2ForCausalLM"]},
    {"architectures": ["Qwen3ForCausalLM"], "head_dim": 6},
    {"attention_bias": True, "mlp_bias": True},
]


def test_the_parameters_of_a_tiny_model_are_those_counted_by_hand():
    # Embedding and head 2 * 10 * 8; per layer qkv 16 * 8, output 8 * 8, gate, up and down 3 * 8 * 16, two norms of 8.
    assert model_of().num_parameters == 160 + 2 * (128 + 64 + 384 + 16) + 8


def test_the_parameters_of_llama_3_1_8b_are_the_published_8_03_billion():
    assert model_of(LLAMA_8B).num_parameters == 8_030_261_248


@pytest.mark.parametrize("changes", FAMILIES)
def test_every_element_of_the_arena_is_filled_from_the_checkpoint_exactly_once(changes: dict[str, Any]):
    model = model_of(**changes)
    layout, filled = slots(model), dict[str, int]()
    for target in placements(model).values():
        slot = layout[target.slot]
        assert target.row == filled.get(target.slot, 0), "parts of a merged matrix follow each other"
        assert target.shape[1:] == slot.shape[1:]
        filled[target.slot] = target.row + target.shape[0]

    assert filled == {name: slot.shape[0] for name, slot in layout.items()}
    assert sum(slot.num_elements for slot in layout.values()) == model.num_parameters


@pytest.mark.parametrize("changes", FAMILIES)
def test_slots_are_aligned_and_do_not_overlap(changes: dict[str, Any]):
    end = 0
    for slot in slots(model_of(**changes)).values():
        assert slot.offset >= end
        assert slot.offset % ALIGNMENT == 0
        end = slot.offset + slot.num_elements


# ---- the plan


def test_keys_and_values_of_a_token_are_counted_over_layers_and_heads():
    assert model_of(LLAMA_8B).kv_bytes_per_token("bfloat16") == 2 * 32 * 8 * 128 * 2
    assert model_of().kv_bytes_per_token("float32") == 2 * 2 * 1 * 4 * 4


def test_what_is_left_of_the_budget_becomes_blocks():
    result = plan(model_of(LLAMA_8B), gpu(80), max_model_len=8192)

    assert result.weights_bytes == 8_030_261_248 * 2
    assert result.budget_bytes == int(80 * GIB * 0.9) - 864 * 2**20
    left = result.budget_bytes - result.weights_bytes - result.activation_bytes
    assert 0 <= left - result.kv_bytes < result.kv_bytes_per_token * result.block_size
    assert result.kv_tokens == result.num_blocks * 64
    assert result.max_concurrency == result.kv_tokens / 8192


def test_a_cache_of_eight_bits_has_twice_the_blocks_and_is_named_where_it_would_fit():
    sixteen, eight = (plan(model_of(LLAMA_8B), gpu(80), kv_cache_dtype=kind) for kind in ("auto", "fp8"))

    assert (sixteen.kv_dtype, eight.kv_dtype) == ("bfloat16", "fp8_e4m3")
    assert eight.kv_bytes_per_token * 2 == sixteen.kv_bytes_per_token
    assert eight.num_blocks // 2 == sixteen.num_blocks
    for kind, named in (("auto", True), ("fp8", False)):
        with pytest.raises(FatalError) as refused:
            plan(model_of(LLAMA_8B), gpu(24), max_model_len=131072 if kind == "fp8" else 50000, kv_cache_dtype=kind)
        assert ("--kv-cache-dtype fp8" in str(refused.value.failure.fix)) is named


def test_what_others_hold_on_a_gpu_is_not_ours():
    ours, shared = plan(model_of(LLAMA_8B), gpu(80)), plan(model_of(LLAMA_8B), gpu(80, free_gib=40))

    assert shared.budget_bytes == 40 * GIB - 864 * 2**20
    assert shared.num_blocks < ours.num_blocks


def test_a_cpu_keeps_its_cache_small():
    assert 3.9 * GIB < plan(model_of(LLAMA_8B), cpu(500)).kv_bytes <= 4 * GIB


def test_the_size_of_the_cache_can_be_given_instead():
    result = plan(model_of(LLAMA_8B), gpu(24), kv_cache_memory_bytes=2 * GIB, max_model_len=4096)

    assert result.num_blocks == 2 * GIB // (result.kv_bytes_per_token * 64)


def test_the_number_of_blocks_can_be_given_instead():
    result = plan(model_of(LLAMA_8B), gpu(24), num_gpu_blocks_override=70, max_model_len=4096)

    assert (result.num_blocks, result.kv_tokens) == (70, 70 * 64)
    with pytest.raises(ConfigError, match="--num-gpu-blocks-override: got 100000, expected at most"):
        plan(model_of(LLAMA_8B), gpu(24), num_gpu_blocks_override=100_000, max_model_len=4096)
    with pytest.raises(FatalError, match="set --max-model-len <= 4480"):
        plan(model_of(LLAMA_8B), gpu(24), num_gpu_blocks_override=70, max_model_len=8192)


@pytest.mark.parametrize(
    ("memory", "settings"),
    [
        # 63 GiB were let through: with weights and activations 2.25 more than are free.
        (gpu(80, free_gib=79), {"kv_cache_memory_bytes": 63 * GIB}),
        (gpu(80, free_gib=79), {"num_gpu_blocks_override": 63 * 1024 // 8}),
        (gpu(80, free_gib=24), {"kv_cache_memory_bytes": 20 * GIB, "max_model_len": 64}),
        (cpu(31), {"kv_cache_memory_bytes": 16 * GIB, "max_model_len": 64}),
    ],
)
def test_a_cache_that_does_not_fit_beside_the_rest_is_refused_with_the_largest_that_does(memory, settings):
    model, (setting, asked) = model_of(LLAMA_8B), next(iter(settings.items()))
    with pytest.raises(ConfigError) as refused:
        plan(model, memory, **settings)
    text = str(refused.value)
    most = re.search(r"expected at most (\d+): ", text)
    assert most is not None

    assert f"has {memory.free_bytes / GIB:.2f} GiB free and the weights take 14.96 GiB, activations " in text
    assert ("the driver and its libraries 0.84 GiB" in text) is (memory.kind == "cuda")
    assert ("other processes about 56.00 GiB of its 80.00 GiB" in text) is (memory.free_bytes == 24 * GIB)
    largest = plan(model, memory, **{**settings, setting: int(most[1])})
    taken = largest.weights_bytes + largest.activation_bytes + largest.kv_bytes
    assert memory.free_bytes - 2 * GIB < taken <= memory.free_bytes
    with pytest.raises(ConfigError):
        plan(model, memory, **{**settings, setting: int(most[1]) + 1})
    assert int(most[1]) < asked


def test_weights_that_leave_no_room_are_refused_whatever_is_asked_of_the_cache():
    with pytest.raises(FatalError) as refused:
        plan(model_of(LLAMA_8B), gpu(16), kv_cache_memory_bytes=GIB)

    assert refused.value.failure.code is FailureCode.WEIGHTS_TOO_LARGE


@pytest.mark.parametrize("setting", ["kv_cache_memory_bytes", "num_gpu_blocks_override"])
def test_a_longest_request_that_no_cache_has_room_for_is_told_with_the_size_that_there_is_room_for(setting):
    """Or what is named would be refused in turn."""
    asked = 20 * GIB if setting == "kv_cache_memory_bytes" else 5000
    settings: dict[str, Any] = {setting: asked, "max_num_seqs": 16}
    with pytest.raises(FatalError) as refused:
        plan(model_of(LLAMA_8B), gpu(24), **settings, max_model_len=131072)

    assert "are left for it" in refused.value.failure.message
    fix = re.fullmatch(r"set --max-model-len <= (\d+) and --([a-z-]+) <= (\d+)", failure_fix(refused))
    assert fix
    assert fix[2] == setting.replace("_", "-")
    assert plan(model_of(LLAMA_8B), gpu(24), **{**settings, setting: int(fix[3])}, max_model_len=int(fix[1]))


def test_a_cache_that_only_a_cpu_with_its_size_given_would_have_is_asked_for():
    settings: dict[str, Any] = {"max_model_len": 100_000, "max_num_seqs": 8}
    with pytest.raises(FatalError) as refused:
        plan(model_of(LLAMA_8B), cpu(5.36), **settings)

    fix = re.search(r"at least ([\d.]+) GiB of memory and set --kv-cache-memory-bytes to (\d+)M,", failure_fix(refused))
    assert fix
    size = int(fix[2]) * 2**20
    assert plan(model_of(LLAMA_8B), cpu(float(fix[1])), **settings, kv_cache_memory_bytes=size).max_model_len == 100_000


def test_other_processes_are_to_be_stopped_and_what_else_is_lacking_is_named_with_it():
    settings: dict[str, Any] = {"max_model_len": 100_000, "max_num_seqs": 8}
    with pytest.raises(FatalError) as refused:
        plan(model_of(LLAMA_8B), gpu(41, 25), **settings, kv_cache_memory_bytes=609)

    fix = re.match(
        r"stop the other processes on this GPU and raise --kv-cache-memory-bytes to (\d+)M", failure_fix(refused)
    )
    assert fix, failure_fix(refused)
    assert plan(model_of(LLAMA_8B), gpu(41), **settings, kv_cache_memory_bytes=int(fix[1]) * 2**20)


def test_the_length_is_the_models_own_or_what_fits_when_none_is_given():
    assert plan(model_of(LLAMA_8B), gpu(80)).max_model_len == 131072
    shorter = plan(model_of(LLAMA_8B), gpu(24), max_num_seqs=8, max_num_batched_tokens=512)
    assert shorter.max_model_len == shorter.kv_tokens < 131072


def test_without_chunks_no_prompt_is_longer_than_a_step():
    assert plan(model_of(LLAMA_8B), gpu(80), enable_chunked_prefill=False).max_model_len == 8192


def test_more_than_the_models_own_length_is_refused_with_it():
    with pytest.raises(ConfigError, match="--max-model-len: got 129, expected at most 128, the model's own limit"):
        plan(model_of(), cpu(4), max_model_len=129)


def test_weights_that_do_not_fit_are_refused_with_need_and_have():
    with pytest.raises(FatalError) as refused:
        plan(model_of(LLAMA_8B), gpu(16))

    failure = refused.value.failure
    assert failure.code is FailureCode.WEIGHTS_TOO_LARGE
    assert failure.need is not None
    assert failure.have == "13.56 GiB"
    assert float(failure.need.split()[0]) > 14.9


@pytest.mark.parametrize("settings", [{}, {"gpu_memory_utilization": 0.01}, {"kv_cache_memory_bytes": 3 * GIB}])
def test_the_memory_that_the_fix_names_for_a_cpu_is_enough(settings: dict[str, Any]):
    model, asked = model_of(LLAMA_8B), {**settings, "max_model_len": 64, "block_size": 16}
    with pytest.raises(FatalError) as refused:
        plan(model, cpu(10), **asked)
    amount = re.search(
        r"at least ([\d.]+) GiB of memory(?: and --gpu-memory-utilization ([\d.]+))?,", failure_fix(refused)
    )
    assert amount is not None

    if amount[2]:
        asked["gpu_memory_utilization"] = float(amount[2])
    assert plan(model, cpu(float(amount[1])), **asked).num_blocks > 0


@pytest.mark.parametrize(
    ("memory", "settings"),
    [
        (cpu(100), {"gpu_memory_utilization": 0.01}),
        (cpu(100), {"gpu_memory_utilization": 0.01, "max_model_len": 8192}),
        (cpu(21), {"gpu_memory_utilization": 0.5, "max_model_len": 128}),
        (gpu(80), {"gpu_memory_utilization": 0.2}),
        (gpu(24), {"gpu_memory_utilization": 0.5, "max_model_len": 8192}),
        (gpu(24), {"gpu_memory_utilization": 0.7, "max_model_len": 16384}),  # the weights fit, the cache is too small
        (gpu(18), {"max_model_len": 4096}),
    ],
)
def test_a_utilization_too_low_is_told_with_the_least_that_suffices(memory: DeviceMemory, settings: dict[str, Any]):
    model = model_of(LLAMA_8B)
    with pytest.raises(FatalError) as refused:
        plan(model, memory, **settings)
    share = re.search(r"raise --gpu-memory-utilization to (\d\.\d\d) at least", failure_fix(refused))
    assert share is not None

    enough = plan(model, memory, **{**settings, "gpu_memory_utilization": float(share[1])})
    # Where no length is set, it is the model's whole one, or on a CPU the whole cache that it has.
    assert enough.max_model_len == min(
        settings.get("max_model_len", 131072), 131072 if memory.kind == "cuda" else 32768
    )
    less = {**settings, "gpu_memory_utilization": float(share[1]) - 0.01}
    if "max_model_len" in settings:
        with pytest.raises(FatalError):
            plan(model, memory, **less)
    else:
        assert plan(model, memory, **less).max_model_len < enough.max_model_len


@pytest.mark.parametrize(
    ("free_gib", "utilization", "fix"),
    [
        (10, 0.9, "stop the other processes on this GPU, or choose a GPU with more free memory"),
        (
            10,
            0.1,
            "stop the other processes on this GPU and raise --gpu-memory-utilization to 0.\\d\\d at least, or .*",
        ),
        (79, 0.1, "raise --gpu-memory-utilization to 0.\\d\\d at least"),
    ],
)
def test_memory_that_others_hold_on_a_gpu_is_told_of(free_gib: float, utilization: float, fix: str):
    with pytest.raises(FatalError) as refused:
        plan(model_of(LLAMA_8B), gpu(80, free_gib), gpu_memory_utilization=utilization)

    told = "Other processes hold about 70.00 GiB of its 80.00 GiB." in refused.value.failure.message
    assert told is (free_gib == 10)
    assert re.fullmatch(fix, failure_fix(refused))


def test_a_gpu_that_is_too_small_when_it_is_empty_is_to_be_a_larger_one():
    with pytest.raises(FatalError) as refused:
        plan(model_of(LLAMA_8B), gpu(16, free_gib=8))

    assert "Other processes hold about 8.00 GiB" in refused.value.failure.message
    assert failure_fix(refused).startswith("choose a GPU with more memory or a smaller model")


def failure_fix(refused: pytest.ExceptionInfo[FatalError]) -> str:
    return refused.value.failure.fix


@pytest.mark.parametrize(
    ("memory", "settings", "larger"),
    [
        (gpu(24), {"max_model_len": 131072, "max_num_seqs": 16}, None),
        (gpu(80), {"max_model_len": 131072, "kv_cache_memory_bytes": GIB}, "raise --kv-cache-memory-bytes to 16384M"),
        (gpu(80), {"max_model_len": 8192, "num_gpu_blocks_override": 70}, "raise --num-gpu-blocks-override to 128"),
        (gpu(20), {"max_model_len": 131072, "kv_cache_memory_bytes": GIB, "max_num_seqs": 16}, None),
        (cpu(20), {"max_model_len": 131072, "max_num_seqs": 1}, None),
        (cpu(64), {"max_model_len": 131072, "max_num_seqs": 1}, "set --kv-cache-memory-bytes to 16384M"),
        (cpu(64), {"max_model_len": 131072, "gpu_memory_utilization": 0.3}, "set --kv-cache-memory-bytes to 16384M"),
    ],
)
def test_a_cache_too_small_names_the_length_and_the_size_that_work(
    memory: DeviceMemory, settings: dict[str, Any], larger: str | None
):
    model = model_of(LLAMA_8B)
    with pytest.raises(FatalError) as refused:
        plan(model, memory, **settings)
    assert refused.value.failure.code is FailureCode.KV_CACHE_TOO_SMALL
    named = re.fullmatch(
        r"set --max-model-len <= (\d+)(?:, or ((?:raise|set) \S+ to \d+M?)(?: at least))?", failure_fix(refused)
    )
    assert named is not None

    result = plan(model, memory, **{**settings, "max_model_len": int(named[1])})
    assert result.max_concurrency >= 1
    assert named[2] == larger
    if larger is not None:
        _, flag, _, value = larger.split()
        setting = {flag[2:].replace("-", "_"): parse_count(value)}
        assert plan(model, memory, **{**settings, **setting}).max_concurrency == 1


def test_the_setting_that_made_a_cache_too_small_is_in_the_message():
    for settings, words in (
        ({"kv_cache_memory_bytes": 30 * 2**20}, "--kv-cache-memory-bytes gives it 30.00 MiB"),
        ({"num_gpu_blocks_override": 4}, "--num-gpu-blocks-override 4 gives it 32.00 MiB"),
    ):
        with pytest.raises(FatalError) as refused:
            plan(model_of(LLAMA_8B), gpu(80), max_model_len=8192, **settings)
        assert words in refused.value.failure.message


def test_blocks_of_a_given_number_are_no_more_tokens_in_eight_bits():
    with pytest.raises(FatalError) as refused:
        plan(model_of(LLAMA_8B), gpu(80), max_model_len=8192, num_gpu_blocks_override=70)

    assert "fp8" not in failure_fix(refused)


def test_a_cache_without_room_for_two_tokens_names_the_setting_that_made_it_so():
    with pytest.raises(FatalError) as refused:
        plan(model_of(), cpu(4), kv_cache_memory_bytes=100)

    assert refused.value.failure.code is FailureCode.KV_CACHE_TOO_SMALL
    assert failure_fix(refused) == "raise --kv-cache-memory-bytes to 1M at least"
    assert plan(model_of(), cpu(4), kv_cache_memory_bytes=2**20).num_blocks > 0


@pytest.mark.parametrize("setting", ["max_num_seqs", "max_num_batched_tokens"])
def test_activations_grow_with_what_a_step_may_hold(setting: str):
    sizes = {"max_num_batched_tokens": 2048, "max_num_seqs": 256}
    small, large = (
        plan(model_of(LLAMA_8B), gpu(80), **{**sizes, setting: size})
        for size in (sizes[setting], sizes[setting] + 1024)
    )

    assert large.activation_bytes > small.activation_bytes


@pytest.mark.parametrize(
    ("memory", "settings", "expected"),
    [
        (lambda: gpu(80), {}, (1024, 8192)),
        (lambda: gpu(24), {}, (256, 2048)),
        (lambda: cpu(64), {}, (256, 2048)),
        (lambda: gpu(80), {"max_num_batched_tokens": 512}, (512, 512)),
        (lambda: gpu(48), {"max_num_seqs": 4000}, (4000, 4000)),
        (lambda: gpu(24), {"max_num_seqs": 8}, (8, 2048)),
        (lambda: gpu(24), {"enable_chunked_prefill": False, "max_model_len": 4000}, (256, 4000)),
    ],
)
def test_a_step_is_as_large_as_suits_the_device_where_nothing_is_set(memory, settings, expected):
    made = plan(model_of(LLAMA_8B), memory(), **settings)

    assert (made.max_num_seqs, made.max_num_batched_tokens) == expected


@pytest.mark.parametrize(
    ("asked", "checkpoint", "kind", "native", "expected"),
    [
        ("auto", "bfloat16", "cuda", False, "bfloat16"),
        ("auto", "float16", "cuda", False, "float16"),
        ("auto", "float32", "cuda", False, "float32"),
        ("auto", "bfloat16", "cpu", True, "bfloat16"),
        ("auto", "bfloat16", "cpu", False, "float32"),
        ("auto", "float16", "cpu", True, "float32"),
        ("half", "bfloat16", "cuda", True, "float16"),
        ("float", "bfloat16", "cpu", True, "float32"),
        ("float16", "bfloat16", "cpu", True, "float16"),
    ],
)
def test_auto_is_the_checkpoints_type_where_the_device_computes_it_natively(
    monkeypatch, asked: str, checkpoint: str, kind: str, native: bool, expected: str
):
    monkeypatch.setattr(plan_module, "computes_bfloat16", lambda: native)

    assert choose_dtype(EngineConfig(model="m", dtype=asked), checkpoint, kind) == expected


def test_the_table_shows_what_was_planned():
    model, memory = model_of(LLAMA_8B), gpu(80)
    table = describe(plan(model, memory, max_model_len=8192), model, memory)

    assert "8.03 billion parameters, bfloat16, on a test GPU" in table
    assert re.search(r"weights +14.96 GiB", table)
    assert re.search(r"longest request \(max model len\) +8,192", table)


# ---- the headers of a checkpoint


def write_safetensors(file: Path, tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A file of float32 zeros; returns its bytes."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({**header, "__metadata__": {"format": "pt"}}).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(end)
    file.write_bytes(content)
    return content


def test_headers_are_read_from_every_file_of_a_checkpoint(tmp_path: Path):
    write_safetensors(tmp_path / "model-1.safetensors", {"a": (2, 3)})
    write_safetensors(tmp_path / "model-2.safetensors", {"b": (5,), "c": ()})
    headers = read_headers(tmp_path)

    assert {name: (info.shape, info.num_bytes) for name, info in headers.items()} == {
        "a": ((2, 3), 24), "b": ((5,), 20), "c": ((), 4),
    }  # fmt: skip


def test_an_index_names_the_files_and_leaves_others_aside(tmp_path: Path):
    for name in ("one", "two", "other"):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: (1,)})
    index = {"weight_map": {"one": "one.safetensors", "two": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    assert [file.name for file in find_files(tmp_path)] == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks 1 of 1 weight files: gone.safetensors"),
        ('{"weight_map": {"a": "../../outside.safetensors"}}', "lacks 1 of 1 weight files: outside.safetensors"),
        ("{}", "it is no index of a checkpoint"),
        ("[", "it is no index of a checkpoint"),
        ('{"weight_map": []}', "it is no index of a checkpoint"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path, index: str, words: str):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FatalError) as refused:
        find_files(tmp_path)

    assert refused.value.failure.code is FailureCode.WEIGHTS_CORRUPT
    assert words in refused.value.failure.message


def test_a_checkpoint_in_another_format_is_named(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FatalError) as refused:
        find_files(tmp_path)

    assert refused.value.failure.code is FailureCode.MODEL_INVALID
    assert "pytorch_model.bin, which this version does not read" in refused.value.failure.message


def test_a_file_cut_anywhere_is_damaged(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    content = write_safetensors(file, {"a": (2, 3)})
    for size in range(len(content)):
        file.write_bytes(content[:size])
        with pytest.raises(FatalError) as refused:
            read_headers(tmp_path)
        assert refused.value.failure.code is FailureCode.WEIGHTS_CORRUPT
        assert "model.safetensors is damaged" in refused.value.failure.message


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{x",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 9) + b'{"a": []}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    ],
)
def test_a_header_that_is_garbage_is_damaged(tmp_path: Path, content: bytes):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FatalError) as refused:
        read_headers(tmp_path)

    assert refused.value.failure.code is FailureCode.WEIGHTS_CORRUPT
