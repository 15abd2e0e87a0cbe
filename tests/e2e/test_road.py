"""The whole road on a real node: helm install, an LLMServer, an answer, scale, a rollout, a failure, removal.

The tests of this file share one server and run in the order in which they stand, as a user's day would.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo
import pytest
import yaml
from fixtures import built

import models
from cluster import Cluster
from waiting import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
STREAM_S = 300
"""At most: two processors with another test run beside this one gave each of six streams 1.5 tokens a second."""
CURL = f"curl -sSN --max-time {STREAM_S} -H 'Content-Type: application/json'"

ROOT = Path(__file__).resolve().parents[2]
SERVER = "smollm2"
URL = f"http://{SERVER}.default.svc.cluster.local"


@pytest.fixture(scope="module")
def installed(cluster: Cluster, loaded_images: dict[str, str]) -> Iterator[Cluster]:
    """The chart on the cluster, and the model on a volume."""
    volume = cluster.state / "volumes" / "e2e"
    (volume / models.NAME).parent.mkdir(parents=True, exist_ok=True)
    cluster.run(["cp", "-r", str(models.smollm2()), str(volume)])
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(demo.claim(host_path=str(volume))))
    cluster.run(
        [
            *("helm", "upgrade", "--install", "octavo", str(ROOT / "helm/octavo"), "-n", "octavo-system"),
            *("--create-namespace", "--wait", "--timeout=120s"),
            f"--set=operator.image={loaded_images['operator']}",
            f"--set=engine.image={loaded_images['engine']}",
        ],
        timeout_s=180,
    )
    yield cluster
    cluster.run(["kubectl", "delete", "llm", "--all", "--wait=true", "--timeout=60s"], check=False)
    cluster.run(["helm", "uninstall", "octavo", "-n", "octavo-system", "--wait"], check=False)


def server(cluster: Cluster, name: str = SERVER) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.kubectl("get", "llm", name, "-o", "json"))
    return found


def condition(document: dict[str, Any], kind: str) -> dict[str, Any]:
    found = [c for c in document.get("status", {}).get("conditions", []) if c["type"] == kind]
    return found[0] if found else {"status": "Missing"}


def pods(cluster: Cluster, name: str = SERVER) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(
        cluster.kubectl("get", "pods", "-l", f"octavo.dev/server={name}", "-o", "json")
    )["items"]
    return items


def staying(cluster: Cluster) -> list[str]:
    """Names of the pods that are not on their way out."""
    return [pod["metadata"]["name"] for pod in pods(cluster) if not pod["metadata"].get("deletionTimestamp")]


def ready_with(cluster: Cluster, replicas: int) -> dict[str, Any] | None:
    document = server(cluster)
    status = document.get("status", {})
    settled = status.get("observedGeneration") == document["metadata"]["generation"]
    if settled and condition(document, "Ready")["status"] == "True" and status.get("readyReplicas") == replicas:
        return document if len(staying(cluster)) == replicas else None
    return None


def ask(cluster: Cluster, path: str, body: dict[str, Any]) -> str:
    """POST from the node, through the Service's address, with the real curl."""
    address = cluster.kubectl("get", "service", SERVER, "-o", "jsonpath={.spec.clusterIP}:{.spec.ports[0].port}")
    command = ["curl", "-sSN", "--max-time", "60", f"http://{address}{path}", "-H", "Content-Type: application/json"]
    return cluster.run([*command, "-d", json.dumps(body)]).stdout


QUESTION = {
    "model": SERVER,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 24,
    "temperature": 0,
}


def test_an_applied_server_becomes_ready_and_tells_its_stages(installed):
    manifest = next(yaml.safe_load_all((ROOT / "examples/smollm2.yaml").read_text()))
    assert manifest["metadata"]["name"] == SERVER
    applied = time.monotonic()
    installed.kubectl("apply", "-f", str(ROOT / "examples/smollm2.yaml"))

    wait_for(lambda: pods(installed), "a pod", every_s=0.05)
    until_pod_s = time.monotonic() - applied
    seen: list[str] = []

    def watch() -> dict[str, Any] | None:
        document = server(installed)
        for pod in document.get("status", {}).get("pods", []):
            if not seen or seen[-1] != pod["stage"]:
                seen.append(pod["stage"])
        return ready_with(installed, 1)

    document = wait_for(watch, "the server to be Ready", 180)

    # kubectl itself takes a good part of this; tests/operator measures the operator's own share.
    assert until_pod_s < 20
    assert [pod["stage"] for pod in document["status"]["pods"]] == ["ready"]
    assert set(seen) - {"ready"}, f"the status never showed a stage before ready: {seen}"
    engine = document["status"]["engine"]
    assert engine["maxModelLen"] > 0
    assert document["status"]["url"].startswith(f"http://{SERVER}.default")
    assert condition(document, "Fits")["status"] == "True"


