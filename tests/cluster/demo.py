#!/usr/bin/env python3
"""From nothing to an answer: `make demo` runs `demo.py up`, `make demo-down` runs `demo.py down`.

Three ways, the first that applies:

1. The current cluster, when KUBECONFIG or CLUSTER=current says so. Its nodes must be able to get the images: kind and
   minikube are handed them; for others set OCTAVO_REGISTRY (a prefix to push to) or OCTAVO_ENGINE_IMAGE and
   OCTAVO_OPERATOR_IMAGE (images that are there already).
2. A single-node Kubernetes of its own on this machine (cluster.py).
3. The engine alone, with the reason and the manifests that the operator would have applied.

Every step may be run again: what is there already is left as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import images
import machine
import programs
from terminal import Report, bold, green, red

from cluster import Cluster, ClusterError, problems

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples/smollm2.yaml"
SERVER, CLAIM, MODEL_FOLDER = "smollm2", "smollm2", "SmolLM2-135M-Instruct"
NAMESPACE, RELEASE, SYSTEM_NAMESPACE = "default", "octavo", "octavo-system"
READY_TIMEOUT_S = 300
QUESTION = "What is the capital of France?"
STREAMED_QUESTION = "Why is the sky blue? Answer in two sentences."
OWN_CLUSTER = "demo"
# The names that dashboards and autoscalers look at first.
SHOWN_METRICS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_sum",
    "vllm:time_to_first_token_seconds_count",
    "vllm:request_success_total",
    "octavo:",
)


class DemoError(Exception):
    """Says what went wrong and what to look at."""


@dataclass(frozen=True)
class Kubernetes:
    """A cluster as this program uses it: two commands and the environment that they need."""

    kubectl_path: str
    helm_path: str
    environment: dict[str, str]
    context: str

    def kubectl(self, *arguments: str, stdin: str | bytes | None = None) -> str:
        return self._run([self.kubectl_path, *arguments], stdin)

    def helm(self, *arguments: str) -> str:
        return self._run([self.helm_path, *arguments], None)

    def _run(self, command: Sequence[str], stdin: str | bytes | None) -> str:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(command, input=data, capture_output=True, env=self.environment)
        if done.returncode != 0:
            words = " ".join([Path(command[0]).name, *command[1:]])
            raise DemoError(f"{words} failed:\n{done.stderr.decode(errors='replace')}")
        return done.stdout.decode()


def up(python: str, report: Report) -> None:
    if wants_current():
        on_current_cluster(python, report)
        return
    with report.step("Look at this machine"):
        packages = machine.missing_packages()
        if packages and os.geteuid() == 0 and shutil.which("apt-get"):
            report.say(f"installing {' '.join(packages)}")
            machine.install()
        found = problems(images_wanted=True)
        report.say("it can carry a Kubernetes of its own" if not found else "it cannot carry a Kubernetes of its own:")
        for problem in found:
            report.say(f"{red('•')} {problem}")
    if found:
        engine_alone(python, report)
    else:
        on_own_cluster(python, report)


def wants_current() -> bool:
    choice = os.environ.get("CLUSTER", "")
    return choice == "current" or (bool(os.environ.get("KUBECONFIG")) and choice != "own")


def on_own_cluster(python: str, report: Report) -> None:
    cluster = Cluster(OWN_CLUSTER)
    with report.step("Build Kubernetes and Helm, and the images"), ThreadPoolExecutor(1) as beside:
        # The compiler keeps the processors busy, the images the network and the disk.
        built = beside.submit(build_images, report)
        programs.build(programs.FOR_DEMO, report.dim)
        built.result()
        report.say(f"in {machine.cache_dir()}")
    with report.step("Prepare the model"):
        model = model_folder(python, report)
    with report.step("Start Kubernetes"):
        names = {target: images.name_of(target) for target in images.TARGETS}
        if cluster.is_up() and not all(images.is_loaded(name, cluster.inside) for name in names.values()):
            # Pods that run keep the build that they started with, as its name is the same.
            report.say("the images have changed: it starts anew")
            cluster.down()
        seconds = cluster.up()
        report.say(f"one node, Ready after {seconds:.1f} s" if seconds > 1 else "it was running")
    kubernetes = Kubernetes(
        str(programs.folder("k8s") / "kubectl"),
        str(programs.folder("helm") / "helm"),
        os.environ | {"KUBECONFIG": str(cluster.kubeconfig)},
        "octavo",
    )
    remember({"mode": "own"})
    try:
        with report.step("Bring the images to the node"):
            for name in names.values():
                cluster.load(name, report.dim)
        with report.step("Fill a PersistentVolumeClaim with the model"):
            volume = cluster.state / "volumes" / CLAIM
            shutil.copytree(model, volume / MODEL_FOLDER, dirs_exist_ok=True)
            kubernetes.kubectl("apply", "-f", "-", stdin=json.dumps(claim(host_path=str(volume))))
            bound = "--for=jsonpath={.status.phase}=Bound"
            kubernetes.kubectl("wait", bound, f"pvc/{CLAIM}", "-n", NAMESPACE, "--timeout=60s")
            report.say(f"{size_of(model) / 1e6:.0f} MB in the claim {CLAIM}, folder {MODEL_FOLDER}")
        serve(kubernetes, names, report)
    except BaseException:
        with contextlib.suppress(OSError, ClusterError):
            logs = machine.cache_dir() / "demo-logs"
            cluster.save_logs(logs)
            report.say(f"logs, events and objects are kept in {logs}")
        raise
    report.table()
    path = f"{programs.folder('k8s')}:{programs.folder('helm')}"
    go_on([f"export KUBECONFIG={cluster.kubeconfig} PATH={path}:$PATH"])


def build_images(report: Report) -> None:
    for target in images.TARGETS:
        images.build(target, report.dim)


def on_current_cluster(python: str, report: Report) -> None:
    with report.step("Look at the current cluster"):
        missing = tuple(c for c, program in (("k8s", "kubectl"), ("helm", "helm")) if not shutil.which(program))
        programs.build(missing, report.dim)
        kubectl = shutil.which("kubectl") or str(programs.folder("k8s") / "kubectl")
        helm = shutil.which("helm") or str(programs.folder("helm") / "helm")
        unnamed = Kubernetes(kubectl, helm, dict(os.environ), "")
        context = unnamed.kubectl("config", "current-context").strip()
        kubernetes = Kubernetes(kubectl, helm, dict(os.environ), context)
        report.say(f"context {context}, server {kubernetes.kubectl('version', '-o', 'json') and 'answers'}")
        installed = kubernetes.helm("list", "-n", SYSTEM_NAMESPACE, "-q", "-f", f"^{RELEASE}$").strip()
        if installed and remembered().get("context") != context:
            raise DemoError(
                f"{context} has a release {RELEASE} in {SYSTEM_NAMESPACE} that is not the demo's, and the demo would "
                f"change it and remove it with all servers. Octavo is there: kubectl apply -f {EXAMPLE}"
            )
        remember({"mode": "current", "kubeconfig": os.environ.get("KUBECONFIG", ""), "context": context})
    with report.step("Build the images and bring them to the cluster"):
        names = images_for(kubernetes, report)
    with report.step("Prepare the model"):
        model = model_folder(python, report)
    with report.step("Fill a PersistentVolumeClaim with the model"):
        kubernetes.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(claim()))
        fill_claim(kubernetes, model, names["operator"])
        report.say(f"{size_of(model) / 1e6:.0f} MB in the claim {CLAIM}, folder {MODEL_FOLDER}")
    serve(kubernetes, names, report)
    report.table()
    go_on([])


def serve(kubernetes: Kubernetes, names: dict[str, str], report: Report) -> None:
    """What a user does on any cluster: install the chart, apply one resource, ask."""
    with report.step("Install the chart"):
        command = ["upgrade", "--install", RELEASE, str(REPOSITORY / "helm/octavo"), "-n", SYSTEM_NAMESPACE]
        command += ["--create-namespace", "--wait", "--timeout", "3m"]
        command += ["--set", "crds.keep=false"]  # the release is the demo's own, and demo-down leaves nothing
        for target, name in names.items():
            command += ["--set", f"{target}.image={name}"]
        report.say(f"helm upgrade --install {RELEASE} helm/octavo -n {SYSTEM_NAMESPACE} --create-namespace …")
        kubernetes.helm(*command)
    with report.step(f"Apply {EXAMPLE.relative_to(REPOSITORY)} and wait until it is ready"):
        kubernetes.kubectl("apply", "-n", NAMESPACE, "-f", str(EXAMPLE))
        watch(kubernetes, report)
        report.say(kubernetes.kubectl("get", "llmserver", SERVER, "-n", NAMESPACE))
    with report.step("Ask from inside the cluster, by the Service's DNS name"):
        url = f"http://{SERVER}.{NAMESPACE}.svc.cluster.local/v1/chat/completions"
        report.say(f"POST {url}\n{bold(QUESTION)}")
        report.say(green(ask_from_a_pod(kubernetes, url, names["operator"])))
    with port_forward(kubernetes) as address:
        with report.step("Ask through kubectl port-forward, and stream the answer"):
            stream_with_curl(address, report)
        with report.step("Read the metrics that Prometheus would scrape"):
            show_metrics(address, report)


def watch(kubernetes: Kubernetes, report: Report) -> None:
    """Show the resource's own words until it is Ready, or until it says that it will not be."""
    started, last = time.monotonic(), ""
    while time.monotonic() - started < READY_TIMEOUT_S:
        server = json.loads(kubernetes.kubectl("get", "llmserver", SERVER, "-n", NAMESPACE, "-o", "json"))
        status: dict[str, Any] = server.get("status", {})
        line = describe(status)
        if line != last:
            report.rewrite(f"{time.monotonic() - started:5.1f} s  {line}")
            last = line
        ready: dict[str, Any] = next((c for c in status.get("conditions", []) if c["type"] == "Ready"), {})
        current = status.get("observedGeneration") == server["metadata"]["generation"]
        if current and ready.get("status") == "True":
            return
        if current and status.get("phase") == "Failed":
            raise DemoError(f"{SERVER} failed: {status.get('message', '')}")
        time.sleep(0.3)
    raise DemoError(f"{SERVER} was not ready within {READY_TIMEOUT_S} s; its last word: {last}")


