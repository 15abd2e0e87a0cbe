"""The only file that talks to the API server: reads, server-side applies and deletes plain documents.

Every error becomes one of two things. A write that the API server understood and refused (quota, admission, a schema,
a name that somebody else has) is a `Refusal`, for the resource's status. Everything else (no answer, overload, missing
rights) is `UnavailableError`: the caller looks again later.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiException
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.dynamic import DynamicClient

from octavo_operator import names

Document = dict[str, Any]
REQUEST_TIMEOUT_S = 15.0
CONNECTIONS = 32
PAGE = 500
"""Objects in one answer to a list: bounds the memory that a cluster with thousands of servers takes for a moment."""


METHODS = {"apply": "patch", "scale": "patch", "create": "post", "replace": "put", "delete": "delete"}


@dataclass(frozen=True)
class Kind:
    """Where the API server keeps a kind. Known here, not discovered: the client's discovery would read every API group
    at start, and keep a cache in a file that another cluster at the same address would find."""

    group_version: str
    plural: str

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        prefix = "/api" if self.group_version == "v1" else "/apis"
        scope = f"/namespaces/{quote(namespace)}" if namespace else ""
        tail = "".join(f"/{quote(part)}" for part in (name, subresource) if part)
        return f"{prefix}/{self.group_version}{scope}/{self.plural}{tail}"


KINDS = {
    names.KIND: Kind(names.API_VERSION, names.PLURAL),
    "Deployment": Kind("apps/v1", "deployments"),
    "ReplicaSet": Kind("apps/v1", "replicasets"),
    "Service": Kind("v1", "services"),
    "PodDisruptionBudget": Kind("policy/v1", "poddisruptionbudgets"),
    "PodMonitor": Kind("monitoring.coreos.com/v1", "podmonitors"),
    "PrometheusRule": Kind("monitoring.coreos.com/v1", "prometheusrules"),
    "Prometheus": Kind("monitoring.coreos.com/v1", "prometheuses"),
    "PrometheusAgent": Kind("monitoring.coreos.com/v1alpha1", "prometheusagents"),
    "Job": Kind("batch/v1", "jobs"),
    "PersistentVolumeClaim": Kind("v1", "persistentvolumeclaims"),
    "Ingress": Kind("networking.k8s.io/v1", "ingresses"),
    "EndpointSlice": Kind("discovery.k8s.io/v1", "endpointslices"),
    "NetworkPolicy": Kind("networking.k8s.io/v1", "networkpolicies"),
    "HTTPRoute": Kind("gateway.networking.k8s.io/v1", "httproutes"),
    "InferencePool": Kind("inference.networking.k8s.io/v1", "inferencepools"),
    "Pod": Kind("v1", "pods"),
    "HorizontalPodAutoscaler": Kind("autoscaling/v2", "horizontalpodautoscalers"),
    "ScaledObject": Kind("keda.sh/v1alpha1", "scaledobjects"),
    # What only `octavo-operator doctor` reads.
    "CustomResourceDefinition": Kind("apiextensions.k8s.io/v1", "customresourcedefinitions"),
    "Node": Kind("v1", "nodes"),
    "StorageClass": Kind("storage.k8s.io/v1", "storageclasses"),
    "Version": Kind("v1", "version"),
    "Event": Kind("v1", "events"),
    "Lease": Kind("coordination.k8s.io/v1", "leases"),
}


class UnavailableError(Exception):
    """The API server did not do what was asked, for a reason that time or an administrator mends."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
        """Of its answer; 0 where none came."""


@dataclass(frozen=True)
class Refusal:
    """A write that the API server understood and refused. The sentence is its own."""

    status: int
    message: str


Observer = Callable[[str, str, int], None]
"""Told of each answer: verb, kind and HTTP status (0: none came)."""


