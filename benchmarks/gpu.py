"""The engine on a GPU, measured as vLLM's figures in benchmarks/notes.md were: offline, all requests at once.

    PYTHONPATH=engine python benchmarks/gpu.py [--output FILE] [--only decode,b1_1024_128] [--profile 128x1024]

Decode: time per output token at a context of 1,056 to 1,184 tokens of `batch` requests at once, beside the floor:
weights and KV cache read once at this device's copy rate, or the products at its matrix rate where that takes longer.
The peer's is (time for 160 tokens - time for 32) / 128, whose steps are the same; here they are timed alone, as two
times of 256 prompts differ by more than 128 steps' noise (15.9 to 18.0 ms on an H200). Beside it the clock of the
multiprocessors meanwhile, and the share of the time for which the card's power limit held it down.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.core.engine import Engine, Runner
from octavo_engine.core.messages import Submit
from octavo_engine.core.scheduler import Scheduler
from octavo_engine.core.step import Sampled, StepPlan
from octavo_engine.kernels.gpu import early_launch
from octavo_engine.models import gpu_decoder
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
import attention
from power import Drawn, Meter
from workloads import WORKLOADS, Workload, fixed

MODEL = Path(__file__).parents[1] / "docker" / "models" / "llama-3.1-8b"
BATCHES = (1, 8, 32, 64, 128, 256)
VLLM = {
    # vLLM 0.25.1, measured on the same kinds of device: ms per output token by batch, then the workloads.
    "H200": {1: 4.93, 8: 5.19, 32: 6.26, 64: 7.63, 128: 10.71, 256: 17.74, "sharegpt_1000": 12594.0,
             "b1_1024_128": 193.0, "b32_1024_256": 3416.0, "prefill_64x2048_1": 3.12},
    "H100": {1: 6.77, 8: 7.15, 32: 8.41, 64: 9.95, 128: 13.79, 256: 21.55, "sharegpt_1000": 11044.0,
             "b1_1024_128": 147.0, "b32_1024_256": 2810.0, "prefill_64x2048_1": 3.11},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="names, comma-separated: attention, decode and workloads")
    parser.add_argument("--repeats", type=int, default=3, help="of the decodes' measurement")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="of the decodes that are measured")
    parser.add_argument("--profile", default="", help="where the time of steps goes, BATCHxCONTEXT,NAME@STEP,...")
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--trace", action="store_true", help="where the time of workloads goes, by kind of step")
    parser.add_argument(
        "--early-launch", type=int, default=early_launch.TOKENS,
        help="tokens up to which a step's kernels are launched before the one in front has ended",
    )  # fmt: skip
    parser.add_argument("--fused-up-to", type=int, help="tokens up to which a step takes the fused road")
    parser.add_argument("--gated-up-to", type=int, help="beyond it, up to which the gated product alone is fused")
    parser.add_argument("--deterministic", action="store_true", help="measure what the mode costs")
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto, fp8_e4m3 or fp8_e5m2")
    arguments = parser.parse_args()
    early_launch.TOKENS = arguments.early_launch
    if arguments.fused_up_to:
        gpu_decoder.FUSED_TOKENS = arguments.fused_up_to
    if arguments.gated_up_to is not None:
        gpu_decoder.GATED_TOKENS = arguments.gated_up_to
    only = [name for name in arguments.only.split(",") if name] or ["attention", "decode", *WORKLOADS]
    copy, product = copy_rate(), product_rate()
    alone: dict[str, object] = {}
    if "attention" in only:  # before the engine takes the memory
        only.remove("attention")
        for name, run_alone in (
            ("decode_attention", lambda: attention.decode(copy * 1e12)), ("prefill_attention", attention.prefill)
        ):  # fmt: skip
            torch.cuda.empty_cache()
            try:
                alone[name] = run_alone()
            except Exception as error:  # noqa: BLE001 - what comes after it is worth more than this
                alone[f"{name}_failed"] = f"{type(error).__name__}: {str(error)[:300]}"
                print(alone, flush=True)
    torch.cuda.empty_cache()
    config = EngineConfig(
        model=str(MODEL), load_format="dummy", max_model_len=17000, enable_prefix_caching=False,
        max_num_seqs=arguments.max_num_seqs, max_num_batched_tokens=arguments.max_num_batched_tokens, device="cuda",
        deterministic=arguments.deterministic, kv_cache_dtype=arguments.kv_cache_dtype,
    )  # fmt: skip
    began = time.monotonic()
    stages: list[tuple[str, float]] = []
    runner = ModelRunner(config)
    loaded = runner.load(MODEL, lambda stage, done, total: stages.append((stage.value, time.monotonic() - began)))
    start_s = time.monotonic() - began
    firsts = dict(reversed(stages))
    print(f"loaded in {start_s:.1f} s", {k: round(v, 2) for k, v in reversed(firsts.items())}, flush=True)
    scheduler = Scheduler.of(config, loaded.plan)
    engine = Engine(scheduler, runner, time.monotonic)
    prepared = 0
    while engine.prepare():
        prepared += 1
    print(f"prepared {prepared} more graphs in {time.monotonic() - began - start_s:.1f} s", flush=True)
    gc.collect()
    gc.freeze()  # as the engine process does
    gpu = torch.cuda.get_device_name()
    peer = VLLM["H200" if "H200" in gpu else "H100"]
    result: dict[str, object] = {
        "gpu": gpu, "copy_TBps": round(copy, 3), "product_TFLOPs": round(product), "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "start_s": round(start_s, 2), "kv_tokens": loaded.plan.kv_tokens,
        "kv_bytes_per_token": loaded.plan.kv_bytes_per_token,
        "deterministic": arguments.deterministic, "kv_cache_dtype": arguments.kv_cache_dtype, **alone,
    }  # fmt: skip

    def keep() -> None:
        """What is measured so far, whatever becomes of the rest."""
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    keep()
    run(engine, fixed(4, 100, 8))
    for which in filter(None, arguments.profile.split(",")):
        profile(engine, which)
    gc.collect()  # a profile leaves millions of objects, and a collection among the steps then takes 0.1 s
    gc.freeze()
    for name in only:
        if name == "decode":
            batches = [int(batch) for batch in arguments.batches.split(",")]
            decode(engine, copy, peer, result, batches, arguments.repeats)
        else:
            workload(engine, name, peer, result, arguments.trace)
        keep()
    print(json.dumps(result, indent=1))


def copy_rate() -> float:
    """TB/s of a large copy on the device, bytes read and bytes written."""
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / _milliseconds(lambda: b.copy_(a)) / 1e9


def product_rate() -> float:
    """TFLOP/s of a large product of bfloat16: cards of one kind that copy alike are up to 5 % apart elsewhere."""
    size = 8192
    a = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(a)
    return 2 * size**3 / _milliseconds(lambda: torch.mm(a, a, out=out)) / 1e9


def _milliseconds(run: Callable[[], object]) -> float:
    """Of one in ten, after three."""
    for _ in range(3):
        run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 10


@dataclass
class Traced:
    """A step, in seconds: between its end and that of the step before, for its launch, and waiting for its result."""

    decodes: int
    prompt_tokens: int
    seconds: float = 0.0
    launch_s: float = 0.0
    wait_s: float = 0.0

    @property
    def kind(self) -> str:
        return "prompts" if self.prompt_tokens > 64 else f"{1 << max(self.decodes - 1, 0).bit_length():5d}"


class TracingRunner:
    """A runner that notes what each step took."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.depth, self.num_compilations = runner.depth, runner.num_compilations
        self.steps: list[Traced] = []
        self._under_way: deque[Traced] = deque()
        self._last = time.monotonic()

    def prepare(self) -> bool:
        return self._runner.prepare()

    def launch(self, plan: StepPlan) -> object:
        prompt_tokens = sum(item.count for item in plan.items if item.count > 1)
        traced = Traced(plan.num_tokens - prompt_tokens, prompt_tokens)
        self._under_way.append(traced)
        began = time.monotonic()
        launched = self._runner.launch(plan)
        traced.launch_s = time.monotonic() - began
        return launched

    def is_done(self, launched: object) -> bool:
        return self._runner.is_done(launched)

    def collect(self, launched: object) -> Sampled:
        traced = self._under_way.popleft()
        began = time.monotonic()
        sampled = self._runner.collect(launched)
        now = time.monotonic()
        traced.wait_s, traced.seconds, self._last = now - began, now - self._last, now
        self.steps.append(traced)
        return sampled


