"""Causal attention of prompt chunks over keys and values in blocks, their own included.

A *tile* is up to TILE_ROWS consecutive tokens of one sequence; the host lists the tiles of all chunks, those with the
most keys first, so that the long ones do not end last. A program is one tile and one query head; the heads of a KV head
are neighbours in the grid and share its blocks in the L2 cache. Blocks that every row sees need no mask.
(Dao, "FlashAttention-2", 2023) A few tiles with many keys, a chunk of a long prompt beside decodes, would leave most of
the chip without work: their keys are split into parts, and the program that finishes last combines them, as in
decode_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo_engine.kernels.gpu import prefill_attention_hopper as hopper
from octavo_engine.kernels.gpu.decode_attention import LOG2_E, PROGRAMS_WANTED, reference_one
from octavo_engine.kernels.gpu.rope_kv import of_cache
from octavo_engine.kernels.kv_scales import UNSCALED, KvScales

TILE_ROWS = 64
"""64 rows and four warps were the fastest of 64 and 128 rows with tensor-memory loads, on an H100 and an H200."""
STAGES = 3
"""Blocks in flight."""
TILE_WORDS = 8
"""token, tokens, state row, position, first block of keys, blocks, first part of the tile, parts of the tile.

A record without tokens is no work."""
LEAST_KEYS = 512
"""Of a part: below, writing it down and reading it again costs more than it gains."""

LARGE_TILE = 128 * 128
"""Numbers in a block of keys; a larger one leaves room for no other beside it."""


@dataclass(frozen=True)
class Chunk:
    """`count` tokens from index `token` of the batch, of the sequence in `row`, from `position` on."""

    token: int
    row: int
    position: int
    count: int


def plan_tiles(
    chunks: Sequence[Chunk], rows: int = TILE_ROWS, block_size: int = 64, room: int = 0, step: int = 1
) -> list[int]:
    """TILE_WORDS for each tile or part of one, tiles with most keys first.

    room: parts of tiles that fill the chip (`parts_wanted`); tiles of which two would fit are split, into no more parts
    than that. 0: none is. step: blocks that the kernel reads at a time (`CacheLoads.tile_step`).
    """
    tiles = [
        (c.token + at, min(rows, c.count - at), c.row, c.position + at)
        for c in chunks
        for at in range(0, c.count, rows)
    ]
    tiles.sort(key=lambda tile: -tile[3])
    blocks = [-(-(position + count) // block_size) for _, count, _, position in tiles]
    most = max(blocks, default=1)
    if 0 < 2 * len(tiles) <= room:
        most = max(-(-sum(blocks) // room), LEAST_KEYS // block_size, 1)
        while sum(-(-of_tile // most) for of_tile in blocks) > room:
            most += 1
    words: list[int] = []
    for tile, of_tile in zip(tiles, blocks, strict=True):
        each = -(-of_tile // -(-of_tile // most))
        each = -(-each // step) * step
        # Each part begins with a key that the tile's first token sees, so that no row of it is without any.
        begin, count = len(words) // TILE_WORDS, min(-(-of_tile // each), tile[3] // (each * block_size) + 1)
        for part in range(count):
            first = part * each
            words += (*tile, first, each if part + 1 < count else of_tile - first, begin, count)
    return words


def parts_wanted(heads: int, wide: bool = False) -> int:
    """Parts of tiles that fill the chip."""
    return (hopper.PROGRAMS if wide else PROGRAMS_WANTED) // heads


def max_tiles(num_tokens: int, num_chunks: int, rows: int = TILE_ROWS, room: int = 0) -> int:
    """Upper bound of the records of `plan_tiles`."""
    return num_tokens // rows + num_chunks + room


@dataclass(frozen=True)
class Scratch:
    """Where the parts of a tile meet."""

    partial: Tensor  # [parts, heads, TILE_ROWS, head_dim padded to a power of two] float32
    lse: Tensor  # [parts, heads, TILE_ROWS] float32
    finished: Tensor  # [parts, heads] int32, zero between launches

    @classmethod
    def allocate(cls, heads: int, dim: int, device: torch.device) -> Scratch:
        parts = max(parts_wanted(heads), 1)  # a wide one's are half as many, of two halves each
        return cls(
            torch.empty(parts, heads, TILE_ROWS, triton.next_power_of_2(dim), dtype=torch.float32, device=device),
            torch.empty(parts, heads, TILE_ROWS, dtype=torch.float32, device=device),
            torch.zeros(parts, heads, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class CacheLoads:
    """How a layer's keys and values are read a block at a time: as tensor-memory copies on Hopper and newer.

    wide: by the kernel for Hopper, in tiles of its ROWS. Otherwise tiles have TILE_ROWS.
    """

    keys: TensorDescriptor | GluonTensorDescriptor
    values: TensorDescriptor | GluonTensorDescriptor
    wide: bool = False

    @classmethod
    def of(cls, kv_cache: Tensor, wide: bool = False) -> CacheLoads:
        """kv_cache: [2, num_blocks, kv_heads, block_size, head_dim]. wide: only where `hopper.takes` it."""
        if wide:
            return cls(*hopper.descriptors(kv_cache), wide=True)
        _, blocks, kv_heads, block_size, dim = kv_cache.shape
        rows = blocks * kv_heads * block_size
        width = triton.next_power_of_2(dim)
        keys, values = (
            TensorDescriptor(part.view(rows, dim), [rows, dim], [dim, 1], [block_size, width]) for part in kv_cache
        )
        return cls(keys, values)

    @property
    def tile_rows(self) -> int:
        return hopper.ROWS if self.wide else TILE_ROWS

    @property
    def tile_step(self) -> int:
        """Blocks of keys that the kernel reads at a time."""
        return hopper.KEYS // int(self.keys.block_shape[0]) if self.wide else 1


def stages_for(block_size: int, dim: int, wanted: int) -> int:
    """Blocks in flight: one where two would not fit into the shared memory of any GPU, with 128 keys of 256 numbers."""
    return wanted if block_size * triton.next_power_of_2(dim) <= LARGE_TILE else 1


def prefill_attention(
    qkv: Tensor, loads: CacheLoads, block_tables: Tensor, tiles: Tensor, out: Tensor, kv_heads: int, block_size: int,
    scale: float, window: int | None = None, softcap: float = 0.0, scales: KvScales = UNSCALED,
    scratch: Scratch | None = None,
) -> None:  # fmt: skip
    """softmax(q·k * scale, over each token's own and earlier keys) · v.

    qkv: [num_tokens, (heads + 2 * kv_heads) * head_dim], queries first and rotated.
    out: [num_tokens, heads * head_dim].
    tiles: [n, TILE_WORDS] int32 from `plan_tiles`, zeros are no work. block_tables: [num_rows, max_blocks] int32.
    Tiles have `loads.tile_rows`. softcap: not with wide ones. scales: for a cache of eight bits.
    scratch: for tiles that are split, which those of a sliding window are not.
    """
    if loads.wide:
        assert not softcap
        hopper.prefill_attention(
            qkv, loads.keys, loads.values, block_tables, tiles, out, kv_heads, block_size, scale, window,
            (scratch.partial, scratch.lse, scratch.finished) if scratch else None,
        )  # fmt: skip
        return
    dim = loads.keys.shape[1]
    heads = out.shape[1] // dim
    of_keys, of_values = of_cache(loads.keys.base, scales)
    _prefill[(heads, tiles.shape[0])](
        qkv, qkv.stride(0), loads.keys, loads.values, block_tables, block_tables.stride(0), tiles, out, out.stride(0),
        scratch.partial if scratch else None, scratch.lse if scratch else None, scratch.finished if scratch else None,
        scale * LOG2_E * (of_keys or 1.0), softcap, of_values, KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim,
        DIM_BLOCK=triton.next_power_of_2(dim), BLOCK_SIZE=block_size, TILE=TILE_ROWS, WINDOW=window or 0,
        SOFTCAP=softcap > 0, STAGES=stages_for(block_size, dim, STAGES), WORDS=TILE_WORDS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _scores(
    query, keys, cache_row, at, position, scale, softcap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Of one block of keys, still to be multiplied with `scale`, without SOFTCAP; -inf for what a row does not see.

    at: [BLOCK_SIZE] the keys' positions; position: [TILE] of the queries.
    """
    scores = tl.dot(query, keys.load([cache_row, 0]).to(query.dtype).T)
    if SOFTCAP:
        x = scores * (scale * (0.6931471805599453 / softcap))
        scores = (2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0) * (softcap * 1.4426950408889634)
    if MASKED:
        seen = at[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (at[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _weights(scores, best, total, scale, SAFE: tl.constexpr):
    """Fold a block's scores into the softmax so far → its best, its total, what to shrink by, and weights.

    The scale is applied with the subtraction, as one multiply-add for each score.
    """
    new_best = tl.maximum(best, tl.max(scores, 1) * scale)
    # A row of a window may see nothing of this block: -inf minus -inf would be NaN.
    safe = new_best if SAFE else tl.where(new_best == float("-inf"), 0.0, new_best)
    shrink = tl.exp2(best - safe)
    weights = tl.exp2(scores * scale - safe[:, None])
    return new_best, total * shrink + tl.sum(weights, 1), shrink, weights


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["tiles"])
def _prefill(
    qkv, stride_token, keys, values, block_tables, stride_table, tiles, out, stride_out, partial, partial_lse,
    finished, scale, softcap, value_scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, STAGES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * WORDS
    kv_head = head // GROUP
    token = tl.load(tile).to(tl.int64)
    num_rows = tl.load(tile + 1)
    if num_rows == 0:  # padding
        return
    table = block_tables + tl.load(tile + 2).to(tl.int64) * stride_table
    start = tl.load(tile + 3)

    row = tl.arange(0, TILE)
    column = tl.arange(0, DIM_BLOCK)
    key = tl.arange(0, BLOCK_SIZE)
    inside = (row < num_rows)[:, None] & (column < DIM)[None, :]
    position = start + row
    query = tl.load(
        qkv + (token + row)[:, None] * stride_token + head * DIM + column[None, :], mask=inside, other=0.0
    )  # [TILE, DIM]
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, DIM_BLOCK], tl.float32)
    factor = 1.0 if SOFTCAP else scale

    first = tl.load(tile + 4)
    end = first + tl.load(tile + 5)
    if WINDOW > 0:
        first = tl.maximum(start - WINDOW + 1, 0) // BLOCK_SIZE
        full = first  # the window's edge runs through the blocks: mask them all
    else:
        # Blocks that the first row sees whole, and with it every row.
        full = tl.maximum(tl.minimum((start + 1) // BLOCK_SIZE, end), first)
    for index in tl.range(first, full, num_stages=STAGES):
        cache_row = (tl.load(table + index) * KV_HEADS + kv_head) * BLOCK_SIZE
        scores = _scores(
            query, keys, cache_row, index * BLOCK_SIZE + key, position, scale, softcap, False, WINDOW, SOFTCAP
        )
        best, total, shrink, weights = _weights(scores, best, total, factor, True)
        v = values.load([cache_row, 0]).to(query.dtype)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
    for index in tl.range(full, end, num_stages=STAGES if WINDOW > 0 else 1):
        cache_row = (tl.load(table + index) * KV_HEADS + kv_head) * BLOCK_SIZE
        scores = _scores(
            query, keys, cache_row, index * BLOCK_SIZE + key, position, scale, softcap, True, WINDOW, SOFTCAP
        )
        best, total, shrink, weights = _weights(scores, best, total, factor, False)
        v = values.load([cache_row, 0]).to(query.dtype)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
    to = out + (token + row)[:, None] * stride_out + head * DIM + column[None, :]
    if value_scale is not None:
        sums *= value_scale
    count = tl.load(tile + 7)
    if partial is None or count == 1:
        tl.store(to, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        heads = tl.num_programs(0)
        slot = tl.program_id(1) * heads + head
        at = row[:, None] * DIM_BLOCK + column[None, :]
        tl.store(partial + slot * (TILE * DIM_BLOCK) + at, sums / total[:, None])
        tl.store(partial_lse + slot * TILE + row, best + tl.log2(total))
        tl.debug_barrier()  # every thread's part is written before the count says so
        begin = tl.load(tile + 6)
        counter = finished + begin * heads + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
            tl.store(counter, 0)
            best = tl.full([TILE], float("-inf"), tl.float32)
            total = tl.zeros([TILE], tl.float32)
            sums = tl.zeros([TILE, DIM_BLOCK], tl.float32)
            for other in tl.range(begin, begin + count, num_stages=1):
                of = other * heads + head
                # From the second-level cache: the first-level one of this processor may hold an older layer's.
                lse = tl.load(partial_lse + of * TILE + row, cache_modifier=".cg")
                part = tl.load(partial + of * (TILE * DIM_BLOCK) + at, cache_modifier=".cg")
                new_best = tl.maximum(best, lse)
                shrink = tl.exp2(best - new_best)
                weight = tl.exp2(lse - new_best)
                sums = sums * shrink[:, None] + part * weight[:, None]
                total = total * shrink + weight
                best = new_best
            tl.store(to, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)


def reference(
    qkv: Tensor, kv_cache: Tensor, block_tables: Tensor, chunks: Sequence[Chunk], heads: int, scale: float,
    window: int | None = None, softcap: float = 0.0, scales: KvScales = UNSCALED,
) -> Tensor:  # fmt: skip
    """The same, a chunk at a time, in float32. → [num_tokens, heads * head_dim]"""
    out = torch.zeros(qkv.shape[0], heads * kv_cache.shape[-1], dtype=qkv.dtype, device=qkv.device)
    for c in chunks:
        part = slice(c.token, c.token + c.count)
        result = reference_one(
            qkv[part], kv_cache, block_tables[c.row], c.position, heads, scale, window, softcap, scales
        )
        out[part] = result.to(qkv.dtype)
    return out
