"""What the operator's tests act with: the API server, staged nodes and pods, stand-in engines, operator processes.

A *staged* node is a Node object without a kubelet. The real scheduler binds pods to it, and the test says what becomes
of them, so that every end a pod can come to is a line in a test and takes no time. What a real kubelet says is tested
on the cluster's real node.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml
from fixtures import built

import waiting
from octavo_engine.status import Effective, Failure, Load, Progress, Statusz
from octavo_engine.status import Stage as EngineStage

ROOT = Path(__file__).resolve().parents[2]
SERVERS = "/apis/octavo.dev/v1alpha1"
KINDS = {
    "llmservers": SERVERS,
    "deployments": "/apis/apps/v1",
    "services": "/api/v1",
    "pods": "/api/v1",
    "events": "/api/v1",
    "secrets": "/api/v1",
    "resourcequotas": "/api/v1",
    "poddisruptionbudgets": "/apis/policy/v1",
    "podmonitors": "/apis/monitoring.coreos.com/v1",
    "leases": "/apis/coordination.k8s.io/v1",
    "jobs": "/apis/batch/v1",
    "persistentvolumeclaims": "/api/v1",
    "ingresses": "/apis/networking.k8s.io/v1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
    "httproutes": "/apis/gateway.networking.k8s.io/v1",
    "endpointslices": "/apis/discovery.k8s.io/v1",
}
CHILDREN = ("deployments", "services", "poddisruptionbudgets")
NODE_LABEL = "octavo.dev/staged"
T = TypeVar("T")
PATIENCE_S = 120.0
"""For what comes by itself. A wait ends when it has come, so that only a failure takes longer; on a machine that four
others keep busy, an operator took more than 30 s to start."""
LEASE = "/apis/coordination.k8s.io/v1/namespaces/octavo-system/leases/octavo-operator"
Document = dict[str, Any]


class ApiError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


def wait_for(look: Callable[[], T | None], what: str, timeout_s: float = PATIENCE_S, every_s: float = 0.02) -> T:
    """The bound is for a machine that is busy; on an idle one everything waited for comes within seconds."""
    return waiting.wait_for(look, what, timeout_s, every_s)


class Api:
    """The API server, by plain HTTP: a request costs a millisecond where kubectl costs a hundred."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        config = yaml.safe_load(cluster.kubeconfig.read_text())
        user, server = config["users"][0]["user"], config["clusters"][0]["cluster"]
        self.server = server
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder, name) for name in ("certificate", "key", "ca")}
            files["certificate"].write_bytes(_data(user, "client-certificate"))
            files["key"].write_bytes(_data(user, "client-key"))
            files["ca"].write_bytes(_data(server, "certificate-authority"))
            self._tls = ssl.create_default_context(cafile=str(files["ca"]))
            self._tls.check_hostname = False
            self._tls.load_cert_chain(files["certificate"], files["key"])
        self._host = server["server"].removeprefix("https://")
        self._local = threading.local()

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Document:
        """Raises ApiError for what the API server refuses, and for "not now" only when it says so for half a minute.

        It says 429 or 503 of a kind whose definition has just come, and of itself when it is busy.
        """
        deadline = time.monotonic() + 30
        while True:
            try:
                return self._request_once(method, path, body, content_type, accept)
            except ApiError as error:
                if error.status not in (429, 503) or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def _request_once(self, method: str, path: str, body: Any, content_type: str, accept: str) -> Document:
        for attempt in (1, 2):
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = self.connect()
            try:
                headers = {"Content-Type": content_type, "Accept": accept}
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                text = answer.read()
                # Of a group that it does not serve, the API server answers "404 page not found".
                document = json.loads(text) if text.startswith(b"{") else {"message": text.decode().strip()}
            except (http.client.HTTPException, OSError):
                connection.close()
                self._local.connection = None
                if attempt == 2:
                    raise
                continue
            if answer.status >= 300:
                raise ApiError(answer.status, document.get("message", ""))
            return document
        raise AssertionError("unreachable")

    def connect(self) -> http.client.HTTPSConnection:
        """A connection of the caller's own, as a watch occupies one."""
        return http.client.HTTPSConnection(self._host, context=self._tls, timeout=30)

    def close(self) -> None:
        """Of this thread; every thread has a connection of its own."""
        if connection := getattr(self._local, "connection", None):
            connection.close()
            self._local.connection = None

    def get(self, path: str) -> Document | None:
        try:
            return self.request("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def merge(self, path: str, patch: Document) -> Document:
        return self.request("PATCH", path, patch, "application/merge-patch+json")


def _data(entry: Document, name: str) -> bytes:
    inline = entry.get(f"{name}-data")
    return base64.b64decode(inline) if inline else Path(entry[name]).read_bytes()


class Engines:
    """Stand-in engines, told apart by the addresses of their pods."""

    def __init__(self, cluster: Any) -> None:
        self.folder = cluster.state / "engines"
        self.folder.mkdir(exist_ok=True)
        self._numbers = itertools.count(1)
        self._cluster = cluster
        script = Path(__file__).with_name("standin.py")
        cluster.start_program("standin", [sys.executable, str(script), str(self.folder)])

    def new_address(self) -> str:
        number = next(self._numbers)
        return f"127.1.{number // 250}.{number % 250 + 1}"

    def answer_for_kwok(self) -> None:
        """KWOK's pods get addresses of one range; made local, they all lead to the stand-in, and all are ready."""
        self._cluster.run(["ip", "route", "replace", "local", "10.245.0.0/16", "dev", "lo"])
        self.say("10.245", says(EngineStage.READY, effective=EFFECTIVE))

    def say(self, address: str, statusz: Statusz | None) -> None:
        file = self.folder / f"{address}.json"
        if statusz is None:
            file.unlink(missing_ok=True)
            return
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(statusz.to_dict()))
        partial.rename(file)


