"""`octavo chat` and `octavo complete`: a conversation with a server, on the terminal. Standard library only."""

from __future__ import annotations

import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

TIMEOUT_S = 600.0


class RefusedError(Exception):
    """The server is not there, or said no; the text is for people."""


@dataclass
class Talk:
    """Whom to ask, and how. url: with its /v1. model None: the one that the server names first."""

    url: str
    model: str | None = None
    api_key: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    def name(self) -> str:
        """The model's. Raises RefusedError."""
        if self.model is None:
            with self._open("/models", None) as response:
                self.model = str(json.load(response)["data"][0]["id"])
        return self.model

    def stream(self, route: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The first choice of each event. Raises RefusedError."""
        with self._open(route, {"model": self.name(), "stream": True, **self.sampling, **body}) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if not data or data.startswith(":"):
                    continue
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise RefusedError(event["error"]["message"])
                if event["choices"]:
                    yield event["choices"][0]

    def _open(self, route: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url.rstrip("/") + route, data, headers)
            return urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            raise RefusedError(_message(error)) from None
        except (urllib.error.URLError, ValueError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            raise RefusedError(f"no server at {self.url}: {reason}. Start one with `octavo serve MODEL`.") from None


def chat(talk: Talk, system_prompt: str | None, quick: str | None) -> int:
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def answer(text: str, out: TextIO) -> None:
        messages.append({"role": "user", "content": text})
        said = ""
        for choice in talk.stream("/chat/completions", {"messages": messages}):
            piece = choice["delta"].get("content") or ""
            said += piece
            _write(out, piece)
        messages.append({"role": "assistant", "content": said})

    return _converse(talk, answer, quick)


def complete(talk: Talk, quick: str | None) -> int:
    def answer(text: str, out: TextIO) -> None:
        for choice in talk.stream("/completions", {"prompt": text}):
            _write(out, choice["text"])

    return _converse(talk, answer, quick)


def _converse(talk: Talk, answer: Any, quick: str | None) -> int:
    """Exit status: 0, or 1 when the server refused."""
    try:
        if quick is not None:
            answer(quick, sys.stdout)
            print()
            return 0
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            print(f"{talk.name()} at {talk.url}. Ctrl-D ends it.")
        while (text := _line("> " if is_terminal else "")) is not None:
            if text.strip():
                answer(text, sys.stdout)
                print()
    except RefusedError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def _line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None


def _write(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()


def _message(error: urllib.error.HTTPError) -> str:
    body = error.read()
    try:
        return f"HTTP {error.code}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}: {body[:200].decode(errors='replace')}"
