"""The kernels' torch references at odd sizes, against the plainest way of saying the same."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_engine.kernels import act_mul, paged_attention, rms_norm, rope_kv_write, sampling
from octavo_engine.kernels.paged_attention import plan_gathers
from octavo_engine.kernels.sampling import SampleRow
from octavo_engine.layers import rotary
from octavo_engine.models.config import RopeConfig
from octavo_engine.sampling_params import SamplingParams

SIZES = [(1, 1), (1, 7), (3, 64), (17, 33), (130, 576)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours: Tensor, naive: Tensor) -> None:
    """Equal up to a rounding or two of ours' type."""
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), naive.double(), atol=4 * eps, rtol=4 * eps)


# ---- small ones


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(rows: int, columns: int, dtype: torch.dtype, with_residual: bool):
    x, weight = noise(rows, columns, dtype=dtype), noise(columns, seed=1, dtype=dtype)
    residual = noise(rows, columns, seed=2, dtype=dtype) if with_residual else None
    total = x if residual is None else x + residual
    naive = torch.stack([row / math.sqrt(float((row * row).mean()) + 1e-5) for row in total.double()])

    normed, summed = rms_norm.reference(x, weight, 1e-5, residual)
    assert torch.equal(summed, total)
    close(normed, naive * weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_rms_norm_over_heads(rows: int, columns: int, dtype: torch.dtype):
    x, weight = noise(rows, 3, columns, dtype=dtype), noise(columns, seed=1, dtype=dtype)
    naive = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()

    close(rms_norm.reference_heads(x, weight, 1e-6), naive)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_act_mul(rows: int, columns: int, dtype: torch.dtype):
    gate, up = noise(rows, columns, dtype=dtype), noise(rows, columns, seed=1, dtype=dtype)
    wide = gate.double()

    close(act_mul.reference(torch.cat([gate, up], -1)), wide / (1 + (-wide).exp()) * up.double())


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_gelu_mul(rows: int, columns: int):
    gate, up = noise(rows, columns, dtype=torch.float32), noise(rows, columns, seed=1, dtype=torch.float32)
    wide = gate.double()
    exact = 0.5 * wide * (1 + torch.erf(wide / 2**0.5))
    nearly = 0.5 * wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))

    for activation, expected in (("gelu", exact), ("gelu_tanh", nearly)):
        ours = act_mul.reference(torch.cat([gate, up], -1), activation)
        # The two are up to 5e-4 apart. Of a gate below zero 1 + erf cancels, which costs more than a rounding or two.
        torch.testing.assert_close(ours.double(), expected * up.double(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_rope_turns_each_pair_by_its_positions_angle_and_stores_keys_and_values(head_dim: int):
    num_heads, kv_heads, block_size, theta = 5, 2, 3, 100.0
    positions = torch.tensor([0, 4, 1, 17])
    query, key = noise(4, num_heads, head_dim), noise(4, kv_heads, head_dim, seed=1)
    value = noise(4, kv_heads, head_dim, seed=2)
    cache = torch.full((2, 6, kv_heads, block_size, head_dim), 9.0)
    blocks, offsets = torch.tensor([5, 0, 5, 2]), torch.tensor([0, 1, 2, 2])
    cos, sin = rotary.tables(RopeConfig(theta, "default", {}), head_dim, 20, torch.device("cpu"))

    def turned(x: Tensor) -> Tensor:
        half = head_dim // 2
        pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
        frequencies = theta ** (-torch.arange(half).double() * 2 / head_dim)
        angles = positions.double()[:, None] * frequencies
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([pairs.real, pairs.imag], -1)

    out = rope_kv_write.reference(
        query, key, value, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1), cache, blocks, offsets
    )
    torch.testing.assert_close(out.double(), turned(query), atol=1e-5, rtol=1e-5)
    for row in range(4):
        torch.testing.assert_close(
            cache[0, blocks[row], :, offsets[row]].double(), turned(key)[row], atol=1e-5, rtol=1e-5
        )
        assert torch.equal(cache[1, blocks[row], :, offsets[row]], value[row])
    assert int((cache != 9.0).any(-1).sum()) == 2 * 4 * kv_heads, "nothing else was written"


# ---- attention


@dataclass
class Paged:
    """Sequences in a cache of scattered blocks. starts, counts: tokens before this step and in it."""

    starts: list[int]
    counts: list[int]
    block_size: int
    num_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 10

    def __post_init__(self) -> None:
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        needed = [-(-end // self.block_size) for end in ends]
        free = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(1)).tolist()
        # What other requests have in their blocks must not matter, nor what is behind the last token.
        self.cache = torch.full((2, len(free), self.kv_heads, self.block_size, self.head_dim), math.nan)
        self.tables = torch.full((len(ends), max(needed) + 2), free[-1])
        self.keys, self.values = [], []
        for index, end in enumerate(ends):
            key = noise(end, self.kv_heads, self.head_dim, seed=2 * index)
            value = noise(end, self.kv_heads, self.head_dim, seed=2 * index + 1)
            for block in range(needed[index]):
                self.tables[index, block] = free.pop(0)
                self.cache[:, self.tables[index, block]] = 3e4
            for position in range(end):
                block = self.tables[index, position // self.block_size]
                self.cache[0, block, :, position % self.block_size] = key[position]
                self.cache[1, block, :, position % self.block_size] = value[position]
            self.keys.append(key)
            self.values.append(value)
        self.query = noise(sum(self.counts), self.num_heads, self.head_dim, seed=99)

    def naive(self, scale: float, window: int | None) -> Tensor:
        """One query, one head at a time."""
        out, row = torch.empty_like(self.query, dtype=torch.float64), 0
        for index, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            for position in range(start, start + count):
                first = 0 if window is None else max(position - window + 1, 0)
                for head in range(self.num_heads):
                    kv_head = head // (self.num_heads // self.kv_heads)
                    key = self.keys[index][first : position + 1, kv_head].double()
                    value = self.values[index][first : position + 1, kv_head].double()
                    weights = (key @ self.query[row, head].double() * scale).softmax(0)
                    out[row, head] = weights @ value
                row += 1
        return out

    def ours(self, scale: float, window: int | None, scratch_bytes: int) -> Tensor:
        block_bytes = 2 * self.kv_heads * self.block_size * self.head_dim * 4
        gathers = plan_gathers(
            self.starts, self.counts, self.tables, self.block_size, self.kv_heads, block_bytes, scratch_bytes
        )
        return paged_attention.reference(self.query, self.cache, gathers, scale, window)


BATCHES = {
    "one token": ([0], [1]),
    "one decode": ([12], [1]),
    "decodes of one length": ([9, 9, 9], [1, 1, 1]),
    "decodes of many lengths": ([0, 1, 2, 3, 7, 8, 9, 30, 31, 64], [1] * 10),
    "a whole prompt": ([0], [37]),
    "a chunk": ([13], [20]),
    "chunks": ([0, 5, 16], [5, 11, 16]),
    "decodes and chunks": ([3, 40, 11, 0, 7, 0], [1, 1, 1, 9, 2, 1]),
}


@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("batch", BATCHES)
def test_attention_sees_what_it_should_and_nothing_else(batch: str, block_size: int, window: int | None):
    paged = Paged(*BATCHES[batch], block_size)

    torch.testing.assert_close(
        paged.ours(0.3, window, 2**30).double(), paged.naive(0.3, window), atol=1e-5, rtol=1e-4
    )  # fmt: skip


@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), [(1, 1, 1), (4, 4, 7), (8, 1, 64), (9, 3, 64)])
def test_attention_in_every_grouping_of_heads(num_heads: int, kv_heads: int, head_dim: int):
    paged = Paged([5, 9, 0], [1, 1, 6], 4, num_heads, kv_heads, head_dim)

    torch.testing.assert_close(paged.ours(0.2, None, 2**30).double(), paged.naive(0.2, None), atol=1e-5, rtol=1e-4)


def test_attention_in_little_memory_gives_the_same():
    paged = Paged([20, 21, 22, 23, 3], [1, 1, 1, 1, 9], 4)

    torch.testing.assert_close(paged.ours(0.3, None, 1).double(), paged.naive(0.3, None), atol=1e-5, rtol=1e-4)


def test_decodes_of_similar_length_share_a_call_and_a_chunk_has_its_own():
    tables = torch.zeros((5, 8), dtype=torch.int64)
    gathers = plan_gathers([60, 63, 3, 0, 62], [1, 1, 1, 8, 1], tables, 8, 2, 1, 2**30)

    assert [(g.num_sequences, g.q_len) for g in gathers] == [(3, 1), (1, 1), (1, 8)]


# ---- sampling


def row(
    history: list[int] | None = None, num_prompt: int = 1, banned: tuple[int, ...] = (), **settings: Any
) -> SampleRow:
    seed = settings.pop("seed", 0)
    tokens = torch.tensor([0] if history is None else history, dtype=torch.int32)
    return SampleRow(SamplingParams(**settings), seed, tokens, num_prompt, banned)


def sample(logits: list[float] | Tensor, **settings: Any) -> int:
    return int(sampling.reference(torch.as_tensor(logits).unsqueeze(0), [row(**settings)])[0])


def drawn(logits: Tensor, count: int = 4000, **settings: Any) -> Counter[int]:
    """How often each token comes, over many seeds."""
    rows = [row(seed=seed, **settings) for seed in range(count)]
    return Counter(sampling.reference(logits.expand(count, -1).clone(), rows).tolist())


def test_the_likeliest_tokens_are_in_their_order_and_of_equal_ones_the_first_come_first():
    logits = torch.full((2, 5000), -3.0, dtype=torch.bfloat16)
    logits[0, [4000, 70, 900, 4321]] = torch.tensor([2.0, 2.0, 2.0, 5.0], dtype=torch.bfloat16)
    logits[1] = float("-inf")
    logits[1, 7] = 1.0

    chosen, ranks, ids, values = sampling.token_logprobs(logits, torch.tensor([70, 7]), 3)

    assert ids.tolist() == [[4321, 70, 900], [7, 0, 1]]
    assert ranks.tolist() == [2, 1]
    assert torch.equal(values, logits.float().log_softmax(-1).gather(-1, ids))
    assert torch.equal(chosen, torch.stack([values[0, 1], values[1, 0]]))
    assert sampling.token_logprobs(logits, torch.tensor([70, 7]), 0)[2].shape == (2, 0)


def test_greedy_takes_the_best_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, -1.0]])

    assert sampling.reference(logits, [row(temperature=0.0)] * 2).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_logits_that_are_not_finite_give_minus_one_and_leave_the_others_alone(bad: list[float], temperature: float):
    logits = torch.tensor([[1.0, 9.0], bad, [9.0, 1.0]])
    rows = [row(temperature=0.0), row(temperature=temperature), row(temperature=0.0)]

    assert sampling.reference(logits, rows).tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"presence_penalty": 2.0}, 1),  # 5 - 2 = 3 < 4
        ({"presence_penalty": 0.5}, 0),
        ({"frequency_penalty": 0.4}, 1),  # 5 - 3 * 0.4 = 3.8 < 4
        ({"frequency_penalty": 0.3}, 0),
        ({"repetition_penalty": 1.3}, 1),  # 5 / 1.3 = 3.8 < 4
        ({"repetition_penalty": 0.5}, 0),
        ({"banned": (0,)}, 1),
        ({"banned": (0, 1)}, 2),
        ({"banned": (0, 999)}, 1),  # an id beyond the vocabulary ended the whole engine
    ],
)
def test_what_was_said_before_is_less_likely(settings: dict[str, Any], expected: int):
    logits = [5.0, 4.0, -1.0]
    assert sample(logits, temperature=0.0, history=(2, 0, 0, 0), num_prompt=1, **settings) == expected