class Cluster:
    def __init__(self, api: ApiClient, observer: Observer) -> None:
        self._api = api
        self._client = DynamicClient(api)
        self._observer = observer

    @classmethod
    async def connect(cls, observer: Observer = lambda verb, kind, status: None) -> Cluster:
        """By KUBECONFIG where that is set, else as the pod's service account, else by ~/.kube/config."""
        configuration = Configuration()
        try:
            if os.environ.get("KUBECONFIG") or not os.environ.get("KUBERNETES_SERVICE_HOST"):
                await config.load_kube_config(client_configuration=configuration)
            else:
                config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException as error:
            raise UnavailableError(f"no way to the API server: {error}") from error
        configuration.connection_pool_maxsize = CONNECTIONS
        # The client would read the user's netrc for each request: asked for only where there is a proxy to find.
        proxied = any(name.lower() in ("https_proxy", "http_proxy", "all_proxy") for name in os.environ)
        configuration.client_session_kwargs = {"trust_env": proxied}
        return cls(ApiClient(configuration), observer)

    async def close(self) -> None:
        await self._api.close()

    async def get(self, kind: str, namespace: str | None, name: str) -> Document | None:
        """The object, or None where there is none (also when its kind does not exist)."""
        answer = await self._request("get", kind, KINDS[kind].path(namespace, name))
        return _or_none(answer)

    async def list(
        self, kind: str, namespace: str | None = None, *, labels: str | None = None, fields: str | None = None
    ) -> list[Document]:
        return [document async for page, _ in self.pages(kind, namespace, labels, fields) for document in page]

    async def pages(
        self,
        kind: str,
        namespace: str | None = None,
        labels: str | None = None,
        fields: str | None = None,
        *,
        only_metadata: bool = False,
    ) -> AsyncIterator[tuple[Sequence[Document], int]]:
        """A list page by page, each with the version that the whole list is of."""
        page: str | None = None
        accept = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io" if only_metadata else None
        while True:
            query = {"labelSelector": labels, "fieldSelector": fields, "limit": str(PAGE), "continue": page}
            answer = await self._request("list", kind, KINDS[kind].path(namespace), query=query, accept=accept)
            if isinstance(answer, Refusal):
                raise UnavailableError(f"list {KINDS[kind].plural}: {answer.message}")
            yield answer.get("items") or [], int(answer.get("metadata", {}).get("resourceVersion") or 0)
            page = answer.get("metadata", {}).get("continue")
            if not page:
                return

    async def knows(self, kind: str) -> bool:
        """Whether the cluster has the kind, as for those that another project's CRD brings."""
        answer = await self._request("discover", kind, f"/apis/{KINDS[kind].group_version}")
        document = _or_none(answer) or {}
        return any(resource["name"] == KINDS[kind].plural for resource in document.get("resources", []))

    async def version(self) -> dict[str, str]:
        """Of the API server: major, minor, gitVersion."""
        answer = await self._request("get", "Version", "/version")
        if isinstance(answer, Refusal):
            raise UnavailableError(answer.message)
        return answer

    async def apply(
        self, body: Document, *, force: bool = True, subresource: str = "", dry_run: bool = False
    ) -> Document | Refusal:
        """Server-side apply under our one name: fields that are no longer in `body` and were ours are removed.

        force takes fields over from whoever has set them; without it that is a Refusal with status 409.
        """
        metadata = body["metadata"]
        path = KINDS[body["kind"]].path(metadata["namespace"], metadata["name"], subresource)
        query = {"fieldManager": names.FIELD_MANAGER, "force": str(force).lower()}
        if dry_run:
            query["dryRun"] = "All"
        return await self._request(
            "apply", body["kind"], path, body=body, query=query, content_type="application/apply-patch+yaml"
        )

    async def scale(self, document: Document, replicas: int) -> Document | Refusal:
        """Sets spec.replicas by the scale subresource, unless somebody has changed the object since it was read."""
        kind, metadata = document["kind"], document["metadata"]
        path = KINDS[kind].path(metadata["namespace"], metadata["name"], "scale")
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "spec": {"replicas": replicas}}
        content = "application/merge-patch+json"
        return await self._request("scale", kind, path, body=body, content_type=content)

    async def create(self, body: Document) -> Document | Refusal:
        path = KINDS[body["kind"]].path(body["metadata"]["namespace"])
        return await self._request("create", body["kind"], path, body=body)

    async def replace(self, body: Document) -> Document | Refusal:
        """Writes the object if it is still at the resourceVersion in `body`; else a Refusal with status 409."""
        path = KINDS[body["kind"]].path(body["metadata"]["namespace"], body["metadata"]["name"])
        return await self._request("replace", body["kind"], path, body=body)

    async def delete(self, body: Document) -> Refusal | None:
        """Deletes exactly this object: one of the same name that came after it stays. Gone already is fine too."""
        metadata = body["metadata"]
        path = KINDS[body["kind"]].path(metadata["namespace"], metadata["name"])
        options = {"propagationPolicy": "Background", "preconditions": {"uid": metadata["uid"]}}
        answer = await self._request("delete", body["kind"], path, body=options)
        return answer if isinstance(answer, Refusal) and answer.status != 404 else None

    async def _request(
        self,
        verb: str,
        kind: str,
        path: str,
        *,
        body: Document | None = None,
        query: Mapping[str, str | None] | None = None,
        content_type: str = "application/json",
        accept: str | None = None,
    ) -> Document | Refusal:
        method = {"apply": "patch", "scale": "patch", "create": "post", "replace": "put", "delete": "delete"}.get(
            verb, "get"
        )
        try:
            answer: Document = await self._client.request(
                method,
                path,
                body=body,
                query_params=[(name, value) for name, value in (query or {}).items() if value is not None],
                content_type=content_type,
                header_params={"Accept": accept} if accept else {},
                serializer=lambda _, document: document,
                _request_timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
            )
        except ApiException as error:
            self._observer(verb, kind, error.status or 0)
            message = _message(error)
            reads = method == "get"
            if error.status in (404, 409, 422) or (error.status in (400, 403, 405, 413) and not reads):
                return Refusal(error.status, message)
            raise UnavailableError(f"{verb} {KINDS[kind].plural}: {message}", error.status or 0) from error
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._observer(verb, kind, 0)
            raise UnavailableError(f"{verb} {KINDS[kind].plural}: {type(error).__name__} {error}".rstrip()) from error
        self._observer(verb, kind, 200)
        return answer


def _or_none(answer: Document | Refusal) -> Document | None:
    if not isinstance(answer, Refusal):
        return answer
    if answer.status == 404:
        return None
    raise UnavailableError(answer.message)


def _message(error: ApiException) -> str:
    """The API server's own sentence, from the Status object that it answers with."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or "")
    try:
        message = json.loads(body)["message"]
    except (ValueError, KeyError, TypeError):
        message = body
    return str(message).strip()[:1000] or f"{error.status} {error.reason}"
