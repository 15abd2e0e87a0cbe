"""From logits to the next token without a sort and without a float32 copy of the logits.

Three small kernels: `_cutoff` finds, per row, the smallest logit that top-k, top-p and min-p leave (rows that use none
of them cost nothing); `_noisy_best` finds the best chunk of tokens of each slice of the vocabulary; `_pick` takes the
best of the slices and draws a token of that chunk.

The draw is the largest of logit / temperature + Gumbel noise. The largest of a chunk is itself such a sum, of one noise
and the logarithm of the chunk's summed exponentials (the Gumbel distribution is max-stable), so that a chunk of 128
tokens costs one noise, and only those of the chunk that wins get noise of their own. With noise for every token it was
486 us for 1,000 rows of 128,256, bound by ten rounds of Philox and two logarithms for each; reading them takes 60. The
noise is a function of (seed, position, chunk or token) alone, so a request draws the same whatever runs beside it.

The cutoff is exact: 16-bit logits have 65,536 values at most, so sixteen halvings of that range find it. Tokens whose
logits tie with the last one kept are kept too. (Gumbel-max: Maddison et al., "A* Sampling", 2014. Philox: Salmon et
al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES, CHUNK = 128, 128
"""Chunks of a slice and tokens of a chunk. An H200 has time for 13 instructions a token while it reads them: drawing is
11.5, of which 2.5 are a chunk's noise and its comparison with others, and would be 5 for chunks of 64 tokens."""
SLICE = LANES * CHUNK
LEAST: tl.constexpr = tl.constexpr(-3e38)
"""Less than logits in units of log 2, where minus infinity would make differences to it NaN."""


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


@dataclass(frozen=True)
class SamplingScratch:
    cutoff: Tensor  # [n] float32
    best: Tensor  # [n, slices] float32
    index: Tensor  # [n, slices] int32

    @classmethod
    def allocate(cls, n: int, vocab: int, device: torch.device) -> SamplingScratch:
        slices = triton.cdiv(vocab, SLICE)
        return cls(
            torch.empty(n, dtype=torch.float32, device=device),
            torch.empty(n, slices, dtype=torch.float32, device=device),
            torch.empty(n, slices, dtype=torch.int32, device=device),
        )


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
    slices = triton.cdiv(vocab, SLICE)
    common = (logits, tokens, rows, positions, state.temperature)
    _cutoff[(n,)](
        *common, state.top_k, state.top_p, state.min_p, scratch.cutoff, VOCAB=vocab, AT_ONCE=8192, num_warps=16
    )
    _noisy_best[(n, slices)](
        *common, state.seed, scratch.cutoff, scratch.best, scratch.index, VOCAB=vocab, AT_ONCE=32,
        num_warps=LANES // 32, **arrangement(vocab),
    )  # fmt: skip
    _pick[(n,)](
        *common, state.seed, scratch.cutoff, scratch.best, scratch.index, token_ids, token_ids.stride(0),
        token_ids.shape[1], out, None, VOCAB=vocab, SLICES=slices, SLICES_BLOCK=triton.next_power_of_2(slices),
        num_warps=CHUNK // 32, **arrangement(vocab),
    )  # fmt: skip


