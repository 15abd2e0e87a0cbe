"""The children that a spec asks for: what each field becomes."""

from __future__ import annotations

from typing import Any

import pytest
from build import server

from octavo_engine.config import ArgumentParser, EngineConfig, ServerConfig, add_arguments, from_namespace
from octavo_operator.desired import objects
from octavo_operator.desired.deployment import deployment, revision
from octavo_operator.desired.monitoring import pod_annotations
from octavo_operator.desired.service import url
from octavo_operator.hostnames import refusal
from octavo_operator.settings import EngineDefaults, SettingsError, from_environment


def children(*, monitors: bool = False, defaults: EngineDefaults | None = None, **spec: Any) -> dict[str, Any]:
    found = objects(server(**spec), defaults or EngineDefaults(), pod_monitors_known=monitors)
    return {body["kind"]: body for body in found}


def pod_spec(**spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = children(**spec)["Deployment"]["spec"]["template"]["spec"]
    return found


def container(**spec: Any) -> dict[str, Any]:
    (found,) = pod_spec(**spec)["containers"]
    return dict(found)


def test_the_arguments_are_what_the_engines_own_parser_reads_back():
    parsed = server(
        engine={"maxModelLen": 4096, "maxNumSeqs": 8, "kvCacheMemory": "1Gi", "enablePrefixCaching": False},
        model={"source": "hf://org/name", "revision": "abc", "servedNames": ["a", "b"]},
        lifecycle={"drainTimeoutSeconds": 5, "startupStallSeconds": 60},
    )
    parser = ArgumentParser("octavo serve")
    add_arguments(parser, [EngineConfig, ServerConfig])
    command, *flags = parsed.args
    namespace = parser.parse_args(flags)

    assert command == "serve"
    assert from_namespace(EngineConfig, namespace) == parsed.engine_config
    assert from_namespace(ServerConfig, namespace) == parsed.server_config
    assert parsed.engine_config.kv_cache_memory_bytes == 2**30


def test_a_hub_model_is_named_by_its_id_and_a_claim_is_mounted_read_only():
    claim = pod_spec(model={"source": "pvc://models/a/b"})
    (volume,) = [v for v in claim["volumes"] if v["name"] == "models"]
    (mount,) = [m for m in claim["containers"][0]["volumeMounts"] if m["name"] == "models"]

    assert "--model=org/name" in container()["args"]
    assert "--model=/models/a/b" in claim["containers"][0]["args"]
    assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert mount["readOnly"] is True
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in claim["containers"][0]["env"]


def test_secrets_are_named_and_never_read():
    token = container(model={"source": "hf://o/n", "tokenSecretRef": {"name": "hf", "key": "t"}})
    keys = pod_spec(expose={"apiKeysSecretRef": {"name": "keys"}})

    assert token["env"][-1] == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "t"}}}
    assert {"secretName": "keys", "items": [{"key": "keys", "path": "keys"}], "defaultMode": 0o440} in [
        volume.get("secret") for volume in keys["volumes"]
    ]
    assert "--api-key-file=/etc/octavo/api-keys/keys" in keys["containers"][0]["args"]


