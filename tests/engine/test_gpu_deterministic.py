"""--deterministic on a GPU: the decoder's bits in the interpreter, and the whole engine's on a device."""

# ruff: noqa: E402 - whether kernels are interpreted is decided before they are imported

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before the modules below are imported

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from interpreted import products_of_a_matrix_unit

import models
from octavo_engine import LLM, RequestOutput, SamplingParams
from octavo_engine.core.step import Admission, StepItem
from octavo_engine.kernels.gpu import invariant_linear
from octavo_engine.kernels.gpu.invariant_attention import invariant_attention, tile_tokens
from octavo_engine.kernels.gpu.prefill_attention import TILE_WORDS, CacheLoads, Chunk, plan_tiles
from octavo_engine.kernels.gpu.prefill_attention import reference as reference_attention
from octavo_engine.models import gpu_decoder
from octavo_engine.models.config import DecoderConfig, RopeConfig
from octavo_engine.models.gpu_decoder import DeviceStep, GpuDecoder
from octavo_engine.models.layout import slots
from octavo_engine.runner.layout import Layout, Tiling, exact, pack
from preempting import preempting

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter computes with numpy, which has no bfloat16
TOLERANCE = 6e-3 if ON_GPU else 1e-3
SHARED_MEMORY = 227 * 1024


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@pytest.fixture(autouse=True)
def matrix_unit(monkeypatch: pytest.MonkeyPatch):
    if not ON_GPU:
        products_of_a_matrix_unit(monkeypatch)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_close(got: Tensor, expected: Tensor) -> None:
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < TOLERANCE, float(error)


