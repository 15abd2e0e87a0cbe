"""Whoever may write LLMServers and nothing else reaches nothing else: every field of a pod is tried in podTemplate.

The fields are the API server's own (its OpenAPI document), so that those of a newer Kubernetes are tried when the tests
run against one. Each is written into the resource alone and in random company; what the operator makes of it is held
against what a pod may be.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from stage import ApiError, chart, wait_for
from test_crd import GOOD, PROFILES, server

from octavo_operator.crd import custom_resource_definition
from octavo_operator.desired import objects
from octavo_operator.desired.deployment import deployment
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server, parse

pytestmark = pytest.mark.cluster

SOURCES = {"emptyDir", "configMap", "persistentVolumeClaim", "downwardAPI", "image", "ephemeral"}
PLAUSIBLE = {
    "image": "r.example/x:1",
    "mountPath": "/data",
    "path": "/",
    "fieldPath": "metadata.name",
    "resource": "limits.cpu",
    "topologyKey": "kubernetes.io/hostname",
    "reference": "r.example/x:1",
    "ip": "10.0.0.1",
    "key": "k",
    "claimName": "claim",
    "medium": "Memory",
    "protocol": "TCP",
    "restartPolicy": "Always",
    "imagePullPolicy": "Always",
    "scheme": "HTTP",
    "operator": "Exists",
    "effect": "NoSchedule",
}
DEEPEST = 7
POD_CONTEXT = {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "seccompProfile"}
CONTEXT = {"allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem", "runAsUser", "runAsGroup"}


def trespasses(pod: dict[str, Any], secrets: frozenset[str] = frozenset()) -> Iterator[str]:
    """Where this pod's spec reaches what a tenant may not. secrets: those that the LLMServer names in fields for it."""
    if pod.get("automountServiceAccountToken") is not False:
        yield "a service account's token is mounted"
    for name in ("hostNetwork", "hostPID", "hostIPC", "serviceAccountName", "serviceAccount", "nodeName", "hostUsers"):
        if name in pod:
            yield name
    if pod["securityContext"]["runAsNonRoot"] is not True or pod["securityContext"]["runAsUser"] < 1:
        yield "root"
    if set(pod["securityContext"]) - POD_CONTEXT:
        yield "a pod's security context"
    for volume in pod["volumes"]:
        sources = set(volume) - {"name"}
        if sources == {"secret"} and volume["secret"]["secretName"] in secrets:
            continue
        if len(sources) != 1 or not sources <= SOURCES:
            yield f"a volume from {sources}"
    if "ephemeralContainers" in pod:
        yield "ephemeral containers"
    for container in (*pod["containers"], *pod.get("initContainers", [])):
        context = container["securityContext"]
        if context["allowPrivilegeEscalation"] or context["capabilities"] != {"drop": ["ALL"]}:
            yield "privileges"
        if set(context) - CONTEXT:
            yield f"a container's security context {context}"
        if context.get("runAsUser", 1) < 1 or context.get("runAsGroup", 1) < 1:
            yield "root"
        if any("hostPort" in port or "hostIP" in port for port in container.get("ports", [])):
            yield "a port of the node"
        if container.get("envFrom"):
            yield "variables from a source"
        for variable in container.get("env", []):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference and reference["name"] not in secrets:
                yield f"the secret {reference['name']}"
        for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
            if "host" in container.get(probe, {}).get("httpGet", {}) or "host" in container.get(probe, {}).get(
                "tcpSocket", {}
            ):
                yield "a request of the kubelet to elsewhere"
    text = json.dumps(pod)
    for word in ('"namespaces"', '"namespaceSelector"', '"namespace"', '"dataSourceRef"', '"dataSource"'):
        if word in text:
            yield f"another namespace, by {word}"


@pytest.fixture(scope="module")
def schemas(api) -> dict[str, Any]:
    found: dict[str, Any] = api.request("GET", "/openapi/v3/api/v1")["components"]["schemas"]
    return found


