"""A KV cache of eight bits: the kernels against their references, and the road from plan to token."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from octavo_engine.kernels.gpu import prefill_attention as prefill_module
from octavo_engine.kernels.gpu import rope_kv
from octavo_engine.kernels.gpu.decode_attention import PART_WORDS, Scratch, decode_attention, plan_parts
from octavo_engine.kernels.gpu.decode_attention import reference as reference_decode
from octavo_engine.kernels.gpu.invariant_attention import invariant_attention, tile_tokens
from octavo_engine.kernels.gpu.prefill_attention import TILE_WORDS, CacheLoads, Chunk, plan_tiles, prefill_attention
from octavo_engine.kernels.gpu.prefill_attention import reference as reference_prefill
from octavo_engine.kernels.kv_scales import KvScales, stored

sys.path.insert(0, str(Path(__file__).parent))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
KINDS = [torch.float8_e4m3fn, torch.float8_e5m2]
SCALES = KvScales(key=0.02, value=0.5)
HEADS = [
    # heads, kv_heads, head_dim, block_size, window, softcap
    (6, 2, 64, 16, None, 0.0), (8, 2, 96, 64, 40, 0.0), (3, 1, 128, 32, None, 5.0), (2, 2, 80, 16, None, 0.0),
    (2, 1, 256, 32, None, 0.0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch):
    """The interpreter loses the carry into an odd exponent when it rounds to eight bits: torch rounds for it."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    convert, kinds = interpreter._convert_float, {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}

    def converted(given: Any, of: Any, to: Any, mode: Any) -> Any:
        if to.name not in kinds or of.name != "fp32":
            return convert(given, of, to, mode)
        wide = torch.frombuffer(bytearray(given.tobytes()), dtype=torch.float32)
        return wide.to(kinds[to.name]).view(torch.uint8).numpy().reshape(given.shape)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def cache_of(kind: torch.dtype, *shape: int) -> Tensor:
    keys, values = torch.randn(2, *shape, device=DEVICE)
    return torch.stack([stored(keys, SCALES.key, kind), stored(values, SCALES.value, kind)])


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < tolerance, float(error)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_keys_and_values_are_scaled_and_held_within_the_types_range(kind: torch.dtype):
    heads, kv_heads, dim, size = 6, 2, 64, 16
    cache = torch.zeros(2, 9, kv_heads, size, dim, device=DEVICE).to(kind)
    tables = ints(list(range(9))).view(3, 3)
    qkv = random(3, (heads + 2 * kv_heads) * dim)
    qkv[1] *= 100
    cos, sin = random(3 * size, dim // 2), random(3 * size, dim // 2)
    where = (ints([0, 2, 1]), ints([0, size + 1, 3 * size - 1]), tables)
    expected, expected_cache = qkv.clone(), cache.clone()
    rope_kv.reference(expected, cos, sin, *where, expected_cache, None, None, 1e-6, SCALES)

    rope_kv.rope_kv(qkv, cos, sin, *where, cache, None, None, 1e-6, SCALES)

    assert cache.float().isfinite().all()
    assert cache.float().max() == torch.finfo(kind).max or kind == torch.float8_e5m2
    # A value that lies between two of the type may go to either, as the sums before it are rounded otherwise.
    assert_close(cache, expected_cache, 0.02 if kind == torch.float8_e4m3fn else 0.04)
    assert float((cache.float() == expected_cache.float()).float().mean()) > 0.97


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "window", "softcap"), HEADS)
def test_decodes_read_what_the_scales_say(heads, kv_heads, dim, block_size, window, softcap, kind):
    lengths = [1, 37, 5 * block_size + 3]
    cache, tables = cache_of(kind, 24, kv_heads, block_size, dim), torch.randperm(24, device=DEVICE).int().view(3, 8)
    qkv = random(3, (heads + 2 * kv_heads) * dim)
    cos, sin = random(8 * block_size, dim // 2), random(8 * block_size, dim // 2)
    rows, positions = ints([2, 0, 1]), ints([n - 1 for n in lengths])
    parts = ints(plan_parts(rows.tolist(), positions.tolist(), block_size, kv_heads, window, 3)).view(-1, PART_WORDS)
    out = torch.full((3, heads * dim), float("nan"), device=DEVICE, dtype=DTYPE)
    options = {"window": window, "softcap": softcap, "scales": SCALES}
    kept = cache.clone()
    expected = reference_decode(qkv, cos, sin, kept, tables, rows, positions, heads, dim**-0.5, **options)
    scratch = Scratch.allocate(3, heads, kv_heads, dim, DEVICE)

    decode_attention(qkv, cos, sin, cache, tables, parts, scratch, out, dim**-0.5, **options)

    assert_close(out, expected, 0.02)  # weights are rounded to 16 bits, and the newest key may be to its neighbour
    assert_close(cache, kept, 0.02)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "window", "softcap"), HEADS)
def test_prompts_read_what_the_scales_say(monkeypatch, heads, kv_heads, dim, block_size, window, softcap, kind):
    cache = cache_of(kind, 30, kv_heads, block_size, dim)
    tables = torch.randint(0, 30, (2, 24), dtype=torch.int32, device=DEVICE)
    chunks = [Chunk(0, 0, 33, 5), Chunk(5, 1, 40, 70)]
    qkv, loads = random(75, (heads + 2 * kv_heads) * dim), CacheLoads.of(cache)
    expected = reference_prefill(qkv, cache, tables, chunks, heads, dim**-0.5, window, softcap, SCALES)

    for attention, rows in ((prefill_attention, 64), (invariant_attention, tile_tokens(heads // kv_heads))):
        tiles = ints(plan_tiles(chunks, rows, block_size)).view(-1, TILE_WORDS)
        out = torch.full((75, heads * dim), float("nan"), device=DEVICE, dtype=DTYPE)
        attention(
            qkv, loads, tables, tiles, out, kv_heads, block_size, dim**-0.5, window, softcap, scales=SCALES
        )  # fmt: skip
        assert_close(out, expected, 6e-3)
    if window is None:
        monkeypatch.setattr(prefill_module, "LEAST_KEYS", block_size)
        words = plan_tiles(chunks, 64, block_size, 8)
        assert max(words[7::TILE_WORDS]) > 1
        out = torch.full((75, heads * dim), float("nan"), device=DEVICE, dtype=DTYPE)
        prefill_attention(
            qkv, loads, tables, ints(words).view(-1, TILE_WORDS), out, kv_heads, block_size, dim**-0.5,
            softcap=softcap, scales=SCALES, scratch=prefill_module.Scratch.allocate(heads, dim, DEVICE),
        )  # fmt: skip
        assert_close(out, expected, 6e-3)


@pytest.mark.skipif(ON_GPU, reason="stands in for a GPU")
def test_a_step_with_eight_bits_gives_nearly_the_logits_of_sixteen(monkeypatch: pytest.MonkeyPatch):
    import interpreted

    from octavo_engine.sampling_params import SamplingParams

    made = interpreted.steps(monkeypatch, kv_dtype=torch.float8_e4m3fn)
    engine = interpreted.engine_of(made)
    prompt = [3 + 7 * i % 190 for i in range(20)]

    tokens, told = interpreted.generate(engine, [(prompt, SamplingParams(temperature=0.0, max_tokens=3, logprobs=0))])[
        0
    ]

    expected = interpreted.logits_of(prompt + tokens)[19:-1].log_softmax(-1)
    apart = [abs(float(row[token]) - of.logprob) for row, token, of in zip(expected, tokens, told, strict=True)]
    assert 0 < max(apart) < 0.2
