"""Log-probabilities of a step's tokens: asked of the device with the step, read when its result is taken.

Of tokens that are sampled, and of prompts' tokens (*scores*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_engine.core.messages import TokenLogprobs
from octavo_engine.core.step import Admission, StepItem
from octavo_engine.kernels import sampling


@dataclass(frozen=True)
class Chances:
    """Of sampled item `index`: tensors on the device."""

    index: int
    logprob: Tensor
    rank: Tensor
    ids: Tensor
    values: Tensor


def start_logprobs(logits: Tensor, tokens: Tensor, asked: Sequence[int | None]) -> list[Chances]:
    """logits: [n, vocab] of the items that sample, tokens: [n], asked: what each one's request wants."""
    indices = [index for index, count in enumerate(asked) if count is not None]
    if not indices:
        return []
    whole = len(indices) == len(asked)
    rows, chosen = (logits, tokens) if whole else (logits[indices], tokens[indices])
    found = sampling.logprobs(rows, chosen, [asked[index] or 0 for index in indices])
    return [Chances(index, *of) for index, of in zip(indices, found, strict=True)]


def read_logprobs(started: Sequence[Chances], count: int) -> list[TokenLogprobs | None] | None:
    """Waits for the device. None when nobody asked."""
    if not started:
        return None
    read: list[TokenLogprobs | None] = [None] * count
    for c in started:
        top = list(zip(c.ids.tolist(), c.values.tolist(), strict=True))
        read[c.index] = TokenLogprobs(float(c.logprob), int(c.rank), top)
    return read


Scores = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a few tokens of a prompt, on the device: see sampling.token_logprobs."""


def start_scores(
    items: Sequence[StepItem], admissions: dict[int, Admission], logits_of: Callable[[int, int], Tensor]
) -> list[Scores]:
    """The log-probabilities that prompts of this step asked for.

    logits_of(first, end): logits of the step's tokens with these indices; asked for a few at a time.
    """
    return [scores for first, item in _placed(items) for scores in _start_item(first, item, admissions, logits_of)]


def read_scores(started: Sequence[Scores]) -> list[TokenLogprobs]:
    """Waits for the device."""
    read = []
    for chosen, ranks, ids, values in started:
        tops = (list(zip(*of, strict=True)) for of in zip(ids.tolist(), values.tolist(), strict=True))
        read += [TokenLogprobs(*of) for of in zip(chosen.tolist(), ranks.tolist(), tops, strict=True)]
    return read


def _placed(items: Sequence[StepItem]) -> Iterator[tuple[int, StepItem]]:
    """Each item with the index of its first token among the step's."""
    first = 0
    for item in items:
        yield first, item
        first += item.count


def _start_item(
    first: int, item: StepItem, admissions: dict[int, Admission], logits_of: Callable[[int, int], Tensor]
) -> Iterator[Scores]:
    admission = admissions[item.row]
    for at in range(0, item.num_scored, sampling.LOGPROB_ROWS):
        many = min(item.num_scored - at, sampling.LOGPROB_ROWS)
        logits = logits_of(first + at, first + at + many)
        # A token's logits tell of the one after it.
        start = item.start + at + 1
        tokens = torch.tensor(admission.tokens[start : start + many], device=logits.device)
        yield sampling.token_logprobs(logits, tokens, admission.sampling.prompt_logprobs or 0)
