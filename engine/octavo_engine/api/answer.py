"""One request's answer while it is generated: tokens in, text pieces and usage out. Shared by all routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from octavo_engine.api.detokenizer import TextStream
from octavo_engine.api.engine_client import Output, Stream, Timing
from octavo_engine.api.errors import bad_request, internal, without_folders
from octavo_engine.api.output.parser import OutputFormat, OutputParser, Parsed, ToolCall
from octavo_engine.api.tokenizer import Tokenizer
from octavo_engine.core.messages import FinishReason, TokenLogprobs
from octavo_engine.sampling_params import SamplingParams

LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON cannot say."""


@dataclass(frozen=True)
class TokenChance:
    """One token of the answer as text, and the likeliest tokens in its place, itself among them or not."""

    token: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Rated:
    """What the model made of one token at a place of the prompt, in the words of vLLM's bodies."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class PromptToken:
    """One token of the prompt; rated, by id: itself and the likeliest tokens in its place. Empty for the first."""

    id: int
    token: str
    rated: dict[int, Rated]


# Made for every token of every stream: slots and shared empty tuples, as a frozen one with lists of its own takes five
# times as long to make.
@dataclass(slots=True)
class Piece:
    """New text of one choice; may be empty. first: nothing came of this choice before. num_tokens: so far.

    text is content; reasoning and calls are what the server's parsers took out of it, each call whole.
    finish_reason is set on a choice's last piece; stop_reason is then the stop string or token id that ended it.
    """

    index: int
    text: str
    first: bool
    num_tokens: int
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    tokens: Sequence[TokenChance] = ()
    """The new tokens with their log-probabilities, where they were asked for."""
    reasoning: str = ""
    calls: Sequence[ToolCall] = ()
    prompt: Sequence[PromptToken] = ()
    """Every token of the choice's prompt where its log-probabilities were asked for; on the first piece."""
    token_ids: Sequence[int] | None = None
    """The new tokens, where they were asked for."""
    prompt_ids: Sequence[int] | None = None
    """The prompt's tokens, where they were asked for; on the first piece."""
    num_reasoning_tokens: int = 0
    """So far; those that arrived while nothing but reasoning was read."""


class _Choice:
    __slots__ = ("num_reasoning_tokens", "num_tokens", "parser", "started", "text")

    def __init__(self, text: TextStream, parser: OutputParser | None) -> None:
        self.text = text
        self.parser = parser
        self.num_tokens = self.num_reasoning_tokens = 0
        self.started = False


