"""The Triton kernels against their references, at odd sizes: on a GPU if there is one, else in the interpreter."""

# ruff: noqa: E402 - whether kernels are interpreted is decided before they are imported

from __future__ import annotations

import itertools
import os
import random as random_numbers

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before the modules below are imported

triton = pytest.importorskip("triton")
tl = triton.language

from octavo_engine.kernels import act_mul as reference_act_mul
from octavo_engine.kernels.gpu import (
    act_mul,
    early_launch,
    norm,
    prefill_attention_hopper,
    rope_kv,
    sample,
    small_linear,
    state,
)
from octavo_engine.kernels.gpu import (
    decode_attention as decode_module,
)
from octavo_engine.kernels.gpu import (
    prefill_attention as prefill_module,
)
from octavo_engine.kernels.gpu.decode_attention import PART_WORDS, Scratch, decode_attention, max_parts, plan_parts
from octavo_engine.kernels.gpu.decode_attention import reference as reference_decode
from octavo_engine.kernels.gpu.prefill_attention import (
    TILE_WORDS,
    CacheLoads,
    Chunk,
    max_tiles,
    plan_tiles,
    prefill_attention,
)
from octavo_engine.kernels.gpu.prefill_attention import reference as reference_prefill

# The interpreter is numpy: it warns where the hardware would not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter computes with numpy, which has no bfloat16
TOLERANCE = 6e-3 if ON_GPU else 1e-3
LLAMA = (32, 8) if ON_GPU else (8, 2)
"""Heads of an 8B Llama. Interpreted, each head costs as much again and shows nothing new."""
HEADS = [
    # heads, kv_heads, head_dim, block_size, window, softcap
    (6, 2, 64, 16, None, 0.0),
    (4, 4, 80, 16, None, 0.0),
    (8, 2, 96, 64, None, 0.0),
    (*LLAMA, 128, 64, None, 0.0),
    (8, 2, 128, 64, 40, 0.0),
    (3, 1, 64, 32, None, 5.0),
    (9, 3, 64, 128, 100, 0.0),
    (4, 2, 256, 32, None, 0.0),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@triton.jit
def no_wait(EARLY: tl.constexpr, LATE: tl.constexpr):
    tl.static_assert(True)


@triton.jit
def no_release(LATE: tl.constexpr):
    tl.static_assert(True)


@triton.jit
def no_prefetch(pointers):
    tl.static_assert(True)


WAYS = {
    "in turn": {"EARLY": False, "LATE": False},
    "early": {"EARLY": True, "LATE": True},
    "at once": {"EARLY": True, "LATE": False},
}


# To the interpreter, which launches nothing early, the last two are the same.
TRIED = list(WAYS) if ON_GPU else ["in turn", "at once"]


@pytest.fixture(params=TRIED)
def launch(request, monkeypatch):
    """Kernels as they are launched after the one in front, and before it has ended: one must find the other's results.

    at once: as of one token. early: as of 2 to 64. The interpreter knows no launches: there it is tried that what such
    a kernel does early is the same work.
    """
    way, many = request.param, 10**6
    monkeypatch.setattr(early_launch, "TOKENS", many * WAYS[way]["EARLY"])
    monkeypatch.setattr(early_launch, "AT_ONCE_TOKENS", many * (not WAYS[way]["LATE"]))
    if not ON_GPU:
        interpret_launches(monkeypatch, way)


def interpret_launches(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    for module in (small_linear, decode_module):
        monkeypatch.setattr(module, "early_launch", lambda tokens: WAYS[way])
        for name, instead in (("wait", no_wait), ("release", no_release), ("prefetch", no_prefetch)):
            monkeypatch.setattr(module, name, instead)


MANY = 4096 if ON_GPU else 512
"""Outputs of a product with programs for every multiprocessor, at 20 s for 4,096 in the interpreter."""


def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter run a kernel's programs from the last to the first. (A GPU has no order.)"""
    from triton.runtime.interpreter import interpreter_builder

    usual = interpreter_builder.set_grid_idx

    def turned(*index: int) -> None:
        usual(*(size - 1 - at for size, at in zip(interpreter_builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", turned)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < tolerance, float(error)  # NaN is not below anything


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 576), (5, 1024), (3, 4096)])
def test_rms_norm_is_the_references(tokens, hidden):
    x, weight = random(tokens, hidden), random(hidden)
    kept, out = x.clone(), torch.full_like(x, float("nan"))

    norm.rms_norm(x, weight, out, 1e-5)

    assert_close(out, norm.reference(x, weight, 1e-5))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("hidden", [576, 2048])
def test_embedding_takes_given_ids_and_those_left_on_the_device(hidden):
    embedding, weight = random(50, hidden), random(hidden)
    ids, rows, positions = ints([3, -1, 7]), ints([0, 1, 1]), ints([0, 2, 3])
    token_ids = torch.randint(0, 50, (2, 8), dtype=torch.int32, device=DEVICE)
    expected_ids = token_ids.clone()
    expected, embedded = norm.reference_embed(ids, rows, positions, expected_ids, embedding, weight, 1e-5)
    residual, out, shares = random(3, hidden), random(3, hidden), torch.zeros(1, 3, device=DEVICE)

    norm.embed_rms_norm(ids, rows, positions, token_ids, embedding, weight, residual, out, 1e-5)
    assert_close(out, expected)
    norm.embed_rms_norm(ids, rows, positions, token_ids, embedding, weight, residual, out, 1e-5, shares)

    assert torch.equal(token_ids, expected_ids)
    assert torch.equal(residual, embedded)
    assert_close(out, embedded.float() * weight.float())
    assert_close(shares[0], embedded.float().square().sum(-1))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(6, 2, 64, 16), (4, 4, 80, 16), (3, 1, 96, 32), (32, 8, 128, 64), (2, 1, 256, 16)],
)
def test_rope_rotates_in_place_and_writes_the_cache(heads, kv_heads, dim, block_size, qk_norm):
    cache, tables = torch.zeros(2, 9, kv_heads, block_size, dim, device=DEVICE, dtype=DTYPE), ints(list(range(9)))
    tables = tables.flip(0).view(3, 3).contiguous()
    qkv = random(3, (heads + 2 * kv_heads) * dim)
    cos, sin = random(3 * block_size, dim // 2), random(3 * block_size, dim // 2)
    rows, positions = ints([0, 2, 1]), ints([0, block_size + 1, 3 * block_size - 1])
    norms = (random(dim), random(dim)) if qk_norm else (None, None)
    expected, expected_cache = qkv.clone(), cache.clone()
    rope_kv.reference(expected, cos, sin, rows, positions, tables, expected_cache, *norms, 1e-6)

    rope_kv.rope_kv(qkv, cos, sin, rows, positions, tables, cache, *norms, 1e-6)

    assert_close(qkv[:, : heads * dim], expected[:, : heads * dim])
    assert_close(cache, expected_cache)


@pytest.mark.parametrize("activation", reference_act_mul.ACTIVATIONS)
@pytest.mark.parametrize("inner", [1500, 4096])
def test_act_mul_gates(inner, activation):
    gate_up, out = random(3, 2 * inner), random(3, inner)

    act_mul.act_mul(gate_up, out, activation)

    assert_close(out, reference_act_mul.reference(gate_up.float(), activation))


@pytest.mark.parametrize("blocks_per_part", [None, 1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "window", "softcap"), HEADS)
def test_decode_attention_writes_and_sees_what_it_should(
    launch, heads, kv_heads, dim, block_size, window, softcap, blocks_per_part
):
    lengths = [1, 37, 5 * block_size + 3, 2 * block_size]
    cache = random(2, 32, kv_heads, block_size, dim)
    tables = torch.randperm(32, device=DEVICE).int().view(4, 8)
    # Behind a sequence's last key there may be anything.
    last = -(-lengths[2] // block_size) - 1
    cache[:, int(tables[1, last]), :, lengths[2] - last * block_size :] = float("nan")
    qkv = random(4, (heads + 2 * kv_heads) * dim)
    cos, sin = random(8 * block_size, dim // 2), random(8 * block_size, dim // 2)
    rows, positions = ints([2, 0, 1, 3]), ints([n - 1 for n in lengths])
    norms = {"query_norm": random(dim), "key_norm": random(dim), "eps": 1e-6} if heads == 8 else {}
    words = plan_parts(rows.tolist(), positions.tolist(), block_size, kv_heads, window, blocks_per_part)
    parts = ints(words + [0] * 2 * PART_WORDS).view(-1, PART_WORDS)
    scratch = Scratch.allocate(4, heads, kv_heads, dim, DEVICE)
    scratch.partial.fill_(float("nan"))
    out = torch.full((4, heads * dim), float("nan"), device=DEVICE, dtype=DTYPE)
    expected_cache = cache.clone()
    options = {"window": window, "softcap": softcap, **norms}
    expected = reference_decode(qkv, cos, sin, expected_cache, tables, rows, positions, heads, dim**-0.5, **options)

    decode_attention(qkv, cos, sin, cache, tables, parts, scratch, out, dim**-0.5, **options)

    assert_close(out, expected)
    assert_close(cache.nan_to_num(), expected_cache.nan_to_num())
    assert not scratch.finished.any()


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 16, 32, 64])
def test_room_for_the_parts_of_many_sequences_is_room_for_those_of_fewer(kv_heads):
    # A buffer is made for as many as there may be, and a graph is of some of them.
    bounds = [max_parts(n, kv_heads) for n in range(1, 400)]
    assert bounds == sorted(bounds)

    for n in (1, 2, 7, 8, 16, 20, 21, 24, 32, 33, 34, 70, 200):
        for length in (1, 300, 1120, 4096, 30_000):
            words = plan_parts(list(range(n)), [length * (1 + i % 3) - 1 for i in range(n)], 64, kv_heads)
            assert len(words) // PART_WORDS <= bounds[n - 1]


def test_parts_cover_each_sequence_once_and_never_outnumber_their_bound():
    for lengths in ([1], [17000], [1120] * 32, [1] * 512, [100_000, 3, 64, 65], list(range(1, 400))):
        for kv_heads, window in itertools.product((1, 2, 8, 32), (None, 100, 4096)):
            rows = [7 * index for index in range(len(lengths))]
            words = plan_parts(rows, [n - 1 for n in lengths], 64, kv_heads, window)
            parts = [words[at : at + PART_WORDS] for at in range(0, len(words), PART_WORDS)]

            assert len(parts) <= max_parts(len(lengths), kv_heads)
            covered: dict[int, list[int]] = {}
            for index, (token, row, position, first, blocks, begin, count, _) in enumerate(parts):
                assert (row, position) == (7 * token, lengths[token] - 1)
                assert count == 1 or begin <= index < begin + count
                covered.setdefault(token, []).extend(range(first, first + blocks))
            for token, length in enumerate(lengths):
                start = 0 if window is None else max(length - window, 0) // 64
                assert covered[token] == list(range(start, -(-length // 64)))


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "window", "softcap"), HEADS)
def test_prefill_attention_sees_what_it_should(heads, kv_heads, dim, block_size, window, softcap):
    cache = random(2, 30, kv_heads, block_size, dim)
    tables = torch.randint(0, 30, (4, 24), dtype=torch.int32, device=DEVICE)
    chunks = [Chunk(0, 0, 0, 70), Chunk(70, 1, 33, 5), Chunk(75, 2, 64, 129), Chunk(204, 3, 200, 17)]
    qkv = random(221, (heads + 2 * kv_heads) * dim)
    expected = reference_prefill(qkv, cache, tables, chunks, heads, dim**-0.5, window, softcap)

    for wide in (False, True) if not softcap and prefill_attention_hopper.takes(cache, DTYPE) else (False,):
        loads = CacheLoads.of(cache, wide)
        tiles = ints([*plan_tiles(chunks, loads.tile_rows, block_size), *[0] * 16]).view(-1, TILE_WORDS)
        out = torch.full((221, heads * dim), float("nan"), device=DEVICE, dtype=DTYPE)
        prefill_attention(qkv, loads, tables, tiles, out, kv_heads, block_size, dim**-0.5, window, softcap)

        assert_close(out, expected)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "softcap"), [
    (6, 2, 64, 16, 0.0), (4, 4, 80, 16, 0.0), (*LLAMA, 128, 64, 0.0), (3, 1, 64, 32, 5.0), (4, 2, 256, 32, 0.0),
])  # fmt: skip
def test_a_few_tiles_with_many_keys_are_split_and_combined(monkeypatch, heads, kv_heads, dim, block_size, softcap):
    monkeypatch.setattr(prefill_module, "LEAST_KEYS", block_size)
    cache = random(2, 30, kv_heads, block_size, dim)
    tables = torch.randperm(30, device=DEVICE).int().view(3, 10)
    # One that ends within a block, one of a single part, and one that ends with a block.
    chunks = [Chunk(0, 0, 8 * block_size - 4, 9), Chunk(9, 1, 0, 5), Chunk(14, 2, 9 * block_size - 20, 20)]
    qkv = random(34, (heads + 2 * kv_heads) * dim)
    room = 8
    words = plan_tiles(chunks, 64, block_size, room)
    records = [words[at : at + TILE_WORDS] for at in range(0, len(words), TILE_WORDS)]
    assert 3 < len(records) <= max_tiles(34, 3, 64, room)
    scratch = prefill_module.Scratch.allocate(heads, dim, DEVICE)
    scratch.partial.fill_(float("nan"))
    assert len(records) <= scratch.partial.shape[0]
    out = torch.full((34, heads * dim), float("nan"), device=DEVICE, dtype=DTYPE)

    prefill_attention(
        qkv, CacheLoads.of(cache), tables, ints([*words, *[0] * 16]).view(-1, TILE_WORDS), out, kv_heads, block_size,
        dim**-0.5, softcap=softcap, scratch=scratch,
    )  # fmt: skip

    assert_close(out, reference_prefill(qkv, cache, tables, chunks, heads, dim**-0.5, softcap=softcap))
    assert not scratch.finished.any()


