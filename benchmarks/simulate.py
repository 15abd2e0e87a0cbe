"""The real engine and scheduler over a GPU in simulated time: what a decision about steps does to those who wait.

    PYTHONPATH=engine python benchmarks/simulate.py [--only long,poisson,streams] [--device H100] [--rate 15]

The loads of benchmarks/served.py. The costs of a step are measured ones (tests/engine/simulated.py); clients and HTTP
are not in it, but for the streams' arrivals, which are spread over 0.2 s. A prediction, to be made before a change and
compared with benchmarks/served.py after it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "engine"))
from simulated import COSTS, Costs, serve
from workloads import sharegpt_like

from octavo_engine.config import EngineConfig

ARRIVE_S = 0.2
"""For which 256 requests at once arrive, when they come through HTTP."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=COSTS, default="H200")
    parser.add_argument("--only", default="long,poisson,streams")
    parser.add_argument("--rate", type=float, default=15.0, help="requests a second of the Poisson load")
    parser.add_argument("--seconds", type=float, default=40.0, help="for which they arrive")
    parser.add_argument("--max-decode-slowdown", type=float, default=EngineConfig(model="").max_decode_slowdown)
    arguments = parser.parse_args()
    costs, slowdown = COSTS[arguments.device], arguments.max_decode_slowdown
    if "long" in arguments.only:
        print("long:", long_prompts(costs, slowdown))
    if "poisson" in arguments.only:
        print("poisson:", poisson(costs, slowdown, arguments.rate, arguments.seconds))
    if "streams" in arguments.only:
        print("streams:", streams(costs, slowdown))


def long_prompts(costs: Costs, slowdown: float) -> str:
    streams = [(0.0, 512, 1500)] * 32
    quiet = serve(costs, streams, slowdown=slowdown)
    prompts = [(1.0 + number, 16_000, 1) for number in range(15)]
    busy = serve(costs, streams + prompts, before=streams, slowdown=slowdown)
    first = sorted(busy.first_of[number] for number in range(32, 47))
    times = busy.at(0.99, busy.gaps_s) / quiet.at(0.5, quiet.gaps_s)
    return (
        f"quiet gap {_ms(quiet.gaps_s)}, busy {_ms(busy.gaps_s)}, p99 {times:.2f} times the quiet p50, "
        f"long prompts' first token {_ms(first)}"
    )


def poisson(costs: Costs, slowdown: float, rate: float, seconds: float) -> str:
    chance, now, requests = random.Random(0), 0.0, []
    for prompt, output in sharegpt_like(int(rate * seconds)):
        now += chance.expovariate(rate)
        requests.append((now, len(prompt), output))
    served = serve(costs, requests, slowdown=slowdown)
    return (
        f"first token {_ms(served.first_s)}, gap {_ms(served.gaps_s)}, "
        f"device idle with work to do {served.idle_s:.3f} of {served.seconds:.1f} s"
    )


def streams(costs: Costs, slowdown: float) -> str:
    chance = random.Random(0)
    requests = [(chance.uniform(0, ARRIVE_S), 128, 512) for _ in range(256)]
    spread = serve(costs, requests, before=[(0.0, 512, 200)] * 32, slowdown=slowdown)
    offline = serve(costs, [(0.0, 128, 512)] * 256, slowdown=slowdown)
    return (
        f"{256 * 512 / spread.seconds:.0f} tokens/s, {offline.seconds / spread.seconds:.1%} of offline, "
        f"first token {_ms(spread.first_s)}, gap {_ms(spread.gaps_s)}"
    )


def _ms(seconds: Sequence[float]) -> str:
    """p50, p99 and the longest."""
    p99 = seconds[min(int(len(seconds) * 0.99), len(seconds) - 1)]
    return "/".join(f"{1e3 * s:.1f}" for s in (statistics.median(seconds), p99, seconds[-1])) + " ms"


if __name__ == "__main__":
    main()
