"""What a tool-call parser is made of: text in pieces, content and calls out. One file per format beside it.

Pure. What looked like a call and is none must still come out as content, and what has been given out is never taken
back: so a call is given out from where it is certain, its arguments in pieces from there on; and where it is certain
only at its end, whole. The result of a text does not depend on how it was cut, because each decision is made on the
shortest text that allows it.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

Schemas = Mapping[str, Mapping[str, Any]]
"""The request's functions: name → JSON schema of its parameters, {} where it gives none."""


@dataclass(frozen=True)
class Call:
    """arguments: a JSON object, as text; of an answer that was cut off, its beginning."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallPart:
    """A call or what has come of it since its last part; the arguments of its parts joined are the call's."""

    name: str
    arguments: str
    begins: bool


@dataclass(frozen=True)
class Found:
    """The first `length` characters are these calls; no calls: they are content after all."""

    length: int
    calls: tuple[Call, ...] = ()


class Candidate(ABC):
    """What may become calls. Made where an opening was found, asked again as text arrives."""

    @abstractmethod
    def resolve(self, text: str, last: bool) -> Found | None:
        """text: from the opening on, longer each time. None: more is needed; never None when last."""

    def so_far(self, text: str) -> tuple[Call, ...]:
        """After `resolve` gave None: the calls that it will give for certain, with arguments that only grow."""
        return ()


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
        self._given: list[int] = []
        """Characters of arguments that were given out, of each of the candidate's calls."""

    @abstractmethod
    def opening(self, text: str, line_start: bool, after_call: bool, last: bool) -> tuple[int, bool]:
        """(how much of text is content for certain, whether a call may begin right there)."""

    @abstractmethod
    def candidate(self) -> Candidate:
        """What reads the call that may begin there."""

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[CallPart]]:
        """The content, and what is new of calls. last: nothing follows."""
        self._held += text
        content: list[str] = []
        calls: list[CallPart] = []
        while self._held:
            if self._candidate is None:
                end, found = self.opening(self._held, self._line_start, self._after_call, last)
                content.append(self._emit(end))
                if not found:
                    break
                self._candidate = self.candidate()
            result = self._candidate.resolve(self._held, last)
            if result is None:
                calls += self._give(self._candidate.so_far(self._held))
                break
            assert 0 < result.length <= len(self._held), result
            self._candidate = None
            if result.calls:
                calls += self._give(result.calls)
                self._given = []
                self._held = self._held[result.length :]
                self._blank, self._line_start, self._after_call = "", True, True
            else:
                assert not self._given, "a call was taken back"
                content.append(self._emit(result.length))
        if last and not self._after_call:
            content.append(self._blank)
            self._blank = ""
        return "".join(content), calls

    def _give(self, calls: Sequence[Call]) -> list[CallPart]:
        """What of these was not given out yet."""
        parts = []
        for index, call in enumerate(calls):
            begins = index == len(self._given)
            if begins:
                self._given.append(0)
            if (new := call.arguments[self._given[index] :]) or begins:
                parts.append(CallPart(call.name, new, begins))
                self._given[index] += len(new)
        return parts

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
        return Call(name, written(arguments))
    except (ValueError, RecursionError):  # among them half a surrogate pair, which no answer can carry
        return None


def written(value: Any) -> str:
    """As JSON. Raises ValueError for what JSON cannot say, RecursionError."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
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


class GrowingCall:
    """{"name": …, "arguments": {…}} from its brace on. Where the name comes first, as models are taught, the call is
    certain once its arguments open, and these are the text as it stands; else it is read when it is whole.
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        """names: of the functions that there are, where nothing else marks a call; None: any."""
        self._names = None if names is None else frozenset(names)
        self._name: str | None = None
        self._start = 0
        self._arguments, self._whole = Balance(), Balance()
        self._arguments_end: int | None = None
        self._end: int | None = None
        self._call: Call | None = None

    @property
    def certain(self) -> bool:
        """Whether it is a call, whatever follows."""
        return self._name is not None

    def read(self, text: str, start: int) -> int | None:
        """Past its closing brace; None when text ends before. The same start each time."""
        if self._end is not None:
            return self._end
        if self._name is None and (head := _HEAD.match(text, start)) is not None:
            self._name, self._start = self._known(head[1]), head.end()
        if self._name is not None and self._arguments_end is None:
            self._arguments_end = self._arguments.end(text, self._start)
        self._end = self._whole.end(text, start)
        if self._end is not None and self._name is None:
            call = call_in(text[start : self._end])
            if call is not None and (self._names is None or call.name in self._names):
                self._call = call
        return self._end

    def so_far(self, text: str) -> tuple[Call, ...]:
        if self._name is not None:
            return (Call(self._name, text[self._start : self._arguments_end]),)
        return () if self._call is None else (self._call,)

    def _known(self, written: str) -> str | None:
        try:
            name = json.loads(written)
            name.encode()
        except ValueError:
            return None
        known = name.strip() and (self._names is None or name in self._names)
        return name if known else None


_HEAD = re.compile(
    r'\{\s{0,16}(?:"(?:type|id)"\s{0,4}:\s{0,4}"[^"\\]{0,64}"\s{0,4},\s{0,16}){0,2}"name"\s{0,4}:\s{0,4}'
    r'("(?:[^"\\]|\\.){0,256}")\s{0,16},\s{0,16}"(?:arguments|parameters)"\s{0,4}:\s{0,16}(?=\{)'
)
