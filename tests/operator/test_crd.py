"""The resource's schema and rules: the API server and the operator's parser give the same answers.

One table of specs goes through both. What the API server cannot know (what this version of the engine does) is tested
in test_spec.py.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from stage import ApiError, wait_for

from octavo_engine.config import EngineConfig
from octavo_operator.crd import custom_resource_definition
from octavo_operator.render import RenderError, render
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import NAME_MAX, Server, parse

ROOT = Path(__file__).resolve().parents[2]
HF, PVC = {"source": "hf://org/name"}, {"source": "pvc://claim/folder"}


def node_affinity(operator: str, values: list[str] | None) -> dict[str, Any]:
    requirement = {"key": "k", "operator": operator} | ({"values": values} if values else {})
    terms = {"nodeSelectorTerms": [{"matchExpressions": [requirement]}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"model": HF, "podTemplate": {"spec": spec}}


def side(**container: Any) -> dict[str, Any]:
    return {"containers": [{"name": "x", "image": "i"} | container]}


PROFILES: dict[str, Any] = {"p": {}}
"""That the operator has, which some of them name."""
GOOD: dict[str, dict[str, Any]] = {
    "least": {"model": HF},
    "claim": {"model": {"source": "pvc://claim"}},
    "deep folder": {"model": {"source": "pvc://claim.a/b/c_d-1.0"}},
    "revision": {"model": HF | {"revision": "refs/pr/1", "tokenSecretRef": {"name": "hf"}}},
    "names": {"model": HF | {"servedNames": ["a", "org/b:latest"]}},
    "engine": {
        "model": HF,
        "engine": {
            "image": "r.example:5000/a/b@sha256:abc",
            "maxModelLen": 8192,
            "dtype": "bfloat16",
            "gpuMemoryUtilization": "0.85",
            "maxNumSeqs": 64,
            "maxNumBatchedTokens": 64,
            "blockSize": 128,
            "enablePrefixCaching": False,
            "enableChunkedPrefill": True,
            "tensorParallel": 1,
            "pipelineParallel": 1,
            "args": ["--seed=7", "--log-level=debug", "--max_num_queued_reqs=5"],
        },
    },
    "an image": {"model": {"source": "oci://r.example:5000/a/b:1@sha256:" + "0" * 64 + "#models/a"}},
    "an image's root": {"model": {"source": "oci://r.example/a"}},
    "in the image": {"model": {"source": "file:///models/a-b_c.d"}},
    "placement": {
        "model": HF,
        "restart": {"id": "2026-11-24T10:00:00"},
        "hardware": {
            "gpus": 1,
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [
                            {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["l4", "a10"]}]}
                        ]
                    },
                    "preferredDuringSchedulingIgnoredDuringExecution": [
                        {"weight": 5, "preference": {"matchExpressions": [{"key": "spot", "operator": "DoesNotExist"}]}}
                    ],
                },
                "podAntiAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [
                        {"labelSelector": {"matchLabels": {"app": "x"}}, "topologyKey": "kubernetes.io/hostname"}
                    ]
                },
            },
            "topologySpread": [{"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 2}],
        },
    },
    "additions": {
        "model": HF,
        "podTemplate": {
            "spec": {
                "containers": [
                    {
                        "name": "engine",
                        "env": [
                            {"name": "HF_ENDPOINT", "value": "http://hub"},
                            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                        ],
                        "volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}],
                    },
                    {
                        "name": "proxy",
                        "image": "r.example/proxy:1",
                        "args": ["-v"],
                        "ports": [{"containerPort": 9000}],
                        "resources": {"limits": {"memory": "64Mi", "cpu": 1}},
                        "securityContext": {"runAsUser": 1000, "privileged": False},
                        "readinessProbe": {"httpGet": {"port": 9000, "path": "/"}, "periodSeconds": 1},
                    },
                ],
                "initContainers": [{"name": "log", "image": "r.example/log:1", "restartPolicy": "Always"}],
                "volumes": [
                    {"name": "data", "emptyDir": {"sizeLimit": 1024}},
                    {"name": "c", "configMap": {"name": "c"}},
                ],
                "schedulerName": "volcano",
                "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["hub.example"]}],
            }
        },
    },
    "a bucket": {
        "model": {
            "source": "s3://bucket.a/models/x",
            "s3": {"endpoint": "http://minio.ml:9000", "region": "eu-west-1", "secretRef": {"name": "s3"}},
        }
    },
    "a disk of each pod": {"model": HF, "cache": {"size": "60Gi"}},
    "a claim of each pod": {"model": HF, "cache": {"mode": "PerReplica", "size": "60Gi", "storageClassName": "fast"}},
    "a claim that is made": {
        "model": HF,
        "cache": {
            "mode": "Shared",
            "size": "60Gi",
            "storageClassName": "",
            "prefetch": True,
            "deletionPolicy": "Retain",
        },
    },
    "a claim that is there": {"model": HF, "cache": {"mode": "Shared", "claimName": "models", "prefetch": True}},
    "a folder of each node": {"model": HF, "cache": {"mode": "NodeLocal", "claimName": "local", "size": "1Ti"}},
    "every way in": {
        "model": PVC,
        "expose": {
            "tls": {"secretName": "cert"},
            "ingress": {"hostname": "*.example.com", "className": "nginx", "tlsSecretName": "wild"},
            "gateway": {
                "parentRefs": [{"name": "g", "namespace": "infra", "sectionName": "https"}],
                "hostnames": ["a.b"],
            },
            "inferencePool": {"endpointPicker": {"name": "picker", "failureMode": "FailClose"}},
            "networkPolicy": {
                "allowFrom": [{"namespaceLabels": {"a": "b"}}, {"podLabels": {"c": "d"}}],
                "allowMetricsFrom": [{"namespaceLabels": {}}],
                "egress": "All",
            },
        },
    },
    "a question for new pods": {
        "model": HF,
        "rollout": {
            "verify": {"prompt": "2 + 2 = ?\nA number.", "maxTokens": 8, "expect": "4", "minTokensPerSecond": 5}
        },
    },
    "whole gpu": {"model": HF, "engine": {"gpuMemoryUtilization": "1.0"}},
    "amount as number": {"model": PVC, "engine": {"kvCacheMemory": 1073741824}},
    "hardware": {
        "model": PVC,
        "hardware": {
            "gpus": 0,
            "resources": {"requests": {"cpu": "500m", "memory": "1.5Gi"}, "limits": {"cpu": 2}},
            "nodeSelector": {"pool": "a"},
            "tolerations": [{"key": "x", "operator": "Exists", "effect": "NoSchedule"}],
            "sharedMemory": "0",
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
        },
    },
    "a name for the GPUs of those that have some": {
        "model": HF,
        "hardware": {"profile": "p", "gpus": 0, "resourceName": "amd.com/gpu"},
    },
    "waits": {
        "model": HF,
        "rollout": {"waitForIdle": True, "idleTimeoutSeconds": 60},
        "autoscaling": {"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 60},
    },
    "rest": {
        "model": HF,
        "replicas": 0,
        "suspend": True,
        "lifecycle": {"drainTimeoutSeconds": 0, "startupStallSeconds": 1},
        "expose": {"service": {"port": 8000, "type": "LoadBalancer"}, "apiKeysSecretRef": {"name": "k", "key": "a.b"}},
        "observability": {"podMonitor": "Enabled", "labels": {"release": "x"}},
        "rollout": {"strategy": "Recreate"},
        "podTemplate": {"metadata": {"labels": {"team": "ml"}, "annotations": {"prometheus.io/scrape": "false"}}},
    },
}
# What does nothing beside the others that are there. spec, words of the refusal, which both have to a letter
WITHOUT_EFFECT: dict[str, tuple[dict[str, Any], str]] = {
    "idle seconds of a server that never sleeps": (
        {"model": HF, "autoscaling": {"maxReplicas": 2, "idleSeconds": 60}},
        "autoscaling.idleSeconds is for servers that may go to zero: set autoscaling.minReplicas to 0",
    ),
    "idle seconds of an HPA": (
        {"model": HF, "autoscaling": {"mode": "HPA", "minReplicas": 1, "maxReplicas": 2, "idleSeconds": 60}},
        "or remove idleSeconds",
    ),
    "a wait for nothing": (
        {"model": HF, "rollout": {"idleTimeoutSeconds": 60}},
        "rollout.idleTimeoutSeconds is the longest wait of rollout.waitForIdle: set waitForIdle to true",
    ),
    "a wait that is not wanted": (
        {"model": HF, "rollout": {"waitForIdle": False, "idleTimeoutSeconds": 60}},
        "or remove idleTimeoutSeconds",
    ),
    "labels of no monitor": (
        {"model": HF, "observability": {"podMonitor": "Disabled", "labels": {"release": "x"}}},
        "observability.labels are the PodMonitor's, and observability.podMonitor is Disabled",
    ),
    "a name for no GPU": (
        {"model": HF, "hardware": {"gpus": 0, "resourceName": "amd.com/gpu"}},
        "hardware.resourceName says how nodes call the GPUs, and hardware.gpus is 0: remove resourceName",
    ),
    "two sizes of one cache": (
        {"model": HF, "engine": {"gpuMemoryUtilization": "0.9", "kvCacheMemory": "4Gi"}},
        "engine.kvCacheMemory says its size: remove one of the two",
    ),
    "nobody may ask": (
        {"model": HF, "expose": {"networkPolicy": {"allowFrom": []}}},
        "expose.networkPolicy.allowFrom is empty, and names nobody: name a peer, or remove it",
    ),
    "nobody may scrape": (
        {"model": HF, "expose": {"networkPolicy": {"allowMetricsFrom": []}}},
        "expose.networkPolicy.allowMetricsFrom is empty, and names nobody",
    ),
}
# spec, words that the API server's refusal must have
BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no model": ({}, ("spec.model", "Required")),
    "plain id": ({"model": {"source": "org/name"}}, ("org/name", "hf://org/name", "pvc://claim/path")),
    "hf without org": ({"model": {"source": "hf://name"}}, ("hf://name", "expected")),
    "dots in a claim's path": ({"model": {"source": "pvc://claim/../etc"}}, ("pvc://claim/../etc",)),
    "absolute path": ({"model": {"source": "pvc://claim//etc"}}, ("expected",)),
    "other scheme": ({"model": {"source": "ftp://host/x"}}, ("ftp://host/x", "expected")),
    "an image with dots": ({"model": {"source": "oci://r/a#../x"}}, ("oci://r/a#../x", "expected")),
    "an image without a path": ({"model": {"source": "oci://r"}}, ("oci://registry/repository:tag",)),
    "a path of two slashes": ({"model": {"source": "file://models/a"}}, ("file:///path",)),
    "dots in a path": ({"model": {"source": "file:///models/../etc"}}, ("expected",)),
    "revision of an image": (
        {"model": {"source": "oci://r/a", "revision": "b"}},
        ("model.revision is 'b'", "a tag or digest of an oci://"),
    ),
    "values with Exists": (
        {"model": HF, "hardware": {"affinity": node_affinity("Exists", ["x"])}},
        ("the operator Exists takes no values",),
    ),
    "In without values": (
        {"model": HF, "hardware": {"affinity": node_affinity("In", None)}},
        ("the operator In needs values",),
    ),
    "a bucket's name": ({"model": {"source": "s3://B/x"}}, ("s3://B/x", "s3://bucket/folder")),
    "s3 of the hub": ({"model": HF | {"s3": {}}}, ("model.s3 is for s3:// sources",)),
    "endpoint": ({"model": {"source": "s3://bucket/x", "s3": {"endpoint": "minio:9000"}}}, ("s3.endpoint",)),
    "cache of a claim": ({"model": PVC, "cache": {}}, ("cache is for models that are downloaded", "remove cache")),
    "a claim for each": (
        {"model": HF, "cache": {"claimName": "c"}},
        ("every pod has a disk of its own", "set cache.mode to Shared"),
    ),
    "node local without a claim": ({"model": HF, "cache": {"mode": "NodeLocal"}}, ("needs cache.claimName",)),
    "shared without a size": ({"model": HF, "cache": {"mode": "Shared"}}, ("needs cache.size",)),
    "a class for nothing": (
        {"model": HF, "cache": {"mode": "Shared", "claimName": "c", "storageClassName": "x"}},
        ("no claim is made",),
    ),
    "a policy for nothing": (
        {"model": HF, "cache": {"deletionPolicy": "Retain"}},
        ("cache.deletionPolicy is about a claim that is made",),
    ),
    "prefetch for each": ({"model": HF, "cache": {"prefetch": True}}, ("set cache.mode to Shared",)),
    "a pool without a route": (
        {"model": HF, "expose": {"inferencePool": {"endpointPicker": {"name": "p"}}}},
        ("set expose.gateway too",),
    ),
    "a peer that is nobody": (
        {"model": HF, "expose": {"networkPolicy": {"allowFrom": [{}]}}},
        ("needs namespaceLabels, podLabels or both",),
    ),
    "a host that is none": ({"model": HF, "expose": {"ingress": {"hostname": "http://x"}}}, ("ingress.hostname",)),
    "certificate as an argument": (
        {"model": HF, "engine": {"args": ["--ssl-certfile=/tmp/x"]}},
        ("'--ssl-certfile=/tmp/x'", "remove it"),
    ),
    "store as an argument": ({"model": HF, "engine": {"args": ["--model-store=/tmp"]}}, ("--model-store=/tmp",)),
    "spread": ({"model": HF, "hardware": {"topologySpread": [{"maxSkew": 1}]}}, ("topologyKey", "Required")),
    "restart": ({"model": HF, "restart": {"id": "now!"}}, ("restart.id",)),
    "the node's network": (pod({"hostNetwork": True}), ("hostNetwork is refused",)),
    "the node's processes": (pod({"hostPID": True}), ("hostPID is refused",)),
    "the node's memory": (pod({"hostIPC": True}), ("hostIPC is refused", "sharedMemory")),
    "an account": (pod({"serviceAccountName": "admin"}), ("serviceAccountName is refused",)),
    "a node": (pod({"nodeName": "n1"}), ("nodeName is refused", "nodeSelector")),
    "a path of the node": (
        pod({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}),
        ("the volume 'x' is refused", "emptyDir"),
    ),
    "a secret as files": (pod({"volumes": [{"name": "x", "secret": {"secretName": "s"}}]}), ("secrets", "refused")),
    "two sources": (
        pod({"volumes": [{"name": "x", "emptyDir": {}, "configMap": {"name": "c"}}]}),
        ("exactly one of emptyDir",),
    ),
    "our volume": (pod({"volumes": [{"name": "models", "emptyDir": {}}]}), ("'models' is the operator's",)),
    "a secret as a variable": (
        pod(side(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}])),
        ("secrets are refused here",),
    ),
    "value twice": (
        pod(side(env=[{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}])),
        ("A has a value and a valueFrom",),
    ),
    "privileged": (pod(side(securityContext={"privileged": True})), ("privileged",)),
    "root": (pod(side(securityContext={"runAsUser": 0})), ("runAsUser",)),
    "no image": (pod({"containers": [{"name": "x"}]}), ("the container 'x' needs an image",)),
    "the engine's arguments": (
        pod({"containers": [{"name": "engine", "args": ["--host=::"]}]}),
        ("sets env and volumeMounts only", "engine.args"),
    ),
    "the engine's variables": (
        pod({"containers": [{"name": "engine", "env": [{"name": "HF_TOKEN", "value": "x"}]}]}),
        ("'HF_TOKEN' is the operator's",),
    ),
    "the engine as an init container": (pod({"initContainers": [{"name": "engine"}]}), ("engine's own container",)),
    "the engine's port": (pod(side(ports=[{"containerPort": 8001}])), ("8001 (management)",)),
    "over the keys": (
        pod(side(volumeMounts=[{"name": "x", "mountPath": "/etc/octavo/api-keys"}])),
        ("'/etc/octavo/api-keys' is the operator's",),
    ),
    "above the keys": (pod(side(volumeMounts=[{"name": "x", "mountPath": "/etc"}])), ("'/etc' is the operator's",)),
    "an annotation against AppArmor": (
        {
            "model": HF,
            "podTemplate": {
                "metadata": {"annotations": {"container.apparmor.security.beta.kubernetes.io/engine": "unconfined"}}
            },
        },
        ("loosens",),
    ),
    "revision of a claim": ({"model": PVC | {"revision": "main"}}, ("model.revision is 'main'", "only hf://")),
    "token of a claim": (
        {"model": PVC | {"tokenSecretRef": {"name": "t"}}},
        ("tokenSecretRef names 't'", "only hf://"),
    ),
    "secret's name": ({"model": HF | {"tokenSecretRef": {"name": "T_"}}}, ("tokenSecretRef.name",)),
    "two equal names": ({"model": HF | {"servedNames": ["a", "a"]}}, ("Duplicate value",)),
    "no names": ({"model": HF | {"servedNames": []}}, ("servedNames",)),
    "length 1": ({"model": HF, "engine": {"maxModelLen": 1}}, ("maxModelLen", "greater than or equal to 2")),
    "dtype": ({"model": HF, "engine": {"dtype": "int3"}}, ("dtype", "bfloat16")),
    "block size": ({"model": HF, "engine": {"blockSize": 17}}, ("blockSize", "16", "128")),
    "utilization": ({"model": HF, "engine": {"gpuMemoryUtilization": "90%"}}, ("'90%'", "'0.01' to '1.0'")),
    "utilization 0": ({"model": HF, "engine": {"gpuMemoryUtilization": "0.0"}}, ("'0.0'", "'0.01' to '1.0'")),
    "utilization on a CPU": (
        {"model": HF, "engine": {"gpuMemoryUtilization": "0.9"}, "hardware": {"gpus": 0}},
        ("hardware.gpus is 0", "engine.kvCacheMemory"),
    ),
    "fewer tokens than requests": (
        {"model": HF, "engine": {"maxNumBatchedTokens": 8, "maxNumSeqs": 9}},
        ("maxNumBatchedTokens must be at least engine.maxNumSeqs",),
    ),
    "an amount": ({"model": HF, "engine": {"kvCacheMemory": "4 GB"}}, ("kvCacheMemory",)),
    "a word that is no flag": ({"model": HF, "engine": {"args": ["-x"]}}, ("engine.args has '-x'", "--seed=7")),
    "a value apart": ({"model": HF, "engine": {"args": ["--seed", "7"]}}, ("engine.args has '7'",)),
    "host": ({"model": HF, "engine": {"args": ["--host=::"]}}, ("engine.args has '--host=::'", "remove it")),
    "key": ({"model": HF, "engine": {"args": ["--api_key=x"]}}, ("engine.args has '--api_key=x'", "remove it")),
    "a field's flag": ({"model": HF, "engine": {"args": ["--max-model-len=1"]}}, ("a field of its own",)),
    "a switch's negation": ({"model": HF, "engine": {"args": ["--no-enable-metrics"]}}, ("--no-enable-metrics",)),
    "parallel product": (
        {"model": HF, "engine": {"tensorParallel": 2}, "hardware": {"gpus": 4}},
        ("must be hardware.gpus",),
    ),
    "gpus below 0": ({"model": HF, "hardware": {"gpus": -1}}, ("hardware.gpus", "greater than or equal to 0")),
    "gpus as an amount": (
        {"model": HF, "hardware": {"resources": {"limits": {"nvidia.com/gpu": 1}}}},
        ("asks for nvidia.com/gpu", "hardware.gpus sets"),
    ),
    "other gpus as an amount": (
        {"model": HF, "hardware": {"resourceName": "amd.com/gpu", "resources": {"requests": {"amd.com/gpu": 1}}}},
        ("asks for amd.com/gpu",),
    ),
    "shared memory": ({"model": HF, "hardware": {"sharedMemory": "lots"}}, ("sharedMemory",)),
    "toleration": ({"model": HF, "hardware": {"tolerations": [{"operator": "Like"}]}}, ("Equal", "Exists")),
    "replicas": ({"model": HF, "replicas": -1}, ("replicas",)),
    "stall": ({"model": HF, "lifecycle": {"startupStallSeconds": 0}}, ("startupStallSeconds",)),
    "service port": ({"model": HF, "expose": {"service": {"port": 65536}}}, ("port", "65535")),
    "service type": ({"model": HF, "expose": {"service": {"type": "ExternalName"}}}, ("ClusterIP",)),
    "monitor": ({"model": HF, "observability": {"podMonitor": "Perhaps"}}, ("Auto", "Enabled", "Disabled")),
    "strategy": ({"model": HF, "rollout": {"strategy": "BlueGreen"}}, ("Surge", "InPlace", "Recreate")),
    "an empty question": ({"model": HF, "rollout": {"verify": {"prompt": " "}}}, ("verify.prompt",)),
    "no question": ({"model": HF, "rollout": {"verify": {"expect": "4"}}}, ("verify.prompt", "Required")),
    "question as an argument": (
        {"model": HF, "engine": {"args": ["--verify-prompt=x"]}},
        ("'--verify-prompt=x'", "a field of its own"),
    ),
    "our label": (
        {"model": HF, "podTemplate": {"metadata": {"labels": {"octavo.dev/server": "x"}}}},
        ("'octavo.dev/server'", "choose another name"),
    ),
    "a common label": (
        {"model": HF, "podTemplate": {"metadata": {"labels": {"app.kubernetes.io/name": "x"}}}},
        ("'app.kubernetes.io/name'",),
    ),
}


def server(spec: dict[str, Any], name: str = "x") -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default"}
    return {"apiVersion": "octavo.dev/v1alpha1", "kind": "LLMServer", "metadata": metadata, "spec": spec}


def try_to_create(api: Any, body: dict[str, Any]) -> str | None:
    """The API server's refusal, or None. Nothing is created."""
    path = "/apis/octavo.dev/v1alpha1/namespaces/default/llmservers?dryRun=All&fieldValidation=Strict"
    try:
        api.request("POST", path, body)
    except ApiError as error:
        return error.message
    return None