@triton.jit
def _ordered(x):
    """16-bit floats as integers 0..65535 in the same order."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)


@triton.jit(do_not_specialize_on_alignment=["tokens", "rows", "positions"])
def _cutoff(
    logits, tokens, rows, positions, temperatures, top_ks, top_ps, min_ps, cutoff, VOCAB: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = tl.load(rows + tl.load(tokens + n))
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    lowest = float("-inf")
    cut_k = (top_k > 0) & (top_k < VOCAB)
    if (temperature > 0) & (cut_k | (top_p < 1.0) | (min_p > 0)):
        base = logits + n.to(tl.int64) * VOCAB
        column = tl.arange(0, AT_ONCE)
        most = tl.full([AT_ONCE], float("-inf"), tl.float32)
        for start in range(0, VOCAB, AT_ONCE):
            x = tl.load(base + start + column, mask=start + column < VOCAB, other=float("-inf")).to(tl.float32)
            most = tl.maximum(most, x)
        top = tl.max(most, 0)
        key = 0
        if cut_k:
            bit = 0x8000
            while bit > 0:
                inside = tl.zeros([AT_ONCE], tl.int32)
                for start in range(0, VOCAB, AT_ONCE):
                    x = tl.load(base + start + column, mask=start + column < VOCAB, other=float("-inf"))
                    hit = (_ordered(x) >= (key | bit)) & (start + column < VOCAB)
                    inside += hit.to(tl.int32)
                if tl.sum(inside, 0) >= top_k:
                    key = key | bit
                bit = bit >> 1
        if top_p < 1.0:
            mass = tl.zeros([AT_ONCE], tl.float32)
            for start in range(0, VOCAB, AT_ONCE):
                x = tl.load(base + start + column, mask=start + column < VOCAB, other=float("-inf"))
                weight = tl.exp((x.to(tl.float32) - top) / temperature)
                mass += tl.where(_ordered(x) >= key, weight, 0.0)
            wanted = tl.sum(mass, 0) * top_p
            found = 0
            bit = 0x8000
            while bit > 0:
                candidate = found | bit
                # All that top-k leaves lies at or above its key: there the mass is known to suffice.
                enough = candidate <= key
                if candidate > key:
                    mass = tl.zeros([AT_ONCE], tl.float32)
                    for start in range(0, VOCAB, AT_ONCE):
                        x = tl.load(base + start + column, mask=start + column < VOCAB, other=float("-inf"))
                        weight = tl.exp((x.to(tl.float32) - top) / temperature)
                        mass += tl.where(_ordered(x) >= candidate, weight, 0.0)
                    enough = tl.sum(mass, 0) >= wanted
                if enough:
                    found = candidate
                bit = bit >> 1
            key = tl.maximum(found, key)
        bits = tl.where(key >= 0x8000, key - 0x8000, 0xFFFF - key)
        lowest = bits.to(tl.int16).to(logits.dtype.element_ty, bitcast=True).to(tl.float32)
        # Key 0 is a NaN of negative sign: nothing was cut.
        lowest = tl.where(key == 0, float("-inf"), lowest)
        if min_p > 0:
            lowest = tl.maximum(lowest, top + temperature * tl.log(min_p))
        lowest = tl.minimum(lowest, top)
    tl.store(cutoff + n, lowest)


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
def _add_to_chunks(x, lowest, rate, largest, total):
    """Chunks' largest scaled logits and their sums of 2 ** (scaled - largest), with more of their logits.

    x: [LANES, pieces, GROUP]. A NaN or an infinity makes the sum NaN, cut or not. largest begins with LEAST instead of
    minus infinity, so that differences to it are numbers.
    """
    x = tl.where(x < lowest, float("-inf"), x)
    larger = tl.maximum(largest, tl.max(tl.max(x, 2), 1) * rate)
    weight = tl.exp2(x * rate - larger[:, None, None])
    return larger, total * tl.exp2(largest - larger) + tl.sum(tl.sum(weight, 2), 1)


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
def _best_chunk(largest, total, seed, position, first):
    """The best score of chunks, infinity if a logit is not finite, and the number of its chunk. first: the number of
    the first chunk. largest, total: [LANES], as `_add_to_chunks` has them."""
    number = first + tl.arange(0, largest.shape[0])
    score = largest + tl.log2(total) + _gumbel(seed, position, number, 0)
    score = tl.where(score != score, float("inf"), score)
    top, lane = tl.max(score, 0, return_indices=True)
    return top, first + lane


@triton.jit
def _columns_of_chunk(chunk, PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """In order. → [PIECES * GROUP]"""
    index = tl.arange(0, PIECES * GROUP)
    first = (chunk // LANES * PIECES * LANES + chunk % LANES) * GROUP
    return first + index // GROUP * (LANES * GROUP) + index % GROUP


@triton.jit
def _token_of_chunk(x, column, lowest, rate, seed, position):
    """The token that is drawn of a chunk's finite logits, -inf for what lies behind the vocabulary."""
    score = x * rate + _gumbel(seed, position, column, 1)
    score = tl.where(x >= lowest, score, float("-inf"))
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == tl.argmax(score, 0), column, 0), 0)


