"""Many LLMServers applied at once, beside the same child objects applied directly: where the operator's time goes.

    python benchmarks/operator_scale.py --servers 1000        # writes benchmarks/results/operator-DATE.json

On a real API server with the real controllers and scheduler; KWOK plays the kubelets, and one process answers for all
engines. Both turns end when every pod is ready; the operator's, when every server says that it is. The load generator
has the same number of connections in both.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("engine", "operator", "tests/operator", "tests/cluster")]

import stage as acting  # noqa: E402 - found through the path above
from stage import Api, ApiError, Engines, Operator, chart  # noqa: E402

from cluster import Cluster  # noqa: E402
from octavo_operator.desired import objects  # noqa: E402
from octavo_operator.settings import EngineDefaults  # noqa: E402
from octavo_operator.spec import Server, parse  # noqa: E402

NAMESPACE = "scale"
NODES = 16
CLIENTS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", type=int, default=1000, help="LLMServers of one replica (default: 1000)")
    parser.add_argument("--name", default="octavo-scale", help="which cluster (default: octavo-scale)")
    parser.add_argument("--idle", type=float, default=60, help="seconds of rest in which writes are counted")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/operator-DATE.json")
    parser.add_argument("--profile", help="file for the operator's cProfile; slows it down")
    parser.add_argument("--only", choices=["direct", "operator"], help="one of the two turns")
    parsed = parser.parse_args()
    cluster = Cluster(parsed.name)
    cluster.down()
    cluster.up(kwok=True)
    try:
        found = measure(cluster, parsed.servers, parsed.idle, parsed.only, parsed.profile)
    finally:
        cluster.down()
    text = json.dumps(found, indent=1)
    print(text)
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    output = parsed.output or ROOT / f"benchmarks/results/operator-{day}.json"
    output.write_text(text + "\n")
    return 0


def measure(cluster: Cluster, count: int, idle_s: float, only: str | None, profile: str | None) -> dict[str, Any]:
    api = Api(cluster)
    cluster.kubectl("create", "namespace", "octavo-system")
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=chart("octavo", "crd", "rbac", "serviceaccount"))
    cluster.kubectl("wait", "--for=condition=Established", "crd/llmservers.octavo.dev", "--timeout=30s")
    Engines(cluster).answer_for_kwok()
    for number in range(NODES):
        add_node(api, f"kwok-{number}", count)
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": f"{platform.machine()}, {len(__import__('os').sched_getaffinity(0))} cores for all of it",
        "servers": count,
        "clients": CLIENTS,
    }
    names = [f"llm-{number:04}" for number in range(count)]
    if only != "operator":
        new_namespace(api)
        found["direct"] = direct(api, names)
        drop_namespace(api)
    if only != "direct":
        new_namespace(api)
        found["operator"] = by_operator(cluster, api, names, idle_s, profile)
    if only is None:
        found["ratio"] = round(found["operator"]["settled_s"] / found["direct"]["settled_s"], 2)
    return found


def direct(api: Api, names: Iterable[str]) -> dict[str, Any]:
    names = list(names)
    bodies = [body for name in names for body in objects(server(name), EngineDefaults(), pod_monitors_known=False)]
    started = time.monotonic()
    in_parallel(lambda body: apply(api, body), bodies)
    applied = time.monotonic() - started
    settle(api, len(names), lambda: False)
    return {"objects": len(bodies), "applied_s": round(applied, 1), "settled_s": round(time.monotonic() - started, 1)}


def by_operator(cluster: Cluster, api: Api, names: Iterable[str], idle_s: float, profile: str | None) -> dict[str, Any]:
    names = list(names)
    python = (sys.executable, *(("-m", "cProfile", "-o", profile) if profile else ()))
    operator = Operator(cluster, "operator", port=18080, python=python)
    try:
        operator.wait_leading()
        time.sleep(3)
        cpu_before = operator.metric("process_cpu_seconds_total")
        started = time.monotonic()
        in_parallel(lambda name: create(api, name), names)
        applied = time.monotonic() - started
        pods_s = settle(api, len(names), lambda: False)
        pods_s = time.monotonic() - started
        wait(lambda: told_ready(api) == len(names), 600)
        settled = time.monotonic() - started
        cpu = operator.metric("process_cpu_seconds_total") - cpu_before
        requests = counts(operator)
        time.sleep(10)  # the last events and resyncs of the burst
        before, cpu_idle = counts(operator), operator.metric("process_cpu_seconds_total")
        time.sleep(idle_s)
        after = counts(operator)
        idle = {key: after[key] - before[key] for key in after if after[key] != before[key]}
        return {
            "created_s": round(applied, 1),
            "pods_ready_s": round(pods_s, 1),
            "settled_s": round(settled, 1),
            "cpu_s": round(cpu, 1),
            "looks": int(operator.metric("octavo_operator_look_seconds_count")),
            "look_errors": int(operator.metric("octavo_operator_look_errors_total")),
            "rss_mb": round(operator.metric("process_resident_memory_bytes") / 1e6),
            "requests": dict(requests),
            "requests_per_server": round(sum(requests.values()) / len(names), 1),
            "idle": {
                "seconds": idle_s,
                "cpu_share": round((operator.metric("process_cpu_seconds_total") - cpu_idle) / idle_s, 3),
                "requests": idle,
            },
        }
    finally:
        operator.stop()
        print(operator.log()[-3000:], file=sys.stderr)


def counts(operator: Operator) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in operator.get("/metrics").splitlines():
        if line.startswith("octavo_operator_api_requests_total{"):
            labels = dict(part.split("=") for part in line[line.index("{") + 1 : line.index("}")].split(","))
            words = [labels[name].strip('"') for name in ("verb", "kind", "code")]
            found[" ".join(words)] += int(float(line.split()[-1]))
    return found


def settle(api: Api, count: int, stop: Callable[[], bool]) -> float:
    started = time.monotonic()
    wait(lambda: ready_pods(api) == count, 900)
    return time.monotonic() - started


def wait(done: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not settled within {limit_s:g} s")
        time.sleep(0.5)


def ready_pods(api: Api) -> int:
    # A table with the pods' columns costs the API server a tenth of the objects themselves.
    pods = table(api, f"/api/v1/namespaces/{NAMESPACE}/pods?resourceVersion=0")
    return sum(row["cells"][1] == "1/1" for row in pods)


def told_ready(api: Api) -> int:
    return sum(row["cells"][1] == "True" for row in table(api, f"{acting.SERVERS}/namespaces/{NAMESPACE}/llmservers"))


_local = threading.local()


def table(api: Api, path: str) -> list[dict[str, Any]]:
    separator = "&" if "?" in path else "?"
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io"
    rows: list[dict[str, Any]] = api.request("GET", f"{path}{separator}includeObject=None", accept=accept)["rows"]
    return rows


def server(name: str) -> Server:
    parsed = parse({**manifest(name), "metadata": {"name": name, "namespace": NAMESPACE, "uid": "", "generation": 1}})
    assert isinstance(parsed, Server), parsed
    return parsed


def manifest(name: str) -> dict[str, Any]:
    hardware = {"gpus": 1, "nodeSelector": {"octavo.dev/scale": "yes"}}
    spec = {"model": {"source": "hf://org/name"}, "hardware": hardware}
    return {"apiVersion": "octavo.dev/v1alpha1", "kind": "LLMServer", "metadata": {"name": name}, "spec": spec}


def create(api: Api, name: str) -> None:
    api.request("POST", f"{acting.SERVERS}/namespaces/{NAMESPACE}/llmservers", manifest(name))


def apply(api: Api, body: dict[str, Any]) -> None:
    body["metadata"].pop("ownerReferences", None)
    plural = {"Deployment": "deployments", "Service": "services", "PodDisruptionBudget": "poddisruptionbudgets"}
    kind = plural[body["kind"]]
    path = f"{acting.KINDS[kind]}/namespaces/{NAMESPACE}/{kind}/{body['metadata']['name']}"
    api.request("PATCH", f"{path}?fieldManager=bench&force=true", body, "application/apply-patch+yaml")


def in_parallel(do: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(do, items))


def add_node(api: Api, name: str, pods: int) -> None:
    labels = {"octavo.dev/scale": "yes", "kubernetes.io/hostname": name}
    metadata = {"name": name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}}
    api.request("POST", "/api/v1/nodes", {"metadata": metadata})
    amounts = {"cpu": "640", "memory": "5Ti", "pods": str(pods), "nvidia.com/gpu": str(pods)}
    api.merge(f"/api/v1/nodes/{name}/status", {"status": {"capacity": amounts, "allocatable": amounts}})
    acting.wait_for(lambda: not (api.get(f"/api/v1/nodes/{name}") or {})["spec"].get("taints"), "a clean node", 60)


def new_namespace(api: Api) -> None:
    api.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    acting.wait_for(lambda: api.get(f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default"), "an account")


def drop_namespace(api: Api) -> None:
    try:
        api.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}")
    except ApiError as error:
        if error.status != 404:
            raise
    acting.wait_for(lambda: api.get(f"/api/v1/namespaces/{NAMESPACE}") is None, "the namespace to be gone", 600, 1)


if __name__ == "__main__":
    sys.exit(main())
