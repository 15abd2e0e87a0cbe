"""What LLM returns: vLLM's RequestOutput and CompletionOutput.

What belongs to adapters, experts, encoders and other instances is there for scripts that read it, and stays None, as do
metrics, which vLLM's LLM leaves None too.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """rank: 1 for the likeliest of all tokens."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer. stop_reason: the stop string or token id that ended it; None for end-of-text and for a length."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    """Of each token, where asked for: itself and the likeliest ones, by id."""
    lora_request: None = None
    routed_experts: None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """One prompt and its `n` answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Of each prompt token, where asked for: None for the first, then as CompletionOutput.logprobs."""
    metrics: None = None
    lora_request: None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    kv_transfer_params: None = None
