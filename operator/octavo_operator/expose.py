"""How clients reach the API, and who may: spec.expose."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from octavo_operator.fields import DNS_LABEL, DNS_SUBDOMAIN, SECRET_KEY, Part, config, rule, without_effect
from octavo_operator.model import SecretRef

HOSTNAME = r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
Hostname = Annotated[str, Field(pattern=HOSTNAME, max_length=253)]
Labels = dict[str, Annotated[str, Field(max_length=63)]]


class ApiKeysSecretRef(SecretRef):
    key: str = Field(
        "keys",
        pattern=SECRET_KEY,
        max_length=253,
        description="Key in the Secret whose value has one API key a line. Default: keys.",
    )


class Service(Part):
    port: int = Field(80, ge=1, le=65535, description="Port of the Service. Default: 80.")
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        "ClusterIP",
        description="Type of the Service. Set apiKeysSecretRef before choosing another. Default: ClusterIP.",
    )


class Ingress(Part):
    """An Ingress of its own. Its annotations (timeouts, certificates) are the operator's setting, not the server's:
    in some controllers they are code."""

    hostname: Hostname = Field(description="Name by which clients ask: llm.example.com.")
    class_name: str | None = Field(
        None, pattern=DNS_SUBDOMAIN, max_length=253, description="IngressClass. Default: the cluster's."
    )
    tls_secret_name: str | None = Field(
        None,
        pattern=DNS_SUBDOMAIN,
        max_length=253,
        description="Secret with the name's certificate, in this namespace; the ingress controller reads it. Default: "
        "no TLS.",
    )


class ParentRef(Part):
    name: str = Field(pattern=DNS_SUBDOMAIN, max_length=253, description="Name of a Gateway.")
    namespace: str | None = Field(
        None,
        pattern=DNS_LABEL,
        max_length=63,
        description="Its namespace; the Gateway's allowedRoutes say whether it takes the route. Default: this one.",
    )
    section_name: str | None = Field(
        None, pattern=DNS_SUBDOMAIN, max_length=253, description="One of its listeners. Default: all that fit."
    )


class Gateway(Part):
    """An HTTPRoute of the Gateway API."""

    parent_refs: list[ParentRef] = Field(min_length=1, max_length=16, description="Gateways that it is attached to.")
    hostnames: list[Hostname] | None = Field(
        None, max_length=16, description="Names by which clients ask. Default: the Gateway's."
    )
    request_timeout: Literal["None", "Gateway"] = Field(
        "None",
        description="None: the route says that a request may take as long as it takes, as gateways cut long answers "
        "off (those made of Envoy after 15 s). Gateway: the route says nothing, for a gateway that takes no timeouts "
        "in routes, such as GKE's. Default: None.",
    )


class EndpointPicker(Part):
    name: str = Field(pattern=DNS_LABEL, max_length=63, description="Service of the picker, in this namespace.")
    port: int = Field(9002, ge=1, le=65535, description="Its port. Default: 9002.")
    failure_mode: Literal["FailOpen", "FailClose"] = Field(
        "FailOpen", description="FailOpen sends requests to any pod while it does not answer. Default: FailOpen."
    )


class InferencePool(Part):
    """An InferencePool of the Gateway API's inference extension: its picker chooses the pod by load and prefix."""

    endpoint_picker: EndpointPicker = Field(description="Who chooses the pod.")


class Peer(Part):
    model_config = config(
        rule(
            "has(self.namespaceLabels) || has(self.podLabels)",
            "'a peer of expose.networkPolicy.allowFrom needs namespaceLabels, podLabels or both'",
        )
    )
    namespace_labels: Labels | None = Field(
        None, max_length=16, description="Labels of their namespace; {} means every namespace. Default: this one."
    )
    pod_labels: Labels | None = Field(None, max_length=16, description="Labels of the pods. Default: all of them.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.namespace_labels is None and self.pod_labels is None:
            raise ValueError("a peer of expose.networkPolicy.allowFrom needs namespaceLabels, podLabels or both")
        return self


_EMPTY = "is empty, and names nobody: name a peer, or remove it, which means"
_NO_CLIENTS = f"expose.networkPolicy.allowFrom {_EMPTY} all pods of this namespace"
_NO_SCRAPERS = f"expose.networkPolicy.allowMetricsFrom {_EMPTY} every namespace"


class NetworkPolicy(Part):
    """Where it is set, only these reach the pods, and the server at the activator while it sleeps; the operator reaches
    their management port in any case."""

    model_config = config(
        rule("!has(self.allowFrom) || size(self.allowFrom) > 0", f"'{_NO_CLIENTS}'", field_path=".allowFrom"),
        rule(
            "!has(self.allowMetricsFrom) || size(self.allowMetricsFrom) > 0",
            f"'{_NO_SCRAPERS}'",
            field_path=".allowMetricsFrom",
        ),
    )
    allow_from: list[Peer] | None = Field(
        None,
        max_length=16,
        description="Who may ask the API; name an ingress controller's or gateway's namespace here. Default: all pods "
        "of this namespace.",
    )
    allow_metrics_from: list[Peer] | None = Field(
        None, max_length=16, description="Who may read metrics. Default: every namespace, for Prometheus to scrape."
    )
    egress: Literal["Auto", "All"] = Field(
        "Auto",
        description="Auto: a pod that has its model on a disk reaches nothing, one that downloads it, everything. "
        "All: everything, for sidecars that need it. Default: Auto.",
    )

    @model_validator(mode="after")
    def _has_effect(self, info: ValidationInfo) -> Self:
        if self.allow_from == []:
            without_effect(info, _NO_CLIENTS)
        if self.allow_metrics_from == []:
            without_effect(info, _NO_SCRAPERS)
        return self


class Tls(Part):
    secret_name: str = Field(
        pattern=DNS_SUBDOMAIN,
        max_length=253,
        description="Secret of type kubernetes.io/tls in this namespace. It is mounted; a renewed one is taken at "
        "once. An ingress controller or gateway in front must be told to speak HTTPS to the pods: by the Helm value "
        "engine.ingressAnnotations, or by a BackendTLSPolicy of the Service.",
    )


class Expose(Part):
    """How clients reach the API."""

    model_config = config(
        rule(
            "!has(self.inferencePool) || has(self.gateway)",
            "'expose.inferencePool is used by an HTTPRoute: set expose.gateway too'",
            field_path=".inferencePool",
        )
    )
    service: Service = Field(Service(), description="The Service in front of the pods.")
    api_keys_secret_ref: ApiKeysSecretRef | None = Field(
        None,
        description="Secret with the API keys that clients must send one of. It is mounted as a file, which the engine "
        "reads again when it changes. Default: no key is asked for.",
    )
    tls: Tls | None = Field(
        None, description="HTTPS at the pods themselves, and so at the Service. Default: none, HTTP inside the cluster."
    )
    ingress: Ingress | None = Field(None, description="An Ingress. Default: none.")
    gateway: Gateway | None = Field(None, description="An HTTPRoute of the Gateway API. Default: none.")
    inference_pool: InferencePool | None = Field(
        None, description="An InferencePool behind the HTTPRoute, instead of the Service. Default: none."
    )
    network_policy: NetworkPolicy | None = Field(
        None, description="A NetworkPolicy of the pods; the cluster's network must enforce it. Default: none."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.inference_pool is not None and self.gateway is None:
            raise ValueError("expose.inferencePool is used by an HTTPRoute: set expose.gateway too")
        return self
