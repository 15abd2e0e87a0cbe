"""Waiting for what comes by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], what: str, timeout_s: float = 120, every_s: float = 0.2) -> T:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(every_s)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


def least_below(bound: float, measure: Callable[[], float], tries: int = 3) -> float:
    """The least that `measure` returns; it is asked again while that is not below `bound`.

    For seconds that a machine which does other things lengthens: of one try of three it hardly ever does.
    """
    least = measure()
    while least >= bound and (tries := tries - 1):
        least = min(least, measure())
    return least


def is_gone(pid: int) -> bool:
    """Ended; where nobody reaps orphans, a zombie is left of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