def submit(engine: Engine, requests: Workload) -> None:
    began = time.monotonic()
    for index, (prompt, output) in enumerate(requests):
        sampling = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True)
        engine.submit(Submit(f"{began}-{index}", prompt, sampling))


def run(engine: Engine, requests: Workload) -> float:
    """Seconds to finish all of them."""
    torch.cuda.synchronize()
    began = time.monotonic()
    submit(engine, requests)
    tokens = 0
    while engine.has_work:
        tokens += sum(len(event.token_ids) for event in engine.step().events)
    torch.cuda.synchronize()
    assert tokens == sum(output for _, output in requests), "tokens were lost"
    return time.monotonic() - began


def decode(
    engine: Engine, copy: float, peer: dict, result: dict[str, Any], batches: list[int], repeats: int
) -> None:  # fmt: skip
    rows = {}
    for batch in batches:
        steady = [steady_ms(engine, batch) for _ in range(repeats)]
        times = [ms for ms, _ in steady]
        ms, drawn = statistics.median(times), [of_run for _, of_run in steady]
        weights = max(15.01e9 / copy / 1e9, batch * 15.01e9 / 690e12 * 1e3)
        floor = weights + batch * 1120 * result["kv_bytes_per_token"] / copy / 1e9
        rows[batch] = {
            "ms": round(ms, 3), "spread": [round(t, 3) for t in times], "floor_ms": round(floor, 3),
            "of_floor": round(floor / ms, 3), "sm_MHz": round(statistics.mean(of_run.mhz for of_run in drawn)),
            "power_limited": round(statistics.mean(of_run.limited for of_run in drawn), 2),
        }  # fmt: skip
        if batch in peer:
            rows[batch]["vs_vllm"] = round(peer[batch] / ms, 3)
        print("decode", batch, rows[batch], flush=True)
    result["decode"] = rows