def test_the_checked_in_crd_is_the_generated_one():
    for path in ("crds/llmserver.yaml", "helm/octavo/files/llmserver.yaml"):
        assert yaml.safe_load((ROOT / path).read_text()) == custom_resource_definition(), "run `make crd`"


def test_the_crd_is_far_below_the_bound_of_client_side_apply():
    # It is kept in an annotation, as JSON without spaces.
    assert len(json.dumps(custom_resource_definition(), separators=(",", ":"))) < 262144 / 2.5


def test_every_field_has_a_description_and_no_type_is_left_open():
    def walk(schema: dict[str, Any], path: str) -> None:
        assert "type" in schema or schema.get("x-kubernetes-int-or-string"), path
        for name, child in schema.get("properties", {}).items():
            described = child.get("description") or path in ("", ".metadata")
            assert described, f"{path}.{name} has no description"
            walk(child, f"{path}.{name}")
        if isinstance(schema.get("items"), dict):
            walk(schema["items"], f"{path}[]")

    (version,) = custom_resource_definition()["spec"]["versions"]
    walk(version["schema"]["openAPIV3Schema"], "")


def test_bounds_are_the_engines_own():
    (version,) = custom_resource_definition()["spec"]["versions"]
    engine = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["engine"]["properties"]
    bounds = {f.name: f.metadata for f in EngineConfig.__dataclass_fields__.values()}

    assert engine["maxNumSeqs"]["maximum"] == bounds["max_num_seqs"]["high"]
    assert engine["maxNumBatchedTokens"]["maximum"] == bounds["max_num_batched_tokens"]["high"]
    assert engine["blockSize"]["enum"] == list(bounds["block_size"]["choices"])
    assert engine["dtype"]["enum"] == list(bounds["dtype"]["choices"])


