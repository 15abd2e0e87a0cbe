"""The chart's life on a real node: install, upgrade, rollback, uninstall, and removals that nobody is there to help.

All of it in namespaces that enforce the restricted Pod Security Standard. The tests share one release, in their order.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo
import images
import pytest
import yaml

import models
from cluster import Cluster
from waiting import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/octavo"
SYSTEM, TEAM, SERVER = "octavo-life", "team", "smollm2"
RESTRICTED = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/enforce-version": "latest",
}


@pytest.fixture(scope="module")
def world(cluster: Cluster, loaded_images: dict[str, str]) -> Iterator[Cluster]:
    """Two restricted namespaces, and a claim with the model in one of them."""
    volume = cluster.state / "volumes" / "life"
    (volume / models.NAME).parent.mkdir(parents=True, exist_ok=True)
    cluster.run(["cp", "-r", str(models.smollm2()), str(volume)])
    for name in (SYSTEM, TEAM):
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    claim = json.loads(json.dumps(demo.claim(host_path=str(volume))).replace('"default"', f'"{TEAM}"'))
    for item in claim["items"]:
        item["metadata"]["name"] += "-life" if item["kind"] == "PersistentVolume" else ""
        if item["kind"] == "PersistentVolumeClaim":
            item["metadata"]["namespace"] = TEAM
            if "volumeName" in item["spec"]:
                item["spec"]["volumeName"] += "-life"
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(claim))
    yield cluster
    cluster.run(["kubectl", "delete", "llm", "--all", "-A", "--wait=true", "--timeout=60s"], check=False)
    cluster.run(["helm", "uninstall", "octavo", "-n", SYSTEM, "--wait"], check=False)
    cluster.run(["kubectl", "delete", "namespace", SYSTEM, TEAM, "--timeout=60s"], check=False)


@pytest.fixture(scope="module")
def last_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chart as a version before might have been: its CRD lacks a field, its values lack a part."""
    folder = tmp_path_factory.mktemp("chart") / "octavo"
    shutil.copytree(CHART, folder)
    about = yaml.safe_load((folder / "Chart.yaml").read_text()) | {"version": "0.0.9"}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(about))
    crd = yaml.safe_load((folder / "files/llmserver.yaml").read_text())
    del crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["restart"]
    (folder / "files/llmserver.yaml").write_text(yaml.safe_dump(crd))
    (folder / "templates/disruption.yaml").unlink()
    return folder


