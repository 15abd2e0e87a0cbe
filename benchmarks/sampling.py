"""Sampling alone: microseconds from logits to tokens in a graph, beside those of reading the logits once.

    PYTHONPATH=engine python benchmarks/sampling.py [--copy-TBps 4.25]

Rows use their own seeds; top-p and top-k are the cutoffs that models' own defaults ask for.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from octavo_engine.kernels.gpu.sample import SamplingScratch, SamplingState, sample

sys.path.insert(0, str(Path(__file__).parent))

from attention import graph_of, milliseconds

VOCAB, ROWS = 128_256, (1, 64, 256, 1000)
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0}, "drawn": {}, "top_p_0.9": {"top_p": 0.9}, "top_k_40": {"top_k": 40},
}  # fmt: skip
CACHE_BYTES = 200e6
"""Read before the same logits come again, so that they come from memory; a step's are in part still in the cache."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy-TBps", type=float, help="of a large copy; measured if it is not given")
    rate = parser.parse_args().copy_TBps
    if rate is None:
        from gpu import copy_rate

        rate = copy_rate()
    found: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "copy_TBps": round(rate, 3)}
    for rows in ROWS:
        read = rows * VOCAB * 2
        row = {"floor_us": round(read / rate / 1e6, 1)}
        row |= {f"{name}_us": round(_us(rows, read, values), 1) for name, values in SETTINGS.items()}
        found[str(rows)] = row
        print("sampling", rows, row, flush=True)
    print(json.dumps(found, indent=1))


def _us(rows: int, read: int, values: dict[str, float]) -> float:
    device = torch.device("cuda")
    batches = [
        torch.randn(rows, VOCAB, device=device).mul_(2).bfloat16() for _ in range(max(2, int(CACHE_BYTES / read)))
    ]
    state = SamplingState.allocate(rows, device)
    for name, value in {"temperature": 1.0, **values}.items():
        getattr(state, name).fill_(value)
    state.seed.copy_(torch.arange(rows))
    scratch = SamplingScratch.allocate(rows, VOCAB, device)
    each = torch.arange(rows, dtype=torch.int32, device=device)
    positions, out = torch.zeros_like(each), torch.empty_like(each)
    token_ids = torch.zeros(rows, 4, dtype=torch.int32, device=device)

    def run() -> None:
        for logits in batches:
            sample(logits, each, each, positions, state, scratch, token_ids, out)

    return 1e3 * milliseconds({"": graph_of(run)})[""] / len(batches)


if __name__ == "__main__":
    main()
