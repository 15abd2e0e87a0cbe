"""The model as requests see it: its names, its text side and its limits. Made once it is ready; never changes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

from octavo_engine.api.chat_template import ChatTemplate, TemplateRefusedError
from octavo_engine.api.errors import ApiError, bad_request, unknown_model
from octavo_engine.api.output.reasoning import begun_by
from octavo_engine.api.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    messages_for_template,
)
from octavo_engine.api.tokenizer import GenerationDefaults, Tokenizer
from octavo_engine.api.tools import tools_for_template
from octavo_engine.sampling_params import SamplingError, SamplingParams

S = TypeVar("S", str, list[int])


@dataclass(frozen=True)
class ChatPrompt:
    """begun: whether the prompt has opened the model's thinking (True), closed it (False), or says nothing of it."""

    token_ids: list[int]
    begun: bool | None


@dataclass(frozen=True)
class ServedModel:
    """names: what clients may call it; the first is the one reported. root: what was asked to be served."""

    names: tuple[str, ...]
    root: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: GenerationDefaults
    max_model_len: int
    created: int
    template_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template where a request gives none."""

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise unknown_model(name)

    def card(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "created": self.created,
                    "owned_by": "octavo",
                    "root": self.root,
                    "parent": None,
                    "max_model_len": self.max_model_len,
                    "permission": [],
                }
                for name in self.names
            ],
        }

    # ---- prompts; slow for long texts, so called off the event loop

    def chat_prompt(self, request: ChatRequest | TokenizeRequest) -> ChatPrompt:
        """The messages as token ids, within the context. Raises ApiError."""
        if self.template is None:
            raise bad_request(
                "This model has no chat template: use /v1/completions, or start the server with --chat-template FILE.",
                "messages",
            )
        assert request.messages is not None
        proceed = bool(request.continue_final_message)
        variables = {**self.template_defaults, **(request.chat_template_kwargs or {})}
        documents = truncation = None
        if isinstance(request, ChatRequest):
            truncation = self._truncation(request, _first(request.max_completion_tokens, request.max_tokens))
            documents = request.documents
            if request.reasoning_effort is not None:
                variables["reasoning_effort"] = request.reasoning_effort
                # Templates that know no effort (Qwen3's) know whether to think at all.
                if "enable_thinking" not in (request.chat_template_kwargs or {}):
                    variables["enable_thinking"] = request.reasoning_effort != "none"
        messages = messages_for_template(request.messages)
        if truncation is None:
            self._check_chars(sum(len(str(message.get("content") or "")) for message in messages), "messages")
        add_prompt = request.add_generation_prompt
        render = functools.partial(
            self.template.render,
            add_generation_prompt=not proceed if add_prompt is None else add_prompt,
            continue_final_message=proceed,
            documents=documents,
            variables=variables,
        )
        tools = tools_for_template(request.tools)
        try:
            text = render(messages, tools=tools)
        except TemplateRefusedError as error:
            raise bad_request(str(error), "messages") from error
        _check_seen(render, text, messages, tools)
        # The template writes the special tokens itself.
        token_ids = self._encode(text, bool(request.add_special_tokens), "messages", truncation)
        return ChatPrompt(token_ids, begun_by(text))

    def completion_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Every prompt as token ids, within the context. Raises ApiError."""
        special = True if request.add_special_tokens is None else request.add_special_tokens
        truncation = self._truncation(request, request.max_tokens or DEFAULT_COMPLETION_TOKENS)
        prompts: list[list[int]] = []
        for prompt in prompts_of(request):
            if isinstance(prompt, str):
                prompts.append(self._encode(prompt, special, "prompt", truncation))
            else:
                prompts.append(self._fitting(prompt if truncation is None else truncation.of(prompt), "prompt"))
        return prompts

    def text_prompt(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """For /tokenize: any length that could be tokenized for generating."""
        self._check_chars(len(text), "prompt")
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _encode(
        self, text: str, add_special_tokens: bool, param: str, truncation: _Truncation | None = None
    ) -> list[int]:
        if truncation is None:
            self._check_chars(len(text), param)
            return self._fitting(self.tokenizer.encode(text, add_special_tokens=add_special_tokens), param)
        # A text that is many times too long is not encoded as a whole. Where it was cut tokens may differ; that is at
        # the end that is thrown away, as the tokens that are kept fill no more than half of what is left.
        text = _Truncation(2 * truncation.length * self.tokenizer.max_token_chars, truncation.side).of(text)
        return self._fitting(truncation.of(self.tokenizer.encode(text, add_special_tokens=add_special_tokens)), param)

    def _truncation(self, request: ChatRequest | CompletionRequest, max_tokens: int | None) -> _Truncation | None:
        """How to shorten prompts. -1 leaves room for the answer that was asked for. Raises ApiError."""
        length = request.truncate_prompt_tokens
        if length is None:
            return None
        if length > self.max_model_len:
            raise bad_request(
                f"truncate_prompt_tokens value ({length}) is greater than max_model_len ({self.max_model_len}). "
                "Please request a smaller truncation size.",
                "truncate_prompt_tokens",
            )
        if length == -1:
            length = max(1, self.max_model_len - (max_tokens or 1))
        return _Truncation(length, request.truncation_side or "left")

    def _check_chars(self, num_chars: int, param: str) -> None:
        """Refuse without encoding what cannot fit: no token stands for more than max_token_chars characters."""
        least = num_chars // self.tokenizer.max_token_chars
        if least >= self.max_model_len:
            raise self._too_long(f"at least {least}", param)

    def _fitting(self, token_ids: list[int], param: str) -> list[int]:
        if not token_ids:
            raise _empty_prompt()
        if len(token_ids) >= self.max_model_len:
            raise self._too_long(str(len(token_ids)), param)
        # Also of text: some tokenizers know tokens that the model has no embedding for.
        self.check_ids(token_ids, param)
        return token_ids

    def _too_long(self, count: str, param: str) -> ApiError:
        return bad_request(
            f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {count} "
            f"tokens in the {param}, which leaves no room for output. Please reduce the length of the {param}.",
            param,
        )

    def check_ids(self, token_ids: list[int], param: str) -> None:
        """Raises ApiError for an id that no token has."""
        largest, size = max(token_ids, default=0), self.tokenizer.vocab_size
        if largest >= size:
            raise bad_request(f"Token id {largest} is out of vocabulary: ids are 0 to {size - 1}.", param)

    def resolved(self, sampling: SamplingParams) -> SamplingParams:
        """With bad words spelled in ids. Raises ApiError for an id that no token has: it is meant for another model."""
        size = self.tokenizer.vocab_size
        for name, largest in sampling.named_ids.items():
            if largest >= size:
                text = f"{largest} is out of vocabulary: ids are 0 to {size - 1}."
                if name == "logit_bias":
                    text = f"token_id(s) [{largest}] in logit_bias contain out-of-vocab token ids."
                raise bad_request(text if name == "logit_bias" else f"{name}: {text}", name)
        if not sampling.bad_words:
            return sampling
        try:
            return replace(sampling, bad_words_ids=self.tokenizer.spellings(sampling.bad_words))
        except SamplingError as error:
            raise bad_request(str(error), error.param) from None

    def max_tokens(self, asked: int | None, prompt_tokens: int, param: str) -> int:
        """How many tokens an answer may have: what was asked for, within the room that the prompt leaves."""
        if asked is not None and asked > self.max_model_len:
            raise bad_request(f"{param}={asked} cannot be greater than max_model_len={self.max_model_len}.", param)
        room = self.max_model_len - prompt_tokens
        return room if asked is None else min(asked, room)


@dataclass(frozen=True)
class _Truncation:
    """side: where what is too much is cut off."""

    length: int
    side: Literal["left", "right"]

    def of(self, sequence: S) -> S:
        return sequence[-self.length :] if self.side == "left" else sequence[: self.length]


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _check_seen(
    render: Callable[..., str], text: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    """Refuse tools and earlier calls that a template leaves out: the model would answer without knowing of them.

    A template that fails without them does know them.
    """
    if tools is not None:
        with contextlib.suppress(TemplateRefusedError):
            if render(messages, tools=None) == text:
                raise bad_request(
                    "This model's chat template knows no tools: it leaves them out. One that does is given to the "
                    "server by --chat-template.",
                    "tools",
                )
    if any("tool_calls" in message for message in messages):
        bare = [{name: value for name, value in message.items() if name != "tool_calls"} for message in messages]
        with contextlib.suppress(TemplateRefusedError):
            if render(bare, tools=tools) == text:
                raise bad_request(
                    "This model's chat template knows no tools: it leaves out the messages' tool_calls.", "messages"
                )


def prompts_of(request: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts as a list, whichever of the four forms they came in. Raises ApiError."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise _empty_prompt()
    if isinstance(prompt[0], int):
        return cast("list[list[int]]", [prompt])
    return prompt


def _empty_prompt() -> ApiError:
    return bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
