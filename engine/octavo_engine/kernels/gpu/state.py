"""Bring the rows of request state on the device up to date: new blocks, and the sampling of new rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels.gpu.sample import SamplingState

BLOCKS_AT_ONCE = 256
SAMPLING_WORDS = 8
"""row, temperature, top_k, top_p, min_p, seed's low and high half, nothing; floats as their bits."""


def set_blocks(updates: Tensor, block_tables: Tensor) -> None:
    """updates: [n, 3] int32 of row, index, block: block_tables[row, index] = block. No pair may occur twice."""
    count = updates.shape[0]
    _set_blocks[(triton.cdiv(count, BLOCKS_AT_ONCE),)](
        updates, count, block_tables, block_tables.stride(0), AT_ONCE=BLOCKS_AT_ONCE, num_warps=4
    )


def set_sampling(updates: Tensor, state: SamplingState) -> None:
    """updates: [n, SAMPLING_WORDS] int32, a row at most once."""
    _set_sampling[(updates.shape[0],)](
        updates, state.temperature, state.top_k, state.top_p, state.min_p, state.seed, WORDS=SAMPLING_WORDS, num_warps=1
    )


@triton.jit(do_not_specialize=["count", "stride_table"], do_not_specialize_on_alignment=["updates"])
def _set_blocks(updates, count, block_tables, stride_table, AT_ONCE: tl.constexpr):
    at = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    inside = at < count
    row = tl.load(updates + at * 3, mask=inside, other=0).to(tl.int64)
    index = tl.load(updates + at * 3 + 1, mask=inside, other=0)
    block = tl.load(updates + at * 3 + 2, mask=inside, other=0)
    tl.store(block_tables + row * stride_table + index, block, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["updates"])
def _set_sampling(updates, temperature, top_k, top_p, min_p, seed, WORDS: tl.constexpr):
    at = updates + tl.program_id(0) * WORDS
    row = tl.load(at)
    tl.store(temperature + row, tl.load(at + 1).to(tl.float32, bitcast=True))
    tl.store(top_k + row, tl.load(at + 2))
    tl.store(top_p + row, tl.load(at + 3).to(tl.float32, bitcast=True))
    tl.store(min_p + row, tl.load(at + 4).to(tl.float32, bitcast=True))
    low = tl.load(at + 5).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(at + 6).to(tl.int64)
    tl.store(seed + row, (high << 32) | low)


def reference_set_blocks(updates: Tensor, block_tables: Tensor) -> None:
    row, index, block = updates.long().unbind(1)
    block_tables[row, index] = block.int()


def reference_set_sampling(updates: Tensor, state: SamplingState) -> None:
    row = updates[:, 0].long()
    state.temperature[row] = updates[:, 1].contiguous().view(torch.float32)
    state.top_k[row] = updates[:, 2]
    state.top_p[row] = updates[:, 3].contiguous().view(torch.float32)
    state.min_p[row] = updates[:, 4].contiguous().view(torch.float32)
    state.seed[row] = (updates[:, 6].long() << 32) | (updates[:, 5].long() & 0xFFFFFFFF)
