"""Request bodies: parsed once, at the edge, into values that later code trusts.

Every field that OpenAI or vLLM know is honoured or refused by name: a client never gets an answer that silently
left out what it asked for. Fields that nobody knows are accepted, as vLLM accepts them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from octavo_engine.api.chat_template import RESERVED_NAMES
from octavo_engine.api.errors import ApiError, bad_request, malformed
from octavo_engine.api.tokenizer import GenerationDefaults
from octavo_engine.api.tool_messages import calls_for_template, check_message_tools
from octavo_engine.sampling_params import MAX_LOGPROBS, SamplingError, SamplingParams
from octavo_engine.structured.grammar import from_response_format
from octavo_engine.structured.params import StructuredOutputsError, StructuredOutputsParams, from_document

log = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16
MAX_STOP_CHARS = 1024
"""Longest stop string: each one is looked for after every token."""
MAX_MESSAGES = 4096
MAX_SALT_CHARS = 512
MAX_TOOLS = 1024
MAX_TOOL_NAME_CHARS = 256


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number; JSON knows no integers, so 3.0 is one and "3" is none."""
_INT64 = Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)]


class Strict(BaseModel):
    """A JSON value of another type than the field's is refused, never converted."""

    model_config = ConfigDict(strict=True, protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class _Body(Strict):
    model_config = ConfigDict(extra="allow")

    model: str | None = None


class _Sampled(_Body):
    """What chat and plain completions have in common."""

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    n: Whole | None = None
    seed: _INT64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Whole] | None = None
    ignore_eos: bool | None = None
    min_tokens: Whole | None = None
    max_tokens: Whole | None = None
    prompt_logprobs: Whole | None = None
    echo: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[Whole] | None = None
    bad_words: list[str] | None = None
    priority: Annotated[Whole, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Whole | None = None
    truncation_side: Literal["left", "right"] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None


class TextPart(Strict):
    model_config = ConfigDict(extra="allow")

    type: str


class Message(Strict):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None


class ToolFunction(Strict):
    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=MAX_TOOL_NAME_CHARS)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class ChatRequest(_Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


TokenIds = list[Annotated[int, Field(ge=0)]]


class CompletionRequest(_Sampled):
    prompt: str | TokenIds | list[str] | list[TokenIds] | None = None
    logprobs: Whole | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(_Body):
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(_Body):
    tokens: TokenIds


B = TypeVar("B", bound=Strict)


def parse_body(kind: type[B], body: bytes) -> B:
    """Raises ApiError: 400 with the field at fault."""
    try:
        request = kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _malformed(error) from None
    except RecursionError:
        raise malformed("The body is nested too deeply.", "body") from None
    _refuse_unsupported(kind, request.model_extra or {})
    return request


def build(kind: type[B], body: Mapping[str, Any]) -> B:
    """A request that another API's request means. Raises ApiError, as parse_body."""
    return parse_body(kind, msgspec.json.encode(body))


@dataclass(frozen=True)
class Generation:
    """What every generating route comes to: how to sample, how to answer.

    max_tokens None: as many as fit. base_id: the client's own request id, or None.
    """

    sampling: SamplingParams
    max_tokens: int | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    cache_salt: str | None
    base_id: str | None
    priority: int = 0
    echo: bool = False
    prompt_only: bool = False
    """Nothing of what is generated is wanted: the request scores its prompt."""
    tells_ids: bool = False
    names_ids: bool = False
    form_param: str = "structured_outputs"
    """The field that sampling.structured_outputs came from."""


def chat_generation(request: ChatRequest, defaults: GenerationDefaults) -> Generation:
    """Raises ApiError."""
    check_conversation(request)
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    if request.top_logprobs and not request.logprobs:
        raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    logprobs = _checked_logprobs(request.top_logprobs or 0, "top_logprobs") if request.logprobs else None
    scored = _checked_prompt_logprobs(request)
    return _generation(request, defaults, getattr(request, name), name, logprobs, scored)


def completion_generation(request: CompletionRequest, defaults: GenerationDefaults) -> Generation:
    """Raises ApiError."""
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    logprobs = None if request.logprobs is None else _checked_logprobs(request.logprobs, "logprobs")
    scored = _checked_prompt_logprobs(request)
    if scored is None and request.echo:
        scored = logprobs
    # With echo, no token at all may be asked for: then the prompt is scored, as evaluation harnesses do it.
    prompt_only = bool(request.echo) and max_tokens == 0
    generation = _generation(request, defaults, max_tokens or int(prompt_only), "max_tokens", logprobs, scored)
    return replace(generation, echo=bool(request.echo), prompt_only=prompt_only)


def role_and_echo(request: ChatRequest) -> tuple[str, str]:
    """The role that answers, and the text that goes before the answer: with `echo`, the message that is continued."""
    last = request.messages[-1]
    asked = request.add_generation_prompt
    prompted = not request.continue_final_message if asked is None else asked
    role = "assistant" if prompted else last.role
    echoed = request.echo and last.role == role
    return role, messages_for_template([last])[0].get("content") or "" if echoed else ""


def messages_for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as templates read them; a list of text parts becomes one text."""
    plain = []
    for message in messages:
        document = message.model_dump(exclude_unset=True)
        if isinstance(message.content, list):
            document["content"] = "\n".join(str((part.model_extra or {}).get("text")) for part in message.content)
        calls_for_template(document)
        plain.append(document)
    return plain


def check_conversation(request: ChatRequest | TokenizeRequest) -> None:
    """What a template is given. Raises ApiError."""
    for index, message in enumerate(request.messages or []):
        _check_content(index, message)
    if request.continue_final_message and request.add_generation_prompt:
        raise bad_request(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.", "continue_final_message"
        )
    if taken := RESERVED_NAMES & set(request.chat_template_kwargs or ()):
        raise bad_request(f"chat_template_kwargs may not set {', '.join(sorted(taken))}.", "chat_template_kwargs")


# ---- from the wire to SamplingParams


def _checked_logprobs(count: int, param: str) -> int:
    if count > MAX_LOGPROBS:
        raise bad_request(
            f"Requested sample logprobs of {count}, which is greater than max allowed: {MAX_LOGPROBS}", param
        )
    if count < 0:
        raise bad_request(f"{param} must be a whole number from 0 to {MAX_LOGPROBS}, got {count}.", param)
    return count


def _checked_prompt_logprobs(request: _Sampled) -> int | None:
    if request.prompt_logprobs is None:
        return None
    if request.stream:
        raise bad_request("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    return _checked_logprobs(request.prompt_logprobs, "prompt_logprobs")


def _generation(
    request: _Sampled,
    defaults: GenerationDefaults,
    max_tokens: int | None,
    max_tokens_name: str,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> Generation:
    truncation = request.truncate_prompt_tokens
    if truncation is not None and (truncation < -1 or truncation == 0):
        raise bad_request(
            f"truncate_prompt_tokens must be a whole number above 0, or -1 for as many as fit, got {truncation}.",
            "truncate_prompt_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
    if request.cache_salt is not None and not 0 < len(request.cache_salt) <= MAX_SALT_CHARS:
        raise bad_request(f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters.", "cache_salt")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if any(len(text) > MAX_STOP_CHARS for text in stop):
        raise bad_request(f"stop strings may have at most {MAX_STOP_CHARS} characters.", "stop")
    form_param, form = structured_outputs(request)
    try:
        sampling = SamplingParams(
            n=_or(request.n, 1),
            presence_penalty=_or(request.presence_penalty, 0.0),
            frequency_penalty=_or(request.frequency_penalty, 0.0),
            repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty, 1.0),
            temperature=_or(request.temperature, defaults.temperature, 1.0),
            top_p=_or(request.top_p, defaults.top_p, 1.0),
            top_k=_or(request.top_k, defaults.top_k, 0),
            min_p=_or(request.min_p, defaults.min_p, 0.0),
            seed=request.seed,
            stop=tuple(stop),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=bool(request.ignore_eos),
            max_tokens=max_tokens,
            min_tokens=_or(request.min_tokens, 0),
            include_stop_str_in_output=bool(request.include_stop_str_in_output),
            skip_special_tokens=_or(request.skip_special_tokens, True),
            logit_bias=request.logit_bias or (),
            allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
            bad_words=tuple(request.bad_words or ()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=form,
        )
    except SamplingError as error:
        param = max_tokens_name if error.param == "max_tokens" else error.param
        raise bad_request(str(error), param) from None
    options = request.stream_options or StreamOptions()
    if defaults.max_tokens is not None:
        max_tokens = defaults.max_tokens if max_tokens is None else min(max_tokens, defaults.max_tokens)
    return Generation(
        sampling=sampling,
        max_tokens=max_tokens,
        stream=bool(request.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        cache_salt=request.cache_salt,
        base_id=request.request_id,
        priority=request.priority or 0,
        tells_ids=bool(request.return_token_ids),
        names_ids=bool(request.return_tokens_as_token_ids),
        form_param=form_param,
    )


def structured_outputs(request: _Sampled) -> tuple[str, StructuredOutputsParams | None]:
    """What the answer's form must be, and in which of the fields that can say it it was said. Raises ApiError."""
    older = {
        "json": request.guided_json, "regex": request.guided_regex, "choice": request.guided_choice,
        "grammar": request.guided_grammar, "json_object": request.guided_json_object or None,
    }  # fmt: skip
    older = {name: value for name, value in older.items() if value is not None}
    if older and request.guided_whitespace_pattern is not None:
        older["whitespace_pattern"] = request.guided_whitespace_pattern
    forms: dict[str, StructuredOutputsParams] = {}
    param = ""
    try:
        for param, read, value in (
            ("response_format", from_response_format, request.response_format),
            ("structured_outputs", from_document, request.structured_outputs or None),
            (f"guided_{next(iter(older), '')}", from_document, older or None),
        ):
            if value is not None and (form := read(value)) is not None:
                forms[param] = form
    except StructuredOutputsError as error:
        raise bad_request(str(error) if error.param == param else f"{param}: {error}", param) from None
    if len(forms) > 1:
        raise bad_request(f"Give only one of {' and '.join(forms)}: an answer has one form.", next(iter(forms)))
    return next(iter(forms.items()), ("structured_outputs", None))


def _or(*values: Any) -> Any:
    for value in values:
        if value is not None:
            return value
    return None


def _check_content(index: int, message: Message) -> None:
    param = f"messages.{index}.content"
    if isinstance(message.content, list):
        for part in message.content:
            text = (part.model_extra or {}).get("text")
            if part.type not in ("text", "input_text"):
                raise bad_request(
                    f"{param}: parts of type {part.type!r} are not supported; this model reads text.", param
                )
            if not isinstance(text, str):
                raise bad_request(f"{param}: a text part needs a string `text`.", param)
    check_message_tools(index, message.role, message.content is None, message.model_extra or {})


# ---- what this version does not do


@dataclass(frozen=True)
class _Refusal:
    """A known field that is refused unless its value asks for nothing."""

    harmless: Callable[[Any], bool]
    reason: str = "is not supported yet"


def _only(*values: Any) -> Callable[[Any], bool]:
    # 0 == False in Python; a client that sends `logprobs: 0` to completions does ask for something.
    return lambda value: any(value is v or (type(value) is type(v) and value == v) for v in values)


def _empty(value: Any) -> bool:
    return value in (None, {}, [])


_NOTHING = _Refusal(_only(None))
_NOTHING_OR_FALSE = _Refusal(_only(None, False))
_NOTHING_OR_EMPTY = _Refusal(_empty)

_REFUSED_EVERYWHERE: dict[str, _Refusal] = {
    "use_beam_search": _NOTHING_OR_FALSE,
    "length_penalty": _Refusal(_only(None, 1, 1.0), "belongs to beam search, which is not supported"),
    "early_stopping": _NOTHING_OR_FALSE,
    "thinking_token_budget": _NOTHING,
    "return_prompt_text": _NOTHING_OR_FALSE,
    "return_token_offsets": _NOTHING_OR_FALSE,
    "kv_transfer_params": _NOTHING_OR_EMPTY,
    "vllm_xargs": _NOTHING_OR_EMPTY,
    "repetition_detection": _NOTHING,
    "service_tier": _Refusal(_only(None, "auto", "default"), "other than auto and default does not exist here"),
}

_REFUSED: dict[type[BaseModel], dict[str, _Refusal]] = {
    ChatRequest: {
        **_REFUSED_EVERYWHERE,
        "functions": _Refusal(_only(None), "is the older form, which is not supported; use tools"),
        "function_call": _Refusal(_only(None, "none"), "is the older form, which is not supported; use tool_choice"),
        "chat_template": _Refusal(_only(None), "is not taken from requests; the server has --chat-template"),
        "media_io_kwargs": _NOTHING_OR_EMPTY,
        "mm_processor_kwargs": _NOTHING_OR_EMPTY,
        "return_assistant_tokens_mask": _NOTHING_OR_FALSE,
        "modalities": _Refusal(_only(None, ["text"]), "other than text are not supported"),
        "audio": _NOTHING,
        "prediction": _NOTHING,
        "web_search_options": _NOTHING,
    },
    CompletionRequest: {
        **_REFUSED_EVERYWHERE,
        "suffix": _Refusal(_only(None, ""), "is not currently supported"),
        "best_of": _Refusal(_only(None, 1), "is not supported"),
        "prompt_embeds": _NOTHING,
    },
    TokenizeRequest: {
        "chat_template": _Refusal(_only(None), "is not taken from requests; the server has --chat-template"),
        "media_io_kwargs": _NOTHING_OR_EMPTY,
        "mm_processor_kwargs": _NOTHING_OR_EMPTY,
    },
    DetokenizeRequest: {},
}

_HARMLESS = frozenset(
    {
        "user", "store", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity",
        "spaces_between_special_tokens", "guided_decoding_backend",
    }
)  # fmt: skip
"""Known fields whose every value leaves the answer as it is."""


def _refuse_unsupported(kind: type[BaseModel], extra: Mapping[str, Any]) -> None:
    refused = _REFUSED.get(kind)
    if refused is None:  # an API's own module looks after its fields
        return
    for name, value in extra.items():
        refusal = refused.get(name)
        if refusal is not None and not refusal.harmless(value):
            raise bad_request(f"{name} {refusal.reason}.", name)
        if refusal is None and name not in _HARMLESS:
            log.debug("unknown request field is ignored field=%.100s", name)


def _malformed(error: pydantic.ValidationError) -> ApiError:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return malformed("body: the body is not valid JSON.", "body")
    # Of a field that may be of several kinds each kind complains: the one that got furthest is what was meant.
    field = details[0]["loc"][:1]
    found = [(_location(detail["loc"]), detail["msg"]) for detail in details if detail["loc"][:1] == field]
    deepest = max(found, key=lambda one: len(one[0]))[0]
    said = dict.fromkeys(message for location, message in found if location == deepest)
    param = ".".join(["body", *deepest])
    return malformed(f"{param}: {_either(list(said))}.", param)


def _location(loc: tuple[int | str, ...]) -> list[str]:
    """Unions and validators put names of their own into the location; the request's are keys and indices."""
    location = [str(part) for part in loc if not (isinstance(part, str) and not part.isidentifier())]
    return [part for part in location if part != NamedTool.__name__][: -1 if location[-1:] == ["str"] else None]


def _either(messages: list[str]) -> str:
    """'Input should be a valid string', 'Input should be a valid array' → 'Input should be a valid string or a …'"""
    start = "Input should be "
    if not all(message.startswith(start) for message in messages):
        return messages[0]
    return start + " or ".join(message.removeprefix(start) for message in messages)
