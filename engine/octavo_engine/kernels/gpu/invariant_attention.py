"""Attention whose result for a token does not depend on the tokens beside it, for --deterministic.

One kernel for prompts and decodes, where the default has one for each: a decode is a chunk of one token. A tile's rows
are a few consecutive tokens times the query heads of one KV head, so that a single token reads its keys once. Every row
goes through its keys block by block from the first, and each block is masked alike, as a compiler may round a sum that
a mask interrupts otherwise. Where a tile starts and ends, and how many rows it has, changes nothing in a row: blocks
that it does not see leave it as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels.gpu.decode_attention import LOG2_E
from octavo_engine.kernels.gpu.prefill_attention import TILE_WORDS, CacheLoads, _scores, _weights, stages_for
from octavo_engine.kernels.gpu.rope_kv import of_cache
from octavo_engine.kernels.kv_scales import UNSCALED, KvScales

ROWS = 64


def tile_tokens(group: int) -> int:
    """Tokens of a tile, for so many query heads to a KV head."""
    assert group <= ROWS, group
    return ROWS // group


def invariant_attention(
    qkv: Tensor, loads: CacheLoads, block_tables: Tensor, tiles: Tensor, out: Tensor, kv_heads: int, block_size: int,
    scale: float, window: int | None = None, softcap: float = 0.0, num_warps: int = 4, num_stages: int = 3,
    scales: KvScales = UNSCALED,
) -> None:  # fmt: skip
    """As `prefill_attention`, whose reference is this one's too. tiles: of at most `tile_tokens` tokens."""
    dim = loads.keys.shape[1]
    heads = out.shape[1] // dim
    of_keys, of_values = of_cache(loads.keys.base, scales)
    _invariant[(kv_heads, tiles.shape[0])](
        qkv, qkv.stride(0), loads.keys, loads.values, block_tables, block_tables.stride(0), tiles, out, out.stride(0),
        scale * LOG2_E * (of_keys or 1.0), softcap, of_values, KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim,
        DIM_BLOCK=triton.next_power_of_2(dim), BLOCK_SIZE=block_size, TILE=ROWS, WINDOW=window or 0,
        SOFTCAP=softcap > 0, STAGES=stages_for(block_size, dim, num_stages), WORDS=TILE_WORDS,
        num_warps=num_warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["tiles"])
def _invariant(
    qkv, stride_token, keys, values, block_tables, stride_table, tiles, out, stride_out, scale, softcap,
    value_scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * WORDS
    token = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 1)
    if count == 0:  # padding
        return
    table = block_tables + tl.load(tile + 2).to(tl.int64) * stride_table
    start = tl.load(tile + 3)

    row = tl.arange(0, TILE)
    column = tl.arange(0, DIM_BLOCK)
    key = tl.arange(0, BLOCK_SIZE)
    inside = (row // GROUP < count)[:, None] & (column < DIM)[None, :]
    position = start + row // GROUP
    at_head = (kv_head * GROUP + row % GROUP) * DIM
    at_query = (token + row // GROUP)[:, None] * stride_token + at_head[:, None] + column[None, :]
    query = tl.load(qkv + at_query, mask=inside, other=0.0)  # [TILE, DIM]
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, DIM_BLOCK], tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(start - WINDOW + 1, 0) // BLOCK_SIZE
    for index in tl.range(first, tl.cdiv(start + count, BLOCK_SIZE), num_stages=STAGES):
        cache_row = (tl.load(table + index) * KV_HEADS + kv_head) * BLOCK_SIZE
        scores = _scores(
            query, keys, cache_row, index * BLOCK_SIZE + key, position, scale, softcap, True, WINDOW, SOFTCAP
        )
        best, total, shrink, weights = _weights(scores, best, total, 1.0 if SOFTCAP else scale, WINDOW == 0)
        v = values.load([cache_row, 0]).to(query.dtype)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
    if value_scale is not None:
        sums *= value_scale
    to = out + (token + row // GROUP)[:, None] * stride_out + at_head[:, None] + column[None, :]
    tl.store(to, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)
