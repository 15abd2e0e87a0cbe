"""A model comes from a hub inside the cluster that is slow, cut and corrupt, while pods are killed: never torn.

The hub is a stand-in on the node (tests/hub.py); the engine, its downloader, the operator, Jobs, claims and the kubelet
are real. The tests share one claim and run in their order.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import images
import pytest

import models
from cluster import Cluster
from waiting import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SYSTEM, TEAM, CLAIM = "octavo-cache", "readers", "qwen"
HUB = "10.250.0.1"
PORT = "8088"


class World:
    def __init__(self, cluster: Cluster, hub: Path, disk: Path) -> None:
        self.cluster, self.hub, self.disk = cluster, hub, disk

    def faults(self, **faults: object) -> None:
        (self.hub / "faults.json").write_text(json.dumps(faults))

    def weights_asked_for(self) -> int:
        return sum("GET" in line and ".safetensors" in line for line in self._requests())

    def _requests(self) -> list[str]:
        with contextlib.suppress(OSError):
            return (self.hub / "requests.log").read_text().splitlines()
        return []

    def whole(self) -> list[Path]:
        return list((self.disk / "models").iterdir()) if (self.disk / "models").exists() else []

    def partial_bytes(self) -> int:
        return sum(path.stat().st_size for path in (self.disk / "partial").glob("*/*.safetensors"))

    def assert_whole(self, folder: Path) -> None:
        for file in models.smollm2().glob("*.safetensors"):
            assert self.cluster.run(["cmp", str(file), str(folder / file.name)], check=False).returncode == 0

    def serve(self, name: str, **spec: Any) -> None:
        body = {"apiVersion": "octavo.dev/v1alpha1", "kind": "LLMServer", "metadata": {"name": name, "namespace": TEAM}}
        engine, hardware = {"kvCacheMemory": "256Mi"}, {"gpus": 0, "resources": {"limits": {"memory": "3Gi"}}}
        body["spec"] = {"model": {"source": "hf://org/smollm2"}, "engine": engine, "hardware": hardware, **spec}
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(body))

    def get(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cluster.kubectl("get", "llm", name, "-n", TEAM, "-o", "json"))
        return found

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        found = [c for c in self.get(name).get("status", {}).get("conditions", []) if c["type"] == kind]
        return found[0] if found else {"status": "Missing", "reason": "Missing", "message": ""}

    def wait_ready(self, name: str, timeout_s: float = 180) -> None:
        wait_for(lambda: self.condition(name, "Ready")["status"] == "True", f"{name} to be Ready", timeout_s)

    def kill(self, pattern: str) -> bool:
        return self.cluster.run(["pkill", "-9", "-f", pattern], check=False).returncode == 0


@pytest.fixture(scope="module")
def world(cluster: Cluster, loaded_images: dict[str, str]) -> Iterator[World]:
    hub, disk = cluster.state / "hub", cluster.state / "volumes" / "cache"
    shutil.copytree(models.smollm2(), hub / "org/smollm2", copy_function=link_or_copy)
    disk.mkdir(parents=True)
    disk.chmod(0o777)
    cluster.start_program("hub", [sys.executable, str(ROOT / "tests/hub.py"), PORT, str(hub), HUB])
    for name in (SYSTEM, TEAM):
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "cache"},
        "spec": {
            "capacity": {"storage": "2Gi"},
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "claimRef": {"namespace": TEAM, "name": CLAIM},
            "hostPath": {"path": str(disk)},
        },
    }
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(volume))
    mirror = json.dumps([{"name": "HF_ENDPOINT", "value": f"http://{HUB}:{PORT}"}])
    cluster.run(
        [
            *("helm", "upgrade", "--install", "octavo", str(ROOT / "helm/octavo"), "-n", SYSTEM),
            *("--wait", "--timeout=120s", f"--set-json=engine.env={mirror}", "--set=operator.replicas=1"),
            f"--set=operator.image={loaded_images['operator']}",
            f"--set=engine.image={loaded_images['engine']}",
        ],
        timeout_s=180,
    )
    yield World(cluster, hub, disk)
    cluster.run(["kubectl", "delete", "llm", "--all", "-n", TEAM, "--timeout=60s"], check=False)
    cluster.run(["helm", "uninstall", "octavo", "-n", SYSTEM, "--wait"], check=False)
    # The chart leaves its definition, which says which release it is of: another one would not take it over.
    cluster.run(["kubectl", "delete", "crd", "llmservers.octavo.dev", "--timeout=60s"], check=False)
    cluster.run(["kubectl", "delete", "namespace", SYSTEM, TEAM, "--timeout=60s"], check=False)
    cluster.run(["kubectl", "delete", "pv", "cache", "--timeout=30s"], check=False)


def link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(Path(source).resolve())
    except OSError:
        shutil.copyfile(source, target)


SHARED = {"mode": "Shared", "size": "2Gi", "storageClassName": ""}


def test_a_prefetch_that_is_slow_cut_damaged_and_killed_twice_ends_in_a_whole_model(world):
    world.faults(bytes_per_s=30_000_000, cut_after=60_000_000, damage=1)
    world.serve(CLAIM, cache={**SHARED, "prefetch": True})
    seen: set[str] = set()
    for kill in range(2):
        at = (kill + 1) * 50_000_000
        wait_for(lambda at=at: world.partial_bytes() > at, "a part of the model", 90, 0.05)
        wait_for(
            lambda: seen.add(world.condition(CLAIM, "ModelCached")["message"]) or any(" %" in m for m in seen),
            "its progress on the resource",
        )
        assert world.kill("octavo download")
        assert world.whole() == []
    assert world.cluster.kubectl("get", "deployments", "-n", TEAM, "-o", "name") == ""
    wait_for(world.whole, "the whole model", 180)

    (folder,) = world.whole()
    world.assert_whole(folder)
    world.wait_ready(CLAIM)
    assert world.condition(CLAIM, "ModelCached")["reason"] == "InStore"
    assert world.weights_asked_for() > 4


def test_it_answers(world):
    url = world.cluster.kubectl("get", "service", CLAIM, "-n", TEAM, "-o", "jsonpath={.spec.clusterIP}")
    question = {"model": CLAIM, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    question |= {"temperature": 0, "max_tokens": 24}
    command = ["curl", "-sS", "--max-time", "60", f"http://{url}/v1/chat/completions"]
    answer = world.cluster.run([*command, "-H", "Content-Type: application/json", "-d", json.dumps(question)]).stdout

    assert "Paris" in json.loads(answer)["choices"][0]["message"]["content"]


def test_another_server_on_the_claim_downloads_nothing(world):
    before = world.weights_asked_for()
    world.serve("second", cache={"mode": "Shared", "claimName": CLAIM})
    world.wait_ready("second")

    assert world.weights_asked_for() == before
    world.cluster.kubectl("delete", "llm", "second", "-n", TEAM, "--timeout=60s")


def test_its_pods_speak_https_and_ask_for_a_key_from_mounted_secrets(world):
    cluster, folder = world.cluster, world.cluster.state
    subject = ["-subj", "/CN=sealed", "-addext", f"subjectAltName=DNS:sealed.{TEAM}.svc"]
    files = ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    cluster.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files])
    pair = [f"--cert={folder}/tls.crt", f"--key={folder}/tls.key"]
    cluster.kubectl("create", "secret", "tls", "sealed", "-n", TEAM, *pair)
    cluster.kubectl("create", "secret", "generic", "keys", "-n", TEAM, "--from-literal=keys=sesame")
    sidecar = {"name": "beside", "image": images.name_of("operator"), "command": ["python3", "-c"]}
    # It ends when it is told to: one that sleeps on kept the namespace for the grace period, ninety seconds of a test.
    ends = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit()); signal.pause()"
    sidecar |= {"args": [ends], "imagePullPolicy": "IfNotPresent"}
    world.serve(
        "sealed",
        cache={"mode": "Shared", "claimName": CLAIM},
        expose={"tls": {"secretName": "sealed"}, "apiKeysSecretRef": {"name": "keys"}, "service": {"port": 443}},
        podTemplate={"spec": {"containers": [sidecar]}},
    )
    world.wait_ready("sealed")
    address = cluster.kubectl("get", "service", "sealed", "-n", TEAM, "-o", "jsonpath={.spec.clusterIP}")
    name = f"sealed.{TEAM}.svc"
    curl = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--resolve", f"{name}:443:{address}"]
    curl += ["--cacert", str(folder / "tls.crt"), f"https://{name}/v1/models"]

    assert cluster.run(curl).stdout == "401"
    assert cluster.run([*curl, "-H", "Authorization: Bearer sesame"]).stdout == "200"
    assert world.get("sealed")["status"]["url"] == f"https://{name}/v1"
    cluster.kubectl("delete", "llm", "sealed", "-n", TEAM, "--timeout=60s")


def test_of_two_pods_one_downloads_and_when_it_is_killed_the_other_goes_on(world):
    (world.hub / "org/smollm2/commit").write_text("f" * 40)
    world.faults(bytes_per_s=30_000_000)
    known, before = set(world.whole()), world.weights_asked_for()
    world.serve("pair", cache={"mode": "Shared", "claimName": CLAIM}, replicas=2)
    wait_for(lambda: world.partial_bytes() > 60_000_000, "a part of the model", 90, 0.05)
    pods = world.cluster.kubectl("get", "pods", "-n", TEAM, "-l", "octavo.dev/server=pair", "-o", "name").split()
    world.cluster.kubectl("delete", *pods[:1], "-n", TEAM, "--force", "--grace-period=0")
    wait_for(lambda: set(world.whole()) - known, "the whole model", 180)

    (folder,) = set(world.whole()) - known
    world.assert_whole(folder)
    world.wait_ready("pair")
    assert world.weights_asked_for() - before <= 3
    world.cluster.kubectl("delete", "llm", "pair", "-n", TEAM, "--timeout=60s")


def test_a_source_that_only_damages_is_told_of_and_nothing_of_it_is_served(world):
    (world.hub / "org/smollm2/commit").write_text("e" * 40)
    world.faults(damage=10**6)
    known = set(world.whole())
    world.serve("broken", cache={"mode": "Shared", "claimName": CLAIM})
    failure = wait_for(
        lambda: (world.get("broken").get("status", {}).get("lastFailure") or {}).get("code") and
        world.get("broken")["status"]["lastFailure"], "the failure on the resource", 120,
    )  # fmt: skip

    assert failure["code"] == "WEIGHTS_CORRUPT"
    assert "proxy, mirror, disk" in failure["fix"]
    assert set(world.whole()) == known
    world.faults()
    world.wait_ready("broken", 240)  # mended, it comes up by itself
    world.cluster.kubectl("delete", "llm", "broken", "-n", TEAM, "--timeout=60s")
