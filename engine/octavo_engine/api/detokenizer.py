"""Token ids to text as they arrive: characters split over tokens, and stop strings split over anything.

Pure; used by the API process and by LLM. The rule behind all of it: what has been emitted is never taken back,
and the pieces joined are the text that decoding everything at once gives.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from octavo_engine.api.tokenizer import Tokenizer
from octavo_engine.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8
"""Tokens held back for an incomplete character. Four bytes make any character; what is longer is not one."""


class IncrementalDecoder(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""

    def finish(self) -> str:
        """What is still held back; U+FFFD for a character that was never completed."""


@dataclass(slots=True)
class TextDelta:
    """num_tokens: how many of the pushed tokens count as output (fewer than pushed when a stop string ended it).
    stop: the stop string that ended the text, or None."""

    text: str
    num_tokens: int
    stop: str | None = None


class TextStream:
    """The text of one answer: decoding, stop strings, and when both begin to apply."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._decoder = make_decoder(tokenizer, skip_special_tokens=sampling.skip_special_tokens)
        self._matcher = StopMatcher(sampling.stop, include=sampling.include_stop_str_in_output)
        self._include_stop_token = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._has_stop = bool(sampling.stop)
        self._count = 0

    @property
    def decode(self) -> Callable[[Sequence[int]], str] | None:
        """What turns tokens that are not the last into text as `push` does, where there are no stop strings."""
        return None if self._has_stop else self._decoder.push

    def push(self, token_ids: Sequence[int], *, last: bool = False, stop_token_id: int | None = None) -> TextDelta:
        """last: no more tokens follow. stop_token_id: the token that ended the output; its text is not part of it."""
        shown = token_ids
        if stop_token_id is not None and not self._include_stop_token and token_ids and token_ids[-1] == stop_token_id:
            shown = token_ids[:-1]
        if not self._has_stop:
            self._count += len(token_ids)
            text = self._decoder.push(shown)
            if last:
                text += self._decoder.finish()
            return TextDelta(text, len(token_ids))
        # One token at a time: where a stop string ends decides how many tokens the answer has,
        # and that must not depend on how many happened to arrive together.
        pieces: list[str] = []
        for index, token_id in enumerate(shown):
            self._count += 1
            text, stop = self._matcher.push(self._decoder.push((token_id,)), search=self._count > self._min_tokens)
            pieces.append(text)
            if stop is not None:
                return TextDelta("".join(pieces), index + 1, stop)
        if last:
            text, stop = self._matcher.push(self._decoder.finish(), search=self._count > self._min_tokens)
            pieces.append(text)
            if stop is None:
                pieces.append(self._matcher.finish())
            return TextDelta("".join(pieces), len(token_ids), stop)
        return TextDelta("".join(pieces), len(token_ids))


class StopMatcher:
    """Finds stop strings in a text that arrives in pieces; holds back what may yet become one.

    The match that ends first wins, the longest of those: so the result does not depend on how the text was cut.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self._exempt = 0  # characters at the start of _held in which no stop string may end

    def push(self, text: str, *, search: bool = True) -> tuple[str, str | None]:
        """(text to emit, the stop string found). Nothing may be pushed after a match."""
        if not text:
            return "", None
        self._held += text
        if search and (found := self._find()):
            start, stop = found
            emitted = self._held[: start + len(stop)] if self._include else self._held[:start]
            self._held = ""
            return emitted, stop
        if not search:
            self._exempt = len(self._held)
        keep = self._partial()
        cut = len(self._held) - keep
        emitted, self._held = self._held[:cut], self._held[cut:]
        self._exempt = max(0, self._exempt - cut)
        return emitted, None

    def finish(self) -> str:
        """The text is over: what was held back did not become a stop string."""
        text, self._held = self._held, ""
        return text

    def _find(self) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None  # (end, start, stop): the smallest is the match we want
        for stop in self._stops:
            start = self._held.find(stop, max(0, self._exempt - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _partial(self) -> int:
        """Length of the longest tail of _held that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def make_decoder(tokenizer: Tokenizer, *, skip_special_tokens: bool) -> IncrementalDecoder:
    if tokenizer.is_byte_level:
        return ByteLevelDecoder(tokenizer, skip_special_tokens)
    return WindowDecoder(tokenizer, skip_special_tokens)


class ByteLevelDecoder:
    """For byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM …): every token is a fixed run of bytes.

    A table lookup and Python's incremental UTF-8 decoder: many times cheaper than decoding a window twice.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._table = _byte_table(tokenizer, skip_special_tokens)
        self._texts = self._table.texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside = False  # of a character

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        if len(token_ids) == 1:
            if not self._inside and (text := self._texts[token_ids[0]]) is not None:
                return text
            data = table[token_ids[0]]
        else:
            data = b"".join([table[token_id] for token_id in token_ids])
        text = self._utf8.decode(data)
        self._inside = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For every other tokenizer: decode the last tokens with and without the new ones and emit the difference.

    The tokens before stand for context: some decoders join or strip by what is to the left.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        # One at a time: a run of byte tokens decodes to characters only where the run ends with a whole one.
        pieces = []
        for token_id in token_ids:
            self._pending.append(token_id)
            pieces.append(self._take(final=False))
        return "".join(pieces)

    def finish(self) -> str:
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)
        incomplete = text.endswith(REPLACEMENT) or len(text) <= len(before)
        if incomplete and not final and len(self._pending) <= MAX_HELD_TOKENS:
            return ""
        self._context, self._pending = self._pending or self._context, []
        return text[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)


class _ByteTable(dict[int, bytes]):
    """Token id → its bytes, filled as ids are seen; b"" for ids that have no text."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self.texts = _TextTable(self)

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._tokenizer.token(token_id)
        value = b"" if token is None else _token_bytes(token)
        self[token_id] = value
        return value


class _TextTable(dict[int, str | None]):
    """Token id → its text, where its bytes are whole characters by themselves, as they mostly are; else None."""

    def __init__(self, table: _ByteTable) -> None:
        super().__init__()
        self._table = table

    def __missing__(self, token_id: int) -> str | None:
        try:
            value = self._table[token_id].decode()
        except UnicodeDecodeError:
            value = None
        self[token_id] = value
        return value


@functools.lru_cache(maxsize=4)
def _byte_table(tokenizer: Tokenizer, skip_special_tokens: bool) -> _ByteTable:
    """One table per tokenizer and mode: all answers share it."""
    return _ByteTable(tokenizer, skip_special_tokens)


def _token_bytes(token: str) -> bytes:
    # As in the ByteLevel decoder of tokenizers: a token with any character outside the alphabet stands for itself.
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
