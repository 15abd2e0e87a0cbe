"""Free text with forms in it: the tags of tools, and vLLM's structural_tag in both of its forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo_engine.structured.params import StructuredOutputsError, StructuredOutputsParams
from octavo_engine.structured.parts import OnSpecial, document_of, json_part, literal, quoted, regex_part

MAX_TAGS = 256


def tagged_text(tags: Sequence[tuple[str, str]], on_special: OnSpecial | None = None, first: str = "") -> str:
    """Any text, in which each trigger is followed by the rule beside it. Tags with one trigger are alternatives."""
    bodies: dict[str, list[str]] = {}
    for trigger, body in tags:
        bodies.setdefault(trigger, []).append(body)
    rules = [f"start: {first}({' | '.join(f'tag_{i}' for i in range(len(bodies)))})* TEXT", "TEXT: /(.|\\n)*/"]
    for i, (trigger, alternatives) in enumerate(bodies.items()):
        body = " | ".join(f"body_{i}_{j}" for j in range(len(alternatives)))
        rules += [f"body_{i}_{j}: {alternative}" for j, alternative in enumerate(alternatives)]
        token = on_special(trigger) if on_special is not None else None
        if token is not None:
            rules.append(f"tag_{i}: TEXT <[{token}]> ({body})")
        else:
            rules += [f"head_{i}[lazy]: TEXT {quoted(trigger)}", f"tag_{i}: head_{i} ({body})"]
    return "\n".join(rules)


def structural(params: StructuredOutputsParams, on_special: OnSpecial | None) -> str:
    """Of params.structural_tag. Raises StructuredOutputsError."""
    assert isinstance(params.structural_tag, str)
    document = document_of("structural_tag", params.structural_tag)
    if "format" in document:
        return _Formats(params, on_special).grammar(document["format"])
    structures, triggers = document.get("structures"), document.get("triggers")
    if not _is_list(structures, dict) or not _is_list(triggers, str):
        raise _wrong("needs `format`, or `structures`, a list of objects, and `triggers`, texts.")
    found = []
    for structure in structures:
        begin, end = structure.get("begin"), structure.get("end", "")
        if not isinstance(begin, str) or not isinstance(end, str):
            raise _wrong("each structure needs `begin` and `end`, texts.")
        trigger = _trigger_of(begin, triggers)
        body = " ".join([quoted(begin[len(trigger) :]), json_part(structure.get("schema", True), params), quoted(end)])
        found.append((trigger, body.removeprefix('"" ').removesuffix(' ""')))
    return tagged_text(found, on_special)


class _Formats:
    """The newer form: formats within formats (const_string, json_schema, regex, any_text, sequence, or, tag,
    triggered_tags, tags_with_separator), each a part of a rule or a rule of its own."""

    def __init__(self, params: StructuredOutputsParams, on_special: OnSpecial | None) -> None:
        self._params, self._on_special = params, on_special
        self._rules: list[str] = []
        self._open = {"TEXT"}
        """What ends in any text, which nothing may follow: there would be no telling where it ends."""

    def grammar(self, format: Any) -> str:
        return "\n".join([f"start: {self._part(format, '')}", *self._rules, "TEXT: /(.|\\n)*/"])

    def _part(self, format: Any, end: str) -> str:
        """What stands for the format and for the text that follows it; free text must know where it ends."""
        kind = format.get("type") if isinstance(format, dict) else None
        match kind:
            case "const_string":
                return self._ended(literal(_text(format, "value"), self._on_special), end)
            case "json_schema":
                if format.get("style", "json") != "json":
                    raise _wrong("json_schema has no style but json.")
                return self._ended(json_part(format.get("json_schema", True), self._params), end)
            case "regex":
                return self._ended(regex_part(_text(format, "pattern")), end)
            case "any_text":
                return self._any_text(format, end)
            case "sequence":
                return self._sequence(_list(format, "elements"), end)
            case "or":
                return self._rule([self._part(element, end) for element in _list(format, "elements")])
            case "tag":
                return self._tag(format, "", end)
            case "triggered_tags":
                return self._triggered(format, end)
            case "tags_with_separator":
                return self._separated(format, end)
        known = "const_string, json_schema, regex, any_text, sequence, or, tag, triggered_tags, tags_with_separator"
        raise _wrong(f"a format's type must be one of {known}; got {str(kind)[:100]!r}.")

    def _ended(self, part: str, end: str) -> str:
        return f"{self._closed(part)} {literal(end, self._on_special)}" if end else part

    def _closed(self, part: str) -> str:
        if part.split(" ")[-1].strip("()?*+") in self._open:
            raise _wrong("any text must come last, or be followed by a const_string or the end of its tag.")
        return part

    def _rule(self, alternatives: list[str], lazy: bool = False) -> str:
        if len(self._rules) == MAX_TAGS:
            raise _wrong(f"has more than {MAX_TAGS} formats.")
        name = f"part_{len(self._rules)}"
        if any(part.split(" ")[-1] in self._open for part in alternatives):
            self._open.add(name)
        self._rules.append(f"{name}{'[lazy]' if lazy else ''}: {' | '.join(alternatives)}")
        return name

    def _any_text(self, format: Any, end: str) -> str:
        if format.get("excludes"):
            raise _wrong("any_text with `excludes` is not supported.")
        if not end:
            return "TEXT"
        part = literal(end, self._on_special)
        # A special token ends a text by itself: no text has it inside.
        return f"TEXT {part}" if part.startswith("<[") else self._rule([f"TEXT {part}"], lazy=True)

    def _sequence(self, elements: list[Any], end: str) -> str:
        parts: list[str] = []
        rest = list(elements)
        while rest:
            element, after = rest.pop(0), rest[0] if rest else None
            if element == _ANY_TEXT and isinstance(after, dict) and after.get("type") == "const_string":
                part = self._ended(self._part(element, _text(rest.pop(0), "value")), "" if rest else end)
            else:
                part = self._part(element, "" if rest else end)
            parts.append(self._closed(part) if rest else part)
        return " ".join(parts)

    def _tag(self, tag: Any, trigger: str, end: str = "") -> str:
        """trigger: what has been written of its beginning."""
        begin, own = _text(tag, "begin"), tag.get("end", "")
        ends = own if isinstance(own, list) else [own]
        if len(ends) != 1 or not isinstance(ends[0], str):
            raise _wrong("a tag's `end` must be one text.")
        rest = begin[len(trigger) :]
        content = tag.get("content")
        body = self._ended(self._part(content, ends[0]), end) if ends[0] else self._part(content, end)
        return f"{literal(rest, self._on_special)} {body}" if rest else body

    def _triggered(self, format: Any, end: str) -> str:
        if format.get("excludes"):
            raise _wrong("triggered_tags with `excludes` are not supported.")
        triggers = _list(format, "triggers", str)
        tags: list[str] = []
        for tag in _list(format, "tags", dict):
            trigger = _trigger_of(_text(tag, "begin"), triggers)
            part = literal(trigger, self._on_special)
            head = f"TEXT {part}" if part.startswith("<[") else self._rule([f"TEXT {part}"], lazy=True)
            tags.append(f"{head} {self._tag(tag, trigger)}")
        any_tag = self._rule(tags)
        if format.get("stop_after_first"):
            return self._ended(any_tag if format.get("at_least_one") else self._rule([any_tag, "TEXT"]), end)
        return self._ended(f"{self._closed(any_tag)}{'+' if format.get('at_least_one') else '*'} TEXT", end)

    def _separated(self, format: Any, end: str) -> str:
        any_tag = self._closed(self._rule([self._tag(tag, "") for tag in _list(format, "tags", dict)]))
        separator = _text(format, "separator")
        more = f" ({literal(separator, self._on_special)} {any_tag})*" if separator else f" {any_tag}*"
        tags = any_tag if format.get("stop_after_first") else any_tag + more
        return self._ended(f"({tags}){'' if format.get('at_least_one') else '?'}", end)


_ANY_TEXT = {"type": "any_text"}


def _trigger_of(begin: str, triggers: Sequence[str]) -> str:
    trigger = next((t for t in triggers if begin.startswith(t)), None)
    if trigger is None:
        raise _wrong(f"no trigger begins {begin[:100]!r}.")
    return trigger


def _text(format: Any, name: str) -> str:
    value = format.get(name)
    if not isinstance(value, str):
        raise _wrong(f"{str(format.get('type', 'tag'))[:50]} needs `{name}`, a text.")
    return value


def _list(format: Any, name: str, kind: type = object) -> list[Any]:
    value = format.get(name)
    if not _is_list(value, kind):
        raise _wrong(f"{format['type']} needs `{name}`, a list of 1 to {MAX_TAGS}.")
    found: list[Any] = value
    return found


def _wrong(problem: str) -> StructuredOutputsError:
    return StructuredOutputsError("structural_tag", problem)


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_TAGS and all(isinstance(part, kind) for part in value)
