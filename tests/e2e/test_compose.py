"""examples/docker-compose.yaml under containerd: where no Docker is, the kubelet runs its command and health check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo
import pytest
import yaml

import models
from cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def test_the_service_of_the_compose_file_becomes_healthy_and_ends_in_order(
    cluster: Cluster, loaded_images: dict[str, str]
) -> None:
    service = yaml.safe_load((ROOT / "examples/docker-compose.yaml").read_text())["services"]["octavo"]
    _, *check = service["healthcheck"]["test"]
    volume = cluster.state / "volumes" / "compose"
    (volume / models.NAME).parent.mkdir(parents=True, exist_ok=True)
    cluster.run(["cp", "-r", str(models.smollm2()), str(volume)])
    hardened = demo.hardened()
    hardened["securityContext"].pop("runAsUser", None)  # the image's own must do
    container: dict[str, Any] = {
        "name": "octavo",
        "image": loaded_images["engine"],
        "args": service["command"],
        "env": [{"name": "HF_HOME", "value": service["environment"]["HF_HOME"]}],
        "readinessProbe": {"exec": {"command": check}, "periodSeconds": 1, "timeoutSeconds": 5},
        # A folder of the model's name, where the server is started, is taken before the Hub is asked.
        "volumeMounts": [{"name": "model", "mountPath": f"/home/octavo/{service['command'][1]}", "readOnly": True}],
    }
    volumes = [{"name": "model", "hostPath": {"path": str(volume / models.NAME), "type": "Directory"}}]
    spec = {"restartPolicy": "Never", "containers": [container | hardened], "volumes": volumes}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "compose"}, "spec": spec}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    try:
        cluster.run(["kubectl", "wait", "--for=condition=Ready", "pod/compose", "--timeout=120s"], timeout_s=130)
        log = cluster.kubectl("logs", "compose")
        ask = (
            "import json, urllib.request as u; b = json.dumps({'prompt': 'The capital of France is', 'max_tokens': 3, "
            "'temperature': 0}).encode(); print(u.urlopen(u.Request('http://127.0.0.1:8000/v1/completions', b, "
            "{'Content-Type': 'application/json'}), timeout=60).read().decode())"
        )
        answer = json.loads(cluster.kubectl("exec", "compose", "--", "python3", "-c", ask))
        address = cluster.kubectl("get", "pod", "compose", "-o", "jsonpath={.status.podIP}")
        # On all addresses, as a published port needs it, though the command names none.
        seen = cluster.kubectl(
            "exec", "compose", "--", "python3", "-c",
            f"from urllib.request import urlopen; print(urlopen('http://{address}:8000/health', timeout=5).status)",
        )  # fmt: skip
    finally:
        cluster.kubectl("delete", "pod", "compose", "--grace-period=30", "--wait=true")

    assert "ready in" in log
    assert "Paris" in answer["choices"][0]["text"]
    assert seen.strip() == "200"
