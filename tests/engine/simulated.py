"""A GPU in simulated time behind the real engine and scheduler: what a decision about steps does to those who wait.

Costs of a step are those of Llama-3.1-8B, put together from what was measured of it part by part: products by
benchmarks/tune_cublas.py, attention by benchmarks/attention.py, decodes and prompts alone by benchmarks/gpu.py (on an
H200 the sum is within 4 % of the steps of 1 to 256 decodes). The host is disturbed now and then, as hosts are.
"""

from __future__ import annotations

import bisect
import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from octavo_engine.core.engine import Engine
from octavo_engine.core.messages import Submit
from octavo_engine.core.scheduler import Scheduler, SchedulerConfig
from octavo_engine.core.step import Sampled, StepItem, StepPlan
from octavo_engine.runner.gpu_steps import GRAPH_SIZES, MIXED_DECODES, MIXED_TOKENS
from octavo_engine.runner.layout import MIXED_CHUNKS
from octavo_engine.sampling_params import SamplingParams

HOST_S, HOST_PER_REQUEST_S = 0.0004, 2.5e-6
WITHOUT_GRAPH_S = 0.009
"""What a host needs to launch the kernels of a step one by one."""
WAKE_S = 0.00006
"""What a thread needs to wake up."""
CONTEXT_SHARE = 131072 / 16.06e9
"""Bytes of a token of context over bytes of the weights."""
LAYERS, HEADS, WIDTH = 32, 32, 4096
HEAD_SHARE = 0.07
"""Of the products' weights are the head's, which has only the tokens that yield logits."""
MANY = 1024
"""Tokens of a step whose products take as long as there are tokens."""
TILE = 128
"""Tokens of a tile of attention."""
SPLIT_TOKENS = 256
"""Prompt tokens of a step whose tiles are split: two tiles times 32 heads leave half of the chip without work."""


