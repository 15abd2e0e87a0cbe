"""The engine's side of structured output: grammars compiled and masks computed by threads beside the step.

One thread compiles, one moves matchers on; llguidance, which does the work, leaves Python's lock alone meanwhile. After
each step the engine hands over the new tokens of all constrained requests at once and goes on; a request whose mask is
not there yet is left out of a step, the others are not. What is too complex ends that one request.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo_engine.core.constraint import Constraint
from octavo_engine.core.messages import Grammar
from octavo_engine.structured.grammar import explained, limits

log = logging.getLogger(__name__)

CACHED_GRAMMARS = 16
"""Compiled grammars that are kept for the next request with the same one."""


class Matcher:
    """One request's constraint. Written by the threads while it is not ready, read by the engine when it is."""

    def __init__(self, grammar: Grammar, end_token_ids: frozenset[int]) -> None:
        self.grammar = grammar
        self.ends = end_token_ids
        self.ready = False
        self.mask: bytes | None = None
        self.complete = False
        self.error: str | None = None
        self.core: Any = None
        self.gate = None if grammar.after is None else Gate(grammar.after, grammar.opening)


class Gate:
    """Where the model's thinking ends, in bytes: the tags may be one token or many, and a token may go beyond."""

    def __init__(self, after: str, opening: str | None) -> None:
        self._after = after.encode()
        self._opening = None if opening is None else opening.encode()
        self._text = b""
        self.passed = False
        """The thinking is over, and there was none of the answer yet."""

    @property
    def thinks(self) -> bool:
        """The next token may be any."""
        return self._opening is None and not self.passed

    @property
    def opening(self) -> bytes:
        """The opening tag, or what is left of it, while it may still come."""
        return b"" if self._opening is None else self._opening[len(self._text) :]

    @property
    def half_open(self) -> bool:
        return bool(self._text) and self._opening is not None

    def push(self, text: bytes) -> bytes | None:
        """None while the answer has not begun, else what has come of it already."""
        if self.passed:
            return text if text.strip(BLANK_LINE) else b""
        self._text += text
        if self._opening is not None:
            if not self._text.startswith(self._opening):
                return None if self._opening.startswith(self._text) else self._text
            self._opening = None
        before, found, rest = self._text.partition(self._after)
        if found:
            rest = rest.lstrip(BLANK_LINE)
            self.passed = not rest
            return rest or None
        self._text = before[-len(self._after) :]
        return None


BLANK_LINE = b"\n\n"