def test_gpus_are_a_limit_with_the_toleration_that_their_nodes_ask_for():
    one = pod_spec(hardware={"gpus": 1, "resources": {"requests": {"cpu": 1}, "limits": {"memory": "8Gi"}}})
    amd = pod_spec(hardware={"gpus": 1, "resourceName": "amd.com/gpu"})

    assert one["containers"][0]["resources"] == {
        "requests": {"cpu": "1"},
        "limits": {"memory": "8Gi", "nvidia.com/gpu": "1"},
    }
    assert one["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert amd["containers"][0]["resources"] == {"limits": {"amd.com/gpu": "1"}}
    assert "tolerations" not in pod_spec()
    assert "--device=cpu" in container()["args"]


@pytest.mark.parametrize(
    ("hardware", "size"),
    [({"gpus": 0}, None), ({"gpus": 1}, None), ({"gpus": 1, "sharedMemory": "1Gi"}, str(2**30))],
)
def test_shared_memory_is_a_volume_in_memory(hardware, size):
    sizes = [v["emptyDir"]["sizeLimit"] for v in pod_spec(hardware=hardware)["volumes"] if v["name"] == "shm"]

    assert sizes == ([size] if size else [])


def test_placement_goes_to_the_pod():
    hardware = {
        "gpus": 0,
        "nodeSelector": {"pool": "a"},
        "tolerations": [{"key": "x", "operator": "Exists"}],
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
    }
    found = pod_spec(hardware=hardware)

    assert found["nodeSelector"] == {"pool": "a"}
    assert found["tolerations"] == [{"key": "x", "operator": "Exists"}]
    assert (found["priorityClassName"], found["runtimeClassName"]) == ("high", "nvidia")


@pytest.mark.parametrize(
    ("spec", "strategy"),
    [
        ({"hardware": {"gpus": 0}}, {"maxSurge": 1, "maxUnavailable": 0}),
        ({"hardware": {"gpus": 1}}, {"maxSurge": 1, "maxUnavailable": 0}),
        ({"rollout": {"strategy": "Auto"}}, {"maxSurge": 1, "maxUnavailable": 0}),
        ({"rollout": {"strategy": "InPlace"}}, {"maxSurge": 0, "maxUnavailable": 1}),
        ({"rollout": {"strategy": "Recreate"}}, None),
    ],
)
def test_pods_are_replaced_as_the_spec_says(spec, strategy):
    found = children(**spec)["Deployment"]["spec"]["strategy"]

    assert found["rollingUpdate"] == strategy
    assert found["type"] == ("RollingUpdate" if strategy else "Recreate")


def test_probes_and_grace_follow_from_the_life_cycle():
    spec = {"lifecycle": {"drainTimeoutSeconds": 60, "startupStallSeconds": 12}}
    probes = container(**spec)

    assert probes["startupProbe"]["failureThreshold"] * probes["startupProbe"]["periodSeconds"] == 15
    assert pod_spec(**spec)["terminationGracePeriodSeconds"] == 80
    assert probes["lifecycle"]["preStop"]["httpGet"] == {"path": "/drain?after=5", "port": "management"}
    assert probes["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize(("spec", "replicas"), [({}, 1), ({"replicas": 3}, 3), ({"replicas": 3, "suspend": True}, 0)])
def test_a_suspended_server_has_no_pods_and_keeps_its_number(spec, replicas):
    assert children(**spec)["Deployment"]["spec"]["replicas"] == replicas


def test_replicas_do_not_change_the_template_and_a_flag_does():
    def template(**spec: Any) -> str:
        return revision(children(**spec)["Deployment"])

    assert (
        template() == template(replicas=5) == template(suspend=True) == template(observability={"labels": {"a": "b"}})
    )
    assert template() != template(engine={"maxNumSeqs": 7})


def test_whether_the_cluster_has_pod_monitors_does_not_restart_engines():
    with_them, without = children(monitors=True), children(monitors=False)

    assert with_them["Deployment"] == without["Deployment"]
    assert "PodMonitor" in with_them
    assert "PodMonitor" not in without


@pytest.mark.parametrize(
    ("choice", "known", "monitor", "annotated"),
    [
        ("Auto", True, True, False),
        ("Auto", False, False, True),
        ("Enabled", True, True, False),
        ("Enabled", False, False, False),
        ("Disabled", True, False, False),
        ("Disabled", False, False, False),
    ],
)
def test_prometheus_is_told_by_one_way_or_by_none(choice, known, monitor, annotated):
    spec = {"observability": {"podMonitor": choice}}

    assert ("PodMonitor" in children(monitors=known, **spec)) is monitor
    assert bool(pod_annotations(server(**spec), pod_monitors_known=known)) is annotated


def test_annotations_that_the_user_gives_are_not_ours_to_set():
    given = {"podTemplate": {"metadata": {"annotations": {"prometheus.io/scrape": "false"}}}}

    assert "prometheus.io/scrape" not in pod_annotations(server(**given), pod_monitors_known=False)


def test_the_users_labels_are_on_the_pods_and_cannot_touch_the_selector():
    template = children(podTemplate={"metadata": {"labels": {"team": "ml"}}})["Deployment"]["spec"]["template"]

    assert template["metadata"]["labels"]["team"] == "ml"
    assert children()["Deployment"]["spec"]["selector"] == {"matchLabels": {"octavo.dev/server": "qwen"}}


def test_pods_meet_the_restricted_standard_and_mount_no_token():
    found, box = pod_spec(), container()

    assert found["automountServiceAccountToken"] is False
    assert found["securityContext"]["runAsNonRoot"] is True
    assert found["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert box["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def test_the_image_is_the_servers_own_or_the_operators_default():
    defaults = EngineDefaults("r/engine:1", "Always", ("pull",))

    assert container(defaults=defaults)["image"] == "r/engine:1"
    assert container(defaults=defaults, engine={"image": "mine:2"})["image"] == "mine:2"
    assert container(defaults=defaults)["imagePullPolicy"] == "Always"
    assert pod_spec(defaults=defaults)["imagePullSecrets"] == [{"name": "pull"}]


@pytest.mark.parametrize(
    ("port", "address"), [(80, "http://qwen.default.svc/v1"), (81, "http://qwen.default.svc:81/v1")]
)
def test_the_url_is_what_an_openai_client_takes(port, address):
    assert url(server(expose={"service": {"port": port}})) == address


def test_a_models_image_is_a_volume_and_one_in_the_engines_image_is_a_path():
    found = pod_spec(model={"source": "oci://r.example/models/qwen:1#a/b"})

    assert {"name": "models", "image": {"reference": "r.example/models/qwen:1", "pullPolicy": "IfNotPresent"}} in (
        found["volumes"]
    )
    assert "--model=/models/a/b" in found["containers"][0]["args"]
    assert "--model=/opt/m" in container(model={"source": "file:///opt/m"})["args"]
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container(model={"source": "file:///opt/m"})["env"]


def test_affinity_goes_to_the_pod_and_spreading_counts_the_pods_of_one_revision():
    terms = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["l4"]}]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    found = pod_spec(hardware={"gpus": 0, "affinity": affinity, "topologySpread": [{"topologyKey": "zone"}]})

    assert found["affinity"] == affinity
    assert found["topologySpreadConstraints"] == [
        {
            "topologyKey": "zone",
            "maxSkew": 1,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"octavo.dev/server": "qwen"}},
            "matchLabelKeys": ["octavo.dev/revision"],
        }
    ]


