"""LLM's keyword arguments: what vLLM's beyond our settings are answered."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from octavo_engine.arguments import engine_config
from octavo_engine.llm import LLM

OF_LLM = set(LLM.__init__.__annotations__)
NAMES = (Path(__file__).parent / "vllm-0.25.1-engine-args.txt").read_text().split()
"""The fields of vLLM 0.25.1's EngineArgs, which its LLM takes."""


def config(**given: Any) -> Any:
    return engine_config("m", None, given)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_LLM])
def test_every_argument_of_vllms_is_known_and_none_of_them_asks_for_nothing(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(**{name: None})


@pytest.mark.parametrize(
    "given",
    [
        {"task": "generate"}, {"runner": "auto"}, {"tokenizer_mode": "auto"}, {"kv_cache_dtype": "auto"},
        {"data_parallel_size": 1}, {"swap_space": 0}, {"enable_lora": False}, {"hf_overrides": {}},
        {"limit_mm_per_prompt": {}}, {"distributed_executor_backend": "mp"}, {"disable_log_stats": False},
        {"speculative_config": None}, {"logits_processors": []}, {"max_logprobs": 20}, {"async_scheduling": True},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_passes_in_silence(given: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(**given)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"swap_space": 4}, "--swap-space 4 has no effect"), ({"compilation_config": 3}, "torch.compile"),
        ({"disable_log_stats": True}, "disable_log_stats has no effect"), ({"served_model_name": ["x"]}, "no model"),
        ({"limit_mm_per_prompt": {"image": 2}}, "models of text alone"),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_warned_of(given: dict[str, Any], word: str) -> None:
    with pytest.warns(UserWarning, match=word):
        config(**given)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"enable_lora": True}, "no LoRA"), ({"kv_cache_dtype": "nvfp4"}, "kv-cache-dtype"),
        ({"speculative_config": {"method": "ngram"}}, "no speculative decoding"), ({"task": "embed"}, "no pooling"),
        ({"hf_overrides": {"a": 1}}, "taken as it is"), ({"logits_processors": ["x"]}, "no code"),
        ({"max_logprobs": 50}, "at most 20"), ({"otlp_traces_endpoint": "http://x"}, "octavo serve"),
        ({"tensor_parallel_size": 2}, "one device"), ({"trust_remote_code": True}, "no code"),
    ],
)  # fmt: skip
def test_what_would_change_what_is_computed_is_refused_with_the_reason(given: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        config(**given)


def test_what_does_not_exist_is_named() -> None:
    with pytest.raises(TypeError, match="did you mean max_model_len"):
        config(max_model_length=5)
    with pytest.raises(TypeError, match="belongs to `octavo serve`"):
        config(port=8000)


def test_types_of_torch_and_automatic_lengths_are_understood() -> None:
    torch = pytest.importorskip("torch")

    assert config(dtype=torch.bfloat16).dtype == "bfloat16"
    assert config(max_model_len="auto").max_model_len is None
    assert config(max_model_len=-1).max_model_len is None
