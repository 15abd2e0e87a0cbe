"""Prints the objects that the operator would apply for manifests. Called by `octavo-operator render`; no cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from octavo_operator import hostnames, names
from octavo_operator.desired import objects
from octavo_operator.settings import EngineDefaults
from octavo_operator.spec import Server, parse


class RenderError(Exception):
    """Names the document and what is wrong with it."""


def render(text: str, defaults: EngineDefaults, *, pod_monitors_known: bool, namespace: str) -> str:
    """YAML of all children of every LLMServer in `text`; other documents in it are skipped."""
    found = [
        child
        for server in manifests(text, namespace, defaults)
        for child in objects(server, defaults, pod_monitors_known=pod_monitors_known)
    ]
    if not found:
        raise RenderError(f"there is no {names.KIND} of {names.API_VERSION} in it")
    return yaml.safe_dump_all(found, sort_keys=False, width=120)


def manifests(text: str, namespace: str, defaults: EngineDefaults) -> Iterator[Server]:
    """Every LLMServer in `text`. Raises RenderError."""
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise RenderError(f"not YAML: {error}") from error
    for document in documents:
        if not isinstance(document, dict) or document.get("kind") != names.KIND:
            continue
        if document.get("apiVersion") != names.API_VERSION:
            raise RenderError(f"apiVersion is {document.get('apiVersion')!r}, expected {names.API_VERSION}")
        metadata: dict[str, Any] = document.get("metadata") or {}
        if not metadata.get("name"):
            raise RenderError(f"an {names.KIND} has no metadata.name")
        given = {"namespace": namespace} | metadata | {"name": str(metadata["name"])}
        server = parse({**document, "metadata": given}, defaults.profiles)
        if not isinstance(server, Server):
            raise RenderError("; ".join(f"{metadata['name']}: {problem}" for problem in server))
        if why := hostnames.refusal(server.spec.expose, defaults.hostnames, server.namespace):
            raise RenderError(f"{metadata['name']}: {why}")
        if server.without_effect:
            raise RenderError("; ".join(f"{metadata['name']}: {sentence}" for sentence in server.without_effect))
        yield server