def describe(status: dict[str, Any]) -> str:
    """The status in one line: phase, each pod's stage with percent and seconds, and the message."""
    words = [str(status.get("phase") or "the operator has not looked at it yet")]
    for pod in status.get("pods", []):
        stage = str(pod.get("stage", "?")).replace("_", " ")
        percent = f" {pod['percent']} %" if pod.get("percent") is not None else ""
        eta = f", {pod['etaSeconds']} s left" if pod.get("etaSeconds") else ""
        words.append(f"{stage}{percent}{eta}")
    return " · ".join([*words, *([status["message"]] if status.get("message") else [])])


def ask_from_a_pod(kubernetes: Kubernetes, url: str, image: str) -> str:
    body = {"model": SERVER, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48, "temperature": 0}
    # A Service answers some tenths of a second after its pod is ready: the node's rules have to be written first.
    script = f"""
import json, time, urllib.error, urllib.request
request = urllib.request.Request({url!r}, {json.dumps(body)!r}.encode(), {{"Content-Type": "application/json"}})
for attempt in range(20):
    try:
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        break
    except urllib.error.URLError as error:
        reason = error
        time.sleep(0.25)
else:
    raise SystemExit(f"no answer: {{reason}}")
print(answer["choices"][0]["message"]["content"])
"""
    name = "octavo-demo-question"
    container = {"name": "ask", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["python3", "-c", script]}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container | hardened()]},
    }
    kubernetes.kubectl("delete", "pod", name, "-n", NAMESPACE, "--ignore-not-found")
    kubernetes.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(pod))
    try:
        phase = "Pending"
        deadline = time.monotonic() + 120
        while phase in ("Pending", "Running", "") and time.monotonic() < deadline:
            phase = kubernetes.kubectl("get", "pod", name, "-n", NAMESPACE, "-o", "jsonpath={.status.phase}")
            time.sleep(0.1)
        said = kubernetes.kubectl("logs", name, "-n", NAMESPACE).strip()
        if phase != "Succeeded":
            raise DemoError(f"the pod that asked ended as {phase}: {said}")
        return said
    finally:
        kubernetes.kubectl("delete", "pod", name, "-n", NAMESPACE, "--wait=false")


