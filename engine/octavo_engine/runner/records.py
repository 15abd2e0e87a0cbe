"""What a request changes in its logits, as the words and the record that kernels/gpu/adjustments.py reads. Pure.

Called by gpu_steps.py when a request enters a row, also after a preemption: then its output so far is counted here.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter

import torch
from torch import Tensor

from octavo_engine.core.step import Admission
from octavo_engine.kernels.gpu.adjustments import (
    BAD_IDS,
    BAD_WORDS,
    ENTRIES,
    FOREVER,
    HEADER,
    LISTED,
    NUMBER,
    SEEN,
    mask_words,
    record_words,
)


def pack_record(admission: Admission, vocab: int) -> array[int]:
    """record_words(vocab) int32 words. Ids that the vocabulary lacks are left out."""
    s, known = admission.sampling, admission.tokens
    entries = _entries(admission, vocab)
    record = array("i", bytes(4 * record_words(vocab)))
    bad = [word for word in s.bad_words_ids if len(word) > 1 and word[-1] in entries]
    record[:HEADER] = array("i", [
        len(known), admission.num_prompt, _bits(s.repetition_penalty), _bits(s.presence_penalty),
        _bits(s.frequency_penalty), len(bad), max((len(word) - 1 for word in bad), default=0),
        int(s.allowed_token_ids is not None),
    ])  # fmt: skip
    counts = Counter(known[admission.num_prompt :])
    for number, (token, (bias, until)) in enumerate(entries.items()):
        at = HEADER + number
        record[at], record[at + ENTRIES], record[at + 3 * ENTRIES] = _bits(bias), until, counts[token]
    at = HEADER + 4 * ENTRIES
    for token in s.allowed_token_ids or ():
        if token < vocab:
            record[at + token // 32] = _signed(record[at + token // 32] | 1 << token % 32)
    at += mask_words(vocab)
    numbers = {token: number for number, token in enumerate(entries)}
    begin = 0
    for index, word in enumerate(bad):
        record[at + index] = begin
        record[at + BAD_WORDS + 1 + index] = numbers[word[-1]]
        ids = at + 2 * BAD_WORDS + 1 + begin
        record[ids : ids + len(word)] = array("i", word)
        begin += len(word)
        record[at + index + 1] = begin
    assert len(bad) <= BAD_WORDS, len(bad)
    assert begin <= BAD_IDS, begin
    return record


def pack_words(admission: Admission, out: Tensor) -> None:
    """The vocabulary's words, into out: [vocab] int16."""
    s, known, vocab = admission.sampling, admission.tokens, out.shape[0]
    out.zero_()
    if s.repetition_penalty != 1.0:
        out[torch.tensor(list(set(known)))] = _signed16(SEEN)
    counts = Counter(known[admission.num_prompt :])
    if counts:
        words = [_signed16(SEEN | min(count, NUMBER)) for count in counts.values()]
        out[torch.tensor(list(counts))] = torch.tensor(words, dtype=torch.int16)
    if entries := list(_entries(admission, vocab)):
        ids = torch.tensor(entries)
        numbers = torch.arange(len(entries), dtype=torch.int16) | LISTED
        out[ids] = numbers | (out[ids] & _signed16(SEEN))


def _entries(admission: Admission, vocab: int) -> dict[int, tuple[float, int]]:
    """Id → its bias, and the length up to which it must not come."""
    s = admission.sampling
    found: dict[int, tuple[float, int]] = {}
    for token, bias in s.logit_bias:
        found[token] = (found.get(token, (0.0, 0))[0] + bias, 0)
    until = admission.num_prompt + s.min_tokens
    bans = [(token, until) for token in admission.min_tokens_ids if s.min_tokens]
    # The last token of a longer bad word is banned from step to step; its entry says when.
    bans += [(word[-1], FOREVER if len(word) == 1 else 0) for word in s.bad_words_ids]
    for token, length in bans:
        bias, before = found.get(token, (0.0, 0))
        found[token] = (bias, max(before, length))
    found = {token: entry for token, entry in found.items() if token < vocab}
    assert len(found) <= ENTRIES, len(found)
    return found


def _bits(value: float) -> int:
    return int(struct.unpack("=i", struct.pack("=f", value))[0])


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def _signed16(word: int) -> int:
    return word - 2**16 if word >= 2**15 else word