class Matchers:
    """The engine's constraints. tokenizer_file: tokenizer.json; vocab_size: columns of the logits."""

    def __init__(self, tokenizer_file: Path, vocab_size: int) -> None:
        self._file, self._vocab_size = tokenizer_file, vocab_size
        self._tokenizer: Any = None
        self._problem: str | None = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._executor: Any = None
        self._to_compile: queue.SimpleQueue[Matcher] = queue.SimpleQueue()
        self._to_advance: queue.SimpleQueue[Sequence[tuple[Matcher, int | None]]] = queue.SimpleQueue()
        self._settled = threading.Condition()
        self._busy = 0
        self._compiling = 0
        threading.Thread(target=self._compile_all, name="grammars", daemon=True).start()
        threading.Thread(target=self._advance_all, name="masks", daemon=True).start()

    # ---- called by the engine

    def start(self, grammar: Grammar, end_token_ids: frozenset[int]) -> Constraint:
        matcher = Matcher(grammar, end_token_ids)
        with self._settled:
            self._compiling += 1
        self._to_compile.put(matcher)
        return matcher

    def advance(self, tokens: Sequence[tuple[Constraint, int]]) -> None:
        batch: list[tuple[Matcher, int | None]] = []
        for matcher, token in tokens:
            assert isinstance(matcher, Matcher)
            matcher.ready = False
            batch.append((matcher, token))
        self._hand_over(batch)

    def settle(self, timeout_s: float, *, grammars: bool = False) -> None:
        with self._settled:
            self._settled.wait_for(lambda: not self._busy and not (grammars and self._compiling), timeout_s)

    # ---- threads

    def _hand_over(self, batch: Sequence[tuple[Matcher, int | None]]) -> None:
        with self._settled:
            self._busy += 1
        self._to_advance.put(batch)

    def _compile_all(self) -> None:
        # Here and not at the first request: reading a vocabulary holds Python's lock for most of a second.
        try:
            self._load()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the file, other requests are served
            self._problem = "this model's tokenizer cannot be used for structured output"
            log.warning("no structured output: %s cannot be read error=%.300s", self._file, error)
        while True:
            matcher = self._to_compile.get()
            try:
                self._compile(matcher)
            except Exception as error:
                log.exception("a grammar failed")
                matcher.error = f"the grammar cannot be used ({type(error).__name__})"
            if matcher.error is None:
                self._hand_over([(matcher, None)])
            else:
                matcher.ready = True
            with self._settled:
                self._compiling -= 1
                self._settled.notify_all()

    def _load(self) -> None:
        from llguidance import LLExecutor, LLTokenizer

        text = self._file.read_text(encoding="utf-8")
        try:
            self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size)
        except ValueError:  # tokens that the model has no logits for
            self._tokenizer = LLTokenizer(text)
        self._executor = LLExecutor()

    def _compile(self, matcher: Matcher) -> None:
        from llguidance import LLMatcher

        text = matcher.grammar.text
        if self._problem is not None:
            matcher.error = self._problem
            return
        core = self._compiled.get(text)
        if core is None:
            core = LLMatcher(self._tokenizer, text, log_level=0, limits=limits())
            if core.is_error():
                matcher.error = explained(core.get_error())
                return
            self._compiled[text] = core
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(text)
        matcher.core = core.deep_copy()

    def _advance_all(self) -> None:
        while True:
            batch = self._to_advance.get()
            try:
                self._advance(batch)
            except Exception as error:
                log.exception("masks failed")
                for matcher, _ in batch:
                    matcher.error = f"the grammar failed ({type(error).__name__})"
            for matcher, _ in batch:
                matcher.ready = True
            with self._settled:
                self._busy -= 1
                self._settled.notify_all()

    # ---- work

    def _advance(self, batch: Sequence[tuple[Matcher, int | None]]) -> None:
        wanting = []
        for matcher, token in batch:
            if token is not None:
                self._take(matcher, token)
            if matcher.error is None and not matcher.complete:
                if matcher.gate is not None and matcher.gate.thinks:
                    matcher.mask = None
                else:
                    wanting.append(matcher)
        if wanting:
            self._compute_masks(wanting)

    def _take(self, matcher: Matcher, token: int) -> None:
        core = matcher.core
        if matcher.gate is not None:
            begun = matcher.gate.push(self._tokenizer.decode_bytes([token]))
            if begun is None:
                return
            matcher.gate = None
            if begun and not core.consume_tokens(self._tokenizer.tokenize_bytes(begun)):
                matcher.error = "the answer went on where the thinking ended, in another form than the grammar's"
                return
        elif token in matcher.ends:
            matcher.complete = True  # an end of text that the request ignores
        elif not core.consume_token(token):
            matcher.error = _reason(core)
        if matcher.error is None and core.is_stopped() and not core.is_error():
            matcher.complete = True

    def _compute_masks(self, matchers: Sequence[Matcher]) -> None:
        words = -(-self._tokenizer.vocab_size // 32)
        size = 4 * words
        buffer = (ctypes.c_uint8 * (size * len(matchers)))()
        self._executor.unsafe_compute_mask_ptr(
            [(matcher.core, index) for index, matcher in enumerate(matchers)], ctypes.addressof(buffer), size,
            len(matchers),
        )  # fmt: skip
        view = memoryview(buffer)
        for index, matcher in enumerate(matchers):
            if matcher.core.is_error():
                matcher.error = _reason(matcher.core)
                continue
            mask = bytearray(view[index * size : (index + 1) * size])
            # The tokenizer's file names one end token; the request's are others, or none.
            if matcher.core.is_accepting():
                for token in matcher.ends:
                    if token < 8 * size:
                        mask[token >> 3] |= 1 << (token & 7)
            if matcher.gate is not None:
                self._open(mask, matcher.gate)
            if not any(mask):
                matcher.error = "no token can follow what the answer has so far"
            matcher.mask = bytes(mask[: -(-self._vocab_size // 32) * 4])

    def _open(self, mask: bytearray, gate: Gate) -> None:
        """Let the tokens in that the gate allows beside the grammar's, or instead of them."""
        if gate.half_open:
            mask[:] = bytes(len(mask))
        texts = (b"\n", BLANK_LINE) if gate.passed else (gate.opening,)
        for text in texts:
            for token in self._tokenizer.tokenize_bytes(text, parse_special=True)[:1]:
                mask[token >> 3] |= 1 << (token & 7)


def _reason(core: Any) -> str:
    return "the answer cannot go on in the grammar's form: " + explained(core.get_error()).partition(": ")[2]
