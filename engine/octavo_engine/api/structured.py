"""The grammar of a request's answer, made and tried off the event loop and within a time limit. Used by app.py."""

from __future__ import annotations

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from octavo_engine.api.errors import bad_request
from octavo_engine.api.output.forms import Function, function_of
from octavo_engine.api.output.parser import OutputFormat
from octavo_engine.api.output.reasoning import CLOSE, OPEN
from octavo_engine.api.tokenizer import Tokenizer
from octavo_engine.core.messages import Grammar
from octavo_engine.structured.grammar import check, either, grammar_of
from octavo_engine.structured.params import StructuredOutputsError, StructuredOutputsParams
from octavo_engine.structured.parts import OnSpecial
from octavo_engine.structured.settings import StructuredOutputsSettings

LIMIT_S = 5.0
"""What is not compiled by then is refused; vLLM's VLLM_REGEX_COMPILATION_TIMEOUT_S."""
THREADS = 2


class Grammars:
    def __init__(self, settings: StructuredOutputsSettings) -> None:
        self._settings = settings
        # Threads of their own: what is slow to compile holds up no templates and no tokenizing.
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grammars")

    async def of(
        self, asked: StructuredOutputsParams | None, format: OutputFormat | None, tokenizer: Tokenizer, param: str
    ) -> Grammar | None:
        """None when any answer will do. param: the request's field that asks. Raises ApiError."""
        demanded = format is not None and format.demanded is not None
        if asked is None and not demanded and (format is None or format.tools is None or not format.strict):
            return None
        if demanded or asked is None:
            param = "tools"
        make = functools.partial(_make, asked and self._settings.applied(asked), format, tokenizer.special_id)
        work = asyncio.get_running_loop().run_in_executor(self._pool, make)
        try:
            text = await asyncio.wait_for(work, LIMIT_S)
        except StructuredOutputsError as error:
            said = error.problem if error.param in (param, "structured_outputs") else error
            raise bad_request(f"{param}: {said}", param) from None
        except TimeoutError:
            raise bad_request(
                f"{param}: its grammar was not compiled within {LIMIT_S:g} s; make it simpler.", param
            ) from None
        if self._settings.enable_in_reasoning:
            return Grammar(text)
        return after_thinking(Grammar(text), format, tokenizer)


def after_thinking(grammar: Grammar, format: OutputFormat | None, tokenizer: Tokenizer) -> Grammar:
    """Where the model's thinking is told apart from its answer, the grammar is the answer's alone."""
    if format is None or format.reasoning is None or format.begun is False:
        return grammar
    if format.begun or format.reasoning.begins_by_itself:
        return replace(grammar, after=CLOSE)
    # A model whose vocabulary does not have the tag does not think: it would only be led astray.
    return replace(grammar, after=CLOSE, opening=OPEN) if tokenizer.core.token_to_id(OPEN) is not None else grammar


def _make(asked: StructuredOutputsParams | None, format: OutputFormat | None, on_special: OnSpecial) -> str:
    text = _text(asked, format, on_special)
    check(text)
    return text


def _text(asked: StructuredOutputsParams | None, format: OutputFormat | None, on_special: OnSpecial) -> str:
    form = None if format is None else format.call_form
    if format is None or form is None:
        assert asked is not None
        return grammar_of(asked, on_special)
    if format.demanded is not None:
        functions = [function_of(name, format.schemas[name]) for name in format.demanded]
        return form.demanded(functions, format.parallel and not format.named, on_special)
    # Only strict functions are held to their schemas where the model decides.
    functions = [
        function_of(name, schema) if name in format.strict else Function(name, {"type": "object"})
        for name, schema in format.schemas.items()
    ]
    if asked is None:
        return form.free(functions, on_special)
    return either(form.demanded(functions, format.parallel, on_special), grammar_of(asked, on_special))
