"""Sampling alone: microseconds from logits to tokens in a graph, beside those of reading the logits once.

    PYTHONPATH=engine python benchmarks/sampling.py [--copy-TBps 4.25] [--rows 1,64,256,1000]

Rows use their own seeds; top-p and top-k are the cutoffs that models' own defaults ask for. Logits are random ones
(flat: a third of the vocabulary is within top-p 0.9) or, with the tail of Zipf's law, like those of a trained model (59
tokens are). adjusted: the same rows drawn a second time with a repetition penalty, as for Qwen2.5's defaults.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from octavo_engine.core.step import Admission
from octavo_engine.kernels.gpu.adjusted import sample_adjusted
from octavo_engine.kernels.gpu.adjustments import Adjustments, mask_words
from octavo_engine.kernels.gpu.sample import SamplingScratch, SamplingState, sample
from octavo_engine.runner.records import pack_record, pack_words
from octavo_engine.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parent))

from attention import graph_of, milliseconds

VOCAB = 128_256
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0}, "drawn": {}, "flat_top_p_0.9": {"top_p": 0.9}, "flat_top_k_40": {"top_k": 40},
    "top_p_0.9": {"top_p": 0.9}, "top_k_40": {"top_k": 40}, "min_p_0.05": {"min_p": 0.05},
    "top_k_20_top_p_0.8": {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    "adjusted": {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
}  # fmt: skip
CACHE_BYTES = 200e6
"""Read before the same logits come again, so that they come from memory; a step's are in part still in the cache."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy-TBps", type=float, help="of a large copy; measured if it is not given")
    parser.add_argument("--rows", default="1,64,256,1000")
    arguments = parser.parse_args()
    rate = arguments.copy_TBps
    if rate is None:
        from gpu import copy_rate

        rate = copy_rate()
    found: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "copy_TBps": round(rate, 3)}
    for rows in map(int, arguments.rows.split(",")):
        read = rows * VOCAB * 2
        row = {"floor_us": round(read / rate / 1e6, 1)}
        row |= {f"{name}_us": round(_us(name, rows, read), 1) for name in SETTINGS}
        found[str(rows)] = row
        print("sampling", rows, row, flush=True)
    print(json.dumps(found, indent=1))


def _us(name: str, rows: int, read: int) -> float:
    device = torch.device("cuda")
    batches = [_logits(name, rows, device) for _ in range(max(2, int(CACHE_BYTES / read)))]
    state = SamplingState.allocate(rows, device)
    for field, value in {"temperature": 1.0, **SETTINGS[name]}.items():
        getattr(state, field).fill_(value)
    state.seed.copy_(torch.arange(rows))
    scratch = SamplingScratch.allocate(rows, VOCAB, device)
    each = torch.arange(rows, dtype=torch.int32, device=device)
    positions, out = torch.full_like(each, 2), torch.empty_like(each)
    token_ids = torch.zeros(rows, 4, dtype=torch.int32, device=device)
    adjusted = name == "adjusted"
    if adjusted:
        adjustments = Adjustments.allocate(rows, VOCAB, device)
        admission = Admission([5, 6, 7], 1, SamplingParams(repetition_penalty=1.05), (2,), 5)
        words = torch.empty(VOCAB, dtype=torch.int16)
        pack_words(admission, words)
        adjustments.words.copy_(words)
        adjustments.records.copy_(torch.frombuffer(pack_record(admission, VOCAB), dtype=torch.int32))
        special = torch.stack([each, torch.full_like(each, -1), torch.ones_like(each)], 1)
        masks = torch.zeros(1, mask_words(VOCAB), dtype=torch.int32, device=device)

    def run() -> None:
        for logits in batches:
            sample(logits, each, each, positions, state, scratch, token_ids, out)
            if adjusted:
                sample_adjusted(
                    logits, special, masks, each, each, positions, state, adjustments, scratch, token_ids, out
                )

    return 1e3 * milliseconds({"": graph_of(run)})[""] / len(batches)


def _logits(name: str, rows: int, device: torch.device) -> torch.Tensor:
    if name.startswith("flat"):
        return torch.randn(rows, VOCAB, device=device).mul_(2).bfloat16()
    ranks = torch.rand(rows, VOCAB, device=device).argsort(1)
    return (18.0 - 1.5 * (ranks + 1.0).log()).bfloat16()


if __name__ == "__main__":
    main()
