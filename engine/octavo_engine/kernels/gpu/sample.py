"""From logits to the next token without a sort and without a float32 copy of the logits.

Three small kernels: `_cutoff` finds, per row, the smallest logit that top-k, top-p and min-p leave (rows that use none
of them cost nothing); `_noisy_best` adds Gumbel noise and finds the best token of each slice of the vocabulary;
`_pick` takes the best slice. The noise is a function of (seed, position, token) alone, so a request draws the same
whatever runs beside it.

The cutoff is exact: 16-bit logits have 65,536 values at most, so sixteen halvings of that range find it. Tokens whose
logits tie with the last one kept are kept too. (Gumbel-max: Maddison et al., "A* Sampling", 2014. Philox: Salmon et
al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SLICE = 4096
"""Tokens of one program of `_noisy_best`; a quarter of them share one call of Philox."""
LANES = 256
"""Calls of Philox at once."""


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
        *common, state.seed, scratch.cutoff, scratch.best, scratch.index, VOCAB=vocab, SLICE=SLICE, LANES=LANES,
        num_warps=4,
    )  # fmt: skip
    _pick[(n,)](
        scratch.best, scratch.index, tokens, rows, positions, token_ids, token_ids.stride(0), token_ids.shape[1], out,
        None, SLICES=slices, SLICES_BLOCK=triton.next_power_of_2(slices), num_warps=1,
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
def _better(best, index, other_best, other_index):
    take = other_best > best  # on a tie the smaller index, which is the first, stays
    return tl.where(take, other_best, best), tl.where(take, other_index, index)


@triton.jit
def _noisy(x, sharpness, bits):
    """x * sharpness with Gumbel noise from uniform bits."""
    # Exponential variates from the side of zero, where floats are dense: -log(1 - u) and for small u its series.
    u = (bits.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponential = tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - tl.minimum(u, 0.99999994)))
    return x * sharpness - tl.log(exponential)


@triton.jit
def _score(base, column, lowest, sharpness, bits, VOCAB: tl.constexpr):
    """Logits with noise from uniform bits; -inf where cut, +inf where not finite."""
    x = tl.load(base + column, mask=column < VOCAB, other=float("-inf")).to(tl.float32)
    bad = (x != x) | (x == float("inf"))
    score = _noisy(x, sharpness, bits)
    score = tl.where((x >= lowest) & (column < VOCAB), score, float("-inf"))
    return tl.where(bad, float("inf"), score)


@triton.jit(do_not_specialize_on_alignment=["tokens", "rows", "positions"])
def _noisy_best(
    logits, tokens, rows, positions, temperatures, seeds, cutoff, best, index, VOCAB: tl.constexpr,
    SLICE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    part = tl.program_id(1)
    token = tl.load(tokens + n)
    row = tl.load(rows + token)
    temperature = tl.load(temperatures + row)
    base = logits + n.to(tl.int64) * VOCAB
    if temperature == 0:
        whole = part * SLICE + tl.arange(0, SLICE)
        x = tl.load(base + whole, mask=whole < VOCAB, other=float("-inf")).to(tl.float32)
        x = tl.where((x != x) | (x == float("inf")), float("inf"), x)
        tl.store(best + n * tl.num_programs(1) + part, tl.max(x, 0))
        tl.store(index + n * tl.num_programs(1) + part, part * SLICE + tl.argmax(x, 0))
    else:
        # In a loop over LANES, as the code of a whole slice at once is 240 KB and waits for its own instructions.
        QUARTER: tl.constexpr = SLICE // 4
        lowest = tl.load(cutoff + n)
        seed = tl.load(seeds + row)
        sharpness = 1.0 / temperature
        zero = tl.zeros([LANES], tl.int32)
        position = zero + tl.load(positions + token) + 1
        top = tl.full([LANES], float("-inf"), tl.float32)
        at = tl.zeros([LANES], tl.int32)
        for start in range(0, QUARTER, LANES):
            lane = start + tl.arange(0, LANES)
            a, b, c, d = tl.philox(seed, part * QUARTER + lane, position, zero, zero)
            column = part * SLICE + lane
            first = _score(base, column, lowest, sharpness, a, VOCAB)
            top, at = _better(top, at, first, column)
            second = _score(base, column + QUARTER, lowest, sharpness, b, VOCAB)
            top, at = _better(top, at, second, column + QUARTER)
            third = _score(base, column + 2 * QUARTER, lowest, sharpness, c, VOCAB)
            top, at = _better(top, at, third, column + 2 * QUARTER)
            fourth = _score(base, column + 3 * QUARTER, lowest, sharpness, d, VOCAB)
            top, at = _better(top, at, fourth, column + 3 * QUARTER)
        chosen = tl.argmax(top, 0)
        tl.store(best + n * tl.num_programs(1) + part, tl.max(top, 0))
        tl.store(index + n * tl.num_programs(1) + part, tl.sum(tl.where(tl.arange(0, LANES) == chosen, at, 0), 0))


@triton.jit(
    do_not_specialize=["stride_row", "max_len"],
    do_not_specialize_on_alignment=["tokens", "rows", "positions", "special"],
)
def _pick(
    best, index, tokens, rows, positions, token_ids, stride_row, max_len, out, special, SLICES: tl.constexpr,
    SLICES_BLOCK: tl.constexpr,
):  # fmt: skip
    """special: the rows of logits that were drawn, as adjusted.py has them; None: all."""
    n = tl.program_id(0)
    part = tl.arange(0, SLICES_BLOCK)
    x = tl.load(best + n * SLICES + part, mask=part < SLICES, other=float("-inf"))
    chosen = tl.argmax(x, 0)
    result = tl.load(index + n * SLICES + chosen)
    top = tl.max(x, 0)
    result = tl.where((top == float("inf")) | (top == float("-inf")), -1, result)
    place = n if special is None else tl.load(special + 3 * n)
    tl.store(out + place, result)
    token = tl.load(tokens + place)
    position = tl.load(positions + token) + 1
    slot = token_ids + tl.load(rows + token).to(tl.int64) * stride_row + position
    tl.store(slot, tl.maximum(result, 0), mask=position < max_len)


def reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """The same draw by sorting; every parameter [n] and of the row's own, position that of the token to come. → [n]"""
    results = []
    for i, row in enumerate(logits.float()):
        if not bool(row.isfinite().all()):
            results.append(-1)
            continue
        if temperature[i] == 0:
            results.append(int(row.argmax()))
            continue
        lowest = reference_cutoff(row, float(temperature[i]), int(top_k[i]), float(top_p[i]), float(min_p[i]))
        score = row * (1.0 / temperature[i]) + gumbel(int(seed[i]), int(position[i]), len(row)).to(row.device)
        results.append(int(score.masked_fill(row < lowest, float("-inf")).argmax()))
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


def gumbel(seed: int, position: int, vocab: int) -> Tensor:
    """The noise of every token at this position, [vocab] float32."""
    mask = 0xFFFFFFFF
    slices = -(-vocab // SLICE)
    quarter = SLICE // 4
    lanes = torch.arange(slices * quarter, dtype=torch.int64)
    counters = [lanes, torch.full_like(lanes, position), torch.zeros_like(lanes), torch.zeros_like(lanes)]
    key = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        high_a, low_a = _wide_product(counters[0], 0xD2511F53)
        high_b, low_b = _wide_product(counters[2], 0xCD9E8D57)
        counters = [high_b ^ counters[1] ^ key[0], low_b, high_a ^ counters[3] ^ key[1], low_a]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    bits = torch.stack(counters).view(4, slices, quarter).transpose(0, 1).reshape(-1)[:vocab]
    u = (bits.float() + 0.5) * 2.3283064365386963e-10
    exponential = torch.where(u < 1e-3, u + 0.5 * u * u, -torch.log(1.0 - u.clamp(max=0.99999994)))
    return -torch.log(exponential)


def _wide_product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers, in int64 without overflow."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)