@contextlib.contextmanager
def port_forward(kubernetes: Kubernetes) -> Iterator[str]:
    """http://127.0.0.1:PORT of the Service, for as long as the block lasts."""
    command = [kubernetes.kubectl_path, "port-forward", "-n", NAMESPACE, f"service/{SERVER}", ":80"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=kubernetes.environment
    )
    try:
        assert process.stdout
        line = process.stdout.readline()  # Forwarding from 127.0.0.1:40001 -> 8000
        if "127.0.0.1:" not in line:
            raise DemoError(f"kubectl port-forward said: {line}")
        yield f"http://{line.split('->')[0].split()[-1]}"
    finally:
        process.terminate()
        process.communicate()


def stream_with_curl(address: str, report: Report) -> None:
    messages = [{"role": "user", "content": STREAMED_QUESTION}]
    body = {"model": SERVER, "messages": messages, "max_tokens": 96, "temperature": 0, "stream": True}
    report.say(f"curl -N {address}/v1/chat/completions -d '{json.dumps(body)}'")
    report.say(bold(STREAMED_QUESTION))
    command = ["curl", "-sSN", "--fail-with-body", "--max-time", "120", "-H", "Content-Type: application/json"]
    command += ["-d", json.dumps(body), f"{address}/v1/chat/completions"]
    started, first, pieces = time.monotonic(), None, 0
    print("  ", end="")
    other = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            event = line.removeprefix("data: ").strip()
            if not line.startswith("data: "):
                other += line
            elif event != "[DONE]":
                text = json.loads(event)["choices"][0]["delta"].get("content") or ""
                first = first or (time.monotonic() if text else None)
                pieces += bool(text)
                print(green(text), end="", flush=True)
    print()
    if process.returncode != 0 or first is None:
        raise DemoError(f"curl got no answer from {address}: {other}")
    seconds = time.monotonic() - first
    report.say(f"first token after {1000 * (first - started):.0f} ms, then {pieces / max(seconds, 1e-3):.0f} tokens/s")