def test_presence_and_frequency_count_the_output_and_repetition_the_prompt_too():
    logits = [5.0, 4.9]
    prompt_only = {"history": (0, 0, 0), "num_prompt": 3}

    assert sample(logits, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0, **prompt_only) == 0
    assert sample(logits, temperature=0.0, repetition_penalty=2.0, **prompt_only) == 1


def test_repetition_makes_a_negative_logit_more_negative():
    assert sample([-1.0, -1.1], temperature=0.0, history=(0,), repetition_penalty=1.2) == 1


def test_tokens_come_as_often_as_their_probabilities_say():
    logits = noise(1, 5, seed=4)
    counts = drawn(logits, temperature=0.7)

    for token, probability in enumerate((logits[0] / 0.7).softmax(0).tolist()):
        deviation = math.sqrt(4000 * probability * (1 - probability))
        assert abs(counts[token] - 4000 * probability) < 4 * deviation


def kept(logits: Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The definition, token by token: the k best, of those the fewest that reach p, of those the ones near the best."""
    probs = logits.double().softmax(0)
    order = sorted(range(len(probs)), key=lambda token: -float(probs[token]))
    best = order[:top_k] if top_k > 0 else order
    total, mass, inside = float(probs[best].sum()), 0.0, set()
    for token in best:
        if mass < top_p * total:
            inside.add(token)
        mass += float(probs[token])
    return {token for token in inside if float(probs[token]) >= min_p * float(probs[order[0]])}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, 1.0, 0.0), (3, 1.0, 0.0), (99, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.9, 0.0), (0, 1e-6, 0.0), (0, 1.0, 0.2),
     (0, 1.0, 1.0), (4, 0.8, 0.0), (-1, 0.9, 0.1), (3, 0.7, 0.3)],
)  # fmt: skip
@pytest.mark.parametrize(("vocab", "temperature"), [(1, 1.0), (7, 0.5), (50, 2.0)])
def test_exactly_the_tokens_that_the_cuts_leave_can_come(
    top_k: int, top_p: float, min_p: float, vocab: int, temperature: float
):
    logits = noise(vocab, seed=vocab) * 1.5  # once divided by the temperature, as the cuts see them
    expected = kept(logits, top_k, top_p, min_p)
    settings = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    counts = drawn(logits.unsqueeze(0) * temperature, **settings)
    probs = logits.softmax(0)
    likely = {t for t in expected if float(probs[t]) / float(probs[list(expected)].sum()) > 0.01}

    assert set(counts) <= expected
    assert likely <= set(counts)


def test_a_draw_depends_on_the_seed_and_the_position_and_on_nothing_beside_it():
    logits = noise(1, 300, seed=8)
    alone = [sample(logits[0], seed=seed, history=(0,) * length) for seed in range(20) for length in (1, 2)]
    rows = [row(seed=seed, history=(0,) * length) for seed in range(20) for length in (1, 2)]
    others = [row(temperature=0.0), row(top_k=5), row(top_p=0.5, seed=3), row(presence_penalty=1.0, history=(1, 2))]
    mixed = [r for pair in zip(rows, others * 10, strict=True) for r in pair]
    together = sampling.reference(logits.expand(80, -1).clone(), mixed).tolist()

    assert together[::2] == alone
    assert len(set(alone)) > 20


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_the_numbers_behind_the_draws_are_spread_over_all_of_zero_to_one(seed: int):
    numbers = [sampling.uniform(seed, position) for position in range(2000)]

    assert all(0 <= number < 1 for number in numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert min(tenths.values()) > 140
    assert len(set(numbers)) == 2000


def test_a_masked_token_never_comes_and_the_logits_stay_as_they_were():
    logits = noise(1, 40, seed=1)
    logits[0, 3] = 9.0
    before = logits.clone()
    masked = replace(row(temperature=0.0), mask=torch.tensor([0b110000, 0], dtype=torch.int32))

    (token,) = sampling.reference(logits, [masked]).tolist()

    assert token == (4 if before[0, 4] > before[0, 5] else 5)
    assert torch.equal(logits, before)
    drawn_ones = {
        sampling.reference(logits, [replace(masked, sampling=SamplingParams(), seed=s)]).item() for s in range(50)
    }
    assert drawn_ones == {4, 5}


def test_a_token_of_no_probability_never_comes():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])

    assert set(drawn(logits, count=500)) == {0, 2}
    assert set(drawn(logits, count=500, top_p=0.99)) == {0, 2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_sixteen_bits_are_sampled_as_wide_ones(dtype: torch.dtype):
    logits = noise(1, 100, seed=3).to(dtype)
    rows = [row(seed=seed, top_p=0.9) for seed in range(50)]

    narrow = sampling.reference(logits.expand(50, -1).clone(), rows)
    assert torch.equal(narrow, sampling.reference(logits.float().expand(50, -1).clone(), rows))
