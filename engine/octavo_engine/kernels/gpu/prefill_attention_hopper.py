"""Prefill attention on Hopper, with warps that load and warps that compute.

One warp brings keys and values into shared memory. Two warp groups of 64 rows each share them: while one is in its
softmax, the other has the matrix unit, and within a group the product of some keys' weights with their values runs
beside the next keys' softmax. (Shah et al., "FlashAttention-3", 2024.) On an H200 it reaches 1.08 and 1.05 times
cuDNN's rate at 8,192 and 16,384 tokens, with blocks of 64, where the portable kernel reaches 0.7 and 0.6. Where a tile
is split, each group writes down its half of a part, and the one that ends last combines that half.

Called by prefill_attention.py, whose reference is this one's too. The interpreter knows no Gluon: its tests want a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo_engine.kernels.gpu.decode_attention import LOG2_E

ROWS = 128
"""Of a tile: two warp groups of 64."""
KEYS = 128
"""Of a stage. With 64 it is a tenth slower: a group's softmax is then too short for the other's products."""
STAGES = 2
"""As fast as three or more."""
DIMS = (64, 128)
"""Head sizes; 256 would not fit into the registers."""
PROGRAMS = 132
"""On the chip at a time: one for each multiprocessor, as its threads take all of its registers."""
REGISTERS = 240
"""Of a thread that computes: with 128 keys and a head of 128 all but eleven words fit."""


def takes(kv_cache: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a Hopper, and the kernel computes queries of this type on this cache.

    kv_cache: [..., block_size, head_dim]
    """
    block_size, dim = kv_cache.shape[-2:]
    if kv_cache.dtype != dtype or dim not in DIMS or KEYS % block_size or triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch == 90)


