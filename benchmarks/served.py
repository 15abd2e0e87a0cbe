"""The engine on a GPU through HTTP, measured as vLLM's figures were: streams of token ids, client on the same host.

    PYTHONPATH=engine python benchmarks/served.py [--output FILE] [--only streams,poisson,long]

streams: 256 at once, beside the same load offline. poisson: ShareGPT-like lengths, 15 requests a second for 40 s.
long: 32 streams alone, then beside prompts of 16,000 tokens, one a second for 15 s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from octavo_engine.bench.datasets import Sample
from octavo_engine.bench.report import Answer
from octavo_engine.bench.serve import Load, Target, run

sys.path.insert(0, str(Path(__file__).parent))
from workloads import Workload, fixed, sharegpt_like

MODEL = Path(__file__).parents[1] / "docker" / "models" / "llama-3.1-8b"
PORT, MANAGEMENT_PORT = 18200, 18201
CLIENTS = 8
READY_S = 180
"""Kernels that nobody has compiled yet take half a minute."""
FLAGS = ["--load-format", "dummy", "--max-model-len", "17000", "--no-enable-prefix-caching", "--max-num-seqs", "1024"]
FLAGS += ["--max-num-batched-tokens", "8192"]
VLLM_H200 = {"poisson": {"ttft_ms": [20.7, 55.4], "gap_ms": [5.37, 12.4]}, "long": {"quiet_gap_ms": [6.41, 7.60]}}
"""vLLM 0.25.1 on an H200: p50 and p99."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=int, default=40, help="of the Poisson load")
    parser.add_argument("--only", default="streams,poisson,long")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "flags": FLAGS}
    requests = fixed(256, 128, 512)

    def keep() -> None:
        """What is measured so far, whatever becomes of the rest."""
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    with serving() as target:
        asyncio.run(warm(target))
        if "long" in only:
            result["long"] = asyncio.run(long_prompts(target))
            print("long", result["long"], "vLLM on H200", VLLM_H200["long"], flush=True)
            keep()
        if "poisson" in only:
            load = Load(request_rate=15.0)
            answers, seconds = asyncio.run(
                run(target, samples(sharegpt_like(15 * arguments.seconds)), load, show_progress=False)
            )
            tokens = sum(answer.output_len for answer in answers)
            result["poisson"] = {"output_tokens_per_s": round(tokens / seconds, 1), **latencies(answers)}
            print("poisson", result["poisson"], "vLLM on H200", VLLM_H200["poisson"], flush=True)
            keep()
        if "streams" in only:
            answers, seconds = from_processes(target, samples(requests), CLIENTS)
            result["streams"] = {"output_tokens_per_s": round(256 * 512 / seconds, 1), **latencies(answers)}
            print("streams", result["streams"], flush=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{MANAGEMENT_PORT}/metrics", timeout=5) as metrics:
            result["kernel_compilations"] = compilations(metrics.read().decode())
    if "streams" in only:
        result["streams"]["of_offline"] = round(result["streams"]["output_tokens_per_s"] / offline(requests), 3)
    print(json.dumps(result, indent=1))
    keep()


@contextlib.contextmanager
def serving() -> Iterator[Target]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(MODEL / "config.json", folder)
        write_tokenizer(Path(folder))
        command = [sys.executable, "-m", "octavo_engine.cli", "serve", folder, "--served-model-name", "m"]
        command += ["--port", str(PORT), "--management-port", str(MANAGEMENT_PORT), *FLAGS]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until = time.monotonic() + READY_S
            while (at := stage()) != "ready":
                if server.poll() is not None:
                    raise SystemExit(f"the server ended with {server.returncode}")
                if time.monotonic() > until:
                    raise SystemExit(f"the server is not ready after {READY_S} s: {at}")
                time.sleep(0.1)
            time.sleep(5)  # the graphs that are captured while nobody waits
            yield Target(f"http://127.0.0.1:{PORT}", "m", body={"temperature": 1.0})
        finally:
            end(server)


def end(server: subprocess.Popen) -> None:
    """Whatever becomes of it, its memory is free afterwards."""
    server.terminate()
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait(60)


def write_tokenizer(folder: Path) -> None:
    """A word for each id of the vocabulary, so that each token of the random model is some text."""
    from tokenizers import Tokenizer, decoders, models

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({f"Ġw{i}": i for i in range(size)}, unk_token="Ġw0"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def stage() -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{MANAGEMENT_PORT}/statusz", timeout=5) as answer:
            return str(json.load(answer)["stage"])
    except OSError:
        return "no answer"


def compilations(metrics: str) -> float:
    """Kernels that were compiled since the server was ready."""
    lines = metrics.splitlines()
    return float(next(line for line in lines if line.startswith("octavo:kernel_compilations_total")).split()[-1])


async def warm(target: Target) -> None:
    await run(target, samples(fixed(8, 100, 8)), Load(), show_progress=False)


async def long_prompts(target: Target) -> dict[str, Any]:
    streams = samples(fixed(32, 512, 1500))
    quiet, _ = await run(target, streams, Load(), show_progress=False)
    beside = asyncio.create_task(run(target, streams, Load(), show_progress=False))
    await asyncio.sleep(1.0)
    steady = Load(request_rate=1.0, burstiness=1e6)
    long, _ = await run(target, samples(fixed(15, 16_000, 1)), steady, show_progress=False)
    busy, _ = await beside
    quiet_ms, busy_ms = latencies(quiet)["gap_ms"], latencies(busy)["gap_ms"]
    return {
        "quiet_gap_ms": quiet_ms, "gap_ms": busy_ms, "gap_p99_by_quiet_p50": round(busy_ms[1] / quiet_ms[0], 2),
        "long_ttft_ms": latencies(long)["ttft_ms"],
    }  # fmt: skip


def from_processes(target: Target, requests: list[Sample], processes: int) -> tuple[list[Answer], float]:
    """All at once, from several processes, as a single one cannot read so many streams as fast as they come."""
    context = multiprocessing.get_context("spawn")
    # Time begins when the last of them has started and imported: the first alone could answer for all before.
    ready = context.Barrier(processes + 1)
    with ProcessPoolExecutor(processes, context, initializer=ready.wait) as pool:
        starts = [pool.submit(abs, 0) for _ in range(processes)]
        ready.wait(READY_S)
        for start in starts:
            start.result()
        began = time.monotonic()
        shares = [pool.submit(_run, target, requests[i::processes]) for i in range(processes)]
        answers = [answer for share in shares for answer in share.result()]
        return answers, time.monotonic() - began


def _run(target: Target, requests: list[Sample]) -> list[Answer]:
    return asyncio.run(run(target, requests, Load(), show_progress=False))[0]


def samples(workload: Workload) -> list[Sample]:
    return [Sample(prompt, output) for prompt, output in workload]


def latencies(answers: Sequence[Answer]) -> dict[str, Any]:
    """p50, p99 and the longest, in ms."""
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed, the first with: {failed[0]}")
    return {
        "ttft_ms": spread([answer.ttft_s for answer in answers]),
        "gap_ms": spread([gap for answer in answers for gap in answer.itls_s] or [0.0]),
    }


def spread(seconds: Sequence[float]) -> list[float]:
    ordered = sorted(seconds)
    p99 = ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]
    return [round(s * 1e3, 2) for s in (statistics.median(ordered), p99, ordered[-1])]


def offline(requests: Workload) -> float:
    """Output tokens per second of the same requests through the engine in this process."""
    from octavo_engine import LLM, SamplingParams

    llm = LLM(
        str(MODEL), load_format="dummy", skip_tokenizer_init=True, max_model_len=17000, enable_prefix_caching=False,
        max_num_seqs=1024, max_num_batched_tokens=8192,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    params = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in requests]
    best = 0.0
    for _ in range(2):
        began = time.monotonic()
        llm.generate(prompts, params, use_tqdm=False)
        best = max(best, sum(n for _, n in requests) / (time.monotonic() - began))
    return best


if __name__ == "__main__":
    main()
