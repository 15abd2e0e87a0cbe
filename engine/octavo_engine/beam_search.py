"""Beam search over an LLM: each step extends every beam by its likeliest tokens and keeps the best of all. Pure but for
the calls of `next_tokens`, which computes a step of all beams together; their common beginnings come from the prefix
cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from octavo_engine.outputs import Logprob
from octavo_engine.sampling_params import MAX_LOGPROBS

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2
"""A beam may need twice as many tokens as there are beams, and so many log-probabilities a step tells."""


@dataclass(frozen=True)
class BeamSearchParams:
    """beam_width: beams that are kept. A beam's score is its log-probability / length ** length_penalty, where the
    length is the prompt's and the answer's, as in vLLM, without an end-of-text token.

    ignore_eos: the end-of-text token does not finish a beam. temperature must be 0: nothing is drawn.
    Raises ValueError.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: None = None
    """These two are vLLM's. They are refused: beams know no stop strings and are not held to a form."""

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_BEAM_WIDTH:
            raise ValueError(f"beam_width must be 1 to {MAX_BEAM_WIDTH}, got {self.beam_width}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, got {self.max_tokens}")
        if self.temperature != 0.0:
            raise ValueError(f"temperature must be 0 in a beam search, which draws nothing, got {self.temperature}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a finite number, got {self.length_penalty}")
        if self.include_stop_str_in_output:
            raise ValueError("include_stop_str_in_output: a beam search looks for no stop strings")
        if self.structured_outputs is not None:
            raise ValueError("structured_outputs: beams are not held to a form; use generate")


@dataclass
class BeamSearchSequence:
    """tokens and text: of the prompt and of the answer; text is None until the search is over."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class BeamSearchOutput:
    """The beam_width best answers to one prompt, the best first."""

    sequences: list[BeamSearchSequence]


NextTokens = Callable[[Sequence[list[int]], int], list[dict[int, Logprob]]]
"""(prompts, how many) → for each prompt its likeliest next tokens."""


def search(
    prompts: Sequence[list[int]],
    params: BeamSearchParams,
    eos_token_ids: Sequence[int],
    next_tokens: NextTokens,
    on_step: Callable[[], object] = lambda: None,
) -> list[list[BeamSearchSequence]]:
    """The best answers to each prompt, all prompts together."""
    width = params.beam_width
    live = [[BeamSearchSequence(list(prompt))] for prompt in prompts]
    done: list[list[BeamSearchSequence]] = [[] for _ in prompts]
    for _ in range(params.max_tokens):
        beams = [beam for of_prompt in live for beam in of_prompt]
        if not beams:
            break
        found = iter(next_tokens([beam.tokens for beam in beams], 2 * width))
        for index, of_prompt in enumerate(live):
            grown = [_grown(beam, token, chances) for beam in of_prompt for token, chances in _each(next(found))]
            if not params.ignore_eos:
                for beam in grown:
                    if beam.tokens[-1] in eos_token_ids:
                        beam.finish_reason, beam.stop_reason = "stop", beam.tokens[-1]
            done[index] += [beam for beam in grown if beam.finish_reason is not None]
            going = sorted((b for b in grown if b.finish_reason is None), key=lambda b: b.cum_logprob, reverse=True)
            live[index] = going[:width]
        on_step()

    def score(beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.finish_reason == "stop")
        return beam.cum_logprob / math.pow(max(length, 1), params.length_penalty)

    for beam in (one for of_prompt in live for one in of_prompt):
        beam.finish_reason = "length"
    both = zip(done, live, strict=True)
    return [sorted([*finished, *going], key=score, reverse=True)[:width] for finished, going in both]


def _each(chances: dict[int, Logprob]) -> list[tuple[int, dict[int, Logprob]]]:
    return [(token, chances) for token in chances]


def _grown(beam: BeamSearchSequence, token: int, chances: dict[int, Logprob]) -> BeamSearchSequence:
    total = beam.cum_logprob + chances[token].logprob
    return BeamSearchSequence([*beam.tokens, token], [*beam.logprobs, chances], total)