def steady_ms(engine: Engine, batch: int) -> tuple[float, Drawn]:
    """Of a step, over the 128 that take the contexts of `batch` requests from 1,056 to 1,184 tokens on average."""
    submit(engine, fixed(batch, 1024, 160 + batch // 4 + 32))
    while engine.scheduler.waiting or sum(r.num_tokens for r in engine.scheduler.running) < batch * 1056:
        engine.step()
    with Meter() as meter:
        began = time.monotonic()
        for _ in range(128):
            engine.step()
        ms = (time.monotonic() - began) / 128 * 1e3
    assert len(engine.scheduler.running) == batch, "some have ended"
    while engine.has_work:
        engine.step()
    return ms, meter.drawn


def profile(engine: Engine, which: str) -> None:
    """Eight steps of BATCHxCONTEXT decodes or, NAME@STEP, from that step of a workload on."""
    from torch.profiler import ProfilerActivity, profile

    name, at, step = which.partition("@")
    if at:
        requests = WORKLOADS[name]()
    else:
        batch, context = map(int, which.split("x"))
        requests = [(prompt, 64) for prompt, _ in fixed(batch, context, 1)]
    for index, (prompt, output) in enumerate(requests):
        engine.submit(Submit(f"p{index}", prompt, SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True)))
    if at:
        for _ in range(int(step)):
            engine.step()
    else:
        while any(request.num_remaining > 1 for request in engine.scheduler.running) or engine.scheduler.waiting:
            engine.step()
        for _ in range(3):
            engine.step()
    running = len(engine.scheduler.running)
    context = sum(request.num_tokens for request in engine.scheduler.running) // max(running, 1)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        began = time.monotonic()
        for _ in range(8):
            engine.step()
        torch.cuda.synchronize()
        wall = time.monotonic() - began
    while engine.has_work:
        engine.step()
    kernels = [e for e in recorded.key_averages() if e.device_time_total and not e.cpu_time_total]
    total = sum(e.device_time_total for e in kernels)
    print(f"profile of {which}, {running} at {context} tokens: {wall / 8e-3:.2f} ms, kernels {total / 8e3:.2f} ms")
    for e in sorted(kernels, key=lambda e: -e.device_time_total)[:12]:
        print(f"  {e.key[:60]:60s} {e.count // 8:4d} x {e.device_time_total / e.count:8.1f} us", flush=True)


def trace(engine: Engine, name: str, requests: Workload) -> None:
    """Print where the time goes, by kind of step, and each step that took half as long again as others of its kind."""
    plain = engine._runner
    engine._runner = runner = TracingRunner(plain)
    try:
        run(engine, requests)
    finally:
        engine._runner = plain
    kinds: dict[str, list[Traced]] = {}
    for step in runner.steps:
        kinds.setdefault(step.kind, []).append(step)
    for kind, steps in sorted(kinds.items()):
        seconds = [step.seconds for step in steps]
        median, late = statistics.median(seconds), sum(max(0.0, s - statistics.median(seconds)) for s in seconds)
        print(
            f"  {name} {kind}: {len(steps)} steps, median {median * 1e3:.2f} ms, longest {max(seconds) * 1e3:.2f} ms,"
            f" {sum(seconds):.2f} s, beyond the median {late:.2f} s,"
            f" launch {statistics.median(step.launch_s for step in steps) * 1e3:.2f} ms", flush=True,
        )  # fmt: skip
        for step in steps:
            if step.seconds > 1.5 * median:
                print(f"    no. {runner.steps.index(step)}: {step}", flush=True)


def workload(engine: Engine, name: str, peer: dict, result: dict[str, object], tracing: bool) -> None:
    requests = WORKLOADS[name]()
    run(engine, requests)
    if tracing:
        trace(engine, name, requests)
    seconds = run(engine, requests)
    output = sum(count for _, count in requests)
    row: dict[str, float] = {"seconds": round(seconds, 3), "output_tokens_per_s": round(output / seconds, 1)}
    if name.startswith("prefill"):
        row["vs_vllm"] = round(peer[name] / seconds, 3)
    else:
        row["vs_vllm"] = round(output / seconds / peer[name], 3)
    result[name] = row
    print(name, row, flush=True)


if __name__ == "__main__":
    main()