@pytest.mark.parametrize("spec", GOOD.values(), ids=list(GOOD))
def test_the_parser_takes_a_good_spec(spec):
    found = parse(server(spec), PROFILES)

    assert isinstance(found, Server), found
    assert found.without_effect == ()


@pytest.mark.parametrize(("spec", "words"), WITHOUT_EFFECT.values(), ids=list(WITHOUT_EFFECT))
def test_what_does_nothing_is_refused_in_a_manifest_and_told_of_a_server_that_has_it(spec, words):
    stored = parse(server(spec))

    assert isinstance(stored, Server), "an object of an older version must still be looked after"
    assert words in " ".join(stored.without_effect)
    with pytest.raises(RenderError, match=re.escape(words)):
        render(yaml.safe_dump(server(spec)), EngineDefaults(), pod_monitors_known=False, namespace="default")


def test_a_profiles_name_for_gpus_means_nothing_to_a_server_without_any_and_is_no_mistake():
    found = parse(
        server({"model": HF, "hardware": {"profile": "p", "gpus": 0}}), {"p": {"resourceName": "amd.com/gpu"}}
    )

    assert isinstance(found, Server)
    assert found.without_effect == ()


@pytest.mark.parametrize("spec", [spec for spec, _ in BAD.values()], ids=list(BAD))
def test_the_parser_refuses_a_bad_spec(spec):
    assert not isinstance(parse(server(spec)), Server)


