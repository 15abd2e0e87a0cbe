"""Generate the CustomResourceDefinition from the models in spec.py and report.py. Called by `octavo-operator crd`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from octavo_operator import names
from octavo_operator.report import Status
from octavo_operator.spec import NAME_MAX, SERVER_SIDE_DEFAULT, Spec

_COLUMNS = (
    # name, type, path, priority (1: only with -o wide)
    ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status', 0),
    ("Phase", "string", ".status.phase", 0),
    ("Model", "string", ".spec.model.source", 0),
    ("Replicas", "string", ".status.ready", 0),
    ("GPUs", "integer", ".status.gpus", 1),
    ("URL", "string", ".status.url", 1),
    ("Message", "string", ".status.message", 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)
# Pydantic writes these for its own purposes; a structural schema must not have them. `additionalProperties: false` is
# among them: the API server prunes unknown fields, and kubectl names them.
_DROPPED = ("title", "default", "discriminator")


def custom_resource_definition() -> dict[str, Any]:
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": "llmserver",
                "shortNames": ["llm"],
                "categories": ["ai"],
            },
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, "priority": priority}
                        for name, kind, path, priority in _COLUMNS
                    ],
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def _root() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "A large language model, served by Octavo's engine behind the OpenAI API.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            # The bound is for the cost that the API server estimates of the rule below.
            "metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 63}}},
            "spec": schema_of(Spec),
            "status": schema_of(Status),
        },
        "x-kubernetes-validations": [
            {
                "rule": f"size(self.metadata.name) <= {NAME_MAX} && "
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "messageExpression": '"metadata.name is \'" + self.metadata.name + "\', expected at most '
                f'{NAME_MAX} characters of a-z, 0-9 and -, beginning with a letter: it names the Service too"',
            }
        ],
    }


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The model's structural schema: without references, nulls and defaults, each field with its description."""
    document = model.model_json_schema(by_alias=True)
    definitions = document.pop("$defs", {})
    schema = _structural(document, definitions)
    assert isinstance(schema, dict)
    return schema


def _structural(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_structural(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    options = node.get("anyOf", [])
    if {"type": "null"} in options:
        # `T | None`: absent is how a resource says none.
        (option,) = [option for option in options if option != {"type": "null"}]
        return _structural({**option, **{k: v for k, v in node.items() if k != "anyOf"}}, definitions)
    if node.get("x-kubernetes-int-or-string"):
        node = {key: value for key, value in node.items() if key != "anyOf"}
    kept: dict[str, Any] = {}
    for key, value in node.items():
        if key in _DROPPED or (key == "additionalProperties" and value is False):
            continue
        if key == "const":
            kept["enum"] = [value]
        elif key == SERVER_SIDE_DEFAULT:
            kept["default"] = value
        elif key == "properties":
            kept[key] = {name: _structural(child, definitions) for name, child in value.items()}
        else:
            kept[key] = _structural(value, definitions)
    # What a reader looks for first comes first.
    order = ("description", "type", "required")
    return {key: kept[key] for key in (*(k for k in order if k in kept), *(k for k in kept if k not in order))}
