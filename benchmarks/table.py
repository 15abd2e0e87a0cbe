"""Everything that Octavo promises of one GPU, measured, and a line for each promise.

    PYTHONPATH=engine python benchmarks/table.py [--output FILE] [--parts gpu,served,startup]
    python benchmarks/table.py --read benchmarks/results/FILE

Runs gpu.py, served.py and startup.py one after another (8 minutes), writes one result file with what each of them
found (benchmarks/results/DEVICE-DATE.json unless told otherwise), and prints the table: what must hold, what it is,
whether it holds. A part that fails loses no other, and its lines say that they have no figure. For prebuilt kernels set
OCTAVO_PREBUILT_KERNELS. The peer's figures are of vLLM 0.25.1 on the same kind of device; through HTTP of an H200.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
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
BATCHES = (1, 8, 32, 64, 128, 256)
LONG_PROMPTS = (8192, 16384)
VLLM_POISSON = {"ttft_ms": (20.7, 55.4), "gap_ms": (5.37, 12.4)}


@dataclass(frozen=True)
class Promise:
    """value: None where it was to be measured and was not. at_most: smaller is better."""

    name: str
    value: float | None
    must: float
    aim: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.must if self.at_most else self.value >= self.must

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        aim = "" if self.aim is None else f", aim {self.aim:.4g}"
        verdict = "holds" if self.holds else "MISSED"
        value = "no figure" if self.value is None else f"{self.value:9.3f}"
        return f"{verdict:6s} {self.name:56s} {value}   must {sign} {self.must:.4g}{aim}"


def promises(found: dict[str, Any]) -> Iterator[Promise]:
    """Of the parts that were to be measured, with all their lines, whatever came of them."""
    for part, of in (("gpu", _of_gpu), ("startup", _of_startup), ("served", _of_served)):
        if part in found:
            yield from of(found[part])


def _at(document: Any, *path: str | int) -> Any:
    """What is there, or None."""
    with contextlib.suppress(KeyError, IndexError, TypeError):
        for key in path:
            document = document[key]
        return document
    return None


def _of_gpu(gpu: dict[str, Any]) -> Iterator[Promise]:
    for name, must, aim in (("sharegpt_1000", 1.15, 1.3), ("b1_1024_128", 1.15, 1.25), ("b32_1024_256", 1.12, 1.2)):
        yield Promise(f"{name}, output tokens/s, of vLLM's", _at(gpu, name, "vs_vllm"), must, aim)
    yield Promise("prefill_64x2048_1, of vLLM's rate", _at(gpu, "prefill_64x2048_1", "vs_vllm"), 1 / 1.05, 1 / 0.95)
    for batch in BATCHES:
        must, aim = (0.90, 0.95) if batch == 256 else (0.84, 0.92)
        share = _at(gpu, "decode", str(batch), "of_floor")
        yield Promise(f"time per output token at batch {batch}, of the floor", share, must, aim)
    for tokens in LONG_PROMPTS:
        share = _at(gpu, "prefill_attention", str(tokens), "of_cudnn")
        yield Promise(f"prefill attention, {tokens} tokens, of cuDNN's", share, 0.8, 1.0)
    rate = _at(gpu, "sharegpt_1000", "output_tokens_per_s")
    ratio = None if rate is None else rate / HUGGING_FACE_SHAREGPT
    yield Promise("sharegpt_1000, of Hugging Face in static batches (H200)", ratio, 80)


def _of_startup(startup: dict[str, Any]) -> Iterator[Promise]:
    seconds = [run["ready_s"] for run in startup.get("runs", [])]
    yield Promise("start to ready, s", min(seconds, default=None), 8, 5, at_most=True)


def _of_served(served: dict[str, Any]) -> Iterator[Promise]:
    yield Promise("256 streams through HTTP, of offline", _at(served, "streams", "of_offline"), 0.95, 0.99)
    for name, words in (("ttft_ms", "first token"), ("gap_ms", "gap")):
        for index, (at, peer) in enumerate(zip(("p50", "p99"), VLLM_POISSON[name], strict=True)):
            got = _at(served, "poisson", name, index)
            yield Promise(f"15 requests/s, {words} {at}, ms", got, peer, round(0.8 * peer, 1), at_most=True)
    long = _at(served, "long")
    yield Promise("32 streams beside long prompts, p99 gap by quiet p50", _at(long, "gap_p99_by_quiet_p50"), 3, 2, True)
    yield Promise("long prompts, first token p50, ms", _at(long, "long_ttft_ms", 0), 900, 700, True)
    compiled = _at(served, "kernel_compilations")
    # Results until 2026-11-30 have the metric's whole line, which ends with the number.
    value = None if compiled is None else float(str(compiled).split()[-1])
    yield Promise("kernels compiled after ready", value, 0, at_most=True)


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


def result_file(folder: Path, device: str, date: str) -> Path:
    """A name that nothing has yet: what was measured before is kept. device: as its maker calls it."""
    kind = re.search(r"[A-Z]+\d+\w*", device)
    name = f"{kind[0].lower() if kind else 'gpu'}-{date}"
    paths = (folder / f"{name}{'' if turn == 1 else f'-{turn}'}.json" for turn in itertools.count(1))
    return next(path for path in paths if not path.exists())


def device_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE-DATE.json")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--read", type=Path, help="print the table of a result file, measure nothing")
    arguments = parser.parse_args()
    found = json.loads(arguments.read.read_text()) if arguments.read else {}
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: got {', '.join(sorted(unknown))}, expected some of {', '.join(PARTS)}")
    if not arguments.read:
        output = arguments.output or result_file(HERE / "results", device_name(), time.strftime("%Y-%m-%d"))
        for found in measure(parts):
            output.write_text(json.dumps(found, indent=1) + "\n")
    table = list(promises(found))
    print(*table, sep="\n")
    print(f"{sum(promise.holds for promise in table)} of {len(table)} hold")


if __name__ == "__main__":
    main()