def test_a_word_with_a_dollar_reaches_the_engine_as_it_was_written():
    """The kubelet reads $(NAME) in arguments as a variable's value, and $$ as $."""
    made = server(engine={"args": ["--chat-template=$(HF_TOKEN) $5"]})
    (container,) = deployment(made, EngineDefaults())["spec"]["template"]["spec"]["containers"]

    assert container["args"][-1] == "--chat-template=$$(HF_TOKEN) $$5"


def test_a_question_for_new_pods_is_a_change_that_somebody_asked_for():
    plain = server(rollout={"strategy": "Surge"})
    asking = server(rollout={"verify": {"prompt": "2+2=", "expect": "4"}})
    words = deployment(asking, EngineDefaults())["spec"]["template"]["spec"]["containers"][0]["args"]

    assert {"--verify-prompt=2+2=", "--verify-expect=4"} <= set(words)
    assert asking.asked != plain.asked
    assert plain.asked == server().asked


def test_another_restart_id_is_another_template():
    first, second = (children(restart={"id": name})["Deployment"] for name in ("a", "b"))

    assert first["spec"]["template"]["metadata"]["annotations"]["octavo.dev/restart"] == "a"
    assert revision(first) != revision(second) != revision(children()["Deployment"])


def test_a_sidecar_is_as_confined_as_the_engine_and_the_engine_gets_its_variables():
    extra = {
        "containers": [
            {
                "name": "engine",
                "env": [{"name": "A", "value": "1"}],
                "volumeMounts": [{"name": "d", "mountPath": "/d"}],
            },
            {"name": "proxy", "image": "p:1", "resources": {"limits": {"cpu": 1}}, "securityContext": {"runAsUser": 7}},
        ],
        "initContainers": [{"name": "first", "image": "f:1"}],
        "volumes": [{"name": "d", "emptyDir": {"sizeLimit": 1024}}],
        "schedulerName": "volcano",
    }
    plain, found = pod_spec(), pod_spec(podTemplate={"spec": extra})
    engine, proxy = found["containers"]

    assert engine["env"] == [*plain["containers"][0]["env"], {"name": "A", "value": "1"}]
    assert engine["volumeMounts"][-1] == {"name": "d", "mountPath": "/d"}
    assert engine["args"] == plain["containers"][0]["args"]
    assert proxy["securityContext"] == engine["securityContext"] | {"runAsUser": 7}
    assert proxy["resources"] == {"limits": {"cpu": "1"}}
    assert found["initContainers"][0]["securityContext"] == engine["securityContext"]
    assert found["volumes"][-1] == {"name": "d", "emptyDir": {"sizeLimit": "1024"}}
    assert found["schedulerName"] == "volcano"


