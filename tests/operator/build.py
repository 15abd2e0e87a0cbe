"""Builders of the facts that the pure decisions take: a test names only what it is about."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from octavo_engine.status import Effective, Load, Progress, Stage, Statusz
from octavo_operator.observed import Pod, Termination
from octavo_operator.spec import Server, parse

NOW = datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
TICK = 60.0
"""The monotonic clock at that time."""
EFFECTIVE = Effective(
    model="org/name",
    dtype="bfloat16",
    max_model_len=2048,
    block_size=64,
    kv_tokens=6400,
    max_concurrency_at_max_len=3.125,
    engine_version="0.1.0",
    weights_bytes=538 * 2**20,
    kv_bytes=2**30,
)


def pod(name: str = "qwen-1", **facts: Any) -> Pod:
    """A pod on a node, known since the monotonic clock was at 0."""
    given: dict[str, Any] = {"phase": "Running", "node": "n1", "revision": "r1"} | facts
    return Pod(name=name, uid=f"uid-{name}", **given)


def end(exit_code: int, message: str = "", reason: str = "Error", at: int = 0) -> Termination:
    """at: seconds after midnight."""
    return Termination(reason, exit_code, message, datetime(2026, 1, 1, 0, 0, at, tzinfo=UTC))


def server(name: str = "qwen", **spec: Any) -> Server:
    body = {"model": {"source": "hf://org/name"}, "hardware": {"gpus": 0}} | spec
    metadata = {"name": name, "namespace": "default", "uid": "uid-server", "generation": 3}
    parsed = parse({"metadata": metadata, "spec": body})
    assert isinstance(parsed, Server), parsed
    return parsed


def engine(stage: Stage, percent: float = 0, effective: Effective | None = None, load: Load | None = None) -> Statusz:
    progress = Progress(int(percent * 2**20), 100 * 2**20, percent, 40.2 if percent else None)
    return Statusz(stage, progress=progress, effective=effective, load=load or Load())