def test_the_service_answers_a_question(installed):
    answer = json.loads(ask(installed, "/v1/chat/completions", QUESTION))

    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["model"] == SERVER


def test_the_answer_streams(installed):
    lines = ask(installed, "/v1/chat/completions", {**QUESTION, "stream": True}).splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
    assert len(chunks) > 3
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert "Paris" in text


def test_a_pod_finds_the_service_by_its_name(installed, loaded_images):
    code = f"from urllib.request import urlopen; print(urlopen('{URL}/v1/models', timeout=10).read().decode())"
    overrides = {
        "spec": {
            "containers": [
                {
                    "name": "ask",
                    "image": loaded_images["engine"],
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python3", "-c", code],
                }
                | demo.hardened()
            ],
            "restartPolicy": "Never",
        }
    }
    installed.kubectl("run", "ask", f"--image={loaded_images['engine']}", f"--overrides={json.dumps(overrides)}")
    try:
        installed.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/ask", "--timeout=60s")
        models_answer = json.loads(installed.kubectl("logs", "ask"))
    finally:
        installed.kubectl("delete", "pod", "ask", "--wait=false")

    assert [card["id"] for card in models_answer["data"]] == [SERVER]


def test_prometheus_scrapes_what_the_operator_wired(installed):
    built("prometheus")
    url = installed.start_prometheus()

    def sample() -> list[Any] | None:
        query = urllib.parse.urlencode({"query": 'vllm:generation_tokens_total{model_name="smollm2"}'})
        with (
            contextlib.suppress(OSError),  # it does not listen yet
            urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as answer,
        ):
            return json.load(answer)["data"]["result"] or None
        return None

    found = wait_for(sample, "Prometheus to have a sample of the engine", 60)

    assert float(found[0]["value"][1]) > 0
    assert found[0]["metric"]["namespace"] == "default"


def test_the_pod_runs_as_nobody_special_and_plans_the_model_that_it_serves(installed):
    def inside(*command: str) -> str:
        return installed.kubectl("exec", f"deployment/{SERVER}", "--", *command)

    plan = inside("octavo", "plan", f"/models/{models.NAME}", "--memory", "4G")

    assert inside("python3", "-c", "import os; print(os.getuid())") == "10001\n"
    assert "8192" in plan.replace(",", "")
    assert "LlamaForCausalLM" in plan or "weights" in plan.lower()


def test_describe_tells_what_runs_and_what_happened(installed):
    text = installed.kubectl("describe", "llm", SERVER)

    for word in ("Max Model Len", "Kv Tokens", "Ready", "Events", "Stage"):
        assert word.lower() in text.lower(), f"{word} is missing in:\n{text}"


def test_scaling_to_two_gives_two_ready_replicas(installed):
    installed.kubectl("scale", "llm", SERVER, "--replicas=2")

    document = wait_for(lambda: ready_with(installed, 2), "two ready replicas", 180)

    assert document["status"]["replicas"] == 2
    installed.kubectl("scale", "llm", SERVER, "--replicas=1")
    wait_for(lambda: ready_with(installed, 1), "one replica again", 90)