def test_an_empty_pod_template_restarts_nobody():
    assert revision(children()["Deployment"]) == revision(children(podTemplate={"spec": {}})["Deployment"])


def test_a_downloaded_model_is_kept_in_a_store_on_the_disk_that_the_cache_names():
    def store(**spec: Any) -> tuple[dict[str, Any], list[str]]:
        found = pod_spec(**spec)
        (volume,) = [v for v in found["volumes"] if v["name"] == "store"]
        return {k: v for k, v in volume.items() if k != "name"}, found["containers"][0]["args"]

    own, args = store()
    sized, sized_args = store(cache={"size": "2Gi"})
    classed, _ = store(cache={"size": "2Gi", "storageClassName": "fast"})
    made, _ = store(cache={"mode": "Shared", "size": "2Gi"})
    given, _ = store(cache={"mode": "NodeLocal", "claimName": "local"})

    assert own == {"emptyDir": {}}
    assert "--model-store=/models" in args
    assert sized == {"emptyDir": {"sizeLimit": "2Gi"}}
    assert f"--model-store-size={2 * 2**30}" in sized_args
    assert classed["ephemeral"]["volumeClaimTemplate"]["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "2Gi"}},
        "storageClassName": "fast",
    }
    assert made == {"persistentVolumeClaim": {"claimName": "qwen"}}
    assert given == {"persistentVolumeClaim": {"claimName": "local"}}
    assert not [v for v in pod_spec(model={"source": "pvc://c/x"})["volumes"] if v["name"] == "store"]


def test_a_claim_that_is_retained_has_no_owner_and_one_that_is_given_is_not_made():
    shared = {"mode": "Shared", "size": "2Gi"}
    deleted = children(cache=shared)["PersistentVolumeClaim"]
    retained = children(cache={**shared, "deletionPolicy": "Retain"})["PersistentVolumeClaim"]

    assert deleted["spec"] == {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "2Gi"}}}
    assert deleted["metadata"]["ownerReferences"]
    assert "ownerReferences" not in retained["metadata"]
    assert "PersistentVolumeClaim" not in children(cache={"mode": "Shared", "claimName": "c"})


