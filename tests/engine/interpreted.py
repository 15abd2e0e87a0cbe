"""The road that a GPU takes, from the scheduler's plan to the sampled token, on a machine that has none.

Kernels run in Triton's interpreter, what CUDA gives to the host (events, page-locked memory) is stood in for, and a
graph is a step that is run again. A model of a few thousand parameters takes a tenth of a second a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo_engine.core.engine import Engine
from octavo_engine.core.messages import Submit, TokenLogprobs
from octavo_engine.core.scheduler import Scheduler, SchedulerConfig
from octavo_engine.kernels.gpu.prebuilt import Compilations
from octavo_engine.layers import rotary
from octavo_engine.models import gpu_decoder
from octavo_engine.models.config import DecoderConfig, RopeConfig
from octavo_engine.models.decoder import Batch, Decoder
from octavo_engine.models.gpu_decoder import GpuDecoder
from octavo_engine.models.layout import slots
from octavo_engine.plan import Plan
from octavo_engine.runner.gpu_steps import GpuSteps
from octavo_engine.runner.layout import Layout
from octavo_engine.sampling_params import SamplingParams

MODEL = DecoderConfig(
    architecture="Qwen3ForCausalLM", vocab_size=200, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=32, norm_eps=1e-6, rope=RopeConfig(10_000.0, "default", {}), max_position=256,
    tied_embeddings=False, qkv_bias=True, output_bias=False, mlp_bias=False, qk_norm=True, windows=(None,),
    activation="silu", dtype="float16",
)  # fmt: skip
CPU = torch.device("cpu")


def weights(model: DecoderConfig = MODEL, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Random; logits have a deviation of about two."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, slot in slots(model).items():
        noise = torch.randn(slot.shape, generator=generator)
        found[name] = (0.1 * noise + ("norm" in name) if noise.dim() == 1 else noise / slot.shape[-1] ** 0.5).to(dtype)
    found["embedding"] *= 8
    found["head"] *= 2
    return found


def products_of_a_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies with numpy's BLAS, which sums a row differently at different places of a tile. Matrix
    units do not, and einsum's plain loops do not."""
    from triton.runtime import interpreter

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.einsum("ik,kj->ij", a.data.astype(np.float32), b.data.astype(np.float32))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


class Event:
    """Everything has run when the call returns."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class Replayed:
    def __init__(self, run: Callable[[], object]) -> None:
        self.replay = run


def steps(
    monkeypatch: pytest.MonkeyPatch, model: DecoderConfig = MODEL, *, max_seqs: int = 16, max_tokens: int = 96,
    block_size: int = 16, graphs: tuple[Layout, ...] = (), deterministic: bool = False,
    kv_dtype: torch.dtype = torch.float16,
) -> GpuSteps:  # fmt: skip
    """A loaded runner. graphs: layouts that are replayed where they fit; without them every step is launched."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **options: zeros(*size, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_decoder, "shared_memory_bytes", lambda device: 227 * 1024)

    def capture(self: GpuSteps, layout: Layout) -> None:
        self._graphs[layout] = Replayed(lambda: self._run(self._step(layout)))  # type: ignore[assignment]

    monkeypatch.setattr(GpuSteps, "_capture", capture)
    length, blocks = 128, 64
    plan = Plan(
        dtype="float16", kv_dtype="float16", budget_bytes=0, weights_bytes=0, activation_bytes=0, kv_bytes_per_token=0,
        block_size=block_size, num_blocks=blocks, max_model_len=length, max_num_seqs=max_seqs,
        max_num_batched_tokens=max_tokens,
    )  # fmt: skip
    cache = torch.zeros(model.num_layers, 2, blocks + 1, model.num_kv_heads, block_size, model.head_dim).to(kv_dtype)
    ids = torch.zeros(max_seqs + 1, length, dtype=torch.int32)
    tables = torch.zeros(max_seqs + 1, -(-length // block_size), dtype=torch.int32)
    cos, sin = rotary.tables(model.rope, model.head_dim, length, CPU)
    half = model.head_dim // 2
    decoder = GpuDecoder(
        model, weights(model), cos[:, :half].half().contiguous(), sin[:, half:].half().contiguous(), cache, ids, tables,
        max_tokens, max_seqs, deterministic,
    )  # fmt: skip
    made = GpuSteps(decoder, plan, max_tokens, max_seqs, cache, ids, tables, Compilations())
    for layout in graphs:
        made._capture(layout)
    return made


def engine_of(made: GpuSteps) -> Engine:
    plan = made._plan
    settings = SchedulerConfig(
        plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_model_len, plan.block_size, True, True
    )
    return Engine(Scheduler(settings, plan.num_blocks), made, time.monotonic)


def generate(
    engine: Engine, requests: list[tuple[list[int], SamplingParams]], eos: tuple[int, ...] = ()
) -> list[tuple[list[int], list[TokenLogprobs]]]:
    """Tokens and their log-probabilities, of requests that begin together."""
    for index, (prompt, sampling) in enumerate(requests):
        engine.submit(Submit(str(index), prompt, replace(sampling, ignore_eos=not sampling.min_tokens), eos))
    found: dict[str, tuple[list[int], list[TokenLogprobs]]] = {str(i): ([], []) for i in range(len(requests))}
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None, event
            found[event.request_id][0].extend(event.token_ids)
            found[event.request_id][1].extend(event.logprobs)
    engine.check_integrity()
    return list(found.values())


def logits_of(tokens: list[int], model: DecoderConfig = MODEL) -> Tensor:
    """What the model gives after each of these tokens, by the reference in float32. → [n, vocab]"""
    from octavo_engine.kernels.paged_attention import plan_gathers

    cos, sin = rotary.tables(model.rope, model.head_dim, 128, CPU)
    decoder = Decoder(model, weights(model, torch.float32), cos, sin)
    n, size = len(tokens), 16
    cache = torch.zeros(model.num_layers, 2, math.ceil(n / size), model.num_kv_heads, size, model.head_dim)
    positions = torch.arange(n)
    tables = torch.arange(math.ceil(n / size)).unsqueeze(0)
    gathers = plan_gathers([0], [n], tables, size, model.num_kv_heads, 1, 2**28)
    batch = Batch(torch.tensor(tokens), positions, positions // size, positions % size, gathers, None)
    return decoder.forward(batch, cache)
