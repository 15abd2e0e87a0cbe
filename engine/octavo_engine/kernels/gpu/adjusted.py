"""Sampling of rows whose logits are changed first (adjustments.py).

Such rows are drawn again after the step's own sampler, with the same noise: rows that change nothing pay nothing.
`_note` counts each new token where it was sampled, so that nothing waits for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels.gpu.adjustments import (
    BAD_WORDS,
    ENTRIES,
    HEADER,
    Adjustments,
    _changes,
    _logits,
    mask_words,
    record_words,
)
from octavo_engine.kernels.gpu.sample import (
    LANES,
    SLICE,
    SamplingScratch,
    SamplingState,
    _add_to_chunks,
    _best_chunk,
    _columns,
    _first_largest,
    _is_cut,
    _num_pieces,
    _pick,
    _rate,
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
    _adjusted_best[(m, triton.cdiv(vocab, SLICE))](
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


@triton.jit(do_not_specialize_on_alignment=["tokens", "rows", "positions", "special"])
def _adjusted_best(
    logits, special, masks, records, words, tokens, rows, positions, temperatures, top_ks, top_ps, min_ps, seeds, best,
    index, largests, totals, VOCAB: tl.constexpr, RECORD: tl.constexpr, MASK: tl.constexpr, ENTRIES: tl.constexpr,
    HEADER: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """As sample.py's `_noisy_best`. Eight tokens of a thread at a time, as the code that changes a logit is long."""
    n = tl.program_id(0)
    part = tl.program_id(1)
    place = tl.load(special + 3 * n)
    token = tl.load(tokens + place)
    row = tl.load(rows + token)
    temperature = tl.load(temperatures + row)
    base = logits + place.to(tl.int64) * VOCAB
    length = tl.load(positions + token) + 1
    changes = _changes(special, n, masks, records, words, row, VOCAB, RECORD, MASK)
    greedy = temperature == 0
    rate = _rate(tl.where(greedy, 1.0, temperature))
    largest = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    first = tl.full([LANES], 2147483647, tl.int32)
    for piece in range(0, _num_pieces(part, VOCAB, PIECES, LANES, GROUP), AT_ONCE // GROUP):
        column = _columns(part, piece, AT_ONCE // GROUP, PIECES, LANES, GROUP)
        x = _logits(base, column, column < VOCAB, changes, length, ENTRIES, HEADER)
        if greedy:
            largest, first = _first_largest(x, column, largest, first)
        else:
            largest, total = _add_to_chunks(x, rate, largest, total)
    if greedy:
        top = tl.max(largest, 0)
        found = tl.min(tl.where(largest == top, first, 2147483647), 0)
    else:
        number = part * LANES + tl.arange(0, LANES)
        top, found = _best_chunk(largest, total, rate, tl.load(seeds + row), length, number)
        if _is_cut(tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row), VOCAB):
            at = n * (tl.num_programs(1) * LANES) + number
            tl.store(largests + at, largest)
            tl.store(totals + at, total)
    tl.store(best + n * tl.num_programs(1) + part, top)
    tl.store(index + n * tl.num_programs(1) + part, found)
