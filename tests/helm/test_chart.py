"""The chart, rendered by the real helm: every branch, and what the schema refuses."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo_operator.activator import settings as activator
from octavo_operator.activators import MANAGEMENT_PORT
from octavo_operator.settings import from_environment
from octavo_operator.wake import ACTIVATOR_LABELS, PORTS

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "octavo"


def render(helm: str, *flags: str) -> list[dict[str, Any]]:
    # Without a cluster to ask, helm assumes a version; a helm built from its module assumes an ancient one.
    command = [helm, "template", "octavo", str(CHART), "-n", "octavo-system", "--kube-version=1.34.0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def only(documents: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    """The document of that kind; of the operator's own, where the activator has one too."""
    found = [d for d in documents if d["kind"] == kind and (d["metadata"]["name"] == name or not name)]
    if len(found) > 1:
        found = [document for document in found if "activator" not in document["metadata"]["name"]]
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
    by_name = {(d["metadata"]["name"], d["metadata"]["namespace"]) for d in documents if d["kind"] == "RoleBinding"}
    assert {("octavo-activator", "team-a"), ("octavo-activator", "team-b")} <= by_name
    environment = only(documents, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "OCTAVO_WATCH_NAMESPACES", "value": "team-a,team-b"} in environment


def test_names_that_servers_may_claim_are_what_the_operator_reads(helm):
    patterns = ["*.{namespace}.llm.example.com", "{namespace}.example.com"]
    documents = render(helm, f"--set-json=tenancy.hostnames={json.dumps(patterns)}")
    told = only(documents, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]

    assert from_environment({e["name"]: e["value"] for e in told if "value" in e}).engine.hostnames == tuple(patterns)


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


def named(documents: list[dict[str, Any]], kind: str) -> list[str]:
    return [d["metadata"]["name"] for d in documents if d["kind"] == kind]


@pytest.mark.parametrize(
    ("flags", "kind", "names"),
    [
        ([], "PodDisruptionBudget", ["octavo-activator", "octavo-operator"]),
        (["operator.replicas=1"], "PodDisruptionBudget", ["octavo-activator"]),
        (["operator.podDisruptionBudget=false", "activator.replicas=1"], "PodDisruptionBudget", []),
        ([], "PodMonitor", []),
        (["metrics.podMonitor.enabled=true"], "PodMonitor", ["octavo-activator", "octavo-operator"]),
        ([], "PrometheusRule", []),
        (["alerts.enabled=true"], "PrometheusRule", ["octavo-operator"]),
        (["dashboards.enabled=false"], "ConfigMap", []),
        ([], "ConfigMap", ["octavo-operator-dashboard-operator", "octavo-operator-dashboard-servers"]),
        ([], "NetworkPolicy", ["octavo-activator"]),
        (["networkPolicy.enabled=true"], "NetworkPolicy", ["octavo-activator", "octavo-operator"]),
        ([], "Service", ["octavo-activator", "octavo-operator"]),
        ([], "Pod", ["octavo-operator-test"]),
        (["tests.enabled=false"], "Service", ["octavo-activator"]),
        (["tests.enabled=false"], "Pod", []),
        ([], "LLMServer", []),
        (["servers[0].name=a", "servers[0].spec.replicas=1", "servers[1].name=b", "servers[1].spec.replicas=2"],
         "LLMServer", ["a", "b"]),
        (["fullnameOverride=mine"], "Deployment", ["mine", "mine-activator"]),
        (["nameOverride=mine"], "Deployment", ["mine-activator", "mine-operator"]),
        ([], "ValidatingAdmissionPolicy", ["octavo-operator-secrets"]),
        (["tenancy.guardSecrets=false"], "ValidatingAdmissionPolicy", []),
        (["tenancy.guardSecrets=false"], "ValidatingAdmissionPolicyBinding", []),
        (["rbac.aggregate=false"], "ClusterRole", ["octavo-activator", "octavo-operator"]),
        (["activator.enabled=false"], "Deployment", ["octavo-operator"]),
        (["activator.enabled=false"], "Service", ["octavo-operator"]),
        (["activator.enabled=false", "metrics.podMonitor.enabled=true"], "PodMonitor", ["octavo-operator"]),
        (["activator.enabled=false", "networkPolicy.enabled=true"], "NetworkPolicy", ["octavo-operator"]),
        (["activator.enabled=false", "rbac.aggregate=false"], "ClusterRole", ["octavo-operator"]),
    ],
)  # fmt: skip
def test_each_branch_makes_what_it_is_for(helm, flags, kind, names):
    assert sorted(named(render(helm, *(f"--set={flag}" for flag in flags)), kind)) == names


