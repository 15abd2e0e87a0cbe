"""An answer's text taken apart as it arrives: reasoning, then content and tool calls. Used by answer.py."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from octavo_engine.api.output.calls import CallPart, Schemas, ToolParser
from octavo_engine.api.output.forms import FORMS, CallForm
from octavo_engine.api.output.hermes import HermesParser
from octavo_engine.api.output.llama3_json import Llama3JsonParser
from octavo_engine.api.output.mistral import MistralParser
from octavo_engine.api.output.pythonic import PythonicParser
from octavo_engine.api.output.qwen3_coder import Qwen3CoderParser
from octavo_engine.api.output.reasoning import DeepSeekR1Parser, Qwen3Parser, ThinkParser

TOOL_PARSERS: Mapping[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "qwen3_coder": Qwen3CoderParser,
    "pythonic": PythonicParser,
}
"""By the names of --tool-call-parser."""

REASONING_PARSERS: Mapping[str, type[ThinkParser]] = {"deepseek_r1": DeepSeekR1Parser, "qwen3": Qwen3Parser}
"""By the names of --reasoning-parser."""

_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolCall:
    """index: its place among the calls of its choice. arguments: a JSON object, as text.

    While an answer is streamed, a call or a part of one; only the first part begins it.
    """

    index: int
    id: str
    name: str
    arguments: str
    begins: bool = True


def joined(parts: Iterable[ToolCall]) -> list[ToolCall]:
    """Whole calls from their parts."""
    calls: dict[int, ToolCall] = {}
    for part in parts:
        call = calls.get(part.index)
        calls[part.index] = part if call is None else replace(call, arguments=call.arguments + part.arguments)
    return list(calls.values())


@dataclass(frozen=True)
class Parsed:
    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


@dataclass(frozen=True)
class OutputFormat:
    """How the answers to one request are to be read. None: that part is not looked for.

    begun: what the prompt says of thinking (see ThinkParser). parallel False: only a choice's first call is given.
    demanded: the functions of which one must be called, None where the model decides; named: the request names it.
    strict: those whose calls keep to their schemas also then.
    """

    tools: type[ToolParser] | None = None
    schemas: Schemas = field(default_factory=dict)
    parallel: bool = True
    reasoning: type[ThinkParser] | None = None
    include_reasoning: bool = True
    begun: bool | None = None
    demanded: tuple[str, ...] | None = None
    named: bool = False
    strict: frozenset[str] = frozenset()

    @property
    def call_form(self) -> CallForm | None:
        """How the model writes calls, as grammars."""
        return None if self.tools is None else next(FORMS[n] for n, kind in TOOL_PARSERS.items() if kind is self.tools)


class OutputParser:
    """One choice's parser."""

    def __init__(self, format: OutputFormat) -> None:
        self._format = format
        self._tools = None if format.tools is None else format.tools(format.schemas)
        self._thinking = None if format.reasoning is None else format.reasoning(format.begun)
        self._num_calls = self._num_begun = 0
        self._id = ""

    @property
    def named(self) -> bool:
        """The call was no decision of the model: it does not end the answer in a way of its own."""
        return self._format.named

    @property
    def has_calls(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str, *, last: bool = False) -> Parsed:
        reasoning = ""
        if self._thinking is not None:
            reasoning, text = self._thinking.push(text, last=last)
            if not self._format.include_reasoning:
                reasoning = ""
        if self._tools is None:
            return Parsed(text, reasoning)
        content, calls = self._tools.push(text, last=last)
        return Parsed(content, reasoning, self._numbered(calls) if calls else [])

    def _numbered(self, parts: list[CallPart]) -> list[ToolCall]:
        assert self._tools is not None
        numbered = []
        for part in parts:
            if part.begins:
                self._num_begun += 1
                self._id = _new_id(self._tools.short_ids)
            if self._num_begun > 1 and not self._format.parallel:
                continue
            self._num_calls = self._num_begun
            numbered.append(ToolCall(self._num_calls - 1, self._id, part.name, part.arguments, part.begins))
        return numbered


def _new_id(short: bool) -> str:
    if short:
        return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
