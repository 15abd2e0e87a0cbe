"""Decide whether a request may join the queue. Pure; called by the engine client before every submit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QueueLimits:
    """max_num_seqs: how many sequences run together; the others bound those that wait."""

    max_num_seqs: int
    max_num_queued_reqs: int
    max_num_queued_tokens: int

    @property
    def most_sequences(self) -> int:
        """A request with more sequences than this could never be admitted."""
        return self.max_num_seqs + self.max_num_queued_reqs


@dataclass(frozen=True)
class QueueState:
    """live: sequences submitted and not ended; unstarted_tokens: prompt tokens of those without a first token.
    running, waiting: what the engine said after its last step, which may be a moment ago."""

    live: int
    unstarted_tokens: int
    running: int
    waiting: int


def refusal(limits: QueueLimits, state: QueueState, sequences: int, prompt_tokens: int) -> str | None:
    """Why these new sequences may not join, or None.

    The engine's figures lag behind: it may not have seen the last submits yet. So we count what is live here and
    take from the engine only how many of them can run at a time: as many as are running when it says that some
    wait (memory is the limit then), else as many as it has slots.
    """
    can_run = limits.max_num_seqs if state.waiting == 0 else state.running
    waiting = max(0, state.live + sequences - can_run)
    if waiting > limits.max_num_queued_reqs:
        return f"{max(0, state.live - can_run)} requests wait, and at most {limits.max_num_queued_reqs} may"
    # A prompt longer than the limit is welcome when nothing else waits; otherwise it could never be served.
    if state.unstarted_tokens > 0 and state.unstarted_tokens + prompt_tokens > limits.max_num_queued_tokens:
        return (
            f"{state.unstarted_tokens} prompt tokens wait, and at most {limits.max_num_queued_tokens} may, "
            f"with this request's {prompt_tokens}"
        )
    return None
