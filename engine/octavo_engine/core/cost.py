"""How long a step takes, learned while running: step_s = base_s + per_token_s * tokens.

Least squares with exponential forgetting over the steps seen; pure arithmetic, fed by engine.step. Its use is to
predict how long what waits will have to wait.
"""

from __future__ import annotations

FORGET = 0.99
"""Weight of the past for each new step: about the last hundred steps count."""


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