@pytest.fixture(scope="module")
def last_operator(world: Cluster, loaded_images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The operator as a version before might have been: it makes other pods, and marks by another rule what for."""
    folder = tmp_path_factory.mktemp("operator")
    code = folder / "octavo_operator"
    shutil.copytree(ROOT / "operator/octavo_operator", code, ignore=shutil.ignore_patterns("__pycache__"))
    for name, today, before in (
        ("spec.py", 'ASKED_RULE = "r1"', 'ASKED_RULE = "r0"'),
        (
            "desired/deployment.py",
            '{"name": "HOME", ',
            '{"name": "OF_THE_LAST_VERSION", "value": "1"}, {"name": "HOME", ',
        ),
    ):
        text = (code / name).read_text()
        assert text.count(today) == 1, f"{name} has changed: correct this test"
        (code / name).write_text(text.replace(today, before))
    lines = (f"FROM {loaded_images['operator']}", "COPY octavo_operator /last/octavo_operator", "ENV PYTHONPATH=/last")
    (folder / "Dockerfile").write_text("\n".join(lines) + "\n")
    image = "localhost/octavo-operator:last"
    images.build_folder(folder, image, print)
    world.load(image, print)
    return image


def helm(world: Cluster, *arguments: str) -> str:
    return world.run(["helm", *arguments, "-n", SYSTEM], timeout_s=240).stdout


def install(world: Cluster, built: dict[str, str], chart: Path, operator: str = "") -> None:
    flags = [f"--set=operator.image={operator or built['operator']}", f"--set=engine.image={built['engine']}"]
    helm(world, "upgrade", "--install", "octavo", str(chart), "--wait", "--timeout=180s", *flags)


def get(world: Cluster, kind: str, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(world.kubectl("get", kind, *arguments, "-o", "json"))["items"]
    return found


def serve(world: Cluster, namespace: str, name: str = SERVER) -> None:
    manifest = next(yaml.safe_load_all((ROOT / "examples/smollm2.yaml").read_text()))
    manifest["metadata"] |= {"namespace": namespace, "name": name}
    world.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))


def engines(world: Cluster) -> dict[str, int]:
    """Name and restarts of each engine pod."""
    found = get(world, "pods", "-n", TEAM, "-l", f"octavo.dev/server={SERVER}")
    return {
        pod["metadata"]["name"]: sum(c["restartCount"] for c in pod["status"].get("containerStatuses", []))
        for pod in found
    }


def says(world: Cluster, kind: str) -> tuple[str, str]:
    """Status and reason of one of the server's conditions."""
    document = json.loads(world.kubectl("get", "llm", SERVER, "-n", TEAM, "-o", "json"))
    conditions = {c["type"]: (c["status"], c["reason"]) for c in document.get("status", {}).get("conditions", [])}
    return conditions.get(kind, ("", ""))


def is_ready(world: Cluster) -> bool:
    return says(world, "Ready")[0] == "True"


def test_the_last_version_is_installed_and_serves_in_restricted_namespaces(
    world, loaded_images, last_version, last_operator
):
    install(world, loaded_images, last_version, last_operator)
    serve(world, TEAM)

    wait_for(lambda: is_ready(world), "the server to be Ready", 180)

    assert get(world, "pods", "-n", SYSTEM, "-l", "app.kubernetes.io/name=octavo-operator")
    (pod,) = get(world, "pods", "-n", TEAM, "-l", f"octavo.dev/server={SERVER}")
    assert "OF_THE_LAST_VERSION" in json.dumps(pod["spec"])
    assert says(world, "UpdateAvailable") == ("False", "UpToDate")


def test_an_upgrade_brings_the_new_definition_and_restarts_no_engine(world, loaded_images):
    before = engines(world)
    refused = world.kubectl(
        "patch", "llm", SERVER, "-n", TEAM, "--type=merge", "-p", '{"spec":{"restart":{"id":"one"}}}', "-o", "json"
    )
    install(world, loaded_images, CHART)
    # For a moment after a definition has changed, its kinds are not among those that the API server lists.
    schema = wait_for(lambda: world.run(["kubectl", "explain", "llm.spec.restart.id"], check=False).stdout, "the field")

    wait_for(lambda: says(world, "UpdateAvailable") == ("True", "OperatorChanged"), "the new operator's word", 60)

    assert "restart" not in json.loads(refused)["spec"]  # the definition before did not have it
    assert "restarts the pods once" in schema
    wait_for(lambda: is_ready(world), "the server to be Ready still", 90)
    assert engines(world) == before


def test_helm_test_says_that_it_works(world, loaded_images):
    said = helm(world, "test", "octavo", "--timeout=120s")

    assert "Phase:          Succeeded" in said
    # The upgrade's old pods may still be ending.
    pods = ("pods", "-n", SYSTEM, "-l", "app.kubernetes.io/name=octavo-operator")
    wait_for(lambda: len(get(world, *pods)) == 2, "two operators", 60)


def test_a_rollback_brings_back_the_last_version_and_restarts_no_engine(world, loaded_images):
    before = engines(world)
    helm(world, "rollback", "octavo", "1", "--wait", "--timeout=180s")

    budgets = [one["metadata"]["name"] for one in get(world, "poddisruptionbudgets", "-n", SYSTEM)]
    assert "octavo-operator" not in budgets
    # To the operator that made them, nothing is new.
    wait_for(lambda: says(world, "UpdateAvailable") == ("False", "UpToDate"), "the last operator's word", 60)
    assert is_ready(world)
    assert engines(world) == before
    install(world, loaded_images, CHART)


def test_a_server_is_deleted_with_all_that_is_its(world):
    started = time.monotonic()
    world.kubectl("delete", "llm", SERVER, "-n", TEAM, "--timeout=60s")
    kinds = "pods,deployments,replicasets,services,poddisruptionbudgets"
    selector = f"octavo.dev/server={SERVER}"
    wait_for(lambda: not get(world, kinds, "-n", TEAM, "-l", selector), "every child to be gone", 60)

    print(f"deleted with its children in {time.monotonic() - started:.1f} s")


def test_a_namespace_goes_while_no_operator_is_there(world):
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "doomed", "labels": RESTRICTED}}
    world.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    serve(world, "doomed", "lost")
    wait_for(lambda: get(world, "pods", "-n", "doomed"), "its pod", 90)
    world.kubectl("scale", "deployment/octavo-operator", "-n", SYSTEM, "--replicas=0")
    selector = "app.kubernetes.io/name=octavo-operator"
    wait_for(lambda: not get(world, "pods", "-n", SYSTEM, "-l", selector), "the operators to be gone", 60)
    started = time.monotonic()
    world.kubectl("delete", "namespace", "doomed", "--timeout=90s", timeout_s=100)

    print(f"the namespace went in {time.monotonic() - started:.1f} s")
    assert "doomed" not in [n["metadata"]["name"] for n in get(world, "namespaces")]


def test_uninstalling_does_not_hang_and_leaves_definition_and_servers(world, loaded_images):
    serve(world, TEAM, "kept")
    started = time.monotonic()
    helm(world, "uninstall", "octavo", "--wait", "--timeout=90s")

    print(f"uninstalled in {time.monotonic() - started:.1f} s")
    kinds = "deployments,services,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,configmaps"
    left = world.kubectl("get", kinds, "-A", "-l", "app.kubernetes.io/instance=octavo", "-o", "name").split()
    assert left == []
    assert [s["metadata"]["name"] for s in get(world, "llm", "-n", TEAM)] == ["kept"]
    world.kubectl("delete", "llm", "kept", "-n", TEAM, "--timeout=30s")


def test_the_definition_itself_can_be_removed_at_last(world):
    world.kubectl("delete", "crd", "llmservers.octavo.dev", "--timeout=60s")

    assert "octavo.dev" not in world.kubectl("get", "crds", "-o", "name")
