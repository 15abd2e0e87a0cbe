"""Octavo beside Hugging Face transformers on this machine's CPU, and the time from start to ready.

Both engines run in one process on the same threads, weights and prompts, in turns (ours, theirs, ours, …), so that
whatever else the machine does falls on both. Greedy, end-of-text ignored, every output of the same length.

    make bench-cpu                        # prints a table, writes benchmarks/results/cpu-DATE.json
    python benchmarks/cpu.py --dtype float32 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "engine"), str(ROOT / "tests")]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

import models  # noqa: E402 - found through the path above
from octavo_engine import LLM, SamplingParams, __version__  # noqa: E402

WORDS = (
    "cat", "dog", "tree", "house", "sea", "sun", "moon", "star", "ice", "wind", "fire", "earth", "cloud", "rain",
    "snow", "fog",
)  # fmt: skip
PROMPTS = [f"Write a short story about a {word} and what it saw on its way home. It begins:" for word in WORDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="length of each output")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load_before = os.getloadavg()[0]
    results = [measure(dtype, arguments.rounds, arguments.tokens, arguments.threads) for dtype in arguments.dtype]
    document = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": "python benchmarks/cpu.py " + " ".join(sys.argv[1:]),
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "versions": versions(),
        "load_average_before": round(load_before, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
        "results": results,
        "start_to_ready_s": [start_to_ready() for _ in range(arguments.rounds)],
    }
    print(table(document))
    target = ROOT / "benchmarks" / "results" / f"cpu-{document['date'][:10]}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {target.relative_to(ROOT)}")


def measure(dtype: str, rounds: int, tokens: int, threads: int) -> dict[str, object]:
    """Medians over the turns, tokens per second."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(models.smollm2())
    ours = LLM(folder, dtype=dtype, enable_prefix_caching=False, cpu_threads=threads)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    theirs.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def octavo(prompts: list[str]) -> None:
        outputs = ours.generate(prompts, greedy, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)

    def transformers(prompt: str) -> None:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = theirs.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=2)
        assert out.shape[1] == inputs["input_ids"].shape[1] + tokens

    def one_by_one() -> None:
        for prompt in PROMPTS:
            octavo([prompt])

    octavo(PROMPTS[:1])
    transformers(PROMPTS[0])
    one, hf, together, single = [], [], [], []
    for turn in range(rounds):
        # One stream takes two seconds: several short turns, so that a busy moment falls on both or is outvoted.
        for prompt in PROMPTS[turn % 4 :: 4]:
            one.append(tokens / seconds(lambda: octavo([prompt])))  # noqa: B023 - called at once
            hf.append(tokens / seconds(lambda: transformers(prompt)))  # noqa: B023
        together.append(len(PROMPTS) * tokens / seconds(lambda: octavo(PROMPTS)))
        single.append(len(PROMPTS) * tokens / seconds(one_by_one))
    figures = {
        "one_stream": statistics.median(one),
        "one_stream_transformers": statistics.median(hf),
        "sixteen_at_once": statistics.median(together),
        "sixteen_one_by_one": statistics.median(single),
    }
    everything = {"one": one, "transformers": hf, "at_once": together, "one_by_one": single}
    return {
        "dtype": dtype,
        "output_tokens_per_s": {name: round(value, 1) for name, value in figures.items()},
        # Of turns side by side and not of the medians: what the machine did meanwhile falls on both.
        "one_stream_vs_transformers": round(statistics.median(a / b for a, b in zip(one, hf, strict=True)), 2),
        "sixteen_vs_one_by_one": round(statistics.median(a / b for a, b in zip(together, single, strict=True)), 2),
        "all": {name: [round(value, 1) for value in values] for name, values in everything.items()},
    }


def start_to_ready() -> float:
    """Seconds from starting `octavo serve` to 200 from /readyz."""
    port, management = free_port(), free_port()
    command = [sys.executable, "-m", "octavo_engine.cli", "serve", str(models.smollm2())]
    command += [f"--port={port}", f"--management-port={management}", "--log-level=warning"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "engine")}
    started = time.monotonic()
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://localhost:{management}/readyz", timeout=1) as answer:
                    if answer.status == 200:
                        return round(time.monotonic() - started, 2)
            except (urllib.error.URLError, OSError):
                time.sleep(0.02)
        raise RuntimeError(f"octavo serve ended with status {server.returncode}")
    finally:
        server.terminate()
        server.wait(30)


def table(document: dict[str, object]) -> str:
    lines = [
        f"{document['cpu']}, {document['threads']} threads, {document['date']}",
        f"{'':12}{'one stream':>12}{'transformers':>14}{'ratio':>7}{'16 at once':>12}{'one by one':>12}{'ratio':>7}",
    ]
    for result in document["results"]:  # type: ignore[attr-defined]
        speed = result["output_tokens_per_s"]
        lines.append(
            f"{result['dtype']:12}{speed['one_stream']:12.1f}{speed['one_stream_transformers']:14.1f}"
            f"{result['one_stream_vs_transformers']:7.2f}{speed['sixteen_at_once']:12.1f}"
            f"{speed['sixteen_one_by_one']:12.1f}{result['sixteen_vs_one_by_one']:7.2f}"
        )
    lines.append(f"start to ready, seconds: {document['start_to_ready_s']}")
    return "\n".join(lines)


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def versions() -> dict[str, str]:
    import transformers

    return {
        "octavo": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