def test_a_change_of_the_context_rolls_without_a_failed_request(installed):
    # Asked from the node while the pod is replaced: short questions one after the other, and a long answer that is
    # being written when its pod is told to go.
    address = installed.kubectl("get", "service", SERVER, "-o", "jsonpath={.spec.clusterIP}:{.spec.ports[0].port}")
    curl = f"{CURL} http://{address}/v1/chat/completions"
    short = shlex.quote(json.dumps({**QUESTION, "max_tokens": 4}))
    long = shlex.quote(json.dumps({**QUESTION, "max_tokens": 300, "ignore_eos": True, "stream": True}))
    stop, codes, stream = (installed.state / name for name in ("stop-asking", "codes", "stream"))
    ask_again = f"{curl} -o /dev/null -w '%{{http_code}}\\n' -d {short} >> {codes} 2>&1; sleep 0.05"
    installed.start_program("streaming", ["bash", "-c", f"{curl} -d {long} > {stream} 2>&1"])
    installed.start_program("asking", ["bash", "-c", f"while [ ! -e {stop} ]; do {ask_again}; done"])
    wait_for(lambda: stream.exists() and stream.read_text().count("data: {") > 5, "the long answer to begin", 60)
    patch = {"spec": {"engine": {"maxModelLen": 2048}}}
    before = staying(installed)
    try:
        installed.kubectl("patch", "llm", SERVER, "--type=merge", "-p", json.dumps(patch))

        def changed() -> dict[str, Any] | None:
            document = ready_with(installed, 1)
            return document if document and document["status"]["engine"]["maxModelLen"] == 2048 else None

        wait_for(changed, "the new context to be in effect", 180)
    finally:
        stop.touch()
    # Its pod goes on with it after the new one has taken over.
    wait_for(lambda: "[DONE]" in stream.read_text(), "the long answer to end", 180)
    answers = codes.read_text().split()
    events = [line for line in stream.read_text().splitlines() if line]

    left = [p["metadata"]["name"] for p in pods(installed) if not p["metadata"].get("deletionTimestamp")]
    assert before not in left
    assert len(answers) > 5
    assert set(answers) == {"200"}, {code: answers.count(code) for code in set(answers)}
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


@pytest.mark.timeout(1200)
def test_no_stream_is_cut_when_the_server_shrinks_and_when_its_node_is_drained(installed):
    installed.kubectl("scale", "llm", SERVER, "--replicas=2")
    wait_for(lambda: ready_with(installed, 2), "two replicas", 120)
    with Streams(installed, "shrink") as streams:
        streams.begun()
        installed.kubectl("scale", "llm", SERVER, "--replicas=1")
        wait_for(lambda: ready_with(installed, 1), "one replica", 120)
    shrunk = streams.ends()

    (before,) = staying(installed)
    with Streams(installed, "drain") as streams:
        streams.begun()
        # The engine's pod is evicted as any drain does it. On the only node there is its successor waits until the
        # node takes pods again, so clients are told to come back meanwhile; who is being answered is answered.
        drain = ["kubectl", "drain", "node1", f"--pod-selector=octavo.dev/server={SERVER}"]
        installed.run([*drain, f"--timeout={STREAM_S}s", "--force", "--delete-emptydir-data"], timeout_s=STREAM_S + 60)
        streams.wait()
    installed.kubectl("uncordon", "node1")
    wait_for(lambda: ready_with(installed, 1), "the successor", 120)

    assert shrunk == ["length"] * STREAMS
    assert streams.ends() == ["length"] * STREAMS
    assert staying(installed) != [before]


STREAMS = 6


