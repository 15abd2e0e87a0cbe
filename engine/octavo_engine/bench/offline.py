"""`octavo bench latency` and `octavo bench throughput`: the engine in this process, without HTTP and without text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from octavo_engine.bench.datasets import Sample, total_tokens
from octavo_engine.bench.report import percentile
from octavo_engine.llm import LLM
from octavo_engine.sampling_params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


def latency(llm: LLM, samples: Sequence[Sample], warmups: int, iterations: int, show_progress: bool) -> dict[str, Any]:
    """Seconds of a whole batch, over and over: {avg_latency, latencies, percentiles}."""
    for _ in range(warmups):
        generate(llm, samples, False)
    steps = tqdm(range(iterations), desc="batches", disable=not show_progress, dynamic_ncols=True)
    seconds = [generate(llm, samples, False) for _ in steps]
    return {
        "avg_latency": statistics.fmean(seconds),
        "latencies": seconds,
        "percentiles": {str(percent): percentile(seconds, percent) for percent in PERCENTILES},
    }


def throughput(llm: LLM, samples: Sequence[Sample], show_progress: bool) -> dict[str, Any]:
    """All requests handed over at once."""
    seconds = generate(llm, samples, show_progress)
    prompt, output = total_tokens(samples)
    return {
        "elapsed_time": seconds,
        "num_requests": len(samples),
        "total_num_tokens": prompt + output,
        "total_output_tokens": output,
        "requests_per_second": len(samples) / seconds,
        "tokens_per_second": (prompt + output) / seconds,
        "output_tokens_per_second": output / seconds,
    }


def generate(llm: LLM, samples: Sequence[Sample], show_progress: bool) -> float:
    """Seconds until the last of them is answered in full."""
    sampling = [
        SamplingParams(temperature=1.0, max_tokens=s.output_len, ignore_eos=True, detokenize=False) for s in samples
    ]
    began = time.perf_counter()
    outputs = llm.generate([s.prompt for s in samples], sampling, use_tqdm=show_progress)
    seconds = time.perf_counter() - began
    short = [o for o, s in zip(outputs, samples, strict=True) if len(o.outputs[0].token_ids) != s.output_len]
    assert not short, f"{len(short)} requests were not answered in full"
    return seconds