# The API server keeps what it does not know of a pod, and the parser refuses it by its name.
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (pod({"shareProcessNamespace": True}), "shareProcessNamespace: is not among what podTemplate may set"),
        (pod({"imagePullSecrets": [{"name": "x"}]}), "imagePullSecrets: is not among"),
        (pod({"runtimeClassName": "x"}), "runtimeClassName: is not among"),
        (pod(side(envFrom=[{"secretRef": {"name": "s"}}])), "envFrom: is not among"),
        (pod(side(volumeDevices=[])), "volumeDevices: is not among"),
        (pod(side(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}})), "capabilities: is not among"),
        (pod(side(lifecycle={})), "lifecycle: is not among"),
        (pod(side(volumeMounts=[{"name": "y", "mountPath": "/y"}])), "mounts 'y', which is not in"),
        (pod({"containers": [{"name": "x", "image": "i"}], "initContainers": [{"name": "x", "image": "i"}]}), "twice"),
    ],
)
def test_what_only_the_parser_sees_is_refused_by_name(spec, words):
    found = parse(server(spec))

    assert not isinstance(found, Server)
    assert words in " ".join(map(str, found))


@pytest.mark.cluster
@pytest.mark.parametrize("spec", GOOD.values(), ids=list(GOOD))
def test_the_api_server_takes_a_good_spec(api, spec):
    assert try_to_create(api, server(spec)) is None


