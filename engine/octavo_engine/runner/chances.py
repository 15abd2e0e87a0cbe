"""Log-probabilities of a step's tokens: asked of the device with the step, read when its result is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from octavo_engine.core.messages import TokenLogprobs
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
