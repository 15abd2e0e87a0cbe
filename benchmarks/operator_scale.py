"""What the operator costs and how fast it is, on a real API server with the real controllers and scheduler.

    python benchmarks/operator_scale.py                    # all turns; writes benchmarks/results/operator-DATE.json
    python benchmarks/operator_scale.py --turns latency    # one of them

KWOK plays the kubelets, and one process answers for all engines. The turns:

direct    Deployments, Services and disruption budgets of --servers LLMServers, applied by as many clients as below
operator  the LLMServers themselves, all at once; ends when every one says that it is ready
latency   from the API server's answer to a client's POST to the pod, in that client's watch: one server after the
          other, then at a rate, whether or not the one before is done
idle      nothing happens, and every request of the operator is counted in front of the API server, kopf's too

Seconds depend on what else wants the machine. CPU seconds, requests and looks do not, and are told beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from operator_world import (
    CLIENTS,
    NAMESPACE,
    NODES,
    PODS,
    ROOT,
    SERVERS,
    Cpu,
    Watch,
    add_node,
    apply,
    create,
    drop_namespace,
    exists,
    in_parallel,
    is_ready,
    manifest,
    new_namespace,
    numbered,
    percentiles,
    requests_of,
)
from stage import Api, Engines, Faults, Operator, chart, define

from cluster import Cluster
from octavo_operator.desired import objects
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server, parse

TURNS = ("direct", "operator", "latency", "idle")
WRITES = ("POST", "PUT", "PATCH", "DELETE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", default=",".join(TURNS), help=f"which, by commas (default: {','.join(TURNS)})")
    parser.add_argument("--servers", type=int, default=1000, help="LLMServers of one replica (default: 1000)")
    parser.add_argument("--samples", type=int, default=200, help="servers of each half of latency (default: 200)")
    parser.add_argument("--rate", type=float, default=4, help="servers a second of its second half (default: 4)")
    parser.add_argument("--idle", type=float, default=600, help="seconds of rest in which writes are counted")
    parser.add_argument("--name", default="octavo-scale", help="which cluster (default: octavo-scale)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/operator-DATE.json")
    parser.add_argument("--profile", help="file for the operator's cProfile; slows it down")
    parsed = parser.parse_args()
    turns = parsed.turns.split(",")
    if unknown := set(turns) - set(TURNS):
        parser.error(f"--turns: got {', '.join(sorted(unknown))}, expected some of {', '.join(TURNS)}")
    cluster = Cluster(parsed.name)
    cluster.down()
    cluster.up(kwok=True)
    try:
        found = measure(cluster, turns, parsed)
    finally:
        cluster.down()
    text = json.dumps(found, indent=1)
    print(text)
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    output = parsed.output or ROOT / f"benchmarks/results/operator-{day}.json"
    output.write_text(text + "\n")
    return 0


def measure(cluster: Cluster, turns: Sequence[str], asked: argparse.Namespace) -> dict[str, Any]:
    api = Api(cluster)
    define(cluster, chart("octavo", "crd", "rbac", "serviceaccount"))
    Engines(cluster).answer_for_kwok()
    for number in range(NODES):
        add_node(api, f"kwok-{number}", asked.servers)
    names = list(numbered(asked.servers))
    doing: dict[str, Callable[[], dict[str, Any]]] = {
        "direct": lambda: direct(cluster, api, names),
        "operator": lambda: by_operator(cluster, api, names, asked.profile),
        "latency": lambda: latency(cluster, api, asked.samples, asked.rate),
        "idle": lambda: idle(cluster, api, names, asked.idle),
    }
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores for all of it",
        "servers": asked.servers,
        "clients": CLIENTS,
    }
    for turn in TURNS:
        if turn in turns:
            new_namespace(api)
            found[turn] = {**doing[turn](), "load_after": round(os.getloadavg()[0], 1)}
            print(turn, json.dumps(found[turn]), file=sys.stderr)
            drop_namespace(api)
    if "direct" in found and "operator" in found:
        found["ratio"] = round(found["operator"]["settled_s"] / found["direct"]["settled_s"], 2)
        found["cpu_ratio"] = round(total(found["operator"]) / total(found["direct"]), 2)
    return found


def total(turn: dict[str, Any]) -> float:
    return float(sum(turn["cpu_s"].values()))


def direct(cluster: Cluster, api: Api, names: Sequence[str]) -> dict[str, Any]:
    bodies = [body for name in names for body in objects(server(name), EngineDefaults(), pod_monitors_known=False)]
    with Watch(api, PODS, is_ready) as pods:
        cpu, started = Cpu(cluster), time.monotonic()
        in_parallel(lambda body: apply(api, body), bodies)
        applied = time.monotonic() - started
        settled = pods.wait(names, 1800) - started
    return {
        "objects": len(bodies),
        "applied_s": round(applied, 1),
        "settled_s": round(settled, 1),
        "cpu_s": cpu.since(),
    }


def by_operator(cluster: Cluster, api: Api, names: Sequence[str], profile: str | None) -> dict[str, Any]:
    operator = start(cluster, python=(sys.executable, *(("-m", "cProfile", "-o", profile) if profile else ())))
    try:
        requests, looks = requests_of(operator), operator.metric("octavo_operator_look_seconds_count")
        with Watch(api, SERVERS, is_ready) as servers:
            cpu, started = Cpu(cluster, operator), time.monotonic()
            in_parallel(lambda name: create(api, name), names)
            created = time.monotonic() - started
            settled, spent = servers.wait(names, 1800) - started, cpu.since()
        requests = requests_of(operator) - requests
        writes = {key: count for key, count in requests.items() if key.split()[0] in ("apply", "create", "scale")}
        return {
            "created_s": round(created, 1),
            "settled_s": round(settled, 1),
            "cpu_s": spent,
            "operator_cpu_ms_per_server": round(1000 * spent["operator"] / len(names), 1),
            "operator_cores": round(spent["operator"] / settled, 2),
            "rss_mb": round(operator.metric("process_resident_memory_bytes") / 1e6),
            "looks_per_server": round((operator.metric("octavo_operator_look_seconds_count") - looks) / len(names), 2),
            "look_errors": int(operator.metric("octavo_operator_look_errors_total")),
            "requests_per_server": round(sum(requests.values()) / len(names), 2),
            "writes_per_server": {key: round(count / len(names), 2) for key, count in sorted(writes.items())},
            "other_requests": {key: count for key, count in sorted(requests.items()) if key not in writes},
        }
    finally:
        end(operator)


def latency(cluster: Cluster, api: Api, samples: int, rate: float) -> dict[str, Any]:
    operator = start(cluster)
    try:
        with Watch(api, PODS, exists) as pods:
            answered: dict[str, float] = {}
            one_by_one = [f"calm-{number:04}" for number in range(samples)]
            for name in one_by_one:
                answered[name] = create(api, name)
                pods.wait([name], 60)
            at_a_rate = [f"rate-{number:04}" for number in range(samples)]
            started = time.monotonic()
            for number, name in enumerate(at_a_rate):
                time.sleep(max(0.0, started + number / rate - time.monotonic()))
                answered[name] = create(api, name)
            pods.wait(at_a_rate, 60)
        took = {name: max(0.0, pods.seen[name] - at) for name, at in answered.items()}
        return {
            "samples": samples,
            "one_after_another_ms": percentiles(took[name] for name in one_by_one),
            "rate_per_s": rate,
            "at_the_rate_ms": percentiles(took[name] for name in at_a_rate),
        }
    finally:
        end(operator)


def idle(cluster: Cluster, api: Api, names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Counts by a proxy that writes each request down, so that nothing is missed that the operator does not count."""
    record = cluster.state / "idle-requests"
    proxy = Faults(cluster, 18400)
    operator = start(cluster, server=proxy.url)
    try:
        with Watch(api, SERVERS, is_ready) as servers:
            in_parallel(lambda name: create(api, name), names)
            servers.wait(names, 1800)
        time.sleep(15)  # the last events of that
        before = operator.metric("process_cpu_seconds_total")
        proxy.do(record=str(record))
        time.sleep(seconds)
        proxy.do()
        spent = operator.metric("process_cpu_seconds_total") - before
        lines = [line.split() for line in record.read_text().splitlines()]
        writes = Counter(f"{method} {resource(path)}" for method, path in lines if method in WRITES)
        reads = Counter(f"{method} {resource(path)}" for method, path in lines if method not in WRITES)
        return {
            "seconds": seconds,
            "writes": writes,
            "writes_but_leases": sum(count for key, count in writes.items() if not key.endswith(" leases")),
            "reads": reads,
            "operator_cores": round(spent / seconds, 4),
            "rss_mb": round(operator.metric("process_resident_memory_bytes") / 1e6),
        }
    finally:
        end(operator)


def resource(path: str) -> str:
    """The plural of it: /apis/apps/v1/namespaces/NS/deployments/NAME?x is about deployments."""
    words = [word for word in path.partition("?")[0].split("/") if word]
    words = words[2:] if words[0] == "api" else words[3:]
    words = words[2:] if words[:1] == ["namespaces"] and len(words) > 2 else words
    return "/".join([words[0], *words[2:]]) if words else "discovery"


def start(cluster: Cluster, **more: Any) -> Operator:
    # Leases as installed, so that what idling costs is what it costs there.
    operator = Operator(cluster, "operator", port=18080, OCTAVO_LEASE_SECONDS="15", **more)
    operator.wait_leading(120)
    time.sleep(3)  # until its watches run
    return operator


def end(operator: Operator) -> None:
    operator.stop()
    print(operator.log()[-2000:], file=sys.stderr)


def server(name: str) -> Server:
    parsed = parse({**manifest(name), "metadata": {"name": name, "namespace": NAMESPACE, "uid": "", "generation": 1}})
    assert isinstance(parsed, Server), parsed
    return parsed


if __name__ == "__main__":
    sys.exit(main())