def resolved(node: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    for option in (node, *node.get("allOf", [])):
        if "$ref" in option:
            found: dict[str, Any] = schemas[option["$ref"].rpartition("/")[2]]
            return found
    return node


def example(node: dict[str, Any], schemas: dict[str, Any], name: str = "", depth: int = 0) -> Any:
    """The least document of this schema: what is required, with values that pass."""
    node = resolved(node, schemas)
    if name in PLAUSIBLE:
        return PLAUSIBLE[name]
    match node.get("type"):
        case "boolean":
            return True
        case "integer" | "number":
            return 1
        case "array":
            return [example(node["items"], schemas, "", depth + 1)]
        case "object":
            more = node.get("additionalProperties")
            required = {k: node["properties"][k] for k in node.get("required", [])}
            return {k: example(v, schemas, k, depth + 1) for k, v in required.items()} or ({"k": "1"} if more else {})
        case _:
            return "1" if "oneOf" in node else "x"


def each(node: dict[str, Any], schemas: dict[str, Any], name: str = "", depth: int = 0) -> Iterator[Any]:
    """A document for every field that this schema has, at any depth: with this field and what is required beside."""
    node = resolved(node, schemas)
    if depth > DEEPEST:
        return
    if node.get("type") == "array":
        for item in each(node["items"], schemas, "", depth + 1):
            yield [item]
    elif "properties" in node:
        least = example(node, schemas)
        for field, child in node["properties"].items():
            for value in each(child, schemas, field, depth + 1):
                yield {**least, field: value}
    else:
        yield example(node, schemas, name)


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One spec with the fields of several: lists are joined, with names that differ."""
    spec: dict[str, Any] = {}
    for document in documents:
        for name, value in document.items():
            spec[name] = [*spec.get(name, []), *value] if isinstance(value, list) else value
    for name, items in spec.items():
        if isinstance(items, list):
            for number, item in enumerate(items):
                if isinstance(item, dict) and "name" in item and item["name"] != "engine":
                    item = items[number] = {**item, "name": f"{name.lower()[:8]}-{number}"}
                    if name in ("containers", "initContainers"):
                        item.setdefault("image", "i")
    return spec


def named_secrets(parsed: Server) -> Iterator[str]:
    """In the fields that are there for it."""
    model, exposed = parsed.spec.model, parsed.spec.expose
    for reference in (model.token_secret_ref, model.s3 and model.s3.secret_ref, exposed.api_keys_secret_ref):
        if reference:
            yield reference.name
    if exposed.tls:
        yield exposed.tls.secret_name


def outcome(spec: dict[str, Any]) -> list[str] | None:
    """None: refused. Else the trespasses of what would be made of it."""
    parsed = parse(server(spec))
    if not isinstance(parsed, Server):
        return None
    named = frozenset(named_secrets(parsed))
    return list(trespasses(deployment(parsed, EngineDefaults())["spec"]["template"]["spec"], named))


def test_no_field_of_a_pod_reaches_beyond_the_server(schemas):
    taken, refused = 0, 0
    for document in each(schemas["io.k8s.api.core.v1.PodSpec"], schemas):
        for container_name in ("x", "engine"):
            spec = merged([document])
            for container in spec.get("containers", []):
                container["name"] = container_name
            found = outcome({"model": {"source": "hf://o/n"}, "podTemplate": {"spec": spec}})
            taken, refused = taken + (found is not None), refused + (found is None)
            assert not found, (found, document)

    print(f"{taken} documents taken and {refused} refused")
    assert taken > 50
    assert refused > 500


@pytest.mark.parametrize("seed", range(20))
def test_no_company_of_fields_does(schemas, seed):
    draw, taken = random.Random(seed), 0
    fields = list(each(schemas["io.k8s.api.core.v1.PodSpec"], schemas))
    good = [d for d in fields if outcome({"model": {"source": "hf://o/n"}, "podTemplate": {"spec": merged([d])}})
            is not None]  # fmt: skip
    for _ in range(100):
        # Mostly what is taken alone, so that the whole is not refused for one part of it.
        chosen = draw.choices(good, k=draw.randint(1, 6)) + draw.choices(fields, k=draw.randint(0, 1))
        spec = json.loads(json.dumps(merged(chosen)))
        found = outcome({"model": {"source": "hf://o/n"}, "podTemplate": {"spec": spec}})
        taken += found is not None

        assert not found, (found, spec)
    assert taken > 10


def test_the_api_server_keeps_nothing_that_would_be_taken_after_it(api, schemas):
    """What it prunes and what it keeps: the stored resource is as harmless as the one that was sent."""
    path = "/apis/octavo.dev/v1alpha1/namespaces/default/llmservers?dryRun=All"
    draw = random.Random(1)
    fields = list(each(schemas["io.k8s.api.core.v1.PodSpec"], schemas))
    stored = 0
    for document in draw.sample(fields, 300):
        body = server({"model": {"source": "hf://o/n"}, "podTemplate": {"spec": merged([document])}})
        try:
            kept = api.request("POST", path, body)
        except ApiError as error:
            if error.status not in (400, 422):
                raise
            continue
        stored += 1
        assert not outcome(kept["spec"]), document

    assert stored > 10


@pytest.mark.parametrize("name", GOOD)
def test_no_child_of_a_good_server_reaches_beyond_it(name):
    parsed = parse(server(GOOD[name]), PROFILES)
    assert isinstance(parsed, Server)
    made = objects(parsed, EngineDefaults(), pod_monitors_known=True)
    pods = [body["spec"]["template"]["spec"] for body in made if body["kind"] in ("Deployment", "Job")]

    assert all(body["metadata"]["namespace"] == "default" for body in made)
    for pod in pods:
        assert not list(trespasses(pod, frozenset(named_secrets(parsed))))


@pytest.mark.parametrize("name", GOOD)
def test_a_namespace_that_enforces_restricted_takes_the_pods(api, restricted, name):
    parsed = parse(server(GOOD[name]), PROFILES)
    assert isinstance(parsed, Server)
    for child in objects(parsed, EngineDefaults(), pod_monitors_known=True):
        if child["kind"] not in ("Deployment", "Job"):
            continue
        template = child["spec"]["template"]
        for absent in ("priorityClassName", "runtimeClassName"):  # classes that this cluster does not have
            template["spec"].pop(absent, None)
        body = {"apiVersion": "v1", "kind": "Pod", **template}
        body["metadata"] = {**template["metadata"], "name": "x", "namespace": restricted}

        api.request("POST", f"/api/v1/namespaces/{restricted}/pods?dryRun=All", body)


@pytest.fixture(scope="module")
def restricted(api) -> Iterator[str]:
    labels = {
        "pod-security.kubernetes.io/enforce": "restricted",
        "pod-security.kubernetes.io/enforce-version": "latest",
    }
    api.request("POST", "/api/v1/namespaces", {"metadata": {"name": "restricted", "labels": labels}})
    wait_for(lambda: api.get("/api/v1/namespaces/restricted/serviceaccounts/default"), "a service account")
    yield "restricted"
    api.request("DELETE", "/api/v1/namespaces/restricted")


def as_tenant(cluster, *words: str, stdin: str = "") -> str:
    """The API server's refusal of what a user does who may write LLMServers of one namespace, and nothing else."""
    done = cluster.run([*("kubectl", "--as=tenant"), *words], stdin=stdin, check=False)
    return "" if done.returncode == 0 else str(done.stderr)


def test_whoever_may_not_read_a_secret_may_not_have_it_read_by_an_engine(cluster, api, stage):
    """engine.image and engine.args are the LLMServer's to say: without the policy any named Secret could be shown."""
    space = f"--namespace={stage.namespace}"
    cluster.kubectl("create", "role", "llm", space, "--verb=*", "--resource=llmservers.octavo.dev")
    cluster.kubectl("create", "rolebinding", "llm", space, "--role=llm", "--user=tenant")
    policy = chart("octavo", "policy")
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=policy)
    bodies = {name: json.dumps(server(spec | {"replicas": 0}, "qwen")) for name, spec in NAMING.items()}
    bodies = {name: body.replace('"default"', f'"{stage.namespace}"') for name, body in bodies.items()}
    try:
        create = ("create", "--dry-run=server", "-f", "-")
        wait_for(lambda: as_tenant(cluster, *create, stdin=bodies["token"]), "the policy to be in force")
        refused = {name: as_tenant(cluster, *create, stdin=body) for name, body in bodies.items()}
        cluster.kubectl("create", "-f", "-", stdin=bodies["token"].replace('"qwen"', '"mine"'))
        patch = ("patch", "llmserver", "mine", space, "--type=merge")
        scaled = as_tenant(cluster, *patch, '-p={"spec":{"replicas":0,"suspend":true,"restart":{"id":"1"}}}')
        image = as_tenant(cluster, *patch, '-p={"spec":{"engine":{"image":"r.example/mine"}}}')
        sidecar = as_tenant(
            cluster, *patch, '-p={"spec":{"podTemplate":{"spec":{"containers":[{"name":"x","image":"i"}]}}}}'
        )
        cluster.kubectl("create", "role", "hf", space, "--verb=get", "--resource=secrets", "--resource-name=s")
        cluster.kubectl("create", "rolebinding", "hf", space, "--role=hf", "--user=tenant")
        wait_for(lambda: not as_tenant(cluster, *create, stdin=bodies["keys"]), "the right to be known")
        allowed = as_tenant(cluster, *patch, '-p={"spec":{"engine":{"image":"r.example/mine"}}}')
    finally:
        cluster.kubectl("delete", "--ignore-not-found", "-f", "-", stdin=policy)

    assert refused.pop("none") == ""
    for name, words in refused.items():
        assert "it names the Secrets s, and tenant may not read all of them" in words, name
    assert scaled == ""
    assert "may not read" in image
    assert "may not read" in sidecar
    assert allowed == ""