def show_metrics(address: str, report: Report) -> None:
    report.say(f"curl {address}/metrics")
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    shown = [
        line for line in lines if line.startswith(SHOWN_METRICS) and "_bucket" not in line and "_created" not in line
    ]
    report.say("\n".join(shown[:20]))
    report.say(f"… {sum(not line.startswith('#') for line in lines)} series in all")


def engine_alone(python: str, report: Report) -> None:
    """No Kubernetes here: show what would have been applied, and answer all the same."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'engine'}:{REPOSITORY / 'operator'}"}
    with report.step("Print what the operator would apply"):
        render = [python, "-m", "octavo_operator.cli", "render", "-f", str(EXAMPLE)]
        done = subprocess.run(render, capture_output=True, text=True, env=environment)
        report.say(done.stdout if done.returncode == 0 else f"octavo-operator render failed: {done.stderr}")
    with report.step("Prepare the model"):
        model = model_folder(python, report)
    with socket.create_server(("127.0.0.1", 0)) as api, socket.create_server(("127.0.0.1", 0)) as management:
        ports = api.getsockname()[1], management.getsockname()[1]
    address = f"http://127.0.0.1:{ports[0]}"
    serve_command = [python, "-m", "octavo_engine.cli", "serve", str(model), "--served-model-name", SERVER]
    serve_command += ["--host=127.0.0.1", f"--port={ports[0]}", f"--management-port={ports[1]}", "--log-level=warning"]
    with subprocess.Popen(serve_command, env=environment) as process:
        try:
            with report.step("Run the engine alone"):
                report.say(f"octavo serve {model} --served-model-name {SERVER}")
                wait_for_engine(process, ports[1], address, report)
            with report.step("Ask, and stream the answer"):
                stream_with_curl(address, report)
            with report.step("Read the metrics"):
                show_metrics(address, report)
        finally:
            process.terminate()
            process.wait(30)
    report.table()
    print("\n" + bold("The engine answered.") + " For the whole of it, on Kubernetes: CLUSTER=current make demo")


def wait_for_engine(process: subprocess.Popen[bytes], management_port: int, address: str, report: Report) -> None:
    last, deadline = "", time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the engine ended with status {process.returncode}; its last words are above")
        with contextlib.suppress(OSError, ValueError):
            with urllib.request.urlopen(f"http://127.0.0.1:{management_port}/statusz", timeout=2) as answer:
                statusz = json.load(answer)
            line = f"{statusz['stage'].replace('_', ' ')} {statusz['progress']['percent']:.0f} %"
            if line != last:
                report.rewrite(line)
                last = line
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        time.sleep(0.1)
    raise DemoError(f"the engine was not ready within {READY_TIMEOUT_S} s; its last word: {last}")


def images_for(kubernetes: Kubernetes, report: Report) -> dict[str, str]:
    """Image names that the current cluster's nodes can get."""
    given = {target: os.environ.get(f"OCTAVO_{target.upper()}_IMAGE", "") for target in images.TARGETS}
    if all(given.values()):
        report.say("taken from OCTAVO_ENGINE_IMAGE and OCTAVO_OPERATOR_IMAGE")
        return given
    registry = os.environ.get("OCTAVO_REGISTRY", "").rstrip("/")
    kind = kubernetes.context.startswith("kind-")
    minikube = kubernetes.context == "minikube"
    if not (registry or kind or minikube or kubernetes.context == "docker-desktop"):
        raise DemoError(
            f"the nodes of {kubernetes.context} cannot get images that are built here: set OCTAVO_REGISTRY to a prefix "
            "that you may push to (registry.example.com/team), or OCTAVO_ENGINE_IMAGE and OCTAVO_OPERATOR_IMAGE"
        )
    names = {}
    for target in images.TARGETS:
        images.build(target, report.dim)
        name = images.name_of(target)
        if registry:
            names[target] = images.push(name, registry)
            report.say(f"pushed {names[target]}")
            continue
        names[target] = name
        if kind:
            images.hand_over(
                name, ["kind", "load", "image-archive", "--name", kubernetes.context.removeprefix("kind-")]
            )
        elif minikube:
            images.hand_over(name, ["minikube", "image", "load"])
    return names


