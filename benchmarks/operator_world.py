"""What operator_scale.py measures in and with: nodes, namespaces, servers, and gauges that do not depend on load."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("engine", "operator", "tests", "tests/operator", "tests/cluster")]

import stage as acting  # noqa: E402 - found through the path above
from stage import Api, ApiError, Operator, wait_for  # noqa: E402

from cluster import Cluster  # noqa: E402

NAMESPACE = "scale"
NODES = 16
CLIENTS = 16
SERVERS = f"{acting.SERVERS}/namespaces/{NAMESPACE}/llmservers"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


def manifest(name: str) -> dict[str, Any]:
    hardware = {"gpus": 1, "nodeSelector": {"octavo.dev/scale": "yes"}}
    spec = {"model": {"source": "hf://org/name"}, "hardware": hardware}
    return {"apiVersion": "octavo.dev/v1alpha1", "kind": "LLMServer", "metadata": {"name": name}, "spec": spec}


def create(api: Api, name: str) -> float:
    """Seconds of the monotonic clock at which the API server had said yes."""
    api.request("POST", SERVERS, manifest(name))
    return time.monotonic()


def apply(api: Api, body: dict[str, Any]) -> None:
    """As `kubectl apply --server-side` does it."""
    body["metadata"].pop("ownerReferences", None)
    plural = {"Deployment": "deployments", "Service": "services", "PodDisruptionBudget": "poddisruptionbudgets"}
    kind = plural[body["kind"]]
    path = f"{acting.KINDS[kind]}/namespaces/{NAMESPACE}/{kind}/{body['metadata']['name']}"
    api.request("PATCH", f"{path}?fieldManager=bench&force=true", body, "application/apply-patch+yaml")


def in_parallel(do: Callable[[Any], object], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(do, items))


class Watch:
    """When the objects of a path first came to be as asked, by server, as a client of the API server sees it.

    Told by a watch and not by asking again and again: a list of a thousand LLMServers takes the API server a fifth of a
    second, which would be measured as the operator's.
    """

    def __init__(self, api: Api, path: str, is_so: Callable[[dict[str, Any]], bool]) -> None:
        self.seen: dict[str, float] = {}
        self._is_so = is_so
        self._news = threading.Condition()
        self._ended = False
        version = api.request("GET", f"{path}?limit=1")["metadata"]["resourceVersion"]
        self._connection: HTTPSConnection = api.connect()
        self._connection.connect()
        self._connection.sock.settimeout(None)
        self._connection.request("GET", f"{path}?watch=true&resourceVersion={version}")
        self._answer = self._connection.getresponse()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._connection.sock.shutdown(2)
        self._thread.join()
        self._connection.close()

    def _read(self) -> None:
        try:
            for line in self._answer:
                now = time.monotonic()
                event = json.loads(line)
                document = event["object"]
                if event["type"] in ("ADDED", "MODIFIED") and self._is_so(document):
                    with self._news:
                        metadata = document["metadata"]
                        name = metadata.get("labels", {}).get("octavo.dev/server", metadata["name"])
                        self.seen.setdefault(name, now)
                        self._news.notify_all()
        except (OSError, ValueError, AttributeError):
            if not self._ended:
                raise

    def wait(self, names: Sequence[str], timeout_s: float) -> float:
        """Until it is so of all of them. Seconds of the monotonic clock at which the last one was."""
        wanted = set(names)
        with self._news:
            if not self._news.wait_for(lambda: wanted <= self.seen.keys(), timeout_s):
                missing = sorted(wanted - self.seen.keys())
                raise TimeoutError(f"not within {timeout_s:g} s: {len(missing)}, such as {', '.join(missing[:5])}")
            return max(self.seen[name] for name in wanted)


def exists(document: dict[str, Any]) -> bool:
    return True


def is_ready(document: dict[str, Any]) -> bool:
    """Of a pod or of an LLMServer, which tell it alike."""
    conditions = document.get("status", {}).get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    at = {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 90, 99)}
    return {name: round(1000 * value, 1) for name, value in {**at, "max": ordered[-1]}.items()}


def requests_of(operator: Operator) -> Counter[str]:
    """By verb, kind and answer, as the operator counts them itself. Its watches are not among them."""
    found: Counter[str] = Counter()
    for line in operator.get("/metrics").splitlines():
        if line.startswith("octavo_operator_api_requests_total{"):
            labels = dict(part.split("=") for part in line[line.index("{") + 1 : line.index("}")].split(","))
            words = [labels[name].strip('"') for name in ("verb", "kind", "code")]
            found[" ".join(words)] += int(float(line.split()[-1]))
    return found


PROGRAMS = ("kube-apiserver", "etcd", "kube-controller", "kube-scheduler", "kwok")


def cpu_seconds(cluster: Cluster) -> dict[str, float]:
    """Of the programs that every server is work for. However many others want the cores, these stay what they are."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = dict.fromkeys(PROGRAMS, 0.0)
    for line in cluster.run(["sh", "-c", "cat /proc/[0-9]*/stat"], check=False).stdout.splitlines():
        name, fields = line[line.index("(") + 1 : line.rindex(")")], line[line.rindex(")") + 1 :].split()
        if name in found:
            found[name] += (int(fields[11]) + int(fields[12])) / ticks
    return found


class Cpu:
    """CPU seconds from here on."""

    def __init__(self, cluster: Cluster, operator: Operator | None = None) -> None:
        self._cluster, self._operator = cluster, operator
        self._before = self._now()

    def since(self) -> dict[str, float]:
        return {name: round(seconds - self._before[name], 1) for name, seconds in self._now().items()}

    def _now(self) -> dict[str, float]:
        found = cpu_seconds(self._cluster)
        if self._operator is not None:
            found["operator"] = self._operator.metric("process_cpu_seconds_total")
        return found


def add_node(api: Api, name: str, pods: int) -> None:
    labels = {"octavo.dev/scale": "yes", "kubernetes.io/hostname": name}
    metadata = {"name": name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}}
    api.request("POST", "/api/v1/nodes", {"metadata": metadata})
    amounts = {"cpu": "640", "memory": "5Ti", "pods": str(pods), "nvidia.com/gpu": str(pods)}
    api.merge(f"/api/v1/nodes/{name}/status", {"status": {"capacity": amounts, "allocatable": amounts}})
    wait_for(lambda: not (api.get(f"/api/v1/nodes/{name}") or {})["spec"].get("taints"), "a clean node", 60)


def new_namespace(api: Api) -> None:
    api.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    wait_for(lambda: api.get(f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default"), "an account")


LIVE_LOOKUPS_S = 31
"""For half a minute after a namespace was deleted, the API server reads one of that name at every write."""


def drop_namespace(api: Api) -> None:
    began = time.monotonic()
    try:
        api.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}")
    except ApiError as error:
        if error.status != 404:
            raise
    wait_for(lambda: api.get(f"/api/v1/namespaces/{NAMESPACE}") is None, "the namespace to be gone", 600, 1)
    time.sleep(max(0.0, began + LIVE_LOOKUPS_S - time.monotonic()))


def numbered(count: int) -> Iterator[str]:
    return (f"llm-{number:04}" for number in range(count))