HUB = {"source": "hf://o/n"}
NAMING: dict[str, dict[str, Any]] = {
    "none": {"model": HUB},
    "token": {"model": HUB | {"tokenSecretRef": {"name": "s"}}},
    "bucket": {"model": {"source": "s3://bucket/x", "s3": {"secretRef": {"name": "s"}}}},
    "keys": {"model": HUB, "expose": {"apiKeysSecretRef": {"name": "s"}}},
    "certificate": {"model": HUB, "expose": {"tls": {"secretName": "s"}}},
    "ingress": {"model": HUB, "expose": {"ingress": {"hostname": "a.b", "tlsSecretName": "s"}}},
}


def test_every_field_that_names_a_secret_is_guarded():
    """A new field for one belongs into the chart's policy, and into NAMING above."""
    names = set(re.findall(r"[a-zA-Z0-9.]*[sS]ecret(?:Ref|Name)\b", " ".join(secret_fields())))
    policy = chart("octavo", "policy").replace("?", "")

    assert len(names) == len(NAMING) - 1
    for name in names:
        assert f"object.spec.{name}" in policy, name


def secret_fields(schema: dict[str, Any] | None = None, path: str = "") -> Iterator[str]:
    if schema is None:
        (version,) = custom_resource_definition()["spec"]["versions"]
        schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for name, child in schema.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        if name.lower().endswith(("secretref", "secretname", "secret")):
            yield here
        else:
            yield from secret_fields(child, here)
    if isinstance(schema.get("items"), dict):
        yield from secret_fields(schema["items"], path)


def test_a_pod_that_is_not_restricted_is_refused_there(api, restricted):
    """The namespace does what the test above trusts it to do."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    with pytest.raises(ApiError, match="violates PodSecurity"):
        api.request(
            "POST",
            f"/api/v1/namespaces/{restricted}/pods?dryRun=All",
            {**pod, "spec": {"containers": [{"name": "x", "image": "i"}]}},
        )
