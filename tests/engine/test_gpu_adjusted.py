"""Rows with penalties, biases, bans and masks, and log-probabilities, on a GPU or in the interpreter."""

# ruff: noqa: E402 - whether kernels are interpreted is decided before they are imported

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before the modules below are imported

pytest.importorskip("triton")

from octavo_engine.core.step import Admission
from octavo_engine.kernels import sampling
from octavo_engine.kernels.gpu import logprobs, sample
from octavo_engine.kernels.gpu.adjusted import sample_adjusted
from octavo_engine.kernels.gpu.adjustments import SPECIAL_WORDS, Adjustments, mask_words
from octavo_engine.kernels.sampling import SampleRow
from octavo_engine.runner.records import pack_record, pack_words
from octavo_engine.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
VOCAB, ROWS, LENGTH = 4500, 4, 64
END = 7
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition": {"repetition_penalty": 1.7},
    "presence and frequency": {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    "all penalties, drawn": {
        "repetition_penalty": 0.6, "presence_penalty": -1.0, "frequency_penalty": 1.9, "temperature": 0.8, "top_k": 40,
        "top_p": 0.8,
    },
    "biases": {"logit_bias": {3: 5.5, 8: -100.0, 4499: 4.25}, "temperature": 1.0, "min_p": 0.05},
    "allowed": {"allowed_token_ids": (5, 31, 32, 4499), "temperature": 1.5, "top_p": 0.7},
    "bad words": {"bad_words_ids": ((9,), (11, 12), (13, 14, 15), (12,))},
    "min_tokens": {"min_tokens": 4, "temperature": 0.5, "top_k": 3},
    "a bias of a token that counts": {"logit_bias": {11: 3.0}, "frequency_penalty": 1.0, "repetition_penalty": 1.2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def settings(case: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 50, **case})


class Rows:
    """A row of state, as the runner keeps it."""

    def __init__(self, admission: Admission, row: int) -> None:
        self.admission, self.row = admission, row
        self.state = sample.SamplingState.allocate(ROWS, DEVICE)
        s = admission.sampling
        for name in ("temperature", "top_k", "top_p", "min_p"):
            getattr(self.state, name)[row] = getattr(s, name)
        self.state.seed[row] = admission.seed
        self.adjustments = Adjustments.allocate(ROWS, VOCAB, DEVICE)
        self.adjustments.records[row] = torch.frombuffer(pack_record(admission, VOCAB), dtype=torch.int32)
        words = torch.empty(VOCAB, dtype=torch.int16)
        pack_words(admission, words)
        self.adjustments.words[row] = words
        self.token_ids = torch.full((ROWS, LENGTH), 4444, dtype=torch.int32, device=DEVICE)
        # Tokens of a cached prefix are not there: the record has them.
        self.history = list(admission.tokens)
        self.token_ids[row, admission.num_prompt : len(self.history)] = ints(self.history[admission.num_prompt :])
        self.scratch = sample.SamplingScratch.allocate(3, VOCAB, DEVICE)

    def draw(self, logits: Tensor, mask: Tensor | None = None) -> int:
        """The next token of logits [vocab], which are the second of three rows."""
        batch = torch.randn(3, VOCAB, device=DEVICE).to(DTYPE)
        batch[1] = logits
        before = batch.clone()
        tokens, rows = ints([0, 4, 2]), ints([0, 0, 0, 0, self.row])
        positions = ints([0, 0, 0, 0, len(self.history) - 1])
        masks = torch.zeros(2, mask_words(VOCAB), dtype=torch.int32, device=DEVICE)
        if mask is not None:
            masks[1] = mask
        special = ints([1, -1 if mask is None else 1, 1]).view(1, SPECIAL_WORDS)
        out = ints([-7, -7, -7])
        sample_adjusted(
            batch, special, masks, tokens, rows, positions, self.state, self.adjustments, self.scratch, self.token_ids,
            out,
        )  # fmt: skip
        assert torch.equal(batch.nan_to_num(), before.nan_to_num())
        assert out.tolist()[::2] == [-7, -7]
        return int(out[1])

    def expected(self, logits: Tensor, mask: Tensor | None = None) -> int:
        a, length = self.admission, len(self.history)
        banned = a.min_tokens_ids if length - a.num_prompt < a.sampling.min_tokens else ()
        packed = None if mask is None else mask.cpu()
        row = SampleRow(a.sampling, a.seed, torch.tensor(self.history), a.num_prompt, banned, packed)
        wide = logits.cpu().float()
        sampling._penalize(wide, row)
        s = a.sampling
        values = [torch.tensor([v]) for v in (s.temperature, s.top_k, s.top_p, s.min_p, a.seed, length)]
        forbidden = wide == float("-inf")
        drawn = sample.reference(wide.masked_fill(forbidden, -3e38)[None], *values)
        return int(drawn[0])


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_drawn_from_what_the_reference_changes(name: str):
    rng = random.Random(3)
    tokens = [11, 12, 40, 11, 13, 13, 14, END]
    rows = Rows(Admission(tokens, 4, settings(CASES[name]), (END, 9000), 2**40 + 17), 2)
    assert (rows.admission.sampling.reshapes) == (name != "nothing")
    followed = [11, 13, 14, 12]

    for follow in followed:
        logits = (torch.randn(VOCAB, device=DEVICE) * 2).to(DTYPE)
        # What the case is about is likely, so that it matters whether it is changed.
        for token in (11, 12, 13, 14, 15, END, 9, 40):
            logits[token] = 7.0 + rng.random()
        assert rows.draw(logits) == rows.expected(logits)
        # Another token than the drawn one, so that bad words begin: the device reads its own history.
        rows.token_ids[2, len(rows.history)] = follow
        rows.history.append(follow)


def test_repetition_makes_a_negative_logit_more_negative():
    rows = Rows(Admission([11, 12], 2, settings({"repetition_penalty": 1.7}), (END,), 5), 2)
    logits = torch.full((VOCAB,), -20.0, device=DEVICE, dtype=DTYPE)
    logits[11], logits[4000] = -4.0, -5.0

    assert rows.draw(logits) == rows.expected(logits) == 4000


def test_a_row_that_changes_nothing_is_drawn_as_the_sampler_draws_it():
    logits = (torch.randn(6, VOCAB, device=DEVICE) * 2).to(DTYPE)
    state, scratch = sample.SamplingState.allocate(6, DEVICE), sample.SamplingScratch.allocate(6, VOCAB, DEVICE)
    state.temperature.copy_(torch.tensor([0.0, 0.3, 1.0, 1.7, 1.0, 1.0]))
    state.top_p[4], state.top_k[5] = 0.9, 30
    state.seed.copy_(torch.arange(6) * 2**35 + 3)
    adjustments = Adjustments.allocate(1, VOCAB, DEVICE)
    masks = torch.full((1, mask_words(VOCAB)), -1, dtype=torch.int32, device=DEVICE)
    token_ids = torch.zeros(6, LENGTH, dtype=torch.int32, device=DEVICE)
    rows, positions = ints(range(6)), ints([5, 0, 7, 2, 2, 9])
    special, usual, again = ints([[n, 0, 0] for n in range(6)]), ints([-7] * 6), ints([-7] * 6)

    sample.sample(logits, rows, rows, positions, state, scratch, token_ids, usual)
    sample_adjusted(logits, special, masks, rows, rows, positions, state, adjustments, scratch, token_ids, again)

    assert again.tolist() == usual.tolist()
    assert usual.min() >= 0


def test_a_mask_leaves_the_tokens_of_its_bits_with_and_without_a_record():
    logits = torch.randn(VOCAB, device=DEVICE).to(DTYPE)
    mask = torch.zeros(mask_words(VOCAB), dtype=torch.int32, device=DEVICE)
    mask[3], mask[140] = 0b1000, -(2**31)
    logits[40] = float("nan")  # of a token that the mask leaves out

    for case in (CASES["nothing"], CASES["repetition"]):
        rows = Rows(Admission([99, 5], 1, settings(case), (), 3), 1)
        got = rows.draw(logits, mask)
        assert got in (99, 140 * 32 + 31)
        assert got == rows.expected(logits.nan_to_num(0.0), mask)


def test_what_nothing_is_left_of_gives_no_token():
    logits = torch.randn(VOCAB, device=DEVICE).to(DTYPE)
    nothing = torch.zeros(mask_words(VOCAB), dtype=torch.int32, device=DEVICE)
    rows = Rows(Admission([5], 1, settings({"temperature": 1.0, "top_p": 0.9}), (), 3), 1)

    assert rows.draw(logits, nothing) == -1
    logits[17] = float("nan")
    assert rows.draw(logits) == -1


def test_a_row_without_a_record_reads_none():
    rows = Rows(Admission([11, 12], 1, settings(CASES["repetition"]), (), 3), 2)
    rows.adjustments.words.fill_(-1)
    rows.adjustments.records.fill_(-1)
    logits = torch.randn(3, VOCAB, device=DEVICE).to(DTYPE)
    masks = torch.full((1, mask_words(VOCAB)), -1, dtype=torch.int32, device=DEVICE)
    out = ints([-7] * 3)

    sample_adjusted(
        logits, ints([2, 0, 0]).view(1, 3), masks, ints([0, 1, 2]), ints([0, 0, 2]), ints([0, 0, 1]), rows.state,
        rows.adjustments, rows.scratch, rows.token_ids, out,
    )  # fmt: skip

    assert out.tolist() == [-7, -7, int(logits[2].argmax())]


@pytest.mark.parametrize(("vocab", "count"), [(31, 0), (31, 20), (4096, 3), (9001, 20)])
def test_logprobs_are_those_of_the_reference(vocab: int, count: int):
    logits = (torch.randn(4, vocab, device=DEVICE) * 3).to(DTYPE)
    chosen = ints(torch.randint(0, vocab, (4,)).tolist())
    chosen[3] = -1  # a row that is not finite; nobody reads what is told of it
    places = ints([2, 0, 3])
    told = ints([[-7] * logprobs.TOLD_WORDS] * 3)

    logprobs.logprobs(logits, places, chosen, count, logprobs.LogprobScratch.allocate(3, vocab, DEVICE), told)

    for row, place in zip(told.tolist()[:2], (2, 0), strict=True):
        values, _, ids, best = logprobs.reference(logits[place][None], chosen[place][None], count)
        value, rank, found, theirs = logprobs.read(row)
        assert abs(value - float(values[0])) < 1e-4
        wide = logits[place].float()
        assert rank == 1 + int((wide > wide[int(chosen[place])]).sum())
        assert len(set(found[:count])) == count
        torch.testing.assert_close(torch.tensor(theirs[:count]), best[0].cpu(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(wide[found[:count]], wide[ids[0]])
