"""Waiting for what comes by itself, in tests of clusters."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], what: str, timeout_s: float = 120, every_s: float = 0.2) -> T:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(every_s)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")