def test_secrets_are_guarded_where_servers_are_watched(helm):
    bindings = [
        only(render(helm, *flags), "ValidatingAdmissionPolicyBinding")["spec"]
        for flags in ((), ("--set=watchNamespaces={a,b}",))
    ]
    (asked,) = bindings[1]["matchResources"]["namespaceSelector"]["matchExpressions"]

    assert "matchResources" not in bindings[0]
    assert asked == {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["a", "b"]}


MONITORS = ("PodMonitor", "PrometheusRule")


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        ([], []),
        (
            [f"--api-versions=monitoring.coreos.com/v1/{kind}" for kind in MONITORS],
            [*MONITORS[:1] * 2, "PrometheusRule"],
        ),
        (
            [f"--api-versions=monitoring.coreos.com/v1/{kind}" for kind in MONITORS]
            + ["--set=alerts.enabled=false,metrics.podMonitor.enabled=false"],
            [],
        ),
    ],
)
def test_what_the_prometheus_operator_takes_is_made_where_the_cluster_has_it(helm, flags, made):
    documents = render(helm, *flags)
    pod = only(documents, "Deployment")["spec"]["template"]
    environment = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
    off = "alerts.enabled=false" in str(flags)

    assert sorted(d["kind"] for d in documents if d["kind"] in MONITORS) == made
    # One that is off is told of as off; one whose kind may come yet is looked for.
    assert environment["OCTAVO_ALERTS_RULE"] == ("" if off else "octavo-operator")
    assert ("prometheus.io/scrape" in pod["metadata"]["annotations"]) is ("PodMonitor" not in made)