# ---- kernels


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "add"),
    [(1, 96, 128, False), (130, 200, 96, False), (65, 16400, 64, False), (1, 96, 128, True), (130, 200, 96, True)],
)
def test_a_product_is_the_references_and_each_tokens_own(tokens: int, outputs: int, inputs: int, add: bool):
    x, weight, bias = random(tokens, inputs), random(outputs, inputs) / 8, random(outputs)
    start = random(tokens, outputs) if add else torch.full((tokens, outputs), float("nan"), device=DEVICE, dtype=DTYPE)
    out = start.clone()

    invariant_linear.invariant_linear(x, weight, bias, out, SHARED_MEMORY, add)

    assert_close(out, invariant_linear.reference(x, weight, bias) + (start.float() if add else 0))
    for first, end in ((0, 1), (tokens - 1, tokens), (tokens // 2, tokens)):
        few = start[first:end].clone()
        invariant_linear.invariant_linear(x[first:end].clone(), weight, bias, few, SHARED_MEMORY, add)
        assert torch.equal(few, out[first:end])


@pytest.mark.parametrize("outputs", [4096, 28672])
@pytest.mark.parametrize("shared_memory", [64 * 1024, 99 * 1024, 227 * 1024])
def test_a_tile_fits_into_shared_memory(outputs: int, shared_memory: int):
    width = invariant_linear.tile_width(outputs)
    stages = invariant_linear.num_stages(width, shared_memory)

    assert 2 <= stages <= 4
    assert stages * 2 * invariant_linear.DEPTH * (invariant_linear.ROWS + width) <= shared_memory


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "window", "softcap"),
    [(9, 3, 64, 16, None, 0.0), (8, 2, 96, 32, 40, 0.0), (4, 4, 80, 64, None, 5.0)],
)
def test_attention_is_the_references_and_each_tokens_own(heads, kv_heads, dim, block_size, window, softcap):
    cache = random(2, 30, kv_heads, block_size, dim)
    tables = torch.randint(0, 30, (3, 24), dtype=torch.int32, device=DEVICE)
    chunks = [Chunk(0, 0, 0, 30), Chunk(30, 1, 33, 5), Chunk(35, 2, 64, 71), Chunk(106, 0, 100, 1)]
    qkv = random(107, (heads + 2 * kv_heads) * dim)

    def attend(chunks: list[Chunk], qkv: Tensor) -> Tensor:
        tiles = ints(plan_tiles(chunks, tile_tokens(heads // kv_heads))).view(-1, TILE_WORDS)
        out = torch.full((qkv.shape[0], heads * dim), float("nan"), device=DEVICE, dtype=DTYPE)
        loads = CacheLoads.of(cache)
        invariant_attention(qkv, loads, tables, tiles, out, kv_heads, block_size, dim**-0.5, window, softcap)
        return out

    whole = attend(chunks, qkv)

    assert_close(whole, reference_attention(qkv, cache, tables, chunks, heads, dim**-0.5, window, softcap))
    for token, row, position in ((0, 0, 0), (29, 0, 29), (32, 1, 35), (35, 2, 64), (90, 2, 119), (106, 0, 100)):
        alone = attend([Chunk(0, row, position, 1)], qkv[token : token + 1].clone())
        assert torch.equal(alone[0], whole[token]), (token, position)
    shifted = attend([Chunk(0, 2, 64, 4), Chunk(4, 2, 68, 67)], qkv[35:106].clone())
    assert torch.equal(shifted, whole[35:106])


# ---- the decoder

MODEL = DecoderConfig(
    architecture="Qwen3ForCausalLM", vocab_size=130, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=6,
    num_kv_heads=2, head_dim=32, norm_eps=1e-6, rope=RopeConfig(10_000.0, "default", {}), max_position=256,
    tied_embeddings=False, qkv_bias=True, output_bias=False, mlp_bias=False, qk_norm=True, windows=(None, 24),
    activation="silu", dtype="bfloat16",
)  # fmt: skip
BLOCK, ROWS, LENGTH = 16, 6, 64
TILING = Tiling(tile_tokens(3), alike=True)


class Steps:
    """Steps of a random decoder, on state of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_decoder, "shared_memory_bytes", lambda device: SHARED_MEMORY)
        generator = torch.Generator().manual_seed(3)
        tensors = {
            name: (torch.randn(slot.shape, generator=generator) / slot.shape[-1] ** 0.5 + (len(slot.shape) == 1))
            .to(DTYPE).to(DEVICE)
            for name, slot in slots(MODEL).items()
        }  # fmt: skip
        self.tables = torch.arange(ROWS * LENGTH // BLOCK, dtype=torch.int32, device=DEVICE).view(ROWS, -1)
        self.cache = torch.zeros(2, 2, self.tables.numel(), 2, BLOCK, 32, dtype=DTYPE, device=DEVICE)
        self.ids = torch.zeros(ROWS, LENGTH, dtype=torch.int32, device=DEVICE)
        angles = torch.outer(torch.arange(LENGTH), 1.0 / 100 ** (torch.arange(16) / 16))
        self.decoder = GpuDecoder(
            MODEL, tensors, angles.cos().to(DTYPE).to(DEVICE), angles.sin().to(DTYPE).to(DEVICE), self.cache, self.ids,
            self.tables, 128, 16, deterministic=True,
        )  # fmt: skip

    def run(self, items: list[tuple[int, int, int]], layout: Layout | None = None) -> dict[int, Tensor]:
        """items: row, start, count of each, decodes first. → the last logits of each row"""
        step = [StepItem(row, start, count, [], True) for row, start, count in items]
        admissions = {row: Admission(prompt(row), LENGTH, SamplingParams(), (), 0) for row, _, _ in items}
        layout = layout or exact(step, TILING)
        words = ints(pack(step, layout, admissions, ROWS - 1, [None, 24], BLOCK, 2, TILING))
        n = layout.tokens
        ids, rows, positions = words[: 3 * n].view(3, n)
        tiles = words[3 * n : 3 * n + TILE_WORDS * layout.tiles].view(-1, TILE_WORDS)
        ends = None if layout.ends is None else words[3 * n + TILE_WORDS * layout.tiles :]
        logits = self.decoder.forward(DeviceStep(ids, rows, positions, layout.decodes, {}, tiles, ends)).clone()
        decodes = sum(count == 1 for _, _, count in items)
        places = [*range(decodes), *range(layout.decodes, layout.decodes + len(items) - decodes)]
        return {row: logits[place] for (row, _, _), place in zip(items, places, strict=True)}


def prompt(row: int) -> list[int]:
    return torch.randint(0, 130, (LENGTH,), generator=torch.Generator().manual_seed(row)).tolist()


def test_a_decoders_bits_are_the_same_alone_in_company_in_chunks_and_as_decodes(monkeypatch):
    whole = Steps(monkeypatch)
    expected = whole.run([(0, 0, 39)])[0]
    kept = whole.cache[:, :, :3].clone()
    assert expected.isfinite().all()

    company = Steps(monkeypatch)
    company.run([(1, 0, 2), (2, 0, 20)])
    assert torch.equal(company.run([(1, 2, 1), (2, 20, 1), (3, 0, 6), (0, 0, 39)])[0], expected)
    assert torch.equal(company.cache[:, :, :3], kept)

    chunks = Steps(monkeypatch)
    for start, end in ((0, 2), (2, 9), (9, 37)):
        chunks.run([(4, 5 + start, 1), (0, start, end - start)])
    chunks.run([(0, 37, 1)])
    assert torch.equal(chunks.run([(0, 38, 1)], Layout.of_decodes(4, TILING))[0], expected)
    assert torch.equal(chunks.cache[:, :, :3], kept)


def test_a_step_padded_to_a_graph_gives_the_bits_of_the_exact_one(monkeypatch):
    exactly, padded = Steps(monkeypatch), Steps(monkeypatch)
    for steps in (exactly, padded):
        steps.run([(1, 0, 3)])
    items = [(1, 3, 1), (0, 0, 9)]

    expected = exactly.run(items)
    found = padded.run(items, Layout.mixed(4, 16, TILING))

    assert all(torch.equal(found[row], expected[row]) for row in (0, 1))


# ---- the engine on a device

TEXT = "The lighthouse keeper wrote down the weather, the ships and the birds of every single day. "
PROMPT = TEXT * 40 + "On the last page it said:"
OTHERS = [TEXT * (i % 30) + f"Number {i} is" for i in range(255)]
SAMPLING = [
    SamplingParams(temperature=0.0, max_tokens=24, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=24, logprobs=2, ignore_eos=True),
]


def told(output: RequestOutput) -> tuple[list[int], list[float]]:
    answer = output.outputs[0]
    assert answer.logprobs is not None
    return list(answer.token_ids), [chance.logprob for step in answer.logprobs for chance in step.values()]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "drawn"])
def test_an_answer_is_the_same_bits_in_every_way_of_computing_it(sampling: SamplingParams):
    found: dict[str, Any] = {}
    for label, settings in {
        "graphs": {"max_num_batched_tokens": 8192},
        "eager": {"max_num_batched_tokens": 8192, "enforce_eager": True},
        "chunks": {"max_num_batched_tokens": 64, "max_num_seqs": 64, "enable_prefix_caching": False},
    }.items():
        llm = LLM(
            str(models.smollm2()), device="cuda", dtype="bfloat16", kv_cache_memory_bytes=2**33, deterministic=True,
            **{"max_num_seqs": 256, **settings},
        )  # fmt: skip
        while llm._engine.prepare():
            pass
        found[label] = told(llm.generate([PROMPT], sampling, use_tqdm=False)[0])
        again = llm.generate([PROMPT], sampling, use_tqdm=False)[0]
        assert (again.num_cached_tokens > 600) == (label != "chunks")
        found[label + ", again"] = told(again)
        crowd = llm.generate([*OTHERS[:100], PROMPT, *OTHERS[100:]], sampling, use_tqdm=False)
        found[label + ", of 256"] = told(crowd[100])
        # Twelve chunks of 64 make the prompt, and are given up with it: preempted sooner it would never end.
        with preempting(llm, every=20 if label == "chunks" else 9):
            found[label + ", preempted"] = told(llm.generate([PROMPT], sampling, use_tqdm=False)[0])
        llm._engine.check_integrity()
        del llm
        torch.cuda.empty_cache()

    expected = found["graphs"]
    assert {label: answer == expected for label, answer in found.items()} == dict.fromkeys(found, True)
