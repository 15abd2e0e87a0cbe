"""Messages to a prompt, with the Jinja template that a checkpoint brings. Used by the API process and by LLM.

The template is the model's, never the request's: it comes from the checkpoint or from --chat-template, and runs in
Jinja's immutable sandbox with what transformers gives templates and nothing more. The messages are the request's, and
a template is a program over them: so a rendering has so many seconds and so many characters.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from octavo_engine.api.tokenizer import read_json
from octavo_engine.status import Failure, FailureCode, FatalError

RESERVED_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "self"}
)
"""Names that chat_template_kwargs may not set: they have request fields of their own, or are the template itself."""

RENDER_S = 2.0
"""Longest rendering, in seconds of a processor. Thousands of messages take a tenth of one; more holds up the others."""
MAX_RENDERED_CHARS = 32 * 2**20
"""Longest prompt as text; also the longest text that a template may make by repeating another."""

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_MARK "


class TemplateRefusedError(ValueError):
    """The template did not take these messages; the text is the template's own, for the user."""


class ChatTemplate:
    """The chat template of one checkpoint, compiled. Thread-safe."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)
        self.render_s = RENDER_S

    @classmethod
    def load(
        cls, folder: Path, special_tokens: Mapping[str, str], override: str | Path | None = None
    ) -> ChatTemplate | None:
        """The template of --chat-template or of the checkpoint, or None when there is none (a base model).

        override: a file, or the template itself. Raises FatalError: INVALID_CONFIG for it, MODEL_INVALID for the
        checkpoint's.
        """
        if isinstance(override, str) and "{" in override:
            code, where = FailureCode.INVALID_CONFIG, "--chat-template"
            source: str | None = override
        elif override is not None:
            code, where = FailureCode.INVALID_CONFIG, f"--chat-template {override}"
            try:
                source = Path(override).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise FatalError(
                    Failure(code, f"{where} cannot be read.", "name a file with a Jinja template", detail=str(error))
                ) from error
        else:
            code, where = FailureCode.MODEL_INVALID, f"The chat template in {folder}"
            source = _checkpoint_template(folder)
        if source is None:
            return None
        try:
            return cls(source, special_tokens)
        except jinja2.TemplateError as error:
            fix = "correct it, or give another file with --chat-template"
            raise FatalError(Failure(code, f"{where} is not valid Jinja: {error}", fix)) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises TemplateRefusedError when the template refuses the messages or fails on them."""
        conversation = [dict(message) for message in messages]
        if continue_final_message:
            _mark_final_message(conversation)
        context = {
            **self._special_tokens,
            **(variables or {}),
            "tools": tools,
            "messages": conversation,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._bounded(context)
        except TemplateRefusedError:
            raise
        except jinja2.TemplateError as error:
            raise TemplateRefusedError(f"The model's chat template refused the messages: {error}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # A template is a program over the user's messages; what it trips over is in them.
            raise TemplateRefusedError(f"The model's chat template failed on the messages: {error}") from error
        return _cut_at_mark(text) if continue_final_message else text

    def _bounded(self, context: dict[str, Any]) -> str:
        _deadline.cpu = time.thread_time() + self.render_s
        _deadline.at = time.monotonic() + self.render_s
        pieces, size = [], 0
        for piece in self._template.generate(context):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED_CHARS:
                raise TemplateRefusedError(f"The prompt would be longer than {MAX_RENDERED_CHARS} characters.")
            _check_deadline()
        return "".join(pieces)


def _checkpoint_template(folder: Path) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json, in transformers' order."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = read_json(folder / name).get("chat_template")
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
            template = named.get("default", next(iter(named.values()), None))
            if isinstance(template, str):
                return template
    return None


def _mark_final_message(conversation: list[dict[str, Any]]) -> None:
    content = conversation[-1].get("content") if conversation else None
    if isinstance(content, list):
        parts = [dict(part) for part in content]
        text_part = next((part for part in reversed(parts) if "text" in part), None)
        if text_part is None:
            raise TemplateRefusedError("continue_final_message needs a final message with text.")
        text_part["text"] += _CONTINUE_MARK
        conversation[-1]["content"] = parts
    elif isinstance(content, str):
        conversation[-1]["content"] = content + _CONTINUE_MARK
    else:
        raise TemplateRefusedError("continue_final_message needs a final message with text.")


def _cut_at_mark(text: str) -> str:
    place = text.rfind(_CONTINUE_MARK.strip())
    if place < 0:
        raise TemplateRefusedError("continue_final_message: the model's chat template leaves out the final message.")
    # A template that trims messages has taken the mark's own blank, and would have taken the message's.
    trimmed = not text.startswith(_CONTINUE_MARK, place)
    return text[:place].rstrip() if trimmed else text[:place]


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: marks the assistant's part for training; here it only renders it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


_deadline = threading.local()


def _check_deadline() -> None:
    # The processor's time is what counts, so that a busy machine refuses nobody; the clock is the cheaper to ask.
    if time.monotonic() > _deadline.at:
        left = _deadline.cpu - time.thread_time()
        if left <= 0:
            raise TemplateRefusedError("The model's chat template takes too long over these messages.")
        _deadline.at = time.monotonic() + left


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox sees every access, call and product of a template, and so what its loops do: there we look at the
    clock."""

    intercepted_binops = frozenset({"*", "**"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_deadline()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _check_deadline()
        return super().getitem(obj, argument)

    # Names that no keyword argument of a template can have, as in Jinja's own.
    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _check_deadline()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        _check_deadline()
        if operator == "**" and (abs(left) > 10**6 or abs(right) > 64):
            raise TemplateRefusedError("The model's chat template computes too large a power.")
        for one, other in ((left, right), (right, left)):
            repeats = operator == "*" and isinstance(one, (str, list, tuple)) and isinstance(other, int)
            if repeats and len(one) * other > MAX_RENDERED_CHARS:
                raise TemplateRefusedError("The model's chat template repeats a text too often.")
        return super().call_binop(context, operator, left, right)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