def says(stage: EngineStage, percent: float = 0, **more: Any) -> Statusz:
    done, total, eta = more.pop("done", 0), more.pop("total", 0), more.pop("eta", None)
    return Statusz(stage, progress=Progress(done, total, percent, eta), **more)


EFFECTIVE = Effective(
    model="/models/m",
    dtype="float32",
    kv_dtype="float32",
    max_model_len=2048,
    block_size=64,
    num_blocks=100,
    kv_tokens=6400,
    max_concurrency_at_max_len=3.125,
    attention_backend="reference",
    gpu="CPU",
    engine_version="0.1.0",
    weights_bytes=538 * 2**20,
    kv_bytes=2**30,
)


def chart(release: str, *templates: str, values: tuple[str, ...] = (), root: Path = ROOT) -> str:
    """What the chart makes of these templates, by the real helm."""
    command = [f"{built('helm')}/helm", "template", release, str(root / "helm/octavo"), "-n", "octavo-system"]
    command += ["--kube-version=1.34.0", *(f"--show-only=templates/{name}.yaml" for name in templates)]
    command += [f"--set={value}" for value in values]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def define(cluster: Any, documents: str) -> None:
    """Apply what the chart made for octavo-system, our kind's definition in it, and return once the kind is served."""
    namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: octavo-system}\n---\n"
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=namespace + documents)
    name = "crd/llmservers.octavo.dev"
    wait_for(
        lambda: is_served(json.loads(cluster.kubectl("get", name, "-o", "json"))), "our kind to be served", 30, 0.2
    )


def is_served(definition: Mapping[str, Any]) -> bool:
    """Whether its objects can be made. `kubectl wait` ends with an error where the conditions are null, as they are
    until the controller has looked."""
    conditions = definition.get("status", {}).get("conditions") or ()
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


