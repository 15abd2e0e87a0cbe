"""One sequence on its way through the engine.

Life of a request:
1. waiting: no blocks, no row, num_computed 0.
2. running: holds a row of the runner's state and the blocks of its computed tokens (and of the next chunk).
3. back to waiting, if preempted: blocks and row given up; its tokens are computed again, mostly from the cache.
4. finished: finish_reason set, nothing held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo_engine.core.blocks import BlockHash, BlockId
from octavo_engine.core.constraint import Constraint
from octavo_engine.core.messages import FinishReason, Submit, TokenLogprobs
from octavo_engine.sampling_params import SamplingParams


@dataclass(eq=False)
class Request:
    """tokens: prompt and output, as far as known. num_computed: those with keys and values in the cache."""

    id: str
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    end_token_ids: frozenset[int]
    """Tokens that end the output."""
    priority: int
    cache_salt: str | None
    arrival: int
    """Counts submissions: the order of requests with equal priority."""
    arrival_s: float
    seed: int

    num_computed: int = 0
    """Tokens of the steps that were planned so far: a step that still runs counts, as later ones run after it."""
    num_pending: int = 0
    """Tokens that planned steps sample and whose ids are not known here yet."""
    blocks: list[BlockId] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    """Of the full blocks of `tokens`; may be longer than the cached part of `blocks`, never longer than tokens."""
    num_hashed: int = 0
    """Leading blocks that were offered to the pool's cache."""
    row: int | None = None
    admitted: bool = False
    """The runner has this row's tokens and sampling parameters."""
    finish_reason: FinishReason | None = None
    num_cached_prompt: int | None = None
    """Prompt tokens found in the prefix cache when it first ran; None before."""
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    num_preemptions: int = 0
    constraint: Constraint | None = None
    scores: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as known, when sampling.prompt_logprobs asks for them."""

    @classmethod
    def of(cls, submit: Submit, arrival: int, now: float, seed: int) -> Request:
        ends = submit.sampling.stop_token_ids + (() if submit.sampling.ignore_eos else submit.eos_token_ids)
        return cls(
            id=submit.request_id, tokens=list(submit.prompt_token_ids), num_prompt=len(submit.prompt_token_ids),
            sampling=submit.sampling, end_token_ids=frozenset(ends), priority=submit.priority,
            cache_salt=submit.cache_salt, arrival=arrival, arrival_s=now, seed=seed,
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        """Known tokens and pending ones."""
        return len(self.tokens) + self.num_pending

    @property
    def num_output(self) -> int:
        """Known tokens of the output."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def awaits_token(self) -> bool:
        """Whether a step can do nothing for it now: its grammar has yet to see the last token, or lets none follow."""
        c = self.constraint
        return c is not None and (self.num_pending > 0 or not c.ready or c.complete or c.error is not None)

    @property
    def num_unscored(self) -> int:
        """Log-probabilities of prompt tokens that are asked for and not known yet."""
        return 0 if self.sampling.prompt_logprobs is None else self.num_prompt - 1 - len(self.scores)

    @property
    def order(self) -> tuple[int, int]:
        """Smaller is served first and preempted last."""
        return (self.priority, self.arrival)

    def check(self) -> None:
        """Assert what holds between steps."""
        assert 0 <= self.num_computed <= self.num_tokens, (self.id, self.num_computed, self.num_tokens)
        assert self.num_pending >= 0, (self.id, self.num_pending)
        if self.row is None:
            assert not self.blocks, f"{self.id} holds blocks without a row"
            assert self.num_computed == 0, f"{self.id} has computed tokens without blocks"
        if self.finish_reason is not None:
            assert self.row is None, f"{self.id} is finished and holds a row"
