"""How one request is sampled: vLLM's SamplingParams, checked when made.

Pure values; used by the API routes, by LLM and by the scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from octavo_engine.structured.params import StructuredOutputsParams

MAX_N = 128
"""Upper bound of `n`: OpenAI's own; one request may not take the whole machine."""
MIN_TEMPERATURE = 0.01
"""Smaller positive temperatures are raised to this, as in vLLM: logits divided by less overflow float16."""
MAX_STOP_STRINGS = 64
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_BIAS = 100.0
"""Larger biases are taken as this, as OpenAI does it: it forces or forbids a token already."""
MAX_BAD_WORDS = 256
MAX_BAD_WORD_IDS = 4096
"""Tokens of all their spellings together: what a device keeps for a request."""
MAX_ALLOWED_TOKEN_IDS = 16384


class RequestOutputKind(Enum):
    """What the outputs of AsyncLLM hold: all of the answer so far, what is new in it, or all of it, once."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


_LATER = "this version does not have it"
_NOT_HERE = {
    "logprob_token_ids": _LATER,
    "flat_logprobs": "log-probabilities come as lists of dicts",
    "extra_args": "there is nothing that would read them",
    "skip_reading_prefix_cache": "give the request a cache_salt of its own, or the engine enable_prefix_caching=False",
    "thinking_token_budget": _LATER,
    "repetition_detection": _LATER,
    "logits_processors": "no code is run in the engine on a caller's word",
    "best_of": "ask for n answers and choose",
    "guided_decoding": "it is called structured_outputs now",
    "truncate_prompt_tokens": "give the prompt's last token ids",
}
"""Why, of vLLM's parameters that this version does not do."""


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
    logit_bias: added to the logits of these ids, {id: bias} or pairs. allowed_token_ids: no others, None: all.
    bad_words must not come; bad_words_ids are their spellings in ids, which whoever has the tokenizer fills in.
    logprobs: log-probabilities of each token and of so many likeliest ones, 0: of the token alone, None: none; of the
    model's own distribution, before penalties and temperature. prompt_logprobs: the same of each prompt token but the
    first, given what is before it. structured_outputs: the form that the text must have; the text is complete when its
    form is, whatever min_tokens and ignore_eos say.
    A value that does not change: `dataclasses.replace` makes another. Raises SamplingError.
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
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    # What vLLM has beyond: there to be given where it asks for nothing, and refused where it asks.
    spaces_between_special_tokens: bool = True
    """A matter of tokenizers that are written in Python; nothing changes with it."""
    skip_clone: bool = False
    """Nothing is copied."""
    logprob_token_ids: None = None
    flat_logprobs: None = None
    extra_args: None = None
    skip_reading_prefix_cache: None = None
    thinking_token_budget: None = None
    repetition_detection: None = None
    logits_processors: None = None
    best_of: None = None
    guided_decoding: None = None
    truncate_prompt_tokens: None = None

    if TYPE_CHECKING:  # what callers may write; the fields say what there is then

        def __init__(
            self,
            n: int = 1,
            presence_penalty: float = 0.0,
            frequency_penalty: float = 0.0,
            repetition_penalty: float = 1.0,
            temperature: float = 1.0,
            top_p: float = 1.0,
            top_k: int = 0,
            min_p: float = 0.0,
            seed: int | None = None,
            stop: str | Iterable[str] | None = (),
            stop_token_ids: Iterable[int] | None = (),
            ignore_eos: bool = False,
            max_tokens: int | None = 16,
            min_tokens: int = 0,
            include_stop_str_in_output: bool = False,
            skip_special_tokens: bool = True,
            detokenize: bool = True,
            logit_bias: Mapping[int, float] | Mapping[str, float] | Iterable[tuple[int, float]] | None = (),
            allowed_token_ids: Iterable[int] | None = None,
            bad_words: Iterable[str] | None = (),
            bad_words_ids: tuple[tuple[int, ...], ...] = (),
            logprobs: int | None = None,
            prompt_logprobs: int | None = None,
            structured_outputs: StructuredOutputsParams | None = None,
            output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
            spaces_between_special_tokens: bool = True,
            skip_clone: bool = False,
            logprob_token_ids: None = None,
            flat_logprobs: bool | None = None,
            extra_args: Mapping[str, Any] | None = None,
            skip_reading_prefix_cache: bool | None = None,
            thinking_token_budget: None = None,
            repetition_detection: None = None,
            logits_processors: None = None,
            best_of: int | None = None,
            guided_decoding: None = None,
            truncate_prompt_tokens: None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        # Lists and single strings are what callers write; tuples keep the value hashable and immutable.
        object.__setattr__(self, "stop", _tuple("stop", self.stop, "a string or a list of strings"))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids, "a list of ids"))
        object.__setattr__(self, "bad_words", _tuple("bad_words", self.bad_words, "a list of strings"))
        if self.allowed_token_ids is not None:
            allowed = _tuple("allowed_token_ids", self.allowed_token_ids, "a list of ids")
            object.__setattr__(self, "allowed_token_ids", allowed)
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        self._check()
        self._check_ids()
        self._refuse_what_is_not_here()
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
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise SamplingError("structured_outputs", self.structured_outputs, "StructuredOutputsParams(...)")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise SamplingError("output_kind", self.output_kind, "a RequestOutputKind")
        if self.n > 1 and self.temperature == 0:
            raise SamplingError("n", self.n, "1 when temperature is 0: greedy answers would all be the same")

    def _check_ids(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise SamplingError("logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_LOGIT_BIAS} entries")
        for token, _ in self.logit_bias:
            _integer("logit_bias", token, 0, 2**31 - 1)
        if self.allowed_token_ids is not None:
            if not 0 < len(self.allowed_token_ids) <= MAX_ALLOWED_TOKEN_IDS:
                count = f"{len(self.allowed_token_ids)} ids"
                raise SamplingError("allowed_token_ids", count, f"1 to {MAX_ALLOWED_TOKEN_IDS} ids")
            for token in self.allowed_token_ids:
                _integer("allowed_token_ids", token, 0, 2**31 - 1)
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise SamplingError("bad_words", f"{len(self.bad_words)} words", f"at most {MAX_BAD_WORDS} words")
        for word in self.bad_words:
            if not isinstance(word, str) or not word.strip():
                raise SamplingError("bad_words", word, "strings that are not empty")
        if (spelled := sum(map(len, self.bad_words_ids))) > MAX_BAD_WORD_IDS:
            raise SamplingError("bad_words", f"{spelled} tokens", f"at most {MAX_BAD_WORD_IDS} tokens in all spellings")

    def _refuse_what_is_not_here(self) -> None:
        for name, why in _NOT_HERE.items():
            value = getattr(self, name)
            if value is None:
                continue
            nothing: tuple[object, ...] = (None, False, {}, [], self.n) if name == "best_of" else (None, False, {}, [])
            if not any(value is one or (type(value) is type(one) and value == one) for one in nothing):
                raise SamplingError(name, value, f"left out: {why}")
            object.__setattr__(self, name, None)

    @classmethod
    def from_optional(cls, **given: Any) -> SamplingParams:
        """With the default in place of each None, but for max_tokens, where None is a value."""
        return cls(**{name: value for name, value in given.items() if value is not None or name == "max_tokens"})

    def with_known(self, **fields: Any) -> SamplingParams:
        """A copy with other values in these fields, which must be right: `replace` would check all of them again."""
        copy = object.__new__(SamplingParams)
        copy.__dict__.update(self.__dict__, **fields)
        return copy

    def clone(self) -> SamplingParams:
        return self.with_known()

    @property
    def named_ids(self) -> dict[str, int]:
        """The largest id of each field that names ids, to be compared with the vocabulary."""
        fields = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": [token for token, _ in self.logit_bias],
            "allowed_token_ids": self.allowed_token_ids or (),
        }
        return {name: max(ids) for name, ids in fields.items() if ids}

    @property
    def reshapes(self) -> bool:
        """Whether logits are changed by more than temperature: by history, by lists of ids, or by words."""
        penalized = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        listed = self.logit_bias or self.allowed_token_ids is not None or self.bad_words_ids
        return bool(penalized or listed or self.min_tokens)

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


def _pairs(value: object) -> tuple[tuple[int, float], ...]:
    """{id: bias}, with ids as numbers or as text, or pairs of them."""
    try:
        items = list(value.items()) if isinstance(value, Mapping) else list(value or ())  # type: ignore[call-overload]
        pairs = [(token if isinstance(token, int) else int(token), float(bias)) for token, bias in items]
    except (TypeError, ValueError):
        raise SamplingError("logit_bias", value, "a map from token ids to numbers") from None
    for _, bias in pairs:
        _number("logit_bias", bias, -math.inf, math.inf)
    return tuple((token, max(-MAX_BIAS, min(bias, MAX_BIAS))) for token, bias in pairs)