class Answer:
    """All choices of one request. Read with next() until finished; close() whatever happens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stream: Stream,
        sampling: SamplingParams,
        prompts: list[list[int]],
        format: OutputFormat | None = None,
        *,
        prompt_only: bool = False,
        tells_ids: bool = False,
        names_ids: bool = False,
    ) -> None:
        """prompts: each with sampling.n choices. format: how to take the texts apart; None leaves them whole.

        prompt_only: the one token that the engine makes is not part of the answer. tells_ids: pieces have token ids.
        names_ids: tokens with log-probabilities are called by their ids and not by their texts.
        """
        self._stream = stream
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._choices = [
            _Choice(TextStream(tokenizer, sampling), None if format is None else OutputParser(format))
            for _ in range(len(prompts) * sampling.n)
        ]
        self._prompts = prompts
        self.scores_prompts = sampling.prompt_logprobs is not None
        self._n = sampling.n
        self._prompt_tokens = sum(map(len, prompts))
        self._tokenizer = tokenizer
        self._prompt_only = prompt_only
        self._tells_ids = tells_ids
        self._tells_tokens = tells_ids or sampling.logprobs is not None
        self._token_text = _name_of if names_ids else tokenizer.decode_one
        self._looks_for_tools = format is not None and format.tools is not None
        self.error: str | None = None
        """A word for what the engine failed with."""
        self.tells_cached = False
        """Whether usage tells how many tokens of the prompts came from the cache."""
        self._cached: dict[int, int] = {}

    @property
    def finished(self) -> bool:
        return self._stream.finished

    async def next(self) -> list[Piece]:
        """What arrived since the last call. Raises ApiError when the engine failed on any choice."""
        return await self._pieces(await self._stream.next())

    def listen(
        self, listener: Callable[[], None] | None, direct: Callable[[Sequence[int]], None] | None = None
    ) -> None:
        self._stream.listen(listener, direct)

    def text_of(self) -> Callable[[Sequence[int]], str] | None:
        """What turns a step's tokens into text and counts them, while the answer is no more than that: one choice that
        has begun, and neither parsed nor told with its tokens nor looked through for stop strings. Else None."""
        choice = self._choices[0]
        decode = choice.text.decode
        if len(self._choices) > 1 or not choice.started or self._tells_tokens or decode is None:
            return None
        if choice.parser is not None or self._prompt_only:
            return None

        def text_of(token_ids: Sequence[int]) -> str:
            choice.num_tokens += len(token_ids)
            return decode(token_ids)

        return text_of

    def take(self) -> list[Piece]:
        """As `next`, of what is there. Not where prompts are scored."""
        return [self._piece(output) for output in self._stream.take()]

    async def _pieces(self, outputs: list[Output]) -> list[Piece]:
        pieces = []
        for output in outputs:
            piece = self._piece(output)
            if output.prompt_logprobs is not None:
                # Long prompts have a hundred thousand of them: not on the loop that everyone's tokens pass through.
                prompt = self._prompts[output.index // self._n]
                rated = await asyncio.to_thread(self._rate, prompt, output.prompt_logprobs)
                piece = replace(piece, prompt=rated)
            pieces.append(piece)
        return pieces

    def close(self) -> None:
        self._stream.close()

    @property
    def timing(self) -> Timing:
        return self._stream.timing

    @property
    def num_tokens(self) -> int:
        """Of all choices, so far."""
        return sum(choice.num_tokens for choice in self._choices)

    def choices_with_calls(self) -> list[bool]:
        """Of each choice that a tool parser reads and that has text: whether it found calls."""
        if not self._looks_for_tools:
            return []
        return [choice.parser is not None and choice.parser.has_calls for choice in self._choices if choice.started]

    def usage(self, completion_tokens: int | None = None) -> dict[str, Any]:
        """So far; completion_tokens for the figure of a single choice."""
        if completion_tokens is None:
            completion_tokens = self.num_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": self._prompt_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }
        if self.tells_cached:
            # Of n choices of one prompt, the first to run tells: the others find what it has computed.
            n = self._n
            usage["prompt_tokens_details"] = {
                "cached_tokens": sum(
                    min((self._cached[i] for i in range(p * n, (p + 1) * n) if i in self._cached), default=0)
                    for p in range(len(self._choices) // n)
                )
            }
        return usage

    def _piece(self, output: Output) -> Piece:
        if not self._tells_ids:
            return self._told(output)
        before = self._choices[output.index].num_tokens
        piece = self._told(output)
        piece.token_ids = output.token_ids[: piece.num_tokens - before]
        if piece.first:
            piece.prompt_ids = self._prompts[output.index // self._n]
        return piece

    def _told(self, output: Output) -> Piece:
        if output.finish_reason is FinishReason.ERROR:
            self.error = "engine_error"
            if output.error_param is not None:
                raise bad_request(f"{output.error_param}: {output.error}", output.error_param)
            why = without_folders(output.error or "no reason given")
            raise internal(f"The engine could not finish this request: {why}")
        choice = self._choices[output.index]
        first, choice.started = not choice.started, True
        if output.num_cached_tokens is not None:
            self._cached[output.index] = output.num_cached_tokens
        ended = output.finish_reason is not None
        if self._prompt_only:
            return Piece(output.index, "", first, 0, "length" if ended else None)
        delta = choice.text.push(output.token_ids, last=ended, stop_token_id=output.stop_token_id)
        choice.num_tokens += delta.num_tokens
        if not ended and delta.stop is None and choice.parser is None and not output.logprobs:
            return Piece(output.index, delta.text, first, choice.num_tokens)  # most tokens are no more than text
        tokens = [
            self._chance(token, of)
            for token, of in zip(output.token_ids[: delta.num_tokens], output.logprobs, strict=False)
        ]
        reason: str | None = None
        named: str | int | None = None
        if delta.stop is not None:
            self._stream.end(output.index, choice.num_tokens)
            reason, named = "stop", delta.stop
        elif ended:
            # The model's own end of text is not a reason worth naming; a token that the client chose is.
            reason = str(output.finish_reason)
            named = output.stop_token_id if output.stop_token_id in self._stop_token_ids else None
        parsed = Parsed(delta.text)
        if choice.parser is not None:
            parsed = choice.parser.push(delta.text, last=reason is not None)
            if parsed.reasoning and not parsed.content:
                choice.num_reasoning_tokens += delta.num_tokens
            if reason == "stop" and choice.parser.has_calls and not choice.parser.named:
                reason = "tool_calls"
        return Piece(
            output.index,
            parsed.content,
            first,
            choice.num_tokens,
            reason,
            named,
            tokens,
            parsed.reasoning,
            parsed.calls,
            num_reasoning_tokens=choice.num_reasoning_tokens,
        )

    def _rate(self, prompt: list[int], logprobs: list[TokenLogprobs]) -> list[PromptToken]:
        text = self._token_text
        tokens = [PromptToken(prompt[0], text(prompt[0]), {})]
        for token, of in zip(prompt[1:], logprobs, strict=True):
            rated = {token: Rated(max(of.logprob, LEAST_LOGPROB), of.rank, text(token))}
            for rank, (id, logprob) in enumerate(of.top, 1):
                rated.setdefault(id, Rated(max(logprob, LEAST_LOGPROB), rank, text(id)))
            tokens.append(PromptToken(token, text(token), rated))
        return tokens

    def _chance(self, token: int, of: TokenLogprobs) -> TokenChance:
        text = self._token_text
        top = [(text(id), max(logprob, LEAST_LOGPROB)) for id, logprob in of.top]
        return TokenChance(text(token), max(of.logprob, LEAST_LOGPROB), top)


def _name_of(token_id: int) -> str:
    return f"token_id:{token_id}"
