"""Log-probabilities of the tokens that a step gave, and the likeliest others, without a sort or a copy of the logits.

A program reads a slice of a row once: its part of the softmax's total, how many tokens lie above the chosen one, and
its own likeliest tokens, one after the other; a second kernel puts the slices together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels import sampling

SLICE = 4096
MOST = 20
"""Likeliest tokens at most (sampling_params.MAX_LOGPROBS)."""
TOLD_WORDS = 2 + 2 * MOST
"""Of a row: its token's log-probability (float bits) and rank, the likeliest ids, their log-probabilities (bits)."""


@dataclass(frozen=True)
class LogprobScratch:
    parts: Tensor  # [n, slices, 3] float32: largest logit, total of the exponentials to it, tokens above the chosen one
    values: Tensor  # [n, slices, MOST] float32
    ids: Tensor  # [n, slices, MOST] int32

    @classmethod
    def allocate(cls, n: int, vocab: int, device: torch.device) -> LogprobScratch:
        slices = triton.cdiv(vocab, SLICE)
        return cls(
            torch.empty(n, slices, 3, dtype=torch.float32, device=device),
            torch.empty(n, slices, MOST, dtype=torch.float32, device=device),
            torch.empty(n, slices, MOST, dtype=torch.int32, device=device),
        )


def logprobs(logits: Tensor, places: Tensor, chosen: Tensor, count: int, scratch: LogprobScratch, told: Tensor) -> None:
    """logits: [>= n, vocab] as the model gave them. places: [n] int32, rows of logits. chosen: ids by place, int32.

    count: likeliest tokens that are asked for, 0 to MOST. told: [n, TOLD_WORDS] int32.
    """
    n, vocab = places.shape[0], logits.shape[1]
    assert count <= MOST, count
    slices = triton.cdiv(vocab, SLICE)
    _of_slice[(n, slices)](
        logits, places, chosen, count, scratch.parts, scratch.values, scratch.ids, VOCAB=vocab, SLICE=SLICE, MOST=MOST,
        num_warps=4,
    )  # fmt: skip
    _of_row[(n,)](
        logits, places, chosen, count, scratch.parts, scratch.values, scratch.ids, told, VOCAB=vocab, SLICES=slices,
        SLICES_BLOCK=triton.next_power_of_2(slices), MOST=MOST, MOST_BLOCK=triton.next_power_of_2(MOST), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["places"])
def _of_slice(
    logits, places, chosen, count, parts, values, ids, VOCAB: tl.constexpr, SLICE: tl.constexpr, MOST: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0)
    part = n * tl.num_programs(1) + tl.program_id(1)
    place = tl.load(places + n)
    base = logits + place.to(tl.int64) * VOCAB
    of_chosen = tl.load(base + tl.maximum(tl.load(chosen + place), 0)).to(tl.float32)
    column = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    x = tl.load(base + column, mask=column < VOCAB, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    tl.store(parts + part * 3, top)
    tl.store(parts + part * 3 + 1, tl.sum(tl.exp(x - safe), 0))
    tl.store(parts + part * 3 + 2, tl.sum((x > of_chosen).to(tl.float32), 0))
    for index in range(count):
        at = tl.argmax(x, 0)  # the first of equal ones
        tl.store(values + part * MOST + index, tl.max(x, 0))
        tl.store(ids + part * MOST + index, tl.program_id(1) * SLICE + at)
        x = tl.where(tl.arange(0, SLICE) == at, float("-inf"), x)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["places"])
def _of_row(
    logits, places, chosen, count, parts, values, ids, told, VOCAB: tl.constexpr, SLICES: tl.constexpr,
    SLICES_BLOCK: tl.constexpr, MOST: tl.constexpr, MOST_BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    place = tl.load(places + n)
    slice_ = tl.arange(0, SLICES_BLOCK)
    is_slice = slice_ < SLICES
    part = parts + (n * SLICES + slice_) * 3
    tops = tl.load(part, mask=is_slice, other=float("-inf"))
    totals = tl.load(part + 1, mask=is_slice, other=0.0)
    above = tl.load(part + 2, mask=is_slice, other=0.0)
    top = tl.max(tops, 0)
    log_total = top + tl.log(tl.sum(totals * tl.exp(tops - top), 0))
    of_chosen = tl.load(logits + place.to(tl.int64) * VOCAB + tl.maximum(tl.load(chosen + place), 0)).to(tl.float32)
    to = told + n * (2 + 2 * MOST)
    tl.store(to, (of_chosen - log_total).to(tl.int32, bitcast=True))
    tl.store(to + 1, 1 + tl.sum(above, 0).to(tl.int32))
    rank = tl.arange(0, MOST_BLOCK)
    at = (n * SLICES + slice_)[:, None] * MOST + rank[None, :]
    inside = is_slice[:, None] & (rank < count)[None, :]
    x = tl.load(values + at, mask=inside, other=float("-inf"))
    id = tl.load(ids + at, mask=inside, other=2147483647)
    for index in range(count):
        best = tl.max(tl.max(x, 1), 0)
        first = tl.min(tl.min(tl.where(x == best, id, 2147483647), 1), 0)
        tl.store(to + 2 + index, first)
        tl.store(to + 2 + MOST + index, (best - log_total).to(tl.int32, bitcast=True))
        x = tl.where(id == first, float("-inf"), x)


def reference(logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows of logits: log-probabilities and ranks [n], the likeliest ids and theirs [n, count]."""
    return sampling.token_logprobs(logits, chosen.long(), count)


def read(told: list[int]) -> tuple[float, int, list[int], list[float]]:
    """A row's words: log-probability, rank, likeliest ids, theirs; MOST of each."""
    floats = torch.tensor([told[0], *told[2 + MOST :]], dtype=torch.int32).view(torch.float32).tolist()
    return floats[0], told[1], told[2 : 2 + MOST], floats[1:]
