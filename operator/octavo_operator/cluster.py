"""The only file that talks to the API server: reads, server-side applies and deletes plain documents.

Every error becomes one of two things. A write that the API server understood and refused (quota, admission, a schema,
a name that somebody else has) is a `Refusal`, for the resource's status. Everything else (no answer, overload, missing
rights) is `UnavailableError`: the caller looks again later. An API server that says when to come again (429 or 5xx
with Retry-After) is asked again then; where that is too far away, the error carries it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from octavo_engine import __version__
from octavo_operator import names

Document = dict[str, Any]
REQUEST_TIMEOUT_S = 15.0
PATIENCE_S = 10.0
"""How long one request may wait, in all, for an API server that asks to be asked later."""
RETRY_AFTER_MAX_S = 60.0
CONNECTIONS = 32
USER_AGENT = f"octavo-operator/{__version__}"
PAGE = 500
"""Objects in one answer to a list: bounds the memory that a cluster with thousands of servers takes for a moment."""


METHODS = {"apply": "PATCH", "scale": "PATCH", "create": "POST", "replace": "PUT", "delete": "DELETE"}
"""Of verbs that write; the others read."""


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

    def __init__(self, message: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        """Of its answer; 0 where none came."""
        self.retry_after_s = retry_after_s
        """It is not to be asked again before."""


@dataclass(frozen=True)
class Refusal:
    """A write that the API server understood and refused. The sentence is its own."""

    status: int
    message: str


T = TypeVar("T")
Observer = Callable[[str, str, int], None]
"""Told of each answer: verb, kind and HTTP status (0: none came)."""


class Cluster:
    def __init__(
        self, api: ApiClient, observer: Observer, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._api, self._observer, self._sleep = api, observer, sleep

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
            hint = "name a kubeconfig that works in KUBECONFIG, or run this in a pod"
            raise UnavailableError(f"no way to the API server: {error}. Fix: {hint}") from error
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

    async def apply_new(self, body: Document) -> Document | Refusal:
        """Like apply, where nothing of that name is: a Refusal with status 409 where something is, whoever made it.

        For an object that is there, a version that it has long left behind is a conflict; for one that is made, the
        API server takes no notice of it. That saves to look first.
        """
        metadata = body["metadata"]
        path = KINDS[body["kind"]].path(metadata["namespace"], metadata["name"])
        query = {"fieldManager": names.FIELD_MANAGER, "force": "false"}
        body = {**body, "metadata": {**metadata, "resourceVersion": "1"}}
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
        method, waited = METHODS.get(verb, "GET"), 0.0
        given = [(name, value) for name, value in (query or {}).items() if value is not None]
        target = f"{path}?{urlencode(given)}" if given else path
        headers = {"Content-Type": content_type, "Accept": accept or "application/json", "User-Agent": USER_AGENT}
        while True:
            try:
                status, content, retry_after = await self._exchange(method, target, headers, body)
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                self._observer(verb, kind, 0)
                what = f"{verb} {KINDS[kind].plural}: {type(error).__name__} {error}".rstrip()
                raise UnavailableError(what) from error
            self._observer(verb, kind, 200 if status < 300 else status)
            if status < 300:
                answer: Document = json.loads(content)
                return answer
            message = _message(status, content)
            if status in (404, 409, 422) or (status in (400, 403, 405, 413) and method != "GET"):
                return Refusal(status, message)
            if retry_after is None or waited + retry_after > PATIENCE_S:
                raise UnavailableError(f"{verb} {KINDS[kind].plural}: {message}", status, retry_after or 0.0)
            # Nothing was done yet, or what can be done twice. A little later, as the others were told the same.
            pause = retry_after * (1 + random.random() / 4)
            waited += pause
            await self._sleep(pause)

    async def _exchange(
        self, method: str, target: str, headers: dict[str, str], body: Document | None
    ) -> tuple[int, bytes, float | None]:
        """Status, content, and after how many seconds to come again where the API server says so."""
        # Below the client's models and its dynamic client, which copy a document twice and cost as much as all else.
        headers = dict(headers)
        await self._api.update_params_for_auth(headers, [], ["BearerToken"], target, method, body)
        answer = await self._api.call_api(
            method,
            self._api.configuration.host + target,
            headers,
            body,
            _request_timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
        )
        content: bytes = await answer.read()
        return answer.status, content, _retry_after(answer.status, answer.headers)


async def together(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of these find, asked at once. When one fails, the others are ended before its error is raised.

    They would go on otherwise, and ask a busy API server again beside those that are asked after the error.
    """
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _retry_after(status: int, headers: Mapping[str, str]) -> float | None:
    """None where the API server does not ask for it. As Kubernetes' own clients take it: on 429 and on 5xx."""
    text = headers.get("Retry-After")
    if status != 429 and (status < 500 or text is None):
        return None
    # Seconds. The standard has dates too, which the API server does not send.
    seconds = float(text) if text is not None and text.isdigit() else 1.0
    return min(max(seconds, 1.0), RETRY_AFTER_MAX_S)


def _or_none(answer: Document | Refusal) -> Document | None:
    if not isinstance(answer, Refusal):
        return answer
    if answer.status == 404:
        return None
    raise UnavailableError(answer.message)


def _message(status: int, content: bytes) -> str:
    """The API server's own sentence, from the Status object that it answers with."""
    text = content.decode(errors="replace")
    try:
        message = json.loads(text)["message"]
    except (ValueError, KeyError, TypeError):
        message = text
    return str(message).strip()[:1000] or f"HTTP {status}"
