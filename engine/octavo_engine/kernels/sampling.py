"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, one draw.

The draw is a function of (seed, position) alone: a request's output does not depend on what runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_engine.sampling_params import SamplingParams

MASK64 = 2**64 - 1
LOGPROB_ROWS = 32
"""Rows whose log-probabilities are computed at once, so that float32 copies of logits stay small."""


@dataclass(frozen=True)
class SampleRow:
    """One row of logits. history: the prompt's ids and the output's so far, [num_prompt + num_output] on the device."""

    sampling: SamplingParams
    seed: int
    history: Tensor
    num_prompt: int
    banned: tuple[int, ...]
    """Ids that may not come now (end tokens before min_tokens)."""
    mask: Tensor | None = None
    """Ids that may come, packed (unpacked below): [ceil(vocab / 32)] int32 on the device; None: any."""

    @property
    def position(self) -> int:
        return self.history.shape[0]


def reference(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The next token of each row, -1 where the logits hold no finite maximum. logits: [n, vocab] → [n] int64"""
    if all(_plain_greedy(row) for row in rows):
        return _checked(logits, logits.argmax(-1))
    # A copy also of float32: log-probabilities are told of what the model gave.
    logits = logits.to(torch.float32, copy=True)
    for i, row in enumerate(rows):
        _penalize(logits[i], row)
    tokens = logits.argmax(-1)
    finite = _checked(logits, tokens)
    drawn = [i for i, row in enumerate(rows) if not row.sampling.greedy]
    if drawn:
        select = torch.tensor(drawn, device=logits.device)
        chosen = _draw(logits[select], [rows[i] for i in drawn])
        finite[select] = torch.where(finite[select] < 0, finite[select], chosen)
    return finite


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): SplitMix64's output function. (Steele et al., OOPSLA 2014)"""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return ((z ^ (z >> 31)) >> 11) / 2**53


def _plain_greedy(row: SampleRow) -> bool:
    return row.sampling.greedy and not row.sampling.reshapes and not row.banned and row.mask is None


def _checked(logits: Tensor, tokens: Tensor) -> Tensor:
    best = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # argmax of a row with a NaN is the NaN
    return torch.where(best.isfinite(), tokens, -1)


def _penalize(logits: Tensor, row: SampleRow) -> None:
    """In place, [vocab]. Penalties as OpenAI and, for repetition, CTRL define them (Keskar et al., 2019)."""
    s = row.sampling
    if s.repetition_penalty != 1.0:
        seen = row.history.unique().long()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    output = row.history[row.num_prompt :].long()
    if (s.presence_penalty or s.frequency_penalty) and len(output):
        ids, counts = output.unique(return_counts=True)
        logits[ids] -= s.presence_penalty + s.frequency_penalty * counts
    if s.logit_bias:
        ids = torch.tensor([token for token, _ in s.logit_bias], device=logits.device)
        logits.index_add_(0, ids, torch.tensor([bias for _, bias in s.logit_bias], device=logits.device))
    if s.allowed_token_ids is not None:
        allowed = torch.tensor(s.allowed_token_ids, device=logits.device)
        kept = logits[allowed]
        logits.fill_(float("-inf"))
        logits[allowed] = kept
    # A tokenizer may name an end token that the embedding has no row for.
    banned = [token for token in (*row.banned, *_last_of_bad_words(row)) if token < logits.shape[0]]
    if banned:
        logits[banned] = float("-inf")
    if row.mask is not None:
        logits.masked_fill_(~unpacked(row.mask, logits.shape[0]), float("-inf"))


def unpacked(masks: Tensor, vocab: int) -> Tensor:
    """masks: [..., words] int32, the lowest bit of the first word first → [..., vocab] bool"""
    bits = masks.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=masks.device)
    return (bits & 1).bool().flatten(-2)[..., :vocab]


def _last_of_bad_words(row: SampleRow) -> list[int]:
    """Ids that would complete a word that must not come."""
    words = row.sampling.bad_words_ids
    if not words:
        return []
    longest = max(map(len, words)) - 1
    output = row.history[max(row.num_prompt, row.position - longest) :].tolist() if longest else []
    return [word[-1] for word in words if len(word) == 1 or tuple(output[-len(word) + 1 :]) == word[:-1]]


