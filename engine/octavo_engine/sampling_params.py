"""How one request is sampled: vLLM's SamplingParams, checked when made.

Pure values; used by the API routes, by LLM and by the scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MAX_N = 128
"""Upper bound of `n`: OpenAI's own; one request may not take the whole machine."""
MIN_TEMPERATURE = 0.01
"""Smaller positive temperatures are raised to this, as in vLLM: logits divided by less overflow float16."""
MAX_STOP_STRINGS = 64
MAX_STOP_TOKEN_IDS = 1024


class SamplingError(ValueError):
    """A sampling value outside its range; `param` names it."""

    def __init__(self, param: str, value: object, expected: str) -> None:
        super().__init__(f"{param} must be {expected}, got {value!r}.")
        self.param = param


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0 or -1, top_p 1, min_p 0 are off. max_tokens None: until the context is full.

    stop_token_ids end the output like the end-of-text token does; ignore_eos ignores only the latter.
    min_tokens: neither ends the output before so many tokens; stop strings are not looked for either.
    Raises SamplingError.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        # Lists and single strings are what callers write; tuples keep the value hashable and immutable.
        object.__setattr__(self, "stop", _tuple("stop", self.stop, "a string or a list of strings"))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids, "a list of ids"))
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        self._check()
        if 0 < self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", MIN_TEMPERATURE)

    def _check(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -2.0, 2.0)
        _number("temperature", self.temperature, 0.0, 2.0)
        # Logits divided by less than that leave the range of float16, and nobody means it.
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, low_included=False)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise SamplingError("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise SamplingError("stop", text, "strings that are not empty")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise SamplingError(
                "stop_token_ids", f"{len(self.stop_token_ids)} ids", f"at most {MAX_STOP_TOKEN_IDS} ids"
            )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(name, getattr(self, name), "True or False")
        if self.stop and not self.detokenize:
            raise SamplingError("detokenize", False, "True with stop strings, which are looked for in the text")
        if self.n > 1 and self.temperature == 0:
            raise SamplingError("n", self.n, "1 when temperature is 0: greedy answers would all be the same")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _tuple(name: str, value: object, expected: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str) and name == "stop":
        return (value,)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise SamplingError(name, value, expected)
    return tuple(value)


def _number(name: str, value: object, low: float, high: float, low_included: bool = True) -> None:
    ok = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low <= value if low_included else low < value)
        and value <= high
    )
    if not ok:
        brackets = "[" if low_included else "("
        raise SamplingError(name, value, f"in {brackets}{low:g}, {high:g}]")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SamplingError(name, value, f"a whole number from {low} to {high}")