class Faults:
    """A proxy in front of the API server that does badly what it is told to (faults.py)."""

    def __init__(self, cluster: Any, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._orders = cluster.state / f"faults-{port}.json"
        self.do()
        script = str(Path(__file__).with_name("faults.py"))
        pki = "/etc/kubernetes/pki"
        command = [sys.executable, script, str(port), "https://10.250.0.1:6443", f"{pki}/ca.crt", str(self._orders)]
        cluster.start_program(f"faults-{port}", command)

    def do(self, **orders: Any) -> None:
        """What goes wrong from now on: nothing, without orders."""
        partial = self._orders.with_suffix(".partial")
        partial.write_text(json.dumps(orders))
        partial.rename(self._orders)


class Stage:
    """One namespace with one staged node, and what happens in it."""

    _numbers = itertools.count(1)

    def __init__(self, api: Api, engines: Engines) -> None:
        self.api, self.engines = api, engines
        self.namespace = f"stage-{next(self._numbers)}"
        self.node = self.namespace
        self._nodes: list[str] = []
        self._beating: set[str] = set()
        self._removed = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"heart of {self.node}", daemon=True)
        self._heart.start()
        api.request("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace}})
        self.add_node(self.node)
        wait_for(lambda: api.get(f"/api/v1/namespaces/{self.namespace}/serviceaccounts/default"), "a service account")

    def remove(self) -> None:
        # The nodes go whatever else fails: later tests count the cluster's nodes.
        try:
            for document in self.list("llmservers"):
                self.delete("llmservers", document["metadata"]["name"])
            for pod in self.list("pods"):
                self.forget(pod["metadata"]["name"])
            self.api.request("DELETE", f"/api/v1/namespaces/{self.namespace}")
        finally:
            self._removed.set()
            self._heart.join()
            for name in self._nodes:
                with contextlib.suppress(ApiError):
                    self.api.request("DELETE", f"/api/v1/nodes/{name}")

    def add_node(self, name: str, gpus: int = 0, *, kwok: bool = False, cpu: str = "64") -> None:
        """kwok: KWOK plays its kubelet, so pods that it is given come to run; else it only says that it is ready."""
        labels = {NODE_LABEL: self.node, "kubernetes.io/hostname": name}
        annotations = {"kwok.x-k8s.io/node": "fake"} if kwok else {}
        metadata = {"name": name, "labels": labels, "annotations": annotations}
        self.api.request("POST", "/api/v1/nodes", {"metadata": metadata})
        self._nodes.append(name)
        amounts = {"cpu": cpu, "memory": "512Gi", "pods": "200", "nvidia.com/gpu": str(gpus)}
        self._say_ready(name, capacity=amounts, allocatable=amounts)
        if not kwok:
            self._beating.add(name)
        # Until the controllers have seen the node as ready, it carries a taint.
        wait_for(lambda: not (self.api.get(f"/api/v1/nodes/{name}") or {})["spec"].get("taints"), "a clean node")

    def lose_node(self) -> None:
        """The staged node says nothing more. It is given up after 50 s, and its pods are no longer ready.

        To say in its place what the controller says of it then is no way round the wait: that marks the pods of those
        nodes only that it gave up itself.
        """
        self._beating.discard(self.node)

    def find_node(self) -> None:
        self._say_ready(self.node)
        self._beating.add(self.node)

    def _beat(self) -> None:
        """Without it every test would have to end within the 50 s, which on a busy machine some do not."""
        try:
            while not self._removed.wait(10):
                for name in tuple(self._beating):
                    with contextlib.suppress(ApiError, OSError, http.client.HTTPException):
                        self._say_ready(name)
        finally:
            self.api.close()

    def _say_ready(self, name: str, **more: Any) -> None:
        now = _now()
        condition = {"type": "Ready", "status": "True", "reason": "Staged", "message": "staged by a test"}
        condition |= {"lastHeartbeatTime": now, "lastTransitionTime": now}
        self.api.merge(f"/api/v1/nodes/{name}/status", {"status": {"conditions": [condition], **more}})

    def path(self, kind: str, name: str = "", subresource: str = "") -> str:
        tail = "".join(f"/{part}" for part in (name, subresource) if part)
        return f"{KINDS[kind]}/namespaces/{self.namespace}/{kind}{tail}"

    def get(self, kind: str, name: str) -> Document | None:
        return self.api.get(self.path(kind, name))

    def list(self, kind: str, query: str = "") -> list[Document]:
        items: list[Document] = self.api.request("GET", self.path(kind) + query)["items"]
        return items

    def delete(self, kind: str, name: str) -> None:
        with contextlib.suppress(ApiError):
            self.api.request("DELETE", self.path(kind, name))

    def forget(self, pod: str) -> None:
        """What a kubelet does last: the object of a pod that has ended goes."""
        with contextlib.suppress(ApiError):
            self.api.request("DELETE", self.path("pods", pod) + "?gracePeriodSeconds=0")

    def create(self, kind: str, body: Document) -> Document:
        return self.api.request("POST", self.path(kind), body)

    def serve(self, name: str = "qwen", **spec: Any) -> Document:
        """An LLMServer, created; by default one replica on the staged node's CPU."""
        body = {"apiVersion": "octavo.dev/v1alpha1", "kind": "LLMServer", "metadata": {"name": name}}
        return self.create("llmservers", {**body, "spec": self.spec(**spec)})

    def spec(self, **spec: Any) -> Document:
        hardware = {"gpus": 0, "nodeSelector": {NODE_LABEL: self.node}} | spec.pop("hardware", {})
        return {"model": {"source": "hf://org/name"}, "hardware": hardware} | spec

    def patch(self, name: str, spec: Document) -> Document:
        return self.api.merge(self.path("llmservers", name), {"spec": spec})

    def status(self, name: str = "qwen") -> Document:
        document = self.get("llmservers", name) or {}
        status: Document = document.get("status", {})
        current = status.get("observedGeneration") == document.get("metadata", {}).get("generation")
        return status if current else {}

    def condition(self, kind: str, name: str = "qwen") -> Document:
        found = [c for c in self.status(name).get("conditions", []) if c["type"] == kind]
        return found[0] if found else {"status": "Missing", "reason": "Missing", "message": ""}

    def wait_condition(
        self, kind: str, status: str, reason: str, name: str = "qwen", timeout_s: float = PATIENCE_S
    ) -> Document:
        def look() -> Document | None:
            found = self.condition(kind, name)
            return found if (found["status"], found["reason"]) == (status, reason) else None

        try:
            return wait_for(look, f"{kind} {status} {reason}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; the status is {json.dumps(self.status(name), indent=1)}") from None

    def pods(self, name: str = "qwen") -> list[Document]:
        return self.list("pods", f"?labelSelector=octavo.dev/server%3D{name}")

    def wait_pods(self, count: int, name: str = "qwen") -> list[Document]:
        """Pods that have been given to the staged node, oldest first."""

        def look() -> list[Document] | None:
            found = [p for p in self.pods(name) if p["spec"].get("nodeName") and not _is_going(p)]
            return found if len(found) == count else None

        found = wait_for(look, f"{count} pods on the staged node")
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def events(self, name: str = "qwen") -> list[tuple[str, str]]:
        found = self.list("events", f"?fieldSelector=involvedObject.name%3D{name},involvedObject.kind%3DLLMServer")
        return [(event["type"], event["reason"]) for event in found]

    def wait_event(self, kind: str, reason: str, name: str = "qwen") -> None:
        """Events come a moment after the status that they are about."""
        wait_for(lambda: (kind, reason) in self.events(name), f"a {kind} event {reason} among {self.events(name)}")

    def run_pod(self, pod: Document, *, ready: bool = False, restarts: int = 0, last: Document | None = None) -> str:
        """What a kubelet reports of a running container. Returns the pod's address."""
        address = pod.get("status", {}).get("podIP") or self.engines.new_address()
        self.report(pod, address, {"running": {"startedAt": _now()}}, ready=ready, restarts=restarts, last=last)
        return address

    def crash_pod(
        self, pod: Document, message: str = "", exit_code: int = 1, reason: str = "Error", restarts: int = 1
    ) -> None:
        """The container ended, and the kubelet waits before it starts it again."""
        end = {"exitCode": exit_code, "reason": reason, "message": message, "startedAt": _now(), "finishedAt": _now()}
        waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}}
        self.report(pod, None, waiting, restarts=restarts, last={"terminated": end})

    def report(
        self,
        pod: Document,
        address: str | None,
        state: Document,
        *,
        ready: bool = False,
        restarts: int = 0,
        last: Document | None = None,
    ) -> None:
        truth = str(ready)
        now = _now()
        container = {
            "name": "engine",
            "ready": ready,
            "restartCount": restarts,
            "state": state,
            "lastState": last or {},
        }
        container |= {"image": "x", "imageID": "", "started": "running" in state}
        conditions = [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": now},
            {"type": "Ready", "status": truth, "lastTransitionTime": now},
            {"type": "ContainersReady", "status": truth, "lastTransitionTime": now},
        ]
        status: Document = {"phase": "Running", "conditions": conditions, "containerStatuses": [container]}
        if address:
            status |= {"podIP": address, "podIPs": [{"ip": address}]}
        updated = self.api.merge(self.path("pods", pod["metadata"]["name"], "status"), {"status": status})
        pod["status"] = updated["status"]

    def up(self, pod: Document, effective: Effective = EFFECTIVE, load: Load | None = None) -> str:
        """The pod's engine is ready and in the Service."""
        address = pod.get("status", {}).get("podIP") or self.engines.new_address()
        self.engines.say(address, says(EngineStage.READY, effective=effective, load=load or Load()))
        self.report(pod, address, {"running": {"startedAt": _now()}}, ready=True)
        return address

    @contextlib.contextmanager
    def kubelet(self, name: str = "qwen") -> Iterator[None]:
        """While this lasts, every pod of the server comes up at once and goes when it is told to."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(0.05):
                for pod in self.pods(name):
                    if _is_going(pod):
                        self.forget(pod["metadata"]["name"])
                    elif pod["spec"].get("nodeName") and not pod["status"].get("podIP"):
                        with contextlib.suppress(ApiError):
                            self.up(pod)
            self.api.close()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def certificate(failure: Failure) -> str:
    return failure.to_json()


def _is_going(document: Document) -> bool:
    return "deletionTimestamp" in document["metadata"]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Operator:
    """`octavo-operator run` as a process in the cluster's network, with the rights that the chart gives it."""

    command, address = "run", "127.0.0.1"

    def __init__(
        self,
        cluster: Any,
        identity: str,
        port: int,
        account: str = "octavo-operator",
        *,
        python: tuple[str, ...] = (sys.executable,),
        server: str = "",
        **environment: str,
    ) -> None:
        self.cluster, self.identity, self.port = cluster, identity, port
        kubeconfig = cluster.state / f"{identity}.kubeconfig"
        token = cluster.kubectl("create", "token", account, "-n", "octavo-system", "--duration=2h").strip()
        config = yaml.safe_load((cluster.state / "root/etc/kubernetes/pki/admin.kubeconfig").read_text())
        config["users"][0]["user"] = {"token": token}
        if server:
            config["clusters"][0]["cluster"] = {"server": server}
        kubeconfig.write_text(yaml.safe_dump(config))
        settings = {
            "KUBECONFIG": str(kubeconfig),
            "PYTHONPATH": f"{ROOT}/engine:{ROOT}/operator",
            "OCTAVO_NAMESPACE": "octavo-system",
            "OCTAVO_IDENTITY": identity,
            "OCTAVO_LISTEN_HOST": "127.0.0.1",
            "OCTAVO_LISTEN_PORT": str(port),
            "OCTAVO_LEASE_SECONDS": "3",
            **environment,
        }
        self._log = cluster.logs / f"{identity}-{port}-{time.monotonic():.0f}.log"
        words = ["env", *(f"{name}={value}" for name, value in settings.items())]
        command = [*words, *python, "-m", "octavo_operator.cli", self.command]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(cluster.inside(command), stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_leading(self, timeout_s: float = PATIENCE_S) -> None:
        wait_for(lambda: "leading identity" in self.log(), f"{self.identity} to lead: {self.log()}", timeout_s)

    def get(self, path: str) -> str:
        url = f"http://{self.address}:{self.port}{path}"
        return str(self.cluster.run(["curl", "-sS", "--max-time", "5", "-w", "%{http_code}", url], check=False).stdout)

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name) and line[0] != "#"]
        return sum(float(line.split()[-1]) for line in lines)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """To the operator itself: nsenter, whose child it is, ends with it."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except FileNotFoundError:
            children = []
        if not children:
            raise ProcessLookupError("the operator has ended by itself")
        os.kill(int(children[0]), number)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.kill(signal.SIGTERM)
        return self.process.wait(60)


class Activator(Operator):
    """`octavo-operator activator` likewise, at an address of its own."""

    command = "activator"

    def __init__(self, cluster: Any, address: str, **environment: str) -> None:
        cluster.run(["ip", "address", "replace", f"{address}/32", "dev", "node0"])
        self.address = address
        environment = {"OCTAVO_LISTEN_HOST": address, "OCTAVO_ACTIVATOR_LEAVE_SECONDS": "2", **environment}
        super().__init__(cluster, f"activator-{address}", 8081, "octavo-activator", **environment)

    def wait_serving(self, timeout_s: float = PATIENCE_S) -> None:
        wait_for(lambda: "taking requests" in self.log(), f"{self.address} to listen: {self.log()}", timeout_s)