def test_a_prefetch_job_runs_where_the_pods_run_without_their_gpus_and_outside_their_service():
    spec = {
        "model": {"source": "hf://o/n", "revision": "abc", "tokenSecretRef": {"name": "hf"}},
        "cache": {"mode": "Shared", "size": "2Gi", "prefetch": True},
        "hardware": {"gpus": 1, "nodeSelector": {"pool": "a"}},
        "podTemplate": {
            "spec": {
                "containers": [
                    {"name": "engine", "env": [{"name": "HF_ENDPOINT", "value": "http://hub"}],
                     "volumeMounts": [{"name": "certs", "mountPath": "/certs"}]},
                    {"name": "side", "image": "s"},
                ],
                "volumes": [{"name": "certs", "configMap": {"name": "ca"}}, {"name": "other", "emptyDir": {}}],
            }
        },
    }  # fmt: skip
    job = children(**spec)["Job"]
    template = job["spec"]["template"]
    (box,) = template["spec"]["containers"]
    parser = ArgumentParser("octavo download")
    add_arguments(parser, [EngineConfig, ServerConfig])
    command, *flags = box["args"]
    namespace = parser.parse_args(flags)

    assert command == "download"
    assert from_namespace(EngineConfig, namespace).model == "o/n"
    assert from_namespace(EngineConfig, namespace).revision == "abc"
    assert from_namespace(EngineConfig, namespace).model_store == "/models"
    assert from_namespace(ServerConfig, namespace).management_port == 8001
    assert "octavo.dev/server" not in template["metadata"]["labels"]
    assert template["metadata"]["labels"]["octavo.dev/prefetch"] == "qwen"
    assert template["spec"]["nodeSelector"] == {"pool": "a"}
    assert template["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert "nvidia.com/gpu" not in str(box["resources"])
    assert {"name": "HF_ENDPOINT", "value": "http://hub"} in box["env"]
    assert any(variable["name"] == "HF_TOKEN" for variable in box["env"])
    assert {m["name"] for m in box["volumeMounts"]} == {"tmp", "cache", "store", "certs"}
    assert {v["name"] for v in template["spec"]["volumes"]} == {"tmp", "cache", "store", "certs"}


def test_a_bucket_is_reached_with_names_of_a_secrets_keys():
    s3 = {"endpoint": "http://minio:9000", "region": "eu", "secretRef": {"name": "s3"}}
    found = container(model={"source": "s3://bucket/m", "s3": s3})

    assert "--model=s3://bucket/m" in found["args"]
    assert {"name": "AWS_ENDPOINT_URL", "value": "http://minio:9000"} in found["env"]
    secret = {"secretKeyRef": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY"}}
    assert {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": secret} in found["env"]


def test_tls_is_a_mounted_secret_and_the_url_says_so():
    spec = {"expose": {"tls": {"secretName": "cert"}, "service": {"port": 443}}}
    found = pod_spec(**spec)

    assert {"name": "tls", "secret": {"secretName": "cert", "defaultMode": 0o440}} in found["volumes"]
    assert "--ssl-certfile=/etc/octavo/tls/tls.crt" in found["containers"][0]["args"]
    assert "--ssl-keyfile=/etc/octavo/tls/tls.key" in found["containers"][0]["args"]
    assert children(**spec)["Service"]["spec"]["ports"][0]["appProtocol"] == "https"
    assert url(server(**spec)) == "https://qwen.default.svc/v1"


def test_an_ingress_has_the_operators_annotations_and_nobody_elses():
    asked = {"ingress": {"hostname": "llm.example.com", "className": "nginx", "tlsSecretName": "t"}}
    made = children(expose=asked, defaults=EngineDefaults(ingress_annotations={"a": "b"}))["Ingress"]
    (rule,) = made["spec"]["rules"]

    assert made["metadata"]["annotations"] == {"a": "b"}
    assert rule["host"] == "llm.example.com"
    assert rule["http"]["paths"][0]["backend"] == {"service": {"name": "qwen", "port": {"name": "http"}}}
    assert made["spec"]["tls"] == [{"hosts": ["llm.example.com"], "secretName": "t"}]
    assert made["spec"]["ingressClassName"] == "nginx"


def test_a_route_leads_to_the_service_or_to_the_pool():
    gateway = {"parentRefs": [{"name": "g", "namespace": "infra"}], "hostnames": ["a.b"]}
    plain = children(expose={"gateway": gateway, "service": {"port": 81}})
    pooled = children(expose={"gateway": gateway, "inferencePool": {"endpointPicker": {"name": "p"}}})
    pool = pooled["InferencePool"]["spec"]

    assert plain["HTTPRoute"]["spec"]["rules"][0]["backendRefs"] == [{"name": "qwen", "port": 81}]
    assert plain["HTTPRoute"]["spec"]["parentRefs"] == gateway["parentRefs"]
    assert pooled["HTTPRoute"]["spec"]["rules"][0]["backendRefs"][0]["kind"] == "InferencePool"
    assert pool["selector"] == {"matchLabels": {"octavo.dev/server": "qwen"}}
    assert pool["targetPorts"] == [{"number": 8000}]
    assert pool["endpointPickerRef"] == {"name": "p", "port": {"number": 9002}, "failureMode": "FailOpen"}


def test_a_policy_lets_the_operator_in_and_a_pod_with_its_model_nowhere_out():
    def policy(**spec: Any) -> dict[str, Any]:
        made = children(defaults=EngineDefaults(operator_namespace="octavo-system"), **spec)["NetworkPolicy"]
        found: dict[str, Any] = made["spec"]
        return found

    closed = policy(model={"source": "pvc://c/m"}, expose={"networkPolicy": {}})
    asked = {
        "allowFrom": [{"namespaceLabels": {"team": "a"}, "podLabels": {}}],
        "allowMetricsFrom": [{"podLabels": {"p": "q"}}],
    }
    given = policy(model={"source": "pvc://c/m"}, expose={"networkPolicy": asked})
    api, management = closed["ingress"]

    assert api == {"ports": [{"port": 8000, "protocol": "TCP"}], "from": [{"podSelector": {}}]}
    assert management["ports"] == [{"port": 8001, "protocol": "TCP"}]
    assert management["from"][0] == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "octavo-system"}}
    }
    assert [port["port"] for port in closed["egress"][0]["ports"]] == [53, 53]
    assert policy(expose={"networkPolicy": {}})["egress"] == [{}]  # it downloads
    assert given["ingress"][0]["from"] == [{"namespaceSelector": {"matchLabels": {"team": "a"}}, "podSelector": {}}]
    assert given["ingress"][1]["from"][1] == {"podSelector": {"matchLabels": {"p": "q"}}}
    assert "NetworkPolicy" not in children()


