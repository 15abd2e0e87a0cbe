"""The chart, rendered by the real helm: every branch, and what the schema refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "octavo"
sys.path.insert(0, str(ROOT / "tests" / "cluster"))


@pytest.fixture(scope="session")
def helm() -> str:
    import programs

    path = programs.folder("helm") / "helm"
    if not path.exists():
        pytest.skip("helm is not built: run `python tests/cluster/cluster.py build helm`")
    return str(path)


def render(helm: str, *flags: str) -> list[dict[str, Any]]:
    # Without a cluster to ask, helm assumes a version; a helm built from its module assumes an ancient one.
    command = [helm, "template", "octavo", str(CHART), "-n", "octavo-system", "--kube-version=1.34.0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def only(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    found = [document for document in documents if document["kind"] == kind]
    assert len(found) == 1, [d["kind"] for d in documents]
    return found[0]


def rules(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rule for d in documents if d["kind"] in ("Role", "ClusterRole") for rule in d["rules"]]


def test_lint_finds_nothing(helm):
    done = subprocess.run([helm, "lint", "--strict", str(CHART)], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_holds_the_generated_crd():
    assert (CHART / "files" / "llmserver.yaml").read_text() == (ROOT / "crds" / "llmserver.yaml").read_text()


def test_the_operator_has_no_verb_on_secrets_and_no_wildcard(helm):
    for flags in ([], ["--set", "watchNamespaces={a,b}"]):
        for rule in rules(render(helm, *flags)):
            assert "secrets" not in rule["resources"]
            assert "*" not in rule["resources"] + rule["verbs"] + rule["apiGroups"]


def test_the_operator_meets_the_restricted_pod_security_standard(helm):
    pod = only(render(helm), "Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]

    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_watched_namespaces_turn_the_cluster_role_into_roles(helm):
    documents = render(helm, "--set", "watchNamespaces={team-a,team-b}", "--set", "rbac.aggregate=false")

    assert not [d for d in documents if d["kind"].startswith("ClusterRole")]
    roles = {d["metadata"]["namespace"] for d in documents if d["kind"] == "Role"}
    assert roles == {"team-a", "team-b", "octavo-system"}
    environment = only(documents, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "OCTAVO_WATCH_NAMESPACES", "value": "team-a,team-b"} in environment


def test_the_crd_is_kept_on_uninstall_unless_told_otherwise(helm):
    crd = only(render(helm), "CustomResourceDefinition")
    unkept = only(render(helm, "--set", "crds.keep=false"), "CustomResourceDefinition")
    none = [d for d in render(helm, "--set", "crds.install=false") if d["kind"] == "CustomResourceDefinition"]

    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "helm.sh/resource-policy" not in unkept["metadata"].get("annotations", {})
    assert none == []


@pytest.mark.parametrize(
    ("flags", "kind", "present"),
    [
        (["--set", "rbac.create=false"], "ClusterRoleBinding", False),
        (["--set", "rbac.create=false"], "RoleBinding", False),
        (["--set", "serviceAccount.create=false", "--set", "serviceAccount.name=mine"], "ServiceAccount", False),
        ([], "ServiceAccount", True),
    ],
)
def test_parts_can_be_left_to_others(helm, flags, kind, present):
    assert any(d["kind"] == kind for d in render(helm, *flags)) is present


def test_every_value_of_the_operator_reaches_its_pod(helm):
    deployment = only(
        render(
            helm,
            *("--set", "operator.image=r.example/op@sha256:abc", "--set", "operator.replicas=2"),
            *("--set", "operator.nodeSelector.pool=system", "--set", "operator.priorityClassName=high"),
            *("--set", "operator.tolerations[0].key=x", "--set", "imagePullSecrets={pull}"),
            *("--set", "operator.podLabels.team=ml", "--set", "operator.podAnnotations.note=yes"),
            *("--set", "operator.env[0].name=HTTPS_PROXY", "--set", "operator.env[0].value=http://p"),
            *("--set", "metrics.annotations=false", "--set", "engine.image=r.example/engine:2"),
            *("--set", "operator.affinity.nodeAffinity.x=y", "--set", "serviceAccount.annotations.a=b"),
        ),
        "Deployment",
    )
    template = deployment["spec"]["template"]
    pod, container = template["spec"], template["spec"]["containers"][0]

    assert deployment["spec"]["replicas"] == 2
    assert container["image"] == "r.example/op@sha256:abc"
    assert pod["nodeSelector"] == {"pool": "system"}
    assert pod["priorityClassName"] == "high"
    assert pod["tolerations"] == [{"key": "x"}]
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert pod["affinity"] == {"nodeAffinity": {"x": "y"}}
    assert template["metadata"]["labels"]["team"] == "ml"
    assert template["metadata"]["annotations"]["note"] == "yes"
    assert "prometheus.io/scrape" not in template["metadata"]["annotations"]
    assert {"name": "HTTPS_PROXY", "value": "http://p"} in container["env"]
    assert {"name": "OCTAVO_ENGINE_IMAGE", "value": "r.example/engine:2"} in container["env"]


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("operator.replica=2", "replica"),
        ("operator.replicas=-1", "replicas"),
        ("operator.logLevel=loud", "logLevel"),
        ("watchNamespaces={Team_A}", "watchNamespaces"),
        ("engine.image=", "image"),
        ("unknown=1", "unknown"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(helm, flag, word):
    command = [helm, "template", "octavo", str(CHART), "--set", flag]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode != 0
    assert word in done.stderr