class Streams:
    """Long answers that are being written, from the node, while the block lasts and until each has ended."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster
        self._files = [cluster.state / f"{name}-{number}" for number in range(STREAMS)]

    def __enter__(self) -> Streams:
        path = "jsonpath={.spec.clusterIP}:{.spec.ports[0].port}"
        address = self._cluster.kubectl("get", "service", SERVER, "-o", path)
        # They have to end within the 120 s that a pod is given to drain: of 200 tokens 185 were there by then.
        asked = {**QUESTION, "max_tokens": 120, "ignore_eos": True, "stream": True}
        body = shlex.quote(json.dumps(asked))
        curl = f"{CURL} http://{address}/v1/chat/completions"
        for file in self._files:
            self._cluster.start_program(file.name, ["bash", "-c", f"{curl} -d {body} > {file} 2>&1; touch {file}.end"])
        return self

    def begun(self) -> None:
        wait_for(lambda: all(f.exists() and f.read_text().count("data: {") > 3 for f in self._files), "streams", 60)

    def wait(self) -> None:
        wait_for(lambda: all(Path(f"{file}.end").exists() for file in self._files), "the streams' ends", STREAM_S)

    def __exit__(self, *error: object) -> None:
        self.wait()

    def ends(self) -> list[str]:
        """The finish reason of each, or what it ended with instead."""
        found = []
        for file in self._files:
            events = [line for line in file.read_text().splitlines() if line]
            whole = len(events) > 2 and events[-1] == "data: [DONE]"
            last = json.loads(events[-2].removeprefix("data: ")) if whole else {}
            found.append(last["choices"][0]["finish_reason"] if whole else "\n".join(events[-2:])[-200:])
        return found


def test_a_server_that_nobody_asks_sleeps_and_the_first_request_wakes_it(installed):
    """No request is lost on the way down nor on the way up, and none needs to know that there was one."""
    # The pod that came with the chart has gone, as it was told when there was nothing for it to do.
    wait_for(lambda: not activator_pods(installed), "no activator", 60)
    url = (
        f"http://{installed.kubectl('get', 'service', SERVER, '-o', 'jsonpath={.spec.clusterIP}')}/v1/chat/completions"
    )
    zero = {"autoscaling": {"minReplicas": 0, "maxReplicas": 1, "scaleDownDelaySeconds": 0, "idleSeconds": 10}}
    installed.kubectl("patch", "llm", SERVER, "--type=merge", "-p", json.dumps({"spec": zero}))
    wait_for(lambda: has_activator(installed, 2), "the activator", 90)
    # Somebody asks in the moment in which the last pod is told to go.
    wait_for(lambda: server(installed)["spec"]["replicas"] == 0, "the server to fall asleep", 90, every_s=0.05)
    falling = [ask_again(installed, url, n) for n in range(12)]
    woken = [wait_for(lambda one=one: one.poll() is not None and one, "its answer", 180) for one in falling]
    codes = [one.communicate()[0].split()[-1] for one in woken]
    # And once it is fast asleep: one asks for a stream, one does not, and twenty at once are answered all the same.
    wait_for(lambda: server(installed)["status"]["phase"] == "Asleep", "the server to sleep", 180)
    asleep = server(installed)["status"]["message"]
    health = installed.run(["curl", "-sS", "-w", "%{http_code}", url.replace("/v1/chat/completions", "/health")]).stdout
    probed = server(installed)["spec"]["replicas"]
    began = time.monotonic()
    plain = [ask_again(installed, url, n) for n in range(20)]
    body = json.dumps({**QUESTION, "stream": True})
    curl = ["curl", "-sSN", "--max-time", "120", url, "-H", "Content-Type: application/json", "-d", body]
    lines, first_token_s = [], 0.0
    with subprocess.Popen(installed.inside(curl), stdout=subprocess.PIPE, text=True) as stream:
        for line in stream.stdout or ():
            if line.startswith("data: {") and not first_token_s:
                first_token_s = time.monotonic() - began
            lines.append(line.strip())
    waited = [wait_for(lambda one=one: one.poll() is not None and one, "its answer", 120) for one in plain]
    document = wait_for(lambda: ready_with(installed, 1), "the server to be Ready", 60)
    slices = json.loads(
        installed.kubectl("get", "endpointslices", "-l", f"kubernetes.io/service-name={SERVER}", "-o", "json")
    )["items"]
    leads = {s["metadata"]["name"]: [a for e in s.get("endpoints") or [] for a in e["addresses"]] for s in slices}
    (pod,) = pods(installed)
    back = {"autoscaling": None, "replicas": 1}
    installed.kubectl("patch", "llm", SERVER, "--type=merge", "-p", json.dumps({"spec": back}))

    print(f"from zero, request to first token: {first_token_s:.1f} s")
    stages = [line for line in lines if line.startswith(": octavo stage=")]
    print("\n".join(stages))
    assert codes == ["200"] * 12
    assert "The first request wakes it, through the activator." in asleep
    assert health.endswith("200")
    assert probed == 0, "a probe wakes nobody"
    assert len(stages) >= 2
    assert [line for line in lines if line][-1] == "data: [DONE]"
    text = [json.loads(line[6:])["choices"] for line in lines if line.startswith("data: {")]
    assert "Paris" in "".join(c[0]["delta"].get("content") or "" for c in text if c)
    assert [one.communicate()[0].split()[-1] for one in waited] == ["200"] * 20
    assert document["spec"]["replicas"] == 1
    # The activator has stepped aside: the Service leads to the pod alone.
    assert leads.pop(SERVER) == []
    assert [address for addresses in leads.values() for address in addresses] == [pod["status"]["podIP"]]
    wait_for(lambda: has_activator(installed, 0), "the activator to go, as no server sleeps any more", 60)


def ask_again(cluster: Cluster, url: str, number: int) -> subprocess.Popen[str]:
    """A short question; the last word that it prints is the status."""
    body = json.dumps({**QUESTION, "max_tokens": 4, "seed": number})
    curl = ["curl", "-sS", "--max-time", "150", "-w", " %{http_code}", url, "-H", "Content-Type: application/json"]
    return subprocess.Popen(cluster.inside([*curl, "-d", body]), stdout=subprocess.PIPE, text=True)


def activator_pods(cluster: Cluster) -> list[str]:
    selector = "app.kubernetes.io/component=activator"
    return cluster.kubectl("get", "pods", "-n", "octavo-system", "-l", selector, "-o", "name").split()


def has_activator(cluster: Cluster, replicas: int) -> bool:
    path = "jsonpath={.spec.replicas} {.status.readyReplicas}"
    found = cluster.kubectl("get", "deployment", "octavo-activator", "-n", "octavo-system", "-o", path).split()
    return found == ([str(replicas)] * 2 if replicas else ["0"])


def test_a_killed_engine_is_reported_and_comes_back(installed):
    (pod,) = staying(installed)
    # From the node: the engine process by its command line, inside this cluster's PID namespace.
    installed.run(["pkill", "-9", "-f", "octavo_engine.core.process"])

    def restarted() -> dict[str, Any] | None:
        document = server(installed)
        failure = document.get("status", {}).get("lastFailure") or {}
        return document if failure.get("code") == "ENGINE_DIED" else None

    document = wait_for(restarted, "the failure on the resource", 60)
    wait_for(lambda: ready_with(installed, 1), "the server to be Ready again", 120)

    assert document["status"]["lastFailure"]["pod"] == pod
    assert document["status"]["lastFailure"]["message"]


def test_a_bad_model_name_is_seen_on_the_resource_with_its_fix(installed):
    manifest = yaml.safe_load((ROOT / "examples/smollm2.yaml").read_text())
    manifest["metadata"]["name"] = "wrong"
    manifest["spec"]["model"]["source"] = f"pvc://{demo.CLAIM}/no-such-model"
    installed.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def failed() -> dict[str, Any] | None:
        document = server(installed, "wrong")
        return document if (document.get("status", {}).get("lastFailure") or {}).get("code") else None

    failure = wait_for(failed, "the failure on the resource", 90)["status"]["lastFailure"]
    installed.kubectl("delete", "llm", "wrong", "--timeout=60s")

    assert failure["code"] in ("MODEL_NOT_FOUND", "MODEL_INVALID")
    assert "no-such-model" in failure["message"]
    assert failure["fix"]


def test_the_operator_killed_in_the_middle_ends_the_same(installed):
    def restarts() -> int:
        selector = "app.kubernetes.io/name=octavo-operator"
        path = "jsonpath={.items[*].status.containerStatuses[0].restartCount}"
        return sum(
            map(int, installed.kubectl("get", "pods", "-n", "octavo-system", "-l", selector, "-o", path).split())
        )

    before = restarts()
    installed.kubectl("patch", "llm", SERVER, "--type=merge", "-p", '{"spec":{"engine":{"maxModelLen":1024}}}')
    installed.run(["pkill", "-9", "-f", "octavo-operator"])

    def changed() -> dict[str, Any] | None:
        document = ready_with(installed, 1)
        return document if document and document["status"]["engine"]["maxModelLen"] == 1024 else None

    wait_for(changed, "the change to be in effect", 180)

    assert restarts() > before


def test_a_field_outside_its_range_is_refused_by_name(installed):
    patch = {"spec": {"engine": {"blockSize": 17}}}
    done = installed.run(["kubectl", "patch", "llm", SERVER, "--type=merge", "-p", json.dumps(patch)], check=False)

    assert done.returncode != 0
    assert "blockSize" in done.stderr
    assert "16" in done.stderr


def test_deletion_leaves_nothing(installed):
    installed.kubectl("delete", "llm", SERVER, "--timeout=60s")

    def gone() -> bool | None:
        kinds = "pods,deployments,replicasets,services,poddisruptionbudgets"
        left = installed.kubectl("get", kinds, "-l", f"octavo.dev/server={SERVER}", "-o", "name")
        return True if not left.strip() else None

    wait_for(gone, "every child to be gone", 90)


def test_uninstalling_leaves_the_definition_of_servers_and_nothing_else(installed):
    # The definition stays because with it every server would go.
    installed.run(["helm", "uninstall", "octavo", "-n", "octavo-system", "--wait", "--timeout=60s"])

    def left(kinds: str) -> list[str]:
        return installed.kubectl("get", kinds, "-A", "-l", "app.kubernetes.io/instance=octavo", "-o", "name").split()

    wait_for(lambda: not left("pods"), "the operator's pod to be gone", 60)

    kinds = "deployments,replicasets,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,crds"
    assert left(kinds) == []
    assert "llmservers.octavo.dev" in installed.kubectl("get", "crds", "-o", "name")
