"""Prefill attention with warps that load and warps that compute, for Hopper: a candidate, not yet measured.

One warp brings blocks of keys and values into shared memory. Two warp groups of 64 rows each share them: while one is
in its softmax, the other has the matrix unit, and within a group the product of a block's weights with its values runs
beside the next block's softmax. (Shah et al., "FlashAttention-3", 2024.) No sliding window and no soft cap.

`tune_prefill_attention.py` measures it beside the Triton kernel. The interpreter knows no Gluon: until then it is known
to compile for sm_90, with blocks of 64 without spilling (11 words with blocks of 128), and nothing else.
"""

from __future__ import annotations

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


def descriptors(kv_cache: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """kv_cache: [2, num_blocks, kv_heads, block_size, head_dim]"""
    _, blocks, kv_heads, block_size, dim = kv_cache.shape
    rows = blocks * kv_heads * block_size
    layout = gl.NVMMASharedLayout.get_default_for([block_size, dim], gl.bfloat16)
    keys, values = (
        TensorDescriptor(part.view(rows, dim), [rows, dim], [dim, 1], [block_size, dim], layout) for part in kv_cache
    )
    return keys, values


def prefill_attention(
    qkv: Tensor, loads: tuple[TensorDescriptor, TensorDescriptor], block_tables: Tensor, tiles: Tensor, out: Tensor,
    kv_heads: int, block_size: int, scale: float, stages: int,
) -> None:  # fmt: skip
    """As kernels/gpu/prefill_attention.py has it; tiles of ROWS rows."""
    keys, values = loads
    dim = keys.shape[1]
    heads = out.shape[1] // dim
    _prefill[(heads, tiles.shape[0])](
        qkv, qkv.stride(0), keys, values, block_tables, block_tables.stride(0), tiles, out, out.stride(0),
        scale * LOG2_E, KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, BLOCK_SIZE=block_size, STAGES=stages,
        REGISTERS=240, num_warps=4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["tiles"])
def _prefill(
    qkv, stride_token, keys, values, block_tables, stride_table, tiles, out, stride_out, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    head = gl.program_id(0)
    tile = tiles + gl.program_id(1) * 4
    kv_head = head // GROUP
    token = gl.load(tile).to(gl.int64)
    num_rows = gl.load(tile + 1)
    table = block_tables + gl.load(tile + 2).to(gl.int64) * stride_table
    start = gl.load(tile + 3)
    full = (start + 1) // BLOCK_SIZE  # blocks that every row sees whole
    end = (start + num_rows + BLOCK_SIZE - 1) // BLOCK_SIZE
    if num_rows > 0:
        k_held = gl.allocate_shared_memory(keys.dtype, [STAGES, BLOCK_SIZE, DIM], keys.layout)
        v_held = gl.allocate_shared_memory(values.dtype, [STAGES, BLOCK_SIZE, DIM], values.layout)
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
                        qkv, stride_token, k_held, v_held, k_full, k_empty, v_full, v_empty, out, stride_out, token,
                        num_rows, start, head, full, end, scale, 0, DIM, BLOCK_SIZE, STAGES,
                    ),
                ),
                (
                    _compute,
                    (
                        qkv, stride_token, k_held, v_held, k_full, k_empty, v_full, v_empty, out, stride_out, token,
                        num_rows, start, head, full, end, scale, 64, DIM, BLOCK_SIZE, STAGES,
                    ),
                ),
                (
                    _load,
                    (
                        keys, values, k_held, v_held, k_full, k_empty, v_full, v_empty, table, kv_head, end, KV_HEADS,
                        BLOCK_SIZE, STAGES,
                    ),
                ),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip


@gluon.jit
def _load(
    keys, values, k_held, v_held, k_full, k_empty, v_full, v_empty, table, kv_head, end,
    KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for index in range(end):
        slot = index % STAGES
        # The phase before a barrier's first counts as complete: the first round finds every slot empty.
        empty = (index // STAGES) & 1 ^ 1
        row = (gl.load(table + index) * KV_HEADS + kv_head) * BLOCK_SIZE
        mbarrier.wait(k_empty.index(slot), empty)
        mbarrier.expect(k_full.index(slot), keys.block_type.nbytes)
        tma.async_copy_global_to_shared(keys, [row, 0], k_full.index(slot), k_held.index(slot))
        mbarrier.wait(v_empty.index(slot), empty)
        mbarrier.expect(v_full.index(slot), values.block_type.nbytes)
        tma.async_copy_global_to_shared(values, [row, 0], v_full.index(slot), v_held.index(slot))


@gluon.jit
def _compute(
    qkv, stride_token, k_held, v_held, k_full, k_empty, v_full, v_empty, out, stride_out, token, num_rows, start, head,
    full, end, scale,
    OFFSET: gl.constexpr, DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows of the tile, from OFFSET on."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ROW_OF_SUMS: gl.constexpr = gl.SliceLayout(1, SUMS)
    GLOBAL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, GLOBAL)) + OFFSET
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, GLOBAL))
    inside = (row < num_rows)[:, None] & (column < DIM)[None, :]
    at = (token + row)[:, None] * stride_token + head * DIM + column[None, :]
    query = gl.convert_layout(gl.load(qkv + at, mask=inside, other=0.0), gl.DotOperandLayout(0, SCORES, 2))
    position = start + OFFSET + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    key = gl.arange(0, BLOCK_SIZE, layout=gl.SliceLayout(0, SCORES))
    nothing = gl.zeros([64, BLOCK_SIZE], gl.float32, SCORES)
    sums = gl.zeros([64, DIM], gl.float32, SUMS)

    mbarrier.wait(k_full.index(0), 0)
    under_way = warpgroup_mma(query, k_held.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(under_way,))
    gl.thread_barrier()  # one thread says so for its warp group: all of it has read
    mbarrier.arrive(k_empty.index(0), count=1)
    if full < 1:
        scores = gl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    best = gl.max(scores, 1) * scale
    weights = gl.exp2(scores * scale - best[:, None])
    total = gl.sum(weights, 1)
    held = gl.convert_layout(weights.to(gl.bfloat16), gl.DotOperandLayout(0, SUMS, 2))
    for index in range(1, end):
        slot = index % STAGES
        before = (index - 1) % STAGES
        mbarrier.wait(k_full.index(slot), (index // STAGES) & 1)
        under_way = warpgroup_mma(query, k_held.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((index - 1) // STAGES) & 1)
        sums_under_way = warpgroup_mma(held, v_held.index(before), sums, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(under_way,))
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(slot), count=1)
        if index >= full:
            scores = gl.where(index * BLOCK_SIZE + key[None, :] <= position[:, None], scores, float("-inf"))
        new_best = gl.maximum(best, gl.max(scores, 1) * scale)
        shrink = gl.exp2(best - new_best)
        weights = gl.exp2(scores * scale - new_best[:, None])
        total = total * shrink + gl.sum(weights, 1)
        best = new_best
        sums = warpgroup_mma_wait(0, deps=(sums_under_way,))
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(before), count=1)
        sums = sums * gl.convert_layout(shrink, ROW_OF_SUMS)[:, None]
        held = gl.convert_layout(weights.to(gl.bfloat16), gl.DotOperandLayout(0, SUMS, 2))
    last = (end - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((end - 1) // STAGES) & 1)
    sums_under_way = warpgroup_mma(held, v_held.index(last), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=(sums_under_way,))
    sums = sums / gl.convert_layout(total, ROW_OF_SUMS)[:, None]
    to = (token + row)[:, None] * stride_out + head * DIM + column[None, :]
    gl.store(out + to, gl.convert_layout(sums.to(gl.bfloat16), GLOBAL), mask=inside)