def claim(host_path: str = "") -> dict[str, Any]:
    """The claim that examples/smollm2.yaml names; with host_path, also a volume of that folder for it."""
    spec: dict[str, Any] = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    items = []
    if host_path:
        spec |= {"storageClassName": "", "volumeName": CLAIM}
        volume = {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "",
            "claimRef": {"namespace": NAMESPACE, "name": CLAIM},
            "hostPath": {"path": host_path, "type": "Directory"},
        }
        items.append({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": CLAIM}, "spec": volume})
    metadata = {"name": CLAIM, "namespace": NAMESPACE}
    items.append({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})
    return {"apiVersion": "v1", "kind": "List", "items": items}


def fill_claim(kubernetes: Kubernetes, model: Path, image: str) -> None:
    """Copy the model through a pod that mounts the claim: that works whatever the claim's volume is."""
    name = "octavo-demo-fill"
    container = {
        "name": "fill",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-c", "import time; time.sleep(900)"],
        "volumeMounts": [{"name": "model", "mountPath": "/model"}],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"fsGroup": 10001},
            "containers": [container | hardened()],
            "volumes": [{"name": "model", "persistentVolumeClaim": {"claimName": CLAIM}}],
        },
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(model, MODEL_FOLDER)
    unpack = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall('/model')"
    kubernetes.kubectl("delete", "pod", name, "-n", NAMESPACE, "--ignore-not-found")
    kubernetes.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(pod))
    try:
        kubernetes.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "-n", NAMESPACE, "--timeout=180s")
        exec_in = ["exec", "-i", name, "-n", NAMESPACE, "--", "python3", "-c", unpack]
        kubernetes.kubectl(*exec_in, stdin=buffer.getvalue())
    finally:
        kubernetes.kubectl("delete", "pod", name, "-n", NAMESPACE)


