"""What a GPU's runner allocates fits into what plan.py counts; added up without a GPU, on tensors without memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")

from interpreted import Event

from octavo_engine.config import EngineConfig
from octavo_engine.device_memory import GIB, DeviceMemory
from octavo_engine.kernels.gpu import prefill_attention_hopper
from octavo_engine.kernels.gpu.prebuilt import Compilations
from octavo_engine.kernels.sampling import LOGPROB_ROWS
from octavo_engine.loader import weights
from octavo_engine.models import gpu_decoder
from octavo_engine.models.config import DecoderConfig, parse_config
from octavo_engine.models.gpu_decoder import GpuDecoder
from octavo_engine.plan import Plan, make_plan
from octavo_engine.runner.gpu_steps import GpuSteps

META = torch.device("meta")
LLAMA_8B = json.loads((Path(__file__).parents[2] / "docker" / "models" / "llama-3.1-8b" / "config.json").read_text())
SMOLLM2 = {
    **LLAMA_8B, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
LARGE_VOCABULARY = {**SMOLLM2, "vocab_size": 262144}
SMALL_VOCABULARY = {**SMOLLM2, "vocab_size": 512}
SCORED_BYTES = 24
"""Of a logit of prompt_logprobs: itself, its float32 log-probability and two words of 64 bits to sort it by."""


@pytest.mark.parametrize(
    ("shape", "gib", "settings"),
    [
        (LLAMA_8B, 80, {"max_num_seqs": 1024, "max_model_len": 8192}),
        (LLAMA_8B, 80, {"max_num_seqs": 1024, "block_size": 16}),
        (LLAMA_8B, 24, {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_model_len": 4096}),
        (LLAMA_8B, 80, {"deterministic": True}),
        (SMOLLM2, 24, {}),
        (SMOLLM2, 80, {"max_num_seqs": 1024}),
        (LARGE_VOCABULARY, 24, {"max_num_seqs": 256}),
        (LARGE_VOCABULARY, 24, {"max_num_seqs": 1, "max_num_batched_tokens": 16}),
        (SMALL_VOCABULARY, 80, {"max_num_seqs": 1024}),
    ],
)
def test_what_a_gpus_runner_allocates_fits_into_what_the_plan_counts(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], gib: int, settings: dict[str, Any]
):
    model, config = parse_config(shape), EngineConfig(model="m", **settings)
    memory = DeviceMemory("cuda", "a test GPU", gib * GIB, gib * GIB)
    plan = make_plan(config, model, "bfloat16", memory)
    allocated = allocated_bytes(monkeypatch, model, plan, config.deterministic)
    scored = LOGPROB_ROWS * model.vocab_size * SCORED_BYTES

    assert allocated > 2 * plan.max_num_seqs * model.vocab_size, "the logits at least were seen"
    assert allocated + scored <= plan.activation_bytes


def allocated_bytes(monkeypatch: pytest.MonkeyPatch, model: DecoderConfig, plan: Plan, deterministic: bool) -> int:
    """What model_runner.py allocates on a GPU beside weights and KV cache."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(gpu_decoder, "shared_memory_bytes", lambda device: 227 * 1024)
    monkeypatch.setattr(prefill_attention_hopper, "takes", lambda cache, dtype: False)
    tensors = weights.allocate(model, torch.bfloat16, META)
    cache = torch.empty(
        (model.num_layers, 2, plan.num_blocks + 1, model.num_kv_heads, plan.block_size, model.head_dim),
        dtype=torch.bfloat16, device=META,
    )  # fmt: skip
    with _Counted() as counted:
        rows, columns = plan.max_num_seqs + 1, -(-plan.max_model_len // plan.block_size)
        ids = torch.zeros((rows, plan.max_model_len), dtype=torch.int32, device=META)
        tables = torch.zeros((rows, columns), dtype=torch.int32, device=META)
        # Cosines and sines in float32, and the halves of them in the weights' type.
        for width, dtype in ((model.head_dim, torch.float32), (model.head_dim // 2, torch.bfloat16)):
            cos, sin = (torch.empty((plan.max_model_len, width), dtype=dtype, device=META) for _ in range(2))
        decoder = GpuDecoder(
            model, tensors, cos, sin, cache, ids, tables, plan.max_num_batched_tokens, plan.max_num_seqs, deterministic
        )
        GpuSteps(decoder, plan, plan.max_num_batched_tokens, plan.max_num_seqs, cache, ids, tables, Compilations())
    padding_block = plan.block_size * plan.kv_bytes_per_token
    return counted.num_bytes + padding_block


class _Counted(TorchFunctionMode):
    """Adds up the tensors that are made on the device; those of the host are made without pinning, as it has no GPU."""

    num_bytes = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        made = function(*args, **options)
        if function in (torch.empty, torch.zeros, torch.ones, torch.full, torch.arange) and made.device == META:
            self.num_bytes += made.nbytes
        return made
