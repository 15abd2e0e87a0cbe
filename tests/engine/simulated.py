"""A GPU in simulated time behind the real engine and scheduler: what a decision about steps does to those who wait.

Costs of a step are those measured of Llama-3.1-8B on the device; the host is disturbed now and then, as hosts are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from octavo_engine.core.engine import Engine
from octavo_engine.core.messages import Submit
from octavo_engine.core.scheduler import Scheduler, SchedulerConfig
from octavo_engine.core.step import Sampled, StepPlan
from octavo_engine.sampling_params import SamplingParams

HOST_S, HOST_PER_REQUEST_S = 0.0004, 2.5e-6
WAKE_S = 0.00006
"""What a thread needs to wake up."""


@dataclass(frozen=True)
class Costs:
    """Seconds: of a step's weights, of a token's products where they take longer, of a token's keys and values, and of
    what else a step has, with and without prompts."""

    weights: float
    token: float
    context_token: float
    rest: float = 0.0003
    prompts: float = 0.0012


COSTS = {
    "H200": Costs(0.0040, 20.5e-6, 131072 / 4.1e12),
    "H100": Costs(0.0053, 21.5e-6, 131072 / 2.95e12),
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Device:
    """Takes launches in order, one ahead; its time and the host's pass on the clock. idle_s: between two steps that it
    could have run without a pause."""

    depth, num_compilations = 1, 0

    def __init__(self, clock: Clock, costs: Costs, disturbed: float, seed: int) -> None:
        self._clock, self._costs, self._disturbed = clock, costs, disturbed
        self._random = random.Random(seed)
        self._free_s = 0.0
        self.idle_s = 0.0
        self.was_idle = True

    def prepare(self) -> bool:
        return False

    def launch(self, plan: StepPlan) -> tuple[float, int]:
        self._clock.now += HOST_S + HOST_PER_REQUEST_S * len(plan.items)
        if self._random.random() < self._disturbed:
            self._clock.now += self._random.uniform(0.0005, 0.003)
        begins = max(self._clock.now, self._free_s)
        if not self.was_idle:
            self.idle_s += begins - self._free_s
        self.was_idle = False
        self._free_s = begins + self._seconds(plan)
        return self._free_s, sum(item.samples for item in plan.items)

    def is_done(self, launched: tuple[float, int]) -> bool:
        return self._clock.now >= launched[0]

    def collect(self, launched: tuple[float, int]) -> Sampled:
        ends, sampled = launched
        self._clock.now = max(self._clock.now, ends) + 0.0001 + 2e-6 * sampled
        return Sampled([7] * sampled)

    def _seconds(self, plan: StepPlan) -> float:
        costs = self._costs
        context = sum(item.start + 1 for item in plan.items if item.count == 1)
        prompts = any(item.count > 1 for item in plan.items)
        return (
            max(costs.weights, costs.token * plan.num_tokens) + costs.context_token * context + costs.rest
            + costs.prompts * prompts
        )  # fmt: skip


@dataclass
class Served:
    """Seconds to first tokens and between tokens, sorted; how long the device stood still while there was work."""

    first_s: list[float]
    gaps_s: list[float]
    idle_s: float
    seconds: float

    def at(self, share: float, seconds: Sequence[float]) -> float:
        return seconds[min(int(len(seconds) * share), len(seconds) - 1)]


def serve(
    costs: Costs, requests: Sequence[tuple[float, int, int]], *, hold: bool = True, slowdown: float | None = 2.2,
    disturbed: float = 0.02, seed: int = 0,
) -> Served:  # fmt: skip
    """requests: arrival in seconds, prompt and output tokens. hold: a step may wait for them, as process.py lets it."""
    clock = Clock()
    device = Device(clock, costs, disturbed, seed)
    scheduler = Scheduler(SchedulerConfig(1024, 8192, 17_000, 64, enable_prefix_caching=False), 8000)
    engine = Engine(scheduler, device, clock, max_slowdown=slowdown)
    born, last, first, gaps = {}, {}, [], []
    arriving = sorted(requests)
    at = 0
    while at < len(arriving) or engine.has_work:
        if not engine.has_work:
            clock.now, device.was_idle = max(clock.now, arriving[at][0]), True
        while at < len(arriving) and arriving[at][0] <= clock.now:
            arrival, prompt, output = arriving[at]
            sampling = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True)
            engine.submit(Submit(str(at), [5] * prompt, sampling))
            born[str(at)] = arrival
            at += 1
        if hold and (seconds := engine.hold_s()):
            due = clock.now + seconds + WAKE_S
            if at < len(arriving) and arriving[at][0] < due:
                clock.now = max(clock.now, arriving[at][0])
                continue
            clock.now = due
        for event in engine.step().events:
            if event.token_ids:
                id = event.request_id
                gaps.append(clock.now - last[id]) if id in last else first.append(clock.now - born[id])
                last[id] = clock.now
    return Served(sorted(first), sorted(gaps), device.idle_s, clock.now)
