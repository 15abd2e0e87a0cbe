"""Decides how many replicas a server should have, by what its engines say of themselves. Pure; called by reconcile.py.

An engine predicts how long a new request would wait, and knows how full its cache is. The mean of that over what it
should be is how many times too few replicas there are. More come at once, at most twice as many in a step; fewer only
when they have been enough for the whole of the delay, so that a lull in the traffic ends nothing that takes minutes to
come back. That history is the only thing remembered here: an operator that restarts scales down later, never wrongly.
Its times are seconds of the monotonic clock: the other one may jump by hours, and a night would seem to have passed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo_engine.status import Load
from octavo_operator.autoscaling import Autoscaling, Target

TOLERANCE = 0.1
"""Closer to the target than this is on it: loads are noisy, and each change of replicas costs a start."""


@dataclass
class History:
    """What was recommended, as far back as the delay, and when somebody was last served or could not have been."""

    since: float
    recommended: deque[tuple[float, int]] = field(default_factory=deque)
    busy_at: float | None = None


@dataclass(frozen=True)
class Scaling:
    replicas: int
    reason: str
    """Why that many, in a sentence."""


def scale(
    spec: Autoscaling,
    current: int,
    loads: Sequence[Load],
    history: History,
    tick: float,
    *,
    asked: bool = False,
    keeps_last: bool = False,
) -> Scaling | None:
    """What spec.replicas should become; None where it may stay. current: what it is.

    loads: of the replicas that are ready. Those that start do not count yet, so that one burst is not answered twice.
    asked: whether the activator holds requests for the server. keeps_last: the last replica stays, idle or not.
    """
    low, high = spec.min_replicas, spec.max_replicas
    # While no replica is ready nobody can ask it. Idleness begins when somebody could and does not: a server that was
    # just woken would otherwise be sent to sleep again before its first request arrives.
    if asked or not loads or any(load.running or load.waiting for load in loads):
        history.busy_at = tick
    if current == 0:
        if asked and not low:
            return Scaling(1, "The activator holds a request for it.")
        return Scaling(low, f"autoscaling.minReplicas is {low}.") if low else None
    if not low <= current <= high:
        bounded = min(max(current, low), high)
        if bounded:
            return Scaling(bounded, f"autoscaling allows {low} to {high} replicas.")
    pressure, why = _pressure(spec.target, loads)
    enough = current if abs(pressure - 1) <= TOLERANCE else math.ceil(len(loads) * pressure)
    quiet_since = history.since if history.busy_at is None else history.busy_at
    idle = tick - quiet_since >= spec.idle_seconds
    floor = low if low or (idle and not keeps_last) else 1
    wanted = min(max(enough, floor), high)
    _remember(history, tick, wanted, spec.scale_down_delay_seconds)
    if wanted > current:
        return Scaling(min(wanted, max(2 * current, current + 1)), f"{why}.")
    if not loads and current:
        return None  # they are starting, or do not answer: nobody knows what is enough
    if current == 1 and not wanted:
        # Nobody asked for all of idleSeconds; the delay is about how many replicas are enough for those who ask.
        return Scaling(0, f"No request came for {spec.idle_seconds} s.")
    if tick - history.since < spec.scale_down_delay_seconds:
        return None
    most = max(max(number for _, number in history.recommended), 1)
    if most >= current:
        return None
    return Scaling(most, f"{most} would have been enough for {spec.scale_down_delay_seconds} s: {why}.")


def _pressure(target: Target, loads: Sequence[Load]) -> tuple[float, str]:
    """How many times as many replicas there should be, and the sentence's half that says by what."""
    if not loads:
        return 0.0, "no replica is ready"
    count = len(loads)
    queue = sum(load.predicted_queue_s for load in loads) / count
    kv = 100 * sum(load.kv_usage for load in loads) / count
    running = sum(load.running for load in loads) / count
    found = [
        (queue / target.queue_seconds, f"a new request would wait {queue:.1f} s, and should {target.queue_seconds} s"),
        (kv / target.kv_usage_percent, f"{kv:.0f} % of the KV cache is in use, and {target.kv_usage_percent} % should"),
    ]
    if target.running is not None:
        found.append((running / target.running, f"{running:.0f} requests run, and {target.running} should"))
    most, why = max(found)
    return most, why[:1].upper() + why[1:]


def _remember(history: History, tick: float, wanted: int, delay_s: float) -> None:
    # A number that a later and higher one outlasts is never the highest of the window: it is dropped at once.
    while history.recommended and history.recommended[-1][1] <= wanted:
        history.recommended.pop()
    history.recommended.append((tick, wanted))
    while len(history.recommended) > 1 and tick - history.recommended[0][0] > delay_s:
        history.recommended.popleft()