def test_a_pod_monitor_takes_the_place_of_the_annotation(helm):
    documents = render(
        helm,
        "--set=metrics.podMonitor.enabled=true,metrics.podMonitor.interval=15s,metrics.podMonitor.labels.release=p",
    )
    monitor = only(documents, "PodMonitor")

    assert "prometheus.io/scrape" not in only(documents, "Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert monitor["metadata"]["labels"]["release"] == "p"
    assert monitor["spec"]["podMetricsEndpoints"][0]["interval"] == "15s"
    assert monitor["spec"]["selector"] == only(documents, "Deployment")["spec"]["selector"]


def test_alerts_can_be_labelled_and_left_out(helm):
    written = {
        rule["alert"]
        for group in yaml.safe_load((CHART / "files/rules.yaml").read_text())["groups"]
        for rule in group["rules"]
    }
    rule = only(
        render(
            helm,
            *("--set=alerts.enabled=true", "--set=alerts.disabled={OctavoQueueLong,OctavoPreemptions}"),
            *("--set=alerts.alertLabels.team=ml", "--set=alerts.labels.release=p"),
        ),
        "PrometheusRule",
    )
    rules = [one for group in rule["spec"]["groups"] for one in group["rules"]]

    assert {one["alert"] for one in rules} == written - {"OctavoQueueLong", "OctavoPreemptions"}
    assert all(one["labels"]["team"] == "ml" and one["labels"]["severity"] for one in rules)
    assert any("{{ $labels.server }}" in one["annotations"]["summary"] for one in rules)
    assert rule["metadata"]["labels"]["release"] == "p"


def test_boards_are_json_in_a_config_map_where_the_sidecar_looks(helm):
    found = [
        d
        for d in render(
            helm,
            "--set=dashboards.namespace=grafana",
            "--set=dashboards.annotations.grafana_folder=Octavo",
        )
        if d["kind"] == "ConfigMap"
    ]

    for config in found:
        ((_, text),) = config["data"].items()
        assert json.loads(text)["panels"]
        assert config["metadata"]["namespace"] == "grafana"
        assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert config["metadata"]["annotations"] == {"grafana_folder": "Octavo"}


def test_common_labels_and_annotations_are_on_everything_but_the_hook(helm):
    values = (
        *("commonLabels.team=ml", "commonAnnotations.note=x", "networkPolicy.enabled=true", "alerts.enabled=true"),
        *("metrics.podMonitor.enabled=true", "servers[0].name=a", "servers[0].spec.x=1"),
    )
    flags = [f"--set={value}" for value in values]
    for document in render(helm, *flags):
        metadata = document["metadata"]
        assert metadata["labels"]["team"] == "ml", document
        assert document["kind"] == "Pod" or metadata["annotations"]["note"] == "x", document


def test_every_container_of_the_chart_is_confined(helm):
    documents = render(helm)
    deployments = [d for d in documents if d["kind"] == "Deployment"]
    pods = [*(d["spec"]["template"]["spec"] for d in deployments), only(documents, "Pod")["spec"]]
    assert len(deployments) == 2

    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_what_the_operator_is_told_of_engines_is_what_it_reads(helm):
    """From values to settings: the variables that the chart writes, read by the operator's own parser."""
    profile = {"gpus": 2, "nodeSelector": {"gpu": "l4"}, "image": "r/e:1"}
    values = {"engine": {"env": [{"name": "HF_ENDPOINT", "value": "https://hub"}], "profiles": {"l4": profile}}}
    values["operator"] = {"loadingPollSeconds": 2, "settledPollSeconds": 30, "resyncSeconds": 600, "leaseSeconds": 20}
    values["operator"]["logLevel"] = "debug"
    values["engine"]["podMonitorLabels"] = {"release": "kps"}
    values["dashboards"] = {"namespace": "grafana"}
    environment = only(render(helm, f"--set-json={_joined(values)}"), "Deployment")["spec"]["template"]["spec"][
        "containers"
    ][0]["env"]
    settings = from_environment({one["name"]: one["value"] for one in environment if "value" in one})

    assert settings.engine.env == (("HF_ENDPOINT", "https://hub"),)
    assert settings.engine.profiles == {"l4": profile}
    assert settings.engine.pod_monitor_labels == {"release": "kps"}
    assert (settings.alerts_rule, settings.boards_namespace) == ("octavo-operator", "grafana")
    assert (settings.loading_poll_s, settings.settled_poll_s, settings.resync_s) == (2, 30, 600)
    assert (settings.lease_seconds, settings.log_level) == (20, "debug")


ACTIVATOR = "octavo-activator"


def test_the_activator_may_read_two_kinds_and_write_none(helm):
    for flags in ([], ["--set", "watchNamespaces={a,b}"]):
        documents = [d for d in render(helm, *flags) if d["metadata"]["name"] == ACTIVATOR]
        granted = [(rule["resources"], rule["verbs"]) for rule in rules(documents)]

        assert granted == [(["llmservers"], ["get"]), (["endpointslices"], ["list"])] * max(len(flags), 1)
        bound = [d for d in documents if d["kind"].endswith("RoleBinding")]
        assert all(d["subjects"][0]["name"] == ACTIVATOR for d in bound)


def test_what_the_activator_is_told_is_what_it_reads_and_its_replicas_are_the_operators(helm):
    values = {"holdSeconds": 60, "requestsPerServer": 3, "requests": 9, "bodyMiB": 2, "bytesMiB": 7, "replicas": 4}
    documents = render(helm, f"--set-json={_joined({'activator': values, 'watchNamespaces': ['a']})}")
    deployment = only(documents, "Deployment", ACTIVATOR)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = activator.from_environment({one["name"]: one["value"] for one in container["env"]})
    told = only(documents, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
    operator = from_environment({one["name"]: one["value"] for one in told if "value" in one})

    assert settings.bounds == activator.Bounds(3, 9, 2 * 2**20, 7 * 2**20, 60)
    assert settings.watch_namespaces == ("a",)
    assert settings.management_port == container["ports"][0]["containerPort"] == MANAGEMENT_PORT
    assert "replicas" not in deployment["spec"], "helm upgrade would set them back"
    assert (operator.activator, operator.activator_replicas) == (ACTIVATOR, 4)
    # It ends when it has waited out what it holds.
    assert pod["terminationGracePeriodSeconds"] >= settings.leave_s + settings.grace_s
    assert container["args"] == ["activator"]


def test_the_policies_of_operator_and_activator_let_them_talk(helm):
    documents = render(helm, "--set=networkPolicy.enabled=true")
    operator, its = only(documents, "NetworkPolicy"), only(documents, "NetworkPolicy", ACTIVATOR)
    (management,) = its["spec"]["ingress"]
    labels = only(documents, "Deployment", ACTIVATOR)["spec"]["template"]["metadata"]["labels"]

    assert not {port["port"] for port in management["ports"]} & set(PORTS), "the operator says who reaches those"
    assert management["from"][0]["podSelector"]["matchLabels"] == operator["spec"]["podSelector"]["matchLabels"]
    (to,) = [rule["to"] for rule in operator["spec"]["egress"] if rule["ports"] == management["ports"]]
    assert to[0]["podSelector"]["matchLabels"].items() <= labels.items()
    assert ACTIVATOR_LABELS.items() <= labels.items()
    assert (
        not its["spec"]["podSelector"]["matchLabels"].items()
        <= only(documents, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    ), "each policy is about its own pods"


def _joined(values: dict[str, Any]) -> str:
    return ",".join(f"{name}={json.dumps(value)}" for name, value in values.items())


def test_each_value_stands_in_the_schema_and_has_a_line_of_why():
    text, schema = (CHART / "values.yaml").read_text(), json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load(text)
    count = 0

    def walk(value: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        nonlocal count
        assert set(value) <= set(schema["properties"]), path
        assert schema["additionalProperties"] is False, path
        for name, child in value.items():
            below = schema["properties"][name]
            if isinstance(child, dict) and "properties" in below:
                walk(child, below, f"{path}.{name}")
            else:
                count += 1

    walk(values, schema, "")
    lines = text.splitlines()
    unexplained = [
        lines[at].strip()
        for at in range(1, len(lines))
        if re.match(r" *[A-Za-z]+: *[^ ]", lines[at])
        and not (lines[at - 1].strip().startswith("#") or re.match(r" *[A-Za-z]+:", lines[at - 1]))
    ]

    assert 50 <= count <= 75, count
    assert unexplained == []


@pytest.mark.cluster
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["networkPolicy.enabled=true,commonLabels.a=b,commonAnnotations.c=d"],
        ["watchNamespaces={default,kube-system}"],
        ["operator.replicas=1,tests.enabled=false,serviceAccount.create=false,serviceAccount.name=default"],
        ["activator.enabled=false"],
        ["networkPolicy.enabled=true,networkPolicy.metricsFrom[0].ipBlock.cidr=10.0.0.0/8"],
    ],
)
def test_a_real_api_server_takes_all_of_it(helm, api, cluster, flags):
    documents = [
        d for d in render(helm, *(f"--set={flag}" for flag in flags)) if d["kind"] != "CustomResourceDefinition"
    ]
    cluster.kubectl(
        "apply", "--server-side", "--dry-run=server", "--field-manager=test", "--force-conflicts",
        "--validate=strict", "-f", "-", stdin=yaml.safe_dump_all(documents),
    )  # fmt: skip


@pytest.mark.cluster
def test_servers_in_values_are_taken_by_the_definition_of_the_same_chart(helm, api, cluster):
    values = {"servers": [{"name": "qwen", "namespace": "default", "spec": {"model": {"source": "hf://o/n"}}}]}
    server = only(render(helm, f"--set-json={_joined(values)}"), "LLMServer")

    cluster.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", stdin=json.dumps(server))


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
        ("activator.replicas=0", "replicas"),
        ("activator.holdSeconds=0", "holdSeconds"),
        ("watchNamespaces={Team_A}", "watchNamespaces"),
        ("engine.image=", "image"),
        ("unknown=1", "unknown"),
        ("engine.profiles.l4.gpu=1", "gpu"),
        ("engine.env[0].value=x", "name"),
        ("alerts.disabled={QueueLong}", "disabled"),
        ("metrics.podMonitor.interval=often", "interval"),
        ("servers[0].name=Qwen", "name"),
        ("networkPolicy.apiServerPorts={}", "apiServerPorts"),
        ("alerts.enabled=Auto", "enabled"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(helm, flag, word):
    command = [helm, "template", "octavo", str(CHART), "--set", flag]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode != 0
    assert word in done.stderr
