"""How long a step takes, learned while running: step_s = base_s + per_token_s * tokens.

Least squares with exponential forgetting over the steps seen; pure arithmetic, fed by engine.step. Its use is to
predict how long what waits will have to wait.

Beside it, how many prompt tokens a step may take without holding up the streams that it carries.
"""

from __future__ import annotations

FORGET = 0.99
"""Weight of the past for each new step: about the last hundred steps count."""
FIRST_CHUNK = 512
"""Prompt tokens beside decodes while nothing is known of their cost: half a millisecond of a large GPU's arithmetic."""
CHUNK_UNIT = 64
"""Chunks are multiples of this, as the kernels' tiles are."""
MAX_CHUNK = 1 << 20


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

    Both times are learned: steps without prompts by their number of decodes, in powers of two, and what a prompt token
    adds to them, which grows along a long prompt and is nothing as long as the step waits for weights anyway.
    """

    def __init__(self, slowdown: float) -> None:
        assert slowdown > 1
        self._slowdown = slowdown
        self._quiet_s: dict[int, float] = {}
        self._per_token_s: float | None = None
        self._allowed = FIRST_CHUNK
        """Of the last step that was asked about."""

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        if not prompt_tokens:
            size = decodes.bit_length()
            known = self._quiet_s.get(size)
            # A step now and then takes longer for reasons of the host's: it must not count for more than it is.
            self._quiet_s[size] = seconds if known is None else known + 0.1 * (min(seconds, 2 * known) - known)
            return
        quiet = self._quiet(decodes) if decodes else 0.0
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

    def tokens(self, decodes: int) -> int | None:
        """Prompt tokens for a step of so many decodes; None where nobody is held up."""
        if not decodes:
            return None
        quiet = self._quiet(decodes)
        if quiet is None or self._per_token_s is None:
            self._allowed = FIRST_CHUNK
        else:
            allowed_s = (self._slowdown - 1.0) * quiet
            tokens = MAX_CHUNK if self._per_token_s * MAX_CHUNK <= allowed_s else int(allowed_s / self._per_token_s)
            self._allowed = max(tokens // CHUNK_UNIT * CHUNK_UNIT, CHUNK_UNIT)
        return self._allowed

    def _quiet(self, decodes: int) -> float | None:
        """Of the nearest number of decodes that was seen."""
        size = decodes.bit_length()
        nearest = min(self._quiet_s, key=lambda s: abs(s - size), default=None)
        return None if nearest is None else self._quiet_s[nearest]
