"""How long a step takes, learned while running: step_s = base_s + per_token_s * tokens.

Least squares with exponential forgetting over the steps seen; pure arithmetic, fed by engine.step. Its use is to
predict how long what waits will have to wait.

Beside it, how many prompt tokens a step may take without holding up the streams that it carries.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGET = 0.99
"""Weight of the past for each new step: about the last hundred steps count."""
FIRST_CHUNK = 512
"""Prompt tokens beside decodes while nothing is known of their cost: half a millisecond of a large GPU's arithmetic."""
CHUNK_UNIT = 64
"""Chunks are multiples of this, as the kernels' tiles are."""
MAX_CHUNK = 1 << 20
WAITING_WEIGHT = 2.0
"""Streams that a request counts for which waits for its first token."""
MOST_WAIT = 8.0
"""As much more of a step as it would be else may prompts have that a crowd waits for."""
DECODE_WORK = 400
"""What a decode adds to a step, in tokens of context that are read in that time. Llama-3.1-8B on an H200, 32 and 256
decodes: 418."""
CLOSE_WORK = 16_000
"""Tokens that a GPU reads in half a millisecond: from steps that differ by less, noise would make any slope."""


class StepCost:
    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._tokens2 = self._product = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        self._weight = FORGET * self._weight + 1.0
        self._tokens = FORGET * self._tokens + tokens
        self._seconds = FORGET * self._seconds + seconds
        self._tokens2 = FORGET * self._tokens2 + tokens * tokens
        self._product = FORGET * self._product + tokens * seconds

    @property
    def per_token_s(self) -> float:
        """Seconds that one more token adds to a step; 0 before the first step."""
        if not self._weight:
            return 0.0
        spread = self._weight * self._tokens2 - self._tokens**2
        # All steps of one size say nothing of the slope: then the mean is all there is to go by.
        if spread <= 1e-9 * self._weight * self._tokens2:
            return self._seconds / self._tokens
        slope = (self._weight * self._product - self._tokens * self._seconds) / spread
        return max(slope, 0.0)

    @property
    def base_s(self) -> float:
        """Seconds of a step with no tokens."""
        if not self._weight:
            return 0.0
        return max((self._seconds - self.per_token_s * self._tokens) / self._weight, 0.0)

    def predict_queue_s(self, waiting_tokens: int, tokens_per_step: int, running: int) -> float:
        """Seconds until the first token of a request that arrives now, behind `waiting_tokens` of prompts."""
        if not waiting_tokens:
            return 0.0
        room = max(tokens_per_step - running, 1)
        steps = -(-waiting_tokens // room)
        return waiting_tokens * self.per_token_s + steps * (self.base_s + running * self.per_token_s)


class ChunkLimit:
    """Keeps a step with prompts from taking more than `slowdown` times as long as one of the same decodes alone.

    Both times are learned. What a prompt token adds grows along a long prompt, and is nothing as long as the step
    waits for weights anyway. Steps without prompts are kept by their work, the tokens that they read, in powers of
    two; others are reached along the line through those that were seen. They have to be: a crowd that arrives is
    seen beside prompts only, and when its decodes were held to be as quick as the most that were known, the rest of
    their time counted as the cost of the prompts, which then came two by two. 256 streams at once had 89 % of their
    throughput offline and the last a first token after 2 s (H200, measured).

    Where few were seen, the line is as steep as bytes say, weights against keys and values: a step reads both. On a
    server that has had eight short requests, 256 streams at once went from 86.5 to 97.3 % of their throughput offline
    with it (H200, measured).

    Where many wait for their first token and few streams are held up, longer steps are right for all of them together.
    Simulated on an H200, 256 streams at once reach 92 % of their throughput offline without it and the last begins
    after 1.3 s; with a request that waits counted as one stream 96.0 % and 0.91 s, as two 97.2 % and 0.80 s for a gap
    of 24 ms at p99 and 41 at most (59 on an engine that has served nothing), as three 97.8 % and 0.74 s for 27 and 54.
    Where prompts come one by one nothing changes.
    """

    def __init__(self, slowdown: float, context_share: float = 0.0) -> None:
        """context_share: bytes of a token of context over bytes of the weights."""
        assert slowdown > 1
        self._slowdown = slowdown
        self._context_share = context_share
        self._quiet_of: dict[int, _Quiet] = {}
        self._per_token_s: float | None = None
        self._allowed = FIRST_CHUNK
        """Of the last step that was asked about."""

    def observe(self, decodes: int, context: int, prompt_tokens: int, seconds: float) -> None:
        """context: tokens that the decodes have together."""
        if not prompt_tokens:
            work = _work(decodes, context)
            mean = self._quiet_of.setdefault(work.bit_length(), _Quiet(work, seconds))
            # A step now and then takes longer for reasons of the host's: it must not count for more than it is.
            mean.seconds += 0.1 * (min(seconds, 2 * mean.seconds) - mean.seconds)
            mean.work += 0.1 * (work - mean.work)
            return
        quiet = self._quiet(decodes, context) if decodes else 0.0
        if quiet is None:
            return
        per_token = max(seconds - quiet, 0.0) / prompt_tokens
        known = per_token if self._per_token_s is None else self._per_token_s
        # A short prompt alone pays for what any step with prompts costs. Taken for the cost of a token, it held up the
        # next long one: first tokens at 15 requests a second came after 73 ms at p99, and without it after 41.
        if per_token > known and 2 * prompt_tokens < min(self._allowed, FIRST_CHUNK):
            return
        # Costs rise along a prompt, and what is learned is two steps old: a rise is followed at once.
        self._per_token_s = max(per_token, (known + per_token) / 2)

    def tokens(self, decodes: int, context: int, waiting: int = 0) -> int | None:
        """Prompt tokens for a step of so many decodes, while `waiting` requests have not begun; None where nobody is
        held up.
        """
        if not decodes:
            return None
        quiet, more = self._quiet(decodes, context), min(1.0 + WAITING_WEIGHT * waiting / decodes, MOST_WAIT)
        if quiet is None or self._per_token_s is None:
            tokens = int(FIRST_CHUNK * more)
        else:
            allowed_s = (self._slowdown - 1.0) * quiet * more
            tokens = MAX_CHUNK if self._per_token_s * MAX_CHUNK <= allowed_s else int(allowed_s / self._per_token_s)
        self._allowed = max(tokens // CHUNK_UNIT * CHUNK_UNIT, CHUNK_UNIT)
        return self._allowed

    def _quiet(self, decodes: int, context: int) -> float | None:
        """Seconds of the decodes alone; None where no step is known."""
        if not self._quiet_of:
            return None
        work = _work(decodes, context)
        size = work.bit_length()
        nearest = self._quiet_of[min(self._quiet_of, key=lambda s: abs(s - size))]
        seconds = nearest.seconds + self._per_work_s() * (work - nearest.work)
        return max(seconds, nearest.seconds / 2)

    def _per_work_s(self) -> float:
        """Slope of the line through the steps without prompts, by least squares; where they lie close, rather the one
        that is expected.
        """
        known = self._quiet_of.values()
        work = sum(quiet.work for quiet in known) / len(known)
        seconds = sum(quiet.seconds for quiet in known) / len(known)
        expected = seconds * self._context_share / (1.0 + work * self._context_share)
        spread = sum((quiet.work - work) ** 2 for quiet in known)
        both = sum((quiet.work - work) * quiet.seconds for quiet in known)
        return max((both + CLOSE_WORK**2 * expected) / (spread + CLOSE_WORK**2), 0.0)


@dataclass(slots=True)
class _Quiet:
    """A step of decodes alone, as they are on average lately."""

    work: float
    seconds: float


def _work(decodes: int, context: int) -> int:
    return context + DECODE_WORK * decodes
