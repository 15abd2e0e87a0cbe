"""Everything that Octavo promises of one GPU, measured, and a line for each promise.

    PYTHONPATH=engine python benchmarks/table.py [--output FILE] [--parts gpu,served,startup]
    python benchmarks/table.py --read benchmarks/results/FILE

Runs gpu.py, served.py and startup.py one after another (8 minutes), writes one result file with what each of them
found, and prints the table: what must hold, what it is, whether it holds. A part that fails loses no other. For
prebuilt kernels set OCTAVO_PREBUILT_KERNELS. The peer's figures are of vLLM 0.25.1 on the same kind of device; through
HTTP of an H200.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = {"gpu": "gpu.py", "served": "served.py", "startup": "startup.py"}
LIMIT_S = 400
"""A part takes 1 to 5 minutes."""
HUGGING_FACE_SHAREGPT = 124
"""Output tokens a second of transformers 5.17 in static batches of 64, on an H200."""
VLLM_POISSON = {"ttft_ms": (20.7, 55.4), "gap_ms": (5.37, 12.4)}


@dataclass(frozen=True)
class Promise:
    """at_most: smaller is better."""

    name: str
    value: float
    must: float
    aim: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.must if self.at_most else self.value >= self.must

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        aim = "" if self.aim is None else f", aim {self.aim:.4g}"
        verdict = "holds" if self.holds else "MISSED"
        return f"{verdict:6s} {self.name:56s} {self.value:9.3f}   must {sign} {self.must:.4g}{aim}"


def promises(found: dict[str, Any]) -> Iterator[Promise]:
    """Of whatever parts were measured."""
    gpu, served, startup = (found.get(part, {}) for part in PARTS)
    for name, must, aim in (("sharegpt_1000", 1.15, 1.3), ("b1_1024_128", 1.15, 1.25), ("b32_1024_256", 1.12, 1.2)):
        if name in gpu:
            yield Promise(f"{name}, output tokens/s, of vLLM's", gpu[name]["vs_vllm"], must, aim)
    if "prefill_64x2048_1" in gpu:
        yield Promise("prefill_64x2048_1, of vLLM's rate", gpu["prefill_64x2048_1"]["vs_vllm"], 1 / 1.05, 1 / 0.95)
    for batch, row in gpu.get("decode", {}).items():
        must, aim = (0.90, 0.95) if int(batch) == 256 else (0.84, 0.92)
        yield Promise(f"time per output token at batch {batch}, of the floor", row["of_floor"], must, aim)
    for tokens, row in gpu.get("prefill_attention", {}).items():
        if row.get("of_cudnn") and int(tokens) >= 8192:
            yield Promise(f"prefill attention, {tokens} tokens, of cuDNN's", row["of_cudnn"], 0.8, 1.0)
    if "sharegpt_1000" in gpu:
        ratio = gpu["sharegpt_1000"]["output_tokens_per_s"] / HUGGING_FACE_SHAREGPT
        yield Promise("sharegpt_1000, of Hugging Face in static batches (H200)", ratio, 80)
    if startup.get("runs"):
        yield Promise("start to ready, s", min(run["ready_s"] for run in startup["runs"]), 8, 5, at_most=True)
    if "of_offline" in served.get("streams", {}):
        yield Promise("256 streams through HTTP, of offline", served["streams"]["of_offline"], 0.95, 0.99)
    if "poisson" in served:
        for name, words in (("ttft_ms", "first token"), ("gap_ms", "gap")):
            for at, peer, got in zip(("p50", "p99"), VLLM_POISSON[name], served["poisson"][name], strict=False):
                yield Promise(f"15 requests/s, {words} {at}, ms", got, peer, round(0.8 * peer, 1), at_most=True)
    if "long" in served:
        long = served["long"]
        yield Promise("32 streams beside long prompts, p99 gap by quiet p50", long["gap_p99_by_quiet_p50"], 3, 2, True)
        yield Promise("long prompts, first token p50, ms", long["long_ttft_ms"][0], 900, 700, True)


def measure(parts: list[str]) -> Iterator[dict[str, Any]]:
    """What is found so far, after each part: of one that fails or takes too long what it had written until then."""
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "result.json")
            run = subprocess.Popen([sys.executable, str(HERE / PARTS[part]), "--output", str(output)])
            try:
                status = run.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGINT)  # so that it ends the server that it may have started
                status = run.wait()
            if status:
                print(f"{part} ended with {status}", flush=True)
            found[part] = json.loads(output.read_text()) if output.exists() else {}
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--read", type=Path, help="print the table of a result file, measure nothing")
    arguments = parser.parse_args()
    found = json.loads(arguments.read.read_text()) if arguments.read else {}
    for found in () if arguments.read else measure(arguments.parts.split(",")):
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    table = list(promises(found))
    print(*table, sep="\n")
    print(f"{sum(promise.holds for promise in table)} of {len(table)} hold")


if __name__ == "__main__":
    main()