def logprobs(logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each row, on the device: (the token's log-probability, its rank, the likeliest `count` ids, their own).

    logits: [n, vocab] as the model gave them; tokens: [n].
    """
    results = []
    for at in range(0, len(counts), LOGPROB_ROWS):
        few = slice(at, at + LOGPROB_ROWS)
        chosen, ranks, ids, values = token_logprobs(logits[few], tokens[few].long().clamp(min=0), max(counts[few]))
        for i, count in enumerate(counts[few]):
            results.append((chosen[i], ranks[i], ids[i, :count], values[i, :count]))
    return results


def token_logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of n rows at once: the tokens' log-probabilities [n], ranks [n], the likeliest ids and their own [n, count].

    Of equal ones, of which bfloat16 has many, the lower id is first, as in greedy decoding.
    logits: [n, vocab], n at most LOGPROB_ROWS; tokens: [n] int64.
    """
    wide = logits.float().log_softmax(-1)
    chosen = wide.gather(-1, tokens.unsqueeze(-1))
    # None is above zero, so that their magnitudes' bits are in the order of the magnitudes.
    magnitude_then_id = (wide.abs().view(torch.int32).long() << 32) | torch.arange(wide.shape[1], device=wide.device)
    ids = magnitude_then_id.topk(max(count, 1), -1, largest=False).values[:, :count] & 0xFFFFFFFF
    return chosen[:, 0], (wide > chosen).sum(-1) + 1, ids, wide.gather(-1, ids)


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """One token per row by inverting the distribution at the row's number. logits: [n, vocab] float32"""
    device = logits.device
    temperature = torch.tensor([r.sampling.temperature for r in rows], device=device).unsqueeze(1)
    probs = (logits / temperature).softmax(-1)
    numbers = torch.tensor([uniform(r.seed, r.position) for r in rows], device=device, dtype=torch.float32)
    cut = [i for i, r in enumerate(rows) if r.sampling.top_k > 0 or r.sampling.top_p < 1.0 or r.sampling.min_p > 0.0]
    whole = [i for i in range(len(rows)) if i not in set(cut)]
    tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
    if whole:
        select = torch.tensor(whole, device=device)
        tokens[select] = _invert(probs[select], numbers[select])
    if cut:
        select = torch.tensor(cut, device=device)
        ordered, ids = probs[select].sort(-1, descending=True)
        ordered = ordered * _kept(ordered, [rows[i].sampling for i in cut])
        tokens[select] = ids.gather(-1, _invert(ordered, numbers[select]).unsqueeze(-1)).squeeze(-1)
    return tokens


def _kept(ordered: Tensor, sampling: Sequence[SamplingParams]) -> Tensor:
    """[n, vocab] bool over descending probabilities: what top-k, then top-p, then min-p leave; the first always."""
    n, vocab = ordered.shape
    device = ordered.device
    top_k = torch.tensor([s.top_k if s.top_k > 0 else vocab for s in sampling], device=device).unsqueeze(1)
    top_p = torch.tensor([s.top_p for s in sampling], device=device).unsqueeze(1)
    min_p = torch.tensor([s.min_p for s in sampling], device=device).unsqueeze(1)
    kept = torch.arange(vocab, device=device).expand(n, vocab) < top_k
    inside = ordered * kept
    inside = inside / inside.sum(-1, keepdim=True)
    # A token stays while the ones before it have not reached p together.
    kept = kept & (inside.cumsum(-1) - inside < top_p)
    kept = kept & (ordered >= min_p * ordered[:, :1])
    kept[:, 0] = True
    return kept


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """The index where the running sum of weights passes number * total. weights: [n, m], numbers: [n]"""
    # Sums in float64: over 150,000 tokens float32 would round the tail away.
    sums = weights.double().cumsum(-1)
    target = numbers.double().unsqueeze(1) * sums[:, -1:]
    index = torch.searchsorted(sums, target, right=True).squeeze(1)
    # Rounding may land behind the last weight that is not zero.
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)
