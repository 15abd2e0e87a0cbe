"""What the scheduler and the engine know of structured output: a request's next token may have to wait for a mask.

The grammars themselves are structured/matcher.py's; they work beside the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from octavo_engine.core.messages import Grammar


class Constraint(Protocol):
    """One request's grammar and how far its output has come in it. Read between steps only."""

    @property
    def ready(self) -> bool:
        """Whether every token that it was told of is taken in, so that the others hold."""

    @property
    def mask(self) -> bytes | None:
        """Which tokens may come next, one bit each, the lowest bit of the first byte first; None: any."""

    @property
    def complete(self) -> bool:
        """Nothing can follow what came so far."""

    @property
    def error(self) -> str | None:
        """Why it cannot go on: too complex, or no token fits."""


class Constraints(Protocol):
    """Makes constraints and moves them on, in threads of its own."""

    def start(self, grammar: Grammar, end_token_ids: frozenset[int]) -> Constraint:
        """Not ready yet when it returns; end_token_ids may come where the grammar may end."""

    def advance(self, tokens: Sequence[tuple[Constraint, int]]) -> None:
        """Tell constraints of a token each. They are not ready until it is taken in."""

    def settle(self, timeout_s: float, *, grammars: bool = False) -> None:
        """Wait until all that were told of tokens are ready, with `grammars` also those that were just started, or for
        so long."""
