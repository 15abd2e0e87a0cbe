"""What the API process and the engine process say to each other.

Plain values: the channel encodes them, LLM passes them in-process. One StepOutput carries everything that a step
produced, so the other side wakes once per step and not once per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from msgspec import Struct

from octavo_engine.sampling_params import SamplingParams
from octavo_engine.status import Effective, Failure, Load, Stage


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


NOT_FINITE = "the model's output was not finite"
"""The error of a TokenEvent whose logits held NaN or infinity."""


# ---- to the engine


@dataclass(frozen=True)
class Start:
    """The model's folder is complete on disk: load it."""

    model_path: str
    resolved_revision: str | None = None
    tokenizer_path: str | None = None
    """The folder of its tokenizer, where that is another."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must keep to, in the words of structured/grammar.py, which has checked it.

    after: the text that ends the model's thinking, when the answer begins with it or may: the grammar holds from there.
    opening: the text that begins it; with it, an answer that does not begin so is held to the grammar at once.
    """

    text: str
    after: str | None = None
    opening: str | None = None


@dataclass(frozen=True)
class Submit:
    """One sequence to generate. `n` answers to a prompt are `n` Submits; the prefix cache shares their prompt.

    The API side has checked the prompt: 1 <= len(prompt_token_ids) < max_model_len, every id in the vocabulary.
    eos_token_ids: the model's own end tokens. cache_salt: only requests with the same salt share cached blocks.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Abort:
    """Stop these requests. Ids that are unknown or finished are skipped; each live one ends in one final event."""

    request_ids: list[str]


@dataclass(frozen=True)
class Shutdown:
    """End now, with exit status 0."""


ToEngine = Start | Submit | Abort | Shutdown


# ---- from the engine


@dataclass(frozen=True)
class StageChanged:
    """A stage began or moved on: progress counts bytes where there are bytes, else it stays 0."""

    stage: Stage
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class Ready:
    """The warm-up generation is done; requests are welcome."""

    effective: Effective


class TokenLogprobs(Struct, frozen=True, array_like=True, gc=False):
    """Of one sampled token: its log-probability, its place among all tokens (1: the likeliest), and the likeliest
    tokens with theirs, in falling order."""

    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


# A thousand are made, sent and read in a step: written as rows without the names of their fields they take a third of
# the time to read, and as msgspec's structs a fifth of the time to make.
class TokenEvent(Struct, array_like=True, gc=False):
    """New tokens of one request. An event with finish_reason is the request's last; it may carry no tokens.

    stop_token_id: the id that ended the output when finish_reason is STOP (end-of-text included).
    num_cached_tokens: prompt tokens that came from the prefix cache; set on the first event.
    queue_s, prefill_s: seconds between arrival and first schedule, and from there to the first token; first event.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    error: str | None = None
    error_param: str | None = None
    """The field of the request that is at fault for the error; None: it is ours."""
    logprobs: list[TokenLogprobs] = []
    """Of each of token_ids where the request asked for them, else empty."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of each of the prompt's tokens but the first, where they were asked for; on the first event with a token."""


@dataclass(frozen=True)
class StepStats:
    """Counters since the engine started, and figures of this step; for /metrics."""

    step_s: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_steps: int = 0
    compilations: int = 0


@dataclass(frozen=True)
class StepOutput:
    """Everything one step produced."""

    events: list[TokenEvent]
    load: Load
    stats: StepStats = field(default_factory=StepStats)


@dataclass(frozen=True)
class Fatal:
    """The engine is about to exit with failure.code.exit_status."""

    failure: Failure


FromEngine = StageChanged | Ready | StepOutput | Fatal
