"""What a tool-call parser is made of: text in pieces, content and whole calls out. One file per format beside it.

Pure. A call is given out when its last character has arrived, never before: what looked like a call and is none
must still come out as content, and what has been given out is never taken back. The result of a text does not depend
on how it was cut, because each decision is made on the shortest text that allows it.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

Schemas = Mapping[str, Mapping[str, Any]]
"""The request's functions: name → JSON schema of its parameters, {} where it gives none."""


@dataclass(frozen=True)
class Call:
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Found:
    """The first `length` characters are these calls; no calls: they are content after all."""

    length: int
    calls: tuple[Call, ...] = ()


class Candidate(Protocol):
    """What may become calls. Made where an opening was found, asked again as text arrives."""

    def resolve(self, text: str, last: bool) -> Found | None:
        """text: from the opening on, longer each time. None: more is needed; never None when last."""


class ToolParser(ABC):
    """One answer's parser. Subclasses say where calls may begin and what they look like."""

    shows_special_tokens: ClassVar[bool] = False
    """The format's marks are special tokens, which decoding would otherwise leave out."""
    short_ids: ClassVar[bool] = False
    """The model's template takes only ids of nine letters and digits."""

    def __init__(self, schemas: Schemas) -> None:
        self.schemas = schemas
        self._held = ""
        self._blank = ""  # white space at the end of the content so far: none of it if a call follows
        self._line_start = True
        self._after_call = False
        self._candidate: Candidate | None = None

    @abstractmethod
    def opening(self, text: str, line_start: bool, after_call: bool, last: bool) -> tuple[int, bool]:
        """(how much of text is content for certain, whether a call may begin right there)."""

    @abstractmethod
    def candidate(self) -> Candidate:
        """What reads the call that may begin there."""

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[Call]]:
        """The content and the calls that this text completes. last: nothing follows."""
        self._held += text
        content: list[str] = []
        calls: list[Call] = []
        while self._held:
            if self._candidate is None:
                end, found = self.opening(self._held, self._line_start, self._after_call, last)
                content.append(self._emit(end))
                if not found:
                    break
                self._candidate = self.candidate()
            result = self._candidate.resolve(self._held, last)
            if result is None:
                break
            assert 0 < result.length <= len(self._held), result
            self._candidate = None
            if result.calls:
                calls += result.calls
                self._held = self._held[result.length :]
                self._blank, self._line_start, self._after_call = "", True, True
            else:
                content.append(self._emit(result.length))
        if last and not self._after_call:
            content.append(self._blank)
            self._blank = ""
        return "".join(content), calls

    def _emit(self, length: int) -> str:
        """Take this much from what is held as content; the white space at its end waits for what follows."""
        if not length:
            return ""
        text, self._held = self._held[:length], self._held[length:]
        line = text.rpartition("\n")
        self._line_start = not line[2].strip() and (bool(line[1]) or self._line_start)
        shown = (self._blank + text).rstrip()
        self._blank = (self._blank + text)[len(shown) :]
        if shown:
            self._after_call = False
        return shown


# ---- openings


def marker_opening(text: str, markers: Sequence[str], last: bool) -> tuple[int, bool]:
    """The first marker, or the tail that may yet become one."""
    starts = [start for marker in markers if (start := text.find(marker)) >= 0]
    if starts:
        return min(starts), True
    if last:
        return len(text), False
    longest = max(map(len, markers)) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(marker.startswith(text[start:]) for marker in markers):
            return start, False
    return len(text), False


def line_opening(text: str, character: str, line_start: bool) -> int | None:
    """The first such character that only white space precedes in its line."""
    if line_start and text.lstrip().startswith(character):
        return text.index(character)
    match = re.search(r"\n\s*" + re.escape(character), text)
    return None if match is None else match.end() - 1


def may_begin(text: str, words: Iterable[str]) -> bool:
    """Whether text begins with one of the words, or may once more of it has come."""
    return any(text.startswith(word) or word.startswith(text) for word in words)


# ---- what is inside


class Balance:
    """Finds where a bracket closes, going on where it stopped: a long call is read once, not once per token."""

    def __init__(self, quotes: str = '"') -> None:
        self._at = 0
        self._depth = 0
        self._quote = ""
        self._outside = re.compile(f"[{quotes}{{}}()\\[\\]]")

    def end(self, text: str, start: int) -> int | None:
        """Past the bracket that closes the one at start; None when text ends before."""
        at = max(self._at, start)
        while at < len(text):
            if self._quote:
                match = _INSIDE[self._quote].search(text, at)
                if match is None:
                    break
                if match[0] == "\\":
                    if match.end() == len(text):
                        at = match.start()
                        self._at = at
                        return None
                    at = match.end() + 1
                else:
                    at, self._quote = match.end(), ""
                continue
            match = self._outside.search(text, at)
            if match is None:
                break
            at = match.end()
            if match[0] in "\"'":
                self._quote = match[0]
            elif match[0] in "{[(":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return at
        else:
            self._at = at
            return None
        self._at = len(text)
        return None


_INSIDE = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}


def read_json(text: str) -> Any:
    """Raises ValueError for all that is not JSON, NaN among it."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def make_call(name: object, arguments: object) -> Call | None:
    """None when these cannot be a call: no name, or arguments that are no object."""
    if isinstance(arguments, str):  # some models write the object as a text
        try:
            arguments = read_json(arguments or "{}")
        except ValueError:
            return None
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        return None
    try:
        name.encode()
        return Call(name, _written(arguments))
    except (ValueError, RecursionError):  # among them half a surrogate pair, which no answer can carry
        return None


def _written(arguments: dict[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments, allow_nan=False)
    return text


def call_of(document: Any) -> Call | None:
    """{"name": …, "arguments" or "parameters": {…}}, also inside "function"."""
    if not isinstance(document, dict):
        return None
    inner = document.get("function")
    if isinstance(inner, dict):
        document = inner
    return make_call(document.get("name"), document.get("arguments", document.get("parameters")))


def call_in(text: str) -> Call | None:
    try:
        return call_of(read_json(text))
    except ValueError:
        return None


def skip_blank(text: str, start: int) -> int:
    """The first place from start on that is not white space."""
    match = _BLANK.match(text, start)
    assert match is not None
    return match.end()


_BLANK = re.compile(r"\s*")
