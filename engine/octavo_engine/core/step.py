"""One step as plain data: what the scheduler decides and the runner does.

Everything a runner (or the worker of another rank) needs is in here; it keeps rows of state between steps and
receives only what changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo_engine.core.blocks import BlockId
from octavo_engine.core.messages import TokenLogprobs
from octavo_engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Admission:
    """A request enters (or, after preemption, enters again) a row of the runner's state.

    tokens: prompt and, after preemption, the output so far. min_tokens_ids: tokens that may not be sampled before
    min_tokens of output (the end tokens). seed is resolved: equal seeds give equal outputs whatever the batch.
    """

    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    min_tokens_ids: tuple[int, ...]
    seed: int


@dataclass(slots=True)  # not frozen: a thousand are made in a step, and freezing one takes a microsecond
class StepItem:
    """`count` tokens of the request in `row`, from position `start`; blocks are appended to the row's table first.

    samples: the item ends at the request's last token, so the step yields its next one.
    num_scored: of so many of its tokens, from the first, the logits tell what the prompt's next token was worth.
    mask: the tokens that may be sampled, one bit each (core/constraint.py); None: any.
    """

    row: int
    start: int
    count: int
    new_blocks: list[BlockId]
    samples: bool
    admission: Admission | None = None
    num_scored: int = 0
    mask: bytes | None = None


@dataclass(frozen=True)
class StepPlan:
    """Decodes (count 1) come before prefill chunks, so that the runner can treat each group as one batch."""

    items: list[StepItem] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.count for item in self.items)


@dataclass(frozen=True)
class Sampled:
    """What a step gave: the next token of each item that samples, in order; -1 where logits were not finite.

    logprobs: None, or for each of them what its request asked for. scores: of the prompts' tokens, num_scored for each
    item, in order.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    scores: list[TokenLogprobs] = field(default_factory=list)