@pytest.mark.skipif(ON_GPU, reason="programs end there in any order")
def test_whichever_program_ends_last_combines_the_parts_to_the_same_bits(monkeypatch):
    monkeypatch.setattr(prefill_module, "LEAST_KEYS", 16)
    heads, kv_heads, dim, size = 2, 1, 32, 16
    cache, tables = random(2, 30, kv_heads, size, dim), torch.randperm(30).int().view(3, 10)
    qkv, x, weight = random(34, (heads + 2 * kv_heads) * dim), random(5, 192), random(70, 192)
    chunks = [Chunk(0, 0, 124, 9), Chunk(9, 1, 0, 5), Chunk(14, 2, 124, 20)]
    tiles = ints(plan_tiles(chunks, 64, size, 8)).view(-1, TILE_WORDS)
    rows, positions = [0, 1, 2], [132, 4, 143]
    parts = ints(plan_parts(rows, positions, size, kv_heads, blocks_per_part=2)).view(-1, PART_WORDS)
    turns = random(160, dim // 2)
    of_tiles = prefill_module.Scratch.allocate(heads, dim, DEVICE)
    of_parts = Scratch.allocate(40, heads, kv_heads, dim, DEVICE)
    of_product = small_linear.Partial.allocate(5, DEVICE)

    def outputs() -> list[Tensor]:
        attended, decoded, product = (torch.full(n, float("nan"), dtype=DTYPE) for n in ((34, 64), (3, 64), (5, 70)))
        prefill_attention(
            qkv, CacheLoads.of(cache), tables, tiles, attended, kv_heads, size, dim**-0.5, scratch=of_tiles
        )  # fmt: skip
        decode_attention(qkv[:3], turns, turns, cache, tables, parts, of_parts, decoded, dim**-0.5)
        small_linear.small_linear(x, weight, product, shape=small_linear.Shape(32, 64, 3, 4, 3), partial=of_product)
        return [attended, decoded, product]

    outputs()  # the decodes' keys are in the cache from here on
    expected = outputs()
    backwards(monkeypatch)
    found = outputs()

    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not any(counts.any() for counts in (of_tiles.finished, of_parts.finished, of_product.finished))


def test_parts_of_tiles_cover_their_keys_once_and_never_outnumber_their_bound():
    rng = random_numbers.Random(4)
    for _ in range(300):
        count = rng.randrange(1, 9)
        chunks = [Chunk(1000 * i, i, rng.randrange(20_000), rng.randrange(1, 300)) for i in range(count)]
        room, step = rng.choice((0, 4, 8, 33)), rng.choice((1, 2, 8))
        words = plan_tiles(chunks, 64, 64, room, step)
        records = [words[at : at + TILE_WORDS] for at in range(0, len(words), TILE_WORDS)]

        assert len(records) <= max_tiles(sum(chunk.count for chunk in chunks), count, 64, room)
        covered: dict[int, list[int]] = {}
        for index, (token, rows, row, position, first, blocks, begin, parts) in enumerate(records):
            assert begin <= index < begin + parts
            assert parts == 1 or begin + parts <= len(records) <= room
            assert first % step == 0
            assert parts == 1 or first * 64 <= records[index][3], "the tile's first token sees keys of each part"
            covered.setdefault(token, []).extend(range(first, first + blocks))
            assert covered[token][-1] < -(-(position + rows) // 64)
            assert row == token // 1000
        for chunk in chunks:
            for at in range(0, chunk.count, 64):
                last = chunk.position + min(at + 64, chunk.count)
                assert covered[chunk.token + at] == list(range(-(-last // 64)))


@pytest.mark.skipif(not ON_GPU, reason="thousands of keys are too many for the interpreter")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(32, 8, 128, 64), (14, 2, 64, 16), (4, 4, 80, 64), (8, 8, 128, 128)]
)
def test_chunks_of_long_prompts_are_the_same_bits_each_time(heads, kv_heads, dim, block_size, wide):
    longest = 16_384
    columns = longest // block_size
    chunks = [Chunk(0, 0, 16_001, 120), Chunk(120, 1, 9_000, 33), *([] if wide else [Chunk(153, 2, 0, 20)])]
    count = sum(chunk.count for chunk in chunks)
    tables = torch.randperm(3 * columns, device=DEVICE).int().view(3, columns)
    # Two layers over one scratch, again and again, as a graph's are.
    caches = [random(2, 3 * columns, kv_heads, block_size, dim) for _ in range(2)]
    if wide and not prefill_attention_hopper.takes(caches[0], DTYPE):
        pytest.skip("no Hopper is here, or it does not take such heads")
    loads = [CacheLoads.of(cache, wide) for cache in caches]
    qkv = random(count, (heads + 2 * kv_heads) * dim)
    room = prefill_module.parts_wanted(heads, wide)
    words = plan_tiles(chunks, loads[0].tile_rows, block_size, room, loads[0].tile_step)
    assert max(words[7::TILE_WORDS]) > 1
    tiles = ints([*words, *[0] * 16]).view(-1, TILE_WORDS)
    scratch = prefill_module.Scratch.allocate(heads, dim, DEVICE)
    scratch.partial.fill_(float("nan"))
    outs = torch.full((20, 2, count, heads * dim), float("nan"), device=DEVICE, dtype=DTYPE)

    for turn, layer in itertools.product(range(20), range(2)):
        prefill_attention(
            qkv, loads[layer], tables, tiles, outs[turn, layer], kv_heads, block_size, dim**-0.5, scratch=scratch
        )  # fmt: skip

    for layer in range(2):
        assert_close(outs[0, layer], reference_prefill(qkv, caches[layer], tables, chunks, heads, dim**-0.5))
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not scratch.finished.any()


@pytest.mark.skipif(not ON_GPU, reason="thousands of keys are too many for the interpreter")
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size", "window"), [
    (8, 2, 128, 64, None), (8, 2, 128, 16, 1000), (4, 4, 64, 32, None), (4, 1, 64, 128, 300),
])  # fmt: skip
def test_prefill_attention_for_hopper_sees_thousands_of_keys(heads, kv_heads, dim, block_size, window):
    cache = random(2, 400, kv_heads, block_size, dim)
    if not prefill_attention_hopper.takes(cache, DTYPE):
        pytest.skip("no Hopper is here")
    tables = torch.randperm(400, device=DEVICE).int()[: 5 * 64].view(5, 64)
    longest = 64 * block_size
    chunks, at = [], 0
    for row, (position, count) in enumerate(
        ((0, longest), (0, 128), (1, 127), (longest - 300, 300), (longest // 2 + 3, 333))
    ):
        position, count = max(position, 0), min(count, longest)
        chunks.append(Chunk(at, row, position, count))
        at += count
    qkv, out = (
        random(at, (heads + 2 * kv_heads) * dim),
        torch.full((at, heads * dim), float("nan"), device=DEVICE, dtype=DTYPE),
    )
    loads = CacheLoads.of(cache, wide=True)
    tiles = ints(plan_tiles(chunks, loads.tile_rows, block_size)).view(-1, TILE_WORDS)

    prefill_attention(qkv, loads, tables, tiles, out, kv_heads, block_size, dim**-0.5, window)

    assert_close(out, reference_prefill(qkv, cache, tables, chunks, heads, dim**-0.5, window))


@pytest.mark.parametrize("vocab", [5000, sample.SLICE + 901])
def test_sampling_is_the_draw_of_the_reference(vocab):
    settings = [
        # temperature, top_k, top_p, min_p
        (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 50, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (1.3, 1, 1.0, 0.0),
        (1.0, 300, 0.5, 0.0), (1.0, 0, 0.01, 0.0), (1.0, 0, 1.0, 0.1), (1.0, 4999, 0.999, 0.001), (2.0, 5000, 1.0, 1.0),
        (0.4, 0, 1.0, 0.3), (3.0, 0, 1.0, 0.6),
    ]  # fmt: skip
    n = len(settings)
    columns = list(zip(*settings, strict=True))
    logits = random(n, vocab) * 3
    rows = ints(list(range(n))).flip(0).contiguous()
    where = sample.SamplingState.allocate(n, DEVICE)
    seeds = torch.randint(-(2**62), 2**62, (n,), device=DEVICE)
    values = [torch.tensor(column, device=DEVICE) for column in columns]
    for target, source in zip((where.temperature, where.top_k, where.top_p, where.min_p), values, strict=True):
        target[rows.long()] = source.to(target.dtype)
    where.seed[rows.long()] = seeds
    positions = ints(list(range(5, 5 + n)))
    token_ids, out = torch.zeros(n, 64, dtype=torch.int32, device=DEVICE), ints([-7] * n)
    scratch = sample.SamplingScratch.allocate(n, vocab, DEVICE)

    sample.sample(logits, ints(list(range(n))), rows, positions, where, scratch, token_ids, out)

    expected = sample.reference(logits.cpu(), *(v.cpu() for v in values), seeds.cpu(), (positions + 1).cpu())
    assert out.tolist() == expected.tolist()
    assert token_ids[rows.long(), positions.long() + 1].tolist() == expected.tolist()


def test_what_a_cut_leaves_is_found_wherever_it_lies():
    vocab = sample.SLICE + 901  # 256 chunks
    settings = [(1.0, 0, 0.9, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 0.5, 0.0), (0.7, 20, 0.8, 0.0), (1.0, 400, 0.99, 0.0)]
    settings += [(1.0, 0, 0.97, 0.0), (0.5, 0, 0.3, 0.0), (1.0, 70, 1.0, 0.02), *[(1.5, 0, 0.9, 0.0)] * 4]
    n = len(settings)
    ranks = torch.stack([torch.randperm(vocab) for _ in range(n)])
    logits = (12.0 - 1.5 * (ranks + 1.0).log()).to(DEVICE, DTYPE)
    # What is likely lies in one chunk, whose sum seems to be enough and whose largest logit alone is not.
    logits[1:3], logits[8:] = -9.0, -9.0
    chunks = sample.chunks(vocab)
    logits[1, chunks[5, 9:17]] = torch.linspace(5.0, 6.0, 8).to(DEVICE, DTYPE)
    logits[2, chunks[200, :5]] = 4.0
    logits[8:, chunks[77, 30:38]] = torch.linspace(15.0, 16.0, 8).to(DEVICE, DTYPE)
    logits[6] = 1.5  # all alike
    where = sample.SamplingState.allocate(n, DEVICE)
    values = [torch.tensor(column, device=DEVICE) for column in zip(*settings, strict=True)]
    for target, source in zip((where.temperature, where.top_k, where.top_p, where.min_p), values, strict=True):
        target.copy_(source.to(target.dtype))
    where.seed.copy_(torch.arange(n) * 2**34 + 11)
    rows, scratch = ints(list(range(n))), sample.SamplingScratch.allocate(n, vocab, DEVICE)
    token_ids = torch.zeros(n, 64, dtype=torch.int32, device=DEVICE)

    for position in range(4 if ON_GPU else 1):
        out, positions = ints([-7] * n), ints([position] * n)
        sample.sample(logits, rows, rows, positions, where, scratch, token_ids, out)

        drawn = [v.cpu() for v in values], where.seed.cpu(), (positions + 1).cpu()
        assert out.tolist() == sample.reference(logits.cpu(), *drawn[0], *drawn[1:]).tolist()


def test_logits_that_are_not_finite_give_no_token():
    logits = random(6, 300)
    logits[0, 299], logits[1, 5], logits[3, 7] = float("nan"), float("inf"), float("nan")
    logits[4], logits[5, 1:] = float("-inf"), float("-inf")
    where, out = sample.SamplingState.allocate(6, DEVICE), ints([-7] * 6)
    where.temperature[1:6] = 1.0
    where.temperature[2] = 0.0
    where.top_k[3] = 2
    rows = ints(list(range(6)))
    token_ids = torch.full((6, 4), 9, dtype=torch.int32, device=DEVICE)

    sample.sample(
        logits, rows, rows, torch.zeros_like(rows), where, sample.SamplingScratch.allocate(6, 300, DEVICE), token_ids,
        out,
    )  # fmt: skip

    assert out.tolist() == [-1, -1, int(logits[2].argmax()), -1, -1, 0]
    assert token_ids[:, 1].tolist() == [0, 0, int(logits[2].argmax()), 0, 0, 0]


def test_the_first_of_the_largest_logits_is_the_greedy_one():
    # One chunk has the tokens 0 to 7 and 1,024 to 1,031, another 1,016 to 1,023.
    vocab = 1096
    logits = torch.zeros(2, vocab, device=DEVICE, dtype=DTYPE)
    logits[0, [1023, 1024, 1090]], logits[1, [7, 5, 1025]] = 3.0, 3.0
    rows, out = ints([0, 1]), ints([-7] * 2)
    where, scratch = sample.SamplingState.allocate(2, DEVICE), sample.SamplingScratch.allocate(2, vocab, DEVICE)
    token_ids = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)

    sample.sample(logits, rows, rows, torch.zeros_like(rows), where, scratch, token_ids, out)

    assert out.tolist() == [1023, 5]


def test_a_row_draws_the_same_whatever_is_beside_it():
    vocab, draws = 2100, 5
    logits = random(draws, vocab) * 2
    where, scratch = sample.SamplingState.allocate(draws, DEVICE), sample.SamplingScratch.allocate(draws, vocab, DEVICE)
    where.temperature.fill_(1.5)
    where.seed.copy_(torch.arange(draws) * 2**33 - 5)
    token_ids = torch.zeros(draws, 16, dtype=torch.int32, device=DEVICE)
    rows, positions = ints(list(range(draws))), ints([4, 0, 9, 3, 3])
    together, alone = ints([-7] * draws), ints([-7] * draws)

    sample.sample(logits, rows, rows, positions, where, scratch, token_ids, together)
    for n in range(draws):
        sample.sample(logits[n : n + 1], rows[n : n + 1], rows, positions, where, scratch, token_ids, alone[n : n + 1])

    assert alone.tolist() == together.tolist()
    assert len(set(together.tolist())) > 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.3, 0, 1.0), (1.7, 0, 1.0), (1.7, 40, 1.0), (0.3, 0, 0.8)],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    # A chunk has eight of these tokens. The interpreter takes 70 ms for a draw: there most draws are the
    # reference's, which are the same.
    vocab, draws, drawn = 200, *((20_000, 20_000) if ON_GPU else (1000, 4))
    logits = (random(1, vocab) * 1.2 * temperature).repeat(draws, 1)
    rows = ints(list(range(draws)))
    positions, seeds = rows % 3, torch.arange(draws) // 3
    values = [torch.full((draws,), value) for value in (temperature, top_k, top_p, 0.0)]
    where = sample.SamplingState.allocate(drawn, DEVICE)
    for target, source in zip(
        (where.temperature, where.top_k, where.top_p, where.min_p, where.seed), [*values, seeds], strict=True
    ):
        target.copy_(source[:drawn])
    token_ids, out = torch.zeros(drawn, 4, dtype=torch.int32, device=DEVICE), ints([-7] * drawn)
    scratch = sample.SamplingScratch.allocate(drawn, vocab, DEVICE)

    sample.sample(logits[:drawn], rows, rows, positions, where, scratch, token_ids, out)

    found = out.cpu()
    if not ON_GPU:
        found = sample.reference(logits, *values, seeds, positions + 1)
        assert out.tolist() == found[:drawn].tolist()
    row = logits[0].float().cpu()
    kept = row >= sample.reference_cutoff(row, temperature, top_k, top_p, 0.0)
    expected = (row / temperature).masked_fill(~kept, float("-inf")).softmax(0) * draws
    counts = torch.bincount(found, minlength=vocab).float()
    assert not counts[~kept].any()
    often = expected >= 10
    pairs = [*zip(counts[often].tolist(), expected[often].tolist(), strict=True)]
    if float(expected[~often].sum()) >= 1:
        pairs.append((float(counts[~often].sum()), float(expected[~often].sum())))
    freedom = len(pairs) - 1
    assert freedom >= 5
    chi_square = sum((count - mean) ** 2 / mean for count, mean in pairs)
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, (chi_square, freedom)  # about p = 0.001


@pytest.mark.parametrize("launch", TRIED, indirect=True)
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "splits"),
    [(1, 96, 128, 1), (1, 130, 192, 1), (5, 130, 192, 1), (5, 130, 192, 3), (33, 64, 256, 4), (64, MANY, 128, 2)],
)
def test_small_linear_fuses_what_surrounds_it(launch, tokens, outputs, inputs, splits):
    x, weight, bias = random(tokens, inputs), random(outputs, inputs) / 16, random(outputs)
    shape, partial = small_linear.Shape(32, 64, 3, 4, splits), small_linear.Partial.allocate(tokens, DEVICE)
    shares = torch.rand(3, tokens, device=DEVICE) * 50
    out = torch.full((tokens, outputs), float("nan"), device=DEVICE, dtype=DTYPE)

    small_linear.small_linear(
        x, weight, out, shape=shape, bias=bias, norm_shares=shares, eps=1e-5, partial=partial
    )  # fmt: skip
    assert_close(out, small_linear.reference(x, weight, bias=bias, norm_shares=shares, eps=1e-5)[0])

    gate_up = random(2 * outputs, inputs) / 16
    activation = list(reference_act_mul.ACTIVATIONS)[(tokens + outputs) % 3]
    small_linear.small_linear(
        x, gate_up, out, shape=shape, norm_shares=shares, eps=1e-5, gated=True, partial=partial, activation=activation
    )  # fmt: skip
    gated = small_linear.reference(x, gate_up, norm_shares=shares, eps=1e-5, gated=True, activation=activation)[0]
    assert_close(out, gated)

    residual, weight_of_norm = random(tokens, outputs), random(outputs)
    expected, total, squares = small_linear.reference(x, weight, residual=residual, next_norm=weight_of_norm)
    after = torch.zeros(small_linear.num_shares(outputs, shape), tokens, device=DEVICE)
    small_linear.small_linear(
        x, weight, out, shape=shape, residual=residual, next_norm=weight_of_norm, shares=after, partial=partial
    )  # fmt: skip

    assert not partial.finished.any()
    assert_close(out, expected)
    assert_close(residual, total)
    assert_close(after.sum(0), squares)


