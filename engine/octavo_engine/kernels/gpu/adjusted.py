"""Sampling of rows whose logits are changed first: penalties, biases, bans, lists of allowed ids, a grammar's mask.

No copy of the logits is made: what changes a logit is looked up beside it, each time that it is read. A row of state
has

- a *word* for each id of the vocabulary, 16 bits: SEEN (in the prompt or the output, for the repetition penalty),
  LISTED (it has an entry), and how often the output has it, or the number of its entry;
- a *record*: penalties, entries (bias, until which length it is banned, at which length a bad word bans it, count), ids
  that are allowed, bad words of several tokens.

The host writes both when a request enters its row (runner/records.py); afterwards `_note` counts each new token where
it was sampled, so that nothing waits for the host. Such rows are drawn again after the step's own sampler, with the
same noise: rows that change nothing pay nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels.gpu.sample import (
    CHUNK,
    LANES,
    LEAST,
    SLICE,
    SamplingScratch,
    SamplingState,
    _add_to_chunks,
    _best_chunk,
    _columns,
    _columns_of_chunk,
    _first_largest,
    _num_pieces,
    _pick,
    _rate,
    _token_of_chunk,
    arrangement,
)

SEEN, LISTED, NUMBER = 0x8000, 0x4000, 0x3FFF
"""Of a word. Counts stop at 16,383."""
ENTRIES = 3072
"""Ids with an entry, at most: 1,024 biases, 1,024 stop ids and the model's own, 512 last tokens of bad words."""
BAD_WORDS, BAD_IDS = 512, 4096
"""Bad words of several tokens, and their tokens."""
HEADER = 8
"""counted, prompt tokens, repetition, presence, frequency, bad words, tokens of the longest less one, allowed."""
SPECIAL_WORDS = 3
"""Of a row to be drawn again: its place among the rows of logits, its mask or -1, whether its record counts."""
FOREVER = 2**31 - 1


