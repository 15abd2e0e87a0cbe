"""From what was measured to figures, a table and JSON. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
MOST_OTHER_REASONS = 2


@dataclass
class Answer:
    """One request as its client saw it. Times in seconds; error is empty when it was answered in full."""

    prompt_len: int
    started_s: float = 0.0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itls_s: list[float] = field(default_factory=list)
    output_len: int = 0
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        return (self.latency_s - self.ttft_s) / (self.output_len - 1) if self.output_len > 1 else None


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest, as numpy does it; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(
    answers: Sequence[Answer], duration_s: float, percentiles: Sequence[float], goodput: dict[str, float]
) -> dict[str, Any]:
    """The figures of `vllm bench serve`, under its keys. goodput: bounds in ms by metric, for request_goodput."""
    done = [answer for answer in answers if not answer.error]
    prompt, output = sum(a.prompt_len for a in done), sum(a.output_len for a in done)
    times = {
        "ttft": [a.ttft_s for a in done],
        "tpot": [a.tpot_s for a in done if a.tpot_s is not None],
        "itl": [itl for a in done for itl in a.itls_s],
        "e2el": [a.latency_s for a in done],
    }
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration_s,
        "output_throughput": output / duration_s,
        "total_token_throughput": (prompt + output) / duration_s,
        "max_concurrent_requests": _most_at_once(done),
        "max_output_tokens_per_s": _best_second(done),
    }
    if goodput:
        good = sum(all(_value_ms(a, name) <= bound for name, bound in goodput.items()) for a in done)
        result["request_goodput"] = good / duration_s
    for name, values in times.items():
        milliseconds = [1e3 * value for value in values]
        result[f"mean_{name}_ms"] = statistics.fmean(milliseconds) if milliseconds else 0.0
        result[f"median_{name}_ms"] = percentile(milliseconds, 50)
        result[f"std_{name}_ms"] = statistics.pstdev(milliseconds) if milliseconds else 0.0
        for percent in percentiles:
            result[f"p{percent:g}_{name}_ms"] = percentile(milliseconds, percent)
    return result


def table(
    result: dict[str, Any],
    percentiles: Sequence[float],
    title: str = "Serving Benchmark Result",
    metrics: Sequence[str] = tuple(METRICS),
    load: Mapping[str, float] | None = None,
) -> str:
    """metrics: of which latencies are shown. load: how requests were sent, as label → value."""
    lines = [f"{f' {title} ':=^58}"]

    def line(label: str, value: float | int) -> None:
        lines.append(f"{label:<45}{value:<12}" if isinstance(value, int) else f"{label:<45}{value:<12.2f}")

    line("Successful requests:", result["completed"])
    line("Failed requests:", result["failed"])
    for label, value in (load or {}).items():
        line(label, value)
    line("Benchmark duration (s):", result["duration"])
    line("Total input tokens:", result["total_input_tokens"])
    line("Total generated tokens:", result["total_output_tokens"])
    line("Request throughput (req/s):", result["request_throughput"])
    if "request_goodput" in result:
        line("Request goodput (req/s):", result["request_goodput"])
    line("Output token throughput (tok/s):", result["output_throughput"])
    line("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    line("Peak concurrent requests:", result["max_concurrent_requests"])
    line("Total token throughput (tok/s):", result["total_token_throughput"])
    for name, words in METRICS.items():
        if name not in metrics:
            continue
        lines.append(f"{words:-^58}")
        line(f"Mean {name.upper()} (ms):", result[f"mean_{name}_ms"])
        line(f"Median {name.upper()} (ms):", result[f"median_{name}_ms"])
        for percent in percentiles:
            line(f"P{percent:g} {name.upper()} (ms):", result[f"p{percent:g}_{name}_ms"])
    lines.append("=" * 58)
    return "\n".join(lines)


def failures(answers: Sequence[Answer]) -> str:
    """How many failed, of how many, the first reason, and further ones by their number; "" where none failed."""
    reasons = [answer.error for answer in answers if answer.error]
    if not reasons:
        return ""
    told = f"{len(reasons)} of {len(answers)} requests failed, the first with: {reasons[0]}"
    others = Counter(reason for reason in reasons if reason != reasons[0]).most_common(MOST_OTHER_REASONS)
    return "\n".join([told, *(f"{count} of them with: {reason}" for reason, count in others)])


def _value_ms(answer: Answer, name: str) -> float:
    seconds = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2el": answer.latency_s}[name]
    return 1e3 * seconds


def _most_at_once(answers: Sequence[Answer]) -> int:
    moments = sorted(
        [(a.started_s, 1) for a in answers] + [(a.started_s + a.latency_s, -1) for a in answers],
        key=lambda moment: (moment[0], moment[1]),
    )
    most = now = 0
    for _, change in moments:
        now += change
        most = max(most, now)
    return most


def _best_second(answers: Sequence[Answer]) -> float:
    """Most tokens that arrived within one second of the run's clock."""
    seconds: dict[int, int] = {}
    for answer in answers:
        moment = answer.started_s + answer.ttft_s
        for gap in (0.0, *answer.itls_s):
            moment += gap
            seconds[int(moment)] = seconds.get(int(moment), 0) + 1
    return float(max(seconds.values(), default=0))