def descriptors(kv_cache: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """kv_cache: [2, num_blocks, kv_heads, block_size, head_dim]"""
    _, blocks, kv_heads, block_size, dim = kv_cache.shape
    rows = blocks * kv_heads * block_size
    kind = gl.bfloat16 if kv_cache.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([block_size, dim], kind)
    keys, values = (
        TensorDescriptor(part.view(rows, dim), [rows, dim], [dim, 1], [block_size, dim], layout) for part in kv_cache
    )
    return keys, values


def prefill_attention(
    qkv: Tensor, keys: TensorDescriptor, values: TensorDescriptor, block_tables: Tensor, tiles: Tensor, out: Tensor,
    kv_heads: int, block_size: int, scale: float, window: int | None, scratch: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """As prefill_attention.py has it; tiles of ROWS rows. scratch: partial, lse and finished, for split tiles."""
    dim = keys.shape[1]
    heads = out.shape[1] // dim
    assert window is None or scratch is None
    _prefill_hopper[(heads, tiles.shape[0])](
        qkv, qkv.stride(0), keys, values, block_tables, block_tables.stride(0), tiles, out, out.stride(0),
        *(scratch or (out, out, out)), scale * LOG2_E, SPLIT=scratch is not None,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, BLOCK_SIZE=block_size, KEYS=KEYS,
        WINDOW=window or 0, STAGES=STAGES, REGISTERS=REGISTERS, WORDS=tiles.shape[1],
        num_warps=4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["tiles"])
def _prefill_hopper(
    qkv, stride_token, keys, values, block_tables, stride_table, tiles, out, stride_out, partial, partial_lse, finished,
    scale,
    SPLIT: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    KEYS: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    head = gl.program_id(0)
    tile = tiles + gl.program_id(1) * WORDS
    kv_head = head // GROUP
    token = gl.load(tile).to(gl.int64)
    num_rows = gl.load(tile + 1)
    table = block_tables + gl.load(tile + 2).to(gl.int64) * stride_table
    start = gl.load(tile + 3)
    # In steps of KEYS keys: what some row sees, and what every row sees whole.
    first = gl.maximum(start - WINDOW + 1, 0) // KEYS if WINDOW > 0 else 0
    full = 0 if WINDOW > 0 else (start + 1) // KEYS
    end = (start + num_rows + KEYS - 1) // KEYS
    last_block = (start + num_rows - 1) // BLOCK_SIZE
    if SPLIT:
        first = gl.load(tile + 4) * BLOCK_SIZE // KEYS
        end = gl.minimum((gl.load(tile + 4) + gl.load(tile + 5)) * BLOCK_SIZE + KEYS - 1, end * KEYS) // KEYS
        full = gl.maximum(gl.minimum(full, end), first)
    if num_rows > 0:  # else padding
        k_held = gl.allocate_shared_memory(keys.dtype, [STAGES, KEYS, DIM], keys.layout)
        v_held = gl.allocate_shared_memory(values.dtype, [STAGES, KEYS, DIM], values.layout)
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(STAGES):
            mbarrier.init(k_full.index(slot), count=1)
            mbarrier.init(v_full.index(slot), count=1)
            mbarrier.init(k_empty.index(slot), count=2)  # one arrival of each warp group
            mbarrier.init(v_empty.index(slot), count=2)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    _compute,
                    (
                        qkv, stride_token, k_held, v_held, k_full, k_empty, v_full, v_empty, out, stride_out, tile,
                        partial, partial_lse, finished, token, num_rows, start, head, first, full, end, scale, 0,
                        DIM, KEYS, WINDOW, STAGES, SPLIT,
                    ),
                ),
                (
                    _compute,
                    (
                        qkv, stride_token, k_held, v_held, k_full, k_empty, v_full, v_empty, out, stride_out, tile,
                        partial, partial_lse, finished, token, num_rows, start, head, first, full, end, scale, 64,
                        DIM, KEYS, WINDOW, STAGES, SPLIT,
                    ),
                ),
                (
                    _load,
                    (
                        keys, values, k_held, v_held, k_full, k_empty, v_full, v_empty, table, kv_head, first, end,
                        last_block, KV_HEADS, BLOCK_SIZE, KEYS, STAGES,
                    ),
                ),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip


@gluon.jit
def _load(
    keys, values, k_held, v_held, k_full, k_empty, v_full, v_empty, table, kv_head, first, end, last_block,
    KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCKS: gl.constexpr = KEYS // BLOCK_SIZE
    for index in range(first, end):
        slot = (index - first) % STAGES
        # The phase before a barrier's first counts as complete: the first round finds every slot empty.
        empty = ((index - first) // STAGES) & 1 ^ 1
        mbarrier.wait(k_empty.index(slot), empty)
        mbarrier.expect(k_full.index(slot), BLOCKS * keys.block_type.nbytes)
        for part in gl.static_range(BLOCKS):
            # Behind the end the last block again, which is there and whose keys no row sees.
            row = (gl.load(table + gl.minimum(index * BLOCKS + part, last_block)) * KV_HEADS + kv_head) * BLOCK_SIZE
            to = k_held.index(slot).slice(part * BLOCK_SIZE, BLOCK_SIZE)
            tma.async_copy_global_to_shared(keys, [row, 0], k_full.index(slot), to)
        mbarrier.wait(v_empty.index(slot), empty)
        mbarrier.expect(v_full.index(slot), BLOCKS * values.block_type.nbytes)
        for part in gl.static_range(BLOCKS):
            row = (gl.load(table + gl.minimum(index * BLOCKS + part, last_block)) * KV_HEADS + kv_head) * BLOCK_SIZE
            to = v_held.index(slot).slice(part * BLOCK_SIZE, BLOCK_SIZE)
            tma.async_copy_global_to_shared(values, [row, 0], v_full.index(slot), to)


@gluon.jit
def _masked(scores, at, position, WINDOW: gl.constexpr):
    """at: [KEYS] the keys' positions; position: [64] of the queries."""
    seen = at[None, :] <= position[:, None]
    if WINDOW > 0:
        seen = seen & (at[None, :] > position[:, None] - WINDOW)
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _safe(best, WINDOW: gl.constexpr):
    """A row of a window may see none of some keys: -inf minus -inf would be NaN."""
    return gl.where(best == float("-inf"), 0.0, best) if WINDOW > 0 else best


@gluon.jit
def _compute(
    qkv, stride_token, k_held, v_held, k_full, k_empty, v_full, v_empty, out, stride_out, tile, partial, partial_lse,
    finished, token, num_rows, start, head, first, full, end, scale,
    OFFSET: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """64 rows of the tile, from OFFSET on."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ROW_OF_SUMS: gl.constexpr = gl.SliceLayout(1, SUMS)
    GLOBAL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, GLOBAL)) + OFFSET
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, GLOBAL))
    inside = (row < num_rows)[:, None] & (column < DIM)[None, :]
    at = (token + row)[:, None] * stride_token + head * DIM + column[None, :]
    query = gl.convert_layout(gl.load(qkv + at, mask=inside, other=0.0), gl.DotOperandLayout(0, SCORES, 2))
    position = start + OFFSET + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    nothing = gl.zeros([64, KEYS], gl.float32, SCORES)
    sums = gl.zeros([64, DIM], gl.float32, SUMS)
    kind: gl.constexpr = qkv.dtype.element_ty

    mbarrier.wait(k_full.index(0), 0)
    under_way = warpgroup_mma(query, k_held.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(under_way,))
    gl.thread_barrier()  # one thread says so for its warp group: all of it has read
    mbarrier.arrive(k_empty.index(0), count=1)
    if first >= full:
        scores = _masked(scores, first * KEYS + key, position, WINDOW)
    best = gl.max(scores, 1) * scale
    weights = gl.exp2(scores * scale - _safe(best, WINDOW)[:, None])
    total = gl.sum(weights, 1)
    held = gl.convert_layout(weights.to(kind), gl.DotOperandLayout(0, SUMS, 2))
    for index in range(first + 1, end):
        turn = index - first
        slot = turn % STAGES
        before = (turn - 1) % STAGES
        mbarrier.wait(k_full.index(slot), (turn // STAGES) & 1)
        under_way = warpgroup_mma(query, k_held.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((turn - 1) // STAGES) & 1)
        sums_under_way = warpgroup_mma(held, v_held.index(before), sums, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(under_way,))
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(slot), count=1)
        if index >= full:
            scores = _masked(scores, index * KEYS + key, position, WINDOW)
        new_best = gl.maximum(best, gl.max(scores, 1) * scale)
        safe = _safe(new_best, WINDOW)
        shrink = gl.exp2(best - safe)
        weights = gl.exp2(scores * scale - safe[:, None])
        total = total * shrink + gl.sum(weights, 1)
        best = new_best
        sums = warpgroup_mma_wait(0, deps=(sums_under_way,))
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(before), count=1)
        sums = sums * gl.convert_layout(shrink, ROW_OF_SUMS)[:, None]
        held = gl.convert_layout(weights.to(kind), gl.DotOperandLayout(0, SUMS, 2))
    last = end - 1 - first
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    sums_under_way = warpgroup_mma(held, v_held.index(last % STAGES), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=(sums_under_way,))
    total = gl.convert_layout(total, ROW_OF_SUMS)
    sums = sums / total[:, None]
    is_last = True
    if SPLIT:
        count = gl.load(tile + 7)
        if count > 1:
            half_of_heads = (head * 2 + OFFSET // 64).to(gl.int32)
            halves = gl.num_programs(0) * 2
            part_row = gl.arange(0, 64, layout=ROW_OF_SUMS)
            at_part = part_row[:, None] * DIM + gl.arange(0, DIM, layout=gl.SliceLayout(0, SUMS))[None, :]
            own = gl.program_id(1) * halves + half_of_heads
            gl.store(partial + own * (64 * DIM) + at_part, sums)
            gl.store(partial_lse + own * 64 + part_row, gl.convert_layout(best, ROW_OF_SUMS) + gl.log2(total))
            gl.thread_barrier()  # every thread's part is written before the count says so
            begin = gl.load(tile + 6)
            counter = finished + begin * halves + half_of_heads
            is_last = gl.atomic_add(counter, 1, sem="acq_rel") == count - 1
            if is_last:
                gl.store(counter, 0)
                most = gl.full([64], float("-inf"), gl.float32, ROW_OF_SUMS)
                total = gl.zeros([64], gl.float32, ROW_OF_SUMS)
                sums = gl.zeros([64, DIM], gl.float32, SUMS)
                for other in range(begin, begin + count):
                    of = other * halves + half_of_heads
                    # From the second-level cache: the first-level one of this processor may hold an older layer's.
                    lse = gl.load(partial_lse + of * 64 + part_row, cache_modifier=".cg")
                    part = gl.load(partial + of * (64 * DIM) + at_part, cache_modifier=".cg")
                    new_most = gl.maximum(most, lse)
                    shrink = gl.exp2(most - new_most)
                    weight = gl.exp2(lse - new_most)
                    sums = sums * shrink[:, None] + part * weight[:, None]
                    total = total * shrink + weight
                    most = new_most
                sums = sums / total[:, None]
    if is_last:
        to = (token + row)[:, None] * stride_out + head * DIM + column[None, :]
        gl.store(out + to, gl.convert_layout(sums.to(kind), GLOBAL), mask=inside)
