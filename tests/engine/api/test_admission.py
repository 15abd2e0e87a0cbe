"""Who may join the queue."""

from __future__ import annotations

import pytest

from octavo_engine.api.admission import QueueLimits, QueueState, refusal

LIMITS = QueueLimits(max_num_seqs=4, max_num_queued_reqs=2, max_num_queued_tokens=100)

CASES = [
    # live, unstarted tokens, running, waiting, new sequences, new tokens, admitted
    ((0, 0, 0, 0), 1, 10, True),
    ((0, 0, 0, 0), 6, 10, True),  # four run, two wait
    ((0, 0, 0, 0), 7, 10, False),
    ((5, 10, 0, 0), 1, 10, True),  # the engine has not seen the five yet: four of them will run
    ((6, 10, 0, 0), 1, 10, False),
    ((6, 10, 4, 2), 1, 10, False),
    ((3, 10, 1, 2), 1, 10, False),  # memory is the limit: one runs, two wait
    ((2, 10, 1, 1), 1, 10, True),
    ((0, 0, 0, 0), 1, 500, True),  # alone, any prompt is welcome
    ((1, 0, 1, 0), 1, 500, True),
    ((1, 50, 1, 0), 1, 50, True),
    ((1, 50, 1, 0), 1, 51, False),
]


@pytest.mark.parametrize(("state", "sequences", "tokens", "admitted"), CASES)
def test_the_queue_is_bounded_by_sequences_and_by_prompt_tokens(state, sequences, tokens, admitted) -> None:
    reason = refusal(LIMITS, QueueState(*state), sequences, tokens)

    assert (reason is None) is admitted, reason