def mask_words(vocab: int) -> int:
    return -(-vocab // 32)


def record_words(vocab: int) -> int:
    return HEADER + 4 * ENTRIES + mask_words(vocab) + 2 * BAD_WORDS + 1 + BAD_IDS


@dataclass(frozen=True)
class Adjustments:
    """Per row of the runner's state. words: [rows, vocab] int16; records: [rows, record_words(vocab)] int32."""

    words: Tensor
    records: Tensor

    @classmethod
    def allocate(cls, rows: int, vocab: int, device: torch.device) -> Adjustments:
        return cls(
            torch.zeros(rows, vocab, dtype=torch.int16, device=device),
            torch.zeros(rows, record_words(vocab), dtype=torch.int32, device=device),
        )


def adjustment_bytes(rows: int, vocab: int) -> int:
    return rows * (2 * vocab + 4 * record_words(vocab))


def sample_adjusted(
    logits: Tensor, special: Tensor, masks: Tensor, tokens: Tensor, rows: Tensor, positions: Tensor,
    state: SamplingState, adjustments: Adjustments, scratch: SamplingScratch, token_ids: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Draw the rows `special` of a step again; the rest is as for `sample`, whose draws of these rows are overwritten.

    special: [m, SPECIAL_WORDS] int32. masks: [>= 1, mask_words(vocab)] int32, of grammars; bit i of word w stands for
    id 32 * w + i. Logits are left as they are: log-probabilities are told of what the model gave.
    """
    m, vocab = special.shape[0], logits.shape[1]
    slices = triton.cdiv(vocab, SLICE)
    common = (logits, special, masks, adjustments.records, adjustments.words, tokens, rows, positions)
    drawn = (state.temperature, state.seed, scratch.cutoff, scratch.best, scratch.index)
    sizes = {
        "VOCAB": vocab, "RECORD": record_words(vocab), "MASK": mask_words(vocab), "ENTRIES": ENTRIES, "HEADER": HEADER,
    }  # fmt: skip
    _note[(m,)](
        special, adjustments.records, adjustments.words, tokens, rows, positions, token_ids, token_ids.stride(0),
        BAD_WORDS=BAD_WORDS, num_warps=4, **sizes,
    )  # fmt: skip
    _adjusted_cutoff[(m,)](
        *common, state.temperature, state.top_k, state.top_p, state.min_p, scratch.cutoff, AT_ONCE=4096, num_warps=16,
        **sizes,
    )  # fmt: skip
    _adjusted_best[(m, slices)](
        *common, *drawn, AT_ONCE=8, num_warps=LANES // 32, **sizes, **arrangement(vocab),
    )  # fmt: skip
    _pick[(m,)](
        logits, tokens, rows, positions, *drawn, token_ids, token_ids.stride(0), token_ids.shape[1], out, special,
        VOCAB=vocab, SLICES=slices, SLICES_BLOCK=triton.next_power_of_2(slices), num_warps=CHUNK // 32,
        **arrangement(vocab),
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


@triton.jit
def _adjusted(
    base, column, inside, word_row, record, mask, counts, masked, allows, length, repetition, presence, frequency,
    ENTRIES: tl.constexpr, HEADER: tl.constexpr,
):  # fmt: skip
    """float32 logits of these ids as they are to be drawn from; -inf for what must not come. base: the row's logits."""
    x = tl.load(base + column, mask=inside, other=float("-inf")).to(tl.float32)
    word = tl.load(word_row + column, mask=inside & counts, other=0).to(tl.int32)
    listed = (word & 0x4000) != 0
    number = word & 0x3FFF
    entry = record + HEADER + number
    count = tl.where(listed, tl.load(entry + 3 * ENTRIES, mask=listed, other=0), number)
    bias = tl.load(entry, mask=listed, other=0).to(tl.float32, bitcast=True)
    until = tl.load(entry + ENTRIES, mask=listed, other=0)
    banned_at = tl.load(entry + 2 * ENTRIES, mask=listed, other=-1)
    x = tl.where((word & 0x8000) != 0, tl.where(x > 0, x / repetition, x * repetition), x)
    x = x - tl.where(count > 0, presence + frequency * count.to(tl.float32), 0.0)
    x = x + bias
    allowed = tl.load(record + HEADER + 4 * ENTRIES + column // 32, mask=inside & allows, other=-1)
    allowed = allowed & tl.load(mask + column // 32, mask=inside & masked, other=-1)
    forbidden = (length < until) | (banned_at == length) | (((allowed >> (column % 32)) & 1) == 0)
    return tl.where(forbidden, float("-inf"), x)


@triton.jit
def _header(special, n, masks, records, words, row, VOCAB: tl.constexpr, RECORD: tl.constexpr, MASK: tl.constexpr):
    """What `_adjusted` needs of a row."""
    which = tl.load(special + 3 * n + 1)
    counts = tl.load(special + 3 * n + 2) != 0
    record = records + row.to(tl.int64) * RECORD
    one = 0x3F800000  # 1.0
    repetition = tl.load(record + 2, mask=counts, other=one).to(tl.float32, bitcast=True)
    presence = tl.load(record + 3, mask=counts, other=0).to(tl.float32, bitcast=True)
    frequency = tl.load(record + 4, mask=counts, other=0).to(tl.float32, bitcast=True)
    allows = tl.load(record + 7, mask=counts, other=0) != 0
    mask = masks + tl.maximum(which, 0).to(tl.int64) * MASK
    word_row = words + row.to(tl.int64) * VOCAB
    return word_row, record, mask, counts, which >= 0, allows, repetition, presence, frequency


@triton.jit
def _in_order(x):
    """float32 as integers in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize_on_alignment=["tokens", "rows", "positions", "special"])
def _adjusted_cutoff(
    logits, special, masks, records, words, tokens, rows, positions, temperatures, top_ks, top_ps, min_ps, cutoff,
    VOCAB: tl.constexpr, RECORD: tl.constexpr, MASK: tl.constexpr, ENTRIES: tl.constexpr, HEADER: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """As sample.py's `_cutoff`, over float32: 32 halvings of its range."""
    n = tl.program_id(0)
    place = tl.load(special + 3 * n)
    token = tl.load(tokens + place)
    row = tl.load(rows + token)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    lowest = float("-inf")
    cut_k = (top_k > 0) & (top_k < VOCAB)
    if (temperature > 0) & (cut_k | (top_p < 1.0) | (min_p > 0)):
        base = logits + place.to(tl.int64) * VOCAB
        length = tl.load(positions + token) + 1
        word_row, record, mask, counts, masked, allows, repetition, presence, frequency = _header(
            special, n, masks, records, words, row, VOCAB, RECORD, MASK
        )
        lane = tl.arange(0, AT_ONCE)
        # 0: the largest; then a pass for each bit of what top-k leaves; one for the mass of that; one for each bit of
        # what top-p leaves. All in one loop: the reading and changing of logits is its longest part.
        top = float("-inf")
        wanted = 0.0
        found = tl.full([], -2147483648, tl.int64)
        of_k = found
        for turn in range(66):
            counting = (turn >= 1) & (turn <= 32)
            weighing = turn == 33
            halving = turn >= 34
            if (turn == 0) | (counting & cut_k) | ((weighing | halving) & (top_p < 1.0)):
                bit = tl.full([], 1, tl.int64) << tl.where(counting, 32 - turn, tl.where(halving, 65 - turn, 0))
                candidate = found + bit
                threshold = tl.where(turn == 33, of_k, candidate).to(tl.int32)
                sums = tl.zeros([AT_ONCE], tl.float32)
                most = tl.full([AT_ONCE], float("-inf"), tl.float32)
                for start in range(0, VOCAB, AT_ONCE):
                    column = start + lane
                    inside = column < VOCAB
                    x = _adjusted(
                        base, column, inside, word_row, record, mask, counts, masked, allows, length, repetition,
                        presence, frequency, ENTRIES, HEADER,
                    )  # fmt: skip
                    if turn == 0:
                        most = tl.maximum(most, x)
                    else:
                        weight = tl.where(counting, 1.0, tl.exp((x - top) / temperature))
                        sums += tl.where((_in_order(x) >= threshold) & inside, weight, 0.0)
                if turn == 0:
                    top = tl.max(most, 0)
                elif weighing:
                    wanted = tl.sum(sums, 0) * top_p
                elif counting:
                    if tl.sum(sums, 0) >= top_k.to(tl.float32):
                        found = candidate
                else:
                    # All that top-k leaves lies at or above its key: there the mass is known to suffice.
                    if (candidate <= of_k) | (tl.sum(sums, 0) >= wanted):
                        found = candidate
            if turn == 32:
                of_k = found
                found = tl.where(top_p < 1.0, -2147483648, found)
        key = tl.maximum(found, of_k)
        bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32)
        lowest = bits.to(tl.float32, bitcast=True)
        # Minus infinity, and the NaNs that come before it: nothing was cut.
        lowest = tl.where(key <= -2139095041, float("-inf"), lowest)
        if min_p > 0:
            lowest = tl.maximum(lowest, top + temperature * tl.log(min_p))
        lowest = tl.minimum(lowest, top)
    tl.store(cutoff + n, lowest)


@triton.jit(do_not_specialize_on_alignment=["tokens", "rows", "positions", "special"])
def _adjusted_best(
    logits, special, masks, records, words, tokens, rows, positions, temperatures, seeds, cutoff, best, index,
    VOCAB: tl.constexpr, RECORD: tl.constexpr, MASK: tl.constexpr, ENTRIES: tl.constexpr, HEADER: tl.constexpr,
    PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """As sample.py's `_noisy_best`, with its chunks and noise; but a token is drawn here, of each slice's best chunk.

    Eight tokens of a thread at a time, as the code that changes a logit is long."""
    n = tl.program_id(0)
    part = tl.program_id(1)
    place = tl.load(special + 3 * n)
    token = tl.load(tokens + place)
    row = tl.load(rows + token)
    temperature = tl.load(temperatures + row)
    base = logits + place.to(tl.int64) * VOCAB
    length = tl.load(positions + token) + 1
    word_row, record, mask, counts, masked, allows, repetition, presence, frequency = _header(
        special, n, masks, records, words, row, VOCAB, RECORD, MASK
    )
    lowest = tl.load(cutoff + n)
    seed = tl.load(seeds + row)
    greedy = temperature == 0
    rate = _rate(tl.where(greedy, 1.0, temperature))
    largest = tl.zeros([LANES], tl.float32) + tl.where(greedy, float("-inf"), LEAST)
    total = tl.zeros([LANES], tl.float32)
    first = tl.full([LANES], 2147483647, tl.int32)
    for piece in range(0, _num_pieces(part, VOCAB, PIECES, LANES, GROUP), AT_ONCE // GROUP):
        column = _columns(part, piece, AT_ONCE // GROUP, PIECES, LANES, GROUP)
        inside = column < VOCAB
        x = _adjusted(
            base, column, inside, word_row, record, mask, counts, masked, allows, length, repetition, presence,
            frequency, ENTRIES, HEADER,
        )  # fmt: skip
        if greedy:
            largest, first = _first_largest(x, column, largest, first)
        else:
            largest, total = _add_to_chunks(x, lowest, rate, largest, total)
    if greedy:
        top = tl.max(largest, 0)
        found = tl.min(tl.where(largest == top, first, 2147483647), 0)
    else:
        top, chunk = _best_chunk(largest, total, seed, length, part * LANES)
        column = _columns_of_chunk(chunk, PIECES, LANES, GROUP)
        inside = column < VOCAB
        x = _adjusted(
            base, column, inside, word_row, record, mask, counts, masked, allows, length, repetition, presence,
            frequency, ENTRIES, HEADER,
        )  # fmt: skip
        found = _token_of_chunk(x, column, lowest, rate, seed, length)
    tl.store(best + n * tl.num_programs(1) + part, top)
    tl.store(index + n * tl.num_programs(1) + part, found)
