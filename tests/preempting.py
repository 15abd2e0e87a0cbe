"""An engine that gives up everything again and again, for tests of what must not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from octavo_engine import LLM


@contextmanager
def preempting(llm: LLM, every: int) -> Iterator[None]:
    """While the block lasts, all running requests are preempted before every so many steps."""
    step, count = llm._engine.step, 0

    def interrupted() -> Any:
        nonlocal count
        count += 1
        if count % every == 0:
            llm._engine.scheduler.preempt_all()
        return step()

    llm._engine.step = interrupted  # type: ignore[method-assign]
    yield
    llm._engine.step = step  # type: ignore[method-assign]
