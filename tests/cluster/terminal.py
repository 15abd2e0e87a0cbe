"""Show how a program of several steps goes: each step's name, what it says, and its seconds. Used by demo.py."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Report:
    """Prints steps as they happen, and remembers their seconds for the table at the end."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    _rewriting: bool = False

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(bold(f"▸ {title}"), flush=True)
        started = time.monotonic()
        yield
        self._end_line()
        self.seconds[title] = time.monotonic() - started
        print(f"  {green('✓')} {self.seconds[title]:.1f} s\n", flush=True)

    def say(self, message: str) -> None:
        self._end_line()
        for line in message.splitlines():
            print(f"  {line}", flush=True)

    def dim(self, message: str) -> None:
        """What a long command reports on its way."""
        self._end_line()
        print(f"  {_style('2', message)}", flush=True)

    def rewrite(self, message: str) -> None:
        """A line that the next one replaces; on something that is no terminal, a line like any other."""
        if sys.stdout.isatty():
            print(f"\r\033[K  {message}", end="", flush=True)
            self._rewriting = True
        else:
            print(f"  {message}", flush=True)

    def table(self) -> None:
        width = max(map(len, self.seconds), default=0)
        total = time.monotonic() - self.started
        for title, seconds in self.seconds.items():
            bar = "▏" if seconds < total / 80 else "█" * round(40 * seconds / total)
            print(f"  {title:<{width}}  {seconds:7.1f} s  {_style('2', bar)}")
        print(bold(f"  {'in all':<{width}}  {total:7.1f} s"), flush=True)

    def _end_line(self) -> None:
        if self._rewriting:
            print(flush=True)
            self._rewriting = False


def bold(text: str) -> str:
    return _style("1", text)


def green(text: str) -> str:
    return _style("32", text)


def red(text: str) -> str:
    return _style("31", text)


def _style(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