@dataclass(frozen=True)
class Costs:
    """Seconds. products: of a step's, by tokens; fused: of the road that decodes take up to 64; a size that is not in
    cuBLAS's table takes `unmeasured` times as long as the next larger that is.

    context_token: of a decode's keys and values; keys: of 128 of them in a tile's program, of which there is one a
    multiprocessor. attention_flops: of a chunk whose context is split over programs, None where none is.
    mixed: decodes and prompt tokens of the graphs with both.
    """

    products: Mapping[int, float]
    fused: Mapping[int, float]
    context_token: float
    keys: float
    multiprocessors: int = 132
    attention_flops: float | None = 430e12
    unmeasured: float = 1.05
    decode_attention: float = 0.00025
    rest_fused: float = 0.0001
    rest: float = 0.0005
    rest_token: float = 1e-6
    mixed: tuple[Sequence[int], Sequence[int]] = (MIXED_DECODES, MIXED_TOKENS)

    def step(self, plan: StepPlan) -> tuple[float, bool]:
        """Seconds on the device, and whether there is a graph."""
        items = plan.items
        decodes = [item for item in items if item.count == 1]
        chunks = [item for item in items if item.count > 1]
        prompt_tokens = plan.num_tokens - len(decodes)
        context = self.context_token * sum(item.start + 1 for item in decodes)
        seconds = context + self.decode_attention * bool(decodes)
        if not chunks:
            padded = _next(GRAPH_SIZES, len(decodes))
            if len(decodes) <= 64:
                return seconds + _at(self.fused, padded) + self.rest_fused, True
            return seconds + self._products(padded) + self.rest + self.rest_token * padded, True
        padded, logits, graph = prompt_tokens, sum(item.samples for item in items), False
        bucketed = prompt_tokens - 7  # of a graph's eight tokens of padding one is needed
        if len(decodes) <= self.mixed[0][-1] and bucketed <= self.mixed[1][-1] and len(chunks) <= MIXED_CHUNKS:
            bucket = _next(self.mixed[0], len(decodes))
            padded, logits, graph = _next(self.mixed[1], bucketed) + 8, bucket + MIXED_CHUNKS, True
            tokens = bucket + padded
        else:
            tokens = plan.num_tokens
        seconds += (1 - HEAD_SHARE) * self._products(tokens) + HEAD_SHARE * self._products(logits)
        seconds += self._attention(chunks, padded) + self.rest + self.rest_token * tokens
        return seconds, graph

    def _products(self, tokens: int) -> float:
        return _at(self.products, tokens) * (1.0 if tokens in self.products else self.unmeasured)

    def _attention(self, chunks: Sequence[StepItem], padded: int) -> float:
        if self.attention_flops and padded <= SPLIT_TOKENS:
            pairs = sum(item.count * (item.start + item.count / 2) for item in chunks)
            return 4 * WIDTH * LAYERS * pairs / self.attention_flops
        # A tile's heads are programs of equal length side by side: so many tiles at once, the next where one has ended.
        ends = [0.0] * (self.multiprocessors // HEADS)
        for item in chunks:
            for end in range(min(TILE, item.count), item.count + TILE, TILE):
                blocks = -(-(item.start + min(end, item.count)) // TILE)
                heapq.heapreplace(ends, ends[0] + LAYERS * self.keys * blocks)
        return max(ends)


def _next(sizes: Sequence[int], size: int) -> int:
    return sizes[min(bisect.bisect_left(sizes, size), len(sizes) - 1)]


def _at(costs: Mapping[int, float], tokens: int) -> float:
    """Of the next larger size, as a tile that is not full takes as long as a full one; beyond MANY on the line between
    the two sizes, as there are many tiles then; beyond all in proportion.
    """
    sizes = list(costs)
    size = _next(sizes, tokens)
    if MANY < tokens < size:
        before = sizes[sizes.index(size) - 1]
        return costs[before] + (costs[size] - costs[before]) * (tokens - before) / (size - before)
    return costs[size] * max(1.0, tokens / size)


def _ms(**costs: float) -> dict[int, float]:
    return {int(name[1:]): cost / 1e3 for name, cost in costs.items()}


def _sustained(products: Mapping[int, float]) -> dict[int, float]:
    """Of steps one after another, as they are in a run: a card at its power limit has a lower clock than for one
    product, and more than 128 tokens take 8 % longer, more than a thousand 4.
    """
    return {tokens: cost * (1.0 if tokens <= 128 else 1.08 if tokens <= MANY else 1.04)
            for tokens, cost in products.items()}  # fmt: skip


_H200_ALONE = _ms(
    _64=4.13, _80=4.16, _96=4.22, _128=4.37, _160=4.71, _192=5.11, _224=5.72, _256=5.97, _320=7.15, _384=8.20,
    _448=10.22, _512=10.31, _576=12.72, _640=13.51, _704=15.41, _768=16.12, _832=18.87, _896=17.87, _960=19.68,
    _1024=20.68, _2048=40.68, _4096=86.02, _8192=169.0,
)  # fmt: skip
H200 = Costs(
    products=_sustained(_H200_ALONE), fused=_ms(_1=3.63, _8=3.75, _32=3.85, _64=4.18), context_token=131072 / 4.45e12,
    keys=1.58e-6, decode_attention=0.00021,
)  # fmt: skip
COSTS = {
    "H200": H200,
    # Of the products six sizes were measured; attention in proportion to its matrix rate.
    "H100": Costs(
        products=_ms(_64=5.61, _128=5.80, _256=6.81, _512=10.57, _896=18.69, _1024=20.30, _8192=169.0),
        fused=_ms(_1=5.2, _32=5.6, _64=6.1), context_token=131072 / 2.95e12, keys=1.65e-6, attention_flops=410e12,
    ),
    # What benchmarks/served.py measured that day: no context was split, and the graphs' totals were not cuBLAS's.
    "H200, 2026-11-28": replace(
        H200, products=_H200_ALONE, fused=_ms(_1=3.75, _8=4.0, _32=4.06, _64=4.5), context_token=131072 / 4.1e12,
        decode_attention=0.00025, attention_flops=None,
        mixed=((8, 32, 64, 128, 256), (*range(64, 513, 64), 640, 768, 1024))
    ),
}  # fmt: skip


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
        seconds, graph = self._costs.step(plan)
        self._clock.now += HOST_S + HOST_PER_REQUEST_S * len(plan.items)
        if self._random.random() < self._disturbed:
            self._clock.now += self._random.uniform(0.0005, 0.003)
        begins = max(self._clock.now, self._free_s)
        if not self.was_idle:
            self.idle_s += begins - self._free_s
        self.was_idle = False
        if not graph:  # its first kernel runs when the last is not launched yet
            self._clock.now += WITHOUT_GRAPH_S
        self._free_s = max(begins + seconds, self._clock.now)
        return self._free_s, sum(item.samples for item in plan.items)

    def is_done(self, launched: tuple[float, int]) -> bool:
        return self._clock.now >= launched[0]

    def collect(self, launched: tuple[float, int]) -> Sampled:
        ends, sampled = launched
        self._clock.now = max(self._clock.now, ends) + 0.0001 + 2e-6 * sampled
        return Sampled([7] * sampled)


@dataclass
class Served:
    """Seconds to first tokens and between tokens, in the order of their request and sorted; how long the device stood
    still while there was work."""

    first_of: Mapping[int, float]
    gaps_s: list[float]
    idle_s: float
    seconds: float

    @property
    def first_s(self) -> list[float]:
        return sorted(self.first_of.values())

    def at(self, share: float, seconds: Sequence[float]) -> float:
        return seconds[min(int(len(seconds) * share), len(seconds) - 1)]


Requests = Sequence[tuple[float, int, int]]
"""Arrival in seconds, prompt and output tokens."""


def serve(
    costs: Costs, requests: Requests, *, before: Requests = (), hold: bool = True, slowdown: float | None = 2.3,
    disturbed: float = 0.02, seed: int = 0,
) -> Served:  # fmt: skip
    """before: what the engine has served when they come. hold: a step may wait for them, as process.py lets it."""
    clock = Clock()
    device = Device(clock, costs, disturbed, seed)
    scheduler = Scheduler(SchedulerConfig(1024, 8192, 17_000, 64, enable_prefix_caching=False), 13_000)
    engine = Engine(scheduler, device, clock, max_slowdown=slowdown, context_share=CONTEXT_SHARE)
    _serve(engine, device, clock, before, hold)
    device.idle_s = 0.0
    return _serve(engine, device, clock, requests, hold)


def _serve(engine: Engine, device: Device, clock: Clock, requests: Requests, hold: bool) -> Served:
    began = clock.now
    arrivals = sorted((began + arrival, index) for index, (arrival, _, _) in enumerate(requests))
    last: dict[int, float] = {}
    first: dict[int, float] = {}
    gaps: list[float] = []
    at = 0
    while at < len(arrivals) or engine.has_work:
        if not engine.has_work:
            clock.now, device.was_idle = max(clock.now, arrivals[at][0]), True
        while at < len(arrivals) and arrivals[at][0] <= clock.now:
            _, prompt, output = requests[arrivals[at][1]]
            sampling = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True)
            engine.submit(Submit(str(arrivals[at][1]), [5] * prompt, sampling))
            at += 1
        if hold and (seconds := engine.hold_s()):
            due = clock.now + seconds + WAKE_S
            if at < len(arrivals) and arrivals[at][0] < due:
                clock.now = max(clock.now, arrivals[at][0])
                continue
            clock.now = due
        for event in engine.step().events:
            if event.token_ids:
                index = int(event.request_id)
                if index in last:
                    gaps.append(clock.now - last[index])
                else:
                    first[index] = clock.now - began - requests[index][0]
                last[index] = clock.now
    return Served(first, sorted(gaps), device.idle_s, clock.now - began)
