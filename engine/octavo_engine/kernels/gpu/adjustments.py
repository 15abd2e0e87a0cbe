"""Changed logits: penalties, biases, bans, lists of allowed ids, a grammar's mask.

No copy of the logits is made: what changes a logit is looked up beside it, each time that it is read. A row of state
has

- a *word* for each id of the vocabulary, 16 bits: SEEN (in the prompt or the output, for the repetition penalty),
  LISTED (it has an entry), and how often the output has it, or the number of its entry;
- a *record*: penalties, entries (bias, until which length it is banned, at which length a bad word bans it, count), ids
  that are allowed, bad words of several tokens.

The host writes both when a request enters its row (runner/records.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def _logits(base, column, inside, changes, length, ENTRIES: tl.constexpr, HEADER: tl.constexpr):
    """float32 logits of these ids as they are to be drawn from; -inf for what must not come, or lies outside.

    base: the row's logits. changes: what `_changes` found, or None where nothing changes them. length: tokens that the
    sequence has."""
    x = tl.load(base + column, mask=inside, other=float("-inf")).to(tl.float32)
    if changes is not None:
        word_row, record, mask, counts, masked, allows, repetition, presence, frequency = changes
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
        x = tl.where(forbidden, float("-inf"), x)
    return x


@triton.jit
def _changes(special, n, masks, records, words, row, VOCAB: tl.constexpr, RECORD: tl.constexpr, MASK: tl.constexpr):
    """What changes the logits of the n-th special row: its words, its record, its mask, and what it says at once."""
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