PATTERNS = ("*.{namespace}.llm.example.com", "{namespace}.example.com")
HERE = "names may be *.default.llm.example.com or default.example.com (Helm value tenancy.hostnames"


@pytest.mark.parametrize(
    ("expose", "refused"),
    [
        ({}, None),
        ({"ingress": {"hostname": "a.default.llm.example.com"}}, None),
        ({"ingress": {"hostname": "a.b.default.llm.example.com"}}, None),
        ({"ingress": {"hostname": "*.default.llm.example.com"}}, None),
        ({"ingress": {"hostname": "default.example.com"}}, None),
        ({"ingress": {"hostname": "default.llm.example.com"}}, "expose.ingress.hostname has 'default.llm.example.com'"),
        ({"ingress": {"hostname": "a.other.llm.example.com"}}, "which this namespace may not claim"),
        ({"ingress": {"hostname": "xdefault.llm.example.com"}}, "'xdefault.llm.example.com'"),
        ({"ingress": {"hostname": "*.llm.example.com"}}, "'*.llm.example.com'"),
        ({"ingress": {"hostname": "*.default.example.com"}}, "'*.default.example.com'"),
        ({"gateway": {"parentRefs": [{"name": "g"}], "hostnames": ["a.default.llm.example.com"]}}, None),
        (
            {"gateway": {"parentRefs": [{"name": "g"}], "hostnames": ["a.default.llm.example.com", "x.y"]}},
            "expose.gateway.hostnames has 'x.y'",
        ),
        ({"gateway": {"parentRefs": [{"name": "g"}]}}, "asks for all names of its Gateway"),
    ],
)
def test_a_namespace_claims_the_names_that_are_its_own_and_no_others(expose, refused):
    of = server(expose=expose)
    told = refusal(of.spec.expose, PATTERNS, "default")
    made = {
        body["kind"]
        for body in objects(of, EngineDefaults(hostnames=PATTERNS), pod_monitors_known=False)
        if body["kind"] in ("Ingress", "HTTPRoute")
    }

    assert (told is None) is (refused is None), told
    assert refused is None or (refused in told and HERE in told)
    assert bool(made) is (refused is None and bool(expose))
    assert refusal(of.spec.expose, (), "default") is None, "without the setting every name may be claimed"


@pytest.mark.parametrize("pattern", ["*", "*-{namespace}.x", "a.*.x", "{ns}.x", "http://x", "{namespace}..x"])
def test_a_pattern_that_would_not_mean_what_it_seems_to_is_refused(pattern):
    with pytest.raises(SettingsError, match=r"OCTAVO_HOSTNAMES: got .*expected a name such as"):
        from_environment({"OCTAVO_HOSTNAMES": f"ok.x,{pattern}", "OCTAVO_NAMESPACE": "x"})