def hardened() -> dict[str, Any]:
    """What a container needs in a namespace that enforces the restricted Pod Security Standard."""
    return {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    }


def model_folder(python: str, report: Report) -> Path:
    done = subprocess.run([python, str(REPOSITORY / "tests/models.py")], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise DemoError("tests/models.py could not prepare the model; its words are above")
    folder = Path(done.stdout.strip().splitlines()[-1])
    report.say(f"{folder.name}, {size_of(folder) / 1e6:.0f} MB")
    return folder


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def go_on(first: Sequence[str]) -> None:
    print(f"\n{bold('It runs, and it answered.')} Go on with:\n")
    for line in (
        *first,
        f"kubectl describe llm {SERVER}",
        f"kubectl port-forward service/{SERVER} 8000:80     # then http://127.0.0.1:8000/v1 for any OpenAI client",
        f"kubectl scale llm {SERVER} --replicas=2",
        "make demo-down     # removes all of it",
    ):
        print(f"  {line}")


def remember(facts: dict[str, str]) -> None:
    machine.cache_dir().mkdir(parents=True, exist_ok=True)
    _memory().write_text(json.dumps(facts))


def remembered() -> dict[str, str]:
    """Where `up` last ran; nothing before the first time and after `down`."""
    facts: dict[str, str] = json.loads(_memory().read_text()) if _memory().exists() else {}
    return facts


def _memory() -> Path:
    return machine.cache_dir() / "demo.json"


def down(report: Report) -> None:
    facts = remembered()
    if facts.get("mode") == "current":
        with report.step(f"Remove the demo from {facts['context']}"):
            remove_from_current(facts)
    with report.step("Stop the demo's own Kubernetes"):
        cluster = Cluster(OWN_CLUSTER)
        cluster.down()
        report.say("no process, mount, interface, rule or cgroup is left" if not cluster.leftovers() else "")
    _memory().unlink(missing_ok=True)
    print(f"{bold('Gone.')} What was downloaded and built stays in {machine.cache_dir()} for the next time.")


def remove_from_current(facts: dict[str, str]) -> None:
    environment = os.environ | ({"KUBECONFIG": facts["kubeconfig"]} if facts["kubeconfig"] else {})
    kubectl = shutil.which("kubectl") or str(programs.folder("k8s") / "kubectl")
    helm = shutil.which("helm") or str(programs.folder("helm") / "helm")
    kubernetes = Kubernetes(kubectl, helm, environment, facts["context"])
    if kubernetes.kubectl("config", "current-context").strip() != facts["context"]:
        raise DemoError(f"the demo ran on {facts['context']}: kubectl config use-context {facts['context']}, then this")
    if "llmservers" in kubernetes.kubectl("api-resources", "--api-group=octavo.dev", "-o", "name"):
        kubernetes.kubectl("delete", "llmserver", SERVER, "-n", NAMESPACE, "--ignore-not-found", "--cascade=foreground")
    with contextlib.suppress(DemoError):  # not installed
        kubernetes.helm("uninstall", RELEASE, "-n", SYSTEM_NAMESPACE, "--wait")
    kubernetes.kubectl("delete", "pvc", CLAIM, "-n", NAMESPACE, "--ignore-not-found")
    kubernetes.kubectl("delete", "namespace", SYSTEM_NAMESPACE, "--ignore-not-found")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    upward = commands.add_parser("up", help="bring everything up and ask a question")
    upward.add_argument("--python", default=sys.executable, help="a Python with the engine's and tests' packages")
    commands.add_parser("down", help="remove everything that `up` started")
    arguments = parser.parse_args()
    report = Report()
    try:
        if arguments.command == "up":
            up(arguments.python, report)
        else:
            down(report)
    except (DemoError, ClusterError, images.ImageError, urllib.error.URLError, subprocess.CalledProcessError) as error:
        print(f"\n{red('The demo stopped:')} {error}", file=sys.stderr)
        print("Run it again to go on from here; make demo-down removes what runs.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run it again to go on from here; make demo-down removes what runs.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
