"""Fixed workloads, so that every engine is measured on the same requests.

A workload is a list of (prompt token ids, number of output tokens). Output lengths are forced, sampling is at
temperature 1 without truncation, and no two prompts share a beginning.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

VOCABULARY = 128_000
Workload = list[tuple[list[int], int]]


def sharegpt_like(count: int, seed: int = 0) -> Workload:
    """Lengths drawn like those published of ShareGPT: log-normal, clipped to 4..1024."""
    random = np.random.RandomState(seed)
    prompts = np.clip(np.exp(random.normal(4.6, 1.25, count)), 4, 1024).astype(int)
    outputs = np.clip(np.exp(random.normal(4.9, 1.0, count)), 4, 1024).astype(int)
    return [(random.randint(100, VOCABULARY, p).tolist(), int(o)) for p, o in zip(prompts, outputs, strict=True)]


def fixed(count: int, prompt: int, output: int, seed: int = 1) -> Workload:
    random = np.random.RandomState(seed)
    return [(random.randint(100, VOCABULARY, prompt).tolist(), output) for _ in range(count)]


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "sharegpt_1000": lambda: sharegpt_like(1000),
    "b1_1024_128": lambda: fixed(1, 1024, 128),
    "b32_1024_256": lambda: fixed(32, 1024, 256),
    "prefill_64x2048_1": lambda: fixed(64, 2048, 1),
}
