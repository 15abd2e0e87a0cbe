"""The real engine and scheduler over a GPU in simulated time: what a decision about steps does to those who wait.

    PYTHONPATH=engine python benchmarks/simulate.py [--rate 15] [--device H100]

ShareGPT-like lengths at Poisson arrivals, with each step launched at once and launched as late as the device allows
(core/pace.py). The costs of a step are measured ones (tests/engine/simulated.py); clients and HTTP are not in it. A
prediction, to be made before a change and compared with benchmarks/served.py after it.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "engine"))
from simulated import COSTS, serve
from workloads import sharegpt_like


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=COSTS, default="H200")
    parser.add_argument("--rate", type=float, default=15.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=40.0, help="for which they arrive")
    parser.add_argument("--max-decode-slowdown", type=float, default=2.2)
    arguments = parser.parse_args()
    chance, now, requests = random.Random(0), 0.0, []
    for prompt, output in sharegpt_like(int(arguments.rate * arguments.seconds)):
        now += chance.expovariate(arguments.rate)
        requests.append((now, len(prompt), output))
    for name, hold in (("launched at once", False), ("launched late", True)):
        served = serve(COSTS[arguments.device], requests, hold=hold, slowdown=arguments.max_decode_slowdown)
        first = [round(1e3 * served.at(share, served.first_s), 1) for share in (0.5, 0.9, 0.99)]
        gaps = [round(1e3 * served.at(share, served.gaps_s), 2) for share in (0.5, 0.99)]
        print(f"{name}: first token p50, p90, p99 {first} ms, gap p50, p99 {gaps} ms, "
              f"device idle with work to do {served.idle_s:.3f} of {served.seconds:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
