"""Sampling under a grammar: the tokens that it does not allow have a logit of minus infinity."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels.gpu.sample import SamplingScratch, SamplingState, sample
from octavo_engine.kernels.sampling import unpacked

AT_ONCE = 4096
"""Logits of one program; 128 words of the mask."""


def sample_masked(
    logits: Tensor, select: Tensor, masks: Tensor, tokens: Tensor | None, rows: Tensor, positions: Tensor,
    state: SamplingState, scratch: SamplingScratch, token_ids: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Sample the rows `select` of a step again, each under its mask; the rest is as for `sample`.

    select: [m] int32, rows of logits; masks: [m, words]. On a copy: log-probabilities are told of what the model gave.
    tokens None: each of the batch's tokens has its row of logits, in order.
    """
    few = logits.index_select(0, select)
    apply_mask(few, masks)
    again = torch.empty_like(select)
    of_rows = select if tokens is None else tokens.index_select(0, select)
    sample(few, of_rows, rows, positions, state, scratch, token_ids, again)
    out.index_copy_(0, select.long(), again)


def apply_mask(logits: Tensor, masks: Tensor) -> None:
    """logits: [n, vocab], any float type, rows one after the other. masks: [n, words] int32, words at least
    ceil(vocab / 32); bit i of word w stands for token 32 * w + i. A NaN of a token that is masked is gone with it."""
    n, vocab = logits.shape
    assert masks.shape[1] * 32 >= vocab, (masks.shape, vocab)
    _apply_mask[(n, triton.cdiv(vocab, AT_ONCE))](
        logits, masks, masks.stride(0), VOCAB=vocab, AT_ONCE=AT_ONCE, num_warps=4
    )


@triton.jit
def _apply_mask(logits, masks, stride_mask, VOCAB: tl.constexpr, AT_ONCE: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    inside = column < VOCAB
    word = tl.load(masks + n * stride_mask + column // 32, mask=inside, other=-1)
    # Written where it is forbidden and nowhere else: most masks allow either nearly all or nearly nothing.
    forbidden = ((word >> (column % 32)) & 1) == 0
    minus_infinity = tl.full([AT_ONCE], float("-inf"), logits.dtype.element_ty)
    tl.store(logits + n * VOCAB + column, minus_infinity, mask=inside & forbidden)


def reference(logits: Tensor, masks: Tensor) -> None:
    logits.masked_fill_(~unpacked(masks, logits.shape[1]), float("-inf"))


def upload(masks: list[bytes], device: torch.device) -> Tensor:
    """[n, words] int32, copied beside the work under way; the masks are equally long."""
    import ctypes

    words = len(masks[0]) // 4
    # PyTorch gives this memory to nobody else until the copy has run.
    host = torch.empty((len(masks), words), dtype=torch.int32, pin_memory=device.type == "cuda")
    for index, mask in enumerate(masks):
        ctypes.memmove(host.data_ptr() + index * 4 * words, mask, 4 * words)
    return host.to(device, non_blocking=True)
