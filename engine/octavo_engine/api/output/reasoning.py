"""What a model thinks before it answers, apart from the answer: <think>…</think>. Pure; text in pieces.

The newlines around the tags belong to the format and to neither text.
"""

from __future__ import annotations

from typing import ClassVar

from octavo_engine.api.output.calls import marker_opening, may_begin

OPEN, CLOSE = "<think>", "</think>"


class ThinkParser:
    """Splits one answer. begun: whether the prompt has opened the thinking (True), closed it (False), or neither."""

    begins_by_itself: ClassVar[bool]
    """Whether an answer without an opening tag is thinking until a closing one comes."""

    def __init__(self, begun: bool | None) -> None:
        self._thinking = self.begins_by_itself if begun is None else begun
        self._tag_may_come = begun is not False
        self._held = ""
        self._ended = False  # newlines that follow a tag are left out

    def push(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """(reasoning, content) that this text completes. last: nothing follows."""
        self._held += text
        if self._tag_may_come:
            stripped = self._held.lstrip()
            if not stripped.startswith(OPEN) and not last and may_begin(stripped, (OPEN,)):
                return "", ""
            self._tag_may_come = False
            if stripped.startswith(OPEN):
                self._held = stripped[len(OPEN) :]
                self._thinking = True
            self._ended = self._thinking
        reasoning = ""
        if self._thinking:
            reasoning = self._think(last)
            if self._thinking:
                return reasoning, ""
        return reasoning, self._after_tag(self._held, take=True)

    def _think(self, last: bool) -> str:
        self._held = self._after_tag(self._held)
        end, closed = marker_opening(self._held, (CLOSE,), last)
        if closed:
            text, self._held = self._held[:end].rstrip("\n"), self._held[end + len(CLOSE) :]
            self._thinking, self._ended = False, True
            return text
        # Newlines wait: they are not part of the thinking when the closing tag is next.
        end = end if last else len(self._held[:end].rstrip("\n"))
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _after_tag(self, text: str, take: bool = False) -> str:
        if take:
            self._held = ""
        if self._ended:
            text = text.lstrip("\n")
            self._ended = not text
        return text


class DeepSeekR1Parser(ThinkParser):
    """DeepSeek-R1 and its distillations: thinking comes first, and the opening tag may be in the prompt or missing."""

    begins_by_itself = True


class Qwen3Parser(ThinkParser):
    """Qwen3: thinking is between tags, of which the prompt may have given the first; without them there is none."""

    begins_by_itself = False


def begun_by(prompt_end: str) -> bool | None:
    """Whether a prompt that ends like this has opened the model's thinking, closed it, or said nothing of it."""
    text = prompt_end.rstrip()
    return True if text.endswith(OPEN) else False if text.endswith(CLOSE) else None