def test_updates_reach_the_rows_they_name():
    tables = torch.zeros(4, 6, dtype=torch.int32, device=DEVICE)
    blocks = ints([1, 0, 7, 3, 5, 9, 1, 1, 8]).view(-1, 3)
    where = sample.SamplingState.allocate(4, DEVICE)
    words = torch.tensor([0.5, 0.9, 0.1]).view(torch.int32).tolist()
    new = ints([2, words[0], 40, words[1], words[2], -5, -3, 0]).view(-1, state.SAMPLING_WORDS)
    expected_tables, expected = tables.clone(), sample.SamplingState.allocate(4, DEVICE)
    state.reference_set_blocks(blocks, expected_tables)
    state.reference_set_sampling(new, expected)

    state.set_blocks(blocks, tables)
    state.set_sampling(new, where)

    assert torch.equal(tables, expected_tables)
    assert int(tables[3, 5]) == 9
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        assert torch.equal(getattr(where, name), getattr(expected, name)), name
    assert int(where.seed[2]) == ((-3 << 32) | (2**32 - 5))


@pytest.mark.parametrize(
    ("rows", "row_bytes", "lines"),
    [
        (4096, 8192, 8),
        (6144, 8192, 4),
        (28672, 8192, 1),
        (128256, 8192, 0),
        (8192, 14336, 4),
        (960, 1152, 8),
        (16, 64, 0),
    ],
)
def test_a_product_asks_for_the_start_of_its_rows_and_for_no_more_than_was_said(rows, row_bytes, lines):
    assert early_launch.asked_lines(rows, row_bytes) == lines
    assert 128 * rows * lines <= early_launch.ASKED_BYTES
    assert 128 * lines <= row_bytes