@triton.jit(do_not_specialize_on_alignment=["tokens", "rows", "positions"])
def _noisy_best(
    logits, tokens, rows, positions, temperatures, seeds, cutoff, best, index, VOCAB: tl.constexpr,
    PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Of each slice the best score and its chunk; of greedy rows the largest logit and its token.

    AT_ONCE: tokens in a thread's registers. Code of a whole slice waits for its own instructions."""
    n = tl.program_id(0)
    part = tl.program_id(1)
    base = logits + n.to(tl.int64) * VOCAB
    pieces = _num_pieces(part, VOCAB, PIECES, LANES, GROUP)
    token = tl.load(tokens + n)
    row = tl.load(rows + token)
    temperature = tl.load(temperatures + row)
    largest = tl.full([LANES], float("-inf"), tl.float32)
    if temperature == 0:
        first = tl.full([LANES], 2147483647, tl.int32)
        for piece in range(0, pieces, AT_ONCE // GROUP):
            column = _columns(part, piece, AT_ONCE // GROUP, PIECES, LANES, GROUP)
            x = tl.load(base + column, mask=column < VOCAB, other=float("-inf")).to(tl.float32)
            largest, first = _first_largest(x, column, largest, first)
        top = tl.max(largest, 0)
        found = tl.min(tl.where(largest == top, first, 2147483647), 0)
    else:
        lowest = tl.load(cutoff + n)
        seed = tl.load(seeds + row)
        position = tl.load(positions + token) + 1
        rate = _rate(temperature)
        largest = tl.full([LANES], LEAST, tl.float32)
        total = tl.zeros([LANES], tl.float32)
        for piece in range(0, pieces, AT_ONCE // GROUP):
            column = _columns(part, piece, AT_ONCE // GROUP, PIECES, LANES, GROUP)
            x = tl.load(base + column, mask=column < VOCAB, other=float("-inf")).to(tl.float32)
            largest, total = _add_to_chunks(x, lowest, rate, largest, total)
        top, found = _best_chunk(largest, total, seed, position, part * LANES)
    tl.store(best + n * tl.num_programs(1) + part, top)
    tl.store(index + n * tl.num_programs(1) + part, found)


@triton.jit(
    do_not_specialize=["stride_row", "max_len"],
    do_not_specialize_on_alignment=["tokens", "rows", "positions", "special"],
)
def _pick(
    logits, tokens, rows, positions, temperatures, seeds, cutoff, best, index, token_ids, stride_row, max_len, out,
    special, VOCAB: tl.constexpr, SLICES: tl.constexpr, SLICES_BLOCK: tl.constexpr, PIECES: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """special: the rows of logits that were drawn, as adjusted.py has them, whose index holds tokens; None: all, and of
    rows that are not greedy it holds chunks."""
    n = tl.program_id(0)
    part = tl.arange(0, SLICES_BLOCK)
    x = tl.load(best + n * SLICES + part, mask=part < SLICES, other=float("-inf"))
    found = tl.load(index + n * SLICES + part, mask=part < SLICES, other=0)
    place = n if special is None else tl.load(special + 3 * n)
    token = tl.load(tokens + place)
    row = tl.load(rows + token)
    position = tl.load(positions + token) + 1
    top, chosen = tl.max(x, 0, return_indices=True)
    result = tl.sum(tl.where(part == chosen, found, 0), 0)
    if special is None:
        temperature = tl.load(temperatures + row)
        if temperature > 0:
            column = _columns_of_chunk(result, PIECES, LANES, GROUP)
            of_chunk = tl.load(logits + n.to(tl.int64) * VOCAB + column, mask=column < VOCAB, other=float("-inf"))
            result = _token_of_chunk(
                of_chunk.to(tl.float32), column, tl.load(cutoff + n), _rate(temperature), tl.load(seeds + row), position
            )
    result = tl.where((top == float("inf")) | (top == float("-inf")), -1, result)
    tl.store(out + place, result)
    slot = token_ids + row.to(tl.int64) * stride_row + position
    tl.store(slot, tl.maximum(result, 0), mask=position < max_len)


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
