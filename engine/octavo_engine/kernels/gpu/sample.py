"""From logits to the next token without a sort and without a float32 copy of the logits.

Two small kernels: `_noisy_best` finds the best chunk of tokens of each slice of the vocabulary; `_pick` takes the best
of the slices and draws a token of that chunk.

The draw is the largest of logit / temperature + Gumbel noise. The largest of a chunk is itself such a sum, of one noise
and the logarithm of the chunk's summed exponentials (the Gumbel distribution is max-stable), so that a chunk of 128
tokens costs one noise, and only those of the chunk that wins get noise of their own. With noise for every token it was
486 us for 1,000 rows of 128,256, bound by ten rounds of Philox and two logarithms for each; reading them takes 60. The
noise is a function of (seed, position, chunk or token) alone, so a request draws the same whatever runs beside it.

Of a row that top-k, top-p or min-p cut, `_noisy_best` keeps each chunk's largest logit and its sum, and `_pick` chooses
by these: whatever is left lies in the chunks whose largest logits are themselves left, mostly a few dozen of a
thousand, and the smallest logit that is left is looked for in them alone. It is exact: keys of floats are divided by
four until one is left, and where the chosen chunks do not have enough, all are looked through, as those of random
weights. Tokens whose logits tie with the last one kept are kept too. One of 128,256 logits with the tail of Zipf's law
is cut at top-p 0.9 in 30 us; halving the keys of all its logits took 230, and of one with a repetition penalty 3,400
(one H200).

(Gumbel-max: Maddison et al., "A* Sampling", 2014. Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
2011)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_engine.kernels.gpu.adjustments import _changes, _logits

LANES, CHUNK = 128, 128
"""Chunks of a slice and tokens of a chunk. An H200 has time for 13 instructions a token while it reads them: drawing is
11.5, of which 2.5 are a chunk's noise and its comparison with others, and would be 5 for chunks of 64 tokens."""
SLICE = LANES * CHUNK
LEAST: tl.constexpr = tl.constexpr(-3e38)
"""Less than logits in units of log 2, where minus infinity would make differences to it NaN."""
UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Of logits as float32: low bits that are zero."""
COARSE: tl.constexpr = tl.constexpr(1 << 16)
"""Chunks are chosen by so many float32 at a time, as many as have a bfloat16: a few too many do no harm."""
MARGIN: tl.constexpr = tl.constexpr(0.25)
"""Of the mass that top-p cuts off. The tail of Zipf's law with 1.5 has 59 tokens within 0.9 and 105 with the margin; a
thousandth of its tail is in each of their chunks."""


def arrangement(vocab: int) -> dict[str, int]:
    """A slice is PIECES times LANES groups of GROUP tokens, and the groups of a lane are its chunk, so that a thread,
    which is a lane, reads beside its neighbours and sums a chunk by itself.

    A group is read at once: 16 bytes of logits, or fewer where not every row begins at a multiple of those.
    """
    group = math.gcd(vocab, 8)
    return {"PIECES": CHUNK // group, "LANES": LANES, "GROUP": group}


@dataclass(frozen=True)
class SamplingState:
    """Per row of the runner's state, [num_rows]. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor

    @classmethod
    def allocate(cls, rows: int, device: torch.device) -> SamplingState:
        return cls(
            torch.zeros(rows, dtype=torch.float32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.ones(rows, dtype=torch.float32, device=device),
            torch.zeros(rows, dtype=torch.float32, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )

    @property
    def of_rows(self) -> tuple[Tensor, ...]:
        return self.temperature, self.top_k, self.top_p, self.min_p, self.seed


@dataclass(frozen=True)
class SamplingScratch:
    """Of slices and, of rows that are cut, of chunks: 12 bytes for 128 logits."""

    best: Tensor  # [n, slices] float32
    index: Tensor  # [n, slices] int32
    largest: Tensor  # [n, chunks] float32
    total: Tensor  # [n, chunks] float32
    chosen: Tensor  # [n, chunks] int32

    @classmethod
    def allocate(cls, n: int, vocab: int, device: torch.device) -> SamplingScratch:
        slices = triton.cdiv(vocab, SLICE)
        return cls(
            torch.empty(n, slices, dtype=torch.float32, device=device),
            torch.empty(n, slices, dtype=torch.int32, device=device),
            torch.empty(n, slices * LANES, dtype=torch.float32, device=device),
            torch.empty(n, slices * LANES, dtype=torch.float32, device=device),
            torch.empty(n, slices * LANES, dtype=torch.int32, device=device),
        )

    @property
    def of_parts(self) -> tuple[Tensor, ...]:
        return self.best, self.index, self.largest, self.total


def sample(
    logits: Tensor, tokens: Tensor, rows: Tensor, positions: Tensor, state: SamplingState, scratch: SamplingScratch,
    token_ids: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """The next token of each row of logits, -1 where one of them is NaN or infinite.

    logits: [n, vocab] bfloat16 or float16. tokens: [n] int32, the token of the batch that each row came from; rows and
    positions, [num_tokens] int32, say whose and where it is. The result goes to out [n] int32 and to
    token_ids[row, position + 1], [num_rows, max_len] int32, where the next step finds it (0 instead of -1).
    """
    n, vocab = logits.shape
    unchanged = {"RECORD": 0, "MASK": 0, "ENTRIES": 0, "HEADER": 0}
    drawn = (logits, None, None, None, None, tokens, rows, positions, *state.of_rows, *scratch.of_parts)
    _noisy_best[(n, triton.cdiv(vocab, SLICE))](
        *drawn, VOCAB=vocab, AT_ONCE=32, num_warps=LANES // 32, **unchanged, **arrangement(vocab)
    )
    _pick[(n,)](
        *drawn, scratch.chosen, token_ids, token_ids.stride(0), token_ids.shape[1], out,
        UNUSED=UNUSED_BITS[logits.dtype], AT_ONCE=64, num_warps=8, **unchanged, **pick_sizes(vocab),
    )  # fmt: skip


def pick_sizes(vocab: int) -> dict[str, int]:
    slices = triton.cdiv(vocab, SLICE)
    return {
        "VOCAB": vocab, "SLICES": slices, "SLICES_BLOCK": triton.next_power_of_2(slices),
        "CHUNKS_BLOCK": LANES * triton.next_power_of_2(slices), **arrangement(vocab),
    }  # fmt: skip


@triton.jit
def _gumbel(seed, position, number, which: tl.constexpr):
    """Noise in units of log 2, as all scores are. number: [m] int32, a chunk's (which 0) or a token's (which 1)."""
    zero = tl.zeros_like(number)
    bits = tl.philox(seed, number, zero + position, zero + which, zero)[0]
    # Exponential variates from the side of zero, where floats are dense: -log(1 - u) and for small u its series.
    u = (bits.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponential = tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - tl.minimum(u, 0.99999994)))
    return -tl.log2(exponential)


@triton.jit
def _rate(temperature):
    return 1.4426950408889634 / temperature


@triton.jit
def _is_cut(top_k, top_p, min_p, VOCAB: tl.constexpr):
    return ((top_k > 0) & (top_k < VOCAB)) | (top_p < 1.0) | (min_p > 0)


@triton.jit
def _scaled(largest, rate):
    return tl.maximum(largest * rate, LEAST)


@triton.jit
def _add_to_chunks(x, rate, largest, total):
    """Chunks' largest logits and their sums of 2 ** (scaled - largest scaled), with more of their logits.

    x: [chunks, pieces, GROUP]. A NaN or an infinity makes the sum NaN."""
    larger = tl.maximum(largest, tl.max(tl.max(x, 2), 1))
    top = _scaled(larger, rate)
    weight = tl.exp2(x * rate - top[:, None, None])
    return larger, total * tl.exp2(_scaled(largest, rate) - top) + tl.sum(tl.sum(weight, 2), 1)


@triton.jit
def _first_largest(x, column, largest, first):
    """The largest logit of each lane and the first token that has it, with more of them; infinity for what is NaN."""
    x = tl.where(x != x, float("inf"), x)
    larger = tl.max(tl.max(x, 2), 1)
    at = tl.min(tl.min(tl.where(x == larger[:, None, None], column, 2147483647), 2), 1)
    return tl.maximum(largest, larger), tl.where(larger > largest, at, first)


@triton.jit
def _num_pieces(part, VOCAB: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """Of this slice, those with tokens of the vocabulary."""
    return tl.minimum(tl.cdiv(VOCAB - part * (PIECES * LANES * GROUP), LANES * GROUP), PIECES)


@triton.jit
def _columns(part, piece, COUNT: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """The tokens of COUNT of this slice's pieces. → [LANES, COUNT, GROUP]: in this order a lane stays in a thread."""
    group = tl.arange(0, LANES)[:, None] + (part * PIECES + piece + tl.arange(0, COUNT)[None, :]) * LANES
    return group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]


@triton.jit
def _best_chunk(largest, total, rate, seed, position, number):
    """The best score of chunks, infinity if a logit is not finite, and the number of its chunk. number: the chunks',
    [n]; largest, total: as `_add_to_chunks` has them."""
    score = _scaled(largest, rate) + tl.log2(total) + _gumbel(seed, position, number, 0)
    score = tl.where(score != score, float("inf"), score)
    top, at = tl.max(score, 0, return_indices=True)
    return top, tl.sum(tl.where(tl.arange(0, number.shape[0]) == at, number, 0), 0)


@triton.jit
def _columns_of_chunk(chunk, index, PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """The tokens of a chunk with these places in it, in order."""
    first = (chunk // LANES * PIECES * LANES + chunk % LANES) * GROUP
    return first + index // GROUP * (LANES * GROUP) + index % GROUP


@triton.jit
def _token_of_chunk(x, column, lowest, rate, seed, position):
    """The token that is drawn of a chunk's finite logits, -inf for what lies behind the vocabulary."""
    score = x * rate + _gumbel(seed, position, column, 1)
    score = tl.where(x >= lowest, score, float("-inf"))
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == tl.argmax(score, 0), column, 0), 0)


@triton.jit(do_not_specialize_on_alignment=["tokens", "rows", "positions", "special"])
def _noisy_best(
    logits, special, masks, records, words, tokens, rows, positions, temperatures, top_ks, top_ps, min_ps, seeds, best,
    index, largests, totals, VOCAB: tl.constexpr, RECORD: tl.constexpr, MASK: tl.constexpr, ENTRIES: tl.constexpr,
    HEADER: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Of each slice the best score and its chunk; of greedy rows the largest logit and its token; of rows that are cut
    what `_cut` wants of each chunk.

    special: the rows of logits that are drawn, as adjusted.py has them, with what changes them; None: all, as they are.
    AT_ONCE: tokens in a thread's registers. Code of a whole slice waits for its own instructions."""
    n = tl.program_id(0)
    part = tl.program_id(1)
    place = n if special is None else tl.load(special + 3 * n)
    base = logits + place.to(tl.int64) * VOCAB
    pieces = _num_pieces(part, VOCAB, PIECES, LANES, GROUP)
    token = tl.load(tokens + place)
    row = tl.load(rows + token)
    length = tl.load(positions + token) + 1
    temperature = tl.load(temperatures + row)
    changes = None if special is None else _changes(special, n, masks, records, words, row, VOCAB, RECORD, MASK)
    largest = tl.full([LANES], float("-inf"), tl.float32)
    if temperature == 0:
        first = tl.full([LANES], 2147483647, tl.int32)
        for piece in range(0, pieces, AT_ONCE // GROUP):
            column = _columns(part, piece, AT_ONCE // GROUP, PIECES, LANES, GROUP)
            x = _logits(base, column, column < VOCAB, changes, length, ENTRIES, HEADER)
            largest, first = _first_largest(x, column, largest, first)
        top = tl.max(largest, 0)
        found = tl.min(tl.where(largest == top, first, 2147483647), 0)
    else:
        rate = _rate(temperature)
        total = tl.zeros([LANES], tl.float32)
        for piece in range(0, pieces, AT_ONCE // GROUP):
            column = _columns(part, piece, AT_ONCE // GROUP, PIECES, LANES, GROUP)
            x = _logits(base, column, column < VOCAB, changes, length, ENTRIES, HEADER)
            largest, total = _add_to_chunks(x, rate, largest, total)
        number = part * LANES + tl.arange(0, LANES)
        top, found = _best_chunk(largest, total, rate, tl.load(seeds + row), length, number)
        if _is_cut(tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row), VOCAB):
            at = n * (tl.num_programs(1) * LANES) + number
            tl.store(largests + at, largest)
            tl.store(totals + at, total)
    tl.store(best + n * tl.num_programs(1) + part, top)
    tl.store(index + n * tl.num_programs(1) + part, found)


@triton.jit
def _key(x, UNUSED: tl.constexpr):
    """float32 as integers in the same order, without the low bits that no logit uses."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> UNUSED).to(tl.int64)


@triton.jit
def _value(key, UNUSED: tl.constexpr):
    """The float32 of a key."""
    bits = ((key << UNUSED) | tl.where(key < 0, (1 << UNUSED) - 1, 0)).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _quarters(low, high):
    """The keys at a quarter, a half and three quarters of the way."""
    width = high - low
    return low + width // 4, low + 2 * width // 4, low + 3 * width // 4


@triton.jit
def _narrowed(low, high, a, b, c, at_a, at_b, at_c, wanted):
    """Those of five keys in order between which the last one is at which enough is left. at_a: what is left at a."""
    lower = tl.where(at_c >= wanted, c, tl.where(at_b >= wanted, b, tl.where(at_a >= wanted, a, low)))
    upper = tl.where(at_c >= wanted, high, tl.where(at_b >= wanted, c, tl.where(at_a >= wanted, b, a)))
    return lower, upper


@triton.jit
def _choose(chosen, chunk, which):
    """The numbers of these chunks, one after another, where all threads find them. → how many they are"""
    tl.debug_barrier()
    tl.store(chosen + tl.cumsum(which.to(tl.int32), 0) - 1, chunk, mask=which)
    tl.debug_barrier()
    return tl.sum(which.to(tl.int32), 0)


@triton.jit
def _chunks_at(
    base, changes, length, chosen, first, count, VOCAB: tl.constexpr, AT_ONCE: tl.constexpr, ENTRIES: tl.constexpr,
    HEADER: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Logits of AT_ONCE of the `count` chosen chunks, [AT_ONCE, CHUNK], -inf where there are none; their numbers."""
    place = first + tl.arange(0, AT_ONCE)
    number = tl.load(chosen + place, mask=place < count, other=0)
    column = _columns_of_chunk(number[:, None], tl.arange(0, PIECES * GROUP)[None, :], PIECES, LANES, GROUP)
    inside = (place < count)[:, None] & (column < VOCAB)
    return _logits(base, column, inside, changes, length, ENTRIES, HEADER), number


@triton.jit
def _best_left(x, number, lowest, rate, seed, position):
    """`_best_chunk` of chunks [n, CHUNK] without the logits below `lowest`."""
    x = tl.where(x >= lowest, x, float("-inf"))[:, None, :]
    nothing = tl.zeros(number.shape, tl.float32)
    largest, total = _add_to_chunks(x, rate, nothing + float("-inf"), nothing)
    return _best_chunk(largest, total, rate, seed, position, number)


@triton.jit
def _cut(
    base, changes, length, temperature, top_k, top_p, min_p, seed, position, largests, totals, chosen,
    VOCAB: tl.constexpr, SLICES: tl.constexpr, CHUNKS_BLOCK: tl.constexpr, UNUSED: tl.constexpr, AT_ONCE: tl.constexpr,
    ENTRIES: tl.constexpr, HEADER: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The smallest logit that top-k, top-p and min-p leave of a row of finite ones, and the chunk that is drawn then.

    largests, totals: of the row's chunks; chosen: room for their numbers."""
    rate = _rate(temperature)
    chunk = tl.arange(0, CHUNKS_BLOCK)
    largest = tl.load(largests + chunk, mask=chunk < SLICES * LANES, other=float("-inf"))
    top = tl.max(largest, 0)
    scaled_top = top * rate
    cut_k = (top_k > 0) & (top_k < VOCAB)
    cut_p = top_p < 1.0
    inside = chunk < SLICES * LANES
    floor = _key(tl.full([], float("-inf"), tl.float32), UNUSED)
    end = _key(top, UNUSED) + 1
    wanted = top_k.to(tl.float32)
    # `low` is a key at which enough is left, `high` one at which too little is.
    low = floor
    least = tl.where(min_p > 0, tl.minimum(top + temperature * tl.log(min_p), top), float("-inf"))
    threshold = least
    if cut_k | cut_p:
        # Chunks whose largest logits are the k largest of all chunks have k logits that large. For top-p they are to
        # have somewhat more than its mass together, as they also have logits that lie below the last of them.
        weight = tl.full([CHUNKS_BLOCK], 1.0, tl.float32)
        enough = wanted
        if not cut_k:
            total = tl.load(totals + chunk, mask=inside, other=0.0)
            weight = total * tl.exp2(_scaled(largest, rate) - scaled_top)
            mass = tl.sum(weight, 0)
            wanted = top_p * mass
            enough = (top_p + MARGIN * (1.0 - top_p)) * mass
        if (not cut_k) | (top_k <= SLICES * LANES):
            low = _key(tl.min(tl.where(inside, largest, top), 0), UNUSED)
        high = end
        while high - low > COARSE >> UNUSED:
            a, b, c = _quarters(low, high)
            at_a = tl.sum(tl.where(largest >= _value(a, UNUSED), weight, 0.0), 0)
            at_b = tl.sum(tl.where(largest >= _value(b, UNUSED), weight, 0.0), 0)
            at_c = tl.sum(tl.where(largest >= _value(c, UNUSED), weight, 0.0), 0)
            low, high = _narrowed(low, high, a, b, c, at_a, at_b, at_c, enough)
        threshold = _value(low, UNUSED)
    count = _choose(chosen, chunk, (largest >= threshold) & inside)
    # 0: the last logit that top-k leaves is looked for; 1: the mass from `low` on is summed, which is what top-k leaves
    # or, without it, should be enough; 2: where it is not, the mass of all chunks, 1, 4 and 16 units of log e below;
    # 3: the last logit that top-p leaves is looked for; 4: a chunk is drawn. Chunks are read at one place, as that is
    # most of the code, and once where no more than AT_ONCE are chosen.
    turn = tl.where(cut_k, 0, tl.where(cut_p, 1, 4))
    high = end
    held = -1
    x = tl.zeros([AT_ONCE, PIECES * GROUP], tl.float32)
    weight = x
    number = tl.zeros([AT_ONCE], tl.int32)
    lowest = top
    best = float("-inf")
    found = 0
    while turn < 5:
        a, b, c = _quarters(low, high)
        if turn == 1:
            a = low
        if turn == 2:
            a = _key(threshold - 16.0 * temperature, UNUSED)
            b = _key(threshold - 4.0 * temperature, UNUSED)
            c = _key(threshold - temperature, UNUSED)
        from_a, from_b, from_c = _value(a, UNUSED), _value(b, UNUSED), _value(c, UNUSED)
        lowest = tl.maximum(_value(low, UNUSED), least)
        sum_a = tl.zeros([AT_ONCE], tl.float32)
        sum_b = sum_a
        sum_c = sum_a
        for first in range(0, count, AT_ONCE):
            if first != held:
                x, number = _chunks_at(
                    base, changes, length, chosen, first, count, VOCAB, AT_ONCE, ENTRIES, HEADER, PIECES, LANES, GROUP
                )
                weight = tl.exp2(x * rate - scaled_top)
                held = first
            if turn == 4:
                better, there = _best_left(x, number, lowest, rate, seed, position)
                found = tl.where(better > best, there, found)
                best = tl.maximum(better, best)
            else:
                each = tl.where(turn == 0, 1.0, weight)
                sum_a += tl.sum(tl.where(x >= from_a, each, 0.0), 1)
                sum_b += tl.sum(tl.where(x >= from_b, each, 0.0), 1)
                sum_c += tl.sum(tl.where(x >= from_c, each, 0.0), 1)
        at_a = tl.sum(sum_a, 0)
        if turn == 4:
            turn = 5
        elif turn == 1:
            turn = 3
            high = end
            if cut_k:
                wanted = at_a * top_p
            elif at_a < wanted:
                turn = 2
                high = low
                low = floor
                count = _choose(chosen, chunk, inside)
                held = -1
        else:
            low, high = _narrowed(low, high, a, b, c, at_a, tl.sum(sum_b, 0), tl.sum(sum_c, 0), wanted)
            if turn == 2:
                turn = 3
        if ((turn == 0) | (turn == 3)) & (high - low <= 1):
            turn = tl.where((turn == 0) & cut_p, 1, 4)
    return lowest, found


@triton.jit(
    do_not_specialize=["stride_row", "max_len"],
    do_not_specialize_on_alignment=["tokens", "rows", "positions", "special"],
)
def _pick(
    logits, special, masks, records, words, tokens, rows, positions, temperatures, top_ks, top_ps, min_ps, seeds, best,
    index, largests, totals, chosen, token_ids, stride_row, max_len, out, VOCAB: tl.constexpr, RECORD: tl.constexpr,
    MASK: tl.constexpr, ENTRIES: tl.constexpr, HEADER: tl.constexpr, SLICES: tl.constexpr, SLICES_BLOCK: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr, UNUSED: tl.constexpr, AT_ONCE: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """The token of each row, from the best of its slices.

    special: the rows of logits that are drawn, as adjusted.py has them, with what changes them; None: all, as they are.
    UNUSED: low bits that no logit has when it is float32. AT_ONCE: chunks in a program's registers."""
    n = tl.program_id(0)
    part = tl.arange(0, SLICES_BLOCK)
    x = tl.load(best + n * SLICES + part, mask=part < SLICES, other=float("-inf"))
    found = tl.load(index + n * SLICES + part, mask=part < SLICES, other=0)
    place = n if special is None else tl.load(special + 3 * n)
    token = tl.load(tokens + place)
    row = tl.load(rows + token)
    length = tl.load(positions + token) + 1
    top, at = tl.max(x, 0, return_indices=True)
    result = tl.sum(tl.where(part == at, found, 0), 0)
    finite = (top < float("inf")) & (top > float("-inf"))
    temperature = tl.load(temperatures + row)
    if finite & (temperature > 0):
        base = logits + place.to(tl.int64) * VOCAB
        changes = None if special is None else _changes(special, n, masks, records, words, row, VOCAB, RECORD, MASK)
        seed = tl.load(seeds + row)
        top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
        lowest = float("-inf")
        if _is_cut(top_k, top_p, min_p, VOCAB):
            chunks = n * (SLICES * LANES)
            lowest, result = _cut(
                base, changes, length, temperature, top_k, top_p, min_p, seed, length, largests + chunks,
                totals + chunks, chosen + chunks, VOCAB, SLICES, CHUNKS_BLOCK, UNUSED, AT_ONCE, ENTRIES, HEADER, PIECES,
                LANES, GROUP,
            )  # fmt: skip
        column = _columns_of_chunk(result, tl.arange(0, PIECES * GROUP), PIECES, LANES, GROUP)
        of_chunk = _logits(base, column, column < VOCAB, changes, length, ENTRIES, HEADER)
        result = _token_of_chunk(of_chunk, column, lowest, _rate(temperature), seed, length)
    result = tl.where(finite, result, -1)
    tl.store(out + place, result)
    slot = token_ids + row.to(tl.int64) * stride_row + length
    tl.store(slot, tl.maximum(result, 0), mask=length < max_len)


def reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """The same draw by sorting; every parameter [n] and of the row's own, position that of the token to come. → [n]"""
    results = []
    for i, row in enumerate(logits.float().cpu()):
        if not bool(row.isfinite().all()):
            results.append(-1)
            continue
        if temperature[i] == 0:
            results.append(int(row.argmax()))
            continue
        lowest = reference_cutoff(row, float(temperature[i]), int(top_k[i]), float(top_p[i]), float(min_p[i]))
        kept = row.masked_fill(row < lowest, float("-inf")).double() / float(temperature[i])
        columns = chunks(len(row))
        of_chunk = torch.nn.functional.pad(kept, (0, columns.numel() - len(row)), value=float("-inf"))[columns]
        draw = int(seed[i]), int(position[i])
        chunk = int((of_chunk.logsumexp(1) + gumbel(*draw, torch.arange(len(columns)), 0)).argmax())
        score = of_chunk[chunk] + gumbel(*draw, columns[chunk], 1)
        results.append(int(columns[chunk, score.argmax()]))
    return torch.tensor(results, dtype=torch.int32)


def reference_cutoff(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> float:
    """The smallest logit that is kept. row: [vocab] float32"""
    ordered = row.sort(descending=True).values
    kept = len(row)
    if 0 < top_k < kept:
        kept = int((ordered >= ordered[top_k - 1]).sum())
    probs = (ordered[:kept] / temperature).double().softmax(0)
    if top_p < 1.0:
        before = probs.cumsum(0) - probs
        kept = max(int((before < top_p).sum()), 1)
    lowest = float(ordered[kept - 1])
    if min_p > 0:
        lowest = max(lowest, float(ordered[0]) + temperature * float(torch.tensor(min_p).log()))
    return min(lowest, float(ordered[0]))


def chunks(vocab: int) -> Tensor:
    """The tokens of each chunk, in order; of the last slice's chunks some lie behind the vocabulary. → [num, CHUNK]"""
    slices = -(-vocab // SLICE)
    tokens = torch.arange(slices * SLICE).view(slices, -1, LANES, math.gcd(vocab, 8))  # [slices, pieces, lanes, group]
    return tokens.transpose(1, 2).reshape(-1, CHUNK)


def gumbel(seed: int, position: int, numbers: Tensor, which: int) -> Tensor:
    """The noise of these chunks (which 0) or tokens (which 1) at this position. numbers: [n] int64 → [n] float64"""
    mask = 0xFFFFFFFF
    zeros = torch.zeros_like(numbers)
    counters = [numbers, zeros + position, zeros + which, zeros]
    key = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        high_a, low_a = _wide_product(counters[0], 0xD2511F53)
        high_b, low_b = _wide_product(counters[2], 0xCD9E8D57)
        counters = [high_b ^ counters[1] ^ key[0], low_b, high_a ^ counters[3] ^ key[1], low_a]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    u = (counters[0].float() + 0.5) * 2.3283064365386963e-10
    exponential = torch.where(u < 1e-3, u + 0.5 * u * u, -torch.log(1.0 - u.clamp(max=0.99999994)))
    return -torch.log(exponential.double())


def _wide_product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers, in int64 without overflow."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)
