"""Sampling of rows whose logits are changed first (adjustments.py).

Such rows are drawn again after the step's own sampler, with the same noise: rows that change nothing pay nothing.
`_note` counts each new token where it was sampled, so that nothing waits for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels.gpu.adjustments import BAD_WORDS, ENTRIES, HEADER, Adjustments, mask_words, record_words
from octavo_engine.kernels.gpu.sample import (
    LANES,
    SLICE,
    SamplingScratch,
    SamplingState,
    _noisy_best,
    _pick,
    arrangement,
    pick_sizes,
)


def sample_adjusted(
    logits: Tensor, special: Tensor, masks: Tensor, tokens: Tensor, rows: Tensor, positions: Tensor,
    state: SamplingState, adjustments: Adjustments, scratch: SamplingScratch, token_ids: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Draw the rows `special` of a step again; the rest is as for `sample`, whose draws of these rows are overwritten.

    special: [m, SPECIAL_WORDS] int32. masks: [>= 1, mask_words(vocab)] int32, of grammars; bit i of word w stands for
    id 32 * w + i. Logits are left as they are: log-probabilities are told of what the model gave.
    """
    m, vocab = special.shape[0], logits.shape[1]
    changes = (special, masks, adjustments.records, adjustments.words)
    sizes = {"RECORD": record_words(vocab), "MASK": mask_words(vocab), "ENTRIES": ENTRIES, "HEADER": HEADER}
    _note[(m,)](
        special, adjustments.records, adjustments.words, tokens, rows, positions, token_ids, token_ids.stride(0),
        VOCAB=vocab, BAD_WORDS=BAD_WORDS, num_warps=4, **sizes,
    )  # fmt: skip
    drawn = (logits, *changes, tokens, rows, positions, *state.of_rows, *scratch.of_parts)
    # Eight tokens of a thread at a time, as the code that changes a logit is long.
    _noisy_best[(m, triton.cdiv(vocab, SLICE))](
        *drawn, VOCAB=vocab, AT_ONCE=8, num_warps=LANES // 32, **sizes, **arrangement(vocab)
    )
    _pick[(m,)](
        *drawn, scratch.chosen, token_ids, token_ids.stride(0), token_ids.shape[1], out, UNUSED=0, AT_ONCE=32,
        num_warps=4, **sizes, **pick_sizes(vocab),
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_row"], do_not_specialize_on_alignment=["tokens", "rows", "positions", "special"])
def _note(
    special, records, words, tokens, rows, positions, token_ids, stride_row, VOCAB: tl.constexpr, RECORD: tl.constexpr,
    MASK: tl.constexpr, ENTRIES: tl.constexpr, HEADER: tl.constexpr, BAD_WORDS: tl.constexpr,
):  # fmt: skip
    """Count the newest token of each row, once, and ban what would complete a bad word now."""
    n = tl.program_id(0)
    token = tl.load(tokens + tl.load(special + 3 * n))
    row = tl.load(rows + token).to(tl.int64)
    position = tl.load(positions + token)
    record = records + row * RECORD
    history = token_ids + row * stride_row
    if tl.load(special + 3 * n + 2) != 0:
        if position >= tl.load(record):
            tl.store(record, position + 1)
            newest = tl.load(history + position)
            word = tl.load(words + row * VOCAB + newest).to(tl.int32) & 0xFFFF
            if (word & 0x4000) != 0:
                count = record + HEADER + 3 * ENTRIES + (word & 0x3FFF)
                tl.store(count, tl.load(count) + 1)
                word = word | 0x8000
            else:
                word = 0x8000 | tl.minimum((word & 0x3FFF) + 1, 0x3FFF)
            tl.store(words + row * VOCAB + newest, word.to(tl.int16))
        num_bad = tl.load(record + 5)
        if num_bad > 0:
            # Lanes are words; each compares its tokens but the last with the output's end, the oldest first.
            lane = tl.arange(0, BAD_WORDS)
            is_word = lane < num_bad
            starts = record + HEADER + 4 * ENTRIES + MASK
            begin = tl.load(starts + lane, mask=is_word, other=0)
            before = tl.load(starts + lane + 1, mask=is_word, other=1) - begin - 1
            first = position + 1 - before
            matches = is_word & (first >= tl.load(record + 1))
            for index in range(tl.load(record + 6)):
                inside = matches & (index < before)
                wanted = tl.load(starts + 2 * BAD_WORDS + 1 + begin + index, mask=inside, other=0)
                found = tl.load(history + first + index, mask=inside, other=0)
                matches = matches & ((wanted == found) | (index >= before))
            entry = tl.load(starts + BAD_WORDS + 1 + lane, mask=matches, other=0)
            tl.store(record + HEADER + 2 * ENTRIES + entry, position + 1 + tl.zeros_like(entry), mask=matches)