@triton.jit
def mark(pointers):
    tl.store(pointers.to(tl.pointer_type(tl.int8)), 1)


@pytest.mark.skipif(ON_GPU, reason="what a device brings into its cache is not to be seen")
@pytest.mark.parametrize(("outputs", "gated", "splits"), [(70, False, 1), (64, False, 2), (70, True, 1)])
def test_a_product_launched_early_asks_for_the_first_lines_of_each_of_its_rows(outputs, gated, splits, monkeypatch):
    interpret_launches(monkeypatch, "early")
    monkeypatch.setattr(small_linear, "prefetch", mark)
    monkeypatch.setattr(early_launch, "ASKED_BYTES", (2 if gated else 1) * splits * outputs * 128 * 2)
    rows = torch.zeros((2 if gated else 1) * outputs + 1, 256, dtype=DTYPE)
    shape, partial = small_linear.Shape(32, 64, 3, 4, splits), small_linear.Partial.allocate(2, DEVICE)
    x, out = random(2, 256), random(2, outputs)
    small_linear.small_linear(x, rows[:-1], out, shape=shape, gated=gated, partial=partial)

    expected = torch.zeros(rows.shape[0], 512, dtype=torch.int8)
    expected[:-1, [0, 128] if splits == 1 else [0, 128, 256, 384]] = 1
    assert torch.equal(rows.view(torch.int8), expected)
