"""When to launch the next step: as late as the device is not kept waiting, so that who arrives meanwhile is in it.

A step is launched while the one before it is under way, as a device would idle while it is planned. Launched at once,
when that one has just begun, it leaves a request that arrives to wait for the rest of one step and all of another; and
with streams running nearly every request arrives so. Pure; asked and fed by engine.py.
"""

from __future__ import annotations

from collections import deque

FIRST_LEAD_S = 0.002
"""How long before the end of a step the next is launched, while nothing is known of the host: planning and launching
a step of some tens of streams takes it 0.3 to 1 ms."""
LEAST_LEAD_S, MOST_LEAD_S = 0.0004, 0.02
LATER_S, EARLIER_S = 0.00001, 0.0005
"""What the lead loses with each launch in time, and gains with one that was not: about one in fifty is late then."""
REMEMBERED = 4
"""The shortest of so many counts, as a step that the host noticed late looks longer than it was."""


class Pace:
    def __init__(self) -> None:
        self._quiet: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        self._lead_s = FIRST_LEAD_S
        self._held = False

    def hold_s(self, decodes: int, age_s: float) -> float:
        """Seconds for which nothing need be launched behind a step of so many decodes that began age_s ago.

        Prompts in it make it longer, by how much is not counted on.
        """
        shortest = min((seconds * min(1.0, decodes / of) for of, seconds in self._quiet), default=0.0)
        left = shortest - self._lead_s - age_s
        self._held |= left > 0
        return max(left, 0.0)

    def launched(self, in_time: bool) -> None:
        """A step was launched behind another, in_time where that one had not ended."""
        if in_time:
            self._lead_s = max(self._lead_s - LATER_S, LEAST_LEAD_S)
        elif self._held:
            self._lead_s = min(self._lead_s + EARLIER_S, MOST_LEAD_S)
        self._held = False

    def observe(self, decodes: int, seconds: float) -> None:
        """A step of decodes alone has ended, which was launched in time."""
        self._quiet.append((decodes, seconds))