@pytest.mark.cluster
@pytest.mark.parametrize(("spec", "words"), BAD.values(), ids=list(BAD))
def test_the_api_server_refuses_a_bad_spec_in_these_words(api, spec, words):
    refusal = try_to_create(api, server(spec))

    assert refusal is not None
    assert [word for word in words if word not in refusal] == [], refusal


@pytest.mark.cluster
@pytest.mark.parametrize(("spec", "words"), WITHOUT_EFFECT.values(), ids=list(WITHOUT_EFFECT))
def test_the_api_server_refuses_what_does_nothing(api, spec, words):
    assert words in str(try_to_create(api, server(spec)))


@pytest.mark.cluster
def test_what_was_stored_before_it_was_refused_can_still_be_changed_around_it(api):
    """As after an upgrade: the operator writes the status, people scale, and the field goes with its part."""
    definition = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/llmservers.octavo.dev"
    path = "/apis/octavo.dev/v1alpha1/namespaces/default/llmservers"
    body = server({"model": HF, "replicas": 0, "autoscaling": {"maxReplicas": 2, "idleSeconds": 60}}, "stored")
    ours = custom_resource_definition()
    (version,) = (older := copy.deepcopy(ours))["spec"]["versions"]
    del version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["autoscaling"][
        "x-kubernetes-validations"
    ]
    api.merge(definition, {"spec": older["spec"]})
    try:
        wait_for(lambda: try_to_create(api, body) is None, "the older definition")
        api.request("POST", path, body)
    finally:
        api.merge(definition, {"spec": ours["spec"]})
    try:
        wait_for(lambda: try_to_create(api, server(body["spec"], "other")) is not None, "the definition")

        api.merge(f"{path}/stored", {"spec": {"replicas": 1, "suspend": True}})
        api.merge(f"{path}/stored/scale", {"spec": {"replicas": 2}})
        with pytest.raises(ApiError, match=r"autoscaling\.idleSeconds is for servers that may go to zero"):
            api.merge(f"{path}/stored", {"spec": {"autoscaling": {"maxReplicas": 3}}})
        api.merge(f"{path}/stored", {"spec": {"autoscaling": {"maxReplicas": 3, "idleSeconds": None}}})
    finally:
        api.request("DELETE", f"{path}/stored")


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("name", "taken"), [("a", True), ("a" * NAME_MAX, True), ("a" * (NAME_MAX + 1), False), ("1a", False)]
)
def test_names_are_bounded_by_what_children_add_to_them(api, name, taken):
    refusal = try_to_create(api, server({"model": HF}, name))
    parsed = parse(server({"model": HF}, name))

    assert (refusal is None) is taken
    assert isinstance(parsed, Server) is taken
    assert taken or f"at most {NAME_MAX} characters" in str(refusal)


EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if "kind: LLMServer" in path.read_text()]


@pytest.mark.cluster
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_api_server_takes_the_examples(api, path):
    for document in yaml.safe_load_all(path.read_text()):
        document["metadata"]["namespace"] = "default"
        assert try_to_create(api, document) is None


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"size": "20Gi"}, {"size": "30Gi"}, None),
        ({"size": "20Gi"}, {"size": "20480Mi"}, None),
        ({"size": "20Gi"}, {"size": "10Gi"}, "a claim cannot shrink: it was 20Gi"),
        ({"size": "20Gi", "storageClassName": "a"}, {"size": "20Gi", "storageClassName": "b"}, "cannot change"),
        ({"size": "20Gi"}, {"size": "20Gi", "storageClassName": "b"}, "cannot change"),
        ({"size": "20Gi", "storageClassName": "a"}, {"claimName": "c"}, None),
    ],
)
def test_what_a_claim_cannot_do_is_refused_with_what_it_was(api, before, after, words):
    path = "/apis/octavo.dev/v1alpha1/namespaces/default/llmservers"
    body = server({"model": HF, "cache": {"mode": "Shared", **before}, "replicas": 0}, "claims")
    created = api.request("POST", path, body)
    try:
        created["spec"]["cache"] = {"mode": "Shared", **after}
        refusal = None
        try:
            api.request("PUT", f"{path}/claims?dryRun=All", created)
        except ApiError as error:
            refusal = error.message
    finally:
        api.request("DELETE", f"{path}/claims")

    assert (refusal is None) is (words is None), refusal
    assert words is None or words in str(refusal)


@pytest.mark.cluster
def test_what_its_owner_left_out_stays_out_but_for_replicas(api):
    path = "/apis/octavo.dev/v1alpha1/namespaces/default/llmservers?dryRun=All"
    created = api.request("POST", path, server({"model": HF, "engine": {}}))

    assert created["spec"] == {"model": HF, "engine": {}, "replicas": 1}
